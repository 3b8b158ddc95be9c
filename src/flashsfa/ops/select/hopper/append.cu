// Codes keys and stores them and their values in a cache's buffers: a block per token of a head, one warp of which has the key and one the
// value. Entry d of a row is entry d / 32 of lane d % 32. Where the newest tokens are kept as they come, what is coded is those that leave
// them, and new ones take other slots.

constexpr int LANES = 32;
constexpr int KEY_ENTRIES = (HEAD_DIM + LANES - 1) / LANES, VALUE_ENTRIES = (VALUE_DIM + LANES - 1) / LANES;  // of a lane

DEVICE float number(u16 x) { return IS_BF16 ? from_bf16(x) : from_half(x); }

// The larger one, NaN if there is one: its row must not be read as numbers.
DEVICE float larger(float x, float y) { return x > y || x != x ? x : y; }

// The scale of a row in 8 bits, from the largest magnitude of each lane.
DEVICE float scale_of(float largest) {
#pragma unroll
  for (int bits = LANES / 2; bits; bits /= 2) largest = larger(largest, from_lane_xor(largest, bits));
  return largest / 127;
}

// Entry `i` of a row, `x`, in 8 bits to the nearest level, of two the even one.
DEVICE void store(void* row, int i, u16 x, float scale) {
  if constexpr (IS_8_BIT) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: what is added to it has no digits behind the point
    static_cast<u8*>(row)[i] = u8(int((number(x) / (scale > 0 ? scale : 1.0f) + shift) - shift));
  } else {
    static_cast<u16*>(row)[i] = x;
  }
}

DEVICE void* row_of(void* buffer, i64 row, int width) {
  return static_cast<u8*>(buffer) + row * width * (IS_8_BIT ? 1 : 2);
}

DEVICE void append_key(const Params& p, const u16* k, i64 row) {
  const int lane = lane_id();
  const u32 before = (1u << lane) - 1;  // lanes
  u16 x[KEY_ENTRIES];
  int magnitude[KEY_ENTRIES];  // -1 of what is in the dense channel, or no entry
#pragma unroll
  for (int i = 0; i < KEY_ENTRIES; ++i) {
    const int d = i * LANES + lane;
    x[i] = d < HEAD_DIM ? k[d] : u16(0);
    magnitude[i] = d >= DENSE_DIMS && d < HEAD_DIM ? x[i] & 0x7fff : -1;
  }
  bool is_kept[KEY_ENTRIES];
  find_largest(is_kept, magnitude, KEPT);
  int kept = 0, slot[KEY_ENTRIES];  // entries kept so far; -1 for none
#pragma unroll
  for (int i = 0; i < KEY_ENTRIES; ++i) {
    const u32 all = ballot(is_kept[i]);
    slot[i] = is_kept[i] ? kept + count_bits(all & before) : -1;
    kept += count_bits(all);
  }
  float scale = 1;
  if constexpr (IS_8_BIT) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < KEY_ENTRIES; ++i)
      if (i * LANES + lane < DENSE_DIMS || slot[i] >= 0) largest = larger(largest, fabsf(number(x[i])));
    scale = scale_of(largest);
    if (lane == 0) p.scale[row] = scale;
  }
  void *dense = row_of(p.dense, row, DENSE_DIMS), *values = row_of(p.values, row, KEPT);
#pragma unroll
  for (int i = 0; i < KEY_ENTRIES; ++i) {
    const int d = i * LANES + lane;
    if (d < DENSE_DIMS) store(dense, d, x[i], scale);
    if (slot[i] < 0) continue;
    store(values, slot[i], x[i], scale);
    p.indices[row * KEPT + slot[i]] = u8(d - DENSE_DIMS);
  }
}

DEVICE void append_value(const Params& p, const u16* v, i64 row) {
  const int lane = lane_id();
  u16 x[VALUE_ENTRIES];
#pragma unroll
  for (int i = 0; i < VALUE_ENTRIES; ++i) x[i] = i * LANES + lane < VALUE_DIM ? v[i * LANES + lane] : u16(0);
  float scale = 1;
  if constexpr (IS_8_BIT) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < VALUE_ENTRIES; ++i)
      if (i * LANES + lane < VALUE_DIM) largest = larger(largest, fabsf(number(x[i])));
    scale = scale_of(largest);
    if (lane == 0) p.v_scale[row] = scale;
  }
  void* stored = row_of(p.stored_v, row, VALUE_DIM);
#pragma unroll
  for (int i = 0; i < VALUE_ENTRIES; ++i)
    if (i * LANES + lane < VALUE_DIM) store(stored, i * LANES + lane, x[i], scale);
}

// A row as it is.
template <int WIDTH>
DEVICE void keep(u16* kept, const u16* row) {
#pragma unroll
  for (int d = lane_id(); d < WIDTH; d += LANES) kept[d] = row[d];
}

extern "C" __global__ void __launch_bounds__(THREADS) append_kernel(const __grid_constant__ Params p) {
  const int batch_head = blockIdx.y;
  const i64 token = blockIdx.x, batch = batch_head / p.heads, head = batch_head % p.heads;
  const i64 row = i64(batch_head) * p.capacity + p.start + token;
  const bool has_key = threadIdx.x < LANES;
  const u16* k = p.k + batch * p.k_batch + head * p.k_head + token * p.k_token;
  const u16* v = p.v + batch * p.v_batch + head * p.v_head + token * p.v_token;
  if constexpr (HAS_RECENT) {
    const i64 slot = i64(batch_head) * p.recent_capacity + token, oldest = slot + p.oldest, newest = slot + p.newest;
    if (has_key)
      keep<HEAD_DIM>(p.recent_k + newest * HEAD_DIM, k);
    else
      keep<VALUE_DIM>(p.recent_v + newest * VALUE_DIM, v);
    if (token >= p.leaving) return;
    k = p.recent_k + oldest * HEAD_DIM;
    v = p.recent_v + oldest * VALUE_DIM;
  }
  if (has_key)
    append_key(p, k, row);
  else
    append_value(p, v, row);
}

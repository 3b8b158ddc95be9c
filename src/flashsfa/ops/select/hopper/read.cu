// Spreads what lies at slots of pools of pages into rows, with zeros for features of a key that were not kept. What `append_kernel` reads as k and v
// is written here. Keys in bits per axis are left to PyTorch.
#if IS_PAGED && !AXIS_BYTES

DEVICE u16 stored(float x) { return IS_BF16 ? to_bf16(x) : to_half(x); }

// Entry `i` of a part in so many bits, in steps of its scale.
template <int BITS>
DEVICE float steps_of(const void* part, int i) {
  const u8* const bytes = static_cast<const u8*>(part);
  if constexpr (BITS == 16) return number(static_cast<const u16*>(part)[i]);
  if constexpr (BITS == 8) return static_cast<signed char>(bytes[i]);
  return float(bytes[i / 2] >> i % 2 * 4 & 15) - 7.5f;
}

DEVICE int packed_index(const u8* indices, int i) {
  const int from = i * INDEX_BITS, shift = from % 8;
  u32 x = indices[from / 8];
  if (shift + INDEX_BITS > 8) x |= u32(indices[from / 8 + 1]) << 8;
  return x >> shift & (1u << INDEX_BITS) - 1;
}

// The key of features at `row`. `memory` holds it until all lanes have put their entries there.
DEVICE void spread_features(const Params& p, i64 row, u16* k, u16* memory) {
  const int lane = lane_id();
  float dense_scale = 1, kept_scale = 1;
  if constexpr (SHARES_SCALE) {
    dense_scale = kept_scale = static_cast<const float*>(p.scale)[row];
  } else {
    if constexpr (DENSE_BITS == 8 && DENSE_DIMS) dense_scale = from_bf16(static_cast<const u16*>(p.scale)[row]);
    if constexpr (KEPT_BITS < 16) kept_scale = from_bf16(p.value_scale[row]);
  }
  const u8* const dense = row_of(p.dense, row, DENSE_DIMS * DENSE_BITS / 8);
  const u8* const values = row_of(p.values, row, (KEPT * KEPT_BITS + 7) / 8);
  for (int d = lane; d < HEAD_DIM; d += LANES) memory[d] = d < DENSE_DIMS ? stored(steps_of<DENSE_BITS>(dense, d) * dense_scale) : u16(0);
  sync_warp();
  const auto put = [&](int i, int place) { memory[DENSE_DIMS + place] = stored(steps_of<KEPT_BITS>(values, i) * kept_scale); };
  if constexpr (IS_BITMAP) {
    const u8* const bits = row_of(p.indices, row, (SPARSE_DIMS + 7) / 8);
    for (int first = 0, kept = 0; first < SPARSE_DIMS; first += LANES) {
      const int place = first + lane;
      const bool is_kept = place < SPARSE_DIMS && bits[place / 8] >> place % 8 & 1;
      const u32 all = ballot(is_kept);
      if (is_kept) put(kept + count_bits(all & (1u << lane) - 1), place);
      kept += count_bits(all);
    }
  } else {
    const u8* const indices = row_of(p.indices, row, (KEPT * INDEX_BITS + 7) / 8);
    for (int i = lane; i < KEPT; i += LANES) put(i, packed_index(indices, i));
  }
  sync_warp();
  for (int d = lane; d < HEAD_DIM; d += LANES) k[d] = memory[d];
}

// Entry `i` of a rotated row of so many bits, in steps of its scale.
template <int WIDTH, int BITS>
DEVICE float level_of(const u8* row, int i) {
  if constexpr (BITS == 4) return steps_of<4>(row, i);
  const int eight = i / 8, place = i % 8;
  const u32 word = reinterpret_cast<const u16*>(row)[eight], byte = row[WIDTH / 4 + eight];
  const u32 level = place < 5 ? word >> 3 * place : place < 7 ? byte >> 3 * (place - 5) : word >> 15 | byte >> 6 << 1;
  return float(level & 7) - 3.5f;
}

// A row as `keep_row` kept it.
template <int WIDTH, int BITS>
DEVICE void spread_row(const void* kept, const void* scale, const u16* centre, i64 row, u16* x) {
  const u8* const at = static_cast<const u8*>(kept) + row * (WIDTH * BITS / 8);
  if constexpr (BITS == 16) {
    keep<WIDTH>(x, reinterpret_cast<const u16*>(at));
  } else if constexpr (BITS == 8) {
    const float step = static_cast<const float*>(scale)[row];
    for (int d = lane_id(); d < WIDTH; d += LANES) x[d] = stored(steps_of<8>(at, d) * step);
  } else {
    const float step = from_bf16(static_cast<const u16*>(scale)[row]), middle = from_bf16(centre[row]);
    float entry[entries(WIDTH)];
#pragma unroll
    for (int i = 0; i < entries(WIDTH); ++i) {
      const int d = i * LANES + lane_id();
      entry[i] = d < WIDTH ? level_of<WIDTH, BITS>(at, d) * step + middle : 0.0f;
    }
    rotate<WIDTH>(entry);
#pragma unroll
    for (int i = 0; i < entries(WIDTH); ++i)
      if (i * LANES + lane_id() < WIDTH) x[i * LANES + lane_id()] = stored(entry[i]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) read_kernel(const __grid_constant__ Params given) {
  extern __shared__ __align__(16) u8 dynamic[];
  static_assert(2 * HEAD_DIM <= WARP_BYTES, "a key lies in the warp's memory");
  const Work work = work_of(dynamic);
  if (work.token >= given.tokens) return;
  const i64 token = work.token, head = blockIdx.y % given.heads, batch = blockIdx.y / given.heads;
  const Place place = place_of(given, given.slots[batch * given.tokens + token], head);
  u16* const k = const_cast<u16*>(given.k) + batch * given.k_batch + head * given.k_head + token * given.k_token;
  u16* const v = const_cast<u16*>(given.v) + batch * given.v_batch + head * given.v_head + token * given.v_token;
  if (place.row < 0) {  // there is no such slot: NaN, not what the memory held
    for (int d = lane_id(); d < HEAD_DIM && work.has_key; d += LANES) k[d] = 0x7fff;
    for (int d = lane_id(); d < VALUE_DIM && work.has_value; d += LANES) v[d] = 0x7fff;
    return;
  }
  const Params p = shifted(given, place.bytes);
  if (work.has_value) spread_row<VALUE_DIM, V_BITS>(p.stored_v, p.v_scale, p.v_centre, place.row, v);
  if (!work.has_key) return;
  if constexpr (INDEX_BITS > 0)
    spread_features(p, place.row, k, reinterpret_cast<u16*>(work.memory));
  else
    spread_row<HEAD_DIM, KEPT_BITS>(p.values, p.scale, p.centre, place.row, k);
}

#endif

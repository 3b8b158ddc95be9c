// Codes of features: a key's dense channel, and of the rest the largest entries with their places.

constexpr int KEY_ENTRIES = entries(HEAD_DIM), SPARSE_DIMS = HEAD_DIM - DENSE_DIMS;
constexpr int MOST_FEATURES = 256;
static_assert(HEAD_DIM <= MOST_FEATURES && 3 * MOST_FEATURES <= WARP_BYTES, "what is packed lies in the warp's memory");

// Entry `i` of a part of a code, `x`. What has 4 bits is packed later.
template <int BITS>
DEVICE void store(void* part, int i, u16 x, float scale, u8* levels) {
  if constexpr (BITS == 16) static_cast<u16*>(part)[i] = x;
  if constexpr (BITS == 8) static_cast<u8*>(part)[i] = SHARES_SCALE ? in_8_bits(x, scale) : to_8_bits(number(x), scale);
  if constexpr (BITS == 4) levels[i] = to_level<4>(number(x), scale);
}

DEVICE void keep_features(const Params& p, const u16* k, i64 row, u8* levels) {
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
  float dense_largest = 0, kept_largest = 0;
#pragma unroll
  for (int i = 0; i < KEY_ENTRIES; ++i) {
    const u32 all = ballot(is_kept[i]);
    slot[i] = is_kept[i] ? kept + count_bits(all & before) : -1;
    kept += count_bits(all);
    if (i * LANES + lane < DENSE_DIMS) dense_largest = larger(dense_largest, fabsf(number(x[i])));
    if (is_kept[i]) kept_largest = larger(kept_largest, fabsf(number(x[i])));
  }
  float dense_scale = 1, kept_scale = 1;
  if constexpr (SHARES_SCALE) {
    dense_scale = kept_scale = scale_of(larger(dense_largest, kept_largest));
    if (lane == 0) static_cast<float*>(p.scale)[row] = kept_scale;
  } else {
    if constexpr (DENSE_BITS == 8 && DENSE_DIMS)
      dense_scale = rounded_scale(dense_largest, 127, static_cast<u16*>(p.scale) + row);
    if constexpr (KEPT_BITS < 16) kept_scale = rounded_scale(kept_largest, KEPT_BITS == 8 ? 127 : 7.5f, p.value_scale + row);
  }
  u8 *const places = levels + MOST_FEATURES, *const bits = places + MOST_FEATURES;  // of the sparse part, a byte per bit
  void* const dense = row_of(p.dense, row, DENSE_DIMS * DENSE_BITS / 8);
  u8* const values = row_of(p.values, row, (KEPT * KEPT_BITS + 7) / 8);
#pragma unroll
  for (int i = 0; i < KEY_ENTRIES; ++i) {
    const int d = i * LANES + lane;
    if (d < DENSE_DIMS) store<DENSE_BITS>(dense, d, x[i], dense_scale, levels);
    if (d >= DENSE_DIMS && d < HEAD_DIM) bits[d - DENSE_DIMS] = is_kept[i];
    if (slot[i] < 0) continue;
    store<KEPT_BITS>(values, slot[i], x[i], kept_scale, levels);
    places[slot[i]] = u8(d - DENSE_DIMS);
  }
  if constexpr (KEPT_BITS == 4) pack(values, levels, KEPT, 4);
  if constexpr (IS_BITMAP)
    pack(row_of(p.indices, row, (SPARSE_DIMS + 7) / 8), bits, SPARSE_DIMS, 1);
  else
    pack(row_of(p.indices, row, (KEPT * INDEX_BITS + 7) / 8), places, KEPT, INDEX_BITS);
}

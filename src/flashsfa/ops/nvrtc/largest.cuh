// The largest entries of a row that a warp has: entry d of it is entry d / 32 of lane d % 32.

constexpr int SIZE_BITS = 15;  // of a magnitude of 16 bits, as an integer: NaN lies above infinity, and ties are exact

// Marks the `count` largest sizes, of those that tie the first. A size is a magnitude, or -1 for what is not looked at. The least one kept is found
// by bisection, a bit at a time.
template <int ENTRIES>
DEVICE void find_largest(bool (&is_kept)[ENTRIES], const int (&size)[ENTRIES], int count) {
  const auto count_from = [&](int least) {
    u32 found = 0;
#pragma unroll
    for (int i = 0; i < ENTRIES; ++i) found += size[i] >= least;
    return int(sum_of_lanes(found));
  };
  int least = 0;
  for (int bit = 1 << (SIZE_BITS - 1); bit; bit /= 2)
    if (count_from(least | bit) >= count) least |= bit;
  int room = count - count_from(least + 1);  // for those that tie
#pragma unroll
  for (int i = 0; i < ENTRIES; ++i) {
    const u32 tied = ballot(size[i] == least);
    is_kept[i] = size[i] > least || (size[i] == least && count_bits(tied & ((1u << lane_id()) - 1)) < room);
    room -= count_bits(tied);
  }
}

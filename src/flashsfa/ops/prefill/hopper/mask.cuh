// Which keys a query sees: causality, a window, the end of the keys.

struct Mask {
  int shift;                          // query i of a sequence stands at key i + shift
  int visible_before, visible_after;  // and sees the keys from so many before it on, up to so many after it

  // Both grow with i.
  __device__ __forceinline__ int first_key(int i) const { return max(0, i + shift - visible_before); }
  __device__ __forceinline__ int end_key(int i, int n_k) const { return min(n_k, i + shift + visible_after); }
};

// Scores of keys outside [begin, end) of their row become -inf. `column` is the tile's first key plus 2 * (lane % 4).
__device__ __forceinline__ void mask_scores(float (&s)[BLOCK_N / 2], int column, const int (&begin)[2], const int (&end)[2]) {
#pragma unroll
  for (int i = 0; i < BLOCK_N / 2; ++i) {
    const int key = column + i / 4 * 8 + (i & 1), h = i >> 1 & 1;
    if (key < begin[h] || key >= end[h]) s[i] = minus_infinity();
  }
}

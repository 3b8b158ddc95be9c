// A consumer's accumulators become output and log-sum-exp. The stores themselves stand in the consumer's loop.

// 16 bytes of row r + 8h to store: its columns 8 * (j + lane % 4) and the next seven. `inverse` is 1 over the row's sum; an empty
// row, which sees no key, is 0.
__device__ __forceinline__ uint4 output_columns(const float (&o)[VALUE_DIM / 2], int j, int h, float inverse, bool empty, int lane) {
  u32 words[4];  // of columns 8j, 8j + 8, 8j + 16 and 8j + 24, plus 2 * (lane % 4)
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 word = pack(o[4 * (j + i) + 2 * h] * inverse, o[4 * (j + i) + 2 * h + 1] * inverse);
    words[i] = empty ? 0 : word;
  }
  return quad_transpose(words, lane);
}

__device__ __forceinline__ float log_sum_exp(float base, float sum, bool empty) {
  return empty ? minus_infinity() : (base + log2_fast(sum)) / LOG2E;
}

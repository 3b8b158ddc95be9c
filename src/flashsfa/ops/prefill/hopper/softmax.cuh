// Online softmax with lazy rescaling. A row's weights are relative to its base, a maximum of some of its scores: softmax does
// not mind which one, as long as no weight grows too large to hold. The sums, which are needed anyway, show when it would: so
// maxima are sought, and outputs rescaled, only then.

// What a thread's weights of one tile and row may sum to before the base moves: float16, in which weights are multiplied with V,
// holds numbers below 2^16.
constexpr float RESCALE_THRESHOLD = 32768.f;
constexpr float LOG2E = 1.4426950408889634f;

struct RowSums {
  float low, high;  // of rows r and r + 8
};

struct OnlineSoftmax {
  float base[2], sum[2];  // binary logarithm of what a row's weights are relative to; this thread's share of their sum

  __device__ __forceinline__ void reset() {
    base[0] = base[1] = minus_infinity();
    sum[0] = sum[1] = 0.f;
  }

  // A tile's scores s become weights, as the operand of P V, and join the sums. True if bases moved: outputs so far are to be
  // multiplied by `rescale`.
  __device__ __forceinline__ bool update(const float (&s)[BLOCK_N / 2], uint4 (&weights)[BLOCK_N / 16], float scale_log2,
                                         float (&rescale)[2]) {
    const RowSums now = exponentiate(s, weights, scale_log2, base);
    // A row without a base yet has infinity or NaN here.
    const bool exceeds = __any_sync(~0u, !(now.low <= RESCALE_THRESHOLD && now.high <= RESCALE_THRESHOLD));
    if (exceeds) {
      rebase(s, weights, scale_log2, rescale);
    } else {
      sum[0] += now.low;
      sum[1] += now.high;
    }
    return exceeds;
  }

  // Moves the bases up to the maxima of all scores so far, and weighs the tile relative to them.
  __device__ __forceinline__ void rebase(const float (&s)[BLOCK_N / 2], uint4 (&weights)[BLOCK_N / 16], float scale_log2,
                                         float (&rescale)[2]) {
    float from[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = minus_infinity();
#pragma unroll
      for (int j = 0; j < BLOCK_N / 8; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
      top = fmaxf(base[h], quad_max(top) * scale_log2);
      from[h] = top == minus_infinity() ? 0.f : top;  // no key yet: exp(-inf) = 0 rather than NaN
      rescale[h] = exp2_fast(base[h] - from[h]);
      base[h] = top;
    }
    const RowSums now = exponentiate(s, weights, scale_log2, from);
    sum[0] = fmaf(sum[0], rescale[0], now.low);
    sum[1] = fmaf(sum[1], rescale[1], now.high);
  }

 private:
  // Weights relative to `from`, and this thread's shares of their sums.
  __device__ __forceinline__ static RowSums exponentiate(const float (&s)[BLOCK_N / 2], uint4 (&weights)[BLOCK_N / 16],
                                                         float scale_log2, const float (&from)[2]) {
    float part[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int t = 0; t < BLOCK_N / 16; ++t) {
      float w[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        w[j] = exp2_fast(fmaf(s[8 * t + j], scale_log2, -from[j >> 1 & 1]));
        part[j & 3] += w[j];
      }
      weights[t] = make_uint4(pack(w[0], w[1]), pack(w[2], w[3]), pack(w[4], w[5]), pack(w[6], w[7]));
    }
    return {part[0] + part[1], part[2] + part[3]};
  }
};

__device__ __forceinline__ void rescale_output(float (&o)[VALUE_DIM / 2], const float (&rescale)[2]) {
#pragma unroll
  for (int i = 0; i < VALUE_DIM / 2; ++i) o[i] *= rescale[i >> 1 & 1];
}

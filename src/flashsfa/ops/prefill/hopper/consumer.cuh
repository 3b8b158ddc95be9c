// What a consumer warpgroup holds of its 64 queries, and its two products. Queries wait in shared memory, all else in registers.

struct Consumer {
  u64 q;                         // descriptor of the queries' first step
  u32 metadata[METADATA_WORDS];  // their sparse metadata
  float s[BLOCK_N / 2];          // scores of one tile
  uint4 p[2][BLOCK_N / 16];      // weights of even tiles and of odd ones, as the A operand of P V
  float o[VALUE_DIM / 2];
  OnlineSoftmax softmax;

  // Waits for the queries, `rows` of which exist, and reads the metadata of rows `row` and row + 8.
  __device__ __forceinline__ void await_queries(const unsigned char* tile, int rows, int row, int lane, int warpgroup) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    publish(warpgroup);
    const u64* indices = (const u64*)(tile + STEP_BYTES * STEPS) + row * (SPARSE_STEPS * 2);
    load_metadata(metadata, indices, row < rows, row + 8 < rows, lane);
  }

  // `k_word` and `v_word` are low words of descriptors.
  __device__ __forceinline__ void issue_scores(u32 k_word) {
    wgmma_fence();
    pin(s);
    scores_from<0>(k_word);
    wgmma_commit();
  }

  template <int STEP>
  __device__ __forceinline__ void scores_from(u32 k_word) {
    if constexpr (STEP < STEPS) {
      constexpr int SPARSE = STEP - DENSE_STEPS;  // the sparse step it is, if not negative
      constexpr int BYTE = SPARSE < 0 ? 32 * STEP : 2 * DENSE_DIMS + 64 * SPARSE;  // of the head's row; a box holds 128 of it
      const u64 b = descriptor(k_word + (BYTE / 128 * BOX_BYTES + BYTE % 128) / 16);
      if constexpr (SPARSE < 0)
        wgmma_qk_dense<(STEP > 0)>(s, q + (STEP_BYTES >> 4) * STEP, b);
      else
        wgmma_qk_sparse<SPARSE % 2, (STEP > 0)>(s, q + (STEP_BYTES >> 4) * STEP, b, metadata[SPARSE / 2]);
      scores_from<STEP + 1>(k_word);
    }
  }

  __device__ __forceinline__ void issue_output(u32 v_word, const uint4 (&p)[BLOCK_N / 16]) {
    wgmma_fence();
    pin(o);
#pragma unroll
    for (int t = 0; t < BLOCK_N / 16; ++t) wgmma_pv(o, p[t], descriptor(v_word + t * 16 * 128 / 16));
    wgmma_commit();
  }
};

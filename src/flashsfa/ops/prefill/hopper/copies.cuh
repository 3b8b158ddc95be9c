// Tiles into shared memory.

// Rows [row, row + BLOCK_N) x entries [column, column + 64) of one head; rows past the end arrive as zeros.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap* map, u32 barrier, int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
}

// What a warpgroup wrote to shared memory is visible to its matrix instructions.
__device__ __forceinline__ void publish(int warpgroup) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  named_sync(WARPGROUP + warpgroup, 128);
}

// Zeros in the rows of a tile of V from `row` on.
__device__ __forceinline__ void clear_rows(u32 v_tile, int row, int thread, int warpgroup) {
  for (int c = 0; c < VALUE_DIM / 64; ++c)
    for (int at = 128 * row + 16 * thread; at < BOX_BYTES; at += 16 * 128)
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(v_tile + c * BOX_BYTES + at), "r"(0) : "memory");
  publish(warpgroup);
}

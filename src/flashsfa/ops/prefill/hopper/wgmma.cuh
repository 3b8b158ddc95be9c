// Matrix instructions, their operands in shared memory and registers. compiler.py writes one function per shape of instruction:
// wgmma_qk_dense<accumulate>, wgmma_qk_sparse<selector, accumulate> and wgmma_pv.
//
// Of a 64 x N accumulator a thread holds rows r and r + 8, r = 16 * warp + lane / 4: entries 4j, 4j + 1 of row r and
// 4j + 2, 4j + 3 of row r + 8, at columns 8j + 2 * (lane % 4) and the next.

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The compiler must neither move nor copy registers that a matrix instruction in flight owns.
template <int N>
__device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// The low word of a matrix descriptor of a box with 128-byte swizzle, to which bytes / 16 may be added; `leading` is the
// distance of boxes, which only an operand read across its rows (V) needs.
__device__ __forceinline__ u32 low_word(u32 address, u32 leading) { return address >> 4 | leading >> 4 << 16; }

// The whole descriptor: groups of 8 rows lie 1024 bytes apart.
__device__ __forceinline__ u64 descriptor(u32 low) { return (u64)low | (u64)(1024 >> 4 | 1 << 30) << 32; }

// The descriptor of queries, which have no swizzle: halves 1024 bytes apart, groups of 8 rows 128.
__device__ __forceinline__ u64 query_descriptor(u32 address) {
  return (u64)(address >> 4) | (u64)(1024 >> 4) << 16 | (u64)(128 >> 4) << 32;
}

// Queries of a warpgroup: the A operand of S = Q Kᵀ, made of their codes as they lie in memory. Plain C++, so that a test runs it
// on the host.
//
// A matrix instruction multiplies 64 rows of Q, and reads them in shared memory: of each row 16 features, or 16 that are kept of
// 32. Without a swizzle, 8 rows of 16 bytes make 128, eight of these the first 16 bytes of all rows, and eight more the
// other 16. So 64 rows are two copies of 16 bytes for each of 128 threads.
//
// The sparse instruction takes 8 aligned groups of four features: two entries of each, and from a register the sparse metadata,
// four bits per group that say which two: bits 0-1 the feature's number in the group of the first, bits 2-3 of the second, in
// ascending order. Thread lane = 4g + c of warp w holds metadata of rows r = 16w + g and r + 8: of four groups, from 4 * (c % 2)
// on, row r in the low half, row r + 8 in the high half. Lanes with c < 2 serve even steps, the others odd ones: the
// instruction's selector picks them. (PTX ISA, wgmma.mma_async.sp, sparse matrix storage.)

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int DENSE_STEPS = DENSE_DIMS / 16;  // matrix instructions along the head for one tile of scores
constexpr int SPARSE_STEPS = (HEAD_DIM - DENSE_DIMS) / 32;
constexpr int STEPS = DENSE_STEPS + SPARSE_STEPS;
constexpr int METADATA_WORDS = SPARSE_STEPS > 2 ? (SPARSE_STEPS + 1) / 2 : 1;  // of a thread: one word serves two steps
constexpr int STEP_BYTES = 64 * 32;                  // of 64 queries for one step in shared memory
constexpr int INDEX_BYTES = 64 * SPARSE_STEPS * 16;  // of 64 queries: the features of the entries kept

struct QueryCodes {
  const char* dense;                             // [B, Hq, Nq, DENSE_STEPS * 32] bytes: the dense channel
  long long dense_batch, dense_head, dense_row;  // its strides in bytes
  const char* values;                            // [B, Hq, Nq, SPARSE_STEPS * 32] bytes: two entries of each group
  const char* indices;                           // [B, Hq, Nq, SPARSE_STEPS * 16] bytes: their features
};

// A thread's share in bringing 64 queries to shared memory: copy(offset in the tile, from, whether the query exists; else
// zeros). `dense`, `values` and `indices` are of the first query, of which `rows` exist. Indices follow the steps, as they lie.
template <class Copy>
__device__ __forceinline__ void stage_queries(const char* dense, long long dense_row, const char* values, const char* indices,
                                              int rows, int thread, const Copy& copy) {
  const int row = thread / 2, half = 16 * (thread % 2);
#pragma unroll
  for (int i = 0; i < STEPS; ++i) {
    const char* from = i < DENSE_STEPS ? dense + row * dense_row + 32 * i
                                       : values + 32 * (row * SPARSE_STEPS + i - DENSE_STEPS);
    copy(STEP_BYTES * i + 64 * half + 16 * row, from + half, row < rows);
  }
  for (int chunk = thread; chunk < 64 * SPARSE_STEPS; chunk += 128)
    copy(STEP_BYTES * STEPS + 16 * chunk, indices + 16 * chunk, chunk < rows * SPARSE_STEPS);
}

// The sparse metadata of four groups, 16 bits, from the eight features kept of them.
__device__ __forceinline__ u32 metadata_of(u64 features) {
  u64 x = features & 0x0303030303030303ull;  // a group is aligned: a feature's number in it
  x = (x | x >> 6) & 0x000f000f000f000full;
  x = (x | x >> 12) & 0x000000ff000000ffull;
  return u32(x | x >> 24) & 0xffffu;
}

// A thread's sparse metadata. `indices` are of its row r, eight bytes for the two features of four groups each; `valid` and
// `valid_8` say whether rows r and r + 8 exist.
__device__ __forceinline__ void load_metadata(u32 (&metadata)[METADATA_WORDS], const u64* indices, bool valid, bool valid_8,
                                              int lane) {
#pragma unroll
  for (int i = 0; i < METADATA_WORDS; ++i) {
    const int c = lane % 4, step = 2 * i + c / 2;
    const u64* features = indices + 2 * step + c % 2;
    const bool used = step < SPARSE_STEPS;
    const u32 low = used && valid ? metadata_of(features[0]) : 0x4444u;  // unused metadata must still name two entries
    const u32 high = used && valid_8 ? metadata_of(features[8 * (2 * SPARSE_STEPS)]) : 0x4444u;
    metadata[i] = low | high << 16;
  }
}

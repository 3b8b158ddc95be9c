// Queries of a warpgroup: the A operand of S = Q Kᵀ, made of their codes as they lie in memory.
//
// A matrix instruction multiplies 64 rows, and reads them in shared memory: of each row 16 features, or 16 that are kept of
// 32. Without a swizzle, 8 rows of 16 bytes make 128, eight of these the first 16 bytes of all rows, and eight more the
// other 16. So 64 rows are two pieces for each of 128 threads to copy.
//
// The sparse instruction takes 8 aligned groups of four features: two entries of each, and from a register four bits a group
// that say which two: bits 0-1 the place of the first, bits 2-3 of the second, in ascending order. Thread lane = 4g + c of
// warp w holds metadata of rows r = 16w + g and r + 8: of four groups, from 4 * (c % 2) on, row r in the low half, row r + 8
// in the high half. Lanes with c < 2 serve even steps, the others odd ones: the instruction's selector picks them.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int DENSE_STEPS = DENSE_DIMS / 16;                // matrix instructions along the head for one tile of scores
constexpr int SPARSE_STEPS = (HEAD_DIM - DENSE_DIMS) / 32;
constexpr int STEPS = DENSE_STEPS + SPARSE_STEPS;
constexpr int WORDS = SPARSE_STEPS > 2 ? (SPARSE_STEPS + 1) / 2 : 1;  // metadata words of a thread: one serves two steps
constexpr int STEP_BYTES = 64 * 32;                         // of 64 rows for one step in shared memory
constexpr int INDEX_BYTES = 64 * SPARSE_STEPS * 16;         // of 64 rows: the features of the entries kept

struct QueryCodes {
  const char* dense;                             // the dense channel: DENSE_STEPS * 32 bytes a row
  long long dense_batch, dense_head, dense_row;  // its strides in bytes
  const char* values;                            // [rows, SPARSE_STEPS * 32] bytes: two entries of each group
  const char* indices;                           // [rows, SPARSE_STEPS * 16] bytes: their features
};

// A thread's share in bringing 64 rows to shared memory: copy(where in the tile, from, whether it is there; else zeros).
// `dense`, `values` and `indices` are of the first row. Indices follow the steps, as they lie.
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
  for (int piece = thread; piece < 64 * SPARSE_STEPS; piece += 128)
    copy(STEP_BYTES * STEPS + 16 * piece, indices + 16 * piece, piece < rows * SPARSE_STEPS);
}

// The metadata of four groups, from their features.
__device__ __forceinline__ u32 places_of(u64 features) {
  u64 x = features & 0x0303030303030303ull;  // a group is aligned: the place in it
  x = (x | x >> 6) & 0x000f000f000f000full;
  x = (x | x >> 12) & 0x000000ff000000ffull;
  return u32(x | x >> 24) & 0xffffu;
}

// A thread's metadata. `indices` are of its row r, eight bytes for the two features of four groups each.
__device__ __forceinline__ void load_places(u32 (&places)[WORDS], const u64* indices, bool there, bool there_8, int lane) {
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    const int c = lane % 4, step = 2 * i + c / 2;
    const u64* features = indices + 2 * step + c % 2;
    const bool used = step < SPARSE_STEPS;
    const u32 low = used && there ? places_of(features[0]) : 0x4444u;  // an unused pair still needs two places
    const u32 high = used && there_8 ? places_of(features[8 * (2 * SPARSE_STEPS)]) : 0x4444u;
    places[i] = low | high << 16;
  }
}


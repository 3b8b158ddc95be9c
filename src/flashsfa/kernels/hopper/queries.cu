// Queries of a warpgroup: the A operand of S = Q Kᵀ, read from their codes as they lie in memory.
//
// A matrix instruction multiplies 64 rows. Thread lane = 4g + c of warp w holds rows r = 16w + g and r + 8 of them. A word
// is two entries of a row. The dense instruction takes 8 words of a row a step, and the thread holds words c and c + 4 of
// its rows. The sparse one takes 8 aligned groups of four features: two entries of each, one word, in the same places, and
// four bits a group that say which two: bits 0-1 the place of the first, bits 2-3 of the second, in ascending order. The
// thread's metadata covers four groups, from 4 * (c % 2) on: of row r in the low half, of row r + 8 in the high half. Lanes
// with c < 2 serve even steps, the others odd ones: the instruction's selector picks them.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int DENSE_STEPS = DENSE_DIMS / 16;                // matrix instructions along the head for one tile of scores
constexpr int SPARSE_STEPS = (HEAD_DIM - DENSE_DIMS) / 32;
constexpr int STEPS = DENSE_STEPS + SPARSE_STEPS;
constexpr int WORDS = SPARSE_STEPS > 2 ? (SPARSE_STEPS + 1) / 2 : 1;  // metadata words of a thread: one serves two steps
constexpr int STEP_BYTES = 64 * 32;                         // of 64 rows for one step in shared memory

struct QueryCodes {
  const u32* dense;    // the dense channel: DENSE_STEPS * 8 words a row
  long long dense_batch, dense_head, dense_row;  // its strides, in words
  const u32* values;   // [rows, SPARSE_STEPS * 8] words: two entries of each group
  const u64* indices;  // [rows, SPARSE_STEPS * 2] eight bytes: the two features of four groups
};

// The metadata of four groups, from their features.
__device__ __forceinline__ u32 places_of(u64 features) {
  u64 x = features & 0x0303030303030303ull;  // a group is aligned: the place in it
  x = (x | x >> 6) & 0x000f000f000f000full;
  x = (x | x >> 12) & 0x000000ff000000ffull;
  return u32(x | x >> 24) & 0xffffu;
}

// Where a thread's word `part` (x, y, z, w of `Queries::values`) of a step belongs in shared memory, as a matrix instruction
// reads its operand there without a swizzle: 8 rows of 16 bytes make 128, eight of these the first 16 bytes of all rows, and
// eight more the other 16.
__device__ __forceinline__ u32 staged_at(int thread, int part) {
  const int lane = thread % 32;  // 16 bytes are four words: lane / 4 is the row, lane % 4 the word
  return thread / 32 * 256 + part % 2 * 128 + part / 2 * 1024 + lane * 4;
}

struct Queries {
  uint4 values[STEPS];
  u32 places[WORDS];

  // `row` of the codes, whose dense channel is at `dense_row`, and row + 8, zeros where they are not there.
  __device__ __forceinline__ void load(const QueryCodes& codes, const u32* dense_row, long long row, bool there, bool there_8,
                                       int lane) {
    const int c = lane % 4;
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const bool dense = i < DENSE_STEPS;
      const u32* words = dense ? dense_row + 8 * i + c : codes.values + (row * SPARSE_STEPS + i - DENSE_STEPS) * 8 + c;
      const u32* words_8 = words + 8 * (dense ? codes.dense_row : 8 * SPARSE_STEPS);
      values[i] = make_uint4(there ? words[0] : 0, there_8 ? words_8[0] : 0, there ? words[4] : 0, there_8 ? words_8[4] : 0);
    }
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
      const int step = 2 * i + c / 2;
      const u64* features = codes.indices + row * (2 * SPARSE_STEPS) + 2 * step + c % 2;
      const bool used = step < SPARSE_STEPS;
      const u32 low = used && there ? places_of(features[0]) : 0x4444u;  // an unused pair still needs two places
      const u32 high = used && there_8 ? places_of(features[8 * (2 * SPARSE_STEPS)]) : 0x4444u;
      places[i] = low | high << 16;
    }
  }
};


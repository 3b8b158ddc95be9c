// What the host passes at a launch, and the sizes of a specialisation. params.py mirrors the structures.

struct alignas(64) TensorMap { u64 words[16]; };  // CUtensorMap
static_assert(sizeof(TensorMap) == TENSOR_MAP_BYTES, "cuda.py holds a tensor map of another size");

struct Params {
  QueryCodes q;
  unsigned short* out;  // [B, Hq, Nq, VALUE_DIM], at the strides below, in entries
  float* lse;           // [B, Hq, Nq]
  long long out_batch, out_head, out_row;
  const int *cu_seqlens_q, *cu_seqlens_k;  // [sequences + 1] where packed sequences begin and end, B = 1; null: nothing is packed
  int n_q, n_k, heads, heads_per_kv_head, is_causal;
  int tiles_per_sequence, work_tiles;  // of one sequence, if it is the longest; of all sequences
  int* tile_counter;       // work tiles begun beyond the first of each thread block; null: each gets one more at most
  int window;              // keys less than this away are visible; at least n_q + n_k: all
  int heads_per_l2_group;  // L2 swizzle: heads whose work tiles are interleaved, since their K and V fit the L2 cache
  float scale;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "params.py lays out Params of another size");

constexpr int THREADS = 128 * (CONSUMERS + 1);
constexpr int BLOCK_M = 64 * CONSUMERS;
constexpr int BOX_BYTES = BLOCK_N * 128;  // BLOCK_N rows of 64 entries: one box of the copy engine
constexpr int K_BYTES = BOX_BYTES * (HEAD_DIM / 64);
constexpr int V_BYTES = BOX_BYTES * (VALUE_DIM / 64);
constexpr int Q_BYTES = STEP_BYTES * STEPS + INDEX_BYTES;  // of one consumer
constexpr int TILE_QUEUE = STAGES + 1;                     // work tiles that the producer may be ahead
static_assert(STAGES > 1, "a consumer that waits for the next tile of K still holds one");

// Dynamic shared memory: tiles of K, of V, the consumers' queries, mbarriers. Addresses as instructions take them.
struct SharedMemory {
  u32 k_tiles, v_tiles;  // [STAGES]
  u32 q_tiles;           // [CONSUMERS]
  u32 k_full, v_full, k_empty, v_empty;  // [STAGES] mbarriers: a tile has come; all consumers have released it
  u32 queue_full;   // [TILE_QUEUE] mbarriers: the index of a work tile is in
  u32 queue_index;  // [TILE_QUEUE]

  __device__ __forceinline__ explicit SharedMemory(u32 start) {
    k_tiles = start;
    v_tiles = k_tiles + STAGES * K_BYTES;
    q_tiles = v_tiles + STAGES * V_BYTES;
    k_full = q_tiles + CONSUMERS * Q_BYTES;
    v_full = k_full + 8 * STAGES;
    k_empty = v_full + 8 * STAGES;
    v_empty = k_empty + 8 * STAGES;
    queue_full = v_empty + 8 * STAGES;
    queue_index = queue_full + 8 * TILE_QUEUE;
  }
};
static_assert(STAGES * (K_BYTES + V_BYTES + 32) + CONSUMERS * Q_BYTES + TILE_QUEUE * 12 == SHARED_BYTES,
              "compiler.py asks for shared memory of another size");

// Tile scheduler: a work tile is BLOCK_M queries of one head, and a thread block stays on its multiprocessor and works on one
// after the other. Work tiles with most keys have the lowest numbers, over all heads of an L2 group.

struct Sequence {
  int first, count;  // rows of Q, or of K and V, of one head
};

// All `n` rows of a batch entry, or what packed `cu_seqlens` say.
__device__ __forceinline__ Sequence sequence_at(int index, const int* cu_seqlens, int n) {
  if (!cu_seqlens) return {0, n};
  const int first = cu_seqlens[index];
  return {first, cu_seqlens[index + 1] - first};
}

struct WorkTile {
  bool exists;
  int batch, head, row;   // row: the first query's, in its sequence
  Sequence q, k;
  long long first;        // the sequence's first query, as a row of [B, Hq, Nq]
  Mask mask;
  int kv_tiles, end_kv_tile;  // tiles of K and V, the last of which precedes end_kv_tile
};

// None exists past the last number, and a shorter sequence has fewer than its share of numbers.
__device__ __forceinline__ WorkTile work_tile_at(const Params& params, int index) {
  WorkTile tile;
  tile.exists = false;
  if (index >= params.work_tiles) return tile;
  const int sequence = index / params.tiles_per_sequence, in_sequence = index % params.tiles_per_sequence;
  tile.q = sequence_at(sequence, params.cu_seqlens_q, params.n_q);
  tile.k = sequence_at(sequence, params.cu_seqlens_k, params.n_k);
  tile.batch = params.cu_seqlens_q ? 0 : sequence;
  const int per_head = (tile.q.count + BLOCK_M - 1) / BLOCK_M;
  tile.exists = in_sequence < per_head * params.heads;
  if (!tile.exists) return tile;
  const int first_head = in_sequence / (per_head * params.heads_per_l2_group) * params.heads_per_l2_group;
  const int heads = min(params.heads_per_l2_group, params.heads - first_head), in_group = in_sequence - first_head * per_head;
  tile.head = first_head + in_group % heads;
  tile.row = (per_head - 1 - in_group / heads) * BLOCK_M;
  tile.first = (long long)(tile.batch * params.heads + tile.head) * params.n_q + tile.q.first;
  tile.mask.shift = tile.k.count - tile.q.count;
  tile.mask.visible_before = params.window - 1;
  tile.mask.visible_after = params.is_causal ? 1 : params.window;
  // One tile of K and V at least, and be it of keys that no query sees.
  tile.end_kv_tile = (max(1, tile.mask.end_key(min(tile.row + BLOCK_M, tile.q.count) - 1, tile.k.count)) + BLOCK_N - 1) / BLOCK_N;
  tile.kv_tiles = tile.end_kv_tile - tile.mask.first_key(tile.row) / BLOCK_N;
  return tile;
}

// The producer's side: numbers of work tiles. Tiles get shorter, so a thread block claims the first that is left, and late, when
// the work tile before has all of its tiles of K and V; where all get two at most, the second ones are dealt in reverse.
struct TileScheduler {
  const Params& params;
  int claimed = 0;

  __device__ __forceinline__ int claim() {
    int count = claimed++ == 0 ? gridDim.x - 1 - blockIdx.x : params.work_tiles;
    if (params.tile_counter) asm volatile("atom.global.add.u32 %0, [%1], 1;" : "=r"(count) : "l"(params.tile_counter) : "memory");
    return (int)gridDim.x + count;
  }
};

// The n-th work tile of this thread block, into the queue. There is room: consumers have read number n - TILE_QUEUE, since its
// first tile of K and V had to leave room for one of number n - 1.
__device__ __forceinline__ void publish_work_tile(const SharedMemory& shared, int n, int index) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared.queue_index + 4 * (n % TILE_QUEUE)), "r"(index) : "memory");
  barrier_arrive(shared.queue_full + 8 * (n % TILE_QUEUE));
}

// The consumers' side: the n-th work tile, out of the queue.
__device__ __forceinline__ WorkTile await_work_tile(const Params& params, const SharedMemory& shared, int n) {
  barrier_wait(shared.queue_full + 8 * (n % TILE_QUEUE), n / TILE_QUEUE & 1);
  int index;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(index) : "r"(shared.queue_index + 4 * (n % TILE_QUEUE)) : "memory");
  return work_tile_at(params, index);
}

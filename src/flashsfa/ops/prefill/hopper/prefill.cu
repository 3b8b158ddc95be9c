// Attention forward for queries that are 2:4 sparse beside a dense channel: S = Q Kᵀ on Hopper's sparse tensor cores (the
// dense channel on the dense ones), online softmax in registers, O = P V. docs/notes/2026-11-27-prefill.md tells the design.
//
// A thread block stays on its multiprocessor and takes blocks of BLOCK_M = 64 * CONSUMERS queries of one head, one after the
// other. For each it walks the keys in tiles of BLOCK_N, last tile first. One warpgroup produces: it takes the blocks, and has
// the copy engine bring tiles of K and V to shared memory, on into the next block. Each of the others consumes for its own 64
// queries. The host puts in front of this text (compiler.py): the tile's sizes, one function per shape of
// matrix instruction (`wgmma_qk_dense<accumulate>`, `wgmma_qk_sparse<selector, accumulate>`, `wgmma_pv`), and queries.cu.
// Queries wait in shared memory, weights in registers.

struct alignas(64) TensorMap { u64 words[16]; };  // CUtensorMap

struct Params {
  QueryCodes q;         // rows [B, Hq, Nq], the dense channel's at strides of its own
  unsigned short* out;  // rows of VALUE_DIM entries at the strides below, in entries
  float* lse;           // [B, Hq, Nq]
  long long out_batch, out_head, out_row;
  const int *q_bounds, *k_bounds;  // [sequences + 1] where packed sequences begin and end, B = 1; null: nothing is packed
  int n_q, n_k, heads, group, causal;
  int width, blocks;  // blocks of one sequence, if it is the longest; of all sequences
  int* taken;         // how many blocks have been taken, beside the first of each thread block; null: each gets one more at most
  int window;    // keys less than this away are seen; at least n_q + n_k: all
  int together;  // heads whose blocks are mixed, so that the ones with most keys start first; the next heads follow
  float scale;
};

constexpr int THREADS = 128 * (CONSUMERS + 1);
constexpr int BLOCK_M = 64 * CONSUMERS;
constexpr int BOX = BLOCK_N * 128;                // bytes of BLOCK_N rows of 64 entries: one box of the copy engine
constexpr int K_BYTES = BOX * (HEAD_DIM / 64);
constexpr int V_BYTES = BOX * (VALUE_DIM / 64);
constexpr int Q_BYTES = STEP_BYTES * STEPS + INDEX_BYTES;  // of one consumer
constexpr int TOLD = STAGES + 1;                  // blocks that consumers may have been told of and not begun
constexpr bool ASKS_EARLY = VALUE_DIM == 64;      // for the next tile of K while scores are computed: measured faster at 64 only
static_assert(STAGES > 1);                        // who asks early still holds a tile
constexpr float LOG2E = 1.4426950408889634f;
constexpr float FAR = 32768.f;                    // a thread's weights of one tile and row may sum to this: float16 holds it

template <bool VALUE>
struct Bool { static constexpr bool value = VALUE; };

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// Where in a ring of stages a warpgroup is, and the parity of the phase there that ends when a tile has come. The producer waits
// for the other one: that the tile before has been released.
struct Cursor {
  int stage = 0;
  u32 parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// ---- barriers, copies, descriptors -----------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  u32 done = 0;
#if SPIN_LIMIT
  for (u32 spins = 0; !done; ++spins) {
    if (spins == SPIN_LIMIT) asm volatile("trap;");
#else
  while (!done) {
#endif
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// Rows [row, row + BLOCK_N) x entries [column, column + 64) of one head; rows past the end arrive as zeros.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap* map, u32 barrier, int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
}

// The low word of a matrix descriptor of a box with 128-byte swizzle, to which bytes / 16 may be added; `leading` is the
// distance of boxes, which only an operand read across its rows (V) needs.
__device__ __forceinline__ u32 low_word(u32 address, u32 leading) { return address >> 4 | leading >> 4 << 16; }

// The whole: groups of 8 rows lie 1024 bytes apart.
__device__ __forceinline__ u64 descriptor(u32 low) { return (u64)low | (u64)(1024 >> 4 | 1 << 30) << 32; }

__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// What a warpgroup wrote to shared memory is there for its matrix instructions.
__device__ __forceinline__ void publish(int warpgroup) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  named_sync(8 + warpgroup, 128);
}

// Zeros in the rows of a tile of V from `row` on.
__device__ __forceinline__ void clear_rows(u32 v_tile, int row, int thread, int warpgroup) {
  for (int c = 0; c < VALUE_DIM / 64; ++c)
    for (int at = 128 * row + 16 * thread; at < BOX; at += 16 * 128)
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(v_tile + c * BOX + at), "r"(0) : "memory");
  publish(warpgroup);
}

// ---- matrix instructions ---------------------------------------------------------------------------------------

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

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ u32 pack_pair(float low, float high) {
  u32 word;
  asm(PACK_PAIR " %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Of four words of each of four lanes, lane i gets the i-th word of all: 16 bytes in a row to store at once.
__device__ __forceinline__ uint4 quad_transpose(const u32 (&words)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  const u32 a = __shfl_xor_sync(~0u, odd ? words[0] : words[1], 1), b = __shfl_xor_sync(~0u, odd ? words[2] : words[3], 1);
  // two words of the even lanes, then of the odd ones: of columns `odd` and 2 + `odd`
  const u32 near[2] = {odd ? a : words[0], odd ? words[1] : a}, far[2] = {odd ? b : words[2], odd ? words[3] : b};
  const u32 x = __shfl_xor_sync(~0u, high ? near[0] : far[0], 2), y = __shfl_xor_sync(~0u, high ? near[1] : far[1], 2);
  return high ? make_uint4(x, y, far[0], far[1]) : make_uint4(near[0], near[1], x, y);
}

// ---- one consumer's 64 queries ---------------------------------------------------------------------------------

struct Pair {
  float low, high;
};

// Of a 64 x N accumulator a thread holds rows r and r + 8, r = 16 * warp + lane / 4: entries 4j, 4j + 1 of row r and
// 4j + 2, 4j + 3 of row r + 8, at columns 8j + 2 * (lane % 4) and the next.
struct Consumer {
  u64 q;                      // descriptor of the queries' first step
  u32 places[WORDS];          // their metadata
  float s[BLOCK_N / 2];       // scores of one tile
  uint4 p[2][BLOCK_N / 16];   // weights of even tiles and of odd ones, as the A operand of P V
  float o[VALUE_DIM / 2];
  float base[2], sum[2];      // binary logarithm of what a row's weights are relative to; this thread's share of their sum

  // Once queries are there (`rows` of them), the metadata of rows `row` and row + 8.
  __device__ __forceinline__ void receive(const unsigned char* tile, int rows, int row, int lane, int warpgroup) {
    asm volatile("cp.async.wait_all;" ::: "memory");
    publish(warpgroup);
    const u64* indices = (const u64*)(tile + STEP_BYTES * STEPS) + row * (SPARSE_STEPS * 2);
    load_places(places, indices, row < rows, row + 8 < rows, lane);
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
      const u64 b = descriptor(k_word + (BYTE / 128 * BOX + BYTE % 128) / 16);
      if constexpr (SPARSE < 0)
        wgmma_qk_dense<(STEP > 0)>(s, q + (STEP_BYTES >> 4) * STEP, b);
      else
        wgmma_qk_sparse<SPARSE % 2, (STEP > 0)>(s, q + (STEP_BYTES >> 4) * STEP, b, places[SPARSE / 2]);
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

  // Scores of keys a row does not see become -inf. `column` is the tile's first key plus 2 * (lane % 4).
  __device__ __forceinline__ void mask(int column, const int (&begin)[2], const int (&end)[2]) {
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; ++i) {
      const int key = column + i / 4 * 8 + (i & 1), h = i >> 1 & 1;
      if (key < begin[h] || key >= end[h]) s[i] = minus_infinity();
    }
  }

  // The tile's scores become weights, as the operand of P V, and join the sums. A row's weights are relative to its base,
  // a maximum of some of its scores: which one, softmax does not mind, as long as no weight grows too large to hold. The
  // sums tell, so that maxima are sought only then. True if bases moved: outputs so far are to be multiplied by `rescale`.
  __device__ __forceinline__ bool soften(uint4 (&to)[BLOCK_N / 16], float scale_log2, float (&rescale)[2]) {
    const Pair now = weigh(to, scale_log2, base);
    const bool moved = __any_sync(~0u, !(now.low <= FAR && now.high <= FAR));  // without a base: infinite or NaN
    if (moved) {
      rebase(to, scale_log2, rescale);
    } else {
      sum[0] += now.low;
      sum[1] += now.high;
    }
    return moved;
  }

  // Weights relative to `from`, and this thread's shares of their sums.
  __device__ __forceinline__ Pair weigh(uint4 (&to)[BLOCK_N / 16], float scale_log2, const float (&from)[2]) const {
    float part[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
    for (int t = 0; t < BLOCK_N / 16; ++t) {
      float w[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        w[j] = exp2_fast(fmaf(s[8 * t + j], scale_log2, -from[j >> 1 & 1]));
        part[j & 3] += w[j];
      }
      to[t] = make_uint4(pack_pair(w[0], w[1]), pack_pair(w[2], w[3]), pack_pair(w[4], w[5]), pack_pair(w[6], w[7]));
    }
    return {part[0] + part[1], part[2] + part[3]};
  }

  // Moves the bases up to the maxima of all scores so far, and weighs the tile relative to them.
  __device__ __forceinline__ void rebase(uint4 (&to)[BLOCK_N / 16], float scale_log2, float (&rescale)[2]) {
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
    const Pair now = weigh(to, scale_log2, from);
    sum[0] = fmaf(sum[0], rescale[0], now.low);
    sum[1] = fmaf(sum[1], rescale[1], now.high);
  }

  __device__ __forceinline__ void rescale_output(const float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < VALUE_DIM / 2; ++i) o[i] *= rescale[i >> 1 & 1];
  }
};

// ---- blocks of queries ----------------------------------------------------------------------------------------

struct Rows {
  int first, count;
};

// Of a sequence: all `n` of its batch entry, or what packed `bounds` say.
__device__ __forceinline__ Rows rows_of(int sequence, const int* bounds, int n) {
  if (!bounds) return {0, n};
  const int first = bounds[sequence];
  return {first, bounds[sequence + 1] - first};
}

struct Block {
  bool exists;
  int batch, head, row;  // the first query's, in its sequence
  Rows q, k;             // the sequence
  long long first;       // the sequence's first query, as a row of [B, Hq, Nq]
  int shift, seen_before, seen_after;
  int tiles, end_tile;   // of keys, the last of which precedes end_tile

  // Query i, which stands at key i + shift, sees the keys from first_key(i) to end_key(i). Both grow with i.
  __device__ __forceinline__ int first_key(int i) const { return max(0, i + shift - seen_before); }
  __device__ __forceinline__ int end_key(int i) const { return min(k.count, i + shift + seen_after); }
};

// Block `index`. There is none past the last, and a shorter sequence has fewer than its share.
__device__ __forceinline__ Block block_at(const Params& params, int index) {
  Block b;
  b.exists = false;
  if (index >= params.blocks) return b;
  const int sequence = index / params.width, place = index % params.width;
  b.q = rows_of(sequence, params.q_bounds, params.n_q);
  b.k = rows_of(sequence, params.k_bounds, params.n_k);
  b.batch = params.q_bounds ? 0 : sequence;
  const int of_head = (b.q.count + BLOCK_M - 1) / BLOCK_M;
  b.exists = place < of_head * params.heads;
  if (!b.exists) return b;
  const int first_head = place / (of_head * params.together) * params.together;
  const int heads = min(params.together, params.heads - first_head), among = place - first_head * of_head;
  b.head = first_head + among % heads;
  b.row = (of_head - 1 - among / heads) * BLOCK_M;
  b.first = (long long)(b.batch * params.heads + b.head) * params.n_q + b.q.first;
  b.shift = b.k.count - b.q.count;
  b.seen_before = params.window - 1;
  b.seen_after = params.causal ? 1 : params.window;
  // One tile at least, and be it of keys that nobody sees.
  b.end_tile = (max(1, b.end_key(min(b.row + BLOCK_M, b.q.count) - 1)) + BLOCK_N - 1) / BLOCK_N;
  b.tiles = b.end_tile - b.first_key(b.row) / BLOCK_N;
  return b;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prefill_kernel(const __grid_constant__ Params params, const __grid_constant__ TensorMap k_map,
                   const __grid_constant__ TensorMap v_map) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 k_tiles = (u32)__cvta_generic_to_shared(shared);  // [STAGES] tiles of K, then of V, then queries, then barriers
  const u32 v_tiles = k_tiles + STAGES * K_BYTES;
  const u32 q_tiles = v_tiles + STAGES * V_BYTES;
  const u32 k_full = q_tiles + CONSUMERS * Q_BYTES;
  const u32 v_full = k_full + 8 * STAGES, k_empty = v_full + 8 * STAGES, v_empty = k_empty + 8 * STAGES;
  const u32 told = v_empty + 8 * STAGES, told_index = told + 8 * TOLD;  // [TOLD] in turn: a block has been taken; its index

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup == CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    const bool leads = threadIdx.x % 128 == 0;
    if (leads) {
      for (int i = 0; i < STAGES; ++i) {
        barrier_init(k_full + 8 * i, 1);
        barrier_init(v_full + 8 * i, 1);
        barrier_init(k_empty + 8 * i, CONSUMERS * 4);  // one arrival a warp
        barrier_init(v_empty + 8 * i, CONSUMERS * 4);
      }
      for (int i = 0; i < TOLD; ++i) barrier_init(told + 8 * i, 1);
      asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
    named_arrive(0, THREADS);
    if (leads) {
      // Blocks get shorter. So a thread block takes the first that is left, and late, when the block before has all of its
      // tiles; where all get two at most, the second ones are dealt in reverse.
      int takes = 0;
      auto another = [&] {
        int taken = takes++ == 0 ? gridDim.x - 1 - blockIdx.x : params.blocks;
        if (params.taken) asm volatile("atom.global.add.u32 %0, [%1], 1;" : "=r"(taken) : "l"(params.taken) : "memory");
        return (int)gridDim.x + taken;
      };
      // The n-th block of this thread block, which consumers are told of: of block n - TOLD they have been, since its first
      // tile had to leave room for one of block n - 1.
      auto take = [&](int n) {
        int index = n == 0 ? blockIdx.x : another();
        Block b = block_at(params, index);
        while (!b.exists && index < params.blocks) b = block_at(params, index = another());
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(told_index + 4 * (n % TOLD)), "r"(index) : "memory");
        barrier_arrive(told + 8 * (n % TOLD));
        return b;
      };
      Block block = take(0), next;
      Cursor at;
      for (int n = 1; block.exists; ++n, block = next) {
        const int kv_head = block.head / params.group;
        for (int i = 0; i < block.tiles; ++i, at.advance()) {
          const int stage = at.stage, row = block.k.first + (block.end_tile - 1 - i) * BLOCK_N;
          barrier_wait(k_empty + 8 * stage, at.parity ^ 1);
          barrier_expect(k_full + 8 * stage, K_BYTES);
#pragma unroll
          for (int c = 0; c < HEAD_DIM / 64; ++c)
            copy_box(k_tiles + stage * K_BYTES + c * BOX, &k_map, k_full + 8 * stage, 64 * c, row, kv_head, block.batch);
          barrier_wait(v_empty + 8 * stage, at.parity ^ 1);
          barrier_expect(v_full + 8 * stage, V_BYTES);
#pragma unroll
          for (int c = 0; c < VALUE_DIM / 64; ++c)
            copy_box(v_tiles + stage * V_BYTES + c * BOX, &v_map, v_full + 8 * stage, 64 * c, row, kv_head, block.batch);
          if (i == block.tiles - 1) next = take(n);
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const int row_in_tile = thread / 32 * 16 + lane / 4;  // this thread's of its warpgroup's 64, and row + 8
    const int column = lane % 4 * 2;
    const float scale_log2 = params.scale * LOG2E;
    // Consumers take turns to issue matrix work (barrier 1 + warpgroup), so that one's softmax runs under another's
    // matrix work.
    const int turn = 1 + warpgroup, next_turn = 1 + (warpgroup + 1) % CONSUMERS;

    Consumer c;
    const u32 q_tile = q_tiles + warpgroup * Q_BYTES;
    c.q = (u64)(q_tile >> 4) | (u64)(1024 >> 4) << 16 | (u64)(128 >> 4) << 32;  // halves 1024 bytes apart, groups of 8 rows 128
    Block block;
    // The n-th block, and its queries on their way.
    auto begin_block = [&](int n) {
      barrier_wait(told + 8 * (n % TOLD), n / TOLD & 1);
      int index;
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(index) : "r"(told_index + 4 * (n % TOLD)) : "memory");
      block = block_at(params, index);
      if (!block.exists) return;
      const int row = block.row + 64 * warpgroup;
      const long long first = block.first + row;
      const QueryCodes& q = params.q;
      const char* dense = q.dense + block.batch * q.dense_batch + block.head * q.dense_head + (block.q.first + row) * q.dense_row;
      stage_queries(dense, q.dense_row, q.values + first * (SPARSE_STEPS * 32), q.indices + first * (SPARSE_STEPS * 16),
                    block.q.count - row, thread, [&](int at, const char* from, bool there) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(q_tile + at), "l"(from), "r"(there ? 16 : 0) : "memory");
      });
    };
    named_sync(0, THREADS);  // the barriers are there
    begin_block(0);
    Cursor k_at, v_at;
    auto k_word = [&] { return low_word(k_tiles, 16) + k_at.stage * (K_BYTES / 16); };
    auto v_word = [&] { return low_word(v_tiles, BOX) + v_at.stage * (V_BYTES / 16); };
    auto await_k = [&] { barrier_wait(k_full + 8 * k_at.stage, k_at.parity); };
    auto await_v = [&] { barrier_wait(v_full + 8 * v_at.stage, v_at.parity); };
    auto release = [&](u32 barriers, Cursor at) {
      if (lane == 0) barrier_arrive(barriers + 8 * at.stage);
    };
    for (int n = 1; block.exists; ++n) {
      const int tiles = block.tiles, end_tile = block.end_tile, end_row = block.q.count;
      const int tile_row = block.row + 64 * warpgroup, row = tile_row + row_in_tile;
      const int begin[2] = {block.first_key(row), block.first_key(row + 8)}, end[2] = {block.end_key(row), block.end_key(row + 8)};
      const int begin_all = block.first_key(tile_row + 63), end_all = block.end_key(tile_row);  // what all 64 queries see
      unsigned short* out = params.out + block.batch * params.out_batch + block.head * params.out_head +
                            (block.q.first + row) * params.out_row;
      float* lse = params.lse + block.first + row;
      c.receive(shared + (q_tile - k_tiles), end_row - tile_row, row_in_tile, lane, warpgroup);
#pragma unroll
      for (int i = 0; i < VALUE_DIM / 2; ++i) c.o[i] = 0.f;
      c.base[0] = c.base[1] = minus_infinity();
      c.sum[0] = c.sum[1] = 0.f;
      float rescale[2];
      if (CONSUMERS > 1 && warpgroup == CONSUMERS - 1 && tiles > 1) named_arrive(next_turn, 256);

      await_k();
      c.issue_scores(k_word());
      const Cursor k_first = k_at;
      k_at.advance();
      if (ASKS_EARLY && tiles > 1) await_k();
      wgmma_wait<0>();
      pin(c.s);
      release(k_empty, k_first);
      c.mask((end_tile - 1) * BLOCK_N + column, begin, end);
      c.rebase(c.p[0], scale_log2, rescale);  // there is no output yet
      if (params.k_bounds && end_tile * BLOCK_N > block.k.count) {  // the next sequence's values: 0 * NaN is NaN
        await_v();
        clear_rows(v_tiles + v_at.stage * V_BYTES, block.k.count - (end_tile - 1) * BLOCK_N, thread, warpgroup);
      }
      // While P V of tile i - 1 runs, the scores of tile i become weights. The branch on their sums keeps the compiler from moving
      // exponentials behind the wait for P V.
      auto step = [&](int i, auto masked, auto odd) {
        constexpr int TO = decltype(odd)::value, FROM = 1 - TO;
        const Cursor k_now = k_at, v_now = v_at;
        if (!ASKS_EARLY) await_k();
        if (CONSUMERS > 1) named_sync(turn, 256);
        c.issue_scores(k_word());
        await_v();
        c.issue_output(v_word(), c.p[FROM]);
        if (CONSUMERS > 1 && !(warpgroup == CONSUMERS - 1 && i == tiles - 1)) named_arrive(next_turn, 256);
        k_at.advance();
        v_at.advance();
        if (ASKS_EARLY && i < tiles - 1) await_k();
        wgmma_wait<1>();
        pin(c.s);
        release(k_empty, k_now);
        if (decltype(masked)::value) c.mask((end_tile - 1 - i) * BLOCK_N + column, begin, end);
        const bool moved = c.soften(c.p[TO], scale_log2, rescale);
        wgmma_wait<0>();
        pin(c.o);
        release(v_empty, v_now);
        if (moved) c.rescale_output(rescale);
      };
      int i = 1;
      auto masked_until = [&](int stop) {
        for (; i < stop; ++i)
          if (i % 2)
            step(i, Bool<true>(), Bool<true>());
          else
            step(i, Bool<true>(), Bool<false>());
      };
      // All 64 queries see the whole of tiles [open, closed). They come in pairs, the first of them odd, so that no step asks which
      // buffer it has; one at either end may be masked in vain. closed <= tiles, as begin_all is no less than the first key that the
      // block's first query sees.
      const int open = max(1, end_tile - end_all / BLOCK_N) | 1, closed = end_tile - (begin_all + BLOCK_N - 1) / BLOCK_N;
      masked_until(min(open, tiles));
      for (; i + 1 < closed; i += 2) {
        step(i, Bool<false>(), Bool<true>());
        step(i + 1, Bool<false>(), Bool<false>());
      }
      masked_until(tiles);
      await_v();
      if (tiles % 2)
        c.issue_output(v_word(), c.p[0]);
      else
        c.issue_output(v_word(), c.p[1]);
      named_sync(8 + warpgroup, 128);  // all four warps have multiplied the queries
      begin_block(n);
      wgmma_wait<0>();
      pin(c.o);
      release(v_empty, v_at);
      v_at.advance();

#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = quad_sum(c.sum[h]);
        const float inverse = 1.f / sum;
        const bool there = row + 8 * h < end_row, none = sum == 0.f;  // a row that sees no key: output 0
#pragma unroll
        for (int j = 0; j < VALUE_DIM / 8; j += 4) {
          u32 words[4];  // of columns 8j, 8j + 8, 8j + 16 and 8j + 24, plus 2 * (lane % 4)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const u32 word = pack_pair(c.o[4 * (j + i) + 2 * h] * inverse, c.o[4 * (j + i) + 2 * h + 1] * inverse);
            words[i] = none ? 0 : word;
          }
          const uint4 columns = quad_transpose(words, lane);
          if (there) *(uint4*)(out + 8 * h * params.out_row + 8 * (j + lane % 4)) = columns;
        }
        if (there && lane % 4 == 0) lse[8 * h] = none ? minus_infinity() : (c.base[h] + log2_fast(sum)) / LOG2E;
      }
    }
  }
}

// Attention forward for queries that are 2:4 sparse beside a dense channel: S = Q Kᵀ on Hopper's sparse tensor cores (the
// dense channel on the dense ones), online softmax in registers, O = P V. docs/notes/2026-11-27-prefill.md tells the design.
//
// A thread block stays on its multiprocessor and works on tiles of BLOCK_M = 64 * CONSUMERS queries of one head, one after the
// other. For each it walks the keys in tiles of BLOCK_N, last tile first. One warpgroup produces: it schedules work tiles, and
// has the copy engine bring tiles of K and V to shared memory. Each of the others consumes for its own 64 queries. compiler.py
// puts the other files in front of this one, and in front of all the tile's sizes and one function per matrix instruction. Both
// main loops stand in the kernel itself: out of functions of their own the assembler makes other code for some tiles.

template <bool VALUE>
struct Bool { static constexpr bool value = VALUE; };

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prefill_kernel(const __grid_constant__ Params params, const __grid_constant__ TensorMap k_map,
                   const __grid_constant__ TensorMap v_map) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const SharedMemory shared((u32)__cvta_generic_to_shared(memory));
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup == CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    const bool elected = threadIdx.x % 128 == 0;
    if (elected) initialise_barriers(shared);
    __syncwarp();
    named_arrive(MBARRIERS_READY, THREADS);
    if (elected) {
      TileScheduler scheduler{params};
      auto schedule = [&](int n) {
        int index = n == 0 ? blockIdx.x : scheduler.claim();
        WorkTile tile = work_tile_at(params, index);
        while (!tile.exists && index < params.work_tiles) tile = work_tile_at(params, index = scheduler.claim());
        publish_work_tile(shared, n, index);
        return tile;
      };
      WorkTile tile = schedule(0), next;
      PipelineState at;
      for (int n = 1; tile.exists; ++n, tile = next) {
        const int kv_head = tile.head / params.heads_per_kv_head;
        for (int i = 0; i < tile.kv_tiles; ++i, at.advance()) {
          const int stage = at.stage, row = tile.k.first + (tile.end_kv_tile - 1 - i) * BLOCK_N;
          barrier_wait(shared.k_empty + 8 * stage, at.parity ^ 1);
          barrier_expect(shared.k_full + 8 * stage, K_BYTES);
#pragma unroll
          for (int c = 0; c < HEAD_DIM / 64; ++c)
            copy_box(shared.k_tiles + stage * K_BYTES + c * BOX_BYTES, &k_map, shared.k_full + 8 * stage, 64 * c, row, kv_head, tile.batch);
          barrier_wait(shared.v_empty + 8 * stage, at.parity ^ 1);
          barrier_expect(shared.v_full + 8 * stage, V_BYTES);
#pragma unroll
          for (int c = 0; c < VALUE_DIM / 64; ++c)
            copy_box(shared.v_tiles + stage * V_BYTES + c * BOX_BYTES, &v_map, shared.v_full + 8 * stage, 64 * c, row, kv_head, tile.batch);
          if (i == tile.kv_tiles - 1) next = schedule(n);
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
    const int thread = threadIdx.x % 128, lane = thread % 32;
    const int row_in_tile = thread / 32 * 16 + lane / 4;  // this thread's of its warpgroup's 64, and row + 8
    const int column = lane % 4 * 2;
    const float scale_log2 = params.scale * LOG2E;
    // Ping-pong: consumers take turns to issue matrix instructions, so that one's softmax runs under another's products.
    const int turn = MMA_TURN + warpgroup, next_turn = MMA_TURN + (warpgroup + 1) % CONSUMERS;

    Consumer c;
    const u32 q_tile = shared.q_tiles + warpgroup * Q_BYTES;
    c.q = query_descriptor(q_tile);
    WorkTile tile;
    // The n-th work tile, and its queries on their way.
    auto begin_tile = [&](int n) {
      tile = await_work_tile(params, shared, n);
      if (!tile.exists) return;
      const int row = tile.row + 64 * warpgroup;
      const long long first = tile.first + row;
      const QueryCodes& q = params.q;
      const char* dense = q.dense + tile.batch * q.dense_batch + tile.head * q.dense_head + (tile.q.first + row) * q.dense_row;
      stage_queries(dense, q.dense_row, q.values + first * (SPARSE_STEPS * 32), q.indices + first * (SPARSE_STEPS * 16),
                    tile.q.count - row, thread, [&](int at, const char* from, bool valid) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(q_tile + at), "l"(from), "r"(valid ? 16 : 0) : "memory");
      });
    };
    named_sync(MBARRIERS_READY, THREADS);
    begin_tile(0);
    const u32 k_tiles = shared.k_tiles, v_tiles = shared.v_tiles, k_full = shared.k_full, v_full = shared.v_full;
    PipelineState k_at, v_at;
    auto k_word = [&] { return low_word(k_tiles, 16) + k_at.stage * (K_BYTES / 16); };
    auto v_word = [&] { return low_word(v_tiles, BOX_BYTES) + v_at.stage * (V_BYTES / 16); };
    auto await_k = [&] { barrier_wait(k_full + 8 * k_at.stage, k_at.parity); };
    auto await_v = [&] { barrier_wait(v_full + 8 * v_at.stage, v_at.parity); };
    auto release = [&](u32 barriers, PipelineState at) {
      if (lane == 0) barrier_arrive(barriers + 8 * at.stage);
    };
    for (int n = 1; tile.exists; ++n) {
      const int tiles = tile.kv_tiles, end_tile = tile.end_kv_tile, end_row = tile.q.count;
      const int tile_row = tile.row + 64 * warpgroup, row = tile_row + row_in_tile;
      const Mask& mask = tile.mask;
      const int begin[2] = {mask.first_key(row), mask.first_key(row + 8)};
      const int end[2] = {mask.end_key(row, tile.k.count), mask.end_key(row + 8, tile.k.count)};
      const int begin_all = mask.first_key(tile_row + 63), end_all = mask.end_key(tile_row, tile.k.count);  // what all 64 queries see
      unsigned short* out = params.out + tile.batch * params.out_batch + tile.head * params.out_head +
                            (tile.q.first + row) * params.out_row;
      float* lse = params.lse + tile.first + row;
      c.await_queries(memory + (q_tile - k_tiles), end_row - tile_row, row_in_tile, lane, warpgroup);
#pragma unroll
      for (int i = 0; i < VALUE_DIM / 2; ++i) c.o[i] = 0.f;
      c.softmax.reset();
      float rescale[2];
      if (CONSUMERS > 1 && warpgroup == CONSUMERS - 1 && tiles > 1) named_arrive(next_turn, 256);

      await_k();
      c.issue_scores(k_word());
      const PipelineState k_first = k_at;
      k_at.advance();
      if (EARLY_K_WAIT && tiles > 1) await_k();
      wgmma_wait<0>();
      pin(c.s);
      release(shared.k_empty, k_first);
      mask_scores(c.s, (end_tile - 1) * BLOCK_N + column, begin, end);
      c.softmax.rebase(c.s, c.p[0], scale_log2, rescale);  // there is no output yet
      if (params.cu_seqlens_k && end_tile * BLOCK_N > tile.k.count) {  // the next sequence's values: 0 * NaN is NaN
        await_v();
        clear_rows(v_tiles + v_at.stage * V_BYTES, tile.k.count - (end_tile - 1) * BLOCK_N, thread, warpgroup);
      }
      // While P V of tile i - 1 runs, the scores of tile i become weights. The branch on their sums keeps the compiler from moving
      // exponentials behind the wait for P V.
      auto step = [&](int i, auto masked, auto odd) {
        constexpr int TO = decltype(odd)::value, FROM = 1 - TO;
        const PipelineState k_now = k_at, v_now = v_at;
        if (!EARLY_K_WAIT) await_k();
        if (CONSUMERS > 1) named_sync(turn, 256);
        c.issue_scores(k_word());
        await_v();
        c.issue_output(v_word(), c.p[FROM]);
        if (CONSUMERS > 1 && !(warpgroup == CONSUMERS - 1 && i == tiles - 1)) named_arrive(next_turn, 256);
        k_at.advance();
        v_at.advance();
        if (EARLY_K_WAIT && i < tiles - 1) await_k();
        wgmma_wait<1>();
        pin(c.s);
        release(shared.k_empty, k_now);
        if (decltype(masked)::value) mask_scores(c.s, (end_tile - 1 - i) * BLOCK_N + column, begin, end);
        const bool moved = c.softmax.update(c.s, c.p[TO], scale_log2, rescale);
        wgmma_wait<0>();
        pin(c.o);
        release(shared.v_empty, v_now);
        if (moved) rescale_output(c.o, rescale);
      };
      int i = 1;
      auto masked_until = [&](int stop) {
        for (; i < stop; ++i)
          if (i % 2)
            step(i, Bool<true>(), Bool<true>());
          else
            step(i, Bool<true>(), Bool<false>());
      };
      // All 64 queries see the whole of tiles [open, closed). Their steps are unrolled by two, the first of them odd, so that no step
      // asks which buffer it has; one at either end may be masked in vain. closed <= tiles, as begin_all is no less than the first key
      // that the work tile's first query sees.
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
      named_sync(WARPGROUP + warpgroup, 128);  // all four warps have multiplied the queries
      begin_tile(n);
      wgmma_wait<0>();
      pin(c.o);
      release(shared.v_empty, v_at);
      v_at.advance();

#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float sum = quad_sum(c.softmax.sum[h]);
        const float inverse = 1.f / sum;
        const bool valid = row + 8 * h < end_row, empty = sum == 0.f;
#pragma unroll
        for (int j = 0; j < VALUE_DIM / 8; j += 4) {
          const uint4 columns = output_columns(c.o, j, h, inverse, empty, lane);
          if (valid) *(uint4*)(out + 8 * h * params.out_row + 8 * (j + lane % 4)) = columns;
        }
        if (valid && lane % 4 == 0) lse[8 * h] = log_sum_exp(c.softmax.base[h], sum, empty);
      }
    }
  }
}

// Attention of a few queries over codes, split over keys: each warp takes some of its own and reads their codes and values straight into
// registers. Warps wait for one another only at the end, when a block merges what they found, and the last block what all did. Scores are in log2
// units: softmax runs in base 2.
//
// The codes of the next keys are asked for as soon as those of the present ones are scored, and their values when the present ones are summed:
// so a warp has most of its registers full of bytes under way.

struct SharedWarp {
  alignas(8) u16 weights[ROWS * WEIGHT_STRIDE];
  float products[HAS_CHANNEL ? WARP_KEYS : 2][ROWS + 1];
  float scores[TOLERANT ? ROWS : 1][TOLERANT ? SEGMENT : 2];  // of a segment
  u16 needed[TOLERANT ? SEGMENT : 4];                         // its keys whose values are read
};

struct SharedSums {
  float peak[WARPS][ROWS], total[WARPS][ROWS], out[WARPS][ROWS][VALUE_DIM];
  int is_last;
};

struct Shared {
  SharedQuery query;
  alignas(8) SharedWarp warps[WARPS];
  alignas(8) SharedSums sums;
};

constexpr int SETTLE = 4;  // times 32 keys between settlements of sums

// What a warp knows of its sequence.
struct Sequence {
  const u8* padding;
  const int* pages;
  int length, begin, end, first;  // keys begin to end are the warp's; those from `first` on are seen by some query
  int blocks;                     // of the tile have keys, one at least
  int last_start;                 // 32 keys lie in the cache from here on, and no later

  // The keys from `start` on: where fewer than 32 are there, some before them too, which count as not seen.
  DEVICE Keys keys(int start) const {
    const int from = IS_PAGED || start <= last_start ? start : last_start, key = from + lane_id();
    const bool is_there = key < end;
    int page = 0;
    if constexpr (IS_PAGED) page = is_there ? pages[key / PAGE] : 0;
    return {ballot(is_there && key >= start && key >= first && !(padding && padding[key])), key, page};
  }
};

DEVICE Sequence sequence_of(const Params& p, int batch, int warp) {
  int length = p.n;
  if (p.lengths) {
    const i64 given = p.lengths_are_64_bit ? static_cast<const i64*>(p.lengths)[batch] : static_cast<const int*>(p.lengths)[batch];
    length = given < 0 ? 0 : given < p.n ? int(given) : p.n;
  }
  int first = p.window ? length - p.m - p.window + 1 : 0;
  first = first < 0 ? 0 : first;
  const int from = first / WARP_KEYS * WARP_KEYS, warps = int(gridDim.y) * WARPS, each = (length - from + warps - 1) / warps;
  const int share = (each + WARP_KEYS - 1) / WARP_KEYS * WARP_KEYS, begin = from + (int(blockIdx.y) * WARPS + warp) * share;
  const int blocks = share ? (length - from + share * WARPS - 1) / (share * WARPS) : 1;
  return {p.padding ? p.padding + batch * p.padding_batch : nullptr, p.pages ? p.pages + batch * p.pages_batch : nullptr,
          length, begin, begin + share < length ? begin + share : length, first, blocks, p.n - WARP_KEYS};
}

DEVICE Rows of_head(Rows x, int batch, int kv_head) {
  x.data += kv_head * x.head + (IS_PAGED ? 0 : batch * x.outer);
  return x;
}

// What 2^x is of 2^peak, which is no smaller.
DEVICE float relative(float x, float peak) { return peak == -INFINITE ? 0.0f : exp2_fast(x - peak); }

// The online softmax of the query rows, and what it has summed.
struct Sums {
  float peak[ROWS];    // largest score so far, the same in all lanes
  float total[ROWS];   // weights of the lane's keys, relative to 2^peak
  float centre[ROWS];  // those times the middle of their values
  float unit;          // of `out` and `mass`: the largest scale of a value so far, so that a weight times its scale is within float16's range
  float inverse;       // 1 / unit
  float out[VALUE_TILES][4];
  float mass[4];  // weights of the query rows 2 * quad and 2 * quad + 1 since sums were settled

  DEVICE void clear() {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      peak[r] = -INFINITE;
      total[r] = centre[r] = 0;
    }
    unit = ARE_VALUES_LEVELS ? 0x1p-100f : 1.0f;
    inverse = 1 / unit;
    mass[0] = mass[1] = mass[2] = mass[3] = 0;
#pragma unroll
    for (int i = 0; i < VALUE_TILES; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i][j] = 0;
  }

  DEVICE float base(int r) const { return peak[r] == -INFINITE ? 0.0f : peak[r]; }

  // Takes the middle of the levels off the sums so far. Matrix units cut sums off, so these must not grow far above what they mean.
  DEVICE void settle() {
    if constexpr (!ARE_VALUES_LEVELS) return;
#pragma unroll
    for (int i = 0; i < VALUE_TILES; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i][j] -= VALUE_MIDDLE / (j < 2 ? EVEN_UNIT : ODD_UNIT) * mass[j % 2];
    mass[0] = mass[1] = 0;
  }

  // The lane's feature 2 * i + j for query row r, which it has.
  DEVICE float output(int i, int j, int r) const {
    if constexpr (!ARE_VALUES_LEVELS) return out[i][2 * j + r % 2];
    return out[i][2 * j + r % 2] * (j ? ODD_UNIT : EVEN_UNIT) * unit;
  }

  // Scale all sums of values by a factor per query row.
  DEVICE void scale_out(const float (&factor)[ROWS]) {
    const int quad = lane_id() % 4;
    float low = factor[0], high = factor[ROWS > 1 ? 1 : 0];
#pragma unroll
    for (int i = 1; i < 4; ++i)
      if (2 * i < ROWS && quad == i) {
        low = factor[2 * i % ROWS];
        high = factor[(2 * i + 1) % ROWS];
      }
#pragma unroll
    for (int i = 0; i < VALUE_TILES; ++i) {
      out[i][0] *= low;
      out[i][1] *= high;
      out[i][2] *= low;
      out[i][3] *= high;
    }
    mass[0] *= low;
    mass[1] *= high;
  }
};

// Makes room for the lane's scores and, of its value, the scale `step`; `kept` is relative to the peaks as `total` is.
DEVICE void raise(Sums& sums, float (&kept)[ROWS], const float (&score)[ROWS], float step) {
  bool grows = ARE_VALUES_LEVELS && step > sums.unit && step < 0x1p100f;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) grows |= score[r] > sums.peak[r];
  if (!ballot(grows)) return;
  float largest[ROWS], shrink[ROWS], unit = sums.unit;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) largest[r] = fmaxf(warp_max(score[r]), sums.peak[r]);
  if constexpr (ARE_VALUES_LEVELS) unit = fmaxf(unit, warp_max(step < 0x1p100f ? step : 0.0f));
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    shrink[r] = relative(sums.peak[r], largest[r]);
    sums.peak[r] = largest[r];
    sums.total[r] *= shrink[r];
    sums.centre[r] *= shrink[r];
    kept[r] *= shrink[r];
    shrink[r] *= sums.unit / unit;
  }
  sums.unit = unit;
  sums.inverse = 1 / unit;
  sums.scale_out(shrink);
}

// Scores of the lane's key from its products, -infinity where a query does not see it.
DEVICE void apply_rules(float (&score)[ROWS], const Params& p, const Sequence& s, int first_row, const Keys& keys) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    score[r] *= p.scale;
    if constexpr (CAPPED) score[r] = p.cap * (2.0f / (1.0f + exp2_fast(-2.8853900817779268f * score[r])) - 1.0f);  // tanh
    bool is_seen = keys.is_mine_seen();
    if constexpr (SEVERAL_QUERIES) {
      const int last = s.length - p.m + (first_row + r) % p.m;
      is_seen = is_seen && keys.key <= last && !(p.window && keys.key <= last - p.window);
    }
    if (!is_seen) score[r] = -INFINITE;
  }
}

struct ValueScale {
  float step, centre;
};

DEVICE ValueScale load_value_scale(const Params& p, const Keys& keys) {
  ValueScale x = {1.0f, 0.0f};
  if constexpr (ARE_VALUES_LEVELS) {
    x.step = 0;
    if (keys.is_mine_seen()) {
      x.step = from_bits(load_number<VALUE_SCALE_BYTES>(my_row(p.v_scale, keys, p.v_scale.key)));
      if constexpr (VALUE_CENTRED) x.centre = from_bits(load_number<2>(my_row(p.v_centre, keys, p.v_centre.key)));
    }
  }
  return x;
}

// Merges what the warps of a block found, and what the blocks of a tile did: the last one to end writes the output.
DEVICE void store(const Params& p, Sums& sums, SharedSums& all, int blocks, int head, int first_row) {
  const int lane = lane_id(), quad = lane % 4, group = lane / 4, warp = threadIdx.x / 32;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float total = warp_sum(sums.total[r]), centre = VALUE_CENTRED ? warp_sum(sums.centre[r]) : 0;
    if (lane == 0) {
      all.peak[warp][r] = sums.peak[r];
      all.total[warp][r] = total;
    }
    if (r / 2 == quad) {
#pragma unroll
      for (int i = 0; i < LANE_FEATURES; ++i) all.out[warp][r][value_feature(group, i)] = sums.output(i / 2, i % 2, r) + centre;
    }
  }
  sync_block();
  const i64 tile_row = i64(head) * int(gridDim.y) * p.padded_rows + first_row;
  const auto row = [&](int block, int r) { return tile_row + block * p.padded_rows + r; };
  for (int i = threadIdx.x; i < ROWS * VALUE_DIM; i += 32 * WARPS) {
    const int r = i / VALUE_DIM, c = i % VALUE_DIM;
    float peak = -INFINITE, total = 0, out = 0;
    for (int w = 0; w < WARPS; ++w) peak = fmaxf(peak, all.peak[w][r]);
    for (int w = 0; w < WARPS; ++w) {
      const float factor = relative(all.peak[w][r], peak);
      total += factor * all.total[w][r];
      out += factor * all.out[w][r][c];
    }
    const i64 to = row(blockIdx.y, r);
    p.partial[to * VALUE_DIM + c] = out;
    if (c == 0) {
      p.peak[to] = peak;
      p.total[to] = total;
    }
  }
  sync_block();
  if (threadIdx.x == 0) all.is_last = count_to(u32(blocks) - 1, p.ended + blockIdx.x) == u32(blocks) - 1;
  sync_block();
  if (!all.is_last) return;
  for (int r = warp; r < ROWS; r += WARPS) {
    float peak = -INFINITE, total = 0;
    for (int i = lane; i < blocks; i += 32) peak = fmaxf(peak, load_written(p.peak + row(i, r)));
    peak = warp_max(peak);
    for (int i = lane; i < blocks; i += 32) total += load_written(p.total + row(i, r)) * relative(load_written(p.peak + row(i, r)), peak);
    total = warp_sum(total);
    const float some = total == 0 ? 1.0f : total;  // a row that sees no key: output 0, log-sum-exp -infinity
    if (lane == 0) {
      all.peak[0][r] = peak;
      all.total[0][r] = some;
      if (p.lse && first_row + r < p.rows) p.lse[i64(head) * p.rows + first_row + r] = (peak + log2_exact(some)) * 0.6931471805599453f;
    }
  }
  sync_block();
  // Four features a lane: a row is read by a warp, or by each half of one, which takes every other block.
  constexpr int ROW_LANES = VALUE_DIM / 4, TEAMS = 32 * WARPS / ROW_LANES;
  const int team = threadIdx.x / ROW_LANES, column = threadIdx.x % ROW_LANES * 4;
  for (int r = 0; r < ROWS; ++r) {
    float out[4] = {};
#pragma unroll 8
    for (int i = team; i < blocks; i += TEAMS) {
      float x[4];
      load_written(x, p.partial + row(i, r) * VALUE_DIM + column);
      const float factor = relative(load_written(p.peak + row(i, r)), all.peak[0][r]);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[j] += factor * x[j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (ROW_LANES < 32) out[j] += from_lane_xor(out[j], ROW_LANES);
      all.out[warp][r][column + j] = out[j];
    }
  }
  sync_block();
  for (int i = threadIdx.x; i < ROWS * VALUE_DIM; i += 32 * WARPS) {
    const int r = i / VALUE_DIM, c = i % VALUE_DIM;
    float out = 0;
    for (int w = 0; w < WARPS; ++w) out += all.out[w][r][c];
    all.out[0][r][c] = out / all.total[0][r];
  }
  if constexpr (VALUE_CENTRED) {  // rotated values: back again
    for (int step = 1; step < VALUE_DIM; step *= 2) {
      sync_block();
      for (int i = threadIdx.x; i < ROWS * VALUE_DIM / 2; i += 32 * WARPS) {
        const int r = i / (VALUE_DIM / 2), j = i % (VALUE_DIM / 2), c = j / step * 2 * step + j % step;
        const float x = all.out[0][r][c], y = all.out[0][r][c + step];
        all.out[0][r][c] = x + y;
        all.out[0][r][c + step] = x - y;
      }
    }
  }
  sync_block();
  for (int i = threadIdx.x; i < ROWS * VALUE_DIM; i += 32 * WARPS) {
    const int r = i / VALUE_DIM, c = i % VALUE_DIM;
    const float x = all.out[0][r][c] * (VALUE_CENTRED ? (VALUE_DIM == 64 ? 0.125f : 0.08838834764831845f) : 1.0f);
    if (first_row + r < p.rows) p.out[(i64(head) * p.rows + first_row + r) * VALUE_DIM + c] = IS_BF16 ? to_bf16(x) : to_half(x);
  }
}

// Puts the weights of the lane's key into the shared memory of its warp, as `add_values` reads them, and adds them to `mass`.
DEVICE void weigh(Sums& sums, float (&mass)[ROWS], SharedWarp& own, const float (&weight)[ROWS], ValueScale scale) {
  const float inverse = ARE_VALUES_LEVELS ? scale.step * sums.inverse : 1.0f;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    mass[r] += weight[r];
    if constexpr (VALUE_CENTRED) sums.centre[r] += weight[r] * scale.centre;
    own.weights[r * WEIGHT_STRIDE + lane_id()] = to_weight(weight[r] * inverse);
  }
}

// Attends to the keys of a warp, reading every value. `wait` is for the queries, once the first keys are asked
// for.
template <class Wait>
DEVICE void attend(Sums& sums, const Params& p, const Sequence& s, const SharedQuery& query, SharedWarp& own, int first_row, Wait wait) {
  StoredKeys stored;
  StoredValues values;
  Keys keys = s.keys(s.begin), next = s.keys(s.begin + WARP_KEYS);
  load_keys(stored, p, keys);
  ValueScale scale = load_value_scale(p, keys);
  load_values<true>(values, 0, p, keys);
  load_values<true>(values, 1, p, keys);
  wait();
  for (int start = s.begin; start < s.end; start += WARP_KEYS) {
    float score[ROWS], none[ROWS] = {};
    key_products(score, stored, query, own.products);
    apply_rules(score, p, s, first_row, keys);
    load_keys(stored, p, next);
    raise(sums, none, score, scale.step);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) score[r] = exp2_fast(score[r] - sums.base(r));  // weights
    weigh(sums, sums.total, own, score, scale);
    scale = load_value_scale(p, next);
    sync_warp();
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      clear_unseen(values, tile, keys);
      add_values(sums.out, sums.mass, values, tile, own.weights);
      load_values<true>(values, tile, p, next);
    }
    sync_warp();  // before the next weights
    if ((start - s.begin) / WARP_KEYS % SETTLE == SETTLE - 1) sums.settle();
    keys = next;
    next = s.keys(start + 2 * WARP_KEYS);
  }
}

constexpr int CHUNKS = SEGMENT / WARP_KEYS;

// Makes weights of a segment's scores. The share of its row's mass so far that the lane's key of each chunk has, the largest of all query
// rows; and that mass.
DEVICE void find_shares(float (&share)[CHUNKS], float (&mass)[ROWS], Sums& sums, SharedWarp& own) {
  const int lane = lane_id();
  float inverse[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float base = sums.base(r);
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      float& score = own.scores[r][WARP_KEYS * i + lane];
      score = exp2_fast(score - base);
      sums.total[r] += score;
      if (ROWS == 1) share[i] = score;
    }
    mass[r] = warp_sum(sums.total[r]);
    inverse[r] = mass[r] > 0 ? 1 / mass[r] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    if (ROWS == 1) {
      share[i] *= inverse[0];
      continue;
    }
    share[i] = 0;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float x = own.scores[r][WARP_KEYS * i + lane] * inverse[r];
      share[i] = x > share[i] || x != x ? x : share[i];  // NaN is not to be lost
    }
  }
}

// The largest share found below which all together have at most `budget`, and an upper bound of what they have.
DEVICE float find_cut(const float (&share)[CHUNKS], float budget, float& below) {
  constexpr float STEPS = 0x1p24f;  // sums are of whole numbers, each lane's rounded up
  float low = -40, high = 0, cut = 0;  // exponents
  below = 0;
  for (int step = 0; step < 9; ++step) {
    const float middle = (low + high) / 2, edge = exp2_fast(middle);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) sum += share[i] < edge ? share[i] : 0.0f;
    sum = sum_of_lanes(u32(sum * STEPS) + 1) / STEPS;
    if (sum <= budget) {
      low = middle;
      cut = edge;
      below = sum;
    } else {
      high = middle;
    }
  }
  return cut;
}

// Attends to the keys of a warp, but leaves out values that together carry at most `tolerance` of the mass of each query row, and lets the
// others stand for them. What was left out before counts: segments after a heavy one may leave out more.
template <class Wait>
DEVICE void attend_within(Sums& sums, const Params& p, const Sequence& s, const SharedQuery& query, SharedWarp& own, int first_row, Wait wait) {
  const int lane = lane_id();
  StoredKeys stored[KEYS_AHEAD];
  Keys keys[KEYS_AHEAD], next = s.keys(s.begin + KEYS_AHEAD * WARP_KEYS);
#pragma unroll
  for (int i = 0; i < KEYS_AHEAD; ++i) {
    keys[i] = s.keys(s.begin + WARP_KEYS * i);
    load_keys(stored[i], p, keys[i]);
  }
  wait();
  float kept[ROWS] = {}, mass[ROWS] = {}, left_out = 0;  // left_out: a share of the mass so far
  for (int segment = s.begin; segment < s.end; segment += SEGMENT) {
    float largest[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) largest[r] = -INFINITE;
    for (int first = 0; first < SEGMENT; first += KEYS_AHEAD * WARP_KEYS) {
#pragma unroll
      for (int i = 0; i < KEYS_AHEAD; ++i) {
        const int start = first + WARP_KEYS * i;
        const int slot = start + ((keys[i].key - segment - start) & (WARP_KEYS - 1));  // of a score: keys may begin before `start`
        float score[ROWS];
        key_products(score, stored[i], query, own.products);
        apply_rules(score, p, s, first_row, keys[i]);
        load_keys(stored[i], p, next);
        keys[i] = next;
        next = s.keys(segment + start + (KEYS_AHEAD + 1) * WARP_KEYS);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          own.scores[r][slot] = score[r];
          largest[r] = fmaxf(largest[r], score[r]);
        }
      }
    }
    sync_warp();
    float before[ROWS], none[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      before[r] = sums.peak[r];
      none[r] = -INFINITE;
    }
    raise(sums, kept, largest, 0);
    float share[CHUNKS], shrink = 0, below;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) before[r] = mass[r] * relative(before[r], sums.peak[r]);
    find_shares(share, mass, sums, own);
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
      if (mass[r] > 0) shrink = fmaxf(shrink, before[r] / mass[r]);
    left_out *= fminf(shrink, 1.0f);
    const float cut = find_cut(share, p.tolerance - left_out, below);
    left_out += below;

    int count = 0;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
      const bool is_needed = !(share[i] < cut) && share[i] != 0;
      const u32 all = ballot(is_needed);
      if (is_needed) own.needed[count + count_bits(all & ((1u << lane) - 1))] = u16(WARP_KEYS * i + lane);
      count += count_bits(all);
    }
    sync_warp();
    const auto needed = [&](int first) {
      const bool is_one = first + lane < count;
      const int key = segment + (is_one ? own.needed[first + lane] : 0);
      return Keys{ballot(is_one), key, IS_PAGED ? s.pages[key / PAGE] : 0};
    };
    StoredValues values;
    Keys there = needed(0);
    ValueScale scale = load_value_scale(p, there);
    load_values<false>(values, 0, p, there);
    load_values<false>(values, 1, p, there);
    for (int first = 0; first < count; first += WARP_KEYS) {
      const Keys behind = needed(first + WARP_KEYS);
      float weight[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) weight[r] = there.is_mine_seen() ? own.scores[r][there.key - segment] : 0.0f;
      raise(sums, kept, none, scale.step);
      weigh(sums, kept, own, weight, scale);
      scale = load_value_scale(p, behind);
      sync_warp();
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        clear_unseen(values, tile, there);
        add_values(sums.out, sums.mass, values, tile, own.weights);
        load_values<false>(values, tile, p, behind);
      }
      sync_warp();  // before the next weights
      there = behind;
    }
    sums.settle();
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float all = warp_sum(sums.total[r]), some = warp_sum(kept[r]);
    kept[r] = some > 0 ? all / some : 1.0f;
    sums.centre[r] *= kept[r];
  }
  sums.scale_out(kept);
}

static_assert(sizeof(Shared) == SHARED_BYTES, "compiler.py asks for shared memory of another size");

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) decode_kernel(const __grid_constant__ Params given) {
  extern __shared__ __align__(16) u8 dynamic[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic);
  const int tiles = given.padded_rows / ROWS, head = int(blockIdx.x) / tiles, first_row = int(blockIdx.x) % tiles * ROWS;
  const int batch = head / given.kv_heads, kv_head = head % given.kv_heads;
  const int warp = threadIdx.x / 32;
  Params p = given;
  for (Rows* x : {&p.channel, &p.channel_scale, &p.channel_centre, &p.kept, &p.kept_scale, &p.indices, &p.v, &p.v_scale, &p.v_centre})
    *x = of_head(*x, batch, kv_head);
  const Sequence s = sequence_of(p, batch, warp);
  if (int(blockIdx.y) >= s.blocks) return;  // a graph has as many blocks as the longest sequence asks for
  SharedWarp& own = shared.warps[warp];

  Sums sums;
  sums.clear();
  const auto wait = [&] {
    static_assert(sizeof(u16[ROWS][QUERY_DIMS]) <= sizeof(SharedSums), "queries lie where sums will");
    load_query(shared.query, reinterpret_cast<u16(*)[QUERY_DIMS]>(&shared.sums), p, batch, kv_head, first_row);
    sync_block();
  };
  if constexpr (TOLERANT)
    attend_within(sums, p, s, shared.query, own, first_row, wait);
  else
    attend(sums, p, s, shared.query, own, first_row, wait);
  sums.settle();
  store(p, sums, shared.sums, s.blocks, head, first_row);
}

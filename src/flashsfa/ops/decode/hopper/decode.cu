// Attention of a few queries over codes, split over keys: each warp takes some of its own and reads their codes and values straight into
// registers. Warps wait for one another only at the end, when a block merges what they found, and the last block what all did. Scores are in log2
// units: softmax runs in base 2.
//
// The codes of the next keys are asked for as soon as those of the present ones are scored, and their values when the present ones are summed:
// so a warp has most of its registers full of bytes under way.

constexpr int JUDGED = KEYS_AHEAD * WARP_KEYS;       // with a tolerance, keys that are scored before it is decided whose values are read
constexpr int QUEUE = TOLERANT ? 4 * WARP_KEYS : 1;  // a power of two: 32 that are asked for, 31 that wait, and JUDGED

// Keys whose values are yet to be added, in a ring; and the scales of the keys that are judged, which would cost registers.
struct Queue {
  alignas(16) float scores[QUEUE][ROWS];
  int keys[QUEUE], pages[IS_PAGED ? QUEUE : 1];
  u32 steps[ARE_VALUES_LEVELS ? QUEUE : 1], centres[VALUE_CENTRED ? QUEUE : 1];
  u32 scored_steps[ARE_VALUES_LEVELS ? JUDGED : 1], scored_centres[VALUE_CENTRED ? JUDGED : 1];
};

struct SharedWarp {
  alignas(16) u16 weights[ROWS * WEIGHT_STRIDE];
  Queue queue;
  float products[HAS_CHANNEL ? WARP_KEYS : 2][ROWS + 1];
};

struct SharedSums {
  float peak[WARPS][ROWS], total[WARPS][ROWS], out[WARPS][ROWS][VALUE_DIM];
  int is_last;
};

struct Shared {
  SharedQuery query;
  alignas(16) SharedWarp warps[WARPS];
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

  // The keys from `start` on: where fewer than 32 are there, some before them too, which count as not seen. Padding is left to `hide_padding`, as what
  // is loaded here is under way for some time.
  DEVICE Keys keys(int start) const {
    const int from = IS_PAGED || start <= last_start ? start : last_start, key = from + lane_id();
    const bool is_there = key < end;
    const int page = IS_PAGED ? int(load_if(is_there, pages + key / PAGE)) : 0;
    return {ballot(is_there && key >= start && key >= first), key, page, HAS_PADDING ? load_if(is_there, padding + key) : 0};
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
  return {HAS_PADDING ? p.padding + batch * p.padding_batch : nullptr, p.pages ? p.pages + batch * p.pages_batch : nullptr,
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
      for (int j = 0; j < 4; ++j) out[i][j] -= VALUE_MIDDLE / level_unit(2 * i + j / 2) * mass[j % 2];
    mass[0] = mass[1] = 0;
  }

  // The lane's feature 2 * i + j for query row r, which it has.
  DEVICE float output(int i, int j, int r) const {
    if constexpr (!ARE_VALUES_LEVELS) return out[i][2 * j + r % 2];
    return out[i][2 * j + r % 2] * level_unit(2 * i + j) * unit;
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

// Makes room for the lane's scores and, of its value, the scale `step`; the sums that `follow` are relative to the peaks as `total` is.
template <int N>
DEVICE void raise(Sums& sums, float (*follow)[ROWS], const float (&score)[ROWS], float step) {
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
#pragma unroll
    for (int i = 0; i < N; ++i) follow[i][r] *= shrink[r];
  }
  if constexpr (ARE_VALUES_LEVELS) {
    sums.inverse = reciprocal(unit);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) shrink[r] *= sums.unit * sums.inverse;
    sums.unit = unit;
  }
  sums.scale_out(shrink);
}

// Scores of the lane's key from its products, -infinity where a query does not see it.
DEVICE void apply_rules(float (&score)[ROWS], const Params& p, const Sequence& s, int first_row, const Keys& keys) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    score[r] *= p.scale;
    if constexpr (CAPPED) score[r] = p.cap * (2.0f / (1.0f + exp2_fast(-2.8853900817779268f * score[r])) - 1.0f);  // tanh
    bool is_seen = keys.is_mine_seen() && !(TOLERANT && first_row + r >= p.rows);  // no row that only fills the tile asks for values
    if constexpr (SEVERAL_QUERIES) {
      const int last = s.length - p.m + (first_row + r) % p.m;
      is_seen = is_seen && keys.key <= last && !(p.window && keys.key <= last - p.window);
    }
    if (!is_seen) score[r] = -INFINITE;
  }
}

// The scale and centre of the lane's value: as they are stored, and what they are, 0 of a value that is not seen.
struct StoredScale {
  u32 step, centre;
};

struct ValueScale {
  float step, centre;
};

DEVICE StoredScale load_value_scale(const Params& p, const Keys& keys) {
  StoredScale x;
  if constexpr (ARE_VALUES_LEVELS) x.step = load_number<VALUE_SCALE_BYTES>(my_row(p.v_scale, keys, p.v_scale.key));
  if constexpr (VALUE_CENTRED) x.centre = load_number<2>(my_row(p.v_centre, keys, p.v_centre.key));
  return x;
}

DEVICE ValueScale value_scale(const StoredScale& stored, bool is_seen) {
  if constexpr (!ARE_VALUES_LEVELS) return {1, 0};
  if (!is_seen) return {0, 0};
  return {number<VALUE_SCALE_BYTES>(stored.step), VALUE_CENTRED ? number<2>(stored.centre) : 0};
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
  StoredScale stored_scale = load_value_scale(p, keys);
  load_values<true>(values, 0, p, keys);
  load_values<true>(values, 1, p, keys);
  wait();
  for (int start = s.begin; start < s.end; start += WARP_KEYS) {
    float score[ROWS];
    hide_padding(keys);
    key_products(score, stored, query, own.products);
    apply_rules(score, p, s, first_row, keys);
    load_keys(stored, p, next);
    const ValueScale scale = value_scale(stored_scale, keys.is_mine_seen());
    raise<0>(sums, nullptr, score, scale.step);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) score[r] = exp2_fast(score[r] - sums.base(r));  // weights
    weigh(sums, sums.total, own, score, scale);
    stored_scale = load_value_scale(p, next);
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

// Attends to the keys of a warp, but leaves out values that together carry at most `tolerance` of the mass of each query row, and lets the
// others stand for them.
//
// A key is left out if every row can spare it: if all keys that are judged together could weigh as much as this one, and the row would still leave
// out no more than it may. The others queue up, and their values are read 32 at a time, while further keys are scored.
template <class Wait>
DEVICE void attend_within(Sums& sums, const Params& p, const Sequence& s, const SharedQuery& query, SharedWarp& own, int first_row, Wait wait) {
  constexpr float LEAST = 1e-30f, STEPS = 0x1p20f, MASS_STEPS = 0x1p24f;  // lanes sum whole numbers
  const int lane = lane_id();
  Queue& queue = own.queue;
  StoredKeys stored[KEYS_AHEAD];
  StoredScale scales[KEYS_AHEAD];
  Keys keys[KEYS_AHEAD], next = s.keys(s.begin + JUDGED);
#pragma unroll
  for (int i = 0; i < KEYS_AHEAD; ++i) {
    keys[i] = s.keys(s.begin + WARP_KEYS * i);
    load_keys(stored[i], p, keys[i]);
    scales[i] = load_value_scale(p, keys[i]);
  }
  wait();
  // Relative to the peaks: the mass of the lane's keys whose values were added, a lower bound of the warp's so far, and an upper one of what was left out of it.
  float parts[3][ROWS] = {};
  float(&added)[ROWS] = parts[0], (&mass)[ROWS] = parts[1], (&left_out)[ROWS] = parts[2];
  int front = 0, asked = 0, behind = 0, turns = 0;  // of the queue: `values` are those before `asked`
  StoredValues values;
  // Lanes for which no key is left take the first one's value and a part of its weight: 0 times a value that is infinite would be no number.
  const auto place_of_mine = [&] { return (front + lane < asked ? front + lane : front) % QUEUE; };
  const auto add_queued = [&] {
    const int place = place_of_mine();
    const float part = lane == 0 || front + lane >= asked ? reciprocal(float(WARP_KEYS + 1 - (asked - front))) : 1.0f;
    const ValueScale scale = value_scale({queue.steps[ARE_VALUES_LEVELS ? place : 0], queue.centres[VALUE_CENTRED ? place : 0]}, true);
    float weight[ROWS], none[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) none[r] = -INFINITE;
    raise<3>(sums, parts, none, scale.step);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) weight[r] = part * exp2_fast(queue.scores[place][r] - sums.base(r));
    weigh(sums, added, own, weight, scale);
    sync_warp();
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) add_values(sums.out, sums.mass, values, tile, own.weights);
    if (++turns % SETTLE == 0) sums.settle();
    front = asked;
  };
  const auto ask = [&] {
    asked = front + WARP_KEYS < behind ? front + WARP_KEYS : behind;
    const int place = place_of_mine();
    const Keys there = {~0u, queue.keys[place], IS_PAGED ? queue.pages[place] : 0, 0};
    load_values<false>(values, 0, p, there);
    load_values<false>(values, 1, p, there);
    sync_warp();  // before places and weights are written again
  };
  for (int first = s.begin;; first += JUDGED) {
    const bool is_end = first + JUDGED >= s.end;
    float score[KEYS_AHEAD][ROWS], weight[KEYS_AHEAD][ROWS], largest[ROWS], spare[ROWS], spared[ROWS] = {};
    Keys here[KEYS_AHEAD];
#pragma unroll
    for (int i = 0; i < KEYS_AHEAD; ++i) {
      hide_padding(keys[i]);
      key_products(score[i], stored[i], query, own.products);
      apply_rules(score[i], p, s, first_row, keys[i]);
      here[i] = keys[i];
      if constexpr (ARE_VALUES_LEVELS) queue.scored_steps[WARP_KEYS * i + lane] = scales[i].step;
      if constexpr (VALUE_CENTRED) queue.scored_centres[WARP_KEYS * i + lane] = scales[i].centre;
      sync_warp();  // else the compiler loads earlier, into other registers, and waits to move them
      load_keys(stored[i], p, next);
      scales[i] = load_value_scale(p, next);
      keys[i] = next;
      next = s.keys(first + (i + 1) * WARP_KEYS + JUDGED);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) largest[r] = i ? fmaxf(largest[r], score[i][r]) : score[i][r];
    }
    raise<3>(sums, parts, largest, 0);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float judged = 0;
#pragma unroll
      for (int i = 0; i < KEYS_AHEAD; ++i) judged += weight[i][r] = exp2_fast(score[i][r] - sums.base(r));
      sums.total[r] += judged;
      mass[r] += sum_of_lanes(u32(judged * MASS_STEPS)) / MASS_STEPS;
      spare[r] = fmaxf((p.tolerance * mass[r] - left_out[r]) / JUDGED, LEAST);
    }
#pragma unroll
    for (int i = 0; i < KEYS_AHEAD; ++i) {
      bool is_spared = true;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) is_spared = is_spared && weight[i][r] < spare[r];  // NaN is not
#pragma unroll
      for (int r = 0; r < ROWS; ++r) spared[r] += is_spared ? weight[i][r] : 0.0f;
      const u32 others = ballot(!is_spared);
      if (!is_spared) {
        const int place = (behind + count_bits(others & ((1u << lane) - 1))) % QUEUE;
        queue.keys[place] = here[i].key;
        if constexpr (IS_PAGED) queue.pages[place] = here[i].page;
        if constexpr (ARE_VALUES_LEVELS) queue.steps[place] = queue.scored_steps[WARP_KEYS * i + lane];
        if constexpr (VALUE_CENTRED) queue.centres[place] = queue.scored_centres[WARP_KEYS * i + lane];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) queue.scores[place][r] = score[i][r];
      }
      behind += count_bits(others);
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
      left_out[r] += sum_of_lanes(u32(spared[r] * (STEPS * reciprocal(spare[r]))) + 1) * (spare[r] / STEPS);
    sync_warp();
    while (behind - asked >= WARP_KEYS || (is_end && behind > front)) {
      if (asked > front) add_queued();
      if (behind > front) ask();
    }
    if (is_end) break;
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float all = warp_sum(sums.total[r]), some = warp_sum(added[r]);
    added[r] = some > 0 ? all / some : 1.0f;
    sums.centre[r] *= added[r];
  }
  sums.scale_out(added);
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

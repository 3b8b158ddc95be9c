// Attention of a few queries to tokens that are held as they came, folded into that to the coded ones: a block per tile of query
// rows of a kv head. There are few such tokens, so that the time is that of one way to memory and back: everything is asked for at the start, and warps meet
// once.
//
// A warp takes eight keys at a time. Its matrix products have queries as A and keys as B, so that lane 4 * group + quad has query row `group`
// and key `group` as they come in, and scores of query row `group` for the keys 2 * quad and 2 * quad + 1. Of values a lane has some features
// of all eight keys.

#define INFINITE from_bits(0x7f800000)

DEVICE int smaller(int a, int b) { return a < b ? a : b; }

constexpr int WARP_KEYS = 8;
constexpr int CHUNKS = (HEAD_DIM + 31) / 32;  // of a row that a lane has, 8 features each: from 8 * (4 * i + quad) on
constexpr int PAIRS = (VALUE_DIM + 63) / 64;  // of features of a value that a lane has: from 2 * (32 * i + lane) on
constexpr int THREADS = 32 * WARPS;
constexpr int RESULTS = (ROWS * VALUE_DIM / 2 + THREADS - 1) / THREADS;  // pairs of features of the output that a thread has

struct Shared {
  alignas(16) float weights[WARPS][ROWS][WARP_KEYS];
  float peak[WARPS][ROWS], total[WARPS][ROWS], out[WARPS][ROWS][VALUE_DIM];
};

static_assert(sizeof(Shared) == SHARED_BYTES, "compiler.py asks for shared memory of another size");

DEVICE float number(u16 x) { return IS_BF16 ? from_bf16(x) : from_half(x); }
DEVICE u32 pair_of(float x, float y) { return IS_BF16 ? to_bf16(x) | u32(to_bf16(y)) << 16 : to_half(x) | u32(to_half(y)) << 16; }

// What e^x is of e^peak, which is no smaller.
DEVICE float relative(float x, float peak) { return exp2_fast((x - (peak == -INFINITE ? 0.0f : peak)) * 1.4426950408889634f); }

// Rows of the exact tokens of a sequence and kv head, in order: the first ones lie from `first` on, and the others as if they did from `recent` on.
struct Exact {
  const u16 *first, *recent;
  int first_stride, recent_stride, n_first;

  DEVICE const u16* row(int token) const {
    const bool is_first = token < n_first;
    return (is_first ? first : recent) + i64(token) * (is_first ? first_stride : recent_stride);
  }
};

// The keys, or the values.
DEVICE Exact exact_of(const Entries& first, const Entries& recent, int n_first, int batch, int head) {
  return {first.data + batch * first.batch + head * first.head,
          recent.data + batch * recent.batch + head * recent.head - i64(n_first) * recent.token, first.token, recent.token, n_first};
}

// What is seen of a sequence.
struct Sequence {
  const i64* positions;
  const u8* padding;
  i64 length;  // not looked at before all is asked for

  DEVICE i64 position(int token, const Params& p) const { return positions ? positions[token] : token < p.n_first ? token : token + p.n_coded; }

  // Whether a query at `at`, which is within the length, sees the token at `position`.
  DEVICE bool is_seen(i64 position, i64 at, const Params& p) const {
    if (position < 0 || position > at || (p.window && position <= at - p.window)) return false;
    return !(padding && padding[position]);
  }
};

DEVICE Sequence sequence_of(const Params& p, int batch) {
  Sequence x = {p.positions, p.padding, p.n};
  if (p.positions) x.positions += batch * p.positions_batch;
  if (p.padding) x.padding += batch * p.padding_batch;
  if (p.lengths) x.length = p.lengths_are_64_bit ? static_cast<const i64*>(p.lengths)[batch] : static_cast<const int*>(p.lengths)[batch];
  return x;
}

// The lane's part of a row of HEAD_DIM, zeros behind its end.
DEVICE void load_part(u32 (&x)[CHUNKS][4], const u16* row) {
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i) {
    const int d = 8 * (4 * i + lane_id() % 4);
    x[i][0] = x[i][1] = x[i][2] = x[i][3] = 0;
    if (HEAD_DIM % 32 == 0 || d < HEAD_DIM) load(x[i], reinterpret_cast<const u8*>(row + d));
  }
}

// The lane's part of what its query row is multiplied by.
struct Factor {
  u32 x[CHUNKS][2][4];

  DEVICE void load_all(const float* row) {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int d = 8 * (4 * i + lane_id() % 4) + 4 * j;
        x[i][j][0] = x[i][j][1] = x[i][j][2] = x[i][j][3] = 0;
        if (HEAD_DIM % 32 == 0 || d < HEAD_DIM) load(x[i][j], reinterpret_cast<const u8*>(row + d));
      }
  }

  // Rounded as the query is: products take no more.
  DEVICE void multiply_into(u32 (&query)[CHUNKS][4]) const {
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const u32 pair = query[i][j], *by = x[i][j / 2] + j % 2 * 2;
        query[i][j] = pair_of(number(u16(pair)) * from_bits(by[0]), number(u16(pair >> 16)) * from_bits(by[1]));
      }
  }
};

// Eight tokens. Behind the last one it is read again, and not seen.
struct Rows {
  u32 key[CHUNKS][4], value[WARP_KEYS][PAIRS];
  i64 position[2];  // of the tokens that the lane has scores of; -1 for none

  DEVICE void load_all(const Exact& keys, const Exact& values, const Sequence& sequence, const Params& p, int start) {
    load_part(key, keys.row(smaller(start + lane_id() / 4, p.n_exact - 1)));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int token = start + 2 * (lane_id() % 4) + j;
      position[j] = token < p.n_exact ? sequence.position(token, p) : -1;
    }
#pragma unroll
    for (int i = 0; i < WARP_KEYS; ++i) {
      const u16* row = values.row(smaller(start + i, p.n_exact - 1));
#pragma unroll
      for (int j = 0; j < PAIRS; ++j) {
        const int d = 2 * (32 * j + lane_id());
        u32 x[1] = {0};
        if (VALUE_DIM % 64 == 0 || d < VALUE_DIM) load(x, reinterpret_cast<const u8*>(row + d));
        value[i][j] = x[0];
      }
    }
  }
};

// What the query rows have found so far: `peak` and, of its own keys, `total` of the lane's query row, and the lane's features of all rows.
struct Sums {
  float peak = -INFINITE, total = 0, out[ROWS][PAIRS][2] = {};
};

// Adds eight tokens; `token` is that of the lane's query row, -1 for none.
DEVICE void attend(Sums& sums, const Rows& rows, const u32 (&query)[CHUNKS][4], float (&weights)[ROWS][WARP_KEYS], const Params& p,
                   const Sequence& sequence, int token) {
  const int group = lane_id() / 4, quad = lane_id() % 4;
  float products[2][4] = {};  // two sums, so that one does not wait for the other
#pragma unroll
  for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j)
      multiply<IS_BF16>(products[j], query[i][2 * j], 0, query[i][2 * j + 1], 0, rows.key[i][2 * j], rows.key[i][2 * j + 1]);
  const i64 at = (sequence.length < p.n ? sequence.length : p.n) - p.m + token;  // where the query stands
  float score[2], largest = sums.peak;
  u32 seen[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    score[j] = (products[0][j] + products[1][j]) * p.scale;
    if (p.cap > 0) score[j] = p.cap * tanhf(score[j]);
    const bool is_seen = token >= 0 && sequence.is_seen(rows.position[j], at, p);
    seen[j] = ballot(is_seen);
    if (!is_seen) score[j] = -INFINITE;
    largest = fmaxf(largest, score[j]);
  }
  largest = fmaxf(largest, from_lane_xor(largest, 1));
  largest = fmaxf(largest, from_lane_xor(largest, 2));
  const float shrink = relative(sums.peak, largest);
  sums.peak = largest;
  sums.total *= shrink;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float factor = from_lane(shrink, 4 * r);
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) sums.out[r][j][0] *= factor, sums.out[r][j][1] *= factor;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float weight = relative(score[j], largest);
    sums.total += weight;
    if (group < ROWS) weights[group][2 * quad + j] = weight;
  }
  sync_warp();
#pragma unroll
  for (int i = 0; i < WARP_KEYS; ++i) {
    const bool is_needed = seen[i % 2] >> i / 2 & 0x11111111;  // what no query sees may hold NaN
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
      const u32 pair = is_needed ? rows.value[i][j] : 0;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        sums.out[r][j][0] += weights[r][i] * number(u16(pair));
        sums.out[r][j][1] += weights[r][i] * number(u16(pair >> 16));
      }
    }
  }
  sync_warp();  // before the next weights
}

extern "C" __global__ void __launch_bounds__(THREADS) exact_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) u8 dynamic[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic);
  const int warp = threadIdx.x / 32, lane = lane_id(), first_row = int(blockIdx.x) * ROWS, head = blockIdx.y, batch = blockIdx.z;
  const i64 tile = (i64(batch) * int(gridDim.y) + head) * p.rows + first_row;  // of the rows of all heads
  const int active = smaller((p.n_exact + WARP_KEYS - 1) / WARP_KEYS, WARPS);  // warps that have keys

  u32 coded[RESULTS];
  float coded_lse[RESULTS];
  u32* outs = reinterpret_cast<u32*>(p.out) + tile * (VALUE_DIM / 2);
#pragma unroll
  for (int i = 0; i < RESULTS; ++i) {
    const int at = threadIdx.x + i * THREADS, r = at / (VALUE_DIM / 2);
    const bool is_row = r < ROWS && first_row + r < p.rows;
    coded[i] = is_row ? outs[at] : 0;
    coded_lse[i] = is_row ? p.lse[tile + r] : 0.0f;
  }

  if (warp < active) {
    const Exact keys = exact_of(p.first_k, p.recent_k, p.n_first, batch, head);
    const Exact values = exact_of(p.first_v, p.recent_v, p.n_first, batch, head);
    const Sequence sequence = sequence_of(p, batch);
    const int given = first_row + lane / 4, row = smaller(given, p.rows - 1);
    const int of_group = p.m == 1 ? row : row / p.m, token = row - of_group * p.m;
    u32 query[CHUNKS][4];
    load_part(query, p.q + batch * p.q_batch + (head * p.group + of_group) * p.q_head + token * p.q_token);
    Factor factor;
    if (p.factor) factor.load_all(p.factor + head * HEAD_DIM);
    Sums sums;
    for (int i = warp * WARP_KEYS; i < p.n_exact; i += WARPS * WARP_KEYS) {
      Rows rows;
      rows.load_all(keys, values, sequence, p, i);
      if (p.factor && i == warp * WARP_KEYS) factor.multiply_into(query);  // not before all is asked for
      attend(sums, rows, query, shared.weights[warp], p, sequence, lane / 4 < ROWS && given < p.rows ? token : -1);
    }
    sums.total += from_lane_xor(sums.total, 1);
    sums.total += from_lane_xor(sums.total, 2);
    if (lane % 4 == 0 && lane / 4 < ROWS) {
      shared.peak[warp][lane / 4] = sums.peak;
      shared.total[warp][lane / 4] = sums.total;
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int j = 0; j < PAIRS; ++j) {
        const int d = 2 * (32 * j + lane);
        if (VALUE_DIM % 64 == 0 || d < VALUE_DIM) shared.out[warp][r][d] = sums.out[r][j][0], shared.out[warp][r][d + 1] = sums.out[r][j][1];
      }
  }
  sync_block();
#pragma unroll
  for (int i = 0; i < RESULTS; ++i) {
    const int at = threadIdx.x + i * THREADS, r = at / (VALUE_DIM / 2), d = 2 * (at % (VALUE_DIM / 2));
    if (r >= ROWS || first_row + r >= p.rows) continue;
    float peak = coded_lse[i];
    for (int w = 0; w < active; ++w) peak = fmaxf(peak, shared.peak[w][r]);
    float total = relative(coded_lse[i], peak), low = number(u16(coded[i])) * total, high = number(u16(coded[i] >> 16)) * total;
    for (int w = 0; w < active; ++w) {
      const float factor = relative(shared.peak[w][r], peak);
      total += factor * shared.total[w][r];
      low += factor * shared.out[w][r][d];
      high += factor * shared.out[w][r][d + 1];
    }
    const float some = total == 0 ? 1.0f : total, inverse = 1 / some;  // a row that sees no token: output 0, log-sum-exp -infinity
    outs[at] = pair_of(low * inverse, high * inverse);
    if (d == 0) p.lse[tile + r] = peak + log2_exact(some) * 0.6931471805599453f;
  }
}

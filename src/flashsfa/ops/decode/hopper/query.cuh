// The query rows of a tile: pruned as keys are, and turned so that they are multiplied with levels as these are stored.
//
// With x = centre + step * (level - middle) for the entries x of a key, a product with a query is one with the query times the steps, and
// what is left of it is a number per query row, found here in the query as it was rounded. A warp takes a row: lane i has its entries
// i, i + 32, ...

constexpr int LANE_ENTRIES = (HEAD_DIM + 31) / 32;
constexpr int DENSE_DIMS = HAS_KEPT ? CHANNEL : 0;  // of a query, which are kept in any case
constexpr int ROTATION = CHANNEL_BITS == 4 && HAS_CHANNEL ? CHANNEL & -CHANNEL : 1;  // width of the blocks that keys are rotated in
constexpr float LARGEST = 256.0f;  // in float16 folded queries are largest around here: the smallest then keep their digits

constexpr float inverse_root(int x) { return x == 1 ? 1.0f : x == 2 ? 0.70710678118654752f : inverse_root(x / 4) / 2; }  // of a power of two

// Zeroes all but the dense dims and the `topk` largest magnitudes of the rest, ties to the lowest index. `bits` are those of x.
DEVICE void prune(float (&x)[LANE_ENTRIES], const u16 (&bits)[LANE_ENTRIES], int topk) {
  int size[LANE_ENTRIES];
  bool is_kept[LANE_ENTRIES];
#pragma unroll
  for (int i = 0; i < LANE_ENTRIES; ++i) {
    const int d = lane_id() + 32 * i;
    size[i] = d >= DENSE_DIMS && d < HEAD_DIM ? bits[i] & 0x7fff : -1;
  }
  find_largest(is_kept, size, topk);
#pragma unroll
  for (int i = 0; i < LANE_ENTRIES; ++i)
    if (size[i] >= 0 && !is_kept[i]) x[i] = 0;
}

// As `rotation.rotate`.
DEVICE void rotate(float (&x)[LANE_ENTRIES]) {
#pragma unroll
  for (int step = 1; step < ROTATION; step *= 2) {
    float other[LANE_ENTRIES];
#pragma unroll
    for (int i = 0; i < LANE_ENTRIES; ++i) other[i] = step < 32 ? from_lane_xor(x[i], step) : x[(i ^ step / 32) % LANE_ENTRIES];
#pragma unroll
    for (int i = 0; i < LANE_ENTRIES; ++i) x[i] = other[i] + ((lane_id() + 32 * i) & step ? -x[i] : x[i]);
  }
#pragma unroll
  for (int i = 0; i < LANE_ENTRIES; ++i) x[i] *= inverse_root(ROTATION);
}

// The entry x[axis] of a row, for another axis in each lane.
DEVICE float entry_of(const float (&x)[LANE_ENTRIES], int axis) {
  float found = 0;
#pragma unroll
  for (int i = 0; i < LANE_ENTRIES; ++i) {
    const float here = from_lane(x[i], axis % 32);
    if (axis / 32 == i) found = here;
  }
  return found;
}

// Writes a row for a channel of levels in float16, in the order of their places, and finds its terms.
DEVICE void fold(u16* row, float (&terms)[3], float (&x)[LANE_ENTRIES], const Params& p, int kv_head) {
  const int lane = lane_id();
  float excess = 0, sum = 0, largest = 0;
  rotate(x);
#pragma unroll
  for (int i = 0; i < LANE_ENTRIES; ++i) {
    const int d = lane + 32 * i;
    if (CHANNEL_BITS == 2 && d < HEAD_DIM) {
      excess -= x[i] * p.centre[kv_head * HEAD_DIM + d];
      x[i] *= p.step[kv_head * HEAD_DIM + d];
    }
    largest = fmaxf(largest, fabsf(x[i]));
  }
  largest = warp_max(largest);
  const bool is_fit = largest > 0x1p-90f && largest < 0x1p90f;
  terms[0] = (is_fit ? from_bits(bits_of(largest) & 0xff800000) : 1.0f) / LARGEST;  // a power of two
  const float inverse = 1 / terms[0];
  excess *= inverse;
#pragma unroll
  for (int i = 0; i < LANE_ENTRIES; ++i) x[i] *= inverse;
#pragma unroll
  for (int first = 0; first < QUERY_DIMS; first += 32) {
    const int place = first + lane;
    float here = x[first / 32 % LANE_ENTRIES], middle = CHANNEL_BITS == 4 ? 7.5f : 128.0f;
    if constexpr (CHANNEL_BITS == 2) {  // an axis to the slot that it starts in
      const bool is_start = place < CHANNEL && p.is_start[kv_head * CHANNEL + place];
      const int axis = is_start ? int(p.axis[kv_head * CHANNEL + place]) : 0;
      const float unit = float(1 << place % 4 * 2);  // of a level that is not moved to the lowest bits of its byte
      here = entry_of(x, axis);
      here = is_start ? here / unit : 0.0f;
      middle = 0.5f * unit * float(p.top[kv_head * HEAD_DIM + axis]);
    }
    const u16 rounded = to_half(here);
    if (place < QUERY_DIMS) row[place] = rounded;
    if (place < CHANNEL) {
      excess += from_half(rounded) * middle;
      sum += from_half(rounded);
    }
  }
  terms[1] = warp_sum(excess);
  terms[2] = warp_sum(sum);
}

// The query rows from `first_row` on into shared memory, `rows` being room for them as they are; by all threads of a block.
DEVICE void load_query(SharedQuery& shared, u16 (*rows)[QUERY_DIMS], const Params& p, int batch, int kv_head, int first_row) {
  const int lane = lane_id();
  for (int r = threadIdx.x / 32; r < ROWS; r += WARPS) {
    const int row = first_row + r, head = kv_head * (p.rows / p.m) + row / p.m;
    const u16* q = p.q + batch * p.q_batch + head * p.q_head + row % p.m * p.q_token;
    u16 bits[LANE_ENTRIES];
    float x[LANE_ENTRIES], nothing = 0, terms[3] = {1, 0, 0};
#pragma unroll
    for (int i = 0; i < LANE_ENTRIES; ++i) {
      const int d = lane + 32 * i;
      bits[i] = row < p.rows && d < HEAD_DIM ? q[d] : 0;
      x[i] = stored_float(bits[i]);
    }
    if (p.topk_query < HEAD_DIM - DENSE_DIMS) prune(x, bits, p.topk_query);
#pragma unroll
    for (int i = 0; i < LANE_ENTRIES; ++i) nothing += x[i] * 0.0f;
    nothing = warp_sum(nothing);  // NaN shows in every score, as in a dense product
#pragma unroll
    for (int i = 0; i < LANE_ENTRIES; ++i) x[i] += nothing;
    if constexpr (IS_CHANNEL_LEVELS) {
      fold(rows[r], terms, x, p, kv_head);
    } else {
#pragma unroll
      for (int i = 0; i < LANE_ENTRIES; ++i)
        if (lane + 32 * i < HEAD_DIM) rows[r][lane + 32 * i] = IS_BF16 ? to_bf16(x[i]) : to_half(x[i]);
    }
    if (lane < 3) shared.terms[lane][r] = lane == 0 ? terms[0] : lane == 1 ? terms[1] : terms[2];
  }
  sync_block();
  lay_out(shared, rows, p, kv_head);
}

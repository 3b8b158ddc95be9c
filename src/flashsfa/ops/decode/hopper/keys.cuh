// Scores of 32 keys: the products of queries with a channel, which every key has, by matrix units, and with kept entries, whose features
// each lane looks up for its key.
//
// A channel is read as words. Lane 4 * group + quad has some words of the keys `group`, `group` + 8, `group` + 16 and `group` + 24, and makes
// pairs of entries from them: entries of 16 bits are pairs already, levels are masked out. The query's fragments are laid out in the order of
// these pairs, divided by what a level is multiplied by where it lies above the lowest bit.

constexpr int CHANNEL_BYTES = CHANNEL_BITS == 2 ? CHANNEL / 4 : CHANNEL * CHANNEL_BITS / 8;
constexpr int CHANNEL_VECTOR = CHANNEL_BYTES % 64 == 0 && CHANNEL_ALIGNMENT >= 16 ? 4 : CHANNEL_BYTES % 32 == 0 && CHANNEL_ALIGNMENT >= 8 ? 2 : 1;
constexpr int PAIRS_PER_WORD = CHANNEL_BITS == 16 ? 1 : CHANNEL_BITS == 8 ? 2 : CHANNEL_BITS == 4 ? 4 : 8;
constexpr int STEP_WORDS = CHANNEL_BITS == 16 ? 2 : 1;  // of a lane, that fill a matrix product's depth at least
constexpr int LANE_WORDS = (words(CHANNEL_BYTES) + 4 * STEP_WORDS - 1) / (4 * STEP_WORDS) * STEP_WORDS;
constexpr int PAIRS = LANE_WORDS * PAIRS_PER_WORD;
constexpr int CHANNEL_PIECE = piece_of(CHANNEL_BYTES, CHANNEL_ALIGNMENT);
constexpr int KEPT_BYTES = (KEPT * KEPT_BITS + 7) / 8;
constexpr int SPARSE_DIMS = HEAD_DIM - CHANNEL;
constexpr int INDEX_BYTES = INDEX_BITS == 0 ? (SPARSE_DIMS + 7) / 8 : (KEPT * INDEX_BITS + 7) / 8;
constexpr int KEPT_PIECE = piece_of(KEPT_BYTES, KEPT_ALIGNMENT), INDEX_PIECE = piece_of(INDEX_BYTES, INDEX_ALIGNMENT);
constexpr bool HAS_CHANNEL = CHANNEL > 0, HAS_KEPT = KEPT > 0;
constexpr bool IS_CHANNEL_LEVELS = HAS_CHANNEL && CHANNEL_BITS < 16;

// What is read of a feature's entries: floats, which need no unpacking, where instructions bind and a load has them all; else 16 bits each.
constexpr bool ARE_FEATURES_FLOATS = ROWS == 1 || (ROWS <= 4 && KEPT_BITS == 4);
constexpr int ENTRY_BYTES = (ARE_FEATURES_FLOATS ? 4 : 2) * ROWS, COPIES = 128 / ENTRY_BYTES;

// Queries of a kv head, shared by the warps of a block.
struct SharedQuery {
  u32 pairs[HAS_CHANNEL ? PAIRS : 1][32];             // by lane: of query row lane / 4, for the pairs of quad lane % 4
  u32 fields[CHANNEL_BITS == 2 ? PAIRS : 1][4];       // by quad: the bits of levels that start in a slot
  alignas(16) u8 features[HAS_KEPT ? SPARSE_DIMS : 1][128];  // the query rows' entries, once for each lane of a load: no two share a bank
  float terms[3][ROWS];  // what a product is multiplied by, what it is too large by, and the sum of the channel
};

DEVICE int channel_word(int i, int quad) { return (i / CHANNEL_VECTOR * 4 + quad) * CHANNEL_VECTOR + i % CHANNEL_VECTOR; }

// Entry (feature, or slot of two bits) `half` of pair `j` of a word.
DEVICE int channel_entry(int word, int j, int half) {
  if (CHANNEL_BITS == 16) return 2 * word + half;
  if (CHANNEL_BITS == 8) return 4 * word + 2 * j + half;
  if (CHANNEL_BITS == 4) return 8 * word + j + 4 * half;
  return 4 * (4 * word + 2 * (j / 4) + half) + j % 4;
}

DEVICE float query_float(u16 x) { return IS_CHANNEL_LEVELS ? from_half(x) : stored_float(x); }

// The query rows of a tile as `key_products` reads them; by all threads of a block.
DEVICE void lay_out(SharedQuery& shared, const u16 (*q)[QUERY_DIMS], const Params& p, int kv_head) {
  const int thread = threadIdx.x, threads = 32 * WARPS;
  if constexpr (HAS_CHANNEL) {
    for (int i = thread; i < PAIRS * 32; i += threads) {
      const int pair = i / 32, lane = i % 32, row = lane / 4 % ROWS;
      const int word = channel_word(pair / PAIRS_PER_WORD, lane % 4);
      u32 both = 0;
      for (int half = 0; half < 2; ++half) {
        const int entry = channel_entry(word, pair % PAIRS_PER_WORD, half);
        u16 x = entry < CHANNEL ? q[row][entry] : 0;
        if (CHANNEL_BITS == 4 && entry % 2) x = to_half(from_half(x) / 16);  // its levels lie above the lowest bit
        both |= u32(x) << (16 * half);
      }
      shared.pairs[pair][lane] = both;
    }
  }
  if constexpr (CHANNEL_BITS == 2) {
    for (int i = thread; i < PAIRS * 4; i += threads) {
      const int pair = i / 4, word = channel_word(pair / PAIRS_PER_WORD, i % 4);
      u32 both = 0;
      for (int half = 0; half < 2; ++half) {
        const int slot = channel_entry(word, pair % PAIRS_PER_WORD, half);
        if (slot < CHANNEL && p.is_start[kv_head * CHANNEL + slot])
          both |= u32(p.top[kv_head * HEAD_DIM + p.axis[kv_head * CHANNEL + slot]]) << (slot % 4 * 2 + 16 * half);
      }
      shared.fields[pair][i % 4] = both;
    }
  }
  if constexpr (HAS_KEPT) {
    for (int i = thread; i < SPARSE_DIMS; i += threads) {
      u16 x[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) x[r] = q[r][CHANNEL + i];
      for (int copy = 0; copy < COPIES; ++copy) {
        u8* entry = shared.features[i] + (copy + i) % COPIES * ENTRY_BYTES;  // no two threads to one bank
        if constexpr (ARE_FEATURES_FLOATS) {
#pragma unroll
          for (int r = 0; r < ROWS; ++r) reinterpret_cast<float*>(entry)[r] = query_float(x[r]);
        } else {
#pragma unroll
          for (int r = 0; r < ROWS; r += 2) reinterpret_cast<u32*>(entry)[r / 2] = x[r] | u32(x[r + 1]) << 16;
        }
      }
    }
  }
}

// 32 keys as they are stored: a lane's part.
struct StoredKeys {
  u32 channel[4][HAS_CHANNEL ? LANE_WORDS : 1][4 / CHANNEL_PIECE];  // of the keys group, group + 8, group + 16, group + 24
  u32 kept[HAS_KEPT ? KEPT_BYTES / KEPT_PIECE : 1], indices[HAS_KEPT ? INDEX_BYTES / INDEX_PIECE : 1];  // of the lane's key, as are the others
  u32 channel_scale, channel_centre, kept_scale;
};

// Of a key that no query sees, whatever lies there: its score does not count.
DEVICE void load_keys(StoredKeys& stored, const Params& p, const Keys& keys) {
  const int quad = lane_id() % 4, group = lane_id() / 4;
  if constexpr (HAS_CHANNEL) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const u8* first_row = row_in_order(p.channel, keys, 16 * tile + group, CHANNEL_STRIDE);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const u8* row = first_row + 8 * i * CHANNEL_STRIDE;
#pragma unroll
        for (int j = 0; j < LANE_WORDS; j += CHANNEL_VECTOR) {
          const int first = 4 * channel_word(j, quad);
          u32(*to)[4 / CHANNEL_PIECE] = &stored.channel[2 * tile + i][j];
          if constexpr (CHANNEL_PIECE < 4) {
#pragma unroll
            for (int k = 0; k < 4; k += CHANNEL_PIECE) {
              (*to)[k / CHANNEL_PIECE] = 0;
              if (first + k < CHANNEL_BYTES) (*to)[k / CHANNEL_PIECE] = load_piece<CHANNEL_PIECE>(row + first + k);
            }
          } else if (4 * channel_word(j + CHANNEL_VECTOR - 1, 3) + 4 > CHANNEL_BYTES && first >= CHANNEL_BYTES) {
#pragma unroll
            for (int k = 0; k < CHANNEL_VECTOR; ++k) to[k][0] = 0;
          } else {
            load_row<4 * CHANNEL_VECTOR, CHANNEL_ALIGNMENT>(*to, row + first);
          }
        }
      }
    }
    if constexpr (CHANNEL_SCALE_BYTES > 0) stored.channel_scale = load_number<CHANNEL_SCALE_BYTES>(my_row(p.channel_scale, keys, p.channel_scale.key));
    if constexpr (CHANNEL_CENTRED) stored.channel_centre = load_number<2>(my_row(p.channel_centre, keys, p.channel_centre.key));
  }
  if constexpr (HAS_KEPT) {
    load_pieces<KEPT_BYTES, KEPT_ALIGNMENT>(stored.kept, my_row(p.kept, keys, KEPT_STRIDE));
    load_pieces<INDEX_BYTES, INDEX_ALIGNMENT>(stored.indices, my_row(p.indices, keys, INDEX_STRIDE));
    if constexpr (KEPT_SCALE_BYTES > 0) stored.kept_scale = load_number<KEPT_SCALE_BYTES>(my_row(p.kept_scale, keys, p.kept_scale.key));
  }
}

// Pair j of a word of the channel.
DEVICE u32 channel_pair(u32 word, int j, u32 field) {
  if (CHANNEL_BITS == 16) return word;
  if (CHANNEL_BITS == 8) return j ? bytes_of<0x4342>(word ^ 0x80808080, 0) : bytes_of<0x4140>(word ^ 0x80808080, 0);
  if (CHANNEL_BITS == 4) return word >> (j / 2 * 8) & (j % 2 ? 0x00f000f0 : 0x000f000f);
  return (j / 4 ? bytes_of<0x4342>(word, 0) : bytes_of<0x4140>(word, 0)) & field;
}

// Products of the channels with the query rows, into `products` [32 keys][ROWS + 1] of this warp. Sync the warp before they are read.
DEVICE void channel_products(const StoredKeys& stored, const SharedQuery& shared, float (*products)[ROWS + 1]) {
  const int lane = lane_id(), quad = lane % 4, group = lane / 4;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    float c[4] = {0, 0, 0, 0};
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair += 2) {
      u32 a[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int word = (pair + i) / PAIRS_PER_WORD, j = (pair + i) % PAIRS_PER_WORD;
        const u32 field = CHANNEL_BITS == 2 ? shared.fields[pair + i][quad] : 0;
        a[2 * i] = channel_pair(word_of<CHANNEL_PIECE>(stored.channel[2 * tile][word]), j, field);
        a[2 * i + 1] = channel_pair(word_of<CHANNEL_PIECE>(stored.channel[2 * tile + 1][word]), j, field);
      }
      multiply<!IS_CHANNEL_LEVELS && IS_BF16>(c, a[0], a[1], a[2], a[3], shared.pairs[pair][lane], shared.pairs[pair + 1][lane]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 2 * quad + i % 2;
      if (row < ROWS) products[16 * tile + group + i / 2 * 8][row] = c[i];
    }
  }
}

// The bits `first` to `first` + count - 1 of a row of words, times 2^UP.
template <int UP>
DEVICE u32 bits_of_row(const u32* row, int first, int count, int row_words) {
  const int word = first / 32, offset = first % 32;
  u32 x = offset >= UP ? row[word] >> (offset - UP) : row[word] << (UP - offset);
  if (offset + count > 32) x |= row[smaller(word + 1, row_words - 1)] << (32 - offset + UP);
  return x & (((1u << count) - 1) << UP);
}

// Entry i of the kept ones.
DEVICE float kept_entry(const u32* kept, int i) {
  if (KEPT_BITS == 16) return stored_float(u16(kept[i / 2] >> (i % 2 * 16)));
  if (KEPT_BITS == 8) {  // below the exponent of 2^23
    const u32 biased = kept[i / 4] ^ 0x80808080, magic = 0x4b000000;
    const u32 x = i % 4 == 0 ? bytes_of<0x7650>(biased, magic) : i % 4 == 1 ? bytes_of<0x7651>(biased, magic)
                : i % 4 == 2 ? bytes_of<0x7652>(biased, magic) : bytes_of<0x7653>(biased, magic);
    return from_bits(x) - 8388736.0f;
  }
  return from_bits(bits_of_row<1>(kept, 4 * i, 4, words(KEPT_BYTES)) | 0x4a800000) - 4194311.5f;  // of 2^22
}

// Adds the products of the lane's kept entries with the query rows.
DEVICE void add_kept(float (&score)[ROWS], const StoredKeys& stored, const SharedQuery& shared) {
  u32 kept[HAS_KEPT ? words(KEPT_BYTES) : 1], indices[HAS_KEPT ? words(INDEX_BYTES) : 1];
  join<KEPT_PIECE>(kept, stored.kept);
  join<INDEX_PIECE>(indices, stored.indices);
  unsigned long long left = 0, behind = 0;  // a bitmap's bits
  int base = 0;
  if constexpr (INDEX_BITS == 0) {
    left = indices[0];
    if constexpr (INDEX_BYTES > 4) left |= (unsigned long long)indices[1] << 32;
    if constexpr (INDEX_BYTES > 8) behind = indices[2];
    if constexpr (INDEX_BYTES > 12) behind |= (unsigned long long)indices[3] << 32;
  }
#pragma unroll
  for (int i = 0; i < KEPT; ++i) {
    u32 offset;  // of a feature, in rows of 128 bytes
    if constexpr (INDEX_BITS == 0) {
      if (INDEX_BYTES > 8 && left == 0) {
        left = behind;
        behind = 0;
        base = 64;
      }
      offset = 128 * (base + (left ? lowest_bit(left) : 0));
      left &= left - 1;
    } else {
      offset = bits_of_row<7>(indices, i * INDEX_BITS, INDEX_BITS, words(INDEX_BYTES));
    }
    // a corrupt index must not read outside of the query
    if constexpr ((SPARSE_DIMS & (SPARSE_DIMS - 1)) == 0)
      offset &= 128 * (SPARSE_DIMS - 1);
    else
      offset = offset < 128 * (SPARSE_DIMS - 1) ? offset : 128 * (SPARSE_DIMS - 1);
    const float entry = kept_entry(kept, i);
    u32 of_rows[words(ENTRY_BYTES)];
    load_shared(of_rows, shared.features[0] + lane_id() % COPIES * ENTRY_BYTES + offset);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) score[r] += entry * (ARE_FEATURES_FLOATS ? from_bits(of_rows[smaller(r, words(ENTRY_BYTES) - 1)]) : query_float(u16(of_rows[r / 2] >> (r % 2 * 16))));
  }
}

// Products of the query rows with the lane's key, in the units of the query.
DEVICE void key_products(float (&score)[ROWS], const StoredKeys& stored, const SharedQuery& shared, float (*products)[ROWS + 1]) {
#pragma unroll
  for (int r = 0; r < ROWS; ++r) score[r] = 0;
  if constexpr (HAS_KEPT) {
    add_kept(score, stored, shared);
    if constexpr (KEPT_SCALE_BYTES > 0) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) score[r] *= number<KEPT_SCALE_BYTES>(stored.kept_scale);
    }
  }
  if constexpr (HAS_CHANNEL) {
    channel_products(stored, shared, products);
    sync_warp();
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      float x = products[lane_id()][r];
      if constexpr (IS_CHANNEL_LEVELS) x = x * LEVEL_UNIT - shared.terms[1][r];
      if constexpr (CHANNEL_SCALE_BYTES > 0) x *= number<CHANNEL_SCALE_BYTES>(stored.channel_scale);
      if constexpr (CHANNEL_CENTRED) x += number<2>(stored.channel_centre) * shared.terms[2][r];
      score[r] += x;
    }
    sync_warp();  // before the next products
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) score[r] *= shared.terms[0][r];
}

// The weighted sum of 32 values: transposed, values [VALUE_DIM, keys] times weights [keys, ROWS], by matrix units.
//
// Lane 4 * group + quad reads the features of its group of the keys 4 * quad to 4 * quad + 3, and of those 16 further, and pairs the entries
// of neighbouring keys. Output tile i has the lane's features 2 * i and 2 * i + 1 for the query rows 2 * quad and 2 * quad + 1.

constexpr int VALUE_BYTES = VALUE_DIM * VALUE_BITS / 8;
constexpr bool ARE_VALUES_EIGHTS = VALUE_BITS == 3;  // eight features have a word of 16 bits and, behind all of these, a byte
constexpr int LANE_FEATURES = VALUE_DIM / 8, VALUE_TILES = LANE_FEATURES / 2;
constexpr int VALUE_WORDS = ARE_VALUES_EIGHTS ? 2 : words(VALUE_BYTES / 8);  // of a lane and key: of eights one with words, one with bytes
constexpr int VALUE_PIECE = ARE_VALUES_EIGHTS ? VALUE_DIM / 32 : smaller(16, VALUE_BYTES / 8);  // bytes that a lane reads at a time
constexpr bool ARE_VALUES_LEVELS = VALUE_BITS < 16;
constexpr int WEIGHT_STRIDE = 48;  // entries between the rows of weights: no two lanes of a load share a bank
constexpr float VALUE_MIDDLE = VALUE_BITS == 8 ? 128.0f : VALUE_BITS == 4 ? 7.5f : 3.5f;  // of the levels, taken off at the end

// What a sum of levels of a lane's i-th feature is multiplied by: some levels lie above the lowest bit.
constexpr float level_unit(int i) {
  if (VALUE_BITS == 4) return i % 2 ? LEVEL_UNIT / 16 : LEVEL_UNIT;
  if (!ARE_VALUES_EIGHTS) return LEVEL_UNIT;
  return i % 8 == 2 ? LEVEL_UNIT / 64 : i % 8 == 1 || i % 8 == 4 || i % 8 == 6 ? LEVEL_UNIT / 8 : LEVEL_UNIT;
}

// The feature that a lane's i-th is.
DEVICE int value_feature(int group, int i) {
  if (ARE_VALUES_EIGHTS) return group * LANE_FEATURES + i;
  constexpr int PIECE = VALUE_PIECE * 8 / VALUE_BITS;
  return i / PIECE * 8 * PIECE + group * PIECE + i % PIECE;
}

struct StoredValues {
  u32 rows[2][4][VALUE_WORDS];  // of the keys 16 * i + 4 * quad + j
};

// The half `tile` of the values of 32 keys, which follow one another or do not.
template <bool IN_ORDER>
DEVICE void load_values(StoredValues& values, int tile, const Params& p, const Keys& keys) {
  const int lane = lane_id(), quad = lane % 4, group = lane / 4, first = 16 * tile + 4 * quad;
  const u8* first_row = row_in_order(p.v, keys, first, VALUE_STRIDE) + group * VALUE_PIECE;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const u8* row = IN_ORDER ? first_row + j * VALUE_STRIDE : row_of(p.v, keys, first + j, VALUE_STRIDE) + group * VALUE_PIECE;
    u32* x = values.rows[tile][j];
    if constexpr (ARE_VALUES_EIGHTS) {
      load_pieces<VALUE_PIECE, VALUE_PIECE>(x, row);
      load_pieces<VALUE_PIECE / 2, VALUE_PIECE / 2>(x + 1, row + (VALUE_DIM / 4 - group * (VALUE_PIECE / 2)));
    } else {
#pragma unroll
      for (int i = 0; i < VALUE_BYTES / 8; i += VALUE_PIECE) load_row<VALUE_PIECE, VALUE_PIECE>(x + i / 4, row + 8 * i);
    }
  }
}

// Values that no query sees may be no numbers, and 0 times such is none; levels are always numbers.
DEVICE void clear_unseen(StoredValues& values, int tile, const Keys& keys) {
  if (ARE_VALUES_LEVELS || keys.seen == ~0u) return;
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (!keys.is_seen(16 * tile + 4 * (lane_id() % 4) + j)) {
#pragma unroll
      for (int i = 0; i < VALUE_WORDS; ++i) values.rows[tile][j][i] = 0;
    }
}

constexpr int PAIRED = ARE_VALUES_EIGHTS ? LANE_FEATURES : 32 / VALUE_BITS;  // features at a time: those of a word, of eights all

// The features of two keys, as pairs.
DEVICE void pair_values(u32 (&pairs)[PAIRED], const u32* of_one, const u32* of_other) {
  const u32 x = of_one[0], y = of_other[0];
  if constexpr (ARE_VALUES_EIGHTS) {
#pragma unroll
    for (int i = 0; i < LANE_FEATURES / 8; ++i) {
      const u32 word = i ? bytes_of<0x7632>(x, y) : bytes_of<0x5410>(x, y), upper = word >> 9;
      const u32 byte = i ? bytes_of<0x4501>(of_one[1], of_other[1]) : bytes_of<0x5410>(of_one[1], of_other[1]);
      u32* eight = pairs + 8 * i;
      eight[0] = word & 0x00070007;
      eight[1] = word & 0x00380038;
      eight[2] = word & 0x01c001c0;
      eight[3] = upper & 0x00070007;
      eight[4] = upper & 0x00380038;
      eight[5] = byte & 0x00070007;
      eight[6] = byte & 0x00380038;
      eight[7] = (word >> 15 & 0x00010001) | (byte >> 5 & 0x00060006);
    }
  } else if constexpr (VALUE_BITS == 16) {
    pairs[0] = bytes_of<0x5410>(x, y);
    pairs[1] = bytes_of<0x7632>(x, y);
  } else if constexpr (VALUE_BITS == 8) {
    const u32 low = bytes_of<0x5140>(x, y) ^ 0x80808080, high = bytes_of<0x7362>(x, y) ^ 0x80808080;
    pairs[0] = bytes_of<0x4140>(low, 0);
    pairs[1] = bytes_of<0x4342>(low, 0);
    pairs[2] = bytes_of<0x4140>(high, 0);
    pairs[3] = bytes_of<0x4342>(high, 0);
  } else {
    const u32 low = bytes_of<0x5410>(x, y), high = bytes_of<0x7632>(x, y);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const u32 both = (i < 4 ? low : high) >> (i % 4 / 2 * 8);
      pairs[i] = both & (i % 2 ? 0x00f000f0 : 0x000f000f);
    }
  }
}

// Adds 16 keys of `values` under the weights at `weights` [ROWS][WEIGHT_STRIDE], those of 32 keys; and these weights, as they were rounded, to
// `mass`, of the query rows as in a tile of `sum`.
DEVICE void add_values(float (&sum)[VALUE_TILES][4], float (&mass)[4], const StoredValues& values, int tile, const u16* weights) {
  const int lane = lane_id(), quad = lane % 4, row = lane / 4 % ROWS;
  const u32* of_keys = reinterpret_cast<const u32*>(weights + row * WEIGHT_STRIDE + 16 * tile + 4 * quad);
  const u32 b0 = of_keys[0], b1 = of_keys[1];
  if constexpr (ARE_VALUES_LEVELS) multiply<false>(mass, 0x3c003c00, 0x3c003c00, 0x3c003c00, 0x3c003c00, b0, b1);
#pragma unroll
  for (int i = 0; i < LANE_FEATURES / PAIRED; ++i) {
    const u32(&of)[4][VALUE_WORDS] = values.rows[tile];
    u32 first[PAIRED], second[PAIRED];
    pair_values(first, of[0] + i, of[1] + i);
    pair_values(second, of[2] + i, of[3] + i);
#pragma unroll
    for (int j = 0; j < PAIRED; j += 2)
      multiply<!ARE_VALUES_LEVELS && IS_BF16>(sum[(i * PAIRED + j) / 2], first[j], first[j + 1], second[j], second[j + 1], b0, b1);
  }
}

DEVICE u16 to_weight(float x) { return !ARE_VALUES_LEVELS && IS_BF16 ? to_bf16(x) : to_half(x); }

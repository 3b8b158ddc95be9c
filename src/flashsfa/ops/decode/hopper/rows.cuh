// Rows of the cache in registers, and what a warp's lanes do together.
//
// A warp takes 32 keys at a time. Lane i belongs to key i for what is one number or one code per key; where matrices are multiplied, lane
// 4 * group + quad holds rows `group` and `group + 8`.

constexpr int WARP_KEYS = 32;
#define INFINITE from_bits(0x7f800000)

constexpr int words(int bytes) { return (bytes + 3) / 4; }
constexpr int smaller(int a, int b) { return a < b ? a : b; }

// A level alone in the low bits of 16 is, as float16, that level times 2^-24: a subnormal number, which matrix units multiply exactly.
constexpr float LEVEL_UNIT = 0x1p24f;

// BYTES from `at`, both multiples of 4, in as few loads as ALIGNMENT allows.
template <int BYTES, int ALIGNMENT>
DEVICE void load_row(u32* x, const u8* at) {
  constexpr int STEP = BYTES % 16 == 0 && ALIGNMENT >= 16 ? 16 : BYTES % 8 == 0 && ALIGNMENT >= 8 ? 8 : 4;
#pragma unroll
  for (int i = 0; i < BYTES / STEP; ++i) load(reinterpret_cast<u32(&)[STEP / 4]>(x[i * STEP / 4]), at + i * STEP);
}

// Rows of any number of bytes are read in pieces of 4, 2 or 1, a register each, which are joined when they are needed.
constexpr int piece_of(int bytes, int alignment) {
  return bytes % 4 == 0 && alignment >= 4 ? 4 : bytes % 2 == 0 && alignment >= 2 ? 2 : 1;
}

template <int PIECE>
DEVICE u32 load_piece(const u8* at) {
  static_assert(PIECE < 4);
  return PIECE == 2 ? load_2_bytes(at) : load_byte(at);
}

template <int BYTES, int ALIGNMENT>
DEVICE void load_pieces(u32* x, const u8* at) {
  constexpr int PIECE = piece_of(BYTES, ALIGNMENT);
  if constexpr (PIECE == 4) {
    load_row<BYTES, ALIGNMENT>(x, at);
  } else {
#pragma unroll
    for (int i = 0; i < BYTES / PIECE; ++i) x[i] = load_piece<PIECE>(at + i * PIECE);
  }
}

// The word that pieces of it make.
template <int PIECE>
DEVICE u32 word_of(const u32* pieces) {
  return PIECE == 4 ? pieces[0] : PIECE == 2 ? pieces[0] | pieces[1] << 16 : pieces[0] | pieces[1] << 8 | pieces[2] << 16 | pieces[3] << 24;
}

// The words of a row; what the last one lacks is 0.
template <int PIECE, int WORDS, int PIECES>
DEVICE void join(u32 (&row)[WORDS], const u32 (&pieces)[PIECES]) {
#pragma unroll
  for (int i = 0; i < WORDS; ++i) {
    u32 here[4 / PIECE] = {};
#pragma unroll
    for (int j = 0; j < 4 / PIECE; ++j)
      if (i * (4 / PIECE) + j < PIECES) here[j] = pieces[i * (4 / PIECE) + j];
    row[i] = word_of<PIECE>(here);
  }
}

// A number of a row of 4 bytes (float32) or 2 (bfloat16), as it is stored; and what it is.
template <int BYTES>
DEVICE u32 load_number(const u8* at) {
  if constexpr (BYTES == 2) return load_2_bytes(at);
  u32 x[1];
  load(x, at);
  return x[0];
}

template <int BYTES>
DEVICE float number(u32 stored) { return from_bits(BYTES == 4 ? stored : stored << 16); }

DEVICE float stored_float(u16 x) { return IS_BF16 ? from_bf16(x) : from_half(x); }

DEVICE float warp_max(float x) {
#pragma unroll
  for (int bits = 16; bits; bits /= 2) x = fmaxf(x, from_lane_xor(x, bits));
  return x;
}

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int bits = 16; bits; bits /= 2) x += from_lane_xor(x, bits);
  return x;
}

constexpr bool IS_PAGED = PAGE_SIZE > 0;
constexpr int PAGE = IS_PAGED ? PAGE_SIZE : 1;

// 32 keys: which of them some query sees, and what each lane knows of its own.
struct Keys {
  u32 seen;  // a bit per key
  int key, page;
  u32 is_padding;  // not yet taken off `seen`

  DEVICE bool is_seen(int i) const { return seen >> i & 1; }
  DEVICE bool is_mine_seen() const { return is_seen(lane_id()); }
};

DEVICE void hide_padding(Keys& keys) {
  if constexpr (HAS_PADDING) keys.seen &= ~ballot(keys.is_padding);
}

// The row of a key of a sequence, rows being `stride` bytes apart.
DEVICE const u8* row_of(const Rows& x, int key, int page, int stride) {
  if constexpr (IS_PAGED) return x.data + i64(page) * x.page + i64(key % PAGE) * stride;
  return x.data + i64(key) * stride;
}

DEVICE const u8* my_row(const Rows& x, const Keys& keys, int stride) { return row_of(x, keys.key, keys.page, stride); }

// The row of key i of 32 that need not follow one another.
DEVICE const u8* row_of(const Rows& x, const Keys& keys, int i, int stride) {
  return row_of(x, from_lane(keys.key, i), IS_PAGED ? from_lane(keys.page, i) : 0, stride);
}

// The row of key i of 32 that do. The next ones up to a multiple of 16 lie behind it: a page has no fewer keys.
DEVICE const u8* row_in_order(const Rows& x, const Keys& keys, int i, int stride) {
  return row_of(x, keys.key - lane_id() + i, IS_PAGED ? from_lane(keys.page, i / 16 * 16) : 0, stride);
}

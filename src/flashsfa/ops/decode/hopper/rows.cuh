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

// BYTES from `at`, which is a multiple of ALIGNMENT. No byte behind them is touched; those of the last word are 0.
template <int BYTES, int ALIGNMENT>
DEVICE void load_row(u32* x, const u8* at) {
  constexpr int STEP = BYTES % 16 == 0 && ALIGNMENT >= 16 ? 16 : BYTES % 8 == 0 && ALIGNMENT >= 8 ? 8 : BYTES % 4 == 0 && ALIGNMENT >= 4 ? 4 : 1;
  if constexpr (STEP > 1) {
#pragma unroll
    for (int i = 0; i < BYTES / STEP; ++i) load(reinterpret_cast<u32(&)[STEP / 4]>(x[i * STEP / 4]), at + i * STEP);
  } else {
#pragma unroll
    for (int i = 0; i < words(BYTES); ++i) {
      x[i] = 0;
      if constexpr (ALIGNMENT >= 2) {
#pragma unroll
        for (int j = 0; j < 4; j += 2)
          if (4 * i + j + 1 < BYTES) x[i] |= load_2_bytes(at + 4 * i + j) << (8 * j);
        if (BYTES % 2 == 1 && i == BYTES / 4) x[i] |= load_byte(at + BYTES - 1) << (8 * ((BYTES - 1) % 4));
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (4 * i + j < BYTES) x[i] |= load_byte(at + 4 * i + j) << (8 * j);
      }
    }
  }
}

// One number of a row, of 4 bytes (float32) or 2 (bfloat16).
template <int BYTES>
DEVICE u32 load_number(const u8* at) {
  if constexpr (BYTES == 4) {
    u32 x[1];
    load(x, at);
    return x[0];
  } else {
    return load_2_bytes(at) << 16;
  }
}

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

  DEVICE bool is_seen(int i) const { return seen >> i & 1; }
  DEVICE bool is_mine_seen() const { return is_seen(lane_id()); }
};

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

// A row that a warp has, in 16, 8, 4 or 3 bits. Entry d of it is entry d / 32 of lane d % 32.

constexpr int LANES = 32;

// What a warp does, for one token of a head: of a token that has a block to itself one warp has the key and another the value, of one among
// TOKENS a warp has both. `memory` is for the key, and as much behind it for the value.
struct Work {
  i64 token;
  bool has_key, has_value;
  u8* memory;
};

DEVICE Work work_of(u8* memory) {
  const int warp = threadIdx.x / LANES, place = TOKENS > 1 ? warp : 0;
  return {i64(blockIdx.x) * TOKENS + place, TOKENS > 1 || warp == 0, TOKENS > 1 || warp == 1, memory + 2 * place * WARP_BYTES};
}

constexpr int entries(int width) { return (width + LANES - 1) / LANES; }  // of a lane

DEVICE float number(u16 x) { return IS_BF16 ? from_bf16(x) : from_half(x); }

// The larger one, NaN if there is one: its row must not be read as numbers.
DEVICE float larger(float x, float y) { return x > y || x != x ? x : y; }

DEVICE float largest_of_lanes(float x) {
#pragma unroll
  for (int bits = LANES / 2; bits; bits /= 2) x = larger(x, from_lane_xor(x, bits));
  return x;
}

// The nearest level, of two the even one.
DEVICE float rounded(float x) {
  const float shift = 12582912.0f;  // 1.5 * 2^23: what is added to it has no digits behind the point
  return (x + shift) - shift;
}

// ---- against a scale in float32

// The scale of a row in 8 bits, from the largest magnitude of each lane.
DEVICE float scale_of(float largest) { return largest_of_lanes(largest) / 127; }

DEVICE u8 in_8_bits(u16 x, float scale) { return u8(int(rounded(number(x) / (scale > 0 ? scale : 1.0f)))); }

// ---- against a scale that is rounded to bfloat16 first. A row with NaN or infinity has NaN for a scale, and levels of zero.

// The scale of a row whose `largest` magnitude takes so many levels; `scale` keeps it.
DEVICE float rounded_scale(float largest, float levels, u16* scale) {
  const float x = largest_of_lanes(largest) / levels;
  const u16 kept = to_bf16(x + x * 0);  // infinity becomes NaN
  if (lane_id() == 0) *scale = kept;
  return from_bf16(kept);
}

DEVICE float steps(float x, float scale) { return scale > 0 ? x / scale : 0.0f; }

DEVICE u8 to_8_bits(float x, float scale) { return u8(int(fminf(fmaxf(rounded(steps(x, scale)), -127.0f), 127.0f))); }

// Of so many bits, the middle two around zero.
template <int BITS>
DEVICE u8 to_level(float x, float scale) {
  constexpr float HALF = 1 << (BITS - 1);
  return u8(fminf(fmaxf(floorf(steps(x, scale)) + HALF, 0.0f), 2 * HALF - 1));
}

// ---- bytes

// `count` numbers one after another from the lowest bit on, of so many `bits` each.
DEVICE void pack(u8* packed, const u8* numbers, int count, int bits) {
  sync_warp();  // which wrote them
  for (int byte = lane_id(); byte < (count * bits + 7) / 8; byte += LANES) {
    u32 x = 0;
#pragma unroll
    for (int bit = 0; bit < 8; ++bit) {
      const int from = 8 * byte + bit, i = from / bits;
      if (i < count) x |= (numbers[i] >> from % bits & 1u) << bit;
    }
    packed[byte] = u8(x);
  }
}

// `width` levels of three bits: eight take a word of 16 bits and, behind all words, a byte. The last one's lowest bit is the word's highest,
// its others are the byte's.
DEVICE void pack_3_bits(u8* packed, const u8* levels, int width) {
  sync_warp();  // which wrote them
  for (int i = lane_id(); i < width / 8; i += LANES) {
    const u8* x = levels + 8 * i;
    const u32 word = x[0] | x[1] << 3 | x[2] << 6 | x[3] << 9 | x[4] << 12 | (x[7] & 1) << 15;
    reinterpret_cast<u16*>(packed)[i] = u16(word);
    packed[width / 4 + i] = u8(x[5] | x[6] << 3 | x[7] >> 1 << 6);
  }
}

DEVICE u8* row_of(void* buffer, i64 row, i64 bytes) { return static_cast<u8*>(buffer) + row * bytes; }

// ---- rows

// A row as it is.
template <int WIDTH>
DEVICE void keep(void* kept, const u16* x) {
#pragma unroll
  for (int d = lane_id(); d < WIDTH; d += LANES) static_cast<u16*>(kept)[d] = x[d];
}

template <int WIDTH>
DEVICE void keep_in_8_bits(u8* kept, float* scale, const u16* row) {
  u16 x[entries(WIDTH)];
  float largest = 0;
#pragma unroll
  for (int i = 0; i < entries(WIDTH); ++i) {
    const int d = i * LANES + lane_id();
    x[i] = d < WIDTH ? row[d] : u16(0);
    largest = larger(largest, fabsf(number(x[i])));
  }
  const float step = scale_of(largest);
  if (lane_id() == 0) *scale = step;
#pragma unroll
  for (int i = 0; i < entries(WIDTH); ++i)
    if (i * LANES + lane_id() < WIDTH) kept[i * LANES + lane_id()] = in_8_bits(x[i], step);
}

// Each block of a power of two of the row, the largest that divides WIDTH, times its Hadamard matrix: a factor of it per bit of an entry's place.
template <int WIDTH>
DEVICE void rotate(float (&x)[entries(WIDTH)]) {
  constexpr int BLOCK = WIDTH & -WIDTH;
#pragma unroll
  for (int bit = 1; bit < BLOCK && bit < LANES; bit *= 2)
#pragma unroll
    for (int i = 0; i < entries(WIDTH); ++i) {
      const float other = from_lane_xor(x[i], bit);
      x[i] = lane_id() & bit ? other - x[i] : x[i] + other;
    }
#pragma unroll
  for (int bit = 1; bit < BLOCK / LANES; bit *= 2)
#pragma unroll
    for (int i = 0; i < entries(WIDTH); ++i) {
      if (i & bit) continue;
      const float one = x[i], other = x[i | bit];
      x[i] = one + other;
      x[i | bit] = one - other;
    }
  float norm = 1;
#pragma unroll
  for (int size = BLOCK; size > 1; size /= 4) norm *= size == 2 ? 0.70710678118654752f : 0.5f;
#pragma unroll
  for (int i = 0; i < entries(WIDTH); ++i) x[i] *= norm;
}

// The rotated row around the middle of its range. `levels` is the warp's memory.
template <int WIDTH, int BITS>
DEVICE void keep_rotated(u8* kept, u16* scale, u16* centre, const u16* row, u8* levels) {
  float x[entries(WIDTH)];
#pragma unroll
  for (int i = 0; i < entries(WIDTH); ++i) x[i] = i * LANES + lane_id() < WIDTH ? number(row[i * LANES + lane_id()]) : 0.0f;
  rotate<WIDTH>(x);
  const float nothing = from_bits(0xff800000);  // minus infinity
  float high = nothing, low = nothing;          // the latter of the row's negative
#pragma unroll
  for (int i = 0; i < entries(WIDTH); ++i)
    if (i * LANES + lane_id() < WIDTH) high = larger(high, x[i]), low = larger(low, -x[i]);
  const u16 rounded_middle = to_bf16(largest_of_lanes(high) / 2 - largest_of_lanes(low) / 2);
  const float middle = from_bf16(rounded_middle);
  if (lane_id() == 0) *centre = rounded_middle;
  float largest = 0;
#pragma unroll
  for (int i = 0; i < entries(WIDTH); ++i)
    if (i * LANES + lane_id() < WIDTH) largest = larger(largest, fabsf(x[i] - middle));
  const float step = rounded_scale(largest, ((1 << BITS) - 1) / 2.0f, scale);
#pragma unroll
  for (int i = 0; i < entries(WIDTH); ++i)
    if (i * LANES + lane_id() < WIDTH) levels[i * LANES + lane_id()] = to_level<BITS>(x[i] - middle, step);
  if constexpr (BITS == 3)
    pack_3_bits(kept, levels, WIDTH);
  else
    pack(kept, levels, WIDTH, BITS);
}

template <int WIDTH, int BITS>
DEVICE void keep_row(const u16* x, void* kept, void* scale, u16* centre, i64 row, u8* levels) {
  u8* const at = row_of(kept, row, WIDTH * BITS / 8);
  if constexpr (BITS == 16) keep<WIDTH>(at, x);
  if constexpr (BITS == 8) keep_in_8_bits<WIDTH>(at, static_cast<float*>(scale) + row, x);
  if constexpr (BITS < 8) keep_rotated<WIDTH, BITS>(at, static_cast<u16*>(scale) + row, centre + row, x, levels);
}

// Arithmetic on registers, and among the four lanes that hold one row of an accumulator.

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two entries in one word, rounded to 16 bits.
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 word;
  asm(PACK_INSTRUCTION " %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Of four words of each of four lanes, lane i gets the i-th word of all: 16 bytes of a row to store at once.
__device__ __forceinline__ uint4 quad_transpose(const u32 (&words)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  const u32 a = __shfl_xor_sync(~0u, odd ? words[0] : words[1], 1), b = __shfl_xor_sync(~0u, odd ? words[2] : words[3], 1);
  // two words of the even lanes, then of the odd ones: of columns `odd` and 2 + `odd`
  const u32 near[2] = {odd ? a : words[0], odd ? words[1] : a}, far[2] = {odd ? b : words[2], odd ? words[3] : b};
  const u32 x = __shfl_xor_sync(~0u, high ? near[0] : far[0], 2), y = __shfl_xor_sync(~0u, high ? near[1] : far[1], 2);
  return high ? make_uint4(x, y, far[0], far[1]) : make_uint4(near[0], near[1], x, y);
}

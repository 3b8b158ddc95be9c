// One warp's instructions: loads, bytes, matrix products, exchanges between lanes. The tests replace this file by one for the CPU.

#define DEVICE __device__ __forceinline__

DEVICE int lane_id() { return threadIdx.x % 32; }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
DEVICE int from_lane(int x, int lane) { return __shfl_sync(~0u, x, lane); }
DEVICE float from_lane(float x, int lane) { return __shfl_sync(~0u, x, lane); }
DEVICE float from_lane_xor(float x, int bits) { return __shfl_xor_sync(~0u, x, bits); }
DEVICE u32 sum_of_lanes(u32 x) { return __reduce_add_sync(~0u, x); }
DEVICE u32 ballot(bool x) { return __ballot_sync(~0u, x); }

// The bytes of low (0 to 3) and high (4 to 7) that the four digits of `selector` name, the lowest first.
template <u32 SELECTOR>
DEVICE u32 bytes_of(u32 low, u32 high) {
  return __byte_perm(low, high, SELECTOR);
}

DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float log2_exact(float x) { return log2f(x); }

// Loads are volatile: they are issued where they stand, ahead of the work that hides them. Whatever reads a register waits for it, if only to
// move it: what is loaded stays as it is until it is needed.
DEVICE void load(u32 (&x)[4], const u8* at) {
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "l"(at));
}
DEVICE void load(u32 (&x)[2], const u8* at) {
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "l"(at));
}
DEVICE void load(u32 (&x)[1], const u8* at) { asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(x[0]) : "l"(at)); }
template <int WORDS>
DEVICE void load_shared(u32 (&x)[WORDS], const u8* at) {
  if constexpr (WORDS == 4) {
    const uint4 y = *reinterpret_cast<const uint4*>(at);
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
  } else if constexpr (WORDS == 2) {
    const uint2 y = *reinterpret_cast<const uint2*>(at);
    x[0] = y.x, x[1] = y.y;
  } else {
    x[0] = *reinterpret_cast<const u32*>(at);
  }
}
DEVICE u32 load_2_bytes(const u8* at) {
  u32 x;
  asm volatile("ld.global.nc.u16 %0, [%1];" : "=r"(x) : "l"(at));
  return x;
}
DEVICE u32 load_byte(const u8* at) {
  u32 x;
  asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(x) : "l"(at));
  return x;
}
// Loads where `is_there`, else 0, into one register: a choice between registers would wait for the load.
DEVICE u32 load_if(bool is_there, const int* at) {
  u32 x;
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0; @p ld.global.nc.u32 %0, [%1];}" : "=&r"(x) : "l"(at), "r"(u32(is_there)));
  return x;
}
DEVICE u32 load_if(bool is_there, const u8* at) {
  u32 x;
  asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0; @p ld.global.nc.u8 %0, [%1];}" : "=&r"(x) : "l"(at), "r"(u32(is_there)));
  return x;
}

DEVICE float from_half(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
DEVICE float from_bf16(u16 x) { return __uint_as_float(u32(x) << 16); }
DEVICE float from_bits(u32 x) { return __uint_as_float(x); }
DEVICE u32 bits_of(float x) { return __float_as_uint(x); }

DEVICE u16 to_half(float x) {
  u16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
DEVICE u16 to_bf16(float x) {
  u16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

// c [16, 8] += a [16, 16] b [16, 8], float16 or, for BF16, bfloat16 times float32.
template <bool BF16>
DEVICE void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if constexpr (BF16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

DEVICE int lowest_bit(unsigned long long x) { return __ffsll((long long)x) - 1; }
// Counts up to `last` and from there to 0 again; the count before. All that the block wrote before is seen by whoever sees the count.
DEVICE u32 count_to(u32 last, u32* at) {
  u32 x;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(x) : "l"(at), "r"(last) : "memory");
  return x;
}
// What other blocks wrote, past the first cache.
DEVICE float load_written(const float* at) {
  float x;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(at) : "memory");
  return x;
}
DEVICE void load_written(float (&x)[4], const float* at) {
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3]) : "l"(at) : "memory");
}
DEVICE int count_bits(u32 x) { return __popc(x); }

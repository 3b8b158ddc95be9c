// Stands for warp.cuh on a CPU: a block's threads are fibers that stop where lanes exchange something, so that a kernel's logic runs,
// lane by lane, without a GPU. Matrix products are in float.

#include <math.h>
#include <string.h>
#include <ucontext.h>
#include <algorithm>
#include <vector>

#define DEVICE inline
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n)
#define __shared__

struct Index { int x, y, z; };
static Index threadIdx, blockIdx, gridDim;
static unsigned char dynamic[1 << 18] __attribute__((aligned(16)));

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  int waits = 0;  // for its warp (1) or block (2)
  bool done = false;
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static unsigned long long slots[32][2][32];  // warp, phase, lane
static float operands[32][2][32][6];
static int phases[1024];

template <class Run>
static void run_block(int threads, Run run) {
  static Run* kernel;
  kernel = &run;
  fibers.resize(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(1 << 16);
    fiber.waits = 0;
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, +[] { (*kernel)(); fibers[threadIdx.x].done = true; }, 0);
  }
  memset(dynamic, 0xff, sizeof dynamic);  // NaN
  for (bool runs = true, backwards = false; runs; backwards = !backwards) {  // so that no order of the lanes hides that they must wait
    runs = false;
    for (int j = 0; j < threads; ++j) {
      const int i = backwards ? threads - 1 - j : j;
      if (!fibers[i].done && !fibers[i].waits) {
        threadIdx.x = i;
        swapcontext(&scheduler, &fibers[i].context);
        runs = true;
      }
    }
    const auto release = [&](int first, int count, int whom) {  // once all of them wait
      for (int i = first; i < first + count; ++i)
        if (fibers[i].waits != whom) return;
      for (int i = first; i < first + count; ++i) fibers[i].waits = 0;
      runs = true;
    };
    for (int i = 0; i < threads; i += 32) release(i, 32, 1);
    release(0, threads, 2);
  }
  for (Fiber& fiber : fibers)
    if (!fiber.done) __builtin_trap();  // some lanes exchange what others do not
}

static void wait_for(int whom) {
  const int me = threadIdx.x;
  fibers[me].waits = whom;
  swapcontext(&fibers[me].context, &scheduler);
  threadIdx.x = me;
}

template <class T>
static T* exchanged(T x) {
  static_assert(sizeof(T) <= 8);
  const int me = threadIdx.x, phase = phases[me]++ % 2;
  memcpy(&slots[me / 32][phase][me % 32], &x, sizeof(T));
  wait_for(1);
  return (T*)slots[me / 32][phase];
}
template <class T>
static T from(int lane, T x) {
  const unsigned long long word = ((unsigned long long*)exchanged(x))[lane];
  T y;
  memcpy(&y, &word, sizeof(T));
  return y;
}

DEVICE int lane_id() { return threadIdx.x % 32; }
DEVICE void sync_warp() { exchanged(0); }
DEVICE void sync_block() { wait_for(2); }
DEVICE int from_lane(int x, int lane) { return from(lane, x); }
DEVICE float from_lane(float x, int lane) { return from(lane, x); }
DEVICE float from_lane_xor(float x, int bits) { return from(lane_id() ^ bits, x); }
DEVICE unsigned ballot(bool x) {
  const auto* all = (unsigned long long*)exchanged((unsigned long long)x);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= unsigned(all[i]) << i;
  return bits;
}
DEVICE unsigned sum_of_lanes(unsigned x) {
  const auto* all = (unsigned long long*)exchanged((unsigned long long)x);
  unsigned sum = 0;
  for (int i = 0; i < 32; ++i) sum += unsigned(all[i]);
  return sum;
}
DEVICE unsigned count_to(unsigned last, unsigned* at) {
  const unsigned x = *at;
  *at = x >= last ? 0 : x + 1;
  return x;
}
DEVICE float load_written(const float* at) { return *at; }
DEVICE void load_written(float (&x)[4], const float* at) { memcpy(x, at, sizeof x); }
template <unsigned SELECTOR>
DEVICE unsigned bytes_of(unsigned low, unsigned high) {
  const unsigned long long both = low | (unsigned long long)high << 32;
  unsigned x = 0;
  for (int i = 0; i < 4; ++i) x |= unsigned(both >> (8 * (SELECTOR >> (4 * i) & 7)) & 255) << (8 * i);
  return x;
}
DEVICE float exp2_fast(float x) { return exp2f(x); }
DEVICE float reciprocal(float x) { return 1 / x; }
DEVICE float log2_exact(float x) { return log2f(x); }

static void require_aligned(const void* at, int bytes) {
  if ((unsigned long long)at % bytes) __builtin_trap();
}
template <int N>
DEVICE void load(unsigned (&x)[N], const unsigned char* at) {
  require_aligned(at, 4 * N);
  memcpy(x, at, 4 * N);
}
template <int N>
DEVICE void load_shared(unsigned (&x)[N], const unsigned char* at) {
  load(x, at);
}
DEVICE unsigned load_2_bytes(const unsigned char* at) {
  require_aligned(at, 2);
  unsigned short x;
  memcpy(&x, at, 2);
  return x;
}
template <class T>
DEVICE unsigned load_if(bool is_there, const T* at) {
  return is_there ? unsigned(*at) : 0;
}
DEVICE unsigned load_byte(const unsigned char* at) { return *at; }

DEVICE float from_bits(unsigned x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
DEVICE unsigned bits_of(float x) {
  unsigned y;
  memcpy(&y, &x, 4);
  return y;
}
DEVICE float from_bf16(unsigned short x) { return from_bits(unsigned(x) << 16); }
DEVICE unsigned short to_bf16(float x) {
  const unsigned bits = bits_of(x);
  return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fff;
}
DEVICE float from_half(unsigned short x) {
  _Float16 y;
  memcpy(&y, &x, 2);
  return y;
}
DEVICE unsigned short to_half(float x) {
  const _Float16 y = x;
  unsigned short bits;
  memcpy(&bits, &y, 2);
  return bits;
}

template <bool BF16>
DEVICE void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const int me = threadIdx.x, warp = me / 32, lane = me % 32, phase = phases[me]++ % 2;
  const unsigned mine[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(operands[warp][phase][lane], mine, sizeof mine);
  wait_for(1);
  const auto number = [](unsigned pair, int half) {
    const unsigned short x = pair >> (16 * half);
    return BF16 ? from_bf16(x) : from_half(x);
  };
  const auto word = [&](int lane, int i) { return bits_of(operands[warp][phase][lane][i]); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k)
      c[i] += number(word(row % 8 * 4 + k % 8 / 2, k / 8 * 2 + row / 8), k % 2) * number(word(column * 4 + k % 8 / 2, 4 + k / 8), k % 2);
  }
}
DEVICE int lowest_bit(unsigned long long x) { return __builtin_ctzll(x); }
DEVICE int count_bits(unsigned x) { return __builtin_popcount(x); }

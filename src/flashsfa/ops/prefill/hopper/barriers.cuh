// How warpgroups wait for one another and for the copy engine.

enum NamedBarrier {     // of bar.sync's 16; the last two are the first of one per consumer
  MBARRIERS_READY = 0,  // all threads: mbarriers are initialised
  MMA_TURN = 1,         // two consumers: the one before has issued its matrix instructions
  WARPGROUP = 8,        // the threads of one consumer
};

__device__ __forceinline__ void named_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  u32 done = 0;
#if SPIN_LIMIT
  for (u32 spins = 0; !done; ++spins) {
    if (spins == SPIN_LIMIT) asm volatile("trap;");
#else
  while (!done) {
#endif
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// One thread, before anybody waits.
__device__ __forceinline__ void initialise_barriers(const SharedMemory& shared) {
  for (int i = 0; i < STAGES; ++i) {
    barrier_init(shared.k_full + 8 * i, 1);
    barrier_init(shared.v_full + 8 * i, 1);
    barrier_init(shared.k_empty + 8 * i, CONSUMERS * 4);  // one arrival per warp
    barrier_init(shared.v_empty + 8 * i, CONSUMERS * 4);
  }
  for (int i = 0; i < TILE_QUEUE; ++i) barrier_init(shared.queue_full + 8 * i, 1);
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

// Where in the ring of stages a warpgroup is, and the parity of the phase there that ends when a tile has come. The producer waits
// for the other parity: that the tile before has been released.
struct PipelineState {
  int stage = 0;
  u32 parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

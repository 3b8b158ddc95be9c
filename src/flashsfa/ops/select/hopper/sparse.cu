// Rows that are zero but for what a code of features keeps, made of whole rows or of the code. A warp has a row; entry d of it is entry d / 32 of
// lane d % 32.

struct Params {
  const u16* x;  // whole rows [batch, heads, tokens, HEAD_DIM], or the dense channel [..., DENSE_DIMS] of codes
  const u16* values;  // of codes, kept entries [..., KEPT]
  const u8* indices;  // and their places in the sparse part, likewise
  u16* out;  // [..., HEAD_DIM]
  // Strides in entries; all are contiguous in their last dimension.
  i64 x_batch, x_head, x_token, values_batch, values_head, values_token, indices_batch, indices_head, indices_token, out_batch, out_head, out_token;
  int tokens, heads;
};

static_assert(sizeof(Params) == PARAMS_BYTES, "sparse.py mirrors Params");
static_assert(HEAD_DIM <= 256, "an index is a byte");
constexpr int LANES = 32, ENTRIES = (HEAD_DIM + LANES - 1) / LANES;

struct Work {
  i64 batch, head, token;

  template <typename T>
  DEVICE T* of(T* x, i64 batch_stride, i64 head_stride, i64 token_stride) const {
    return x + batch * batch_stride + head * head_stride + token * token_stride;
  }
};

DEVICE Work work_of(const Params& p) {
  return {blockIdx.y / p.heads, blockIdx.y % p.heads, i64(blockIdx.x) * (THREADS / LANES) + threadIdx.x / LANES};
}

extern "C" __global__ void __launch_bounds__(THREADS) prune_kernel(const __grid_constant__ Params p) {
  const Work work = work_of(p);
  if (work.token >= p.tokens) return;
  const u16* const row = work.of(p.x, p.x_batch, p.x_head, p.x_token);
  u16* const out = work.of(p.out, p.out_batch, p.out_head, p.out_token);
  u16 x[ENTRIES];
  int magnitude[ENTRIES];  // -1 of what is in the dense channel, or no entry
#pragma unroll
  for (int i = 0; i < ENTRIES; ++i) {
    const int d = i * LANES + lane_id();
    x[i] = d < HEAD_DIM ? row[d] : u16(0);
    magnitude[i] = d >= DENSE_DIMS && d < HEAD_DIM ? x[i] & 0x7fff : -1;
  }
  bool is_kept[ENTRIES];
  find_largest(is_kept, magnitude, KEPT);
#pragma unroll
  for (int i = 0; i < ENTRIES; ++i) {
    const int d = i * LANES + lane_id();
    if (d < HEAD_DIM) out[d] = d < DENSE_DIMS || is_kept[i] ? x[i] : u16(0);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) scatter_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(16) u8 dynamic[];
  u16* const memory = reinterpret_cast<u16*>(dynamic) + threadIdx.x / LANES * HEAD_DIM;  // the row, until all lanes have put their entries there
  const Work work = work_of(p);
  if (work.token >= p.tokens) return;
  const u16* const dense = work.of(p.x, p.x_batch, p.x_head, p.x_token);
  const u16* const values = work.of(p.values, p.values_batch, p.values_head, p.values_token);
  const u8* const indices = work.of(p.indices, p.indices_batch, p.indices_head, p.indices_token);
  u16* const out = work.of(p.out, p.out_batch, p.out_head, p.out_token);
  for (int d = lane_id(); d < HEAD_DIM; d += LANES) memory[d] = d < DENSE_DIMS ? dense[d] : u16(0);
  sync_warp();
  for (int i = lane_id(); i < KEPT; i += LANES) {
    const int d = DENSE_DIMS + indices[i];
    if (d < HEAD_DIM) memory[d] = values[i];
  }
  sync_warp();
  for (int d = lane_id(); d < HEAD_DIM; d += LANES) out[d] = memory[d];
}

// Codes keys and values and stores them in a cache's buffers. Where the newest tokens are kept as they come, what is coded is those that leave them,
// and new ones take other slots. In pools of pages each token has a slot of its own.

DEVICE void append_key(const Params& p, const u16* k, i64 row, int head, u8* memory) {
  if constexpr (AXIS_BYTES > 0)
    keep_axes(p, k, row, head);
  else if constexpr (INDEX_BITS > 0)
    keep_features(p, k, row, memory);
  else
    keep_row<HEAD_DIM, KEPT_BITS>(k, p.values, p.scale, p.centre, row, memory);
}

extern "C" __global__ void __launch_bounds__(THREADS) append_kernel(const __grid_constant__ Params given) {
  extern __shared__ __align__(16) u8 dynamic[];
  Params p = given;
  const Work work = work_of(dynamic);
  if (work.token >= p.tokens) return;
  const int batch_head = blockIdx.y;
  const i64 token = work.token, batch = batch_head / p.heads, head = batch_head % p.heads;
  i64 row = i64(batch_head) * p.capacity + p.start + token;
  if constexpr (IS_PAGED) {
    const Place place = place_of(p, p.slots[batch * p.tokens + token], head);
    if (place.row < 0) return;
    row = place.row;
    p = shifted(p, place.bytes);
  }
  const u16* k = p.k + batch * p.k_batch + head * p.k_head + token * p.k_token;
  const u16* v = p.v + batch * p.v_batch + head * p.v_head + token * p.v_token;
  if constexpr (HAS_RECENT) {
    const i64 slot = i64(batch_head) * p.recent_capacity + token, oldest = slot + p.oldest, newest = slot + p.newest;
    if (work.has_key) keep<HEAD_DIM>(p.recent_k + newest * HEAD_DIM, k);
    if (work.has_value) keep<VALUE_DIM>(p.recent_v + newest * VALUE_DIM, v);
    if (token >= p.leaving) return;
    k = p.recent_k + oldest * HEAD_DIM;
    v = p.recent_v + oldest * VALUE_DIM;
  }
  if (work.has_key) append_key(p, k, row, int(head), work.memory);
  if (work.has_value) keep_row<VALUE_DIM, V_BITS>(v, p.stored_v, p.v_scale, p.v_centre, row, work.memory + WARP_BYTES);
}

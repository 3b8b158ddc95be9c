// What a launch passes. `Params` of params.py mirrors it.

struct Params {
  const u16* k;  // [batch, heads, tokens, HEAD_DIM], contiguous in its last dimension
  const u16* v;  // [batch, heads, tokens, VALUE_DIM], likewise
  // The cache's buffers [batch, heads, capacity, ...], contiguous: int8 where they have scales in float32, else as k and v.
  void* dense;
  void* values;
  u8* indices;
  float* scale;
  void* stored_v;
  float* v_scale;
  // The newest tokens, contiguous [batch, heads, recent_capacity, ...]: the `leaving` ones from slot `oldest` on are coded in place of k and
  // v, which are stored from slot `newest` on.
  u16* recent_k;
  u16* recent_v;
  i64 k_batch, k_head, k_token, v_batch, v_head, v_token;  // strides in entries
  int heads, capacity, start, recent_capacity, leaving, oldest, newest;
};

static_assert(sizeof(Params) == PARAMS_BYTES, "params.py mirrors Params");

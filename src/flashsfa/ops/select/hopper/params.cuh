// What a launch passes. `Params` of params.py mirrors it.

struct Params {
  const u16* k;  // [batch, heads, tokens, HEAD_DIM], contiguous in its last dimension
  const u16* v;  // [batch, heads, tokens, VALUE_DIM], likewise
  // The cache's buffers [batch, heads, capacity, ...], contiguous; those that its form has. Scales are float32 or bfloat16, centres bfloat16.
  void* values;  // kept entries of keys, whole rows, or levels of axes
  void* stored_v;
  void* dense;
  u8* indices;
  void* scale;  // of keys: of the dense channel, if entries have one of their own
  u16* value_scale;
  u16* centre;
  void* v_scale;
  u16* v_centre;
  // Of the axes of each head, [heads, ...]: which one starts in a slot of two bits, if one does; highest level, lower end, and 1 / step of each.
  const i64* axis;
  const u8* is_start;
  const u8* top;
  const float* low;
  const float* per_step;
  // The newest tokens, contiguous [batch, heads, recent_capacity, ...]: the `leaving` ones from slot `oldest` on are coded in place of k and
  // v, which are stored from slot `newest` on.
  u16* recent_k;
  u16* recent_v;
  // Of buffers that are pools of pages: [batch, tokens] the slot of each token, page * page_size + place in it.
  const i64* slots;
  i64 k_batch, k_head, k_token, v_batch, v_head, v_token;  // strides in entries
  // From a page or head of all pools to the next: so many rows of each, and so many bytes.
  i64 page_rows, head_rows, page_bytes, head_bytes;
  i64 all_slots;  // of a pool
  int tokens, heads, capacity, start, recent_capacity, leaving, oldest, newest, page_size;
};

static_assert(sizeof(Params) == PARAMS_BYTES, "params.py mirrors Params");

// What a launch passes. `Params` of params.py mirrors it.

// Keys or values [batch, kv_heads, tokens, ...], contiguous in the last dimension.
struct Entries {
  const u16* data;
  i64 batch, head;  // strides in entries, as the next
  int token;
};

struct Params {
  Entries first_k, first_v, recent_k, recent_v;  // exact tokens: the first ones, then the others
  const u16* q;           // [batch, heads, m, HEAD_DIM], contiguous in the last dimension
  const float* factor;    // [kv_heads, HEAD_DIM] of queries, from a multiple of 16 bytes on, or none
  const i64* positions;   // [batch, n_exact] of the exact tokens; none where coded tokens lie between the first and the recent ones
  const void* lengths;    // [batch] int32 or int64, or none
  const u8* padding;      // [batch, n], or none
  u16* out;               // [heads, rows, VALUE_DIM] of the coded tokens, then of all
  float* lse;             // [heads, rows] natural log-sum-exp, likewise
  i64 q_batch, q_head, q_token, positions_batch, padding_batch;  // strides in entries
  int rows, m, group, n, n_first, n_coded, n_exact, window;   // window 0: none
  int lengths_are_64_bit;
  float scale, cap;       // cap 0: none; else the scale is in units of it
};

static_assert(sizeof(Params) == PARAMS_BYTES, "params.py mirrors Params");

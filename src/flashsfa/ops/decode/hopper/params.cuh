// What a launch passes. `Params` of params.py mirrors it.

// A cache tensor [outer, head, key, ...] as bytes. The outer dimension is the sequence, or the page of a pool.
struct Rows {
  const u8* data;
  i64 outer, head;  // strides in bytes, as the next
  int key, page;    // page: `outer` again, of a pool of pages
};

struct Params {
  Rows channel, channel_scale, channel_centre, kept, kept_scale, indices, v, v_scale, v_centre;
  const u16* q;           // [batch, heads, m, HEAD_DIM]
  const i64* axis;        // [kv_heads, CHANNEL] the axis that a slot belongs to
  const u8* is_start;     // [kv_heads, CHANNEL]
  const u8* top;          // [kv_heads, HEAD_DIM] highest level of an axis
  const float* step;      // [kv_heads, HEAD_DIM] from a level of an axis to the next
  const float* centre;    // [kv_heads, HEAD_DIM] of the range of an axis
  const void* lengths;    // [batch] int32 or int64, or none
  const u8* padding;      // [batch, n], if HAS_PADDING
  const int* pages;       // [batch, ...] page ids, or none
  float* partial;         // [heads, splits, padded_rows, VALUE_DIM] unnormalised output
  float* peak;            // [heads, splits, padded_rows] largest score
  float* total;           // [heads, splits, padded_rows] sum of weights relative to 2^peak
  u32* ended;             // [tiles] how many blocks of a tile have ended, 0 at first and at last
  u16* out;               // [heads, rows, VALUE_DIM]
  float* lse;             // [heads, rows] natural log-sum-exp, or none
  i64 q_batch, q_head, q_token, padding_batch, pages_batch;  // strides in entries
  int kv_heads, n, m, topk_query, window;                    // window 0: none
  int rows, padded_rows, lengths_are_64_bit;
  float scale, cap, tolerance;
};

static_assert(sizeof(Params) == PARAMS_BYTES, "params.py mirrors Params");

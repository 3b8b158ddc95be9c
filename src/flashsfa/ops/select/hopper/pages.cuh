// Where tokens lie in pools of pages.

// Row `row` of buffers that all begin so many `bytes` further; -1 for a slot that there is not.
struct Place { i64 row, bytes; };

DEVICE Place place_of(const Params& p, i64 slot, i64 head) {
  if (slot < 0 || slot >= p.all_slots) return {-1, 0};
  const i64 page = slot / p.page_size;
  return {page * p.page_rows + head * p.head_rows + slot % p.page_size, page * p.page_bytes + head * p.head_bytes};
}

DEVICE Params shifted(Params p, i64 bytes) {
  p.values = row_of(p.values, 1, bytes);
  p.stored_v = row_of(p.stored_v, 1, bytes);
  p.dense = row_of(p.dense, 1, bytes);
  p.indices += bytes;
  p.scale = row_of(p.scale, 1, bytes);
  p.value_scale += bytes / 2;
  p.centre += bytes / 2;
  p.v_scale = row_of(p.v_scale, 1, bytes);
  p.v_centre += bytes / 2;
  return p;
}

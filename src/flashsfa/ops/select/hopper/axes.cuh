// Keys in a number of bits per axis, by the tables of `AxisLayout`: a lane has a byte, in which up to four axes start.

DEVICE void keep_axes(const Params& p, const u16* k, i64 row, int head) {
  const i64 first_axis = i64(head) * HEAD_DIM, first_slot = i64(head) * AXIS_BYTES * 4;
  u8* const packed = row_of(p.values, row, AXIS_BYTES);
  for (int byte = lane_id(); byte < AXIS_BYTES; byte += LANES) {
    u32 bits = 0;
#pragma unroll
    for (int slot = 0; slot < 4; ++slot) {
      const i64 at = first_slot + byte * 4 + slot;
      if (!p.is_start[at]) continue;
      const i64 d = p.axis[at], axis = first_axis + d;
      const float place = (number(k[d]) - p.low[axis]) * p.per_step[axis];
      const int top = p.top[axis], level = place > 0 ? place < top ? int(place) : top : 0;  // of NaN the lowest one
      bits |= u32(level) << 2 * slot;
    }
    packed[byte] = u8(bits);
  }
}

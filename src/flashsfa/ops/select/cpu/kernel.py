"""Tokens coded and written to the buffers of a cache: the bits that `topk_codes` and `quantize_rows` give."""

from __future__ import annotations

import numpy as np

from ...cpu.largest import largest
from ...cpu.machine import jit, widen
from ...cpu.parts import Part, entries, is_there, place
from ...cpu.threads import Kernel

_PAST_INT32 = np.float32(2**31)


def _append(like, kept_like, at, batch, heads, n, topk, dense_dims, dims, v_dim, coded, start, oldest, newest):
    """Code `coded` tokens to token `start` of the buffers: of k and v, or where there are buffers of the newest tokens, of those from slot
    `oldest` on; and put k and v, `n` tokens, to slot `newest` of them. `at` [10, 4] tells where k, v, the newest k and v, dense channel,
    values, indices, scale, v and its scale lie: what comes like `like`, what is kept like `kept_like`, int8 where there are scales."""
    k, v, newest_k, newest_v = Part(like, at[0]), Part(like, at[1]), Part(like, at[2]), Part(like, at[3])
    dense, values, v_kept = Part(kept_like, at[4]), Part(kept_like, at[5]), Part(kept_like, at[8])
    indices = Part(np.empty(0, np.uint8), at[6])
    scale, v_scale = Part(np.empty(0, np.float32), at[7]), Part(np.empty(0, np.float32), at[9])
    has_newest = is_there(newest_k)
    code = np.empty(dense_dims + topk, like.dtype)
    for head in range(batch * heads):
        b, h = head // heads, head % heads
        for i in range(coded):
            k_row = _row(newest_k if has_newest else k, b, h, oldest + i, dims)
            v_row = _row(newest_v if has_newest else v, b, h, oldest + i, v_dim)
            key, places = start + i, largest(k_row[dense_dims:], topk)
            _row(indices, b, h, key, topk)[:] = places
            code[:dense_dims] = k_row[:dense_dims]
            for j in range(topk):
                code[dense_dims + j] = k_row[dense_dims + places[j]]
            step = _keep_scale(code, scale, b, h, key)
            _keep(code[:dense_dims], step, _row(dense, b, h, key, dense_dims))
            _keep(code[dense_dims:], step, _row(values, b, h, key, topk))
            _keep(v_row, _keep_scale(v_row, v_scale, b, h, key), _row(v_kept, b, h, key, v_dim))
        if has_newest:
            for i in range(n):
                _row(newest_k, b, h, newest + i, dims)[:] = _row(k, b, h, i, dims)
                _row(newest_v, b, h, newest + i, v_dim)[:] = _row(v, b, h, i, v_dim)


append = Kernel(_append, parallel=False)


@jit()
def _row(part, b, h, key, width):
    """The entries of a key."""
    start = np.int64(place(part, b, h, key))
    return entries(part)[start : start + width]


@jit()
def _keep_scale(row, scale, b, h, key):
    """What a row is rounded in steps of: its scale, which is written, or 1 where that is zero or NaN; 0 where it is not rounded."""
    if not is_there(scale):
        return np.float32(0)
    top = np.float32(0)
    for x in row:
        size = abs(widen(x))
        if top == top and not size <= top:  # NaN, once there, stays
            top = size
    top /= np.float32(127)
    entries(scale)[place(scale, b, h, key)] = top
    return top if top > 0 else np.float32(1)


@jit()
def _keep(row, step, kept):
    """Write a row as it is, or by its step in 8 bits: 0 for what is no int32, and else the lowest byte, as in torch."""
    if step == 0:
        for u in range(len(row)):
            kept[u] = row[u]
        return
    for u in range(len(row)):
        level = np.rint(widen(row[u]) / step)
        kept[u] = np.int32(level) if abs(level) < _PAST_INT32 else np.int32(0)

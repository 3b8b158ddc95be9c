"""Queries as the passes take them: float32, times the scale of scores, and zero but for what their code keeps."""

from __future__ import annotations

import numpy as np

from ...cpu.largest import largest
from ...cpu.machine import jit, prange, widen
from ...cpu.parts import Part, entries, place
from ...cpu.threads import Kernel


def _lay_out(like, at, kv_heads, m, factor, topk, dense_dims, whole, coded):
    """q [B, Hq, M, D], like `like` and where `at` [4] tells, times the factor to whole [B·Hkv, R, D]: the queries of a kv head
    together, R = Hq / Hkv · M. With topk > 0 also to coded, of the same shape, what a code keeps: the first `dense_dims` entries and the
    `topk` largest magnitudes of the others, ties to the lowest index."""
    heads, rows, _ = whole.shape
    for line in prange(heads * rows):
        _lay_out_row(np.int64(line), like, at, kv_heads, m, np.float32(factor), topk, dense_dims, whole, coded)


lay_out = Kernel(_lay_out)


@jit()
def _lay_out_row(line, like, at, kv_heads, m, factor, topk, dense_dims, whole, coded):
    rows, dims = whole.shape[1:]
    head, row, q = line // rows, line % rows, Part(like, at)
    group, bits = rows // m, entries(q)
    start = place(q, head // kv_heads, head % kv_heads * group + row // m, row % m)
    for u in range(dims):
        whole[head, row, u] = widen(bits[start + np.uint64(u)])
    if topk > 0:
        coded[head, row] = 0
        for u in range(dense_dims):
            coded[head, row, u] = whole[head, row, u] * factor
        for u in largest(whole[head, row].view(np.uint32)[dense_dims:], topk) + dense_dims:
            coded[head, row, u] = whole[head, row, u] * factor
    for u in range(dims):
        whole[head, row, u] *= factor

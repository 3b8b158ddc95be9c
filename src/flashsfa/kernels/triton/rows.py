"""Which rows a program takes, where blocks of rows of all heads make up the grid."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_of_rows(heads, n, R: tl.constexpr):
    """Batch entry, head and their common index (int64), R rows (int64), and which of these are among the n there are.

    The grid is one-dimensional: cdiv(n, R) programs a head, head after head, batch entry after batch entry.
    """
    blocks = tl.cdiv(n, R)
    batch_head = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks) * R + tl.arange(0, R)  # [R]
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    return batch, head, batch_head.to(tl.int64), row.to(tl.int64), row < n

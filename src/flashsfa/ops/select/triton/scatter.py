"""Codes scattered to dense rows on the GPU: zeros, dense channel and kept entries in one pass, each byte written once.

`scatter_words` and `keep_support` (16-bit dtypes, K <= 16, even sizes): a thread builds eight entries in registers, four words
of two, and looks at every kept entry of the row for those that are among its eight.

`scatter_over_zeros` (any): zeros are written, and the kept entries over them while they still lie in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton.rows import block_of_rows, cdiv, in_units, next_power_of_2

_ENTRIES = 4096  # per program, for `scatter_over_zeros`
_ROWS = 32  # of the output per program, for words: as measured on an H100 (docs/notes/2026-11-26-quality.md)


def scatter(dense: Tensor, values: Tensor, indices: Tensor, out: Tensor) -> Tensor:
    """Write a code to `out` as dense rows, and return it.

    Args:
        dense: [..., M], values: [..., K], indices: [..., K] uint8: a code on CUDA, any strides of the leading dimensions.
            An index past the sparse part is left out.
        out: [..., D] of the dtype of values; its last dimension is contiguous.
    """
    head_dim, dense_dims, topk = out.shape[-1], dense.shape[-1], values.shape[-1]
    if out.numel() == 0:
        return out
    rows = out if out.ndim == 4 else out.view(1, 1, -1, head_dim)  # [B, H, N, D]
    batch, heads, n, _ = rows.shape
    dense, values, indices = (
        x if x.ndim == 4 and x.stride(-1) == 1 else x.reshape(batch, heads, n, x.shape[-1]).contiguous()
        for x in (dense, values, indices)
    )
    channel = (dense,) if dense_dims else ()  # an empty one has odd strides, and is not read
    if _by_words(topk, rows, *channel):
        scatter_words_kernel[(cdiv(n, _ROWS) * batch * heads,)](
            dense.view(torch.int32) if dense_dims else None, values, indices, rows.view(torch.int32),
            *(s // 2 for s in dense.stride()[:3]), *values.stride()[:3], *indices.stride()[:3],
            *(s // 2 for s in rows.stride()[:3]), heads, n,
            D=head_dim, M=dense_dims, K=topk, R=_ROWS, **_pieces(head_dim),
        )  # fmt: skip
        return out
    width = next_power_of_2(head_dim)
    block = max(1, _ENTRIES // width)
    scatter_over_zeros_kernel[(cdiv(n, block) * batch * heads,)](
        dense, values, indices, rows,
        *dense.stride()[:3], *values.stride()[:3], *indices.stride()[:3], *rows.stride()[:3], heads, n,
        D=head_dim, D_PAD=width, M=dense_dims, M_PAD=next_power_of_2(dense_dims),
        K=topk, K_PAD=next_power_of_2(topk), R=block, num_warps=4,
    )  # fmt: skip
    return out


def keep_support(rows: Tensor, dense_dims: int, indices: Tensor, out: Tensor) -> bool:
    """Write `rows` to `out`, zero but for the first `dense_dims` entries and those at `indices` of the rest.

    Args:
        rows: [B, H, N, D] on CUDA; indices: [B, H, N, K] uint8; last dimensions contiguous.
        out: as rows.

    Returns:
        False, with nothing written, for what cannot be written by words.
    """
    batch, heads, n, head_dim = rows.shape
    topk = indices.shape[-1]
    if not _by_words(topk, rows, out) or dense_dims % 2 or indices.stride(-1) != 1:
        return False
    if rows.numel():
        keep_support_kernel[(cdiv(n, _ROWS) * batch * heads,)](
            rows.view(torch.int32), indices, out.view(torch.int32),
            *(s // 2 for s in rows.stride()[:3]), *indices.stride()[:3], *(s // 2 for s in out.stride()[:3]), heads, n,
            D=head_dim, M=dense_dims, K=topk, R=_ROWS, **_pieces(head_dim),
        )  # fmt: skip
    return True


def _pieces(head_dim: int) -> dict[str, int]:
    """Pieces of eight entries per row of the output, and warps, so that a thread has four: more would not fit its registers."""
    pieces = next_power_of_2(cdiv(head_dim, 8))
    return {"PIECES": pieces, "num_warps": max(1, _ROWS * pieces // 128)}


def _by_words(topk: int, *tensors: Tensor) -> bool:
    """Whether K and the tensors that are read or written by words are within what words can do."""
    return topk <= 16 and all(x.itemsize == 2 and in_units(x, 2) for x in tensors)


@triton.jit(do_not_specialize=["heads", "n"])
def scatter_words_kernel(
    DENSE, VALUES, INDICES, OUT,
    dense_sb, dense_sh, dense_sn, values_sb, values_sh, values_sn, indices_sb, indices_sh, indices_sn,
    out_sb, out_sh, out_sn, heads, n,
    D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, PIECES: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """DENSE and OUT are int32 of two entries, with strides in words."""
    batch, head, _, row, there = block_of_rows(heads, n, R)
    value_row = VALUES + batch * values_sb + head * values_sh + row * values_sn  # [R] pointers
    index_row = INDICES + batch * indices_sb + head * indices_sh + row * indices_sn
    words = _words(value_row, index_row, there, D, M, K, PIECES, R)  # [R, 4 * PIECES]
    column = tl.arange(0, 4 * PIECES)[None, :]  # [1, 4 * PIECES]
    if M > 0:
        dense_row = DENSE + batch * dense_sb + head * dense_sh + row * dense_sn
        words |= tl.load(dense_row[:, None] + column, mask=there[:, None] & (column < M // 2), other=0)
    out_row = OUT + batch * out_sb + head * out_sh + row * out_sn
    tl.store(out_row[:, None] + column, words, mask=there[:, None] & (column < D // 2))


@triton.jit(do_not_specialize=["heads", "n"])
def keep_support_kernel(
    ROWS, INDICES, OUT,
    rows_sb, rows_sh, rows_sn, indices_sb, indices_sh, indices_sn, out_sb, out_sh, out_sn, heads, n,
    D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, PIECES: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """ROWS and OUT are int32 of two entries, with strides in words."""
    batch, head, _, row, there = block_of_rows(heads, n, R)
    index_row = INDICES + batch * indices_sb + head * indices_sh + row * indices_sn  # [R] pointers
    kept = _words(None, index_row, there, D, M, K, PIECES, R)  # [R, 4 * PIECES]
    column = tl.arange(0, 4 * PIECES)[None, :]  # [1, 4 * PIECES]
    kept = tl.where(column < M // 2, -1, kept)
    inside = there[:, None] & (column < D // 2)
    row_words = ROWS + batch * rows_sb + head * rows_sh + row * rows_sn
    out_row = OUT + batch * out_sb + head * out_sh + row * out_sn
    tl.store(out_row[:, None] + column, kept & tl.load(row_words[:, None] + column, mask=inside, other=0), mask=inside)


@triton.jit
def _words(
    value_row,
    index_row,
    there,
    D: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    PIECES: tl.constexpr,
    R: tl.constexpr,
):
    """Rows as words [R, 4 * PIECES] int32: the kept entries, all bits set for each without values, and zeros. A thread has a
    piece of four words."""
    piece = tl.arange(0, PIECES)[None, :]  # [1, PIECES]
    none = tl.zeros([R, PIECES], tl.int32)
    inside = there[:, None] & (8 * piece < D)
    # One address for all pieces of a row: the same load serves them all.
    index_row = index_row[:, None] + none  # [R, PIECES]
    if value_row is not None:
        value_row = value_row[:, None] + none
    first, second, third, fourth = none, none, none, none
    for i in tl.static_range(K):
        feature = M + tl.load(index_row + i, mask=inside, other=0).to(tl.int32)  # [R, PIECES]
        value = none | 0xFFFF
        if value_row is not None:
            value &= tl.load(value_row + i, mask=inside, other=0).to(tl.int16, bitcast=True).to(tl.int32)
        value = tl.where(feature % 2 == 1, value << 16, value)
        word = feature // 2 - 4 * piece
        first = tl.where(word == 0, first | value, first)
        second = tl.where(word == 1, second | value, second)
        third = tl.where(word == 2, third | value, third)
        fourth = tl.where(word == 3, fourth | value, fourth)
    return tl.join(tl.join(first, third), tl.join(second, fourth)).reshape(R, 4 * PIECES)


@triton.jit(do_not_specialize=["heads", "n"])
def scatter_over_zeros_kernel(
    DENSE, VALUES, INDICES, OUT,
    dense_sb, dense_sh, dense_sn, values_sb, values_sh, values_sn, indices_sb, indices_sh, indices_sn,
    out_sb, out_sh, out_sn, heads, n,
    D: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr, M_PAD: tl.constexpr,
    K: tl.constexpr, K_PAD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    batch, head, _, row, there = block_of_rows(heads, n, R)
    there = there[:, None]
    out_row = (OUT + batch * out_sb + head * out_sh + row * out_sn)[:, None]  # [R, 1]
    column = tl.arange(0, D_PAD)[None, :]  # [1, D_PAD]
    zeros = tl.zeros([R, D_PAD], OUT.dtype.element_ty)
    tl.store(out_row + column, zeros, mask=there & (column >= M) & (column < D))
    if M > 0:
        column = tl.arange(0, M_PAD)[None, :]  # [1, M_PAD]
        dense_row = DENSE + batch * dense_sb + head * dense_sh + row * dense_sn  # [R]
        dense = tl.load(dense_row[:, None] + column, mask=there & (column < M))  # [R, M_PAD]
        tl.store(out_row + column, dense, mask=there & (column < M))
    slot = tl.arange(0, K_PAD)[None, :]  # [1, K_PAD]
    inside = there & (slot < K)
    index_row = INDICES + batch * indices_sb + head * indices_sh + row * indices_sn  # [R]
    value_row = VALUES + batch * values_sb + head * values_sh + row * values_sn
    index = tl.load(index_row[:, None] + slot, mask=inside, other=0).to(tl.int32)  # [R, K_PAD]
    value = tl.load(value_row[:, None] + slot, mask=inside)  # [R, K_PAD]
    tl.debug_barrier()  # other threads' zeros are written before the entries that replace them
    tl.store(out_row + M + index, value, mask=inside & (index < D - M))

"""Rows of 16 bits times a float32 matrix per head, in one launch.

A product of float32 is three of bfloat16 on the matrix units: 16 bits of each number, far more than the result is rounded to. A few
rows are spread over many programs by their columns, as each has to read its part of the matrix first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton import first_use as first_use
from ..triton.rows import cdiv

_PRECISION = "ieee" if triton.knobs.runtime.interpret else "bf16x3"  # of which the interpreter does not know
_FEW = 64  # rows of a kv head, up to which time is latency
_NO_SIDE = (None,) * 3 + (0,) * 14


def transform(*sides: tuple[Tensor, Tensor]) -> list[Tensor]:
    """As `ops.transform.transform`: one or two sides x [B, H * G, N, D] and matrix [H, D, D].

    Args:
        sides: each x float16 or bfloat16 on CUDA, not empty, and each matrix float32; any strides.

    Returns:
        as x each, with dimensions in the same order in memory.
    """
    heads, head_dim, _ = sides[0][1].shape
    outs = [torch.empty_like(x) for x, _ in sides]
    rows = [x.numel() // head_dim // heads for x, _ in sides]  # of a kv head
    given = [
        (x, matrix, out, *x.stride(), *matrix.stride(), *out.stride(), of_head, x.shape[2], x.shape[1] // heads)
        for (x, matrix), out, of_head in zip(sides, outs, rows, strict=True)
    ]
    one, other = given if len(given) == 2 else (*given, _NO_SIDE)
    block, columns = (
        16 if max(rows) <= _FEW else 64,
        32 if head_dim > 16 else 16,
    )  # more do not fit the registers of every GPU
    transform_kernel[(cdiv(max(rows), block) * cdiv(head_dim, columns), len(sides) * heads)](
        *one, *other, heads, D=head_dim, R=block, C=columns, STEP=columns, PRECISION=_PRECISION, num_warps=4
    )
    return outs


@triton.jit(do_not_specialize=["rows", "n", "group", "other_rows", "other_n", "other_group", "heads"])
def transform_kernel(
    X, MATRIX, OUT, x_sb, x_sh, x_sn, x_sd, m_sh, m_si, m_so, out_sb, out_sh, out_sn, out_sd, rows, n, group,
    Y, OTHER, OUT_Y, y_sb, y_sh, y_sn, y_sd, o_sh, o_si, o_so, out_yb, out_yh, out_yn, out_yd, other_rows, other_n, other_group,
    heads, D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) < heads:
        _transform_rows(
            X, MATRIX, OUT, x_sb, x_sh, x_sn, x_sd, m_sh, m_si, m_so, out_sb, out_sh, out_sn, out_sd, rows, n, group,
            tl.program_id(1), D, R, C, STEP, PRECISION,
        )  # fmt: skip
    elif Y is not None:
        _transform_rows(
            Y, OTHER, OUT_Y, y_sb, y_sh, y_sn, y_sd, o_sh, o_si, o_so, out_yb, out_yh, out_yn, out_yd, other_rows, other_n,
            other_group, tl.program_id(1) - heads, D, R, C, STEP, PRECISION,
        )  # fmt: skip


@triton.jit
def _transform_rows(
    X, MATRIX, OUT, x_sb, x_sh, x_sn, x_sd, m_sh, m_si, m_so, out_sb, out_sh, out_sn, out_sd, rows, n, group, head,
    D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R rows of a kv head, whose queries of all batch entries are one run of rows, by C columns."""
    parts = tl.cdiv(D, C)  # of the same rows, one after the other
    row = (tl.program_id(0) // parts * R + tl.arange(0, R)).to(tl.int64)  # [R]
    column = tl.program_id(0) % parts * C + tl.arange(0, C)  # [C]
    entry, token, head = row // n, row % n, head.to(tl.int64)
    batch, query_head = entry // group, head * group + entry % group
    there, inside = (row < rows)[:, None], (column < D)[None, :]
    x_row = (X + batch * x_sb + query_head * x_sh + token * x_sn)[:, None]  # [R, 1]
    out = tl.zeros([R, C], tl.float32)
    for start in tl.static_range(0, D, STEP):
        feature = start + tl.arange(0, STEP)  # [STEP]
        x = tl.load(x_row + feature[None, :] * x_sd, mask=there & (feature < D)[None, :], other=0)  # [R, STEP]
        at = MATRIX + head * m_sh + feature[:, None] * m_si + column[None, :] * m_so  # [STEP, C]
        matrix = tl.load(at, mask=(feature < D)[:, None] & inside, other=0)
        out = tl.dot(x.to(tl.float32), matrix, out, input_precision=PRECISION)
    out_row = (OUT + batch * out_sb + query_head * out_sh + token * out_sn)[:, None]  # [R, 1]
    tl.store(out_row + column[None, :] * out_sd, out.to(OUT.dtype.element_ty), mask=there & inside)

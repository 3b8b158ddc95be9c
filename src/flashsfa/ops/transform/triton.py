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


def transform(x: Tensor, matrix: Tensor) -> Tensor:
    """x [B, H * G, N, D] times matrix [H, D, D] float32 of its kv head, as `ops.transform.transform`.

    Args:
        x: float16 or bfloat16 on CUDA, any strides, not empty.
        matrix: any strides.

    Returns:
        as x, with dimensions in the same order in memory.
    """
    batch, query_heads, n, head_dim = x.shape
    heads = matrix.shape[0]
    group = query_heads // heads
    out = torch.empty_like(x)
    rows = batch * group * n
    block, columns = (
        16 if rows <= _FEW else 64,
        32 if head_dim > 16 else 16,
    )  # more do not fit the registers of every GPU
    transform_kernel[(cdiv(rows, block) * cdiv(head_dim, columns), heads)](
        x, matrix, out, *x.stride(), *matrix.stride(), *out.stride(), rows, n, group,
        D=head_dim, R=block, C=columns, STEP=columns, PRECISION=_PRECISION, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows", "n", "group"])
def transform_kernel(
    X, MATRIX, OUT, x_sb, x_sh, x_sn, x_sd, m_sh, m_si, m_so, out_sb, out_sh, out_sn, out_sd, rows, n, group,
    D: tl.constexpr, R: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """R rows of a kv head, whose queries of all batch entries are one run of rows, by C columns."""
    parts = tl.cdiv(D, C)  # of the same rows, one after the other
    row = (tl.program_id(0) // parts * R + tl.arange(0, R)).to(tl.int64)  # [R]
    column = tl.program_id(0) % parts * C + tl.arange(0, C)  # [C]
    head = tl.program_id(1).to(tl.int64)
    entry, token = row // n, row % n
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

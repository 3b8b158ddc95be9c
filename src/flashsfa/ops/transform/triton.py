"""Rows of 16 bits times a float32 matrix per head, in one launch.

The matrix is taken as the sum of two of x's dtype, for which the matrix units multiply rows as they lie in memory: 16 bits of each entry
or more, where the result is rounded to 11 at most. A few rows are spread over many programs by their columns, as each has to read its
part of the matrix first; of many rows a program takes several blocks one after the other, with the next one's on their way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton import first_use as first_use
from ..triton.rows import cdiv, next_power_of_2

_INTERPRETED = triton.knobs.runtime.interpret  # by what has no products of bfloat16
_FEW = 256  # rows of a kv head, up to which time is latency
_PROGRAMS = 512  # or so: some four for each multiprocessor of a large GPU


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
    few, tokens = max(rows) <= _FEW, [x.shape[2] for x, _ in sides]
    block, columns, stages = _tile(few, max(head_dim, 16))
    parts = cdiv(head_dim, columns)
    mixed = few or min(tokens) < block
    # how long a run of rows is that blocks divide, and how many there are for a kv head
    runs = [(of_head, 1) if mixed else (n, of_head // n) for of_head, n in zip(rows, tokens, strict=True)]
    blocks = 1 if few else _blocks(runs, block, parts * heads)
    programs = max(cdiv(length, blocks * block) * count for length, count in runs)
    transform_kernel[(programs * parts, len(sides) * heads)](
        *given[0], *given[-1], heads, blocks, D=head_dim, K=next_power_of_2(max(head_dim, 16)), R=block, C=columns, FEW=few, MIXED=mixed,
        INTERPRETED=_INTERPRETED, num_warps=4, num_stages=stages,
    )  # fmt: skip
    return outs


def _tile(few: bool, width: int) -> tuple[int, int, int]:
    """Rows and columns of a block, and how many blocks of rows are under way: as measured on an H200
    (docs/notes/2026-11-30-vllm-follows-the-bytes.md), and what fits the registers and the shared memory of every GPU."""
    if few:
        return 16, 32 if width > 16 else 16, 1
    return (64, min(64, next_power_of_2(width)), 3) if width <= 128 else (64, 32, 2)


def _blocks(runs: list[tuple[int, int]], block: int, parts: int) -> int:
    """How many blocks a program takes one after the other: no more than leave every multiprocessor its programs, and as many as the
    others of its run."""
    most = max(1, sum(cdiv(length, block) * count for length, count in runs) * parts // _PROGRAMS)
    longest = cdiv(max(length for length, _ in runs), block)
    return cdiv(longest, cdiv(longest, most))


@triton.jit(do_not_specialize=["rows", "n", "group", "other_rows", "other_n", "other_group", "heads", "blocks"])
def transform_kernel(
    X, MATRIX, OUT, x_sb, x_sh, x_sn, x_sd, m_sh, m_si, m_so, out_sb, out_sh, out_sn, out_sd, rows, n, group,
    Y, OTHER, OUT_Y, y_sb, y_sh, y_sn, y_sd, o_sh, o_si, o_so, out_yb, out_yh, out_yn, out_yd, other_rows, other_n, other_group,
    heads, blocks, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FEW: tl.constexpr, MIXED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """`blocks` blocks of R rows by C columns; one block if FEW. The rows of a kv head are its queries of all batch entries: blocks are
    of them all if MIXED, otherwise of one batch entry and query head, which spares two divisions a row."""
    # one code for both sides, which would have memory and registers of their own otherwise
    one = tl.program_id(1) < heads
    X, MATRIX, OUT = tl.where(one, X, Y), tl.where(one, MATRIX, OTHER), tl.where(one, OUT, OUT_Y)
    rows, n, group = tl.where(one, rows, other_rows), tl.where(one, n, other_n), tl.where(one, group, other_group)
    x_sb, x_sh = tl.where(one, x_sb, y_sb), tl.where(one, x_sh, y_sh)
    x_sn, x_sd = tl.where(one, x_sn, y_sn), tl.where(one, x_sd, y_sd)
    m_sh, m_si, m_so = tl.where(one, m_sh, o_sh), tl.where(one, m_si, o_si), tl.where(one, m_so, o_so)
    out_sb, out_sh = tl.where(one, out_sb, out_yb), tl.where(one, out_sh, out_yh)
    out_sn, out_sd = tl.where(one, out_sn, out_yn), tl.where(one, out_sd, out_yd)
    head = tl.where(one, tl.program_id(1), tl.program_id(1) - heads).to(tl.int64)
    parts = tl.cdiv(D, C)  # of the same rows, one after the other
    program, span = tl.program_id(0) // parts, R if FEW else blocks * R
    if MIXED:
        length, run, first = rows, 0, program * span
    else:
        programs = tl.cdiv(n, span)
        length, run, first = n, program // programs, program % programs * span
    if run * length + first < rows:  # the other side may have more
        feature, column = tl.arange(0, K), tl.program_id(0) % parts * C + tl.arange(0, C)  # [K], [C]
        kept, inside = (feature < D)[None, :], (column < D)[None, :]
        at = MATRIX + head * m_sh + feature[:, None] * m_si + column[None, :] * m_so  # [K, C]
        high, low, scale = _halves(tl.load(at, mask=(feature < D)[:, None] & inside, other=0), X.dtype.element_ty)
        for block in tl.range(0, 1 if FEW else blocks):
            row = first + block * R + tl.arange(0, R)  # [R]
            there = (row < length)[:, None]
            entry, token = (row // n, row % n) if MIXED else (run, row)
            batch, query_head, token = (entry // group).to(tl.int64), head * group + entry % group, token.to(tl.int64)
            x_row = (X + batch * x_sb + query_head * x_sh + token * x_sn)[:, None]  # [R, 1]
            x = tl.load(x_row + feature[None, :] * x_sd, mask=there & kept, other=0)  # [R, K]
            if INTERPRETED:
                out = tl.dot(x.to(tl.float32), low.to(tl.float32), input_precision="ieee")
                out = tl.dot(x.to(tl.float32), high.to(tl.float32), out, input_precision="ieee")
            else:
                out = tl.dot(x, high, tl.dot(x, low))
            out_row = (OUT + batch * out_sb + query_head * out_sh + token * out_sn)[:, None]  # [R, 1]
            tl.store(out_row + column[None, :] * out_sd, (out * scale).to(OUT.dtype.element_ty), mask=there & inside)


@triton.jit
def _halves(matrix, DTYPE: tl.constexpr):
    """Two matrices of DTYPE and a scale of each column [1, C]: matrix [K, C] is their sum times the scale, as far as twice DTYPE's
    digits go."""
    scale = tl.full([1, matrix.shape[1]], 1.0, tl.float32)
    if tl.float16 == DTYPE:  # of few exponents: a column's largest entry comes between 1 and 2, exactly
        bits = tl.max(tl.abs(matrix), 0, keep_dims=True).to(tl.int32, bitcast=True)
        exponent = bits & 0x7F800000
        scale = exponent.to(tl.float32, bitcast=True)
        matrix *= (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    high = matrix.to(DTYPE)
    return high, (matrix - high.to(tl.float32)).to(DTYPE), scale

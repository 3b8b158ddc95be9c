"""Rows of 16 bits times a float32 matrix per head, in one launch.

The matrix is taken as the sum of two of x's dtype, for which the matrix units multiply rows as they lie in memory: 16 bits of each entry
or more, where the result is rounded to 11 at most. A few rows are spread over many programs by their columns, as each has to read its
part of the matrix first; of many rows a program takes several blocks one after the other, with the next one's on their way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton import first_use as first_use
from ..triton.rows import cdiv, next_power_of_2

_INTERPRETED = triton.knobs.runtime.interpret  # by what has no products of bfloat16
_FEW = 128  # tokens, up to which time is latency
_SIDE = 16  # arguments of a side: three tensors, eleven strides, heads and tokens
_PROGRAMS = 512  # or so: some four for each multiprocessor of a large GPU


def transform(*sides: tuple[Tensor, Tensor]) -> list[Tensor]:
    """As `ops.transform.transform`: one or two sides x [B, H * G, N, D] and matrix [H, D, D], of one B.

    Args:
        sides: each x float16 or bfloat16 on CUDA, not empty, and each matrix float32; any strides.

    Returns:
        as x each, with dimensions in the same order in memory.
    """
    outs = [torch.empty_like(x) for x, _ in sides]
    grid, arguments, sizes, options = _launch(outs, *sides)
    transform_kernel[grid](*arguments, **sizes, **options)
    return outs


class Prepared:
    """`transform` of sides of one form to the same `outs` each time, without what Triton asks of each launch. A form is shapes, strides and
    dtypes; addresses are multiples of 16."""

    def __init__(self, outs: list[Tensor], run: Callable[..., None], arguments: list[Any]) -> None:
        self._outs, self._run, self._arguments = outs, run, arguments

    @classmethod
    def of(cls, *sides: tuple[Tensor, Tensor]) -> Prepared | None:
        """For sides such as these; None if they lie at other addresses."""
        outs = [torch.empty_like(x) for x, _ in sides]
        if any(x.data_ptr() % 16 for x in (*outs, *(x for side in sides for x in side))):
            return None
        grid, arguments, sizes, options = _launch(outs, *sides)
        kernel = transform_kernel.warmup(*arguments, **sizes, **options, grid=grid)
        return cls(outs, kernel[grid], [*arguments, *sizes.values()])

    def __call__(self, *sides: tuple[Tensor, Tensor]) -> list[Tensor]:
        """As `transform`, over what was returned before. That the sides have the form is the caller's to know."""
        arguments = self._arguments
        for place, (x, matrix) in zip((0, _SIDE), (sides[0], sides[-1]), strict=True):
            arguments[place], arguments[place + 1] = x, matrix
        self._run(*arguments)
        return self._outs


def _launch(
    outs: list[Tensor], *sides: tuple[Tensor, Tensor]
) -> tuple[tuple[int, int, int], list[Any], dict[str, Any], dict[str, Any]]:
    """The grid, arguments in their order, constants in theirs, and how it is compiled."""
    kv_heads, head_dim, _ = sides[0][1].shape
    batch, tokens, heads = sides[0][0].shape[0], [x.shape[2] for x, _ in sides], [x.shape[1] for x, _ in sides]
    given = [
        [x, matrix, out, *x.stride(), *matrix.stride(), *out.stride(), *x.shape[1:3]]
        for (x, matrix), out in zip(sides, outs, strict=True)
    ]
    rows, columns, stages = _tile(max(tokens), max(head_dim, 16))
    blocks, parts = cdiv(max(tokens), rows), cdiv(head_dim, columns)
    # as many blocks to a program as leave every multiprocessor its programs, and to each as many as to the others
    all_blocks = batch * parts * sum(n * cdiv(x, rows) for n, x in zip(heads, tokens, strict=True))
    programs = cdiv(blocks, max(1, all_blocks // _PROGRAMS))
    arguments = [*given[0], *given[-1], batch, kv_heads, programs, cdiv(blocks, programs)]
    sizes = {
        "D": head_dim, "K": next_power_of_2(max(head_dim, 16)), "R": rows, "C": columns, "INTERPRETED": _INTERPRETED,
    }  # fmt: skip
    return (batch * sum(heads) * programs * parts, 1, 1), arguments, sizes, {"num_warps": 4, "num_stages": stages}


def _tile(tokens: int, width: int) -> tuple[int, int, int]:
    """Rows and columns of a block, and how many blocks of rows are under way: as measured on an H200
    (docs/notes/2026-11-30-vllm-follows-the-bytes.md), and what fits the registers and the shared memory of every GPU."""
    if tokens <= _FEW:
        return 16, 32 if width > 16 else 16, 1
    return (64, min(64, next_power_of_2(width)), 3) if width <= 128 else (64, 32, 2)


@triton.jit(do_not_specialize=["heads", "n", "other_heads", "other_n", "batch", "kv_heads", "programs", "blocks"])
def transform_kernel(
    X, MATRIX, OUT, x_sb, x_sh, x_sn, x_sd, m_sh, m_si, m_so, out_sb, out_sh, out_sn, out_sd, heads, n,
    Y, OTHER, OUT_Y, y_sb, y_sh, y_sn, y_sd, o_sh, o_si, o_so, out_yb, out_yh, out_yn, out_yd, other_heads, other_n,
    batch, kv_heads, programs, blocks, D: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """`blocks` blocks of R rows of a batch entry and head, by C columns."""
    parts = tl.cdiv(D, C)  # of the same rows, one after the other
    program, entry = tl.program_id(0) // parts % programs, tl.program_id(0) // parts // programs
    # one code for both sides, which would have memory and registers of their own otherwise
    one = entry < batch * heads
    entry = tl.where(one, entry, entry - batch * heads)
    X, MATRIX, OUT = tl.where(one, X, Y), tl.where(one, MATRIX, OTHER), tl.where(one, OUT, OUT_Y)
    heads, n = tl.where(one, heads, other_heads), tl.where(one, n, other_n)
    x_sb, x_sh = tl.where(one, x_sb, y_sb), tl.where(one, x_sh, y_sh)
    x_sn, x_sd = tl.where(one, x_sn, y_sn), tl.where(one, x_sd, y_sd)
    m_sh, m_si, m_so = tl.where(one, m_sh, o_sh), tl.where(one, m_si, o_si), tl.where(one, m_so, o_so)
    out_sb, out_sh = tl.where(one, out_sb, out_yb), tl.where(one, out_sh, out_yh)
    out_sn, out_sd = tl.where(one, out_sn, out_yn), tl.where(one, out_sd, out_yd)
    index, head = (entry // heads).to(tl.int64), (entry % heads).to(tl.int64)
    first = program * blocks * R
    if first < n:  # the other side may have more
        feature, column = tl.arange(0, K), tl.program_id(0) % parts * C + tl.arange(0, C)  # [K], [C]
        kept, inside = (feature < D)[None, :], (column < D)[None, :]
        at = MATRIX + head // (heads // kv_heads) * m_sh + feature[:, None] * m_si + column[None, :] * m_so  # [K, C]
        high, low, scale = _halves(tl.load(at, mask=(feature < D)[:, None] & inside, other=0), X.dtype.element_ty)
        X += index * x_sb + head * x_sh
        OUT += index * out_sb + head * out_sh
        for block in tl.range(0, blocks):
            row = first + block * R + tl.arange(0, R)  # [R]
            there, row = (row < n)[:, None], row.to(tl.int64)[:, None]
            x = tl.load(X + row * x_sn + feature[None, :] * x_sd, mask=there & kept, other=0)  # [R, K]
            if INTERPRETED:
                out = tl.dot(x.to(tl.float32), low.to(tl.float32), input_precision="ieee")
                out = tl.dot(x.to(tl.float32), high.to(tl.float32), out, input_precision="ieee")
            else:
                out = tl.dot(x, high, tl.dot(x, low))
            to = OUT + row * out_sn + column[None, :] * out_sd  # [R, C]
            tl.store(to, (out * scale).to(OUT.dtype.element_ty), mask=there & inside)


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

"""The end of a decode: the splits of each query row become its output."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ...triton.rows import next_power_of_2
from .scores import Problem, rotated


def run_splits(kernel: Any, problem: Problem, launch: dict[str, Any], waves: int, out: Tensor, lse: Tensor) -> None:
    """Run a `kernel` that attends to the keys in splits, so many that each processor has `waves` programs, and merge them into out and
    lse, both [heads, rows, ...]."""
    splits = problem.splits(launch["BN"], waves)
    partial = problem.scratch(splits, problem.padded_rows, problem.width)
    peak, total = (problem.scratch(splits, problem.padded_rows) for _ in range(2))
    kernel[problem.heads * problem.tiles, splits](
        PARTIAL=partial, PEAK=peak, TOTAL=total,
        **problem.visibility, **problem.places, **problem.coded, **problem.valued, **launch,
    )  # fmt: skip
    combine(problem, partial, peak, total, out, lse)


def combine(
    problem: Problem, partial: Tensor, peak: Tensor | None, total: Tensor, out: Tensor, lse: Tensor | None
) -> None:
    """Merge unnormalised outputs `partial` [heads, splits, R, Dv] into out [heads, rows, Dv], rotated back where they are rotated.

    `total` [heads, splits, R] are the splits' weights relative to 2^`peak`; with None they share one base. The
    natural log-sum-exp goes to `lse` if given.
    """
    decode_combine_kernel[(problem.heads * problem.rows,)](
        partial, peak, total, out, lse, total.shape[1], problem.rows,
        R=problem.padded_rows, DV=problem.width, ROTATION=problem.rotation, BS=min(32, next_power_of_2(total.shape[1])), num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def decode_combine_kernel(
    PARTIAL, PEAK, TOTAL, OUT, LSE, splits, rows,
    R: tl.constexpr, DV: tl.constexpr, ROTATION: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """One query row: output [DV] and log-sum-exp."""
    head, r = tl.program_id(0) // rows, tl.program_id(0) % rows
    first_row = head.to(tl.int64) * splits * R + r
    DVP: tl.constexpr = triton.next_power_of_2(DV)
    c = tl.arange(0, DVP)
    peak = float("-inf")
    total = 0.0
    acc = tl.zeros([DVP], tl.float32)
    for first in range(0, splits, BS):
        s = first + tl.arange(0, BS)
        row = first_row + s * R  # [BS]
        inside = s < splits
        peaks = tl.where(inside, 0.0, float("-inf"))
        if PEAK is not None:
            peaks = tl.load(PEAK + row, mask=inside, other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = tl.exp2(peaks - base)  # [BS]
        shrink = tl.exp2(peak - base)
        part = tl.load(
            PARTIAL + row[:, None] * DV + c[None, :], mask=inside[:, None] & (c < DV)[None, :], other=0.0
        )  # [BS, DVP]
        total = total * shrink + tl.sum(weight * tl.load(TOTAL + row, mask=inside, other=0.0), 0)
        acc = acc * shrink + tl.sum(weight[:, None] * part, 0)
        peak = new_peak
    some = tl.where(total == 0.0, 1.0, total)  # a row that sees no key: output 0, log-sum-exp -inf
    at = tl.program_id(0).to(tl.int64)
    out = acc / some
    if ROTATION > 1:
        out = rotated(out, c, ROTATION)
    tl.store(OUT + at * DV + c, out.to(OUT.dtype.element_ty), mask=c < DV)
    if LSE is not None:
        tl.store(LSE + at, (peak + tl.log2(some)) * 0.6931471805599453)

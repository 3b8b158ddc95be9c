"""Attention over further keys folded into attention so far, in one pass over both."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...triton.rows import block_of_rows, cdiv, next_power_of_2

_ENTRIES = 4096  # of the output per program


def merge_parts(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Fold `part` into `out` and its log-sum-exp into `lse`, in place, with fp32 arithmetic.

    Args:
        out, part: [B, H, N, D] of one dtype, the last dimension contiguous, any strides of the others.
        lse, part_lse: [B, H, N] float32, any strides; -inf where a query saw no key, its output being 0.
    """
    batch, heads, n, head_dim = out.shape
    width = next_power_of_2(head_dim)
    block = max(1, _ENTRIES // width)
    merge_parts_kernel[(cdiv(n, block) * batch * heads,)](
        out, lse, part, part_lse,
        *out.stride()[:3], *lse.stride(), *part.stride()[:3], *part_lse.stride(), heads, n,
        D=head_dim, D_PAD=width, R=block, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "n"])
def merge_parts_kernel(
    OUT, LSE, PART, PART_LSE,
    out_sb, out_sh, out_sn, lse_sb, lse_sh, lse_sn, part_sb, part_sh, part_sn, part_lse_sb, part_lse_sh, part_lse_sn,
    heads, n, D: tl.constexpr, D_PAD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """R queries of one head: output [R, D] and log-sum-exp [R]."""
    batch, head, _, row, there = block_of_rows(heads, n, R)
    column = tl.arange(0, D_PAD)[None, :]  # [1, D_PAD]
    inside = there[:, None] & (column < D)
    at = LSE + batch * lse_sb + head * lse_sh + row * lse_sn  # [R]
    part_at = PART_LSE + batch * part_lse_sb + head * part_lse_sh + row * part_lse_sn
    out_at = (OUT + batch * out_sb + head * out_sh + row * out_sn)[:, None] + column  # [R, D_PAD]
    values_at = (PART + batch * part_sb + head * part_sh + row * part_sn)[:, None] + column
    lse = tl.load(at, mask=there, other=0.0)  # [R]
    part_lse = tl.load(part_at, mask=there, other=0.0)
    out = tl.load(out_at, mask=inside, other=0.0).to(tl.float32)  # [R, D_PAD]
    part = tl.load(values_at, mask=inside, other=0.0).to(tl.float32)
    peak = tl.maximum(lse, part_lse)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    base = tl.where((lse != lse) | (part_lse != part_lse), float("nan"), base)  # which maximum() passes over
    keep, add = tl.exp(lse - base), tl.exp(part_lse - base)
    total = tl.where(peak == float("-inf"), 1.0, keep + add)  # no key on either side: output 0, log-sum-exp -inf
    merged = (out * keep[:, None] + part * add[:, None]) / total[:, None]
    tl.store(out_at, merged.to(OUT.dtype.element_ty), mask=inside)
    tl.store(at, tl.where(base != base, base, peak + tl.log(total)), mask=there)

"""Codes and values in 8 bits, written into a cache's buffers: what `codes.quantize_rows` gives, bit by bit, in one pass over rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ....checks import require
from ...triton.rows import block_of_rows, cdiv, next_power_of_2

_ROWS, _FEW_ROWS = 8, 512  # of all heads, up to which a program takes a single one


def write_8_bit(
    code: tuple[Tensor, Tensor, Tensor],
    v: Tensor,
    buffers: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    start: int,
) -> None:
    """Write a code and v in 8 bits into a cache's buffers at token `start`, in one launch.

    Args:
        code: contiguous dense channel [B, H, N, M], values [B, H, N, K] and uint8 indices [B, H, N, K], on CUDA.
        v: [B, H, N, Dv] any strides.
        buffers: of dense channel, values and indices [B, H, C, ...], their scales [B, H, C] float32, v [B, H, C, Dv] and its
            scales; int8 where they have scales; contiguous.

    Raises:
        ValueError: buffers that do not fit, or a `start` that leaves no room.
    """
    dense, values, indices = code
    batch, heads, n, topk = values.shape
    capacity = buffers[0].shape[2]
    for name, buffer, width in zip(
        ("dense", "values", "indices", "scale", "v", "v_scale"), buffers,
        ((dense.shape[-1],), (topk,), (topk,), (), (v.shape[-1],), ()), strict=True,
    ):  # fmt: skip
        require(
            buffer.is_contiguous() and buffer.shape == (batch, heads, capacity, *width) and buffer.device == v.device,
            lambda name=name, buffer=buffer, width=width: (
                f"the {name} buffer must be contiguous {[batch, heads, capacity, *width]} on {v.device}, got {tuple(buffer.shape)} on "
                f"{buffer.device}"
            ),
        )
    require(0 <= start <= capacity - n, lambda: f"{n} tokens at {start} do not fit buffers of {capacity}")
    if not v.numel():
        return
    rows = 1 if batch * heads * n <= _FEW_ROWS else _ROWS
    write_8_bit_kernel[(cdiv(n, rows) * batch * heads,)](
        dense, values, indices, v, *buffers, *v.stride(), start, heads, n, capacity,
        M=dense.shape[-1], M_PAD=next_power_of_2(dense.shape[-1]), K=topk, K_PAD=next_power_of_2(topk),
        DV=v.shape[-1], DV_PAD=next_power_of_2(v.shape[-1]), R=rows, num_warps=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["start", "heads", "n", "capacity"])
def write_8_bit_kernel(
    DENSE, VALUES, INDICES, V, DENSE_OUT, VALUES_OUT, INDICES_OUT, SCALE_OUT, V_OUT, V_SCALE_OUT,
    v_sb, v_sh, v_sn, v_sd, start, heads, n, capacity,
    M: tl.constexpr, M_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    batch, head, batch_head, row, there = block_of_rows(heads, n, R)
    code_row, out_row = batch_head * n + row, batch_head * capacity + start + row  # [R]
    slot = tl.arange(0, K_PAD)[None, :]  # [1, K_PAD]
    kept = there[:, None] & (slot < K)
    values = tl.load(VALUES + code_row[:, None] * K + slot, mask=kept, other=0).to(tl.float32)  # [R, K_PAD]
    largest = _largest(values)  # [R]
    if M > 0:
        column = tl.arange(0, M_PAD)[None, :]  # [1, M_PAD]
        inside = there[:, None] & (column < M)
        dense = tl.load(DENSE + code_row[:, None] * M + column, mask=inside, other=0).to(tl.float32)  # [R, M_PAD]
        largest = tl.maximum(largest, _largest(dense), propagate_nan=tl.PropagateNan.ALL)
    scale = _scale(largest)
    if M > 0:
        tl.store(DENSE_OUT + out_row[:, None] * M + column, _levels(dense, scale), mask=inside)
    tl.store(VALUES_OUT + out_row[:, None] * K + slot, _levels(values, scale), mask=kept)
    tl.store(
        INDICES_OUT + out_row[:, None] * K + slot, tl.load(INDICES + code_row[:, None] * K + slot, mask=kept), mask=kept
    )
    tl.store(SCALE_OUT + out_row, scale, mask=there)
    column = tl.arange(0, DV_PAD)[None, :]  # [1, DV_PAD]
    inside = there[:, None] & (column < DV)
    v_row = V + batch * v_sb + head * v_sh + row * v_sn  # [R]
    v = tl.load(v_row[:, None] + column.to(tl.int64) * v_sd, mask=inside, other=0).to(tl.float32)  # [R, DV_PAD]
    scale = _scale(_largest(v))
    tl.store(V_OUT + out_row[:, None] * DV + column, _levels(v, scale), mask=inside)
    tl.store(V_SCALE_OUT + out_row, scale, mask=there)


@triton.jit
def _largest(x):
    """The largest magnitude of each row of x [R, W]; NaN where there is one, as the row must not be read as numbers."""
    has_nan = tl.max((x != x).to(tl.int32), 1) > 0
    return tl.where(has_nan, float("nan"), tl.max(tl.abs(x), 1))


@triton.jit
def _scale(largest):
    """Of rows [R] whose largest magnitude is this."""
    return tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))


@triton.jit
def _levels(x, scale):
    """x [R, W] in int8, to the nearest level, of two the even one."""
    unit = tl.where(scale > 0, scale, 1.0)[:, None] + tl.zeros(x.shape, tl.float32)
    shift = 12582912.0  # 1.5 · 2^23: what is added to it has no digits behind the point
    return ((tl.div_rn(x, unit) + shift) - shift).to(tl.int8)

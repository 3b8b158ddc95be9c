"""2:4 pruning on the GPU: the two largest of each aligned group of four, in one pass over x.

A group lies in one thread's registers: six comparisons rank its entries, and where its two go in the code is known before.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...triton.rows import as_batch_head_row, block_of_rows, cdiv, next_power_of_2
from ..plain import empty_code

_ENTRIES = 4096  # per program


def prune_24(x: Tensor, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dense channel [..., M], values [..., (D - M) / 2] and their uint8 indices, as `plain.plain_prune_24` selects.

    Args:
        x: [..., D] float16, bfloat16 or float32 on CUDA, any strides, D <= 256.
        dense_dims: M; D - M a multiple of four.
    """
    sparse_dims = x.shape[-1] - dense_dims
    dense, values, indices = empty_code(x, sparse_dims // 2, dense_dims)
    if x.numel() == 0:
        return dense, values, indices
    rows = as_batch_head_row(x)  # [B, H, N, D]
    batch, heads, n, _ = rows.shape
    width = next_power_of_2(sparse_dims)
    block = _ENTRIES // width
    prune_24_kernel[(cdiv(n, block) * batch * heads,)](
        rows, dense, values, indices, *rows.stride(), heads, n,
        M=dense_dims, M_PAD=next_power_of_2(dense_dims), S=sparse_dims, S_PAD=width, R=block, num_warps=4,
    )  # fmt: skip
    return dense, values, indices


@triton.jit(do_not_specialize=["heads", "n"])
def prune_24_kernel(
    X, DENSE, VALUES, INDICES, x_sb, x_sh, x_sn, x_sd, heads, n,
    M: tl.constexpr, M_PAD: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    batch, head, batch_head, row, there = block_of_rows(heads, n, R)
    there = there[:, None]
    x_row = (X + batch * x_sb + head * x_sh + row * x_sn)[:, None]  # [R, 1]
    out_row = (batch_head * n + row)[:, None]  # [R, 1]
    if M > 0:
        column = tl.arange(0, M_PAD)[None, :]  # [1, M_PAD]
        dense = tl.load(x_row + column.to(tl.int64) * x_sd, mask=there & (column < M))  # [R, M_PAD]
        tl.store(DENSE + out_row * M + column, dense, mask=there & (column < M))
    column = tl.arange(0, S_PAD)[None, :]  # [1, S_PAD]
    x = tl.load(x_row + (M + column).to(tl.int64) * x_sd, mask=there & (column < S), other=0)  # [R, S_PAD]
    even, odd = tl.split(tl.reshape(x, (R, S_PAD // 4, 2, 2)))  # entries 0, 2 and 1, 3 of a group: [R, G, 2]
    x0, x2 = tl.split(even)  # [R, G]
    x1, x3 = tl.split(odd)
    m0, m1, m2, m3 = _magnitude(x0), _magnitude(x1), _magnitude(x2), _magnitude(x3)
    # How many entries of the group go before each; of equal ones the first does.
    b01, b02, b03 = (m0 >= m1).to(tl.int32), (m0 >= m2).to(tl.int32), (m0 >= m3).to(tl.int32)
    b12, b13, b23 = (m1 >= m2).to(tl.int32), (m1 >= m3).to(tl.int32), (m2 >= m3).to(tl.int32)
    keep0 = b01 + b02 + b03 >= 2
    keep1 = 1 - b01 + b12 + b13 >= 2
    keep2 = 2 - b02 - b12 + b23 >= 2
    keep3 = b03 + b13 + b23 < 2
    low = tl.where(keep0, x0, tl.where(keep1, x1, x2))
    high = tl.where(keep3, x3, tl.where(keep2, x2, x1))
    first = tl.where(keep0, 0, tl.where(keep1, 1, 2))
    second = tl.where(keep3, 3, tl.where(keep2, 2, 1))
    slot = tl.arange(0, S_PAD // 2)[None, :]  # [1, S_PAD / 2]
    inside = there & (slot < S // 2)
    values = tl.reshape(tl.join(low, high), (R, S_PAD // 2))
    in_group = tl.reshape(tl.join(first, second), (R, S_PAD // 2))
    tl.store(VALUES + out_row * (S // 2) + slot, values, mask=inside)
    tl.store(INDICES + out_row * (S // 2) + slot, (slot // 2 * 4 + in_group).to(tl.uint8), mask=inside)


@triton.jit
def _magnitude(x):
    """x as an integer that orders as |x| does, NaN above infinity."""
    if x.dtype.primitive_bitwidth == 16:
        return x.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    else:
        return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF

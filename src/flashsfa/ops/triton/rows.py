"""Rows of tensors [B, H, N, D] as a grid of blocks: which rows a program works on."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes 6 us per call on the host, as does its next power of two: a third of a launch."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n; 1 for n = 0."""
    return 1 << max(0, n - 1).bit_length()


def as_batch_head_row(x: Tensor) -> Tensor:
    """x [..., D] as a view [B, H, N, D] with N as long as strides allow; a copy only for more than 3 such dims."""
    sizes: list[int] = []
    strides: list[int] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == size * stride:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 3 or x.numel() == 0:
        return x.reshape(1, 1, -1, x.shape[-1])
    missing = 3 - len(sizes)
    return x.as_strided((*[1] * missing, *sizes, x.shape[-1]), (*[0] * missing, *strides, x.stride(-1)))


def in_units(x: Tensor, unit: int) -> bool:
    """Whether each row of x [..., D] is contiguous and made of whole units of `unit` entries, counted from the storage's start."""
    return x.stride(-1) == 1 and all(s % unit == 0 for s in (*x.stride()[:-1], x.storage_offset(), x.shape[-1]))


@triton.jit
def block_of_rows(heads, n, R: tl.constexpr):
    """Batch entry, head and their common index (int64), R rows (int64), and which of these are among the n there are.

    The grid is one-dimensional: cdiv(n, R) programs per head, head after head, batch entry after batch entry.
    """
    blocks = tl.cdiv(n, R)
    batch_head = tl.program_id(0) // blocks
    row = (tl.program_id(0) % blocks) * R + tl.arange(0, R)  # [R]
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    return batch, head, batch_head.to(tl.int64), row.to(tl.int64), row < n

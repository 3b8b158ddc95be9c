"""How a cache reaches numba's kernels: where its parts lie.

A part is handed over by its address: to make an array of it takes the host some microseconds, and a call has ten of them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .machine import jit, numba

# numba knows no bfloat16 and no float16: it sees the bits
_BITS = {
    torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.uint16, torch.uint8: np.uint8, torch.int8: np.int8
}  # fmt: skip
NO_PART = (0, 0, 0, 0)  # where a part lies that is not there


def where(x: Tensor | None, held: list[Tensor]) -> tuple[int, ...]:
    """The address of a part [B, Hkv, n] or [B, Hkv, n, W] of a cache, and its strides of B, Hkv and n in entries. What had to be
    copied, since its entries of a key are not adjacent, is put into `held`: keep this as long as the part is read."""
    if x is None:
        return NO_PART
    strides = x.stride()
    if len(strides) == 4 and strides[3] != 1:
        x = x.contiguous()
        held.append(x)
        strides = x.stride()
    return x.data_ptr(), strides[0], strides[1], strides[2]


def book(held: list[Tensor], *parts: Tensor | None) -> np.ndarray:
    """Where parts lie, [parts, 4], as `where` tells."""
    return np.array([where(x, held) for x in parts])


@functools.cache
def like(dtype: torch.dtype) -> np.ndarray:
    """An empty array of the dtype in which kernels see a part's bits."""
    return np.empty(0, _BITS[dtype])


# What follows exists in kernels only: numba shares nested tuples out over no threads, so each task makes them again.


class Part(NamedTuple):
    """A part of a cache."""

    like: np.ndarray
    where: np.ndarray  # [4]


def _entries_code(typing: Any, like: Any, address: Any) -> Any:
    """The memory from `address` on, as an array of the dtype of `like`. Its length says nothing."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        made = context.make_array(signature.return_type)(context, builder)
        size = context.get_constant(numba.types.intp, like.dtype.bitwidth // 8)
        numba.np.arrayobj.populate_array(
            made,
            data=builder.inttoptr(arguments[1], made.data.type),
            shape=[context.get_constant(numba.types.intp, 1 << 48)],
            strides=[size],
            itemsize=size,
            meminfo=None,
        )
        return made._getvalue()

    return like(like, numba.types.int64), generate


_entries: Any = numba.extending.intrinsic(_entries_code) if numba else None


@jit()
def is_there(part):
    """Whether a cache has this part."""
    return part.where[0] != 0


@jit()
def entries(part):
    """The bits of a part in one dimension, from its first entry on."""
    return _entries(part.like, part.where[0])


@jit()
def place(part, b, h, key):
    """Where the entries of a key lie in `entries`. Unsigned, as numba checks an index that may be negative."""
    return np.uint64(b * part.where[1] + h * part.where[2] + key * part.where[3])

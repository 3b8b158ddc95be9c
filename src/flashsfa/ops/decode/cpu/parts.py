"""How a cache reaches numba's kernels: where its parts lie, and which of its tokens a query sees.

A part is handed over by its address: to make an array of it takes the host some microseconds, and a call has ten of them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .machine import jit, numba

# numba knows no bfloat16: it sees the bits
_BITS = {
    torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.uint8: np.uint8, torch.int8: np.int8
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


@functools.cache
def like(dtype: torch.dtype) -> np.ndarray:
    """An empty array of the dtype in which kernels see a part's bits."""
    return np.empty(0, _BITS[dtype])


# What follows exists in kernels only: numba shares nested tuples out over no threads, so each task makes them again.


class Part(NamedTuple):
    """A part of a cache."""

    like: np.ndarray
    where: np.ndarray  # [4]


class Features(NamedTuple):
    """Keys as features, in the dtype of the queries or in 8 bits with a scale: `codes.FeatureCodes`."""

    values: Part
    indices: Part
    dense: Part
    scale: Part
    topk: int
    dense_dims: int


class Levels(NamedTuple):
    """Keys in levels of `level_bytes`, with the sparse entries of a code beside them.

    The level l of a feature lies at bit `shift` of byte `byte`, all [1 or Hkv, C], and is read as
    (middle + (l - its middle level) * step) * scale + centre, with scale and centre of the key where it has them; in 8 bits
    `is_signed` says that l is.
    Sparse entries are int8 or levels around 7.5, times `value_scale`; their places are told by `form`.
    """

    rows: Part
    level_bytes: int
    byte: np.ndarray
    shift: np.ndarray
    bits: np.ndarray
    step: np.ndarray
    middle: np.ndarray
    is_signed: bool
    scale: Part
    centre: Part
    values: Part
    value_bits: int
    indices: Part
    index_bytes: int
    form: int
    index_bits: int
    topk: int
    dense_dims: int
    value_scale: Part


class Exact(NamedTuple):
    """Tokens that are held as they came."""

    k: Part
    v: Part


class Seen(NamedTuple):
    """Of all tokens each query sees `first` to `last`, both [B, M], but for the padding [B, N]; N may be 0. The `n` tokens after the
    first `n_first` are coded, for each of `kv_heads`."""

    first: np.ndarray
    last: np.ndarray
    padding: np.ndarray
    kv_heads: int
    n_first: int
    n: int


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

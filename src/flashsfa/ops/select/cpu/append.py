"""Tokens appended to a cache on the CPU by one call of a kernel: what can be known before is prepared once."""

from __future__ import annotations

import torch
from torch import Tensor

from ....extras import install_hint
from ...cpu import threads
from ...cpu.parts import book, like
from ..hopper.append import Buffers, Ring, require_fit, require_room
from ..hopper.compiler import Form
from . import kernel

_MOST_ROWS = 128  # of all heads: for more PyTorch's operations are as fast


class Append:
    """Writes tokens of one form (shape, strides and dtype of keys and values) to buffers that lie where they lay."""

    def __init__(self, k: Tensor, v: Tensor, form: Form, x: Buffers) -> None:
        recent = x.recent_k
        self._at = book([], k, v, recent, x.recent_v, x.dense, x.values, x.indices, x.scale, x.v, x.v_scale)
        self._dtypes, self._likes = (k.dtype, x.v.dtype), (like(k.dtype), like(x.v.dtype))
        self._shape = (*k.shape[:3], form.kept, form.dense_dims, k.shape[3], v.shape[3])
        self._tokens, self._room = k.shape[2], (x.v.shape[2], 0 if recent is None else recent.shape[2])

    def __call__(self, k: Tensor, v: Tensor, start: int, ring: Ring | None = None) -> None:
        """As the one for Hopper."""
        leaving, oldest, newest = require_room(self._tokens, start, ring, *self._room)
        self._at[0, 0], self._at[1, 0] = k.data_ptr(), v.data_ptr()
        kernel.append(self._dtypes, *self._likes, self._at, *self._shape, leaving, start, oldest, newest)


def prepare(k: Tensor, v: Tensor, form: Form, buffers: Buffers) -> Append | str | None:
    """What appends tokens such as k [B, H, N, D] and v [B, H, N, Dv] to buffers of a cache on the CPU; None for those that the kernel is not
    for, and in words why it cannot be had.

    Raises `ValueError` for buffers that do not fit k, v and the form.
    """
    if not _takes(k, v, form):
        return None
    if not threads.is_available():
        return f"the fused CPU code needs numba: {install_hint('cpu')}"
    require_fit(k, v, form, buffers, is_paged=False)
    return Append(k, v, form, buffers)


def _takes(k: Tensor, v: Tensor, form: Form) -> bool:
    """Whether the kernel is for tokens like these: few, with adjacent entries, of keys that are kept as features, and of a dtype that it can
    round to 8 bits where that is asked."""
    dtypes = (torch.float32, torch.bfloat16) if form.shares_scale else (torch.float32, torch.bfloat16, torch.float16)
    return (
        form.is_of_features
        and k.dtype in dtypes
        and k.stride(3) == v.stride(3) == 1
        and 0 < k.shape[0] * k.shape[1] * k.shape[2] <= _MOST_ROWS
    )

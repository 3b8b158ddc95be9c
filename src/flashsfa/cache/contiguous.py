"""`SparseKVCache`: the key codes and values of the tokens seen so far, in preallocated buffers.

A key costs 2·M + 3·K bytes in 16-bit dtypes (M dense dims, K kept features) instead of 2·D; values stay dense. In 8 bits
a key costs M + 2·K + 4 bytes and a value Dv + 4, the 4 being a float32 scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..budget import require_budget
from ..checks import (
    require,
    require_alike,
    require_int,
    require_keys_and_values,
    require_no_gradient,
)
from ..codes import FeatureCodes, quantize_rows, topk_codes
from ..contexts import lasting_tensors
from ..ops.select.operators import append, append_op, has_fused
from ..stored import KVView

_GROWTH_TOKENS = 256


class SparseKVCache:
    """Codes and values of up to `capacity` tokens; grows by a quarter (at least 256 tokens) when full.

    A call that raises, for whatever reason, leaves the cache as it was. What `torch.inference_mode()` filled can be continued
    outside of it.

    Args:
        topk, dense_dims: the key code, as in `topk_codes`.
        capacity: tokens to allocate on the first `append`, which also fixes batch, heads, widths, dtype and device.
        dtype: torch.int8 to keep codes and values in 8 bits with a scale a row; None to keep them as they come.
    """

    def __init__(
        self,
        topk: int,
        *,
        dense_dims: int = 0,
        capacity: int = _GROWTH_TOKENS,
        dtype: torch.dtype | None = None,
    ) -> None:
        require_int("topk", topk, 1, 256)
        require_int("dense_dims", dense_dims, 0, 255)
        require_int("capacity", capacity, 1)
        require(dtype in (None, torch.int8), f"dtype must be torch.int8 or None, got {dtype}")
        self.dtype, self.topk, self.dense_dims = dtype, topk, dense_dims
        self._first_capacity = capacity
        self._length = 0
        self._held: _Held | None = None

    def __len__(self) -> int:
        """Tokens held."""
        return self._length

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return self._first_capacity if self._held is None else self._held.kv.v.shape[2]

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The dtype that keys and values come in; None before the first."""
        return None if self._held is None else self._held.input_dtype

    @property
    def kv(self) -> KVView:
        """Codes, values and scales of the held tokens, [B, Hkv, N, ...]: views of the buffers."""
        return self._view(self._buffers(), 0, self._length)

    @property
    def codes(self) -> FeatureCodes:
        """Codes of the held keys, [B, Hkv, N, ...]: a view of the buffers."""
        return self.kv.codes

    @property
    def v(self) -> Tensor:
        """[B, Hkv, N, Dv] held values: a view of the buffer."""
        return self.kv.v

    @property
    def v_scale(self) -> Tensor | None:
        """[B, Hkv, N] float32 scales of `v`, None unless the cache keeps 8 bits."""
        return None if self._held is None else self.kv.v_scale

    @property
    def nbytes(self) -> int:
        """Bytes of the held tokens: codes, values and scales."""
        return 0 if self._held is None else sum(x.nbytes for x in self.kv.tensors())

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of the buffers."""
        return 0 if self._held is None else sum(x.nbytes for x in self._held.kv.tensors())

    def append(self, k: Tensor, v: Tensor) -> KVView:
        """Code the keys k [B, Hkv, N, D], store them with v [B, Hkv, N, Dv], and return all that is held: what
        `sparse_feature_decode` takes.

        Raises `TypeError` or `ValueError` if k and v do not fit each other or the cache, or ask for a gradient.
        """
        require_keys_and_values(k, v)
        require_no_gradient(k, v)
        require_budget(self.topk, k.shape[-1], self.dense_dims)
        require(v.shape[-1] >= 1, "v must have at least one feature")
        start, end = self._length, self._length + k.shape[2]
        held = self._held
        if held is None:
            held = self._allocate(max(self._first_capacity, end), k, v)
        else:
            for name, new, old in (("k", k, held.kv.codes.shape), ("v", v, held.kv.v.shape)):
                if new.shape[:2] != old[:2] or new.shape[-1] != old[-1]:
                    raise ValueError(
                        f"{name} {tuple(new.shape)} does not fit a cache of [B, Hkv, D] = {[*old[:2], old[-1]]}"
                    )
            _require_like(held, k)
            if end > self.capacity:
                more = max(_GROWTH_TOKENS, self.capacity // 4)
                held = held.moved(0, self._length, max(end, self.capacity + more))
        self._write(held.kv, k, v, start)
        seen = self._view(held, 0, end)
        self._held, self._length = held, end
        return seen

    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Allocate `capacity` zeroed tokens for the codes of keys such as k [B, Hkv, any, D] and values such as v, and
        hold them all: a cache of fixed size and address, filled by `append_at` and `write_at`."""
        require(self.dtype is None, "a cache of fixed size keeps codes and values as they come: leave dtype None")
        require_alike(k=k, v=v)
        require_budget(self.topk, k.shape[-1], self.dense_dims)
        held = self._allocate(self.capacity, k, v)
        for buffer in held.kv.tensors():
            buffer.zero_()
        self._held, self._length = held, held.kv.v.shape[2]

    def append_at(self, k: Tensor, v: Tensor, start: Tensor) -> KVView:
        """Code the keys k [B, Hkv, N, D] and store them with v [B, Hkv, N, Dv] from token `start` ([] int64, on the
        device) of an allocated cache on, in place, in one launch on a GPU and without a host sync; return all that is held.
        Whether they fit is the caller's to know."""
        kv = self._buffers().kv
        self._check_width(k.shape[-1], v)
        require_no_gradient(k, v)
        require_alike(cache=kv.v, k=k, v=v)
        append_op(k.detach(), v.detach(), kv.codes.dense, kv.codes.values, kv.codes.indices, kv.v, start)
        return self.kv

    def write_at(self, codes: FeatureCodes, v: Tensor, slots: Tensor) -> KVView:
        """Overwrite the tokens `slots` [N] (int64, on the device) of an allocated cache with codes and v
        [B, Hkv, N, ...], in place and without a host sync; return all that is held."""
        kv = self._buffers().kv
        self._check_width(codes.head_dim, v)
        require(
            (codes.dense_dims, codes.topk) == (self.dense_dims, self.topk),
            lambda: (
                f"codes of topk={codes.topk}, dense_dims={codes.dense_dims} do not fit a cache of topk={self.topk}, "
                f"dense_dims={self.dense_dims}"
            ),
        )
        require_alike(cache=kv.v, codes=codes.values, v=v)
        for buffer, new in zip(kv.tensors(), KVView(codes, v).tensors(), strict=True):
            buffer.index_copy_(2, slots, new.detach())
        return self.kv

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens; a negative `length` forgets that many from the end."""
        require_int("length", length)
        kept = self._length + length if length < 0 else length
        require(kept >= 0, lambda: f"cannot crop {self._length} tokens to {kept}")
        self._length = min(kept, self._length)

    def keep_last(self, length: int, capacity: int) -> None:
        """Forget all but the last `length` tokens and move them to buffers of `capacity` tokens."""
        require(0 <= length <= capacity, f"{length} tokens do not fit a capacity of {capacity}")
        first = max(0, self._length - length)
        self._held, self._length = self._buffers().moved(first, self._length, capacity), self._length - first

    def to(self, device: torch.device | str) -> None:
        """Move the buffers to `device`; further tokens must come from there."""
        if self._held is not None:
            self._held = self._held.map(lambda x: x.to(device))

    def select_batch(self, index: Tensor) -> None:
        """Keep the batch rows `index` [B'] (int64), in that order, repeats allowed: beam search, batch filters."""
        if self._held is not None:
            index = index.to(self._held.kv.v.device)
            self._held = self._held.map(lambda x: x[index])

    @staticmethod
    def _view(held: _Held, first: int, end: int) -> KVView:
        return held.kv.map(lambda x: x[:, :, first:end])

    def _write(self, kv: KVView, k: Tensor, v: Tensor, start: int) -> None:
        """Code k and write it with v at token `start`, where nothing is held yet."""
        if self.dtype is None and has_fused(k):
            append(k, v, kv.codes.dense, kv.codes.values, kv.codes.indices, kv.v, start)
            return
        fresh, v_scale = topk_codes(k, self.topk, dense_dims=self.dense_dims), None
        if self.dtype is not None:
            fresh = fresh.quantize()
            v, v_scale = quantize_rows(v)
        for buffer, new in zip(kv.tensors(), KVView(fresh, v, v_scale).tensors(), strict=True):
            buffer[:, :, start : start + new.shape[2]] = new

    def _check_width(self, head_dim: int, v: Tensor) -> None:
        kv = self._buffers().kv
        require(
            head_dim == kv.codes.head_dim and v.shape[-1] == kv.v.shape[-1],
            lambda: (
                f"keys of head_dim {head_dim} and v {tuple(v.shape)} do not fit a cache of {kv.codes.head_dim} and "
                f"{tuple(kv.v.shape)}"
            ),
        )

    def _buffers(self) -> _Held:
        if self._held is None:
            raise RuntimeError("the cache is empty: append keys and values first")
        return self._held

    def _allocate(self, capacity: int, k: Tensor, v: Tensor) -> _Held:
        """New buffers of `capacity` tokens for keys such as k and values such as v."""
        rows, device = (*k.shape[:2], capacity), k.device
        kept = k.dtype if self.dtype is None else self.dtype
        scale = v_scale = None
        with lasting_tensors():
            if self.dtype is not None:
                scale, v_scale = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
            codes = FeatureCodes(
                torch.empty((*rows, self.dense_dims), dtype=kept, device=device),
                torch.empty((*rows, self.topk), dtype=kept, device=device),
                torch.empty((*rows, self.topk), dtype=torch.uint8, device=device),
                k.shape[-1],
                scale,
            )
            values = torch.empty((*rows, v.shape[-1]), dtype=kept, device=device)
            return _Held(KVView(codes, values, v_scale), k.dtype)


@dataclass(frozen=True)
class _Held:
    """Buffers of `capacity` tokens, and the dtype that keys and values come in."""

    kv: KVView
    input_dtype: torch.dtype

    def map(self, change: Callable[[Tensor], Tensor]) -> _Held:
        with lasting_tensors():
            return replace(self, kv=self.kv.map(change))

    def moved(self, first: int, end: int, capacity: int) -> _Held:
        """New buffers of `capacity` tokens that begin with the tokens `first` to `end` of these."""

        def move(x: Tensor) -> Tensor:
            new = torch.empty((*x.shape[:2], capacity, *x.shape[3:]), dtype=x.dtype, device=x.device)
            new[:, :, : end - first] = x[:, :, first:end]
            return new

        return self.map(move)


def _require_like(held: _Held, k: Tensor) -> None:
    """k comes in the dtype and from the device of what is held."""
    if k.dtype != held.input_dtype:
        raise TypeError(f"k is {k.dtype} but the cache holds {held.input_dtype}; cast them to one dtype")
    require(
        k.device == held.kv.v.device,
        lambda: f"k is on {k.device} but the cache is on {held.kv.v.device}; move them together",
    )

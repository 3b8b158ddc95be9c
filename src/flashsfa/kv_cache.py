"""`SparseKVCache`: the key codes and values of the tokens seen so far, in preallocated buffers.

A key costs 2·M + 3·K bytes in 16-bit dtypes (M dense dims, K kept features) instead of 2·D; values stay dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import require, require_alike, require_budget, require_float
from .codes import FeatureCodes, topk_codes

_GROWTH_TOKENS = 256


class SparseKVCache:
    """Codes and values of up to `capacity` tokens; grows by a quarter (at least 256 tokens) when full.

    Args:
        topk, dense_dims: the key code, as in `topk_codes`.
        capacity: tokens to allocate on the first `append`, which also fixes batch, heads, widths, dtype and device.
    """

    def __init__(self, topk: int, *, dense_dims: int = 0, capacity: int = _GROWTH_TOKENS) -> None:
        require(capacity >= 1, f"capacity must be at least 1 token, got {capacity}")
        self.topk = topk
        self.dense_dims = dense_dims
        self._capacity = capacity
        self._length = 0
        self._codes: FeatureCodes | None = None  # buffers [B, Hkv, capacity, ...]
        self._v: Tensor | None = None  # [B, Hkv, capacity, Dv]

    def __len__(self) -> int:
        """Tokens held."""
        return self._length

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return self._capacity

    @property
    def codes(self) -> FeatureCodes:
        """Codes of the held keys, [B, Hkv, N, ...]: a view of the buffers."""
        codes, _ = self._buffers()
        return codes[:, :, : self._length]

    @property
    def v(self) -> Tensor:
        """[B, Hkv, N, Dv] held values: a view of the buffer."""
        _, v = self._buffers()
        return v[:, :, : self._length]

    @property
    def nbytes(self) -> int:
        """Bytes of the held tokens: codes and values."""
        return 0 if self._v is None else self.codes.nbytes + self.v.nbytes

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of the buffers."""
        if self._codes is None or self._v is None:
            return 0
        return self._codes.nbytes + self._v.nbytes

    def append(self, k: Tensor, v: Tensor) -> tuple[FeatureCodes, Tensor]:
        """Code the keys k [B, Hkv, N, D], store them with v [B, Hkv, N, Dv], return all held codes and values.

        Raises `TypeError` or `ValueError`, and stores nothing, if k and v do not fit each other or the cache.
        """
        for name, x in (("k", k), ("v", v)):
            require_float(name, x)
            require(x.ndim == 4, f"{name} must be [B, Hkv, N, D], got shape {tuple(x.shape)}")
        require_alike(k=k, v=v)
        require(
            k.shape[:3] == v.shape[:3],
            f"k and v must share [B, Hkv, N], got {tuple(k.shape)} and {tuple(v.shape)}",
        )
        require_budget(self.topk, k.shape[-1], self.dense_dims)
        if self._codes is None or self._v is None:
            self._capacity = max(self._capacity, k.shape[2])
            self._codes, self._v = self._allocate(k, v)
        stored, stored_v = self._codes, self._v
        for name, new, old in (("k", k, stored.shape), ("v", v, stored_v.shape)):
            require(
                new.shape[:2] == old[:2] and new.shape[-1] == old[-1],
                f"{name} {tuple(new.shape)} does not fit a cache of [B, Hkv, D] = {[*old[:2], old[-1]]}",
            )
        require_alike(cache=stored_v, k=k)
        start, end = self._length, self._length + k.shape[2]
        if end > self._capacity:
            stored, stored_v = self._grow(end)
        fresh = topk_codes(k.detach(), self.topk, dense_dims=self.dense_dims)
        for buffer, new in _parts(stored, fresh):
            buffer[:, :, start:end] = new
        stored_v[:, :, start:end] = v.detach()
        self._length = end
        return self.codes, self.v

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens; a negative `length` forgets that many from the end."""
        length = self._length + length if length < 0 else length
        require(length >= 0, f"cannot crop {self._length} tokens to {length}")
        self._length = min(length, self._length)

    def select_batch(self, index: Tensor) -> None:
        """Keep the batch rows `index` [B'] (int64), in that order, repeats allowed: beam search, batch filters."""
        if self._codes is None or self._v is None:
            return
        index = index.to(self._v.device)
        codes = self._codes
        self._codes = FeatureCodes(codes.dense[index], codes.values[index], codes.indices[index], codes.head_dim)
        self._v = self._v[index]

    def _buffers(self) -> tuple[FeatureCodes, Tensor]:
        if self._codes is None or self._v is None:
            raise RuntimeError("the cache is empty: append keys and values first")
        return self._codes, self._v

    def _allocate(self, k: Tensor, v: Tensor) -> tuple[FeatureCodes, Tensor]:
        rows = (*k.shape[:2], self._capacity)
        return (
            FeatureCodes(
                k.new_empty((*rows, self.dense_dims)),
                k.new_empty((*rows, self.topk)),
                k.new_empty((*rows, self.topk), dtype=torch.uint8),
                k.shape[-1],
            ),
            v.new_empty((*rows, v.shape[-1])),
        )

    def _grow(self, needed: int) -> tuple[FeatureCodes, Tensor]:
        old_codes, old_v = self.codes, self.v
        self._capacity = max(needed, self._capacity + max(_GROWTH_TOKENS, self._capacity // 4))
        rows = old_v.shape[0], old_v.shape[1], 0
        like_k = old_codes.values.new_empty((*rows, old_codes.head_dim))
        self._codes, self._v = codes, v = self._allocate(like_k, old_v)
        for buffer, old in (*_parts(codes, old_codes), (v, old_v)):
            buffer[:, :, : self._length] = old
        return codes, v


def _parts(a: FeatureCodes, b: FeatureCodes) -> tuple[tuple[Tensor, Tensor], ...]:
    return (a.dense, b.dense), (a.values, b.values), (a.indices, b.indices)

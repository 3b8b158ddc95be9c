"""`SparseKVCache`: the key codes and values of the tokens seen so far, in preallocated buffers.

A key costs 2·M + 3·K bytes in 16-bit dtypes (M dense dims, K kept features) instead of 2·D; values stay dense. In 8 bits
a key costs M + 2·K + 4 bytes and a value Dv + 4, the 4 being a float32 scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import require, require_alike, require_budget, require_keys_and_values
from .codes import FeatureCodes, quantize_rows, topk_codes
from .kernels.topk import append_codes, append_codes_op, has_fused

_GROWTH_TOKENS = 256


class SparseKVCache:
    """Codes and values of up to `capacity` tokens; grows by a quarter (at least 256 tokens) when full.

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
        require(capacity >= 1, f"capacity must be at least 1 token, got {capacity}")
        require(
            dtype in (None, torch.int8),
            f"dtype must be torch.int8 or None, got {dtype}",
        )
        self.dtype = dtype
        self.topk = topk
        self.dense_dims = dense_dims
        self._capacity = capacity
        self._length = 0
        self._codes: FeatureCodes | None = None  # buffers [B, Hkv, capacity, ...]
        self._v: Tensor | None = None  # [B, Hkv, capacity, Dv]
        self._v_scale: Tensor | None = None  # [B, Hkv, capacity] in 8 bits
        self._like = torch.empty(0)  # of the dtype and device that come in

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
    def v_scale(self) -> Tensor | None:
        """[B, Hkv, N] float32 scales of `v`, None unless the cache keeps 8 bits."""
        return None if self._v_scale is None else self._v_scale[:, :, : self._length]

    @property
    def nbytes(self) -> int:
        """Bytes of the held tokens: codes, values and scales."""
        scales = 0 if self.v_scale is None else self.v_scale.nbytes
        return 0 if self._v is None else self.codes.nbytes + self.v.nbytes + scales

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of the buffers."""
        if self._codes is None or self._v is None:
            return 0
        return self._codes.nbytes + self._v.nbytes + (0 if self._v_scale is None else self._v_scale.nbytes)

    def append(self, k: Tensor, v: Tensor) -> tuple[FeatureCodes, Tensor]:
        """Code the keys k [B, Hkv, N, D], store them with v [B, Hkv, N, Dv], return all held codes and values
        (with `v_scale` in 8 bits).

        Raises `TypeError` or `ValueError`, and stores nothing, if k and v do not fit each other or the cache.
        """
        require_keys_and_values(k, v)
        require_budget(self.topk, k.shape[-1], self.dense_dims)
        require(v.shape[-1] >= 1, "v must have at least one feature")
        if self._codes is None or self._v is None:
            self._like = k.new_empty(0)
            self._reallocate(max(self._capacity, k.shape[2]), k.shape, v.shape[-1])
        stored, stored_v = self._buffers()
        for name, new, old in (("k", k, stored.shape), ("v", v, stored_v.shape)):
            if new.shape[:2] != old[:2] or new.shape[-1] != old[-1]:
                raise ValueError(
                    f"{name} {tuple(new.shape)} does not fit a cache of [B, Hkv, D] = {[*old[:2], old[-1]]}"
                )
        require_alike(cache=self._like, k=k)
        start, end = self._length, self._length + k.shape[2]
        if end > self._capacity:
            self._grow(end)
        self._write(k.detach(), v.detach(), start)
        self._length = end
        return self.codes, self.v

    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Allocate `capacity` zeroed tokens for the codes of keys such as k [B, Hkv, any, D] and values such as v, and
        hold them all: a cache of fixed size and address, filled by `append_at` and `write_at`."""
        require(self.dtype is None, "a cache of fixed size keeps codes and values as they come: leave dtype None")
        require_alike(k=k, v=v)
        require_budget(self.topk, k.shape[-1], self.dense_dims)
        self._like = k.new_empty(0)
        self._reallocate(self._capacity, k.shape, v.shape[-1])
        for buffer in self._parts():
            buffer.zero_()
        self._length = self._capacity

    def append_at(self, k: Tensor, v: Tensor, start: Tensor) -> tuple[FeatureCodes, Tensor]:
        """Code the keys k [B, Hkv, N, D] and store them with v [B, Hkv, N, Dv] from token `start` ([] int64, on the
        device) of an allocated cache on, in place, in one launch on a GPU and without a host sync; return all held codes
        and values. Whether they fit is the caller's to know."""
        held, held_v = self._buffers()
        self._check_width(k.shape[-1], v)
        require_alike(cache=held_v, k=k, v=v)
        append_codes_op(k.detach(), v.detach(), held.dense, held.values, held.indices, held_v, start)
        return self.codes, self.v

    def write_at(self, codes: FeatureCodes, v: Tensor, slots: Tensor) -> tuple[FeatureCodes, Tensor]:
        """Overwrite the tokens `slots` [N] (int64, on the device) of an allocated cache with codes and v
        [B, Hkv, N, ...], in place and without a host sync; return all held codes and values."""
        held, held_v = self._buffers()
        self._check_width(codes.head_dim, v)
        require(
            (codes.dense_dims, codes.topk) == (held.dense_dims, held.topk),
            lambda: (
                f"codes of topk={codes.topk}, dense_dims={codes.dense_dims} do not fit a cache of topk={held.topk}, "
                f"dense_dims={held.dense_dims}"
            ),
        )
        require_alike(cache=held_v, codes=codes.values, v=v)
        for buffer, new in zip(self._parts(), _parts(codes, v, None), strict=True):
            buffer.index_copy_(2, slots, new.detach())
        return self.codes, self.v

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens; a negative `length` forgets that many from the end."""
        length = self._length + length if length < 0 else length
        require(length >= 0, f"cannot crop {self._length} tokens to {length}")
        self._length = min(length, self._length)

    def keep_last(self, length: int, capacity: int) -> None:
        """Forget all but the last `length` tokens and move them to buffers of `capacity` tokens."""
        require(0 <= length <= capacity, f"{length} tokens do not fit a capacity of {capacity}")
        kept = [x[:, :, max(0, self._length - length) : self._length] for x in self._parts()]
        self._reallocate(capacity, self.codes.shape, self.v.shape[-1])
        self._length = min(length, self._length)
        for buffer, before in zip(self._parts(), kept, strict=True):
            buffer[:, :, : self._length] = before

    def to(self, device: torch.device | str) -> None:
        """Move the buffers to `device`; further tokens must come from there."""
        if self._codes is None or self._v is None:
            return
        self._codes, self._v = self._codes.to(device), self._v.to(device)
        self._v_scale = None if self._v_scale is None else self._v_scale.to(device)
        self._like = self._like.to(device)

    def select_batch(self, index: Tensor) -> None:
        """Keep the batch rows `index` [B'] (int64), in that order, repeats allowed: beam search, batch filters."""
        if self._codes is None or self._v is None:
            return
        index = index.to(self._v.device)
        self._codes, self._v = self._codes[index], self._v[index]
        self._v_scale = None if self._v_scale is None else self._v_scale[index]

    def _write(self, k: Tensor, v: Tensor, start: int) -> None:
        """Code k and store it with v at token `start`."""
        codes, v_buffer = self._buffers()
        if self.dtype is None and has_fused(k):
            append_codes(k, v, codes, v_buffer, start)
            return
        fresh, v_scale = topk_codes(k, self.topk, dense_dims=self.dense_dims), None
        if self.dtype is not None:
            fresh = fresh.quantize()
            v, v_scale = quantize_rows(v)
        for buffer, new in zip(self._parts(), _parts(fresh, v, v_scale), strict=True):
            buffer[:, :, start : start + new.shape[2]] = new

    def _check_width(self, head_dim: int, v: Tensor) -> None:
        held, held_v = self._buffers()
        require(
            head_dim == held.head_dim and v.shape[-1] == held_v.shape[-1],
            lambda: (
                f"keys of head_dim {head_dim} and v {tuple(v.shape)} do not fit a cache of {held.head_dim} and "
                f"{tuple(held_v.shape)}"
            ),
        )

    def _buffers(self) -> tuple[FeatureCodes, Tensor]:
        if self._codes is None or self._v is None:
            raise RuntimeError("the cache is empty: append keys and values first")
        return self._codes, self._v

    def _reallocate(self, capacity: int, k_shape: torch.Size, v_dim: int) -> None:
        """New buffers of `capacity` tokens; nothing changes where memory does not suffice."""
        rows, device = (*k_shape[:2], capacity), self._like.device
        kept = self._like.dtype if self.dtype is None else self.dtype
        scale = v_scale = None
        if self.dtype is not None:
            scale, v_scale = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
        codes = FeatureCodes(
            torch.empty((*rows, self.dense_dims), dtype=kept, device=device),
            torch.empty((*rows, self.topk), dtype=kept, device=device),
            torch.empty((*rows, self.topk), dtype=torch.uint8, device=device),
            k_shape[-1],
            scale,
        )
        v = torch.empty((*rows, v_dim), dtype=kept, device=device)
        self._codes, self._v, self._v_scale, self._capacity = codes, v, v_scale, capacity

    def _grow(self, needed: int) -> None:
        old = self._parts()
        capacity = max(needed, self._capacity + max(_GROWTH_TOKENS, self._capacity // 4))
        self._reallocate(capacity, self.codes.shape, self.v.shape[-1])
        for buffer, before in zip(self._parts(), old, strict=True):
            buffer[:, :, : self._length] = before[:, :, : self._length]

    def _parts(self) -> list[Tensor]:
        codes, v = self._buffers()
        return _parts(codes, v, self._v_scale)


def _parts(codes: FeatureCodes, v: Tensor, v_scale: Tensor | None) -> list[Tensor]:
    """The tensors of codes and values, scales where there are any."""
    parts = (codes.dense, codes.values, codes.indices, codes.scale, v, v_scale)
    return [x for x in parts if x is not None]

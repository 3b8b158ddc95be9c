"""`Coder`: how a cache keeps the tokens that it does not keep as they come."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .axes import AxisBits, AxisCodes
from .budget import require_budget
from .checks import has_values, require, require_int
from .codes import FeatureCodes, quantize_rows, topk_codes
from .contexts import lasting_tensors
from .formats import CodeFormat
from .narrow import NarrowCodes, NarrowRows
from .stored import ExactKV, KeyCodes, KVView


@dataclass(frozen=True)
class Coder:
    """The key code of a cache, and in how many bits it keeps codes and values.

    Attributes:
        topk, dense_dims: the key code, as in `topk_codes`. With topk = head_dim every feature is kept.
        bits: torch.int8 for codes and values in 8 bits with a float32 scale a row, a `CodeFormat` for its widths, None for codes
            and values as they come. In a `CodeFormat` keys of which every feature is kept are rows without indices, of its
            `value_bits`.
        axes: in place of topk (None then) and of the widths of keys: how many bits each axis of the keys has. Their calibration is
            that of a `FeatureBasis`, in whose coordinates the keys come.
    """

    topk: int | None
    dense_dims: int = 0
    bits: torch.dtype | CodeFormat | None = None
    axes: AxisBits | None = None

    def __post_init__(self) -> None:
        require(
            (self.topk is None) == (self.axes is not None),
            "keys are kept by topk or in axes, and one of them must be given",
        )
        if self.topk is not None:
            require_int("topk", self.topk, 1, 256)
        elif not isinstance(self.axes, AxisBits):
            raise TypeError(f"axes must be an AxisBits, such as basis.axes[layer], got {type(self.axes).__name__}")
        require_int("dense_dims", self.dense_dims, 0, 255)
        require(
            self.axes is None or (not self.dense_dims and self.axes.bits.ndim == 2),
            "axes are those of one layer, [H, D], and have no dense channel beside: leave dense_dims 0",
        )
        require(
            self.bits in (None, torch.int8) or isinstance(self.bits, CodeFormat),
            f"dtype must be torch.int8, a CodeFormat or None, got {self.bits}",
        )

    def arguments(self) -> dict[str, Any]:
        """What a cache takes for this code."""
        return {"topk": self.topk, "dense_dims": self.dense_dims, "axes": self.axes, "dtype": self.bits}

    def require_fit(self, k: Tensor, v: Tensor) -> None:
        """Raise `ValueError` for keys [B, Hkv, N, D] or values [B, Hkv, N, Dv] of a shape that cannot be kept so."""
        head_dim, v_dim = k.shape[-1], v.shape[-1]
        require(v_dim >= 1, "v must have at least one feature")
        if self.axes is not None:
            heads = tuple(self.axes.bits.shape)
            require(
                (k.shape[1], head_dim) == heads, lambda: f"k {tuple(k.shape)} does not fit axes [Hkv, D] = {[*heads]}"
            )
        else:
            assert self.topk is not None
            require_budget(self.topk, head_dim, self.dense_dims)
            if isinstance(self.bits, CodeFormat):
                self.bits.key_bytes(head_dim, self.dense_dims, self.topk)
        if isinstance(self.bits, CodeFormat):
            self.bits.require_v_dim(v_dim)

    def encode(self, k: Tensor, v: Tensor) -> KVView:
        """k [B, Hkv, N, D] and v [B, Hkv, N, Dv] as a cache keeps them."""
        codes: KeyCodes
        if self.axes is not None:
            codes = AxisCodes.encode(k, self.axes.to(k.device))
        elif isinstance(self.bits, CodeFormat) and self.topk == k.shape[-1]:
            codes = NarrowRows.encode(k, self.bits.value_bits)
        else:
            codes = self._features(k)
            if self.bits is not None:
                is_8_bit = self.bits == torch.int8
                codes = codes.quantize() if is_8_bit else NarrowCodes.encode(codes, self.bits)  # type: ignore[arg-type]
        if isinstance(self.bits, CodeFormat):
            return KVView(codes, NarrowRows.encode(v, self.bits.v_bits))
        return KVView(codes, v) if self.bits is None else KVView(codes, *quantize_rows(v))

    def rounded(self, k: Tensor, v: Tensor) -> ExactKV:
        """k and v as decode reads them from such a cache. Gradients reach the kept features, straight through the rounding."""
        thin_k = k if self.axes is not None else self._features(k).to_dense()
        if self.axes is None and self.bits is None:
            return ExactKV(thin_k, v)
        kept = self.encode(k.detach(), v.detach()).rows(torch.promote_types(torch.float32, k.dtype))
        return ExactKV(thin_k + (kept.k - thin_k.detach()), v + (kept.v - v.detach()))

    def empty(self, capacity: int, k: Tensor, v: Tensor) -> KVView:
        """Unfilled buffers of `capacity` tokens for keys such as k and values such as v."""
        form = (self, tuple(k.shape[:2]), k.shape[-1], v.shape[-1], k.dtype, v.dtype, k.device)
        none, *parts = _no_tokens(*form) if has_values(k) else _no_tokens.__wrapped__(*form)
        codes, values = ([x.new_empty((*x.shape[:2], capacity, *x.shape[3:])) for x in part] for part in parts)
        return none.of_views(codes, values)

    def _features(self, k: Tensor) -> FeatureCodes:
        assert self.topk is not None
        return topk_codes(k, self.topk, dense_dims=self.dense_dims)


@functools.lru_cache(maxsize=1024)  # each layer of each new cache asks
def _no_tokens(
    coder: Coder,
    heads: tuple[int, int],
    head_dim: int,
    v_dim: int,
    k_dtype: torch.dtype,
    v_dtype: torch.dtype,
    device: torch.device,
) -> tuple[KVView, list[Tensor], list[Tensor]]:
    """Codes and values of no tokens, and the tensors of both."""
    with lasting_tensors():
        k = torch.empty((*heads, 0, head_dim), dtype=k_dtype, device=device)
        none = coder.encode(k, torch.empty((*heads, 0, v_dim), dtype=v_dtype, device=device))
    return none, none.codes.tensors(), none.value_tensors()


class Coded:
    """What caches share: a `coder`, whose key code they show."""

    coder: Coder

    @property
    def topk(self) -> int | None:
        """Budget of the key code; None for keys in bits per axis."""
        return self.coder.topk

    @property
    def dense_dims(self) -> int:
        """Width of the dense channel of the key code."""
        return self.coder.dense_dims

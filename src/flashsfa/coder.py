"""`Coder`: how a cache keeps the tokens that it does not keep as they come."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .budget import require_budget
from .checks import require, require_int
from .codes import quantize_rows, topk_codes
from .formats import CodeFormat
from .narrow import NarrowCodes, NarrowRows
from .stored import ExactKV, KVView


@dataclass(frozen=True)
class Coder:
    """The key code of a cache, and in how many bits it keeps codes and values.

    Attributes:
        topk, dense_dims: the key code, as in `topk_codes`. With topk = head_dim every feature is kept.
        bits: torch.int8 for codes and values in 8 bits with a float32 scale a row, a `CodeFormat` for its widths, None for codes
            and values as they come. In a `CodeFormat` keys of which every feature is kept are rows without indices, of its
            `value_bits`.
    """

    topk: int
    dense_dims: int = 0
    bits: torch.dtype | CodeFormat | None = None

    def __post_init__(self) -> None:
        require_int("topk", self.topk, 1, 256)
        require_int("dense_dims", self.dense_dims, 0, 255)
        require(
            self.bits in (None, torch.int8) or isinstance(self.bits, CodeFormat),
            f"dtype must be torch.int8, a CodeFormat or None, got {self.bits}",
        )

    def require_fit(self, head_dim: int, v_dim: int) -> None:
        """Raise `ValueError` for keys or values of a width that cannot be kept so."""
        require_budget(self.topk, head_dim, self.dense_dims)
        require(v_dim >= 1, "v must have at least one feature")
        if isinstance(self.bits, CodeFormat):
            self.bits.require_v_dim(v_dim)
            self.bits.key_bytes(head_dim, self.dense_dims, self.topk)

    def encode(self, k: Tensor, v: Tensor) -> KVView:
        """k [B, Hkv, N, D] and v [B, Hkv, N, Dv] as a cache keeps them."""
        bits = self.bits
        if isinstance(bits, CodeFormat):
            values = NarrowRows.encode(v, bits.v_bits)
            if self.topk == k.shape[-1]:
                return KVView(NarrowRows.encode(k, bits.value_bits), values)
            return KVView(NarrowCodes.encode(topk_codes(k, self.topk, dense_dims=self.dense_dims), bits), values)
        codes = topk_codes(k, self.topk, dense_dims=self.dense_dims)
        return KVView(codes, v) if bits is None else KVView(codes.quantize(), *quantize_rows(v))

    def rounded(self, k: Tensor, v: Tensor) -> ExactKV:
        """k and v as decode reads them from such a cache. Gradients reach the kept features, straight through the rounding."""
        thin_k = topk_codes(k, self.topk, dense_dims=self.dense_dims).to_dense()
        if self.bits is None:
            return ExactKV(thin_k, v)
        kept = self.encode(k.detach(), v.detach()).rows(torch.promote_types(torch.float32, k.dtype))
        return ExactKV(thin_k + (kept.k - thin_k.detach()), v + (kept.v - v.detach()))

    def empty(self, capacity: int, k: Tensor, v: Tensor) -> KVView:
        """Unfilled buffers of `capacity` tokens for keys such as k and values such as v."""
        none = self.encode(k[:, :, :0].detach(), v[:, :, :0].detach())
        return none.map(lambda x: x.new_empty((*x.shape[:2], capacity, *x.shape[3:])))

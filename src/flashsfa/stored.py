"""`KVView`: what a cache holds, as decode reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .codes import FeatureCodes


@dataclass(frozen=True, eq=False)
class KVView:
    """Stored keys and values: what a cache's `append` returns and `sparse_feature_decode` takes. Unpacks as `codes, v`.

    Attributes:
        codes: key codes [B, Hkv, N, ...], or pools of pages [P, Hkv, page_size, ...].
        v: [B, Hkv, N, Dv] values, or a pool of pages.
        v_scale: [B, Hkv, N] float32 factor of each row of an int8 v, else None.
        kv_lens: [B] integer number of valid keys of each sequence; None for all N.
        page_table: [B, max_pages] int32 for pools of pages, else None: key j of sequence b is slot j % page_size of page
            `page_table[b, j // page_size]`.
    """

    codes: FeatureCodes
    v: Tensor
    v_scale: Tensor | None = None
    kv_lens: Tensor | None = None
    page_table: Tensor | None = None

    def __iter__(self) -> Iterator[FeatureCodes | Tensor]:
        return iter((self.codes, self.v))

    @property
    def n(self) -> int:
        """Keys that there is room for per sequence."""
        return self.v.shape[2] if self.page_table is None else self.page_table.shape[1] * self.v.shape[2]

    def tensors(self) -> list[Tensor]:
        """Codes, values and their scales."""
        parts = (self.codes.dense, self.codes.values, self.codes.indices, self.codes.scale, self.v, self.v_scale)
        return [x for x in parts if x is not None]

    def map(self, change: Callable[..., Tensor], *others: KVView) -> KVView:
        """The view with each tensor of codes, values and scales changed alike, together with its like of `others`."""
        v_scale = None if self.v_scale is None else change(self.v_scale, *(x.v_scale for x in others))
        codes = self.codes.map(change, *(x.codes for x in others))
        return KVView(codes, change(self.v, *(x.v for x in others)), v_scale, self.kv_lens, self.page_table)

    def contiguous_pages(self) -> KVView:
        """The pages gathered to [B, Hkv, max_pages * page_size, ...]; a view without pages as it is."""
        if self.page_table is None:
            return self
        pages = self.page_table.long().clamp(
            0, self.v.shape[0] - 1
        )  # entries past a sequence's length may hold anything

        def gather(pool: Tensor) -> Tensor:
            return pool[pages].transpose(1, 2).flatten(2, 3)  # [B, max_pages, Hkv, page_size, ...] before

        return replace(self.map(gather), page_table=None)

    def widened(self, dtype: torch.dtype) -> KVView:
        """8-bit codes and values in `dtype`, their scales taken in; others as they are."""
        codes = self.codes if self.codes.scale is None else self.codes.to(dtype)
        if self.v_scale is None:
            return replace(self, codes=codes)
        return replace(self, codes=codes, v=(self.v.float() * self.v_scale[..., None]).to(dtype), v_scale=None)

"""`PageLayout`: key codes and values in raw pages of bytes, as an inference server hands them out.

A server knows a page as `page_size` cells a kv head, of equally many bytes each. The cells of a head are one run of
bytes, and inside it each part of the tokens lies by itself:

    dense channel [page_size, M] | kept values [page_size, K] | V [page_size, Dv] | indices [page_size, K] uint8 | pad

so that every part is the strided tensor which `sparse_feature_decode(page_table=...)` reads in place, and its rows are
as dense as in a `PagedSparseKVCache`. A page of 16 or more tokens keeps all parts aligned to 16 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..budget import require_budget
from ..checks import FLOAT_DTYPES, require
from ..codes import FeatureCodes


@dataclass(frozen=True)
class PageLayout:
    """The bytes of one token and kv head.

    Attributes:
        head_dim, v_dim: widths D of keys and Dv of values.
        topk, dense_dims: the key code: K kept values with their indices, M dense dims.
        dtype: of dense channel, kept values and V.

    Raises `ValueError` for a budget that does not fit the head or a dtype that is not floating.
    """

    head_dim: int
    v_dim: int
    topk: int
    dense_dims: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        require_budget(self.topk, self.head_dim, self.dense_dims)
        require(self.v_dim >= 1, f"v_dim must be at least 1, got {self.v_dim}")
        require(self.dtype in FLOAT_DTYPES, f"pages hold codes in a floating dtype, got {self.dtype}")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token and kv head: (M + K + Dv) elements and K indices, rounded up to whole elements."""
        elements = self.dense_dims + self.topk + self.v_dim + -(-self.topk // self.dtype.itemsize)
        return elements * self.dtype.itemsize

    def views(self, pages: Tensor) -> tuple[FeatureCodes, Tensor]:
        """Codes [P, Hkv, page_size, ...] and V [P, Hkv, page_size, Dv] that share the memory of `pages`.

        Args:
            pages: [P, Hkv, page_size, C], any dtype, with C elements of `token_bytes` together. Pages and heads may
                lie anywhere; the tokens of one head and page must be contiguous.

        Raises `ValueError` for pages of another shape, order or alignment.
        """
        cells = self._bytes(pages)
        page_size = cells.shape[2]
        runs = cells.flatten(2)  # [P, Hkv, page_size * token_bytes]
        widths = {"dense": self.dense_dims, "values": self.topk, "v": self.v_dim}
        parts, start = {}, 0
        for name, width in widths.items():
            end = start + page_size * width * self.dtype.itemsize
            parts[name] = runs[..., start:end].view(self.dtype).unflatten(-1, (page_size, width))
            start = end
        indices = runs[..., start : start + page_size * self.topk].unflatten(-1, (page_size, self.topk))
        return FeatureCodes(parts["dense"], parts["values"], indices, self.head_dim), parts["v"]

    def write(self, pages: Tensor, slots: Tensor, codes: FeatureCodes, v: Tensor) -> None:
        """Store codes [T, Hkv, ...] and v [T, Hkv, Dv] at slots [T] (int64: page · page_size + place in the page), in
        place and without a host sync. Slots outside of the pages are an error that only the CPU reports."""
        for pool, new in zip(self._parts(pages), (codes.dense, codes.values, codes.indices, v), strict=True):
            pool[slots // pool.shape[2], :, slots % pool.shape[2]] = new

    def read(self, pages: Tensor, slots: Tensor) -> tuple[FeatureCodes, Tensor]:
        """Copies of the codes [T, Hkv, ...] and v [T, Hkv, Dv] at slots [T]."""
        dense, values, indices, v = (x[slots // x.shape[2], :, slots % x.shape[2]] for x in self._parts(pages))
        return FeatureCodes(dense, values, indices, self.head_dim), v

    def _parts(self, pages: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        codes, v = self.views(pages)
        return codes.dense, codes.values, codes.indices, v

    def _bytes(self, pages: Tensor) -> Tensor:
        """`pages` as uint8 [P, Hkv, page_size, token_bytes], checked."""
        require(
            pages.ndim == 4 and pages.shape[-1] * pages.itemsize == self.token_bytes,
            f"pages must be [P, Hkv, page_size, C] with C of {self.token_bytes} bytes, got {pages.dtype} "
            f"{tuple(pages.shape)}",
        )
        *outer, token, last = pages.stride()
        require(
            last == 1 and token == pages.shape[-1],
            f"the tokens of one page and head must be contiguous, got strides {tuple(pages.stride())}; in vLLM's "
            "names: a KV cache layout that ends in HNC or BNC, such as LBHNC",
        )
        offsets = (*outer, pages.storage_offset())
        require(
            all(x * pages.itemsize % self.dtype.itemsize == 0 for x in offsets),
            f"pages and heads must start at whole {self.dtype} elements; got strides {tuple(pages.stride())} and offset "
            f"{pages.storage_offset()} of {pages.itemsize} bytes",
        )
        return pages.view(torch.uint8)

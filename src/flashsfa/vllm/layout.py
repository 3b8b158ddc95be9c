"""`PageLayout`: key codes and values in raw pages of bytes, as an inference server hands them out.

A server knows a page as `page_size` cells a kv head, of equally many bytes each. The cells of a head are one run of bytes, and inside
it each tensor of a `Coder`'s codes and values lies by itself, such as

    dense channel [page_size, M] | kept values [page_size, K] | indices [page_size, K] uint8 | V [page_size, Dv] | pad

so that each is the strided tensor which `sparse_feature_decode(page_table=...)` reads in place, and its rows are as dense as in a
`PagedSparseKVCache`. A page of 16 or more tokens keeps all of them aligned to 16 bytes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.buffers import PagedKernels, put_in_pages
from ..checks import FLOAT_DTYPES, require
from ..coder import Coder
from ..ops.select.hopper.append import Paged
from ..stored import ExactKV, KVView


@dataclass(frozen=True)
class PageLayout:
    """The bytes of one token and kv head.

    Attributes:
        coder: the key code, and in how many bits codes and values are kept. It has no axes, whose widths differ by head.
        head_dim, v_dim: widths D of keys and Dv of values.
        dtype: that keys and values come in.

    Raises `ValueError` for a code that does not fit the widths or a dtype that is not floating.
    """

    coder: Coder
    head_dim: int
    v_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        require(
            self.coder.axes is None, "pages hold equally many bytes of each head: keys are kept by topk, not in axes"
        )
        require(self.dtype in FLOAT_DTYPES, f"pages hold codes in a floating dtype, got {self.dtype}")
        _no_tokens(self)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token and kv head, rounded up to whole elements of `dtype`."""
        used = sum(x.shape[3:].numel() * x.itemsize for x in _no_tokens(self).tensors())
        return -(-used // self.dtype.itemsize) * self.dtype.itemsize

    def views(self, pages: Tensor) -> KVView:
        """Codes and values [P, Hkv, page_size, ...] that share the memory of `pages`.

        Args:
            pages: [P, Hkv, page_size, C], any dtype, with C elements of `token_bytes` together. Pages and heads may
                lie anywhere; the tokens of one head and page must be contiguous.

        Raises `ValueError` for pages of another shape, order or alignment.
        """
        cells = self._bytes(pages)
        page_size = cells.shape[2]
        runs = cells.flatten(2)  # [P, Hkv, page_size * token_bytes]
        start = 0

        def part(x: Tensor) -> Tensor:
            nonlocal start
            run = runs[..., start : start + page_size * x.shape[3:].numel() * x.itemsize]
            start += run.shape[-1]
            return run.view(x.dtype).unflatten(-1, (page_size, *x.shape[3:]))

        return _no_tokens(self).map(part)

    def write(self, pages: Tensor, slots: Tensor, kv: KVView) -> None:
        """Store codes and values [1, Hkv, T, ...] at slots [T] (int64: page · page_size + place in the page), in place and without a
        host sync. Slots outside of the pages are an error that only the CPU reports."""
        put_in_pages(self.views(pages), slots[None], kv)

    def read(self, pages: Tensor, slots: Tensor) -> KVView:
        """Copies [1, Hkv, T, ...] of the codes and values at slots [T]."""
        return self.views(pages).map(lambda x: x[slots // x.shape[2], :, slots % x.shape[2]].transpose(0, 1)[None])

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
        widest = max(x.itemsize for x in _no_tokens(self).tensors())
        offsets = (*outer, pages.storage_offset())
        require(
            all(x * pages.itemsize % widest == 0 for x in offsets),
            f"pages and heads must start at whole elements of {widest} bytes; got strides {tuple(pages.stride())} and offset "
            f"{pages.storage_offset()} of {pages.itemsize} bytes",
        )
        return pages.view(torch.uint8)


class PageStore:
    """Codes keys and stores them with values in pages of one layout, and spreads them out again, without a host sync: in one launch on a
    Hopper GPU."""

    def __init__(self, layout: PageLayout) -> None:
        self.layout = layout
        self._kernels = PagedKernels()

    def write(self, pages: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k [1, Hkv, T, D] and v [1, Hkv, T, Dv] at slots [T], int64 as in `PageLayout.write`; what has a negative slot goes nowhere,
        or to page 0."""
        append = self._kernel(pages, k, v)
        if append is not None:
            append(k, v, slots[None])
        else:
            self.layout.write(pages, slots.clamp(min=0), self.layout.coder.encode(k, v))

    def rows(self, pages: Tensor, slots: Tensor) -> ExactKV:
        """Keys [1, Hkv, T, D] as sparse rows and values [1, Hkv, T, Dv] at slots [T], in the layout's dtype."""
        layout, heads = self.layout, pages.shape[1]

        def empty(tokens: int) -> ExactKV:
            widths = layout.head_dim, layout.v_dim
            return ExactKV(*(pages.new_empty((1, heads, tokens, width), dtype=layout.dtype) for width in widths))

        none = empty(0)
        read = self._kernel(pages, none.k, none.v, reads=True)
        if read is None:
            return layout.read(pages, slots).rows(layout.dtype)
        rows = empty(len(slots))
        read(rows.k, rows.v, slots[None])
        return rows

    def _kernel(self, pages: Tensor, k: Tensor, v: Tensor, *, reads: bool = False) -> Paged | None:
        where = pages.data_ptr(), pages.shape, pages.stride()
        return self._kernels.find(where, lambda: self.layout.views(pages), k, v, reads=reads)


@functools.cache
def _no_tokens(layout: PageLayout) -> KVView:
    """Codes and values [1, 1, 0, ...] of no tokens: what tensors there are, their dtypes and widths."""
    k, v = (torch.empty(1, 1, 0, width, dtype=layout.dtype, device="cpu") for width in (layout.head_dim, layout.v_dim))
    layout.coder.require_fit(k, v)
    return layout.coder.empty(0, k, v)

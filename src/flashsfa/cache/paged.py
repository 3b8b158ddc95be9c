"""`PagedSparseKVCache`: key codes and values of many sequences in one pool of pages, with shared prefixes.

A sequence holds whole pages, so memory is lost in its last page alone, and a fork holds the pages of its prefix
together with the original: a page is copied when a holder appends to it, and returns to the pool with its last holder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from ..axes import AxisBits
from ..checks import (
    MOST_TOKENS,
    require,
    require_int,
    require_keys_and_values,
    require_no_gradient,
    require_page_size,
)
from ..coder import Coded, Coder
from ..contexts import lasting_tensors, without_autocast
from ..formats import CodeFormat
from ..narrow import NarrowRows
from ..stored import ExactKV, KeyCodes, KVView
from .buffers import PagedKernels, put_in_pages
from .exact import ExactSlots


class PagedSparseKVCache(Coded):
    """A pool of `pages` pages of `page_size` tokens; sequences are named by the integers that `add` and `fork` return.

    A call that raises, for whatever reason, leaves the cache as it was.

    Args:
        topk, dense_dims: the key code, as in `topk_codes`.
        axes: in place of topk, the bits [Hkv, D] of each axis of keys that come in the coordinates of a basis.
        pages: size of the pool, allocated on the first `append`, which also fixes heads, widths, dtype and device.
        page_size: tokens a page, a power of two from 16 to 256.
        dtype: torch.int8 to keep codes and values in 8 bits with a scale a row, a `CodeFormat` for its widths, None to keep them as
            they come.
        recent: newest tokens of each sequence that are kept as they come, beside their codes.
        first: first tokens of each sequence that are kept as they come, beside their codes.

    Example:
        >>> prompt = cache.add()
        >>> cache.append([prompt], k, v)
        >>> branches = [prompt, cache.fork(prompt)]
        >>> out = sparse_feature_decode(q, cache.view(branches))
    """

    def __init__(
        self,
        topk: int | None = None,
        *,
        dense_dims: int = 0,
        axes: AxisBits | None = None,
        pages: int,
        page_size: int = 64,
        dtype: torch.dtype | CodeFormat | None = None,
        recent: int = 0,
        first: int = 0,
    ) -> None:
        self.coder = Coder(topk, dense_dims, dtype, axes)
        require_int("pages", pages, 1)
        require_page_size(page_size)
        require_int("recent", recent, 0, MOST_TOKENS)
        require_int("first", first, 0, MOST_TOKENS)
        self._slots = ExactSlots(first, recent)
        self.page_size = page_size
        self._holders = [0] * pages  # sequences that hold each page
        self._free = list(range(pages - 1, -1, -1))
        self._held: dict[int, list[int]] = {}  # pages of each sequence, in order
        self._lengths: dict[int, int] = {}
        self._exact: dict[
            int, ExactKV
        ] = {}  # of each sequence that was appended to, [1, Hkv, E, ...], written anew by each append
        self._next = 0
        self._pools: KVView | None = None  # [P, Hkv, page_size, ...]
        self._writers = PagedKernels()
        self._input_dtype: torch.dtype | None = None  # of keys and values as they come

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    @property
    def codes(self) -> KeyCodes:
        """The pool of codes, [P, Hkv, page_size, ...]."""
        return self._filled().codes

    @property
    def v(self) -> Tensor | NarrowRows:
        """The pool of values, [P, Hkv, page_size, Dv]."""
        return self._filled().v

    @property
    def nbytes(self) -> int:
        """Bytes of the pages held, scales included, and of the exact tokens' slots; what is shared counts once."""
        if self._pools is None:
            return 0
        exact = sum({id(x): x.nbytes for x in self._exact.values()}.values())
        pages = len(self._holders) - self.free_pages
        return sum(x.nbytes for x in self._pools.tensors()) * pages // len(self._holders) + exact

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        self._require_known(sequence)
        return self._lengths[sequence]

    def add(self) -> int:
        """A new, empty sequence."""
        return self._name([], 0)

    def fork(self, sequence: int) -> int:
        """A new sequence that starts as `sequence` stands now. Copies nothing."""
        self._require_known(sequence)
        for page in self._held[sequence]:
            self._holders[page] += 1
        name = self._name(list(self._held[sequence]), self._lengths[sequence])
        if sequence in self._exact:
            self._exact[name] = self._exact[sequence]
        return name

    def free(self, sequence: int) -> None:
        """Forget a sequence; pages that nobody else holds return to the pool."""
        self._require_known(sequence)
        del self._lengths[sequence]
        self._exact.pop(sequence, None)
        for page in self._held.pop(sequence):
            self._release(page)

    def append(self, sequences: Sequence[int], k: Tensor, v: Tensor) -> None:
        """Code the keys k [B, Hkv, N, D] and store them with v [B, Hkv, N, Dv] as N more tokens of each of B sequences.

        Raises:
            TypeError, ValueError: k and v do not fit each other, the sequences or the pool, or ask for a gradient.
            RuntimeError: too few free pages.
        """
        self._check(sequences, k, v)
        if not sequences:
            return
        batch, tokens, size = len(sequences), k.shape[2], self.page_size
        plan = self._plan(sequences, tokens)
        k, v = k.detach(), v.detach()
        pools = self._allocate(k, v) if self._pools is None else self._pools
        at = [range(self._lengths[s], self._lengths[s] + tokens) for s in sequences]
        places = [[pages[i // size] * size + i % size for i in span] for pages, span in zip(plan.held, at, strict=True)]
        slots = torch.tensor(places, device=k.device, dtype=torch.long).reshape(batch, tokens)
        exact = self._written(sequences, k, v)
        # Until the end this writes where no sequence looks: pages that are free, and slots past a sequence's length.
        if plan.copies:
            for pool in pools.tensors():
                pool[plan.copies] = pool[plan.shared]
        self._write(pools, k, v, slots)
        self._pools, self._input_dtype = pools, k.dtype
        self._commit(sequences, plan, tokens)
        self._exact.update(exact)

    def view(self, sequences: Sequence[int]) -> KVView:
        """The stored keys and values of B sequences, for `sparse_feature_decode`: the pools, lengths, pages and exact tokens."""
        self._require_all_known(sequences)
        pools = self._filled()
        device = pools.v.device
        held = [self._held[s] for s in sequences]
        width = max((len(pages) for pages in held), default=0)
        table = [pages + [0] * (width - len(pages)) for pages in held]
        kv_lens = torch.tensor([self._lengths[s] for s in sequences], dtype=torch.int32, device=device)
        page_table = torch.tensor(table, dtype=torch.int32, device=device).reshape(len(held), width)
        recent = self._exact_of(sequences, pools) if width else None
        return replace(pools, kv_lens=kv_lens, page_table=page_table, recent=recent)

    def _exact_of(self, sequences: Sequence[int], pools: KVView) -> ExactKV | None:
        """The exact tokens of B sequences, [B, Hkv, E, ...]; None where none are kept."""
        k, v = (
            torch.empty((1, x.shape[1], 0, x.shape[-1]), dtype=self._input_dtype, device=x.device)
            for x in (pools.codes, pools.v)
        )
        none = self._slots.empty(k, v)
        if none is None or not sequences:
            return None
        held = [self._exact.get(s, none) for s in sequences]
        positions = torch.cat([x.positions for x in held if x.positions is not None])
        with without_autocast(k.device):
            return replace(held[0].map(lambda *x: torch.cat(x), *held[1:]), positions=positions)

    def _write(self, pools: KVView, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Code k and store it with v at `slots` [B, N]."""
        write = self._writers.find(None, lambda: pools, k, v)
        if write is not None:
            write(k, v, slots)
        else:
            put_in_pages(pools, slots, self.coder.encode(k, v))

    def _written(self, sequences: Sequence[int], k: Tensor, v: Tensor) -> dict[int, ExactKV]:
        """The exact tokens of each sequence after it goes on with k and v [B, Hkv, N, ...]. Changes nothing."""
        with lasting_tensors():
            none = self._slots.empty(k[:1], v[:1])
            if none is None:
                return {}
            starts = torch.tensor([self._lengths[s] for s in sequences], device=k.device)
            written = {}
            for i, sequence in enumerate(sequences):
                new = ExactKV(k[i : i + 1], v[i : i + 1])
                written[sequence] = self._slots.written(self._exact.get(sequence, none), new, starts[i : i + 1])
            return written

    def _filled(self) -> KVView:
        if self._pools is None:
            raise RuntimeError("the cache is empty: append keys and values first")
        return self._pools

    def _allocate(self, k: Tensor, v: Tensor) -> KVView:
        """New pools for keys such as k and values such as v."""
        self._writers = PagedKernels()  # not those of pools that an append which failed had made
        with lasting_tensors():
            rows = self.coder.empty(self.page_size, k, v)
            return rows.map(lambda x: x.new_empty((len(self._holders), *x.shape[1:])))

    def _name(self, pages: list[int], length: int) -> int:
        name, self._next = self._next, self._next + 1
        self._held[name], self._lengths[name] = pages, length
        return name

    def _plan(self, sequences: Sequence[int], tokens: int) -> _Plan:
        """Where `tokens` more tokens of each sequence go. Changes nothing; `_commit` does."""
        held, shared, parted = [list(self._held[s]) for s in sequences], [], Counter[int]()
        copies, taken = [], 0

        def take() -> int:
            nonlocal taken
            taken += 1
            return self._free[-taken] if taken <= self.free_pages else -1

        for sequence, pages in zip(sequences, held, strict=True):
            length = self._lengths[sequence]
            # a page with room left that another holder has, too, is copied; the last holder keeps it
            if tokens and length % self.page_size and self._holders[pages[-1]] - parted[pages[-1]] > 1:
                parted[pages[-1]] += 1
                shared.append(pages[-1])
                pages[-1] = take()
                copies.append(pages[-1])
            while len(pages) * self.page_size < length + tokens:
                pages.append(take())
        if taken > self.free_pages:
            raise RuntimeError(f"appending needs {taken} pages, {self.free_pages} are free: free a sequence first")
        return _Plan(held, shared, copies, taken)

    def _commit(self, sequences: Sequence[int], plan: _Plan, tokens: int) -> None:
        for page in plan.shared:
            self._holders[page] -= 1
        for _ in range(plan.taken):
            self._holders[self._free.pop()] = 1
        for sequence, pages in zip(sequences, plan.held, strict=True):
            self._held[sequence] = pages
            self._lengths[sequence] += tokens

    def _release(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page] == 0:
            self._free.append(page)

    def _require_all_known(self, sequences: Sequence[int]) -> None:
        if not isinstance(sequences, Sequence) or not all(isinstance(x, Integral) for x in sequences):
            raise TypeError(f"sequences must be a list of the integers that add() returned, got {sequences!r}")
        for sequence in sequences:
            self._require_known(sequence)

    def _require_known(self, sequence: int) -> None:
        require_int("sequence", sequence)
        require(sequence in self._held, f"no sequence {sequence} in this cache; it holds {sorted(self._held)}")

    def _check(self, sequences: Sequence[int], k: Tensor, v: Tensor) -> None:
        self._require_all_known(sequences)
        require(len(set(sequences)) == len(sequences), f"each sequence can be appended to once, got {list(sequences)}")
        require_keys_and_values(k, v)
        require_no_gradient(k, v)
        require(
            k.shape[0] == len(sequences),
            f"k and v must share [B, Hkv, N] with B = {len(sequences)} sequences, got {tuple(k.shape)} and {tuple(v.shape)}",
        )
        self.coder.require_fit(k, v)
        if self._pools is None:
            return
        for name, new, pool in (("k", k, self._pools.codes), ("v", v, self._pools.v)):
            heads, width = pool.shape[1], pool.shape[-1]
            require(
                new.shape[1] == heads and new.shape[-1] == width,
                f"{name} {tuple(new.shape)} does not fit a pool of {heads} kv heads and width {width}",
            )
        if k.dtype != self._input_dtype:
            raise TypeError(f"k is {k.dtype} but the pool holds {self._input_dtype}; cast them to one dtype")
        require(
            k.device == self._pools.v.device,
            lambda: f"k is on {k.device} but the pool is on {self.v.device}; move them together",
        )


class _Plan(NamedTuple):
    """Where an append goes: the pages `held` by each sequence after it, which `shared` pages are copied to which free ones
    (`copies`), and how many free pages are `taken` from the end of the list."""

    held: list[list[int]]
    shared: list[int]
    copies: list[int]
    taken: int

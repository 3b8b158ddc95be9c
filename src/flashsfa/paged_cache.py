"""`PagedSparseKVCache`: key codes and values of many sequences in one pool of pages, with shared prefixes.

A sequence holds whole pages, so memory is lost in its last page alone, and a fork holds the pages of its prefix
together with the original: a page is copied when a holder appends to it, and returns to the pool with its last holder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import require, require_alike, require_budget, require_keys_and_values, require_page_size
from .codes import FeatureCodes, topk_codes


class PagedSparseKVCache:
    """A pool of `pages` pages of `page_size` tokens; sequences are named by the integers that `add` and `fork` return.

    Args:
        topk, dense_dims: the key code, as in `topk_codes`.
        pages: size of the pool, allocated on the first `append`, which also fixes heads, widths, dtype and device.
        page_size: tokens a page, a power of two from 16 to 256.

    Example:
        >>> prompt = cache.add()
        >>> cache.append([prompt], k, v)
        >>> branches = [prompt, cache.fork(prompt)]
        >>> out = sparse_feature_decode(q, cache.codes, cache.v, **cache.lookup(branches))
    """

    def __init__(self, topk: int, *, dense_dims: int = 0, pages: int, page_size: int = 64) -> None:
        require(pages >= 1, f"a pool needs at least 1 page, got {pages}")
        require_page_size(page_size)
        self.topk, self.dense_dims, self.page_size = topk, dense_dims, page_size
        self._holders = [0] * pages  # sequences that hold each page
        self._free = list(range(pages - 1, -1, -1))
        self._held: dict[int, list[int]] = {}  # pages of each sequence, in order
        self._lengths: dict[int, int] = {}
        self._next = 0
        self._codes: FeatureCodes | None = None  # pools [P, Hkv, page_size, ...]
        self._v: Tensor | None = None  # [P, Hkv, page_size, Dv]

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    @property
    def codes(self) -> FeatureCodes:
        """The pool of codes, [P, Hkv, page_size, ...]."""
        return self._pools()[0]

    @property
    def v(self) -> Tensor:
        """The pool of values, [P, Hkv, page_size, Dv]."""
        return self._pools()[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the pages held; a shared page counts once."""
        if self._codes is None or self._v is None:
            return 0
        return (self._codes.nbytes + self._v.nbytes) * (len(self._holders) - self.free_pages) // len(self._holders)

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
        return self._name(list(self._held[sequence]), self._lengths[sequence])

    def free(self, sequence: int) -> None:
        """Forget a sequence; pages that nobody else holds return to the pool."""
        self._require_known(sequence)
        del self._lengths[sequence]
        for page in self._held.pop(sequence):
            self._release(page)

    def append(self, sequences: Sequence[int], k: Tensor, v: Tensor) -> None:
        """Code the keys k [B, Hkv, N, D] and store them with v [B, Hkv, N, Dv] as N more tokens of each of B sequences.

        Raises:
            TypeError, ValueError: k and v do not fit each other, the sequences or the pool.
            RuntimeError: too few free pages. Nothing is stored in either case.
        """
        self._check(sequences, k, v)
        needed = self._missing_pages(sequences, k.shape[2])
        if needed > self.free_pages:
            raise RuntimeError(f"appending needs {needed} pages, {self.free_pages} are free: free a sequence first")
        fresh = topk_codes(k.detach(), self.topk, dense_dims=self.dense_dims)
        if self._codes is None or self._v is None:
            self._codes, self._v = self._allocate(k, v)
        for sequence in sequences:  # from here on nothing large is allocated that could fail
            self._reserve(sequence, k.shape[2])
        at = [range(self._lengths[s], self._lengths[s] + k.shape[2]) for s in sequences]
        page = [[self._held[s][i // self.page_size] for i in span] for s, span in zip(sequences, at, strict=True)]
        pages = torch.tensor(page, device=k.device, dtype=torch.long).reshape(len(sequences), -1)  # [B, N]
        slots = torch.tensor([list(span) for span in at], device=k.device, dtype=torch.long) % self.page_size  # [B, N]
        new = (fresh.dense, fresh.values, fresh.indices, v.detach())
        for pool, x in zip(self._all_pools(), new, strict=True):
            pool[pages, :, slots.reshape_as(pages)] = x.transpose(1, 2)  # [B, N, Hkv, C]
        for sequence in sequences:
            self._lengths[sequence] += k.shape[2]

    def lookup(self, sequences: Sequence[int]) -> dict[str, Tensor]:
        """`kv_lens` [B] int32 and `page_table` [B, max_pages] int32 of B sequences, for `sparse_feature_decode`."""
        for sequence in sequences:
            self._require_known(sequence)
        device = self.v.device
        held = [self._held[s] for s in sequences]
        width = max((len(pages) for pages in held), default=0)
        table = [pages + [0] * (width - len(pages)) for pages in held]
        return {
            "kv_lens": torch.tensor([self._lengths[s] for s in sequences], dtype=torch.int32, device=device),
            "page_table": torch.tensor(table, dtype=torch.int32, device=device).reshape(len(held), width),
        }

    def _pools(self) -> tuple[FeatureCodes, Tensor]:
        if self._codes is None or self._v is None:
            raise RuntimeError("the cache is empty: append keys and values first")
        return self._codes, self._v

    def _all_pools(self) -> tuple[Tensor, ...]:
        codes, v = self._pools()
        return codes.dense, codes.values, codes.indices, v

    def _allocate(self, k: Tensor, v: Tensor) -> tuple[FeatureCodes, Tensor]:
        rows = (len(self._holders), k.shape[1], self.page_size)
        codes = FeatureCodes(
            k.new_empty((*rows, self.dense_dims)),
            k.new_empty((*rows, self.topk)),
            k.new_empty((*rows, self.topk), dtype=torch.uint8),
            k.shape[-1],
        )
        return codes, v.new_empty((*rows, v.shape[-1]))

    def _name(self, pages: list[int], length: int) -> int:
        name, self._next = self._next, self._next + 1
        self._held[name], self._lengths[name] = pages, length
        return name

    def _missing_pages(self, sequences: Sequence[int], tokens: int) -> int:
        """Pages that `tokens` more tokens of each sequence take from the pool."""
        filled = sum(-(-(self._lengths[s] + tokens) // self.page_size) - len(self._held[s]) for s in sequences)
        parting = Counter(self._held[s][-1] for s in sequences if tokens > 0 and self._must_copy(s))
        # the last holder of a page keeps it
        return filled + sum(min(count, self._holders[page] - 1) for page, count in parting.items())

    def _must_copy(self, sequence: int) -> bool:
        """Whether the sequence's last page has room left but another holder too."""
        return self._lengths[sequence] % self.page_size > 0 and self._holders[self._held[sequence][-1]] > 1

    def _reserve(self, sequence: int, tokens: int) -> None:
        held = self._held[sequence]
        if tokens > 0 and self._must_copy(sequence):
            shared, held[-1] = held[-1], self._take()
            for pool in self._all_pools():
                pool[held[-1]] = pool[shared]
            self._release(shared)
        while len(held) * self.page_size < self._lengths[sequence] + tokens:
            held.append(self._take())

    def _take(self) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page] == 0:
            self._free.append(page)

    def _require_known(self, sequence: int) -> None:
        require(sequence in self._held, f"no sequence {sequence} in this cache; it holds {sorted(self._held)}")

    def _check(self, sequences: Sequence[int], k: Tensor, v: Tensor) -> None:
        for sequence in sequences:
            self._require_known(sequence)
        require(len(set(sequences)) == len(sequences), f"each sequence can be appended to once, got {list(sequences)}")
        require_keys_and_values(k, v)
        require(
            k.shape[0] == len(sequences),
            f"k and v must share [B, Hkv, N] with B = {len(sequences)} sequences, got {tuple(k.shape)} and {tuple(v.shape)}",
        )
        require_budget(self.topk, k.shape[-1], self.dense_dims)
        if self._codes is not None and self._v is not None:
            for name, new, heads, width in (
                ("k", k, self._v.shape[1], self._codes.head_dim),
                ("v", v, self._v.shape[1], self._v.shape[-1]),
            ):
                require(
                    new.shape[1] == heads and new.shape[-1] == width,
                    f"{name} {tuple(new.shape)} does not fit a pool of {heads} kv heads and width {width}",
                )
            require_alike(pool=self._v, k=k)

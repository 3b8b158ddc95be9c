"""`Mask`: which keys a query sees. Causality, window, padding, packed sequences and lengths, described once for all backends."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .checks import MOST_TOKENS, require_int


@dataclass(frozen=True, eq=False)
class Mask:
    """Visibility of N_k keys to N_q queries.

    Query i stands at position p = i + N - N_q, where N is N_k, or the sequence's own number of keys (bottom-right alignment: the last
    query at the last key).

    Attributes:
        is_causal: key j is visible only if j <= p.
        window: key j is visible only if |p - j| < window: with `is_causal`, the `window` most recent keys,
            the query's own included.
        key_padding_mask: [B, N_k] bool, True where a key is padding and nobody sees it.
        cu_seqlens_q, cu_seqlens_k: [S + 1] int32 bounds of S packed sequences; queries see only keys of
            their own sequence, and positions count within it. Batch size 1 then.
        max_seqlen_q, max_seqlen_k: longest packed sequence.
        kv_lens: [B] integer number of keys of each sequence, the first of the N_k, where not all are there; more count as N_k.
    """

    is_causal: bool = False
    window: int | None = None
    key_padding_mask: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    kv_lens: Tensor | None = None

    @property
    def is_packed(self) -> bool:
        """Whether several sequences lie one after another."""
        return self.cu_seqlens_q is not None

    def without_idle_window(self, n_q: int, n_k: int) -> Mask:
        """The same mask; without its window if that is too wide to hide a key."""
        if self.window is None or self.window < max(n_q, n_k):
            return self
        return replace(self, window=None)

    def with_lengths(self, kv_lens: Tensor) -> Mask:
        """The same mask for sequences of other lengths."""
        return replace(self, kv_lens=kv_lens)

    def segments(self, n_q: int, n_k: int) -> list[tuple[slice, slice]]:
        """Query and key ranges of the packed sequences; one range over everything when nothing is packed."""
        if self.cu_seqlens_q is None or self.cu_seqlens_k is None:
            return [(slice(0, n_q), slice(0, n_k))]
        q_bounds, k_bounds = self.cu_seqlens_q.tolist(), self.cu_seqlens_k.tolist()
        return [
            (slice(q_bounds[s], q_bounds[s + 1]), slice(k_bounds[s], k_bounds[s + 1])) for s in range(len(q_bounds) - 1)
        ]

    def key_ranges(self, n_q: int, n_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """[N_q] first visible key and [N_q] end of the visible keys of each query of one sequence, padding apart."""
        position = torch.arange(n_k - n_q, n_k, device=device)
        end = position + 1 if self.is_causal else torch.full_like(position, n_k)
        start = torch.zeros_like(position)
        if self.window is not None:
            window = min(self.window, n_q + n_k)  # as wide as any, and no sum with it wraps around
            start = position - window + 1
            end = torch.minimum(end, position + window)
        return start.clamp(0, n_k), end.clamp(0, n_k)

    def to_bool(self, n_q: int, n_k: int, device: torch.device) -> Tensor:
        """[B or 1, 1, N_q, N_k] bool, True where visible: the definition the backends are tested against."""
        key = torch.arange(n_k, device=device)
        if self.is_packed:
            visible = torch.zeros(n_q, n_k, dtype=torch.bool, device=device)
            for rows, keys in self.segments(n_q, n_k):
                start, end = self.key_ranges(rows.stop - rows.start, keys.stop - keys.start, device)  # [n], [n]
                local = key[keys] - keys.start
                visible[rows, keys] = (local >= start[:, None]) & (local < end[:, None])
            return visible[None, None]
        lengths = torch.tensor([n_k], device=device) if self.kv_lens is None else self.kv_lens.clamp(max=n_k)
        visible = self._sees(key, lengths, n_q, n_k)
        if self.key_padding_mask is not None:
            visible = visible & ~self.key_padding_mask[:, None, None]
        return visible

    def sees(self, keys: Tensor, n_q: int, n_k: int) -> Tensor:
        """[B or 1, 1, N_q, E] bool, what `to_bool` has at `keys` [B or 1, E], in any order; False for what is none of the N_k keys.
        Nothing is packed."""
        lengths = torch.tensor([n_k], device=keys.device) if self.kv_lens is None else self.kv_lens.clamp(max=n_k)
        visible = self._sees(keys[:, None, None], lengths, n_q, n_k)
        if self.key_padding_mask is not None:
            padding = self.key_padding_mask
            at = keys.clamp(0, n_k - 1).expand(len(padding), -1)
            visible = visible & ~padding.gather(1, at)[:, None, None]
        return visible

    def hiding(self, keys: Tensor) -> Mask:
        """The same mask without the keys [B, N_k] bool, as if they were padding."""
        return replace(self, key_padding_mask=keys if self.key_padding_mask is None else self.key_padding_mask | keys)

    def _sees(self, key: Tensor, lengths: Tensor, n_q: int, n_k: int) -> Tensor:
        """[B or 1, 1, N_q, E] bool for keys [E] or [B or 1, 1, 1, E], padding apart."""
        position = (lengths[:, None] - n_q + torch.arange(n_q, device=key.device))[
            :, None, :, None
        ]  # [B or 1, 1, N_q, 1]
        visible = ((key >= 0) & (key < lengths[:, None, None, None])).expand(-1, -1, n_q, -1)
        if self.is_causal:
            visible = visible & (key <= position)
        if self.window is not None:
            window = min(self.window, n_q + n_k)
            visible = visible & (key > position - window) & (key < position + window)
        return visible

    def shows_all(self, n_q: int) -> bool:
        """Whether it is known, without a look at any value, that every one of `n_q` queries sees every key."""
        hides = self.window is not None or self.key_padding_mask is not None or self.kv_lens is not None
        return not hides and not self.is_packed and (not self.is_causal or n_q == 1)


def checked_window(window: int | None) -> int | None:
    """`window`, at least 1, cut to the length that no sequence has: sums with larger ones would wrap around."""
    if window is None:
        return None
    require_int("window", window, 1)
    return min(window, MOST_TOKENS)

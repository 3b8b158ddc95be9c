"""`ExactSlots`: the first and the newest tokens of sequences, as they came, in buffers of fixed size and address.

Beside them every token is coded, so a token that another takes the slot of, or one that is taken back, needs no further work: its
code is there, and a slot whose position is not held is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..stored import ExactKV


@dataclass(frozen=True)
class ExactSlots:
    """Room for the `first` tokens of a sequence, token p in slot p, and behind it for the `recent` newest ones, a ring."""

    first: int
    recent: int

    def empty(self, k: Tensor, v: Tensor) -> ExactKV | None:
        """Zeroed slots for keys such as k [B, Hkv, any, D] and values such as v, that hold nothing; None where there are none."""
        slots = self.first + self.recent
        if not slots:
            return None
        rows = ExactKV(k, v).map(lambda x: x.new_zeros((*x.shape[:2], slots, x.shape[3])))
        return ExactKV(rows.k, rows.v, torch.full((1, slots), -1, dtype=torch.int64, device=k.device))

    def written(self, held: ExactKV, new: ExactKV, start: Tensor) -> ExactKV:
        """What the slots hold after the tokens `new` [B, Hkv, N, ...] at `start` [B or 1] (int64, on the device) and the next
        positions. New tensors; no host sync."""
        assert held.positions is not None
        count = new.k.shape[2]
        if not count:
            return held
        slot, begin = torch.arange(self.first + self.recent, device=start.device), start[:, None]
        is_first, last = slot < self.first, begin + count - 1
        # the newest token of each slot of the ring; one of the first tokens is in its own slot alone
        position = (last - (last - slot) % max(self.recent, 1)).where(~is_first, slot)  # [B or 1, E]
        token = position - begin
        is_new = (token >= 0) & (token < count) & (is_first | (position >= self.first))
        source = token.clamp(0, count - 1)[:, None, :, None]

        def pick(old: Tensor, x: Tensor) -> Tensor:
            fresh = x.gather(2, source.expand(*old.shape))
            return fresh.where(is_new[:, None, :, None], old)

        rows = held.map(pick, new)
        return ExactKV(rows.k, rows.v, position.where(is_new, held.positions))

"""The synthetic needle task (paper, Table 2): a haystack of one repeated token, with one needle to be found again.

`# # # 17 # # # # ? 17 # #`: the needle is one of `NEEDLES` tokens, at any place; after the question mark it must follow. While
training, the question stands at any place after the needle, and all that is predicted is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .data import IGNORED

HAY, QUESTION, FIRST_NEEDLE, NEEDLES = 0, 1, 2, 62
VOCABULARY = FIRST_NEEDLE + NEEDLES
SHORTEST = 4  # a needle, hay or not, the question and its answer


class NeedleWindows(Dataset):
    """`count` windows of `context` tokens; window i is drawn from (seed, i) alone.

    Args:
        at_end: the question ends the window, as it is tested; else it stands anywhere.
    """

    def __init__(self, context: int, count: int, seed: int, at_end: bool = False) -> None:
        self._context, self._count, self._seed, self._at_end = context, count, seed, at_end

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + index)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=generator, device="cpu"))

        last = self._context - 2  # where the last possible question stands
        question = last if self._at_end else draw(1, last + 1)
        place, needle = draw(0, question), FIRST_NEEDLE + draw(0, NEEDLES)
        ids = torch.full((self._context,), HAY, device="cpu")
        ids[place], ids[question], ids[question + 1] = needle, QUESTION, needle
        labels = torch.full_like(ids, IGNORED)
        labels[question + 1] = needle
        return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def needle_accuracy(
    model: Any, lengths: Sequence[int], count: int, seed: int, step: Callable[[], None] = lambda: None
) -> dict[int, float]:
    """The share of `count` needles that `model` finds again at the end of contexts of these lengths."""
    found = {}
    for length in lengths:
        windows, hits = NeedleWindows(length, count, seed, at_end=True), 0
        for index in range(count):
            ids = windows[index]["input_ids"].to(model.device)
            logits = model(input_ids=ids[None, :-1], use_cache=False, logits_to_keep=1).logits
            hits += int(logits[0, -1].argmax() == ids[-1])
        found[length] = hits / count
        step()
    return found

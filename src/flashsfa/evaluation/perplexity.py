"""Perplexity over non-overlapping windows of tokens, and how far it could be off."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import require
from ..huggingface.structure import evaluating

_ROWS = 1024  # logits turned to float32 at a time: of a long window they would be the largest tensor by far
_LARGEST_LOSS = math.log(sys.float_info.max)


def perplexity(model: Any, windows: Tensor, progress: Callable[[], None] = lambda: None) -> float:
    """exp of the mean negative log-likelihood of all but the first token of each window. Arguments and errors as in
    `window_losses`."""
    return spread(window_losses(model, windows, progress))[0]


@torch.no_grad()
def window_losses(model: Any, windows: Tensor, progress: Callable[[], None] = lambda: None) -> list[float]:
    """The mean negative log-likelihood of all but the first token of each window, in nats per token.

    Each token is scored as decode sees it: one whose cache is in fewer bits attends to the rounded keys and values that the cache
    holds, and one that keeps its newest and first tokens as they came to these, and to the codes of the others.
    But all values count: `value_tolerance` is left aside here, and is what `tolerance.decode_losses` is for.

    Args:
        model: a causal language model of transformers; in training mode it is measured without dropout all the same.
        windows: [S, W] int64 token ids.
        progress: called after each window.

    Raises `ValueError` if the mean is NaN, or so large that its exponential overflows.
    """
    losses = []
    for window in windows:
        ids = window[None].to(model.device)
        with evaluating(model):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]  # [W - 1, vocabulary]
        total = 0.0
        for rows, targets in zip(logits.split(_ROWS), ids[0, 1:].split(_ROWS), strict=True):
            total += F.cross_entropy(rows.float(), targets, reduction="sum").item()
        losses.append(total / (windows.shape[1] - 1))
        progress()
    loss = statistics.fmean(losses)
    require(
        loss < _LARGEST_LOSS,  # NaN is not
        f"the model's loss is {loss:.3g} nats per token, which no working model has: its weights are damaged, or overflow in {model.dtype}",
    )
    return losses


def spread(losses: Sequence[float], baseline: Sequence[float] | None = None) -> tuple[float, float | None]:
    """Perplexity from the losses of windows, and its standard error over them; None for a single window.

    With the losses of a `baseline` on the same windows it is the ratio of both perplexities, and the error is that of paired
    windows: much smaller, for a hard window is hard for both.
    """
    losses = losses if baseline is None else [x - y for x, y in zip(losses, baseline, strict=True)]
    value = math.exp(statistics.fmean(losses))
    return value, value * statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None

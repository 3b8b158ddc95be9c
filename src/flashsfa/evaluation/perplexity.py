"""Perplexity over non-overlapping windows of tokens."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import require
from ..huggingface import SparseCache
from ..huggingface.switch import is_enabled

_ROWS = 1024  # logits turned to float32 at a time: of a long window they would be the largest tensor by far
_LARGEST_LOSS = math.log(sys.float_info.max)


@torch.no_grad()
def perplexity(model: Any, windows: Tensor, progress: Callable[[], None] = lambda: None) -> float:
    """exp of the mean negative log-likelihood of all but the first token of each window.

    A model whose cache is in 8 bits attends to the rounded keys and values that the cache holds.

    Args:
        model: a causal language model of transformers.
        windows: [S, W] int64 token ids.
        progress: called after each window.

    Raises `ValueError` if the loss is NaN, or so large that its exponential overflows.
    """
    rounds = is_enabled(model) and model.config.sfa["cache_dtype"] is not None
    total = 0.0
    for window in windows:
        ids = window[None].to(model.device)
        cache = SparseCache(model) if rounds else None
        logits = model(input_ids=ids, past_key_values=cache, use_cache=rounds).logits[0, :-1]  # [W - 1, vocabulary]
        for rows, targets in zip(logits.split(_ROWS), ids[0, 1:].split(_ROWS), strict=True):
            total += F.cross_entropy(rows.float(), targets, reduction="sum").item()
        progress()
    loss = total / (windows.shape[0] * (windows.shape[1] - 1))
    require(
        loss < _LARGEST_LOSS,  # NaN is not
        f"the model's loss is {loss:.3g} nats a token, which no working model has: its weights are damaged, or overflow in {model.dtype}",
    )
    return math.exp(loss)

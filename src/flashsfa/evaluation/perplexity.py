"""Perplexity over non-overlapping windows of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 1024  # logits turned to float32 at a time: of a long window they would be the largest tensor by far


@torch.no_grad()
def perplexity(model: Any, windows: Tensor, progress: Callable[[], None] = lambda: None) -> float:
    """exp of the mean negative log-likelihood of all but the first token of each window.

    Args:
        model: a causal language model of transformers.
        windows: [S, W] int64 token ids.
        progress: called after each window.
    """
    total = 0.0
    for window in windows:
        ids = window[None].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]  # [W - 1, vocabulary]
        for rows, targets in zip(logits.split(_ROWS), ids[0, 1:].split(_ROWS), strict=True):
            total += F.cross_entropy(rows.float(), targets, reduction="sum").item()
        progress()
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))

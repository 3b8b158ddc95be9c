"""Bytes of a model's KV cache, read from a live one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..huggingface import SparseCache, cache_nbytes
from ..huggingface.switch import is_enabled


def cache_bytes_per_token(model: Any, ids: Tensor) -> float:
    """Bytes of keys and values that a token takes in all layers together, of a model of transformers, dense or switched.

    Args:
        ids: [N] token ids that are put into a cache; tokens that it keeps as they come count with the others.
    """
    return cache_nbytes(fill_cache(model, ids))["total"] / len(ids)


@torch.no_grad()
def fill_cache(model: Any, ids: Tensor) -> Any:
    """The cache of a model, dense or switched, that holds the tokens `ids` [N]."""
    cache = SparseCache(model) if is_enabled(model) else None
    inputs = ids[None].to(model.device)
    return model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

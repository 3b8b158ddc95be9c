"""Bytes of a model's KV cache, read from a live one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..huggingface import SparseCache, cache_nbytes
from ..huggingface.switch import is_enabled

_TOKENS = 32


@torch.no_grad()
def cache_bytes_per_token(model: Any, ids: Tensor) -> float:
    """Bytes of keys and values that a token takes in all layers together, of a model of transformers, dense or switched.

    Args:
        ids: [N] token ids; the first 32 are put into a cache.
    """
    inputs = ids[None, :_TOKENS].to(model.device)
    cache = SparseCache(model) if is_enabled(model) else None
    cache = model(input_ids=inputs, past_key_values=cache, use_cache=True).past_key_values
    return cache_nbytes(cache)["total"] / inputs.shape[1]

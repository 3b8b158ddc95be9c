"""Bytes of a model's KV cache, read from a live one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..huggingface import SparseCache, attention_shape, cache_nbytes
from ..huggingface.attention import LayerCoding
from ..huggingface.structure import attention_layers, dense_cache_layers
from ..huggingface.switch import is_enabled


def cache_bytes_per_token(model: Any, ids: Tensor) -> float:
    """Bytes of keys and values that a token takes in all layers together, of a model of transformers, dense or switched.

    Args:
        ids: [N] token ids that are put into a cache; tokens that it keeps as they come count with the others.
    """
    return cache_nbytes(fill_cache(model, ids))["total"] / len(ids)


def token_bytes(model: Any) -> int:
    """Bytes of one more token's key and value in a kv head of the switched layers, coded, or as they are in a dense model."""
    _, kv_heads, head_dim = attention_shape(model)
    token = torch.zeros(1, kv_heads, 1, head_dim, dtype=model.dtype)
    coding = next((x.sfa for x in attention_layers(model) if isinstance(getattr(x, "sfa", None), LayerCoding)), None)
    nbytes = coding.coder.encode(token, token).nbytes if isinstance(coding, LayerCoding) else 2 * token.nbytes
    return nbytes // kv_heads


@torch.no_grad()
def blank_cache(model: Any, tokens: int) -> Any:
    """A cache of a model, dense or switched, that holds `tokens` keys and values of zero: as large as one that a text fills."""
    cache = SparseCache(model) if is_enabled(model) else Cache(layers=dense_cache_layers(model))
    _, kv_heads, head_dim = attention_shape(model)
    rows = torch.zeros(1, kv_heads, tokens, head_dim, dtype=model.dtype, device=model.device)
    for module in attention_layers(model):
        cache.update(rows, rows, module.layer_idx)
    return cache


@torch.no_grad()
def fill_cache(model: Any, ids: Tensor) -> Any:
    """The cache of a model, dense or switched, that holds the tokens `ids` [N]."""
    cache = SparseCache(model) if is_enabled(model) else None
    inputs = ids[None].to(model.device)
    return model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

"""Calibration of a model's basis: its queries and keys after RoPE, streamed into moments, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..basis import FeatureBasis, Moments
from ..checks import require

_NAME = "sfa_calibration"


@torch.no_grad()
def calibrate(
    model: Any, windows: Tensor, kind: str = "whitened", progress: Callable[[], None] = lambda: None
) -> FeatureBasis:
    """The basis [L, Hkv, D, D] of a dense model's attention layers, from text.

    Args:
        model: a causal language model of transformers that `enable` can switch.
        windows: [S, W] int64 token ids; a few thousand tokens suffice.
        kind: "whitened", "balanced", "pca" or "identity" (see `FeatureBasis.from_moments`).
        progress: called after each window.
    """
    moments: dict[int, Moments] = {}

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen = moments.setdefault(module.layer_idx, Moments(key.shape[1], key.shape[-1]))
        seen.update(query, key)
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(_NAME, record)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        for window in windows:
            model(input_ids=window[None].to(model.device), use_cache=False)
            progress()
    finally:
        model.set_attn_implementation(before)
    require(
        bool(moments),
        f"{type(model).__name__} called no attention function of transformers: it cannot be switched",
    )
    return FeatureBasis.stack([FeatureBasis.from_moments(moments[i], kind) for i in sorted(moments)])

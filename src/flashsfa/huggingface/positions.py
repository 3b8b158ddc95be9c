"""Positions in the dense channel alone: RoPE turns the features that are always kept and leaves the sparse ones free of
position, which costs the least quality (docs/explanation/cache.md).

This is for models that are trained so. GPT-2 drops its learned positions; Qwen3 turns the first pairs of a head in place of
all. In both the channel has the frequencies of a head of its own width.
"""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import torch
from torch import Tensor

from ..checks import require
from ..nn import rotate, rotation

FAMILIES = ("gpt2", "qwen3")
_THETA = 10000.0  # GPT-2's config has none


def require_channel(model: Any, dims: int, head_dim: int) -> None:
    """Raise `ValueError` if a model cannot have its positions in a channel of `dims` features."""
    family = model.config.model_type
    require(
        family in FAMILIES,
        f"positions='channel' is for GPT-2 and Qwen3 models that are trained with it, not for {family}: leave it out, and "
        "calibrate a basis for a checkpoint that turns whole heads by RoPE",
    )
    require(
        2 <= dims <= head_dim and dims % 2 == 0,
        f"positions='channel' turns the dense channel in pairs: dense_dims must be even, 2 to {head_dim}, got {dims}",
    )
    if family == "qwen3":
        rope = vars(model).get("_sfa_positions", model.config.rope_parameters)  # the model's own
        require(
            rope["rope_type"] == "default" or is_channel(rope, dims, head_dim),
            f"positions='channel' with dense_dims={dims} fits no model whose config has rope_parameters {rope}",
        )


def move_to_channel(model: Any, dims: int) -> int:
    """Turn `dims` features of each query and key alone, in place; `restore` undoes it.

    A Qwen3 model has this in its config, so transformers by itself loads what was saved; a model that was loaded so stays
    as it is.

    Returns:
        The features that `channel_first` must bring to the front: `dims` for Qwen3, 0 where they are there.
    """
    if model.config.model_type == "gpt2":
        model._sfa_positions = [
            model.base_model.wpe.register_forward_hook(_no_embedding),
            *(_LeadingRotation(block.attn, dims) for block in model.base_model.h),
        ]
        return 0
    config, base = model.config, model.base_model
    rope = config.rope_parameters
    if not is_channel(rope, dims, config.head_dim):
        moved, before = copy.deepcopy(config), base.rotary_emb
        moved.rope_parameters = _channel_rope(rope["rope_theta"], dims, config.head_dim)
        rotary_emb = type(before)(moved).to(before.inv_freq.device)
        rotary_emb.before = before  # follows the model from device to device
        model._sfa_positions, config.rope_parameters, base.rotary_emb = rope, dict(moved.rope_parameters), rotary_emb
    return dims


def restore(model: Any) -> None:
    """Undo `move_to_channel`; a model whose positions were not moved stays as it is."""
    before = vars(model).pop("_sfa_positions", None)
    if isinstance(before, list):
        for handle in before:
            handle.remove()
    elif before is not None:
        model.config.rope_parameters = before
        model.base_model.rotary_emb = model.base_model.rotary_emb.before


def channel_first(x: Tensor, dims: int) -> Tensor:
    """x [..., D] with the `dims` features of its first rotary pairs in front: pair i of RoPE is features i and i + D/2."""
    # first features of all pairs lie before the second ones
    turned, still = dims // 2, (x.shape[-1] - dims) // 2  # pairs
    front, rest, front_second, rest_second = x.split((turned, still, turned, still), dim=-1)
    return torch.cat((front, front_second, rest, rest_second), dim=-1)  # alone: of a step, each launch counts


def is_channel(rope: dict[str, Any], dims: int, head_dim: int) -> bool:
    """Whether a config's rotary fields are those of `_channel_rope`."""
    share = rope.get("partial_rotary_factor") or 1.0
    return rope["rope_type"] == "proportional" and math.isclose(share, dims / head_dim)


def _channel_rope(theta: float, dims: int, head_dim: int) -> dict[str, Any]:
    """transformers' "proportional" RoPE turns the first pairs of a head alone, by the frequencies that these pairs have in
    a head where all turn. A base raised to head_dim / dims spreads them over the whole range again."""
    share = math.nextafter(dims / head_dim, 2)  # of which transformers takes the whole pairs
    return {
        "rope_type": "proportional",
        "partial_rotary_factor": share,
        "rope_theta": float(theta) ** (head_dim / dims),
    }


def _no_embedding(wpe: Any, arguments: tuple[Tensor], embedded: Tensor) -> Tensor:
    """Learned positions that count as 0: a parameter without any gradient would stop distributed training."""
    return 0 * embedded


class _Call(threading.local):
    """What a call of a layer was given, by thread."""

    positions: Tensor  # [B or 1, N]

    def __reduce__(self) -> tuple[type[_Call], tuple[()]]:
        return _Call, ()


class _LeadingRotation:
    """Hooks of a GPT-2 attention layer: RoPE on the first `dims` features of a head.

    They follow `c_attn`, whichever module that is at a call: LoRA puts one of its own in its place and takes it away again, and what it adds
    is turned, too. Positions are those of the layer's call, which checkpointing repeats.
    """

    def __init__(self, attention: Any, dims: int) -> None:
        self._dims, self._head_dim, self._call = dims, attention.head_dim, _Call()
        self._hook_on(attention.c_attn)
        self._before_calls = attention.register_forward_pre_hook(self._begin, with_kwargs=True)

    def remove(self) -> None:
        self._before_calls.remove()
        self._handle.remove()

    def _begin(self, attention: Any, _: tuple, kwargs: dict[str, Any]) -> None:
        self._call.positions = kwargs["position_ids"]
        if attention.c_attn is not self._hooked:
            self._handle.remove()
            self._hook_on(attention.c_attn)

    def _hook_on(self, module: Any) -> None:
        self._hooked, self._handle = module, module.register_forward_hook(self._turn)

    def _turn(self, c_attn: Any, arguments: tuple, out: Tensor) -> Tensor:
        """Queries, keys and values [B, N, 3·H·D], the first two turned."""
        angles = rotation(self._call.positions, self._dims, _THETA)  # [B or 1, N, dims / 2] each
        cos, sin = (x[:, :, None] for x in angles)
        q, k, v = out.chunk(3, dim=-1)
        q, k = (rotate(x.unflatten(-1, (-1, self._head_dim)), cos, sin).flatten(-2) for x in (q, k))
        return torch.cat((q, k, v), dim=-1)

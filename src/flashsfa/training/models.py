"""Models from scratch: transformers' GPT-2 and Qwen3 of any size, with the attention that a recipe names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..checks import require, require_budget
from ..huggingface import enable
from ..huggingface.attention import LayerCoding
from ..huggingface.switch import attention_layers, attention_shape
from .attention import Core, DenseCore, SparseCore, Visible, channel_basis, install, uninstall
from .baselines import PerformerCore, QuantizedCore, factorise, multiply, shorten
from .recipe import Attention, Model

_CONTEXT_FIELD = {"gpt2": "n_positions", "qwen3": "max_position_embeddings"}
_NO_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "qwen3": {}}
_DENSE = "sdpa"


def build(model: Model, attention: Attention, context: int, vocab_size: int | None, seed: int) -> Any:
    """A model with random weights, drawn from `seed`, in float32, ready to be trained; `finish` makes it ready to be saved.

    Raises `ValueError` that names the key of the recipe if something does not fit.
    """
    config = _config(model, attention, context, vocab_size)
    torch.manual_seed(seed)
    try:
        built = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=_DENSE)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"model.config: {str(error).strip().partition(chr(10))[0]}") from error
    built.loss_type = "ForCausalLM"  # told by no name, GPT-2 would warn at each trace, which breaks compiled graphs
    layers, (_, kv_heads, head_dim) = attention_layers(built), attention_shape(built)
    channel = attention.dense_dims if attention.positions == "channel" else 0
    if attention.kind == "sfa":
        topk, topk_query, dense_dims = _budgets(attention, head_dim)
        basis = channel_basis(len(layers), kv_heads, head_dim, channel) if channel else None
        enable(built, topk, topk_query=topk_query, dense_dims=dense_dims, basis=basis)
    elif attention.kind == "short":
        shorten(built, _width(attention, head_dim, even=True))
    elif attention.kind == "low_rank":
        factorise(built, _width(attention, config.hidden_size))

    def core(index: int, module: nn.Module) -> Core:
        made: Core
        if attention.kind == "sfa":
            coding: LayerCoding = module.sfa  # type: ignore[assignment]
            made = SparseCore(coding, channel)
        elif attention.kind == "int8":
            made = QuantizedCore()
        elif attention.kind == "performer":
            made = PerformerCore(head_dim, attention.width or head_dim, seed + index)
        else:
            made = DenseCore()
        # Qwen3's config has a window of its own.
        wrap = attention.window is not None and model.architecture == "gpt2"
        return _Windowed(made, attention.window) if wrap else made  # type: ignore[arg-type]

    install(built, core)
    return built


def finish(model: Any, attention: Attention) -> None:
    """Make a trained model one that transformers saves and that computes its attention as transformers does."""
    uninstall(model, "sfa" if attention.kind == "sfa" else _DENSE)
    multiply(model)


def can_load(architecture: str, attention: Attention) -> bool:
    """Whether transformers or `flashsfa.from_pretrained` loads what was trained; nobody else knows some baselines."""
    return attention.kind not in ("int8", "performer") and not (architecture == "gpt2" and attention.window is not None)


class _Windowed(Core):
    """A core that sees the most recent tokens only, for models whose config knows no window."""

    def __init__(self, core: Core, window: int) -> None:
        super().__init__()
        self.core, self._window = core, window

    def forward(self, q: Any, k: Any, v: Any, visible: Visible) -> Any:
        return self.core(q, k, v, Visible(visible.scale, self._window, visible.bounds, visible.longest))


def _config(model: Model, attention: Attention, context: int, vocab_size: int | None) -> Any:
    """transformers' config of a recipe."""
    default, context_field = AutoConfig.for_model(model.architecture), _CONTEXT_FIELD[model.architecture]
    aliases = type(default).attribute_map
    known = {*default.to_dict(), *aliases}
    for key in model.config:
        require(key in known, f"model.config.{key}: {type(default).__name__} has no such field")
    require(
        not {context_field, "max_position_embeddings"} & model.config.keys(),
        "model.config: the positions are data.context; leave them out",
    )
    values = {**_NO_DROPOUT[model.architecture], **model.config, context_field: context}
    values = {aliases.get(key, key): value for key, value in values.items()}
    if vocab_size is not None:
        values.setdefault("vocab_size", vocab_size)
    require("vocab_size" in values, "model.config.vocab_size: missing, as the data names no tokenizer")
    # Token ids of a vocabulary that is not the default's mean nothing.
    values |= {key: values.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    positions = attention.positions or ("learned" if model.architecture == "gpt2" else "full")
    require(
        (positions == "learned") == (model.architecture == "gpt2"),
        f"attention.positions: {model.architecture} cannot have {positions} positions",
    )
    try:
        if model.architecture == "qwen3":
            values |= _rope(values, attention, getattr(AutoConfig.for_model("qwen3", **values), "head_dim", 0))
            if attention.window is not None:
                values |= {"use_sliding_window": True, "sliding_window": attention.window, "max_window_layers": 0}
        return AutoConfig.for_model(model.architecture, **values)
    except ValueError:
        raise
    except Exception as error:  # transformers checks types by an error class of its own
        raise ValueError(f"model.config: {' '.join(str(error).split())}") from error


def _rope(values: dict[str, Any], attention: Attention, head_dim: int) -> dict[str, Any]:
    """The rotary fields for positions in a channel, or in queries and keys that are short.

    transformers' "proportional" RoPE turns the first pairs of a head alone, by the frequencies that these pairs have in a
    head where all turn. A base raised to head_dim / dims spreads them over the whole range again.
    """
    dims = (
        attention.dense_dims
        if attention.positions == "channel"
        else attention.width
        if attention.kind == "short"
        else None
    )
    if dims is None:
        return {}
    require(
        2 <= dims <= head_dim and dims % 2 == 0,
        f"attention.{'width' if attention.kind == 'short' else 'dense_dims'}: rotary dimensions come in pairs: must be "
        f"even, 2 to head_dim {head_dim}, got {dims}",
    )
    theta = float((values.get("rope_parameters") or {}).get("rope_theta", 10000.0)) ** (head_dim / dims)
    return {
        "rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": dims / head_dim, "rope_theta": theta}
    }


def _budgets(attention: Attention, head_dim: int) -> tuple[int, int | None, int]:
    topk, topk_query, dense_dims = attention.topk or 0, attention.topk_query, attention.dense_dims
    try:
        require_budget(topk, head_dim, dense_dims)
        if topk_query not in (None, head_dim):
            require_budget(topk_query or 0, head_dim, dense_dims)
    except ValueError as error:
        raise ValueError(f"attention: {error}") from error
    return topk, topk_query, dense_dims


def _width(attention: Attention, most: int, even: bool = False) -> int:
    width = attention.width or 0
    require(
        1 <= width <= most and not (even and width % 2),
        f"attention.width: must be {'even, ' if even else ''}1 to {most}, got {width}",
    )
    return width

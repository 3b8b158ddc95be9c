"""Models from scratch: transformers' GPT-2 and Qwen3 of any size, with the attention that a recipe names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ..checks import require
from ..huggingface import enable
from ..huggingface.attention import LayerCoding
from ..huggingface.positions import channel_first, move_to_channel, require_channel
from ..huggingface.switch import attention_layers, attention_shape
from .attention import Core, DenseCore, EqualizedCore, SparseCore, Visible, install, uninstall
from .baselines import PerformerCore, QuantizedCore, factorise, multiply, scale_queries, shorten
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
    heads, _, head_dim = attention_shape(built)
    in_channel = attention.positions == "channel"
    try:
        if attention.kind == "sfa":
            enable(
                built, attention.topk or 0, topk_query=attention.topk_query, dense_dims=attention.dense_dims,
                layers=attention.layers, positions="channel" if in_channel else None, query_pattern=attention.query_pattern,
            )  # fmt: skip
        elif in_channel:
            require_channel(built, attention.dense_dims, head_dim)
            move_to_channel(built, attention.dense_dims)
    except ValueError as error:
        raise ValueError(f"attention: {error}") from error
    for module in attention_layers(built):
        scale_queries(module, _temperature(attention, module, head_dim))
    if attention.kind == "short":
        width = _width(attention, head_dim, even=True)
        shorten(built, width)
        if model.architecture == "qwen3":
            move_to_channel(built, width)
    elif attention.kind == "low_rank":
        factorise(built, _width(attention, config.hidden_size))

    def core(index: int, module: nn.Module) -> Core:
        made: Core
        if hasattr(module, "sfa"):
            coding: LayerCoding = module.sfa  # type: ignore[assignment]
            made = SparseCore(coding, attention.gradient)
        elif attention.kind == "int8":
            made = QuantizedCore()
        elif attention.kind == "performer":
            made = PerformerCore(head_dim, attention.width or head_dim, seed + index)
        else:
            made = DenseCore()
        if attention.equalize:
            made = EqualizedCore(made, heads, head_dim)
        # Qwen3's config has a window of its own.
        wrap = attention.window is not None and model.architecture == "gpt2"
        return _Windowed(made, attention.window) if wrap else made  # type: ignore[arg-type]

    install(built, core)
    return built


def finish(model: Any, attention: Attention) -> None:
    """Make a trained model one that transformers saves and that computes its attention as transformers does."""
    for layer in attention_layers(model):
        for part in layer.sfa_core.modules():  # type: ignore[union-attr]
            if isinstance(part, EqualizedCore):
                part.fold(layer)
    uninstall(model, "sfa" if attention.kind == "sfa" else _DENSE)
    multiply(model)


def can_load(architecture: str, attention: Attention) -> bool:
    """Whether transformers or `flashsfa.from_pretrained` loads what was trained; nobody else knows some baselines."""
    ours_alone = attention.window is not None or (attention.positions == "channel" and attention.kind != "sfa")
    return attention.kind not in ("int8", "performer") and not (architecture == "gpt2" and ours_alone)


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
        positions != ("full" if model.architecture == "gpt2" else "learned"),
        f"attention.positions: {model.architecture} cannot have {positions} positions",
    )
    require(
        not attention.equalize or positions == "learned",
        "attention.equalize: for GPT-2 with learned positions alone, whose projections can take it in",
    )
    require(
        attention.kind != "short" or positions != "channel",
        "attention.positions: short queries and keys have no channel; leave it out",
    )
    try:
        if model.architecture == "qwen3" and attention.window is not None:
            values |= {"use_sliding_window": True, "sliding_window": attention.window, "max_window_layers": 0}
        return AutoConfig.for_model(model.architecture, **values)
    except ValueError:
        raise
    except Exception as error:  # transformers checks types by an error class of its own
        raise ValueError(f"model.config: {' '.join(str(error).split())}") from error


def _temperature(attention: Attention, module: Any, head_dim: int) -> torch.Tensor:
    """What the features of a head's queries [D] are multiplied with at the start, in the model's order."""
    factor = torch.full((head_dim,), float(attention.temperature))
    if attention.sparse_temperature is None or not hasattr(module, "sfa"):
        return factor
    factor[attention.dense_dims :] = attention.sparse_temperature
    order = torch.arange(head_dim)
    if module.sfa.channel:
        order = channel_first(order, module.sfa.channel)
    return torch.empty(head_dim).scatter(0, order, factor)


def _width(attention: Attention, most: int, even: bool = False) -> int:
    width = attention.width or 0
    require(
        1 <= width <= most and not (even and width % 2),
        f"attention.width: must be {'even, ' if even else ''}1 to {most}, got {width}",
    )
    return width

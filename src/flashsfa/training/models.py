"""Models from scratch: transformers' GPT-2 and Qwen3 of any size, with the attention that a recipe names."""

from __future__ import annotations

import contextlib
import math
import os
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from ..basis import FeatureBasis
from ..checks import checked, require
from ..huggingface import enable
from ..huggingface.attention import LayerCoding
from ..huggingface.positions import channel_first, move_to_channel, require_channel
from ..huggingface.switch import attention_layers, attention_shape
from .attention import (
    Core,
    DenseCore,
    EqualizedCore,
    FittedBasis,
    ScaledCore,
    SparseCore,
    TrainedBasis,
    Visible,
    install,
    scale_queries,
    uninstall,
    uninstall_sparse,
)
from .baselines import PerformerCore, QuantizedCore, factorise, multiply, shorten
from .recipe import Attention, Model

_CONTEXT_FIELD = {"gpt2": "n_positions", "qwen3": "max_position_embeddings"}
_NO_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "qwen3": {}}
_DENSE = "sdpa"
# Fields of the configs that mean nothing here, or ask for another attention than the recipe does.
_NO_FIELDS = ("use_cache", "add_cross_attention", "reorder_and_upcast_attn", "scale_attn_weights")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_MAY_BE_ZERO = ("max_window_layers", *_TOKEN_IDS)
_MOST_LAYERS = 4096  # a model of a billion would be built for days before its memory is known
_TRIED_TOKENS = 8


def build(model: Model, attention: Attention, context: int, vocab_size: int | None, seed: int) -> Any:
    """A model with random weights, drawn from `seed`, in float32, ready to be trained; `finish` makes it ready to be saved.

    Raises `ValueError` that names the key of the recipe if something does not fit.
    """
    config = _config(model, attention, context, vocab_size)
    _require_room(_instance(config, "meta"))
    torch.manual_seed(seed)
    built = _instance(config, None)
    built.loss_type = "ForCausalLM"  # told by no name, GPT-2 would warn at each trace, which breaks compiled graphs
    heads, kv_heads, head_dim = attention_shape(built)
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
            basis: TrainedBasis | FittedBasis | None = None
            if attention.train_basis:
                basis = TrainedBasis(FeatureBasis.identity(kv_heads, head_dim), head_dim**-0.5)
            elif attention.dense_share:
                basis = FittedBasis(kv_heads, head_dim, attention.topk)
            made = SparseCore(coding, attention.gradient, basis)
        elif attention.kind == "int8":
            made = QuantizedCore()
        elif attention.kind == "performer":
            made = PerformerCore(head_dim, attention.width or head_dim, seed + index)
        else:
            made = DenseCore()
        if attention.score_scale != 1:
            made = ScaledCore(made, attention.score_scale)
        if attention.equalize:
            made = EqualizedCore(made, heads, head_dim)
        # Qwen3's config has a window of its own.
        wrap = attention.window is not None and model.architecture == "gpt2"
        return _Windowed(made, attention.window) if wrap else made  # type: ignore[arg-type]

    install(built, core)
    _try(built, context)
    return built


def finish(model: Any, attention: Attention) -> None:
    """Make a trained model one that transformers saves and that computes its attention as transformers does."""
    for layer in attention_layers(model):
        for part in layer.sfa_core.modules():  # type: ignore[union-attr]
            if isinstance(part, (EqualizedCore, ScaledCore)):
                part.fold(layer)
    if attention.kind == "sfa":
        uninstall_sparse(model)
    else:
        uninstall(model, _DENSE)
    multiply(model)


def why_not_kept(architecture: str, attention: Attention) -> str | None:
    """What of a recipe neither transformers nor `flashsfa.from_pretrained` would load again, so that no model is written; None for all
    others."""
    if attention.kind in ("int8", "performer"):
        return f"attention.kind {attention.kind}"
    if architecture == "gpt2" and attention.window is not None:
        return "attention.window of a GPT-2"
    if architecture == "gpt2" and attention.positions == "channel" and attention.kind != "sfa":
        return f"attention.positions channel of a GPT-2 of kind {attention.kind}"
    return None


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
    fields = {name for name in type(default).__annotations__ if name not in _NO_FIELDS and "summary" not in name}
    for key, value in model.config.items():
        require(
            aliases.get(key, key) in fields, f"model.config.{key}: {type(default).__name__} has no such field to set"
        )
        _check_field(f"model.config.{key}", aliases.get(key, key), value)
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
    values |= {key: values.get(key) for key in _TOKEN_IDS}
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
        config = AutoConfig.for_model(model.architecture, **values)
    except Exception as error:  # transformers checks types by an error class of its own
        raise ValueError(f"model.config: {_reason(error)}") from error
    for key in _TOKEN_IDS:
        ids = getattr(config, key)
        past = [id for id in (ids if isinstance(ids, list) else [ids or 0]) if id >= config.vocab_size]
        require(not past, f"model.config.{key}: {past} lies past the vocabulary of {config.vocab_size}")
    return config


def _check_field(key: str, name: str, value: Any) -> None:
    """Raise `ValueError` if a field of a config has a value that no model has. Types are checked by transformers."""
    if name in ("activation_function", "hidden_act"):
        known = sorted(ACT2FN)
        require(isinstance(value, str) and value in known, f"{key}: must be one of {', '.join(known)}; got {value!r}")
    is_dropout = name.endswith(("pdrop", "dropout"))
    require(
        name not in ("attn_pdrop", "attention_dropout") or value == 0,
        f"{key}: attention drops no weights; leave it out",
    )
    most = 1 if is_dropout else _MOST_LAYERS if name in ("n_layer", "num_hidden_layers") else 2**62
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, (int, float)) and not isinstance(number, bool):
            least = 0 if is_dropout or isinstance(number, float) or name in _MAY_BE_ZERO else 1
            require(least <= number <= most, f"{key}: must be {least} to {most}, got {number}")


def _instance(config: Any, device: str | None) -> Any:
    """A model of `config` in float32, with random weights."""
    try:
        with contextlib.nullcontext() if device is None else torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=_DENSE)
    except Exception as error:  # transformers looks at few fields before it uses them
        raise ValueError(f"model.config: {_reason(error)}") from error


def _require_room(model: Any) -> None:
    """Raise `ValueError` if this machine cannot hold the weights of `model`, which may be on the meta device."""
    count = sum(p.numel() for p in model.parameters())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    require(
        4 * count <= memory,
        f"model.config: {count} parameters take {4 * count / 2**30:.0f} GiB in float32, more than this machine's memory",
    )


@torch.no_grad()
def _try(model: Any, context: int) -> None:
    """Run `model` on a few tokens: whatever its config and its attention do not fit shows before a run begins."""
    ids = torch.zeros(1, min(context, _TRIED_TOKENS), dtype=torch.long, device=model.device)
    try:
        with checked():
            logits = model.eval()(ids, use_cache=False).logits
    except Exception as error:
        raise ValueError(f"model.config: a model like this cannot be run: {_reason(error)}") from error
    require(bool(logits.isfinite().all()), "model.config: a model like this gives scores that are no numbers")
    model.train()


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, (ValueError, StrictDataclassError)) else f"{type(error).__name__}: {text}"


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

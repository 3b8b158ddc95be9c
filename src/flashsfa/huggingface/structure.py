"""What a model of transformers is made of, and whether Sparse Feature Attention can take the place of its attention."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import AttentionMaskInterface, create_chunked_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..checks import require

# Where torch.compile, PEFT, DistributedDataParallel, FSDP and TRL keep the model that they wrap.
_WRAPPED = ("_orig_mod", "base_model", "model", "module", "_fsdp_wrapped_module", "pretrained_model")
_ATTENTION_DROPOUT = ("attention_dropout", "attn_dropout", "dropout", "dropout_p", "dropout_prob", "attn_drop")
# Cache layers of transformers that hold the keys and values of one attention and nothing else. Others, also those that derive
# from them, hold more (a state, an index) or less (the keys of another layer).
DENSE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def unwrap(model: Any) -> Any:
    """The model of transformers inside the wrappers of torch.compile, PEFT and distributed training: the one that generates."""
    while isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel):
        inner = [model._modules[name] for name in _WRAPPED if model._modules.get(name) is not None]
        if not inner:
            break
        model = inner[0]
    return model


def text_part(model: Any) -> Any:
    """The part of a model that generates text: the model itself, or what is in it beside a vision tower and its like."""
    model = unwrap(model)
    config = text_config(model)
    if config is model.config:
        return model
    return next((x for x in model.modules() if isinstance(x, PreTrainedModel) and x.config is config), model)


def attention_of(model: Any) -> str:
    """The name of the attention implementation of the part that generates."""
    return str(text_config(model)._attn_implementation)


def own_config(model: Any) -> None:
    """Give a model a config of its own, it and its parts and whatever wraps it: models that were made of one config would be switched
    together."""
    copies: dict[int, Any] = {}
    copy.deepcopy(unwrap(model).config, copies)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, PreTrainedConfig) and id(value) in copies:
                setattr(module, name, copies[id(value)])


def set_attention(model: Any, name: str) -> None:
    """Change the attention implementation of the part that generates; a vision tower keeps its own."""
    text_part(model).set_attn_implementation(name)
    # What generate() compiled has the other attention; and in a copy of a model it is that of the original.
    vars(unwrap(model)).pop("_compiled_call", None)


@contextmanager
def attending_by(model: Any, name: str, function: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[None]:
    """Within this context `function` is the attention of the part that generates, and `mask` makes its masks; `name` is theirs alone."""
    # Where models look first, and only for now: kvpress puts wrappers there of all functions that it finds when it is imported,
    # and a function registered for good would be hidden behind the wrapper of an earlier one.
    ALL_ATTENTION_FUNCTIONS[name] = function
    AttentionMaskInterface.register(name, mask)
    before = attention_of(model)
    try:
        set_attention(model, name)
        yield
    finally:
        set_attention(model, before)
        del ALL_ATTENTION_FUNCTIONS[name]


def attention_layers(model: Any) -> list[nn.Module]:
    """The self-attention modules of the part that generates, in the order of their layers. `layer_idx` of each is the layer of the model that it is in:
    some models have attention in a few of their layers."""
    model = unwrap(model)
    require(isinstance(model, nn.Module), f"enable switches a transformers model, got {type(model).__name__}")
    config = getattr(model, "config", None)
    require(
        not getattr(config, "is_encoder_decoder", False) and not getattr(config, "add_cross_attention", False),
        f"{type(model).__name__} has cross-attention, which sfa does not replace: encoder-decoders cannot be switched",
    )
    part = text_part(model) if isinstance(model, PreTrainedModel) else model
    found = [module for module in part.modules() if hasattr(module, "layer_idx") and hasattr(module, "scaling")]
    indices = [module.layer_idx for module in found]
    require(
        all(isinstance(index, int) and index >= 0 for index in indices),
        f"{type(model).__name__} has attention modules whose layer_idx is not their own layer's: {indices}",
    )
    require(
        len(set(indices)) == len(indices),
        f"{type(model).__name__} has several attention modules in a layer, as models with cross-attention have, and cannot be switched: "
        f"their layer_idx are {shortened(indices)}",
    )
    return sorted(found, key=lambda module: module.layer_idx)


def attention_shape(model: Any) -> tuple[int, int, int]:
    """Query heads, kv heads and head_dim of a model's attention, from its config."""
    config = text_config(model)
    heads = config.num_attention_heads
    kv_heads = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def default_dense_dims(model: Any) -> int:
    """Rotary dimensions of a model that rotates the first part of each head only; 0 if it rotates all or nothing."""
    _, _, head_dim = attention_shape(model)
    rope = getattr(text_config(model), "rope_parameters", None) or {}
    if rope.get("rope_type") == "proportional":  # its rotated features are not the first ones
        return 0
    factor = rope.get("partial_rotary_factor") or 1.0
    rotary_dims = int(head_dim * factor)
    return rotary_dims if rotary_dims < head_dim else 0


def default_shared_kind(model: Any) -> str:
    """The basis in which bits of a key are shared out over its axes, where none is named: "scaled", which goes with RoPE, for a model that
    turns keys by it, as its config says, else "whitened" (docs/results.md, "125M parameters")."""
    is_turned = any(name.startswith("rope") and value for name, value in text_config(model).to_dict().items())
    return "scaled" if is_turned else "whitened"


def text_config(model: Any) -> Any:
    """The config of the part of a model that generates."""
    return unwrap(model).config.get_text_config(decoder=True)


def most_positions(model: Any) -> int | None:
    """Tokens that a model was made for; None where its config does not say."""
    return getattr(text_config(model), "max_position_embeddings", None)


def dense_cache_layers(model: Any) -> list[Any]:
    """The layers that transformers itself would cache in."""
    return DynamicCache(config=text_config(model)).layers


def tensor_device(module: nn.Module) -> torch.device:
    """Where a module computes: the device of its tensors, which for quantised layers are all buffers. The CPU for tensors that
    are offloaded."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            return tensor.device
    return torch.device("cpu")


def attention_dropout(module: nn.Module) -> tuple[str, float]:
    """The share of attention weights that a module drops in training, and the name under which it holds that share: modules
    copy it from the config when they are made."""
    for name in _ATTENTION_DROPOUT:
        held = getattr(module, name, None)
        if isinstance(held, nn.Dropout):
            return f"{name}.p", held.p
        if isinstance(held, (int, float)):
            return name, float(held)
    return "", 0.0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, no part of `model` is in training mode: what is measured with dropout is noise."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def require_no_dropout(module: nn.Module, share: float) -> None:
    """Raise `ValueError`, with the way out, if `module` drops a share of its attention weights."""
    if not share:
        return
    kind, (name, _) = type(module).__name__, attention_dropout(module)
    raise ValueError(
        f"sfa does not drop attention weights, and in training mode this model drops {share:g} of them: call model.eval(), or set "
        + (f"{name} = 0.0 on each {kind}" if name else f"the attention dropout of each {kind} to 0")
        + ", for a model that is made no longer looks at its config"
    )


def require_whole(model: Any) -> None:
    """Raise `ValueError` with the reason if not all attention of a model can be replaced."""
    modules: list[Any] = attention_layers(model)
    require_switchable(unwrap(model), modules)
    require_whole_context(model, [module.layer_idx for module in modules])


def require_switchable(model: Any, modules: list[nn.Module]) -> None:
    """Raise `ValueError` with the reason if the attention of a model of this kind cannot be replaced."""
    name = type(model).__name__
    require(
        isinstance(model, PreTrainedModel) and hasattr(model, "config"),
        f"{name} is no transformers model: it has no config",
    )
    require(
        model.base_model is not model or model.can_generate(),
        f"{name} is the inside of a model: enable the whole one, whose forward or generate you call",
    )
    config, part = text_config(model), text_part(model)
    require(
        config is part.config,
        f"{name} has more than one part, and none of its modules is known for the one that generates text: enable that one, whose "
        "generate you call",
    )
    require(
        not getattr(config, "kv_lora_rank", None),
        f"{name} uses latent attention (MLA), which sfa does not replace",
    )
    require(
        bool(modules) and part._can_set_attn_implementation(),
        f"{name} does not route its attention through transformers' AttentionInterface, so it cannot be switched",
    )
    require(
        "chunked_attention" not in (getattr(config, "layer_types", None) or []) or _tells_chunks(),
        f"{name} has chunked attention, which this version of transformers does not tell from a sliding window: upgrade it",
    )
    require(not getattr(config, "num_kv_shared_layers", None), f"{name} shares keys between layers: not yet supported")
    try:
        heads, kv_heads, head_dim = attention_shape(model)
    except (AttributeError, RuntimeError) as error:  # transformers' answer for what differs from layer to layer
        raise ValueError(f"{name} has no single head size for all layers: not yet supported") from error
    require(head_dim <= 256, f"{name} has head_dim {head_dim}; indices are uint8, so at most 256")
    _require_plain_cache(name, model, modules)
    for module in modules:
        _require_plain_attention(name, module, heads // kv_heads)
    _require_windows(name, model, modules)


def require_whole_context(model: Any, layers: Iterable[int]) -> None:
    """Raise `ValueError` if `layers` of a model see chunks of the context: other layers can be switched beside them."""
    kinds, chunked = getattr(text_config(model), "layer_types", None) or [], _chunked(model, layers)
    others = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    require(
        not chunked,
        lambda: (
            f"{type(unwrap(model)).__name__} has chunked attention in layers {shortened(chunked)}, which sfa does not replace"
            + (f": leave them dense with enable(layers={shortened(others)})" if others else "")
        ),
    )


def _chunked(model: Any, layers: Iterable[int]) -> list[int]:
    """Those of `layers` that attend in chunks."""
    kinds = getattr(text_config(model), "layer_types", None) or []
    return [index for index in layers if index < len(kinds) and kinds[index] == "chunked_attention"]


def shortened(numbers: Sequence[int]) -> str:
    """A list of layers for a message."""
    return str([*numbers]) if len(numbers) <= 8 else f"[{', '.join(map(str, numbers[:6]))}, ... {numbers[-1]}]"


def _require_plain_attention(name: str, module: Any, group: int) -> None:
    """A module's attention is causal, and a softmax over scores that nothing else shapes."""
    require(
        getattr(module, "is_causal", None) is True,
        f"{name} has attention that is not causal, or masks keys in a way of its own, which sfa does not replace",
    )
    require(
        not getattr(module, "attn_logit_softcapping", None) or _hands_over(module, "softcap"),
        f"{name} caps its scores (softcap) by itself, out of sight of an attention function",
    )
    require(
        getattr(module, "sinks", None) is None or _hands_over(module, "s_aux"),
        f"{name} has attention sinks that it does not hand to an attention function",
    )
    require(
        getattr(module, "indexer", None) is None, f"{name} chooses its keys by an index, which sfa does not replace"
    )
    require(
        getattr(module, "num_key_value_groups", group) == group,
        f"{name} shares key heads between query heads in a way of its own, which sfa does not replace",
    )
    if module.training:
        require_no_dropout(module, attention_dropout(module)[1])


def _require_windows(name: str, model: Any, modules: list[Any]) -> None:
    """Windows that hide keys are handed to the attention function, which gets no mask for them. Chunks are another matter."""
    caching, chunked = dense_cache_layers(model), _chunked(model, (module.layer_idx for module in modules))
    longest = most_positions(model) or math.inf
    for module in modules:
        window = getattr(caching[module.layer_idx], "sliding_window", None)
        hides = window is not None and window < longest and module.layer_idx not in chunked
        require(
            not hides or _hands_over(module, "sliding_window"),
            f"{name} masks keys by a sliding window that it does not hand to an attention function",
        )


def _hands_over(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward passes `argument` on to the attention function: a model that shapes its scores elsewhere would be
    silently wrong."""
    try:
        return f"{argument}=" in inspect.getsource(type(module).forward)
    except (OSError, TypeError):  # no source at hand
        return False


def _tells_chunks() -> bool:
    """Whether transformers hands the config to whoever makes the mask of layers that attend in chunks."""
    return "config=config" in inspect.getsource(create_chunked_causal_mask)


def _require_plain_cache(name: str, model: Any, modules: list[nn.Module]) -> None:
    """The attention layers of a model cache keys and values and nothing else, each in a cache layer of its own."""
    require(
        not model.can_generate() or model._supports_default_dynamic_cache(),
        f"{name} keeps a cache of its own, which sfa does not replace",
    )
    caching: dict[int, Any] = {
        index: layer for index, layer in enumerate(dense_cache_layers(model)) if isinstance(layer, CacheLayerMixin)
    }
    odd = sorted({type(layer).__name__ for layer in caching.values() if type(layer) not in DENSE_LAYERS})
    require(not odd, f"{name} has layers that cache more than the keys and values of attention ({', '.join(odd)})")
    own = [module.layer_idx for module in modules]
    require(
        own == list(caching),
        f"{name} has attention in layers {own}, and caches keys and values in layers {list(caching)}: one of each is needed",
    )

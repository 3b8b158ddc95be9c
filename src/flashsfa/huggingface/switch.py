"""`enable`, `disable`, `from_pretrained`: a dense checkpoint's attention becomes sparse, in place and back."""

from __future__ import annotations

import types
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..basis import FeatureBasis
from ..checks import require, require_budget
from .attention import NAME, LayerCoding, register
from .cache import SparseCache

BASIS_FILE = "sfa_basis.safetensors"
_METHODS = ("_prepare_cache_for_generation", "save_pretrained")


@dataclass(frozen=True)
class SFASettings:
    """What `enable` was told; stored as `config.sfa` and so in config.json. Fields as `enable`'s arguments."""

    topk: int
    topk_query: int | None = None
    dense_dims: int = 0
    layers: list[int] | None = None
    value_tolerance: float = 0.0


def enable(
    model: Any,
    topk: int,
    *,
    topk_query: int | None = None,
    dense_dims: int = 0,
    basis: FeatureBasis | None = None,
    layers: list[int] | None = None,
    value_tolerance: float = 0.0,
) -> Any:
    """Switch a transformers causal language model to Sparse Feature Attention, in place.

    The model then generates with a cache of codes, without being asked, and `save_pretrained` keeps settings and
    basis. Switching again replaces the settings. `disable` undoes it.

    Args:
        model: a model whose attention goes through transformers' AttentionInterface (GPT-2, Llama, Qwen3 ...).
        topk, topk_query, dense_dims: budgets, as in `sparse_feature_attention`.
        basis: [L, Hkv, D, D] coordinates from `calibrate`; None for the model's own.
        layers: indices of the layers to switch; None for all.
        value_tolerance: as in `sparse_feature_decode`.

    Returns:
        model.

    Raises `ValueError`, with the model unchanged, if it cannot be switched; the message names the reason.
    """
    settings = SFASettings(topk, topk_query, dense_dims, None if layers is None else sorted(layers), value_tolerance)
    modules = _attention_layers(model)
    _check(model, modules, settings, basis)
    if is_enabled(model):
        disable(model)
    register()
    for index in range(len(modules)) if layers is None else layers:
        layer_basis = None if basis is None else basis[index]
        coding = LayerCoding(topk, topk_query, dense_dims, value_tolerance, layer_basis)
        parameter = next(modules[index].parameters())
        modules[index].sfa = coding.to(parameter.device)
    model._sfa_dense_attention = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    model.config.sfa = asdict(settings)
    _extend(model, basis)
    return model


def disable(model: Any) -> Any:
    """Undo `enable`: the model computes again exactly what it did before. A model that is not switched stays as is."""
    if not is_enabled(model):
        return model
    for module in model.modules():
        if isinstance(getattr(module, "sfa", None), LayerCoding):
            del module.sfa
    model.set_attn_implementation(model._sfa_dense_attention)
    del model._sfa_dense_attention, model.config.sfa
    for name in _METHODS:
        delattr(model, name)
    return model


def is_enabled(model: Any) -> bool:
    """Whether `enable` switched this model."""
    return hasattr(model, "_sfa_dense_attention")


def from_pretrained(path: str | Path, **kwargs: Any) -> Any:
    """Load a model that was saved while switched, with its settings and basis. `kwargs` go to transformers.

    Raises `ValueError` if `path` holds no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no model: config.json is missing")
    stored = getattr(AutoConfig.from_pretrained(path), "sfa", None)
    if stored is None:
        raise ValueError(f"{path} holds a dense model; load it with transformers and call flashsfa.enable")
    basis = FeatureBasis.load(path / BASIS_FILE) if (path / BASIS_FILE).is_file() else None
    model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    return enable(model, basis=basis, **stored)


def attention_shape(model: Any) -> tuple[int, int, int]:
    """Query heads, kv heads and head_dim of a model's attention, from its config."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _attention_layers(model: Any) -> list[nn.Module]:
    """The self-attention modules by layer index."""
    found = {m.layer_idx: m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")}
    return [found[i] for i in sorted(found)]


def _check(model: Any, modules: list[nn.Module], settings: SFASettings, basis: FeatureBasis | None) -> None:
    """Raise `ValueError` with the reason if the model cannot be switched."""
    name = type(model).__name__
    require(hasattr(model, "config"), f"{name} is no transformers model: it has no config")
    config = model.config.get_text_config(decoder=True)
    require(
        not getattr(config, "kv_lora_rank", None),
        f"{name} uses latent attention (MLA), which sfa does not replace",
    )
    require(
        bool(modules) and model._can_set_attn_implementation(),
        f"{name} does not route its attention through transformers' AttentionInterface, so it cannot be switched",
    )
    require(
        not getattr(config, "is_encoder_decoder", False) and not getattr(config, "add_cross_attention", False),
        f"{name} has cross-attention, which sfa does not replace",
    )
    for module in modules:
        require(
            not getattr(module, "attn_logit_softcapping", None),
            f"{name} caps its scores (softcap): not yet supported",
        )
        require(getattr(module, "sinks", None) is None, f"{name} has attention sinks: not yet supported")
    _, kv_heads, head_dim = attention_shape(model)
    require(head_dim <= 256, f"{name} has head_dim {head_dim}; indices are uint8, so at most 256")
    require_budget(settings.topk, head_dim, settings.dense_dims)
    if settings.topk_query not in (None, head_dim):
        require_budget(settings.topk_query, head_dim, settings.dense_dims)
    require(
        0 <= settings.value_tolerance < 1,
        f"value_tolerance must be in [0, 1), got {settings.value_tolerance}",
    )
    require(
        settings.layers is None or 0 < len(settings.layers) == len(set(settings.layers)),
        f"layers must name each layer to switch once, got {settings.layers}; leave it None for all",
    )
    unknown = [i for i in settings.layers or [] if not 0 <= i < len(modules)]
    require(not unknown, f"layers {unknown} do not exist: {name} has layers 0 to {len(modules) - 1}")
    if basis is not None:
        expected = (len(modules), kv_heads, head_dim, head_dim)
        require(
            tuple(basis.query.shape) == tuple(basis.key.shape) == expected,
            f"the basis is {tuple(basis.query.shape)} but {name} needs [L, Hkv, D, D] = {expected}; calibrate on this model",
        )


def _extend(model: Any, basis: FeatureBasis | None) -> None:
    """On this instance: generate() makes a SparseCache, save_pretrained() writes the basis too."""
    prepare, save = model._prepare_cache_for_generation, model.save_pretrained

    def prepare_cache(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        implementation = generation_config.cache_implementation
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            require(
                implementation in (None, "dynamic"),
                f"cache_implementation={implementation!r} holds dense keys; leave it None for the cache of codes",
            )
            model_kwargs["past_key_values"] = SparseCache(self)
            generation_config.cache_implementation = None
        return prepare(generation_config, model_kwargs, *args, **kwargs)

    def save_with_basis(self: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        save(save_directory, *args, **kwargs)
        if basis is not None:
            basis.save(Path(save_directory) / BASIS_FILE)

    model._prepare_cache_for_generation = types.MethodType(prepare_cache, model)
    model.save_pretrained = types.MethodType(save_with_basis, model)

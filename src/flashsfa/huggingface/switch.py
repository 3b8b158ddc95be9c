"""`enable`, `disable`, `from_pretrained`: a dense checkpoint's attention becomes sparse, in place and back."""

from __future__ import annotations

import functools
import types
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..basis import FeatureBasis
from ..checks import query_budget, require, require_budget
from .attention import NAME, LayerCoding, register
from .cache import SparseCache, StaticSparseCache
from .positions import move_to_channel, require_channel, restore

# In a folder, for some programs load every *.safetensors file beside config.json as weights.
BASIS_FILE = "sfa/basis.safetensors"
TESTED_VERSIONS = ((5, 17), (5, 23))  # of transformers: the suite ran on 5.17, 5.20 and 5.23
_METHODS = ("_prepare_cache_for_generation", "save_pretrained", "_get_files_timestamps")


@dataclass(frozen=True)
class SFASettings:
    """What `enable` was told; stored as `config.sfa` and so in config.json. Fields as `enable`'s arguments, and whether
    a basis belongs to them, which a saved model keeps in `BASIS_FILE`."""

    topk: int
    topk_query: int | None = None
    dense_dims: int = 0
    layers: list[int] | None = None
    value_tolerance: float = 0.0
    has_basis: bool = False
    positions: str | None = None
    cache_dtype: str | None = None
    query_pattern: str | None = None

    def arguments(self) -> dict[str, Any]:
        """What `enable` takes for them, the basis apart."""
        return {name: value for name, value in asdict(self).items() if name != "has_basis"}


def enable(
    model: Any,
    topk: int,
    *,
    topk_query: int | None = None,
    dense_dims: int | None = None,
    basis: FeatureBasis | None = None,
    layers: list[int] | None = None,
    value_tolerance: float = 0.0,
    positions: str | None = None,
    cache_dtype: str | None = None,
    query_pattern: str | None = None,
) -> Any:
    """Switch a transformers causal language model to Sparse Feature Attention, in place.

    The model then generates with a cache of codes, without being asked, and `save_pretrained` keeps settings and
    basis. `generate` takes cache_implementation "dynamic" (its default), "static" and "offloaded", and
    prefill_chunk_size. Switching again replaces the settings. `disable` undoes it.

    Args:
        model: a model whose attention goes through transformers' AttentionInterface (GPT-2, Llama, Qwen3 ...).
        topk, topk_query: budgets, as in `sparse_feature_attention`.
        dense_dims: as in `sparse_feature_attention`; None for `default_dense_dims`, the part of a head that carries
            positions in a model with partial rotary embeddings (GPT-NeoX, Phi, StableLM, GLM-4), 0 in others.
        basis: [L, Hkv, D, D] coordinates from `calibrate`, for these budgets: its gain, and a dictionary, fit no others;
            None for the model's own.
        layers: indices of the layers to switch; None for all.
        value_tolerance: as in `sparse_feature_decode`.
        positions: "channel" turns the dense channel alone by RoPE and leaves the sparse features free of position: for
            GPT-2 (whose learned positions are dropped) and Qwen3 models that are trained so. None for the model's own.
        cache_dtype: "int8" keeps the codes and values of the switched layers' dynamic and offloaded caches in 8 bits with
            a float32 scale a row: a key costs M + 2·K + 4 bytes (M dense dims, K kept features), a value Dv + 4. A
            prompt attends to the rounded ones too; calls without such a cache round nothing, and static caches are refused.
            None keeps them in the dtype that they come in.
        query_pattern: as in `sparse_feature_attention`, for prompts on Hopper's sparse tensor cores; for models that are trained
            with it, in others it costs quality (docs/explanation/prefill.md).

    Returns:
        model.

    Raises `ValueError`, with the model unchanged, if it cannot be switched; the message names the reason.
    """
    modules = attention_layers(model)
    _check_model(model, modules)
    dense_dims = default_dense_dims(model) if dense_dims is None else dense_dims
    layers = None if layers is None else sorted(layers)
    settings = SFASettings(
        topk, topk_query, dense_dims, layers, value_tolerance, basis is not None, positions, cache_dtype, query_pattern
    )
    _check_settings(model, modules, settings, basis)
    _warn_of_untested_version()
    register()
    disable(model)
    try:
        model._sfa_dense_attention = model.config._attn_implementation
        channel = 0 if positions is None else move_to_channel(model, dense_dims)
        kept_dtype = None if cache_dtype is None else getattr(torch, cache_dtype)
        for index in range(len(modules)) if layers is None else layers:
            layer_basis = None if basis is None else basis[index]
            coding = LayerCoding(
                topk, topk_query, dense_dims, value_tolerance, layer_basis, channel, cache_dtype=kept_dtype,
                query_pattern=query_pattern,
            )  # fmt: skip
            modules[index].sfa = coding.to(next(modules[index].parameters()).device)
        model.set_attn_implementation(NAME)
        model.config.sfa = asdict(settings)
        _extend(model, basis)
    except BaseException:
        disable(model)
        raise
    return model


def disable(model: Any) -> Any:
    """Undo `enable`: the model computes again exactly what it did before. A model that is not switched stays as is."""
    if not is_enabled(model):
        return model
    for module in model.modules():
        if isinstance(getattr(module, "sfa", None), LayerCoding):
            del module.sfa
    model.set_attn_implementation(model._sfa_dense_attention)
    restore(model)
    if hasattr(model, "_sfa_hook"):
        model._sfa_hook.remove()
    for owner, name in ((model.config, "sfa"), *((model, x) for x in ("_sfa_dense_attention", "_sfa_hook", *_METHODS))):
        vars(owner).pop(name, None)
    return model


def is_enabled(model: Any) -> bool:
    """Whether `enable` switched this model."""
    return hasattr(model, "_sfa_dense_attention")


def from_pretrained(path: str | Path, **kwargs: Any) -> Any:
    """Load a model that was saved while switched, with its settings and basis. `kwargs` go to transformers.

    Raises `ValueError` if `path` holds no such model, or not all of it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(path)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no model: config.json is missing")
    stored = getattr(AutoConfig.from_pretrained(path), "sfa", None)
    if stored is None:
        raise ValueError(f"{path} holds a dense model; load it with transformers and call flashsfa.enable")
    settings = SFASettings(**stored)
    if settings.has_basis and not (path / BASIS_FILE).is_file():
        raise ValueError(
            f"{path} names a basis, but {BASIS_FILE} is missing: it was saved without flashsfa, or is incomplete"
        )
    basis = FeatureBasis.load(path / BASIS_FILE) if settings.has_basis else None
    model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
    return enable(model, basis=basis, **settings.arguments())


def attention_shape(model: Any) -> tuple[int, int, int]:
    """Query heads, kv heads and head_dim of a model's attention, from its config."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def default_dense_dims(model: Any) -> int:
    """Rotary dimensions of a model that rotates the first part of each head only; 0 if it rotates all or nothing."""
    config = model.config.get_text_config(decoder=True)
    _, _, head_dim = attention_shape(model)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "proportional":  # its rotated features are not the first ones
        return 0
    factor = rope.get("partial_rotary_factor") or 1.0
    rotary_dims = int(head_dim * factor)
    return rotary_dims if rotary_dims < head_dim else 0


def attention_layers(model: Any) -> list[nn.Module]:
    """The self-attention modules by layer index."""
    require(isinstance(model, nn.Module), f"enable switches a transformers model, got {type(model).__name__}")
    found = {m.layer_idx: m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")}
    return [found[i] for i in sorted(found)]


def _check_model(model: Any, modules: list[nn.Module]) -> None:
    """Raise `ValueError` with the reason if a model of this kind cannot be switched."""
    name = type(model).__name__
    require(hasattr(model, "config"), f"{name} is no transformers model: it has no config")
    config = model.config.get_text_config(decoder=True)
    require(config is model.config, f"{name} has more than one part (text beside images, say): not yet supported")
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
    require(not getattr(config, "attention_chunk_size", None), f"{name} has chunked attention: not yet supported")
    require(not getattr(config, "num_kv_shared_layers", None), f"{name} shares keys between layers: not yet supported")
    for module in modules:
        require(
            not getattr(module, "attn_logit_softcapping", None),
            f"{name} caps its scores (softcap): not yet supported",
        )
        require(getattr(module, "sinks", None) is None, f"{name} has attention sinks: not yet supported")
    try:
        _, _, head_dim = attention_shape(model)
    except (AttributeError, RuntimeError) as error:  # transformers' answer for what differs from layer to layer
        raise ValueError(f"{name} has no single head size for all layers: not yet supported") from error
    require(head_dim <= 256, f"{name} has head_dim {head_dim}; indices are uint8, so at most 256")


def _check_settings(model: Any, modules: list[nn.Module], settings: SFASettings, basis: FeatureBasis | None) -> None:
    """Raise `ValueError` with the reason if the settings do not fit the model."""
    name = type(model).__name__
    _, kv_heads, head_dim = attention_shape(model)
    require_budget(settings.topk, head_dim, settings.dense_dims)
    query_budget(settings.topk_query, settings.topk, head_dim, settings.dense_dims, settings.query_pattern)
    require(
        0 <= settings.value_tolerance < 1,
        f"value_tolerance must be in [0, 1), got {settings.value_tolerance}",
    )
    require(
        settings.layers is None or 0 < len(settings.layers) == len(set(settings.layers)),
        f"layers must name each layer to switch once, got {settings.layers}; leave it None for all",
    )
    require(settings.positions in (None, "channel"), f"positions must be 'channel' or None, got {settings.positions!r}")
    require(settings.cache_dtype in (None, "int8"), f"cache_dtype must be 'int8' or None, got {settings.cache_dtype!r}")
    if settings.positions is not None:
        require(basis is None, "positions='channel' has no basis: the model is trained in the coordinates it has")
        require_channel(model, settings.dense_dims, head_dim)
    unknown = [i for i in settings.layers or [] if not 0 <= i < len(modules)]
    require(not unknown, f"layers {unknown} do not exist: {name} has layers 0 to {len(modules) - 1}")
    if basis is not None:
        expected = (len(modules), kv_heads, head_dim, head_dim)
        require(
            tuple(basis.query.shape) == tuple(basis.key.shape) == expected,
            f"the basis is {tuple(basis.query.shape)} but {name} needs [L, Hkv, D, D] = {expected}; calibrate on this model",
        )


@functools.cache
def _warn_of_untested_version() -> None:
    first, last = TESTED_VERSIONS
    if not first <= tuple(int(x) for x in transformers.__version__.split(".")[:2]) <= last:
        tested = " to ".join(f"{major}.{minor}" for major, minor in TESTED_VERSIONS)
        warnings.warn(f"flashsfa is tested with transformers {tested}, not {transformers.__version__}", stacklevel=3)


def _extend(model: Any, basis: FeatureBasis | None) -> None:
    """On this instance: generate() makes a cache of codes, save_pretrained() writes the basis too, calls are checked."""

    def prepare_cache(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        given = model_kwargs.get("past_key_values") is not None
        if given or generation_config.use_cache is False or self.config._attn_implementation != NAME:
            arguments = (generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
            type(self)._prepare_cache_for_generation(self, *arguments)
            return
        implementation = generation_config.cache_implementation or "dynamic"
        require(
            implementation in ("dynamic", "offloaded", "static"),
            f"cache_implementation={implementation!r} holds dense keys; caches of codes are 'dynamic' (the default), "
            "'offloaded' and 'static'",
        )
        if implementation == "static":
            longest = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            cache: Any = StaticSparseCache(self, longest)
            if generation_config.prefill_chunk_size is not None and not hasattr(self, "hf_device_map"):
                # the first chunk may run compiled, and what is allocated there has no fixed address
                _, kv_heads, head_dim = attention_shape(self)
                rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
                device = self.device.type
                dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.dtype
                cache.early_initialization(rows, kv_heads, head_dim, dtype, self.device)
        else:
            cache = SparseCache(self, offloading=implementation == "offloaded")
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    def save_with_basis(
        self: Any, save_directory: str | Path, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        file = Path(save_directory) / BASIS_FILE
        if is_main_process:
            if basis is None:
                file.unlink(missing_ok=True)  # an earlier model's
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                basis.save(file)
        type(self).save_pretrained(self, save_directory, is_main_process, *args, **kwargs)  # uploads too, if asked to

    def files_before_saving(self: Any, directory: str | Path) -> dict[str, float]:
        # save_pretrained(push_to_hub=True) uploads what changed since this call, which comes after the basis was written
        found = type(self)._get_files_timestamps(self, directory)
        found.pop(Path(BASIS_FILE).parts[0], None)
        return found

    model._prepare_cache_for_generation = types.MethodType(prepare_cache, model)
    model.save_pretrained = types.MethodType(save_with_basis, model)
    model._get_files_timestamps = types.MethodType(files_before_saving, model)
    model._sfa_hook = model.base_model.register_forward_pre_hook(_CallCheck(), with_kwargs=True)


class _CallCheck:
    """Looks at each call of the model: refuses dense static caches, and warns of padding that shifts positions, once."""

    def __init__(self) -> None:
        self.warned = False

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        require(
            not isinstance(kwargs.get("past_key_values"), transformers.StaticCache),
            "transformers' StaticCache holds dense keys: pass flashsfa.huggingface.StaticSparseCache(model, max_cache_len)",
        )
        mask = kwargs.get("attention_mask")
        if (
            self.warned
            or torch.compiler.is_compiling()
            or kwargs.get("position_ids") is not None
            or not isinstance(mask, torch.Tensor)
            or mask.ndim != 2
            or bool((mask[:, 0] != 0).all())
        ):
            return
        self.warned = True
        warnings.warn(
            "left-padded input without position_ids: its tokens stand at shifted positions, and top-k features depend on "
            "them. Pass position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0), as generate() does",
            stacklevel=2,
        )

"""`enable`, `disable`, `from_pretrained`: a dense checkpoint's attention becomes sparse, in place and back."""

from __future__ import annotations

import functools
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers

from ..basis import FeatureBasis
from ..budget import FeatureBudget
from ..checks import require
from ..formats import CodeFormat, cache_bits
from .attention import NAME, LayerCoding
from .instance import extend, retract
from .loading import find_file, load_weights, read_config, refusing
from .positions import move_to_channel, require_channel, restore
from .settings import BASIS_FILE, SFASettings, require_layers
from .structure import (
    attention_layers,
    attention_of,
    attention_shape,
    default_dense_dims,
    own_config,
    require_switchable,
    require_whole_context,
    set_attention,
    tensor_device,
    unwrap,
)

TESTED_VERSIONS = ((5, 17), (5, 23))  # of transformers: the suite ran on 5.17, 5.20 and 5.23


def enable(
    model: Any,
    topk: int | None = None,
    *,
    topk_query: int | str | None = None,
    dense_dims: int | None = None,
    basis: FeatureBasis | None = None,
    layers: list[int] | None = None,
    value_tolerance: float = 0.0,
    positions: str | None = None,
    cache_dtype: str | None = None,
    query_pattern: str | None = None,
    recent: int = 0,
    first: int = 0,
    prefill: str = "coded",
) -> Any:
    """Switch a transformers causal language model to Sparse Feature Attention, in place.

    The model then generates with a cache of codes, without being asked, and `save_pretrained` keeps settings and
    basis. `generate` takes cache_implementation "dynamic" (its default), "static" and "offloaded", and
    prefill_chunk_size. Switching again replaces the settings. `disable` undoes it.

    Args:
        model: a model whose attention goes through transformers' AttentionInterface (GPT-2, Llama, Qwen3 ...), bare or in the
            wrappers of PEFT, torch.compile or distributed training. Of one with several parts (Gemma 3 and Qwen3-VL with images) the
            part that generates text is switched.
        topk, topk_query: budgets, as in `sparse_feature_attention`. Without them keys are kept as the basis says, in a number of bits
            per axis.
        dense_dims: as in `sparse_feature_attention`; None for `default_dense_dims`, the part of a head that carries
            positions in a model with partial rotary embeddings (GPT-NeoX, Phi, StableLM, GLM-4), 0 in others.
        basis: [L, Hkv, D, D] coordinates from `calibrate`, for these budgets: its gain, and a dictionary, fit no others;
            None for the model's own. One that was calibrated with key_bytes takes the place of budgets. L counts the layers with attention, in their order.
        layers: indices of the model's layers to switch, where others without attention count too; None for all. Layers that attend in
            chunks (Llama 4) are left out.
        value_tolerance: as in `sparse_feature_decode`.
        positions: "channel" turns the dense channel alone by RoPE and leaves the sparse features free of position: for
            GPT-2 (whose learned positions are dropped) and Qwen3 models that are trained so. None for the model's own.
        cache_dtype: in how many bits the switched layers' caches keep codes and values. "int8": 8 bits with a
            float32 scale a row; a key costs M + 2·K + 4 bytes (M dense dims, K kept features), a value Dv + 4. "int4": the
            dense channel in 8 bits, kept features and values in 4, indices as small as they go; other widths by a name such as
            "d8s8v4" or "d8s4v3" (`CodeFormat`, which counts the bytes). With topk = head_dim keys are rows without indices, in the width
            after the s. None keeps all in the dtype that it comes in. A prompt attends to the rounded ones too, and so do calls
            without a cache; gradients pass straight through.
        query_pattern: as in `sparse_feature_attention`, for prompts on Hopper's sparse tensor cores; for models that are trained
            with it, in others it costs quality (docs/explanation/prefill.md).
        recent: newest tokens that caches keep as they come, static ones beside their codes; queries see codes of the others. Tokens
            of one call see the cache as it stands after the last of them; without a cache each token sees what it would if they
            came one by one, in plain PyTorch.
        first: first tokens of each sequence that these caches keep as they come. In layers with a sliding window they are forgotten
            with the window, as other tokens are. Batches are then padded on the right, or not at all.
        prefill: "coded" prompts attend to the keys that these caches hold; with "dense" the tokens of a call, if there are several,
            attend to their own keys and values as they come, and to earlier ones as the cache holds them. What is cached is the
            same. Without a cache, as for `recent`.

    Returns:
        model.

    Raises `ValueError`, with the model unchanged, if it cannot be switched; the message names the reason.
    """
    whole, model = model, unwrap(model)
    modules: list[Any] = attention_layers(model)
    require_switchable(model, modules)
    if dense_dims is None:
        dense_dims = 0 if topk is None else default_dense_dims(model)
    if layers is not None:
        require_layers(layers)
        layers = sorted(layers)
    if basis is not None and not isinstance(basis, FeatureBasis):
        raise TypeError(f"basis must be a FeatureBasis, as calibrate returns, or None; got {type(basis).__name__}")
    settings = SFASettings(
        topk, topk_query, dense_dims, layers, value_tolerance, basis is not None, positions, cache_dtype, query_pattern,
        recent, first, prefill,
    )  # fmt: skip
    budget = _check_settings(model, [module.layer_idx for module in modules], settings, basis)
    _warn_of_untested_version()
    disable(model)
    own_config(whole)
    try:
        model._sfa_dense_attention = attention_of(model)
        channel = 0 if positions is None else move_to_channel(model, dense_dims)
        for place, module in enumerate(modules):
            if layers is not None and module.layer_idx not in layers:
                continue
            coding = LayerCoding(budget, value_tolerance, None if basis is None else basis[place], channel, settings)
            module.sfa = coding.to(tensor_device(module))
        set_attention(model, NAME)
        model.config.sfa = asdict(settings)
        extend(model, basis)
    except BaseException:
        disable(model)
        raise
    return whole


def disable(model: Any) -> Any:
    """Undo `enable`: the model computes again exactly what it did before. A model that is not switched stays as is, but for settings in
    its config, of a converted model that transformers loaded dense.

    Returns:
        model.
    """
    inner = unwrap(model)
    if not is_enabled(inner):
        if isinstance(config := getattr(inner, "config", None), transformers.PreTrainedConfig):
            vars(config).pop("sfa", None)
        return model
    for module in inner.modules():
        if isinstance(getattr(module, "sfa", None), LayerCoding):
            del module.sfa
    set_attention(inner, inner._sfa_dense_attention)
    restore(inner)
    retract(inner)
    vars(inner.config).pop("sfa", None)
    del inner._sfa_dense_attention
    return model


def is_enabled(model: Any) -> bool:
    """Whether `enable` switched this model."""
    return hasattr(unwrap(model), "_sfa_dense_attention")


def from_pretrained(path: str | Path, **kwargs: Any) -> Any:
    """Load a model that was saved while switched, of the class that was saved, with its settings and basis.

    Args:
        path: a local directory or a name on the hub.
        kwargs: as transformers' `from_pretrained` takes them: dtype, device_map, revision, subfolder, token ...

    Raises `ValueError` if there is no such model, or not all of it.
    """
    config = read_config(path, **kwargs)
    require(
        "sfa" in config,
        f"{path} holds a dense model; load it with transformers and call flashsfa.enable, or make a converted one with flashsfa convert",
    )
    with refusing(f"{path} cannot be loaded as a converted model"):
        settings = SFASettings.from_config(config["sfa"])
        basis = load_basis(path, **kwargs)
        _require_named(basis, settings)
    model = load_weights(path, _saved_class(config), **kwargs)
    return enable(model, basis=basis, **settings.arguments())


def load_basis(path: str | Path, **kwargs: Any) -> FeatureBasis | None:
    """The basis beside a model that was saved while switched; None where there is none. Arguments as `from_pretrained`'s."""
    file = find_file(path, BASIS_FILE, is_optional=True, **kwargs)
    return None if file is None else FeatureBasis.load(file)


def _require_named(basis: FeatureBasis | None, settings: SFASettings) -> None:
    """Raise `ValueError` unless there is a basis where the settings name one, and nowhere else."""
    require(
        settings.has_basis == (basis is not None),
        f"its settings name a basis, but {BASIS_FILE} is missing: it was saved without flashsfa, or is incomplete"
        if settings.has_basis
        else f"{BASIS_FILE} is there, but its settings name no basis: it belongs to another model, or config.json was changed",
    )


def _saved_class(config: dict[str, Any]) -> Any:
    """The class of transformers that a checkpoint was saved from; None, for that of its config, for remote code."""
    names = config.get("architectures")
    named = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    found = None if "auto_map" in config else getattr(transformers, named, None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else None


def _check_settings(model: Any, present: list[int], settings: SFASettings, basis: FeatureBasis | None) -> FeatureBudget:
    """The budget. Raises `ValueError` with the reason if the settings do not fit the model, which has attention in the layers
    `present`."""
    name = type(model).__name__
    _, kv_heads, head_dim = attention_shape(model)
    budget, bits = settings.budget(head_dim), cache_bits(settings.cache_dtype)
    if isinstance(bits, CodeFormat):
        bits.require_v_dim(head_dim)
        bits.key_bytes(head_dim, budget.dense_dims, budget.topk)
    if settings.positions is not None:
        require(basis is None, "positions='channel' has no basis: the model is trained in the coordinates it has")
        require_channel(model, settings.dense_dims, head_dim)
    unknown = [index for index in settings.layers or [] if index not in present]
    require_whole_context(model, present if settings.layers is None else settings.layers)
    every = present == list(range(len(present)))
    held = f"layers 0 to {len(present) - 1}" if every else f"attention in layers {present}"
    require(not unknown, f"layers {unknown} do not exist: {name} has {held}")
    if basis is not None:
        expected = (len(present), kv_heads, head_dim, head_dim)
        require(
            tuple(basis.query.shape) == tuple(basis.key.shape) == expected,
            f"the basis is {tuple(basis.query.shape)} but {name} needs [L, Hkv, D, D] = {expected}; calibrate on this model",
        )
        require(
            (settings.topk is None) == (basis.axes is not None),
            "a basis with bits per axis takes the place of topk: leave topk out"
            if settings.topk is not None
            else "this basis has no bits per axis: give the topk that it was calibrated for, or calibrate with key_bytes",
        )
        basis.check(settings.topk, settings.dense_dims)
    return budget


@functools.cache
def _warn_of_untested_version() -> None:
    first, last = TESTED_VERSIONS
    if not first <= tuple(int(x) for x in transformers.__version__.split(".")[:2]) <= last:
        tested = " to ".join(f"{major}.{minor}" for major, minor in TESTED_VERSIONS)
        warnings.warn(f"flashsfa is tested with transformers {tested}, not {transformers.__version__}", stacklevel=3)

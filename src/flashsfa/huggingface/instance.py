"""What `enable` changes on one instance of a model beside its attention: how it generates, how it is saved, what it may be
called with. All of it can be pickled and copied with the model."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode

from ..basis import FeatureBasis
from ..checks import require
from ..contexts import asked_once
from ..ops import record
from .attention import NAME, OtherMask
from .cache import SparseCache, StaticSparseCache, require_first_tokens, require_readable
from .settings import BASIS_FILE
from .structure import attention_of, attention_shape, text_config

_METHODS = ("_prepare_cache_for_generation", "generate", "save_pretrained", "_get_files_timestamps")


def extend(model: Any, basis: FeatureBasis | None) -> None:
    """On this instance: generate() makes a cache of codes, save_pretrained() writes the basis too, calls are checked."""
    functions: tuple[Any, ...] = (
        _prepare_cache,
        _generate,
        functools.partial(_save_with_basis, basis=basis),
        _files_before_saving,
    )
    for name, function in zip(_METHODS, functions, strict=True):
        setattr(model, name, functools.partial(function, model))
    model._sfa_hook = model.base_model.register_forward_pre_hook(
        _CallCheck(model.config.sfa["first"] > 0), with_kwargs=True
    )


def retract(model: Any) -> None:
    """Undo `extend`; a model that it did not change stays as it is."""
    hook = vars(model).pop("_sfa_hook", None)
    if hook is not None:
        hook.remove()
    for name in (*_METHODS, "_sfa_longest_cache"):
        vars(model).pop(name, None)


def _prepare_cache(
    model: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """`_prepare_cache_for_generation` of transformers, with caches of codes."""
    given = model_kwargs.get("past_key_values")
    is_ours = attention_of(model) == NAME
    if is_ours and model.config.sfa["first"]:  # a call with one token of a prompt looks like a step
        _require_no_padding_first(model_kwargs.get("attention_mask"), model_kwargs)
    guesses = generation_mode == GenerationMode.ASSISTED_GENERATION
    if (guesses or generation_config.is_assistant) and is_ours:
        _require_guesses(model, given, generation_config)
    if given is not None or generation_config.use_cache is False or not is_ours:
        arguments = (generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        type(model)._prepare_cache_for_generation(model, *arguments)
        if isinstance(given, SparseCache):
            given.expect_guesses(_prompt_length(model_kwargs, generation_config) if guesses else None)
        return
    implementation = generation_config.cache_implementation or "dynamic"
    require(
        implementation in ("dynamic", "offloaded", "static"),
        f"cache_implementation={implementation!r} holds dense keys; caches of codes are 'dynamic' (the default), "
        "'offloaded' and 'static'",
    )
    if implementation == "static":
        longest = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
        # as transformers does with caches of its own: a shorter one would have the model compiled again
        longest = model._sfa_longest_cache = max(longest, getattr(model, "_sfa_longest_cache", 0))
        cache: Any = StaticSparseCache(model, longest)
        if generation_config.prefill_chunk_size is not None and not hasattr(model, "hf_device_map"):
            # the first chunk may run compiled, and what is allocated there has no fixed address
            _, kv_heads, head_dim = attention_shape(model)
            rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            device = model.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
            cache.early_initialization(rows, kv_heads, head_dim, dtype, model.device)
    else:
        cache = SparseCache(model, offloading=implementation == "offloaded")
        if guesses:
            cache.expect_guesses(_prompt_length(model_kwargs, generation_config))
    if generation_config.is_assistant:
        cache.activate_past_recording()
    model_kwargs["past_key_values"] = cache


def _require_guesses(model: Any, cache: Any, generation_config: Any) -> None:
    """Raise `ValueError` if speculative decoding is asked for what it cannot do: to guess into a cache of fixed size, to go on from a
    cache, or by the first layers of a model that has them in a part."""
    require(
        generation_config.is_assistant or cache is None or not cache.get_seq_length(),
        "transformers' speculative decoding runs the whole prompt again whatever a cache holds: give it an empty one, or decode without an "
        "assistant, prompt_lookup_num_tokens and assistant_early_exit",
    )
    require(
        generation_config.assistant_early_exit is None or text_config(model) is model.config,
        f"assistant_early_exit takes the first layers of a model of text alone, not of {type(model).__name__}: leave it out, or say "
        "prompt_lookup_num_tokens",
    )
    require(
        not isinstance(cache, StaticSparseCache) and generation_config.cache_implementation != "static",
        "speculative decoding takes back tokens that were guessed wrong, and a static cache has overwritten others by then: leave "
        "cache_implementation out, or say 'offloaded'; or decode without an assistant, prompt_lookup_num_tokens and assistant_early_exit",
    )


def _prompt_length(model_kwargs: dict[str, Any], generation_config: Any) -> int:
    """Tokens of the sequence before the first that is generated."""
    for name in ("position_ids", "attention_mask"):
        if model_kwargs.get(name) is not None:
            return int(model_kwargs[name].shape[-1])
    return int(generation_config._mask_length)  # of a mask of ones, which transformers drops


def _generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` of transformers, which leaves the number of layers of an early exit in the config where that fails; and a cache that
    outlives it expects no more guesses."""
    config = text_config(model)
    layers, found = config.num_hidden_layers, None
    try:
        found = type(model).generate(model, *args, **kwargs)
        return found
    finally:
        if config.num_hidden_layers != layers:
            config.num_hidden_layers = layers
        for cache in (kwargs.get("past_key_values"), getattr(found, "past_key_values", None)):
            if isinstance(cache, SparseCache):
                cache.expect_guesses(None)


def _save_with_basis(
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    *args: Any,
    basis: FeatureBasis | None,
    **kwargs: Any,
) -> None:
    """`save_pretrained` of transformers, and the basis beside it."""
    file = Path(save_directory) / BASIS_FILE
    if is_main_process and not Path(save_directory).is_file():  # of a file transformers says what is wrong
        if basis is None:
            file.unlink(missing_ok=True)  # an earlier model's
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            basis.save(file)
    type(model).save_pretrained(model, save_directory, is_main_process, *args, **kwargs)  # uploads too, if asked to


def _files_before_saving(model: Any, directory: str | Path) -> dict[str, float]:
    """`_get_files_timestamps` of transformers: save_pretrained(push_to_hub=True) uploads what changed since this call, which
    comes after the basis was written."""
    found: dict[str, float] = type(model)._get_files_timestamps(model, directory)
    found.pop(Path(BASIS_FILE).parts[0], None)
    return found


class _CallCheck:
    """Looks at each call of the model: refuses caches that sfa does not read, and warns of padding that shifts positions, once."""

    def __init__(self, keeps_first: bool) -> None:
        self._keeps_first, self.warned = keeps_first, False

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for argument in (*args, *kwargs.values()):
            require_readable(argument)
            _say_cache(argument)
            if self._keeps_first:
                require_first_tokens(module, argument)
        _require_no_press(module)
        if args:
            kwargs = dict(zip(_parameters(type(module)), args, strict=False)) | kwargs
        mask = kwargs.get("attention_mask")
        if self._keeps_first:
            _require_no_padding_first(mask, kwargs)
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


@asked_once
def _parameters(kind: type[nn.Module]) -> list[str]:
    """Names of what a model of this class takes, in their places."""
    return list(inspect.signature(kind.forward).parameters)[1:]


def _say_cache(cache: Any) -> None:
    """For `explain()`: what keeps the keys that a call brings."""
    if isinstance(cache, (SparseCache, StaticSparseCache)):
        record.record("cache", "codes", "the model's own cache")
    elif isinstance(cache, Cache) and cache.get_seq_length():
        record.record("cache", "transformers", _DENSE_CACHE, fallback=True)


_DENSE_CACHE = (
    "the call brought keys of a dense cache, which takes as much memory as the dense model's: pass past_key_values=flashsfa.huggingface.SparseCache(model), "
    "or use model.generate, which makes it"
)


def _require_no_press(module: nn.Module) -> None:
    """Raise `ValueError` if a press of kvpress hooks on a layer: it would take keys out of the cache, and put others there."""
    if "kvpress" not in sys.modules:
        return
    for hook in (hook for layer in module.modules() for hook in layer._forward_hooks.values()):
        press = type(getattr(hook, "__self__", None))
        require(
            not any(kind.__module__.split(".")[0] == "kvpress" for kind in press.__mro__),
            f"{press.__name__} of kvpress would prune the keys in a cache, and a cache of codes holds none: enter "
            "flashsfa.huggingface.pruning(model, press) in place of press(model), or disable the model",
        )


def _require_no_padding_first(mask: Any, kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` if a prompt begins with padding, which would be kept in place of the first tokens of its sequence. For a
    static cache `generate` hands over what `attention_mask` made of the mask, by kind of layer where there are several."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if isinstance(mask, OtherMask):
        mask = mask.visible.any(2)[:, 0]
    if torch.compiler.is_compiling() or not isinstance(mask, torch.Tensor):
        return
    if mask.ndim == 4 and mask.shape[1:3] == (1, 1):
        mask = mask[:, 0, 0]
    if mask.ndim != 2:
        return
    rows = next((x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None)
    is_step = rows is not None and rows.shape[1] == 1 and mask.shape[1] > 1  # to look would be a device sync per token
    require(
        is_step or bool((mask[:, 0] != 0).all()),
        "left-padded sequences begin with padding, which first would keep in place of their first tokens: run them one by one, "
        "or enable the model with first=0",
    )

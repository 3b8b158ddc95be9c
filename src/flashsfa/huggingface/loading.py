"""Every checkpoint is loaded here: whole, or refused in one line that says why.

transformers makes up weights that a checkpoint lacks, by its random initialisation, and leaves out those that it has no
place for; what is damaged raises whatever comes. Here each is a `ValueError`.
"""

from __future__ import annotations

import json
import logging
import re
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils import cached_file

from ..checks import require

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
# Buffers of the causal mask, which older versions of transformers saved with GPT-2 and its kin.
_OLD_MASKS = re.compile(r"\battn(\.attention)?\.(bias|masked_bias|causal_mask)$")
_NAMED_TENSORS = 4  # of a kind, in a message
_LONGEST_REASON = 600  # characters


def auto_class(config: Any) -> Any:
    """The Auto class of transformers that makes the whole model of a config: of one with a part for text beside others, that part is
    not all."""
    is_composite = config.get_text_config(decoder=True) is not config
    order = (AutoModelForImageTextToText, AutoModelForCausalLM)
    found = (auto for auto in (order if is_composite else reversed(order)) if type(config) in auto._model_mapping)
    return next(found, AutoModelForCausalLM)


def load_weights(source: str | Path, model_class: Any = None, **kwargs: Any) -> Any:
    """The model of a checkpoint, with every tensor of it in its place and no other: `model_class.from_pretrained`, checked.

    Args:
        source: a local directory or a name on the hub.
        model_class: a class of transformers, or one of its Auto classes; None for that of its config (`auto_class`).
        kwargs: as transformers takes them (dtype, device_map, revision, subfolder, gguf_file ...).

    Raises `ValueError` of one line: no such model, damaged files, a config that fits no model, tensors that are missing,
    of another shape, or that the model has no place for. Tied weights may be missing, and a class may ignore tensors.
    """
    what = "a causal language model" if model_class is None else f"a {model_class.__name__}"
    checked = {"output_loading_info", "ignore_mismatched_sizes"} & kwargs.keys()
    require(
        not checked,
        lambda: (
            f"leave out {' and '.join(sorted(checked))}: every tensor is checked here, and one that does not fit is refused"
        ),
    )
    with refusing(f"{source} cannot be loaded as {what}"), _quiet():
        config = {} if {"config", "gguf_file"} & kwargs.keys() else _read_config(source, **kwargs)
        if model_class is None:
            has_parts = "text_config" in config and "auto_map" not in config
            model_class = (
                auto_class(AutoConfig.from_pretrained(source, **_of_hub(kwargs))) if has_parts else AutoModelForCausalLM
            )
        model, found = model_class.from_pretrained(
            source,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **{"trust_remote_code": False, **kwargs},  # None would ask on the terminal
        )
        require(
            not getattr(model, "_hf_peft_config_loaded", False),
            "it is an adapter: load the model that it belongs to, and merge it with PEFT's merge_and_unload",
        )
        _require_whole(found)
        if model.can_generate() and "gguf_file" not in kwargs:
            _read_json(find_file(source, "generation_config.json", is_optional=True, **kwargs))
    return model


def load_tokenizer(source: str | Path, **kwargs: Any) -> Any:
    """The tokenizer of a checkpoint. Arguments as `load_weights`'. Raises `ValueError` of one line if there is none, or a
    damaged one."""
    with refusing(f"{source} has no tokenizer that can be loaded"), _quiet(), _naming_both_places(source):
        _require_found(source)
        return AutoTokenizer.from_pretrained(source, **{"trust_remote_code": False, **kwargs})


def read_config(source: str | Path, **kwargs: Any) -> dict[str, Any]:
    """The config.json of a checkpoint. Arguments as `load_weights`'. Raises `ValueError` of one line if there is none, or
    it has sizes that no model has."""
    with refusing(f"{source} holds no model"), _quiet():
        return _read_config(source, **kwargs)


def find_file(source: str | Path, name: str, *, is_optional: bool = False, **kwargs: Any) -> Path | None:
    """The file `name` of a checkpoint, fetched from the hub where it lies there; None for an optional one that is not to be
    had. Arguments as `load_weights`'.

    Raises `ValueError` or `OSError` if another is missing, or the hub cannot be asked.
    """
    if Path(source).is_dir():
        file = Path(source, kwargs.get("subfolder") or "", name)
        require(is_optional or file.is_file(), f"{name} is missing")
        return file if file.is_file() else None
    with _naming_both_places(source):
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=not is_optional, **_of_hub(kwargs))
    return None if found is None else Path(found)


def _of_hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments of `load_weights` those that say where files lie."""
    return {key: kwargs[key] for key in _HUB_ARGUMENTS if kwargs.get(key) is not None}


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever goes wrong in the block is a `ValueError` of one line that begins with `what`; memory that does not suffice is
    no fault of the checkpoint."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{what}: {_reason(error)}") from error


@contextmanager
def _naming_both_places(source: str | Path) -> Iterator[None]:
    """An error of the hub says first that `source` is no folder here: whoever misspelt one did not think of the hub."""
    try:
        yield
    except OSError as error:
        if Path(source).is_dir():
            raise
        raise OSError(f"there is no folder {source} here, and as a name on the hub: {error}") from error


def _read_config(source: str | Path, **kwargs: Any) -> dict[str, Any]:
    _require_found(source)
    config = _read_json(find_file(source, "config.json", **kwargs))
    parts = [config, *(part for part in (config.get("text_config"),) if isinstance(part, dict))]
    for name, size in ((name, part.get(name)) for part in parts for name in _SIZES):
        require(
            not isinstance(size, (bool, str, float, int)) or (type(size) is int and size >= 1),
            f"{name} in config.json must be a whole number of at least 1, got {size!r}",
        )
    return config


def _require_found(source: str | Path) -> None:
    """A path that is none reads as a name on the hub, and the error would be about that."""
    name = str(source)
    is_path = isinstance(source, Path) or name.startswith(("/", ".", "~")) or name.count("/") > 1
    require(not is_path or Path(source).exists(), "there is no such directory")
    require(not Path(source).is_file(), "it is a file, not a directory")


def _read_json(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        content = json.loads(file.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{file.name} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{file.name} is no valid JSON") from error
    require(isinstance(content, dict), f"{file.name} holds {type(content).__name__} where an object belongs")
    return dict(content)


def _require_whole(found: dict[str, Any]) -> None:
    """Raise `ValueError` if transformers' account of a load names tensors that were not read, or not used."""
    misfits = [f"{name} {[*given]} for {[*due]}" for name, given, due in found["mismatched_keys"]]
    unexpected = [name for name in found["unexpected_keys"] if not _OLD_MASKS.search(name)]
    faults = (
        ("misses", found["missing_keys"], ""),
        ("has other shapes than its config:", misfits, ""),
        ("holds", unexpected, ", which the model has no place for"),
    )
    message = "; ".join(f"{verb} {_listed(names)}{tail}" for verb, names, tail in faults if names)
    require(not message, f"the checkpoint {message}")


def _listed(names: Iterable[str]) -> str:
    first, *rest = sorted(names)
    shown = [first, *rest[: _NAMED_TENSORS - 1]]
    more = len(rest) + 1 - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    text = textwrap.shorten(str(error), _LONGEST_REASON, placeholder=" ...")
    if isinstance(error, SafetensorError):
        return f"a file of its weights is damaged ({text})"
    if isinstance(error, (OSError, ValueError, ImportError, StrictDataclassError)) and text:
        return text
    return f"transformers fails on its config or weights ({type(error).__name__}{text and ': '}{text})"


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers, and nothing of its log where the block fails: that comes when all is well."""
    held: list[tuple[logging.Handler, logging.LogRecord]] = []
    handlers = [x for name in ("transformers", "huggingface_hub") for x in logging.getLogger(name).handlers]
    filters = [_Hold(handler, held) for handler in handlers]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    for handler, hold in zip(handlers, filters, strict=True):
        handler.addFilter(hold)
    try:
        yield
    except BaseException:
        held.clear()
        raise
    finally:
        for handler, hold in zip(handlers, filters, strict=True):
            handler.removeFilter(hold)
        if bars:
            transformers.utils.logging.enable_progress_bar()
        for handler, record in held:
            handler.handle(record)


class _Hold(logging.Filter):
    """Keeps a handler's records in a list instead."""

    def __init__(self, handler: logging.Handler, held: list[tuple[logging.Handler, logging.LogRecord]]) -> None:
        super().__init__()
        self._handler, self._held = handler, held

    def filter(self, record: logging.LogRecord) -> bool:
        self._held.append((self._handler, record))
        return False

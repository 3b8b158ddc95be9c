"""Text for calibration and evaluation: read, split without overlap, cut into windows of tokens."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import require

_TEXT_SUFFIXES = (".txt", ".md", ".rst")
_ENOUGH_TOKENS = 8000  # to calibrate on


def read_text(source: str | Path | None) -> str:
    """The text of a file, or of all .txt, .md and .rst files below a folder in name order; None for the topics of
    Python's own help (`pydoc_data.topics`), which need no download.

    Raises `ValueError` if there is nothing readable in it.
    """
    if source is None:
        from pydoc_data.topics import topics

        return "\n\n".join(text for _, text in sorted(topics.items()))
    path = Path(source)
    require(
        os.path.lexists(path), f"text {path} does not exist; give a text file or a folder of .txt, .md or .rst files"
    )
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in _TEXT_SUFFIXES and not p.is_dir())
    require(bool(files), f"folder {path} holds no .txt, .md or .rst file")
    text = "\n\n".join(_read_file(file) for file in files)
    require(bool(text.strip()), f"text {path} is empty")
    return text


def separate_texts(calibrate: str | Path | None, evaluate: str | Path | None) -> tuple[str, str]:
    """A text to calibrate on and one to evaluate on that share nothing: two sources, or the halves of one.

    Raises `ValueError` if one source lies inside the other.
    """
    one, other = (None if x is None else Path(os.path.realpath(x)) for x in (calibrate, evaluate))
    if one == other:
        return _halves(read_text(evaluate))
    if one is not None and other is not None:
        require(
            not (one.is_relative_to(other) or other.is_relative_to(one)),
            f"of the texts to calibrate on ({calibrate}) and to evaluate on ({evaluate}) one lies inside the other;"
            " give texts that share nothing, or the same one for both, which is split in two",
        )
    return read_text(calibrate), read_text(evaluate)


def token_windows(tokenizer: Any, text: str, *, length: int, count: int, purpose: str) -> Tensor:
    """[S, length] int64: the first windows of `text`, at most `count`, taken evenly across it.

    Raises `ValueError` if the text is shorter than one window.
    """
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"][0]
    available = ids.numel() // length
    require(
        available > 0,
        f"the {purpose} text has {ids.numel()} tokens, less than one window of {length}; give more text or a smaller --window",
    )
    windows = ids[: available * length].view(available, length)
    chosen = torch.linspace(0, available - 1, min(count, available), device="cpu").round().long()
    return windows[chosen]


def calibration_windows(tokenizer: Any, text: str, *, length: int, least: int) -> Tensor:
    """[S, length] int64 from `text`, as `token_windows`: `least` windows or more, so that they hold `_ENOUGH_TOKENS`, where there are so
    many."""
    count = max(least, math.ceil(_ENOUGH_TOKENS / length))
    return token_windows(tokenizer, text, length=length, count=count, purpose="calibration")


def _read_file(path: Path) -> str:
    try:
        require(path.is_file(), f"text {path} cannot be read: it is a broken link, or no file")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text {path} is not UTF-8: {error}") from error
    except OSError as error:
        raise ValueError(f"text {path} cannot be read: {error.strerror or error}") from error
    require("\0" not in text, f"text {path} holds NUL characters: it is no text")
    return text


def _halves(text: str) -> tuple[str, str]:
    """Cut at a paragraph near the middle."""
    middle = len(text) // 2
    cut = text.find("\n\n", middle)
    cut = middle if cut < 0 else cut
    return text[:cut], text[cut:]

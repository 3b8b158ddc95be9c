"""Training data: documents become one stream of token ids, the stream becomes windows in an order of their own.

The order is drawn here, from the run's seed alone, so that models of any kind see the same windows in the same order, and
a run that goes on after a kill sees what it would have seen.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..checks import require
from ..extras import install_hint
from ..files import whole_file, whole_folder
from ..huggingface.loading import load_tokenizer

_TEXT_SUFFIXES = (".txt", ".md", ".rst")
_SEPARATOR_LINE = re.compile("^\x1e\n?", re.MULTILINE)  # U+001E, the record separator
_DOCUMENTS_AT_A_TIME = 64
IGNORED = -100  # the label of a token that is not predicted


@dataclass(frozen=True)
class TokenStream:
    """Token ids one after another.

    Attributes:
        ids: [T] uint16 or uint32, perhaps mapped from a file.
        separator: the id that ends each document; None if unknown.
    """

    ids: np.ndarray
    separator: int | None

    def window(self, index: int, length: int) -> Tensor:
        """[length] int64, the window of this number."""
        return torch.from_numpy(self.ids[index * length : (index + 1) * length].astype(np.int64))


class Windows(Dataset):
    """`count` windows of a stream, each pass over it shuffled anew; `seed=None` keeps the stream's order.

    Items are {"input_ids": [context] int64}.
    """

    def __init__(self, stream: TokenStream, context: int, count: int, seed: int | None = None) -> None:
        self._stream, self._context, self._count, self._seed = stream, context, count, seed
        self._available = len(stream.ids) // context
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        round_, place = divmod(index, self._available)
        if self._seed is not None:
            if self._order[0] != round_:
                generator = torch.Generator().manual_seed(self._seed + round_)
                self._order = (round_, torch.randperm(self._available, generator=generator, device="cpu"))
            place = int(self._order[1][place])
        return {"input_ids": self._stream.window(place, self._context)}


def batches(
    windows: Any, count: int, at_a_time: int, collate: Callable[..., dict[str, Any]], device: torch.device
) -> Iterator[dict[str, Any]]:
    """The first `count` windows as batches of so many at a time, on `device`."""
    for start in range(0, count, at_a_time):
        batch = collate([windows[i] for i in range(start, min(start + at_a_time, count))])
        yield {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}


@dataclass(frozen=True)
class Collator:
    """Windows to a batch. A window's first token is not predicted, as nothing comes before it.

    With `separator`, documents are packed: a token sees its own document alone. Positions start anew in each, its first
    token is not predicted, and `cu_seq_lens_q` holds where documents begin in the batch laid end to end.
    """

    separator: int | None = None

    def __call__(self, windows: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
        ids = torch.stack([w["input_ids"] for w in windows])  # [B, N]
        labels = torch.stack([w.get("labels", w["input_ids"]) for w in windows]).clone()
        if self.separator is None:
            labels[:, 0] = IGNORED
            return {"input_ids": ids, "labels": labels}
        first = torch.zeros_like(ids, dtype=torch.bool)  # [B, N] True where a document begins
        first[:, 0] = True
        first[:, 1:] = ids[:, :-1] == self.separator
        starts = first.flatten().nonzero()[:, 0]  # [S]
        bounds = torch.cat((starts, torch.tensor([ids.numel()], device=ids.device)))  # [S + 1]
        positions = torch.arange(ids.numel(), device=ids.device) - starts.repeat_interleave(bounds.diff())
        return {
            "input_ids": ids, "labels": labels.masked_fill(first, IGNORED), "position_ids": positions.view_as(ids),
            "cu_seq_lens_q": bounds.int(), "max_length_q": ids.shape[1],
        }  # fmt: skip


def read_stream(source: str, key: str, tokenizer: Any | None, separator: int | None) -> TokenStream:
    """The tokens of `source`, one of the forms that `recipe.Data` names.

    Args:
        key: of the recipe, for messages.
        tokenizer: of transformers; None if the recipe names none.
        separator: overrides the tokenizer's end-of-text token.
    """
    if separator is None and tokenizer is not None:
        separator = tokenizer.eos_token_id
    if source.endswith(".npy"):
        return TokenStream(_token_file(Path(source), key), separator)
    if tokenizer is None:
        raise ValueError(f"data.tokenizer: missing, and {key} {source} is text; name one, or give a token file (.npy)")
    documents = _datasets(source, key) if source.startswith("datasets:") else _text_files(Path(source), key)
    return TokenStream(tokenize(documents, tokenizer, separator), separator)


def tokenize(documents: Iterator[str], tokenizer: Any, separator: int | None) -> np.ndarray:
    """[T] token ids of the documents, each followed by `separator`: uint16 if the vocabulary fits, else uint32."""
    end = [] if separator is None else [separator]
    size = max(len(tokenizer), *(id + 1 for id in end), 0)
    require(size <= 1 << 32, f"a vocabulary of {size} does not fit uint32")
    dtype = np.uint16 if size <= 1 << 16 else np.uint32
    parts: list[np.ndarray] = []
    batch: list[str] = []

    def flush() -> None:
        if batch:
            ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            try:
                parts.extend(np.asarray(document + end, dtype=dtype) for document in ids)
            except OverflowError as error:
                raise ValueError(f"the tokenizer gives ids past its vocabulary of {len(tokenizer)}: {error}") from error
            batch.clear()

    for document in documents:
        batch.append(document)
        if len(batch) == _DOCUMENTS_AT_A_TIME:
            flush()
    flush()
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def write_tokens(path: Path, ids: np.ndarray, tokenizer: Any) -> None:
    """Write a token file, and its tokenizer into the folder beside it: both, or neither.

    Raises `OSError` if they cannot be written.
    """
    folder = tokenizer_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as beside:
            with beside.open("wb") as file:
                np.save(file, ids)
            if _is_free(folder):
                with whole_folder(folder) as inner:
                    tokenizer.save_pretrained(inner)
    except Exception as error:  # a full disk is another error in each of the libraries that write here
        raise OSError(f"{path} could not be written: {error}") from error


def tokenizer_folder(path: Path) -> Path:
    """Where the tokenizer of a token file, and of others in its folder, lies."""
    return path.parent / "tokenizer"


def require_tokenizer_folder(path: Path, tokenizer: Any) -> None:
    """Raise `ValueError` if another tokenizer, or something else, stands where that of the token file `path` is to be."""
    folder = tokenizer_folder(path)
    if _is_free(folder):
        return
    try:
        is_same = _rules(load_tokenizer(folder)) == _rules(tokenizer)
    except ValueError:
        is_same = False
    require(is_same, f"{folder} exists and is not the tokenizer of these tokens: name a file in another folder")


def check_stream(
    stream: TokenStream, key: str, context: int, vocab_size: int, context_key: str = "data.context"
) -> int:
    """The windows in `stream`; raises `ValueError` if there is none or a token lies past the vocabulary."""
    windows = len(stream.ids) // context
    require(windows > 0, f"{key} has {len(stream.ids)} tokens, less than one window of {context_key} {context}")
    largest = max(int(stream.ids[i : i + (1 << 24)].max()) for i in range(0, len(stream.ids), 1 << 24))
    require(largest < vocab_size, f"{key} holds token {largest}, past the model's vocabulary of {vocab_size}")
    return windows


def text_documents(path: Path) -> Iterator[str]:
    """The documents of a text file, or of all text files below a folder in name order."""
    return _text_files(path, "text")


def _is_free(folder: Path) -> bool:
    return not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))


def _rules(tokenizer: Any) -> tuple[Any, ...]:
    """What decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return tokenizer.get_vocab(), tokenizer.eos_token_id, backend and backend.to_str()


def _token_file(path: Path, key: str) -> np.ndarray:
    require(path.is_file(), f"{key}: token file {path} does not exist")
    try:
        ids = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # numpy parses the header as Python, which fails in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{key}: {path} is no token file, or a damaged one: {reason}") from error
    require(
        ids.ndim == 1 and ids.dtype in (np.uint16, np.uint32),
        f"{key}: {path} must hold one row of uint16 or uint32 token ids, got {ids.dtype} {ids.shape}",
    )
    return ids


def _text_files(path: Path, key: str) -> Iterator[str]:
    require(path.exists(), f"{key}: {path} does not exist")
    files = sorted(p for p in path.rglob("*") if p.suffix in _TEXT_SUFFIXES) if path.is_dir() else [path]
    require(bool(files), f"{key}: folder {path} holds no .txt, .md or .rst file")
    for file in files:
        require(file.is_file(), f"{key}: {file} is no file that can be read as text")  # a pipe would never end
    require(any(file.stat().st_size for file in files), f"{key}: {path} is empty")
    return _documents(files, key)


def _documents(files: Sequence[Path], key: str) -> Iterator[str]:
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{key}: {file} is not UTF-8: {error}") from error
        yield from (part for part in _SEPARATOR_LINE.split(text) if part.strip())


def _datasets(source: str, key: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{error}: {install_hint('train')}") from error
    _, name, split = (*source.split(":", 2), "", "")[:3]
    require(bool(name and split), f"{key}: write it as datasets:NAME:SPLIT, got {source}")
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # many kinds, of many libraries
        raise ValueError(f"{key}: {source} cannot be loaded: {str(error).strip().partition(chr(10))[0]}") from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    require("text" in (rows.column_names or ()), f"{key}: {source} has no column text, only {rows.column_names}")
    kind = getattr(rows.features["text"], "dtype", None)
    require(kind in ("string", "large_string"), f"{key}: the column text of {source} holds {kind}, and no text")
    return (row["text"] for row in rows if row["text"] and row["text"].strip())

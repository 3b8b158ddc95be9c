"""`choose`: ways to keep a model's cache are measured, and the model is switched to the one that fits what may be lost or kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .basis import FeatureBasis
from .candidates import Candidate, Candidates, Exact, ladder
from .checks import require
from .evaluation.memory import blank_cache, token_bytes
from .evaluation.perplexity import spread, window_losses
from .evaluation.subject import Progress
from .files import write_whole
from .huggingface import disable, enable
from .huggingface.cache import cache_nbytes
from .huggingface.calibration import gather_moments, require_windows
from .huggingface.structure import attention_layers, attention_shape, default_shared_kind

Rows = dict[str, dict[str, Any]]  # figures of each candidate, by its name
_MOST_WIDENED = 1 << 30  # parameters, that take 4 GiB in float32
_NEAREST = 3


@dataclass(frozen=True)
class Limits:
    """What may be lost and kept; without either what loses least is chosen.

    Attributes:
        max_loss: of perplexity, as a share of the dense model's: 0.01 for 1 %.
        max_bytes: of a coded key and its value, as a share of those of the dense model in its dtype.

    Raises `ValueError` for shares that are none.
    """

    max_loss: float | None = None
    max_bytes: float | None = None

    def __post_init__(self) -> None:
        require(self.max_loss is None or 0 <= self.max_loss < 1, f"a loss is 0 % or more and under 100 %, got {self}")
        require(self.max_bytes is None or 0 < self.max_bytes < 1, f"bytes are over 0 % and under 100 %, got {self}")

    def __bool__(self) -> bool:
        return self.max_loss is not None or self.max_bytes is not None

    def __str__(self) -> str:
        loss = None if self.max_loss is None else f"a loss of at most {100 * self.max_loss:g} %"
        nbytes = None if self.max_bytes is None else f"at most {100 * self.max_bytes:g} % of the bytes"
        return " and ".join(x for x in (loss, nbytes) if x is not None)

    def most(self, dense_bytes: int) -> float:
        """Bytes of a token within `max_bytes`: 29 % of 400 are 116, though 0.29 * 400 is less."""
        assert self.max_bytes is not None
        return round(self.max_bytes * dense_bytes, 6)

    def pick(self, rows: Rows, names: Sequence[str]) -> str | None:
        """Of the candidates `names`: the fewest bytes within the loss, or without one the least loss; None where nothing fits."""
        most = rows["dense"]["token_bytes"] if self.max_bytes is None else self.most(rows["dense"]["token_bytes"])
        fitting = [name for name in names if rows[name]["token_bytes"] <= most]
        if self.max_loss is None:
            return min(fitting, key=lambda name: rows[name]["loss"], default=None)
        within = [name for name in fitting if rows[name]["loss"] <= self.max_loss]
        return min(within, key=lambda name: (rows[name]["token_bytes"], rows[name]["loss"]), default=None)


class NothingFitsError(ValueError):
    """No candidate is within the limits. `rows` are the nearest; those that were not measured have no loss."""

    def __init__(self, limits: Limits, rows: list[dict[str, Any]]) -> None:
        nearest = rows[0]
        loss = f"a loss of {100 * nearest['loss']:.2f} % with " if "loss" in nearest else ""
        super().__init__(
            f"nothing that was tried has {limits}; the nearest is {nearest['label']}: {loss}{nearest['token_bytes']} bytes per token "
            f"and kv head, {100 * nearest['share']:.0f} % of the dense ones. Allow as much, or train the model on"
        )
        self.rows = rows


@dataclass(frozen=True)
class Choice:
    """What was measured, and what the model is switched to.

    Attributes:
        rows: figures by name, "dense" first.
        candidates: what was measured, by the same names.
        name: of the one chosen.
        basis: that goes with it.
    """

    rows: Rows
    candidates: Candidates
    name: str
    basis: FeatureBasis | None

    @property
    def candidate(self) -> Candidate:
        """The one chosen."""
        return self.candidates[self.name]

    def switch(self, model: Any) -> None:
        """Switch `model`."""
        _switch(model, self.candidate, self.basis)


class Kept:
    """Measurements of a run that may be stopped, in a hidden file beside its output, for the next run of the same.

    Args:
        output: where the result will be.
    """

    def __init__(self, output: Path) -> None:
        output = output.absolute()
        self.path = output.parent / f".{output.name[:40]}.measured.json"
        self._missing = [parent for parent in self.path.parents if not parent.exists()]
        self._of = ""
        self._rows: Rows = {}

    def open(self, what: str) -> None:
        """Take what was measured of `what` before; anything else there is of another run."""
        self._of = what
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads(self.path.read_bytes())
            if isinstance(found, dict) and found.get("of") == what and isinstance(found.get("rows"), dict):
                self._rows = found["rows"]

    def find(self, name: str) -> dict[str, Any] | None:
        return self._rows.get(name)

    def add(self, name: str, row: dict[str, Any]) -> None:
        self._rows[name] = row
        write_whole(self.path, json.dumps({"of": self._of, "rows": self._rows}))

    def remove(self) -> None:
        """Of the file, and of the folders that it needed."""
        self.path.unlink(missing_ok=True)
        for parent in self._missing:
            with suppress(OSError):  # by now others have files there
                parent.rmdir()


def choose(
    model: Any, calibration: Tensor, evaluation: Tensor, limits: Limits | None = None, *,
    candidates: Candidates | None = None, exact: Exact | None = None, max_position: int | None = None, kept: Kept | None = None,
    progress: Progress = lambda description, steps: lambda: None,
) -> Choice:  # fmt: skip
    """Measure ways to keep the cache of a dense model, and switch it in place to the one that `limits` pick.

    It is calibrated once, if a candidate has a basis. Each candidate is measured on `evaluation`, each token as decode sees it.

    Args:
        model: a causal language model of transformers that `enable` can switch.
        calibration, evaluation: [S, W] int64 token ids each, that share no text.
        limits: None for the least loss.
        candidates: "dense" first; None for `ladder`.
        exact: what the candidates of the ladder keep as it comes; None for the newest 32 tokens and the first 4.
        max_position: as `gather_moments`'.
        kept: where measurements are found, and added.
        progress: called with a description and the number of its steps; what it returns is called once a step.

    Raises `NothingFitsError` if no candidate is within the limits, `ValueError` if the model cannot be switched; it is dense then.
    """
    limits = limits or Limits()
    for name, windows in (("calibration", calibration), ("evaluation", evaluation)):
        require_windows(name, windows, model)
    require(
        evaluation.shape[1] > 1, "evaluation must hold windows of two tokens or more: each but the first is guessed"
    )
    *_, head_dim = attention_shape(model)
    dense_bytes = 2 * head_dim * model.dtype.itemsize
    is_asked = candidates is not None
    if candidates is None:
        most = None if limits.max_bytes is None else limits.most(dense_bytes)
        candidates = ladder(head_dim, most, exact or Exact())
    candidates = {name: x.of_kind(default_shared_kind(model)) for name, x in candidates.items()}
    names = [name for name, x in candidates.items() if x.may_win]
    if not names:
        smallest = sorted(ladder(head_dim, None, Exact()).values(), key=lambda x: x.token_bytes or dense_bytes)
        raise NothingFitsError(limits, [_without_figures(x, dense_bytes) for x in smallest[:_NEAREST]])
    try:
        for candidate in candidates.values():  # refuses a model or a budget before any long work
            if candidate.options is not None and "topk" in candidate.options:
                _switch(model, candidate, None)
                nbytes = token_bytes(model)
                require(
                    nbytes <= dense_bytes or not (is_asked and candidate.may_win),
                    f"{candidate.label} takes {nbytes} bytes per token and kv head, more than the {dense_bytes} of a dense key and value: "
                    "keep fewer features, or keep them in fewer bits",
                )
    finally:
        disable(model)
    if kept is not None:
        kept.open(_fingerprint(model, calibration, evaluation, max_position))
    moments = []
    if any(candidate.fit is not None for candidate in candidates.values()):
        bar = progress("calibrating", len(calibration))
        with _wide_on_a_cpu(model):
            moments = gather_moments(model, calibration, max_position=max_position, progress=bar)
        for layer in moments:
            layer.require_finite()

    bases: dict[str, FeatureBasis] = {}  # small beside the model

    def basis_of(candidate: Candidate) -> FeatureBasis | None:
        if candidate.fit is None:
            return None
        what = json.dumps(candidate.fit, sort_keys=True)
        if what not in bases:
            fitted = progress(f"fitting the basis: {candidate.label}", len(moments))
            bases[what] = FeatureBasis.from_layers(moments, **candidate.fit, fitted=fitted)
        return bases[what]

    rows: Rows = {}
    try:
        for name, candidate in candidates.items():
            what = json.dumps([candidate.options, candidate.fit], sort_keys=True)
            if (found := None if kept is None else kept.find(what)) is not None:
                progress(f"measured before: {candidate.label}", 1)()
            else:
                _switch(model, candidate, basis_of(candidate))
                found = _measured(model, evaluation, progress(f"perplexity: {candidate.label}", len(evaluation)))
                if kept is not None:
                    kept.add(what, found)
            rows[name] = {"label": candidate.label} | found
            rows[name] |= _against(rows[name], rows["dense"])
        chosen = limits.pick(rows, names)
        if chosen is None:
            raise NothingFitsError(
                limits, sorted((rows[name] for name in names), key=lambda row: row["loss"])[:_NEAREST]
            )
        choice = Choice(rows, candidates, chosen, basis_of(candidates[chosen]))
    except BaseException:
        disable(model)
        raise
    choice.switch(model)
    return choice


@contextmanager
def _wide_on_a_cpu(model: Any) -> Iterator[None]:
    """On a CPU the model computes in float32, which most CPUs do several times faster than in 16 bits; its weights come out unchanged.
    Large models stay as they are."""
    narrow = [(x, x.dtype) for x in model.parameters() if x.dtype in (torch.bfloat16, torch.float16)]
    if model.device.type != "cpu" or sum(x.numel() for x, _ in narrow) > _MOST_WIDENED:
        yield
        return
    try:
        for x, _ in narrow:
            x.data = x.data.float()
        yield
    finally:
        for x, dtype in narrow:
            x.data = x.data.to(dtype)


def _switch(model: Any, candidate: Candidate, basis: FeatureBasis | None) -> None:
    disable(model)
    if candidate.options is not None:
        enable(model, basis=basis, **candidate.options)


def _measured(model: Any, evaluation: Tensor, progress: Callable[[], None]) -> dict[str, Any]:
    """Losses of the windows, bytes of a further token, and those of a cache that holds one window, exact tokens included."""
    with _wide_on_a_cpu(model):
        losses = window_losses(model, evaluation, progress)
    tokens = evaluation.shape[1]
    cache = blank_cache(model, tokens)
    nbytes = cache_nbytes(cache)
    _, kv_heads, _ = attention_shape(model)
    rows = tokens * len(attention_layers(model)) * kv_heads
    return {
        "perplexity": spread(losses)[0],
        "window_losses": losses,
        "token_bytes": token_bytes(model),
        "kv_bytes_per_token": nbytes["total"] / tokens,
        "key_bytes_per_token_and_head": nbytes["keys"] / rows,
        "value_bytes_per_token_and_head": nbytes["values"] / rows,
    }


def _against(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """What a row lost of the dense one, the standard error of that over the windows, and the share of its bytes."""
    ratio, error = spread(row["window_losses"], dense["window_losses"])
    return {"loss": ratio - 1, "loss_error": error, "share": row["token_bytes"] / dense["token_bytes"]}


def _without_figures(candidate: Candidate, dense_bytes: int) -> dict[str, Any]:
    nbytes = candidate.token_bytes or dense_bytes
    return {"label": candidate.label, "token_bytes": nbytes, "share": nbytes / dense_bytes}


def _fingerprint(model: Any, calibration: Tensor, evaluation: Tensor, max_position: int | None) -> str:
    """Of all that a measurement depends on beside its candidate: the config, the weights by their sums, the windows, the versions."""
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    sums = [(name, str(x.dtype), x.detach().sum(dtype=torch.float64).item()) for name, x in model.named_parameters()]
    windows = [x.tolist() for x in (calibration, evaluation)]
    versions = [__version__, torch.__version__, model.device.type]
    found = json.dumps([config, sums, windows, max_position, versions], default=str, sort_keys=True)
    return hashlib.sha256(found.encode()).hexdigest()

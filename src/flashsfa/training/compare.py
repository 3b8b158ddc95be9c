"""Finished runs beside one another: what they reached, and how their training losses went."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import require
from ..extras import pyplot
from .recipe import Attention, Data, Distill, Model, Training
from .run import RESULT

_PARTS = {"model": Model, "attention": Attention, "data": Data, "training": Training, "distill": Distill}  # of a recipe
_LARGEST_GAP = 100.0  # between the logarithms of two perplexities: more is drawn as this
_SMOOTHED = 7  # logs that a point of a drawn curve is the mean of
FEWEST_LOSSES = _SMOOTHED + 1  # of a curve of two points


@dataclass(frozen=True)
class Run:
    """A finished run: its directory's name, its recipe and what stands in `result.json`."""

    name: str
    recipe: dict[str, Any]
    result: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.recipe["training"]["seed"]

    @property
    def sight(self) -> tuple:
        """What must be alike for losses to be compared: the tokens, their order apart, and the steps."""
        data, training = _said("data", self.recipe["data"]), self.recipe["training"]
        return *sorted(map(repr, data.items())), training["tokens"], training["batch"]

    @property
    def kind(self) -> str:
        """What differs from the defaults in the recipe, as text, apart from its seed: a key that is newer than a run is at its default there."""
        recipe = self.recipe | {"training": self.recipe["training"] | {"seed": None}}
        return json.dumps(
            {name: _said(name, part) for name, part in recipe.items() if part is not None}, sort_keys=True
        )

    def losses(self) -> dict[float, float]:
        """The training loss by step."""
        return {row["step"]: row["loss"] for row in self.result["curve"] if "loss" in row}


def _said(name: str, part: Any) -> Any:
    """What differs from the defaults in a part of a recipe."""
    defaults = _PARTS.get(name)
    if defaults is None or not isinstance(part, dict):
        return part
    return {key: x for key, x in part.items() if x != getattr(defaults, key, object())}


def read_run(directory: Path) -> Run:
    """The finished run in `directory`. Raises `ValueError` if there is none, or one whose result is not whole."""
    path = directory / RESULT
    require(path.is_file(), f"{directory} holds no finished run: {RESULT} is missing")
    try:
        result = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, it is no valid JSON: leave this run out, or run it again") from error
    try:
        _check_result(result)
    except ValueError as error:
        raise ValueError(f"{path} is no result of a run: {error}; leave this run out, or run it again") from error
    return Run(directory.resolve().name, result.pop("recipe"), result)


def _check_result(result: Any) -> None:
    """Raise `ValueError` that names the key unless `compare` and `draw` find all that they read, of the right kind."""

    def found(key: str) -> Any:
        value = result
        for part in key.split("."):
            require(isinstance(value, dict) and part in value, f"{key} is missing")
            value = value[part]
        return value

    for key in ("recipe.data.context", "recipe.training.tokens", "recipe.training.batch", "parameters", "steps"):
        _check_number(key, found(key), 1, whole=True)
    _check_number("recipe.training.seed", found("recipe.training.seed"), 0, whole=True)
    _check_number("perplexity", found("perplexity"), 1e-300)
    for key in ("seconds_per_step", "peak_memory_bytes"):
        if found(key) is not None:
            _check_number(key, found(key), 0)
    require(isinstance(result["recipe"].get("attention", {}), dict), "recipe.attention is no mapping")
    date, commit = found("environment.date"), found("environment.commit")
    require(
        isinstance(date, str) and bool(re.match(r"\d{4}-\d\d-\d\d", date)), f"environment.date is no date: {date!r}"
    )
    require(
        commit is None or (isinstance(commit, str) and bool(re.fullmatch(r"[\w-]+", commit))),
        f"environment.commit is no commit: {commit!r}",
    )
    curve = found("curve")
    require(isinstance(curve, list) and all(isinstance(row, dict) for row in curve), "curve is no list of rows")
    losses = [row for row in curve if "loss" in row]
    require(bool(losses), "curve holds no loss")
    for row in losses:
        _check_number("curve: step", row.get("step"), 0, whole=True)
        _check_number("curve: loss", row["loss"], -(2**63))


def _check_number(key: str, value: Any, least: float, whole: bool = False) -> None:
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    require(
        is_number and least <= value < 2**63,
        f"{key} is {value!r:.80}, and no {'count' if whole else 'number'} that a run has",
    )


def compare(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each kind of run, over its seeds; "change" is a seed's perplexity over that of the first kind, less 1. Step time and
    memory are means over the seeds, None where a run has none.

    Raises `ValueError` for runs that saw other tokens or took other steps, of a seed that the first kind lacks, or of one recipe and seed.
    """
    for run in runs:
        require(run.sight == runs[0].sight, f"{run.name} saw other data or took other steps than {runs[0].name}")
    names = Counter(run.name for run in runs)
    require(max(names.values()) == 1, f"two runs are named {max(names, key=names.__getitem__)}: rename a directory")
    kinds: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        kinds.setdefault(run.kind, []).append(run)
    for same in kinds.values():
        for one, other in itertools.pairwise(same):  # by seed
            require(
                one.seed != other.seed,
                f"{one.name} and {other.name} are runs of one recipe and seed: leave one of them out, or train it with another training.seed",
            )
    base = {run.seed: run.result["perplexity"] for run in kinds[runs[0].kind]}
    for run in runs:
        require(run.seed in base, f"{run.name} has seed {run.seed}, and {runs[0].name} was not run with it")
    return [
        {
            "runs": [run.name for run in same],
            "seeds": [run.seed for run in same],
            "model": same[0].recipe.get("model"),
            "attention": same[0].recipe.get("attention", {}),
            "tokens": same[0].recipe["training"]["tokens"],
            "parameters": same[0].result["parameters"],
            "perplexity": [run.result["perplexity"] for run in same],
            "change": [run.result["perplexity"] / base[run.seed] - 1 for run in same],
            "seconds_per_step": _mean([run.result["seconds_per_step"] for run in same]),
            "peak_memory_bytes": _mean([run.result["peak_memory_bytes"] for run in same]),
        }
        for same in kinds.values()
    ]


def _mean(figures: Sequence[float | None]) -> float | None:
    known = [x for x in figures if x is not None]
    return statistics.fmean(known) if len(known) == len(figures) else None


def has_curves(runs: Sequence[Run]) -> bool:
    """Whether `draw` has anything to draw: a run that logged at least `FEWEST_LOSSES` losses."""
    return any(len(run.losses()) >= FEWEST_LOSSES for run in runs)


def draw(runs: Sequence[Run], path: Path) -> None:
    """Write two pictures as a PNG: training losses, and how far each lies above that of the first kind with its seed."""
    plt = pyplot()
    data, training = runs[0].recipe["data"], runs[0].recipe["training"]
    tokens = data["context"] * training["batch"] / 1e6
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    base = {run.seed: run.losses() for run in runs if run.kind == runs[0].kind}
    colours = plt.get_cmap("tab20").colors
    for run, colour in zip(runs, colours * len(runs), strict=False):
        losses = run.losses()
        label = f"{_plain(run.name)}  {run.result['perplexity']:.2f}"
        left.plot(*_smooth({s * tokens: x for s, x in losses.items()}), color=colour, label=label, lw=1.3)
        shared = {s: x - base[run.seed][s] for s, x in losses.items() if s in base[run.seed]}
        if shared:
            gap = {s * tokens: 100 * math.expm1(min(x, _LARGEST_GAP)) for s, x in shared.items()}
            right.plot(*_smooth(gap), color=colour, lw=1.3)
    left.set(
        xlabel="trained on, million tokens", ylabel="training loss, nats per token",
        title="Training loss; validation perplexity beside the name",
    )  # fmt: skip
    right.set(
        xlabel="trained on, million tokens", ylabel="perplexity above the baseline's, %",
        title=f"On training text, against {_plain(runs[0].name)}",
    )  # fmt: skip
    lowest = min(_smooth(run.losses())[1][-1] for run in runs)
    left.set_ylim(lowest - 0.1, lowest + 1.5)
    ends = [line.get_ydata()[-1] for line in right.get_lines()]  # early differences may be large, and say nothing
    right.set_ylim(min(ends) - 5, max(ends) + 10)
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plain(name: str) -> str:
    """A name as matplotlib writes it, which reads what stands between dollars as mathematics."""
    return name.replace("$", r"\$")


def _smooth(points: dict[float, float]) -> tuple[list[float], list[float]]:
    """x and y of the running mean of points."""
    x, y = list(points), list(points.values())
    width = min(_SMOOTHED, len(y))
    return x[width - 1 :], [statistics.fmean(y[i : i + width]) for i in range(len(y) - width + 1)]

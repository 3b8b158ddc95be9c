"""Finished runs beside one another: what they reached, and how their training losses went."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import require
from .run import RESULT

_SMOOTHED = 7  # logs that a point of a drawn curve is the mean of


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
        data, training = self.recipe["data"], self.recipe["training"]
        return *data.values(), training["tokens"], training["batch"]

    @property
    def kind(self) -> str:
        """The recipe as text, apart from its seed."""
        return json.dumps(self.recipe | {"training": self.recipe["training"] | {"seed": None}}, sort_keys=True)

    def losses(self) -> dict[float, float]:
        """The training loss by step."""
        return {row["step"]: row["loss"] for row in self.result["curve"] if "loss" in row}


def read_run(directory: Path) -> Run:
    """The finished run in `directory`. Raises `ValueError` if there is none."""
    path = directory / RESULT
    require(path.is_file(), f"{directory} holds no finished run: {RESULT} is missing")
    result = json.loads(path.read_text())
    return Run(directory.resolve().name, result.pop("recipe"), result)


def compare(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each kind of run, over its seeds; "change" is a seed's perplexity over that of the first kind, less 1.

    Raises `ValueError` for runs that saw other tokens or took other steps, or of a seed that the first kind lacks.
    """
    for run in runs:
        require(run.sight == runs[0].sight, f"{run.name} saw other data or took other steps than {runs[0].name}")
    kinds: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        kinds.setdefault(run.kind, []).append(run)
    base = {run.seed: run.result["perplexity"] for run in kinds[runs[0].kind]}
    for run in runs:
        require(run.seed in base, f"{run.name} has seed {run.seed}, and {runs[0].name} was not run with it")
    return [
        {
            "runs": [run.name for run in same],
            "seeds": [run.seed for run in same],
            "attention": same[0].recipe.get("attention", {}),
            "parameters": same[0].result["parameters"],
            "perplexity": [run.result["perplexity"] for run in same],
            "change": [run.result["perplexity"] / base[run.seed] - 1 for run in same],
            "seconds_per_step": same[0].result["seconds_per_step"],
            "peak_memory_bytes": same[0].result["peak_memory_bytes"],
        }
        for same in kinds.values()
    ]


def draw(runs: Sequence[Run], path: Path) -> None:
    """Write two pictures as a PNG: training losses, and how far each lies above that of the first kind with its seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    data, training = runs[0].recipe["data"], runs[0].recipe["training"]
    tokens = data["context"] * training["batch"] / 1e6
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    base = {run.seed: run.losses() for run in runs if run.kind == runs[0].kind}
    colours = plt.get_cmap("tab20").colors
    for run, colour in zip(runs, colours * len(runs), strict=False):
        losses = run.losses()
        label = f"{run.name}  {run.result['perplexity']:.2f}"
        left.plot(*_smooth({s * tokens: x for s, x in losses.items()}), color=colour, label=label, lw=1.3)
        gap = {s * tokens: 100 * math.expm1(x - base[run.seed][s]) for s, x in losses.items() if s in base[run.seed]}
        right.plot(*_smooth(gap), color=colour, lw=1.3)
    left.set(
        xlabel="million tokens", ylabel="training loss", title="training loss; validation perplexity beside the name"
    )
    right.set(xlabel="million tokens", ylabel="%", title=f"perplexity on training text against {runs[0].name}")
    lowest = min(_smooth(run.losses())[1][-1] for run in runs)
    left.set_ylim(lowest - 0.1, lowest + 1.5)
    ends = [line.get_ydata()[-1] for line in right.get_lines()]  # early differences may be large, and say nothing
    right.set_ylim(min(ends) - 5, max(ends) + 10)
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _smooth(points: dict[float, float]) -> tuple[list[float], list[float]]:
    """x and y of the running mean of points."""
    x, y = list(points), list(points.values())
    width = min(_SMOOTHED, len(y))
    return x[width - 1 :], [statistics.fmean(y[i : i + width]) for i in range(len(y) - width + 1)]

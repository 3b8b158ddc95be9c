"""Needle in a haystack: what a model finds again, over the depth of the needle and the length of the context."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..extras import pyplot
from . import VARIANTS
from .haystack import Sample


@torch.no_grad()
def find_needles(
    model: Any, tokenizer: Any, samples: Sequence[Sample], progress: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """Continue each sample greedily; a row a sample: length, depth, prompt_tokens, answers, continuation, score.

    Args:
        model, tokenizer: of transformers; the model makes its own cache.
        samples: from `haystack.samples`.
        progress: called after each sample.
    """
    rows = []
    for sample in samples:
        prompt = torch.tensor([sample.prompt], device=model.device)
        out = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=sample.new_tokens, do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )  # fmt: skip
        continuation = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
        rows.append(
            {
                "length": sample.length, "depth": sample.depth, "prompt_tokens": prompt.shape[1],
                "answers": list(sample.answers), "continuation": continuation, "score": sample.score(continuation),
            }
        )  # fmt: skip
        progress()
    return rows


@dataclass(frozen=True)
class ScoreGrid:
    """Mean scores over depth and length.

    Attributes:
        depths: labels of the rows.
        lengths: tokens, of the columns.
        scores: a list a depth.
        mean: over all cells.
    """

    depths: list[str]
    lengths: list[int]
    scores: list[list[float]]
    mean: float

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> ScoreGrid:
        """Of the rows of `find_needles`."""
        depths, lengths = (list(dict.fromkeys(row[name] for row in rows)) for name in ("depth", "length"))
        cells = {
            (d, n): [r["score"] for r in rows if r["depth"] == d and r["length"] == n] for d in depths for n in lengths
        }
        scores = [[statistics.fmean(cells[d, n]) for n in lengths] for d in depths]
        labels = ["all" if depth is None else f"{100 * depth:.0f} %" for depth in depths]
        return cls(labels, lengths, scores, statistics.fmean(itertools.chain(*scores)))


def draw(title: str, grids: Mapping[str, ScoreGrid], path: Path) -> None:
    """Write a heat map of depth over length as a PNG, a panel a variant, named by the key of its grid."""
    plt = pyplot()
    any_grid = next(iter(grids.values()))
    width, height = 2.2 + 0.8 * len(any_grid.lengths), 1.8 + 0.5 * len(any_grid.depths)
    figure, panels = plt.subplots(
        1, len(grids), figsize=(max(6.0, width * len(grids)), height), layout="constrained", squeeze=False, sharey=True
    )
    figure.suptitle(title, fontsize=10, parse_math=False)
    for (name, grid), axes in zip(grids.items(), panels[0], strict=True):
        image = axes.imshow(grid.scores, vmin=0, vmax=1, cmap="YlGnBu", aspect="auto")
        for y, row in enumerate(grid.scores):
            for x, score in enumerate(row):
                axes.text(
                    x, y, f"{100 * score:.0f}", ha="center", va="center", color="white" if score > 0.5 else "black"
                )
        axes.set_title(f"{VARIANTS[name]}: {100 * grid.mean:.0f} % found", fontsize=10)
        axes.set_xticks(range(len(grid.lengths)), grid.lengths, rotation=45 if len(grid.lengths) > 6 else 0)
        axes.set_yticks(range(len(grid.depths)), grid.depths)
        axes.set_xlabel("context length in tokens")
    panels[0, 0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=panels, label="share of answers found")
    figure.savefig(path, dpi=130)
    plt.close(figure)

"""The picture of a run: how much faster each case is than its strongest rival, as bars, at the two longest lengths measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..extras import pyplot
from .cases import rival_name, tokens_label
from .results import Results

_COLORS = ("#1d6fb8", "#8ecae6")  # the longest length first
_SLOWER = "#b4532a"
_INK = "#4c566a"
_LENGTHS = 2
_INCHES_A_BAR = 0.24
_TITLES = {
    "decode": "Decode: attention of one new token over the tokens in the cache",
    "prefill": "Prefill: a causal forward pass, selection of features included",
    "topk": "Selecting the features of keys",
    "generate": "Whole models: a token after a long context",
    "generate-plain": "Whole models: a token of a plain model.generate()",
    "serve": "Serving with vLLM: output tokens a second",
}

Groups = Mapping[str, Mapping[str, Mapping[int, float]]]


def draw(results: Results, file: Path | IO[bytes]) -> None:
    """Write a PNG of the rows that have a time and a rival; with none, the picture says so."""
    rows = [row for row in results.rows if row.ratio is not None]
    longest = sorted({row.n for row in rows})[-_LENGTHS:]
    groups: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row.n in longest and row.ratio is not None:
            groups.setdefault(row.facet, {}).setdefault(row.curve, {})[row.n] = row.ratio
    competing = [name for row in rows for name, result in row.baselines.items() if result.competes]
    rivals = dict.fromkeys(rival_name(name.removesuffix("_grouped")) for name in competing)
    speedup_bars(file, groups, title=f"{_TITLES[results.operation]}\n{results.title}", rivals=tuple(rivals))


def speedup_bars(file: Path | IO[bytes], groups: Groups, *, title: str, rivals: Sequence[str]) -> None:
    """Write a PNG of horizontal bars, one a length: a ratio of times by group, label and tokens. Bars below 1, where it is
    slower, have a colour of their own."""
    from matplotlib.patches import Patch

    plt = pyplot()
    lengths = sorted({n for bars in groups.values() for of_label in bars.values() for n in of_label}, reverse=True)
    colors = {n: _COLORS[i % len(_COLORS)] for i, n in enumerate(lengths)}
    places, labels, heads, at = [], [], [], 0.0
    for group, bars in groups.items():
        heads.append((at, group))
        at += 1.2
        for label, ratios in bars.items():
            places += [(at + i, n, ratios[n]) for i, n in enumerate(n for n in lengths if n in ratios)]
            labels.append((at + (len(ratios) - 1) / 2, label))
            at += len(ratios) + 0.6
        at += 0.6
    figure, axes = plt.subplots(figsize=(10, 1.7 + _INCHES_A_BAR * at), layout="constrained")
    figure.suptitle(title if groups else f"{title}\nnothing was timed", fontsize=10)
    beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9}
    beside["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # over the line at 1
    for y, n, ratio in places:
        axes.barh(y, ratio, 0.9, color=colors[n] if ratio >= 1 else _SLOWER, alpha=1 if n == lengths[0] else 0.75)
        axes.annotate(f"{ratio:.2f}x", (ratio, y), (5, 0), **beside)
    for y, group in heads:
        axes.annotate(group, (0, y), (4, 0), weight="bold", **beside)
    axes.set_yticks([y for y, _ in labels], [label for _, label in labels])
    axes.tick_params(axis="y", length=0)
    axes.axvline(1, color=_INK, lw=1.5)
    axes.set_xlim(0, 1.12 * max((ratio for *_, ratio in places), default=1.0))
    axes.set_ylim(at - 1, -0.8)
    against = f"the fastest of {', '.join(rivals)}" if len(rivals) > 1 else "".join(rivals)
    axes.set_xlabel(f"times as fast as {against} (higher is better)" if rivals else "")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=colors[n], label=f"{tokens_label(n)} tokens") for n in lengths]
    if any(ratio < 1 for *_, ratio in places):
        handles.append(Patch(color=_SLOWER, label="slower than the rival"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)

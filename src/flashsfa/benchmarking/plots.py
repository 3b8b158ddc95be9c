"""The picture of a run: time, and bytes or operations, over context length, with the roofline of each curve."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import tokens_label
from .results import Results, Row

_COLORS = ("#2a9d8f", "#e76f51", "#8e5ea2", "#d4a017", "#1d6fb8", "#7a9e3b")
_BASELINE_COLORS = ("#4c566a", "#8d96a8", "#4c566a", "#8d96a8")
_BASELINE_MARKERS = ("s", "D", "^", "v")


def draw(results: Results, path: Path) -> None:
    """Write a PNG: a column a facet; above milliseconds, with each curve's roofline dashed; below bytes moved, or TFLOP/s
    where arithmetic is of interest.

    Rows without a time are not drawn; with none left, the picture says so.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    rows = [row for row in results.rows if row.timing is not None]
    counts_work = any(row.tflops for row in rows)
    facets = list(dict.fromkeys(row.facet for row in rows)) or ["nothing was timed"]
    curves = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(dict.fromkeys(row.curve for row in rows))}
    names = list(dict.fromkeys(name for row in rows for name in row.baselines))
    baselines = {
        name: (_BASELINE_COLORS[i % len(_BASELINE_COLORS)], _BASELINE_MARKERS[i % len(_BASELINE_MARKERS)])
        for i, name in enumerate(names)
    }
    figure, panels = plt.subplots(
        2, len(facets), figsize=(max(8, 4 * len(facets)), 8), layout="constrained", squeeze=False
    )
    figure.suptitle(f"{results.operation}: {results.title}", fontsize=10)
    for facet, times, below in zip(facets, *panels, strict=True):
        here = [row for row in rows if row.facet == facet]
        for name, (color, marker) in baselines.items():
            measured = [row for row in here if name in row.baselines]
            style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1}
            _line(times, [(row.n, row.baselines[name].timing.median_ms) for row in measured], **style)
            lower = [
                baseline_tflops(row, name) if counts_work else row.baselines[name].moved_per_token for row in measured
            ]
            _line(below, [(row.n, value) for row, value in zip(measured, lower, strict=True)], **style)
        for name, color in curves.items():
            of_curve = [row for row in here if row.curve == name]
            limits = [(row.n, 1e3 * row.bytes_moved / results.copy_bytes_per_s) for row in of_curve if row.bytes_moved]
            _line(times, [(row.n, row.timing.median_ms) for row in of_curve if row.timing], color=color, marker="o")
            _line(times, limits, color=color, ls="--", lw=1)
            own = [(row.n, row.tflops if counts_work else row.moved_per_token) for row in of_curve]
            _line(below, [(n, value) for n, value in own if value], color=color, marker="o")
        lengths = sorted({row.n for row in here})
        for axes in (times, below):
            axes.set_xscale("log")
            axes.set_xticks(lengths, [tokens_label(n) for n in lengths])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.set_xlabel("context length, tokens")
        times.set(yscale="log", ylabel="ms, median")
        times.set_title(facet, fontsize=9)
        times.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        times.yaxis.set_major_formatter("{x:g}")
        times.minorticks_off()
        label = "TFLOP/s of the dense computation" if counts_work else "bytes moved a token and kv head"
        below.set(ylabel=label, ylim=(0, 1.08 * below.get_ylim()[1]))
    handles = [Line2D([], [], color=c, marker=m, lw=1, label=n.replace("_", " ")) for n, (c, m) in baselines.items()]
    handles += [Line2D([], [], color=color, marker="o", label=name) for name, color in curves.items()]
    handles.append(Line2D([], [], color="black", ls="--", lw=1, label="roofline: bytes moved / copy bandwidth"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def baseline_tflops(row: Row, name: str) -> float:
    """Operations of the dense computation a second of a baseline, by its time."""
    assert row.tflops is not None
    return row.tflops / row.baselines[name].ratio


def _line(axes: Any, points: Sequence[tuple[int, float]], **style: Any) -> None:
    """A line through (context length, value); where several rows measured the same baseline, their median."""
    lengths = sorted({n for n, _ in points})
    axes.plot(lengths, [statistics.median(value for n, value in points if n == length) for length in lengths], **style)

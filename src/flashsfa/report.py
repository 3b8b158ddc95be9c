"""The picture of a conversion: quality, bytes and time, dense beside sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .extras import pyplot

_DENSE, _SPARSE, _OTHER, _GREY = "#4c566a", "#2a9d8f", "#8fa3b0", "#c9ced6"


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the four panels of a `convert` report as a PNG."""
    plt = pyplot()
    figure, ((quality, memory), (prefill, decode)) = plt.subplots(
        2, 2, figsize=(12, 5 + 0.6 * max(5, len(report["variants"]))), layout="constrained"
    )
    figure.suptitle(f"{report['settings']['model']}: dense and Sparse Feature Attention", fontsize=13, parse_math=False)
    _draw_quality(quality, report)
    _draw_memory(memory, report)
    rows = report["attention_ms"]
    _draw_times(prefill, "prefill", [row for row in rows if "prefill_dense" in row])
    prefill.set_title("Prefill: one layer's attention over a prompt")
    _draw_times(decode, "decode", rows)
    decode.set_title("Decode: one layer's attention of a new token")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_frontier(report: dict[str, Any], path: Path) -> None:
    """Write the loss of each candidate over its bytes as a PNG: the choice marked, the limits as lines, dense caches beside."""
    plt = pyplot()
    rows, chosen = report["variants"], report["chosen"]
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for name, row in rows.items():
        is_dense, is_chosen = name.startswith("dense"), name == chosen
        color = _SPARSE if is_chosen else _DENSE if is_dense else _OTHER
        axes.errorbar(
            row["token_bytes"], 100 * row["loss"], yerr=100 * (row["loss_error"] or 0) if name != "dense" else None,
            fmt="s" if is_dense else "D" if name.startswith("topk") else "o", color=color, capsize=3, zorder=3 if is_chosen else 2,
            markersize=11 if is_chosen else 7,
        )  # fmt: skip
        if is_dense or name.startswith("topk"):
            axes.annotate(
                row["label"], (row["token_bytes"], 100 * row["loss"]), xytext=(7, 9), textcoords="offset points", color=color,
                fontsize=9, parse_math=False, ha="right" if name == "dense" else "left",
            )  # fmt: skip
    best = _frontier([(row["token_bytes"], 100 * row["loss"]) for row in rows.values()])
    axes.plot(*zip(*best, strict=True), color=_GREY, drawstyle="steps-post", zorder=1)
    settings, dense = report["settings"], rows["dense"]["token_bytes"]
    if settings["max_loss"] is not None:
        axes.axhline(100 * settings["max_loss"], color=_SPARSE, linewidth=1, linestyle="--")
    if settings["max_bytes"] is not None:
        axes.axvline(settings["max_bytes"] * dense, color=_SPARSE, linewidth=1, linestyle="--")
    axes.axhline(0, color=_DENSE, linewidth=0.8)
    row = rows[chosen]
    axes.set_title(
        f"{settings['model']}: chosen {row['label']}\n{100 * row['loss']:+.2f} % of perplexity, {row['token_bytes']} of {dense} "
        f"bytes ({100 * row['share']:.0f} %)",
        fontsize=11, parse_math=False,
    )  # fmt: skip
    axes.set_xlabel("bytes of a coded token per kv head, key and value")
    axes.set_ylabel("loss of perplexity in %, with its standard error")
    axes.set_xlim(0, 1.05 * dense)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (bytes, loss) those that no other beats in both, from few bytes to many."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def _draw_quality(axes: Any, report: dict[str, Any]) -> None:
    """What each cache loses, in percent of the dense model's perplexity."""
    rows = {name: row for name, row in report["variants"].items() if name != "dense"}
    dense = report["variants"]["dense"]["perplexity"]
    losses = [100 * (row["perplexity"] / dense - 1) for row in rows.values()]
    bars = axes.barh([row["label"] for row in rows.values()], losses, color=_colors(report, rows))
    axes.bar_label(bars, [f"{loss:+.2f} %" for loss in losses], padding=3)
    axes.invert_yaxis()
    axes.axvline(0, color=_DENSE, linewidth=1)
    high = max(0.5, *losses)
    axes.set_xlim(min(losses) - 0.3 * high if min(losses) < 0 else 0, 1.3 * high)  # room for the labels
    axes.set_xlabel(f"perplexity against dense ({dense:.2f}), lower is better")
    axes.set_title("Loss, each token scored as decode sees it")


def _draw_memory(axes: Any, report: dict[str, Any]) -> None:
    rows = report["variants"]
    names = [row["label"] for row in rows.values()]
    keys = [row["key_bytes_per_token_and_head"] for row in rows.values()]
    values = [row["value_bytes_per_token_and_head"] for row in rows.values()]
    axes.barh(names, keys, color=_colors(report, rows))
    bars = axes.barh(names, values, left=keys, color=_GREY)
    whole = keys[0] + values[0]
    sums = [key + value for key, value in zip(keys, values, strict=True)]
    axes.bar_label(bars, [f"{x:.0f}  ({100 * x / whole:.0f} %)" for x in sums], padding=3)
    axes.invert_yaxis()
    axes.set_yticks(range(len(names)), [""] * len(names))  # those of the panel beside, and dense on top
    axes.text(0, 0, "  dense", va="center", color="white")
    axes.set_xlim(0, 1.4 * whole)
    axes.set_xlabel("bytes per token and kv head: keys (dark) and values (light)")
    axes.set_title("KV cache, read from the live one")


def _colors(report: dict[str, Any], rows: dict[str, Any]) -> list[str]:
    return [_SPARSE if name == report["chosen"] else _DENSE if name.startswith("dense") else _OTHER for name in rows]


def _draw_times(axes: Any, phase: str, rows: list[dict[str, float]]) -> None:
    """Time against dense attention's, so that a context of 1k and one of 32k can be read side by side; milliseconds on the bars."""
    shares = [100 * row[f"{phase}_sfa"] / row[f"{phase}_dense"] for row in rows]
    for shift, kind, color, heights in ((-0.2, "dense", _DENSE, [100.0] * len(rows)), (0.2, "sfa", _SPARSE, shares)):
        label = "dense" if kind == "dense" else "Sparse Feature Attention"
        bars = axes.bar([x + shift for x in range(len(rows))], heights, width=0.4, color=color, label=label)
        times = [f"{row[f'{phase}_{kind}']:.3g}\nms" for row in rows]
        axes.bar_label(bars, times, fontsize=8, padding=2)
    ticks = [f"{row['context']:.0f}\n{_comparison(share)}" for row, share in zip(rows, shares, strict=True)]
    axes.set_xticks(range(len(rows)), ticks)
    axes.set_xlim(-0.6, max(len(rows), 3) - 0.4)
    axes.set_ylim(0, 1.35 * max(100.0, *shares))
    axes.set_xlabel("context length in tokens")
    axes.set_ylabel("time, % of dense attention's")
    axes.legend(loc="upper center", ncols=2, fontsize=8)


def _comparison(share: float) -> str:
    """`share` percent of dense attention's time, in words."""
    return f"{100 / share:.2f}x faster" if share <= 100 else f"{share / 100:.2f}x slower"

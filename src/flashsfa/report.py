"""The picture of a conversion: quality, bytes and time, dense beside sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_DENSE, _SPARSE, _GREY = "#4c566a", "#2a9d8f", "#c9ced6"


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the four panels of a `convert` report as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ((quality, memory), (prefill, decode)) = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
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


def _draw_quality(axes: Any, report: dict[str, Any]) -> None:
    names = ("dense", "sfa", "basis", "plain_topk")
    values = [report[name]["perplexity"] for name in names]
    bars = axes.barh([report[name]["label"] for name in names], values, color=(_DENSE, _SPARSE, _GREY, _GREY))
    dense = values[0]
    labels = [f"{dense:.2f}", *(f"{value:.2f}  ({100 * (value / dense - 1):+.1f} %)" for value in values[1:])]
    axes.bar_label(bars, labels, padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * max(values))
    axes.set_xlabel("perplexity, lower is better")
    axes.set_title("Quality, on the same windows of text")


def _draw_memory(axes: Any, report: dict[str, Any]) -> None:
    parts = [report[name] for name in ("dense", "sfa")]
    labels = ("dense", "Sparse Feature Attention")
    keys = [part["key_bytes_per_token_and_head"] for part in parts]
    values = [part["value_bytes_per_token_and_head"] for part in parts]
    axes.bar(labels, values, color=_GREY, width=0.5)
    axes.bar(labels, keys, bottom=values, color=(_DENSE, _SPARSE), width=0.5)
    whole = keys[0] + values[0]
    for x, (key, value) in enumerate(zip(keys, values, strict=True)):
        axes.text(x, value + key / 2, f"keys {key:.0f}", ha="center", va="center", color="white")
        axes.text(x, value / 2, f"values {value:.0f}", ha="center", va="center")
        saved = f"  ({100 * ((key + value) / whole - 1):+.0f} %)" if x else ""
        axes.text(x, key + value + 0.02 * whole, f"{key + value:.0f}{saved}", ha="center", va="bottom")
    axes.set_ylim(0, 1.12 * whole)
    axes.set_ylabel("bytes per token and kv head")
    axes.set_title("KV cache, measured on the live cache")


def _draw_times(axes: Any, phase: str, rows: list[dict[str, float]]) -> None:
    """Time against dense attention's, so that a context of 1k and one of 32k can be read side by side; milliseconds on the bars."""
    shares = [100 * row[f"{phase}_sfa"] / row[f"{phase}_dense"] for row in rows]
    for shift, kind, color, heights in ((-0.2, "dense", _DENSE, [100.0] * len(rows)), (0.2, "sfa", _SPARSE, shares)):
        label = "dense" if kind == "dense" else "Sparse Feature Attention"
        bars = axes.bar([x + shift for x in range(len(rows))], heights, width=0.4, color=color, label=label)
        times = [f"{row[f'{phase}_{kind}']:.3g}\nms" for row in rows]
        axes.bar_label(bars, times, label_type="center", color="white", fontsize=9)
    ticks = [f"{row['context']:.0f}\n{_comparison(share)}" for row, share in zip(rows, shares, strict=True)]
    axes.set_xticks(range(len(rows)), ticks)
    axes.set_xlim(-0.6, max(len(rows), 3) - 0.4)
    axes.set_ylim(0, 1.25 * max(100.0, *shares))
    axes.set_xlabel("context length in tokens")
    axes.set_ylabel("time, % of dense attention's")
    axes.legend(loc="upper center", ncols=2, fontsize=8)


def _comparison(share: float) -> str:
    """`share` percent of dense attention's time, in words."""
    return f"{100 / share:.2f}x faster" if share <= 100 else f"{share / 100:.2f}x slower"

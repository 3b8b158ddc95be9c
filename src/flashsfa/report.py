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

    figure, ((quality, memory), (prefill, decode)) = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    figure.suptitle(f"{report['settings']['model']}: dense and Sparse Feature Attention", fontsize=13, parse_math=False)

    names = ("dense", "sfa", "basis", "plain_topk")
    colors = (_DENSE, _SPARSE, _GREY, _GREY)
    values = [report[n]["perplexity"] for n in names]
    bars = quality.barh([report[n]["label"] for n in names], values, color=colors)
    quality.bar_label(bars, [f"{v:.2f}" for v in values], padding=3)
    quality.invert_yaxis()
    quality.set_xlim(0, 1.25 * max(values))
    quality.set_title("Perplexity, same windows (lower is better)")

    labels = ("dense", "SFA")
    parts = [report[n] for n in ("dense", "sfa")]
    keys = [p["key_bytes_per_token_and_head"] for p in parts]
    vs = [p["value_bytes_per_token_and_head"] for p in parts]
    memory.bar(labels, vs, color=_GREY, label="values", width=0.5)
    memory.bar(labels, keys, bottom=vs, color=(_DENSE, _SPARSE), width=0.5)
    for i, (key, value) in enumerate(zip(keys, vs, strict=True)):
        memory.text(i, value + key / 2, f"keys {key:.0f} B", ha="center", va="center", color="white")
        memory.text(i, value / 2, f"values {value:.0f} B", ha="center", va="center")
    memory.set_ylabel("bytes a token and kv head")
    memory.set_title("KV cache, measured on the live cache")

    for axes, phase in ((prefill, "prefill"), (decode, "decode")):
        rows = [r for r in report["attention_ms"] if f"{phase}_dense" in r]
        contexts = [r["context"] for r in rows]
        for kind, color in (("dense", _DENSE), ("sfa", _SPARSE)):
            axes.plot(
                contexts,
                [r[f"{phase}_{kind}"] for r in rows],
                "o-",
                color=color,
                label=kind if kind == "dense" else "SFA",
            )
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="context",
            ylabel="ms",
            title=f"Attention of one layer: {phase}",
        )
        axes.set_xticks(contexts, [str(c) for c in contexts])
        axes.minorticks_off()
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)

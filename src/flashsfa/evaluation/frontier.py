"""One model, one row: what trained models lose in each form of their caches, and the time of decode that was measured of each form,
beside the dense model that was trained on the same tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..basis import FeatureBasis
from ..benchmarking.cases import tokens_label
from ..benchmarking.configuration import Configuration
from ..benchmarking.decode import DecodeCase
from ..candidates import Exact, rivals
from ..checks import require
from ..extras import pyplot
from ..formats import ROTATION_WIDTH
from ..huggingface import SFASettings, attention_shape, disable, enable
from .haystack import Sample
from .memory import cache_bytes_per_token, token_bytes
from .needle import find_needles
from .perplexity import spread, window_losses
from .subject import Progress
from .tolerance import tolerance_losses

_CACHES = {16: None, 8: "int8", 4: "int4", 3: "d8s4v3"}  # `enable`'s cache_dtype by bits
_COLORS = ("#4c566a", "#2a9d8f", "#d1803a", "#7a5195", "#1d6fb8", "#b4532a")  # the dense model first
_MARKERS = {16: "o", 8: "s", 4: "D", 3: "^"}

Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Form:
    """A way to keep the cache of a model.

    Attributes:
        configuration: which has its name in all tables.
        options: `enable`'s, the basis apart; None for a dense model as it is.
    """

    configuration: Configuration
    options: dict[str, Any] | None

    def switch(self, model: Any, basis: FeatureBasis | None) -> None:
        """Switch `model` to it."""
        disable(model)
        if self.options is not None:
            enable(model, basis=basis, **self.options)


def require_forms(name: str, settings: SFASettings) -> None:
    """Raise `ValueError` for a switched model whose caches are none of `forms`."""
    require(
        not (settings.recent or settings.first),
        f"{name} keeps its newest {settings.recent} and first {settings.first} tokens exact, and the forms that are compared keep none: "
        "measure it with flashsfa eval perplexity, or save it switched with recent=0 and first=0",
    )


def forms(settings: SFASettings | None, head_dim: int, basis: FeatureBasis | None = None) -> list[Form]:
    """Those of a model in 16, 8 and 4 bits, and values in 3, as far as the head can be held in them: of a switched model by its settings without its
    `value_tolerance`, which has rows of its own, and of a dense one for None. Of keys in bits per axis, which `basis` says, the values are
    in 16, 8, 4 and 3 bits."""
    found = []
    if settings is None:
        for name, rival in rivals(head_dim, Exact(0, 0, "coded")).items():
            found.append(Form(Configuration.named(name.replace("_", "-"), head_dim), rival.options))
        return found
    axis_bytes = None if basis is None or basis.axes is None else basis.axes.key_bytes
    for bits, cache_dtype in _CACHES.items():
        if (bits > 4 or head_dim % ROTATION_WIDTH == 0) and (bits > 3 or axis_bytes is not None):
            configuration = Configuration(head_dim, settings.dense_dims, settings.topk, bits, axis_bytes=axis_bytes)
            found.append(
                Form(configuration, settings.arguments() | {"cache_dtype": cache_dtype, "value_tolerance": 0.0})
            )
    return found


def measure_model(
    results: Results, name: str, model: Any, tokenizer: Any, basis: FeatureBasis | None, windows: Mapping[int, Tensor],
    tolerances: Sequence[float], prompts: Sequence[Sample], recorded: Sequence[dict[str, Any]], progress: Progress,
) -> None:  # fmt: skip
    """Put the figures of a model by form, and in 16 bits by tolerance, into the results, each as soon as it is whole.

    Args:
        name: of the model, in the results.
        model: dense, or switched with `basis`; it is left in the last of its forms.
        windows: [S, W] token ids by their length W.
        prompts: needles to be found.
        recorded: rows of `flashsfa bench decode`.
    """
    settings = SFASettings.from_config(model.config.sfa) if hasattr(model.config, "sfa") else None
    heads, kv_heads, head_dim = attention_shape(model)
    found: dict[str, Any] = {"sfa": getattr(model.config, "sfa", None), "forms": {}, "tolerances": {}}
    results[name] = found
    for form in forms(settings, head_dim, basis):
        form.switch(model, basis)
        kind, by_length = form.configuration.name, {}
        for length, cut in windows.items():
            losses = window_losses(model, cut, progress(f"{name}: {kind}, {length} tokens", len(cut)))
            by_length[length] = _figures(losses) | {"kv_bytes_per_token": cache_bytes_per_token(model, cut[0])}
        rows = find_needles(model, tokenizer, prompts, progress(f"{name}: {kind}, needles", len(prompts)))
        has_dense_queries = settings is not None and settings.budget(head_dim).keeps_queries
        found["forms"][kind] = {
            "bits": form.configuration.bits,
            "token_bytes": token_bytes(model),
            "lengths": by_length,
            "needles": {n: fmean(r["score"] for r in rows if r["length"] == n) for n in {r["length"] for r in rows}},
            "decode_ms": decode_ms(recorded, form.configuration, has_dense_queries, heads // kv_heads),
        }
        if form.configuration.bits < 16:
            continue
        for tolerance in tolerances:
            by_length = {}
            for length, cut in windows.items():
                bar = progress(f"{name}: tolerance {tolerance:g}, {length} tokens", len(cut))
                losses, share = tolerance_losses(model, cut, tolerance, bar)
                by_length[length] = _figures(losses) | {"v_rows_read": share}
            found["tolerances"][tolerance] = by_length


def compare(results: Results) -> None:
    """Put into the figures what they lose of those of the first model in its first form: "loss" of perplexity, and its "error"."""
    first = next(iter(results.values()))
    dense = next(iter(first["forms"].values()))["lengths"]
    for model in results.values():
        measured = [form["lengths"] for form in model["forms"].values()] + list(model["tolerances"].values())
        for by_length in measured:
            for length, row in by_length.items():
                ratio, error = spread(row["window_losses"], dense[length]["window_losses"])
                row |= {"loss": ratio - 1, "error": error}


def read_recorded(files: Sequence[Path]) -> tuple[list[dict[str, Any]], str]:
    """The rows of results of `flashsfa bench decode` that were timed, and the device and batch that they were timed with. Raises
    `ValueError` for a file that holds none, or files of several devices or batches."""
    rows: list[dict[str, Any]] = []
    devices: dict[str, None] = {}
    for file in files:
        require(file.is_file(), f"--decode {file} does not exist: name the JSON that flashsfa bench decode wrote")
        try:
            content = json.loads(file.read_bytes())
            if content["operation"] != "decode":
                raise KeyError(content["operation"])
            timed = [row for row in content["rows"] if row["status"] == "ok" and row["timing"] and row["baselines"]]
            rows += timed
            device = content["environment"]["device"]
            devices |= {f"{device}, batch {re.findall(r'[0-9]+', row['facet'])[-1]}": None for row in timed}
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise ValueError(f"--decode {file} holds no results of flashsfa bench decode") from error
    require(
        len(devices) <= 1,
        f"--decode: times of {' and '.join(devices)} do not compare; name the files of one device and batch",
    )
    return rows, "".join(devices)


def decode_ms(
    recorded: Sequence[dict[str, Any]], configuration: Configuration, has_dense_queries: bool, group: int
) -> dict[int, float]:
    """Milliseconds by tokens in the cache, of exactly this code at a layout of `group` query heads per kv head. Of dense keys and values
    in 16 bits they are those of the fastest rival."""
    found: dict[int, float] = {}
    curve = DecodeCase(1, group, 1, 1, configuration, torch.float32, torch.device("cpu"), has_dense_queries).curve
    for row in recorded:
        head_dim, query_heads, kv_heads = (int(x) for x in re.findall(r"\d+", row["facet"])[:3])
        if (head_dim, query_heads // kv_heads) != (configuration.head_dim, group):
            continue
        if configuration.is_dense and configuration.bits == 16:
            times = [x["timing"]["median_ms"] for x in row["baselines"].values() if x["competes"]]
            found[row["n"]] = min([*times, found.get(row["n"], torch.inf)])
        elif row["curve"] == curve:
            found[row["n"]] = row["timing"]["median_ms"]
    return found


def draw(title: str, results: Results, length: int, device: str, path: Path) -> None:
    """Write the losses at windows of `length` tokens as a PNG: over bytes, and over the decode times of `device`, its name and the batch, at
    the two longest caches."""
    plt = pyplot()
    timed = sorted({n for model in results.values() for form in model["forms"].values() for n in form["decode_ms"]})[
        -2:
    ]
    figure, panels = plt.subplots(
        1, 1 + len(timed), figsize=(1.5 + 4.8 * (1 + len(timed)), 5), layout="constrained", squeeze=False, sharey=True
    )
    if title:
        figure.suptitle(title, fontsize=11)
    for axes, n in zip(panels[0], (None, *timed), strict=True):
        for place, (name, model) in enumerate(results.items()):
            points = [
                (form["token_bytes"] if n is None else form["decode_ms"][n], 100 * row["loss"], 100 * (row["error"] or 0), form["bits"])
                for form in model["forms"].values()
                for row in (form["lengths"][length],)
                if n is None or n in form["decode_ms"]
            ]  # fmt: skip
            color = _COLORS[place % len(_COLORS)]
            axes.plot([x for x, *_ in points], [y for _, y, *_ in points], color=color, lw=1, alpha=0.5, label=name)
            for x, y, error, bits in points:
                axes.errorbar(x, y, yerr=error, fmt=_MARKERS[bits], color=color, capsize=3)
        axes.axhline(0, color=_COLORS[0], lw=0.8)
        axes.set_xlim(left=0)
        axes.set_xlabel(
            "bytes of a coded token per kv head, key and value"
            if n is None
            else f"decode at {tokens_label(n)} tokens, ms of one layer\n{device}"
        )
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel(f"loss of perplexity at {length} tokens, %\n(bars: its standard error)")
    handles = [
        plt.Line2D([], [], color="black", marker=marker, ls="", label=f"{bits} bits")
        for bits, marker in _MARKERS.items()
    ]
    lines, _ = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles=[*lines, *handles], loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _figures(losses: list[float]) -> dict[str, Any]:
    return {"perplexity": spread(losses)[0], "window_losses": losses}

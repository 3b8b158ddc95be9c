"""`flashsfa convert`: its options, and what it prints of the report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..budget import DENSE
from ..candidates import Exact
from ..evaluation import VARIANTS
from ..presets import DEFAULT_CACHE_DTYPE, MEASURED_HEAD_DIM, PRESETS, larger_budgets
from .options import (
    HELP_TOPICS,
    HelpFormatter,
    add_budget,
    add_device,
    add_dtype,
    add_tokenizer,
    percents,
    require_counts,
    some_path,
    some_text,
)
from .screen import console, need, progress

if TYPE_CHECKING:
    from rich.table import Table

_LARGE_LOSS = 0.05  # of perplexity: more is worth another try


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="convert a language model and report what was saved and what it cost",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "model", nargs="?", type=some_text, metavar="MODEL",
        help="local directory or hub name (default: a small bundled model)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=some_path, required=True, metavar="DIR", help="new directory for model and report"
    )
    parser.add_argument(
        "--max-loss", type=percents, metavar="P%",
        help="choose: of some ten ways to keep the cache that are measured, the one of fewest bytes that loses at most so much of perplexity",
    )  # fmt: skip
    parser.add_argument(
        "--bytes", type=percents, metavar="P%", dest="max_bytes",
        help="choose: the least loss with at most so much of the bytes that a dense key and value take in --dtype",
    )  # fmt: skip
    parser.add_argument(
        "--preset", choices=PRESETS, metavar="NAME",
        help="nothing is compared; of 256 bytes per token and head of 64, and loss of SmolLM2-135M: "
        + "; ".join(
            f"{name}, {x.purpose} ({x.token_bytes}, {x.loss})".replace("%", "%%") for name, x in PRESETS.items()
        ),
    )  # fmt: skip
    add_budget(parser, "the model's positions", cache_dtype=DEFAULT_CACHE_DTYPE, **Exact().options())
    parser.add_argument(
        "--calibrate", type=some_text, metavar="TEXT", help=f"file or folder to calibrate on (default: {HELP_TOPICS})"
    )
    parser.add_argument(
        "--eval", type=some_text, metavar="TEXT", help="file or folder to evaluate on; the same TEXT is split in two"
    )
    add_tokenizer(parser)
    add_dtype(parser, "of weights and cache")
    add_device(parser)
    parser.add_argument(
        "--window", type=int, metavar="N", help="tokens per window (default: 2048, or the model's positions if fewer)"
    )
    parser.add_argument(
        "--windows", type=int, metavar="N",
        help="windows to evaluate on; calibration takes twice as many, or 8000 tokens (default: 2, or 4 with --max-loss or --bytes)",
    )  # fmt: skip
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> None:
    require_counts(
        options, key_bytes=1, topk=1, topk_query=1, dense_dims=0, max_position=1, window=2, windows=1, recent=0, first=0
    )
    need("demo", "matplotlib", "rich", "transformers")
    from ..choose import NothingFitsError
    from ..convert import ConvertSettings, convert

    settings = ConvertSettings(
        model=options.model, max_loss=options.max_loss, max_bytes=options.max_bytes, preset=options.preset, key_bytes=options.key_bytes, topk=options.topk, topk_query=options.topk_query,
        dense_dims=options.dense_dims, basis=options.basis, calibrate=options.calibrate, eval=options.eval,
        dtype=options.dtype, cache_dtype=options.cache_dtype, recent=options.recent, first=options.first,
        prefill=options.prefill, window=options.window, windows=options.windows, max_position=options.max_position,
        tokenizer=options.tokenizer, device=options.device,
    )  # fmt: skip
    try:
        with progress() as bars:
            report = convert(settings, options.output, bars)
    except NothingFitsError as error:
        console().print(_nearest(error.rows))
        raise
    _print_report(report, options.output)


def _print_report(report: dict[str, Any], output: Path) -> None:
    from ..choose import Limits

    screen = console()
    screen.print(_quality(report))
    screen.print(_times(report["attention_ms"]))
    for name, title in VARIANTS.items():
        screen.print(f"{title} continues: {report['texts'][name]}")
    screen.print()
    screen.print(_pays_from(report["attention_ms"]))
    rows = report["variants"]
    chosen, dense = rows[report["chosen"]], rows["dense"]
    limits = Limits(report["settings"]["max_loss"], report["settings"]["max_bytes"])
    if limits:
        screen.print(f"Chosen: {'the fewest bytes' if limits.max_loss is not None else 'the least loss'} with {limits}")
    screen.print(
        f"Written: {chosen['label']}, {chosen['token_bytes']} bytes of a coded token, {100 * chosen['share']:.0f} % of dense"
    )
    screen.print(
        f"Loss: perplexity {chosen['perplexity']:.2f} against {dense['perplexity']:.2f} dense, {_loss(chosen)}"
    )
    if report["perplexity_increase"] > _LARGE_LOSS:
        _print_advice(report)
    pictures = "report.json, report.png and frontier.png" if limits else "report.json and report.png"
    print(f"model, {pictures} are in {output}")


def _quality(report: dict[str, Any]) -> Table:
    from rich.table import Table

    rows = report["variants"]
    dense = rows["dense"]
    table = Table(
        "cache", "perplexity", "against dense", "bytes of a coded token", "of dense", "read from the live cache: key + value", "of dense",
        title="Quality and bytes per token and kv head",
        caption="± is the standard error over the windows; a live cache holds one of them, exact tokens included",
    )  # fmt: skip
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["token_bytes"]):
        keys, values = row["key_bytes_per_token_and_head"], row["value_bytes_per_token_and_head"]
        table.add_row(
            row["label"], f"{row['perplexity']:.2f}", "" if name == "dense" else _loss(row),
            str(row["token_bytes"]), f"{100 * row['share']:.0f} %", f"{keys:.1f} + {values:.1f}",
            f"{100 * row['kv_bytes_per_token'] / dense['kv_bytes_per_token']:.0f} %",
            style="bold" if name == report["chosen"] else None,
        )  # fmt: skip
    return table


def _nearest(rows: list[dict[str, Any]]) -> Table:
    """What comes nearest to limits that nothing meets."""
    from rich.table import Table

    table = Table("cache", "against dense", "bytes of a coded token", "of dense", title="The nearest")
    for row in rows:
        loss = _loss(row) if "loss" in row else "not measured"
        table.add_row(row["label"], loss, str(row["token_bytes"]), f"{100 * row['share']:.0f} %")
    return table


def _loss(row: dict[str, Any]) -> str:
    error = "" if row["loss_error"] is None else f" ± {100 * row['loss_error']:.2f}"
    return f"{100 * row['loss']:+.2f}{error} %"


def _times(rows: list[dict[str, float]]) -> Table:
    from rich.table import Table

    columns = ("prefill_dense", "prefill_sfa", "decode_dense", "decode_sfa")
    table = Table(
        "tokens", *(column.replace("_sfa", ", sparse").replace("_dense", ", dense") for column in columns),
        title="Attention of one layer, ms: a prompt (prefill), a new token (decode)",
    )  # fmt: skip
    for row in rows:
        table.add_row(str(row["context"]), *(f"{row[c]:.2f}" if c in row else "" for c in columns))
    return table


def _pays_from(rows: list[dict[str, float]]) -> str:
    """From which context on decode is faster than dense at all that were timed."""
    lost = [row["context"] for row in rows if row["decode_sfa"] >= row["decode_dense"]]
    won = [row["context"] for row in rows if not lost or row["context"] > max(lost)]
    if not won:
        return f"Decode here: slower than dense up to {max(lost)} tokens, the longest context timed"
    return f"Decode here: faster than dense from {min(won)} tokens on"


def _print_advice(report: dict[str, Any]) -> None:
    from rich.table import Table

    screen, settings, head_dim = console(), report["switched"], report["settings"]["head_dim"]
    screen.print(f"That is much (over {100 * _LARGE_LOSS:.0f} %).", end=" ")
    if report["settings"]["preset"] is None:  # which says these itself
        if settings["topk"] is None:
            screen.print("Give a key more bytes (--key-bytes).")
        elif settings["topk_query"] not in (DENSE, head_dim):
            screen.print("Queries are not cached: keep them dense first, with --topk-query dense.")
        if not (settings["recent"] and settings["first"]):
            screen.print("Keep the newest and the first tokens as they come: --recent 32 --first 4.")
    larger = [] if settings["topk"] is None else larger_budgets(settings["dense_dims"], settings["topk"], head_dim)
    if larger:
        table = Table("options", "key bytes in 16 bits, per token and head", "loss of SmolLM2-135M")
        for preset in larger:
            table.add_row(
                f"--dense-dims {preset.dense_dims} --topk {preset.topk}",
                str(preset.key_bytes),
                f"{100 * preset.loss:+.1f} %",
            )
        screen.print("Keep more features:")
        screen.print(table)
        if head_dim != MEASURED_HEAD_DIM:
            screen.print(f"These losses are those of the same shares of heads of {MEASURED_HEAD_DIM}.")
    chosen = report["variants"][report["chosen"]]
    better = [
        row
        for row in report["variants"].values()
        if row["loss"] < chosen["loss"] and row["token_bytes"] <= chosen["token_bytes"]
    ]
    for row in better:
        screen.print(f"With no more bytes {row['label']} loses {_loss(row)}.")
    screen.print(
        "Let it choose, with --max-loss 1% or --bytes 50%, or take a preset, measured with SmolLM2-135M and heads of 64:"
    )
    screen.print(_presets())
    screen.print(
        "Calibrate on text of the kind that the model will read (--calibrate), or train the model on (flashsfa train distill)."
    )


def _presets() -> Table:
    from rich.table import Table

    table = Table("option", "for", "bytes of a coded token, of 256", "loss")
    for name, preset in PRESETS.items():
        table.add_row(f"--preset {name}", preset.purpose, str(preset.token_bytes), preset.loss)
    return table

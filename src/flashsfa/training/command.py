"""`flashsfa train`: its options and what they run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

Progress = Callable[[str, int], Callable[[], None]]  # (description, steps) -> call once a step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` its commands."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def recipe_command(name: str, help: str, run: Callable[..., Any]) -> None:
        command = commands.add_parser(name, help=help)
        command.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="see recipes/")
        command.add_argument(
            "-o", "--output", type=Path, metavar="DIR",
            help="of the run; the same command goes on where it was stopped (default: runs/ and the recipe's name)",
        )  # fmt: skip
        command.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
            help="change a value of the recipe, as in --set training.seed=1",
        )  # fmt: skip
        command.set_defaults(train=run)

    recipe_command("pretrain", "train a GPT-2 or Qwen3 from scratch, dense, sparse or as a baseline", _pretrain)
    recipe_command("distill", "fine-tune a converted model towards its dense attention", _distill)

    tokenize = commands.add_parser(
        "tokenize", help="turn text into a token file, once for many runs, with its tokenizer beside it"
    )
    tokenize.add_argument(
        "text", type=Path, metavar="TEXT", help="file or folder; a line holding only U+001E ends a document"
    )
    tokenize.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.npy", help="a new file")
    tokenize.add_argument(
        "--tokenizer", metavar="NAME", help="directory or hub name (default: the small bundled model's)"
    )
    tokenize.set_defaults(train=_tokenize)

    compare = commands.add_parser("compare", help="finished runs beside one another: perplexity, step time, curves")
    compare.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="directories of runs; the first, with its seeds, is the baseline",
    )
    compare.add_argument(
        "-o", "--output", type=Path, default=Path("results"), metavar="DIR",
        help="earlier results there are kept (default: results)",
    )  # fmt: skip
    compare.set_defaults(train=_compare)

    support = commands.add_parser(
        "support", help="which features a converted model keeps: entropy, overlap, effective k"
    )
    support.add_argument("model", metavar="MODEL", help="a converted model's directory")
    support.add_argument(
        "--text", metavar="TEXT", help="file or folder, or a token file (default: topics of Python's help)"
    )
    support.add_argument("--window", type=int, default=1024, help="tokens a window (default: 1024)")
    support.add_argument("--windows", type=int, default=8, help="windows, spread over the text (default: 8)")
    support.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("results"),
        metavar="DIR",
        help="earlier results there are kept (default: results)",
    )
    support.set_defaults(train=_support)


def run(options: argparse.Namespace, progress: Callable[[], Any]) -> None:
    """Run the command that `options` name. `progress` opens the bars of the command line."""
    try:
        import accelerate  # noqa: F401
        import rich  # noqa: F401
        import yaml  # noqa: F401
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'flashsfa[train]'") from error
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options.train(options, progress)


def _pretrain(options: argparse.Namespace, progress: Any) -> None:
    from .pretrain import pretrain
    from .recipe import PretrainRecipe

    _train(options, PretrainRecipe, pretrain)


def _distill(options: argparse.Namespace, progress: Any) -> None:
    from .distill import distill
    from .recipe import DistillRecipe

    _train(options, DistillRecipe, distill)


def _train(options: argparse.Namespace, kind: Any, run: Callable[..., dict[str, Any]]) -> None:
    from .recipe import read

    directory = options.output or Path("runs") / options.recipe.stem
    result = run(read(kind, options.recipe, options.overrides), directory)
    needles = "".join(f", needle at {n}: {100 * share:.0f} %" for n, share in result.get("needle", {}).items())
    print(f"validation perplexity {result['perplexity']:.3f} after {result['steps']} steps{needles}; in {directory}")


def _tokenize(options: argparse.Namespace, progress: Any) -> None:
    from ..evaluation.results import require_place
    from ..huggingface.loading import load_tokenizer
    from ..models import bundled_model
    from .data import require_tokenizer_folder, text_documents, tokenize, write_tokens

    output: Path = options.output
    if output.suffix != ".npy" or os.path.lexists(output):
        raise ValueError(f"-o {output}: name a new file that ends in .npy")
    require_place(output.parent)
    tokenizer = load_tokenizer(options.tokenizer or bundled_model())
    require_tokenizer_folder(output, tokenizer)
    ids = tokenize(text_documents(options.text), tokenizer, tokenizer.eos_token_id)
    if not len(ids):
        raise ValueError(f"{options.text} holds no text, only blank lines")
    write_tokens(output, ids, tokenizer)
    print(f"{len(ids)} tokens ({ids.dtype}), documents end with token {tokenizer.eos_token_id}; in {output}")


def _compare(options: argparse.Namespace, progress: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    from ..evaluation.results import require_place, save
    from .compare import compare, draw, read_run

    _require_matplotlib()
    require_place(options.output)
    runs = [read_run(path) for path in options.runs]
    rows = compare(runs)
    curves = {run.name: run.losses() for run in runs}
    content = {
        "evaluation": "training",
        "environment": runs[0].result["environment"],
        "results": rows,
        "curves": curves,
    }
    paths = save(content, options.output, lambda path: draw(runs, path))
    training = runs[0].recipe["training"]
    title = f"{training['tokens'] / 1e6:.1f}M tokens, {runs[0].result['steps']} steps; means over seeds, compared with {runs[0].name}"
    table = Table("run", "seeds", "perplexity", "change", "of seeds", "ms a step", "peak MiB", title=title)
    for row in rows:
        change = [f"{100 * x:+.2f}" for x in (fmean(row["change"]), min(row["change"]), max(row["change"]))]
        table.add_row(
            row["runs"][0], str(len(row["seeds"])), f"{fmean(row['perplexity']):.2f}", f"{change[0]} %",
            f"{change[1]} to {change[2]}" if len(row["change"]) > 1 else "",
            *("" if row[key] is None else f"{row[key] * factor:.0f}"
              for key, factor in (("seconds_per_step", 1e3), ("peak_memory_bytes", 2**-20))),
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 200, markup=False).print(table)
    print("written: " + ", ".join(map(str, paths)))


def _support(options: argparse.Namespace, progress: Any) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table

    from ..checks import require
    from ..evaluation.results import document, require_place, save
    from ..huggingface import from_pretrained
    from .support import draw, support_statistics

    require(options.window >= 2 and options.windows >= 1, "--window must be at least 2 tokens and --windows at least 1")
    _require_matplotlib()
    require_place(options.output)
    model = from_pretrained(options.model).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    limit = getattr(model.config, "max_position_embeddings", None) or options.window
    require(options.window <= limit, f"--window {options.window}: the model has {limit} positions")
    windows = _windows(options, model.get_input_embeddings().num_embeddings)
    with progress() as bars:
        statistics = support_statistics(model, windows, bars("supports", len(windows)))
    settings = {"model": options.model, "text": options.text, "windows": list(windows.shape), "sfa": model.config.sfa}
    content = document("support", settings, model.device)
    content["results"] = statistics.rows()
    topk, name = model.config.sfa["topk"], Path(options.model).resolve().name
    paths = save(content, options.output, lambda path: draw(f"{name}: supports", statistics, topk, path))
    table = Table(
        "layer", "entropy", "overlap", f"effective k of {topk}", title=f"{name}: supports, lowest to highest head"
    )
    for layer in range(len(statistics.entropy)):
        parts = (getattr(statistics, n)[layer] for n in ("entropy", "overlap", "effective_topk"))
        table.add_row(str(layer), *(f"{float(x.min()):.2f} to {float(x.max()):.2f}" for x in parts))
    Console(markup=False).print(table)
    print("written: " + ", ".join(map(str, paths)))


def _windows(options: argparse.Namespace, vocab_size: int) -> Any:
    """[S, W] token ids to look at."""
    import torch

    from ..checks import require
    from ..evaluation.text import read_text, token_windows
    from ..huggingface.loading import load_tokenizer
    from .data import check_stream, read_stream

    cut = {"length": options.window, "count": options.windows}
    if not (options.text or "").endswith(".npy"):
        windows = token_windows(load_tokenizer(options.model), read_text(options.text), purpose="--text", **cut)
        largest = int(windows.max())
        require(
            largest < vocab_size, f"the tokenizer gives token {largest}, past the model's vocabulary of {vocab_size}"
        )
        return windows
    stream = read_stream(options.text, "--text", None, None)
    available = check_stream(stream, "--text", options.window, vocab_size, "--window")
    chosen = torch.linspace(0, available - 1, min(options.windows, available), device="cpu").round().long().tolist()
    return torch.stack([stream.window(index, options.window) for index in chosen])


def _require_matplotlib() -> None:
    """Before any work: what draws the result is imported at the end."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'flashsfa[train]'") from error

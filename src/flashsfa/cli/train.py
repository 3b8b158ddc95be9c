"""`flashsfa train`: models from scratch, converted models trained on, and what they learned."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from .options import HELP_TOPICS, HelpFormatter, add_output, add_tokenizer, some_path, some_text
from .screen import console, need, print_written, progress

if TYPE_CHECKING:
    from torch import Tensor


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("train", help="train a model from scratch, or fine-tune a converted one")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, help: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, formatter_class=HelpFormatter)
        command.set_defaults(run=_train, train=run)
        return command

    for name, help, run in (
        ("pretrain", "train a GPT-2 or Qwen3 from scratch, dense, sparse or as a baseline", _pretrain),
        ("distill", "fine-tune a converted model towards its dense attention", _distill),
    ):
        recipe = add(name, help, run)
        recipe.add_argument("recipe", type=some_path, metavar="RECIPE.yaml", help="see recipes/")
        recipe.add_argument(
            "-o", "--output", type=some_path, metavar="DIR",
            help="of the run; the same command goes on where it was stopped (default: runs/ and the recipe's name)",
        )  # fmt: skip
        recipe.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides",
            help="change a value of the recipe, as in --set training.seed=1",
        )  # fmt: skip

    tokenize = add(
        "tokenize", "turn text into a token file, once for many runs, with its tokenizer beside it", _tokenize
    )
    tokenize.add_argument(
        "text", type=some_path, metavar="TEXT", help="file or folder; a line holding only U+001E ends a document"
    )
    tokenize.add_argument("-o", "--output", type=some_path, required=True, metavar="FILE.npy", help="a new file")
    tokenize.add_argument(
        "--tokenizer", type=some_text, metavar="NAME", help="directory or hub name (default: the small bundled model's)"
    )

    compare = add("compare", "finished runs beside one another: perplexity, step time, curves", _compare)
    compare.add_argument(
        "runs", type=some_path, nargs="+", metavar="RUN",
        help="directories of runs; the first, with its seeds, is the baseline",
    )  # fmt: skip
    add_output(compare)

    support = add("support", "which features a converted model keeps: entropy, overlap, effective k", _support)
    support.add_argument("model", type=some_text, metavar="MODEL", help="a converted model's directory")
    support.add_argument(
        "--text", type=some_text, metavar="TEXT", help=f"file or folder, or a token file (default: {HELP_TOPICS})"
    )
    add_tokenizer(support)
    support.add_argument("--window", type=int, default=1024, metavar="N", help="tokens per window")
    support.add_argument("--windows", type=int, default=8, metavar="N", help="windows, spread over the text")
    add_output(support)


def _train(options: argparse.Namespace) -> None:
    need("train", "accelerate", "rich", "yaml", "transformers")
    options.train(options)


def _pretrain(options: argparse.Namespace) -> None:
    from ..training.pretrain import pretrain
    from ..training.recipe import PretrainRecipe

    _run(options, PretrainRecipe, pretrain)


def _distill(options: argparse.Namespace) -> None:
    from rich.table import Table

    from ..training.distill import distill
    from ..training.recipe import DistillRecipe

    result = _run(options, DistillRecipe, distill)
    if not _is_first():
        return
    dense = result["perplexity_dense"]
    caption = "coded: as it is trained, without exact tokens and with features in 16 bits; flashsfa eval perplexity measures the cache as it is kept"
    table = Table(
        "model", "validation perplexity", "against dense before", title="Distillation", caption=None if result["as_kept"] else caption
    )  # fmt: skip
    for name, value in (
        ("dense, before", dense),
        ("coded, before", result["perplexity_before"]),
        ("coded, after", result["perplexity"]),
    ):
        table.add_row(name, f"{value:.3f}", f"{100 * (value / dense - 1):+.1f} %" if value != dense else "")
    console().print(table)


def _run(options: argparse.Namespace, kind: Any, run: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    from torch import distributed

    from ..training.recipe import read
    from ..training.run import curves_folder

    directory = options.output or Path("runs") / options.recipe.stem
    result = run(read(kind, options.recipe, options.overrides), directory)
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # or torch warns of it as the process ends
    if not _is_first():
        return result
    needles = "".join(f", needle at {n}: {100 * share:.0f} %" for n, share in result.get("needle", {}).items())
    print(f"validation perplexity {result['perplexity']:.3f} after {result['steps']} steps{needles}; in {directory}")
    if (curves := curves_folder(directory)) is not None:
        print(f"curves are in {curves}; to see them: tensorboard --logdir {directory}")
    return result


def _is_first() -> bool:
    """Whether this is the only process of a run, or the first that torchrun started: the one that writes, and says what came of it."""
    return os.environ.get("RANK", "0") == "0"


def _tokenize(options: argparse.Namespace) -> None:
    from ..files import require_place
    from ..huggingface.loading import load_tokenizer
    from ..models import bundled_model
    from ..training.data import require_tokenizer_folder, text_documents, tokenize, write_tokens

    output: Path = options.output
    if output.suffix != ".npy":
        raise ValueError(f"-o {output}: name a file that ends in .npy")
    if os.path.lexists(output):
        raise ValueError(f"-o {output} exists already: name a new file, or remove it first")
    require_place(output.parent)
    tokenizer = load_tokenizer(options.tokenizer or bundled_model())
    require_tokenizer_folder(output, tokenizer)
    ids = tokenize(text_documents(options.text), tokenizer, tokenizer.eos_token_id)
    if not len(ids):
        raise ValueError(f"{options.text} holds no text, only blank lines")
    write_tokens(output, ids, tokenizer)
    end = tokenizer.eos_token_id
    ends = (
        "the tokenizer has no end token: nothing parts documents" if end is None else f"documents end with token {end}"
    )
    print(f"{len(ids)} tokens ({ids.dtype}), {ends}; in {output}")


def _compare(options: argparse.Namespace) -> None:
    from rich.table import Table

    from ..evaluation.results import save
    from ..files import require_place
    from ..training.compare import FEWEST_LOSSES, compare, draw, has_curves, read_run

    need("train", "matplotlib")
    require_place(options.output)
    runs = [read_run(path) for path in options.runs]
    rows = compare(runs)
    content = {
        "evaluation": "training", "environment": runs[0].result["environment"], "results": rows,
        "curves": {run.name: run.losses() for run in runs},
    }  # fmt: skip
    can_draw = has_curves(runs)
    paths = save(content, options.output, (lambda path: draw(runs, path)) if can_draw else None)
    training = runs[0].recipe["training"]
    title = f"{training['tokens'] / 1e6:.1f}M tokens, {runs[0].result['steps']} steps; means over seeds, compared with {runs[0].name}"
    table = Table("run", "seeds", "perplexity", "change", "of seeds", "ms per step", "peak MiB", title=title)
    for row in rows:
        change = [f"{100 * x:+.2f}" for x in (fmean(row["change"]), min(row["change"]), max(row["change"]))]
        table.add_row(
            row["runs"][0], str(len(row["seeds"])), f"{fmean(row['perplexity']):.2f}", f"{change[0]} %",
            f"{change[1]} to {change[2]}" if len(row["change"]) > 1 else "",
            *("" if row[key] is None else f"{row[key] * factor:.0f}"
              for key, factor in (("seconds_per_step", 1e3), ("peak_memory_bytes", 2**-20))),
        )  # fmt: skip
    console().print(table)
    if not can_draw:
        print(
            f"no picture: a curve takes {FEWEST_LOSSES} logged losses, and these runs have fewer; train longer, or set "
            "training.log_every lower"
        )
    print_written(paths)


def _support(options: argparse.Namespace) -> None:
    import torch
    from rich.table import Table

    from ..checks import require
    from ..evaluation.results import document, save
    from ..files import require_place
    from ..huggingface import from_pretrained
    from ..huggingface.structure import most_positions
    from ..training.support import draw, support_statistics

    require(options.window >= 2 and options.windows >= 1, "--window must be at least 2 tokens and --windows at least 1")
    need("train", "matplotlib")
    require_place(options.output)
    model = from_pretrained(options.model).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    limit = most_positions(model) or options.window
    require(options.window <= limit, f"--window {options.window}: the model has {limit} positions")
    windows = _windows(options, model.get_input_embeddings().num_embeddings)
    with progress() as bars:
        statistics = support_statistics(model, windows, bars("supports", len(windows)))
    settings = {"model": options.model, "text": options.text, "windows": list(windows.shape), "sfa": model.config.sfa}
    content = document("support", settings, model.device)
    content["results"] = statistics.rows()
    topk, name = statistics.topk, Path(options.model).resolve().name
    paths = save(content, options.output, lambda path: draw(f"{name}: supports", statistics, path))
    dense_queries = statistics.topk_query is None
    overlap = "overlap 1 as queries are dense" if dense_queries else f"overlap above chance, {statistics.chance:.2f}"
    table = Table(
        "layer", "entropy", "overlap", f"effective k of {topk}", "verdict",
        title=f"{name}: supports, lowest to highest head",
        caption=f"good: of every head entropy from {statistics.LEAST_ENTROPY}, {overlap}, effective k from {statistics.least_effective:g}",
    )  # fmt: skip
    for layer in range(len(statistics.entropy)):
        parts = (getattr(statistics, n)[layer] for n in ("entropy", "overlap", "effective_topk"))
        ranges = (f"{float(x.min()):.2f} to {float(x.max()):.2f}" for x in parts)
        table.add_row(str(layer), *ranges, statistics.verdict(layer))
    console().print(table)
    print_written(paths)


def _windows(options: argparse.Namespace, vocab_size: int) -> Tensor:
    """[S, W] token ids to look at."""
    import torch

    from ..checks import require
    from ..evaluation.text import read_text, token_windows
    from ..models import tokenizer_of
    from ..training.data import check_stream, read_stream

    cut = {"length": options.window, "count": options.windows}
    if not (options.text or "").endswith(".npy"):
        tokenizer = tokenizer_of(options.model, options.tokenizer)
        windows = token_windows(tokenizer, read_text(options.text), purpose="--text", **cut)
        largest = int(windows.max())
        require(
            largest < vocab_size, f"the tokenizer gives token {largest}, past the model's vocabulary of {vocab_size}"
        )
        return windows
    stream = read_stream(options.text, "--text", None, None)
    available = check_stream(stream, "--text", options.window, vocab_size, "--window")
    chosen = torch.linspace(0, available - 1, min(options.windows, available), device="cpu").round().long().tolist()
    return torch.stack([stream.window(index, options.window) for index in chosen])

"""`flashsfa eval`: its options, what they run, and the table on screen."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..basis import KINDS
from ..checks import MOST_TOKENS, require, require_int
from .haystack import TASKS

if TYPE_CHECKING:
    from rich.table import Table

    from .subject import Subject

Progress = Callable[[str, int], Callable[[], None]]  # (description, steps) -> call once a step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the three evaluations as commands of its own."""
    evaluations = parser.add_subparsers(required=True, dest="evaluation", metavar="EVALUATION")

    def add(
        name: str, help: str, measure: Callable[..., Any], context: str = "the longest measured"
    ) -> argparse.ArgumentParser:
        command = evaluations.add_parser(name, help=help, formatter_class=_HelpFormatter)
        command.set_defaults(measure=measure)
        _add_subject(command, context)
        return command

    perplexity = add("perplexity", "perplexity over long windows of a text", _perplexity)
    perplexity.add_argument(
        "--text", type=some_text, metavar="TEXT", help="file or folder (default: topics of Python's help)"
    )
    perplexity.add_argument("--window", type=int, default=4096, help="tokens a window")
    perplexity.add_argument("--windows", type=int, default=8, help="windows, spread over the text")

    needle = add("needle", "needles in a haystack of real text, and RULER's offline tasks", _needle)
    needle.add_argument(
        "--text", type=some_text, metavar="TEXT", help="file or folder for the hay (default: topics of Python's help)"
    )
    needle.add_argument("--task", choices=TASKS, default="single", help="what to find")
    needle.add_argument("--lengths", type=_integers, default="512,1024,2048,4096", help="contexts in tokens, by commas")
    needle.add_argument(
        "--depths", type=_integers, default="0,25,50,75,100", help="needle depths in percent, by commas"
    )
    needle.add_argument("--trials", type=int, default=1, help="prompts a length and depth")
    needle.add_argument("--seed", type=int, default=0, help="another one gives other prompts")

    harness = add(
        "lm-eval", "tasks of EleutherAI's lm-eval, built in or of your own", _lm_eval,
        context="2048, or the model's positions if fewer",
    )  # fmt: skip
    harness.add_argument("--tasks", type=_names, required=True, help="names of tasks, groups or tags, by commas")
    harness.add_argument(
        "--include-path", type=some_path, metavar="DIR", help="folder with task files (.yaml) of your own"
    )
    harness.add_argument("--limit", type=int, default=None, help="examples a task (default: all)")
    harness.add_argument("--num-fewshot", type=int, default=None, help="worked examples (default: what the task says)")
    harness.add_argument("--batch-size", type=int, default=1, help="prompts at a time")


def require_counts(options: argparse.Namespace, **least: int) -> None:
    """Each of these options, where it is given, is at least so much, and a number of things that there can be."""
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None:
            require_int(f"--{name.replace('_', '-')}", value, low, MOST_TOKENS)


def some_text(text: str) -> str:
    """An option's value that is not empty, as that of a shell variable without a value."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} names nothing")
    return text


def some_path(text: str) -> Path:
    """As `some_text`."""
    return Path(some_text(text))


def run(options: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], list[Path]]:
    """Run the evaluation that `options` name; returns what was found, as it stands in the JSON, and the files written.

    Raises `ValueError` for options that do not fit, with nothing written.
    """
    import torch

    from ..files import require_place

    require_counts(options, topk=1, topk_query=1, dense_dims=0, max_position=2)
    require_place(options.output)
    try:
        return options.measure(options, progress)
    except torch.OutOfMemoryError as error:
        raise ValueError("the GPU is out of memory: use shorter contexts, or smaller batches") from error


def table(document: dict[str, Any]) -> Table:
    """What was found, a row a variant or figure."""
    from rich.markup import escape
    from rich.table import Table

    results, model = document["results"], escape(document["settings"]["model"])
    if document["evaluation"] == "perplexity":
        out = Table("attention", "perplexity", "against dense", title=f"{model}: perplexity")
        dense = results.get("dense")
        for name, row in results.items():
            change = (
                f"{100 * (row['perplexity'] / dense['perplexity'] - 1):+.1f} %" if dense and name != "dense" else ""
            )
            out.add_row(name, f"{row['perplexity']:.2f}", change)
    elif document["evaluation"] == "needle":
        from .needle import ScoreGrid

        grids = {name: ScoreGrid.of(result["rows"]) for name, result in results.items()}
        lengths = next(iter(grids.values())).lengths
        title = f"{model}: {document['settings']['task']}, percent found"
        out = Table("attention", "depth", *(f"{n} tokens" for n in lengths), title=title)
        for name, grid in grids.items():
            for depth, scores in zip(grid.depths, grid.scores, strict=True):
                out.add_row(name, depth, *(f"{100 * score:.0f}" for score in scores))
    else:
        out = Table("task", "metric", *results, title=f"{model}: lm-eval")
        first = next(iter(results.values()))["results"]
        for task, metrics in first.items():
            for metric in (m for m, value in metrics.items() if isinstance(value, float) and "_stderr" not in m):
                values = [result["results"][task] for result in results.values()]
                out.add_row(task, metric.removesuffix(",none"), *(_with_error(value, metric) for value in values))
    return out


def _perplexity(options: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], list[Path]]:
    require_counts(options, window=2, windows=1)
    from .perplexity import perplexity
    from .results import save
    from .text import separate_texts, token_windows

    calibration_text, text = separate_texts(options.calibrate, options.text)
    subject = _subject(options)
    subject.require_length(options.window)
    windows = token_windows(subject.tokenizer, text, length=options.window, count=options.windows, purpose="evaluation")
    calibration = subject.calibration_windows(calibration_text, options.window)
    document = _document(options, subject)
    for name in subject.variants(calibration, options.window, progress):
        value = perplexity(subject.model, windows, progress(f"perplexity: {name}", len(windows)))
        document["results"][name] = {"perplexity": value, "windows": len(windows), "tokens": windows.numel()}
    document["settings"]["sfa"] = subject.switched
    return document, save(document, options.output)


def _needle(options: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], list[Path]]:
    require_counts(options, trials=1)
    for length in options.lengths:
        require_int("each of --lengths", length, 1, MOST_TOKENS)
    require(all(0 <= d <= 100 for d in options.depths), f"--depths are percents from 0 to 100, got {options.depths}")
    from .haystack import Haystack, samples
    from .needle import ScoreGrid, draw, find_needles
    from .results import save
    from .text import separate_texts

    calibration_text, text = separate_texts(options.calibrate, options.text)
    subject = _subject(options)
    longest = max(options.lengths)
    subject.require_length(longest)
    depths = [depth / 100 for depth in options.depths]
    prompts = samples(
        options.task, Haystack(subject.tokenizer, text), options.lengths, depths, options.trials, options.seed
    )
    calibration = subject.calibration_windows(calibration_text, longest)
    document, grids = _document(options, subject), {}
    for name in subject.variants(calibration, longest, progress):
        step = progress(f"{options.task}: {name}", len(prompts))
        rows = find_needles(subject.model, subject.tokenizer, prompts, step)
        grids[name] = ScoreGrid.of(rows)
        document["results"][name] = {"score": grids[name].mean, "rows": rows}
    document["settings"]["sfa"] = subject.switched
    title = f"{subject.name}, needle: {options.task}" + (f", {_label(subject.switched)}" if subject.switched else "")
    return document, save(document, options.output, lambda path: draw(title, grids, path))


def _lm_eval(options: argparse.Namespace, progress: Progress) -> tuple[dict[str, Any], list[Path]]:
    require_counts(options, limit=1, num_fewshot=0, batch_size=1)
    from .harness import Harness
    from .results import save
    from .text import read_text

    harness = Harness(options.tasks, options.include_path)
    subject = _subject(options)
    longest = subject.usual_length if options.max_position is None else options.max_position
    subject.require_length(longest)
    calibration = subject.calibration_windows(read_text(options.calibrate), longest)
    document = _document(options, subject)
    for name in subject.variants(calibration, longest, progress):
        document["results"][name] = harness.evaluate(
            subject.model, subject.tokenizer, batch_size=options.batch_size, limit=options.limit,
            num_fewshot=options.num_fewshot,
        )  # fmt: skip
    document["settings"]["sfa"] = subject.switched
    if subject.switched and subject.switched["cache_dtype"] is not None:
        document["settings"]["rounded"] = "what is generated; likelihoods use no cache"
    return document, save(document, options.output)


def _add_subject(parser: argparse.ArgumentParser, context: str) -> None:
    """The options that say which model, how it is switched and where results go; `context` is calibrated for."""
    parser.add_argument(
        "model", nargs="?", type=some_text, metavar="MODEL",
        help="a converted model's directory, or a dense model: local directory or hub name (default: a small bundled model)",
    )  # fmt: skip
    parser.add_argument("--dense", action="store_true", help="measure the model dense too, on the same prompts")
    parser.add_argument(
        "-o", "--output", type=some_path, default=Path("results"), metavar="DIR", help="earlier results there are kept"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the weights"
    )
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: cuda if there is one")
    switch = parser.add_argument_group(
        "switching a dense model", "as flashsfa convert does; --topk switches it, the others say how"
    )
    switch.add_argument("--topk", type=int, help="kept features of a key beside the dense channel")
    switch.add_argument("--topk-query", type=int, help="kept features of a query (default: all, dense queries)")
    switch.add_argument("--dense-dims", type=int, help="leading features that are always kept (default: 22)")
    switch.add_argument(
        "--basis", choices=KINDS,
        help="calibrated coordinates (default: dictionary for dense queries, balanced for sparse ones)",
    )  # fmt: skip
    switch.add_argument("--max-position", type=int, help=f"context in tokens to calibrate for (default: {context})")
    switch.add_argument(
        "--calibrate", type=some_text, metavar="TEXT",
        help="file or folder to calibrate on (default: topics of Python's help); a TEXT that is measured on too is split in two",
    )  # fmt: skip
    switch.add_argument(
        "--cache-dtype", choices=("int8",),
        help="of the cache of codes (default: as --dtype); likelihoods of lm-eval use no cache",
    )  # fmt: skip


def _subject(options: argparse.Namespace) -> Subject:
    from .subject import Subject, SubjectSettings

    return Subject(
        SubjectSettings(
            model=options.model, dense=options.dense, topk=options.topk, topk_query=options.topk_query,
            dense_dims=options.dense_dims, basis=options.basis, max_position=options.max_position,
            calibrate=options.calibrate, cache_dtype=options.cache_dtype, dtype=options.dtype, device=options.device,
        )
    )  # fmt: skip


def _document(options: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    from .results import document
    from .subject import SWITCH_OPTIONS

    elsewhere = ("run", "measure", "evaluation", "output", *SWITCH_OPTIONS)  # the last as used: under "sfa"
    settings = {n: v for n, v in vars(options).items() if n not in elsewhere}
    return document(options.evaluation, settings | {"model": subject.name}, subject.model.device)


def _label(switched: dict[str, Any]) -> str:
    kept = "" if switched["cache_dtype"] is None else f", {switched['cache_dtype']}"
    return f"sfa: {switched['dense_dims']} dense dims + top-{switched['topk']}{kept}"


def _with_error(values: dict[str, Any], metric: str) -> str:
    name, _, filter_name = metric.partition(",")
    error = values.get(f"{name}_stderr,{filter_name}")
    return f"{values[metric]:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")


def _integers(text: str) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers like 1,2,3") from None
    return numbers


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that are values."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)

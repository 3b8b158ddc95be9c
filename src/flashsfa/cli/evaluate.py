"""`flashsfa eval`: quality of a model, switched, dense or both."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..evaluation import VARIANTS
from ..evaluation.haystack import TASKS
from .options import (
    HELP_TOPICS,
    HelpFormatter,
    add_budget,
    add_device,
    add_dtype,
    add_output,
    add_tokenizer,
    integers,
    names,
    require_counts,
    some_path,
    some_text,
)
from .screen import Progress, console, need, print_written, progress

_DEPTHS = (0, 25, 50, 75, 100)  # of needles, in percent

if TYPE_CHECKING:
    from rich.table import Table

    from ..evaluation.measure import Measured
    from ..evaluation.subject import SubjectSettings


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("eval", help="measure a model's quality, switched, dense or both")
    evaluations = parser.add_subparsers(required=True, metavar="EVALUATION")

    def add(
        name: str, help: str, measure: Callable[..., Measured], table: Callable[..., Table],
        context: str = "the longest measured",
    ) -> argparse.ArgumentParser:  # fmt: skip
        command = evaluations.add_parser(name, help=help, formatter_class=HelpFormatter)
        command.set_defaults(run=_eval, measure=measure, table=table)
        _add_subject(command, context)
        return command

    perplexity = add("perplexity", "perplexity over long windows of a text", _perplexity, _perplexity_table)
    perplexity.add_argument("--text", type=some_text, metavar="TEXT", help=f"file or folder (default: {HELP_TOPICS})")
    perplexity.add_argument(
        "--window", type=int, metavar="N", help="tokens per window (default: 4096, or the model's positions if fewer)"
    )
    perplexity.add_argument("--windows", type=int, default=8, metavar="N", help="windows, spread over the text")

    needle = add("needle", "needles in a haystack of real text, and RULER's offline tasks", _needle, _needle_table)
    needle.add_argument(
        "--text", type=some_text, metavar="TEXT", help=f"file or folder for the hay (default: {HELP_TOPICS})"
    )
    needle.add_argument(
        "--task", choices=TASKS, default="single", metavar="TASK", help=f"what to find: {', '.join(TASKS)}"
    )
    needle.add_argument(
        "--lengths",
        type=integers,
        metavar="N,N",
        help="contexts in tokens, by commas (default: 512,1024,2048,4096, as far as the model has positions)",
    )
    needle.add_argument(
        "--depths",
        type=integers,
        metavar="P,P",
        help=f"needle depths in percent, by commas (default: {','.join(map(str, _DEPTHS))}; common-words has none)",
    )
    needle.add_argument("--trials", type=int, default=1, metavar="N", help="prompts for each length and depth")
    needle.add_argument("--seed", type=int, default=0, metavar="N", help="another one gives other prompts")

    compared = evaluations.add_parser(
        "frontier", help="what trained models lose in each form of their caches, beside a dense one", formatter_class=HelpFormatter
    )  # fmt: skip
    compared.set_defaults(run=_frontier)
    compared.add_argument(
        "models", nargs="+", type=some_text, metavar="MODEL",
        help="directories: the dense model that the others are compared with, then those, switched or dense",
    )  # fmt: skip
    compared.add_argument("--text", type=some_text, metavar="TEXT", help=f"file or folder (default: {HELP_TOPICS})")
    compared.add_argument(
        "--lengths",
        type=integers,
        default="1024",
        metavar="N,N",
        help="tokens of a window and of a haystack, by commas",
    )
    compared.add_argument(
        "--windows", type=int, default=32, metavar="N", help="windows of each length, spread over the text"
    )
    compared.add_argument(
        "--tolerances",
        type=_shares,
        default="0.01,0.05,0.1",
        metavar="T,T",
        help="of values, measured in 16 bits, by commas",
    )
    compared.add_argument(
        "--trials", type=int, default=1, metavar="N", help="needles for each length and depth; 0 for none"
    )
    compared.add_argument(
        "--decode",
        nargs="+",
        type=some_path,
        default=(),
        metavar="JSON",
        help="results of flashsfa bench decode, for the times",
    )
    add_output(compared)
    add_tokenizer(compared)
    add_dtype(compared, "of the weights")
    add_device(compared)

    tasks = add(
        "lm-eval", "tasks of EleutherAI's lm-eval, built in or of your own", _lm_eval, _lm_eval_table,
        context="2048, or the model's positions if fewer",
    )  # fmt: skip
    tasks.add_argument(
        "--tasks", type=names, required=True, metavar="NAME,NAME", help="names of tasks, groups or tags, by commas"
    )
    tasks.add_argument(
        "--include-path", type=some_path, metavar="DIR", help="folder with task files (.yaml) of your own"
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="examples per task (default: all)")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="worked examples (default: what the task says)")
    tasks.add_argument("--batch-size", type=int, default=1, metavar="N", help="prompts at a time")


def _add_subject(parser: argparse.ArgumentParser, context: str) -> None:
    """The options that say which model, how it is switched and where results go."""
    parser.add_argument(
        "model", nargs="?", type=some_text, metavar="MODEL",
        help="a converted model's directory, or a dense model: local directory or hub name (default: a small bundled model)",
    )  # fmt: skip
    parser.add_argument("--dense", action="store_true", help="measure the model dense too, on the same prompts")
    add_output(parser)
    add_tokenizer(parser)
    add_dtype(parser, "of the weights")
    add_device(parser)
    switch = parser.add_argument_group(
        "switching a dense model", "--key-bytes or --topk switches it, the others say how"
    )
    add_budget(switch, context)
    switch.add_argument(
        "--calibrate", type=some_text, metavar="TEXT",
        help=f"file or folder to calibrate on (default: {HELP_TOPICS}); a TEXT that is measured on too is split in two",
    )  # fmt: skip


def _eval(options: argparse.Namespace) -> None:
    need("eval", "matplotlib", "rich", "transformers")
    from ..evaluation.subject import SubjectSettings

    require_counts(options, key_bytes=1, topk=1, topk_query=1, dense_dims=0, max_position=2, recent=0, first=0)
    settings = SubjectSettings(**{field.name: getattr(options, field.name) for field in fields(SubjectSettings)})
    with progress() as bars:
        document, paths = options.measure(options, settings, bars)
    console().print(options.table(document["settings"], document["results"]))
    print_written(paths)


def _perplexity(options: argparse.Namespace, settings: SubjectSettings, bars: Progress) -> Measured:
    from ..evaluation.measure import measure_perplexity

    require_counts(options, window=2, windows=1)
    return measure_perplexity(
        settings, options.output, bars, text=options.text, window=options.window, windows=options.windows
    )


def _needle(options: argparse.Namespace, settings: SubjectSettings, bars: Progress) -> Measured:
    from ..evaluation.measure import measure_needles

    require_counts(options, trials=1)
    has_depth = TASKS[options.task].has_depth
    if options.depths is not None and not has_depth:
        raise ValueError(f"--depths means nothing to {options.task}, whose words stand everywhere: leave it out")
    depths = (options.depths or list(_DEPTHS)) if has_depth else []
    return measure_needles(
        settings, options.output, bars, text=options.text, task=options.task, lengths=options.lengths,
        depths=depths, trials=options.trials, seed=options.seed,
    )  # fmt: skip


def _frontier(options: argparse.Namespace) -> None:
    need("eval", "matplotlib", "rich", "transformers")
    from ..evaluation.measure import measure_frontier

    require_counts(options, windows=1, trials=0)
    with progress() as bars:
        document, paths = measure_frontier(
            options.models, options.output, bars, text=options.text, lengths=options.lengths, windows=options.windows,
            tolerances=options.tolerances, trials=options.trials, decode=options.decode, dtype=options.dtype, device=options.device,
            tokenizer=options.tokenizer,
        )  # fmt: skip
    console().print(_forms_table(document["results"], document["settings"]["decode_device"]))
    if document["settings"]["tolerances"]:
        console().print(_tolerances_table(document["results"]))
    print_written(paths)


def _shares(text: str) -> list[float]:
    """Shares by commas, sorted, each once."""
    try:
        return sorted({float(part) for part in text.split(",") if part.strip()})
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of shares like 0.01,0.05") from None


def _lm_eval(options: argparse.Namespace, settings: SubjectSettings, bars: Progress) -> Measured:
    from ..evaluation.measure import measure_tasks

    require_counts(options, limit=1, num_fewshot=0, batch_size=1)
    return measure_tasks(
        settings, options.output, bars, tasks=options.tasks, include_path=options.include_path, limit=options.limit,
        num_fewshot=options.num_fewshot, batch_size=options.batch_size,
    )  # fmt: skip


def _perplexity_table(settings: dict[str, Any], results: dict[str, Any]) -> Table:
    from rich.table import Table

    from ..evaluation.perplexity import spread

    dense = results.get("dense")
    any_row = next(iter(results.values()))
    caption = f"± is the standard error over {any_row['windows']} windows; against dense, of the same windows in pairs"
    if any_row["standard_error"] is None:
        is_short = settings["windows"] > 1
        more = (
            "the text has no more: a longer text, or a shorter --window, shows"
            if is_short
            else "--windows 2 or more show"
        )
        caption = f"of one window: {more} how far it could be off"
    table = Table(
        "attention", "perplexity", "against dense", "KV cache bytes per token",
        title=f"{settings['model']}: perplexity of each token as decode sees it", caption=caption,
    )  # fmt: skip
    for name, row in results.items():
        change, nbytes = "", f"{row['kv_bytes_per_token']:.0f}"
        if dense and name != "dense":
            ratio, error = spread(row["window_losses"], dense["window_losses"])
            change = f"{_with_error(100 * (ratio - 1), None if error is None else 100 * error, '+.1f')} %"
            nbytes += f" ({100 * (row['kv_bytes_per_token'] / dense['kv_bytes_per_token'] - 1):+.0f} %)"
        table.add_row(VARIANTS[name], _with_error(row["perplexity"], row["standard_error"], ".2f"), change, nbytes)
    return table


def _forms_table(results: dict[str, Any], timed_on: str) -> Table:
    from rich.table import Table

    every = [form for model in results.values() for form in model["forms"].values()]
    lengths, timed = list(every[0]["lengths"]), sorted({n for form in every for n in form["decode_ms"]})
    needles = [n for n in lengths if n in every[0]["needles"]]
    table = Table(
        "model", "cache", "bytes", *(f"perplexity at {n}" for n in lengths), *(f"loss at {n}" for n in lengths),
        *(f"needles at {n}" for n in needles), *(f"ms at {n}" for n in timed), title="Each form of each model's cache",
        caption="bytes of a coded token, key and value, per kv head; each token is scored as decode sees it"
        + (f"; ms of one layer's decode as recorded, {timed_on}" if timed_on else ""),
    )  # fmt: skip
    for name, model in results.items():
        for kind, form in model["forms"].items():
            rows = list(form["lengths"].values())
            table.add_row(
                name, kind, str(form["token_bytes"]), *(f"{row['perplexity']:.2f}" for row in rows), *(_loss(row) for row in rows),
                *(f"{100 * form['needles'][n]:.0f} %" for n in needles),
                *(f"{form['decode_ms'][n]:.3f}" if n in form["decode_ms"] else "" for n in timed),
            )  # fmt: skip
    return table


def _tolerances_table(results: dict[str, Any]) -> Table:
    from rich.table import Table

    lengths = list(next(iter(next(iter(results.values()))["tolerances"].values())))
    table = Table(
        "model", "tolerance", *(x for n in lengths for x in (f"loss at {n}", f"V rows read at {n}")),
        title="Values left out, in 16 bits", caption="V rows: of those that the last tokens of a window see",
    )  # fmt: skip
    for name, model in results.items():
        for tolerance, by_length in model["tolerances"].items():
            rows = by_length.values()
            table.add_row(
                name, f"{tolerance:g}", *(x for r in rows for x in (_loss(r), f"{100 * r['v_rows_read']:.0f} %"))
            )
    return table


def _loss(row: dict[str, Any]) -> str:
    return f"{_with_error(100 * row['loss'], None if row['error'] is None else 100 * row['error'], '+.2f')} %"


def _needle_table(settings: dict[str, Any], results: dict[str, Any]) -> Table:
    from rich.table import Table

    from ..evaluation.needle import ScoreGrid

    grids = {name: ScoreGrid.of(result["rows"]) for name, result in results.items()}
    lengths = next(iter(grids.values())).lengths
    title = f"{settings['model']}: {settings['task']}, percent found"
    table = Table("attention", "depth", *(f"{n} tokens" for n in lengths), title=title)
    for name, grid in grids.items():
        for depth, scores in zip(grid.depths, grid.scores, strict=True):
            table.add_row(VARIANTS[name], depth, *(f"{100 * score:.0f}" for score in scores))
    return table


def _lm_eval_table(settings: dict[str, Any], results: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("task", "metric", *(VARIANTS[name] for name in results), title=f"{settings['model']}: lm-eval")
    first = next(iter(results.values()))["results"]
    for task, metrics in first.items():
        for metric in (m for m, value in metrics.items() if isinstance(value, float) and "_stderr" not in m):
            name, _, filter_name = metric.partition(",")
            values = [result["results"][task] for result in results.values()]
            errors = [value.get(f"{name}_stderr,{filter_name}") for value in values]
            table.add_row(
                task, metric.removesuffix(",none"),
                *(_with_error(value[metric], error if isinstance(error, float) else None, ".4f")
                  for value, error in zip(values, errors, strict=True)),
            )  # fmt: skip
    return table


def _with_error(value: float, error: float | None, form: str) -> str:
    return f"{value:{form}}" + ("" if error is None else f" ± {error:{form.lstrip('+')}}")

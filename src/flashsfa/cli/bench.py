"""`flashsfa bench`: times beside torch's dense kernels, and servers beside vLLM's."""

from __future__ import annotations

import argparse

from ..checks import named_device
from .options import HelpFormatter, add_device, add_output, some_text
from .screen import console, need, print_written


def add_parser(commands: argparse._SubParsersAction) -> None:
    bench = commands.add_parser(
        "bench", help="time decode, prefill, coding or whole models beside torch's dense kernels, or servers beside vLLM's, each case checked first",
        formatter_class=HelpFormatter,
    )  # fmt: skip
    bench.add_argument(
        "operation", choices=("decode", "prefill", "topk", "generate", "serve"), metavar="OPERATION",
        help="what to time: decode, prefill, topk (coding), generate (whole models) or serve (vLLM with the plugin and without)",
    )  # fmt: skip
    bench.add_argument(
        "--plain", action="store_true",
        help="generate: model.generate() as one calls it first, where the host's part counts, in place of CUDA graphs",
    )  # fmt: skip
    bench.add_argument("--quick", action="store_true", help="few cases at two lengths, few repeats")
    bench.add_argument(
        "--only", nargs="+", type=some_text, default=(), metavar="TEXT",
        help="run the cases alone whose names contain every TEXT",
    )  # fmt: skip
    add_device(bench)
    add_output(bench, "results")
    bench.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> int:
    device = named_device(options.device)
    if options.plain and options.operation != "generate":
        raise ValueError(f"--plain is a way to time generate, not {options.operation}; leave it out")
    need("bench", "matplotlib", "rich")
    if options.operation == "generate":
        need("hf", "transformers")
    if options.operation == "serve":
        need("vllm", "transformers", "vllm")
    from .. import benchmarking
    from ..benchmarking.findings import findings

    screen = console()
    operation = f"{options.operation}-plain" if options.plain else options.operation
    results, paths = benchmarking.run(
        operation, device=device, quick=options.quick, directory=options.output, only=options.only,
        on_start=lambda count: screen.print(f"{count} cases on {device}"),
        on_row=lambda row: screen.print(row.summary()),
    )  # fmt: skip
    screen.print(results.table(findings(results.rows)))
    print_written(paths)
    return int(any(row.status == "failed" for row in results.rows))

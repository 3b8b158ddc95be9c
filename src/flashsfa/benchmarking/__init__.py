"""Benchmarks of decode, prefill, coding and whole models, beside the strongest dense kernels torch has, and of servers beside vLLM's.

A case is timed only after its output has passed the error rule; a case that fails or cannot run is a row with its
reason and no time. `decode`, `prefill`, `topk`, `generate`, `plain` and `serve` hold the cases, `timing` the clock and the copy bandwidth that serves as
roofline, `results` the rows, table and files, `findings` what they say together, `plots` the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from ..checks import require
from ..extras import install_hint
from ..files import require_place, whole_file
from . import decode, prefill, topk
from .cases import Case, MeasuredCase, UnavailableError, WrongOutputError
from .results import BaselineResult, Results, Row, environment, incomplete_note
from .timing import copy_bandwidth, measure, release


def _cases_with(extra: str, name: str, device: torch.device, quick: bool) -> Sequence[MeasuredCase]:
    """Those of the module `name`, which needs what the `extra` installs."""
    try:
        module = import_module(f".{name}", __name__)
    except ImportError as error:
        raise ImportError(f"{error}: {install_hint(extra)}") from error
    return module.cases(device, quick)


CASES: dict[str, Callable[[torch.device, bool], Sequence[Case | MeasuredCase]]] = {
    "decode": decode.cases,
    "prefill": prefill.cases,
    "topk": topk.cases,
    "generate": partial(_cases_with, "hf", "generate"),
    "generate-plain": partial(_cases_with, "hf", "plain"),
    "serve": partial(_cases_with, "vllm", "serve"),
}
_NAMED_CASES = 3  # in a message


def run(
    operation: str,
    *,
    device: torch.device,
    quick: bool,
    directory: Path,
    on_start: Callable[[int], object],
    on_row: Callable[[Row], object],
    only: Sequence[str] = (),
) -> tuple[Results, list[Path]]:
    """Run the cases of `operation`, a key of `CASES`; write JSON and a picture into `directory`.

    `on_start` is told the number of cases, `on_row` each row as soon as it is there. `only` names the cases to run by
    texts that their names must all contain. Returns the results and the files written. The JSON is written anew after each
    row, marked as incomplete until all are there; a note of an interrupt names the files. Raises `OSError` before anything is
    measured if `directory` cannot be written, and `ValueError` if no case is left.
    """
    require_place(directory)
    known = CASES[operation](device, quick)
    cases = [case for case in known if all(text in case.name for text in only)]
    require(
        bool(cases),
        f"no case of {operation} has {' and '.join(map(repr, only))} in its name; it has {len(known)}, such as: "
        + "; ".join(case.name for case in known[:_NAMED_CASES]),
    )
    on_start(len(cases))
    where, bandwidth = environment(device), copy_bandwidth(device)
    rows: list[Row] = []
    path: Path | None = None

    def save(incomplete: str | None = None) -> Results:
        nonlocal path
        results = Results(operation, where, bandwidth, tuple(rows), incomplete)
        path = results.save(directory, path)
        return results

    def finish(results: Results) -> list[Path]:
        from .plots import draw

        assert path is not None
        picture = path.with_suffix(".png")
        with whole_file(picture) as file:
            draw(results, file)
        return [path, picture]

    results = None
    try:
        for case in cases:
            rows.append(run_case(case, bandwidth, quick))
            results = save(None if len(rows) == len(cases) else f"{len(rows)} of {len(cases)} cases")
            on_row(rows[-1])
            release(device)
    except KeyboardInterrupt as stop:
        if results is not None:
            stop.add_note(incomplete_note(finish(results)))
        raise
    assert results is not None
    return results, finish(results)


def run_case(case: Case | MeasuredCase, bandwidth: float, quick: bool) -> Row:
    """Prepare, check, and only then time a case; whatever stops it becomes the note of a row without a time.

    Args:
        bandwidth: bytes a second of a copy on the case's device, the roofline.
        quick: a few repeats instead of many.
    """
    row = partial(Row, case.name, case.facet, case.curve, case.n)
    try:
        if isinstance(case, MeasuredCase):
            return row(status="ok", **case.measure(bandwidth, quick))
        work = case.prepare()
        verdict = work.check(work.run())
        if not verdict.passed:
            return row(status="failed", note=verdict.note)
        runs, notes = {"flashsfa": work.run}, []
        for name, baseline in work.baselines.items():
            try:
                baseline.run()
                runs[name] = baseline.run
            except RuntimeError as error:
                notes.append(f"{name} does not run: {_first_line(error)}")
        times = measure(runs, case.device, quick)
    except UnavailableError as reason:
        return row(status="skipped", note=str(reason))
    except WrongOutputError as found:
        return row(status="failed", note=str(found))
    except torch.OutOfMemoryError as error:
        return row(status="skipped", note=f"does not fit in memory: {_first_line(error)}")
    except Exception as error:  # whatever it is: the other cases still have their rows
        return row(status="failed", note=f"{type(error).__name__}: {_first_line(error)}")
    ours = times.pop("flashsfa")
    choice = work.choice()
    return row(
        status="ok", note="; ".join(notes), timing=ours,
        gb_per_s=work.nbytes / ours.median_ms / 1e6,
        tflops=None if work.flops is None else work.flops / ours.median_ms / 1e9,
        roofline_percent=100 * 1e3 * work.nbytes / bandwidth / ours.median_ms,
        bytes_moved=work.nbytes, bytes_per_token=work.bytes_per_token, moved_per_token=work.nbytes / work.tokens,
        v_rows_read=work.v_rows_read, error=verdict.error,
        backend=choice.backend if choice else "not recorded", reason=choice.reason if choice else "",
        baselines={
            name: BaselineResult(
                timing, gb_per_s=work.baselines[name].nbytes / timing.median_ms / 1e6,
                ratio=timing.median_ms / ours.median_ms, moved_per_token=work.baselines[name].nbytes / work.tokens,
                competes=work.baselines[name].competes,
            )
            for name, timing in times.items()
        },
    )  # fmt: skip


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

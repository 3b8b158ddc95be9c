"""What commands show: progress, tables, and the one line that says which extra is missing."""

from __future__ import annotations

import importlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import install_hint

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[str, int], Callable[[], None]]  # (description, steps) -> call once a step


def need(extra: str, *modules: str) -> None:
    """Raise `ImportError` before any work if a module is missing, with the extra that brings it; modules that talk are quiet."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of a home that it cannot write to
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f"{error}: {install_hint(extra)}") from error
    if "transformers" in modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


def console() -> Console:
    """Where tables are printed; names are no markup, and a file is as wide as a table needs."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)


def print_written(paths: list[Path]) -> None:
    print("written: " + ", ".join(map(str, paths)))


@contextmanager
def progress() -> Iterator[Progress]:
    """On a terminal a bar for each activity; elsewhere a line when it begins, after the seconds that have passed."""
    if not sys.stdout.isatty():
        begin = time.monotonic()

        def announce(description: str, steps: int) -> Callable[[], None]:
            print(f"{time.monotonic() - begin:5.0f} s  {description}", flush=True)
            return lambda: None

        yield announce
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns: Any = (TextColumn("{task.description:<52}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bars:

        def start(description: str, steps: int) -> Callable[[], None]:
            task = bars.add_task(description, total=steps)
            return lambda: bars.advance(task)

        yield start

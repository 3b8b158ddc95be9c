"""Which backend runs, and why: every choice is recorded here, and `explain()` tells it; and what makes the user wait."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..files import cache_folder, private_folder

_log = logging.getLogger("flashsfa")


@dataclass(frozen=True)
class Choice:
    """The backend an operation ran on and the reason in one sentence."""

    backend: str
    reason: str


_last: dict[str, Choice] = {}
_announced: set[tuple[str, str]] = set()


def record(operation: str, backend: str, reason: str, *, fallback: bool = False) -> None:
    """Note what `operation` runs on. A `fallback` (slower than what the user may expect) is logged, once each."""
    _last[operation] = Choice(backend, reason)
    if fallback and (operation, reason) not in _announced:
        _announced.add((operation, reason))
        _log.warning("%s runs on the %s backend: %s", operation, backend, reason)


def explain() -> str:
    """Which backend each operation last ran on in this process, and why; one line an operation."""
    if not _last:
        return "nothing has run yet"
    return "\n".join(f"{operation}: {choice.backend} ({choice.reason})" for operation, choice in sorted(_last.items()))


def last_choice(operation: str) -> Choice | None:
    """The record behind `explain()` for one operation, or None if it has not run."""
    return _last.get(operation)


def code_folder(name: str) -> Path | None:
    """The folder `name` for compiled code, of the user alone; None, said once, where there can be none."""
    folder = private_folder(name)
    if folder is None and ("code", name) not in _announced:
        _announced.add(("code", name))
        _log.warning(
            "compiled code cannot be kept in %s, so each process compiles again: name a folder that you alone can write in FLASHSFA_CACHE",
            cache_folder() or "a cache folder, as there is no home",
        )
    return folder


_SLOW_SECONDS = 1.0


@contextmanager
def said_if_slow(what: str) -> Iterator[None]:
    """Log, once each, that `what` is being compiled where that takes more than a second: a first start may seem to hang."""
    timer = compiling(what)
    try:
        yield
    finally:
        timer.cancel()


def compiling(what: str) -> threading.Timer:
    """As `said_if_slow`, for a compilation that ends when the timer is cancelled."""
    timer = threading.Timer(_SLOW_SECONDS, _say_compiling, [what])
    timer.daemon = True
    timer.start()
    return timer


def _say_compiling(what: str) -> None:
    if ("compiling", what) not in _announced:
        _announced.add(("compiling", what))
        _log.warning("compiling %s for this machine: some seconds, once a machine", what)

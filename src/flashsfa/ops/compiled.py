"""Code that is compiled on the user's machine: where it is kept, and a line in the log when it makes the user wait."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import cache_folder, private_folder

_log = logging.getLogger("flashsfa")
_announced: set[tuple[str, str]] = set()


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

"""Which backend runs, and why: every choice is recorded here, and `explain()` tells it."""

from __future__ import annotations

import logging
from typing import NamedTuple

from ..contexts import constant_in_traces

_log = logging.getLogger("flashsfa")


class Choice(NamedTuple):
    """The backend an operation ran on and the reason in one sentence."""

    backend: str
    reason: str


# A reader of "attention: dense" would think that nothing happened.
_SPELT = {"dense": "sparse features through a dense kernel"}

_last: dict[str, Choice] = {}
_announced: set[tuple[str, str]] = set()


@constant_in_traces  # else a graph would be guarded by what was recorded before
def record(operation: str, backend: str, reason: str, *, fallback: bool = False) -> None:
    """Note what `operation` runs on; of a compiled call when it is traced. A `fallback` (slower than what the user may expect) is logged,
    once each."""
    _last[operation] = Choice(backend, reason)
    if fallback and (operation, reason) not in _announced:
        _announced.add((operation, reason))
        _log.warning("%s runs on the %s backend: %s", operation, backend, reason)


def again(operation: str, choice: Choice) -> None:
    """Note that `operation` runs on what was recorded before."""
    _last[operation] = choice


def explain() -> str:
    """Which backend each operation last ran on in this process, and why; one line an operation."""
    if not _last:
        return "nothing has run yet"
    return "\n".join(
        f"{operation}: {_SPELT.get(choice.backend, choice.backend)} ({choice.reason})"
        for operation, choice in sorted(_last.items())
    )


def last_choice(operation: str) -> Choice | None:
    """The record behind `explain()` for one operation, or None if it has not run."""
    return _last.get(operation)

"""The command line: `flashsfa convert`, `flashsfa eval`, `flashsfa train`, `flashsfa bench` and `flashsfa info`.

A file a command: its options, what it calls, and what it prints. `options` and `screen` hold what they share. Modules that a
command needs are imported when it runs, so that `--help` is quick and an extra that is missing is named.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .. import __version__
from . import bench, convert, evaluate, info, train

_COMMANDS = (convert, evaluate, train, bench, info)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 with one line on stderr that says what to do.

    `bench` returns 1 if a case failed. Ctrl-C ends with 130 and SIGTERM with 143, both after what was begun is removed.
    """
    options = parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text in any encoding
    try:
        with _sigterm_stops():
            return options.run(options) or 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        _say(f"error: {error}", error)
        return 2
    except MemoryError as error:
        _say("error: the memory of this machine is full: use shorter contexts, or fewer", error)
        return 2
    except KeyboardInterrupt as stop:
        _say("stopped", stop)
        return 128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)


def _say(what: str, error: BaseException) -> None:
    """One line on stderr, with the notes of `error`."""
    print(" ".join("; ".join([f"flashsfa: {what}", *getattr(error, "__notes__", [])]).split()), file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it parses has `run`, the function that runs the command."""
    parser = argparse.ArgumentParser(prog="flashsfa", description="Sparse Feature Attention")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


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

"""Runs kernels, compiled by numba once a machine, on torch's number of threads or on the one that calls.

The machine code is kept in NUMBA_CACHE_DIR, else in the folder `numba` of the cache folder (`files.cache_folder`).

numba's threads do not survive a fork: a process that was forked after they had started decodes on one thread, with the same
kernels compiled so.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import compiled
from .machine import OPTIONS, numba

_log = logging.getLogger("flashsfa")
_one_at_a_time = threading.RLock()  # numba's fallback threading layer ends the process on concurrent kernels
_threads_are_lost = False  # in a process that was forked after numba had started threads


def is_available() -> bool:
    """Whether numba can be imported."""
    return numba is not None


def manner() -> str:
    """How kernels run in this process, for `explain()`."""
    return f"compiled for this CPU{_ONE_THREAD if _threads_are_lost else ''}"


_ONE_THREAD = ", on one thread: this process was forked after numba's threads had started"


@contextmanager
def ready() -> Iterator[None]:
    """Within, kernels run on torch's number of threads, and no other thread of the process runs any."""
    with _one_at_a_time:
        if _threads_are_lost:
            yield
            return
        # numba's first question starts its OpenMP threads, which sets OpenMP's number of them, torch's too, to all cores
        threads, before = torch.get_num_threads(), numba.get_num_threads()
        wanted = min(threads, numba.config.NUMBA_NUM_THREADS)
        if wanted != before:
            numba.set_num_threads(wanted)
        try:
            yield
        finally:
            if wanted != before:
                numba.set_num_threads(before)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)


class Kernel:
    """A function, called with the dtypes that it is compiled for before its arguments. One with loops over `prange` is compiled for all
    cores, or for one where threads are lost, and called within `ready()`; one that is not `parallel` runs on the thread that calls."""

    def __init__(self, function: Callable, *, parallel: bool = True) -> None:
        self._function, self._parallel = function, parallel
        self._compiled: dict[bool, Callable] = {}
        self._called: set[tuple] = set()  # what is compiled

    def __call__(self, dtypes: tuple, *arguments: Any) -> None:
        parallel = self._parallel and not _threads_are_lost
        if (parallel, dtypes) in self._called:
            self._compiled[parallel](*arguments)
            return
        self._call_first(parallel, arguments)
        self._called.add((parallel, dtypes))

    def _call_first(self, parallel: bool, arguments: tuple) -> None:
        """As a call, the first time with these dtypes: compiled, or read from where that is kept."""
        if self._parallel and not parallel:
            _say_one_thread()
        folder = _folder(parallel)
        with _one_at_a_time, compiled.said_if_slow("kernels for the CPU"):
            try:
                if parallel not in self._compiled:
                    self._compiled[parallel] = self._compile(parallel, folder)
                self._compiled[parallel](*arguments)
            except OSError as error:  # a full disk
                _log.warning("kernels are compiled, but cannot be kept in %s: %s", folder, error)
                self._compiled[parallel](*arguments)
            except (EOFError, pickle.UnpicklingError) as error:
                _log.warning("kernels are compiled again, as what was kept in %s is damaged: %s", folder, error)
                assert folder is not None
                shutil.rmtree(folder, ignore_errors=True)
                self._compiled[parallel] = self._compile(parallel, folder)
                self._compiled[parallel](*arguments)

    def _compile(self, parallel: bool, folder: Path | None) -> Callable:
        """The function, to be compiled at its first call or read from `folder`."""
        named = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(folder or "")  # read when the function is decorated
        try:
            return numba.njit(**OPTIONS, parallel=parallel, cache=folder is not None)(self._function)
        finally:
            numba.config.CACHE_DIR = named


@functools.cache
def _say_one_thread() -> None:
    _log.warning("decode runs on the numba backend: %s", manner())


def _folder(parallel: bool) -> Path | None:
    """Where the machine code is kept; numba itself does not tell the two forms apart, nor the sources that a kernel calls."""
    folder = numba.config.CACHE_DIR or compiled.code_folder("numba")
    return Path(folder, f"flashsfa-{'all-cores' if parallel else 'one-core'}-{_sources()}") if folder else None


@functools.cache
def _sources() -> str:
    """A digest of the kernels, which lie in folders of the name `cpu`."""
    texts = (path.read_bytes() for path in sorted(Path(__file__).parents[1].rglob("cpu/*.py")))
    return hashlib.sha256(b"".join(texts)).hexdigest()[:8]


def _before_fork() -> None:
    """A child has no other thread that could finish a decode: it is waited for."""
    _one_at_a_time.acquire()


def _after_fork_in_child() -> None:
    global _threads_are_lost
    _one_at_a_time.release()
    try:
        numba.threading_layer()
    except ValueError:  # no threads were started
        return
    _threads_are_lost = True


if numba and hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_one_at_a_time.release, after_in_child=_after_fork_in_child
    )

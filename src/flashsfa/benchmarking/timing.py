"""The clock: medians over interleaved runs with a cold cache, and the bandwidth of a copy."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_GIB = 1 << 30
_FLUSH_BYTES = {"cuda": _GIB, "cpu": _GIB // 8}
_FLUSH_READS = {"cuda": 3, "cpu": 1}  # some 0.35 ms each on an H100, no more than an operator's launches may take
_COPY_BYTES = {"cuda": _GIB, "cpu": _GIB // 4}
_REPEATS = {"cuda": 50, "cpu": 15}
_QUICK_REPEATS = 7
_REPEAT_MS = 2000.0
_WARM_UP = 2  # compiles kernels and fills the allocator's pools


@dataclass(frozen=True)
class Timing:
    """Milliseconds a run: the median and the 20th and 80th percentile."""

    median_ms: float
    p20_ms: float
    p80_ms: float

    @property
    def spread(self) -> float:
        """From the 20th to the 80th percentile, as a share of the median."""
        return (self.p80_ms - self.p20_ms) / self.median_ms


def measure(runs: Mapping[str, Callable[[], Any]], device: torch.device, quick: bool = False) -> dict[str, Timing]:
    """Time each of `runs` on `device`: CUDA events on a GPU, the wall clock on the CPU.

    Runs alternate, so that noise and clock changes meet all alike. Before each, a large buffer is read: the caches
    are cold and hold nothing that would have to be written back, and on a GPU it is read often enough for the launches
    of the run to be queued behind it, so that the events enclose the GPU's work alone.
    """
    flush = torch.zeros(_FLUSH_BYTES[device.type] // 4, device=device)
    for run in runs.values():
        for _ in range(_WARM_UP):
            run()
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
    for _ in range(_QUICK_REPEATS if quick else _REPEATS[device.type]):
        for name, run in runs.items():
            for _ in range(_FLUSH_READS[device.type]):
                flush.sum()
            start = _mark(device)
            run()
            marks[name].append((start, _mark(device)))
    _wait(device)
    return {name: summary([_elapsed_ms(*pair) for pair in pairs]) for name, pairs in marks.items()}


def repeat(run: Callable[[], Any], device: torch.device, quick: bool = False) -> Timing:
    """Time `run` alone, one whose own data clears the caches, after a warm-up: for about two seconds, at least once."""
    run()

    def timed(count: int) -> list[float]:
        marks = []
        for _ in range(count):
            start = _mark(device)
            run()
            marks.append((start, _mark(device)))
        _wait(device)
        return [_elapsed_ms(*pair) for pair in marks]

    times = timed(1)
    most = _QUICK_REPEATS if quick else _REPEATS[device.type]
    return summary(times + timed(min(most, int(_REPEAT_MS / times[0])) - 1))


def wall_clock(runs: Mapping[str, Callable[[], Any]], device: torch.device, calls: int) -> dict[str, Timing]:
    """Time each of `runs` as one waits for it, the host's part too, after a warm-up. Runs alternate: a host is busier at times."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(calls):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: summary(found) for name, found in times.items()}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a copy of a large buffer: the roofline of all that is bound by memory."""
    source = torch.zeros(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    timing = measure({"copy": lambda: target.copy_(source)}, device)["copy"]
    return 2 * source.nbytes / timing.median_ms * 1e3


def release(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed_ms(start: Any, end: Any) -> float:
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def summary(times: list[float]) -> Timing:
    """Of runs that took `times` milliseconds."""
    if len(times) == 1:
        return Timing(times[0], times[0], times[0])
    p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), p20, p80)

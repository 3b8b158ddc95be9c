"""Numbers by which the thread block of a tile that ends last knows that it does: 0 when a kernel begins, which leaves them so.

Kernels of one stream follow one another and share theirs. A graph has its own, as it may run on another stream than it is captured on, beside
others. In a graph, to set them to 0 would be a launch more for each kernel. So they are taken from a variable that the driver loads as 0, and for
good, as graphs know them by address. Memory of torch would not do: what a graph's pool holds is given to others once the graph is captured.
"""

from __future__ import annotations

import contextlib
import threading

import torch
from torch import Tensor

from ... import nvrtc
from ...nvrtc import cuda

_COUNT = 1 << 20  # numbers of a device
_LEAST = 1024  # that a stream or graph takes, for larger calls to come
SOURCE = f'extern "C" {{ __device__ unsigned counters[{_COUNT}]; }}\n'


class _Room:
    """Numbers of a device that nobody has taken."""

    def __init__(self, device: torch.device) -> None:
        self._next = self._end = 0
        if device.type == "cuda":
            # a driver that loads nothing loads no kernel either, whose launch says why
            with contextlib.suppress(RuntimeError):
                self._next = cuda.load_variable(nvrtc.machine_code("counters", SOURCE), "counters")
                self._end = self._next + 4 * _COUNT

    def take(self, count: int) -> int | None:
        """Address of `count` of them, or None if there are fewer."""
        address, end = self._next, self._next + 4 * count
        if end > self._end:
            return None
        self._next = end
        return address


_rooms: dict[torch.device, _Room] = {}
_taken: dict[tuple[torch.device, int, int | None], tuple[int, int]] = {}  # how many, and where, of a stream and graph
_lasting: list[Tensor] = []
_lock = threading.Lock()  # two threads must not take the same


def address(tiles: int, device: torch.device) -> int:
    """Of the numbers of `tiles` tiles, for a kernel on torch's current stream of its current `device`."""
    stream, graph = _current(device)
    count, where = _taken.get((device, stream, graph), (0, 0))
    if count >= tiles:
        return where
    with _lock:
        return _take(tiles, device, stream, graph)


def _take(tiles: int, device: torch.device, stream: int, graph: int | None) -> int:
    if device not in _rooms and graph is None:  # nothing is loaded while a graph is captured
        _rooms[device] = _Room(device)
    count = max(tiles, _LEAST)
    found = _rooms[device].take(count) if device in _rooms else None
    if found is None:
        zeros = torch.zeros(count, dtype=torch.int32, device=device)
        if graph is not None:  # which sets them to 0 itself, each time
            return zeros.data_ptr()
        _lasting.append(zeros)
        found = zeros.data_ptr()
    _taken[device, stream, graph] = count, found
    return found


def _current(device: torch.device) -> tuple[int, int | None]:
    """The stream, and the graph that it is captured into, if it is."""
    return (cuda.current_stream(), cuda.current_graph()) if device.type == "cuda" else (0, None)

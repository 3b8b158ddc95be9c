"""Run-time compilation of CUDA kernels with NVRTC: no nvcc, nothing at install time.

Machine code is kept in memory and, named by a hash of its source, options and compiler, in the folder `kernels` of the cache folder
(`files.cache_folder`). What lies there runs on the GPU, so that it is believed only if it is whole and the user's own; anything else is
compiled again and replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from ...contexts import asked_once
from ...files import is_private, write_whole
from .. import compiled
from . import cuda

_OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17", "--device-as-default-execution-space")


@asked_once
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@asked_once
def obstacle() -> str | None:
    """Why nothing can be compiled at run time, or None if it can."""
    try:
        cuda.nvrtc_version()
    except cuda.CompilationError as error:
        return str(error)
    return None


def defines(values: Mapping[str, object]) -> str:
    """What the files of a kernel know of one specialisation: a constant for each value."""
    return "".join(f"#define {name.upper()} {value}\n" for name, value in values.items())


def listed(folder: Path, files: Iterable[str]) -> str:
    """The text of source files, each under its name and lines."""
    return "".join(f'#line 1 "{name}"\n{(folder / name).read_text()}' for name in files)


def machine_code(name: str, source: str, *, afresh: bool = False) -> bytes:
    """Machine code of the `source` of the kernel `name` for sm_90a, from the disk cache where it is there and not `afresh`. Needs no GPU.

    Raises `CompilationError` if there is no NVRTC or it refuses.
    """
    key = hashlib.sha256(f"{cuda.nvrtc_version()}{_OPTIONS}{source}".encode()).hexdigest()[:32]
    folder = compiled.code_folder("kernels")
    path = folder and folder / f"{name}-sm_90a-{key}.cubin"
    if path and not afresh and (kept := _read_kept(path)):
        return kept
    with compiled.said_if_slow(f"the {name} kernel"):
        cubin = cuda.compile_cubin(source, "generated", _OPTIONS)
    if path:
        with contextlib.suppress(OSError):  # a full disk costs only the next start
            write_whole(path, _digest(path, cubin) + cubin)
            path.chmod(0o600)  # whatever the umask: what others may write is not believed
    return cubin


class Variant(Protocol):
    """One specialisation of a kernel: its thread blocks."""

    def __hash__(self) -> int: ...

    @property
    def threads(self) -> int: ...

    @property
    def shared_bytes(self) -> int: ...


class Kernel(NamedTuple):
    """One specialisation, ready to launch on a device."""

    loaded: ctypes.c_void_p
    threads: int
    shared_bytes: int
    device: int

    def launch(self, grid: tuple[int, int, int], *params: ctypes.Structure | ctypes.Array) -> None:
        """Run it on torch's current stream of its device."""
        if cuda.current_device() == self.device:
            cuda.launch(self.loaded, grid, self.threads, self.shared_bytes, params)
            return
        with torch.cuda.device(self.device):
            cuda.launch(self.loaded, grid, self.threads, self.shared_bytes, params)


@functools.cache
def load_kernel(compile_cubin: Callable[..., bytes], variant: Variant, name: str, device: int) -> Kernel | str:
    """The kernel `name` of what `compile_cubin(variant, afresh=)` returns; or why there is none: what failed once is not tried again."""

    def load(afresh: bool) -> ctypes.c_void_p:
        cubin = compile_cubin(variant, afresh=afresh)
        try:
            return cuda.load_kernel(cubin, name, variant.shared_bytes, device)
        except cuda.CompilationError:
            if afresh:
                raise
        return load(afresh=True)  # what the disk had may not be what the compiler makes

    try:
        return Kernel(load(afresh=False), variant.threads, variant.shared_bytes, device)
    except cuda.CompilationError as error:
        return str(error)


def _read_kept(path: Path) -> bytes | None:
    """The code at `path`, if it is whole and nobody else can have written it."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            content = file.read() if is_private(os.fstat(file.fileno())) else b""
    except OSError:
        return None
    digest, cubin = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return cubin if cubin and digest == _digest(path, cubin) else None


_DIGEST_BYTES = 32


def _digest(path: Path, cubin: bytes) -> bytes:
    """Of the code and its name: one that was kept under another name is another."""
    return hashlib.sha256(path.name.encode() + cubin).digest()

"""The few functions of NVRTC and the CUDA driver that the kernels for Hopper need, through ctypes.

Both libraries come with what is there anyway: NVRTC with torch's CUDA wheels or a CUDA toolkit, the driver with the GPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TENSOR_MAP_BYTES = 128  # sizeof(CUtensorMap), which is aligned to 64
_Map = ctypes.c_char * TENSOR_MAP_BYTES


class CompilationError(RuntimeError):
    """A kernel cannot be built or loaded here; the message says why."""


def nvrtc_version() -> tuple[int, int]:
    """Version of the run-time compiler; `CompilationError` where there is none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def compile_cubin(source: str, name: str, options: Sequence[str]) -> bytes:
    """Machine code of a CUDA source without headers. Needs no GPU. Raises `CompilationError` with the compiler's log."""
    program = ctypes.c_void_p()
    _nvrtc("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            _nvrtc("nvrtcCompileProgram", program, len(options), arguments)
        except CompilationError as error:
            log = _nvrtc_bytes("nvrtcGetProgramLog", program).decode(errors="replace")
            raise CompilationError(f"{error}\n{log.strip(chr(0)).strip()[:2000]}") from None
        return _nvrtc_bytes("nvrtcGetCUBIN", program)
    finally:
        _nvrtc("nvrtcDestroyProgram", ctypes.byref(program))


def load_kernel(cubin: bytes, name: str, shared_bytes: int, device: int) -> ctypes.c_void_p:
    """A kernel of `cubin`, allowed `shared_bytes` of dynamic shared memory on `device`. Lives as long as the process.

    Raises `CompilationError` if the driver refuses it, as one that is older than the compiler does.
    """
    library, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    max_dynamic_shared_bytes = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    try:
        _driver("cuLibraryLoadData", ctypes.byref(library), cubin, None, None, 0, None, None, 0)
        _driver("cuLibraryGetKernel", ctypes.byref(kernel), library, name.encode())
        _driver("cuKernelSetAttribute", max_dynamic_shared_bytes, shared_bytes, kernel, device)
    except RuntimeError as error:
        raise CompilationError(f"{error}, for code of NVRTC {'.'.join(map(str, nvrtc_version()))}") from None
    return kernel


def load_variable(cubin: bytes, name: str) -> int:
    """Address of a variable of `cubin` on torch's current device, as it is loaded: 0 where it says nothing else. Lives as long as the process."""
    library, address = ctypes.c_void_p(), ctypes.c_void_p()
    _bind_context()
    _driver("cuLibraryLoadData", ctypes.byref(library), cubin, None, None, 0, None, None, 0)
    _driver("cuLibraryGetGlobal", ctypes.byref(address), None, library, name.encode())
    assert address.value is not None
    return address.value


def launch(
    kernel: ctypes.c_void_p,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    parameters: Sequence[ctypes.Structure | ctypes.Array],
) -> None:
    """Launch on torch's current device and stream."""
    if not _bound.here:
        _bind_context()
        _bound.here = True
    addresses = (ctypes.c_void_p * len(parameters))(*map(ctypes.addressof, parameters))
    stream = ctypes.c_void_p(current_stream())
    result = _launch_kernel()(kernel, *grid, threads, 1, 1, shared_bytes, stream, addresses, None)
    if result:
        raise _error("cuLaunchKernel", result)


# Each launch asks for these, in a tenth of the time of torch's public forms, which ask whether CUDA has begun.


def current_device() -> int:
    """torch's current device, where CUDA has begun."""
    return torch._C._cuda_getDevice()


def current_stream() -> int:
    """torch's current stream of its current device."""
    return torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())


def current_graph() -> int | None:
    """A number of the graph that torch's current stream is captured into, of which no two have the same; None where it is not."""
    if not torch._C._cuda_isCurrentStreamCapturing():
        return None
    status, number = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(current_stream())
    _driver("cuStreamGetCaptureInfo_v2", stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    return number.value


def tensor_map(x: Tensor, rows: int) -> ctypes.Array:
    """A CUtensorMap for tensors such as x [B, H, N, D], 16 bits an entry: boxes of `rows` rows of 64 entries, swizzled by 128 bytes,
    zeros past the end. The last dimension is contiguous, the other strides are multiples of 16 bytes. It has no address yet: `move_map`
    gives it one, a multiple of 16 bytes."""
    found = _aligned_map()
    ctypes.memmove(found, _map_of(x.shape, x.stride(), x.dtype, rows), TENSOR_MAP_BYTES)
    return found


def move_map(made: ctypes.Array, x: Tensor) -> None:
    """Let a map for tensors such as x be that of x."""
    _driver("cuTensorMapReplaceAddress", made, ctypes.c_void_p(x.data_ptr()))


@functools.lru_cache(maxsize=1024)  # each layer of a model asks for the same
def _map_of(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, rows: int) -> ctypes.Array:
    """That of a tensor of this form which lies nowhere yet."""
    sizes = (ctypes.c_uint64 * 4)(*reversed(shape))
    # A dimension of one entry has any stride: 16 bytes satisfy the check.
    steps_between = (ctypes.c_uint64 * 3)(*(2 * (strides[i] if shape[i] > 1 else 8) for i in (2, 1, 0)))
    box, steps = (ctypes.c_uint32 * 4)(64, rows, 1, 1), (ctypes.c_uint32 * 4)(1, 1, 1, 1)
    element = {torch.float16: 6, torch.bfloat16: 9}[dtype]  # CU_TENSOR_MAP_DATA_TYPE_*
    interleave_none, swizzle_128b, promotion_l2_128b, fill_zeros = 0, 3, 2, 0
    found = _aligned_map()
    _driver(
        "cuTensorMapEncodeTiled", found, element, 4, ctypes.c_void_p(), sizes, steps_between, box, steps, interleave_none,
        swizzle_128b, promotion_l2_128b, fill_zeros,
    )  # fmt: skip
    return found


def _aligned_map() -> ctypes.Array:
    """Room for a map, which the driver wants at a multiple of 64 bytes."""
    space = ctypes.create_string_buffer(TENSOR_MAP_BYTES + 64)
    return _Map.from_buffer(space, -ctypes.addressof(space) % 64)


class _Bound(threading.local):
    """Whether this thread has a context: once there is one, torch changes it with the device."""

    here = False


_bound = _Bound()


def _bind_context() -> None:
    """torch's context for this thread, which a thread lacks until the CUDA runtime has been called in it."""
    context = ctypes.c_void_p()
    _driver("cuCtxGetCurrent", ctypes.byref(context))
    if not context:
        _driver("cuDevicePrimaryCtxRetain", ctypes.byref(context), torch.cuda.current_device())
        _driver("cuCtxSetCurrent", context)


def _driver(function: str, *arguments: object) -> None:
    result = getattr(_libcuda(), function)(*arguments)
    if result:
        raise _error(function, result)


def _error(function: str, result: int) -> RuntimeError:
    text = ctypes.c_char_p()
    _libcuda().cuGetErrorName(result, ctypes.byref(text))
    return RuntimeError(f"{function}: {(text.value or b'unknown error').decode()}")


def _nvrtc(function: str, *arguments: object) -> None:
    library = _libnvrtc()
    result = getattr(library, function)(*arguments)
    if result:
        raise CompilationError(f"{function}: {library.nvrtcGetErrorString(result).decode()}")


def _nvrtc_bytes(function: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _nvrtc(f"{function}Size", program, ctypes.byref(size))
    content = ctypes.create_string_buffer(size.value)
    _nvrtc(function, program, content)
    return content.raw


@functools.cache
def _libcuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _launch_kernel() -> Any:
    return _libcuda().cuLaunchKernel


@functools.cache
def _libnvrtc() -> ctypes.CDLL:
    """NVRTC of torch's CUDA wheels, else of a toolkit on the loader's path."""
    package = importlib.util.find_spec("nvidia")
    folders = [Path(p) for p in (package.submodule_search_locations or ())] if package else []
    found = [path for folder in folders for path in sorted(folder.glob("*/lib/libnvrtc.so.*[0-9]"))]
    found.sort(key=lambda path: path.suffix != f".{(torch.version.cuda or '').split('.')[0]}")  # torch's own first
    for path in found:
        for builtins in path.parent.glob("libnvrtc-builtins.so.*[0-9]"):
            ctypes.CDLL(str(builtins))  # NVRTC itself looks for it on the loader's path alone
    for name in (*map(str, found), *(f"libnvrtc.so.{major}" for major in (13, 12))):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise CompilationError("NVRTC (libnvrtc) is not installed: pip install nvidia-cuda-nvrtc")

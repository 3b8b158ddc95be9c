"""Rows that are zero but for what a code keeps, for little of the host's time: made of whole rows, or of the code.

Triton's kernels do the same, with fewer instructions per row.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ... import nvrtc
from . import MOST_HEADS, MOST_ROWS

SOURCES = Path(__file__).parent
FILES = (
    "../../nvrtc/types.cuh",
    "../../nvrtc/warp.cuh",
    "../../nvrtc/largest.cuh",
    "sparse.cu",
)  # as they use one another
_PARTS = ("x", "values", "indices", "out")


def prune(x: Tensor, topk: int, dense_dims: int, out: Tensor) -> bool:
    """Write x [B, H, N, D] to `out`, zero but for its first `dense_dims` entries and the `topk` largest magnitudes of the others, ties to the
    lowest index. False, with nothing written, for what the kernel is not for."""
    return _run("prune_kernel", topk, dense_dims, out, x=x)


def scatter(dense: Tensor, values: Tensor, indices: Tensor, out: Tensor) -> bool:
    """Write a code of [..., M] dense entries, and [..., K] values at uint8 indices past these, to `out` [B, H, N, D]. An index past the sparse
    part is left out. False as in `prune`."""
    return _run("scatter_kernel", values.shape[-1], dense.shape[-1], out, x=dense, values=values, indices=indices)


def _run(name: str, topk: int, dense_dims: int, out: Tensor, **parts: Tensor) -> bool:
    given = [out if part == "out" else parts.get(part) for part in _PARTS]
    forms = (None if x is None else (x.dtype, x.shape, x.stride()) for x in given)
    launch = _prepared(name, topk, dense_dims, out.device, *forms)
    if launch is None:
        return False
    params = Params.from_buffer_copy(launch.params)
    params.x, params.values, params.indices, params.out = (None if x is None else x.data_ptr() for x in given)
    launch.kernel.launch(launch.grid, params)
    return True


_Form: TypeAlias = tuple[torch.dtype, torch.Size, tuple[int, ...]] | None


class _Launch(NamedTuple):
    """What launches over tensors of one form have in common: `params` are all but addresses."""

    kernel: nvrtc.Kernel
    grid: tuple[int, int, int]
    params: Params


@functools.lru_cache(maxsize=1024)  # each layer of a model asks for the same
def _prepared(name: str, topk: int, dense_dims: int, device: torch.device, *forms: _Form) -> _Launch | None:
    """For parts of these `forms`; None for what the kernel is not for."""
    assert forms[-1] is not None
    dtype, shape, _ = forms[-1]
    if len(shape) != 4 or dtype not in (torch.float16, torch.bfloat16) or not nvrtc.is_hopper(device):
        return None
    batch, heads, n, head_dim = shape
    if not 0 < batch * heads * n <= MOST_ROWS or batch * heads > MOST_HEADS or head_dim > 256:
        return None
    strides: list[int] = []
    for part, form in zip(_PARTS, forms, strict=True):
        if form is None:
            strides += (0, 0, 0)
            continue
        its_dtype, its_shape, (*of_rows, of_entries) = form
        expected = torch.uint8 if part == "indices" else dtype
        if its_shape[:3] != shape[:3] or its_dtype != expected or (of_entries != 1 and its_shape[3] > 1):
            return None
        strides += of_rows
    if nvrtc.obstacle() is not None:
        return None
    kernel = nvrtc.load_kernel(compile_cubin, Variant(head_dim, dense_dims, topk), name, device.index)
    if isinstance(kernel, str):
        return None
    grid = -(-n * 32 // Variant.threads), batch * heads, 1
    return _Launch(kernel, grid, Params(None, None, None, None, *strides, n, heads))


class Params(ctypes.Structure):
    """That of sparse.cu, which compiles only if both have one size."""

    _fields_ = (
        *((part, ctypes.c_void_p) for part in _PARTS),
        *((f"{part}_{of}", ctypes.c_longlong) for part in _PARTS for of in ("batch", "head", "token")),
        ("tokens", ctypes.c_int),
        ("heads", ctypes.c_int),
    )


@dataclass(frozen=True)
class Variant:
    """What the kernels are compiled for: D, M and K."""

    head_dim: int
    dense_dims: int
    kept: int

    threads: ClassVar[int] = 128  # of a block

    @property
    def shared_bytes(self) -> int:
        """Of a row per warp."""
        return self.threads // 32 * 2 * self.head_dim


def constants(variant: Variant) -> str:
    """What the files know of the specialisation."""
    return nvrtc.defines(asdict(variant) | {"threads": variant.threads, "params_bytes": ctypes.sizeof(Params)})


def compile_cubin(variant: Variant, *, afresh: bool = False) -> bytes:
    """Machine code of one specialisation for sm_90a, as `nvrtc.machine_code` finds or makes it."""
    return nvrtc.machine_code("sparse", constants(variant) + nvrtc.listed(SOURCES, FILES), afresh=afresh)

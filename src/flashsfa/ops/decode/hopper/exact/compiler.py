"""The source of the kernel for exact tokens: one `Variant` is one specialisation."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from .... import nvrtc
from .params import Params

SOURCES = Path(__file__).parent
FILES = (
    "../../../nvrtc/types.cuh",
    "params.cuh",
    "../../../nvrtc/warp.cuh",
    "exact.cu",
)  # as they use one another


@dataclass(frozen=True)
class Variant:
    """What the kernel is compiled for.

    Attributes:
        is_bf16: whether all is bfloat16; else float16.
        head_dim: D; value_dim: Dv, multiples of 8 up to 256.
        rows: query rows of a block, 1, 2, 4 or 8.
    """

    is_bf16: bool
    head_dim: int
    value_dim: int
    rows: int

    warps: ClassVar[int] = 8  # of a block

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Of `Shared` in exact.cu."""
        size = 4 * self.warps * self.rows * (8 + 2 + self.value_dim)
        return -(-size // 16) * 16


def source(variant: Variant) -> str:
    """The CUDA source of one specialisation: its sizes, and all files, each under its name and lines."""
    return constants(variant) + nvrtc.listed(SOURCES, FILES)


def constants(variant: Variant) -> str:
    """What the files know of the specialisation."""
    values = {name: int(value) for name, value in asdict(variant).items()}
    values |= {"warps": variant.warps, "params_bytes": ctypes.sizeof(Params), "shared_bytes": variant.shared_bytes}
    return nvrtc.defines(values)


def compile_cubin(variant: Variant, *, afresh: bool = False) -> bytes:
    """Machine code of one specialisation for sm_90a, as `nvrtc.machine_code` finds or makes it."""
    return nvrtc.machine_code("exact", source(variant), afresh=afresh)

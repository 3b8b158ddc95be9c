"""The source of the kernel that appends: one `Variant` is one specialisation."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from ... import nvrtc
from .params import Params

SOURCES = Path(__file__).parent
FILES = (
    "../../nvrtc/types.cuh",
    "params.cuh",
    "../../nvrtc/warp.cuh",
    "../../nvrtc/largest.cuh",
    "append.cu",
)  # as they use one another


@dataclass(frozen=True)
class Variant:
    """What the kernel is compiled for.

    Attributes:
        is_bf16: whether keys and values come in bfloat16; else float16.
        head_dim: D; dense_dims: M; kept: K; value_dim: Dv.
        is_8_bit: whether codes and values are stored in int8 with scales; else as they come.
        has_recent: whether the newest tokens are kept as they come.
    """

    is_bf16: bool
    head_dim: int
    dense_dims: int
    kept: int
    value_dim: int
    is_8_bit: bool
    has_recent: bool

    threads: ClassVar[int] = 64  # of a block: a warp for a key and one for its value
    shared_bytes: ClassVar[int] = 0


def source(variant: Variant) -> str:
    """The CUDA source of one specialisation: its sizes, and all files, each under its name and lines."""
    return constants(variant) + nvrtc.listed(SOURCES, FILES)


def constants(variant: Variant) -> str:
    """What the files know of the specialisation."""
    values = {name: int(value) for name, value in asdict(variant).items()}
    values |= {"threads": variant.threads, "params_bytes": ctypes.sizeof(Params)}
    return nvrtc.defines(values)


def compile_cubin(variant: Variant, *, afresh: bool = False) -> bytes:
    """Machine code of one specialisation for sm_90a, as `nvrtc.machine_code` finds or makes it."""
    return nvrtc.machine_code("append", source(variant), afresh=afresh)

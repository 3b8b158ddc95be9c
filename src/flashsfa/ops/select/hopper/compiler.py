"""The source of the kernels that append to a cache and read its pages: one `Variant` is one specialisation."""

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
    "rows.cuh",
    "features.cuh",
    "axes.cuh",
    "pages.cuh",
    "append.cu",
    "read.cu",
)  # as they use one another


@dataclass(frozen=True)
class Form:
    """How a cache keeps keys and values. 16 bits are those that they come in.

    Attributes:
        v_bits: of a feature of a value; 4 or 3 of one that is rotated, as `NarrowRows` are.
        kept_bits: of a kept entry of a key; of each feature, as of a value, where keys have neither indices nor axes.
        kept: kept entries K, of keys with indices.
        dense_dims, dense_bits: the dense channel beside them.
        index_bits: of an index; 0 for keys without.
        is_bitmap: whether in place of indices there is a bit per feature of the sparse part.
        shares_scale: whether dense channel and entries, in 8 bits, have one scale in float32, as `FeatureCodes` do; else each has its own.
        axis_bytes: of a key in bits per axis; 0 for others.
    """

    v_bits: int
    kept_bits: int = 16
    kept: int = 0
    dense_dims: int = 0
    dense_bits: int = 16
    index_bits: int = 0
    is_bitmap: bool = False
    shares_scale: bool = False
    axis_bytes: int = 0

    @property
    def is_of_features(self) -> bool:
        """Whether keys are kept as `FeatureCodes`, and values beside them in as many bits."""
        in_8_bits = self.shares_scale and self.v_bits == 8
        return (
            self.index_bits == 8
            and not self.is_bitmap
            and (in_8_bits or self.kept_bits == self.dense_bits == self.v_bits == 16)
        )


@dataclass(frozen=True)
class Variant:
    """What the kernels are compiled for.

    Attributes:
        is_bf16: whether keys and values come in bfloat16; else float16.
        head_dim: D; value_dim: Dv.
        has_recent: whether the newest tokens are kept as they come.
        is_paged: whether the buffers are pools of pages.
        form: what they are coded as.
        tokens: of a block.
    """

    is_bf16: bool
    head_dim: int
    value_dim: int
    has_recent: bool
    is_paged: bool
    form: Form
    tokens: int

    warp_bytes: ClassVar[int] = 1024  # a byte per feature of a row, or three

    @property
    def threads(self) -> int:
        """Of a block: a warp for each of its tokens; of a single one a warp for the key and one for the value."""
        return 32 * max(self.tokens, 2)

    @property
    def shared_bytes(self) -> int:
        return 2 * self.warp_bytes * self.tokens


def source(variant: Variant) -> str:
    """The CUDA source of one specialisation: its sizes, and all files, each under its name and lines."""
    return constants(variant) + nvrtc.listed(SOURCES, FILES)


def constants(variant: Variant) -> str:
    """What the files know of the specialisation."""
    values = asdict(variant)
    values |= values.pop("form")
    values = {name: int(value) for name, value in values.items()}
    sizes = {"threads": variant.threads, "warp_bytes": variant.warp_bytes, "params_bytes": ctypes.sizeof(Params)}
    return nvrtc.defines(values | sizes)


def compile_cubin(variant: Variant, *, afresh: bool = False) -> bytes:
    """Machine code of one specialisation for sm_90a, as `nvrtc.machine_code` finds or makes it."""
    return nvrtc.machine_code("append", source(variant), afresh=afresh)

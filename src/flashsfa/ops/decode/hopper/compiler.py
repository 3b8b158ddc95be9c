"""The source of the decode kernel: one `Variant` is one specialisation."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass
from pathlib import Path

from ... import nvrtc
from .params import Params

SOURCES = Path(__file__).parent
FILES = (
    "../../nvrtc/types.cuh",
    "params.cuh",
    "../../nvrtc/warp.cuh",
    "../../nvrtc/largest.cuh",
    "rows.cuh",
    "keys.cuh",
    "query.cuh",
    "values.cuh",
    "decode.cu",
)  # as they use one another


@dataclass(frozen=True)
class Variant:
    """What the kernel is compiled for.

    Attributes:
        is_bf16: whether queries, and what is stored in 16 bits, are bfloat16; else float16.
        head_dim: D; value_dim: Dv, 64 or 128.
        rows: query rows of a warp, 1, 2, 4 or 8.
        query_dims: rows of the query matrix: D, or the slots of axes.
        channel: entries of the channel of a key, in slots for axes; 0 for none.
        channel_bits: 16, 8, 4, or 2 for axes.
        kept: kept entries K beside it; kept_bits: 16, 8 or 4.
        index_bits: of the place of each; 0 for a bitmap.
        value_bits: 16, 8, 4 or 3.
        channel_scale_bytes, kept_scale_bytes, value_scale_bytes: 0 for none, 2 for bfloat16, 4 for float32.
        channel_centred, value_centred: whether rows have a centre, in bfloat16.
        channel_alignment, kept_alignment, index_alignment: powers of two up to 16 that divide all addresses.
        channel_stride, kept_stride, index_stride, value_stride: bytes from a key's row to the next.
        page_size: keys per page, 0 for no pages.
        has_padding: whether there is a padding mask.
        has_several_queries: whether query rows see different keys.
        is_capped: whether scores have a softcap.
        is_tolerant: whether values of little weight are left out.
        warps: of a block; blocks: of a multiprocessor, at least.
        keys_ahead: with a tolerance, how many times 32 keys a warp asks for ahead, and judges together.
    """

    is_bf16: bool
    head_dim: int
    value_dim: int
    rows: int
    query_dims: int
    channel: int
    channel_bits: int
    kept: int
    kept_bits: int
    index_bits: int
    value_bits: int
    channel_scale_bytes: int
    kept_scale_bytes: int
    value_scale_bytes: int
    channel_centred: bool
    value_centred: bool
    channel_alignment: int
    kept_alignment: int
    index_alignment: int
    channel_stride: int
    kept_stride: int
    index_stride: int
    value_stride: int
    page_size: int
    has_padding: bool
    has_several_queries: bool
    is_capped: bool
    is_tolerant: bool
    warps: int
    blocks: int
    keys_ahead: int

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Of `Shared` in decode.cu."""

        def aligned(size: int, to: int) -> int:
            return -(-size // to) * to

        sparse_dims = self.head_dim - self.channel
        words, double = aligned(channel_bytes(self.channel, self.channel_bits), 4) // 4, 1 + (self.channel_bits == 16)
        pairs = aligned(words, 4 * double) // 4 * {16: 1, 8: 2, 4: 4, 2: 8}[self.channel_bits]
        query = 128 * (pairs or 1) + 16 * (pairs if self.channel_bits == 2 else 1)
        query += 128 * (sparse_dims if self.kept else 1) + 12 * self.rows
        queue = 128 if self.is_tolerant else 1
        entries = queue if self.page_size else 1
        entries += sum(
            queue + 32 * self.keys_ahead if is_there else 2 for is_there in (self.value_bits < 16, self.value_centred)
        )
        warp = 96 * self.rows + aligned(4 * (queue * (self.rows + 1) + entries), 16)
        warp = aligned(warp + 4 * (self.rows + 1) * (32 if self.channel else 2), 16)
        sums = aligned(4 * self.warps * self.rows * (2 + self.value_dim) + 4, 8)
        return aligned(aligned(query, 16) + self.warps * warp + sums, 16)


def channel_bytes(channel: int, bits: int) -> int:
    """Of the channel of a key, of so many entries, or slots of axes."""
    return channel // 4 if bits == 2 else channel * bits // 8


_NAMES = {"has_several_queries": "several_queries", "is_capped": "capped", "is_tolerant": "tolerant"}


def source(variant: Variant) -> str:
    """The CUDA source of one specialisation: its sizes, and all files, each under its name and lines."""
    return constants(variant) + nvrtc.listed(SOURCES, FILES)


def constants(variant: Variant) -> str:
    """What the files know of the specialisation."""
    values = {_NAMES.get(name, name): int(value) for name, value in asdict(variant).items()}
    values |= {"params_bytes": ctypes.sizeof(Params), "shared_bytes": variant.shared_bytes}
    return nvrtc.defines(values)


def compile_cubin(variant: Variant, *, afresh: bool = False) -> bytes:
    """Machine code of one specialisation for sm_90a, as `nvrtc.machine_code` finds or makes it."""
    return nvrtc.machine_code("decode", source(variant), afresh=afresh)

"""Decode by a CUDA kernel for Hopper, which keeps most of its registers full of the cache's bytes under way.

Each warp takes some of the keys, a block merges what its warps found, and the last block what all did. With a tolerance, a warp reads the
values of those keys alone that carry weight.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ... import nvrtc
from ...triton.rows import next_power_of_2
from ..held import Call, Held
from ..triton.scores import LOG2_E, processors
from . import compiler, counters
from .compiler import Variant
from .params import Params, Rows

_WARP_KEYS = 32
_MOST_ROWS = 8  # query rows of a warp: the columns of its matrix products
_MOST_WAVES = 4  # of blocks of four warps
_LITTLE = 2048  # keys for each multiprocessor
_WIDTHS = (64, 128)
_SHARED_BYTES, _RESERVED_BYTES = 228 << 10, 1 << 10  # of a multiprocessor, and of these for each thread block
_MOST_KEPT = 64  # the loop over kept entries is unrolled
_CERTAIN = 1 - 2**-7  # of the tolerance: room for the rounding of weights and sums
_FIELDS = {
    "CHANNEL": "channel", "CHANNEL_SCALE": "channel_scale", "CHANNEL_CENTRE": "channel_centre", "VALUES": "kept",
    "VALUE_SCALE": "kept_scale", "INDICES": "indices", "V": "v", "V_SCALE": "v_scale", "V_CENTRE": "v_centre",
}  # fmt: skip
_TABLES = {"AXIS": "axis", "IS_START": "is_start", "TOP": "top", "STEP": "step", "CENTRE": "centre"}


def obstacle(q: Tensor, held: Held) -> str | None:
    """Why the kernel cannot take these on a Hopper GPU, or None if it can. Looks at no values."""
    if nvrtc.obstacle() is not None:
        return f"the CUDA kernel is compiled at run time: {nvrtc.obstacle()}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the CUDA kernel takes float16 and bfloat16, not {q.dtype}"
    if held.width not in _WIDTHS:
        return f"the CUDA kernel takes values of width 64 and 128, not {held.width}"
    if q.shape[-1] > 256 or held.topk > _MOST_KEPT:
        return f"the CUDA kernel takes heads of at most 256 and {_MOST_KEPT} kept entries, not {q.shape[-1]} and {held.topk}"
    if held.topk and held.index_bits == 0 and q.shape[-1] - held.channel > 128:
        return "the CUDA kernel takes bitmaps of at most 128 features"
    channel_bytes = compiler.channel_bytes(held.channel, held.bits)
    if channel_bytes > 128:
        return f"the CUDA kernel takes a channel of at most 128 bytes, not {channel_bytes}"
    return None


def attend(call: Call, out: Tensor, lse: Tensor) -> str | None:
    """Write the output [B, Hq, M, Dv] and its log-sum-exp [B, Hq, M] over what is `held`; or say why it cannot be done."""
    q = call.q if call.q.stride(-1) == 1 else call.q.contiguous()
    prepared = Prepared.of(replace(call, q=q))
    return prepared if isinstance(prepared, str) else prepared.attend(q, out, lse)


@dataclass
class Prepared:
    """The kernel for queries of one form over tensors that lie where they lay: only how many keys there are may change.

    Attributes:
        params: what the kernel is passed but for the queries, the number of keys and where its results go.
        keys: at most.
        tiles: of query rows, of all heads; rows: in all of them.
        lasting: what the kernel reads beside the cache and the queries.
    """

    kernel: nvrtc.Kernel
    variant: Variant
    params: Params
    keys: int
    tiles: int
    rows: int
    lasting: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, call: Call) -> Prepared | str:
        """For a call whose queries are contiguous along the last dimension, or why the kernel cannot take it."""
        q, held = call.q, call.held
        (batch, q_heads, m, head_dim), v = q.shape, held.tensors["V"]
        kv_heads = v.shape[1]
        table, lengths, padding = (
            None if x is None else x.contiguous()
            for x in (call.page_table, call.mask.kv_lens, call.mask.key_padding_mask)
        )
        keys = v.shape[2] * (1 if table is None else table.shape[1])
        heads, query_rows = batch * kv_heads, q_heads // kv_heads * m
        padded_rows = next_power_of_2(query_rows)
        rows = min(padded_rows, _MOST_ROWS)
        tiles = heads * (padded_rows // rows)
        room = (
            keys if table is not None else max(keys, v.stride(1) // max(1, v.stride(2)))
        )  # what a cache may grow to where it lies
        softcap = call.scores.softcap
        form = _Form(
            q.dtype,
            head_dim,
            rows,
            0 if table is None else v.shape[2],
            padding is not None,
            m > 1,
            softcap is not None,
            call.value_tolerance > 0,
            tiles <= processors(q.device) // 4 or tiles * room <= processors(q.device) * _LITTLE,
        )
        places = tuple((name, _Place.of(x)) for name, x in held.tensors.items() if name in _FIELDS)
        specialised = _specialised(form, places, *held.sizes)
        if isinstance(specialised, str):
            return specialised
        variant, template = specialised
        kernel = nvrtc.load_kernel(compiler.compile_cubin, variant, "decode_kernel", q.device.index)
        if isinstance(kernel, str):
            return kernel
        params = Params.from_buffer_copy(template)
        for name, x in held.tensors.items():
            if name in _FIELDS:
                getattr(params, _FIELDS[name]).data = x.data_ptr()
            else:
                setattr(params, _TABLES[name], x.data_ptr())
        params.q_batch, params.q_head, params.q_token, _ = q.stride()
        params.topk_query = call.topk_query or head_dim
        if lengths is not None:
            params.lengths, params.lengths_are_64_bit = lengths.data_ptr(), lengths.dtype == torch.int64
        if padding is not None:
            params.padding, params.padding_batch = padding.data_ptr(), padding.stride(0)
        if table is not None:
            params.pages, params.pages_batch = table.data_ptr(), table.stride(0)
        params.kv_heads, params.m, params.window = kv_heads, m, call.mask.window or 0
        params.rows, params.padded_rows = query_rows, padded_rows
        # log2 units; under a cap, which stands before them, in units of it
        params.scale = call.scores.scale * LOG2_E if softcap is None else call.scores.scale / softcap
        params.cap = (softcap or 0.0) * LOG2_E
        params.tolerance = call.value_tolerance * _CERTAIN
        return cls(kernel, variant, params, keys, tiles, heads * padded_rows, (table, lengths, padding))

    def over(self, lengths: Tensor, table: Tensor) -> Prepared:
        """Itself, for other `lengths` and pages, of the dtype and shape of those that it was prepared with and contiguous like these. Who calls
        keeps both until it has attended."""
        self.params.lengths, self.params.pages = lengths.data_ptr(), table.data_ptr()
        self.lasting = ()
        return self

    def attend(
        self, q: Tensor, out: Tensor, lse: Tensor | None, keys: int | None = None, padding: Tensor | None = None
    ) -> str | None:
        """As `attend`, for queries such as those that this was prepared for; over the first `keys`, if any are named, without those
        of `padding` [B, keys] bool, given if, and only if, the prepared call had some."""
        variant, params, device = self.variant, self.params, q.device
        if keys is None:
            params.n = self.keys
        else:
            assert (padding is not None) == variant.has_padding
            padding = None if padding is None else padding.contiguous()
            params.n, params.padding_batch = keys, keys
            params.padding = None if padding is None else padding.data_ptr()
        if params.n < _WARP_KEYS and not params.pages:
            return f"the CUDA kernel takes at least {_WARP_KEYS} keys, not {params.n}"
        blocks = _blocks_per_tile(
            self.tiles,
            params.n // (2 * _WARP_KEYS * variant.warps),
            processors(device) * variant.blocks,
            _MOST_WAVES * variant.warps // 4,
        )
        sums = self.rows * blocks  # as many weighted sums of values, and of maxima and sums of weights
        scratch = torch.empty(sums * (variant.value_dim + 2), dtype=torch.float32, device=device)
        params.q, params.out = q.data_ptr(), out.data_ptr()
        params.lse = None if lse is None else lse.data_ptr()
        params.partial = scratch.data_ptr()
        params.peak = params.partial + 4 * sums * variant.value_dim
        params.total = params.peak + 4 * sums
        params.ended = counters.address(self.tiles, device)
        self.kernel.launch((self.tiles, blocks, 1), params)
        return None


class _Form(NamedTuple):
    """What a variant follows from beside what is held."""

    dtype: torch.dtype
    head_dim: int
    rows: int
    page_size: int
    has_padding: bool
    has_several_queries: bool
    is_capped: bool
    is_tolerant: bool
    is_little: bool  # work: many thread blocks share the keys of each tile of query rows


class _Place(NamedTuple):
    """How a tensor of a cache lies in memory: all but where, and how many keys there are."""

    dtype: torch.dtype
    offset: int  # of its address from a multiple of 16
    strides: tuple[int, int, int]  # in bytes, of the batch or the page, the head and the key; 0 along a single one

    @classmethod
    def of(cls, x: Tensor) -> _Place:
        size, (outer, head, key, *_), lengths = x.itemsize, x.stride(), x.shape
        strides = (
            outer * size if lengths[0] > 1 else 0,
            head * size if lengths[1] > 1 else 0,
            key * size if lengths[2] > 1 else 0,
        )
        return cls(x.dtype, x.data_ptr() % 16, strides)

    @property
    def alignment(self) -> int:
        """The largest power of two up to 16 that divides the addresses of all rows."""
        return math.gcd(16, self.offset, *self.strides)

    @property
    def bits(self) -> int:
        """Of an entry: a uint8 has two."""
        return 4 if self.dtype == torch.uint8 else 8 * self.dtype.itemsize


@functools.lru_cache(maxsize=4096)  # a growing cache has other strides after each growth, not at each step
def _specialised(
    form: _Form,
    held: tuple[tuple[str, _Place], ...],
    channel: int,
    channel_bits: int,
    topk: int,
    index_bits: int,
    value_bits: int,
    width: int,
) -> tuple[Variant, bytes] | str:
    """The kernel for what is `held`, and its parameters but for addresses and lengths; or why there is none."""
    places = dict(held)
    v = places["V"]
    piece = width // 32 if value_bits == 3 else min(16, width * value_bits // 64)
    if v.alignment < piece:
        return f"the CUDA kernel reads values {piece} bytes at a time, and these do not begin at multiples of it"
    if form.page_size and any(x.strides[0] >= 1 << 31 for x in places.values()):
        return "the CUDA kernel takes pages of less than 2 GiB"

    def scale_bytes(name: str) -> int:
        return places[name].dtype.itemsize if name in places else 0

    nothing = _Place(torch.uint8, 0, (0, 0, 0))
    kept, indices = (places[name] if topk else nothing for name in ("VALUES", "INDICES"))
    dense = places["CHANNEL"] if channel else nothing
    warps, blocks = _warps_and_blocks(width * value_bits // 8, form)
    # 64 keys at once are too much for the registers where a key or the query rows take many
    is_light = form.rows <= 4 and compiler.channel_bytes(channel, channel_bits) < 32
    variant = Variant(
        is_bf16=form.dtype == torch.bfloat16,
        head_dim=form.head_dim,
        value_dim=width,
        rows=form.rows,
        query_dims=channel if channel_bits == 2 else form.head_dim,
        channel=channel,
        channel_bits=channel_bits,
        kept=topk,
        kept_bits=kept.bits if topk else 16,
        index_bits=index_bits,
        value_bits=value_bits,
        channel_scale_bytes=scale_bytes("CHANNEL_SCALE"),
        kept_scale_bytes=scale_bytes("VALUE_SCALE"),
        value_scale_bytes=scale_bytes("V_SCALE"),
        channel_centred="CHANNEL_CENTRE" in places,
        value_centred="V_CENTRE" in places,
        channel_alignment=dense.alignment,
        kept_alignment=kept.alignment,
        index_alignment=indices.alignment,
        channel_stride=dense.strides[2],
        kept_stride=kept.strides[2],
        index_stride=indices.strides[2],
        value_stride=v.strides[2],
        page_size=form.page_size,
        has_padding=form.has_padding,
        has_several_queries=form.has_several_queries,
        is_capped=form.is_capped,
        is_tolerant=form.is_tolerant,
        warps=warps,
        blocks=blocks,
        keys_ahead=2 if is_light and value_bits < 16 and form.is_tolerant else 1,
    )
    fitting = _SHARED_BYTES // (variant.shared_bytes + _RESERVED_BYTES)
    variant = replace(variant, blocks=min(blocks, fitting))
    params = Params()
    for name, place in held:
        outer, head, key = place.strides
        setattr(params, _FIELDS[name], Rows(None, outer, head, key, outer if outer < 1 << 31 else 0))
    return variant, bytes(params)


def _warps_and_blocks(value_bytes: int, form: _Form) -> tuple[int, int]:
    """Warps of a thread block, and thread blocks of a multiprocessor: measured on an H200 (docs/notes/2026-11-30-decode-again.md). More
    warps have more bytes under way, until registers are too few for what is read; fewer blocks leave less to merge."""
    if form.is_tolerant:
        return 4, 3 if value_bytes == 256 or form.rows > 1 else 4
    return (4, 2) if form.is_little or value_bytes == 256 else (12, 1)


@functools.cache
def _blocks_per_tile(tiles: int, most: int, resident: int, waves: int) -> int:
    """Thread blocks that share the keys of one tile of query rows, so that all end at about the same time, no more than `most`, from
    where each would have little to do, and no more than so many `waves` of what is resident. More are merged longer: they must gain a tenth."""
    counts = range(1, max(1, min(most, waves * resident // tiles)) + 1)
    best = 1
    for count in counts:
        if math.ceil(tiles * count / resident) / count < 0.9 * math.ceil(tiles * best / resident) / best:
            best = count
    return best

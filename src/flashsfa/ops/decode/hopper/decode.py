"""Decode by a CUDA kernel for Hopper, which keeps most of its registers full of the cache's bytes under way.

Each warp takes some of the keys, a block merges what its warps found, and the last block what all did. With a tolerance, a warp scores a segment of keys first and reads the
values of those alone that carry weight.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from ....stored import KVView
from ... import nvrtc
from ...nvrtc import cuda
from ..held import Call, Held
from . import compiler
from .compiler import Variant
from .params import Params, Rows

_WARP_KEYS = 32
_MOST_ROWS = 8  # query rows of a warp: the columns of its matrix products
_WARPS = 4
_MOST_WAVES = 4
_WIDTHS = (64, 128)
_MOST_KEPT = 64  # the loop over kept entries is unrolled
_CERTAIN = 1 - 2**-7  # of the tolerance: room for the rounding of weights and sums
_TENSORS = {
    "channel": "CHANNEL", "channel_scale": "CHANNEL_SCALE", "channel_centre": "CHANNEL_CENTRE", "kept": "VALUES",
    "kept_scale": "VALUE_SCALE", "indices": "INDICES", "v": "V", "v_scale": "V_SCALE", "v_centre": "V_CENTRE",
}  # fmt: skip


def obstacle(q: Tensor, kv: KVView) -> str | None:
    """Why the kernel cannot take these, or None if it can. Looks at no values."""
    if not nvrtc.is_hopper(q.device):
        return "the CUDA kernel is Hopper's (sm_90)"
    if nvrtc.obstacle() is not None:
        return f"the CUDA kernel is compiled at run time: {nvrtc.obstacle()}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the CUDA kernel takes float16 and bfloat16, not {q.dtype}"
    held = Held.of(kv)
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
    from ..triton.narrow import NarrowProblem
    from ..triton.scores import processors

    q, held, page_table, v = call.q, call.held, call.page_table, call.held.tensors["V"]
    piece = min(16, held.width * _bits(v, "V_CENTRE" in held.tensors) // 64)
    if _alignment(v) < piece:
        return f"the CUDA kernel reads values {piece} bytes at a time, and these do not begin at multiples of it"
    if page_table is None and v.shape[2] < _WARP_KEYS:
        return f"the CUDA kernel takes at least {_WARP_KEYS} keys, not {v.shape[2]}"
    if page_table is not None and any(_stride(x, 0) >= 1 << 31 for x in held.tensors.values()):
        return "the CUDA kernel takes pages of less than 2 GiB"
    counts = torch.empty(q.shape[0] * q.shape[1] * q.shape[2], dtype=torch.int32, device=q.device)
    problem = NarrowProblem(call, are_biased=False, counts=counts)
    rows = min(problem.padded_rows, _MOST_ROWS)
    variant = _variant(call, problem.coded["T"], rows, problem.places["PAGE"])
    tiles = problem.heads * (problem.padded_rows // rows)
    blocks = _blocks_per_tile(
        tiles, problem.keys // (2 * _WARP_KEYS * variant.warps), processors(q.device) * variant.blocks
    )
    partial = problem.scratch(blocks, problem.padded_rows, problem.width)
    peak, total = (problem.scratch(blocks, problem.padded_rows) for _ in range(2))
    tables = {
        name.lower(): held.tensors[name].data_ptr() for name in ("AXIS", "IS_START", "TOP") if name in held.tensors
    }
    lengths, padding, terms = problem.visibility["LENS"], problem.ruled["PADDING"], problem.coded["TERMS"]
    pages = problem.places["PAGES"]
    params = Params(
        **{name: _rows(held.tensors[of]) for name, of in _TENSORS.items() if of in held.tensors},
        **tables,
        q=problem.coded["Q"].data_ptr(),
        terms=None if terms is None else terms.data_ptr(),
        lengths=None if lengths is None else lengths.data_ptr(),
        padding=None if padding is None else padding.data_ptr(),
        pages=None if pages is None else pages.data_ptr(),
        partial=partial.data_ptr(),
        peak=peak.data_ptr(),
        total=total.data_ptr(),
        ended=counts.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
        padding_batch=problem.ruled["padding_sb"],
        pages_batch=problem.places["pages_sb"],
        kv_heads=problem.kv_heads,
        n=problem.keys,
        m=q.shape[2],
        window=call.mask.window or 0,
        rows=problem.rows,
        padded_rows=problem.padded_rows,
        lengths_are_64_bit=lengths is not None and lengths.dtype == torch.int64,
        scale=problem.ruled["scale"],
        cap=problem.ruled["cap"],
        tolerance=call.value_tolerance * _CERTAIN,
    )
    return launch(variant, (tiles, blocks, 1), params)


def launch(variant: Variant, grid: tuple[int, int, int], params: Params) -> str | None:
    """Run the kernel on torch's current device and stream, or say why it cannot be built."""
    kernel = _load(variant, torch.cuda.current_device())
    if isinstance(kernel, str):
        return kernel
    cuda.launch(kernel, grid, variant.threads, variant.shared_bytes, (params,))
    return None


@functools.cache
def _load(variant: Variant, device: int) -> ctypes.c_void_p | str:
    """The kernel of one specialisation, ready to launch on `device`, or why there is none: what failed once is not tried again."""
    return nvrtc.load_kernel(
        lambda afresh: compiler.compile_cubin(variant, afresh=afresh), "decode_kernel", variant.shared_bytes, device
    )


def _variant(call: Call, query_dims: int, rows: int, page_size: int) -> Variant:
    q, held, is_tolerant = call.q, call.held, call.value_tolerance > 0
    tensors = held.tensors
    value_bits = _bits(tensors["V"], "V_CENTRE" in tensors)

    def scale_bytes(name: str) -> int:
        return tensors[name].itemsize if name in tensors else 0

    return Variant(
        is_bf16=q.dtype == torch.bfloat16,
        head_dim=q.shape[-1],
        value_dim=held.width,
        rows=rows,
        query_dims=query_dims,
        channel=held.channel,
        channel_bits=held.bits,
        kept=held.topk,
        kept_bits=_bits(tensors["VALUES"], True) if held.topk else 16,
        index_bits=held.index_bits,
        value_bits=value_bits,
        channel_scale_bytes=scale_bytes("CHANNEL_SCALE"),
        kept_scale_bytes=scale_bytes("VALUE_SCALE"),
        value_scale_bytes=scale_bytes("V_SCALE"),
        channel_centred="CHANNEL_CENTRE" in tensors,
        value_centred="V_CENTRE" in tensors,
        channel_alignment=_alignment(tensors["CHANNEL"]) if held.channel else 16,
        kept_alignment=_alignment(tensors["VALUES"]) if held.topk else 16,
        index_alignment=_alignment(tensors["INDICES"]) if held.topk else 16,
        channel_stride=_stride(tensors["CHANNEL"], 2) if held.channel else 0,
        kept_stride=_stride(tensors["VALUES"], 2) if held.topk else 0,
        index_stride=_stride(tensors["INDICES"], 2) if held.topk else 0,
        value_stride=_stride(tensors["V"], 2),
        page_size=page_size,
        has_several_queries=q.shape[2] > 1,
        is_capped=call.scores.softcap is not None,
        is_tolerant=is_tolerant,
        warps=_WARPS,
        blocks=_blocks(value_bits, rows, held.topk > 0 and not held.channel, is_tolerant),
        keys_ahead=2 if value_bits == 8 else 1,
    )


def _blocks(value_bits: int, rows: int, is_kept_alone: bool, is_tolerant: bool) -> int:
    """Thread blocks of a multiprocessor, and so registers of a thread: measured on an H200 (docs/notes/2026-11-29-decode-on-hopper.md).
    More have more bytes under way, until registers are too few for what is read."""
    if value_bits == 16 or (rows > 1 and is_tolerant):
        return 3
    if is_tolerant:
        return 4
    if value_bits == 8:
        return 3
    return 5 if rows == 1 and is_kept_alone else 4


def _bits(x: Tensor, is_uint8_packed: bool) -> int:
    """Bits of an entry of a cache tensor."""
    return 4 if x.dtype == torch.uint8 and is_uint8_packed else 8 * x.itemsize


def _stride(x: Tensor, dim: int) -> int:
    """In bytes; 0 along a single entry, whose stride can be anything."""
    return x.stride(dim) * x.itemsize if x.shape[dim] > 1 else 0


def _alignment(x: Tensor) -> int:
    """The largest power of two up to 16 that divides the addresses of all rows."""
    return math.gcd(16, x.data_ptr(), *(_stride(x, dim) for dim in range(3)))


def _rows(x: Tensor) -> Rows:
    outer, head, key = (_stride(x, dim) for dim in range(3))
    return Rows(x.data_ptr(), outer, head, key, outer if outer < 1 << 31 else 0)


@functools.cache
def _blocks_per_tile(tiles: int, most: int, resident: int) -> int:
    """Thread blocks that share the keys of one tile of query rows, so that all end at about the same time, and no more than
    `most`, from where each would have little to do. More are merged longer: they must gain a tenth."""
    counts = range(1, max(1, min(most, _MOST_WAVES * resident // tiles)) + 1)
    best = 1
    for count in counts:
        if math.ceil(tiles * count / resident) / count < 0.9 * math.ceil(tiles * best / resident) / best:
            best = count
    return best

"""Decode over keys and values of few bits: as `decode`, by kernels that unpack a block at a time, in registers.

No host sync and no shape that depends on data: the launches can be captured in a CUDA graph. Deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....axes import AxisCodes
from ....checks import require
from ....codes import FeatureCodes
from ....formats import index_bits
from ....mask import Mask
from ....narrow import NarrowRows
from ....scores import ScoreRules
from ....stored import KVView
from .combine import run_splits
from .narrow_blocks import add_values, narrow_query_kernel, narrow_scores, store_values
from .scores import TRITON_DTYPES, Problem, chunk, live_keys, locate, split_range, strided

# Tensors of a view by the names that the kernels have for them: [B, Hkv, N, C] and [B, Hkv, N], or pools of pages; and tables of the
# axes [Hkv, D].
_ROWS = ("CHANNEL", "VALUES", "INDICES", "V")
_SCALES = ("CHANNEL_SCALE", "CHANNEL_CENTRE", "VALUE_SCALE", "V_SCALE", "V_CENTRE")
_TABLES = ("AXIS", "IS_START", "TOP", "STEP", "CENTRE")
NAMES = (*_ROWS, *_SCALES, *_TABLES)


def decode(
    q: Tensor, kv: KVView, mask: Mask, scores: ScoreRules, value_tolerance: float, topk_query: int | None = None
) -> tuple[Tensor, Tensor]:
    """As `plain.decode`, for float16, bfloat16 and float32. No host sync, deterministic, no gradients. No value is left out, so any
    `value_tolerance` is kept.

    Raises `ValueError` if a cache tensor's last dimension is not contiguous: copying a cache a step would cost more
    than decoding it.
    """
    held = Held.of(kv)
    for name in _ROWS:
        x = held.tensors.get(name)
        require(
            x is None or x.shape[-1] <= 1 or x.stride(-1) == 1,
            lambda: f"the last dimension of {name.lower()} must be contiguous, got strides {tuple(x.stride())}",  # noqa: B023 (called at once)
        )
    if not torch.compiler.is_compiling():
        return _run(q, held, kv.page_table, mask, scores, topk_query)
    return _decode_narrow_op(
        q, [held.tensors.get(name) for name in NAMES], held.sizes,
        kv.page_table, mask.kv_lens, mask.key_padding_mask, mask.window, [scores.scale, scores.softcap or 0.0], topk_query,
    )  # fmt: skip


@dataclass(frozen=True)
class Held:
    """What a view holds, as the kernels read it.

    Attributes:
        tensors: those that there are, by name.
        channel, bits: places of the channel of a key, and its packing (`narrow_blocks`).
        topk, index_bits: kept entries of the other features, and the bits of the place of each; 0 for a bitmap.
        width: of a value.
    """

    tensors: dict[str, Tensor]
    channel: int
    bits: int
    topk: int
    index_bits: int
    width: int

    @property
    def sizes(self) -> list[int]:
        """All but the tensors, in order."""
        return [self.channel, self.bits, self.topk, self.index_bits, self.width]

    @classmethod
    def of(cls, kv: KVView) -> Held:
        """The tensors of a view."""
        codes, v = kv.codes, kv.v
        topk, place_bits = 0, 8
        parts: dict[str, Tensor | None]
        if isinstance(codes, NarrowRows):
            channel, bits = codes.width, codes.bits
            parts = {"CHANNEL": codes.kept, "CHANNEL_SCALE": codes.scale, "CHANNEL_CENTRE": codes.centre}
        elif isinstance(codes, AxisCodes):
            axes = codes.axes
            channel, bits = 4 * axes.key_bytes, 2
            parts = {"CHANNEL": codes.packed, "AXIS": axes.layout.axis, "IS_START": axes.layout.is_start}
            parts |= {"TOP": axes.layout.top, "STEP": axes.step, "CENTRE": axes.centre}
        else:
            channel, topk = codes.dense_dims, codes.topk
            if isinstance(codes, FeatureCodes):
                channel_scale = value_scale = codes.scale
            else:
                channel_scale, value_scale = codes.dense_scale, codes.value_scale
                form = codes.format.index_form(topk, codes.sparse_dims)
                place_bits = {"uint8": 8, "packed": index_bits(codes.sparse_dims), "bitmap": 0}[form]
            bits = 16 if channel_scale is None else 8
            parts = {"VALUES": codes.values, "INDICES": codes.indices, "VALUE_SCALE": value_scale}
            if channel:
                parts |= {"CHANNEL": codes.dense, "CHANNEL_SCALE": channel_scale}
        if isinstance(v, NarrowRows):
            parts |= {"V": v.kept, "V_SCALE": v.scale, "V_CENTRE": v.centre}
        else:
            parts |= {"V": v, "V_SCALE": kv.v_scale}
        held = {name: x for name, x in parts.items() if x is not None}
        return cls(held, channel, bits, topk, place_bits, v.shape[-1])


def _run(
    q: Tensor, held: Held, page_table: Tensor | None, mask: Mask, scores: ScoreRules, topk_query: int | None
) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], held.width))
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel():
        with torch.cuda.device_of(q):
            problem = NarrowProblem(q, held, page_table, mask, scores, topk_query)
            run_splits(decode_narrow_kernel, problem, *_launch(problem), out, lse)
    return out, lse


# For torch.compile, which cannot look into a launch. Eager calls save its cost to the host.
@torch.library.custom_op("flashsfa::decode_narrow", mutates_args=())
def _decode_narrow_op(
    q: Tensor,
    tensors: Sequence[Tensor | None],
    sizes: Sequence[int],
    page_table: Tensor | None,
    kv_lens: Tensor | None,
    key_padding_mask: Tensor | None,
    window: int | None,
    real: Sequence[float],
    topk_query: int | None,
) -> tuple[Tensor, Tensor]:
    scale, softcap = real
    named = zip(NAMES, tensors, strict=True)
    held = Held({name: x for name, x in named if x is not None}, *sizes)
    mask = Mask(True, window, key_padding_mask, kv_lens=kv_lens)
    return _run(q, held, page_table, mask, ScoreRules(scale, softcap or None), topk_query)


@_decode_narrow_op.register_fake
def _(q: Tensor, tensors: Sequence[Tensor | None], sizes: Sequence[int], *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], sizes[-1])), q.new_empty(q.shape[:3], dtype=torch.float32)


class NarrowProblem(Problem):
    """One decode call over what is `Held`.

    Attributes:
        coded, valued: arguments of `narrow_scores` and `add_values`.
    """

    def __init__(
        self, q: Tensor, held: Held, page_table: Tensor | None, mask: Mask, rules: ScoreRules, topk_query: int | None
    ) -> None:
        tensors = held.tensors
        super().__init__(q, tensors["V"], page_table, mask, rules)
        self.held, self.head_dim, self.width = held, q.shape[-1], held.width
        self.rotation = _rotation(held.width) if "V_CENTRE" in tensors else 1
        levels = (
            q.dtype if q.dtype == torch.float32 else torch.float16
        )  # exact for them, and has more digits than bfloat16
        self.coded: dict[str, Any] = {
            **self._queries(q, levels, topk_query), **self.ruled,
            **{name: tensors.get(name) for name in ("AXIS", "IS_START", "TOP")},
            **_arguments(tensors, "CHANNEL", "CHANNEL_SCALE", "CHANNEL_CENTRE", "VALUES", "VALUE_SCALE", "INDICES"),
            "D": self.head_dim, "C": held.channel, "BITS": held.bits, "K": held.topk, "INDEX_BITS": held.index_bits,
        }  # fmt: skip
        self.valued: dict[str, Any] = {
            **_arguments(tensors, "V", "V_SCALE", "V_CENTRE"), "DV": held.width,
            "DTYPE": TRITON_DTYPES[levels if "V_SCALE" in tensors else q.dtype],
        }  # fmt: skip

    def _queries(self, q: Tensor, levels: torch.dtype, topk_query: int | None) -> dict[str, Any]:
        """Query rows [heads, T, R] by feature, or by place where axes have places, and what goes with them."""
        held = self.held
        dense_dims = held.channel if held.topk else 0
        if held.bits == 16 or not held.channel:
            return {"Q": self.by_feature(q, dense_dims, topk_query), "TERMS": None, "T": q.shape[-1]}
        places = held.channel if held.bits == 2 else q.shape[-1]
        by_place = q.new_empty((self.heads, places, self.padded_rows), dtype=levels)
        terms = self.scratch(3, self.padded_rows)
        narrow_query_kernel[self.heads, self.rows](
            by_place, terms, **{name: held.tensors.get(name) for name in _TABLES}, **self.query_arguments(q, dense_dims, topk_query),
            C=held.channel, BITS=held.bits, ROTATION=_rotation(held.channel) if held.bits == 4 else 1, num_warps=4,
        )  # fmt: skip
        return {"Q": by_place, "TERMS": terms, "T": places}


def _arguments(tensors: dict[str, Tensor], *names: str) -> dict[str, Any]:
    """Tensors and their strides as kernel arguments."""
    found: dict[str, Any] = {}
    for name in names:
        found |= strided(name, tensors.get(name))
    return found


def _rotation(width: int) -> int:
    """Width of the blocks in which `rotation.rotate` mixes a row."""
    return width & -width


def _launch(problem: NarrowProblem) -> tuple[dict[str, Any], int]:
    """Keys a block and warps of the partial kernel, and programs a processor. By counts of instructions and registers alone: not
    measured yet (docs/notes/2026-11-29-decode-of-few-bits.md).

    One warp unpacks a key once: more would share the columns of a product, each with all keys. So it takes more only for what does
    not fit its registers: wide rows, and gathered products of many rows. Some 12 programs a processor then have 32 keys each in flight.
    """
    held = problem.held
    is_small = problem.head_dim <= 128 or problem.tile <= 8
    keys, warps = 32, 1
    if problem.dtype == torch.float32:
        keys, warps = 16, 4 if is_small else 8
    elif max(problem.head_dim, held.width) > 128:
        warps = 4 if is_small else 8
    elif problem.tile > 8 and held.topk and held.index_bits:
        warps = 4
    return {"BN": keys, "KC": chunk(max(1, held.topk), problem.tile), "num_warps": warps, "num_stages": 1}, 16


# A cache grows at each step, and with it the strides of its scales; those of rows are multiples of 16 anyway.
_GROWING = ["n", *(f"{name.lower()}_{stride}" for name in _SCALES for stride in ("sb", "sh"))]


@triton.jit(do_not_specialize=_GROWING)
def decode_narrow_kernel(
    Q, TERMS, CHANNEL, CHANNEL_SCALE, CHANNEL_CENTRE, VALUES, VALUE_SCALE, INDICES, AXIS, IS_START, TOP, V, V_SCALE, V_CENTRE,
    LENS, PADDING, PAGES, PARTIAL, PEAK, TOTAL,
    kv_heads, n, m, window, scale, cap,
    channel_sb, channel_sh, channel_scale_sb, channel_scale_sh, channel_centre_sb, channel_centre_sh, values_sb, values_sh,
    value_scale_sb, value_scale_sh, indices_sb, indices_sh, v_sb, v_sh, v_scale_sb, v_scale_sh, v_centre_sb, v_centre_sh,
    padding_sb, pages_sb,
    channel_sn: tl.constexpr, channel_scale_sn: tl.constexpr, channel_centre_sn: tl.constexpr, values_sn: tl.constexpr,
    value_scale_sn: tl.constexpr, indices_sn: tl.constexpr, v_sn: tl.constexpr, v_scale_sn: tl.constexpr, v_centre_sn: tl.constexpr,
    DTYPE: tl.constexpr, D: tl.constexpr, T: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, K: tl.constexpr, INDEX_BITS: tl.constexpr,
    DV: tl.constexpr, R: tl.constexpr, RT: tl.constexpr, PAGE: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr,
    BN: tl.constexpr, KC: tl.constexpr,
):  # fmt: skip
    """Unnormalised output [RT, DV], maximum and sum of one split for one tile of rows. Scores in log2 units."""
    head, tile = tl.program_id(0) // (R // RT), tl.program_id(0) % (R // RT)
    b, h = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    first_row = tile * RT
    r = first_row + tl.arange(0, RT)  # [RT]
    length, begin, end = split_range(LENS, b, n, m, window, WINDOW, BN)
    HALVES: tl.constexpr = V_CENTRE is not None
    W: tl.constexpr = max(16, triton.next_power_of_2(DV // 2 if HALVES else DV))
    peak = tl.full([RT], float("-inf"), tl.float32)
    total = tl.zeros([RT], tl.float32)
    low = tl.zeros([RT, W], tl.float32)
    high = tl.zeros([RT, W if HALVES else 1], tl.float32)
    unit = 2.0**-100 if V_SCALE is not None else 1.0
    for start in range(begin, end, BN):
        key = start + tl.arange(0, BN)  # [BN]
        live = live_keys(PADDING + b * padding_sb if PADDING is not None else None, key, length, m, window, WINDOW)
        outer, slot = locate(PAGES + b * pages_sb if PAGES is not None else None, b, key, live, PAGE)
        score = narrow_scores(
            Q + head.to(tl.int64) * T * R + r,
            TERMS + head.to(tl.int64) * 3 * R + r if TERMS is not None else None,
            CHANNEL + outer * channel_sb + h * channel_sh + slot * channel_sn if CHANNEL is not None else None,
            CHANNEL_SCALE + outer * channel_scale_sb + h * channel_scale_sh + slot * channel_scale_sn if CHANNEL_SCALE is not None else None,
            CHANNEL_CENTRE + outer * channel_centre_sb + h * channel_centre_sh + slot * channel_centre_sn if CHANNEL_CENTRE is not None else None,
            VALUES + outer * values_sb + h * values_sh + slot * values_sn if VALUES is not None else None,
            VALUE_SCALE + outer * value_scale_sb + h * value_scale_sh + slot * value_scale_sn if VALUE_SCALE is not None else None,
            INDICES + outer * indices_sb + h * indices_sh + slot * indices_sn if INDICES is not None else None,
            AXIS + h * C if AXIS is not None else None,
            IS_START + h * C if IS_START is not None else None,
            TOP + h * D if TOP is not None else None,
            key, live, first_row, length, m, window, scale, cap, D - C, C, BITS, K, INDEX_BITS, R, RT, CAUSAL, CAPPED, WINDOW, KC,
        )  # fmt: skip
        new_peak = tl.maximum(peak, tl.max(score, 0))  # [RT]
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2(peak - base)  # [RT]
        p = tl.exp2(score - base[None, :])  # [BN, RT]
        total = total * shrink + tl.sum(p, 0)
        # weight 0 times an unfilled buffer's NaN would be NaN, so rows that nobody sees are not loaded
        low, high, unit = add_values(
            p,
            V + outer * v_sb + h * v_sh + slot * v_sn,
            V_SCALE + outer * v_scale_sb + h * v_scale_sh + slot * v_scale_sn if V_SCALE is not None else None,
            V_CENTRE + outer * v_centre_sb + h * v_centre_sh + slot * v_centre_sn if V_CENTRE is not None else None,
            live, low, high, unit, shrink, DTYPE, DV,
        )  # fmt: skip
        peak = new_peak
    row = (head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * R + r  # [RT]
    tl.store(PEAK + row, peak)
    tl.store(TOTAL + row, total)
    store_values(PARTIAL + row * DV, low, high, unit, DV, HALVES)

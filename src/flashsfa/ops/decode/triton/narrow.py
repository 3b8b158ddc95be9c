"""Decode over keys and values of few bits: as `decode`, by kernels that unpack a block at a time, in registers. Every value is read."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..held import SCALES, TABLES, Call
from .combine import run_splits
from .narrow_blocks import add_values, narrow_query_kernel, narrow_scores, store_values
from .scores import TRITON_DTYPES, Problem, chunk, live_keys, locate, split_range, strided


def attend(call: Call, out: Tensor, lse: Tensor) -> None:
    """Write the output [B, Hq, M, Dv] and its log-sum-exp [B, Hq, M] over what is `held`. No value is left out, so any `value_tolerance` is
    kept."""
    problem = NarrowProblem(call)
    run_splits(decode_narrow_kernel, problem, *_launch(problem), out, lse)


class NarrowProblem(Problem):
    """One decode call over what is `Held`.

    Attributes:
        queries: query rows as kernels take them.
        coded, valued: arguments of `narrow_scores` and `add_values`.
    """

    def __init__(self, call: Call) -> None:
        q, held = call.q, call.held
        super().__init__(q, held.tensors["V"], call.page_table, call.mask, call.scores)
        self.held, self.head_dim, self.width = held, q.shape[-1], held.width
        self.rotation = _rotation(held.width) if "V_CENTRE" in held.tensors else 1
        # float16 is exact for levels, and has more digits than bfloat16
        self._levels = q.dtype if q.dtype == torch.float32 else torch.float16
        self.queries = self._queries(q, self._levels, call.topk_query)

    @property
    def coded(self) -> dict[str, Any]:
        held, tensors = self.held, self.held.tensors
        return {
            **self.queries, **self.ruled,
            **{name: tensors.get(name) for name in ("AXIS", "IS_START", "TOP")},
            **_arguments(tensors, "CHANNEL", "CHANNEL_SCALE", "CHANNEL_CENTRE", "VALUES", "VALUE_SCALE", "INDICES"),
            "D": self.head_dim, "C": held.channel, "BITS": held.bits, "K": held.topk, "INDEX_BITS": held.index_bits,
        }  # fmt: skip

    @property
    def valued(self) -> dict[str, Any]:
        tensors = self.held.tensors
        return {
            **_arguments(tensors, "V", "V_SCALE", "V_CENTRE"), "DV": self.width, "V_BITS": self.held.value_bits,
            "DTYPE": TRITON_DTYPES[self._levels if "V_SCALE" in tensors else self.dtype],
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
            by_place, terms, **{name: held.tensors.get(name) for name in TABLES}, **self.query_arguments(q, dense_dims, topk_query),
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
    if held.value_bits == 3 and held.width > 64:  # unpacked all at once
        keys = 16
    return {"BN": keys, "KC": chunk(max(1, held.topk), problem.tile), "num_warps": warps, "num_stages": 1}, 16


# A cache grows at each step, and with it the strides of its scales; those of most rows are multiples of 16 anyway.
_GROWING = ["n", *(f"{name.lower()}_{stride}" for name in SCALES for stride in ("sb", "sh"))]


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
    DV: tl.constexpr, V_BITS: tl.constexpr, R: tl.constexpr, RT: tl.constexpr, PAGE: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr,
    BN: tl.constexpr, KC: tl.constexpr,
):  # fmt: skip
    """Unnormalised output [RT, DV], maximum and sum of one split for one tile of rows. Scores in log2 units."""
    head, tile = tl.program_id(0) // (R // RT), tl.program_id(0) % (R // RT)
    b, h = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    first_row = tile * RT
    r = first_row + tl.arange(0, RT)  # [RT]
    length, begin, end = split_range(LENS, b, n, m, window, WINDOW, BN)
    HALVES: tl.constexpr = V_BITS == 4
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
            live, low, high, unit, shrink, DTYPE, DV, V_BITS,
        )  # fmt: skip
        peak = new_peak
    row = (head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * R + r  # [RT]
    tl.store(PEAK + row, peak)
    tl.store(TOTAL + row, total)
    store_values(PARTIAL + row * DV, low, high, unit, DV, HALVES)

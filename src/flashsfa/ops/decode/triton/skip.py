"""Decode that leaves out the V rows which carry almost no weight, within a certified share of the softmax mass.

Scores need only the codes, so all weights are known before V is touched:

1. `decode_score_kernel` reads the codes and writes every weight p = 2^(s - m), m the whole-numbered maximum of the
   key's block, and the maxima and sums. Whole-numbered maxima make each later change of base exact.
2. `decode_count_kernel` takes each key's largest share w of any query row's mass, w = max over rows of p / total,
   writes its depth (half-octaves below 1, the top bits of its pattern), and counts the depths.
3. `decode_value_kernel` bounds the mass of a half-octave by count times upper edge, cuts where the bound of all below
   stays within the tolerance, and reads the V rows of the keys above the cut.

A row's own weights are at most those shares, so what is left out carries at most a share τ of each query's weight, and
the rest is renormalised: the output moves by at most 2·τ·max‖v‖ whatever the scores are. One count serves all rows.
Weights are kept in bfloat16 for 16-bit caches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton.rows import cdiv
from .combine import combine
from .scores import FeatureProblem, block_keys, block_scores, channel_words, chunk, live_keys, locate, split_range

_BLOCK = 128  # keys that share a maximum
_SCAN = 1024  # weights, or depths, at a time where nothing else is looked at
_BINS = 64  # half-octaves below a share of 1 that are told apart: weights down to 2^-32
_CERTAIN = 1 - 2**-7  # of the tolerance: room for the rounding of weights and sums


def decode_skipping(problem: FeatureProblem, value_tolerance: float, out: Tensor, lse: Tensor) -> None:
    """Decode with `value_tolerance` > 0 into out [B, Hq, M, Dv] and lse [B, Hq, M]; the lse is exact."""
    rows, tiles = problem.padded_rows, problem.tiles
    splits, keys = problem.splits(_BLOCK, 32 if problem.tile == 1 else 16), cdiv(problem.keys, _BLOCK) * _BLOCK
    grid = problem.heads * tiles, splits
    on = {"device": problem.device}
    weight_dtype = torch.float32 if problem.dtype == torch.float32 else torch.bfloat16
    sizes = {"keys": keys, "ROWS": problem.rows, "BLOCK": _BLOCK, "BINS": _BINS}
    scored = {
        "WEIGHTS": torch.empty(problem.heads, keys, rows, dtype=weight_dtype, **on),
        "BLOCK_PEAK": problem.scratch(keys // _BLOCK, rows),
        "PEAK": problem.scratch(splits, rows),
        "TOTAL": problem.scratch(splits, rows),
        "COUNTS": torch.empty(problem.heads, tiles, _BINS, dtype=torch.int32, **on),
    }
    depths = torch.empty(problem.heads, tiles, keys, dtype=torch.uint8, **on)
    kept = chunk(problem.topk, problem.tile)
    decode_score_kernel[grid](
        **scored, **sizes, **problem.visibility, **problem.places, **problem.coded, KC=kept, num_warps=_warps(problem, kept), num_stages=1,
    )  # fmt: skip
    decode_count_kernel[grid](
        **scored, DEPTHS=depths, LSE=lse, **sizes, **problem.visibility,
        SCAN=max(_BLOCK, _SCAN // max(1, problem.tile // 4)), num_warps=4, num_stages=1,
    )  # fmt: skip
    partial, mass = problem.scratch(splits, rows, problem.width), problem.scratch(splits, rows)
    needed = torch.empty(problem.heads, tiles, keys, dtype=torch.int32, **on)
    decode_value_kernel[grid](
        **scored, DEPTHS=depths, NEEDED=needed, PARTIAL=partial, KEPT=mass, tolerance=value_tolerance * _CERTAIN,
        **sizes, **problem.visibility, **problem.places, **problem.valued, SCAN=_SCAN,
        BN=max(16, block_keys(problem) // 2), num_warps=2 if problem.tile < 8 else 4, num_stages=1,
    )  # fmt: skip
    combine(problem, partial, None, mass, out, None)


def _warps(problem: FeatureProblem, kept: int) -> int:
    """Warps of the score kernel: 2, as measured, more for more query rows and features, whose block would not fit the registers."""
    words = 2 * _BLOCK * (kept * problem.tile + channel_words(problem.dense_dims, problem.dtype))
    return 2 if words <= 6144 else 4 if words <= 12288 else 8


@triton.jit(do_not_specialize=["n"])
def decode_score_kernel(
    Q, DENSE_K, VALUES, INDICES, CODE_SCALE, LENS, PADDING, PAGES,
    WEIGHTS, BLOCK_PEAK, PEAK, TOTAL, COUNTS,
    keys, kv_heads, n, m, window, scale, cap,
    dense_k_sb, dense_k_sh, values_sb, values_sh, indices_sb, indices_sh, code_scale_sb, code_scale_sh,
    padding_sb, pages_sb,
    dense_k_sn: tl.constexpr, values_sn: tl.constexpr, indices_sn: tl.constexpr, code_scale_sn: tl.constexpr,
    D: tl.constexpr, DENSE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, R: tl.constexpr, RT: tl.constexpr,
    PAGE: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
    KC: tl.constexpr,
):  # fmt: skip
    """Weights of one split's keys for one tile of rows; -1 where a query does not see a key."""
    head, tile = (tl.program_id(0) // (R // RT)).to(tl.int64), tl.program_id(0) % (R // RT)
    b, h = head // kv_heads, head % kv_heads
    first_row = tile * RT
    r = first_row + tl.arange(0, RT)  # [RT]
    if tl.program_id(1) == 0:
        tl.store(COUNTS + tl.program_id(0) * BINS + tl.arange(0, BINS), tl.zeros([BINS], tl.int32))
    length, begin, end = split_range(LENS, b, n, m, window, WINDOW, BLOCK)
    peak = tl.full([RT], float("-inf"), tl.float32)
    total = tl.zeros([RT], tl.float32)
    for start in range(begin, end, BLOCK):
        key = start + tl.arange(0, BLOCK)  # [BLOCK]
        live = live_keys(PADDING + b * padding_sb if PADDING is not None else None, key, length, m, window, WINDOW)
        outer, slot = locate(PAGES + b * pages_sb if PAGES is not None else None, b, key, live, PAGE)
        score = block_scores(
            Q + head * D * R + r,
            DENSE_K + outer * dense_k_sb + h * dense_k_sh + slot * dense_k_sn,
            VALUES + outer * values_sb + h * values_sh + slot * values_sn,
            INDICES + outer * indices_sb + h * indices_sh + slot * indices_sn,
            CODE_SCALE + outer * code_scale_sb + h * code_scale_sh + slot * code_scale_sn if CODE_SCALE is not None else None,
            key, live, first_row, length, m, window, scale, cap, D, DENSE, K, R, RT, CAUSAL, CAPPED, WINDOW, BLOCK, KC,
        )  # fmt: skip
        block_peak = tl.ceil(tl.max(score, 0))  # [RT]
        p = tl.exp2(score - tl.where(block_peak == float("-inf"), 0.0, block_peak)[None, :])  # [BLOCK, RT]
        new_peak = tl.maximum(peak, block_peak)
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp2(peak - base) + tl.sum(p, 0) * tl.exp2(block_peak - base)
        peak = new_peak
        stored = tl.where(score == float("-inf"), -1.0, p).to(WEIGHTS.dtype.element_ty)
        tl.store(WEIGHTS + (head * keys + key)[:, None] * R + r[None, :], stored)
        tl.store(BLOCK_PEAK + (head * (keys // BLOCK) + start // BLOCK) * R + r, block_peak)
    at = (head * tl.num_programs(1) + tl.program_id(1)) * R + r
    tl.store(PEAK + at, peak)
    tl.store(TOTAL + at, total)


@triton.jit(do_not_specialize=["n"])
def decode_count_kernel(
    LENS, WEIGHTS, BLOCK_PEAK, PEAK, TOTAL, COUNTS, DEPTHS, LSE,
    keys, kv_heads, n, m, window,
    ROWS: tl.constexpr, R: tl.constexpr, RT: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr,
    BINS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Depths of one split's keys, added to the counts of its tile; the first split writes the rows' log-sum-exp."""
    head, tile = (tl.program_id(0) // (R // RT)).to(tl.int64), tl.program_id(0) % (R // RT)
    r = tile * RT + tl.arange(0, RT)  # [RT]
    peak, total = row_mass(PEAK, TOTAL, head, r, R)  # [RT]
    if tl.program_id(1) == 0:
        some = tl.where(total == 0.0, 1.0, total)
        tl.store(LSE + head * ROWS + r, (peak + tl.log2(some)) * 0.6931471805599453, mask=r < ROWS)
    _, begin, end = split_range(LENS, head // kv_heads, n, m, window, WINDOW, BLOCK)
    depths = DEPTHS + tl.program_id(0).to(tl.int64) * keys
    counts = tl.zeros([BINS], tl.int32)
    for start in range(begin, end, SCAN):
        block = start // BLOCK + tl.arange(0, SCAN // BLOCK)
        inside = (block < tl.cdiv(end, BLOCK))[:, None] & (r < ROWS)[None, :]  # [SCAN / BLOCK, RT]
        block_peak = tl.load(
            BLOCK_PEAK + (head * (keys // BLOCK) + block)[:, None] * R + r[None, :], mask=inside, other=0.0
        )
        key = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]  # [SCAN / BLOCK, BLOCK]
        p = tl.load(
            WEIGHTS + (head * keys + key)[:, :, None] * R + r[None, None, :], mask=inside[:, None, :], other=-1.0
        ).to(tl.float32)  # [SCAN / BLOCK, BLOCK, RT]
        share = tl.where(p < 0, -1.0, p * (tl.exp2(block_peak - peak[None, :]) / total[None, :])[:, None, :])
        share = tl.reduce(share, 2, largest)  # [SCAN / BLOCK, BLOCK]
        share = tl.where(share == share, share, 1.0)  # NaN is not to be lost
        octave = share.to(tl.int32, bitcast=True) >> 22  # negative where no row sees the key
        depth = tl.minimum(tl.maximum(TOP_OCTAVE - octave, 0), BINS - 1)
        seen = octave >= 0
        tl.store(depths + key, tl.where(seen, depth, UNSEEN).to(tl.uint8), mask=key < end)
        counts += tl.histogram(tl.reshape(depth, [SCAN]), BINS, mask=tl.reshape(seen, [SCAN]))
    tl.atomic_add(COUNTS + tl.program_id(0) * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["n"])
def decode_value_kernel(
    V, V_SCALE, LENS, PAGES, WEIGHTS, BLOCK_PEAK, PEAK, TOTAL, COUNTS, DEPTHS, NEEDED, PARTIAL, KEPT,
    keys, kv_heads, n, m, window, tolerance, v_sb, v_sh, v_scale_sb, v_scale_sh, pages_sb,
    v_sn: tl.constexpr, v_scale_sn: tl.constexpr, DTYPE: tl.constexpr, DV: tl.constexpr,
    ROWS: tl.constexpr, R: tl.constexpr, RT: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
    BN: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Unnormalised output [RT, DV] and kept mass of one split for one tile of rows, from the V rows they need."""
    head, tile = (tl.program_id(0) // (R // RT)).to(tl.int64), tl.program_id(0) % (R // RT)
    b, h = head // kv_heads, head % kv_heads
    r = tile * RT + tl.arange(0, RT)  # [RT]
    peak, _ = row_mass(PEAK, TOTAL, head, r, R)  # [RT]
    deepest = kept_depths(COUNTS + tl.program_id(0) * BINS, tolerance, BINS)
    _, begin, end = split_range(LENS, b, n, m, window, WINDOW, BLOCK)
    depths = DEPTHS + tl.program_id(0).to(tl.int64) * keys
    needed = NEEDED + tl.program_id(0).to(tl.int64) * keys + begin
    count = 0
    for start in range(begin, end, SCAN):
        key = start + tl.arange(0, SCAN)
        need = (tl.load(depths + key, mask=key < end, other=UNSEEN) < deepest).to(tl.int32)  # [SCAN]
        tl.store(needed + count + tl.cumsum(need, 0) - 1, key, mask=need > 0)
        count += tl.sum(need, 0)
    tl.debug_barrier()  # what one thread stored another loads
    DVP: tl.constexpr = triton.next_power_of_2(DV)
    c = tl.arange(0, DVP)  # [DVP]
    acc = tl.zeros([RT, DVP], tl.float32)
    kept = tl.zeros([RT], tl.float32)
    for start in range(0, count, BN):
        inside = start + tl.arange(0, BN) < count  # [BN]
        key = tl.load(needed + start + tl.arange(0, BN), mask=inside, other=0)
        outer, slot = locate(PAGES + b * pages_sb if PAGES is not None else None, b, key, inside, PAGE)
        v_row = V + outer * v_sb + h * v_sh + slot * v_sn  # [BN]
        v = tl.load(v_row[:, None] + c[None, :], mask=inside[:, None] & (c < DV)[None, :], other=0.0)  # [BN, DVP]
        wanted = inside[:, None] & (r < ROWS)[None, :]  # [BN, RT]
        p = tl.load(WEIGHTS + (head * keys + key)[:, None] * R + r[None, :], mask=wanted, other=0.0).to(tl.float32)
        block_peak = tl.load(
            BLOCK_PEAK + (head * (keys // BLOCK) + key // BLOCK)[:, None] * R + r[None, :], mask=wanted, other=0.0
        )
        weight = tl.where(p > 0, p * tl.exp2(block_peak - peak[None, :]), tl.where(p < 0, 0.0, p))  # -1: unseen
        kept += tl.sum(weight, 0)
        if V_SCALE is not None:
            v_scale = V_SCALE + outer * v_scale_sb + h * v_scale_sh + slot * v_scale_sn  # [BN]
            weight *= tl.load(v_scale, mask=inside, other=0.0)[:, None]
        acc = tl.dot(tl.trans(weight).to(DTYPE), v.to(DTYPE), acc, input_precision="ieee")
    at = (head * tl.num_programs(1) + tl.program_id(1)) * R + r  # [RT]
    tl.store(KEPT + at, kept)
    tl.store(PARTIAL + at[:, None] * DV + c[None, :], acc, mask=(c < DV)[None, :])


TOP_OCTAVE = tl.constexpr(2 * 127)  # the half-octave that starts at 1: twice the biased exponent, plus the next bit
UNSEEN = tl.constexpr(255)  # the depth of a key that no query sees


@triton.jit
def largest(a, b):
    """The larger of two; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def row_mass(PEAK, TOTAL, head, r, R: tl.constexpr):
    """Maximum and mass of rows r [RT] over all splits."""
    splits = tl.num_programs(1)
    BS: tl.constexpr = 256 // r.shape[0]
    peak = tl.full(r.shape, float("-inf"), tl.float32)
    total = tl.zeros(r.shape, tl.float32)
    for first in range(0, splits, BS):
        s = first + tl.arange(0, BS)
        at = (head * splits + s)[:, None] * R + r[None, :]  # [BS, RT]
        peaks = tl.load(PEAK + at, mask=(s < splits)[:, None], other=float("-inf"))
        new_peak = tl.maximum(peak, tl.max(peaks, 0))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        totals = tl.load(TOTAL + at, mask=(s < splits)[:, None], other=0.0)
        total = total * tl.exp2(peak - base) + tl.sum(totals * tl.exp2(peaks - base[None, :]), 0)
        peak = new_peak
    return peak, total


@triton.jit
def kept_depths(counts, tolerance, BINS: tl.constexpr):
    """How many depths to keep so that the mass below them is within the tolerance, by an upper bound of it."""
    lowest = tl.arange(0, BINS)  # bins from the lightest up
    count = tl.load(counts + BINS - 1 - lowest).to(tl.float32)
    bound = tl.cumsum(count * octave_start(lowest + (TOP_OCTAVE - BINS + 2)), 0)  # each bin ends where the next starts
    return BINS - tl.sum((bound <= tolerance).to(tl.int32), 0)


@triton.jit
def octave_start(octave):
    """The smallest number in a half-octave."""
    return tl.exp2((octave // 2 - 127).to(tl.float32)) * (1.0 + 0.5 * (octave % 2))

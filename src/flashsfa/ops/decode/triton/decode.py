"""Decode over feature codes, split over keys and combined: every byte of the cache is read once a tile of query rows.

No host sync and no shape that depends on data: the launches can be captured in a CUDA graph. Deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....checks import require
from ....codes import FeatureCodes
from ....mask import Mask
from ....scores import ScoreRules
from ....stored import KVView
from ...triton.rows import next_power_of_2
from .combine import run_splits
from .scores import FeatureProblem, block_keys, block_scores, channel_words, chunk, live_keys, locate, split_range
from .skip import decode_skipping

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def decode(
    q: Tensor,
    kv: KVView,
    mask: Mask,
    scores: ScoreRules,
    value_tolerance: float,
    topk_query: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `plain.decode`, for float16, bfloat16 and float32. No host sync, deterministic, no gradients. `out` [B, Hq, M, Dv], contiguous, is a
    place for the output outside of traces.

    Raises `ValueError` if a cache tensor's last dimension is not contiguous: copying a cache a step would cost more
    than decoding it.
    """
    codes = kv.codes
    for name, x in (("dense", codes.dense), ("values", codes.values), ("indices", codes.indices), ("v", kv.v)):
        require(
            x.shape[-1] <= 1 or x.stride(-1) == 1,
            lambda: f"the last dimension of {name} must be contiguous, got strides {tuple(x.stride())}",  # noqa: B023 (called at once)
        )
    if not torch.compiler.is_compiling():
        return _run(q, kv, mask, scores, value_tolerance, topk_query, out)
    return _decode_op(
        q, codes.dense, codes.values, codes.indices, kv.v, codes.scale, kv.v_scale, kv.page_table, mask.kv_lens,
        mask.key_padding_mask, mask.window, [scores.scale, scores.softcap or 0.0, value_tolerance], topk_query,
    )  # fmt: skip


def _run(
    q: Tensor,
    kv: KVView,
    mask: Mask,
    scores: ScoreRules,
    value_tolerance: float,
    topk_query: int | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out = q.new_empty((*q.shape[:3], kv.v.shape[-1])) if out is None else out
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel():
        with torch.cuda.device_of(q):
            problem = FeatureProblem(q, kv, mask, scores, topk_query)
            if value_tolerance > 0:
                decode_skipping(problem, value_tolerance, out, lse)
            else:
                run_splits(decode_partial_kernel, problem, *_launch(problem), out, lse)
    return out, lse


# For torch.compile, which cannot look into a launch. Eager calls save its cost to the host.
@torch.library.custom_op("flashsfa::decode", mutates_args=())
def _decode_op(
    q: Tensor,
    dense: Tensor,
    values: Tensor,
    indices: Tensor,
    v: Tensor,
    code_scale: Tensor | None,
    v_scale: Tensor | None,
    page_table: Tensor | None,
    kv_lens: Tensor | None,
    key_padding_mask: Tensor | None,
    window: int | None,
    real: Sequence[float],
    topk_query: int | None,
) -> tuple[Tensor, Tensor]:
    scale, softcap, value_tolerance = real
    kv = KVView(FeatureCodes(dense, values, indices, q.shape[-1], code_scale), v, v_scale, kv_lens, page_table)
    mask = Mask(True, window, key_padding_mask, kv_lens=kv_lens)
    return _run(q, kv, mask, ScoreRules(scale, softcap or None), value_tolerance, topk_query)


@_decode_op.register_fake
def _(q: Tensor, dense: Tensor, values: Tensor, indices: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=torch.float32)


def _launch(problem: FeatureProblem) -> tuple[dict[str, Any], int]:
    """Keys a block and warps of the partial kernel, and programs a processor: a table measured on an H100.

    A warp is to have about 8 KB of V in flight, held in registers (software pipelining costs more registers than it
    gains); more rows want fewer programs, whose results must be combined.
    """
    rows, row_bytes = problem.tile, problem.row_bytes
    keys, warps, waves = block_keys(problem), 4, 16 if rows == 1 else 8
    if row_bytes <= 128:
        keys, warps, waves = (32, 1, 16) if problem.width <= 64 and 1 < rows <= 4 else (keys, 2, 16)
    elif problem.dense_dims and problem.dtype != torch.float32:
        warps = 2
    # What was not measured: more query rows, features or width. A block that does not fit the registers is slow.
    most = (
        128 if problem.dtype == torch.float32 else 250
    )  # of 255 a thread, and the operands of products without matrix units
    while _words(problem, keys) > most * 32 * warps and warps < 8:
        warps *= 2
    while _words(problem, keys) > most * 32 * warps and keys > 16:
        keys //= 2
    return {"BN": keys, "KC": chunk(problem.topk, rows), "num_warps": warps, "num_stages": 1}, waves


def _words(problem: FeatureProblem, keys: int) -> int:
    """Registers that a block of keys takes: products and what they are added to, the dense channel, V as it is read and as it is
    multiplied; and the output."""
    width = next_power_of_2(problem.width)
    products = 2 * chunk(problem.topk, problem.tile) * problem.tile
    value = width * (problem.dtype.itemsize + problem.is_8_bit) // 4
    return keys * (products + channel_words(problem.dense_dims, problem.dtype) + value) + 16 * width


@triton.jit(do_not_specialize=["n"])  # a cache grows at each step
def decode_partial_kernel(
    Q, DENSE_K, VALUES, INDICES, CODE_SCALE, V, V_SCALE, LENS, PADDING, PAGES,
    PARTIAL, PEAK, TOTAL,
    kv_heads, n, m, window, scale, cap,
    dense_k_sb, dense_k_sh, values_sb, values_sh, indices_sb, indices_sh, code_scale_sb, code_scale_sh, v_sb, v_sh,
    v_scale_sb, v_scale_sh, padding_sb, pages_sb,
    dense_k_sn: tl.constexpr, values_sn: tl.constexpr, indices_sn: tl.constexpr, code_scale_sn: tl.constexpr,
    v_sn: tl.constexpr, v_scale_sn: tl.constexpr, DTYPE: tl.constexpr,
    D: tl.constexpr, DENSE: tl.constexpr, K: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, RT: tl.constexpr,
    PAGE: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr,
    BN: tl.constexpr, KC: tl.constexpr,
):  # fmt: skip
    """Unnormalised output [RT, DV], maximum and sum of one split for one tile of rows. Scores in log2 units."""
    head, tile = tl.program_id(0) // (R // RT), tl.program_id(0) % (R // RT)
    b, h = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    first_row = tile * RT
    length, begin, end = split_range(LENS, b, n, m, window, WINDOW, BN)
    DVP: tl.constexpr = triton.next_power_of_2(DV)
    c = tl.arange(0, DVP)  # [DVP]
    q = Q + head.to(tl.int64) * D * R + first_row + tl.arange(0, RT)  # [RT]
    peak = tl.full([RT], float("-inf"), tl.float32)
    total = tl.zeros([RT], tl.float32)
    acc = tl.zeros([RT, DVP], tl.float32)
    for start in range(begin, end, BN):
        key = start + tl.arange(0, BN)  # [BN]
        live = live_keys(PADDING + b * padding_sb if PADDING is not None else None, key, length, m, window, WINDOW)
        outer, slot = locate(PAGES + b * pages_sb if PAGES is not None else None, b, key, live, PAGE)
        score = block_scores(
            q,
            DENSE_K + outer * dense_k_sb + h * dense_k_sh + slot * dense_k_sn,
            VALUES + outer * values_sb + h * values_sh + slot * values_sn,
            INDICES + outer * indices_sb + h * indices_sh + slot * indices_sn,
            CODE_SCALE + outer * code_scale_sb + h * code_scale_sh + slot * code_scale_sn if CODE_SCALE is not None else None,
            key, live, first_row, length, m, window, scale, cap, D, DENSE, K, R, RT, CAUSAL, CAPPED, WINDOW, BN, KC,
        )  # fmt: skip
        # weight 0 times an unfilled buffer's NaN would be NaN, so rows that nobody sees are not loaded
        v_row = V + outer * v_sb + h * v_sh + slot * v_sn  # [BN]
        v = tl.load(v_row[:, None] + c[None, :], mask=live[:, None] & (c < DV)[None, :], other=0.0)  # [BN, DVP]
        new_peak = tl.maximum(peak, tl.max(score, 0))  # [RT]
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        shrink = tl.exp2(peak - base)  # [RT]
        p = tl.exp2(score - base[None, :])  # [BN, RT]
        total = total * shrink + tl.sum(p, 0)
        if V_SCALE is not None:
            v_scale = V_SCALE + outer * v_scale_sb + h * v_scale_sh + slot * v_scale_sn  # [BN]
            p *= tl.load(v_scale, mask=live, other=0.0)[:, None]
        acc = tl.dot(tl.trans(p).to(DTYPE), v.to(DTYPE), acc * shrink[:, None], input_precision="ieee")  # [RT, DVP]
        peak = new_peak
    row = (head.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * R + first_row + tl.arange(0, RT)  # [RT]
    tl.store(PEAK + row, peak)
    tl.store(TOTAL + row, total)
    tl.store(PARTIAL + row[:, None] * DV + c[None, :], acc, mask=(c < DV)[None, :])

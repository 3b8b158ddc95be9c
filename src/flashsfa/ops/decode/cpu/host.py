"""Decode on the CPU, compiled by numba: see the package."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from ....axes import AxisCodes
from ....codes import FeatureCodes
from ....formats import index_bits
from ....mask import Mask
from ....narrow import NarrowCodes, NarrowRows
from ....rotation import rotate
from ....scores import ScoreRules
from ....stored import KVView
from . import keys, threads
from .parts import like, where
from .queries import lay_out
from .softmax import LOG2_E, weigh
from .values import sum_levels, sum_rows

_INDEX_FORMS = {"uint8": keys.UINT8, "packed": keys.PACKED, "bitmap": keys.BITMAP}


def obstacle(dtype: torch.dtype, kv: KVView) -> str | None:
    """Why `decode` does not take queries of `dtype` over these keys and values; None if it does."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"takes no {dtype}"
    if kv.page_table is not None:
        return "reads no pages"
    codes = kv.codes
    if isinstance(codes, NarrowRows) and codes.bits == 16:
        return "reads no whole keys of 16 bits beside values of fewer"
    if isinstance(codes, NarrowCodes) and (
        codes.format.value_bits == 16 or (codes.format.dense_bits == 16 and codes.dense_dims)
    ):
        return "reads no codes of which a part has 16 bits and another fewer"
    return None


def decode(
    q: Tensor, kv: KVView, mask: Mask, scores: ScoreRules, value_tolerance: float, topk_query: int | None = None
) -> tuple[Tensor, Tensor]:
    """As `plain.decode`, for q and a view without an `obstacle`; tokens that it holds as they came, without positions, included.

    Parts have any strides of B, Hkv and N; they are copied first if the entries of a key are not adjacent.
    """
    batch, kv_heads, n, value_dim = kv.v.shape
    m, rows, heads = q.shape[2], q.shape[1] // kv_heads * q.shape[2], batch * kv_heads
    # scores come in log2 units; under a cap, which stands before them, as what its tanh takes
    cap = 0.0 if scores.softcap is None else scores.softcap * LOG2_E
    factor = scores.scale * LOG2_E if scores.softcap is None else scores.scale / scores.softcap
    held: list[Tensor] = []
    seen, exact = _seen(batch, m, kv, mask), _exact(kv, q, held)
    weights = np.empty((heads, rows, n), np.float32)
    lse, cuts, masses = (np.empty((heads, rows), np.float32) for _ in range(3))
    sums, out = (np.empty((heads, rows, value_dim), np.float32) for _ in range(2))
    whole = coded = np.empty((heads, rows, q.shape[-1]), np.float32)
    if topk_query is not None:
        coded = np.empty_like(whole)
    with threads.ready():
        kept = topk_query or 0, kv.key_budget[1]
        lay_out((q.dtype,), like(q.dtype), _book(held, q)[0], kv_heads, m, factor, *kept, whole, coded)
        if isinstance(kv.codes, FeatureCodes):
            keys.score_features((kv.codes.values.dtype,), coded, *_features(kv.codes, held), *seen, cap, weights)
        else:
            if isinstance(kv.codes, NarrowRows) and kv.codes.is_rotated:
                coded = rotate(torch.from_numpy(coded)).numpy()
            scale_like, *levels = _levels(kv.codes, held)
            keys.score_levels((scale_like.dtype,), coded, scale_like, *levels, *seen, cap, weights)
        exact_q = whole if scores.exact_factor is None else _times(whole, scores.exact_factor)
        weigh((q.dtype,), exact_q, *exact, *seen, cap, float(value_tolerance), weights, lse, cuts, sums, masses)
        if isinstance(kv.v, NarrowRows) and kv.v.is_rotated:
            at, block = _book(held, kv.v.kept, kv.v.scale, kv.v.centre), kv.v.width & -kv.v.width
            sum_levels((), weights, cuts, *seen, at, block, sums, masses, out)
        else:
            v, v_scale = (kv.v, kv.v_scale) if isinstance(kv.v, Tensor) else (kv.v.kept, kv.v.scale)
            sum_rows((v.dtype,), weights, cuts, *seen, like(v.dtype), _book(held, v, v_scale), sums, masses, out)
    del held  # what kernels read by its address was kept until here
    shape = (batch, q.shape[1], m)
    return torch.from_numpy(out).view(*shape, value_dim).to(q.dtype), torch.from_numpy(lse).view(shape)


def _seen(batch: int, m: int, kv: KVView, mask: Mask) -> tuple:
    """Which of all tokens the queries see: the fields of `parts.Seen`."""
    n, n_first, coded = kv.n, kv.n_first, kv.v.shape[2]
    padding = np.zeros((batch, 0), np.bool_)
    if mask.key_padding_mask is not None:
        padding = mask.key_padding_mask.contiguous().numpy()
    if mask.kv_lens is None and mask.window is None and m == 1:  # the usual step, at less than the general rule costs
        first, last = np.zeros((batch, 1), np.int64), np.full((batch, 1), n)
    else:
        lengths = np.full(batch, n) if mask.kv_lens is None else mask.kv_lens.numpy().astype(np.int64)
        last = lengths[:, None] - m + np.arange(1, m + 1)  # [B, M]
        first = np.zeros_like(last) if mask.window is None else last - mask.window
        first, last = first.clip(0, n), last.clip(0, n)
    return first, last, padding, kv.v.shape[1], n_first, coded


def _features(codes: FeatureCodes, held: list[Tensor]) -> tuple:
    at = _book(held, codes.values, codes.indices, codes.dense, codes.scale)
    return like(codes.values.dtype), at, codes.topk, codes.dense_dims


def _levels(codes: NarrowCodes | NarrowRows | AxisCodes, held: list[Tensor]) -> tuple:
    no_entries = (0, 0, keys.NO_INDICES, 0, 0, 0)
    if isinstance(codes, AxisCodes):
        layout, axes = codes.axes.layout, codes.axes
        tables = (layout.byte, layout.shift, axes.bits, axes.step, axes.centre)
        at = _book(held, codes.packed, *[None] * 5)
        return _scale_like(None), at, axes.key_bytes, *(x.numpy() for x in tables), False, *no_entries
    if isinstance(codes, NarrowRows):
        at = _book(held, codes.kept.view(torch.uint8), codes.scale, codes.centre, *[None] * 3)
        return (
            _scale_like(codes.scale),
            at,
            codes.kept.shape[3],
            *_row_fields(codes.width, codes.bits),
            codes.bits == 8,
            *no_entries,
        )
    dense, values = codes.dense.view(torch.uint8), codes.values.view(torch.uint8)
    at = _book(held, dense, codes.dense_scale, None, values, codes.indices, codes.value_scale)
    form = _INDEX_FORMS[codes.format.index_form(codes.topk, codes.sparse_dims)]
    sparse = codes.format.value_bits, codes.indices.shape[3], form, index_bits(codes.sparse_dims), codes.topk
    return (
        _scale_like(codes.dense_scale),
        at,
        codes.dense_dims,
        *_row_fields(codes.dense_dims, 8),
        True,
        *sparse,
        codes.dense_dims,
    )


@functools.cache
def _row_fields(width: int, bits: int) -> tuple[np.ndarray, ...]:
    """Byte, shift, bits, step and middle [1, width] of rows that `pack` wrote, or of int8, whose middle level is -0.5."""
    bit = np.arange(width)[None] * bits
    shape, middle = (1, width), -0.5 if bits == 8 else 0.0
    return (
        bit // 8, (bit % 8).astype(np.uint8), np.full(shape, bits, np.uint8), np.ones(shape, np.float32),
        np.full(shape, middle, np.float32),
    )  # fmt: skip


def _exact(kv: KVView, q: Tensor, held: list[Tensor]) -> tuple:
    """Of tokens that are held as they came, before and after the coded ones, what `weigh` takes."""
    oldest, newest = ((None, None) if part is None else (part.k, part.v) for part in (kv.first, kv.recent))
    counts = (0 if k is None else k.shape[2] for k, _ in (oldest, newest))
    return like(q.dtype), _book(held, *oldest, *newest), *counts


def _times(q: np.ndarray, factor: Tensor) -> np.ndarray:
    """q [B·Hkv, R, D] times the factor [Hkv, D]."""
    grouped = q.reshape(-1, len(factor), *q.shape[1:])
    return (grouped * factor.numpy()[:, None]).reshape(q.shape)


def _scale_like(scale: Tensor | None) -> np.ndarray:
    return like(torch.bfloat16 if scale is None else scale.dtype)


def _book(held: list[Tensor], *parts: Tensor | None) -> np.ndarray:
    """Where parts lie, [parts, 4]."""
    return np.array([where(x, held) for x in parts])

"""Decode on the CPU, compiled by numba: see the package."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from ....axes import AxisCodes
from ....codes import FeatureCodes, topk_codes
from ....formats import index_bits
from ....mask import Mask
from ....narrow import NarrowCodes, NarrowRows
from ....rotation import rotate
from ....scores import ScoreRules
from ....stored import ExactKV, KVView
from . import keys, threads
from .softmax import LOG2_E, weigh
from .values import sum_values

# numba knows no bfloat16: it sees the bits
_UNSIGNED = {torch.float32: torch.uint32, torch.bfloat16: torch.uint16}
_Part = tuple[np.ndarray, tuple[int, ...]]  # the bits of a part as one dimension, and the strides of B, Hkv and N
_INDEX_FORMS = {"uint8": keys.UINT8, "packed": keys.PACKED, "bitmap": keys.BITMAP}


def obstacle(dtype: torch.dtype, kv: KVView) -> str | None:
    """Why `decode` does not take queries of `dtype` over these keys and values; None if it does."""
    if dtype not in _UNSIGNED:
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

    Parts have any strides of B and Hkv; they are copied first if the code rows of a head are not adjacent or the entries of a V
    row are not.
    """
    batch, kv_heads, n, value_dim = kv.v.shape
    m, rows, heads = q.shape[2], q.shape[1] // kv_heads * q.shape[2], batch * kv_heads
    # scores come in log2 units; under a cap, which stands before them, as what its tanh takes
    cap = 0.0 if scores.softcap is None else scores.softcap * LOG2_E
    factor = scores.scale * LOG2_E if scores.softcap is None else scores.scale / scores.softcap
    whole = coded = (q.detach().float() * factor).reshape(heads, rows, q.shape[-1])
    if topk_query is not None:
        thin = topk_codes(q.detach(), topk_query, dense_dims=kv.key_budget[1]).to_dense()
        coded = (thin.float() * factor).reshape(heads, rows, q.shape[-1])
    first, last = _visible(batch, m, kv.n, mask)
    padding = np.zeros((batch, 0), np.bool_)
    if mask.key_padding_mask is not None:
        padding = mask.key_padding_mask.contiguous().numpy()
    n_first = kv.n_first
    weights = np.empty((heads, rows, n), np.float32)
    lse, cuts, masses = (np.empty((heads, rows), np.float32) for _ in range(3))
    sums, out = (np.empty((heads, rows, value_dim), np.float32) for _ in range(2))
    with threads.ready():
        where = (first, last, padding, kv_heads, n_first, n, cap, weights)
        if isinstance(kv.codes, FeatureCodes):
            keys.score_features(coded.numpy(), *_feature_parts(kv.codes), *where)
        else:
            if isinstance(kv.codes, NarrowRows) and kv.codes.is_rotated:
                coded = rotate(coded)
            keys.score_levels(coded.numpy(), *_level_parts(kv.codes), *where)
        weigh(
            whole.numpy(), *_exact_parts(kv.first, q), n_first, *_exact_parts(kv.recent, q), kv.n - n_first - n, first, last,
            padding, kv_heads, n, cap, float(value_tolerance), weights, lse, cuts, sums, masses,
        )  # fmt: skip
        sum_values(weights, cuts, padding, *_value_parts(kv), first, last, kv_heads, n_first, n, sums, masses, out)
    shape = (batch, q.shape[1], m)
    return torch.from_numpy(out).view(*shape, value_dim).to(q.dtype), torch.from_numpy(lse).view(shape)


def _visible(batch: int, m: int, n: int, mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """Each query's first visible key and the one past its last, both [B, M]; padding apart."""
    if (
        mask.kv_lens is None and mask.window is None and m == 1
    ):  # the usual step, at less than the cost of the general rule
        return np.zeros((batch, 1), np.int64), np.full((batch, 1), n)
    lengths = np.full(batch, n) if mask.kv_lens is None else mask.kv_lens.numpy().astype(np.int64)
    last = lengths[:, None] - m + np.arange(1, m + 1)  # [B, M]
    first = np.zeros_like(last) if mask.window is None else last - mask.window
    return first.clip(0, n), last.clip(0, n)


def _feature_parts(codes: FeatureCodes) -> tuple:
    scale = _no_part(torch.float32) if codes.scale is None else _rows(codes.scale[..., None])
    return (
        *_rows(codes.values), *_rows(codes.indices), *_rows(codes.dense), *scale, codes.topk, codes.dense_dims
    )  # fmt: skip


def _level_parts(codes: NarrowCodes | NarrowRows | AxisCodes) -> tuple:
    """Of keys in levels, what `score_levels` takes."""
    no_scale = _no_part(torch.bfloat16)
    no_entries = (*_no_part(torch.uint8), 0, *_no_part(torch.uint8), 0, keys.NO_INDICES, 0, 0, 0, *no_scale)
    if isinstance(codes, AxisCodes):
        layout, axes = codes.axes.layout, codes.axes
        tables = (layout.byte, layout.shift, axes.bits, axes.step, axes.centre)
        return (
            *_rows(codes.packed),
            axes.key_bytes,
            *(x.numpy() for x in tables),
            False,
            *no_scale,
            *no_scale,
            *no_entries,
        )
    if isinstance(codes, NarrowRows):
        fields, is_signed = _row_fields(codes.width, codes.bits), codes.bits == 8
        scales = (*_scale_part(codes.scale), *_scale_part(codes.centre))
        return (*_rows(codes.kept.view(torch.uint8)), codes.kept.shape[3], *fields, is_signed, *scales, *no_entries)
    form = _INDEX_FORMS[codes.format.index_form(codes.topk, codes.sparse_dims)]
    return (
        *_rows(codes.dense.view(torch.uint8)), codes.dense_dims, *_row_fields(codes.dense_dims, 8), True,
        *_scale_part(codes.dense_scale), *no_scale,
        *_rows(codes.values.view(torch.uint8)), codes.format.value_bits,
        *_rows(codes.indices), codes.indices.shape[3], form, index_bits(codes.sparse_dims),
        codes.topk, codes.dense_dims, *_scale_part(codes.value_scale),
    )  # fmt: skip


@functools.cache
def _row_fields(width: int, bits: int) -> tuple[np.ndarray, ...]:
    """Byte, shift, bits, step and middle [1, width] of rows that `pack` wrote, or of int8, whose middle level is -0.5."""
    bit = np.arange(width)[None] * bits
    shape, middle = (1, width), -0.5 if bits == 8 else 0.0
    return (
        bit // 8, (bit % 8).astype(np.uint8), np.full(shape, bits, np.uint8), np.ones(shape, np.float32),
        np.full(shape, middle, np.float32),
    )  # fmt: skip


def _exact_parts(part: ExactKV | None, q: Tensor) -> tuple:
    """Keys and values that are held as they came."""
    if part is None:
        return (*_no_part(q.dtype), *_no_part(q.dtype))
    return (*_rows(part.k, adjacent=False), *_rows(part.v, adjacent=False))


def _value_parts(kv: KVView) -> tuple:
    """Of values, what `sum_values` takes."""
    v = kv.v
    if isinstance(v, Tensor):
        scale = _no_part(torch.float32) if kv.v_scale is None else _scale_part(kv.v_scale)
        return (*_rows(v, adjacent=False), *scale, *_no_part(torch.bfloat16), 0)
    rotation = v.width & -v.width if v.is_rotated else 0
    scale = _no_part(torch.float32) if v.scale is None else _scale_part(v.scale)
    return (*_rows(v.kept, adjacent=False), *scale, *_scale_part(v.centre), rotation)


def _scale_part(x: Tensor | None) -> _Part:
    """A scale or centre [B, Hkv, N]; None for one that is not there."""
    return _no_part(torch.bfloat16) if x is None else _rows(x[..., None])


@functools.cache
def _no_part(dtype: torch.dtype) -> _Part:
    return _rows(torch.empty(0, 0, 0, 1, dtype=dtype, device="cpu"))


def _rows(x: Tensor, adjacent: bool = True) -> _Part:
    """The bits of x [B, Hkv, N, W] from its first element on, and its strides. x is copied if the entries of a row are not adjacent
    or, with `adjacent`, the rows of a head."""
    strides, (batch, heads, n, width) = x.stride(), x.shape
    if strides[3] != 1 or (adjacent and strides[2] != width):
        x = x.contiguous()
        strides = x.stride()
    across_b, across_h, across_n, _ = strides
    extent = 0
    if batch and heads and n and width:
        extent = (batch - 1) * across_b + (heads - 1) * across_h + (n - 1) * across_n + width
    bits = _UNSIGNED.get(x.dtype)
    flat = x.detach().as_strided((extent,), (1,))
    return (flat if bits is None else flat.view(bits)).numpy(), (across_b, across_h, across_n)

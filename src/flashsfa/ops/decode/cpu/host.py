"""Decode on the CPU, compiled by numba: see the package."""

from __future__ import annotations

import functools
from typing import NamedTuple

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
from ... import record
from ...cpu import threads
from ...cpu.parts import book, like
from . import keys
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
    made = Prepared.of(q, kv, mask, scores, value_tolerance, topk_query)
    return made.attend(q, kv, mask.key_padding_mask, mask.kv_lens)


def prepared(
    q: Tensor, kv: KVView, mask: Mask, scores: ScoreRules, value_tolerance: float, topk_query: int | None
) -> Prepared | None:
    """What attends for queries of this form over whatever tokens the buffers of `kv` hold; None where a part of them is copied first,
    and for no queries."""
    made = Prepared.of(q, kv, mask, scores, value_tolerance, topk_query)
    return made if q.numel() and not made.copies else None


class Prepared(NamedTuple):
    """Decode for queries of one form over the buffers of a view, of which others show other numbers of tokens and other exact ones.

    Attributes:
        rows: queries of a kv head.
        kept: how many features a code keeps of a query, 0 for queries as they are, and its dense ones.
        factor, cap: of scores, which come in log2 units; under a cap, which stands before them, as what its tanh takes.
        score, key_dtypes, keys: pass one, and what it takes of the buffers.
        is_rotated: whether queries are rotated before they meet keys.
        add, value_dtypes, values: pass three, likewise.
        copies: parts of the buffers that had to be copied, which are read by their addresses.
    """

    rows: int
    kept: tuple[int, int]
    window: int | None
    factor: float
    cap: float
    exact_factor: Tensor | None
    value_tolerance: float
    score: threads.Kernel
    key_dtypes: tuple
    keys: tuple
    is_rotated: bool
    add: threads.Kernel
    value_dtypes: tuple
    values: tuple
    copies: list[Tensor]

    @classmethod
    def of(
        cls, q: Tensor, kv: KVView, mask: Mask, scores: ScoreRules, value_tolerance: float, topk_query: int | None
    ) -> Prepared:
        """For `decode` with these arguments."""
        codes, copies = kv.codes, list[Tensor]()
        cap = 0.0 if scores.softcap is None else scores.softcap * LOG2_E
        factor = scores.scale * LOG2_E if scores.softcap is None else scores.scale / scores.softcap
        if isinstance(codes, FeatureCodes):
            score, key_dtypes, parts = keys.score_features, (codes.values.dtype,), _features(codes, copies)
        else:
            score, parts = keys.score_levels, _levels(codes, copies)
            key_dtypes = (parts[0].dtype,)
        is_rotated = isinstance(codes, NarrowRows) and codes.is_rotated
        return cls(
            q.shape[1] // kv.v.shape[1] * q.shape[2], (topk_query or 0, kv.key_budget[1]), mask.window, factor, cap, scores.exact_factor,
            float(value_tolerance), score, key_dtypes, parts, is_rotated, *_values(kv, copies), copies,
        )  # fmt: skip

    def attend(
        self, q: Tensor, kv: KVView, padding: Tensor | None, kv_lens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `decode`, for such queries and a view of these buffers."""
        batch, kv_heads, n, value_dim = kv.v.shape
        rows, cap, heads, m = self.rows, self.cap, batch * kv_heads, q.shape[2]
        held: list[Tensor] = []
        exact = _exact(kv, q, held)
        seen = _seen(batch, m, kv_heads, n, exact[2:], padding, kv_lens, self.window)
        weights = np.empty((heads, rows, n), np.float32)
        lse, cuts, masses = np.empty((3, heads, rows), np.float32)
        sums, out = np.empty((2, heads, rows, value_dim), np.float32)
        whole = coded = np.empty((heads, rows, q.shape[3]), np.float32)
        if self.kept[0]:
            coded = np.empty_like(whole)
        with threads.ready():
            lay_out((q.dtype,), like(q.dtype), book(held, q)[0], kv_heads, m, self.factor, *self.kept, whole, coded)
            if self.is_rotated:
                coded = rotate(torch.from_numpy(coded)).numpy()
            self.score(self.key_dtypes, coded, *self.keys, *seen, cap, weights)
            exact_q = whole if self.exact_factor is None else _times(whole, self.exact_factor)
            weigh((q.dtype,), exact_q, *exact, *seen, cap, self.value_tolerance, weights, lse, cuts, sums, masses)
            self.add(self.value_dtypes, weights, cuts, *seen, *self.values, sums, masses, out)
        del held  # what kernels read by its address was kept until here
        shape = (batch, q.shape[1], m)
        return torch.from_numpy(out).view(*shape, value_dim).to(q.dtype), torch.from_numpy(lse).view(shape)

    def attend_again(self, q: Tensor, kv: KVView, padding: Tensor | None) -> Tensor:
        """The output alone, recorded for `explain()`."""
        out, _ = self.attend(q, kv, padding)
        record.record("decode", "numba", threads.manner())
        return out


def _seen(
    batch: int,
    m: int,
    kv_heads: int,
    coded: int,
    exact: tuple[int, int],
    padding: Tensor | None,
    kv_lens: Tensor | None,
    window: int | None,
) -> tuple:
    """Which of all tokens, `exact` ones before and after the coded ones, the queries see: the fields of `parts.Seen`."""
    n = exact[0] + coded + exact[1]
    hidden = np.zeros((batch, 0), np.bool_) if padding is None else padding.contiguous().numpy()
    if kv_lens is None and window is None and m == 1:  # the usual step, at less than the general rule costs
        first = np.zeros((batch, 1), np.int64)
        last = first + n
    else:
        lengths = np.full(batch, n) if kv_lens is None else kv_lens.numpy().astype(np.int64)
        last = lengths[:, None] - m + np.arange(1, m + 1)  # [B, M]
        first = np.zeros_like(last) if window is None else last - window
        first, last = first.clip(0, n), last.clip(0, n)
    return first, last, hidden, kv_heads, exact[0], coded


def _features(codes: FeatureCodes, held: list[Tensor]) -> tuple:
    at = book(held, codes.values, codes.indices, codes.dense, codes.scale)
    return like(codes.values.dtype), at, codes.topk, codes.dense_dims


def _levels(codes: NarrowCodes | NarrowRows | AxisCodes, held: list[Tensor]) -> tuple:
    no_entries = (0, 0, keys.NO_INDICES, 0, 0, 0)
    if isinstance(codes, AxisCodes):
        layout, axes = codes.axes.layout, codes.axes
        tables = (layout.byte, layout.shift, axes.bits, axes.step, axes.centre)
        at = book(held, codes.packed, *[None] * 5)
        return _scale_like(None), at, axes.key_bytes, *(x.numpy() for x in tables), False, *no_entries
    if isinstance(codes, NarrowRows):
        at = book(held, codes.kept.view(torch.uint8), codes.scale, codes.centre, *[None] * 3)
        return (
            _scale_like(codes.scale),
            at,
            codes.kept.shape[3],
            *_row_fields(codes.width, codes.bits),
            codes.bits == 8,
            *no_entries,
        )
    dense, values = codes.dense.view(torch.uint8), codes.values.view(torch.uint8)
    at = book(held, dense, codes.dense_scale, None, values, codes.indices, codes.value_scale)
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


def _values(kv: KVView, copies: list[Tensor]) -> tuple[threads.Kernel, tuple, tuple]:
    """Pass three over these values, the dtypes that it is compiled for, and what it takes of them."""
    if isinstance(kv.v, NarrowRows) and kv.v.is_rotated:
        at, block = book(copies, kv.v.kept, kv.v.scale, kv.v.centre), kv.v.width & -kv.v.width
        return sum_levels, (), (at, kv.v.bits, block)
    v, scale = (kv.v, kv.v_scale) if isinstance(kv.v, Tensor) else (kv.v.kept, kv.v.scale)
    return sum_rows, (v.dtype,), (like(v.dtype), book(copies, v, scale))


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
    first, recent = kv.first, kv.recent
    if first is None and recent is None:
        return like(q.dtype), _NO_EXACT, 0, 0
    oldest, newest = ((None, None) if part is None else (part.k, part.v) for part in (first, recent))
    counts = (0 if k is None else k.shape[2] for k, _ in (oldest, newest))
    return like(q.dtype), book(held, *oldest, *newest), *counts


_NO_EXACT = book([], None, None, None, None)


def _times(q: np.ndarray, factor: Tensor) -> np.ndarray:
    """q [B·Hkv, R, D] times the factor [Hkv, D]."""
    grouped = q.reshape(-1, len(factor), *q.shape[1:])
    return (grouped * factor.numpy()[:, None]).reshape(q.shape)


def _scale_like(scale: Tensor | None) -> np.ndarray:
    return like(torch.bfloat16 if scale is None else scale.dtype)

"""Decode in plain PyTorch, for every device and dtype: the meaning that the fused backends share.

Scores come block by block from the codes, the softmax is exact, and V is read once, or with a tolerance only in the
rows that carry weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...axes import AxisCodes
from ...checks import has_values
from ...codes import FeatureCodes, topk_codes
from ...mask import Mask
from ...narrow import NarrowRows
from ...rotation import rotate
from ...scores import ScoreRules
from ...stored import KeyCodes, KVView

_BLOCK_KEYS = 2048  # keys a block: its gathered features stay in the CPU's cache


def decode(
    q: Tensor, kv: KVView, mask: Mask, scores: ScoreRules, value_tolerance: float, topk_query: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of the last M tokens over coded keys, without sinks.

    Args:
        q: [B, Hq, M, D] queries.
        kv: stored keys and values.
        mask: causal; window, padding and the lengths of the sequences.
        value_tolerance: share of each query's weight whose V rows may be left out.
        topk_query: features of a query to keep beside the dense channel; None for q as it is.

    Returns:
        out [B, Hq, M, Dv] in q's dtype and lse [B, Hq, M] float32 (float64 for float64).
    """
    if topk_query is not None:
        q = topk_codes(q, topk_query, dense_dims=kv.key_budget[1]).to_dense()
    kv = kv.contiguous_pages().scaled(torch.float32)  # what is packed becomes floats a block at a time
    grouped = _grouped(q, kv.v)
    grouped = grouped + (grouped * 0).sum(-1, keepdim=True)  # NaN shows in every score, as in a dense product
    s = scores.cap(scores.scale * _products(grouped, kv.codes))  # [B, Hkv, G·M, N]
    m = q.shape[2]
    visible = None if mask.shows_all(m) else mask.to_bool(m, kv.v.shape[2], q.device)[:, 0]
    return _weigh(q, s, kv.v, visible, value_tolerance)


def decode_exact(q: Tensor, kv: KVView, mask: Mask, scores: ScoreRules) -> tuple[Tensor, Tensor]:
    """Attention of the last M tokens over the exact tokens of a view, with all of q. Arguments and results as `decode`'s; `mask` is that
    of all tokens of the view."""
    exact = kv.all_exact()
    assert exact.positions is not None
    grouped = _grouped(scores.exact_queries(q), exact.v)
    s = scores.cap(scores.scale * (grouped @ exact.k.to(grouped.dtype).mT))  # [B, Hkv, G·M, E]
    visible = None
    if kv.is_placed or not mask.shows_all(q.shape[2]):
        visible = mask.sees(exact.positions, q.shape[2], kv.n)[:, 0]  # [B or 1, M, E]
    return _weigh(q, s, exact.v, visible, 0.0)


def _grouped(q: Tensor, v: Tensor | NarrowRows) -> Tensor:
    """q [B, Hq, M, D] as [B, Hkv, G·M, D], in the dtype to compute in: the query heads of a kv head and its M tokens are the rows of
    one small matrix."""
    return q.unflatten(1, (v.shape[1], -1)).flatten(2, 3).to(_compute_dtype(q.dtype))


def _weigh(
    q: Tensor, s: Tensor, v: Tensor | NarrowRows, visible: Tensor | None, value_tolerance: float
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, M, Dv] in q's dtype and lse [B, Hq, M] of scores s [B, Hkv, G·M, N], of which `visible` [B or 1, M, N] count."""
    m, group = q.shape[2], q.shape[1] // v.shape[1]
    if visible is not None:
        seen = visible.any(1)[:, None]  # [B or 1, 1, N]
        if not has_values(seen) or not bool(seen.all()):
            # weight 0 times whatever an unfilled buffer holds must be 0, NaN included
            v = v.where(seen) if isinstance(v, NarrowRows) else v.where(seen[..., None], 0)
        s = s.masked_fill(~visible.repeat(1, group, 1)[:, None], -math.inf)  # rows run over G, then M
    lse = s.logsumexp(-1)  # [B, Hkv, G·M]
    weights = (s - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).exp_()
    out = _weigh_some(weights, v, value_tolerance) if value_tolerance > 0 else _weigh_all(weights, v)
    if isinstance(v, NarrowRows) and v.is_rotated:
        out = rotate(out)
    out = out.unflatten(2, (group, m)).flatten(1, 2).to(q.dtype)  # [B, Hq, M, Dv]
    return out, lse.unflatten(2, (group, m)).flatten(1, 2)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _products(q: Tensor, codes: KeyCodes) -> Tensor:
    """Products [B, Hkv, R, N] of q [B, Hkv, R, D] over coded keys, which become floats a block at a time."""
    if isinstance(codes, NarrowRows) and codes.is_rotated:
        q = rotate(q)
    scores = q.new_empty((*q.shape[:3], codes.shape[2]))
    for keys in _blocks(scores.shape[-1]):
        block: KeyCodes = codes[:, :, keys]
        if isinstance(block, NarrowRows):
            scores[..., keys] = q @ block.rows(q.dtype).mT
        elif isinstance(block, AxisCodes):
            scores[..., keys] = q @ block.to_dense(q.dtype).mT
        else:
            scores[..., keys] = _gathered(q, block if isinstance(block, FeatureCodes) else block.to_codes(q.dtype))
    return scores


def _gathered(q: Tensor, codes: FeatureCodes) -> Tensor:
    """Products [B, Hkv, R, n] of q [B, Hkv, R, D] over a block of codes, gathered feature by feature."""
    q_dense, q_sparse = q[..., : codes.dense_dims], q[..., codes.dense_dims :]
    # an unfilled buffer may hold any index; its scores are masked
    where = codes.indices.long().clamp(max=codes.sparse_dims - 1)
    where = where.flatten(2)[:, :, None].expand(-1, -1, q.shape[2], -1)  # [B, Hkv, R, n·K]
    shared = q_sparse.gather(-1, where).unflatten(-1, (-1, codes.topk))  # [B, Hkv, R, n, K]
    values = codes.values.to(q.dtype)[..., None]  # [B, Hkv, n, K, 1]
    products = (shared.transpose(2, 3) @ values).squeeze(-1).mT  # [B, Hkv, R, n]
    return products + q_dense @ codes.dense.to(q.dtype).mT if codes.dense_dims else products


def _blocks(n: int) -> list[slice]:
    """The keys 0 to n in blocks; in one where a graph is compiled, which a loop would bind to one n."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    return [slice(start, start + _BLOCK_KEYS) for start in range(0, n, _BLOCK_KEYS)]


def _weigh_all(weights: Tensor, v: Tensor | NarrowRows) -> Tensor:
    """weights [B, Hkv, R, N] times v [B, Hkv, N, Dv], in the dtype of the weights."""
    if isinstance(v, Tensor) and v.dtype == weights.dtype:
        return weights @ v
    out = weights.new_zeros((*weights.shape[:3], v.shape[-1]))
    for keys in _blocks(v.shape[2]):  # widen V a block at a time, never whole
        out += weights[..., keys] @ _rows(v[:, :, keys], weights.dtype)
    return out


def _weigh_some(weights: Tensor, v: Tensor | NarrowRows, tolerance: float) -> Tensor:
    """As `_weigh_all`, with the rows of V alone that `needed_rows` names. The rest is renormalised: dropping a share t moves the
    output by at most 2·t·max‖v‖."""
    needed = needed_rows(weights, tolerance)  # [B, Hkv, N]
    out = weights.new_zeros((*weights.shape[:3], v.shape[-1]))
    for b in range(v.shape[0]):
        for h in range(v.shape[1]):
            rows = needed[b, h].nonzero()[:, 0]
            kept = weights[b, h][:, rows]  # [R, n]
            total = kept.sum(-1, keepdim=True)
            out[b, h] = (kept / total.where(total > 0, 1)) @ _rows(v[b, h][rows], weights.dtype)
    return out


def needed_rows(weights: Tensor, tolerance: float) -> Tensor:
    """Which rows of V [..., N] queries that share them read, for their weights [..., R, N]: all but the lightest that sum to at most
    `tolerance` for every one of them."""
    ascending, order = weights.sort(-1)
    light = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, ascending.cumsum(-1) <= tolerance)
    return ~light.all(-2)


def _rows(v: Tensor | NarrowRows, dtype: torch.dtype) -> Tensor:
    return v.rows(dtype) if isinstance(v, NarrowRows) else v.to(dtype)

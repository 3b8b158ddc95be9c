"""Decode in plain PyTorch, for every device and dtype: the meaning that the fused backends share.

Scores come block by block from the codes, the softmax is exact, and V is read once, or with a tolerance only in the
rows that carry weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks import has_values
from ...codes import FeatureCodes, topk_codes

_BLOCK_KEYS = 2048  # keys a block: its gathered features stay in the CPU's cache


@dataclass(frozen=True)
class DecodeRules:
    """Where a sequence's keys are and which of them its M queries see; causality is always on.

    Attributes:
        kv_lens: [B] integer number of valid keys; all N when None.
        window: only the `window` most recent keys of each query.
        key_padding_mask: [B, N] bool, True where a key is padding.
        page_table: [B, max_pages] int32. Codes and v are then pools of pages [P, Hkv, page_size, ...], and key j
            of sequence b is slot j % page_size of page `page_table[b, j // page_size]`.
    """

    kv_lens: Tensor | None = None
    window: int | None = None
    key_padding_mask: Tensor | None = None
    page_table: Tensor | None = None

    def visible(self, m: int, n: int, device: torch.device) -> Tensor | None:
        """[B or 1, M, N] bool, or None when every query sees every key."""
        if self.kv_lens is None and self.window is None and self.key_padding_mask is None and m == 1:
            return None
        lengths = torch.tensor([n], device=device) if self.kv_lens is None else self.kv_lens.clamp(max=n)  # [B or 1]
        position = lengths[:, None, None] - m + torch.arange(m, device=device)[:, None]  # [B or 1, M, 1]
        key = torch.arange(n, device=device)
        visible = key <= position
        if self.window is not None:
            visible = visible & (key > position - min(self.window, m + n))  # no wider one hides less
        if self.key_padding_mask is not None:
            visible = visible & ~self.key_padding_mask[:, None]
        return visible


def decode(
    q: Tensor,
    codes: FeatureCodes,
    v: Tensor,
    rules: DecodeRules,
    scale: float,
    value_tolerance: float,
    *,
    topk_query: int | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the last M tokens over coded keys.

    Args:
        q: [B, Hq, M, D] queries.
        codes, v: keys [B, Hkv, N, ...] and values [B, Hkv, N, Dv], or pools of pages (`DecodeRules.page_table`).
        scale: factor of the scores.
        value_tolerance: share of each query's weight whose V rows may be left out.
        topk_query: features of a query to keep beside the dense channel; None for q as it is.
        v_scale: [B, Hkv, N] float32 factor of each row of an 8-bit v, or the pool of them.

    Returns:
        out [B, Hq, M, Dv] in q's dtype and lse [B, Hq, M] float32 (float64 for float64).
    """
    if topk_query is not None:
        q = topk_codes(q, topk_query, dense_dims=codes.dense_dims).to_dense()
    if rules.page_table is not None:
        codes, v, v_scale = _gather_pages(codes, v, v_scale, rules.page_table)
    if codes.scale is not None:
        codes = codes.to(torch.float32)
    if v_scale is not None:
        v = v.float() * v_scale[..., None]
    m, n, group = q.shape[2], v.shape[2], q.shape[1] // v.shape[1]
    # the query heads of a kv head and its M tokens are the rows of one small matrix
    grouped = q.unflatten(1, (v.shape[1], group)).flatten(2, 3)  # [B, Hkv, G·M, D]
    grouped = grouped.to(_compute_dtype(q.dtype))
    grouped = grouped + (grouped * 0).sum(-1, keepdim=True)  # NaN shows in every score, as in a dense product
    scores = scale * _scores(grouped, codes)  # [B, Hkv, G·M, N]
    visible = rules.visible(m, n, q.device)  # [B or 1, M, N]
    if visible is not None:
        seen = visible.any(1)[:, None, :, None]  # [B or 1, 1, N, 1]
        if not has_values(seen) or not bool(seen.all()):
            v = v.where(seen, 0)  # weight 0 times whatever an unfilled buffer holds must be 0, NaN included
        visible = visible.repeat(1, group, 1)[:, None]  # rows run over G, then M
        scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1)  # [B, Hkv, G·M]
    weights = (scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).exp_()
    out = _weigh_some(weights, v, value_tolerance) if value_tolerance > 0 else _weigh_all(weights, v)
    out = out.unflatten(2, (group, m)).flatten(1, 2).to(q.dtype)  # [B, Hq, M, Dv]
    return out, lse.unflatten(2, (group, m)).flatten(1, 2)


def _gather_pages(
    codes: FeatureCodes, v: Tensor, v_scale: Tensor | None, page_table: Tensor
) -> tuple[FeatureCodes, Tensor, Tensor | None]:
    """Pools of pages as contiguous codes, v and its scale [B, Hkv, max_pages * page_size, ...]."""
    pages = page_table.long().clamp(0, v.shape[0] - 1)  # entries past a sequence's length may hold anything

    def gather(pool: Tensor) -> Tensor:
        return pool[pages].transpose(1, 2).flatten(2, 3)  # [B, max_pages, Hkv, page_size, ...] before

    scale = None if codes.scale is None else gather(codes.scale)
    gathered = FeatureCodes(gather(codes.dense), gather(codes.values), gather(codes.indices), codes.head_dim, scale)
    return gathered, gather(v), None if v_scale is None else gather(v_scale)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scores(q: Tensor, codes: FeatureCodes) -> Tensor:
    """Unscaled scores [B, Hkv, R, N] of q [B, Hkv, R, D] over coded keys, gathered feature by feature."""
    split, rows = codes.dense_dims, q.shape[2]
    q_dense, q_sparse = q[..., :split], q[..., split:]
    scores = q.new_empty((*q.shape[:3], codes.values.shape[2]))
    for keys in _blocks(scores.shape[-1]):
        block = codes[:, :, keys]
        # an unfilled buffer may hold any index; its scores are masked
        where = block.indices.long().clamp(max=codes.sparse_dims - 1)
        where = where.flatten(2)[:, :, None].expand(-1, -1, rows, -1)  # [B, Hkv, R, n·K]
        shared = q_sparse.gather(-1, where).unflatten(-1, (-1, codes.topk))  # [B, Hkv, R, n, K]
        values = block.values.to(q.dtype)[..., None]  # [B, Hkv, n, K, 1]
        part = (shared.transpose(2, 3) @ values).squeeze(-1).mT  # [B, Hkv, R, n]
        if split:
            part = part + q_dense @ block.dense.to(q.dtype).mT
        scores[..., keys] = part
    return scores


def _blocks(n: int) -> list[slice]:
    """The keys 0 to n in blocks; in one where a graph is compiled, which a loop would bind to one n."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    return [slice(start, start + _BLOCK_KEYS) for start in range(0, n, _BLOCK_KEYS)]


def _weigh_all(weights: Tensor, v: Tensor) -> Tensor:
    """weights [B, Hkv, R, N] times v [B, Hkv, N, Dv], in the dtype of the weights."""
    if v.dtype == weights.dtype:
        return weights @ v
    out = weights.new_zeros((*weights.shape[:3], v.shape[-1]))
    for keys in _blocks(v.shape[2]):  # widen V a block at a time, never whole
        out += weights[..., keys] @ v[:, :, keys].to(weights.dtype)
    return out


def _weigh_some(weights: Tensor, v: Tensor, tolerance: float) -> Tensor:
    """As `_weigh_all`, leaving out the lightest rows of V whose weights sum to at most `tolerance` for every query
    of the kv head. The rest is renormalised: dropping a share t moves the output by at most 2·t·max‖v‖."""
    ascending, order = weights.sort(-1)  # [B, Hkv, R, N]
    light = torch.empty_like(order, dtype=torch.bool).scatter_(-1, order, ascending.cumsum(-1) <= tolerance)
    needed = ~light.all(2)  # [B, Hkv, N]: the union over the queries of a kv head
    out = weights.new_zeros((*weights.shape[:3], v.shape[-1]))
    for b in range(v.shape[0]):
        for h in range(v.shape[1]):
            rows = needed[b, h].nonzero()[:, 0]
            kept = weights[b, h][:, rows]  # [R, n]
            total = kept.sum(-1, keepdim=True)
            out[b, h] = (kept / total.where(total > 0, 1)) @ v[b, h][rows].to(weights.dtype)
    return out

"""`sparse_feature_decode`: a few queries against cached key codes, reading codes and never dense keys.

The plain PyTorch path: scores come block by block from the codes, the softmax is exact, and V is read once, or
with a tolerance only in the rows that carry weight.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .attention import code_queries, sparse_feature_attention
from .checks import require, require_alike, require_float
from .codes import FeatureCodes
from .kernels import dispatch

_BLOCK_KEYS = 2048  # keys a block: its gathered features stay in the CPU's cache


def sparse_feature_decode(
    q: Tensor,
    codes: FeatureCodes,
    v: Tensor,
    *,
    kv_lens: Tensor | None = None,
    topk_query: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    key_padding_mask: Tensor | None = None,
    value_tolerance: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of the last M tokens over a cache of key codes. No gradients.

    Args:
        q: [B, Hq, M, D] queries of the newest M tokens; the last one stands at the last key.
        codes: key codes [B, Hkv, N, ...], as `SparseKVCache` holds them.
        v: [B, Hkv, N, Dv].
        kv_lens: [B] integer number of valid keys of each sequence, at most N; N for all when None.
        topk_query: kept features of a query: None for the codes' topk, D for dense queries.
        scale: 1/sqrt(D) by default.
        window: see only the `window` most recent keys.
        key_padding_mask: [B, N] bool, True where a key is padding.
        value_tolerance: leave out V rows that carry at most this share of each query's weight, 0 <= τ < 1. The
            output moves by at most 2·τ·max‖v‖. 0 is exact.
        return_lse: also return the log-sum-exp of each query's scores.

    Returns:
        out [B, Hq, M, Dv]; with return_lse also lse [B, Hq, M] float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: inputs that do not fit, before anything is computed.
    """
    _check(q, codes, v, kv_lens, window, key_padding_mask, value_tolerance)
    dispatch.record(
        "decode", "torch", f"plain PyTorch on {q.device.type}: gathers features, {_BLOCK_KEYS} keys a block"
    )
    n, scale = v.shape[2], 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    sparse_q = code_queries(q.detach(), codes.topk, topk_query, codes.dense_dims).to_dense()
    # the query heads of a kv head and its M tokens are the rows of one small matrix
    grouped = sparse_q.unflatten(1, (v.shape[1], -1)).flatten(2, 3)  # [B, Hkv, G·M, D]
    scores = scale * _scores(grouped.to(_compute_dtype(q.dtype)), codes)  # [B, Hkv, G·M, N]
    visible = _visible(q.shape[2], n, kv_lens, window, key_padding_mask, q.device)  # [B or 1, 1, M, N]
    if visible is not None:
        seen = visible.any(2)[..., None]  # [B or 1, 1, N, 1]
        if not bool(seen.all()):
            v = v.where(seen, 0)  # weight 0 times whatever an unfilled buffer holds must be 0, NaN included
        visible = visible.repeat(1, 1, scores.shape[2] // q.shape[2], 1)  # rows run over G, then M
        scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(-1)  # [B, Hkv, G·M]
    weights = (scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).exp_()
    out = _weigh_some(weights, v, value_tolerance) if value_tolerance > 0 else _weigh_all(weights, v)
    out = out.unflatten(2, (-1, q.shape[2])).flatten(1, 2).to(v.dtype)  # [B, Hq, M, Dv]
    lse = lse.unflatten(2, (-1, q.shape[2])).flatten(1, 2)
    return (out, lse) if return_lse else out


_DECODE_QUERIES = 16  # up to here codes are read as they are; more queries repay spreading the keys out once


def attend_cached(
    q: Tensor,
    codes: FeatureCodes,
    v: Tensor,
    *,
    topk_query: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    key_padding_mask: Tensor | None = None,
    value_tolerance: float = 0.0,
) -> Tensor:
    """The newest tokens' q [B, Hq, M, D] over all cached codes and v: decode for few queries, prefill for many.

    `value_tolerance` is a saving of decode; prefill is exact.
    """
    out: Any
    if q.shape[2] <= _DECODE_QUERIES:
        out = sparse_feature_decode(
            q, codes, v, topk_query=topk_query, scale=scale, window=window, key_padding_mask=key_padding_mask,
            value_tolerance=value_tolerance,
        )  # fmt: skip
    else:
        out = sparse_feature_attention(
            q, codes, v, topk_query=topk_query, scale=scale, window=window, key_padding_mask=key_padding_mask,
            is_causal=True,
        )  # fmt: skip
    return out


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scores(q: Tensor, codes: FeatureCodes) -> Tensor:
    """Unscaled scores [B, Hkv, R, N] of q [B, Hkv, R, D] over coded keys, gathered feature by feature."""
    split, rows = codes.dense_dims, q.shape[2]
    q_dense, q_sparse = q[..., :split], q[..., split:]
    scores = q.new_empty((*q.shape[:3], codes.values.shape[2]))
    for start in range(0, scores.shape[-1], _BLOCK_KEYS):
        block = codes[:, :, start : start + _BLOCK_KEYS]
        where = block.indices.long().flatten(2)[:, :, None].expand(-1, -1, rows, -1)  # [B, Hkv, R, n·K]
        shared = q_sparse.gather(-1, where).unflatten(-1, (-1, codes.topk))  # [B, Hkv, R, n, K]
        values = block.values.to(q.dtype)[..., None]  # [B, Hkv, n, K, 1]
        part = (shared.transpose(2, 3) @ values).squeeze(-1).mT  # [B, Hkv, R, n]
        if split:
            part = part + q_dense @ block.dense.to(q.dtype).mT
        scores[..., start : start + _BLOCK_KEYS] = part
    return scores


def _visible(
    m: int, n: int, kv_lens: Tensor | None, window: int | None, padding: Tensor | None, device: torch.device
) -> Tensor | None:
    """[B or 1, 1, M, N] bool, or None when every query sees every key."""
    if kv_lens is None and window is None and padding is None and m == 1:
        return None
    lengths = torch.tensor([n], device=device) if kv_lens is None else kv_lens.to(device)  # [B or 1]
    position = lengths[:, None, None] - m + torch.arange(m, device=device)[:, None]  # [B or 1, M, 1]
    key = torch.arange(n, device=device)
    visible = key <= position
    if window is not None:
        visible = visible & (key > position - window)
    if padding is not None:
        visible = visible & ~padding[:, None]
    return visible[:, None]


def _weigh_all(weights: Tensor, v: Tensor) -> Tensor:
    """weights [B, Hkv, R, N] times v [B, Hkv, N, Dv], in the dtype of the weights."""
    if v.dtype == weights.dtype:
        return weights @ v
    out = weights.new_zeros((*weights.shape[:3], v.shape[-1]))
    for start in range(0, v.shape[2], _BLOCK_KEYS):  # widen V a block at a time, never whole
        keys = slice(start, start + _BLOCK_KEYS)
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


def _check(
    q: Tensor,
    codes: FeatureCodes,
    v: Tensor,
    kv_lens: Tensor | None,
    window: int | None,
    key_padding_mask: Tensor | None,
    value_tolerance: float,
) -> None:
    require(
        isinstance(codes, FeatureCodes),
        f"codes must be FeatureCodes, got {type(codes).__name__}; see topk_codes",
    )
    for name, x in (("q", q), ("codes", codes.values), ("v", v)):
        require_float(name, x)
        require(x.ndim == 4, f"{name} must be [B, H, N, D], got shape {tuple(x.shape)}")
    require_alike(q=q, codes=codes.values, v=v)
    require(q.shape[-1] == codes.head_dim, f"q has head_dim {q.shape[-1]}, the codes {codes.head_dim}")
    require(
        codes.values.shape[:3] == v.shape[:3] and q.shape[0] == v.shape[0],
        f"codes {tuple(codes.values.shape[:3])}, v {tuple(v.shape[:3])} and q's batch {q.shape[0]} must agree on [B, Hkv, N]",
    )
    require(
        v.shape[1] > 0 and q.shape[1] % v.shape[1] == 0,
        f"query heads must be a multiple of kv heads, got {q.shape[1]} and {v.shape[1]}",
    )
    require(window is None or window >= 1, f"window must be at least 1 or None, got {window}")
    require(0 <= value_tolerance < 1, f"value_tolerance must be in [0, 1), got {value_tolerance}")
    if key_padding_mask is not None:
        require(
            key_padding_mask.dtype == torch.bool and key_padding_mask.shape == (q.shape[0], v.shape[2]),
            f"key_padding_mask must be bool [B, N] = [{q.shape[0]}, {v.shape[2]}], True where a key is padding; "
            f"got {key_padding_mask.dtype} {tuple(key_padding_mask.shape)}",
        )
    if kv_lens is not None:
        require(
            kv_lens.shape == (q.shape[0],) and not kv_lens.is_floating_point(),
            f"kv_lens must be [B] = [{q.shape[0]}] integers, got {kv_lens.dtype} {tuple(kv_lens.shape)}",
        )
        if kv_lens.device.type == "cpu":
            require(
                bool((kv_lens >= 0).all()) and bool((kv_lens <= v.shape[2]).all()),
                f"kv_lens must be 0 to the {v.shape[2]} keys held, got {kv_lens.tolist()}",
            )
    codes.check_indices()

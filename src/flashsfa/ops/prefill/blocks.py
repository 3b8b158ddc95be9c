"""Attention in plain PyTorch, a block of queries at a time: for what no fused kernel takes, on every device and dtype.

A block's scores are built in full, in float32 (float64 for float64 inputs): memory grows with the keys, not with their square.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...mask import Mask
from ...scores import ScoreRules
from ..select.plain import empty_rows

_SCORES = 1 << 24  # entries of a block of scores: 64 MB in float32


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scores: ScoreRules) -> tuple[Tensor, Tensor]:
    """Attention of q [B, Hq, N_q, D], k [B, Hkv, N_k, D], v [B, Hkv, N_k, Dv] without sinks: out [B, Hq, N_q, Dv] in v's dtype and
    lse [B, Hq, N_q] in `lse_dtype`. Queries that see nothing: 0 and -inf."""
    out = empty_rows(q, v.shape[-1]).zero_()
    lse = torch.full(q.shape[:-1], -math.inf, dtype=lse_dtype(v.dtype), device=q.device)
    queries, keys, values = _grouped(q, k, lse.dtype), k.to(lse.dtype), v.to(lse.dtype)
    for rows, cols, visible in _blocks(mask, q, k.shape[2]):
        s, value = _scores(queries[..., rows, :], keys[..., cols, :], values[..., cols, :], visible, scores)
        total = s.logsumexp(-1)  # [B, Hkv, G, R]
        finite = total.clamp(min=torch.finfo(total.dtype).min)  # a row that sees no key gets weights exp(-inf) = 0
        out[..., rows, :] = ((s - finite[..., None]).exp() @ value[:, :, None]).flatten(1, 2).to(out.dtype)
        lse[..., rows] = total.flatten(1, 2)
    return out, lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, scores: ScoreRules
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given the output and the log-sum-exp of `forward`, or both with sinks."""
    queries, keys, values, grads = (
        x.to(lse.dtype) for x in (_grouped(q, k, lse.dtype), k, v, _grouped(grad_out, k, lse.dtype))
    )
    delta = (grads * _grouped(out, k, lse.dtype)).sum(-1)  # [B, Hkv, G, N_q]
    lse = _grouped(lse[..., None], k, lse.dtype)[..., 0]
    dq, dk, dv = torch.zeros_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
    for rows, cols, visible in _blocks(mask, q, k.shape[2]):
        query, key, grad = queries[..., rows, :], keys[..., cols, :], grads[..., rows, :]
        s, value = _scores(query, key, values[..., cols, :], visible, scores)
        finite = lse[..., rows, None].clamp(min=torch.finfo(lse.dtype).min)
        weights = (s - finite).exp()  # [B, Hkv, G, R, C]
        dv[..., cols, :] += (weights.mT @ grad).sum(2)
        ds = weights * (grad @ value[:, :, None].mT - delta[..., rows, None])
        ds = scores.scale * ds * scores.slope(s.masked_fill(weights == 0, 0))
        dq[..., rows, :] += ds @ key[:, :, None]
        dk[..., cols, :] += (ds.mT @ query).sum(2)
    return dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a log-sum-exp over inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _grouped(x: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """x [B, Hq, N, ...] as [B, Hkv, G, N, ...]: the query heads of a kv head side by side."""
    return x.unflatten(1, (k.shape[1], -1)).to(dtype)


def _scores(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scores: ScoreRules) -> tuple[Tensor, Tensor]:
    """Scores [B, Hkv, G, R, C] of a block, -inf where invisible [B or 1, R, C], and its values, zero where nobody sees them: weight 0
    times NaN is NaN."""
    unseen = ~visible.any(-2)[:, None, :, None]  # [B or 1, 1, C, 1]
    k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
    s = scores.cap(scores.scale * (q @ k[:, :, None].mT))
    return s.masked_fill(~visible[:, None, None], -math.inf), v


def _blocks(mask: Mask, q: Tensor, n_k: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Query rows, keys that any of them sees, and which see which [B or 1, R, C]."""
    batch, heads, n_q, _ = q.shape
    for rows, keys in mask.segments(n_q, n_k):
        start, end = mask.key_ranges(rows.stop - rows.start, keys.stop - keys.start, q.device)  # [n], [n]
        step = max(1, _SCORES // max(1, batch * heads * (keys.stop - keys.start)))
        for first in range(0, rows.stop - rows.start, step):
            block = slice(first, min(first + step, rows.stop - rows.start))
            low, high = int(start[block].min()), int(end[block].max())
            if high <= low:
                continue
            key = torch.arange(low, high, device=q.device)
            visible = ((key >= start[block, None]) & (key < end[block, None]))[None]  # [1, R, C]
            if mask.key_padding_mask is not None:
                visible = visible & ~mask.key_padding_mask[:, None, low + keys.start : high + keys.start]
            yield (
                slice(rows.start + block.start, rows.start + block.stop),
                slice(keys.start + low, keys.start + high),
                visible,
            )

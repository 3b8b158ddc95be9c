"""Attention of a whole text as decode sees it, where caches keep the newest and the first tokens as they came.

Row i sees the `recent` newest tokens, its own included, and the `first` ones exactly, and codes of the others: what one token at a
time sees through a cache. In plain PyTorch, a block of queries at a time, and differentiable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...budget import FeatureBudget
from ...codes import code_queries, quantize_rows, topk_codes
from ...contexts import without_autocast
from ...mask import Mask
from ...scores import ScoreRules
from .. import record
from .blocks import lse_dtype

_ROWS = 256  # queries a block


def attend(
    q: Tensor, k: Tensor, exact_k: Tensor, v: Tensor, budget: FeatureBudget, mask: Mask, scores: ScoreRules, *,
    recent: int, first: int, is_8_bit: bool,
) -> Tensor:  # fmt: skip
    """out [B, Hq, N_q, Dv] of q [B, Hq, N_q, D], k [B, Hkv, N_k, D] and v [B, Hkv, N_k, Dv], none of them coded yet; `exact_k` are the keys
    as they score where they are exact. `mask` is causal;
    nothing is packed. With `is_8_bit` codes and their values are rounded as an 8-bit cache rounds them, straight through for
    gradients."""
    record.record(
        "attention", "torch", "tokens that caches keep as they came: scores are built in blocks", fallback=True
    )
    with without_autocast(q.device):
        dtype, n_q, n_k, group = lse_dtype(v.dtype), q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
        thin_q = code_queries(q, budget).to_dense()
        codes = topk_codes(k, budget.topk, dense_dims=budget.dense_dims)
        thin_k, thin_v = codes.to_dense(), v
        if is_8_bit:
            kept, v_scale = quantize_rows(v.detach())
            thin_k = thin_k + (codes.map(torch.detach).quantize().to_dense().to(dtype) - thin_k.detach())
            thin_v = v + (kept.to(dtype) * v_scale[..., None] - v.detach())
        visible = mask.to_bool(n_q, n_k, q.device)  # [B or 1, 1, N_q, N_k]
        seen = visible.any(-2)[..., None]  # [B or 1, 1, N_k, 1]
        # weight 0 times NaN is NaN
        keys, thin_keys, values, thin_values = (
            x.to(dtype).where(seen, 0).repeat_interleave(group, 1) for x in (exact_k, thin_k, v, thin_v)
        )
        key = torch.arange(n_k, device=q.device)
        out = []
        for start in range(0, n_q, _ROWS):
            rows = slice(start, start + _ROWS)
            position = torch.arange(n_k - n_q, n_k, device=q.device)[rows, None]
            exact = (key < first) | (key > position - recent)  # [R, N_k]
            s = (q[:, :, rows].to(dtype) @ keys.mT).where(exact, thin_q[:, :, rows].to(dtype) @ thin_keys.mT)
            s = scores.cap(scores.scale * s).masked_fill(~visible[..., rows, :], -math.inf)
            lse = s.logsumexp(-1).clamp(min=torch.finfo(dtype).min)  # a row that sees no key gets weights exp(-inf) = 0
            weights = (s - lse[..., None]).exp()
            part = weights.where(exact, 0) @ values + weights.masked_fill(exact, 0) @ thin_values
            out.append(scores.with_sinks(part, lse)[0].to(v.dtype))
        return torch.cat(out, dim=2) if out else q.new_zeros((*q.shape[:3], v.shape[-1]))

"""Attention of a whole text as decode sees it, where caches keep the newest and the first tokens as they came.

Row i sees the `recent` newest tokens, its own included, and the `first` ones exactly, and codes of the others: what one token at a
time sees through a cache. In plain PyTorch, a block of queries at a time, and differentiable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...budget import FeatureBudget
from ...codes import code_queries
from ...contexts import without_autocast
from ...mask import Mask
from ...scores import ScoreRules
from ...stored import ExactKV
from .. import record
from .blocks import lse_dtype

_ROWS = 256  # queries a block


def attend(
    q: Tensor,
    exact: ExactKV,
    coded: ExactKV,
    budget: FeatureBudget,
    mask: Mask,
    scores: ScoreRules,
    *,
    recent: int,
    first: int,
) -> Tensor:
    """out [B, Hq, N_q, Dv] of q [B, Hq, N_q, D], not coded yet, over keys [B, Hkv, N_k, D] and values [B, Hkv, N_k, Dv]: as they came
    where they are `exact`, and as a cache reads them where they are `coded`. `mask` is causal; nothing is packed."""
    record.record(
        "attention", "torch", "tokens that caches keep as they came: scores are built in blocks", fallback=True
    )
    with without_autocast(q.device):
        dtype, n_q, n_k, group = lse_dtype(exact.v.dtype), q.shape[2], exact.k.shape[2], q.shape[1] // exact.k.shape[1]
        thin_q = code_queries(q, budget).to_dense()
        visible = mask.to_bool(n_q, n_k, q.device)  # [B or 1, 1, N_q, N_k]
        seen = visible.any(-2)[..., None]  # [B or 1, 1, N_k, 1]
        # weight 0 times NaN is NaN
        keys, thin_keys, values, thin_values = (
            x.to(dtype).where(seen, 0).repeat_interleave(group, 1) for x in (exact.k, coded.k, exact.v, coded.v)
        )
        out = []
        for start in range(0, n_q, _ROWS):
            rows, end = slice(start, start + _ROWS), min(start + _ROWS, n_q) + n_k - n_q
            # The rows see the keys before `end`: those of `head` exactly, those of `middle` coded, and of `band` some so, some so.
            position = torch.arange(start + n_k - n_q, end, device=q.device)[:, None]
            low = min(first, end)
            high = max(low, start + n_k - n_q - recent + 1)
            head, middle, band = slice(0, low), slice(low, high), slice(high, end)
            is_exact = torch.arange(high, end, device=q.device) > position - recent  # [R, keys of the band]
            own, thin = scores.exact_queries(q[:, :, rows].to(dtype)), thin_q[:, :, rows].to(dtype)
            s = torch.cat(
                (
                    own @ keys[:, :, head].mT,
                    thin @ thin_keys[:, :, middle].mT,
                    (own @ keys[:, :, band].mT).where(is_exact, thin @ thin_keys[:, :, band].mT),
                ),
                dim=-1,
            )
            s = scores.cap(scores.scale * s).masked_fill(~visible[..., rows, :end], -math.inf)
            lse = s.logsumexp(-1).clamp(min=torch.finfo(dtype).min)  # a row that sees no key gets weights exp(-inf) = 0
            weights = (s - lse[..., None]).exp()
            in_band = weights[..., band]
            part = weights[..., head] @ values[:, :, head] + weights[..., middle] @ thin_values[:, :, middle]
            part = part + in_band.where(is_exact, 0) @ values[:, :, band]
            part = part + in_band.masked_fill(is_exact, 0) @ thin_values[:, :, band]
            out.append(scores.with_sinks(part, lse)[0].to(exact.v.dtype))
        return torch.cat(out, dim=2) if out else q.new_zeros((*q.shape[:3], exact.v.shape[-1]))

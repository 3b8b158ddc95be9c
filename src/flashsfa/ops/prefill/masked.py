"""Attention under a mask that is given key by key, where none of the rules of `Mask` tells it: images whose tokens see one another both
ways, chunks, packed texts in a batch.

In plain PyTorch, a block of queries at a time, and differentiable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...budget import FeatureBudget
from ...codes import code_queries
from ...contexts import without_autocast
from ...scores import ScoreRules
from ...stored import KVView
from .. import record
from .blocks import lse_dtype

_ROWS = 256  # queries a block


def attend(q: Tensor, kv: KVView, budget: FeatureBudget, visible: Tensor, scores: ScoreRules) -> Tensor:
    """out [B, Hq, N_q, Dv] in the dtype of q [B, Hq, N_q, D], not coded yet, over the N_k keys of a view, in whatever form it holds
    them. `visible` [B or 1, 1, N_q, N_k] bool is the whole mask: lengths of the view hide nothing more."""
    record.record("attention", "torch", "a mask of its own: scores are built in blocks", fallback=True)
    with without_autocast(q.device):
        dtype, n_q = lse_dtype(q.dtype), q.shape[2]
        rows, thin_q = kv.rows(dtype), code_queries(q, budget).to_dense()
        is_exact = kv.is_exact()[:, None, None] if kv.exact else None  # [B or 1, 1, 1, N_k]
        seen = visible.any(-2)[..., None]  # [B or 1, 1, N_k, 1]
        group = q.shape[1] // rows.k.shape[1]
        # weight 0 times NaN is NaN
        keys, values = (x.to(dtype).where(seen, 0).repeat_interleave(group, 1) for x in (rows.k, rows.v))
        out = []
        for start in range(0, n_q, _ROWS):
            block = slice(start, start + _ROWS)
            s = thin_q[:, :, block].to(dtype) @ keys.mT
            if is_exact is not None:
                s = (scores.exact_queries(q[:, :, block].to(dtype)) @ keys.mT).where(is_exact, s)
            s = scores.cap(scores.scale * s).masked_fill(~visible[..., block, :], -math.inf)
            lse = s.logsumexp(-1).clamp(min=torch.finfo(dtype).min)  # a row that sees no key gets weights exp(-inf) = 0
            out.append(scores.with_sinks((s - lse[..., None]).exp() @ values, lse)[0].to(q.dtype))
        return torch.cat(out, dim=2) if out else q.new_zeros((*q.shape[:3], rows.v.shape[-1]))

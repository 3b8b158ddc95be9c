"""The exact operator in plain PyTorch: the one truth for tests, documentation and benchmarks.

Written to be read, in any float dtype up to fp64, with the N x N score matrix in full. Nothing here is fast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .budget import FeatureBudget
from .mask import Mask
from .scores import ScoreRules


def topk_rows(x: Tensor, topk: int, *, dense_dims: int = 0, pattern: str | None = None) -> Tensor:
    """x [..., D] with zeros in place of all but its first `dense_dims` entries and the `topk` largest magnitudes
    of the rest, ties to the lowest index (paper, Eq. 3); with `pattern` "2:4" of those that are among the two largest
    of their aligned group of four."""
    rest = x[..., dense_dims:]
    magnitude = rest.detach().abs().masked_fill(rest.isnan(), math.nan)  # CUDA's abs and sort keep a NaN's sign
    if pattern == "2:4":
        of_four = magnitude.unflatten(-1, (-1, 4)).sort(dim=-1, descending=True, stable=True).indices[..., 2:]
        left_out = (
            torch.zeros_like(magnitude, dtype=torch.bool).unflatten(-1, (-1, 4)).scatter(-1, of_four, True).flatten(-2)
        )
        magnitude = magnitude.masked_fill(left_out, -1)  # behind zeros that may be kept
        rest = rest.masked_fill(left_out, 0)
    order = magnitude.sort(dim=-1, descending=True, stable=True).indices[..., :topk]
    kept = torch.zeros_like(rest).scatter(-1, order, rest.gather(-1, order))
    return torch.cat((x[..., :dense_dims], kept), dim=-1)


def sparse_rows(
    x: Tensor, topk: int, *, dense_dims: int = 0, pattern: str | None = None, gradient: str = "kept"
) -> Tensor:
    """`topk_rows` by the operator's rules: a `topk` of D keeps all, and a `gradient` of "all" goes straight through."""
    if topk == x.shape[-1] and pattern is None:
        return x
    rows = topk_rows(x, topk, dense_dims=dense_dims, pattern=pattern)
    return rows if gradient == "kept" else rows.detach() + (x - x.detach())


def code_rows(dense: Tensor, values: Tensor, indices: Tensor, head_dim: int) -> Tensor:
    """The rows [..., D] of a code: its dense channel [..., M], and `values` [..., K] at `indices` of the rest."""
    rest = values.new_zeros((*values.shape[:-1], head_dim - dense.shape[-1]))
    return torch.cat((dense, rest.scatter(-1, indices.long(), values)), dim=-1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over rows that are already sparse: softmax(scale · q kᵀ) v and its log-sum-exp.

    A pair of rows without a shared feature has score 0 and keeps its weight exp(0). A query that sees no key
    gets output 0 and log-sum-exp -inf. What stands in a key or value that no query sees does not matter, NaN included; a NaN
    that a query sees makes its output NaN. Differentiable any number of times, in both modes and under torch.func.

    Args:
        q: [B, Hq, N_q, D]; k: [B, Hkv, N_k, D]; v: [B, Hkv, N_k, Dv]; Hq a multiple of Hkv.
        mask: what is visible; everything by default.
        scale, softcap, sinks: as in `flashsfa.sparse_feature_attention`.

    Returns:
        out [B, Hq, N_q, Dv] and lse [B, Hq, N_q].
    """
    return attend(q, k, v, mask, ScoreRules.of(q, scale, softcap, sinks))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, scores: ScoreRules) -> tuple[Tensor, Tensor]:
    """`attention` by the package's types."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if mask is None:
        s = scores.cap(scores.scale * (q @ k.mT))  # [B, Hq, N_q, N_k]
    else:
        visible = mask.to_bool(q.shape[-2], k.shape[-2], q.device)  # [B or 1, 1, N_q, N_k]
        unseen = ~visible.any(-2)[..., None]  # [B or 1, 1, N_k, 1]
        k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)  # weight 0 times NaN is NaN
        s = scores.cap(scores.scale * (q @ k.mT)).masked_fill(~visible, -math.inf)
    lse = s.logsumexp(-1)  # [B, Hq, N_q]
    if scores.sinks is not None:
        sinks = scores.sinks.to(lse.dtype)[:, None]
        nothing = (lse == -math.inf) & (sinks == -math.inf)  # logaddexp of both has no gradient
        lse = torch.logaddexp(lse.masked_fill(nothing, 0), sinks).masked_fill(nothing, -math.inf)
    finite = lse.clamp(min=torch.finfo(lse.dtype).min)  # a row that sees no key gets weights exp(-inf) = 0
    return (s - finite[..., None]).exp() @ v, lse


def sparse_feature_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    topk: int,
    topk_query: int | str | None = None,
    dense_dims: int = 0,
    query_pattern: str | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    gradient: str = "kept",
) -> tuple[Tensor, Tensor]:
    """Top-k of both sides, then `attention`. Arguments as in `flashsfa.sparse_feature_attention`."""
    budget = FeatureBudget.of(
        q.shape[-1], topk, topk_query=topk_query, dense_dims=dense_dims, query_pattern=query_pattern
    )
    q = sparse_rows(q, budget.topk_query, dense_dims=dense_dims, pattern=query_pattern, gradient=gradient)
    k = sparse_rows(k, topk, dense_dims=dense_dims, gradient=gradient)
    return attention(q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks)

"""The operator: `sparse_feature_attention`, over padded and packed sequences. Checks, and the types that travel below them."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from . import reference
from .budget import FeatureBudget
from .checks import (
    has_values,
    may_look,
    refuse_transforms,
    require,
    require_alike,
    require_bool,
    require_choice,
    require_float,
    require_int,
    require_padding,
    require_tensor,
)
from .codes import FeatureCodes
from .contexts import without_autocast
from .mask import Mask, checked_window
from .ops import record
from .ops.prefill import operator
from .scores import ScoreRules

BACKENDS = ("auto", "dense", "reference")
GRADIENTS = ("kept", "all")


class AttentionOptions(TypedDict, total=False):
    """Keywords of `sparse_feature_attention` beside `return_lse`."""

    topk: int | None
    topk_query: int | str | None
    dense_dims: int
    query_pattern: str | None
    is_causal: bool
    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    window: int | None
    key_padding_mask: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    gradient: str
    backend: str


@overload
def sparse_feature_attention(
    q: Tensor,
    k: Tensor | FeatureCodes,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def sparse_feature_attention(
    q: Tensor, k: Tensor | FeatureCodes, v: Tensor, *, return_lse: Literal[True], **options: Unpack[AttentionOptions]
) -> tuple[Tensor, Tensor]: ...
def sparse_feature_attention(
    q: Tensor,
    k: Tensor | FeatureCodes,
    v: Tensor,
    *,
    topk: int | None = None,
    topk_query: int | str | None = None,
    dense_dims: int = 0,
    query_pattern: str | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    key_padding_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    gradient: str = "kept",
    backend: str = "auto",
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · Q̃K̃ᵀ) V, where Q̃ and K̃ keep the `topk` largest features of each row (paper, Eq. 3-5).

    Layout and names follow `torch.nn.functional.scaled_dot_product_attention`. Pairs without a shared feature
    score 0 and keep their weight exp(0). Differentiable in q, k, v and sinks; the log-sum-exp carries no gradient.

    Args:
        q: [B, Hq, N_q, D], D <= 256, float16, bfloat16, float32 or float64; packed [Tq, Hq, D].
        k: [B, Hkv, N_k, D], Hq a multiple of Hkv; packed [Tk, Hkv, D]. Or the keys' `FeatureCodes`, then `topk` and `dense_dims`
            are theirs.
        v: [B, Hkv, N_k, Dv]; packed [Tk, Hkv, Dv].
        topk: kept features of a key, 1 to D - dense_dims. D with dense_dims=0 is dense attention.
        topk_query: kept features of a query: None for the same as keys, "dense" (or D) for dense queries.
        dense_dims: leading features that are always kept, on both sides, beside the `topk` of the rest.
        query_pattern: "2:4" keeps the `topk_query` largest features of a query subject to at most two in each aligned
            group of four, on every backend; sparse tensor cores multiply such queries at twice the dense rate whatever
            their number, so topk_query=(D - dense_dims) / 2, the most, costs no more (docs/explanation/prefill.md).
        is_causal: aligned to the last key (bottom right), as flash-attn does.
        scale: 1/sqrt(D) by default, with the full D. A number: multiply a learned one into q.
        softcap: c > 0 replaces each score s by c · tanh(s / c), as Gemma 2 does. No fused kernel knows it: scores are then built in
            blocks.
        sinks: [Hq] logits that join each row's softmax without a value (the attention sinks of gpt-oss).
        window: see only keys less than `window` positions away; with is_causal, the `window` most recent.
        key_padding_mask: [B, N_k] bool, True where a key is padding (as in `torch.nn.MultiheadAttention`).
        cu_seqlens_q, cu_seqlens_k: [S + 1] int32 on the device of q: cumulative lengths from 0 to Tq and Tk of packed sequences,
            each of which attends to itself alone.
        max_seqlen_q, max_seqlen_k: longest of them; read from cu_seqlens when None (a device sync on a GPU).
        return_lse: also return the log-sum-exp of each query's scores.
        gradient: of q and k. "kept" reaches the kept features only, and is zero elsewhere (paper, section 3.2); "all"
            gives each feature what it would get had it been kept, which trains better (docs/explanation/quality.md). Key codes
            get that of what they hold.
        backend: "auto", "dense" (torch's fused kernels over codes scattered to rows) or "reference" (plain PyTorch, N x N scores,
            differentiable any number of times, in forward mode and under torch.func). "auto" takes this package's kernel on a Hopper
            GPU, on sparse tensor cores for queries in the 2:4 pattern and for others where it is faster, else "dense";
            `flashsfa.explain()` tells what ran, and why.

    Returns:
        out [B, Hq, N_q, Dv]; with return_lse also lse [B, Hq, N_q] in float32 (float64 for float64 inputs). A
        query that sees no key gets 0 and -inf (with a sink, the sink). Packed: out [Tq, Hq, Dv] and lse [Hq, Tq].

    Raises:
        TypeError, ValueError: inputs that do not fit, before anything runs; the message says what to do.
        NotImplementedError: forward-mode or second derivatives and torch.func transforms, but for backend="reference".
    """
    _refuse_unknown(unknown)
    is_packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if is_packed:
        for name, x in (("q", q), ("k", k.values if isinstance(k, FeatureCodes) else k), ("v", v)):
            require_tensor(name, x)
            require(x.ndim == 3, f"{name} must be packed as [T, H, D], got shape {tuple(x.shape)}")
        longest = _longest("q", cu_seqlens_q, max_seqlen_q, q), _longest("k", cu_seqlens_k, max_seqlen_k, k)
        counts = [0 if x is None else x.numel() - 1 for x in (cu_seqlens_q, cu_seqlens_k)]
        require(counts[0] == counts[1], f"cu_seqlens_q and cu_seqlens_k count {counts[0]} and {counts[1]} sequences")
        require(key_padding_mask is None, "packed sequences have no padding: leave key_padding_mask out")
        q, k, v = _by_head(q), _by_head(k), _by_head(v)
    else:
        require(
            max_seqlen_q is None and max_seqlen_k is None,
            "max_seqlen_q and max_seqlen_k belong to packed sequences: pass cu_seqlens_q and cu_seqlens_k, or leave them out",
        )
        longest = 0, 0
    _check_tensors(q, k, v, is_causal, key_padding_mask, gradient, backend)
    mask = Mask(is_causal, checked_window(window), key_padding_mask, cu_seqlens_q, cu_seqlens_k, *longest)
    scores = ScoreRules.of(q, scale, softcap, sinks)
    out, lse = _attend(q, k, v, topk, topk_query, dense_dims, query_pattern, mask, scores, gradient, backend)
    if is_packed:
        out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


def sparse_feature_attention_varlen(
    q: Tensor,
    k: Tensor | FeatureCodes,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    **options: Any,
) -> Any:
    """`sparse_feature_attention` over packed sequences, under the name and in the order of flash-attn."""
    return sparse_feature_attention(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        **options,
    )  # fmt: skip


_SDPA = {
    "attn_mask": "pass is_causal, window and key_padding_mask, which say which keys a query sees",
    "dropout_p": "attention weights are not dropped here",
    "enable_gqa": "leave it out, kv heads are shared by groups of query heads as they come",
}


def _refuse_unknown(options: dict[str, Any]) -> None:
    """Keywords of torch's SDPA are refused with what to do; harmless values of them pass."""
    for name, value in options.items():
        if name not in _SDPA:
            raise TypeError(f"sparse_feature_attention() got an unexpected keyword argument {name!r}")
        if name == "enable_gqa" or value is None or (name == "dropout_p" and value == 0):
            continue
        raise TypeError(f"sparse_feature_attention takes no {name}: {_SDPA[name]}")


def _by_head(x: Any) -> Any:
    """Packed x [T, H, D] as [1, H, T, D]."""
    return x.map(_by_head) if isinstance(x, FeatureCodes) else x.transpose(0, 1)[None]


def _longest(side: str, bounds: Tensor | None, named: int | None, rows: Tensor | FeatureCodes) -> int:
    """The longest sequence that `bounds` cut `rows` [T, H, D] into: the `named` one, or read; all checked as far as may be."""
    name = f"cu_seqlens_{side}"
    require_tensor(name, bounds)
    assert bounds is not None
    device, total = rows.device, rows.shape[0]
    require(
        bounds.ndim == 1 and bounds.numel() >= 1 and bounds.dtype == torch.int32 and bounds.device == device,
        lambda: (
            f"{name} must be a 1-D int32 tensor on {device}, got {bounds.dtype} {tuple(bounds.shape)} on {bounds.device}"
        ),
    )
    looks = may_look(bounds)
    if looks:
        require(
            int(bounds[0]) == 0 and int(bounds[-1]) == total and bool((bounds.diff() >= 0).all()),
            lambda: f"{name} must rise from 0 to the {total} packed rows, got {bounds.tolist()[:8]}",
        )
    if named is not None:
        require_int(f"max_seqlen_{side}", named, 0)
        if looks and bounds.numel() > 1:
            longest = int(bounds.diff().max())
            require(named >= longest, f"max_seqlen_{side} is {named}, but a sequence has {longest} tokens")
        return min(named, total)
    if bounds.numel() == 1:
        return 0
    return int(bounds.diff().max()) if torch.compiler.is_compiling() or has_values(bounds) else total


def _check_tensors(
    q: Tensor,
    k: Tensor | FeatureCodes,
    v: Tensor,
    is_causal: bool,
    key_padding_mask: Tensor | None,
    gradient: str,
    backend: str,
) -> None:
    key_rows = k.values if isinstance(k, FeatureCodes) else k
    for name, x in (("q", q), ("k", key_rows), ("v", v)):
        require_float(name, x)
        require(x.ndim == 4, lambda: f"{name} must be [B, H, N, D], got shape {tuple(x.shape)}")  # noqa: B023 (called at once)
    if isinstance(k, FeatureCodes):
        require_float("k.dense", k.dense)
    require_alike(q=q, k=key_rows, v=v)
    require(q.shape[-1] == k.shape[-1], lambda: f"q and k must share head_dim, got {q.shape[-1]} and {k.shape[-1]}")
    require(
        key_rows.shape[:3] == v.shape[:3],
        lambda: f"k and v must share [B, Hkv, N_k], got {tuple(key_rows.shape[:3])} and {tuple(v.shape[:3])}",
    )
    require(q.shape[0] == key_rows.shape[0], lambda: f"q has batch {q.shape[0]}, k and v have {key_rows.shape[0]}")
    require(
        key_rows.shape[1] > 0 and q.shape[1] % key_rows.shape[1] == 0,
        lambda: f"query heads must be a multiple of kv heads, got {q.shape[1]} and {key_rows.shape[1]}",
    )
    require(v.shape[-1] >= 1, "v must have at least one feature")
    require_bool("is_causal", is_causal)
    require_choice("gradient", gradient, GRADIENTS)
    require_choice("backend", backend, BACKENDS)
    if key_padding_mask is not None:
        require_padding(key_padding_mask, q.shape[0], key_rows.shape[2], q.device)


def _attend(
    q: Tensor,
    k: Tensor | FeatureCodes,
    v: Tensor,
    topk: int | None,
    topk_query: int | str | None,
    dense_dims: int,
    query_pattern: str | None,
    mask: Mask,
    scores: ScoreRules,
    gradient: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    head_dim = q.shape[-1]
    if isinstance(k, FeatureCodes):
        require(
            topk in (None, k.topk) and dense_dims in (0, k.dense_dims),
            f"the key codes hold topk={k.topk}, dense_dims={k.dense_dims}; got topk={topk}, dense_dims={dense_dims}",
        )
        k.check_indices()
        topk, dense_dims = k.topk, k.dense_dims
    if topk is None:
        raise ValueError("topk is needed: how many features of each key to keep")
    budget = FeatureBudget.of(head_dim, topk, topk_query=topk_query, dense_dims=dense_dims, query_pattern=query_pattern)
    if backend == "reference":
        return _attend_plainly(q, k, v, budget, mask, scores, gradient)
    keys = k.values if isinstance(k, FeatureCodes) else k
    refuse_transforms("sparse_feature_attention", operator.WAY_OUT, q, keys, v, scores.sinks)
    if isinstance(k, FeatureCodes):
        k, budget = k.to_dense(), budget.with_keys_kept()
    return operator.attend(q, k, v, budget, mask, scores, gradient_of_all=gradient == "all", backend=backend)


def _attend_plainly(
    q: Tensor,
    k: Tensor | FeatureCodes,
    v: Tensor,
    budget: FeatureBudget,
    mask: Mask,
    scores: ScoreRules,
    gradient: str,
) -> tuple[Tensor, Tensor]:
    """backend="reference": no operator of ours in between, so that every transform of torch sees plain PyTorch."""
    record.record("attention", "reference", "asked for")
    with without_autocast(q.device):
        q = reference.sparse_rows(
            q, budget.topk_query, dense_dims=budget.dense_dims, pattern=budget.query_pattern, gradient=gradient
        )
        if isinstance(k, FeatureCodes):
            k = reference.code_rows(k.dense, k.values, k.indices, k.head_dim)
        else:
            k = reference.sparse_rows(k, budget.topk, dense_dims=budget.dense_dims, gradient=gradient)
        out, lse = reference.attend(q, k, v, mask, scores)
    return out, lse.detach().to(operator.lse_dtype(v.dtype))

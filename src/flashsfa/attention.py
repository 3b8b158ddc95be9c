"""The operator: `sparse_feature_attention` and its packed form. Checks, backend choice, gradients.

Both sides become `FeatureCodes`; attention is then a function of codes. Between forward and backward autograd
keeps exactly the operator's inputs, and these are the codes, so queries and keys are never kept dense.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import require, require_alike, require_budget, require_float, require_padding
from .codes import FeatureCodes, at_support, code_queries, empty_rows, row_codes, topk_codes
from .kernels import dense, dispatch
from .kernels.hopper import prefill as hopper
from .kernels.hopper.cuda import CompilationError
from .kernels.topk import spread
from .masks import AttentionMask

BACKENDS = ("auto", "dense", "reference")


def sparse_feature_attention(
    q: Tensor,
    k: Tensor | FeatureCodes,
    v: Tensor,
    *,
    topk: int | None = None,
    topk_query: int | None = None,
    dense_dims: int = 0,
    query_pattern: str | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    key_padding_mask: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · Q̃K̃ᵀ) V, where Q̃ and K̃ keep the `topk` largest features of each row (paper, Eq. 3-5).

    Layout and names follow `torch.nn.functional.scaled_dot_product_attention`. Pairs without a shared feature
    score 0 and keep their weight exp(0). Differentiable in q, k and v; the gradient of q and k reaches the kept
    features only (straight-through). The log-sum-exp carries no gradient.

    Args:
        q: [B, Hq, N_q, D], D <= 256, float16, bfloat16, float32 or float64.
        k: [B, Hkv, N_k, D], Hq a multiple of Hkv; or the keys' `FeatureCodes`, then `topk` and `dense_dims` are theirs.
        v: [B, Hkv, N_k, Dv].
        topk: kept features of a key, 1 to D - dense_dims. D with dense_dims=0 is dense attention.
        topk_query: kept features of a query: None for the same as keys, D for dense queries.
        dense_dims: leading features that are always kept, on both sides, beside the `topk` of the rest.
        query_pattern: "2:4" keeps the `topk_query` largest features of a query subject to at most two in each aligned
            group of four, on every backend; sparse tensor cores multiply such queries at twice the dense rate whatever
            their number, so topk_query=(D - dense_dims) / 2, the most, costs no more (docs/hopper-prefill.md).
        is_causal: aligned to the last key (bottom right), as flash-attn does.
        scale: 1/sqrt(D) by default, with the full D.
        window: see only keys less than `window` positions away; with is_causal, the `window` most recent.
        key_padding_mask: [B, N_k] bool, True where a key is padding (as in `torch.nn.MultiheadAttention`).
        return_lse: also return the log-sum-exp of each query's scores.
        backend: "auto", "dense" (torch's fused kernels over spread-out codes) or "reference" (plain PyTorch,
            N x N scores). "auto" takes Hopper's sparse tensor cores for queries in the 2:4 pattern where it can, else
            "dense"; `flashsfa.explain()` tells what ran, and why.

    Returns:
        out [B, Hq, N_q, Dv]; with return_lse also lse [B, Hq, N_q] in float32 (float64 for float64 inputs). A
        query that sees no key gets 0 and -inf.

    Raises:
        TypeError, ValueError: inputs that do not fit, before anything runs; the message says what to do.
    """
    _check_attention(q, k, v, window, key_padding_mask, backend)
    mask = AttentionMask(is_causal=is_causal, window=window, key_padding_mask=key_padding_mask)
    out, lse = _attend(q, k, v, topk, topk_query, dense_dims, query_pattern, mask, scale, backend)
    return (out, lse) if return_lse else out


def sparse_feature_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    topk: int,
    topk_query: int | None = None,
    dense_dims: int = 0,
    query_pattern: str | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`sparse_feature_attention` over packed sequences, each attending to itself alone.

    Args:
        q: [Tq, Hq, D]; k: [Tk, Hkv, D]; v: [Tk, Hkv, Dv]: the sequences one after another.
        cu_seqlens_q, cu_seqlens_k: [S + 1] int32 on the device of q: cumulative lengths from 0 to Tq and Tk.
        max_seqlen_q, max_seqlen_k: longest sequence; read from cu_seqlens when None (a device sync on a GPU).
        The rest as in `sparse_feature_attention`.

    Returns:
        out [Tq, Hq, Dv]; with return_lse also lse [Hq, Tq].
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        require(x.ndim == 3, f"{name} must be packed as [T, H, D], got shape {tuple(x.shape)}")
    for name, bounds, total in (("cu_seqlens_q", cu_seqlens_q, q), ("cu_seqlens_k", cu_seqlens_k, k)):
        require(
            bounds.ndim == 1 and bounds.numel() >= 1 and bounds.dtype == torch.int32 and bounds.device == q.device,
            f"{name} must be a 1-D int32 tensor on {q.device}, got {bounds.dtype} {tuple(bounds.shape)} on {bounds.device}",
        )
        if bounds.device.type == "cpu" and not torch.compiler.is_compiling():
            steps = bounds.diff()
            require(
                int(bounds[0]) == 0 and int(bounds[-1]) == total.shape[0] and bool((steps >= 0).all()),
                f"{name} must rise from 0 to the {total.shape[0]} packed rows, got {bounds.tolist()[:8]}",
            )
    require(
        cu_seqlens_q.shape == cu_seqlens_k.shape,
        f"cu_seqlens_q and cu_seqlens_k count {cu_seqlens_q.numel() - 1} and {cu_seqlens_k.numel() - 1} sequences",
    )
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, T, D]
    _check_attention(q, k, v, window, None, backend)
    mask = AttentionMask(
        is_causal=is_causal,
        window=window,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=_longest(cu_seqlens_q) if max_seqlen_q is None else max_seqlen_q,
        max_seqlen_k=_longest(cu_seqlens_k) if max_seqlen_k is None else max_seqlen_k,
    )
    out, lse = _attend(q, k, v, topk, topk_query, dense_dims, query_pattern, mask, scale, backend)
    out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


def _longest(bounds: Tensor) -> int:
    return int(bounds.diff().max()) if bounds.numel() > 1 else 0


def _check_attention(
    q: Tensor,
    k: Tensor | FeatureCodes,
    v: Tensor,
    window: int | None,
    key_padding_mask: Tensor | None,
    backend: str,
) -> None:
    key_rows = k.values if isinstance(k, FeatureCodes) else k
    for name, x in (("q", q), ("k", key_rows), ("v", v)):
        require_float(name, x)
        require(x.ndim == 4, f"{name} must be [B, H, N, D], got shape {tuple(x.shape)}")
    if isinstance(k, FeatureCodes):
        require_float("k.dense", k.dense)
    require_alike(q=q, k=key_rows, v=v)
    require(q.shape[-1] == k.shape[-1], f"q and k must share head_dim, got {q.shape[-1]} and {k.shape[-1]}")
    require(
        key_rows.shape[:3] == v.shape[:3],
        f"k and v must share [B, Hkv, N_k], got {tuple(key_rows.shape[:3])} and {tuple(v.shape[:3])}",
    )
    require(q.shape[0] == key_rows.shape[0], f"q has batch {q.shape[0]}, k and v have {key_rows.shape[0]}")
    require(
        key_rows.shape[1] > 0 and q.shape[1] % key_rows.shape[1] == 0,
        f"query heads must be a multiple of kv heads, got {q.shape[1]} and {key_rows.shape[1]}",
    )
    require(v.shape[-1] >= 1, "v must have at least one feature")
    require(window is None or window >= 1, f"window must be at least 1 or None, got {window}")
    require(backend in BACKENDS, f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if key_padding_mask is not None:
        require_padding(key_padding_mask, q.shape[0], key_rows.shape[2], q.device)


def _attend(
    q: Tensor,
    k: Tensor | FeatureCodes,
    v: Tensor,
    topk: int | None,
    topk_query: int | None,
    dense_dims: int,
    query_pattern: str | None,
    mask: AttentionMask,
    scale: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    # Codes are kept for the backward pass; without one, attention needs their rows alone.
    as_rows = not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v) if isinstance(x, Tensor)))
    if isinstance(k, FeatureCodes):
        require(
            topk in (None, k.topk) and dense_dims in (0, k.dense_dims),
            f"the key codes hold topk={k.topk}, dense_dims={k.dense_dims}; got topk={topk}, dense_dims={dense_dims}",
        )
        k.check_indices()
        k_codes, topk, dense_dims = k, k.topk, k.dense_dims
    else:
        if topk is None:
            raise ValueError("topk is needed: how many features of each key to keep")
        require_budget(topk, k.shape[-1], dense_dims)
        k_codes = row_codes(k, topk, dense_dims) if as_rows else topk_codes(k, topk, dense_dims=dense_dims)
    q_codes = code_queries(q, topk, topk_query, dense_dims, query_pattern, as_rows)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _codes_attention_op(
        *(q_codes.dense, q_codes.values, q_codes.indices, k_codes.dense, k_codes.values, k_codes.indices, v),
        *(q.shape[-1], scale, mask.is_causal, mask.window, mask.key_padding_mask),
        *(mask.cu_seqlens_q, mask.cu_seqlens_k, mask.max_seqlen_q, mask.max_seqlen_k, backend, query_pattern),
    )


# The custom operators speak in flat tensors, as torch.library wants them: the six parts of two codes, v, the mask.


@torch.library.custom_op("flashsfa::codes_attention", mutates_args=())
def _codes_attention_op(
    q_dense: Tensor,
    q_values: Tensor,
    q_indices: Tensor,
    k_dense: Tensor,
    k_values: Tensor,
    k_indices: Tensor,
    v: Tensor,
    head_dim: int,
    scale: float,
    is_causal: bool,
    window: int | None,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    backend: str,
    query_pattern: str | None,
) -> tuple[Tensor, Tensor]:
    mask = AttentionMask(is_causal, window, key_padding_mask, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    k = spread(k_dense, k_values, k_indices, head_dim)
    obstacle = None
    if query_pattern is not None and backend == "auto":
        q_codes = FeatureCodes(q_dense, q_values, q_indices, head_dim)
        obstacle = hopper.obstacle(q_codes, k, v, mask, scale)
        if obstacle is None:
            try:
                out, lse = hopper.forward(q_codes, k, v, mask=mask, scale=scale)
                dispatch.record("attention", "hopper", "sparse tensor cores, for queries in the 2:4 pattern")
                return out, lse
            except CompilationError as error:
                obstacle = f"the kernel for sparse tensor cores cannot be compiled: {error}"
    q = spread(q_dense, q_values, q_indices, head_dim)
    kernel = _choose("attention", q, v, mask, backend, obstacle)
    if kernel is None:
        out, lse = reference.attention(q, k, v, mask=mask, scale=scale)
        lse = lse.to(torch.float64 if v.dtype == torch.float64 else torch.float32)
    else:
        out, lse = dense.forward(kernel, q, k, v, mask, scale)
    return _by_token(out), lse.contiguous()


@_codes_attention_op.register_fake
def _(
    q_dense: Tensor,
    q_values: Tensor,
    q_indices: Tensor,
    k_dense: Tensor,
    k_values: Tensor,
    k_indices: Tensor,
    v: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    return empty_rows(q_values, v.shape[-1]), v.new_empty(q_values.shape[:-1], dtype=lse_dtype)


@torch.library.custom_op("flashsfa::codes_attention_backward", mutates_args=())
def _codes_attention_backward_op(
    grad_out: Tensor,
    q_dense: Tensor,
    q_values: Tensor,
    q_indices: Tensor,
    k_dense: Tensor,
    k_values: Tensor,
    k_indices: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    head_dim: int,
    scale: float,
    is_causal: bool,
    window: int | None,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mask = AttentionMask(is_causal, window, key_padding_mask, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    q = spread(q_dense, q_values, q_indices, head_dim)
    k = spread(k_dense, k_values, k_indices, head_dim)
    kernel = _choose("attention_backward", q, v, mask, backend)
    if kernel is None:
        dq, dk, dv = reference.attention_backward(grad_out, q, k, v, mask=mask, scale=scale)
    else:
        dq, dk, dv = dense.backward(kernel, grad_out, q, k, v, out, lse, mask, scale)
    q_grads, k_grads = (at_support(dq, q_dense.shape[-1], q_indices), at_support(dk, k_dense.shape[-1], k_indices))
    return *q_grads, *k_grads, _by_token(dv)


@_codes_attention_backward_op.register_fake
def _(
    grad_out: Tensor,
    q_dense: Tensor,
    q_values: Tensor,
    q_indices: Tensor,
    k_dense: Tensor,
    k_values: Tensor,
    k_indices: Tensor,
    v: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    fresh = [x.new_empty(x.shape) for x in (q_dense, q_values, k_dense, k_values)]
    return fresh[0], fresh[1], fresh[2], fresh[3], empty_rows(v, v.shape[-1])


def _by_token(x: Tensor) -> Tensor:
    """x [B, H, N, D] in the memory order of `empty_rows`; torch's kernels mostly write it so already."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _choose(
    operation: str, q: Tensor, v: Tensor, mask: AttentionMask, backend: str, obstacle: str | None = None
) -> dense.Kernel | None:
    """The dense kernel to run, or None for the reference; recorded for `explain()`, with the `obstacle` to a faster one."""
    if backend == "reference":
        dispatch.record(operation, "reference", "asked for")
        return None
    kernel, reason = dense.choose_kernel(q, v, mask)
    if obstacle is not None:
        reason = f"{reason}; no sparse tensor cores: {obstacle}"
    if kernel is not None:
        dispatch.record(operation, "dense", reason, fallback=obstacle is not None)
        return kernel
    if backend == "dense":
        raise ValueError(f"backend='dense' cannot run: {reason}; use backend='auto'")
    dispatch.record(operation, "reference", f"{reason}; scores are built in full", fallback=True)
    return None


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, head_dim, scale, is_causal, window, padding, cu_q, cu_k, max_q, max_k, backend, _ = inputs
    out, lse = output
    ctx.save_for_backward(*tensors, out, lse, padding, cu_q, cu_k)
    ctx.settings = (head_dim, scale, is_causal, window, max_q, max_k, backend)
    ctx.mark_non_differentiable(lse)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor | None) -> tuple:
    *tensors, padding, cu_q, cu_k = ctx.saved_tensors
    head_dim, scale, is_causal, window, max_q, max_k, backend = ctx.settings
    dq_dense, dq_values, dk_dense, dk_values, dv = _codes_attention_backward_op(
        grad_out, *tensors, head_dim, scale, is_causal, window, padding, cu_q, cu_k, max_q, max_k, backend
    )
    return dq_dense, dq_values, None, dk_dense, dk_values, None, dv, *(None,) * 11


_codes_attention_op.register_autograd(_backward, setup_context=_setup)

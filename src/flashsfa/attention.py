"""The operator: `sparse_feature_attention` and its packed form. Checks, backend choice, gradients.

One operator codes queries and keys and attends, and hands out the codes: they are what autograd keeps for the backward
pass, so queries and keys are never kept dense. Without gradients it writes rows that are zero but for the code, in one pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .checks import (
    checked_scale,
    checked_window,
    has_values,
    may_look,
    query_budget,
    refuse_transforms,
    require,
    require_alike,
    require_bool,
    require_budget,
    require_choice,
    require_float,
    require_int,
    require_padding,
    require_tensor,
)
from .codes import FeatureCodes, all_dense_codes, keeps_all, topk_codes
from .contexts import without_autocast
from .mask import AttentionMask
from .ops import plan
from .ops.prefill import fused as dense
from .ops.prefill.hopper import prefill as hopper
from .ops.prefill.hopper.cuda import CompilationError
from .ops.select import operators as select
from .ops.select.plain import by_token, empty_code, empty_rows

BACKENDS = ("auto", "dense", "reference")
GRADIENTS = ("kept", "all")
_WAY_OUT = "pass backend='reference', which is plain PyTorch and has them"


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
    gradient: str = "kept",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale · Q̃K̃ᵀ) V, where Q̃ and K̃ keep the `topk` largest features of each row (paper, Eq. 3-5).

    Layout and names follow `torch.nn.functional.scaled_dot_product_attention`. Pairs without a shared feature
    score 0 and keep their weight exp(0). Differentiable in q, k and v; the log-sum-exp carries no gradient.

    Args:
        q: [B, Hq, N_q, D], D <= 256, float16, bfloat16, float32 or float64.
        k: [B, Hkv, N_k, D], Hq a multiple of Hkv; or the keys' `FeatureCodes`, then `topk` and `dense_dims` are theirs.
        v: [B, Hkv, N_k, Dv].
        topk: kept features of a key, 1 to D - dense_dims. D with dense_dims=0 is dense attention.
        topk_query: kept features of a query: None for the same as keys, D for dense queries.
        dense_dims: leading features that are always kept, on both sides, beside the `topk` of the rest.
        query_pattern: "2:4" keeps the `topk_query` largest features of a query subject to at most two in each aligned
            group of four, on every backend; sparse tensor cores multiply such queries at twice the dense rate whatever
            their number, so topk_query=(D - dense_dims) / 2, the most, costs no more (docs/explanation/prefill.md).
        is_causal: aligned to the last key (bottom right), as flash-attn does.
        scale: 1/sqrt(D) by default, with the full D. A number: multiply a learned one into q.
        window: see only keys less than `window` positions away; with is_causal, the `window` most recent.
        key_padding_mask: [B, N_k] bool, True where a key is padding (as in `torch.nn.MultiheadAttention`).
        return_lse: also return the log-sum-exp of each query's scores.
        gradient: of q and k. "kept" reaches the kept features only, and is zero elsewhere (paper, section 3.2); "all"
            gives each feature what it would get had it been kept, which trains better (docs/explanation/quality.md). Key codes
            get that of what they hold.
        backend: "auto", "dense" (torch's fused kernels over spread-out codes) or "reference" (plain PyTorch, N x N scores,
            differentiable any number of times, in forward mode and under torch.func). "auto" takes this package's kernel on a Hopper GPU, on sparse tensor cores for queries in the 2:4
            pattern and for others where it is faster, else "dense"; `flashsfa.explain()` tells what ran, and why.

    Returns:
        out [B, Hq, N_q, Dv]; with return_lse also lse [B, Hq, N_q] in float32 (float64 for float64 inputs). A
        query that sees no key gets 0 and -inf.

    Raises:
        TypeError, ValueError: inputs that do not fit, before anything runs; the message says what to do.
        NotImplementedError: forward-mode or second derivatives and torch.func transforms, but for backend="reference".
    """
    _check_attention(q, k, v, is_causal, key_padding_mask, gradient, backend)
    mask = AttentionMask(is_causal=is_causal, window=checked_window(window), key_padding_mask=key_padding_mask)
    out, lse = _attend(q, k, v, topk, topk_query, dense_dims, query_pattern, mask, scale, gradient, backend)
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
    gradient: str = "kept",
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`sparse_feature_attention` over packed sequences, each attending to itself alone. Arguments that are not listed are as there.

    Args:
        q: [Tq, Hq, D]; k: [Tk, Hkv, D]; v: [Tk, Hkv, Dv]: the sequences one after another.
        cu_seqlens_q, cu_seqlens_k: [S + 1] int32 on the device of q: cumulative lengths from 0 to Tq and Tk.
        max_seqlen_q, max_seqlen_k: longest sequence; read from cu_seqlens when None (a device sync on a GPU).

    Returns:
        out [Tq, Hq, Dv]; with return_lse also lse [Hq, Tq].
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        require_tensor(name, x)
        require(x.ndim == 3, f"{name} must be packed as [T, H, D], got shape {tuple(x.shape)}")
    longest_q = _longest("q", cu_seqlens_q, max_seqlen_q, q)
    longest_k = _longest("k", cu_seqlens_k, max_seqlen_k, k)
    require(
        cu_seqlens_q.shape == cu_seqlens_k.shape,
        f"cu_seqlens_q and cu_seqlens_k count {cu_seqlens_q.numel() - 1} and {cu_seqlens_k.numel() - 1} sequences",
    )
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, T, D]
    _check_attention(q, k, v, is_causal, None, gradient, backend)
    mask = AttentionMask(
        is_causal=is_causal,
        window=checked_window(window),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
    )
    out, lse = _attend(q, k, v, topk, topk_query, dense_dims, query_pattern, mask, scale, gradient, backend)
    out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


def _longest(side: str, bounds: Tensor, named: int | None, rows: Tensor) -> int:
    """The longest sequence that `bounds` cut `rows` [T, H, D] into: the `named` one, or read; all checked as far as may be."""
    require_tensor(f"cu_seqlens_{side}", bounds)
    require(
        bounds.ndim == 1 and bounds.numel() >= 1 and bounds.dtype == torch.int32 and bounds.device == rows.device,
        lambda: (
            f"cu_seqlens_{side} must be a 1-D int32 tensor on {rows.device}, got {bounds.dtype} {tuple(bounds.shape)} on "
            f"{bounds.device}"
        ),
    )
    total, looks = rows.shape[0], may_look(bounds)
    if looks:
        require(
            int(bounds[0]) == 0 and int(bounds[-1]) == total and bool((bounds.diff() >= 0).all()),
            lambda: f"cu_seqlens_{side} must rise from 0 to the {total} packed rows, got {bounds.tolist()[:8]}",
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


def _check_attention(
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
    topk_query: int | None,
    dense_dims: int,
    query_pattern: str | None,
    mask: AttentionMask,
    scale: float | None,
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
        k = reference.code_rows(*_parts(k), head_dim) if backend == "reference" else k.to_dense()
        topk_key = head_dim  # these rows are sparse already
    else:
        if topk is None:
            raise ValueError("topk is needed: how many features of each key to keep")
        require_budget(topk, head_dim, dense_dims)
        topk_key = topk
    topk_query = query_budget(topk_query, topk, head_dim, dense_dims, query_pattern)
    scale = checked_scale(scale, head_dim)
    if backend == "reference":
        return _attend_plain(q, k, v, topk_query, topk_key, dense_dims, query_pattern, mask, scale, gradient)
    refuse_transforms("sparse_feature_attention", _WAY_OUT, q, k, v)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    out, lse, *_ = _attention_op(
        *(q, k, v, topk_query, topk_key, dense_dims, query_pattern, keep, scale, mask.is_causal, mask.window),
        *(mask.key_padding_mask, mask.cu_seqlens_q, mask.cu_seqlens_k, mask.max_seqlen_q, mask.max_seqlen_k),
        *(gradient == "all", backend),
    )
    return out, lse


def _attend_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_query: int,
    topk: int,
    dense_dims: int,
    query_pattern: str | None,
    mask: AttentionMask,
    scale: float,
    gradient: str,
) -> tuple[Tensor, Tensor]:
    """backend="reference": no operator of ours in between, so that every transform of torch sees plain PyTorch."""
    plan.record("attention", "reference", "asked for")
    with without_autocast(q.device):
        q = reference.sparse_rows(q, topk_query, dense_dims=dense_dims, pattern=query_pattern, gradient=gradient)
        k = reference.sparse_rows(k, topk, dense_dims=dense_dims, gradient=gradient)
        out, lse = reference.attention(q, k, v, mask=mask, scale=scale)
    return out, lse.detach().to(dense.lse_dtype(v.dtype))


# The custom operators speak in flat tensors, as torch.library wants them: a code is its dense channel, values and indices.
# Rows of a budget of head_dim stay as they are.

_Code = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("flashsfa::attention", mutates_args=())
def _attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_query: int,
    topk: int,
    dense_dims: int,
    query_pattern: str | None,
    keep: bool,
    scale: float,
    is_causal: bool,
    window: int | None,
    key_padding_mask: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    gradient_of_all: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, lse, and with `keep` the codes of q and of k; empty tensors for rows that stay as they are."""
    mask = AttentionMask(is_causal, window, key_padding_mask, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    mask = mask.without_idle_window(q.shape[2], k.shape[2])
    with without_autocast(q.device):
        k_rows, k_code = _coded(k, topk, dense_dims, keep)
        if query_pattern is None:
            q_rows, q_code = _coded(q, topk_query, dense_dims, keep)
            out, lse = _attend_rows(q_rows, k_rows, v, mask, scale, backend)
        else:
            q_codes = topk_codes(q, topk_query, dense_dims=dense_dims, pattern=query_pattern)
            q_code = _parts(q_codes) if keep else _no_code(q)
            out, lse = _attend_pairs(q_codes, k_rows, v, mask, scale, backend)
    return out, lse, *q_code, *k_code


@_attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_query: int,
    topk: int,
    dense_dims: int,
    query_pattern: str | None,
    keep: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def code(x: Tensor, budget: int, pattern: str | None) -> _Code:
        return empty_code(x, budget, dense_dims) if keep and not keeps_all(x, budget, pattern) else _no_code(x)

    lse = v.new_empty(q.shape[:-1], dtype=dense.lse_dtype(v.dtype))
    return empty_rows(q, v.shape[-1]), lse, *code(q, topk_query, query_pattern), *code(k, topk, None)


def _coded(x: Tensor, topk: int, dense_dims: int, keep: bool) -> tuple[Tensor, _Code]:
    """The rows of x's code, and with `keep` the code."""
    if keeps_all(x, topk):
        return x, _no_code(x)
    rows, code = select.coded_rows(x, topk, dense_dims, keep)
    return rows, code or _no_code(x)


def _parts(codes: FeatureCodes) -> _Code:
    return codes.dense, codes.values, codes.indices


def _no_code(x: Tensor) -> _Code:
    return x.new_empty(0), x.new_empty(0), x.new_empty(0, dtype=torch.uint8)


def _attend_pairs(
    q: FeatureCodes, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention of queries in the 2:4 pattern to the rows k, on sparse tensor cores where it can be."""
    obstacle = None
    if backend == "auto":
        found = hopper.obstacle(q, k, v, mask, scale) or _on_hopper(
            q, k, v, mask, scale, "sparse tensor cores, for queries in the 2:4 pattern"
        )
        if not isinstance(found, str):
            return found
        obstacle = f"no sparse tensor cores: {found}"
    return _attend_dense(select.scatter(*_parts(q), q.head_dim), k, v, mask, scale, backend, obstacle)


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Attention of rows: the kernel for Hopper where it is faster than torch's."""
    obstacle = None
    if backend == "auto" and hopper.is_faster(q, k, v, mask, scale):
        found = _on_hopper(all_dense_codes(q), k, v, mask, scale, "the kernel for Hopper, with dense queries")
        if not isinstance(found, str):
            return found
        obstacle = f"not the kernel for Hopper: {found}"
    return _attend_dense(q, k, v, mask, scale, backend, obstacle)


def _on_hopper(
    q: FeatureCodes, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, reason: str
) -> tuple[Tensor, Tensor] | str:
    """out and lse by the kernel for Hopper, or why there is none."""
    try:
        found = hopper.forward(q, k, v, mask=mask, scale=scale)
    except CompilationError as error:
        return f"the kernel cannot be compiled: {error}"
    plan.record("attention", "hopper", reason)
    return found


def _attend_dense(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, backend: str, obstacle: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of rows, on torch's dense kernels; the `obstacle` kept it from a faster one."""
    kernel = _choose("attention", q, v, mask, backend, obstacle)
    if kernel is None:
        out, lse = reference.attention(q, k, v, mask=mask, scale=scale)
        lse = lse.to(dense.lse_dtype(v.dtype))
    else:
        out, lse = dense.forward(kernel, q, k, v, mask, scale)
    return by_token(out), lse.contiguous()


@torch.library.custom_op("flashsfa::attention_backward", mutates_args=())
def _attention_backward_op(
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
    gradient_of_all: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. A code whose dense channel is head_dim wide stands for rows as they are."""
    mask = AttentionMask(is_causal, window, key_padding_mask, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    mask = mask.without_idle_window(q_dense.shape[2], v.shape[2])
    q = select.scatter(q_dense, q_values, q_indices, head_dim)
    k = select.scatter(k_dense, k_values, k_indices, head_dim)
    kernel = _choose("attention_backward", q, v, mask, backend)
    with without_autocast(q.device):
        if kernel is None:
            dq, dk, dv = reference.attention_backward(grad_out, q, k, v, mask=mask, scale=scale)
        else:
            dq, dk, dv = dense.backward(kernel, grad_out, q, k, v, out, lse, mask, scale)
    if gradient_of_all:
        return by_token(dq), by_token(dk), by_token(dv)
    return _at_code(dq, q_dense, q_indices), _at_code(dk, k_dense, k_indices), by_token(dv)


@_attention_backward_op.register_fake
def _(
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
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_rows(q_dense, head_dim), empty_rows(k_dense, head_dim), empty_rows(v, v.shape[-1])


def _at_code(grad: Tensor, code_dense: Tensor, indices: Tensor) -> Tensor:
    """The gradient of a code's rows as that of the rows it was made of: it reaches what the code keeps."""
    dense_dims = code_dense.shape[-1]
    return by_token(grad) if dense_dims == grad.shape[-1] else select.keep_support(grad, dense_dims, indices)


def _choose(
    operation: str, q: Tensor, v: Tensor, mask: AttentionMask, backend: str, obstacle: str | None = None
) -> dense.Kernel | None:
    """The dense kernel to run, or None for the reference; recorded for `explain()`, with the `obstacle` to a faster one."""
    kernel, reason = dense.choose_kernel(q, v, mask)
    if obstacle is not None:
        reason = f"{reason}; {obstacle}"
    if kernel is not None:
        plan.record(operation, "dense", reason, fallback=obstacle is not None)
        return kernel
    if backend == "dense":
        raise ValueError(f"backend='dense' cannot run: {reason}; use backend='auto'")
    plan.record(operation, "reference", f"{reason}; scores are built in full", fallback=True)
    return None


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, topk_query, topk, _, query_pattern, _, *settings, padding, cu_q, cu_k, max_q, max_k, of_all, backend = (
        inputs
    )
    out, lse, *codes = output
    q_code = _parts(all_dense_codes(q)) if keeps_all(q, topk_query, query_pattern) else codes[:3]
    k_code = _parts(all_dense_codes(k)) if keeps_all(k, topk) else codes[3:]
    ctx.save_for_backward(*q_code, *k_code, v, out, lse, padding, cu_q, cu_k)
    ctx.settings, ctx.options = (q.shape[-1], *settings), (max_q, max_k, of_all, backend)
    ctx.mark_non_differentiable(lse, *codes)


def _backward(ctx: Any, grad_out: Tensor, *_: Tensor | None) -> tuple:
    *tensors, padding, cu_q, cu_k = ctx.saved_tensors
    grads = _attention_backward_op(grad_out, *tensors, *ctx.settings, padding, cu_q, cu_k, *ctx.options)
    return *grads, *(None,) * 15


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple:
    raise NotImplementedError(f"sparse_feature_attention has no second derivatives: {_WAY_OUT}")


_attention_op.register_autograd(_backward, setup_context=_setup)
_attention_backward_op.register_autograd(_no_second_derivative)

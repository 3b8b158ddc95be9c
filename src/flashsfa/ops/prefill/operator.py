"""Prefill as an operator of torch: codes queries and keys, attends, and hands out the codes, which are what autograd keeps for the
backward pass; so queries and keys are never kept dense. Without gradients it writes rows that are zero but for the code, in one pass.

The one place that knows an order of flat tensors and numbers, which torch.library wants: `_flatten` and `_unflatten`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...budget import PATTERNS, FeatureBudget
from ...checks import runs_plainly
from ...codes import FeatureCodes, all_dense_codes, topk_codes
from ...contexts import without_autocast
from ...mask import Mask
from ...scores import ScoreRules
from .. import record
from ..nvrtc.cuda import CompilationError
from ..plan import PrefillPlan, plan_prefill
from ..select import operators as select
from ..select.plain import by_token, empty_code, empty_rows
from . import blocks, pieces
from .blocks import lse_dtype as lse_dtype
from .hopper import prefill as hopper

WAY_OUT = "pass backend='reference', which is plain PyTorch and has them"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    budget: FeatureBudget,
    mask: Mask,
    scores: ScoreRules,
    *,
    gradient_of_all: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, N_q, Dv] and lse [B, Hq, N_q] of checked inputs. Differentiable in q, k, v and the sinks."""
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, scores.sinks))
    call = _Call(budget, mask, scores, keep, gradient_of_all, backend)
    if runs_plainly(*(x for x in (q, k, v, scores.sinks) if x is not None)):
        return _forward(call, q, k, v)[:2]
    out, lse, *_ = _attention_op(q, k, v, *_flatten(call))
    return out, lse


@dataclass(frozen=True, eq=False)
class _Call:
    """What is asked for beside q, k and v."""

    budget: FeatureBudget
    mask: Mask
    scores: ScoreRules
    keep: bool  # the codes, for a backward pass
    gradient_of_all: bool
    backend: str


_Flat = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, list[int], list[float], str]
_Code = tuple[Tensor, Tensor, Tensor]
_UNSET = -1


def _flatten(call: _Call) -> _Flat:
    budget, mask, scores = call.budget, call.mask, call.scores
    pattern = _UNSET if budget.query_pattern is None else PATTERNS.index(budget.query_pattern)
    window = _UNSET if mask.window is None else mask.window
    whole = [
        budget.head_dim, budget.topk, budget.topk_query, budget.dense_dims, pattern, mask.is_causal, window, mask.max_seqlen_q,
        mask.max_seqlen_k, call.keep, call.gradient_of_all,
    ]  # fmt: skip
    softcap = 0.0 if scores.softcap is None else scores.softcap
    return (
        mask.key_padding_mask, mask.cu_seqlens_q, mask.cu_seqlens_k, scores.sinks, whole, [scores.scale, softcap], call.backend,
    )  # fmt: skip


def _unflatten(
    padding: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    sinks: Tensor | None,
    whole: Sequence[int],
    real: Sequence[float],
    backend: str,
) -> _Call:
    head_dim, topk, topk_query, dense_dims, pattern, is_causal, window, max_q, max_k, keep, of_all = whole
    budget = FeatureBudget(head_dim, topk, topk_query, dense_dims, None if pattern == _UNSET else PATTERNS[pattern])
    mask = Mask(bool(is_causal), None if window == _UNSET else window, padding, cu_q, cu_k, max_q, max_k)
    scores = ScoreRules(real[0], real[1] or None, sinks)
    return _Call(budget, mask, scores, bool(keep), bool(of_all), backend)


@torch.library.custom_op("flashsfa::attention", mutates_args=())
def _attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    sinks: Tensor | None,
    whole: Sequence[int],
    real: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, lse, and where they are to be kept the codes of q and of k; empty tensors for rows that stay as they are."""
    out, lse, q_code, k_code = _forward(_unflatten(padding, cu_q, cu_k, sinks, whole, real, backend), q, k, v)
    return out, lse, *(q_code or _no_code(q)), *(k_code or _no_code(k))


def _forward(call: _Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, _Code | None, _Code | None]:
    budget, mask = call.budget, call.mask.without_idle_window(q.shape[2], k.shape[2])
    with without_autocast(q.device):
        k_rows, k_code = _coded(k, budget.topk, budget, call.keep)
        plan = plan_prefill(q, k_rows, v, budget, mask, call.scores, call.backend)
        if budget.query_pattern is not None:
            codes = topk_codes(q, budget.topk_query, dense_dims=budget.dense_dims, pattern=budget.query_pattern)
            q_code = _parts(codes) if call.keep else None
            out, lse = _run(plan, codes, k_rows, v, mask, call.scores)
        else:
            q_rows, q_code = _coded(q, budget.topk_query, budget, call.keep)
            out, lse = _run(plan, q_rows, k_rows, v, mask, call.scores)
        out, lse = call.scores.with_sinks(out, lse)
    return by_token(out), lse.contiguous(), q_code, k_code


@_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, *flat: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call, lse = _unflatten(*flat), v.new_empty(q.shape[:-1], dtype=lse_dtype(v.dtype))

    def code(x: Tensor, topk: int, stays: bool) -> _Code:
        return empty_code(x, topk, call.budget.dense_dims) if call.keep and not stays else _no_code(x)

    q_code = code(q, call.budget.topk_query, call.budget.keeps_queries)
    return empty_rows(q, v.shape[-1]), lse, *q_code, *code(k, call.budget.topk, call.budget.keeps_keys)


def _run(
    plan: PrefillPlan, q: Tensor | FeatureCodes, k: Tensor, v: Tensor, mask: Mask, scores: ScoreRules
) -> tuple[Tensor, Tensor]:
    """out and lse without sinks by the first form of the plan that can be had."""
    obstacle = plan.obstacle
    if plan.hopper is not None:
        try:
            found = hopper.forward(q, k, v, mask=mask, scale=scores.scale)
            record.record("attention", "hopper", plan.hopper)
            return found
        except CompilationError as error:
            lost = "no sparse tensor cores" if isinstance(q, FeatureCodes) else "not the kernel for Hopper"
            obstacle = f"{lost}: the kernel cannot be compiled: {error}"
    if isinstance(q, FeatureCodes):
        q = select.scatter(*_parts(q), q.head_dim)
    plan.record("attention", obstacle)
    if plan.kernel is None:
        return blocks.forward(q, k, v, mask, scores)
    return pieces.forward(plan.kernel, q, k, v, mask, scores.scale)


def _coded(x: Tensor, topk: int, budget: FeatureBudget, keep: bool) -> tuple[Tensor, _Code | None]:
    """The rows of x's code, and with `keep` the code, if they do not stay as they are."""
    return (x, None) if topk == x.shape[-1] else select.coded_rows(x, topk, budget.dense_dims, keep)


def _parts(codes: FeatureCodes) -> _Code:
    return codes.dense, codes.values, codes.indices


def _no_code(x: Tensor) -> _Code:
    return x.new_empty(0), x.new_empty(0), x.new_empty(0, dtype=torch.uint8)


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
    padding: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    sinks: Tensor | None,
    whole: Sequence[int],
    real: Sequence[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the sinks (empty without any). A code whose dense channel is head_dim wide stands for rows as they are."""
    call = _unflatten(padding, cu_q, cu_k, sinks, whole, real, backend)
    budget, mask, scores = call.budget, call.mask.without_idle_window(q_dense.shape[2], v.shape[2]), call.scores
    q = select.scatter(q_dense, q_values, q_indices, budget.head_dim)
    k = select.scatter(k_dense, k_values, k_indices, budget.head_dim)
    with without_autocast(q.device):
        plan = plan_prefill(q, k, v, budget, mask, scores, backend)
        plan.record("attention_backward")
        if plan.kernel is None:
            dq, dk, dv = blocks.backward(grad_out, q, k, v, out, lse, mask, scores)
        else:
            dq, dk, dv = pieces.backward(plan.kernel, grad_out, q, k, v, out, lse, mask, scores.scale)
        d_sinks = v.new_empty(0) if sinks is None else scores.sink_gradient(grad_out, out, lse)
    if call.gradient_of_all:
        return by_token(dq), by_token(dk), by_token(dv), d_sinks
    return _at_code(dq, q_dense, q_indices), _at_code(dk, k_dense, k_indices), by_token(dv), d_sinks


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
    *flat: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    call = _unflatten(*flat)
    head_dim, sinks = call.budget.head_dim, call.scores.sinks
    d_sinks = v.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return empty_rows(q_dense, head_dim), empty_rows(k_dense, head_dim), empty_rows(v, v.shape[-1]), d_sinks


def _at_code(grad: Tensor, code_dense: Tensor, indices: Tensor) -> Tensor:
    """The gradient of a code's rows as that of the rows it was made of: it reaches what the code keeps."""
    dense_dims = code_dense.shape[-1]
    return by_token(grad) if dense_dims == grad.shape[-1] else select.keep_support(grad, dense_dims, indices)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, padding, cu_q, cu_k, sinks, *numbers = inputs
    out, lse, *codes = output
    budget = _unflatten(padding, cu_q, cu_k, sinks, *numbers).budget
    q_code = _parts(all_dense_codes(q)) if budget.keeps_queries else codes[:3]
    k_code = _parts(all_dense_codes(k)) if budget.keeps_keys else codes[3:]
    ctx.save_for_backward(*q_code, *k_code, v, out, lse, padding, cu_q, cu_k, sinks)
    ctx.numbers = numbers
    ctx.mark_non_differentiable(lse, *codes)


def _backward(ctx: Any, grad_out: Tensor, *_: Tensor | None) -> tuple:
    tensors = ctx.saved_tensors  # looked at once: activation checkpointing allows no more
    dq, dk, dv, d_sinks = _attention_backward_op(grad_out, *tensors, *ctx.numbers)
    return dq, dk, dv, None, None, None, None if tensors[-1] is None else d_sinks, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple:
    raise NotImplementedError(f"sparse_feature_attention has no second derivatives: {WAY_OUT}")


_attention_op.register_autograd(_backward, setup_context=_setup)
_attention_backward_op.register_autograd(_no_second_derivative)

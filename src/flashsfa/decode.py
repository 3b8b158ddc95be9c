"""`sparse_feature_decode`: a few queries against cached key codes, reading codes and never dense keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .axes import AxisCodes
from .budget import FeatureBudget
from .checks import (
    FLOAT_DTYPES,
    has_values,
    is_checked,
    may_look,
    refuse_transforms,
    require,
    require_alike,
    require_float,
    require_no_gradient,
    require_padding,
    require_page_size,
    require_tensor,
    require_tolerance,
    runs_plainly,
)
from .codes import FeatureCodes, code_queries
from .contexts import without_autocast
from .mask import Mask, checked_window
from .narrow import NarrowCodes, NarrowRows
from .ops import record
from .ops.decode import gpu, plain
from .ops.plan import DecodePlan, plan_decode, told_with_exact
from .ops.prefill import operator, pieces
from .scores import ScoreRules
from .stored import ExactKV, KeyCodes, KVView

_DIFFERENTIABLE = "use sparse_feature_attention with backend='reference'"
FEW_QUERIES = 16  # up to here codes are read as they are; more queries repay scattering the keys' codes to rows once


class DecodeOptions(TypedDict, total=False):
    """Keywords of `sparse_feature_decode` beside `return_lse`."""

    kv_lens: Tensor | None
    topk_query: int | str | None
    query_pattern: str | None
    scale: float | None
    softcap: float | None
    sinks: Tensor | None
    window: int | None
    key_padding_mask: Tensor | None
    page_table: Tensor | None
    v_scale: Tensor | None
    value_tolerance: float
    out: Tensor | None


@overload
def sparse_feature_decode(
    q: Tensor,
    codes: KeyCodes | KVView,
    v: Tensor | NarrowRows | None = ...,
    *,
    return_lse: Literal[False] = ...,
    **options: Unpack[DecodeOptions],
) -> Tensor: ...
@overload
def sparse_feature_decode(
    q: Tensor,
    codes: KeyCodes | KVView,
    v: Tensor | NarrowRows | None = ...,
    *,
    return_lse: Literal[True],
    **options: Unpack[DecodeOptions],
) -> tuple[Tensor, Tensor]: ...
def sparse_feature_decode(
    q: Tensor,
    codes: KeyCodes | KVView,
    v: Tensor | NarrowRows | None = None,
    *,
    kv_lens: Tensor | None = None,
    topk_query: int | str | None = None,
    query_pattern: str | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    window: int | None = None,
    key_padding_mask: Tensor | None = None,
    page_table: Tensor | None = None,
    v_scale: Tensor | None = None,
    value_tolerance: float = 0.0,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of the last M tokens over a cache of key codes. No gradients: refused where one is asked for.

    Runs on a CUDA kernel on Hopper and on Triton kernels on other GPUs, compiled by numba on the CPU where it is installed, and in plain
    PyTorch elsewhere; `flashsfa.explain()` tells which. Tokens that a cache holds as they came (`SparseKVCache(recent=, first=)`) are scored
    by the whole of q and k, whatever `topk_query`, on a further CUDA kernel on Hopper and in plain PyTorch elsewhere and where
    torch.compile traces; one softmax runs over these and the coded ones.

    Args:
        q: [B, Hq, M, D] queries of the newest M tokens; the last one stands at the last key.
        codes: key codes [B, Hkv, N, ...]; or what a cache's `append` returned, which holds v, v_scale, kv_lens and page_table too.
        v: [B, Hkv, N, Dv].
        kv_lens: [B] integer number of valid keys of each sequence, at most N; N for all when None. Lengths on a GPU
            are looked at in checked mode only; a longer one counts as N.
        topk_query: kept features of a query: None for the codes' topk, "dense" (or D) for dense queries.
        query_pattern: as in `sparse_feature_attention`, for queries like those of a prompt read with it.
        scale: 1/sqrt(D) by default.
        softcap, sinks: as in `sparse_feature_attention`.
        window: see only the `window` most recent keys.
        key_padding_mask: [B, N] bool, True where a key is padding; N counts exact tokens too.
        page_table: [B, max_pages] int32. Codes and v are then pools of pages [P, Hkv, page_size, ...], page_size a
            power of two from 16 to 256; key j of sequence b is slot j % page_size of page
            `page_table[b, j // page_size]`, and N = max_pages * page_size. Needs kv_lens; entries past a
            sequence's length are not read.
        v_scale: [B, Hkv, N] float32 factor of each row of v, where v is int8. The codes may be 8-bit
            with their own scale (`FeatureCodes.quantize`) then.
        value_tolerance: leave out V rows that carry at most this share of each query's weight over the keys, 0 <= τ < 1. The
            output moves by at most 2·τ·max‖v‖. 0 is exact. The Triton kernels over few bits read every value.
        return_lse: also return the log-sum-exp of each query's scores.
        out: [B, Hq, M, Dv] of the dtype and device of q, with any strides: filled with the output, and returned. On a GPU the kernels write
            there where it is contiguous, begins at a multiple of 16 bytes and shares no memory with what they read; else the output is
            copied there.

    Returns:
        out [B, Hq, M, Dv]; with return_lse also lse [B, Hq, M] float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: inputs that do not fit, before anything is computed.
        NotImplementedError: inside a torch.func transform or forward-mode differentiation.
    """
    if isinstance(codes, KVView):
        require(
            v is None and v_scale is None and kv_lens is None and page_table is None,
            "what append returned holds v, v_scale, kv_lens and page_table: leave them out, or pass codes",
        )
        kv = codes
    else:
        require(
            isinstance(codes, (FeatureCodes, NarrowCodes, NarrowRows, AxisCodes)),
            lambda: f"codes must be FeatureCodes or what append returned, got {type(codes).__name__}; see topk_codes",
        )
        if not isinstance(v, NarrowRows):
            require_tensor("v", v)
        kv = KVView(codes, v, v_scale, kv_lens, page_table)  # type: ignore[arg-type]
    mask = Mask(True, checked_window(window), key_padding_mask, kv_lens=kv.kv_lens)

    def call() -> _Call:
        topk, dense_dims = kv.key_budget
        budget = FeatureBudget.of(
            q.shape[-1], topk, topk_query=topk_query, dense_dims=dense_dims, query_pattern=query_pattern
        )
        scores = ScoreRules.of(q, scale, softcap, sinks)
        place = None if out is None else _place(out, q, kv, mask, sinks)
        return _Call(q, kv, budget, mask, scores, value_tolerance, place)

    require_no_gradient(sinks)
    if kv.prepared is not None and not return_lse and runs_plainly(q) and q.shape[-1:] == kv.key_shape[-1:]:
        now = call()
        again = _again(
            q, kv, now.budget, window=mask.window, padding=key_padding_mask, scale=now.scores.scale, softcap=softcap, sinks=sinks,
            value_tolerance=value_tolerance, out=now.out,
        )  # fmt: skip
        if again is not None:
            return _put(again, out)
    _check(q, kv, mask, value_tolerance)
    require_no_gradient(q, *kv.form.tensors(), *kv.exact_tensors())
    refuse_transforms("sparse_feature_decode", _DIFFERENTIABLE, q, sinks, *kv.tensors())
    found, lse = _decode(call())
    found = _put(found, out)
    return (found, lse) if return_lse else found


class _Call(NamedTuple):
    """What is asked of decode: queries, what a cache holds, and the rules.

    Attributes:
        out: [B, Hq, M, Dv], contiguous, where a kernel that can writes the output, which is then what is returned; None for a tensor of its own.
    """

    q: Tensor
    kv: KVView
    budget: FeatureBudget
    mask: Mask
    scores: ScoreRules
    value_tolerance: float
    out: Tensor | None = None


def _place(out: Tensor, q: Tensor, kv: KVView, mask: Mask, sinks: Tensor | None) -> Tensor | None:
    """`out`, checked, if a kernel may write there while it reads the rest; None where the output is to be made apart and copied."""
    require_tensor("out", out)
    require_alike(q=q, out=out)
    shape = (*q.shape[:3], kv.v.shape[-1])
    require(out.shape == shape, lambda: f"out must be [B, Hq, M, Dv] = {shape}, got {tuple(out.shape)}")
    require_no_gradient(out)
    refuse_transforms("sparse_feature_decode", _DIFFERENTIABLE, out)
    if not (has_values(q) and has_values(out) and out.is_contiguous() and out.data_ptr() % 16 == 0):
        return None
    others = kv.kv_lens, kv.page_table, mask.key_padding_mask, sinks
    read = [q, *kv.tensors(), *kv.exact_tensors(), *(x for x in others if x is not None)]
    written = out.untyped_storage().data_ptr()
    return None if any(x.untyped_storage().data_ptr() == written for x in read) else out


def _put(found: Tensor, out: Tensor | None) -> Tensor:
    """The output `found`, in `out` if there is one, where a kernel may have written it."""
    if out is None:
        return found
    if found is out:
        torch.autograd.graph.increment_version(out)  # autograd sees no launch
    else:
        out.copy_(found)
    return out


def attend_cached(
    q: Tensor,
    kv: KVView,
    budget: FeatureBudget,
    *,
    window: int | None = None,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    exact_factor: Tensor | None = None,
    value_tolerance: float = 0.0,
) -> Tensor:
    """The newest tokens' q [B, Hq, M, D] over all that a cache holds, as `sparse_feature_decode` with these arguments for few queries; prefill
    for many, of which none is left out by a tolerance. `exact_factor` is that of `ScoreRules`, and `key_padding_mask` counts exact tokens too.

    No gradients: refused where one is asked for.
    """
    is_plain = runs_plainly(q)
    if is_plain:
        again = _again(
            q, kv, budget, window=window, padding=key_padding_mask, scale=scale, softcap=softcap, sinks=sinks, factor=exact_factor,
            value_tolerance=value_tolerance,
        )  # fmt: skip
        if again is not None:
            return again
    mask = Mask(True, checked_window(window), key_padding_mask, kv_lens=kv.kv_lens)
    scores = ScoreRules.of(q, scale, softcap, sinks, exact_factor)
    if not (is_plain and _is_seen_to_fit(q, kv, mask, value_tolerance)):
        _check(q, kv, mask, value_tolerance, is_of_cache=True)
        require_no_gradient(q, *kv.form.tensors(), *kv.exact_tensors())
    if q.shape[2] <= FEW_QUERIES:
        return _decode(_Call(q, kv, budget, mask, scores, value_tolerance))[0]
    if mask.kv_lens is None or kv.exact:
        return _prefill(q, kv, budget.with_keys_kept(), mask, scores)
    # a chunk of a prompt in a compiled model, where the host does not know the number of keys
    q, rows = code_queries(q, budget).to_dense(), kv.rows(q.dtype)
    if scores.softcap is not None or scores.sinks is not None:
        return reference.attend(q, rows.k, rows.v, mask, scores)[0]
    visible = mask.to_bool(q.shape[2], rows.k.shape[2], q.device)
    return F.scaled_dot_product_attention(q, rows.k, rows.v, visible, scale=scores.scale, enable_gqa=True)


def _again(
    q: Tensor,
    kv: KVView,
    budget: FeatureBudget,
    *,
    window: int | None,
    padding: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    value_tolerance: float,
    factor: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | None:
    """The output for queries that `run_plainly`, by what was prepared when such a call met these buffers first: nothing is checked or planned
    twice. None where that is not possible."""
    kept, has_exact = kv.prepared, kv.first is not None or kv.recent is not None
    if (
        kept is None or q.ndim != 4 or q.shape[2] > FEW_QUERIES or kv.n_coded < gpu.FEWEST_KEYS
        or sinks is not None or kv.kv_lens is not None or budget.query_pattern is not None
        or (has_exact and (q.shape[2] > 1 or window is not None))
    ):  # fmt: skip
        return None
    if padding is not None:
        require_padding(padding, q.shape[0], kv.n, q.device)
    if type(value_tolerance) is not float:  # which what is kept was checked for
        require_tolerance(value_tolerance)
    form = (
        q.device, q.dtype, q.shape, q.stride(), budget, type(window), window, type(scale), scale, type(softcap), softcap, value_tolerance,
        kv.first is None, kv.recent is None, padding is None, q.data_ptr() % 16 if has_exact else 0,
        None if factor is None else factor.data_ptr(),  # kept with what reads it, if anything does
    )  # fmt: skip

    def prepare() -> _Attend | None:
        mask, scores = Mask(True, checked_window(window), padding), ScoreRules.of(q, scale, softcap, None, factor)
        return _prepared(_Call(q, kv, budget, mask, scores, value_tolerance))

    attend = kept.find(form, prepare)
    return None if attend is None else attend(q, kv, padding, out)


# Attends by q, the view, the padding and the place for the output.
_Attend: TypeAlias = Callable[[Tensor, KVView, Tensor | None, Tensor | None], Tensor | None]


def _prepared(call: _Call) -> _Attend | None:
    """What attends for queries of the form of a call's over views of the same buffers; None where nothing is kept. Raises as `_check` does."""
    q, kv, budget, mask, scores, value_tolerance = call[:6]
    _check(q, kv, mask, value_tolerance, is_of_cache=True)
    plan, topk_query = plan_decode(q, kv), None if budget.keeps_queries else budget.topk_query
    if plan.backend == "hopper":
        kernels = gpu.prepared(q, kv, mask, scores, value_tolerance, topk_query)
        choice = record.Choice(plan.backend, told_with_exact(plan.reason, None) if kv.exact else plan.reason)
        if kernels is not None:
            return lambda q, kv, padding, out: gpu.attend_again(q, kernels, choice, kv, padding, out)
    elif plan.backend == "numba":
        from .ops.decode import cpu

        made = cpu.prepared(q, kv, mask, scores, value_tolerance, topk_query)
        if made is not None:
            return lambda q, kv, padding, out: made.attend_again(q, kv, padding)
    return None


def _prefill(q: Tensor, kv: KVView, budget: FeatureBudget, mask: Mask, scores: ScoreRules) -> Tensor:
    """Many queries, over the rows of all tokens. Sparse queries see coded tokens alone, and dense ones the exact tokens."""
    kv = kv if scores.exact_factor is None else _with_factor(kv, scores)
    rows = kv.rows(q.dtype)

    def attend(budget: FeatureBudget, mask: Mask, scores: ScoreRules) -> tuple[Tensor, Tensor]:
        if mask.kv_lens is not None:
            return reference.attend(code_queries(q, budget).to_dense(), rows.k, rows.v, mask, scores)
        return operator.attend(q, rows.k, rows.v, budget, mask, scores, gradient_of_all=False, backend="auto")

    if not kv.exact:
        return attend(budget, mask, scores)[0]
    exact = budget.with_queries_kept()
    if budget == exact or not kv.n_coded:
        return attend(exact, mask, scores)[0]
    is_exact, without_sinks = kv.is_exact().expand(q.shape[0], -1), replace(scores, sinks=None)
    out, lse = attend(budget, mask.hiding(is_exact), without_sinks)
    pieces.merge(out, lse, *attend(exact, mask.hiding(~is_exact), without_sinks))
    return scores.with_sinks(out, lse)[0]


def _with_factor(kv: KVView, scores: ScoreRules) -> KVView:
    """The view with exact keys that have the factor in place of the queries."""

    def change(part: ExactKV | None) -> ExactKV | None:
        return None if part is None else replace(part, k=scores.exact_keys(part.k))

    return replace(kv, first=change(kv.first), recent=change(kv.recent))


def _decode(call: _Call) -> tuple[Tensor, Tensor]:
    """The output [B, Hq, M, Dv] and lse [B, Hq, M] of checked inputs."""
    q, kv, budget, mask, scores = call[:5]
    if 0 in (*q.shape, kv.n):
        return scores.with_sinks(*_nothing_seen(q, kv))
    plan = plan_decode(q, kv)
    takes_exact = plan.backend == "numba" and not kv.is_placed and budget.query_pattern is None
    if not kv.exact or takes_exact:
        return scores.with_sinks(*_decode_coded(call, plan))
    plan = replace(plan, held=None)  # of these views, parts are read
    if kv.is_placed:
        coded, rest = replace(kv, recent=None), mask.hiding(kv.is_exact().expand(q.shape[0], -1))
        out, lse = _decode_coded(call._replace(kv=coded, mask=rest), plan)
    else:
        out, lse = _decode_between(call, plan)
    _add_exact(out, lse, call, plan)
    return scores.with_sinks(out, lse)


def _add_exact(out: Tensor, lse: Tensor, call: _Call, plan: DecodePlan) -> None:
    """Fold the exact tokens of a view into out [B, Hq, M, Dv] and lse [B, Hq, M] of its coded ones, in place."""
    q, kv, mask, scores = call.q, call.kv, call.mask, call.scores
    if plan.fuses_exact:
        from .ops.decode.hopper.exact import exact

        obstacle = exact.attend(q, kv, mask, scores, out, lse)
        if obstacle is None:
            return
        record.record("decode", plan.backend, told_with_exact(plan.reason, obstacle), fallback=True)
    with without_autocast(q.device):
        pieces.merge(out, lse, *plain.decode_exact(q, kv, mask, scores))


def _decode_between(call: _Call, plan: DecodePlan) -> tuple[Tensor, Tensor]:
    """As `_decode_coded`, over the coded tokens after the first and before the newest exact ones."""
    q, kv, mask = call.q, call.kv, call.mask
    parts = []
    ranges = [_coded_range(i, q.shape[2], kv, mask) for i in range(q.shape[2])]
    firsts = [i for i, here in enumerate(ranges) if i == 0 or here != ranges[i - 1]]  # of the queries that see the same
    for first, behind in zip(firsts, [*firsts[1:], len(ranges)], strict=True):
        part, (start, end) = q[:, :, first:behind], ranges[first]
        coded, padding = kv.coded(start, end), mask.key_padding_mask
        if start == end:
            parts.append(_nothing_seen(part, coded))
            continue
        # All of these queries see all of these tokens, so to a kernel, in which a later query sees more, they are further heads.
        heads = part.flatten(1, 2)[:, :, None]  # [B, Hq·m, 1, D]
        here = None if padding is None else padding[:, kv.n_first + start : kv.n_first + end]
        out, lse = _decode_coded(call._replace(q=heads, kv=coded, mask=Mask(True, None, here), out=None), plan)
        parts.append((out.reshape(*part.shape[:3], -1), lse.reshape(part.shape[:3])))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def _coded_range(query: int, queries: int, kv: KVView, mask: Mask) -> tuple[int, int]:
    """The coded tokens, counted from the first of them, that one of the newest `queries` tokens sees, padding apart."""
    coded, behind = kv.n_coded, kv.n - queries + query + 1 - kv.n_first  # where the tokens that it sees end
    end = min(max(behind, 0), coded)
    start = 0 if mask.window is None else min(max(behind - mask.window, 0), end)
    return start, end


def _nothing_seen(q: Tensor, kv: KVView) -> tuple[Tensor, Tensor]:
    """out and lse of queries that see no key."""
    out = q.new_zeros((*q.shape[:3], kv.v.shape[-1]))
    return out, torch.full(q.shape[:3], -math.inf, dtype=operator.lse_dtype(q.dtype), device=q.device)


def _decode_coded(call: _Call, plan: DecodePlan) -> tuple[Tensor, Tensor]:
    """As `_decode`, over coded tokens alone and without sinks."""
    q, kv, budget, mask, scores, value_tolerance, out = call
    if mask.kv_lens is not None and mask.kv_lens.device != q.device:
        mask = mask.with_lengths(mask.kv_lens.to(q.device))
    if budget.query_pattern is not None:  # the kernels know no pattern: they take the pruned rows as dense queries
        q, budget = code_queries(q, budget).to_dense(), budget.with_queries_kept()
    run: Any = plain.decode
    backend = plan.backend
    if backend == "hopper" or (backend == "triton" and kv.is_narrow):
        run = partial(gpu.decode, backend=backend, held=plan.held, out=out)
    elif backend == "triton":
        from .ops.decode.triton import decode as triton

        run = partial(triton.decode, out=out)
    elif backend == "numba":
        from .ops.decode.cpu import decode as run
    with without_autocast(q.device):
        topk_query = None if budget.keeps_queries else budget.topk_query
        return run(q, kv, mask, scores, value_tolerance, topk_query)


def _is_seen_to_fit(q: Tensor, kv: KVView, mask: Mask, value_tolerance: float) -> bool:
    """Whether q, which runs plainly, fits what a cache holds, at a tenth of the host's time that `_check` takes: only q is new, and the
    exact tokens may be. False where that is left to `_check`."""
    if type(value_tolerance) is not float or value_tolerance:
        return False
    if mask.key_padding_mask is not None or mask.kv_lens is not None or not kv.is_deferred or q.ndim != 4:
        return False
    form, (batch, heads, _, head_dim), dtype, device = kv.form, q.shape, q.dtype, q.device
    codes, v, has_gradient = form.codes, form.v, torch.is_grad_enabled()
    kv_heads, v_dim = v.shape[1], v.shape[3]
    if head_dim != codes.shape[-1] or batch != v.shape[0] or not kv_heads or heads % kv_heads:
        return False
    if device != v.device or dtype not in FLOAT_DTYPES:
        return False
    if isinstance(codes, FeatureCodes) and codes.scale is None and codes.dtype != dtype:
        return False
    if isinstance(v, Tensor) and form.v_scale is None and v.dtype != dtype:
        return False
    for part in kv.exact:
        k, rows = part.k, (batch, kv_heads, part.k.shape[2])
        if (
            part.positions is not None or k.shape != (*rows, head_dim) or part.v.shape != (*rows, v_dim)
            or not (k.dtype == part.v.dtype == dtype and k.device == part.v.device == device)
            or (has_gradient and (k.requires_grad or part.v.requires_grad))
        ):  # fmt: skip
            return False
    return True


def _check(q: Tensor, kv: KVView, mask: Mask, value_tolerance: float, *, is_of_cache: bool = False) -> None:
    """Raise unless all fit. What a cache of ours made is not looked at token by token: its indices are in range."""
    # past the tokens held a buffer may hold anything, which checked mode would find
    form, device = kv if is_checked() else kv.form, q.device if isinstance(q, Tensor) else None
    codes, v, v_scale = form.codes, form.v, form.v_scale
    # past a sequence's length a buffer may hold anything, NaN too
    may_hold_nan = kv.kv_lens is not None
    require_float("q", q)
    require(
        not (isinstance(codes, NarrowRows) and codes.bits == 3),
        "rows of 3 bits are values: keys that keep every feature are rows of 16, 8 or 4 bits",
    )
    if isinstance(codes, FeatureCodes):
        _check_stored(q, "codes", codes.values, codes.scale, may_hold_nan)
        _check_stored(q, "dense", codes.dense, codes.scale, may_hold_nan)
    if isinstance(v, Tensor):
        _check_stored(q, "v", v, v_scale, may_hold_nan)
    for name, rows in (("codes", codes), ("v", v)):
        if rows.device != device:
            raise ValueError(f"{name} is on {rows.device} but q is on {device}; move them together")
        if len(rows.shape) != 4:
            raise ValueError(f"{name} must be [B, H, N, D], got shape {tuple(rows.shape)}")
    if q.ndim != 4:
        raise ValueError(f"q must be [B, H, N, D], got shape {tuple(q.shape)}")
    if v_scale is not None:
        require_tensor("v_scale", v_scale)
        require(
            v_scale.shape == v.shape[:3] and v_scale.dtype == torch.float32 and v_scale.device == device,
            lambda: f"v_scale must be float32 [B, Hkv, N] = {tuple(v.shape[:3])} on {device}",
        )
    require(q.shape[-1] == codes.shape[-1], lambda: f"q has head_dim {q.shape[-1]}, the codes {codes.shape[-1]}")
    require(
        codes.shape[:3] == v.shape[:3],
        lambda: f"codes {tuple(codes.shape[:3])} and v {tuple(v.shape[:3])} must agree on [B, Hkv, N]",
    )
    require(
        v.shape[1] > 0 and q.shape[1] % v.shape[1] == 0,
        lambda: f"query heads must be a multiple of kv heads, got {q.shape[1]} and {v.shape[1]}",
    )
    require_tolerance(value_tolerance)
    for part in kv.exact:
        _check_exact(q, kv, part)
    batch = q.shape[0]
    if kv.page_table is None:
        require(v.shape[0] == batch, lambda: f"q has batch {batch}, codes and v {v.shape[0]}; they must agree")
        n = kv.n
    else:  # looked at before the view counts by it
        n = _check_pages(batch, v, kv.page_table, kv.kv_lens)
    padding, kv_lens = mask.key_padding_mask, kv.kv_lens
    if padding is not None:
        require_padding(padding, batch, n, q.device)
    if kv_lens is not None:
        require_tensor("kv_lens", kv_lens)
        require(
            kv_lens.shape == (batch,) and kv_lens.dtype in (torch.int32, torch.int64),
            lambda: f"kv_lens must be [B] = [{batch}] int32 or int64, got {kv_lens.dtype} {tuple(kv_lens.shape)}",
        )
        if may_look(kv_lens):
            require(
                bool((kv_lens >= 0).all()) and bool((kv_lens <= n).all()),
                lambda: f"kv_lens must be 0 to the {n} keys held, got {kv_lens.tolist()}",
            )
    if is_of_cache or not may_look(q):
        return
    if kv_lens is not None and kv.page_table is not None:
        _check_page_ids(kv.page_table, kv_lens.to(device), v)
    elif isinstance(kv.codes, FeatureCodes):
        lengths = [kv.n_coded] * batch if kv_lens is None else kv_lens.tolist()
        for b, length in enumerate(lengths):  # past it a buffer may hold anything
            kv.codes[b, :, :length].check_indices()


def _check_stored(q: Tensor, name: str, x: Tensor, scale: Tensor | None, may_hold_nan: bool) -> None:
    """Checks of codes or values that are not packed: of the dtype of q, or int8 with a scale."""
    if scale is None:
        require_float(name, x, may_hold_nan=may_hold_nan)
        if x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype} but q is {q.dtype}; cast them to one dtype")
    elif x.dtype != torch.int8:
        raise TypeError(f"{name} with a scale must be int8, got {x.dtype}")


def _check_exact(q: Tensor, kv: KVView, part: ExactKV) -> None:
    """Checks of tokens that a view holds as they came."""
    require_float("exact k", part.k, may_hold_nan=kv.is_placed)
    require_float("exact v", part.v, may_hold_nan=kv.is_placed)
    require_alike(q=q, k=part.k, v=part.v)
    codes, v = kv.form.codes, kv.form.v
    rows = (q.shape[0], v.shape[1], part.k.shape[2])
    require(
        part.k.shape == (*rows, codes.shape[-1]) and part.v.shape == (*rows, v.shape[-1]),
        lambda: (
            f"exact tokens {tuple(part.k.shape)} and {tuple(part.v.shape)} do not fit codes {tuple(codes.shape)} and v "
            f"{tuple(v.shape)}"
        ),
    )
    positions = part.positions
    if positions is None:
        require(
            kv.kv_lens is None and kv.page_table is None,
            "exact tokens beside kv_lens or pages need positions: the keys in place of whose codes they stand",
        )
        return
    require_tensor("positions", positions)
    require(
        part is kv.recent and kv.first is None,
        "exact tokens with positions are all in recent, the first ones too: leave first None",
    )
    require(
        positions.shape in ((1, part.k.shape[2]), (q.shape[0], part.k.shape[2]))
        and positions.dtype == torch.int64
        and positions.device == q.device,
        lambda: (
            f"positions must be int64 [B or 1, E] with B = {q.shape[0]}, E = {part.k.shape[2]} on {q.device}, got "
            f"{positions.dtype} {tuple(positions.shape)} on {positions.device}"
        ),
    )


def _check_pages(batch: int, v: Tensor | NarrowRows, page_table: Tensor, kv_lens: Tensor | None) -> int:
    """Checks of paged caches; the number of keys that the table has room for."""
    page_size = v.shape[2]
    require_page_size(page_size)
    require_tensor("page_table", page_table)
    require(
        page_table.ndim == 2 and page_table.shape[0] == batch and page_table.dtype == torch.int32
        and page_table.device == v.device,
        lambda: f"page_table must be int32 [B, max_pages] with B = {batch} on {v.device}, got {page_table.dtype} "
        f"{tuple(page_table.shape)} on {page_table.device}",
    )  # fmt: skip
    require(kv_lens is not None, "a page_table needs kv_lens: the table alone does not say how many keys are valid")
    return page_table.shape[1] * page_size


def _check_page_ids(page_table: Tensor, kv_lens: Tensor, v: Tensor | NarrowRows) -> None:
    pages, page_size = v.shape[0], v.shape[2]
    used = torch.arange(page_table.shape[1], device=v.device) * page_size < kv_lens[:, None]
    ids = page_table[used]
    require(
        bool((ids >= 0).all()) and bool((ids < pages).all()),
        f"page_table names pages outside of the pool of {pages}",
    )

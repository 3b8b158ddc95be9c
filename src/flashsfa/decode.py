"""`sparse_feature_decode`: a few queries against cached key codes, reading codes and never dense keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attention import sparse_feature_attention
from .checks import (
    checked_scale,
    checked_window,
    has_values,
    may_look,
    query_budget,
    refuse_transforms,
    require,
    require_alike,
    require_float,
    require_no_gradient,
    require_padding,
    require_page_size,
    require_tensor,
    require_tolerance,
)
from .codes import FeatureCodes, topk_codes
from .contexts import without_autocast
from .ops import plan
from .ops.decode import plain as decode_torch
from .ops.decode.plain import DecodeRules
from .ops.prefill.fused import lse_dtype


def sparse_feature_decode(
    q: Tensor,
    codes: FeatureCodes,
    v: Tensor,
    *,
    kv_lens: Tensor | None = None,
    topk_query: int | None = None,
    query_pattern: str | None = None,
    scale: float | None = None,
    window: int | None = None,
    key_padding_mask: Tensor | None = None,
    page_table: Tensor | None = None,
    v_scale: Tensor | None = None,
    value_tolerance: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of the last M tokens over a cache of key codes. No gradients: refused where one is asked for.

    Runs on Triton kernels on a GPU, compiled by numba on the CPU where it is installed, and in plain PyTorch
    elsewhere; `flashsfa.explain()` tells which.

    Args:
        q: [B, Hq, M, D] queries of the newest M tokens; the last one stands at the last key.
        codes: key codes [B, Hkv, N, ...], as `SparseKVCache` holds them.
        v: [B, Hkv, N, Dv].
        kv_lens: [B] integer number of valid keys of each sequence, at most N; N for all when None. Lengths on a GPU
            are looked at in checked mode only; a longer one counts as N.
        topk_query: kept features of a query: None for the codes' topk, D for dense queries.
        query_pattern: as in `sparse_feature_attention`, for queries like those of a prompt read with it.
        scale: 1/sqrt(D) by default.
        window: see only the `window` most recent keys.
        key_padding_mask: [B, N] bool, True where a key is padding.
        page_table: [B, max_pages] int32. Codes and v are then pools of pages [P, Hkv, page_size, ...], page_size a
            power of two from 16 to 256; key j of sequence b is slot j % page_size of page
            `page_table[b, j // page_size]`, and N = max_pages * page_size. Needs kv_lens; entries past a
            sequence's length are not read.
        v_scale: [B, Hkv, N] float32 factor of each row of v, where v is int8. The codes may be 8-bit
            with their own scale (`FeatureCodes.quantize`) then.
        value_tolerance: leave out V rows that carry at most this share of each query's weight, 0 <= τ < 1. The
            output moves by at most 2·τ·max‖v‖. 0 is exact.
        return_lse: also return the log-sum-exp of each query's scores.

    Returns:
        out [B, Hq, M, Dv]; with return_lse also lse [B, Hq, M] float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: inputs that do not fit, before anything is computed.
        NotImplementedError: inside a torch.func transform or forward-mode differentiation.
    """
    window = checked_window(window)
    _check(q, codes, v, DecodeRules(kv_lens, window, key_padding_mask, page_table), v_scale, value_tolerance)
    require_no_gradient(q, codes.values, codes.dense, v)
    refuse_transforms(
        "sparse_feature_decode", "use sparse_feature_attention with backend='reference'", q, codes.values, v
    )
    kv_lens = None if kv_lens is None else kv_lens.to(q.device)
    rules = DecodeRules(kv_lens, window, key_padding_mask, page_table)
    scale = checked_scale(scale, q.shape[-1])
    head_dim, dense_dims = q.shape[-1], codes.dense_dims
    topk_query = query_budget(topk_query, codes.topk, head_dim, dense_dims, query_pattern)
    if query_pattern is not None:  # the kernels know no pattern: they take the pruned rows as dense queries
        q = topk_codes(q, topk_query, dense_dims=dense_dims, pattern=query_pattern).to_dense()
        topk_query = head_dim
    if 0 in (*q.shape, v.shape[2], *(() if page_table is None else page_table.shape)):
        out = q.new_zeros((*q.shape[:3], v.shape[-1]))
        lse = torch.full(q.shape[:3], -math.inf, dtype=lse_dtype(q.dtype), device=q.device)
        return (out, lse) if return_lse else out
    kept = None if topk_query == head_dim else topk_query
    run = _backend(q, rules)
    with without_autocast(q.device):
        out, lse = run(q, codes, v, rules, scale, value_tolerance, topk_query=kept, v_scale=v_scale)
    return (out, lse) if return_lse else out


FEW_QUERIES = 16  # up to here codes are read as they are; more queries repay spreading the keys out once


def attend_cached(
    q: Tensor,
    codes: FeatureCodes,
    v: Tensor,
    *,
    topk_query: int | None = None,
    query_pattern: str | None = None,
    scale: float | None = None,
    window: int | None = None,
    key_padding_mask: Tensor | None = None,
    v_scale: Tensor | None = None,
    value_tolerance: float = 0.0,
) -> Tensor:
    """The newest tokens' q [B, Hq, M, D] over all cached codes and v: decode for few queries, prefill for many.

    `value_tolerance` is a saving of decode; prefill is exact. No gradients: refused where one is asked for.
    """
    out: Any
    queries: dict[str, Any] = {"topk_query": topk_query, "query_pattern": query_pattern}
    if q.shape[2] <= FEW_QUERIES:
        out = sparse_feature_decode(
            q, codes, v, **queries, scale=scale, window=window, key_padding_mask=key_padding_mask, v_scale=v_scale,
            value_tolerance=value_tolerance,
        )  # fmt: skip
    else:
        require_tolerance(value_tolerance)
        require_no_gradient(q, codes.values, v)
        codes = codes if codes.scale is None else codes.to(q.dtype)
        v = v if v_scale is None else (v.float() * v_scale[..., None]).to(q.dtype)
        out = sparse_feature_attention(
            q, codes, v, **queries, scale=scale, window=window, key_padding_mask=key_padding_mask, is_causal=True
        )  # fmt: skip
    return out


def _backend(q: Tensor, rules: DecodeRules) -> Callable[..., tuple[Tensor, Tensor]]:
    """The `decode` function for these tensors, recorded for `explain()`."""
    run, name, reason = _fused(q, rules)
    if not torch.compiler.is_compiling():
        plan.record("decode", name, reason, fallback=name == "torch")
    return run


def _fused(q: Tensor, rules: DecodeRules) -> tuple[Callable[..., tuple[Tensor, Tensor]], str, str]:
    """The fastest `decode`, its name and the reason."""
    plain = decode_torch.decode, "torch"
    if not torch.compiler.is_compiling() and not has_values(q):
        return *plain, "the tensors hold no values"
    if q.device.type == "cuda":
        try:
            from .ops.decode.triton import decode as decode_triton
        except ImportError:
            return *plain, "the fused kernels need Triton"
        if q.dtype in decode_triton.DTYPES:
            return decode_triton.decode, "triton", "kernels over codes, split over the keys"
        return *plain, f"the fused kernels take no {q.dtype}"
    if q.device.type != "cpu":
        return *plain, f"no fused kernels on {q.device.type}"
    from .ops.decode import cpu as decode_numba

    if not decode_numba.is_available():
        return *plain, "the fused CPU code needs numba: pip install 'flashsfa[cpu]'"
    if torch.compiler.is_compiling():
        return *plain, "the fused CPU code cannot be traced by torch.compile"
    if rules.page_table is not None:
        return *plain, "the fused CPU code reads no pages"
    if not decode_numba.supports(q.dtype):
        return *plain, f"the fused CPU code takes no {q.dtype}"
    return decode_numba.decode, "numba", decode_numba.manner()


def _check(
    q: Tensor, codes: FeatureCodes, v: Tensor, rules: DecodeRules, v_scale: Tensor | None, value_tolerance: float
) -> None:
    require(
        isinstance(codes, FeatureCodes),
        lambda: f"codes must be FeatureCodes, got {type(codes).__name__}; see topk_codes",
    )
    scaled = {"q": None, "codes": codes.scale, "dense": codes.scale, "v": v_scale}
    tensors = {"q": q, "codes": codes.values, "dense": codes.dense, "v": v}
    for name, x in tensors.items():
        if scaled[name] is None:
            # past a sequence's length a buffer may hold anything, NaN too
            require_float(name, x, may_hold_nan=name != "q" and rules.kv_lens is not None)
        require_tensor(name, x)
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, H, N, D], got shape {tuple(x.shape)}")
    require_alike(**{name: x for name, x in tensors.items() if scaled[name] is None})
    for name, x in tensors.items():
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}; move them together")
        if scaled[name] is not None and x.dtype != torch.int8:
            raise TypeError(f"{name} with a scale must be int8, got {x.dtype}")
    if v_scale is not None:
        require_tensor("v_scale", v_scale)
    require(
        v_scale is None
        or (v_scale.shape == v.shape[:3] and v_scale.dtype == torch.float32 and v_scale.device == q.device),
        lambda: f"v_scale must be float32 [B, Hkv, N] = {tuple(v.shape[:3])} on {q.device}",
    )
    require(q.shape[-1] == codes.head_dim, lambda: f"q has head_dim {q.shape[-1]}, the codes {codes.head_dim}")
    require(
        codes.values.shape[:3] == v.shape[:3],
        lambda: f"codes {tuple(codes.values.shape[:3])} and v {tuple(v.shape[:3])} must agree on [B, Hkv, N]",
    )
    require(
        v.shape[1] > 0 and q.shape[1] % v.shape[1] == 0,
        lambda: f"query heads must be a multiple of kv heads, got {q.shape[1]} and {v.shape[1]}",
    )
    require_tolerance(value_tolerance)
    batch, n = q.shape[0], v.shape[2]
    if rules.page_table is None:
        require(v.shape[0] == batch, lambda: f"q has batch {batch}, codes and v {v.shape[0]}; they must agree")
    else:
        n = _check_pages(batch, v, rules.page_table, rules.kv_lens)
    padding, kv_lens = rules.key_padding_mask, rules.kv_lens
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
    if not may_look(v):
        return
    if kv_lens is None:
        codes.check_indices()
    elif rules.page_table is not None:
        _check_page_ids(rules.page_table, kv_lens.to(v.device), v)
    else:  # past a sequence's length a buffer may hold anything
        for b, length in enumerate(kv_lens.tolist()):
            codes[b, :, :length].check_indices()


def _check_pages(batch: int, v: Tensor, page_table: Tensor, kv_lens: Tensor | None) -> int:
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


def _check_page_ids(page_table: Tensor, kv_lens: Tensor, v: Tensor) -> None:
    pages, page_size = v.shape[0], v.shape[2]
    used = torch.arange(page_table.shape[1], device=v.device) * page_size < kv_lens[:, None]
    ids = page_table[used]
    require(
        bool((ids >= 0).all()) and bool((ids < pages).all()),
        f"page_table names pages outside of the pool of {pages}",
    )

"""Inputs of the operator, and the rule by which every result of it is judged."""

import math

import torch

from flashsfa import FeatureCodes, reference, topk_codes
from flashsfa import sparse_feature_attention as attention
from flashsfa.mask import Mask


def inputs(n_q, n_k, *, heads=(2, 2), d=32, d_v=None, dtype=torch.float32, batch=2, strided=False):
    """q, k and v; strided ones are views with gaps in memory and heads after tokens."""
    tensors = []
    for h, n, width in ((heads[0], n_q, d), (heads[1], n_k, d), (heads[1], n_k, d_v or d)):
        x = torch.randn(batch, n, h, 2 * width, dtype=dtype).transpose(1, 2)[..., ::2]
        tensors.append(x if strided else x.contiguous())
    return tensors


def outputs_and_gradients(function, q, k, v, grad_out):
    """(out, lse, dq, dk, dv) of function(q, k, v) -> (out, lse)."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = function(q, k, v)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def sparse_rows(x, topk, dense_dims):
    """x with only its coded entries, and 1 where an entry is kept."""
    if topk == x.shape[-1]:
        return x, torch.ones_like(x)
    codes = topk_codes(x, topk, dense_dims=dense_dims)
    ones = FeatureCodes(torch.ones_like(codes.dense), torch.ones_like(codes.values), codes.indices, codes.head_dim)
    return codes.to_dense(), ones.to_dense()


def assert_error_rule(
    q,
    k,
    v,
    grad_out=None,
    *,
    topk,
    topk_query=None,
    dense_dims=0,
    scale=None,
    gradient="kept",
    backend="auto",
    softcap=None,
    sinks=None,
    **visible,
):
    """At most twice the error of the same mathematics in the same dtype, both measured against fp64.

    All three run on the operator's own choice of features, so ties in the selection do not count.
    """
    mask = Mask(**visible)
    if grad_out is None:
        grad_out = torch.randn(*q.shape[:-1], v.shape[-1], dtype=v.dtype)

    def operator(q, k, v):
        options = {"topk": topk, "topk_query": topk_query, "dense_dims": dense_dims, "gradient": gradient}
        options |= {"scale": scale, "softcap": softcap, "sinks": sinks}
        return attention(q, k, v, **options, return_lse=True, backend=backend, **visible)

    def plain(q, k, v):
        return reference.attention(q, k, v, mask=mask, scale=scale, softcap=softcap, sinks=sinks)

    q_sparse, q_kept = sparse_rows(q, topk_query or topk, dense_dims)
    k_sparse, k_kept = sparse_rows(k, topk, dense_dims)
    rows = (q_sparse, k_sparse, v, grad_out)
    got = outputs_and_gradients(operator, q, k, v, grad_out)
    same_dtype = outputs_and_gradients(plain, *rows)
    truth = outputs_and_gradients(plain, *(x.double() for x in rows))
    kept = (1, 1, q_kept, k_kept, 1) if gradient == "kept" else (1, 1, 1, 1, 1)
    # dq and dk are differences of terms as large as grad_out · out; where these cancel, their rounding stays.
    terms = (1 / math.sqrt(q.shape[-1]) if scale is None else abs(scale)) * largest((grad_out * truth[0]).abs().sum(-1))
    terms = (0, 0, terms * largest(k_sparse), terms * largest(q_sparse), 0)
    eps = torch.finfo(q.dtype).eps
    names = ("out", "lse", "dq", "dk", "dv")
    for name, x, y, ref, support, term in zip(names, got, same_dtype, truth, kept, terms, strict=True):
        expected_dtype = torch.promote_types(q.dtype, torch.float32) if name == "lse" else q.dtype
        assert x.dtype == expected_dtype, name
        y, ref = y * support, ref * support
        assert x.shape == ref.shape, name
        assert torch.equal(x.isneginf(), ref.isneginf()), name
        assert not x.isnan().any(), name
        x, y, ref = (z.masked_fill(ref.isneginf(), 0) for z in (x, y, ref))
        assert largest(x - ref) <= 2 * largest(y - ref) + eps * (4 * largest(ref) + term), name
    return got

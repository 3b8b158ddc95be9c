"""Inputs of the prefill kernel for Hopper, and the rules by which its results and those of the public path are judged."""

import dataclasses

import pytest
import torch

from flashsfa import reference, sparse_feature_attention
from flashsfa.codes import all_dense_codes, topk_codes
from flashsfa.mask import Mask
from flashsfa.ops.prefill.hopper import prefill

BF16, FP16 = torch.bfloat16, torch.float16


hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def coded(q, dense_dims=0):
    """q [..., D] as the kernel takes it: all that the 2:4 pattern holds beside the dense channel."""
    sparse_dims = q.shape[-1] - dense_dims
    return topk_codes(q, sparse_dims // 2, dense_dims=dense_dims, pattern="2:4") if sparse_dims else all_dense_codes(q)


def normal(*shape, dtype=BF16):
    return torch.randn(*shape, dtype=dtype, device="cuda")


def packing(q_lengths, k_lengths):
    """What an `Mask` says about packed sequences of these lengths."""
    bounds = [torch.tensor([0, *n], device="cuda").cumsum(0, dtype=torch.int32) for n in (q_lengths, k_lengths)]
    return {"cu_seqlens_q": bounds[0], "cu_seqlens_k": bounds[1],
            "max_seqlen_q": max(q_lengths), "max_seqlen_k": max(k_lengths)}  # fmt: skip


def check(q, k, v, is_causal, window=None, lengths=None, **changes):
    """The error rule for out and log-sum-exp, against fp64, with both default tiles. `q` are codes, packed where
    there are `lengths` (of their sequences and of the keys'); barriers trap instead of hanging."""
    scale = q.head_dim**-0.5
    mask = Mask(is_causal, window, **(packing(*lengths) if lengths else {}))
    assert prefill.obstacle(q, q.dense_dims, k, v, mask, scale) is None
    rows = q.to_dense()
    truth, true_lse = reference.attention(rows.double(), k.double(), v.double(), mask=mask, scale=scale)
    plain, plain_lse = reference.attention(rows, k, v, mask=mask, scale=scale)
    allowed = 2 * (plain.double() - truth).abs().max() + 4 * torch.finfo(q.dtype).eps * truth.abs().max()
    seen = true_lse.isfinite()
    if seen.any():
        lse_allowed = 2 * (plain_lse.double() - true_lse)[seen].abs().max() + 1e-5 * true_lse[seen].abs().max()
    usual = [
        prefill.default_tile(q.dtype, q.head_dim, v.shape[-1], q.dense_dims, long_context=long_context)
        for long_context in (False, True)
    ]
    for tile in dict.fromkeys(dataclasses.replace(tile, spin_limit=1 << 22, **changes) for tile in usual):
        out, lse = prefill.forward(q, k, v, mask=mask, scale=scale, tile=tile)
        assert out.shape == truth.shape
        assert out.dtype == q.dtype
        assert (out.double() - truth).abs().max() <= allowed
        assert torch.equal(lse == -torch.inf, ~seen)
        if seen.any():
            assert (lse.double() - true_lse)[seen].abs().max() <= lse_allowed
        again, _ = prefill.forward(q, k, v, mask=mask, scale=scale, tile=tile)
        assert torch.equal(out, again)


def slope(out):
    """A fixed gradient; float16 cannot count more than 65504 entries."""
    return torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view(out.shape)


def attend(q, k, v, **options):
    """Output, log-sum-exp and gradients under a fixed output gradient."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = sparse_feature_attention(q, k, v, return_lse=True, **options)
    out.backward(slope(out))
    return out.detach(), lse, q.grad, k.grad, v.grad


def plain(q, k, v, *, topk, topk_query, dense_dims, is_causal):
    """The same by `reference`, in the dtype of the inputs, in full."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = reference.sparse_feature_attention(
        q, k, v, topk=topk, topk_query=topk_query, dense_dims=dense_dims, query_pattern="2:4",
        mask=Mask(is_causal),
    )  # fmt: skip
    out.backward(slope(out))
    return out.detach(), lse.detach(), q.grad, k.grad, v.grad


def check_public(q, k, v, backend="auto", **options):
    """The error rule for outputs and gradients. Inputs select alike in every dtype."""
    found = attend(q, k, v, query_pattern="2:4", backend=backend, **options)
    truth = plain(q.double(), k.double(), v.double(), **options)
    rough = plain(q, k, v, **options)
    # dq and dk are differences of terms as large as grad_out · out; where these cancel, their rounding stays.
    terms = q.shape[-1] ** -0.5 * truth[0].abs().sum(-1).max()  # |grad_out| <= 1
    terms = (0, 0, terms * k.abs().max(), terms * q.abs().max(), 0)
    eps = torch.finfo(q.dtype).eps
    for x, exact, same, term in zip(found, truth, rough, terms, strict=True):
        seen = exact.isfinite()
        assert torch.equal(x.isfinite(), seen)
        error, allowed = ((y.double() - exact)[seen].abs().max() for y in (x, same))
        assert error <= 2 * allowed + eps * (4 * exact[seen].abs().max() + term)

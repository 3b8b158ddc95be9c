"""The operators under torch.compile and torch.library's own checks."""

import pytest
import torch

from flashsfa import sparse_feature_attention, sparse_feature_attention_varlen, topk_codes


def heads_of(n, heads=2, **options):
    return torch.randn(2, heads, n, 16, **options)


def attend(options):
    return lambda q, k, v: sparse_feature_attention(q, k, v, topk=4, **options)


def packed(q, k, v):
    bounds = torch.tensor([0, 3, 9], dtype=torch.int32, device=q.device)
    rows = (x[0].transpose(0, 1) for x in (q, k, v))
    return sparse_feature_attention_varlen(*rows, bounds, bounds, 6, 6, topk=4, is_causal=True)


def padded(q, k, v):
    padding = torch.arange(9, device=q.device).expand(2, 9) > 6
    return sparse_feature_attention(q, k, v, topk=4, key_padding_mask=padding)


def code_and_attend(q, k, v):
    codes = topk_codes(k, 4, dense_dims=2)
    return sparse_feature_attention(q, codes, v) + codes.to_dense().sum()


FUNCTIONS = {
    "attention": attend({"is_causal": True}),
    "options": attend({"dense_dims": 2, "window": 5, "topk_query": 16, "scale": 0.3}),
    "padding": padded,
    "packed": packed,
    "codes": lambda q, k, v: topk_codes(q, 4, dense_dims=2).to_dense() + topk_codes(k, 3).values.sum() + v,
    "codes-as-keys": code_and_attend,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_equals_eager(name):
    torch._dynamo.reset()
    x = [heads_of(9, requires_grad=True) for _ in range(3)]
    results = []
    for function in (FUNCTIONS[name], torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")):
        out = function(*x)
        results.append((out, *torch.autograd.grad(out.square().sum(), x, allow_unused=True)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dense_dims", [0, 3])
def test_opcheck_topk_codes(dense_dims, dtype):
    x = heads_of(5, dtype=dtype, requires_grad=True).transpose(1, 2)
    torch.library.opcheck(torch.ops.flashsfa.topk_codes.default, (x, 4, dense_dims))


def flat(codes):
    return [codes.dense.requires_grad_(), codes.values.requires_grad_(), codes.indices]


@pytest.mark.parametrize(
    ("is_causal", "window", "padded"), [(True, None, False), (False, 3, False), (False, None, True)]
)
@pytest.mark.parametrize("backend", ["dense", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck_attention(is_causal, window, padded, backend, dtype):
    q, k, v = heads_of(5, 4, dtype=dtype), heads_of(7, dtype=dtype), heads_of(7, dtype=dtype)
    codes = [topk_codes(x, 4, dense_dims=2) for x in (q, k)]
    padding = torch.arange(7).expand(2, 7) > 4 if padded else None
    settings = (16, 0.25, is_causal, window, padding, None, None, 0, 0, backend)
    tensors = [*flat(codes[0]), *flat(codes[1]), v.requires_grad_()]
    op, backward = (getattr(torch.ops.flashsfa, x).default for x in ("codes_attention", "codes_attention_backward"))
    torch.library.opcheck(op, (*tensors, *settings, None))
    with torch.no_grad():
        out, lse = op(*tensors, *settings, None)
    tensors = [x.detach() for x in tensors]
    torch.library.opcheck(backward, (torch.randn_like(out), *tensors, out, lse, *settings))

"""Queries in the 2:4 pattern on the public path: on whatever device and backend, then on a Hopper GPU."""

import pytest
import torch

import flashsfa
from flashsfa import sparse_feature_attention
from flashsfa.codes import topk_codes
from flashsfa.ops.nvrtc import cuda
from flashsfa.ops.prefill.hopper import prefill
from hopper_cases import BF16, FP16, attend, check_public, hopper, normal, packing, slope

BUDGETS = [(64, 64, 8, 8, 0), (64, 64, 8, 32, 0), (64, 32, 8, 16, 32), (32, 16, 3, 5, 4)]  # D, Dv, topk, topk_query, M


@pytest.mark.parametrize("backend", ["auto", "dense", "reference"])
@pytest.mark.parametrize(("head_dim", "value_dim", "topk", "topk_query", "dense_dims"), BUDGETS)
def test_every_backend_prunes_alike(head_dim, value_dim, topk, topk_query, dense_dims, backend):
    q = torch.randn(2, 4, 9, head_dim)
    k, v = torch.randn(2, 2, 13, head_dim), torch.randn(2, 2, 13, value_dim)
    check_public(q, k, v, backend, topk=topk, topk_query=topk_query, dense_dims=dense_dims, is_causal=True)


@pytest.mark.parametrize("dense_dims", [0, 4])
def test_opcheck_selection(dense_dims):
    x = torch.randn(2, 3, 16, requires_grad=True)
    torch.library.opcheck(torch.ops.flashsfa.prune_24.default, (x, dense_dims))


def test_a_query_keeps_its_features_in_the_pattern():
    q, k, v = (torch.randn(1, 1, 6, 16, requires_grad=True) for _ in "qkv")
    sparse_feature_attention(q, k, v, topk=16, topk_query=5, query_pattern="2:4").sum().backward()
    kept = q.grad != 0
    assert torch.equal(kept, topk_codes(q.detach(), 5, pattern="2:4").to_dense() != 0)
    assert (kept.unflatten(-1, (-1, 4)).sum(-1) <= 2).all()


def test_packed_sequences_take_the_pattern():
    q, k, v = (torch.randn(11, 2, 16) for _ in "qkv")
    bounds = torch.tensor([0, 4, 11], dtype=torch.int32)
    options = {"topk": 3, "topk_query": 8, "query_pattern": "2:4", "is_causal": True}
    out = flashsfa.sparse_feature_attention_varlen(q, k, v, bounds, bounds, **options)
    for a, b in ((0, 4), (4, 11)):
        one = sparse_feature_attention(*(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), **options)
        torch.testing.assert_close(out[a:b], one[0].transpose(0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk_query": 9}, "at most half"),
        ({"topk_query": 16}, "at most half"),
        ({"dense_dims": 2}, "whole groups of four"),
        ({"query_pattern": "1:2"}, "'2:4' or None"),
    ],
    ids=str,
)
def test_budgets_that_the_pattern_cannot_hold(options, message):
    x = torch.randn(1, 1, 3, 16)
    with pytest.raises(ValueError, match=message):
        sparse_feature_attention(x, x, x, **{"topk": 3, "query_pattern": "2:4"} | options)


@pytest.mark.cpu
def test_what_the_kernel_cannot_take_is_explained(caplog):
    x = torch.randn(1, 1, 3, 64).to(BF16)
    sparse_feature_attention(x, x, x, topk=8, query_pattern="2:4")
    assert "attention: sparse features through a dense kernel (" in flashsfa.explain()
    assert "no sparse tensor cores" in flashsfa.explain()
    assert "Hopper" in flashsfa.explain()


@pytest.mark.cpu
def test_a_kernel_that_cannot_be_compiled_falls_back(monkeypatch):
    def refuse(*_, **__):
        raise cuda.CompilationError("no NVRTC here")

    monkeypatch.setattr(prefill, "obstacle", lambda *_: None)
    monkeypatch.setattr(prefill, "forward", refuse)
    x = torch.randn(1, 2, 9, 64).to(BF16)
    check_public(x, x, x, topk=8, topk_query=32, dense_dims=0, is_causal=True)
    assert "cannot be compiled: no NVRTC here" in flashsfa.explain()


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("head_dim", "topk_query", "dense_dims", "n_q", "n_k"),
    [(64, 32, 0, 200, 200), (128, 64, 0, 129, 300), (64, 16, 32, 65, 65), (128, 48, 32, 200, 200), (128, 16, 0, 100, 100),
     (128, 16, 32, 300, 129)],
)  # fmt: skip
def test_public_path_and_gradients(head_dim, topk_query, dense_dims, n_q, n_k, dtype):
    q = normal(2, 4, n_q, head_dim, dtype=dtype)
    k, v = (normal(2, 2, n_k, head_dim, dtype=dtype) for _ in "kv")
    check_public(q, k, v, topk=16, topk_query=topk_query, dense_dims=dense_dims, is_causal=True)
    assert "attention: hopper (" in flashsfa.explain()
    assert "attention_backward: sparse features through a dense kernel (" in flashsfa.explain()


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "window"), [(64, None), (128, None), (128, 900), (256, None)])
def test_dense_queries_take_the_kernel_where_it_is_faster(head_dim, window):
    """The error rule against fp64, gradients included; short prompts stay with torch."""
    options = {"topk": 16, "topk_query": head_dim, "is_causal": True, "window": window}

    def results(dtype, n, backend):
        torch.manual_seed(1)
        rows = [torch.randn(1, 1, n, head_dim, device="cuda").to(BF16).to(dtype).requires_grad_() for _ in "qkv"]
        out, lse = sparse_feature_attention(*rows, return_lse=True, backend=backend, **options)
        out.backward(slope(out))
        return out.detach(), lse, *(x.grad for x in rows)

    results(BF16, 100, "auto")
    assert "attention: sparse features through a dense kernel (" in flashsfa.explain()
    found = results(BF16, 4100, "auto")
    assert "attention: hopper (the kernel for Hopper, with dense queries)" in flashsfa.explain()
    for x, exact, same in zip(
        found, results(torch.float64, 4100, "reference"), results(BF16, 4100, "dense"), strict=True
    ):
        error, allowed = ((y.double() - exact).abs().max() for y in (x, same))
        assert error <= 2 * allowed + 4 * torch.finfo(BF16).eps * exact.abs().max()


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
def test_public_path_of_packed_sequences(is_causal):
    """Outputs and gradients as one by one."""
    q_lengths, k_lengths = [200, 1, 0, 65], [300, 1, 0, 64]
    q, k, v = (normal(sum(n), heads, 128) for n, heads in ((q_lengths, 4), (k_lengths, 2), (k_lengths, 2)))
    options = {"topk": 16, "topk_query": 64, "query_pattern": "2:4", "is_causal": is_causal, "return_lse": True}

    def results(attend):
        rows = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = attend(*rows)
        out.backward(slope(out))
        return out.detach(), lse, *(x.grad for x in rows)

    def packed(q, k, v):
        bounds = packing(q_lengths, k_lengths)
        return flashsfa.sparse_feature_attention_varlen(q, k, v, **bounds, **options)

    def one_by_one(q, k, v):
        sequences = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
        heads_first = [[x.transpose(0, 1)[None] for x in one] for one in sequences if len(one[0])]
        parts = [sparse_feature_attention(*one, **options) for one in heads_first]
        return torch.cat([out[0].transpose(0, 1) for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1)

    expected, found = results(one_by_one), results(packed)
    assert "attention: hopper (" in flashsfa.explain()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    for gradient, other in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(gradient, other, rtol=0.02, atol=0.02 * float(other.abs().max()))


@hopper
@pytest.mark.gpu
def test_public_path_compiles():
    q, k, v = (normal(1, 2, 150, 64) for _ in "qkv")
    options = {"topk": 8, "topk_query": 32, "query_pattern": "2:4", "is_causal": True}
    eager = attend(q, k, v, **options)

    @torch.compile(fullgraph=True)
    def compiled(q, k, v):
        return sparse_feature_attention(q, k, v, return_lse=True, **options)

    out, lse = compiled(q, k, v)
    assert torch.equal(out, eager[0])
    assert torch.equal(lse, eager[1])
    assert out.stride() == eager[0].stride()
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    compiled(q, k, v)[0].sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@hopper
@pytest.mark.gpu
def test_public_path_in_a_cuda_graph():
    q, k, v = (normal(1, 2, 150, 128) for _ in "qkv")
    options = {"topk": 16, "topk_query": 64, "query_pattern": "2:4", "is_causal": True}
    expected = sparse_feature_attention(q, k, v, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse_feature_attention(q, k, v, **options)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"key_padding_mask": True}, "no padding"),
        ({"scale": -1.0}, "positive scale"),
        ({"dense_dims": 16}, "multiple of 32"),
        ({"dtype": torch.float32}, "float16 and bfloat16"),
        ({"n": 0}, "nothing to attend"),
    ],
    ids=str,
)
def test_obstacles_are_explained(options, reason):
    x = normal(1, 1, options.pop("n", 70), 64, dtype=options.pop("dtype", BF16))
    if "key_padding_mask" in options:
        options["key_padding_mask"] = torch.zeros(1, 70, dtype=torch.bool, device="cuda")
    sparse_feature_attention(x, x, x, topk=8, query_pattern="2:4", **options)
    assert reason in flashsfa.explain()

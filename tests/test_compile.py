"""The operators under torch.compile and torch.library's own checks."""

import functools

import pytest
import torch

import flashsfa
from flashsfa import sparse_feature_attention, sparse_feature_attention_varlen, topk_codes
from flashsfa.budget import FeatureBudget
from flashsfa.codes import all_dense_codes
from flashsfa.contexts import constant_in_traces
from flashsfa.mask import Mask
from flashsfa.ops import record
from flashsfa.ops.prefill import operator
from flashsfa.scores import ScoreRules


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
    "gradient": attend({"is_causal": True, "gradient": "all"}),
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
def test_opcheck_topk(dense_dims, dtype):
    x = heads_of(5, dtype=dtype, requires_grad=True).transpose(1, 2)
    torch.library.opcheck(torch.ops.flashsfa.topk.default, (x, 4, dense_dims))


BUDGETS = [(4, 4, None), (16, 4, None), (4, 16, None), (6, 4, "2:4")]
BACKENDS = [("dense", False), ("auto", True), ("auto", False)]  # and with "all" gradients a cap and sinks
MASKS = [(True, None, False), (False, 3, False), (False, None, True)]
DTYPES = [torch.bfloat16, torch.float32]


# Every budget with every backend; masks and dtypes go round, so that any two of the four meet.
@pytest.mark.parametrize(
    ("budget", "backend", "mask", "dtype"),
    [
        (budget, backend, MASKS[(i + j) % 3], DTYPES[(i + j) % 2])
        for i, budget in enumerate(BUDGETS)
        for j, backend in enumerate(BACKENDS)
    ],
    ids=str,
)
def test_opcheck_attention(budget, backend, mask, dtype):
    """Kept codes, and rows that stay as they are on either side; the backward operator over what the forward hands out."""
    (topk_query, topk, pattern), (backend, of_all), (is_causal, window, padded) = budget, backend, mask
    tensors = [
        x.requires_grad_() for x in (heads_of(5, 4, dtype=dtype), heads_of(7, dtype=dtype), heads_of(7, dtype=dtype))
    ]
    padding = torch.arange(7).expand(2, 7) > 4 if padded else None
    budget = FeatureBudget(16, topk, topk_query, 4, pattern)
    scores = ScoreRules(0.25, softcap=2.0 if of_all else None, sinks=torch.randn(4) if of_all else None)

    def flat(keep):
        return operator._flatten(
            operator._Call(budget, Mask(is_causal, window, padding), scores, keep, of_all, backend)
        )

    op, backward = (getattr(torch.ops.flashsfa, x).default for x in ("attention", "attention_backward"))
    torch.library.opcheck(op, (*tensors, *flat(True)))
    q, k, v = (x.detach() for x in tensors)
    torch.library.opcheck(op, (q, k, v, *flat(False)))
    out, lse, *_ = op(q, k, v, *flat(True))
    codes = [
        all_dense_codes(x) if kept == 16 else topk_codes(x, kept, dense_dims=4, pattern=rule)
        for x, kept, rule in ((q, topk_query, pattern), (k, topk, None))
    ]
    parts = [part for code in codes for part in (code.dense, code.values, code.indices)]
    torch.library.opcheck(backward, (torch.randn_like(out), *parts, v, out, lse, *flat(True)))


def test_what_cannot_be_traced_is_asked_once():
    @functools.cache
    @constant_in_traces
    def answer(device):
        torch._dynamo.graph_break()
        return device.type == "meta"

    def step(x):
        return x + 1 if answer(x.device) else x - 1

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(torch.zeros(2)), torch.full((2,), -1.0))


def test_what_is_said_breaks_no_graph(monkeypatch):
    """A fallback that is met first while a graph is compiled."""
    monkeypatch.setattr(record, "_announced", set())
    monkeypatch.setattr(record, "_last", {})

    def run(x):
        record.record("attention", "torch", "scores are built in blocks", fallback=True)
        return x + 1

    assert torch.compile(run, fullgraph=True, backend="eager")(torch.zeros(2)).tolist() == [1, 1]


def test_exact_tokens_compile_in_one_graph():
    q, k, v = heads_of(1, 4), heads_of(40), heads_of(40)
    kv = flashsfa.SparseKVCache(4, recent=4, first=2).append(k, v)
    with torch.no_grad():
        step = torch.compile(flashsfa.sparse_feature_decode, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(step(q, kv), flashsfa.sparse_feature_decode(q, kv))


@pytest.mark.parametrize("exact", [{}, {"recent": 4, "first": 2}], ids=["coded", "exact"])
@pytest.mark.parametrize("dtype", [None, torch.int8], ids=["as they come", "8 bits"])
def test_views_of_a_cache_that_goes_on_compile_in_one_graph(dtype, exact):
    """A view that was made outside of the trace, which no one has looked at."""
    torch._dynamo.reset()
    k, v = heads_of(60), heads_of(60)
    cache = flashsfa.SparseKVCache(4, dtype=dtype, **exact)
    cache.append(k[:, :, :50], v[:, :, :50])
    step = torch.compile(
        lambda q, kv: flashsfa.sparse_feature_decode(q, kv, topk_query="dense"), fullgraph=True, backend="eager"
    )
    with torch.no_grad():
        for i in range(50, 53):
            q = heads_of(1, 4)
            kv = cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
            found = step(q, kv)
            torch.testing.assert_close(found, flashsfa.sparse_feature_decode(q, kv, topk_query="dense"))

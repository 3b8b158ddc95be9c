"""Steps over a growing cache on the CPU, by what the first of them prepared: the same bits, and no input goes unchecked."""

import copy
from dataclasses import replace

import pytest
import torch

from flashsfa import CodeFormat, SparseKVCache, explain, sparse_feature_decode
from numba_marks import NUMBA

pytestmark = NUMBA
BATCH, HEADS, DIM = 2, 2, 32
FORMATS = {
    "features": {"topk": 5, "dense_dims": 7},
    "int8": {"topk": 5, "dense_dims": 7, "dtype": torch.int8},
    "bitmap": {"topk": 7, "dense_dims": 9, "dtype": CodeFormat()},
    "whole keys in 4 bits": {"topk": DIM, "dtype": CodeFormat()},
}


def same_as_once(q, view, **options):
    """A decode by what is prepared has the bits of one that prepares nothing."""
    assert view.prepared is not None
    expected = sparse_feature_decode(q, replace(view), **options)  # a view of its own
    for _ in range(2):
        assert torch.equal(sparse_feature_decode(q, view, **options), expected)


@pytest.mark.parametrize("exact", [{}, {"recent": 5, "first": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_steps_follow_a_growing_cache(options, dtype, exact):
    """Through moves of the newest tokens, growth of the coded ones, tokens taken back, a copy and a choice of sequences."""
    k, v = torch.randn(2, BATCH, HEADS, 70, DIM, dtype=dtype)
    cache = SparseKVCache(**options, **exact, capacity=45)
    cache.append(k[:, :, :40], v[:, :, :40])

    def step(end, queries=1, cache=cache, **rules):
        view = cache.append(k[:, :, end - 1 : end], v[:, :, end - 1 : end])
        same_as_once(torch.randn(BATCH, 3 * HEADS, queries, DIM, dtype=dtype), view, **rules)
        return view.n

    for end in range(41, 56):
        n = step(end)
    step(56, topk_query="dense", softcap=3.0)
    step(57, queries=3)
    step(58, window=9)
    step(59, value_tolerance=0.05)
    step(60, key_padding_mask=torch.rand(BATCH, n + 5) < 0.3)
    assert "decode: numba" in explain()
    step(61, cache=copy.deepcopy(cache))
    cache.select_batch(torch.tensor([1, 1]))
    step(62)
    cache.crop(50)
    step(63)


def test_an_output_has_its_place():
    cache = SparseKVCache(5, dense_dims=7)
    view = cache.append(*torch.randn(2, BATCH, HEADS, 50, DIM))
    q, place = torch.randn(BATCH, 2 * HEADS, 1, DIM), torch.empty(BATCH, 2 * HEADS, 1, DIM)
    expected = sparse_feature_decode(q, view).clone()
    assert sparse_feature_decode(q, view, out=place) is place
    assert torch.equal(place, expected)


def padding(n, **kind):
    return {"key_padding_mask": torch.zeros(BATCH, n, **kind)}


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda q: q.bfloat16(), {}, TypeError, "is torch.float32 but q is torch.bfloat16"),
        (lambda q: q.int(), {}, TypeError, "q must be float16, bfloat16, float32 or float64"),
        (lambda q: q.tolist(), {}, TypeError, "q must be a torch.Tensor"),
        (lambda q: q[..., :16], {}, ValueError, "q has head_dim 16, the codes 32"),
        (lambda q: q[..., :5], {}, ValueError, "q has head_dim 5, the codes 32"),
        (lambda q: q[:, :3], {}, ValueError, "query heads must be a multiple of kv heads"),
        (lambda q: q[:1], {}, ValueError, "q has batch 1|do not fit codes"),
        (lambda q: q[:, :, 0], {}, ValueError, r"q must be \[B, H, N, D\]"),
        (lambda q: q.to("meta"), {}, ValueError, "q is on meta|codes is on cpu"),
        (lambda q: q.requires_grad_(), {}, ValueError, "carry no gradient"),
        (lambda q: q, padding(49, dtype=torch.bool), ValueError, "key_padding_mask must be bool"),
        (lambda q: q, padding(50, dtype=torch.uint8), ValueError, "key_padding_mask must be bool"),
        (lambda q: q, {"value_tolerance": 1.0}, ValueError, "value_tolerance"),
        (lambda q: q, {"value_tolerance": False}, TypeError, "value_tolerance"),
        (lambda q: q, {"topk_query": 26}, ValueError, "topk_query"),
        (lambda q: q, {"topk_query": True}, TypeError, "topk_query"),
        (lambda q: q, {"window": 0}, ValueError, "window"),
        (lambda q: q, {"window": True}, TypeError, "window"),
        (lambda q: q, {"scale": float("nan")}, ValueError, "scale"),
        (lambda q: q, {"sinks": torch.zeros(3)}, ValueError, "sinks"),
        (lambda q: q, {"out": torch.empty(BATCH, 4, 1, DIM + 1)}, ValueError, "out must be"),
    ],
)
@pytest.mark.parametrize("exact", [{}, {"recent": 5, "first": 2}], ids=str)
def test_what_changes_is_checked_again(change, options, error, message, exact):
    """After good calls, also of the rules that are equal to wrong ones."""
    cache = SparseKVCache(5, dense_dims=7, **exact)
    view = cache.append(*torch.randn(2, BATCH, HEADS, 50, DIM))
    q = torch.randn(BATCH, 2 * HEADS, 1, DIM)
    for good in ({}, {"window": 1}, {"topk_query": 1}, padding(50, dtype=torch.bool)):
        same_as_once(q, view, **good)
    with pytest.raises(error, match=message):
        sparse_feature_decode(change(q), view, **options)
    same_as_once(q.detach(), view)

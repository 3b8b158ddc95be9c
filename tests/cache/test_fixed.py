"""Caches of fixed size on a Hopper GPU, or in the emulator: one launch codes what comes, as PyTorch does, compiled or not."""

import pickle

import pytest
import torch

import flashsfa
from append_cases import HEADS, assert_same_view, draw, use_kernel
from flashsfa import SparseKVCache
from flashsfa.cache import contiguous
from flashsfa.formats import CodeFormat
from flashsfa.ops import record
from flashsfa.ops.select.hopper import append
from held_cases import axis_bits

FORMS = {
    "8 bits": {"topk": 8, "dense_dims": 4, "dtype": torch.int8},
    "4 bits": {"topk": 8, "dense_dims": 4, "dtype": CodeFormat()},
    "8 bits, exact tokens": {"topk": 8, "dense_dims": 4, "dtype": torch.int8, "recent": 3, "first": 2},
    "whole keys": {"topk": 64, "dtype": CodeFormat(value_bits=8, v_bits=8)},
}
CAPACITY = 24


def filled(options, k, v, *, compiles=False):
    """Two appends of several tokens, two of one, and one of which the last two tokens do not fit."""
    cache = SparseKVCache(**options, capacity=CAPACITY)
    cache.allocate(k, v)
    append = torch.compile(cache.append_at, fullgraph=True, backend="eager") if compiles else cache.append_at
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 20), (20, 26)):
        append(k[:, :, start:end], v[:, :, start:end], torch.tensor(start, device=k.device))
    return cache


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", [*FORMS, "bits per axis"])
def test_one_launch_writes_what_pytorch_codes(name, compiles, monkeypatch):
    torch._dynamo.reset()
    options = FORMS.get(name) or {"axes": axis_bits(HEADS, 64), "dtype": CodeFormat(v_bits=4)}
    k, v = draw(26)
    expected = SparseKVCache(**options, capacity=26)
    expected.allocate(k, v)
    for start, end in ((0, 9), (9, 26)):
        expected.write_at(
            expected.coder.encode(k[:, :, start:end], v[:, :, start:end]), torch.arange(start, end, device=k.device)
        )
        expected.keep_exact(k[:, :, start:end], v[:, :, start:end], torch.tensor(start, device=k.device))
    use_kernel(monkeypatch)
    found = filled(options, k, v, compiles=compiles)
    assert_same_view(found.kv, expected.kv.map(lambda x: x[:, :, :CAPACITY].contiguous()))
    assert record.last_choice("append").backend == "hopper"


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
def test_what_does_not_fit_is_refused_or_left_out(compiles, monkeypatch):
    torch._dynamo.reset()
    use_kernel(monkeypatch)
    k, v = draw(8)
    cache = SparseKVCache(**FORMS["8 bits"], capacity=CAPACITY)
    cache.allocate(k, v)
    before = [x.clone() for x in cache.kv.tensors()]
    append = torch.compile(cache.append_at, backend="eager") if compiles else cache.append_at
    append(k[:, :, :3], v[:, :, :3], torch.tensor(-3, device=k.device))
    assert all(torch.equal(x, y) for x, y in zip(cache.kv.tensors(), before, strict=True))
    start = torch.tensor(0, device=k.device)
    for k_wrong, v_wrong in (
        (k[:1], v[:1]),
        (k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1)),
        (k[:, :1], v[:, :1]),
        (k[0], v[0]),
        (k, v[:, :, 1:]),
    ):
        with pytest.raises(ValueError, match="do not fit a cache of"):
            cache.append_at(k_wrong, v_wrong, start)
    k[0, 0, 0, 0] = torch.nan
    wide = SparseKVCache(8, capacity=CAPACITY)
    wide.allocate(k, v)
    for filled_so in (cache, wide):
        with flashsfa.checked(), pytest.raises(ValueError, match="NaN"):
            filled_so.append_at(k, v, start)


def test_more_heads_than_a_launch_takes(monkeypatch):
    """As after a batch that was repeated; compiled, the kernel is not asked again whether it takes them."""
    torch._dynamo.reset()
    use_kernel(monkeypatch)
    monkeypatch.setattr(contiguous, "MOST_HEADS", 6)
    monkeypatch.setattr(append, "MOST_HEADS", 6)
    k, v = draw(4)
    cache = SparseKVCache(**FORMS["8 bits"], capacity=4)
    cache.allocate(k, v)
    cache.select_batch(torch.tensor([0, 1, 1, 0], device=k.device))
    k, v = (x[[0, 1, 1, 0]] for x in (k, v))
    torch.compile(cache.append_at, fullgraph=True, backend="eager")(k, v, torch.tensor(0, device=k.device))
    assert_same_view(cache.kv, cache.coder.encode(k, v))


def moved(cache):
    cache.to("cpu")
    return cache


@pytest.mark.parametrize(
    ("name", "leave"),
    [("4 bits", lambda cache: pickle.loads(pickle.dumps(cache))), ("8 bits", moved)],
    ids=["pickled", "moved"],
)
def test_a_cache_that_left_its_kernel_codes_where_it_is(name, leave, monkeypatch):
    k, v = draw(20)
    with monkeypatch.context() as patch:
        use_kernel(patch)
        cache = SparseKVCache(**FORMS[name], capacity=CAPACITY)
        cache.allocate(k, v)
        cache.append_at(k[:, :, :5], v[:, :, :5], torch.tensor(0, device=k.device))
        cache = leave(cache)
    k, v = (x.to(cache.v.device) for x in (k, v))
    cache.append_at(k[:, :, 5:], v[:, :, 5:], torch.tensor(5, device=k.device))
    assert_same_view(cache.kv.map(lambda x: x[:, :, :20].contiguous()), cache.coder.encode(k, v))

"""Whatever fails, wherever it fails: a cache stays as it was, and goes on."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flashsfa import PagedSparseKVCache, SparseKVCache

PAGE = 16


class FailAt(TorchDispatchMode):
    """The operation of this number fails, as if memory had run out."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError(f"no memory for {function}")
        return function(*args, **(kwargs or {}))


def tokens(n, b=2):
    return torch.randn(b, 2, n, 8), torch.randn(b, 2, n, 6)


def contiguous(dtype=None, filled=6):
    cache = SparseKVCache(3, dense_dims=2, capacity=8, dtype=dtype)
    if filled:
        cache.append(*tokens(filled))
    return cache


def paged(filled=5):
    """Two sequences that share a page with room left, and a third of its own."""
    cache = PagedSparseKVCache(3, dense_dims=2, pages=6, page_size=PAGE)
    first, other = cache.add(), cache.add()
    if filled:
        cache.append([first], *tokens(filled, b=1))
        cache.append([other], *tokens(PAGE, b=1))
    cache.fork(first)
    return cache


def state_of(cache):
    """Everything that a user sees of a cache, in copies."""
    if isinstance(cache, SparseKVCache):
        held = [len(cache), cache.capacity, cache.nbytes, cache.nbytes_allocated, cache.input_dtype]
        return held + ([] if not len(cache) else [cache.codes.to_dense().clone(), cache.v.clone()])
    held = [cache.free_pages, cache.nbytes, *(cache.length(s) for s in range(3))]
    if cache.nbytes:
        for s in range(3):
            (pages,) = cache.view([s]).page_table.long()
            for pool in (cache.codes.dense, cache.codes.values, cache.codes.indices, cache.v):
                held.append(pool[pages].transpose(0, 1).flatten(1, 2)[:, : cache.length(s)].clone())
    return held


CALLS = {
    "first": (lambda: contiguous(filled=0), lambda c, t: c.append(*t)),
    "within": (contiguous, lambda c, t: c.append(t[0][:, :, :2], t[1][:, :, :2])),
    "growing": (contiguous, lambda c, t: c.append(*t)),
    "growing in 8 bits": (lambda: contiguous(torch.int8), lambda c, t: c.append(*t)),
    "keep_last": (contiguous, lambda c, t: c.keep_last(3, 20)),
    "select_batch": (contiguous, lambda c, t: c.select_batch(torch.tensor([1, 1, 0]))),
    "to": (contiguous, lambda c, t: c.to("meta")),
    "paged, first": (lambda: paged(0), lambda c, t: c.append([0, 1], *t)),
    "paged": (paged, lambda c, t: c.append([0, 1], *t)),
    "paged, parting": (paged, lambda c, t: c.append([2, 0], *t)),
    "paged, many": (paged, lambda c, t: c.append([2, 1], *tokens(20))),
    "paged, too many": (paged, lambda c, t: c.append([2, 1], *tokens(200))),
}


def assert_as(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.cpu  # on a GPU an append is one launch
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_a_failure_at_any_operation_changes_nothing(name):
    make, call = CALLS[name]
    cache, more = make(), tokens(4)
    before = state_of(cache)
    for number in itertools.count():
        try:
            with FailAt(number):
                call(cache, more)
        except RuntimeError:  # an OutOfMemoryError is one
            assert_as(state_of(cache), before)
            if number > 400:
                assert name == "paged, too many"
                return
        else:
            break
    assert number > 2  # operations did fail
    untouched = make()  # fails nowhere: the same in the end
    assert_as([x for x in state_of(cache) if not isinstance(x, torch.Tensor)], [
        x for x in (call(untouched, more), state_of(untouched))[1] if not isinstance(x, torch.Tensor)
    ])  # fmt: skip


def test_a_fork_after_a_failed_append_reads_what_was_stored():
    cache = PagedSparseKVCache(3, pages=2, page_size=PAGE)
    sequence = cache.add()
    k, v = tokens(5, b=1)
    cache.append([sequence], k, v)
    for bad in ((k.double(), v.double()), (k[..., :4], v), (k, v[:, :, :2])):
        with pytest.raises((TypeError, ValueError)):
            cache.append([sequence], *bad)
    with pytest.raises(RuntimeError, match="1 are free"):
        cache.append([sequence], *tokens(40, b=1))
    fork = cache.fork(sequence)
    assert (cache.length(fork), cache.free_pages) == (5, 1)
    cache.free(sequence)
    cache.free(fork)
    assert cache.free_pages == 2

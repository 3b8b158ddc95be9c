"""Paged sequences decode as contiguous ones, forks share pages until they part, and pages come back."""

import copy

import pytest
import torch

from append_cases import DEVICE, same_bits, use_kernel
from flashsfa import sparse_feature_decode, topk_codes
from flashsfa.cache.paged import PagedSparseKVCache
from flashsfa.formats import CodeFormat
from flashsfa.ops import record
from flashsfa.ops.select.hopper import append as hopper

HKV, D, DV, PAGE = 2, 16, 12, 16


def tokens(n, b=1, dtype=torch.float32, device="cpu"):
    return torch.randn(b, HKV, n, D, device=device).to(dtype), torch.randn(b, HKV, n, DV, device=device).to(dtype)


def assert_holds(cache, stories):
    """`stories` maps each sequence to the keys and values [1, Hkv, N, ...] it should hold: decode all at once."""
    q = torch.randn(len(stories), 2 * HKV, 1, D)
    out = sparse_feature_decode(q, cache.view(list(stories)))
    for b, (sequence, (k, v)) in enumerate(stories.items()):
        assert cache.length(sequence) == k.shape[2]
        expected = sparse_feature_decode(q[b : b + 1], topk_codes(k, 4, dense_dims=3), v)
        torch.testing.assert_close(out[b : b + 1], expected)


def extend(story, new):
    return tuple(torch.cat(parts, dim=2) for parts in zip(story, new, strict=True))


def test_sequences_of_their_own_length():
    cache = PagedSparseKVCache(4, dense_dims=3, pages=12, page_size=PAGE)
    a, b, c = cache.add(), cache.add(), cache.add()
    stories = {a: tokens(PAGE), b: tokens(1), c: tokens(2 * PAGE + 3)}
    for sequence, story in stories.items():
        cache.append([sequence], *story)
    assert_holds(cache, stories)
    for n in (1, 1, 20):  # all three together, past the ends of pages
        k, v = tokens(n, b=3)
        cache.append([c, a, b], k, v)
        for i, sequence in enumerate((c, a, b)):
            stories[sequence] = extend(stories[sequence], (k[i : i + 1], v[i : i + 1]))
        assert_holds(cache, stories)


@pytest.mark.parametrize("shared", [PAGE - 1, PAGE, PAGE + 1])
def test_forks_share_until_they_part(shared):
    cache = PagedSparseKVCache(4, dense_dims=3, pages=10, page_size=PAGE)
    prompt = cache.add()
    story = tokens(shared)
    cache.append([prompt], *story)
    held = 10 - cache.free_pages
    branches = [prompt, cache.fork(prompt), cache.fork(prompt)]
    assert 10 - cache.free_pages == held  # nothing copied yet
    stories = dict.fromkeys(branches, story)
    assert_holds(cache, stories)
    for branch in branches:
        new = tokens(2)
        cache.append([branch], *new)
        stories[branch] = extend(stories[branch], new)
        assert_holds(cache, stories)
    cache.free(prompt)
    del stories[prompt]
    assert_holds(cache, stories)
    for branch in stories:
        cache.free(branch)
    assert cache.free_pages == 10
    assert cache.nbytes == 0


def test_freed_pages_are_used_again():
    cache = PagedSparseKVCache(4, dense_dims=3, pages=2, page_size=PAGE)
    for _ in range(3):
        sequence = cache.add()
        story = tokens(2 * PAGE)
        cache.append([sequence], *story)
        assert cache.free_pages == 0
        assert_holds(cache, {sequence: story})
        cache.free(sequence)


def test_nbytes_counts_shared_pages_once():
    cache = PagedSparseKVCache(4, dense_dims=3, pages=4, page_size=PAGE)
    assert cache.nbytes == 0
    sequence = cache.add()
    cache.append([sequence], *tokens(PAGE + 1))
    cache.fork(sequence)
    assert cache.nbytes == 2 * PAGE * HKV * (4 * 3 + 5 * 4 + 4 * DV)


def test_a_full_pool_stores_nothing():
    cache = PagedSparseKVCache(4, dense_dims=3, pages=2, page_size=PAGE)
    a, b = cache.add(), cache.add()
    story = tokens(PAGE + 1)
    cache.append([a], *story)
    with pytest.raises(RuntimeError, match="needs 1 pages, 0 are free"):
        cache.append([a, b], *tokens(1, b=2))
    copy = cache.fork(a)
    with pytest.raises(RuntimeError, match="needs 1 pages"):  # room in the last page, but it is shared
        cache.append([copy], *tokens(1))
    assert_holds(cache, {a: story, copy: story})


def test_two_holders_part_in_one_append():
    """The last holder of a page keeps it: one free page is enough."""
    cache = PagedSparseKVCache(4, dense_dims=3, pages=2, page_size=PAGE)
    a = cache.add()
    story = tokens(3)
    cache.append([a], *story)
    b = cache.fork(a)
    k, v = tokens(1, b=2)
    cache.append([a, b], k, v)
    assert_holds(cache, {s: extend(story, (k[i : i + 1], v[i : i + 1])) for i, s in enumerate((a, b))})


@pytest.mark.parametrize("bits", [None, torch.int8, CodeFormat(8, 4, v_bits=8)], ids=str)
def test_one_launch_stores_what_pytorch_does(bits, monkeypatch):
    """On a Hopper GPU: prompts, steps and pages that part, also in a copy of the cache, which has pools of its own."""
    sizes = {"dense_dims": 3, "pages": 12, "page_size": PAGE, "dtype": bits}
    steps = [tokens(n, b=2, dtype=torch.bfloat16, device=DEVICE) for n in (PAGE + 3, 1, 2, 0)]
    caches = []
    for has_kernel in (False, True):
        if has_kernel:
            use_kernel(monkeypatch)
        cache = PagedSparseKVCache(4, **sizes)
        sequences = [cache.add(), cache.add()]
        for k, v in steps:
            cache.append(sequences, k, v)
        sequences[0] = cache.fork(sequences[1])
        cache.append(sequences, *steps[1])
        caches.append(cache)
    assert record.last_choice("append").backend == "hopper"
    further = [copy.deepcopy(cache) for cache in caches]
    for cache in further:
        cache.append([1], *(x[:1] for x in steps[2]))
    for cache, other in (caches, further):
        one, another = (x.view([1, 2]) for x in (cache, other))
        assert torch.equal(one.page_table, another.page_table)
        written = one.page_table[one.page_table > 0].unique().long()
        for x, y in zip(one.tensors(), another.tensors(), strict=True):
            same_bits(x[written].nan_to_num(7), y[written].nan_to_num(7))


def test_pools_of_a_failed_append_are_forgotten(monkeypatch):
    """A kernel that could not be launched had been prepared for them."""
    use_kernel(monkeypatch)
    cache = PagedSparseKVCache(4, pages=3, page_size=PAGE)
    sequence, (k, v) = cache.add(), tokens(5, dtype=torch.bfloat16, device=DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(hopper.Paged, "__call__", lambda *_: (_ for _ in ()).throw(RuntimeError("no launch")))
        with pytest.raises(RuntimeError, match="no launch"):
            cache.append([sequence], k, v)
    assert cache.length(sequence) == 0
    cache.append([sequence], k, v)
    page = cache.view([sequence]).page_table[0, 0]
    assert torch.equal(cache.v[page, :, :5], v[0])


def test_errors():
    for options, message in (
        ({"pages": 0}, "pages must be at least 1"),
        ({"pages": 1, "page_size": 24}, "power of two"),
    ):
        with pytest.raises(ValueError, match=message):
            PagedSparseKVCache(4, **options)
    cache = PagedSparseKVCache(4, pages=4, page_size=PAGE)
    with pytest.raises(RuntimeError, match="empty"):
        _ = cache.codes
    a = cache.add()
    k, v = tokens(2)
    cache.append([a], k, v)
    for call, message in [
        (lambda: cache.append([7], k, v), "no sequence 7"),
        (lambda: cache.append([a, a], *tokens(1, b=2)), "once"),
        (lambda: cache.append([a], *tokens(1, b=2)), "B = 1"),
        (lambda: cache.append([a], k[:, :1], v[:, :1]), "does not fit"),
        (lambda: cache.append([a], k, v[..., :3]), "does not fit"),
        (lambda: cache.free(9), "no sequence 9"),
        (lambda: cache.view([a, 3]), "no sequence 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    for call in (
        lambda: cache.append(torch.tensor([a]), k, v),
        lambda: cache.append(a, k, v),
        lambda: cache.append(["0"], k, v),
        lambda: cache.view(a),
    ):
        with pytest.raises(TypeError, match=r"sequences must be a list of the integers that add\(\) returned, got"):
            call()
    with pytest.raises(TypeError, match="sequence must be an int, got"):
        cache.fork(torch.tensor(a))
    with pytest.raises(TypeError, match="cast"):
        cache.append([a], k.double(), v.double())
    assert cache.length(a) == 2

"""Exact tokens in place of their codes, in caches of fixed size, pages and ragged batches, against a list of tokens."""

import math

import pytest
import torch

from flashsfa import SparseKVCache, sparse_feature_decode
from flashsfa.budget import FeatureBudget
from flashsfa.cache.paged import PagedSparseKVCache
from flashsfa.decode import attend_cached
from flashsfa.reference import sparse_rows
from flashsfa.stored import ExactKV, KVView

HKV, GROUP, D, DV, TOPK, DENSE, PAGE = 2, 3, 16, 12, 3, 4, 16
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
SIZES = [(5, 3), (0, 3), (5, 0), (1, 1), (40, 2), (2, 40)]


def draw(n, batch=1):
    return torch.randn(batch, HKV, n, D, dtype=torch.float64), torch.randn(batch, HKV, n, DV, dtype=torch.float64)


class Tokens:
    """The plain model of one sequence: keys and values [Hkv, D] in a list, and for each whether it was coded."""

    def __init__(self, recent, first):
        self.recent, self.first, self.held = recent, first, []

    def append(self, k, v):
        self.held += [[k[:, i], v[:, i], False] for i in range(k.shape[1])]
        for position, token in enumerate(self.held[: max(0, len(self.held) - self.recent)]):
            token[2] = position >= self.first

    def fork(self):
        copy = Tokens(self.recent, self.first)
        copy.held = [list(token) for token in self.held]
        return copy

    def attend(self, q, window=None, padding=None, softcap=None):
        """out and lse of q [Hq, M, D], a query and a sum at a time."""
        m, n = q.shape[1], len(self.held)
        out, lse = torch.zeros(*q.shape[:2], DV, dtype=q.dtype), torch.full(q.shape[:2], -math.inf, dtype=q.dtype)
        thin = sparse_rows(q[None], TOPK, dense_dims=DENSE)[0]
        for head in range(q.shape[0]):
            for i in range(m):
                at = n - m + i
                seen = [j for j in range(at + 1) if window is None or j > at - window]
                seen = [j for j in seen if padding is None or not padding[j]]
                if not seen:
                    continue
                scores, values = [], []
                for k, v, is_coded in (self.held[j] for j in seen):
                    k = k[head // GROUP]
                    if is_coded:
                        k = sparse_rows(k[None, None, None], TOPK, dense_dims=DENSE)[0, 0, 0]
                    s = D**-0.5 * ((thin if is_coded else q)[head, i] @ k)
                    scores.append(s if softcap is None else softcap * torch.tanh(s / softcap))
                    values.append(v[head // GROUP])
                scores = torch.stack(scores)
                lse[head, i] = scores.logsumexp(0)
                out[head, i] = scores.softmax(0) @ torch.stack(values)
        return out, lse


def assert_decodes(view, models, m, **rules):
    q = torch.randn(len(models), HKV * GROUP, m, D, dtype=torch.float64)
    found = sparse_feature_decode(q, view, return_lse=True, **rules)
    padding = rules.pop("key_padding_mask", None)
    for b, model in enumerate(models):
        expected = model.attend(q[b], padding=None if padding is None else padding[b], **rules)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x[b], y, **CLOSE)


@pytest.mark.parametrize(("recent", "first"), [*SIZES, (0, 0)])
@pytest.mark.parametrize("seed", range(2))
def test_pages_hold_what_lists_hold(recent, first, seed):
    torch.manual_seed(seed)
    cache = PagedSparseKVCache(TOPK, dense_dims=DENSE, pages=60, page_size=PAGE, recent=recent, first=first)
    models = {cache.add(): Tokens(recent, first) for _ in range(3)}
    for step in range(14):
        names = list(models)
        kind, name = int(torch.randint(0, 6, ())), names[int(torch.randint(0, len(names), ()))]
        if kind == 4 and len(models) < 6:
            models[cache.fork(name)] = models[name].fork()
        elif kind == 5 and len(models) > 2:
            cache.free(name)
            del models[name]
        else:
            order = [names[i] for i in torch.randperm(len(names))[: 1 + step % len(names)]]
            k, v = draw((1, 1, 2, 11)[kind % 4], len(order))
            cache.append(order, k, v)
            for i, each in enumerate(order):
                models[each].append(k[i], v[i])
        if all(x.held for x in models.values()):
            view, m = cache.view(list(models)), (1, 3, 9)[step % 3]
            assert_decodes(view, list(models.values()), m, window=(None, 4)[step % 2], softcap=2.0)


def test_paged_bytes_count_shared_slots_once_and_are_given_back():
    cache = PagedSparseKVCache(TOPK, dense_dims=DENSE, pages=4, page_size=PAGE, recent=5, first=3)
    name = cache.add()
    cache.append([name], *draw(20))
    pages, slots = 2 * PAGE * HKV * (8 * (DENSE + TOPK + DV) + TOPK), 8 * HKV * 8 * (D + DV)
    fork = cache.fork(name)
    assert cache.nbytes == pages + slots
    cache.append([fork], *draw(1))
    assert cache.nbytes == 3 * pages // 2 + 2 * slots
    cache.free(name)
    cache.free(fork)
    assert cache.nbytes == 0


def test_a_failed_append_to_pages_leaves_the_exact_tokens(monkeypatch):
    cache, model = PagedSparseKVCache(TOPK, dense_dims=DENSE, pages=4, page_size=PAGE, recent=5, first=3), Tokens(5, 3)
    name = cache.add()
    k, v = draw(20)
    cache.append([name], k, v)
    model.append(k[0], v[0])
    with pytest.raises(RuntimeError, match="free"):
        cache.append([name], *draw(60))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_commit", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.append([name], *draw(4))
    assert_decodes(cache.view([name]), [model], 2)


def ragged(lengths, recent, first, n=30):
    """A view of sequences of several lengths, with NaN wherever nothing is held, and their models."""
    models, views = [], []
    for length in lengths:
        model = Tokens(recent, first)
        cache = SparseKVCache(TOPK, dense_dims=DENSE, capacity=n, recent=recent, first=first)
        cache.allocate(*draw(0))
        for x in (cache.codes.dense, cache.codes.values, cache.v, cache.kv.recent.k, cache.kv.recent.v):
            x.fill_(math.nan)
        start = 0
        for count in (length // 2, 1, length - length // 2 - 1) if length else ():
            k, v = draw(count)
            cache.append_at(k, v, torch.tensor(start))
            model.append(k[0], v[0])
            start += count
        models.append(model)
        views.append(cache.kv)
    kv = views[0].map(lambda *x: torch.cat(x), *views[1:])
    parts = [view.recent for view in views]
    positions = torch.cat([part.positions for part in parts])
    exact = parts[0].map(lambda *x: torch.cat(x), *parts[1:])
    recent = ExactKV(exact.k, exact.v, positions)
    return KVView(kv.codes, kv.v, None, torch.tensor(lengths), recent=recent), models


@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize(("recent", "first"), SIZES)
def test_batches_of_several_lengths(recent, first, m, padded, window):
    view, models = ragged([13, 4, 1, 17], recent, first, 17)
    padding = None
    if padded:
        padding = torch.zeros(4, 17, dtype=torch.bool)
        padding[0, :7] = padding[1, 2] = padding[3, 15] = True
    assert_decodes(view, models, m, window=window, key_padding_mask=padding, softcap=2.0)


@pytest.mark.parametrize("topk_query", [TOPK, D])
@pytest.mark.parametrize("m", [2, 20])
def test_few_and_many_queries_agree(m, topk_query):
    view, _ = ragged([30, 30], 5, 3)
    q = torch.randn(2, HKV * GROUP, m, D, dtype=torch.float64)
    budget = FeatureBudget.of(D, TOPK, topk_query=topk_query, dense_dims=DENSE)
    out = attend_cached(q, view, budget)
    expected = sparse_feature_decode(q, view, topk_query=topk_query)
    torch.testing.assert_close(out, expected, **CLOSE)


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_fused_kernels(backend, monkeypatch):
    pytest.importorskip(backend)
    if backend == "triton":  # in its interpreter where there is no GPU
        from flashsfa import decode as module
        from flashsfa.ops.plan import DecodePlan

        monkeypatch.setattr(module, "plan_decode", lambda q, kv: DecodePlan("triton", "asked for"))
    view, _ = ragged([23, 4], 5, 3)
    q = torch.randn(2, HKV * GROUP, 3, D, dtype=torch.float64)
    single = view.map(lambda x: x.float() if x.is_floating_point() else x)
    exact = view.recent.map(torch.Tensor.float)
    single = KVView(single.codes, single.v, None, view.kv_lens, recent=exact)
    found = sparse_feature_decode(q.float(), single)
    monkeypatch.undo()
    expected = sparse_feature_decode(q, view)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused():
    view, _ = ragged([9, 4], 5, 3)
    q = torch.randn(2, HKV * GROUP, 1, D, dtype=torch.float64)
    exact = view.recent

    def decode(**changed):
        return sparse_feature_decode(q, KVView(view.codes, view.v, None, view.kv_lens, **changed))

    with pytest.raises(ValueError, match="need positions"):
        decode(recent=ExactKV(exact.k, exact.v))
    with pytest.raises(ValueError, match="positions must be int64"):
        decode(recent=ExactKV(exact.k, exact.v, exact.positions[:, 1:]))
    with pytest.raises(ValueError, match="leave first None"):
        decode(recent=exact, first=exact)
    cache = SparseKVCache(TOPK, recent=2)
    cache.allocate(*draw(0))
    with pytest.raises(ValueError, match="append_at"):
        cache.append(*draw(1))
    with pytest.raises(ValueError, match="must be 0 to"):
        PagedSparseKVCache(TOPK, pages=2, recent=-1)

"""A cache that keeps its newest and first tokens as they came, against a list of tokens each of which is exact or coded."""

import math
from dataclasses import replace

import pytest
import torch

from flashsfa import SparseKVCache, explain, sparse_feature_decode, topk_codes
from flashsfa.budget import FeatureBudget
from flashsfa.codes import quantize_rows
from flashsfa.decode import attend_cached
from flashsfa.ops.prefill import masked
from flashsfa.reference import sparse_rows
from flashsfa.scores import ScoreRules
from flashsfa.stored import ExactKV

B, HKV, GROUP, D, DV, TOPK, DENSE = 2, 2, 3, 16, 12, 3, 4
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def draw(n, dtype=torch.float64, batch=B):
    return torch.randn(batch, HKV, n, D, dtype=dtype), torch.randn(batch, HKV, n, DV, dtype=dtype)


class Tokens:
    """The plain model: tokens (k, v, position, is exact) in a list."""

    def __init__(self, recent, first):
        self.recent, self.first, self.held = recent, first, []
        self.seen = 0

    def append(self, k, v):
        for i in range(k.shape[2]):
            self.held.append([k[:, :, i], v[:, :, i], self.seen, True])
            self.seen += 1
        for token in self.held[: max(0, len(self.held) - self.recent)]:
            if token[2] >= self.first:
                token[3] = False

    def crop(self, length):
        self.seen -= len(self.held) - length
        self.held = self.held[:length]

    def keep_last(self, length):
        self.held = self.held[max(0, len(self.held) - length) :]

    def select(self, rows):
        self.held = [[k[rows], v[rows], *rest] for k, v, *rest in self.held]

    def attend(self, q, topk_query=TOPK, window=None, padding=None, softcap=None, sinks=None, pattern=None):
        """Of the newest tokens' q, one query, key and sum at a time."""
        m, n, scale = q.shape[2], len(self.held), q.shape[-1] ** -0.5
        thin = sparse_rows(q, topk_query, dense_dims=DENSE, pattern=pattern)
        k = torch.stack([x[0] if x[3] else sparse_rows(x[0], TOPK, dense_dims=DENSE) for x in self.held], 2)
        v = torch.stack([x[1] for x in self.held], 2).repeat_interleave(GROUP, 1)
        k = k.repeat_interleave(GROUP, 1)
        exact = torch.tensor([x[3] for x in self.held])
        s = scale * (q @ k.mT).where(exact, thin @ k.mT)
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        position, key = torch.arange(n - m, n)[:, None], torch.arange(n)
        visible = (key <= position) & (key > position - (window or n + m))
        visible = visible if padding is None else visible & ~padding[:, None, None]
        s = s.masked_fill(~visible, -math.inf)
        lse = s.logsumexp(-1)
        if sinks is not None:
            lse = torch.logaddexp(lse, sinks[:, None])
        return (s - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).exp() @ v, lse


def both(recent, first, dtype=None, **options):
    return SparseKVCache(TOPK, dense_dims=DENSE, recent=recent, first=first, dtype=dtype, **options), Tokens(
        recent, first
    )


def assert_holds(cache, model):
    """The same tokens, exact or coded, in the same order."""
    exact = [token for token in model.held if token[3]]
    coded = [token for token in model.held if not token[3]]
    assert len(cache) == len(model.held)
    parts = cache.kv.exact
    held = [x for part in parts for x in part.k.unbind(2)], [x for part in parts for x in part.v.unbind(2)]
    assert [len(x) for x in held] == [len(exact)] * 2
    assert cache.codes.shape[2] == len(coded)
    for found, tokens in ((held[0], [x[0] for x in exact]), (held[1], [x[1] for x in exact])):
        assert all(torch.equal(x, y) for x, y in zip(found, tokens, strict=True))
    for i, (k, v, *_) in enumerate(coded):
        assert torch.equal(cache.codes[:, :, i].to_dense(), topk_codes(k, TOPK, dense_dims=DENSE).to_dense())
        assert torch.equal(cache.v[:, :, i], v)
    assert cache.kv.n_first == sum(token[2] < model.first for token in exact)
    heads = HKV * cache.kv.v.shape[0]
    size = 8 * (DENSE + TOPK + DV) + TOPK
    assert cache.nbytes == heads * (len(coded) * size + len(exact) * 8 * (D + DV))
    assert cache.key_nbytes == heads * (len(coded) * (size - 8 * DV) + len(exact) * 8 * D)


SIZES = [(0, 0), (5, 0), (0, 3), (5, 3), (1, 1), (40, 2)]


@pytest.mark.parametrize(("recent", "first"), SIZES)
@pytest.mark.parametrize("seed", range(4))
def test_any_steps_hold_what_a_list_holds(recent, first, seed):
    torch.manual_seed(seed)
    cache, model = both(recent, first, capacity=2)
    for _ in range(60):
        kind = int(torch.randint(0, 8, ()))
        n = len(model.held)
        if kind < 5 or not n:
            k, v = draw((1, 1, 2, 0, 13)[kind % 5], batch=model.held[0][0].shape[0] if n else B)
            view = cache.append(k, v)
            model.append(k, v)
            assert view.n == len(cache)
        elif kind == 5:
            length = int(torch.randint(0, n + 1, ())) if int(torch.randint(0, 3, ())) == 0 else max(0, n - 3)
            cache.crop(length)
            model.crop(length)
        elif kind == 6:
            rows = torch.tensor([1, 0])
            cache.select_batch(rows)
            model.select(rows)
        else:
            length = max(0, n - 2)
            cache.keep_last(length, length + 5)
            model.keep_last(length)
        if model.held:
            assert_holds(cache, model)


def test_a_token_is_coded_once_and_the_ring_does_not_grow():
    cache, model = both(5, 3)
    widths, room = [], set()
    code = cache._code
    cache._code = lambda kv, k, v, start: (widths.append(k.shape[2]), code(kv, k, v, start))
    for count in (20, *(1,) * 40, 7, 0, 2):
        k, v = draw(count)
        cache.append(k, v)
        model.append(k, v)
        room.add(cache.nbytes_allocated)
    cache.crop(-9)
    model.crop(len(model.held) - 9)
    k, v = draw(12)
    cache.append(k, v)
    model.append(k, v)
    assert_holds(cache, model)
    assert sum(widths) == sum(not token[3] for token in model.held) + 4  # of the 9 cropped, 5 were in the ring
    assert len(room) == 1


def test_nothing_exact_is_the_cache_without():
    (k, v), plain = draw(30), SparseKVCache(TOPK, dense_dims=DENSE)
    cache, _ = both(0, 0)
    for start, end in ((0, 9), (9, 10), (10, 30)):
        part = k[:, :, start:end], v[:, :, start:end]
        found, expected = cache.append(*part), plain.append(*part)
        assert all(torch.equal(x, y) for x, y in zip(found.tensors(), expected.tensors(), strict=True))
        assert found.exact == []
    assert cache.nbytes_allocated == plain.nbytes_allocated


QUERIES = [{}, {"topk_query": D}, {"topk_query": 6, "pattern": "2:4"}]


@pytest.mark.parametrize("queries", QUERIES, ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4, 12])
@pytest.mark.parametrize("m", [1, 3, 9, 20])
@pytest.mark.parametrize(("recent", "first"), [(5, 3), (0, 3), (5, 0)])
def test_decode_and_prompts_run_one_softmax(recent, first, m, window, padded, queries):
    cache, model = both(recent, first)
    for count in (25, 4, 1, 1):
        k, v = draw(count)
        view = cache.append(k, v)
        model.append(k, v)
    q = torch.randn(B, HKV * GROUP, m, D, dtype=torch.float64)
    padding = None
    if padded:
        padding = torch.zeros(B, 31, dtype=torch.bool)
        padding[0, :7] = padding[1, -2] = True
    sinks = torch.randn(HKV * GROUP, dtype=torch.float64)
    expected, expected_lse = model.attend(q, window=window, padding=padding, softcap=2.0, sinks=sinks, **queries)
    pattern, topk_query = queries.get("pattern"), queries.get("topk_query")
    rules = {"window": window, "key_padding_mask": padding, "softcap": 2.0, "sinks": sinks}
    out, lse = sparse_feature_decode(q, view, topk_query=topk_query, query_pattern=pattern, return_lse=True, **rules)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(lse, expected_lse, **CLOSE)
    budget = FeatureBudget.of(D, TOPK, topk_query=topk_query, dense_dims=DENSE, query_pattern=pattern)
    out = attend_cached(q, view, budget, **rules)
    torch.testing.assert_close(out, expected, **CLOSE)


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("m", [2, 20])
@pytest.mark.parametrize("recent", [0, 5])
def test_a_chunk_beside_what_was_held_before_it(recent, m, window):
    cache, model = both(recent, 3)
    k, v = draw(30)
    before = cache.append(k, v)
    model.append(k, v)
    k, v = draw(m)
    cache.append(k, v)
    model.held += [[k[:, :, i], v[:, :, i], 30 + i, True] for i in range(m)]
    view, q = before.followed_by(ExactKV(k, v)), torch.randn(B, HKV * GROUP, m, D, dtype=torch.float64)
    budget = FeatureBudget.of(D, TOPK, dense_dims=DENSE)
    out = attend_cached(q, view, budget, window=window)
    torch.testing.assert_close(out, model.attend(q, window=window)[0], **CLOSE)


@pytest.mark.parametrize("topk_query", [TOPK, D])
@pytest.mark.parametrize("how", ["decode", "placed", "masked", "prefill", "no codes"])
def test_a_factor_of_queries_is_one_of_exact_keys_alone(how, topk_query):
    cache, _ = both(5, 3)
    kv = cache.append(*draw(30))
    if how == "no codes":
        kv = kv.coded(0, 0).followed_by(ExactKV(*draw(22)))
    if how == "placed":
        positions = torch.tensor([[0, 4, 24, -1, 3]])
        kv = replace(kv, first=None, recent=ExactKV(*(x[:, :, :5] for x in draw(9)), positions))
    q = torch.randn(B, HKV * GROUP, 20 if how in ("prefill", "no codes") else 3, D, dtype=torch.float64)
    factor = 0.3 + torch.rand(HKV, D)
    budget = FeatureBudget.of(D, TOPK, dense_dims=DENSE, topk_query=topk_query)

    def attend(kv, factor=None):
        if how == "masked":
            rules = ScoreRules.of(q, 0.4, 5.0, exact_factor=factor)
            return masked.attend(q, kv, budget, torch.ones(1, 1, 3, kv.n, dtype=torch.bool), rules)
        return attend_cached(q, kv, budget, window=17, scale=0.4, softcap=5.0, exact_factor=factor)

    def change(part):
        return part and replace(part, k=part.k * factor[:, None])

    expected = attend(replace(kv, first=change(kv.first), recent=change(kv.recent)))
    torch.testing.assert_close(attend(kv, factor), expected, **CLOSE)
    assert (attend(kv) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("cropped", [0, 3, 30, 34, 35])
@pytest.mark.parametrize("m", [1, 4])
def test_decode_where_parts_are_empty(m, cropped):
    """All exact, none in the ring, or only first tokens."""
    cache, model = both(8, 3)
    for count in (30, 9):
        k, v = draw(count)
        cache.append(k, v)
        model.append(k, v)
    cache.crop(39 - cropped)
    model.crop(39 - cropped)
    q = torch.randn(B, HKV * GROUP, m, D, dtype=torch.float64)
    out, lse = sparse_feature_decode(q, cache.kv, return_lse=True)
    expected, expected_lse = model.attend(q)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(lse, expected_lse, **CLOSE)


@pytest.mark.parametrize("backend", ["numba", "triton"])
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("tolerance", [0.0, 0.02])
def test_fused_kernels(backend, m, window, tolerance, monkeypatch):
    pytest.importorskip(backend)
    if backend == "numba" and torch.get_default_device().type != "cpu":
        pytest.skip("numba's code is for the CPU")
    if backend == "triton":  # in its interpreter where there is no GPU
        from flashsfa import decode as module
        from flashsfa.ops.plan import DecodePlan

        monkeypatch.setattr(module, "plan_decode", lambda q, kv: DecodePlan("triton", "asked for"))
    cache, model = both(5, 3)
    for count in (40, 1, 1):
        k, v = draw(count, torch.float32)
        view = cache.append(k, v)
        model.append(k, v)
    q = torch.randn(B, HKV * GROUP, m, D)
    out = sparse_feature_decode(q, view, window=window, value_tolerance=tolerance)
    expected = model.attend(q, window=window)[0]
    largest = v.norm(dim=-1).max() if not tolerance else view.rows(torch.float32).v.norm(dim=-1).max()
    assert (out - expected).norm(dim=-1).max() <= 2 * tolerance * largest + 1e-5 * largest
    if backend == "numba":
        assert "decode: numba (compiled for this CPU)" in explain()


def test_eight_bits_round_coded_tokens_alone():
    cache, model = both(5, 3, torch.int8)
    k, v = draw(30, torch.float32)
    view = cache.append(k, v)
    model.append(k, v)
    for token in model.held:
        if not token[3]:
            token[0] = topk_codes(token[0], TOPK, dense_dims=DENSE).quantize().to_dense()
            kept, scale = quantize_rows(token[1])
            token[1] = kept * scale[..., None]
    assert torch.equal(view.recent.k, k[:, :, -5:])
    assert torch.equal(view.first.v, v[:, :, :3])
    q = torch.randn(B, HKV * GROUP, 2, D)
    torch.testing.assert_close(sparse_feature_decode(q, view), model.attend(q)[0], rtol=1e-5, atol=1e-5)
    assert cache.nbytes == B * HKV * (22 * (DENSE + 2 * TOPK + 4 + DV + 4) + 8 * 4 * (D + DV))


@pytest.mark.parametrize("recent", [0, 5])
def test_a_failed_append_leaves_the_cache_as_it_was(recent, monkeypatch):
    cache, model = both(recent, 3, capacity=12)
    for count in (10, 1, 1, 1, 1):
        k, v = draw(count)
        cache.append(k, v)
        model.append(k, v)

    def full(*args, **kwargs):
        raise MemoryError

    for count in (1, 30):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", full)
            patch.setattr("flashsfa.coder.topk_codes", full)
            patch.setattr("flashsfa.cache.contiguous.append", full)
            with pytest.raises(MemoryError):
                cache.append(*draw(count))
        assert_holds(cache, model)
    k, v = draw(2)
    cache.append(k, v)
    model.append(k, v)
    assert_holds(cache, model)


def test_what_does_not_fit_is_refused():
    for options in ({"recent": -1}, {"first": -1}):
        with pytest.raises(ValueError, match="must be 0 to"):
            SparseKVCache(TOPK, **options)
    with pytest.raises(TypeError, match="recent must be an int"):
        SparseKVCache(TOPK, recent=2.0)
    k, v = draw(3)
    view = SparseKVCache(TOPK, recent=2).append(k, v)
    q = torch.randn(B, HKV * GROUP, 1, D, dtype=torch.float64)
    with pytest.raises(ValueError, match="key_padding_mask"):
        sparse_feature_decode(q, view, key_padding_mask=torch.zeros(B, 1, dtype=torch.bool))
    with pytest.raises(TypeError, match="cast"):
        sparse_feature_decode(q.float(), view)


@pytest.mark.parametrize("dtype", [None, torch.int8], ids=str)
@pytest.mark.parametrize("guesses", [1, 4, 30], ids=str)
@pytest.mark.parametrize("kept", [0, 1, 29])
def test_tokens_taken_back_to_a_mark_leave_nothing_behind(dtype, guesses, kept):
    """As if they had not come, also where they drove exact tokens out of the ring, or the buffers grew."""
    k, v = draw(40)
    caches = [SparseKVCache(4, dense_dims=2, capacity=9, recent=5, first=2, dtype=dtype) for _ in range(2)]
    for cache in caches:
        cache.append(k[:, :, :10], v[:, :, :10])
    cache, expected = caches
    cache.mark()
    for i in range(10, 10 + guesses):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    kept = min(kept, guesses)
    cache.crop(10 + kept)
    if kept:
        expected.append(k[:, :, 10 : 10 + kept], v[:, :, 10 : 10 + kept])
    for held in (cache, expected):  # and go on alike
        held.append(k[:, :, 36:], v[:, :, 36:])
    assert len(cache) == len(expected)
    for x, y in zip(cache.kv.tensors(), expected.kv.tensors(), strict=True):
        assert torch.equal(x, y)
    for part, other in zip(cache.kv.exact, expected.kv.exact, strict=True):
        assert torch.equal(part.k, other.k)
        assert torch.equal(part.v, other.v)

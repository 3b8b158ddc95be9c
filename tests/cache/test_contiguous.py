"""Decoding from codes equals the operator, tolerances hold their bound, and the cache keeps what it was given."""

import pytest
import torch

import flashsfa
from decode_cases import attend_cached
from flashsfa import FeatureCodes, SparseKVCache, sparse_feature_attention, sparse_feature_decode, topk_codes
from flashsfa.budget import FeatureBudget
from flashsfa.decode import attend_cached as attend_held
from flashsfa.stored import ExactKV, KVView

B, HKV, N, D = 2, 2, 40, 16
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def draw(m, groups=3, n=N, dtype=torch.float64):
    shapes = (HKV * groups, m), (HKV, n), (HKV, n)
    return [torch.randn(B, heads, rows, D, dtype=dtype) for heads, rows in shapes]


QUERIES = [{}, {"topk_query": D}, {"topk_query": 2}, {"topk_query": 6, "query_pattern": "2:4"}]


@pytest.mark.parametrize("queries", QUERIES, ids=str)
@pytest.mark.parametrize("dense_dims", [0, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize(("m", "groups"), [(1, 1), (1, 3), (3, 3)])
def test_decode_equals_causal_attention(m, groups, window, padded, dense_dims, queries):
    q, k, v = draw(m, groups)
    padding = torch.zeros(B, N, dtype=torch.bool)
    padding[0, :7] = True
    rules = {**queries, "window": window, "key_padding_mask": padding if padded else None}
    out, lse = sparse_feature_decode(q, topk_codes(k, 4, dense_dims=dense_dims), v, return_lse=True, **rules)
    expected, expected_lse = sparse_feature_attention(
        q, k, v, topk=4, dense_dims=dense_dims, is_causal=True, return_lse=True, backend="reference", **rules
    )
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(lse, expected_lse, **CLOSE)


def test_long_context_in_blocks():
    """More keys than one block of the scores."""
    q, k, v = draw(1, n=4100, dtype=torch.bfloat16)
    codes = topk_codes(k, 4)
    out = sparse_feature_decode(q, codes, v)
    expected = sparse_feature_decode(q.double(), codes.to(torch.float64), v.double())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("window", [None, 5])
def test_kv_lens_equals_cropping(m, window):
    q, k, v = draw(m)
    codes, lens = topk_codes(k, 4, dense_dims=3), torch.tensor([N, 17])
    out, lse = sparse_feature_decode(q, codes, v, kv_lens=lens, window=window, return_lse=True)
    for b, n in enumerate(lens.tolist()):
        row = slice(b, b + 1)
        expected, expected_lse = sparse_feature_decode(
            q[row], codes[row, :, :n], v[row, :, :n], window=window, return_lse=True
        )
        torch.testing.assert_close(out[row], expected, **CLOSE)
        torch.testing.assert_close(lse[row], expected_lse, **CLOSE)


def test_no_visible_key_gives_zero():
    q, k, v = draw(1)
    out, lse = sparse_feature_decode(q, topk_codes(k, 4), v, kv_lens=torch.tensor([N, 0]), return_lse=True)
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    assert out.isfinite().all()


@pytest.mark.parametrize("tolerance", [0.0, 1e-6, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("scores", ["one-hot", "flat", "random"])
def test_value_tolerance_bound(scores, tolerance):
    q, k, v = draw(2)
    if scores == "flat":
        q = torch.zeros_like(q)
    if scores == "one-hot":
        k[:, :, 5] = 100 * q[:, ::3, 0].sign()
    v[:, :, ::2] = -100  # opposed values, so that dropping rows shows
    v[:, :, 1::2] = 100
    codes = topk_codes(k, 4)
    exact = sparse_feature_decode(q, codes, v)
    error = (sparse_feature_decode(q, codes, v, value_tolerance=tolerance) - exact).norm(dim=-1).max()
    assert error <= 2 * tolerance * v.norm(dim=-1).max() + (1e-9 if tolerance else 0)


@pytest.mark.cpu
def test_decode_errors():
    q, k, v = draw(1)
    codes = topk_codes(k, 4)
    bad = FeatureCodes(codes.dense, codes.values, torch.full_like(codes.indices, D), D)
    with pytest.raises(ValueError, match="past the sparse part"):
        sparse_feature_decode(q, bad, v)
    with pytest.raises(ValueError, match="FeatureCodes"):
        sparse_feature_decode(q, k, v)
    with pytest.raises(TypeError, match="cast"):
        sparse_feature_decode(q.float(), codes, v)
    for arguments, options, message in [
        ((q[..., :8], codes, v), {}, "head_dim"),
        ((q, codes, v[:, :, 1:]), {}, "agree"),
        ((q[:, :3], codes, v), {}, "multiple of kv heads"),
        ((q, codes, v), {"window": 0}, "window"),
        ((q, codes, v), {"value_tolerance": 1.0}, "value_tolerance"),
        ((q, codes, v), {"value_tolerance": -0.1}, "value_tolerance"),
        ((q, codes, v), {"key_padding_mask": torch.zeros(B, N)}, "key_padding_mask"),
        ((q, codes, v), {"kv_lens": torch.tensor([1, N + 1])}, "kv_lens"),
        ((q, codes, v), {"kv_lens": torch.tensor([1])}, "kv_lens"),
        ((q, codes, v), {"topk_query": D + 1}, "topk"),
        ((q, codes, v), {"topk_query": D, "query_pattern": "2:4"}, "at most half"),
        ((q, codes, v), {"query_pattern": "1:2"}, "pattern must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            sparse_feature_decode(*arguments, **options)


def assert_holds(cache, k, v):
    expected = topk_codes(k, cache.topk, dense_dims=cache.dense_dims)
    assert len(cache) == k.shape[2]
    for name in ("dense", "values", "indices"):
        torch.testing.assert_close(getattr(cache.codes, name), getattr(expected, name), **EXACT)
    torch.testing.assert_close(cache.v, v, **EXACT)


@pytest.mark.parametrize("dense_dims", [0, 3])
def test_cache_grows_crops_and_selects(dense_dims):
    _, k, v = draw(1, n=300)
    cache = SparseKVCache(4, dense_dims=dense_dims, capacity=3)
    for start, end in ((0, 2), (2, 3), (3, 4), (4, 280), (280, 300)):  # to, at and past the capacity
        cache.append(k[:, :, start:end], v[:, :, start:end])
        assert_holds(cache, k[:, :, :end], v[:, :, :end])
        assert cache.capacity >= end
    cache.crop(100)
    assert_holds(cache, k[:, :, :100], v[:, :, :100])
    cache.crop(-10)
    cache.crop(1000)
    assert_holds(cache, k[:, :, :90], v[:, :, :90])
    cache.append(k[:, :, 200:210], v[:, :, 200:210])
    kept = [*range(90), *range(200, 210)]
    assert_holds(cache, k[:, :, kept], v[:, :, kept])
    rows = torch.tensor([1, 1, 0])
    cache.select_batch(rows)
    assert_holds(cache, k[rows][:, :, kept], v[rows][:, :, kept])
    with pytest.raises(ValueError, match="crop"):
        cache.crop(-101)


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_cache_nbytes(dtype, size):
    _, k, v = draw(1, dtype=dtype)
    cache = SparseKVCache(4, dense_dims=3, capacity=64)
    assert cache.nbytes == cache.nbytes_allocated == len(cache) == 0
    cache.append(k, v)
    a_token = size * 3 + (size + 1) * 4 + size * D
    assert cache.nbytes == B * HKV * N * a_token
    assert cache.nbytes_allocated == B * HKV * 64 * a_token


def test_cache_errors_store_nothing():
    _, k, v = draw(1)
    with pytest.raises(ValueError, match="capacity"):
        SparseKVCache(4, capacity=0)
    with pytest.raises(RuntimeError, match="empty"):
        _ = SparseKVCache(4).codes
    with pytest.raises(ValueError, match="topk"):
        SparseKVCache(17).append(k, v)
    cache = SparseKVCache(4)
    cache.append(k, v)
    for arguments in ((k[:1], v[:1]), (k[..., :8], v), (k, v[..., :8]), (k, v[:, :, 1:]), (k[0], v[0])):
        with pytest.raises(ValueError, match=r"fit|share|must be"):
            cache.append(*arguments)
    with pytest.raises(TypeError, match="cast"):
        cache.append(k.float(), v.float())
    assert_holds(cache, k, v)


def test_an_unfilled_buffer_past_kv_lens_does_not_leak():
    k, v = torch.randn(2, 2, 12, 16), torch.randn(2, 2, 12, 16)
    q, lens = torch.randn(2, 4, 1, 16), torch.tensor([5, 12])
    codes = topk_codes(k, 4)
    clean = sparse_feature_decode(q, codes, v, kv_lens=lens)
    v[0, :, 5:] = float("nan")
    torch.testing.assert_close(sparse_feature_decode(q, codes, v, kv_lens=lens), clean)


def test_out_of_memory_leaves_the_cache_as_it_was(monkeypatch):
    _, k, v = draw(1)
    cache = SparseKVCache(4, capacity=4)
    cache.append(k[:, :, :4], v[:, :, :4])
    before = cache.codes.to_dense().clone()

    def full(*args, **kwargs):
        raise MemoryError

    for change in (lambda: cache.append(k[:, :, 4:6], v[:, :, 4:6]), lambda: cache.keep_last(2, 8)):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", full)
            with pytest.raises(MemoryError):
                change()
        assert (len(cache), cache.capacity) == (4, 4)
        assert torch.equal(cache.codes.to_dense(), before)
    cache.append(k[:, :, 4:], v[:, :, 4:])
    assert torch.equal(cache.codes.to_dense(), topk_codes(k, 4).to_dense())


def test_write_at_refuses_what_does_not_fit():
    _, k, v = draw(1)
    cache = SparseKVCache(4, capacity=8)
    cache.allocate(k, v)
    slots, codes = torch.tensor([0]), topk_codes(k[:, :, :1], 4)
    for wrong_codes, wrong_v in (
        (codes, v[:, :, :1].float()),
        (codes.quantize(), v[:, :, :1]),
        (topk_codes(k[:, :, :1], 1), v[:, :, :1]),
        (codes, v[:, :, :1, :3]),
        (topk_codes(k[:, :, :2], 4), v[:, :, :2]),
    ):
        with pytest.raises(ValueError, match="do not fit 1 slots"):
            cache.write_at(KVView(wrong_codes, wrong_v), slots)
    assert (cache.codes.values == 0).all()


@pytest.mark.parametrize("m", [1, 17])
def test_decode_refuses_to_lose_a_gradient(m):
    """Rather than to return an output without one."""
    for wanted in range(3):
        q, k, v = draw(m)
        (q, k, v)[wanted].requires_grad_()
        for call in (attend_cached, sparse_feature_decode):
            with pytest.raises(ValueError, match="no gradient"):
                call(q, topk_codes(k, 4), v)
            with torch.no_grad():
                assert not call(q, topk_codes(k, 4), v).requires_grad
    with pytest.raises(ValueError, match="value_tolerance"), torch.no_grad():
        attend_cached(q, topk_codes(k, 4), v, value_tolerance=5.0)


def test_checked_mode_looks_at_what_is_visible():
    q, k, v = draw(1)
    codes = topk_codes(k, 4, dense_dims=2)
    lens = torch.tensor([N - 1] * q.shape[0])
    v[:, :, -1] = torch.nan
    with flashsfa.checked():
        sparse_feature_decode(q, codes, v, kv_lens=lens)
        with pytest.raises(ValueError, match="v holds NaN"):
            sparse_feature_decode(q, codes, v)
        codes.dense[0, 0, 0, 0] = torch.nan
        with pytest.raises(ValueError, match="dense holds NaN"):
            sparse_feature_decode(q, codes, k)


def test_checked_mode_looks_at_what_is_held():
    """Not at what the buffers held before, or what was taken back."""
    q, k, v = draw(1)
    cache = SparseKVCache(4, dense_dims=2, capacity=4 * N)
    cache.append(k, v)
    bad = torch.full_like(k[:, :, :3], torch.nan)
    for _ in range(2):
        cache.append(bad, bad)
        cache.crop(N)
        with flashsfa.checked():
            assert sparse_feature_decode(q, cache.kv).isfinite().all()
    with flashsfa.checked(), pytest.raises(ValueError, match="holds NaN"):
        cache.append(bad, bad)
    view = cache.append(bad, bad)
    with flashsfa.checked(), pytest.raises(ValueError, match="holds NaN"):
        sparse_feature_decode(q, view)


def test_an_allocated_cache_takes_no_append():
    _, k, v = draw(1)
    cache = SparseKVCache(4, capacity=8)
    cache.allocate(k, v)
    with pytest.raises(ValueError, match="a cache of fixed size is filled by append_at"):
        cache.append(k[:, :, :1], v[:, :, :1])


def test_a_mark_holds_no_tensors_of_the_caller():
    _, k, v = draw(1)
    cache, expected = (SparseKVCache(4, recent=4) for _ in range(2))
    for each in (cache, expected):
        each.append(k[:, :, :10], v[:, :, :10])
    expected.append(k[:, :, 10:12], v[:, :, 10:12])
    own = k[:, :, 10:15].clone(), v[:, :, 10:15].clone()
    cache.mark()
    cache.append(*own)
    for x in own:
        x.zero_()
    cache.crop(12)
    assert torch.equal(cache.codes.to_dense(), expected.codes.to_dense())
    assert torch.equal(cache.kv.recent.k, expected.kv.recent.k)


@pytest.mark.parametrize("index", [[0], torch.tensor([[0]]), torch.tensor([0.0])], ids=["list", "two", "float"])
def test_batches_are_selected_by_row_numbers(index):
    _, k, v = draw(1)
    cache = SparseKVCache(4)
    cache.append(k, v)
    with pytest.raises((TypeError, ValueError), match="index must be"):
        cache.select_batch(index)


def test_a_prompt_over_tokens_of_its_own_is_looked_at():
    """Views of a cache beside exact tokens that are anyone's: what does not fit is refused as over any view, plainly called or not."""
    k, v = torch.randn(2, 2, 2, 40, 16).unbind()
    q, budget = torch.randn(2, 4, 40, 16), FeatureBudget.of(16, 4)
    cache = SparseKVCache(4, capacity=64)
    view = cache.append(k, v)

    def attend(q=q, k=k, v=v, **options):
        return attend_held(q, view.exact_alone(ExactKV(k, v)), budget, **options)

    expected = sparse_feature_attention(q, k, v, topk=16, is_causal=True)
    torch.testing.assert_close(attend(), expected)
    with pytest.raises(ValueError, match="carry no gradient"):
        attend(k=k.clone().requires_grad_())
    with pytest.raises(ValueError, match="do not fit codes"):
        attend(k=k[:1], v=v[:1])
    with pytest.raises(TypeError, match="cast them to one dtype"):
        attend(v=v.half())
    with pytest.raises(TypeError, match="value_tolerance"):
        attend(value_tolerance=None)
    with pytest.raises(ValueError, match="multiple of kv heads"):
        attend(q=q[:, :3])
    with pytest.raises(ValueError, match="head_dim"):
        attend(q=q[..., :8])


def test_a_view_of_all_there_is_room_for_is_no_buffer():
    k, v = torch.randn(2, 1, 2, 16, 8).unbind()
    cache = SparseKVCache(4, capacity=16)
    cache.append(k, v)
    cache.v.requires_grad_()
    cache.crop(4)
    assert not cache.append(k[:, :, :12], v[:, :, :12]).v.requires_grad

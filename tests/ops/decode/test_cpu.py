"""Decode compiled by numba: equal to the plain path for every shape and rule, and its tolerance holds the bound."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import flashsfa
from decode_cases import DecodeRules, decode
from flashsfa import SparseKVCache, topk_codes
from flashsfa.codes import FeatureCodes
from flashsfa.ops.decode import cpu as decode_numba
from flashsfa.ops.decode import plain as decode_torch
from flashsfa.ops.decode.cpu import softmax
from flashsfa.stored import KVView
from numba_marks import NUMBA

pytestmark = NUMBA
DTYPES = [torch.float32, torch.bfloat16]


def draw(dtype=torch.float32, b=2, groups=3, hkv=2, m=1, n=70, d=16, dv=24, topk=4, dense_dims=0):
    q, k, v = (torch.randn(shape, dtype=dtype) for shape in ((b, hkv * groups, m, d), (b, hkv, n, d), (b, hkv, n, dv)))
    return topk_codes(q, topk, dense_dims=dense_dims).to_dense(), topk_codes(k, topk, dense_dims=dense_dims), v


def truth(q, codes, v, rules, scale):
    return decode(decode_torch, q.double(), codes.to(torch.float64), v.double(), rules, scale, 0.0)


def assert_as_good_as_torch(q, codes, v, rules=DecodeRules(), scale=0.25):  # noqa: B008 (frozen)
    """out and lse are at most twice as far from fp64 as the plain PyTorch path in the same dtype."""
    results = decode(decode_numba, q, codes, v, rules, scale, 0.0)
    plain = decode(decode_torch, q, codes, v, rules, scale, 0.0)
    assert results[0].dtype == v.dtype
    assert results[1].dtype == torch.float32
    for result, same_dtype, exact in zip(results, plain, truth(q, codes, v, rules, scale), strict=True):
        assert result.shape == exact.shape
        torch.testing.assert_close(result.isneginf(), exact.isneginf())
        finite = exact.isfinite()
        error, allowed = ((x.double() - exact)[finite].abs().max() for x in (result, same_dtype))
        assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * exact[finite].abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "m"), [(1, 1), (3, 1), (4, 2), (1, 5), (7, 3), (16, 1)])
@pytest.mark.parametrize(
    ("d", "dv", "topk", "dense_dims"), [(16, 24, 4, 0), (16, 8, 3, 5), (128, 96, 16, 22), (256, 1, 8, 0)]
)
def test_shapes(dtype, groups, m, d, dv, topk, dense_dims):
    assert_as_good_as_torch(*draw(dtype, groups=groups, m=m, d=d, dv=dv, topk=topk, dense_dims=dense_dims))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3, 127, 1024, 2600])
def test_lengths_around_the_blocks(dtype, n):
    assert_as_good_as_torch(*draw(dtype, n=n))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tolerance", [0.0, 0.05])
@pytest.mark.parametrize(("groups", "m", "dense_dims"), [(1, 1, 0), (3, 1, 4), (3, 2, 0), (7, 1, 4)])
def test_eight_bits(dtype, tolerance, groups, m, dense_dims):
    """Codes and values of a growing cache, whose buffers hold anything past its tokens."""
    q, codes, v = draw(dtype, groups=groups, m=m, n=1100, dense_dims=dense_dims)
    cache = SparseKVCache(4, dense_dims=dense_dims, capacity=1200, dtype=torch.int8)
    cache.append(torch.zeros(2, 2, 1200, 16, dtype=dtype), torch.zeros(2, 2, 1200, 24, dtype=dtype))
    cache.codes.scale[:] = cache.v_scale[:] = torch.nan
    cache.crop(0)
    small, held = cache.append(codes.to_dense(), v)
    rules = DecodeRules(torch.tensor([1100, 37]), window=900)
    out, lse = decode(decode_numba, q, small, held, rules, 0.25, tolerance, v_scale=cache.v_scale)
    wide = held.double() * cache.v_scale[..., None]
    expected, expected_lse = truth(q, small, wide, rules, 0.25)
    assert out.dtype == dtype
    rounding = (1e-5 if dtype == torch.float32 else 5e-3) * wide.norm(dim=-1).max()
    assert (out.double() - expected).norm(dim=-1).max() <= 2 * tolerance * wide.norm(dim=-1).max() + rounding
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kv_lens", [None, [70, 70], [2, 33], [0, 70]])
def test_rules(m, window, padded, kv_lens):
    q, codes, v = draw(m=m, dense_dims=2)
    mask = torch.rand(2, 70) < 0.4 if padded else None
    rules = DecodeRules(kv_lens if kv_lens is None else torch.tensor(kv_lens), window, mask)
    assert_as_good_as_torch(q, codes, v, rules)


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_nothing_leaks_from_where_no_query_looks(tolerance):
    q, codes, v = draw(m=2, dense_dims=2)
    mask = torch.zeros(2, 70, dtype=torch.bool)
    mask[:, 10:20] = True
    rules = DecodeRules(torch.tensor([33, 50]), 20, mask)
    clean = decode(decode_numba, q, codes, v, rules, 1.0, tolerance)
    for b, end in enumerate((33, 50)):
        for hidden in (slice(0, end - 21), slice(10, 20), slice(end, None)):
            for x in (codes.dense, codes.values, v):
                x[b, :, hidden] = float("nan")
            codes.indices[b, :, hidden] = 255
    for poisoned, expected in zip(decode(decode_numba, q, codes, v, rules, 1.0, tolerance), clean, strict=True):
        torch.testing.assert_close(poisoned, expected, rtol=0, atol=0)


def test_no_visible_key_gives_zero():
    q, codes, v = draw()
    out, lse = decode(decode_numba, q, codes, v, DecodeRules(torch.tensor([70, 0])), 1.0, 0.1)
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    assert out.isfinite().all()
    assert flashsfa.sparse_feature_decode(q[:, :, :0], codes, v, value_tolerance=0.1).shape == (2, 6, 0, 24)
    out, lse = decode(decode_numba, q, codes[:, :, :0], v[:, :, :0], DecodeRules(), 1.0, 0.0)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("where", ["q", "codes", "v"])
@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_nan_in_a_visible_key_shows(where, tolerance):
    q, codes, v = draw(groups=1)
    q, codes = q.abs() + 1, FeatureCodes(codes.dense, codes.values.abs(), codes.indices, 16)
    codes.values[0, 0, 5] = 50  # the key that carries the weight, which no tolerance leaves out
    {"q": q, "codes": codes.values, "v": v}[where][0, 0, {"q": 0}.get(where, 5)] = float("nan")
    out, lse = decode(decode_numba, q, codes, v, DecodeRules(), 1.0, tolerance)
    assert out[0, 0].isnan().all()
    assert bool(lse[0, 0].isnan().all()) == (where != "v")
    assert out[1].isfinite().all()
    assert out[0, 1].isfinite().all()


def test_large_scores_neither_overflow_nor_lose_the_tail():
    q, codes, v = draw()
    for factor in (1e-3, 30.0, 1e6):
        assert_as_good_as_torch(q, codes, v, scale=factor)


def test_views_are_read_where_they_lie():
    """The strides of a cache's buffers, of [B, N, H, D] layouts, and of rows that are not adjacent."""
    q, codes, v = draw(dense_dims=2, b=2, n=70)
    rules = DecodeRules(torch.tensor([40, 31]))
    expected = decode(decode_numba, q, codes[:, :, :40], v[:, :, :40], rules, 1.0, 0.0)
    cropped = FeatureCodes(*(x[:, :, :40].contiguous() for x in (codes.dense, codes.values, codes.indices)), 16)
    transposed = v[:, :, :40].transpose(1, 2).contiguous().transpose(1, 2)
    apart = torch.stack((v[:, :, :40], v[:, :, :40]), -1)[..., 0]
    strided = FeatureCodes(*(x.mT.contiguous().mT for x in (cropped.dense, cropped.values, cropped.indices)), 16)
    for some_codes, some_v in ((cropped, transposed), (strided, apart)):
        for result, same in zip(decode(decode_numba, q, some_codes, some_v, rules, 1.0, 0.0), expected, strict=True):
            torch.testing.assert_close(result, same, rtol=0, atol=0)


@pytest.mark.parametrize("tolerance", [1e-6, 1e-2, 0.3, 0.99])
@pytest.mark.parametrize("scores", ["equal", "one-hot", "geometric", "random"])
@pytest.mark.parametrize("m", [1, 2])
def test_tolerance_bound(scores, tolerance, m):
    q, codes, v = draw(m=m, n=1500, dv=8)
    q[:], codes.values[..., 1:], codes.indices[:] = 1, 0, torch.arange(4, dtype=torch.uint8)
    per_key = {
        "equal": torch.zeros(1500),
        "one-hot": torch.zeros(1500).index_fill(0, torch.tensor(700), 12.0),
        "geometric": -0.05 * torch.arange(1500.0),
        "random": 3 * torch.randn(1500),
    }[scores]
    codes.values[..., 0] = per_key
    v[:, :, ::2], v[:, :, 1::2] = -100, 100  # opposed values, so that dropping rows shows
    v[0, 0] = per_key.sign()[:, None] * 100
    exact, exact_lse = truth(q, codes, v, DecodeRules(), 1.0)
    out, lse = decode(decode_numba, q, codes, v, DecodeRules(), 1.0, tolerance)
    error = (out.double() - exact).norm(dim=-1).max()
    assert error <= 2 * tolerance * v.norm(dim=-1).max() + 1e-5 * v.norm(dim=-1).max()
    torch.testing.assert_close(lse, exact_lse.float())


@pytest.mark.parametrize("groups", [1, 3])
def test_a_tolerance_skips_rows(groups):
    """NaN in the rows that may be left out does not reach the output; tolerance 0 reads them."""
    q, codes, v = draw(groups=groups, n=2000)
    q[:], codes.values[:], codes.indices[:] = 1, 0, torch.arange(4, dtype=torch.uint8)
    codes.values[:, :, ::10, 0] = 12.0  # a tenth of the keys carry all but 1e-4 of the weight
    v[:, :, 1::10] = float("nan")
    assert decode(decode_numba, q, codes, v, DecodeRules(), 1.0, 1e-3)[0].isfinite().all()
    assert decode(decode_numba, q, codes, v, DecodeRules(), 1.0, 0.0)[0].isnan().all()


def test_exp2_is_accurate_to_about_an_ulp():
    x = np.linspace(-126, 0, 100_001, dtype=np.float32)
    result = np.array([softmax._exp2(value) for value in x])
    assert np.abs(result / np.exp2(x.astype(np.float64)) - 1).max() < 1.5e-7
    assert softmax._exp2(np.float32(-127)) == 0


def test_threads_change_neither_the_result_nor_the_users_setting():
    import numba

    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("needs two cores")
    q, codes, v = draw(b=1, hkv=1, n=5000)
    torch_threads, before = torch.get_num_threads(), numba.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(decode(decode_numba, q, codes, v, DecodeRules(), 1.0, 1e-2))
        assert numba.get_num_threads() == before
    torch.set_num_threads(torch_threads)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_dtypes():
    _, codes, v = draw()
    found = [decode_numba.obstacle(x, KVView(codes, v)) for x in (*DTYPES, torch.float16, torch.float64)]
    assert found == [None, None, "takes no torch.float16", "takes no torch.float64"]


@pytest.mark.cpu
def test_a_decode_leaves_torchs_number_of_threads():
    """In a process of its own: numba starts its threads once."""
    script = (
        "import torch, flashsfa; torch.set_num_threads(1); x = torch.randn(1, 2, 9, 16);"
        "flashsfa.sparse_feature_decode(x, flashsfa.topk_codes(x, 4), x); print(torch.get_num_threads())"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "1\n"

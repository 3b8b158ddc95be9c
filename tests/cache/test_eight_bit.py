"""8-bit codes and caches: rounding stays within a step, decode reads them as their widened selves, and bytes shrink."""

import pytest
import torch

from decode_cases import DecodeRules, attend_cached, decode
from flashsfa import FeatureCodes, SparseKVCache, sparse_feature_decode, topk_codes
from flashsfa.budget import FeatureBudget
from flashsfa.codes import code_queries, quantize_rows
from flashsfa.formats import CodeFormat
from flashsfa.narrow import NarrowCodes, NarrowRows
from flashsfa.ops.decode import plain as decode_torch
from flashsfa.stored import KVView
from held_cases import axis_bits

STEP = 0.5 / 127  # of a row's largest entry


def draw(m=1, n=150, d=32):
    shapes = (2, 6, m, d), (2, 2, n, d), (2, 2, n, 48)
    return [torch.randn(shape) for shape in shapes]


def test_rows_round_within_a_step():
    x = torch.randn(50, 20) * 10.0 ** torch.arange(-5, 5).repeat(5)[:, None]
    x[3] = 0
    kept, scale = quantize_rows(x)
    error = (kept.float() * scale[:, None] - x).abs()
    assert (error <= 1.01 * STEP * x.abs().amax(-1, keepdim=True)).all()
    assert (error[3] == 0).all()


def test_codes_share_one_scale_a_row():
    _, k, _ = draw()
    codes = topk_codes(k, 8, dense_dims=4)
    small = codes.quantize()
    assert small.dtype == torch.int8
    assert small.nbytes == 2 * 2 * 150 * (4 + 8 + 8 + 4)
    torch.testing.assert_close(small[0, :, 3:7].to_dense(), small.to_dense()[0, :, 3:7])
    error = (small.to_dense() - codes.to_dense()).abs().amax(-1)
    assert (error <= 1.01 * STEP * codes.to_dense().abs().amax(-1)).all()


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
@pytest.mark.parametrize("m", [1, 3, 20])
def test_cache_decodes_as_its_widened_self(m, tolerance):
    q, k, v = draw(m)
    cache = SparseKVCache(8, dense_dims=4, capacity=20, dtype=torch.int8)
    for start, end in ((0, 20), (20, 21), (21, 150)):  # grows
        codes, values = cache.append(k[:, :, start:end], v[:, :, start:end])
    assert values.dtype == torch.int8
    out = attend_cached(q, codes, values, v_scale=cache.v_scale, value_tolerance=tolerance)
    wide = values.float() * cache.v_scale[..., None]
    exact, largest = attend_cached(q, codes.to(torch.float32), wide), wide.norm(dim=-1).max()
    assert (out - exact).norm(dim=-1).max() <= (2 * tolerance + 1e-5) * largest
    torch.testing.assert_close(wide, v, rtol=0, atol=float(STEP * 1.01 * v.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("tolerance", [0.0, 0.01])
@pytest.mark.parametrize("kind", ["axes", "8 bits beside packed values", "packed beside 8 bits"])
def test_scales_beside_what_is_packed(kind, tolerance, dtype):
    """Each part that has a scale is read with it, whatever the other one is."""
    q, k, v = (x.to(dtype) for x in draw())
    kept, scale = quantize_rows(v)
    if kind == "axes":
        kv = SparseKVCache(axes=axis_bits(2, 32), dtype=torch.int8).append(k, v)
    elif kind == "packed beside 8 bits":
        kv = KVView(NarrowCodes.encode(topk_codes(k, 8), CodeFormat()), kept, scale)
    else:
        kv = KVView(topk_codes(k, 8).quantize(), NarrowRows.encode(v, 4))
    rows = kv.rows(torch.float64)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), rows.k, rows.v, enable_gqa=True)
    for seen in (kv, kv.map(lambda x: x.clone())):
        out = sparse_feature_decode(q, seen, topk_query="dense", value_tolerance=tolerance).double()
        bound = 2 * tolerance * rows.v.norm(dim=-1).max() + 20 * max(torch.finfo(dtype).eps, 1e-6)
        assert (out - exact).norm(dim=-1).max() <= bound


def test_cache_bytes_and_selection():
    _, k, v = draw()
    cache = SparseKVCache(8, dense_dims=4, capacity=150, dtype=torch.int8)
    cache.append(k, v)
    assert cache.nbytes == cache.nbytes_allocated == 2 * 2 * 150 * (4 + 8 + 8 + 4 + 48 + 4)
    before = cache.v.float() * cache.v_scale[..., None]
    cache.select_batch(torch.tensor([1, 0, 1]))
    torch.testing.assert_close(cache.v.float() * cache.v_scale[..., None], before[[1, 0, 1]])
    with pytest.raises(TypeError, match="cast"):
        cache.append(k[[1, 0, 1]].double(), v[[1, 0, 1]].double())
    with pytest.raises(ValueError, match="dtype must be"):
        SparseKVCache(8, dtype=torch.float16)


def test_errors():
    q, k, v = draw()
    codes, (small, scale) = topk_codes(k, 8), quantize_rows(v)
    with pytest.raises(TypeError, match="v must be float16"):
        sparse_feature_decode(q, codes, small)
    with pytest.raises(TypeError, match="v with a scale"):
        sparse_feature_decode(q, codes, v, v_scale=scale)
    with pytest.raises(ValueError, match="v_scale must be"):
        sparse_feature_decode(q, codes, small, v_scale=scale[:, :, 1:])


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
@pytest.mark.parametrize("dense_dims", [0, 4])
# int8 with 16-bit queries multiplies in bfloat16, which Triton's interpreter cannot
@pytest.mark.parametrize(
    ("m", "q_dtype"), [(1, torch.float32), pytest.param(2, torch.float16, marks=pytest.mark.gpu)], ids=str
)
def test_kernels_read_eight_bits(m, q_dtype, dense_dims, tolerance):
    pytest.importorskip("triton")
    from flashsfa.ops.decode.triton import decode as decode_triton

    q, k, v = (x.to(q_dtype) for x in draw(m))
    q = code_queries(q, FeatureBudget.of(q.shape[-1], 8, dense_dims=dense_dims)).to_dense()
    codes, (small, scale) = topk_codes(k, 8, dense_dims=dense_dims).quantize(), quantize_rows(v)
    rules = DecodeRules(torch.tensor([150, 77]), window=100)
    out, lse = decode(decode_triton, q, codes, small, rules, 0.3, tolerance, v_scale=scale)
    truth, truth_lse = decode(decode_torch, q.double(), codes.to(torch.float64), small.double() * scale[..., None], rules, 0.3, 0.0)  # fmt: skip
    slack = 1e-5 if q_dtype == torch.float32 else 5e-3
    largest = v.float().norm(dim=-1).max()
    assert out.dtype == q_dtype
    assert (out - truth).norm(dim=-1).max() <= 2 * tolerance * largest + slack * largest
    torch.testing.assert_close(lse.double(), truth_lse, rtol=1e-5, atol=1e-5)


def test_quantizing_twice_changes_nothing():
    codes = topk_codes(torch.randn(5, 32), 8).quantize()
    assert codes.quantize() is codes


def test_small_rows_widen_exactly():
    """A scale below float16's smallest normal number must not be rounded before it is multiplied."""
    codes = topk_codes(1e-3 * torch.randn(50, 32), 8).quantize()
    torch.testing.assert_close(codes.to(torch.float16).to_dense(), codes.to_dense().half(), rtol=0, atol=0)


@pytest.mark.parametrize("values", [torch.float32, torch.int8])
def test_scale_belongs_to_int8_alone(values):
    parts = torch.ones(3, 0), torch.ones(3, 2), torch.tensor([[0, 1]] * 3, dtype=torch.uint8)
    scale = torch.ones(3) if values == torch.float32 else None
    with pytest.raises(ValueError, match="int8 codes need a scale"):
        FeatureCodes(parts[0].to(values), parts[1].to(values), parts[2], 8, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("tolerance", [0.0, 1e-3])
def test_float16_queries_keep_small_rows_of_v(tolerance):
    """Weights times the scales of small V rows leave the range of float16."""
    q, k, v = (x.cuda().half() for x in draw(n=4096))
    k[:, :, 7] = 3 * q[:, ::3, 0]  # one peaked key, and the rest small but many
    v = 0.03 * v
    codes, (small, scale) = topk_codes(k, 8).quantize(), quantize_rows(v)
    out = sparse_feature_decode(q, codes, small, v_scale=scale, value_tolerance=tolerance).double()
    wide = small.double() * scale[..., None]
    truth, _ = decode(
        decode_torch, q.double(), codes.to(torch.float64), wide, DecodeRules(), 32**-0.5, 0.0, topk_query=8
    )
    assert (out - truth).norm() / truth.norm() <= 0.02 + 2 * tolerance * wide.norm(dim=-1).max() / truth.norm()

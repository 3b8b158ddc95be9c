"""How caches keep tokens: in every format what they hold is what `Coder` makes of each token alone, and what decode reads."""

import pytest
import torch

from flashsfa import SparseKVCache, explain, sparse_feature_decode
from flashsfa.coder import Coder
from flashsfa.formats import CodeFormat, cache_bits
from flashsfa.mask import Mask
from flashsfa.reference import attend, sparse_rows
from flashsfa.scores import ScoreRules

B, HKV, GROUP, D, DV = 2, 2, 3, 32, 16
NAMES = [None, "int8", "int4", "d16s16v4", "d8s8v8-packed", "d16s4v8-uint8", "d8s16v16-bitmap"]
BUDGETS = [(5, 9), (3, 0), (D, 0)]  # the last keeps every feature


def draw(n, dtype=torch.float64):
    return torch.randn(B, HKV, n, D, dtype=dtype), torch.randn(B, HKV, n, DV, dtype=dtype)


def make(topk, dense_dims, name, **options):
    return SparseKVCache(topk, dense_dims=dense_dims, dtype=cache_bits(name), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("topk", "dense_dims"), BUDGETS)
@pytest.mark.parametrize("name", NAMES)
def test_a_cache_holds_what_each_token_is_coded_to(name, topk, dense_dims, dtype):
    """However the tokens come, and whatever was taken back in between."""
    cache = make(topk, dense_dims, name, capacity=2, recent=4, first=2)
    k, v = draw(31, dtype)
    cache.append(k[:, :, :9], v[:, :, :9])
    cache.append(k[:, :, 9:20], v[:, :, 9:20])
    cache.append(*draw(3, dtype))
    cache.crop(20)  # one of the ring is coded then
    for i in range(20, 31):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    cache.select_batch(torch.tensor([1, 0]))
    k, v = k[[1, 0]], v[[1, 0]]
    kv = cache.kv
    assert torch.equal(kv.first.k, k[:, :, :2])
    assert torch.equal(kv.recent.v, v[:, :, 27:])
    for i in range(2, 27):
        alone = Coder(topk, dense_dims, cache_bits(name)).encode(k[:, :, i : i + 1], v[:, :, i : i + 1])
        for held, expected in zip(kv.coded(i - 2, i - 1).tensors(), alone.tensors(), strict=True):
            assert torch.equal(held, expected)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize(("topk", "dense_dims"), BUDGETS)
@pytest.mark.parametrize("name", NAMES)
def test_decode_reads_rounded_keys_and_values(name, topk, dense_dims, m):
    cache = make(topk, dense_dims, name)
    k, v = draw(40)
    kv = cache.append(k, v)
    rounded = Coder(topk, dense_dims, cache_bits(name)).rounded(k, v)
    q = torch.randn(B, HKV * GROUP, m, D, dtype=torch.float64)
    found = sparse_feature_decode(q, kv)
    q = sparse_rows(q, topk, dense_dims=dense_dims)
    expected, _ = attend(q, rounded.k, rounded.v, Mask(True), ScoreRules.of(q))
    slack = 1e-6 if name == "int8" else 1e-9  # 8-bit codes are widened to float32
    torch.testing.assert_close(found, expected, rtol=slack, atol=slack)
    assert "takes no torch.float64" in explain()  # plain PyTorch then


@pytest.mark.parametrize(("topk", "dense_dims"), BUDGETS)
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_the_format(name, topk, dense_dims):
    cache = make(topk, dense_dims, name)
    cache.append(*draw(7, torch.bfloat16))
    bits, rows = cache_bits(name), B * HKV * 7
    if isinstance(bits, CodeFormat):
        assert cache.key_nbytes == rows * bits.key_bytes(D, dense_dims, topk)
        assert cache.nbytes == cache.key_nbytes + rows * bits.v_bytes(DV)
    elif bits == torch.int8:
        assert cache.nbytes == rows * (dense_dims + 2 * topk + 4 + DV + 4)
    else:
        assert cache.nbytes == rows * (2 * dense_dims + 3 * topk + 2 * DV)


@pytest.mark.parametrize("name", NAMES)
def test_rounding_lets_the_gradients_of_kept_features_through(name):
    k, v = draw(6)
    k.requires_grad_()
    v.requires_grad_()
    rounded = Coder(5, 9, cache_bits(name)).rounded(k, v)
    (rounded.k.sum() + rounded.v.sum()).backward()
    kept = sparse_rows(k.detach(), 5, dense_dims=9) != 0
    assert torch.equal(k.grad, kept.to(k.dtype))
    assert torch.equal(v.grad, torch.ones_like(v))


def test_fewer_bits_lose_more():
    k, v = draw(300)
    errors = []
    for name in ("d16s16v16", "d8s8v8", "d8s4v4"):
        rounded = Coder(D, 0, cache_bits(name)).rounded(k, v)
        errors.append([((x - y).norm() / y.norm()).item() for x, y in ((rounded.k, k), (rounded.v, v))])
    assert errors[0] == [0, 0]
    assert all(0 < x < 0.006 for x in errors[1])
    assert all(0.02 < x < 0.09 for x in errors[2])


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="axes must be an AxisBits, such as basis\\.axes\\[layer\\], got str"):
        SparseKVCache(axes="x")
    with pytest.raises(ValueError, match="dtype must be torch\\.int8, a CodeFormat or None"):
        SparseKVCache(3, dtype=torch.int16)
    with pytest.raises(ValueError, match="width must be a multiple of 16, got 12; take 8 bits"):
        make(3, 0, "int4").append(torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 12))
    with pytest.raises(ValueError, match="width must be a multiple of 16, got 8; take 8 bits"):
        make(8, 0, "int4").append(torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 16))
    with pytest.raises(ValueError, match="'int2' names no format of a cache; there are int4, int8, or widths such as"):
        cache_bits("int2")

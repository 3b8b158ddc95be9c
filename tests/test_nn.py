"""The attention module: cached equals uncached, the full budget is dense attention, gradients, arguments."""

import pytest
import torch
import torch.nn.functional as F

from flashsfa import PagedSparseKVCache, SparseFeatureAttention, SparseKVCache


@pytest.mark.parametrize("positions", ["channel", "full", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2, "qk_norm": True, "window": 9, "topk_query": 16},
        {"topk_query": 6, "query_pattern": "2:4"},
    ],
)
def test_cached_equals_uncached(positions, options):
    layer = SparseFeatureAttention(64, 4, topk=4, dense_dims=4, positions=positions, **options).double()
    x = torch.randn(2, 50, 64, dtype=torch.float64)
    cache = layer.make_cache(8)
    cuts = (0, 20), (20, 21), (21, 25), (25, 50)
    with torch.no_grad():
        parts = [layer(x[:, a:b], cache) for a, b in cuts]
        torch.testing.assert_close(torch.cat(parts, 1), layer(x), rtol=1e-10, atol=1e-10)
    assert len(cache) == 50


def test_an_eight_bit_cache():
    layer = SparseFeatureAttention(64, 4, topk=4, dense_dims=4)
    x, cache = torch.randn(2, 50, 64), SparseKVCache(4, dense_dims=4, dtype=torch.int8)
    with torch.no_grad():
        parts = [layer(x[:, a:b], cache) for a, b in ((0, 30), (30, 31), (31, 50))]
        torch.testing.assert_close(torch.cat(parts, 1), layer(x), rtol=0.02, atol=0.01)


def test_full_budget_is_dense_attention():
    layer = SparseFeatureAttention(32, 4, topk=8, num_kv_heads=2, positions="full", bias=True).double()
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    q, k, v = (
        project(x).view(2, 11, heads, 8).transpose(1, 2)
        for project, heads in ((layer.q_proj, 4), (layer.k_proj, 2), (layer.v_proj, 2))
    )
    angle = torch.outer(torch.arange(11.0), 10000.0 ** (-torch.arange(4.0) / 4)).double()
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotate(t):
        turned = torch.complex(t[..., :4], t[..., 4:]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    out = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True, enable_gqa=True)
    expected = layer.o_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)  # the angles are float32


@pytest.mark.parametrize("gradient", ["kept", "all"])
def test_gradients(gradient):
    layer = SparseFeatureAttention(32, 4, topk=2, dense_dims=2, qk_norm=True, gradient=gradient)
    x = torch.randn(2, 9, 32, requires_grad=True)
    layer(x).square().sum().backward()
    for name, tensor in (("x", x), *layer.named_parameters()):
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 33}, "give head_dim"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"topk": 0}, "topk"),
        ({"topk": 7}, "topk"),
        ({"topk_query": 7}, "topk"),
        ({"topk_query": 3, "query_pattern": "2:4"}, "at most half"),
        ({"dense_dims": 8}, "dense_dims"),
        ({"dense_dims": 0}, "even width"),
        ({"dense_dims": 3}, "even width"),
        ({"positions": "full", "head_dim": 7}, "even width"),
        ({"positions": "learned"}, "positions must be one of"),
        ({"gradient": "none"}, "gradient must be one of"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SparseFeatureAttention(**{"embed_dim": 32, "num_heads": 4, "topk": 2, "dense_dims": 2, **options})


@pytest.mark.parametrize(
    ("x", "cache", "error", "message"),
    [
        (
            torch.zeros(3, 32),
            None,
            ValueError,
            r"x must be \[B, N, embed_dim\] with embed_dim = 32, got shape \(3, 32\)",
        ),
        (torch.zeros(1, 3, 16), None, ValueError, r"got shape \(1, 3, 16\)"),
        (torch.zeros(1, 3, 32, dtype=torch.int64), None, TypeError, "x must be float16"),
        ("x", None, TypeError, "x must be a torch.Tensor, got str"),
        (
            torch.zeros(1, 3, 32),
            "x",
            TypeError,
            r"cache must be a SparseKVCache, such as one of make_cache\(\), got str",
        ),
        (torch.zeros(1, 3, 32), PagedSparseKVCache(2, pages=1), TypeError, "got PagedSparseKVCache"),
    ],
)
def test_wrong_inputs(x, cache, error, message):
    with pytest.raises(error, match=message):
        SparseFeatureAttention(32, 4, topk=2, dense_dims=2)(x, cache)


def test_positions_go_on_where_a_cache_has_forgotten():
    layer = SparseFeatureAttention(32, 2, topk=4, positions="full", window=8).double()
    x, cache = torch.randn(1, 40, 32, dtype=torch.float64), layer.make_cache()
    with torch.no_grad():
        layer(x[:, :30], cache)
        cache.keep_last(8, 64)
        assert (len(cache), cache.length) == (8, 30)
        torch.testing.assert_close(layer(x[:, 30:], cache), layer(x)[:, 30:], rtol=1e-10, atol=1e-10)

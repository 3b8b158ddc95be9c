"""Legal inputs that kernels like to get wrong, and illegal ones: the right value, or one sentence."""

import math
import sys

import pytest
import torch

import flashsfa
from attention_cases import assert_error_rule, inputs
from flashsfa import FeatureCodes, PagedSparseKVCache, SparseFeatureAttention, SparseKVCache, reference, topk_codes
from flashsfa import sparse_feature_attention as attention
from flashsfa import sparse_feature_attention_varlen as attention_varlen
from flashsfa import sparse_feature_decode as decode
from flashsfa.mask import Mask

HUGE = [sys.maxsize, 2**63, 2**31 - 1, 2**31]
PADDING = torch.tensor([[True, False, False, True, False, False, False, True, True]] * 2, device="cpu")


def masks(device):
    """Keyword arguments of the operator, for 9 keys of 2 sequences."""
    return {
        "full": {},
        "causal": {"is_causal": True},
        "window": {"is_causal": True, "window": 3},
        "two-sided": {"window": 3},
        "padding": {"is_causal": True, "key_padding_mask": PADDING.to(device)},
    }


MASKS = list(masks("cpu"))


def gradients(function, *tensors):
    tensors = [x.detach().requires_grad_() for x in tensors]
    out = function(*tensors)
    return torch.autograd.grad(out.float().square().sum(), tensors)


# Sizes so large that sums with them wrap around


@pytest.mark.parametrize("window", HUGE)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_q", [4, 9])
def test_a_window_of_any_size_hides_nothing(window, causal, n_q):
    q, k, v = inputs(n_q, 9)

    def attend(window, backend="auto"):
        return lambda *x: attention(*x, topk=4, is_causal=causal, window=window, backend=backend)

    for backend in ("auto", "reference"):
        torch.testing.assert_close(attend(window, backend)(q, k, v), attend(None)(q, k, v))
    for found, expected in zip(gradients(attend(window), q, k, v), gradients(attend(None), q, k, v), strict=True):
        torch.testing.assert_close(found, expected)
    truth, _ = reference.sparse_feature_attention(q, k, v, topk=4, mask=Mask(is_causal=causal))
    found, _ = reference.sparse_feature_attention(q, k, v, topk=4, mask=Mask(causal, window))
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("window", HUGE)
def test_a_window_of_any_size_in_other_calls(window, device):
    q, k, v = (x[0].transpose(0, 1) for x in inputs(9, 9))  # [T, H, D]
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = [attention_varlen(q, k, v, bounds, bounds, 9, 9, topk=4, is_causal=True, window=w) for w in (window, None)]
    torch.testing.assert_close(*packed)
    q, k, v = inputs(2, 9)
    codes = topk_codes(k, 4)
    torch.testing.assert_close(decode(q, codes, v, window=window), decode(q, codes, v))
    layers = []
    for w in (window, None):
        torch.manual_seed(0)
        layers.append(SparseFeatureAttention(32, 2, topk=4, positions="none", window=w).to(device))
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(layers[0](x), layers[1](x))
        cached = [layer(x, layer.make_cache()) for layer in layers]
    torch.testing.assert_close(*cached)


@pytest.mark.parametrize("longest", HUGE)
def test_a_longest_sequence_of_any_size(longest):
    q, k, v = (x[0].transpose(0, 1) for x in inputs(9, 9, d=64, dtype=torch.bfloat16))
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    found, expected = (attention_varlen(q, k, v, bounds, bounds, n, n, topk=8, is_causal=True) for n in (longest, 5))
    assert torch.equal(found, expected)


# Scales that are not positive


@pytest.mark.parametrize("scale", [0.0, -0.25, 1e-31, -1e-60])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [16, 64])
def test_scales_of_any_sign(scale, mask, dtype, d, device):
    for n_q in (6, 9):
        assert_error_rule(*inputs(n_q, 9, heads=(4, 2), d=d, dtype=dtype), topk=4, scale=scale, **masks(device)[mask])


@pytest.mark.parametrize("scale", [0.0, -0.25])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scales_of_any_sign_in_decode(scale, dtype):
    q, k, v = inputs(3, 9, heads=(4, 2), dtype=dtype)
    wide = [x.double() for x in (q, topk_codes(k, 4).to_dense(), v)]
    truth, _ = reference.attention(*wide, mask=Mask(is_causal=True), scale=scale)
    found = decode(q, topk_codes(k, 4), v, topk_query=32, scale=scale)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=16 * torch.finfo(dtype).eps)


# NaN


@pytest.mark.parametrize("side", ["q", "k", "all", "overflow"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("n", [9, 200])
def test_nan_is_seen_wherever_the_reference_sees_it(side, mask, dtype, n, device):
    q, k, v = inputs(n, n, heads=(4, 2), d=64, dtype=dtype)
    if side == "q":
        q[0, 1, 3, 5] = math.nan
    elif side == "k":
        k[1, 0, 2, 5] = math.nan
    elif side == "all":
        k[:] = math.nan
    else:  # scores of infinity less infinity, out of finite numbers
        q[0, 1, 3], k[0, 0, 1] = torch.finfo(dtype).max, torch.finfo(dtype).max
        k[0, 0, 1, 1] *= -1
    options = masks(device)[mask]
    if "key_padding_mask" in options and n > 9:
        options["key_padding_mask"] = torch.arange(n, device=device).expand(2, n) % 5 == 4
    out, lse = attention(q, k, v, topk=64, return_lse=True, **options)
    mask = Mask(**options)
    truth, truth_lse = reference.attention(*(x.double() for x in (q, k, v)), mask=mask)
    if side == "overflow":  # which other rows overflow depends on the order of sums
        assert out[0, 1, 3].isnan().all()
        assert not lse[0, 1, 3].isfinite()
        assert torch.equal(out[1].isfinite(), truth[1].isfinite())
        return
    assert truth.isnan().any()
    assert torch.equal(out.isnan().any(-1), truth.isnan().any(-1))
    assert torch.equal(lse.isnan() | lse.isposinf(), truth_lse.isnan() | truth_lse.isposinf())
    whole = ~truth.isnan()
    torch.testing.assert_close(out[whole], truth[whole].to(dtype), rtol=0, atol=0.05 if dtype.itemsize == 2 else 1e-4)


@pytest.mark.parametrize("mask", MASKS)
def test_nan_reaches_the_gradients(mask, device):
    q, k, v = inputs(9, 9)
    q[0, 1, 4, 5] = math.nan
    found = gradients(lambda *x: attention(*x, topk=32, **masks(device)[mask]), q, k, v)
    expected = gradients(lambda *x: attention(*x, topk=32, **masks(device)[mask], backend="reference"), q, k, v)
    assert found[0][0, 1, 4].isnan().all()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[1].isnan(), b[1].isnan())  # the other sequence knows nothing of it
        assert not b[0].isnan().any() or a[0].isnan().any()


def test_nan_in_decode_and_the_module(device):
    q, k, v = inputs(1, 9)
    q[0, 1, 0, 5] = math.nan
    k[..., 5] = 0  # no key shares the feature
    out, lse = decode(q, topk_codes(k, 4), v, return_lse=True)
    assert torch.equal(out.isnan().all(-1), q.isnan().any(-1))
    assert torch.equal(lse.isnan(), q.isnan().any(-1))
    layer = SparseFeatureAttention(32, 2, topk=4, positions="none").to(device)
    with torch.no_grad():
        layer.q_proj.weight.fill_(math.nan)
        for cache in (None, layer.make_cache()):
            assert layer(torch.randn(1, 5, 32), cache).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_what_stands_in_padding_does_not_matter(dtype, causal, device):
    q, k, v = inputs(9, 9, dtype=dtype)
    padding = PADDING.to(device)
    results = []
    for filler in (0.0, math.nan, math.inf):
        for x in (k, v):
            x.masked_fill_(padding[:, None, :, None], filler)
        for backend in ("auto", "reference"):
            options = {"topk": 4, "is_causal": causal, "key_padding_mask": padding, "backend": backend}
            results.append(
                (attention(q, k, v, **options), *gradients(lambda *x, o=options: attention(*x, **o), q, k, v))
            )
        results.append((decode(q[:, :, -1:], topk_codes(k, 4), v, key_padding_mask=padding),))
    for i, found in enumerate(results[3:]):
        for a, b in zip(found, results[i % 3], strict=True):
            torch.testing.assert_close(a, b)
    assert all(x.isfinite().all() for found in results for x in found)


# Nothing to attend


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(2, 0, 9), (2, 1, 0), (0, 1, 9), (0, 0, 0)])
def test_nothing_to_decode(dtype, sizes, device):
    batch, m, n = sizes
    q, k, v = inputs(m, n, heads=(4, 2), dtype=dtype, batch=batch)
    out, lse = decode(q, topk_codes(k, 4), v, return_lse=True)
    assert (out.shape, lse.shape) == ((batch, 4, m, 32), (batch, 4, m))
    assert (out == 0).all()
    assert lse.isneginf().all()
    assert attention(q, k, v, topk=4).shape == out.shape


def test_no_sequences():
    rows = torch.randn(0, 2, 32)
    bounds = torch.zeros(1, dtype=torch.int32)
    assert attention_varlen(rows, rows, rows, bounds, bounds, topk=4).shape == (0, 2, 32)
    cache = PagedSparseKVCache(4, pages=1, page_size=16)
    nothing = torch.randn(0, 2, 3, 32)
    cache.append([], nothing, nothing)
    sequence = cache.add()
    cache.append([sequence], *(torch.randn(1, 2, 16, 32) for _ in range(2)))
    cache.append([], nothing, nothing)  # with a full pool
    assert cache.length(sequence) == 16


# Arguments of the wrong kind

Q, X = torch.randn(1, 2, 6, 16, device="cpu"), torch.randn(6, 2, 16, device="cpu")
CODES, BOUNDS = topk_codes(Q, 4), torch.tensor([0, 6], dtype=torch.int32, device="cpu")


def packed(**changes):
    bounds = {"cu_seqlens_q": BOUNDS, "cu_seqlens_k": BOUNDS, "topk": 4}
    return attention_varlen(X, X, X, **(bounds | changes))


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: attention(Q, Q, Q, topk=4.0), TypeError, "topk must be an int, got 4.0"),
        (lambda: attention(Q, Q, Q, topk=True), TypeError, "topk must be an int, got True"),
        (lambda: attention(Q, Q, Q, topk=4, topk_query=2.5), TypeError, "topk_query must be an int"),
        (lambda: attention(Q, Q, Q, topk=4, dense_dims="2"), TypeError, "dense_dims must be an int"),
        (lambda: attention(Q, Q, Q, topk=4, window=4.0), TypeError, "window must be an int"),
        (lambda: attention(Q, Q, Q, topk=4, window=True), TypeError, "window must be an int, got True"),
        (lambda: attention(Q, Q, Q, topk=4, window=math.inf), TypeError, "window must be an int"),
        (lambda: attention(Q, Q, Q, topk=4, window=(3, 0)), TypeError, "window must be an int"),
        (lambda: attention(Q, Q, Q, topk=4, window=torch.tensor(3)), TypeError, "window must be an int"),
        (lambda: attention(Q, Q, Q, topk=4, window=0), ValueError, "window must be at least 1"),
        (lambda: attention(Q, Q, Q, topk=4, scale="x"), TypeError, "scale must be a float"),
        (lambda: attention(Q, Q, Q, topk=4, scale=math.nan), ValueError, "scale must be finite"),
        (lambda: attention(Q, Q, Q, topk=4, scale=torch.nn.Parameter(torch.tensor(0.2))), TypeError, "multiply q by"),
        (lambda: attention(Q, Q, Q, topk=4, is_causal=1), TypeError, "is_causal must be True or False"),
        (lambda: attention(Q, Q, Q, topk=4, key_padding_mask=[[False] * 6]), TypeError, "key_padding_mask must be a"),
        (lambda: topk_codes(Q, 4.0), TypeError, "topk must be an int"),
        (lambda: decode(Q, CODES, Q, window=4.0), TypeError, "window must be an int"),
        (lambda: decode(Q, CODES, Q, scale="x"), TypeError, "scale must be a float"),
        (lambda: decode(Q, CODES, Q, kv_lens=[6]), TypeError, "kv_lens must be a torch.Tensor, got list"),
        (lambda: decode(Q, CODES, Q, page_table=[[0]], kv_lens=BOUNDS[1:]), ValueError, "page_size"),
        (lambda: decode(Q, CODES, Q, value_tolerance="0.1"), TypeError, "value_tolerance must be a float"),
        (lambda: decode(Q, CODES, Q, value_tolerance=math.nan), ValueError, "value_tolerance must be finite"),
        (lambda: packed(cu_seqlens_q=[0, 6]), TypeError, "cu_seqlens_q must be a torch.Tensor, got list"),
        (lambda: packed(max_seqlen_k=5), ValueError, "max_seqlen_k is 5, but a sequence has 6 tokens"),
        (lambda: packed(max_seqlen_q=6.0), TypeError, "max_seqlen_q must be an int"),
        (lambda: attention_varlen(X.numpy(), X, X, BOUNDS, BOUNDS, topk=4), TypeError, "q must be a torch.Tensor"),
        (lambda: SparseKVCache(4.0), TypeError, "topk must be an int"),
        (lambda: SparseKVCache(4, capacity=2.5), TypeError, "capacity must be an int"),
        (lambda: PagedSparseKVCache(4, pages=1.5), TypeError, "pages must be an int"),
        (lambda: SparseFeatureAttention(32, 2.0, topk=4), TypeError, "num_heads must be an int"),
        (lambda: SparseFeatureAttention(32, 0, topk=4), ValueError, "num_heads must be at least 1"),
        (lambda: SparseFeatureAttention(32, 2, topk=4, positions="none", window=True), TypeError, "window must be"),
        (lambda: SparseFeatureAttention(32, 2, topk=4, positions="none", backend="fast"), ValueError, "backend must be"),
    ],
)  # fmt: skip
def test_arguments_of_the_wrong_kind(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_codes_are_equal_to_themselves_alone():
    codes, same = topk_codes(torch.ones(2, 8), 3), topk_codes(torch.ones(2, 8), 3)
    assert codes == codes
    assert codes != same


def test_a_checked_block_is_its_own_threads_alone():
    """Another thread that leaves a block neither ends nor starts the mode here."""
    import threading

    inside, leave = threading.Event(), threading.Event()

    def other():
        with flashsfa.checked():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    nan = torch.full((1, 1, 2, 8), math.nan)
    attention(nan, nan, nan, topk=4)  # not checked here
    with flashsfa.checked():
        leave.set()
        thread.join()
        with pytest.raises(ValueError, match="q holds NaN"):
            attention(nan, nan, nan, topk=4)
    attention(nan, nan, nan, topk=4)


def test_meta_and_fake_tensors_have_shapes_alone():
    from torch._subclasses import FakeTensorMode

    q, k, v = inputs(2, 9, heads=(4, 2))

    def calls(q, k, v):
        codes = topk_codes(k, 4)
        lens = torch.full((2,), 9, device=q.device)
        rows, bounds = k[0].transpose(0, 1), torch.zeros(3, dtype=torch.int32, device=q.device)
        yield decode(q, codes, v)
        yield decode(q[:, :, :1], codes, v, kv_lens=lens, value_tolerance=0.0)
        yield attention(q, codes, v, is_causal=True)
        yield attention(q, k, v, topk=4, is_causal=True)
        yield attention_varlen(rows, rows, rows, bounds, bounds, topk=4)[None].transpose(1, 2)

    shapes = [(2, 4, 2, 32), (2, 4, 1, 32), (2, 4, 2, 32), (2, 4, 2, 32), (1, 2, 9, 32)]
    assert [tuple(x.shape) for x in calls(*(x.to("meta") for x in (q, k, v)))] == shapes
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert [tuple(x.shape) for x in calls(*(mode.from_tensor(x) for x in (q, k, v)))] == shapes


def test_a_fake_code_is_not_looked_at():
    codes = topk_codes(torch.randn(2, 8), 3)
    assert FeatureCodes(*(x.to("meta") for x in (codes.dense, codes.values, codes.indices)), 8).to_dense().shape == (
        2,
        8,
    )

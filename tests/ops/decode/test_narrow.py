"""Decode over narrow codes and values: as plain decode over what they read as, a block of keys at a time."""

import math
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from decode_cases import DecodeRules, decode
from flashsfa import sparse_feature_decode, topk_codes
from flashsfa.formats import INDEX_FORMS, CodeFormat
from flashsfa.narrow import NarrowCodes, NarrowRows
from flashsfa.ops.decode import plain
from flashsfa.scores import ScoreRules
from flashsfa.stored import KVView

FORMATS = [CodeFormat(d, s, "auto", v) for d, s, v in product((16, 8), (16, 8, 4), (16, 8, 4))]
FORMATS += [CodeFormat(index=index) for index in INDEX_FORMS]
SLACK = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
BEST = CodeFormat()


def stored(n, form, *, batch=2, heads=2, d=32, d_v=32, topk=5, dense_dims=9, dtype=torch.float32):
    """Codes and values of random tokens in `form`."""
    k, v = (torch.randn(batch, heads, n, width).to(dtype) for width in (d, d_v))
    return NarrowCodes.encode(topk_codes(k, topk, dense_dims=dense_dims), form), NarrowRows.encode(v, form.v_bits)


def queries(m, *, batch=2, heads=4, d=32, dtype=torch.float32):
    return torch.randn(batch, heads, m, d).to(dtype)


def decode_narrow(q, codes, v, mask, scores, tolerance=0.0, topk_query=None):
    return plain.decode(q, KVView(codes, v), mask, scores, tolerance, topk_query)


def assert_as_what_it_reads(q, codes, v, rules=None, *, tolerance=0.0, topk_query=None, softcap=None):
    """`decode_narrow` and plain decode over codes and values in floats agree to rounding; the result."""
    rules = rules or DecodeRules()
    out, lse = decode_narrow(q, codes, v, rules.mask, ScoreRules(0.3, softcap), tolerance, topk_query)
    wide = torch.promote_types(q.dtype, torch.float32)
    expected, expected_lse = decode(
        plain, q, codes.to_codes(wide), v.to_dense(wide), rules, 0.3, tolerance, topk_query=topk_query, softcap=softcap
    )
    assert out.dtype == q.dtype
    slack = {"rtol": SLACK[q.dtype], "atol": SLACK[q.dtype], "equal_nan": True}
    torch.testing.assert_close(out, expected, **slack)
    torch.testing.assert_close(lse, expected_lse, **slack)
    return out, lse


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("m", [1, 3])
def test_every_format(form, m):
    assert_as_what_it_reads(queries(m), *stored(37, form))


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("form", [BEST, CodeFormat(16, 16, "auto", 16), CodeFormat(8, 8, "packed", 8)], ids=str)
def test_every_dtype(form, dtype):
    assert_as_what_it_reads(queries(2, dtype=dtype), *stored(19, form, dtype=dtype), topk_query=4)


@pytest.mark.parametrize(
    ("d", "dense_dims", "topk", "d_v"),
    [(64, 22, 12, 64), (256, 16, 31, 128), (64, 0, 1, 16), (7, 0, 3, 48), (128, 127, 1, 96)],
)
def test_every_width(d, dense_dims, topk, d_v):
    assert_as_what_it_reads(queries(2, d=d), *stored(11, BEST, d=d, d_v=d_v, topk=topk, dense_dims=dense_dims))


def hidden(n):
    """A padding mask of [2, n] that hides a key in the middle and all but the newest."""
    keys = torch.arange(n)
    return torch.stack((keys == n // 2, keys < n - 1))


RULES = {
    "window": lambda n: DecodeRules(window=4),
    "lengths": lambda n: DecodeRules(kv_lens=torch.tensor([n - 3, 1])),
    "an empty sequence": lambda n: DecodeRules(kv_lens=torch.tensor([0, n])),
    "padding": lambda n: DecodeRules(key_padding_mask=hidden(n)),
    "all": lambda n: DecodeRules(torch.tensor([n - 1, n]), 9, hidden(n)),
}


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
@pytest.mark.parametrize("form", [BEST, CodeFormat(16, 8, "uint8", 8), CodeFormat(8, 16, "packed", 16)], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_masks_and_tolerance(name, form, tolerance):
    codes, v = stored(23, form, dtype=torch.float64)
    q = queries(3, dtype=torch.float64)
    assert_as_what_it_reads(q, codes, v, RULES[name](23), tolerance=tolerance, softcap=2.0)


def test_several_blocks_of_keys():
    codes, v = stored(2 * 2048 + 5, BEST, batch=1, heads=1)
    q = queries(2, batch=1, heads=2)
    assert_as_what_it_reads(q, codes, v)
    assert_as_what_it_reads(q, codes, v, DecodeRules(kv_lens=torch.tensor([2100])), tolerance=0.05)


class LargestFloats(TorchDispatchMode):
    """The most entries of a floating tensor that an operation made."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype.itemsize > 2:
                self.entries = max(self.entries, x.numel())
        return out


@pytest.mark.parametrize("lengths", [None, 10_000])
def test_the_cache_is_never_whole_in_floats(lengths):
    n = 8 * 2048
    codes, v = stored(n, BEST, batch=1, heads=1, d=64, d_v=64, topk=12, dense_dims=22)
    rules = DecodeRules(kv_lens=None if lengths is None else torch.tensor([lengths]))
    with LargestFloats() as most:
        decode_narrow(queries(1, batch=1, heads=2, d=64), codes, v, rules.mask, ScoreRules(0.1))
    assert most.entries <= 2048 * 64


@pytest.mark.parametrize("form", [BEST, CodeFormat(16, 16, "bitmap", 8), CodeFormat(8, 16, "packed", 16)], ids=str)
def test_what_an_unfilled_buffer_holds_reaches_nothing(form):
    codes, v = stored(20, form)
    q, rules = queries(2), DecodeRules(kv_lens=torch.tensor([13, 7]))

    def spoilt(x):
        x = x.clone()
        for b, length in enumerate(rules.kv_lens.tolist()):
            x[b, :, length:] = math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
        return x

    expected = decode_narrow(q, codes, v, rules.mask, ScoreRules(0.3))
    out = decode_narrow(q, codes.map(spoilt), v.map(spoilt), rules.mask, ScoreRules(0.3))
    for x, y in zip(out, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("form", [BEST, CodeFormat(8, 8, "auto", 8)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_of_a_seen_token_is_seen(form, bad):
    k, v, q = torch.randn(1, 1, 9, 32), torch.randn(1, 1, 9, 32), queries(1, batch=1, heads=1)
    v[0, 0, 4, 7] = bad
    codes, values = NarrowCodes.encode(topk_codes(k, 5, dense_dims=9), form), NarrowRows.encode(v, form.v_bits)
    out, lse = decode_narrow(q, codes, values, DecodeRules().mask, ScoreRules(0.3))
    assert out.isnan().all()
    assert lse.isfinite().all()
    k[0, 0, 2, 1] = bad
    codes = NarrowCodes.encode(topk_codes(k, 5, dense_dims=9), form)
    assert decode_narrow(q, codes, values, DecodeRules().mask, ScoreRules(0.3))[1].isnan().all()


def test_strided_views_of_a_buffer():
    codes, v = stored(40, BEST)
    q = queries(2)
    held = (x.map(lambda t: t[:, :, 5:31]) for x in (codes, v))
    copies = (x.map(lambda t: t[:, :, 5:31].contiguous()) for x in (codes, v))
    for x, y in zip(assert_as_what_it_reads(q, *held), assert_as_what_it_reads(q, *copies), strict=True):
        torch.testing.assert_close(x, y)


def test_keys_are_no_rows_of_3_bits():
    """No kernel reads such keys: they are refused, not read as others."""
    keys, values = (NarrowRows.encode(torch.randn(1, 1, 40, 32), 3) for _ in range(2))
    with pytest.raises(ValueError, match="rows of 3 bits are values"):
        sparse_feature_decode(queries(1, batch=1, heads=1), keys, values)


def test_no_keys():
    out, lse = decode_narrow(queries(1), *stored(0, BEST), DecodeRules().mask, ScoreRules(0.3))
    assert torch.equal(out, torch.zeros(2, 4, 1, 32))
    assert (lse == -math.inf).all()

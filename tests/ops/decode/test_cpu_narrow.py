"""Decode compiled by numba over codes and values of few bits, and over tokens held as they came: equal to the plain path."""

import dataclasses
import functools

import pytest
import torch

from flashsfa import AxisBits, CodeFormat, SparseKVCache
from flashsfa.mask import Mask
from flashsfa.ops.decode import cpu, plain
from flashsfa.ops.prefill import pieces
from flashsfa.scores import ScoreRules
from numba_marks import NUMBA

pytestmark = NUMBA
D, DV, HEADS = 40, 32, 2
FORMATS = {
    "features": {"topk": 5, "dense_dims": 7},
    "int8": {"topk": 5, "dense_dims": 7, "dtype": torch.int8},
    "bitmap": {"topk": 7, "dense_dims": 9, "dtype": CodeFormat()},
    "packed": {"topk": 3, "dense_dims": 0, "dtype": CodeFormat(8, 4, "packed", 8)},
    "uint8": {"topk": 1, "dense_dims": 1, "dtype": CodeFormat(8, 4, "uint8", 16)},
    "mixed": {"topk": 1, "dense_dims": 1, "dtype": CodeFormat(16, 8, "uint8", 16)},
    "entries in 8 bits": {"topk": 6, "dense_dims": 3, "dtype": CodeFormat(8, 8, "bitmap", 4)},
    "whole keys in 8 bits": {"topk": D, "dtype": CodeFormat(8, 8, v_bits=8)},
    "whole keys in 4 bits": {"topk": 32, "dtype": CodeFormat()},
    "axes": {"dtype": CodeFormat()},
    "axes, values in 3 bits": {"dtype": CodeFormat(v_bits=3)},
    "axes, values in 16 bits": {"dtype": CodeFormat(v_bits=16)},
}
SUPPORTED = [name for name in FORMATS if name != "mixed"]


@functools.cache
def axes():
    rows = torch.randn(HEADS, 300, D, generator=torch.Generator().manual_seed(1)) * torch.linspace(3, 0.1, D)
    return AxisBits.fit(rows, 21)[1]


def cache_of(name, dtype=torch.float32, n=70, batch=2, v_dim=DV, **exact):
    """A filled cache of the format, and queries' width."""
    options = dict(FORMATS[name])
    if name.startswith("axes"):
        options["axes"] = axes()
    width = 32 if options.get("topk") == 32 else D
    k, v = torch.randn(batch, HEADS, n, width, dtype=dtype), torch.randn(batch, HEADS, n, v_dim, dtype=dtype)
    cache = SparseKVCache(**options, capacity=n + 9, **exact)
    cache.append(k, v)
    return cache, width


def expected(q, kv, mask, rules, topk_query=None):
    """The plain path in float64."""
    kv = kv if kv.is_narrow else kv.widened(torch.float64)
    q = q.double()
    coded = dataclasses.replace(kv, first=None, recent=None)
    if not kv.exact:
        return plain.decode(q, coded, mask, rules, 0.0, topk_query)
    wide = dataclasses.replace(
        kv,
        **{name: part and part.map(torch.Tensor.double) for name, part in (("first", kv.first), ("recent", kv.recent))},
    )
    visible = mask.to_bool(q.shape[2], kv.n, q.device)[..., kv.n_first : kv.n_first + kv.v.shape[2]]
    outs = []
    for i in range(q.shape[2]):  # the coded tokens that a query sees, as padding of the others
        hidden = ~visible[:, 0, i].expand(q.shape[0], -1)
        if coded.v.shape[2]:
            part = plain.decode(q[:, :, i : i + 1], coded, Mask(True, None, hidden), rules, 0.0, topk_query)
        else:
            part = torch.zeros(*q.shape[:2], 1, DV).double(), torch.full((*q.shape[:2], 1), -torch.inf).double()
        outs.append(part)
    out, lse = (torch.cat(x, dim=2) for x in zip(*outs, strict=True))
    pieces.merge(out, lse, *plain.decode_exact(q, wide, mask, rules))
    return out, lse


def assert_equal(q, kv, mask, rules, topk_query=None, tolerance=0.0):
    found = cpu.decode(q, kv, mask, rules, tolerance, topk_query)
    for x, y in zip(found, expected(q, kv, mask, rules, topk_query), strict=True):
        torch.testing.assert_close(
            x.double(),
            y,
            rtol=2e-2 if q.dtype == torch.bfloat16 else 2e-5,
            atol=2e-2 if q.dtype == torch.bfloat16 else 2e-5,
        )


@pytest.mark.parametrize("v_dim", [16, 48, 80, 128])
@pytest.mark.parametrize("name", ["axes", "axes, values in 3 bits"])
def test_widths_of_rotated_values(name, v_dim):
    cache, width = cache_of(name, v_dim=v_dim)
    q = torch.randn(2, HEADS * 3, 2, width)
    found, due = (decode(q, cache.kv, Mask(True), ScoreRules(0.2), 0.0, None) for decode in (cpu.decode, plain.decode))
    for x, y in zip(found, due, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SUPPORTED)
def test_formats(name, dtype):
    """Grouped heads, several queries, a length for each sequence, a window, padding and a cap."""
    cache, width = cache_of(name, dtype, n=1100)
    padding = torch.zeros(2, 1100, dtype=torch.bool)
    padding[0, :5] = True
    for groups, m, lengths, window, softcap in (
        (1, 1, None, None, None), (3, 1, None, None, 2.0), (5, 2, (1100, 31), None, None), (2, 3, (1100, 1050), 1040, None)
    ):  # fmt: skip
        q = torch.randn(2, HEADS * groups, m, width, dtype=dtype)
        kv_lens = None if lengths is None else torch.tensor(lengths)
        mask = Mask(True, window, padding if groups > 1 else None, kv_lens=kv_lens)
        assert_equal(q, cache.kv, mask, ScoreRules(0.2, softcap))


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize(("recent", "first"), [(5, 2), (0, 3), (4, 0), (99, 3)])
def test_exact_tokens(name, recent, first):
    cache, width = cache_of(name, recent=recent, first=first)
    padding = torch.zeros(2, 70, dtype=torch.bool)
    padding[1, [0, 1, 30, 69]] = True
    for m, window in ((1, None), (1, 3), (4, None), (3, 40)):
        q = torch.randn(2, HEADS * 3, m, width)
        for hidden in (None, padding):
            assert_equal(q, cache.kv, Mask(True, window, hidden), ScoreRules(0.2, None))
    if "features" in name:
        for factor in (None, torch.rand(HEADS, D)):
            rules = ScoreRules(0.2, None, exact_factor=factor)
            assert_equal(torch.randn(2, 4, 1, D), cache.kv, Mask(True), rules, topk_query=5)
            assert_equal(torch.randn(2, 4, 3, D), cache.kv, Mask(True), rules)


@pytest.mark.parametrize("name", SUPPORTED)
def test_what_is_hidden_may_hold_anything(name):
    """Unfilled buffers, NaN scales and indices out of range among them."""
    cache, width = cache_of(name, n=70)
    q, mask = torch.randn(2, HEADS, 1, width), Mask(True, None, kv_lens=torch.tensor([33, 50]))
    clean = cpu.decode(q, cache.kv, mask, ScoreRules(0.2, None), 0.0)
    for x in cache.kv.tensors():
        for b, end in enumerate((33, 50)):
            x[b, :, end:] = float("nan") if x.is_floating_point() else 127 if x.dtype == torch.int8 else 255
    for found, same in zip(cpu.decode(q, cache.kv, mask, ScoreRules(0.2, None), 0.0), clean, strict=True):
        torch.testing.assert_close(found, same, rtol=0, atol=0)


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("where", ["q", "scale"])
def test_nan_shows(name, where):
    cache, width = cache_of(name, n=9)
    q, kv = torch.randn(2, HEADS, 1, width), cache.kv
    floating = [x for x in kv.tensors() if x.is_floating_point()]
    if where == "scale" and not floating:
        pytest.skip("nothing in it is floating")
    (q[0, 0, 0] if where == "q" else floating[-1][0, 0, 3]).fill_(float("nan"))
    out, _ = cpu.decode(q, kv, Mask(True), ScoreRules(0.2, None), 0.0)
    assert out[0, 0].isnan().any()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_tolerance_leaves_rows_out(name):
    """Within its bound; exact tokens are always read."""
    cache, width = cache_of(name, n=1500, recent=3, first=2)
    q, rules = 4 * torch.randn(2, HEADS, 1, width), ScoreRules(0.3, None)
    exact = cpu.decode(q, cache.kv, Mask(True), rules, 0.0)
    found = cpu.decode(q, cache.kv, Mask(True), rules, 0.2)
    largest = cache.kv.rows(torch.float32).v.norm(dim=-1).max()
    assert (found[0] - exact[0]).norm(dim=-1).max() <= 2 * 0.2 * largest
    assert not torch.equal(found[0], exact[0])
    torch.testing.assert_close(found[1], exact[1])


def test_mixed_widths_say_that_they_run_in_plain_pytorch():
    cache, _ = cache_of("mixed", n=9)
    assert cpu.obstacle(torch.float32, cache.kv) == "reads no codes of which a part has 16 bits and another fewer"

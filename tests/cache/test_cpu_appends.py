"""Steps of a cache on the CPU, of which a kernel of numba's does the work in one call, leave what PyTorch's operations leave, bit by bit."""

import copy
import math
from dataclasses import replace
from random import Random

import pytest
import torch

from append_cases import BATCH, HEADS, TOKENS, assert_same_view, hostile, poisoned, same_bits
from flashsfa import CodeFormat, SparseKVCache, checked, explain, topk_codes
from flashsfa.cache.buffers import buffers_of
from flashsfa.coder import Coder
from flashsfa.ops import record
from flashsfa.ops.cpu import threads
from flashsfa.ops.select.hopper.append import Ring
from flashsfa.ops.select.operators import prepared_append
from flashsfa.stored import ExactKV
from numba_marks import NUMBA

pytestmark = NUMBA
# (head_dim, topk, dense_dims, v_dim)
SHAPES = [(64, 22, 12, 64), (80, 26, 22, 72), (37, 36, 1, 7), (33, 1, 5, 64), (256, 32, 0, 300), (255, 255, 0, 3), (1, 1, 0, 1)]  # fmt: skip
# how tokens come, and in how many bits they are kept
KINDS = [
    (torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.int8), (torch.bfloat16, torch.int8),
]  # fmt: skip
EXACT = {"none": {}, "recent": {"recent": 3}, "both": {"recent": 2, "first": 2}}


@pytest.fixture(autouse=True)
def nothing_ran(monkeypatch):
    monkeypatch.setattr(record, "_last", {})


@pytest.fixture
def plainly(monkeypatch):
    """Calls a function as without the kernel."""

    def run(call, *arguments):
        with monkeypatch.context() as changed:
            changed.setattr("flashsfa.cache.contiguous.has_writer", lambda k, v: False)
            return call(*arguments)

    return run


def nasty(dtype, head_dim, v_dim):
    """As `hostile`, with rows of NaN, of zeros of both signs, and of what is too small or too large for a scale besides."""
    k, v = (torch.cat((x, x), dim=2) for x in hostile(dtype, head_dim, v_dim))
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for x in (k, v):
        x[:, :, TOKENS, ::3] = math.nan
        x[:, :, TOKENS, ::2] *= 1000
        x[:, :, TOKENS + 1] = torch.tensor([0.0, -0.0]).repeat(BATCH, HEADS, x.shape[3])[..., : x.shape[3]]
        x[:, :, TOKENS + 2] = (torch.randn(x.shape[3]) * 99).round() * tiny
        x[:, 0, TOKENS + 3] = torch.finfo(dtype).max
        x[:, 1, TOKENS + 3, 0] = -math.nan
    return k, v


def with_one_nan(view):
    """The kernel keeps the bits of NaN, which torch's `gather` may change."""
    return view.map(lambda x: x.masked_fill(x.isnan(), math.nan) if x.is_floating_point() else x)


@pytest.mark.parametrize("exact", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize(("dtype", "bits"), KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hostile_tokens(shape, dtype, bits, exact, plainly):
    """One by one and two by two, through moves of the newest tokens and growth."""
    head_dim, topk, dense_dims, v_dim = shape
    k, v = nasty(dtype, head_dim, v_dim)
    cache, plain = (SparseKVCache(topk, dense_dims=dense_dims, dtype=bits, capacity=9, **exact) for _ in range(2))
    for count in (1, 2):
        for i in range(0, 2 * TOKENS, count):
            tokens = k[:, :, i : i + count], v[:, :, i : i + count]
            found, expected = cache.append(*tokens), plainly(plain.append, *tokens)
            assert_same_view(with_one_nan(found), with_one_nan(expected))
    assert "append: numba" in explain()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_kept_has_its_bits(dtype):
    """Those of NaN too."""
    k, v = nasty(dtype, 64, 8)
    cache, codes = SparseKVCache(22, dense_dims=12), topk_codes(k, 22, dense_dims=12)
    for i in range(2 * TOKENS):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    bits = k[..., 12:].view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
    values = bits.gather(-1, codes.indices.long()).view(dtype)
    for one, another in zip((*cache.codes.tensors(), cache.v), (codes.dense, values, codes.indices, v), strict=True):
        same_bits(one, another)


# tensors [B, H, N, width] of all strides
LAYOUTS = {
    "by token": lambda n, width, dtype: torch.randn(BATCH, n, HEADS, width, dtype=dtype).transpose(1, 2),
    "tokens first": lambda n, width, dtype: torch.randn(n, BATCH, HEADS, width, dtype=dtype).permute(1, 2, 0, 3),
    "heads first": lambda n, width, dtype: torch.randn(HEADS, n, BATCH, width, dtype=dtype).permute(2, 0, 1, 3),
    "part of a row": lambda n, width, dtype: torch.randn(BATCH, HEADS, n, width + 9, dtype=dtype)[..., 5:-4],
    "one for all sequences": lambda n, width, dtype: torch.randn(1, HEADS, n, width, dtype=dtype).expand(
        BATCH, -1, -1, -1
    ),
    "one for all heads and tokens": lambda n, width, dtype: torch.randn(BATCH, 1, 1, width, dtype=dtype).expand(
        -1, HEADS, n, -1
    ),
    "apart": lambda n, width, dtype: torch.randn(BATCH, HEADS, n, 2 * width, dtype=dtype)[..., ::2],  # left to PyTorch
}


@pytest.mark.parametrize(("dtype", "bits"), KINDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_in_any_order(layout, dtype, bits, plainly):
    cache, plain = (SparseKVCache(5, dense_dims=3, dtype=bits, recent=1) for _ in range(2))
    for n in (1, 1, 2, 2, 1):
        k, v = (LAYOUTS[layout](n, width, dtype) for width in (16, 24))
        assert_same_view(cache.append(k, v), plainly(plain.append, k, v))
    assert ("append: torch" if layout == "apart" else "append: numba") in explain()


@pytest.mark.parametrize("exact", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("bits", [None, torch.int8], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_between_steps(seed, bits, exact, plainly):
    """Steps of few tokens and prompts, crops, marks, other orders of sequences, copies, windows and checks."""
    random = Random(seed)
    cache, plain = (SparseKVCache(5, dense_dims=3, dtype=bits, **exact, capacity=9) for _ in range(2))

    def append(count):
        k, v = torch.randn(2, BATCH, HEADS, count, 16)
        assert_same_view(cache.append(k, v), plainly(plain.append, k, v))
        assert_same_view(cache.kv, plain.kv)

    append(12)
    for _ in range(60):
        what = random.choice(["step"] * 12 + ["steps", "prompt", "crop", "mark", "order", "copy", "window", "checked"])
        if what == "step":
            for _ in range(random.randint(1, 6)):
                append(1)
        elif what in ("steps", "prompt"):
            append(random.randint(2, 4) if what == "steps" else 200)
        elif what == "checked":
            with checked():
                append(1)
        elif what == "crop":
            count = random.randint(1, min(9, len(cache) - 1))
            cache.crop(-count)
            plain.crop(-count)
        elif what == "mark":
            cache.mark()
            plain.mark()
            append(random.randint(1, 3))
            cache.crop(-1)
            plainly(plain.crop, -1)
        elif what == "order":
            order = torch.tensor(random.choices(range(BATCH), k=BATCH))
            cache.select_batch(order)
            plain.select_batch(order)
        elif what == "copy":
            cache, plain = copy.deepcopy(cache), copy.deepcopy(plain)
        elif len(cache) > 20:
            cache.keep_last(20, 24)
            plain.keep_last(20, 24)
    assert "append: numba" in explain()


@pytest.mark.parametrize(("dtype", "bits"), KINDS, ids=str)
@pytest.mark.parametrize("has_newest", [False, True])
def test_nothing_else_is_written(has_newest, dtype, bits):
    """Neither to other slots nor around the buffers."""
    k, v = hostile(dtype, 37, 7)
    made = []

    def buffer(x):
        made.append(poisoned(x.shape[3:], x.dtype))
        return made[-1][0]

    kv = Coder(5, 3, bits).encode(k[:, :, :0], v[:, :, :0]).map(buffer)
    slots = [(3, 5 if has_newest else 3 + TOKENS)] * len(made)
    if has_newest:
        kv = replace(kv, recent=ExactKV(k, v).map(buffer))
        slots += [(4, 4 + TOKENS)] * 2
    prepared_append(k, v, *buffers_of(kv))(k, v, 3, Ring(2, 1, 4) if has_newest else None)
    for (x, memory), (start, end) in zip(made, slots, strict=True):
        x.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[x.itemsize])[:, :, start:end] = -1
        assert memory.view(torch.int8).eq(-1).all()


def test_what_does_not_fit_is_refused():
    k, v = torch.randn(2, BATCH, HEADS, 2, 16)
    form, buffers = buffers_of(Coder(5, 3).empty(6, k, v))
    write = prepared_append(k, v, form, buffers)
    for start in (-1, 5):
        with pytest.raises(ValueError, match="4 is the last place"):
            write(k, v, start)
    with pytest.raises(ValueError, match="the v buffer must be contiguous"):
        prepared_append(k, v, form, buffers._replace(v=buffers.v[..., 1:]))
    write = prepared_append(k, v, form, buffers._replace(recent_k=k.repeat(1, 1, 2, 1), recent_v=v.repeat(1, 1, 2, 1)))
    with pytest.raises(ValueError, match="do not fit 4 slots"):
        write(k, v, 0, Ring(1, 0, 3))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {}),
        (torch.float16, {"dtype": torch.int8}),
        (torch.float32, {"dtype": CodeFormat()}),
    ],
    ids=str,
)
def test_what_is_left_to_torch(dtype, options, caplog):
    cache = SparseKVCache(5, dense_dims=3, **options)
    for _ in range(3):
        cache.append(*torch.randn(2, BATCH, HEADS, 1, 16).to(dtype))
    assert "append: torch (the fused CPU code takes few tokens at a time" in explain()
    assert "append" not in caplog.text


@pytest.mark.parametrize("bits", [None, CodeFormat(dense_bits=16, value_bits=16, v_bits=16)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_format_of_16_bits(dtype, bits, plainly):
    cache, plain = (SparseKVCache(5, dense_dims=3, dtype=bits) for _ in range(2))
    for _ in range(3):
        k, v = torch.randn(2, BATCH, HEADS, 1, 16).to(dtype)
        assert_same_view(cache.append(k, v), plainly(plain.append, k, v))


def test_without_numba_tokens_are_written_as_ever(monkeypatch, caplog):
    monkeypatch.setattr(threads, "numba", None)
    monkeypatch.setattr(record, "_announced", set())
    k, v = torch.randn(2, BATCH, HEADS, 1, 16)
    cache = SparseKVCache(5, dense_dims=3)
    for _ in range(3):
        cache.append(k, v)
    same_bits(cache.v, v.repeat(1, 1, 3, 1))
    assert caplog.text.count("append runs on the torch backend: the fused CPU code needs numba") == 1

"""The kernel for Hopper that appends a few tokens writes what plain PyTorch codes, bit by bit: on such a GPU where there is one, else lane by lane
on the CPU."""

import math

import pytest
import torch

from append_cases import BATCH, BITS, CAPACITY, DEVICE, DTYPES, HEADS, TOKENS, hostile, poisoned, same_bits, use_kernel
from flashsfa import topk_codes
from flashsfa.codes import quantize_rows
from flashsfa.ops import nvrtc
from flashsfa.ops.select.hopper.append import Buffers, Ring, prepare

# (head_dim, topk, dense_dims, v_dim)
SHAPES = [(128, 16, 16, 128), (80, 26, 22, 72), (37, 36, 1, 7), (33, 1, 5, 64), (256, 32, 0, 300), (1, 1, 0, 1)]


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    use_kernel(monkeypatch)


def buffers(topk, dense_dims, v_dim, dtype, bits, head_dim=None):
    """Of a cache, and their memory; with `head_dim` those of the newest tokens too."""
    stored = bits or dtype
    forms = [((dense_dims,), stored), ((topk,), stored), ((topk,), torch.uint8), ((v_dim,), stored)]
    forms += [((), torch.float32)] * 2 if bits else [None, None]
    forms += [((head_dim,), dtype), ((v_dim,), dtype)] if head_dim else []
    made = [form and poisoned(*form) for form in forms]
    return Buffers(*(x and x[0] for x in made)), [x[1] for x in made if x]


def encoded(k, v, topk, dense_dims, bits):
    codes = topk_codes(k, topk, dense_dims=dense_dims)
    if bits is None:  # as integers: on a CPU `gather` may return other bits for NaN
        values = k[..., dense_dims:].view(torch.int16).gather(-1, codes.indices.long()).view(k.dtype)
        return [codes.dense, values, codes.indices, v]
    codes, (v, v_scale) = codes.quantize(), quantize_rows(v)
    return [codes.dense, codes.values, codes.indices, v, codes.scale, v_scale]


def put(held, parts, start):
    """Write the coded `parts`, as `encoded` returns them."""
    for buffer, part in zip([x for x in held[:6] if x is not None], parts, strict=True):
        buffer[:, :, start : start + part.shape[2]] = part


def assert_same_memory(found, expected):
    for one, another in zip(found, expected, strict=True):
        same_bits(one, another)


def assert_appends(k, v, topk, dense_dims, bits, start):
    (found, memory), (other, expected) = (buffers(topk, dense_dims, v.shape[-1], k.dtype, bits) for _ in range(2))
    put(other, encoded(k, v, topk, dense_dims, bits), start)
    prepare(k, v, found)(k, v, start)
    assert_same_memory(memory, expected)


@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "topk", "dense_dims", "v_dim"), SHAPES)
def test_what_is_written_and_nothing_else(head_dim, topk, dense_dims, v_dim, dtype, bits):
    k, v = hostile(dtype, head_dim, v_dim)
    for start in (0, CAPACITY - TOKENS):
        assert_appends(k, v, topk, dense_dims, bits, start)
    assert_appends(k[:, :, 3:4], v[:, :, 3:4], topk, dense_dims, bits, CAPACITY - 1)


@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "topk", "dense_dims", "v_dim"), SHAPES)
@pytest.mark.parametrize("ring", [Ring(3, 2, 5), Ring(0, 4, 4), Ring(0, 0, 3)], ids=str)
def test_what_leaves_the_newest_is_coded(ring, head_dim, topk, dense_dims, v_dim, dtype, bits):
    """And what comes takes their place, whatever it holds."""
    (old_k, old_v), (k, v) = (hostile(dtype, head_dim, v_dim) for _ in range(2))
    k[:, :, 4, 0], v[0, :, 5] = math.nan, math.nan
    (found, memory), (other, expected) = (buffers(topk, dense_dims, v_dim, dtype, bits, head_dim) for _ in range(2))
    leaving, new = (slice(at, at + n) for at, n in ((ring.oldest, ring.leaving), (ring.newest, TOKENS)))
    for held in (found, other):
        held.recent_k[:, :, leaving], held.recent_v[:, :, leaving] = (
            x[:, :, TOKENS - ring.leaving :] for x in (old_k, old_v)
        )
    put(other, encoded(other.recent_k[:, :, leaving], other.recent_v[:, :, leaving], topk, dense_dims, bits), 1)
    other.recent_k[:, :, new], other.recent_v[:, :, new] = k, v
    prepare(k, v, found)(k, v, 1, ring)
    assert_same_memory(memory, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_above_infinity(dtype):
    k, v = hostile(dtype, 128, 128)
    k[:, :, :3, 40::7] = math.nan
    k[0, 1, 5], v[0, 1, 5], v[:, :, 4, 3] = math.nan, math.nan, math.nan
    assert_appends(k, v, 16, 16, None, 2)


@pytest.mark.parametrize("shape", [(128, 16, 16, 128), (80, 26, 22, 72)])
def test_a_row_with_nan_is_read_as_nan(shape):
    head_dim, topk, dense_dims, v_dim = shape
    k, v = (torch.randn(BATCH, HEADS, TOKENS, width, device=DEVICE).bfloat16() for width in (head_dim, v_dim))
    k[0, 0, 0, :3], v[0, 0, 0, 5:9] = math.nan, math.nan
    k[1, 1, 0], v[1, 1, 0] = math.nan, math.nan
    found, _ = buffers(topk, dense_dims, v_dim, torch.bfloat16, torch.int8)
    prepare(k, v, found)(k, v, 1)
    expected = encoded(k, v, topk, dense_dims, torch.int8)
    for scales, due in zip((found.scale, found.v_scale), expected[-2:], strict=True):
        scales = scales[:, :, 1 : 1 + TOKENS]
        assert torch.equal(scales.isnan(), due.isnan())
        assert scales.isnan().sum() == 2
        assert torch.equal(scales[~scales.isnan()], due[~due.isnan()])


def test_other_forms_are_left_to_triton(monkeypatch):
    k = torch.randn(BATCH, HEADS, TOKENS, 64, dtype=torch.float16, device=DEVICE)
    fit = buffers(8, 4, 64, k.dtype, None)[0]
    assert prepare(k, k, fit) is not None
    assert prepare(k.float(), k.float(), buffers(8, 4, 64, torch.float32, None)[0]) is None
    assert prepare(k, k.mT.contiguous().mT, fit) is None
    assert prepare(k[:, :, :0], k[:, :, :0], fit) is None
    many = k[:, :, :1].expand(BATCH, HEADS, 129, 64)
    assert prepare(many, many, fit) is None
    monkeypatch.setattr(nvrtc, "obstacle", lambda: "NVRTC is not installed")
    assert "NVRTC is not installed" in prepare(k, k, fit)


def test_what_does_not_fit_is_refused():
    k = torch.randn(BATCH, HEADS, TOKENS, 64, dtype=torch.float16, device=DEVICE)
    fit = buffers(8, 4, 64, k.dtype, None)[0]
    with pytest.raises(ValueError, match="6 tokens at 6 do not fit"):
        prepare(k, k, fit)(k, k, CAPACITY - TOKENS + 1)
    with pytest.raises(ValueError, match="6 tokens at -1 do not fit"):
        prepare(k, k, fit)(k, k, -1)
    with pytest.raises(ValueError, match="the v buffer must be contiguous"):
        prepare(k, k[..., :32], fit)
    with pytest.raises(ValueError, match="the dense buffer must be contiguous"):
        prepare(k, k, fit._replace(dense=fit.dense.mT.contiguous().mT))
    with pytest.raises(ValueError, match=r"the values buffer must be contiguous torch\.float16"):
        prepare(k, k, fit._replace(values=fit.values.bfloat16()))
    with pytest.raises(ValueError, match="scales both or neither"):
        prepare(k, k, fit._replace(scale=fit.v[..., 0].float()))
    with pytest.raises(ValueError, match="both or neither"):
        prepare(k, k, fit._replace(recent_k=k))
    with pytest.raises(ValueError, match="the recent_v buffer must be contiguous"):
        prepare(k, k, fit._replace(recent_k=k.contiguous(), recent_v=k.contiguous().float()))
    with_recent = prepare(k, k, buffers(8, 4, 64, k.dtype, None, 64)[0])
    for ring in (Ring(-1, 0, 5), Ring(1, -1, 5), Ring(2, 4, 5), Ring(1, 4, 6), Ring(7, 0, 7)):
        with pytest.raises(ValueError, match="do not fit 11 slots"):
            with_recent(k, k, 0, ring)
    with pytest.raises(ValueError, match="1 tokens at 11 do not fit"):
        with_recent(k, k, CAPACITY, Ring(1, 0, 5))
    with pytest.raises(ValueError, match="leave 60 dense"):
        prepare(k, k, fit._replace(dense=k.new_empty(BATCH, HEADS, CAPACITY, 60)))

"""The kernel for Hopper that appends a few tokens writes what plain PyTorch codes, bit by bit: on such a GPU where there is one, else lane by lane
on the CPU."""

import math
from dataclasses import replace

import pytest
import torch

from append_cases import BATCH, BITS, CAPACITY, DEVICE, DTYPES, HEADS, TOKENS, hostile, poisoned, same_bits, use_kernel
from flashsfa.cache.buffers import buffers_of
from flashsfa.coder import Coder
from flashsfa.formats import CodeFormat
from flashsfa.narrow import NarrowRows
from flashsfa.ops import nvrtc
from flashsfa.ops.select.hopper import append
from flashsfa.ops.select.hopper.append import Ring
from flashsfa.rotation import rotate
from flashsfa.stored import ExactKV
from held_cases import axis_bits

# (head_dim, topk, dense_dims, v_dim)
SHAPES = [(128, 16, 16, 128), (80, 26, 22, 72), (37, 36, 1, 7), (33, 1, 5, 64), (256, 32, 0, 300), (1, 1, 0, 1)]
FORMATS = [
    ("d8s4v8-packed", SHAPES[0]), ("d8s4v16-bitmap", SHAPES[1]), ("d16s4v8-uint8", SHAPES[1]), ("d8s8v16-packed", SHAPES[3]),
    ("d16s8v8-bitmap", SHAPES[2]), ("d8s16v8-packed", SHAPES[4]), ("d8s4v8-bitmap", (5, 3, 0, 8)), ("d8s4v8-packed", (3, 1, 1, 8)),
]  # fmt: skip


@pytest.fixture(autouse=True, params=[append._FEW_TOKENS, 0], ids=["alone", "four a block"])
def kernel(monkeypatch, request):
    """For tokens that have a block each, and for those that share it."""
    use_kernel(monkeypatch)
    monkeypatch.setattr(append, "_FEW_TOKENS", request.param)
    monkeypatch.setattr(
        "flashsfa.axes.may_look", lambda x: False
    )  # as on a GPU, where an axis takes whatever a key holds


def held(coder, k, v, *, has_recent=False):
    """Poisoned buffers of a cache, and the memory that they are parts of."""
    memory = []

    def buffer(x):
        made, all_of_it = poisoned(x.shape[3:], x.dtype)
        memory.append(all_of_it)
        return made

    kv = coder.encode(k[:, :, :0], v[:, :, :0]).map(buffer)
    return (replace(kv, recent=ExactKV(k, v).map(buffer)) if has_recent else kv), memory


def prepare(k, v, kv):
    return append.prepare(k, v, *buffers_of(kv))


def put(kv, coder, k, v, start):
    """Write what k and v are coded as."""
    parts = coder.encode(k, v).tensors()
    if coder.bits is None and coder.axes is None:  # as integers: on a CPU `gather` may return other bits for NaN
        sparse = k[..., coder.dense_dims :].view(torch.int16)
        parts[1] = sparse.gather(-1, parts[2].long()).view(k.dtype)
    for buffer, part in zip(kv.tensors(), parts, strict=True):
        buffer[:, :, start : start + part.shape[2]] = part


def assert_same(found, expected, memory, other, start, count):
    """All of the memory. One NaN is as another in what is computed of a row."""
    for kv in (found, expected):
        for x in kv.tensors():
            written = x[:, :, start : start + count]
            if x.ndim == 3:
                written[written.isnan()] = math.nan
    for one, another in zip(memory, other, strict=True):
        same_bits(one, another)


def assert_appends(coder, k, v, start):
    (found, memory), (expected, other) = (held(coder, k, v) for _ in range(2))
    put(expected, coder, k, v, start)
    prepare(k, v, found)(k, v, start)
    assert_same(found, expected, memory, other, start, k.shape[2])


def assert_appends_somewhere(coder, k, v):
    for start in (0, CAPACITY - TOKENS):
        assert_appends(coder, k, v, start)
    assert_appends(coder, k[:, :, 3:4], v[:, :, 3:4], CAPACITY - 1)


@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "topk", "dense_dims", "v_dim"), SHAPES)
def test_what_is_written_and_nothing_else(head_dim, topk, dense_dims, v_dim, dtype, bits):
    assert_appends_somewhere(Coder(topk, dense_dims, bits), *hostile(dtype, head_dim, v_dim))


@pytest.mark.parametrize(("name", "shape"), FORMATS)
def test_codes_in_the_widths_of_a_format(name, shape):
    head_dim, topk, dense_dims, v_dim = shape
    for dtype in DTYPES:
        assert_appends_somewhere(Coder(topk, dense_dims, CodeFormat.named(name)), *hostile(dtype, head_dim, v_dim))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("head_dim", "v_dim"), [(128, 64), (37, 7)])
def test_keys_that_keep_every_feature(head_dim, v_dim, bits):
    form = CodeFormat(value_bits=bits, v_bits=24 - bits)
    for dtype in DTYPES:
        assert_appends_somewhere(Coder(head_dim, 0, form), *hostile(dtype, head_dim, v_dim))


@pytest.mark.parametrize("bits", [None, CodeFormat(v_bits=8)], ids=str)
@pytest.mark.parametrize("head_dim", [33, 256])
def test_bits_per_axis(head_dim, bits):
    """Each head has its own; a step of zero reads all as the centre."""
    axes = axis_bits(HEADS, head_dim)
    axes = replace(axes, step=axes.step * (torch.arange(head_dim, device=DEVICE) != 2))
    for dtype in DTYPES:
        k, v = hostile(dtype, head_dim, 72)
        k[0, :, 0, ::5] = math.nan
        assert_appends_somewhere(Coder(None, bits=bits, axes=axes), k, v)


def whole_numbers(dtype, width):
    """Rows [B, H, N, width] of small integers, whose sums are exact in any order; and one of NaN, of infinity, of zeros and of ones."""
    x = (torch.randn(BATCH, TOKENS, HEADS, width, device=DEVICE) * 6).round()
    x[0, 1, :, ::3], x[0, 2, 0, 3], x[0, 2, 1, 0], x[1, 0], x[1, 1] = math.nan, math.inf, -math.inf, 0, -1
    x[1, 2] *= 512
    return x.to(dtype).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 64, 80, 192, 256])
@pytest.mark.parametrize("v_bits", [4, 3])
def test_rotated_rows(v_bits, width, dtype):
    """Of keys in 4 bits and of values. The norm of their rotation is a power of two."""
    k, v = whole_numbers(dtype, width), whole_numbers(dtype, width)
    assert_appends_somewhere(Coder(width, 0, CodeFormat(v_bits=v_bits)), k, v)


@pytest.mark.parametrize("v_bits", [4, 3])
def test_rotated_values(v_bits):
    """Of a width that takes all registers, beside each kind of key."""
    v, form = whole_numbers(torch.bfloat16, 1024), CodeFormat(v_bits=v_bits)
    k, _ = hostile(torch.bfloat16, 64, 1)
    for coder in (Coder(9, 7, form), Coder(None, bits=form, axes=axis_bits(HEADS, 64))):
        assert_appends(coder, k, v, 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [32, 96, 128, 512])
@pytest.mark.parametrize("bits", [4, 3])
def test_any_rotated_rows_but_for_ties(bits, width, dtype):
    """Sums of a rotation depend on their order in the last bit, by which a scale or a level may fall to the other side of a tie."""
    v = torch.randn(BATCH, HEADS, TOKENS, width, device=DEVICE).to(dtype)
    v[:, :, 1] *= 1e-4
    v[:, :, 2, 5] = 300
    coder, highest = Coder(None, bits=CodeFormat(v_bits=bits), axes=axis_bits(HEADS, 64)), 2 ** (bits - 1) - 0.5
    k, start = hostile(dtype, 64, 1)[0], 1
    kv, _ = held(coder, k, v)
    prepare(k, v, kv)(k, v, start)
    found = kv.v[:, :, start : start + TOKENS]
    rotated = rotate(v.double())
    eps = torch.finfo(torch.bfloat16).eps / 2 * (1 + 1e-4)
    middle = (rotated.amax(-1) + rotated.amin(-1)) / 2
    centre, scale = found.centre.double(), found.scale.double()
    assert ((centre - middle).abs() <= eps * middle.abs() + 1e-6 * rotated.abs().amax(-1)).all()
    around = rotated - centre[..., None]
    largest = around.abs().amax(-1) / highest
    assert ((scale - largest).abs() <= eps * largest).all()
    steps = around / scale[..., None]
    levels = NarrowRows(found.kept, torch.ones_like(found.scale), torch.zeros_like(found.centre), width, bits).rows(
        torch.float64
    )
    due = (steps.floor() + 0.5).clamp(-highest, highest)
    is_tie = (steps - steps.round()).abs() < 1e-4
    assert is_tie.double().mean() < 0.01
    assert torch.equal(levels[~is_tie], due[~is_tie])
    assert (levels - due).abs().max() <= 1
    usual = NarrowRows.encode(v, bits)
    assert ((usual.scale == found.scale) & (usual.centre == found.centre)).double().mean() > 0.9


@pytest.mark.parametrize("ring", [Ring(3, 2, 5), Ring(0, 4, 4), Ring(0, 0, 3)], ids=str)
@pytest.mark.parametrize("bits", [*BITS.values(), CodeFormat(v_bits=8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "topk", "dense_dims", "v_dim"), SHAPES[:2])
def test_what_leaves_the_newest_is_coded(ring, head_dim, topk, dense_dims, v_dim, dtype, bits):
    """And what comes takes their place, whatever it holds."""
    (old_k, old_v), (k, v) = (hostile(dtype, head_dim, v_dim) for _ in range(2))
    k[:, :, 4, 0], v[0, :, 5] = math.nan, math.nan
    coder = Coder(topk, dense_dims, bits)
    (found, memory), (expected, other) = (held(coder, k, v, has_recent=True) for _ in range(2))
    leaving, new = (slice(at, at + n) for at, n in ((ring.oldest, ring.leaving), (ring.newest, TOKENS)))
    old = old_k[:, :, TOKENS - ring.leaving :], old_v[:, :, TOKENS - ring.leaving :]
    for kv in (found, expected):
        kv.recent.k[:, :, leaving], kv.recent.v[:, :, leaving] = old
    put(expected, coder, expected.recent.k[:, :, leaving], expected.recent.v[:, :, leaving], 1)
    expected.recent.k[:, :, new], expected.recent.v[:, :, new] = k, v
    prepare(k, v, found)(k, v, 1, ring)
    assert_same(found, expected, memory, other, 1, ring.leaving)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_above_infinity(dtype):
    k, v = hostile(dtype, 128, 128)
    k[:, :, :3, 40::7] = math.nan
    k[0, 1, 5], v[0, 1, 5], v[:, :, 4, 3] = math.nan, math.nan, math.nan
    assert_appends(Coder(16, 16), k, v, 2)


@pytest.mark.parametrize("shape", [(128, 16, 16, 128), (80, 26, 22, 72)])
def test_a_row_with_nan_is_read_as_nan(shape):
    head_dim, topk, dense_dims, v_dim = shape
    k, v = (torch.randn(BATCH, HEADS, TOKENS, width, device=DEVICE).bfloat16() for width in (head_dim, v_dim))
    k[0, 0, 0, :3], v[0, 0, 0, 5:9] = math.nan, math.nan
    k[1, 1, 0], v[1, 1, 0] = math.nan, math.nan
    coder = Coder(topk, dense_dims, torch.int8)
    kv, _ = held(coder, k, v)
    prepare(k, v, kv)(k, v, 1)
    due = coder.encode(k, v)
    for scales, expected in ((kv.codes.scale, due.codes.scale), (kv.v_scale, due.v_scale)):
        scales = scales[:, :, 1 : 1 + TOKENS]
        assert torch.equal(scales.isnan(), expected.isnan())
        assert scales.isnan().sum() == 2
        assert torch.equal(scales[~scales.isnan()], expected[~expected.isnan()])


def test_other_forms_are_left_to_other_ways(monkeypatch):
    k = torch.randn(BATCH, HEADS, TOKENS, 64, dtype=torch.float16, device=DEVICE)
    coder = Coder(8, 4)
    fit, _ = held(coder, k, k)
    assert prepare(k, k, fit) is not None
    assert prepare(k.float(), k.float(), held(coder, k.float(), k.float())[0]) is None
    assert prepare(k, k.mT.contiguous().mT, fit) is None
    assert prepare(k[:, :, :0], k[:, :, :0], fit) is None
    many = k[:, :, :1].expand(BATCH, HEADS, (1 << 16) // (BATCH * HEADS) + 1, 64)
    assert prepare(many, many, fit) is None
    wide = k.repeat(1, 1, 1, 5)
    assert prepare(wide, k, held(Coder(None, axes=axis_bits(HEADS, 320)), wide, k)[0]) is None
    monkeypatch.setattr(nvrtc, "obstacle", lambda: "NVRTC is not installed")
    assert "NVRTC is not installed" in prepare(k, k, fit)


PAGES, PAGE = 3, 5
SLOTS = [[4, 5, 11, -1, 14, 0], [1, 15, 7, 6, -7, 9]]  # page * 5 + place; -1, -7 and 15 are none of them


def put_in_pages(pools, coder, k, v):
    """At `SLOTS`."""
    for pool, x in zip(pools.tensors(), coder.encode(k, v).tensors(), strict=True):
        for sequence, slots in enumerate(SLOTS):
            for token, slot in enumerate(slots):
                if 0 <= slot < PAGES * PAGE:
                    pool[slot // PAGE, :, slot % PAGE] = x[sequence, :, token]


def assert_same_but_for_nan(found, expected):
    """In all of what is computed of a row one NaN is as another."""
    for one, another in zip(found.tensors(), expected.tensors(), strict=True):
        if one.is_floating_point() and one.ndim == 3:
            assert torch.equal(one.isnan(), another.isnan())
            one, another = one.nan_to_num(7), another.nan_to_num(7)
        same_bits(one, another)


@pytest.mark.parametrize("bits", [*BITS.values(), CodeFormat(v_bits=8), CodeFormat(16, 8, "bitmap", 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "topk", "dense_dims", "v_dim"), SHAPES[:4])
def test_pools_of_pages(head_dim, topk, dense_dims, v_dim, dtype, bits):
    """Each token has its slot; one of a slot that there is not goes nowhere."""
    coder, (k, v) = Coder(topk, dense_dims, bits), hostile(dtype, head_dim, v_dim)
    found, expected = (
        coder.empty(PAGE, k, v).map(lambda x: poisoned_pool(x.shape[3:], x.dtype)) for _ in range(2)
    )  # [P, H, page_size, ...]
    put_in_pages(expected, coder, k, v)
    append.prepare_paged(k, v, *buffers_of(found))(k, v, torch.tensor(SLOTS, device=DEVICE))
    assert_same_but_for_nan(found, expected)


def poisoned_pool(width, dtype):
    shape = (PAGES, HEADS, PAGE, *width)
    return (
        torch.full((math.prod(shape) * dtype.itemsize,), 255, dtype=torch.uint8, device=DEVICE).view(dtype).view(shape)
    )


def test_slots_and_pools_that_do_not_fit_are_refused():
    k = torch.randn(BATCH, HEADS, TOKENS, 64, dtype=torch.float16, device=DEVICE)
    coder = Coder(8, 4)
    pools = coder.empty(PAGE, k, k).map(lambda x: poisoned_pool(x.shape[3:], x.dtype))
    form, fit = buffers_of(pools)
    writer = append.prepare_paged(k, k, form, fit)
    for slots in (
        torch.zeros(BATCH, TOKENS),
        torch.zeros(TOKENS, BATCH, dtype=torch.int64).mT,
        torch.zeros(2, 5).long(),
    ):
        with pytest.raises(ValueError, match="slots must be contiguous int64"):
            writer(k, k, slots.to(DEVICE))
    writer(k[:, :, :0], k[:, :, :0], torch.zeros(BATCH, 0, dtype=torch.int64, device=DEVICE))
    with pytest.raises(ValueError, match="equally many bytes apart"):
        append.prepare_paged(k, k, form, fit._replace(v=torch.cat((fit.v, fit.v), dim=1)[:, :HEADS]))
    with pytest.raises(ValueError, match="the v buffer must be contiguous"):
        append.prepare_paged(k, k, form, fit._replace(v=fit.v.mT.contiguous().mT))
    with pytest.raises(ValueError, match="the dense buffer must be contiguous"):
        append.prepare_paged(k, k, form, fit._replace(dense=fit.dense[:2]))
    assert append.prepare_paged(k.float(), k.float(), form, fit) is None


def test_what_does_not_fit_is_refused():
    k = torch.randn(BATCH, HEADS, TOKENS, 64, dtype=torch.float16, device=DEVICE)
    form, fit = buffers_of(held(Coder(8, 4), k, k)[0])
    with pytest.raises(ValueError, match="6 tokens at 6 do not fit"):
        append.prepare(k, k, form, fit)(k, k, CAPACITY - TOKENS + 1)
    with pytest.raises(ValueError, match="6 tokens at -1 do not fit"):
        append.prepare(k, k, form, fit)(k, k, -1)
    with pytest.raises(ValueError, match="the v buffer must be contiguous"):
        append.prepare(k, k[..., :32], form, fit)
    with pytest.raises(ValueError, match="the dense buffer must be contiguous"):
        append.prepare(k, k, form, fit._replace(dense=fit.dense.mT.contiguous().mT))
    with pytest.raises(ValueError, match=r"the values buffer must be contiguous torch\.float16"):
        append.prepare(k, k, form, fit._replace(values=fit.values.bfloat16()))
    with pytest.raises(ValueError, match="must be dense, indices, v, values; got dense, indices, scale, v, values"):
        append.prepare(k, k, form, fit._replace(scale=fit.v[..., 0].float()))
    with pytest.raises(ValueError, match="must be dense, indices, recent_k, recent_v, v, values; got"):
        append.prepare(k, k, form, fit._replace(recent_k=k))
    with pytest.raises(ValueError, match="leave 60 dense"):
        append.prepare(k, k, replace(form, dense_dims=60), fit)
    with_recent = prepare(k, k, held(Coder(8, 4), k, k, has_recent=True)[0])
    for ring in (Ring(-1, 0, 5), Ring(1, -1, 5), Ring(2, 4, 5), Ring(1, 4, 6), Ring(7, 0, 7)):
        with pytest.raises(ValueError, match="do not fit 11 slots"):
            with_recent(k, k, 0, ring)
    with pytest.raises(ValueError, match="1 tokens at 11 do not fit"):
        with_recent(k, k, CAPACITY, Ring(1, 0, 5))

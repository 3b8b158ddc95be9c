"""The steps of a cache on a Hopper GPU, of which a kernel does the work in one launch, leave what other appends leave, bit by bit."""

import copy
import math
from random import Random

import pytest
import torch

import emulated
import flashsfa
from append_cases import BATCH, BITS, DEVICE, HEADS, assert_same_view, draw, same_bits, use_kernel
from flashsfa import SparseKVCache, explain
from flashsfa.formats import CodeFormat
from flashsfa.ops import nvrtc
from held_cases import axis_bits


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    use_kernel(monkeypatch)


FEATURES = {"topk": 8, "dense_dims": 4}
STEPS = {
    "16 bits": FEATURES,
    "8 bits": {**FEATURES, "dtype": torch.int8},
    "4 bits": {**FEATURES, "dtype": CodeFormat()},
    "rows in 4 bits": {"topk": 64, "dtype": CodeFormat()},
    "axes": {"dtype": CodeFormat()},
    "axes beside values in 8 bits": {"dtype": CodeFormat(v_bits=8)},
    "8 and 4 bits beside values as they come": {**FEATURES, "dtype": CodeFormat(dense_bits=8, value_bits=4, v_bits=16)},
}
EXACT = {"recent": {"recent": 7}, "first": {"first": 2}, "both": {"recent": 3, "first": 4}}


@pytest.fixture(params=STEPS)
def options(request):
    options = STEPS[request.param]
    return options if "topk" in options else {**options, "axes": axis_bits(HEADS, 64)}


@pytest.fixture
def plainly(monkeypatch):
    """Calls a function as on a device without the kernel."""

    def run(call, *arguments):
        with monkeypatch.context() as changed:
            changed.setattr(nvrtc, "is_hopper", lambda device: False)
            changed.setattr("flashsfa.cache.contiguous.has_writer", lambda k, v: False)
            return call(*arguments)

    return run


@pytest.fixture
def launches(monkeypatch):
    """A list that gets an entry per launch."""
    return emulated.note_launches(monkeypatch)


@pytest.mark.parametrize("exact", EXACT.values(), ids=EXACT)
def test_a_step_is_one_launch(options, exact, launches, monkeypatch):
    """Nothing else writes, once the form and the buffers have been seen."""
    k, v = draw(30)
    cache = SparseKVCache(**options, **exact, capacity=64)
    cache.append(k[:, :, :10], v[:, :, :10])
    cache.append(k[:, :, 10:11], v[:, :, 10:11])
    recent = exact.get("recent", 0)
    left = recent - 1 if recent else 15  # before the newest tokens move to another buffer
    monkeypatch.setattr(SparseKVCache, "_write", None)
    launches.clear()
    for i in range(11, 11 + left):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    assert len(launches) == left


@pytest.mark.parametrize("exact", EXACT.values(), ids=EXACT)
def test_a_step_makes_no_views_of_what_nobody_asks_for(options, exact, plainly):
    """A view is that of its step when it is asked for, whatever came since, and copies hold its tensors."""
    k, v = draw(30)
    cache, plain = (SparseKVCache(**options, **exact, capacity=64) for _ in range(2))
    for start, end in ((0, 10), (10, 11), (11, 12)):
        view, expected = (
            cache.append(k[:, :, start:end], v[:, :, start:end]),
            plainly(plain.append, k[:, :, start:end], v[:, :, start:end]),
        )
    assert not {"codes", "v", "v_scale"} & vars(view).keys()
    assert (view.n, view.n_coded, view.key_budget, view.key_shape) == (
        expected.n, expected.v.shape[2], expected.key_budget, (*expected.codes.shape[:2], expected.v.shape[2], 64)
    )  # fmt: skip
    assert view.is_narrow == expected.is_narrow
    assert not {"codes", "v", "v_scale"} & vars(view).keys()
    assert (view.plain_values is None) == (expected.plain_values is None)
    later = copy.copy(view)
    cache.append(k[:, :, 12:13], v[:, :, 12:13])
    with pytest.raises(AttributeError, match="has no values"):
        view.values  # noqa: B018 (what is asked for is the error)
    for found in (view, later, copy.deepcopy(view)):
        assert_same_view(found, expected)


@pytest.mark.parametrize("exact", [{}, EXACT["both"]], ids=str)
def test_a_prompt_is_one_launch(options, exact, plainly, launches):
    k, v = (6 * draw(300)).round()  # sums of a rotation are exact, in whatever order
    cache, plain = (SparseKVCache(**options, **exact) for _ in range(2))
    assert_same_view(cache.append(k, v), plainly(plain.append, k, v))
    assert len(launches) == 1


@pytest.mark.parametrize("exact", [{}, *EXACT.values()], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_whatever_comes_between_steps(options, exact, seed, plainly, launches):
    """Steps of few tokens and of more than the newest, crops, marks, other orders of sequences, copies, and windows: held and returned is
    what a cache without the kernel holds and returns."""
    random = Random(seed)
    cache, plain = (SparseKVCache(**options, **exact, capacity=9) for _ in range(2))

    def both(call):
        nonlocal cache, plain
        cache, plain = call(cache), plainly(call, plain)

    def append(count):
        k, v = (6 * draw(count)).round()  # sums of a rotation are exact, in whatever order
        assert_same_view(cache.append(k, v), plainly(plain.append, k, v))
        assert_same_view(cache.kv, plain.kv)

    def changed(name, *arguments):
        both(lambda x: (getattr(x, name)(*arguments), x)[1])

    append(12)
    for _ in range(40):
        what = random.choice(["step"] * 12 + ["steps", "many", "crop", "mark", "order", "copy", "window"])
        if what == "step":
            for _ in range(random.randint(1, 6)):
                append(1)
        elif what in ("steps", "many"):
            append(random.randint(2, 4) if what == "steps" else random.randint(5, 12))
        elif what == "crop":
            changed("crop", -random.randint(1, min(9, len(cache) - 1)))
        elif what == "mark":
            changed("mark")
            for _ in range(random.randint(1, 3)):
                append(random.randint(1, 3))
            changed("crop", -random.randint(1, 3))
        elif what == "order":
            changed("select_batch", torch.tensor(random.choices(range(BATCH), k=BATCH), device=DEVICE))
        elif what == "copy":
            both(copy.deepcopy)
        elif len(cache) > 20:
            changed("keep_last", 20, 24)
    assert len(launches) > 40


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, {"recent": 7, "first": 2}], ids=str)
@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
def test_token_by_token_as_at_once(bits, options, mode):
    """Through growth of the buffers; views that were returned stay what they were."""
    k, v = draw()
    whole, cache = (SparseKVCache(8, dense_dims=4, dtype=bits, capacity=n, **options) for n in (256, 9))
    with mode():
        seen = [cache.append(k[:, :, :5], v[:, :, :5])]
        seen += [cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1]) for i in range(5, 30)]
        assert "append: hopper" in explain()
        seen += [cache.append(k[:, :, i : i + 2], v[:, :, i : i + 2]) for i in range(30, 40, 2)]
        whole.append(k, v)
        assert_same_view(seen[-1], cache.kv)
        for view in [cache.kv, *seen]:
            n = view.v.shape[2]  # coded tokens
            assert view.codes.shape == (BATCH, HEADS, n, 64)
            for one, another in zip(view.tensors(), whole.kv.tensors(), strict=True):
                same_bits(one, another[:, :, :n])
        assert [view.n for view in seen] == [*range(5, 31), *range(32, 41, 2)]


def test_what_comes_between_steps():
    """A crop, a choice of sequences, a mark and a copy: what was prepared writes to the buffers that it was prepared for."""
    k, v = draw(16)
    cache, plain = (SparseKVCache(8, dense_dims=4, capacity=64) for _ in range(2))

    def step(i, index=slice(None)):
        assert_same_view(cache.append(k[index, :, i : i + 1], v[index, :, i : i + 1]), cache.kv)

    for i in range(5):
        step(i)
    cache.crop(3)
    step(5)
    cache.mark()
    step(6)
    cache.crop(4)
    step(7)
    before = [x.clone() for x in cache.kv.tensors()]
    other = copy.deepcopy(cache)
    for i in (8, 9):
        other.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    for one, another in zip(cache.kv.tensors(), before, strict=True):
        same_bits(one, another)
    step(10)
    cache.select_batch(torch.tensor([1, 0], device=DEVICE))
    step(11, [1, 0])
    order = [0, 1, 2, 5, 7, 10, 11]
    plain.append(k[[1, 0]][:, :, order], v[[1, 0]][:, :, order])
    for one, another in zip(cache.kv.tensors(), plain.kv.tensors(), strict=True):
        same_bits(one, another)
    assert len(other) == 7
    same_bits(other.v, v[:, :, [0, 1, 2, 5, 7, 8, 9]])


def test_errors_are_those_of_any_append():
    k, v = draw(3)
    cache = SparseKVCache(8, dense_dims=4)
    one = k[:, :, :1], v[:, :, :1]
    for _ in range(3):
        cache.append(*one)
    held = [x.clone() for x in cache.kv.tensors()]
    with pytest.raises(TypeError, match=r"k must be a torch\.Tensor"):
        cache.append(one[0].tolist(), one[1])
    with pytest.raises(TypeError, match="cast them"):
        cache.append(*(x.half() for x in one))
    with pytest.raises(TypeError, match="cast them"):
        cache.append(one[0], one[1].half())
    with pytest.raises(ValueError, match="does not fit a cache"):
        cache.append(*(x[..., :32] for x in one))
    with pytest.raises(ValueError, match="does not fit a cache"):
        cache.append(*(x[:1] for x in one))
    with pytest.raises(ValueError, match=r"must share \[B, Hkv, N\]"):
        cache.append(one[0], v)
    with pytest.raises(ValueError, match="caches of codes carry no gradient"):
        cache.append(one[0].clone().requires_grad_(), one[1])
    with pytest.raises(ValueError, match="holds NaN"), flashsfa.checked():
        cache.append(one[0] * math.nan, one[1])
    assert len(cache) == 3
    for before, after in zip(held, cache.kv.tensors(), strict=True):
        same_bits(before, after)


def test_checked_mode_looks_at_what_axes_cannot_hold():
    k, v = draw(3)
    cache = SparseKVCache(axes=axis_bits(HEADS, 64))
    one = k[:, :, :1], v[:, :, :1]
    cache.append(*one)
    with pytest.raises(ValueError, match="NaN or infinity"), flashsfa.checked():
        cache.append(one[0] * math.inf, one[1])
    assert len(cache) == 1


def test_without_a_compiler_tokens_are_written_as_ever(monkeypatch, caplog):
    monkeypatch.setattr(nvrtc, "obstacle", lambda: "NVRTC is missing here")
    k, v = draw(4)
    cache, whole = (SparseKVCache(8, dense_dims=4) for _ in range(2))
    for i in range(4):
        cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    whole.append(k, v)
    assert_same_view(cache.kv, whole.kv)
    assert caplog.text.count("NVRTC is missing here") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
def test_steps_follow_a_prompt_on_a_gpu(bits):
    """Triton codes the prompt; what it and the kernel write is what one call writes, NaN included."""
    k, v = draw(800, d=128)
    k[:, :, ::7, ::5], v[:, :, ::11, 3] = math.nan, math.nan
    k[:, :, 799], v[:, :, 798], k[:, :, 5], v[:, :, 5] = math.nan, math.nan, math.nan, math.nan
    whole, cache = (SparseKVCache(16, dense_dims=16, dtype=bits) for _ in range(2))
    whole.append(k, v)
    cache.append(k[:, :, :700], v[:, :, :700])
    assert "topk: triton" in explain()
    for i in range(700, 800):
        assert_same_view(cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1]), cache.kv)
    assert "append: hopper" in explain()
    for one, another in zip(cache.kv.tensors(), whole.kv.tensors(), strict=True):
        same_bits(one, another)


@pytest.mark.gpu
def test_a_graph_holds_a_step():
    k, v = draw(2)
    cache = SparseKVCache(8, dense_dims=4, capacity=8)
    for _ in range(2):
        cache.append(k[:, :, :1], v[:, :, :1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seen = cache.append(k[:, :, :1], v[:, :, :1])
    k[:, :, 0], v[:, :, 0] = k[:, :, 1], v[:, :, 1]
    graph.replay()
    same_bits(seen.v[:, :, 2:], v[:, :, :1])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    k, v = (x.to("cuda:1") for x in draw(4))
    cache = SparseKVCache(8, dense_dims=4, capacity=8)
    for i in range(4):
        seen = cache.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    same_bits(seen.v, v)
    assert torch.cuda.current_device() == 0


def test_what_ran_is_told_of_the_last_cache():
    k, v = draw(3)
    SparseKVCache(8, capacity=9).append(k, v)
    assert "append: hopper" in explain()
    SparseKVCache(8, capacity=9).append(k.float(), v.float())
    assert "append: hopper" not in explain()

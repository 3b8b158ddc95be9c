"""The kernel for Hopper that appends a few tokens writes what plain PyTorch codes, bit by bit: on such a GPU where there is one, else lane by lane
on the CPU."""

import copy
import math

import pytest
import torch

import emulated
import flashsfa
from flashsfa import SparseKVCache, explain, topk_codes
from flashsfa.codes import quantize_rows
from flashsfa.ops import nvrtc
from flashsfa.ops.select.hopper import append as hopper
from flashsfa.ops.select.hopper.append import Buffers, prepare

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16]
BITS = {"16 bits": None, "8 bits": torch.int8}
# (head_dim, topk, dense_dims, v_dim)
SHAPES = [(128, 16, 16, 128), (80, 26, 22, 72), (37, 36, 1, 7), (33, 1, 5, 64), (256, 32, 0, 300), (1, 1, 0, 1)]
BATCH, HEADS, TOKENS, CAPACITY = 2, 2, 6, 11


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    if DEVICE.type == "cuda":
        if not nvrtc.is_hopper(DEVICE):
            pytest.skip("needs a Hopper GPU, or none")
    elif emulated.COMPILER is None:
        pytest.skip("needs g++ to stand in for a GPU")
    else:
        monkeypatch.setattr(nvrtc, "is_hopper", lambda device: True)
        monkeypatch.setattr(nvrtc, "obstacle", lambda: None)
        monkeypatch.setattr(hopper, "load", emulated.load_append)
        monkeypatch.setattr(hopper, "launch", emulated.launch_append)


def hostile(dtype, head_dim, v_dim):
    """Keys and values, neither of which is contiguous, of rows that are random, tied, zero, infinite, tiny, and large."""

    def draw(width):
        x = torch.randn(BATCH, TOKENS, HEADS, width)
        x[:, 1] = x[:, 1].round()
        x[0, 2], x[1, 2] = 0, -1
        x[:, 3, 0, ::3] = math.inf
        x[:, 3, 1, width // 2 :] = -math.inf
        x[:, 4] *= 1e-7
        x[:, 5] = x[:, 5].round() * 10000
        return x.to(DEVICE, dtype)

    wide = torch.full((BATCH, HEADS, TOKENS, v_dim + 3), math.nan, dtype=dtype, device=DEVICE)
    wide[..., 1 : v_dim + 1] = draw(v_dim).transpose(1, 2)
    return draw(head_dim).transpose(1, 2), wide[..., 1 : v_dim + 1]


def poisoned(width, dtype):
    """A buffer [B, H, C, *width] and the memory that it is the middle of, all of whose bits are set."""
    shape = (BATCH, HEADS, CAPACITY, *width)
    memory = torch.full(((math.prod(shape) + 128) * dtype.itemsize,), 255, dtype=torch.uint8, device=DEVICE).view(dtype)
    return memory[64:-64].view(shape), memory


def buffers(topk, dense_dims, v_dim, dtype, bits):
    """Of a cache, and their memory."""
    stored = bits or dtype
    forms = [((dense_dims,), stored), ((topk,), stored), ((topk,), torch.uint8), ((v_dim,), stored)]
    forms += [((), torch.float32)] * 2 if bits else []
    made = [poisoned(*form) for form in forms]
    return Buffers(*(buffer for buffer, _ in made)), [memory for _, memory in made]


def encoded(k, v, topk, dense_dims, bits):
    codes = topk_codes(k, topk, dense_dims=dense_dims)
    if bits is None:  # as integers: on a CPU `gather` may return other bits for NaN
        values = k[..., dense_dims:].view(torch.int16).gather(-1, codes.indices.long()).view(k.dtype)
        return [codes.dense, values, codes.indices, v]
    codes, (v, v_scale) = codes.quantize(), quantize_rows(v)
    return [codes.dense, codes.values, codes.indices, v, codes.scale, v_scale]


def same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def assert_appends(k, v, topk, dense_dims, bits, start, expected=None):
    found, memory = buffers(topk, dense_dims, v.shape[-1], k.dtype, bits)
    other, expected_memory = buffers(topk, dense_dims, v.shape[-1], k.dtype, bits)
    for buffer, part in zip(
        [x for x in other if x is not None], expected or encoded(k, v, topk, dense_dims, bits), strict=True
    ):
        buffer[:, :, start : start + k.shape[2]] = part
    prepare(k, v, found)(k, v, start)
    for one, another in zip(memory, expected_memory, strict=True):
        same_bits(one, another)


@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "topk", "dense_dims", "v_dim"), SHAPES)
def test_what_is_written_and_nothing_else(head_dim, topk, dense_dims, v_dim, dtype, bits):
    k, v = hostile(dtype, head_dim, v_dim)
    for start in (0, CAPACITY - TOKENS):
        assert_appends(k, v, topk, dense_dims, bits, start)
    assert_appends(k[:, :, 3:4], v[:, :, 3:4], topk, dense_dims, bits, CAPACITY - 1)


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
    with pytest.raises(ValueError, match="leave 60 dense"):
        prepare(k, k, fit._replace(dense=k.new_empty(BATCH, HEADS, CAPACITY, 60)))


# ---- through a cache


def draw(n=40, dtype=torch.bfloat16, d=64):
    return torch.randn(2, BATCH, HEADS, n, d, device=DEVICE).to(dtype)


def assert_same_view(found, expected):
    assert [x.stride() for x in found.tensors()] == [x.stride() for x in expected.tensors()]
    for one, another in zip(found.tensors(), expected.tensors(), strict=True):
        same_bits(one, another)
    assert len(found.exact) == len(expected.exact)
    for one, another in zip(found.exact, expected.exact, strict=True):
        same_bits(one.k, another.k)
        same_bits(one.v, another.v)


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
        assert "topk: hopper" in explain()
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
    assert "topk: hopper" in explain()
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

"""The Triton top-k codes kernel selects exactly what plain PyTorch does, and appends to a cache's buffers in place.

Without a GPU the kernel runs in Triton's interpreter, on small shapes.
"""

import math

import pytest
import torch

pytest.importorskip("triton")

import flashsfa
from flashsfa.ops.select.plain import empty_code, plain_scatter, plain_topk, select_topk
from flashsfa.ops.select.triton.topk import Launch, append, encode, launch_for, topk_rows

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# (head_dim, topk, dense_dims)
BUDGETS = [(32, 1, 0), (64, 8, 0), (64, 12, 22), (80, 26, 16), (96, 16, 16), (128, 16, 0), (256, 12, 22)]
BUDGETS += [(32, 32, 0), (64, 48, 16), (37, 3, 1), (37, 36, 1), (128, 1, 127), (1, 1, 0)]


@pytest.fixture(scope="module")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


MANY = 1 << 20


def launches(dtype, topk):
    """Every method that applies: to few rows, to many, and to all."""
    bisect = Launch("bisect", rows=8, lanes=4, num_warps=1)
    return dict.fromkeys((launch_for(dtype, topk, 1), launch_for(dtype, topk, MANY), bisect))


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def assert_selects(x, topk, dense_dims, launch=None):
    dense, values, indices = encode(x, topk, dense_dims, launch)
    rest = x[..., dense_dims:]
    expected = select_topk(rest, topk)
    same(indices, expected.to(torch.uint8))
    same(values, rest.gather(-1, expected))
    same(dense, x[..., :dense_dims])
    assert dense.is_contiguous()
    assert values.is_contiguous()


def hostile_rows(head_dim, dtype, device):
    """[8, head_dim]: random, tied, constant, zero, NaN and infinite rows, and one with few nonzeros."""
    rows = torch.randn(8, head_dim)
    rows[1] = torch.randint(-2, 3, (head_dim,))
    rows[2] = -1
    rows[3] = 0
    rows[4, ::3] = math.nan
    rows[4, 1::3] = -math.inf
    rows[5] = math.inf
    rows[6, head_dim // 4 :] = 0
    rows[7] = rows[7] * 1e-7  # subnormal in float16
    return rows.to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "topk", "dense_dims"), BUDGETS)
def test_selection_is_plain_pytorchs(head_dim, topk, dense_dims, dtype, device):
    x = hostile_rows(head_dim, dtype, device)
    for launch in launches(dtype, topk):
        assert_selects(x, topk, dense_dims, launch)


@pytest.mark.parametrize("with_code", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "topk", "dense_dims"), [*BUDGETS, (128, 5, 16), (64, 3, 8), (24, 16, 0), (72, 8, 8)]
)
def test_rows_in_one_pass(head_dim, topk, dense_dims, dtype, with_code, device):
    """Rows, and their code beside, are those of two passes; in memory by token, and where rows are no whole program."""
    x = torch.stack([hostile_rows(head_dim, dtype, device), torch.randn(8, head_dim, device=device).to(dtype)])
    x = torch.cat((x, x[:, :3]), dim=1)[None]  # [1, 2, 11, D]
    out = torch.full((1, 11, 2, head_dim), 7, dtype=dtype, device=device).transpose(1, 2)
    code = tuple(part.fill_(7) for part in empty_code(x, topk, dense_dims)) if with_code else None
    expected = plain_topk(x, topk, dense_dims)
    assert not topk_rows(x, topk, dense_dims, out, code)  # so few rows are coded first
    if topk_rows(x, topk, dense_dims, out, code, launch_for(dtype, topk, MANY)):
        same(out, plain_scatter(*expected, head_dim))
        for got, wanted in zip(code or (), expected, strict=False):
            same(got, wanted)
    else:
        assert dtype == torch.float32 or topk > 16 or head_dim % 8 or dense_dims % 8
        assert (out == 7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 512, 513])
def test_default_launch(rows, dtype, device):
    """Few rows, and more, for which other kernels are chosen."""
    assert launch_for(dtype, 4, rows).method == (
        "rank" if rows <= 512 else "bisect" if dtype == torch.float32 else "network"
    )
    assert_selects(torch.randn(rows, 16, device=device).to(dtype), 4, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_rows(dtype, device):
    assert_selects(torch.randn(5, 7, 64, device=device).to(dtype), 8, 0)
    assert_selects(torch.randn(37, 64, device=device).to(dtype), 33, 2)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 2)[:2],
        lambda x: x[..., ::2],
        lambda x: x[:, ::2, :, 1:],
        lambda x: x[..., 1:33],
        lambda x: x[..., 2:],
        lambda x: x[0].mT.contiguous().mT,
        lambda x: x[:1, :1].expand(2, 3, -1, -1),
        lambda x: x[:1, :2].unfold(2, 2, 2).movedim(-1, 0),
        lambda x: x[0, 0, 0],
        lambda x: x[:, :0],
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_strides(view, dtype, device):
    x = view(torch.randn(2, 3, 6, 34, device=device).to(dtype))
    for launch in launches(dtype, 5):
        assert_selects(x, 5, 3, launch)


@pytest.mark.parametrize("method", ["network", "bisect", "rank"])
@pytest.mark.parametrize(("rows", "lanes", "num_warps"), [(16, 1, 1), (16, 2, 1), (32, 4, 4)])
def test_any_launch(method, rows, lanes, num_warps, device):
    assert_selects(hostile_rows(80, torch.bfloat16, device), 12, 5, Launch(method, rows, lanes, num_warps))


def buffers(batch, heads, capacity, topk, dense_dims, d_v, dtype, device):
    """NaN (255 for indices) where nothing was written."""

    def new(width):
        return torch.full((batch, heads, capacity, width), math.nan, dtype=dtype, device=device)

    indices = torch.full((batch, heads, capacity, topk), 255, dtype=torch.uint8, device=device)
    return new(dense_dims), new(topk), indices, new(d_v)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("start", [0, 3, torch.tensor(2), torch.tensor([4, 1])], ids=str)
@pytest.mark.parametrize("n", [1, 5])
def test_append_writes_its_tokens_and_no_others(start, n, dtype, device):
    k = torch.randn(2, n, 3, 64, device=device).to(dtype).transpose(1, 2)
    v = torch.randn(2, 3, 40, n, device=device).to(dtype).mT
    got = buffers(2, 3, 9, 8, 6, 40, dtype, device)
    expected = buffers(2, 3, 9, 8, 6, 40, dtype, device)
    selected = select_topk(k[..., 6:], 8)
    parts = k[..., :6], k[..., 6:].gather(-1, selected), selected.to(torch.uint8), v
    starts = start.expand(2).tolist() if isinstance(start, torch.Tensor) else [start] * 2
    for buffer, part in zip(expected, parts, strict=True):
        for b, s in enumerate(starts):
            buffer[b, :, s : s + n] = part[b]
    append(k, v, *got, start.to(device) if isinstance(start, torch.Tensor) else start)
    for one, other in zip(got, expected, strict=True):
        same(one, other)


def test_append_past_the_end_on_the_device_writes_what_fits(device):
    k = torch.randn(2, 1, 3, 32, device=device)
    got = buffers(2, 1, 4, 4, 0, 32, k.dtype, device)
    append(k, k, *got, torch.tensor([3, -2], device=device))
    v = got[-1][:, 0]
    same(v[0, 3], k[0, 0, 0])
    same(v[1, 0], k[1, 0, 2])
    assert v[0, :3].isnan().all()
    assert v[1, 1:].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 8}, "2 tokens at 8 do not fit buffers of 9"),
        ({"start": -1}, "do not fit"),
        ({"start": torch.tensor([1.0])}, "start must be"),
        ({"start": torch.tensor([1, 2, 3])}, "start must be"),
        ({"v": torch.ones(2, 3, 2, 32)}, "fits neither"),
        ({"v_buf": torch.ones(2, 9, 3, 40).transpose(1, 2)}, "the v buffer must be contiguous"),
        ({"dense_buf": torch.ones(2, 3, 8, 6)}, "the dense buffer must be"),
        ({"values_buf": torch.ones(2, 3, 9, 8).half()}, "its buffers"),
        ({"indices_buf": torch.ones(2, 3, 9, 8)}, "indices torch.float32"),
    ],
)
def test_append_refuses_what_does_not_fit(change, message, device):
    names = ("dense_buf", "values_buf", "indices_buf", "v_buf")
    arguments = dict(zip(names, buffers(2, 3, 9, 8, 6, 40, torch.float32, device), strict=True))
    arguments |= {"k": torch.ones(2, 3, 2, 64), "v": torch.ones(2, 3, 2, 40), "start": 0} | change
    arguments = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(ValueError, match=message):
        append(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "topk", "dense_dims"), BUDGETS)
def test_many_rows(head_dim, topk, dense_dims, dtype, device):
    x = torch.randn(3, 5, 1234, head_dim, device=device).to(dtype)
    x[0] = x[0].round()
    assert_selects(x, topk, dense_dims)


@pytest.mark.gpu
def test_offsets_past_int32(device):
    x = torch.empty(2**24 + 3, 128, dtype=torch.bfloat16, device=device)
    x[-5:] = torch.randn(5, 128)
    _, values, indices = encode(x, 128, 0)
    same(values[-5:], x[-5:])
    assert (indices[-5:] == torch.arange(128, device=device)).all()
    _, values, indices = encode(x, 16, 0)
    expected = select_topk(x[-5:], 16)
    same(indices[-5:], expected.to(torch.uint8))
    same(values[-5:], x[-5:].gather(-1, expected))


@pytest.mark.gpu
def test_append_in_a_cuda_graph(device):
    k = torch.randn(2, 3, 1, 64, device=device, dtype=torch.bfloat16)
    got = buffers(2, 3, 4, 8, 0, 64, k.dtype, device)
    start = torch.zeros(2, dtype=torch.int64, device=device)
    append(k, k, *got, start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append(k, k, *got, start)
        start += 1
    tokens = torch.randn(4, *k.shape, device=device).to(k.dtype)
    for token in tokens:
        k.copy_(token)
        graph.replay()
    same(got[-1], tokens.squeeze(3).movedim(0, 2))
    same(got[1], encode(got[-1], 8, 0)[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_public_function_runs_on_triton(dtype):
    x = torch.randn(2, 3, 65, 128, device="cuda", dtype=dtype, requires_grad=True)
    codes = flashsfa.topk_codes(x, 16, dense_dims=8)
    same(codes.indices, select_topk(x[..., 8:], 16).to(torch.uint8))
    codes.to_dense().sum().backward()
    same(x.grad, (codes.to_dense() != 0).to(dtype))
    assert ("torch" if dtype == torch.float64 else "triton") in flashsfa.explain()


@pytest.mark.gpu
def test_cache_appends_in_place():
    cache, k, v = flashsfa.SparseKVCache(8, dense_dims=4), *torch.randn(2, 2, 3, 300, 64, device="cuda").bfloat16()
    for start, end in ((0, 5), (5, 6), (6, 300)):  # the last one makes the buffers grow
        cache.append(k[:, :, start:end], v[:, :, start:end])
    expected = flashsfa.topk_codes(k, 8, dense_dims=4)
    for got, part in ((cache.codes.dense, expected.dense), (cache.codes.values, expected.values), (cache.v, v)):
        same(got, part)
    same(cache.codes.indices, expected.indices)

"""Codes scattered to dense rows: the Triton kernel and the operator write what plain PyTorch does.

Without a GPU the kernel runs in Triton's interpreter, on small shapes.
"""

import math

import pytest
import torch

pytest.importorskip("triton")

from flashsfa.codes import FeatureCodes, topk_codes
from flashsfa.ops.select.operators import append_op, keep_support, scatter_op
from flashsfa.ops.select.operators import scatter as scattered
from flashsfa.ops.select.plain import at_support, plain_scatter, plain_topk
from flashsfa.ops.select.triton import scatter as module
from flashsfa.ops.select.triton.scatter import scatter

# (head_dim, topk, dense_dims)
BUDGETS = [(64, 8, 0), (64, 12, 22), (128, 16, 16), (37, 3, 1), (256, 12, 22), (64, 64, 0), (128, 1, 127), (1, 1, 0)]


@pytest.fixture(scope="module")
def where():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parts(codes):
    return codes.dense, codes.values, codes.indices


def coded(shape, topk, dense_dims, dtype, device):
    dense, values, indices = plain_topk(torch.randn(shape, device=device).to(dtype), topk, dense_dims)
    return FeatureCodes(dense, values, indices, shape[-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_rows_are_those_of_plain_pytorch(budget, dtype, where):
    head_dim, topk, dense_dims = budget
    codes = coded((2, 3, 37, head_dim), topk, dense_dims, dtype, where)
    out = torch.empty(2, 3, 37, head_dim, dtype=dtype, device=where)
    expected = plain_scatter(*parts(codes), head_dim)
    assert torch.equal(scatter(*parts(codes), out), expected)
    flat = FeatureCodes(*(x.reshape(222, x.shape[-1]) for x in parts(codes)), head_dim)
    out = torch.empty(222, head_dim, dtype=dtype, device=where)
    assert torch.equal(scatter(*parts(flat), out), expected.reshape(222, head_dim))


@pytest.mark.parametrize(("topk", "dense_dims"), [(8, 0), (5, 16), (16, 2)])
def test_small_even_codes_are_built_from_words(topk, dense_dims, where, monkeypatch):
    """They never come to the kernel that writes zeros first, which is several times slower."""
    monkeypatch.setattr(module, "scatter_over_zeros_kernel", None)
    codes = coded((2, 3, 37, 64), topk, dense_dims, torch.bfloat16, where)
    out = torch.full((2, 3, 37, 64), float("nan"), dtype=torch.bfloat16, device=where)
    assert torch.equal(scatter(*parts(codes), out), plain_scatter(*parts(codes), 64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_rows_keep_their_support(budget, dtype, where):
    """NaN among what is not kept is gone; the kept entries come back as they were."""
    head_dim, topk, dense_dims = budget
    rows = torch.randn(2, 37, 3, head_dim, device=where).to(dtype).transpose(1, 2)
    indices = plain_topk(torch.randn_like(rows), topk, dense_dims)[2]
    kept = plain_scatter(*(torch.ones_like(x) for x in at_support(rows, dense_dims, indices)), indices, head_dim) != 0
    rows = rows.where(kept, math.nan)
    out = torch.full((2, 37, 3, head_dim), math.nan, dtype=dtype, device=where).transpose(1, 2)
    written = module.keep_support(rows, dense_dims, indices, out)
    assert written == (dtype.itemsize == 2 and topk <= 16 and head_dim % 2 == dense_dims % 2 == 0)
    if written:
        assert torch.equal(out, rows.where(kept, 0))
    assert torch.equal(keep_support(rows, dense_dims, indices), rows.where(kept, 0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_view_of_a_cache_to_rows_by_token(dtype, where):
    """Strides of both sides; what lies around them stays."""
    codes = coded((2, 3, 60, 64), 8, 16, dtype, where)
    held = codes[:, 1:, 5:45]
    buffer = torch.full((2, 50, 3, 64), 7.0, dtype=dtype, device=where)
    out = buffer.transpose(1, 2)[:, 1:, 3:43]
    assert torch.equal(scatter(*parts(held), out), plain_scatter(*parts(held), 64))
    assert (buffer[:, :, 0] == 7).all()
    assert (buffer[:, :3] == 7).all()
    assert (buffer[:, 43:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_index_past_the_row_writes_nothing(dtype, where):
    codes = coded((1, 1, 4, 32), 4, 8, dtype, where)
    wrong = codes.indices.clone()
    wrong[..., 1] = 24
    buffer = torch.full((1, 1, 4, 64), 7.0, dtype=dtype, device=where)
    found = scatter(codes.dense, codes.values, wrong, buffer[..., :32])
    kept = torch.tensor([0, 2, 3], device=where)
    fewer = (codes.dense, codes.values[..., kept], codes.indices[..., kept])
    assert torch.equal(found, plain_scatter(*fewer, 32))
    assert (buffer[..., 32:] == 7).all()


def test_no_rows(where):
    codes = coded((1, 2, 0, 32), 4, 0, torch.float32, where)
    assert scatter(*parts(codes), torch.empty(1, 2, 0, 32, device=where)).shape == (1, 2, 0, 32)


def test_gradients_reach_channel_and_values():
    codes = coded((2, 3, 5, 16), 4, 3, torch.float64, "cpu")
    dense, values = codes.dense.requires_grad_(), codes.values.requires_grad_()
    assert torch.autograd.gradcheck(lambda d, v: FeatureCodes(d, v, codes.indices, 16).to_dense(), (dense, values))
    torch.library.opcheck(scatter_op, (dense, values, codes.indices, 16))


def arguments_of_append(device, dtype=torch.float32):
    k, v = (torch.randn(2, 3, 4, 32, device=device).to(dtype) for _ in "kv")
    buffers = [torch.randn(2, 3, 20, n, device=device).to(dtype) for n in (6, 5, 32)]
    indices = torch.zeros(2, 3, 20, 5, dtype=torch.uint8, device=device)
    return k, v, buffers[0], buffers[1], indices, buffers[2], torch.tensor(7, device=device)


def test_append_writes_its_tokens_alone():
    arguments = arguments_of_append("cpu")
    before = [x.clone() for x in arguments[2:6]]
    append_op(*arguments)
    k, v = arguments[:2]
    for buffer, old, new in zip(arguments[2:6], before, (*plain_topk(k, 5, 6), v), strict=True):
        assert torch.equal(buffer[:, :, 7:11], new)
        assert torch.equal(buffer[:, :, :7], old[:, :, :7])
        assert torch.equal(buffer[:, :, 11:], old[:, :, 11:])
    torch.library.opcheck(append_op, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_operators_on_a_gpu(dtype):
    codes = coded((2, 4, 300, 128), 16, 16, dtype, "cuda")
    expected = plain_scatter(*parts(codes), 128)
    assert torch.equal(codes.to_dense(), expected)
    by_token = scattered(*parts(codes), 128)
    assert torch.equal(by_token, expected)
    if dtype != torch.float64:
        assert by_token.transpose(1, 2).is_contiguous()
    x = torch.randn(2, 4, 30, 128, device="cuda", dtype=dtype, requires_grad=True)
    seed = torch.randn_like(x)
    (grad,) = torch.autograd.grad(topk_codes(x, 16, dense_dims=16).to_dense(), x, seed)
    assert torch.equal(grad, torch.where(topk_codes(x, 16, dense_dims=16).to_dense() != 0, seed, 0))
    given = arguments_of_append("cuda", dtype)
    plain = [x.clone() for x in given]
    append_op(*given)
    slots = torch.arange(7, 11, device="cuda")
    for buffer, new in zip(plain[2:6], (*plain_topk(plain[0], 5, 6), plain[1]), strict=True):
        buffer.index_copy_(2, slots, new)
    assert all(torch.equal(found, wanted) for found, wanted in zip(given, plain, strict=True))

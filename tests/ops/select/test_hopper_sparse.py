"""Sparse rows by kernels for Hopper are those of plain PyTorch, bit by bit: on such a GPU where there is one, else on the CPU, lane by lane."""

import math

import pytest
import torch

from append_cases import DEVICE, DTYPES, use_kernel
from flashsfa import explain, topk_codes
from flashsfa.ops import nvrtc
from flashsfa.ops.select import operators
from flashsfa.ops.select.hopper import sparse
from flashsfa.ops.select.plain import empty_rows, plain_scatter, plain_topk

SIZES = [(64, 8, 0), (128, 16, 16), (128, 16, 41), (80, 5, 3), (37, 33, 4), (256, 1, 255), (256, 256, 0), (1, 1, 0)]


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    use_kernel(monkeypatch)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(operators, "has_fused", lambda x: True)


def hostile(dtype, head_dim, n=9):
    """[B, H, N, D] of a model's strides: rows that are random, tied, zero, infinite, NaN, tiny and large."""
    x = torch.randn(2, n, 3, head_dim)
    x[:, 1] = x[:, 1].round()
    x[0, 2], x[1, 2] = 0, -1
    x[:, 3, 0, ::3] = math.inf
    x[:, 3, 1, head_dim // 2 :] = -math.inf
    x[:, 4] *= 1e-7
    x[:, 5, :, ::5] = math.nan
    x[:, 6] *= 10000
    return x.to(DEVICE, dtype).transpose(1, 2)


def poisoned(x):
    return empty_rows(x, x.shape[-1]).fill_(math.nan)


def same_bits(one, other):
    """Of numbers; NaN has others where PyTorch gathers it on a CPU."""
    bits, others = (x.masked_fill(x.isnan(), math.nan).contiguous().view(torch.int16) for x in (one, other))
    return one.dtype == other.dtype and torch.equal(bits, others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "topk", "dense_dims"), SIZES)
def test_prune(head_dim, topk, dense_dims, dtype):
    x = hostile(dtype, head_dim)
    expected = plain_scatter(*plain_topk(x, topk, dense_dims), head_dim)
    out = poisoned(x)
    assert sparse.prune(x, topk, dense_dims, out)
    assert same_bits(out, expected)
    rows, code = operators.coded_rows(x, topk, dense_dims, keep=False)
    assert code is None
    assert same_bits(rows, expected)
    assert "topk: hopper" in explain()
    wide = torch.full((2, 3, 9, head_dim + 3), math.nan, dtype=dtype, device=DEVICE)
    assert sparse.prune(x, topk, dense_dims, wide[..., 1:-2])
    assert same_bits(wide[..., 1:-2], expected)
    assert wide[..., 0].isnan().all()
    assert wide[..., -2:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "topk", "dense_dims"), SIZES)
def test_scatter(head_dim, topk, dense_dims, dtype):
    x = hostile(dtype, head_dim)
    dense, values, indices = plain_topk(x, topk, dense_dims)
    expected = plain_scatter(dense, values, indices, head_dim)
    out = poisoned(x)
    assert sparse.scatter(dense, values, indices, out)
    assert same_bits(out, expected)
    assert same_bits(operators.scatter(dense, values, indices, head_dim), expected)
    parts = [torch.cat((y, y), dim=2)[:, :, 3:12] for y in (dense, values, indices)]  # other strides
    assert sparse.scatter(*parts, out)
    assert same_bits(out, plain_scatter(*parts, head_dim))


def test_an_index_past_the_sparse_part_is_left_out():
    dense, values, indices = plain_topk(hostile(torch.bfloat16, 64), 8, 16)
    indices[..., 2], indices[..., 5] = 48, 255
    out = empty_rows(values, 64).fill_(math.nan)
    assert sparse.scatter(dense, values, indices, out)
    there = [i for i in range(8) if i not in (2, 5)]
    assert same_bits(out, plain_scatter(dense, values[..., there], indices[..., there], 64))


def test_many_rows_and_odd_numbers_of_them():
    for n in (1, 3, 4, 5, 130):
        x = hostile(torch.bfloat16, 64, n=max(n, 7))[:, :, :n]
        out = empty_rows(x, 64).fill_(math.nan)
        assert sparse.prune(x, 6, 10, out)
        assert same_bits(out, topk_codes(x, 6, dense_dims=10).to_dense())


def test_what_it_is_not_for_is_left_to_others(monkeypatch):
    x = hostile(torch.bfloat16, 64)
    out = poisoned(x)
    assert not sparse.prune(x.float(), 4, 0, out.float())
    assert not sparse.prune(x[0], 4, 0, out[0])
    assert not sparse.prune(x.transpose(2, 3).contiguous().transpose(2, 3), 4, 0, out)
    assert not sparse.prune(x[:, :, :0], 4, 0, out[:, :, :0])
    many = torch.zeros(1, 1, 1, 64, dtype=x.dtype, device=DEVICE).expand(1, 1, (1 << 16) + 1, 64)
    assert not sparse.prune(many, 4, 0, many)
    monkeypatch.setattr(nvrtc, "load_kernel", lambda *_: "the driver is too old")
    assert not sparse.prune(x, 4, 0, out)
    monkeypatch.setattr(nvrtc, "obstacle", lambda: "no compiler")
    assert not sparse.scatter(x[..., :0], x[..., :4], x[..., :4].view(torch.uint8)[..., ::2], out)
    assert out.isnan().all()


@pytest.mark.cpu
@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("size", SIZES)
def test_compiles(size):
    head_dim, topk, dense_dims = size
    assert sparse.compile_cubin(sparse.Variant(head_dim, dense_dims, topk)).startswith(b"\x7fELF")

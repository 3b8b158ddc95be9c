"""Codes and values written in 8 bits by Triton are those of plain PyTorch, bit by bit.

Without a GPU the kernel runs in Triton's interpreter, on small shapes.
"""

import pytest
import torch

pytest.importorskip("triton")

from flashsfa import SparseKVCache
from flashsfa.codes import quantize_rows, topk_codes
from flashsfa.ops.select.plain import plain_topk
from flashsfa.ops.select.triton import quantize
from flashsfa.ops.select.triton.quantize import write_8_bit

CAPACITY, START = 9, 3


@pytest.fixture(scope="module")
def where():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def buffers(batch, heads, topk, dense_dims, v_dim, device):
    """Filled with what must stay where nothing is written."""
    shape = (batch, heads, CAPACITY)
    rows = (torch.full((*shape, width), 77, dtype=torch.int8, device=device) for width in (dense_dims, topk, v_dim))
    dense, values, v = rows
    indices = torch.full((*shape, topk), 77, dtype=torch.uint8, device=device)
    scale, v_scale = (torch.full(shape, 77.0, device=device) for _ in range(2))
    return dense, values, indices, scale, v, v_scale


@pytest.mark.parametrize("rows", [1, 8], ids=lambda rows: f"{rows} rows per program")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("head_dim", "topk", "dense_dims", "v_dim"), [(64, 12, 22, 64), (32, 8, 0, 80), (33, 1, 5, 7)])
def test_levels_are_those_of_plain_pytorch(head_dim, topk, dense_dims, v_dim, dtype, rows, where, monkeypatch):
    monkeypatch.setattr(quantize, "_FEW_ROWS", 0 if rows > 1 else 512)
    k = torch.randn(2, 5, 3, head_dim, device=where).to(dtype).transpose(1, 2)
    v = torch.randn(2, 5, 3, v_dim, device=where).to(dtype).transpose(1, 2)
    k[0, 0, 0], v[0, 0, 1] = 0, 0  # no scale
    k[0, 1, 0] *= 1e4  # and large ones
    k[1, 1, 1] *= 1e-6
    codes = topk_codes(k, topk, dense_dims=dense_dims).quantize()
    found = buffers(2, 3, topk, dense_dims, v_dim, where)
    write_8_bit(plain_topk(k, topk, dense_dims), v, found, START)
    expected = (codes.dense, codes.values, codes.indices, codes.scale, *quantize_rows(v))
    for buffer, new in zip(found, expected, strict=True):
        assert torch.equal(buffer[:, :, START : START + 5], new)
        assert (buffer[:, :, :START] == 77).all()
        assert (buffer[:, :, START + 5 :] == 77).all()


def test_a_row_with_nan_is_read_as_nan(where):
    k = torch.randn(1, 1, 4, 8, device=where)
    k[..., 1, 0], k[..., 2, 6], k[..., 3, :] = torch.nan, torch.nan, torch.nan
    found = buffers(1, 1, 4, 4, 8, where)
    write_8_bit(plain_topk(k, 4, 4), k, found, 0)
    for scale in (found[3], found[5]):
        assert scale[0, 0, :4].isnan().tolist() == [False, True, True, True]


def test_half_a_level_goes_to_the_even_one(where):
    k = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 3.5], device=where).expand(1, 1, 1, 8)
    found = buffers(1, 1, 4, 4, 8, where)
    write_8_bit(plain_topk(k, 4, 4), k, found, 0)
    assert found[4][0, 0, 0].tolist() == [127, 0, 2, 2, 0, -2, 126, 4]
    assert found[3][0, 0, 0] == found[5][0, 0, 0] == 1


def test_what_does_not_fit_is_refused(where):
    k = torch.randn(1, 2, 5, 16, device=where)
    code, found = plain_topk(k, 4, 2), buffers(1, 2, 4, 2, 16, where)
    with pytest.raises(ValueError, match="5 tokens at 5 do not fit buffers of 9"):
        write_8_bit(code, k, found, 5)
    with pytest.raises(ValueError, match="the v buffer must be contiguous"):
        write_8_bit(code, k[..., :8], found, 0)
    assert all((x == 77).all() for x in found)


@pytest.mark.gpu
def test_a_cache_on_a_gpu_holds_what_one_on_the_cpu_does():
    k, v = (torch.randn(2, 4, 700, 128, dtype=torch.bfloat16, device="cpu") for _ in "kv")
    here, there = (SparseKVCache(16, dense_dims=16, dtype=torch.int8) for _ in range(2))
    for part in (slice(0, 690), slice(690, 691), slice(691, 700)):
        here.append(k[:, :, part], v[:, :, part])
        there.append(k[:, :, part].cuda(), v[:, :, part].cuda())
    for a, b in zip(here.kv.tensors(), there.kv.tensors(), strict=True):
        assert torch.equal(a, b.cpu())

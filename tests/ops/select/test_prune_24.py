"""Codes in the 2:4 pattern: selection against the reference, and the Triton kernel against plain PyTorch.

Without a GPU the kernel runs in Triton's interpreter, on small shapes.
"""

import pytest
import torch

from flashsfa import reference
from flashsfa.codes import topk_codes
from flashsfa.ops.select.plain import plain_prune_24

# (head_dim, dense_dims)
WIDTHS = [(64, 0), (64, 32), (128, 0), (128, 32), (128, 96), (36, 4), (4, 0), (37, 1), (256, 0)]


def rows(*shape, dtype=torch.float32):
    """Rows with ties, whole groups of zeros, negative zeros, infinities and NaN."""
    x = torch.randn(shape).mul(4).round().div(4)
    x.view(-1, shape[-1])[::3, -4:] = 0
    x.view(-1)[5::41] = -0.0
    x.view(-1)[7::53] = torch.inf
    x.view(-1)[11::97] = torch.nan
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("head_dim", "dense_dims"), WIDTHS)
def test_kept_entries_are_those_of_the_reference(head_dim, dense_dims, dtype):
    x = rows(2, 5, 3, head_dim, dtype=dtype)
    half = (head_dim - dense_dims) // 2
    for topk in {1, max(1, half // 2), half}:
        codes = topk_codes(x, topk, dense_dims=dense_dims, pattern="2:4")
        assert codes.topk == topk
        assert (codes.indices[..., 1:] > codes.indices[..., :-1]).all()
        kept = reference.topk_rows(x, topk, dense_dims=dense_dims, pattern="2:4")
        torch.testing.assert_close(codes.to_dense(), kept, rtol=0, atol=0, equal_nan=True)


def test_gradient_reaches_the_kept_entries():
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    for topk in (4, 10):
        codes = topk_codes(x, topk, dense_dims=4, pattern="2:4")
        (grad,) = torch.autograd.grad(codes.to_dense().sum(), x)
        assert torch.equal(grad != 0, codes.to_dense() != 0)
        assert (grad[grad != 0] == 1).all()


def where():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("head_dim", "dense_dims"), WIDTHS)
def test_kernel_codes_as_plain_pytorch(head_dim, dense_dims, dtype):
    pytest.importorskip("triton")
    from flashsfa.ops.select.triton.prune_24 import prune_24

    x = rows(2, 7, 3, head_dim, dtype=dtype).to(where())
    for found, expected in zip(prune_24(x, dense_dims), plain_prune_24(x, dense_dims), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kernel_reads_any_view(dtype):
    pytest.importorskip("triton")
    from flashsfa.ops.select.triton.prune_24 import prune_24

    x = rows(2, 7, 3, 36, dtype=dtype).to(where())
    strided = x.mT.contiguous().mT, torch.stack((x, x), -1)[..., 0]
    for view in (x.transpose(1, 2), x[..., 1:, :], x.flatten(0, 2), x[:0], *strided):
        for found, expected in zip(prune_24(view, 4), plain_prune_24(view, 4), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_zeros_within_the_pattern_are_kept_before_pruned_entries():
    x = torch.tensor([0.0, 0, 0, 0, 0, 2, 0, 0], requires_grad=True)
    codes = topk_codes(x.detach(), 4, pattern="2:4")
    reference.topk_rows(x, 4, pattern="2:4").sum().backward()
    assert x.grad.nonzero().flatten().tolist() == codes.indices.tolist() == [0, 1, 4, 5]

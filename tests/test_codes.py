"""Feature codes: which entries are selected, what the format promises, and its gradient."""

import math

import pytest
import torch

import flashsfa
from flashsfa import FeatureCodes, reference, topk_codes

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# (head_dim, topk, dense_dims)
BUDGETS = [(1, 1, 0), (2, 1, 1), (7, 3, 0), (32, 32, 0), (64, 8, 0), (64, 5, 16), (65, 64, 1), (128, 16, 64)]
BUDGETS += [(255, 1, 0), (256, 16, 0), (256, 256, 0), (256, 1, 255)]


def assert_selects(x, topk, dense_dims=0):
    """The code of x is well formed and holds exactly what the reference keeps."""
    codes = topk_codes(x, topk, dense_dims=dense_dims)
    rows = x.shape[:-1]
    assert codes.values.shape == codes.indices.shape == (*rows, topk)
    assert codes.dense.shape == (*rows, dense_dims)
    assert (codes.shape, codes.topk, codes.dense_dims) == (x.shape, topk, dense_dims)
    assert codes.sparse_dims == x.shape[-1] - dense_dims
    assert codes.indices.dtype == torch.uint8
    assert (codes.dtype, codes.device) == (x.dtype, x.device)
    assert (codes.indices.long().diff(dim=-1) > 0).all()
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(codes.values, x[..., dense_dims:].gather(-1, codes.indices.long()), **exact)
    torch.testing.assert_close(codes.dense, x[..., :dense_dims], **exact)
    torch.testing.assert_close(codes.to_dense(), reference.topk_rows(x, topk, dense_dims=dense_dims), **exact)
    return codes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "topk", "dense_dims"), BUDGETS)
def test_selection_is_the_references(head_dim, topk, dense_dims, dtype):
    assert_selects(torch.randn(2, 3, 5, head_dim, dtype=dtype), topk, dense_dims)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "topk", "dense_dims"), BUDGETS)
def test_many_ties(head_dim, topk, dense_dims, dtype):
    assert_selects(torch.randint(-2, 3, (50, head_dim)).to(dtype), topk, dense_dims)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_dim(dtype, device):
    """On a GPU each compiles its own kernels: some of them."""
    for head_dim in range(1, 257) if device.type == "cpu" else (1, 2, 3, 17, 33, 64, 100, 129, 192, 255, 256):
        assert_selects(torch.randn(3, head_dim, dtype=dtype), (head_dim + 3) // 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_index(dtype):
    x = torch.tensor([[0.0] * 6, [-1.0] * 6, [1, -1, 1, -1, 1, -1], [0, 2, 1, 1, -1, 3]], dtype=dtype)
    assert assert_selects(x, 3).indices.tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [1, 2, 5]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_larger_than_infinity(dtype):
    x = torch.tensor([[1, math.inf, math.nan, -math.inf], [-math.nan, 0, math.inf, math.nan]], dtype=dtype)
    assert assert_selects(x, 1).indices.tolist() == [[2], [0]]
    assert assert_selects(x, 2).indices.tolist() == [[1, 2], [0, 3]]


@pytest.mark.parametrize("rows", [(), (0,), (2, 0, 3), (1,)])
def test_leading_shapes(rows):
    assert_selects(torch.randn(*rows, 16), 4, 2)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[..., ::2],
        lambda x: x[:, ::2, 1:],
        lambda x: x.mT,
        lambda x: x[:1, :1].expand(3, 4, -1),
    ],
)
@pytest.mark.parametrize("values", [torch.randn, lambda *shape: torch.randint(-2, 3, shape).float()])
def test_noncontiguous_rows(view, values):
    x = view(values(4, 6, 32))
    assert not x.is_contiguous()
    codes = assert_selects(x, min(4, x.shape[-1] - 1), 1)
    assert codes.values.is_contiguous()
    assert codes.dense.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("index", [0, slice(1, 3), (1, 2), (slice(None), -1), (..., 0), (None, 1), (0, ..., slice(2))])
def test_indexing_equals_indexing_rows(index):
    x = torch.randn(4, 5, 3, 16)
    codes = topk_codes(x, 4, dense_dims=2)
    rows = index if isinstance(index, tuple) else (index,)
    expected = x[(*rows, slice(None))] if Ellipsis in rows else x[rows]
    assert torch.equal(codes[index].to_dense(), reference.topk_rows(expected, 4, dense_dims=2))
    with pytest.raises(ValueError, match="4 indices for 3 leading"):
        codes[0, 0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_and_cast(dtype):
    codes = topk_codes(torch.randn(2, 7, 64), 8, dense_dims=4).to(dtype)
    assert codes.nbytes == 2 * 7 * ((4 + 8) * dtype.itemsize + 8)
    assert codes.dense.dtype == codes.values.dtype == codes.dtype == dtype
    assert codes.indices.dtype == torch.uint8
    assert codes.to("cpu").head_dim == 64


def test_gradient_is_straight_through():
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    dense = topk_codes(x, 4, dense_dims=3).to_dense()
    dense.backward(upstream)
    assert torch.equal(x.grad, upstream * (dense != 0))
    topk_codes(x, 4).values.sum().backward()  # the dense channel left unused
    assert torch.equal(x.grad - upstream * (dense != 0) != 0, reference.topk_rows(x, 4) != 0)


@pytest.mark.parametrize(
    ("x", "topk", "dense_dims", "error", "message"),
    [
        (torch.ones(2, 8), 0, 0, ValueError, "topk must be 1 to 8"),
        (torch.ones(2, 8), 9, 0, ValueError, "topk must be 1 to 8"),
        (torch.ones(2, 8), 6, 3, ValueError, "topk must be 1 to 5"),
        (torch.ones(2, 8), 1, 8, ValueError, "dense_dims must be 0 to"),
        (torch.ones(2, 8), 1, -1, ValueError, "dense_dims must be 0 to"),
        (torch.ones(2, 257), 1, 0, ValueError, "head_dim must be 1 to 256"),
        (torch.ones(2, 0), 1, 0, ValueError, "head_dim must be 1 to 256"),
        (torch.tensor(1.0), 1, 0, ValueError, "at least one dimension"),
        (torch.ones(2, 8, dtype=torch.int64), 1, 0, TypeError, "x must be float16"),
        (torch.ones(2, 8, dtype=torch.complex64), 1, 0, TypeError, "x must be float16"),
        ([1.0], 1, 0, TypeError, "must be a torch.Tensor, got list"),
    ],
)
def test_bad_inputs(x, topk, dense_dims, error, message):
    with pytest.raises(error, match=message):
        topk_codes(x, topk, dense_dims=dense_dims)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.ones(2, 4)}, "codes need dense"),
        ({"dense": torch.ones(3, 2)}, "codes need dense"),
        ({"indices": torch.zeros(2, 3, dtype=torch.int64)}, "indices must be uint8"),
        ({"dense": torch.ones(2, 2, dtype=torch.float64)}, "must share a dtype"),
        ({"head_dim": 4}, "head_dim 4 cannot hold 2 dense and 3 sparse"),
        ({"head_dim": 257}, "head_dim 257 cannot hold"),
    ],
)
def test_parts_that_do_not_fit(change, message):
    parts = {"dense": torch.ones(2, 2), "values": torch.ones(2, 3), "head_dim": 8}
    parts["indices"] = torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=message):
        FeatureCodes(**(parts | change))


@pytest.mark.cpu
def test_index_past_the_sparse_part():
    codes = FeatureCodes(torch.ones(1, 2), torch.ones(1, 1), torch.tensor([[6]], dtype=torch.uint8), 8)
    with pytest.raises(ValueError, match="a code index is 6, past the sparse part of 6"):
        codes.check_indices()
    topk_codes(torch.ones(0, 8), 2).check_indices()
    topk_codes(torch.arange(8.0)[None], 2, dense_dims=2).check_indices()


def test_checked_mode_finds_nan():
    x = torch.tensor([[1.0, math.nan]])
    with flashsfa.checked():
        with pytest.raises(ValueError, match="x holds NaN"):
            topk_codes(x, 1)
        with flashsfa.checked(False):
            topk_codes(x, 1)
    topk_codes(x, 1)

"""Narrow codes and values: what survives, to which step, and what rows with NaN or infinity read as."""

import math

import pytest
import torch

from flashsfa import topk_codes
from flashsfa.formats import INDEX_FORMS, CodeFormat
from flashsfa.narrow import NarrowCodes, NarrowRows
from flashsfa.ops.select.narrow import pack_3_bits, unpack_3_bits
from flashsfa.rotation import rotate

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
WIDTHS = [(16, 16), (16, 8), (16, 4), (8, 16), (8, 8), (8, 4)]
NARROW = CodeFormat(8, 4)
ROUNDING = 1e-6  # of float32, beside half a step


def heavy_tailed(*shape):
    """Student's t with two degrees of freedom, rows of very different size."""
    x = torch.distributions.StudentT(2.0).sample(shape).to(torch.get_default_device())
    return x * torch.logspace(-6, 2, shape[-2])[:, None]


def assert_within_half_a_step(x, read, step):
    assert ((x.double() - read.double()).abs() <= step.double() * (0.5 + 1e-5) + ROUNDING * x.double().abs()).all()


# ---- codes


@pytest.mark.parametrize("index", INDEX_FORMS)
@pytest.mark.parametrize("sparse_dims", [1, 2, 3, 7, 8, 9, 31, 42, 64, 65, 128, 129, 200, 256])
def test_indices_are_kept_for_every_budget(sparse_dims, index):
    for topk in {1, 2, 3, 5, 8, 11, 16, sparse_dims - 1, sparse_dims} & set(range(1, sparse_dims + 1)):
        codes = topk_codes(torch.randn(3, 7, sparse_dims), topk)
        stored = NarrowCodes.encode(codes, CodeFormat(16, 16, index))
        read = stored.to_codes(torch.float32)
        assert torch.equal(read.indices, codes.indices)
        assert torch.equal(read.to_dense(), codes.to_dense())


@pytest.mark.parametrize(("dense_bits", "value_bits"), WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [torch.randn, heavy_tailed])
def test_entries_come_back_to_half_a_step(rows, dtype, dense_bits, value_bits):
    codes = topk_codes(rows(2, 50, 64).to(dtype), 11, dense_dims=22)
    read = NarrowCodes.encode(codes, CodeFormat(dense_bits, value_bits)).to_codes(torch.float64)
    for name, bits in (("dense", dense_bits), ("values", value_bits)):
        x = getattr(codes, name)
        steps = {16: math.inf, 8: 127, 4: 7.5}[bits]
        step = x.abs().amax(-1, keepdim=True).double() / steps * (1 + 2**-8)  # the stored step is rounded
        assert_within_half_a_step(x, getattr(read, name), step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_read_in_the_dtype_asked_for(dtype):
    stored = NarrowCodes.encode(topk_codes(torch.randn(2, 5, 64), 8, dense_dims=16), NARROW)
    read, exact = stored.to_codes(dtype), stored.to_codes(torch.float64)
    assert read.dtype == read.dense.dtype == dtype
    assert torch.equal(read.dense, exact.dense.to(dtype))
    assert torch.equal(read.values, exact.values.to(dtype))


def test_shape_and_parts():
    stored = NarrowCodes.encode(topk_codes(torch.randn(2, 3, 5, 64), 11, dense_dims=16), NARROW)
    assert stored.shape == (2, 3, 5, 64)
    assert (stored.topk, stored.dense_dims, stored.sparse_dims) == (11, 16, 48)
    assert stored.device == stored.dense.device
    assert stored.values.shape == (2, 3, 5, 6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_rows(bits, scale):
    """The step has the range of float32."""
    x = torch.randn(4, 32) * scale
    codes = topk_codes(x, 8, dense_dims=8)
    read = NarrowCodes.encode(codes, CodeFormat(8, bits)).to_codes(torch.float32)
    assert_within_half_a_step(codes.values, read.values, codes.values.abs().amax(-1, keepdim=True) / 7.4)
    assert read.to_dense().isfinite().all()


@pytest.mark.parametrize(("dense_bits", "value_bits"), WIDTHS)
def test_zero_rows(dense_bits, value_bits):
    stored = NarrowCodes.encode(topk_codes(torch.zeros(3, 32), 5, dense_dims=7), CodeFormat(dense_bits, value_bits))
    assert torch.equal(stored.to_codes(torch.float32).to_dense(), torch.zeros(3, 32))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("dense_bits", "value_bits"), WIDTHS)
def test_nan_and_infinity_stay_visible(dense_bits, value_bits, bad):
    """In the part of the row that held them, and nowhere else; as they were in 16 bits."""
    x = torch.randn(4, 32)
    x[0, 3], x[1, 20] = bad, bad
    codes = topk_codes(x, 5, dense_dims=8)
    read = NarrowCodes.encode(codes, CodeFormat(dense_bits, value_bits)).to_codes(torch.float32)
    assert not read.dense[0].isfinite().all()
    assert not read.values[1].isfinite().all()
    assert read.dense[1:].isfinite().all()
    assert read.values[[0, 2, 3]].isfinite().all()
    if dense_bits == 8:
        assert read.dense[0].isnan().all()
    if value_bits < 16:
        assert read.values[1].isnan().all()


@pytest.mark.parametrize(("dense_dims", "topk"), [(0, 1), (0, 256), (255, 1), (17, 239)])
@pytest.mark.parametrize("leading", [(), (0,), (2, 0, 3), (4,)])
def test_leading_shapes_and_the_widest_head(leading, dense_dims, topk):
    codes = topk_codes(torch.randn(*leading, 256), topk, dense_dims=dense_dims)
    read = NarrowCodes.encode(codes, NARROW).to_codes(torch.float32)
    assert read.shape == codes.shape
    assert torch.equal(read.indices, codes.indices)


@pytest.mark.parametrize(
    "view", [lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[:1].expand(3, *x.shape[1:])]
)
@pytest.mark.parametrize("index", INDEX_FORMS)
def test_strided_codes(view, index):
    form = CodeFormat(8, 4, index)
    codes = topk_codes(torch.randn(4, 6, 64), 9, dense_dims=16)
    strided = codes.map(view)
    read = NarrowCodes.encode(strided, form).map(view).to_codes(torch.float32)
    expected = NarrowCodes.encode(codes, form).to_codes(torch.float32).map(view).map(view)
    for name in ("dense", "values", "indices"):
        assert torch.equal(getattr(read, name), getattr(expected, name))


INDICES = [0, slice(1, 3), (1, 2), (slice(None), -1), (..., 0), (None, 1), (0, ..., slice(2)), (0, 1, 2)]


@pytest.mark.parametrize("index", INDICES)
def test_indexing_equals_indexing_what_is_read(index):
    codes = NarrowCodes.encode(topk_codes(torch.randn(4, 5, 3, 32), 5, dense_dims=2), NARROW)
    values = NarrowRows.encode(torch.randn(4, 5, 3, 32), 4)
    assert torch.equal(codes[index].to_codes(torch.float32).to_dense(), codes.to_codes(torch.float32)[index].to_dense())
    rows = index if isinstance(index, tuple) else (index,)
    whole = (*rows, slice(None)) if Ellipsis in rows else rows
    assert torch.equal(values[index].rows(torch.float32), values.rows(torch.float32)[whole])
    for stored in (codes, values):
        with pytest.raises(ValueError, match="4 indices for 3 leading"):
            stored[0, 0, 0, 0]


def test_map_goes_through_all_parts_of_several():
    codes = [NarrowCodes.encode(topk_codes(torch.randn(1, 3, 32), 5, dense_dims=2), NARROW) for _ in range(2)]
    values = [NarrowRows.encode(torch.randn(1, 3, 32), 4) for _ in range(2)]
    for a, b in (codes, values):
        both = a.map(lambda *x: torch.cat(x, dim=1), b)
        assert both.shape == (1, 6, 32)
        for x, *parts in zip(both.tensors(), a.tensors(), b.tensors(), strict=True):
            assert torch.equal(x, torch.cat(parts, dim=1))


def test_codes_in_8_bits_are_not_quantised_again():
    codes = topk_codes(torch.randn(3, 16), 4).quantize()
    with pytest.raises(ValueError, match="codes are quantised once"):
        NarrowCodes.encode(codes, NARROW)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": 0}, "topk must be 1 to 16"),
        ({"topk": 7}, "values of 7 entries in 4 bits must be torch.uint8 \\[..., 4\\], got torch.uint8 \\(2, 3\\)"),
        ({"head_dim": 12}, "bitmap indices of 5 in 8 must be uint8 \\[..., 1\\]"),
        ({"dense": torch.zeros(2, 4)}, "dense of 4 entries in 8 bits must be torch.int8"),
        ({"dense": torch.zeros(3, 4, dtype=torch.int8)}, "all parts share rows and device"),
        ({"dense_scale": None}, "dense in 8 bits need a scale in torch.bfloat16, got none"),
        ({"dense_scale": torch.zeros(2, 1, dtype=torch.bfloat16)}, "all parts share rows and device"),
        ({"value_scale": torch.zeros(2)}, "values in 4 bits need a scale in torch.bfloat16, got torch.float32"),
        ({"indices": torch.zeros(2, 2, dtype=torch.int32)}, "bitmap indices of 5 in 16 must be uint8"),
        ({"format": CodeFormat(8, 16)}, "values of 5 entries in 16 bits must be floating"),
    ],
)
def test_parts_that_do_not_fit(change, message):
    stored = NarrowCodes.encode(topk_codes(torch.randn(2, 20), 5, dense_dims=4), NARROW)
    parts = {name: getattr(stored, name) for name in stored.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        NarrowCodes(**(parts | change))


@pytest.mark.parametrize("byte", [0, 1, 255])
@pytest.mark.parametrize(("sparse_dims", "topk"), [(64, 8), (256, 40), (100, 100)])
def test_any_bitmap_reads_as_indices_within_the_head(sparse_dims, topk, byte):
    """Unwritten memory too: decode masks such keys, but a read past the row would be an error."""
    stored = NarrowCodes.encode(topk_codes(torch.randn(3, sparse_dims), topk), CodeFormat(16, 16, "bitmap"))
    garbage = stored.map(lambda x: x if x.is_floating_point() else torch.full_like(x, byte))
    garbage.to_codes(torch.float32).check_indices()


def test_compiled_whole():
    """In one graph, to the same codes."""

    def there_and_back(x):
        codes = NarrowCodes.encode(topk_codes(x, 5, dense_dims=4), CodeFormat(8, 4, "bitmap"))
        packed = NarrowCodes.encode(topk_codes(x, 5, dense_dims=4), CodeFormat(8, 4, "packed"))
        values = [NarrowRows.encode(x, bits).to_dense(x.dtype) for bits in (4, 3)]
        return codes.to_codes(x.dtype).to_dense(), packed.to_codes(x.dtype).to_dense(), *values

    x = torch.randn(2, 3, 48)
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    for read, expected in zip(compiled(x), there_and_back(x), strict=True):
        torch.testing.assert_close(read, expected)


# ---- values


def test_three_bits_lie_as_they_are_described():
    """Eight levels in a word and a byte, all words before all bytes: the kernels count on it."""
    levels = torch.randint(0, 8, (5, 32), dtype=torch.uint8)
    packed = pack_3_bits(levels)
    assert packed.shape == (5, 12)
    for row, of_row in zip(levels.tolist(), packed.tolist(), strict=True):
        for i in range(4):
            eight, word, byte = row[8 * i : 8 * i + 8], of_row[2 * i] | of_row[2 * i + 1] << 8, of_row[8 + i]
            assert [word >> shift & 7 for shift in (0, 3, 6, 9, 12)] == eight[:5]
            assert [byte & 7, byte >> 3 & 7, word >> 15 | byte >> 6 << 1] == eight[5:]
    assert torch.equal(unpack_3_bits(packed, 32), levels)


@pytest.mark.parametrize("v_dim", [16, 48, 64, 80, 128, 256, 576])
@pytest.mark.parametrize("rows", [torch.randn, heavy_tailed])
@pytest.mark.parametrize("bits", [16, 8, 4, 3])
def test_values_come_back_to_half_a_step(bits, rows, v_dim):
    """For 4 and 3 bits of the range of the rotated row."""
    v = rows(2, 50, v_dim)
    stored = NarrowRows.encode(v, bits)
    assert stored.shape == v.shape
    kept = rotate(v) if stored.is_rotated else v
    steps = {16: math.inf, 8: 127, 4: 7.5, 3: 3.5}[bits]
    largest = kept.abs().amax(-1, keepdim=True)
    low, high = kept.aminmax(dim=-1, keepdim=True)
    half_range = (high - low) / 2 + 2**-8 * largest if stored.is_rotated else largest
    assert_within_half_a_step(kept, stored.rows(torch.float32), half_range / steps * (1 + 2**-8))
    expected = rotate(stored.rows(torch.float64)) if stored.is_rotated else stored.rows(torch.float64)
    torch.testing.assert_close(stored.to_dense(torch.float64), expected)


def test_constant_rows_cost_nothing():
    """The step shrinks with the range around the middle, not with the size of the row."""
    v = torch.full((3, 16), 0.3) * torch.tensor([1.0, -1000.0, 0.0])[:, None]
    read = NarrowRows.encode(rotate(v), 4).rows(torch.float32)
    torch.testing.assert_close(read, v, rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", [16, 8, 4, 3])
def test_values_with_nan_or_infinity(bits, bad):
    v = torch.randn(3, 16)
    v[1, 5] = bad
    read = NarrowRows.encode(v, bits).to_dense(torch.float32)
    assert not read[1, 5].isfinite()
    assert read[[0, 2]].isfinite().all()
    if bits < 16:
        assert read[1].isnan().all()


@pytest.mark.parametrize("bits", [16, 8, 4, 3])
def test_hidden_rows_read_as_zero_whatever_they_hold(bits):
    v = torch.randn(2, 3, 5, 16)
    v[:, :, 2] = math.nan
    seen = torch.arange(5) != 2
    stored = NarrowRows.encode(v, bits)
    read = stored.where(seen[None, None]).rows(torch.float32)
    assert torch.equal(read[:, :, 2], torch.zeros(2, 3, 16))
    assert torch.equal(read[:, :, seen], stored.rows(torch.float32)[:, :, seen])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 2}, "16, 8, 4 or 3 bits, got 2"),
        ({"width": 24}, "width must be a multiple of 16"),
        ({"width": 48}, "kept of 48 entries in 4 bits must be torch.uint8 \\[..., 24\\]"),
        ({"scale": None}, "kept in 4 bits need a scale in torch.bfloat16"),
        ({"centre": None}, "rows of 4 and 3 bits need a bfloat16 centre"),
        ({"centre": torch.zeros(2)}, "rows of 4 and 3 bits need a bfloat16 centre"),
        ({"scale": torch.zeros(3, dtype=torch.bfloat16)}, "all parts share rows"),
    ],
)
def test_values_that_do_not_fit(change, message):
    stored = NarrowRows.encode(torch.randn(2, 32), 4)
    parts = {name: getattr(stored, name) for name in stored.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        NarrowRows(**(parts | change))


@pytest.mark.parametrize("x", [torch.ones(2, 16, dtype=torch.int64), [1.0]])
def test_values_are_floating_tensors(x):
    with pytest.raises(TypeError, match="x must be"):
        NarrowRows.encode(x, 4)


# ---- the rotation


@pytest.mark.parametrize("width", [1, 2, 16, 24, 64, 80, 96, 128, 256, 576])
def test_rotation_is_orthonormal_and_its_own_inverse(width):
    matrix = rotate(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.mT)
    x = torch.randn(3, width, dtype=torch.float64)
    torch.testing.assert_close(rotate(x), x @ matrix)
    torch.testing.assert_close(rotate(rotate(x)), x)
    block = width & -width
    assert torch.equal(matrix.abs() > 0, torch.block_diag(*[torch.ones(block, block) > 0] * (width // block)))


def test_rotation_is_undone_on_the_output_or_folded_into_the_projections():
    weights = torch.rand(5, 7, dtype=torch.float64)
    x = torch.randn(7, 32, dtype=torch.float64)
    w_v, w_o = torch.randn(16, 32, dtype=torch.float64), torch.randn(32, 16, dtype=torch.float64)
    out = weights @ (x @ w_v.mT)
    torch.testing.assert_close(rotate(weights @ rotate(x @ w_v.mT)), out)
    folded_v, folded_o = rotate(w_v.mT).mT, rotate(w_o)
    torch.testing.assert_close(weights @ (x @ folded_v.mT) @ folded_o.mT, out @ w_o.mT)


def test_rotation_spreads_an_outlier():
    """Which is why 4 bits hold what follows it: less than half of the error without it."""
    v = torch.randn(100, 64)
    v[:, 3] *= 30
    rotated = NarrowRows.encode(v, 4).to_dense(torch.float32)
    unrotated = NarrowRows.encode(rotate(v), 4).rows(torch.float32)  # rotated twice before it is quantised
    assert 2 * (rotated - v).norm() < (unrotated - v).norm()

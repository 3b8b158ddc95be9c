"""Rows in other coordinates: the Triton kernel gives what products of float32 do, rounded, and each row the same alone as among others.

Without a GPU the kernel runs in Triton's interpreter, on small shapes.
"""

import inspect

import pytest
import torch

pytest.importorskip("triton")

from flashsfa import FeatureBasis, explain
from flashsfa.ops import transform as room
from flashsfa.ops.transform import triton

SHAPES = [(1, 2, 1, 1), (3, 2, 2, 1), (1, 1, 1, 70), (2, 2, 3, 40), (1, 3, 2, 130)]  # (batch, kv heads, group, tokens)


@pytest.fixture(scope="module")
def where():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def drawn(shape, head_dim, dtype, where):
    batch, heads, group, n = shape
    x = torch.randn(batch, heads * group, n, head_dim, device=where).to(dtype)
    return x, torch.randn(heads, head_dim, head_dim, device=where)


def transform(x, matrix):
    return triton.transform((x, matrix))[0]


def expected(x, matrix):
    """In float64, unrounded."""
    return (x.double().unflatten(1, (len(matrix), -1)) @ matrix.double()[:, None]).flatten(1, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [128, 64, 80, 37, 1, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_its_dtype(shape, head_dim, dtype, where):
    x, matrix = drawn(shape, head_dim, dtype, where)
    exact, out = expected(x, matrix), transform(x, matrix)
    assert out.dtype == dtype
    rounded = exact.to(dtype)
    eps = torch.finfo(dtype).eps
    assert ((out.double() - exact).abs() <= eps * exact.abs() + 2**-15 * exact.abs().max()).all()
    if where.type == "cuda" or dtype == torch.float16:  # the interpreter cuts bfloat16 off
        # one that had rounded the matrix to 16 bits would round half of the entries another way
        assert (out != rounded).float().mean() < 0.05


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_strides_and_their_order_is_kept(shape, where):
    x, matrix = drawn(shape, 64, torch.bfloat16, where)
    out = transform(x, matrix)
    by_token = x.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((*x.shape[:3], 128), float("nan"), dtype=x.dtype, device=where)
    wide[..., ::2] = x
    for other in (by_token, wide[..., ::2], x.mT.contiguous().mT):
        assert torch.equal(transform(other, matrix), out)
    assert transform(by_token, matrix).transpose(1, 2).is_contiguous()
    assert torch.equal(transform(x, matrix.mT.contiguous().mT), out)


def test_a_row_is_the_same_alone(where):
    x, matrix = drawn((2, 2, 2, 150), 128, torch.bfloat16, where)
    whole = transform(x, matrix)
    for i in (0, 63, 149):
        assert torch.equal(transform(x[1:, :, i : i + 1], matrix), whole[1:, :, i : i + 1])


def test_two_sides_are_one_launch_and_the_same(where):
    q, query = drawn((2, 2, 3, 70), 64, torch.bfloat16, where)
    k, key = drawn((2, 2, 1, 40), 64, torch.bfloat16, where)
    for sides in (((q, query), (k, key)), ((k, key), (q, query))):
        both = triton.transform(*sides)
        assert all(torch.equal(out, transform(*side)) for out, side in zip(both, sides, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens"), [(1, (290, 150)), (2, (70, 330)), (15, (3, 2))], ids=str)
@pytest.mark.parametrize("programs", [1, 6, 12])
def test_a_program_of_several_blocks(programs, batch, tokens, dtype, where, monkeypatch):
    """All of a run's, or a number that does not divide them."""
    sides = [drawn((batch, 2, group, n), 64, dtype, where) for group, n in zip((2, 1), tokens, strict=True)]
    apart = triton.transform(*sides)
    monkeypatch.setattr(triton, "_PROGRAMS", programs)
    together = triton.transform(*sides)
    for side, one, other in zip(sides, apart, together, strict=True):
        torch.testing.assert_close(one.double(), expected(*side), rtol=0.01, atol=0.01)
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [2.0**-20, 2.0**20])
def test_float16_rows_by_a_matrix_that_float16_does_not_hold(size, where):
    x, matrix = drawn((1, 2, 2, 3), 64, torch.float16, where)
    matrix[:, :, ::2] *= size
    x *= size**-0.5
    exact = expected(x, matrix)
    error = (transform(x, matrix).double() - exact).abs()
    assert (error <= torch.finfo(x.dtype).eps * exact.abs() + 2.0**-24)[exact.abs() < 65504].all()


def test_one_launch_is_for_sides_of_one_dtype_in_16_bits(where):
    """Others are torch's, as those of two devices are, which it refuses."""
    x, matrix = drawn((1, 2, 2, 3), 64, torch.bfloat16, where)
    for other in (x.half(), x.float(), x[:, :, :0], x.to("meta")):
        assert not room._has_fused((x, matrix), (other, matrix))
    assert not room._has_fused((x, matrix.bfloat16()))
    assert not room._has_fused((x, matrix.to("meta")))
    assert room._has_fused((x, matrix), (x[:, :2], matrix))


@pytest.mark.gpu
def test_a_basis_takes_it(monkeypatch):
    x, matrix = drawn((1, 2, 2, 40), 64, torch.bfloat16, torch.device("cuda"))
    k = x[:, ::2]
    basis, seen, run = FeatureBasis(matrix, matrix), [], triton.transform
    monkeypatch.setattr(triton, "transform", lambda *sides: seen.append(sides) or run(*sides))
    q = basis.transform_query(x)
    assert all(torch.equal(a, b) for a, b in zip(basis.transform(x, k), (q, basis.transform_key(k)), strict=True))
    assert len(seen) == 3
    assert "basis: triton" in explain()
    # a step of both sides takes it, and one of a single side does not
    few = basis.transform(x[:, :, :3], k[:, :, :3])[0]
    assert len(seen) == 4
    assert torch.equal(few, q[:, :, :3])
    torch.testing.assert_close(basis.transform_query(x[:, :, :3]), few, rtol=0.01, atol=0.01)
    assert len(seen) == 4
    # what traces or differentiates takes the products of torch
    x.requires_grad_()
    basis.transform(x, k)[0].sum().backward()
    assert len(seen) == 4
    assert x.grad is not None
    torch.testing.assert_close(basis.transform_query(x).detach(), q, rtol=0.01, atol=0.01)


class Compiled:
    """A kernel of Triton that notes what it is launched with."""

    def __init__(self):
        self.launches = []

    def warmup(self, *arguments, grid, num_warps, num_stages, **sizes):
        self.compiled = grid, list(arguments), sizes
        return {grid: lambda *given: self.launches.append(given)}


@pytest.mark.cpu
@pytest.mark.parametrize("tokens", [17, 300, 5000])
def test_prepared_once_it_is_launched_with_the_tensors_of_each_call(tokens, monkeypatch):
    kernel, names = Compiled(), list(inspect.signature(triton.transform_kernel.fn).parameters)
    monkeypatch.setattr(triton, "transform_kernel", kernel)
    layers = [[drawn((1, 2, g, tokens), 64, torch.bfloat16, "cpu") for g in (3, 1)] for _ in range(3)]
    call = triton.Prepared.of(*layers[0])
    for sides in layers:
        outs = call(*sides)
        assert all(x.shape == out.shape and x.stride() == out.stride() for (x, _), out in zip(sides, outs, strict=True))
        grid, arguments, sizes, _ = triton._launch(outs, *sides)
        assert kernel.compiled[::2] == (grid, sizes)
        (given,) = kernel.launches
        kernel.launches.clear()
        assert [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in given] == [
            x.data_ptr() if isinstance(x, torch.Tensor) else x for x in (*arguments, *sizes.values())
        ]
        # constants follow the other arguments, as in the kernel's signature
        assert len(given) == len(names)
        assert list(sizes) == names[-len(sizes) :]


def test_no_kernel_is_prepared_for_a_cpu():
    sides = [drawn((1, 2, g, 40), 64, torch.bfloat16, "cpu") for g in (3, 1)]
    assert room.prepared(*sides) is None
    with pytest.raises(ValueError, match="for a basis"):
        room.prepared((sides[0][0], sides[0][1][:1, :3]))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [17, 300, 5000])
def test_prepared_it_gives_what_it_gives_at_once(tokens):
    layers = [[drawn((1, 2, g, tokens), 128, torch.bfloat16, "cuda") for g in (2, 1)] for _ in range(3)]
    layers = [[(x.transpose(1, 2).contiguous().transpose(1, 2), m) for x, m in sides] for sides in layers]
    call = room.prepared(*layers[0])
    for sides in layers:
        for out, expected in zip(call(*sides), room.transform(*sides), strict=True):
            torch.testing.assert_close(out, expected, rtol=0, atol=0)

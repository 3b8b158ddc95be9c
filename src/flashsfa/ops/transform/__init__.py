"""Queries and keys in other coordinates: rows of each head times the head's matrix, in the matrix's precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...checks import require, runs_plainly
from ...contexts import without_autocast
from .. import record
from ..select.operators import triton_is_installed

_HALVES = (torch.float16, torch.bfloat16)
_FEW_TOKENS = 16


def transform(*sides: tuple[Tensor, Tensor]) -> list[Tensor]:
    """For each of one or two `sides` x [B, H * G, N, D] and matrix [H, D, D], with one B and H: x times its kv head's matrix, in x's dtype.

    Rounding the matrix to 16 bits would undo what the two sides of a basis are to each other, so autocast does not reach it. On a GPU
    rows of 16 bits take one launch; what it gives for a row does not depend on the rows beside it. One side of a few tokens, as plain
    decode has it, is left to torch: its steps wait for the host, which a launch by Triton takes as long as several of torch's.

    Raises `ValueError` for rows that do not fit their matrix: a kernel would read what lies beside them.
    """
    _require_fit(*sides)
    x, _ = sides[0]
    is_step = len(sides) == 1 and x.shape[2] <= _FEW_TOKENS
    if x.is_cuda and not is_step and runs_plainly(*(x for side in sides for x in side)) and _has_fused(*sides):
        from . import triton as kernels

        with torch.cuda.device_of(x):
            return kernels.transform(*sides)
    with without_autocast(x.device):
        return [_product(x, matrix) for x, matrix in sides]


def prepared(*sides: tuple[Tensor, Tensor]) -> Callable[..., list[Tensor]] | None:
    """`transform` of sides such as these, two of many tokens, for little of the host's time: it is called like it with sides of the same form,
    wherever they lie, and writes what it returns over what it returned before. On torch's current device, which must be theirs. None where there is no such
    kernel."""
    _require_fit(*sides)
    tensors = [x for side in sides for x in side]
    if not tensors[0].is_cuda or not runs_plainly(*tensors) or not _has_fused(*sides):
        return None
    from . import triton as kernels

    with torch.cuda.device_of(tensors[0]):
        return kernels.Prepared.of(*sides)


def _require_fit(*sides: tuple[Tensor, Tensor]) -> None:
    shape = sides[0][1].shape
    require(
        len(shape) == 3
        and all(
            matrix.shape == shape
            and x.ndim == 4
            and x.shape[0] == sides[0][0].shape[0]
            and x.shape[1] % shape[0] == 0
            and x.shape[3] == shape[1] == shape[2]
            for x, matrix in sides
        ),
        lambda: (
            f"queries and keys must be [B, H * G, N, D] for a basis [H, D, D], that of one layer; got {[tuple(x.shape) for x, _ in sides]} for "
            f"{[tuple(matrix.shape) for _, matrix in sides]}"
        ),
    )


def _has_fused(*sides: tuple[Tensor, Tensor]) -> bool:
    """Whether the fused kernel takes these, on a GPU; recorded for `explain()`."""
    first, _ = sides[0]
    if not all(
        x.dtype == first.dtype and x.dtype in _HALVES and matrix.dtype == torch.float32 and x.numel()
        and x.device == matrix.device == first.device for x, matrix in sides
    ):  # fmt: skip
        record.record("basis", "torch", "the Triton kernel takes rows of one dtype of 16 bits and a basis in float32")
        return False
    if not triton_is_installed():
        record.record("basis", "torch", "the fused kernel needs Triton: pip install triton", fallback=True)
        return False
    record.record("basis", "triton", "rows of 16 bits, in one launch")
    return True


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, matrix.dtype)
    grouped = x.unflatten(1, (matrix.shape[0], -1))  # [B, H, G, N, D]
    return (grouped.to(dtype) @ matrix[:, None].to(dtype)).to(x.dtype).flatten(1, 2)

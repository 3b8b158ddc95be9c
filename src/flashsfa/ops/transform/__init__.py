"""Queries and keys in other coordinates: rows of each head times the head's matrix, in the matrix's precision."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import runs_plainly
from ...contexts import without_autocast
from ..select.operators import triton_is_installed

_HALVES = (torch.float16, torch.bfloat16)


def transform(x: Tensor, matrix: Tensor) -> Tensor:
    """x [B, H * G, N, D] times its kv head's matrix [H, D, D], in x's dtype.

    Rounding the matrix to 16 bits would undo what two sides of a basis are to each other, so autocast does not reach it. On a GPU rows
    of 16 bits take one launch; what it gives for a row does not depend on the rows beside it.
    """
    is_fused = x.is_cuda and x.dtype in _HALVES and matrix.dtype == torch.float32 and x.numel() > 0
    if is_fused and runs_plainly(x, matrix) and triton_is_installed():
        from . import triton as kernels

        with torch.cuda.device_of(x):
            return kernels.transform(x, matrix)
    dtype = torch.promote_types(x.dtype, matrix.dtype)
    grouped = x.unflatten(1, (matrix.shape[0], -1))  # [B, H, G, N, D]
    with without_autocast(x.device):
        return (grouped.to(dtype) @ matrix[:, None].to(dtype)).to(x.dtype).flatten(1, 2)

"""The Hadamard rotation that spreads an outlier of a row over its features, so that few bits hold it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .checks import has_values
from .contexts import lasting_tensors, without_autocast


def rotate(x: Tensor) -> Tensor:
    """x [..., C] in an orthonormal basis that mixes all features: blocks of the largest power of two that divides C, each
    times its Hadamard matrix. It is its own inverse, so it also undoes itself.

    Attention over rotated values gives the rotated output: `rotate(weights @ rotate(v)) == weights @ v`. In a model it is
    as well folded into the weights: rotate the output features of a head's value projection, and its input features of the output
    projection. Computed in x's dtype; differentiable.
    """
    width = x.shape[-1] & -x.shape[-1]
    is_real = has_values(x)  # what is traced must not be kept
    matrix = (_hadamard if is_real else _hadamard.__wrapped__)(width, x.dtype, x.device)
    with without_autocast(x.device):
        return (x.unflatten(-1, (-1, width)) @ matrix).flatten(-2)


@functools.cache
def _hadamard(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The orthonormal, symmetric Hadamard matrix [width, width] of a power of two."""
    with lasting_tensors():
        matrix = torch.full((1, 1), width**-0.5, dtype=dtype, device=device)
        while len(matrix) < width:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        return matrix

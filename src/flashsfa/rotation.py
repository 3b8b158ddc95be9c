"""The Hadamard rotation that spreads an outlier of a value over its features, so that 4 bits hold it."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor) -> Tensor:
    """x [..., C] in an orthonormal basis that mixes all features: blocks of the largest power of two that divides C, each
    times its Hadamard matrix. It is its own inverse, so it also undoes itself.

    Attention over rotated values gives the rotated output: `rotate(weights @ rotate(v)) == weights @ v`. In a model it is
    as well folded into the weights: rotate the output features of a head's value projection, and its input features of the output
    projection. Computed in x's dtype; differentiable.
    """
    block = x.shape[-1] & -x.shape[-1]
    half = 1
    while half < block:
        first, second = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        half *= 2
    return x * block**-0.5

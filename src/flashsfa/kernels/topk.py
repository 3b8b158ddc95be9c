"""Which kernel selects top-k features: Triton on a GPU, plain PyTorch (`codes.select_topk`) everywhere else."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from ..codes import plain_topk_codes, topk_codes_op
from . import dispatch


@topk_codes_op.register_kernel("cuda")
def _(x: Tensor, topk: int, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype == torch.float64:
        dispatch.record("topk_codes", "torch", "the Triton kernel takes no float64")
        return plain_topk_codes(x, topk, dense_dims)
    if importlib.util.find_spec("triton") is None:
        dispatch.record("topk_codes", "torch", "triton is not installed: pip install triton", fallback=True)
        return plain_topk_codes(x, topk, dense_dims)
    from .triton import topk_codes

    dispatch.record("topk_codes", "triton", "one pass over x")
    with torch.cuda.device_of(x):
        return topk_codes.topk_codes(x, topk, dense_dims)

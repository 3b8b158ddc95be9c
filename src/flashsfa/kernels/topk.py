"""Which kernel selects top-k features: Triton on a GPU, plain PyTorch (`codes.plain_topk_codes`) everywhere else."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from ..codes import FeatureCodes, plain_topk_codes, topk_codes_op
from . import dispatch


@topk_codes_op.register_kernel("cuda")
def _(x: Tensor, topk: int, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    if not has_fused(x):
        return plain_topk_codes(x, topk, dense_dims)
    from .triton import topk_codes

    with torch.cuda.device_of(x):
        return topk_codes.topk_codes(x, topk, dense_dims)


def has_fused(x: Tensor) -> bool:
    """Whether the fused kernel codes the rows of x; recorded for `explain()`."""
    if not x.is_cuda:
        return False
    installed = _triton_is_installed()
    if installed and x.dtype != torch.float64:
        dispatch.record("topk_codes", "triton", "one pass over the rows")
        return True
    reason = (
        f"the Triton kernel takes no {x.dtype}" if installed else "the fused kernel needs Triton: pip install triton"
    )
    dispatch.record("topk_codes", "torch", reason, fallback=True)
    return False


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def append_codes(k: Tensor, v: Tensor, codes: FeatureCodes, v_buffer: Tensor, start: int) -> None:
    """Code k [B, H, N, D] and write codes and v [B, H, N, Dv] at token `start` of a cache's buffers, in one launch.

    Only where `has_fused(k)`; `codes` and `v_buffer` are contiguous [B, H, C, ...].
    """
    from .triton import topk_codes

    with torch.cuda.device_of(k):
        topk_codes.append_codes(k, v, codes.dense, codes.values, codes.indices, v_buffer, start)

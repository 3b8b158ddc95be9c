"""Which kernel codes rows and spreads codes: Triton on a GPU, plain PyTorch (`codes`) everywhere else."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from ..codes import (
    FeatureCodes,
    empty_rows,
    pair_codes_op,
    plain_pair_codes,
    plain_spread_codes,
    plain_topk_codes,
    plain_topk_rows,
    spread_codes_op,
    topk_codes_op,
    topk_rows_op,
)
from . import dispatch


@topk_codes_op.register_kernel("cuda")
def _(x: Tensor, topk: int, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    if not has_fused(x):
        return plain_topk_codes(x, topk, dense_dims)
    from .triton import topk_codes

    with torch.cuda.device_of(x):
        return topk_codes.topk_codes(x, topk, dense_dims)


@topk_rows_op.register_kernel("cuda")
def _(x: Tensor, topk: int, dense_dims: int) -> Tensor:
    if not has_fused(x):
        return plain_topk_rows(x, topk, dense_dims)
    from .triton import topk_codes

    with torch.cuda.device_of(x):
        out = empty_rows(x, x.shape[-1])
        if topk_codes.topk_rows(x, topk, dense_dims, out):
            return out
        return spread(*topk_codes.topk_codes(x, topk, dense_dims), x.shape[-1])


@pair_codes_op.register_kernel("cuda")
def _(x: Tensor, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    if not has_fused(x):
        return plain_pair_codes(x, dense_dims)
    from .triton import pair_codes

    with torch.cuda.device_of(x):
        return pair_codes.pair_codes(x, dense_dims)


def spread(dense: Tensor, values: Tensor, indices: Tensor, head_dim: int) -> Tensor:
    """`FeatureCodes.to_dense` for the inside of an operator: without the cost of another one, and without gradients."""
    if dense.shape[-1] == head_dim:
        return dense
    if not has_fused(values):
        return plain_spread_codes(dense, values, indices, head_dim)
    from .triton import spread_codes

    with torch.cuda.device_of(values):
        return spread_codes.spread_codes(dense, values, indices, empty_rows(values, head_dim))


spread_codes_op.register_kernel("cuda")(spread)


def has_fused(x: Tensor) -> bool:
    """Whether the fused kernel codes the rows of x; recorded for `explain()`."""
    if not x.is_cuda:
        return False
    installed = triton_is_installed()
    if installed and x.dtype != torch.float64:
        dispatch.record("topk_codes", "triton", "one pass over the rows")
        return True
    reason = (
        f"the Triton kernel takes no {x.dtype}" if installed else "the fused kernel needs Triton: pip install triton"
    )
    dispatch.record("topk_codes", "torch", reason, fallback=True)
    return False


@functools.cache
def triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def append_codes(k: Tensor, v: Tensor, codes: FeatureCodes, v_buffer: Tensor, start: int | Tensor) -> None:
    """Code k [B, H, N, D] and write codes and v [B, H, N, Dv] at token `start` of a cache's buffers, in one launch.

    Only where `has_fused(k)`; `codes` and `v_buffer` are contiguous [B, H, C, ...].
    """
    from .triton import topk_codes

    with torch.cuda.device_of(k):
        topk_codes.append_codes(k, v, codes.dense, codes.values, codes.indices, v_buffer, start)


def _append_plain(
    k: Tensor, v: Tensor, dense: Tensor, values: Tensor, indices: Tensor, v_buffer: Tensor, start: Tensor
) -> None:
    parts = (*plain_topk_codes(k, values.shape[-1], dense.shape[-1]), v)
    slots = start + torch.arange(k.shape[2], device=k.device)
    for buffer, new in zip((dense, values, indices, v_buffer), parts, strict=True):
        buffer.index_copy_(2, slots, new)


# `append_codes` with `start` [] on the device, for CUDA graphs and torch.compile.
append_codes_op = torch.library.custom_op(
    "flashsfa::append_codes", _append_plain, mutates_args=("dense", "values", "indices", "v_buffer")
)


@append_codes_op.register_kernel("cuda")
def _(k: Tensor, v: Tensor, dense: Tensor, values: Tensor, indices: Tensor, v_buffer: Tensor, start: Tensor) -> None:
    if has_fused(k):
        append_codes(k, v, FeatureCodes(dense, values, indices, k.shape[-1]), v_buffer, start)
    else:
        _append_plain(k, v, dense, values, indices, v_buffer, start)


@append_codes_op.register_fake
def _(*_: Tensor) -> None:
    """Nothing is returned."""

"""Which kernel codes rows and spreads codes: Triton on a GPU, plain PyTorch (`codes`) everywhere else."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from ..codes import (
    FeatureCodes,
    at_support,
    empty_code,
    empty_rows,
    pair_codes_op,
    plain_pair_codes,
    plain_spread_codes,
    plain_topk_codes,
    spread_codes_op,
    topk_codes_op,
)
from . import dispatch


def topk_codes(x: Tensor, topk: int, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dense channel, values and indices of x [..., D]. This and the functions below are the insides of operators: they
    carry no gradients."""
    if not has_fused(x):
        return plain_topk_codes(x, topk, dense_dims)
    from .triton import topk_codes

    with torch.cuda.device_of(x):
        return topk_codes.topk_codes(x, topk, dense_dims)


def coded_rows(
    x: Tensor, topk: int, dense_dims: int, keep: bool
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """The rows [..., D] of x's code, zero but for what it keeps, and with `keep` the code; in one pass where one can."""
    if not has_fused(x):
        code = plain_topk_codes(x, topk, dense_dims)
        return plain_spread_codes(*code, x.shape[-1]), code if keep else None
    from .triton import spread_codes, topk_codes

    with torch.cuda.device_of(x):
        out, kept = empty_rows(x, x.shape[-1]), empty_code(x, topk, dense_dims) if keep else None
        if topk_codes.topk_rows(x, topk, dense_dims, out, kept):
            return out, kept
        code = topk_codes.topk_codes(x, topk, dense_dims)
        return spread_codes.spread_codes(*code, out), code if keep else None


def pair_codes(x: Tensor, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """The code of the two largest of each aligned group of four of x [..., D], and its dense channel."""
    if not has_fused(x):
        return plain_pair_codes(x, dense_dims)
    from .triton import pair_codes

    with torch.cuda.device_of(x):
        return pair_codes.pair_codes(x, dense_dims)


def spread(dense: Tensor, values: Tensor, indices: Tensor, head_dim: int) -> Tensor:
    """The rows [..., D] of a code, as `FeatureCodes.to_dense`."""
    if dense.shape[-1] == head_dim:
        return dense
    if not has_fused(values):
        return plain_spread_codes(dense, values, indices, head_dim)
    from .triton import spread_codes

    with torch.cuda.device_of(values):
        return spread_codes.spread_codes(dense, values, indices, empty_rows(values, head_dim))


def keep_support(rows: Tensor, dense_dims: int, indices: Tensor) -> Tensor:
    """rows [..., D], zero but for the first `dense_dims` entries and those at `indices` [..., K] of the rest."""
    if not has_fused(rows):
        return plain_spread_codes(*at_support(rows, dense_dims, indices), indices, rows.shape[-1])
    from .triton import spread_codes

    with torch.cuda.device_of(rows):
        out = empty_rows(rows, rows.shape[-1])
        if spread_codes.keep_support(rows, dense_dims, indices, out):
            return out
        return spread_codes.spread_codes(*at_support(rows, dense_dims, indices), indices, out)


topk_codes_op.register_kernel("cuda")(topk_codes)
pair_codes_op.register_kernel("cuda")(pair_codes)
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

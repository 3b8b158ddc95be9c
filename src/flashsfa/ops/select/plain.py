"""The selection in plain PyTorch, on any device: the meaning that the fused forms share. A code is three tensors here: dense channel,
values and indices (`codes.FeatureCodes`)."""

from __future__ import annotations

import torch
from torch import Tensor

# An integer view orders magnitudes as floats do, ranks NaN above infinity and makes ties exact.
_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def select_topk(x: Tensor, topk: int) -> Tensor:
    """Positions [..., K] (int64, ascending) of the `topk` largest magnitudes of x [..., D], ties to the lowest."""
    magnitude = x.detach().view(integer := _INTEGER_OF_SIZE[x.itemsize]) & torch.iinfo(integer).max  # [..., D], no sign
    if x.device.type != "cpu":  # without a host sync, so that a CUDA graph can hold it
        return magnitude.sort(dim=-1, descending=True, stable=True).indices[..., :topk].sort(-1).values
    largest = magnitude.topk(topk, dim=-1, sorted=False)  # [..., K]
    threshold = largest.values.amin(-1, keepdim=True)  # [..., 1]
    keep = magnitude >= threshold
    if int(keep.count_nonzero()) == largest.values.numel():
        return largest.indices.sort(-1).values
    # Some row of x has more entries at its threshold than may be kept: keep the first ones.
    above = magnitude > threshold
    room = topk - above.sum(-1, keepdim=True)
    tied = keep & ~above
    keep = above | (tied & (tied.cumsum(-1) <= room))
    # Every row of x now keeps exactly K entries, and nonzero() walks them in order: its last column is the sorted indices.
    return keep.nonzero()[:, -1].view(*x.shape[:-1], topk)


def plain_topk(x: Tensor, topk: int, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dense channel, values and indices of x in plain PyTorch, on any device."""
    # The code is allocated before the work space of the selection: what lives longest must not lie above it on the
    # heap. And it is a contiguous copy: a view of x would keep all of x alive for as long as the code.
    values, indices = x.new_empty((*x.shape[:-1], topk)), x.new_empty((*x.shape[:-1], topk), dtype=torch.uint8)
    dense = x[..., :dense_dims].clone(memory_format=torch.contiguous_format)
    rest = x[..., dense_dims:]  # [..., D - M]
    selected = select_topk(rest, topk)  # [..., K]
    torch.gather(rest, -1, selected, out=values)
    return dense, values, indices.copy_(selected)


def plain_prune_24(x: Tensor, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """The code [..., (D - M) / 2] of the two largest of each aligned group of four, in plain PyTorch, on any device."""
    groups = x[..., dense_dims:].unflatten(-1, (-1, 4))  # [..., G, 4]
    _, values, in_group = plain_topk(groups, 2, 0)  # [..., G, 2]
    first = torch.arange(0, 4 * groups.shape[-2], 4, dtype=torch.uint8, device=x.device)[:, None]  # [G, 1]
    dense = x[..., :dense_dims].clone(memory_format=torch.contiguous_format)
    return dense, values.flatten(-2), (in_group + first).flatten(-2)


def plain_scatter(dense: Tensor, values: Tensor, indices: Tensor, head_dim: int) -> Tensor:
    """A code as dense rows [..., D], in plain PyTorch, on any device, in the memory order of `empty_rows`."""
    rows, dense_dims = empty_rows(values, head_dim).zero_(), dense.shape[-1]
    if dense_dims:
        rows[..., :dense_dims] = dense
    rows[..., dense_dims:].scatter_(-1, indices.long(), values)
    return rows


def empty_code(x: Tensor, topk: int, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised dense channel [..., M], values [..., K] and indices [..., K] for x [..., D]."""
    rows = x.shape[:-1]
    return (
        x.new_empty((*rows, dense_dims)),
        x.new_empty((*rows, topk)),
        x.new_empty((*rows, topk), dtype=torch.uint8),
    )


def empty_rows(like: Tensor, width: int) -> Tensor:
    """Uninitialised [..., width] beside `like` [..., K]. Of [B, H, N, K] it lies in memory as [B, N, H, width]: so models hold
    their queries, keys and values, attention kernels follow them, and gradients need no copy on their way back."""
    if like.ndim != 4:
        return like.new_empty((*like.shape[:-1], width))
    batch, heads, n, _ = like.shape
    return like.new_empty((batch, n, heads, width)).transpose(1, 2)


def by_token(x: Tensor) -> Tensor:
    """x [B, H, N, D] in the memory order of `empty_rows`, copied if it lies in another."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def at_support(grad: Tensor, dense_dims: int, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient [..., D] of a code's dense rows as gradients of its dense channel [..., M] and its values [..., K]."""
    at_values = grad[..., dense_dims:].gather(-1, indices.long())
    return grad[..., :dense_dims].clone(memory_format=torch.contiguous_format), at_values

"""Feature codes: what a query or key row leaves behind when only its largest features are kept.

A row of width `head_dim` becomes a dense channel of its first `dense_dims` entries and, of the rest (the
sparse part), the `topk` entries of largest magnitude with their positions. This is the one format that the
operator, the kernels and the cache speak (paper section 3.1; the dense channel is ours).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from .checks import may_look, query_budget, refuse_transforms, require, require_budget, require_float


@dataclass(frozen=True, eq=False)
class FeatureCodes:
    """Codes of rows with any leading shape `...`. Two are equal if they are one object: compare their parts.

    Attributes:
        dense: [..., M] the dense channel: the first M entries of each row, M >= 0.
        values: [..., K] the kept entries of the sparse part, in ascending order of index, each index once. Dtype of `dense`.
        indices: [..., K] uint8 positions of `values`, counted from 0 within the sparse part.
        head_dim: width D of the coded rows; the sparse part is D - M wide.
        scale: [...] float32 factor of each row's dense channel and values, for 8-bit codes; None for 1.

    Raises `ValueError` for parts whose shapes, dtypes or devices do not fit one another.
    """

    dense: Tensor
    values: Tensor
    indices: Tensor
    head_dim: int
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        dense, values, indices = self.dense, self.values, self.indices
        require(
            values.shape == indices.shape and dense.shape[:-1] == values.shape[:-1],
            lambda: (
                f"codes need dense [..., M], values [..., K] and indices [..., K]; got {tuple(dense.shape)}, "
                f"{tuple(values.shape)} and {tuple(indices.shape)}"
            ),
        )
        require(indices.dtype == torch.uint8, lambda: f"indices must be uint8, got {indices.dtype}")
        require(
            values.dtype == dense.dtype and values.device == dense.device == indices.device,
            lambda: (
                f"dense and values must share a dtype and all parts a device; got {dense.dtype} on {dense.device}, "
                f"{values.dtype} on {values.device}, indices on {indices.device}"
            ),
        )
        require(
            self.dense_dims + self.topk <= self.head_dim <= 256,
            lambda: (
                f"head_dim {self.head_dim} cannot hold {self.dense_dims} dense and {self.topk} sparse entries (at most 256)"
            ),
        )
        require(
            (self.scale is not None) == (values.dtype == torch.int8),
            lambda: (
                f"int8 codes need a scale, and others have none; got {values.dtype} {'without' if self.scale is None else 'with'} one"
            ),
        )
        scale = self.scale
        if scale is not None:
            require(
                scale.shape == values.shape[:-1] and scale.dtype == torch.float32 and scale.device == values.device,
                lambda: (
                    f"scale must be float32 {tuple(values.shape[:-1])} on {values.device}, got {scale.dtype} "
                    f"{tuple(scale.shape)} on {scale.device}"
                ),
            )

    @property
    def shape(self) -> torch.Size:
        """The leading shape `...` of the coded rows followed by `head_dim`: the shape of `to_dense()`."""
        return torch.Size((*self.values.shape[:-1], self.head_dim))

    @property
    def topk(self) -> int:
        """Budget K: kept entries of the sparse part."""
        return self.values.shape[-1]

    @property
    def dense_dims(self) -> int:
        """Width M of the dense channel."""
        return self.dense.shape[-1]

    @property
    def sparse_dims(self) -> int:
        """Width D - M of the sparse part."""
        return self.head_dim - self.dense_dims

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of the code itself: M + K values, K indices and the scale of a row."""
        scale = 0 if self.scale is None else self.scale.nbytes
        return self.dense.nbytes + self.values.nbytes + self.indices.nbytes + scale

    def to_dense(self) -> Tensor:
        """The coded rows as [..., D], with zeros where nothing was kept; float32 for 8-bit codes. Rows [B, H, N, D] are a
        transposed view of a contiguous [B, N, H, D]. Differentiable in dense and values, by the reverse mode."""
        refuse_transforms("FeatureCodes.to_dense", "use flashsfa.reference.code_rows", self.dense, self.values)
        if self.scale is not None:
            return self.to(torch.float32).to_dense()
        if not self.topk and not self.sparse_dims:
            return self.dense
        return spread_codes_op(self.dense, self.values, self.indices, self.head_dim)

    def __getitem__(self, index: Any) -> FeatureCodes:
        """Index the leading dimensions, as `x[index]` does for a tensor; the code's own dimension stays whole."""
        index = index if isinstance(index, tuple) else (index,)
        scale = None if self.scale is None else self.scale[index]
        if not any(isinstance(i, EllipsisType) for i in index):  # `in` would bind a compiled graph to one length
            require(
                len(index) < self.values.ndim,
                f"{len(index)} indices for {self.values.ndim - 1} leading dimensions",
            )
        else:
            index = (*index, slice(None))
        return FeatureCodes(self.dense[index], self.values[index], self.indices[index], self.head_dim, scale)

    def to(self, *args: Any, **kwargs: Any) -> FeatureCodes:
        """`Tensor.to` for the dense channel and the values; the indices follow to the device and stay uint8. Another
        dtype takes the scale in."""
        dense, values, scale = self.dense, self.values, self.scale
        like = values.new_empty(0).to(*args, **kwargs)  # what dtype and device the arguments ask for
        if scale is not None and like.dtype != self.dtype:
            wide = torch.promote_types(torch.float32, like.dtype)
            dense, values = (x.to(wide) * scale[..., None] for x in (dense, values))
            scale = None
        scale = None if scale is None else scale.to(like.device)
        dense, values = dense.to(*args, **kwargs), values.to(*args, **kwargs)
        return FeatureCodes(dense, values, self.indices.to(like.device), self.head_dim, scale)

    def quantize(self) -> FeatureCodes:
        """int8 codes, with one scale for the dense channel and values of a row; codes in int8 stay as they are."""
        if self.scale is not None:
            return self
        kept, scale = quantize_rows(torch.cat((self.dense, self.values), dim=-1))
        dense, values = (x.contiguous() for x in kept.split((self.dense_dims, self.topk), dim=-1))
        return FeatureCodes(dense, values, self.indices, self.head_dim, scale)

    def check_indices(self) -> None:
        """Raise `ValueError` for an index past the sparse part. Costs a device sync on a GPU, so only on the
        CPU or in checked mode are codes from outside looked at."""
        if may_look(self.indices) and self.indices.numel():
            highest = int(self.indices.max())
            require(
                highest < self.sparse_dims,
                f"a code index is {highest}, past the sparse part of {self.sparse_dims} features "
                f"(head_dim {self.head_dim} less dense_dims {self.dense_dims})",
            )


def topk_codes(x: Tensor, topk: int, *, dense_dims: int = 0, pattern: str | None = None) -> FeatureCodes:
    """Code the rows of `x`: the first `dense_dims` entries, and the `topk` largest magnitudes of the rest.

    Ties go to the lowest index; NaN counts as larger than infinity. Differentiable: the gradient reaches the
    kept entries and is zero elsewhere (the straight-through rule of the paper, section 3.2; docs/explanation/method.md). For forward-mode
    derivatives and torch.func there is `flashsfa.reference.topk_rows`.

    Args:
        x: [..., D] float16, bfloat16, float32 or float64, any strides, D <= 256.
        topk: 1 to D - dense_dims.
        dense_dims: width of the dense channel, 0 to D - 1.
        pattern: "2:4" keeps the largest subject to at most two in each aligned group of four of the sparse part, which
            is what sparse tensor cores multiply (docs/explanation/prefill.md). topk is then at most half of the sparse part,
            a multiple of four wide.

    Raises:
        TypeError: x is no floating tensor of a supported dtype.
        ValueError: a budget out of range or that the pattern cannot hold; in checked mode also NaN in x.
        NotImplementedError: inside a torch.func transform or forward-mode differentiation.
    """
    require_float("x", x)
    require(x.ndim >= 1, "x must have at least one dimension")
    require_budget(topk, x.shape[-1], dense_dims, pattern)
    refuse_transforms("topk_codes", "use flashsfa.reference.topk_rows", x)
    if pattern is None:
        dense, values, indices = topk_codes_op(x, topk, dense_dims)
    else:
        dense, values, indices = pair_codes_op(x, dense_dims)
        if topk < values.shape[-1]:  # the largest of these: in each group a row's largest two come before its others
            _, values, slots = topk_codes_op(values, topk, 0)
            indices = indices.gather(-1, slots.long())
    return FeatureCodes(dense, values, indices, x.shape[-1])


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., C] in int8 and the float32 scale [...] of each row: x ≈ int8 · scale."""
    wide = x.float()
    scale = wide.abs().amax(-1) / 127
    return (wide / scale.where(scale > 0, 1)[..., None]).round().to(torch.int8), scale


def all_dense_codes(x: Tensor) -> FeatureCodes:
    """The code that keeps all of `x` [..., D] in its dense channel: how unsparsified queries are written."""
    nothing = (*x.shape[:-1], 0)
    return FeatureCodes(x, x.new_empty(nothing), x.new_empty(nothing, dtype=torch.uint8), x.shape[-1])


def code_queries(
    q: Tensor, topk: int, topk_query: int | None, dense_dims: int, pattern: str | None = None
) -> FeatureCodes:
    """Code q [..., D] by the rule of `topk_query`: None means `topk`, D means dense queries (without a pattern)."""
    budget = query_budget(topk_query, topk, q.shape[-1], dense_dims, pattern)
    if keeps_all(q, budget, pattern):
        return all_dense_codes(q)
    return topk_codes(q, budget, dense_dims=dense_dims, pattern=pattern)


def keeps_all(x: Tensor, topk: int, pattern: str | None = None) -> bool:
    """Whether a budget leaves x [..., D] as it is: D without a pattern, whatever the dense channel."""
    return topk == x.shape[-1] and pattern is None


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
    # Some row has more entries at its threshold than room for them: keep the first ones.
    above = magnitude > threshold
    room = topk - above.sum(-1, keepdim=True)
    tied = keep & ~above
    keep = above | (tied & (tied.cumsum(-1) <= room))
    # Every row now keeps exactly K entries, and nonzero() walks rows in order: its last column is the sorted indices.
    return keep.nonzero()[:, -1].view(*x.shape[:-1], topk)


def plain_topk_codes(x: Tensor, topk: int, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dense channel, values and indices of x in plain PyTorch, on any device."""
    # The code is allocated before the work space of the selection: what lives longest must not lie above it on the
    # heap. And it is a contiguous copy: a view of x would keep all of x alive for as long as the code.
    values, indices = x.new_empty((*x.shape[:-1], topk)), x.new_empty((*x.shape[:-1], topk), dtype=torch.uint8)
    dense = x[..., :dense_dims].clone(memory_format=torch.contiguous_format)
    rest = x[..., dense_dims:]  # [..., D - M]
    selected = select_topk(rest, topk)  # [..., K]
    torch.gather(rest, -1, selected, out=values)
    return dense, values, indices.copy_(selected)


def plain_pair_codes(x: Tensor, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """The code [..., (D - M) / 2] of the two largest of each aligned group of four, in plain PyTorch, on any device."""
    groups = x[..., dense_dims:].unflatten(-1, (-1, 4))  # [..., G, 4]
    _, values, places = plain_topk_codes(groups, 2, 0)  # [..., G, 2]
    first = torch.arange(0, 4 * groups.shape[-2], 4, dtype=torch.uint8, device=x.device)[:, None]  # [G, 1]
    dense = x[..., :dense_dims].clone(memory_format=torch.contiguous_format)
    return dense, values.flatten(-2), (places + first).flatten(-2)


def plain_spread_codes(dense: Tensor, values: Tensor, indices: Tensor, head_dim: int) -> Tensor:
    """The rows [..., D] of a code in plain PyTorch, on any device, in the memory order of `empty_rows`."""
    rows, dense_dims = empty_rows(values, head_dim).zero_(), dense.shape[-1]
    if dense_dims:
        rows[..., :dense_dims] = dense
    rows[..., dense_dims:].scatter_(-1, indices.long(), values)
    return rows


def empty_code(x: Tensor, topk: int, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised dense channel [..., M], values [..., K] and indices [..., K] for the rows of x [..., D]."""
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


# On a GPU `kernels.topk` replaces the plain forms.
topk_codes_op = torch.library.custom_op("flashsfa::topk_codes", plain_topk_codes, mutates_args=())


@topk_codes_op.register_fake
def _(x: Tensor, topk: int, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    return empty_code(x, topk, dense_dims)


pair_codes_op = torch.library.custom_op("flashsfa::pair_codes", plain_pair_codes, mutates_args=())


@pair_codes_op.register_fake
def _(x: Tensor, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    return empty_code(x, (x.shape[-1] - dense_dims) // 2, dense_dims)


spread_codes_op = torch.library.custom_op("flashsfa::spread_codes", plain_spread_codes, mutates_args=())


@spread_codes_op.register_fake
def _(dense: Tensor, values: Tensor, indices: Tensor, head_dim: int) -> Tensor:
    return empty_rows(values, head_dim)


def _topk_codes_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, *budgets = inputs
    ctx.head_dim, ctx.budgets = x.shape[-1], len(budgets)
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(output[2])


def _topk_codes_backward(ctx: Any, grad_dense: Tensor, grad_values: Tensor, _: Tensor | None) -> tuple:
    (indices,) = ctx.saved_tensors
    return FeatureCodes(grad_dense, grad_values, indices, ctx.head_dim).to_dense(), *(None,) * ctx.budgets


topk_codes_op.register_autograd(_topk_codes_backward, setup_context=_topk_codes_setup)
pair_codes_op.register_autograd(_topk_codes_backward, setup_context=_topk_codes_setup)


def at_support(grad: Tensor, dense_dims: int, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient [..., D] of a code's rows as gradients of its dense channel [..., M] and its values [..., K]."""
    at_values = grad[..., dense_dims:].gather(-1, indices.long())
    return grad[..., :dense_dims].clone(memory_format=torch.contiguous_format), at_values


def _spread_codes_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    dense, _, indices, _ = inputs
    ctx.dense_dims = dense.shape[-1]
    ctx.save_for_backward(indices)


def _spread_codes_backward(ctx: Any, grad: Tensor) -> tuple:
    (indices,) = ctx.saved_tensors
    return *at_support(grad, ctx.dense_dims, indices), None, None


spread_codes_op.register_autograd(_spread_codes_backward, setup_context=_spread_codes_setup)

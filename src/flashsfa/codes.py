"""Feature codes: what a query or key row leaves behind when only its largest features are kept.

A row of width `head_dim` becomes a dense channel of its first `dense_dims` entries and, of the rest (the
sparse part), the `topk` entries of largest magnitude with their positions (paper section 3.1; the dense channel is ours). The operator and
16-bit caches speak this format; `narrow` and `axes` have those of caches of few bits, and `stored.KeyCodes` names them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor

from .budget import FeatureBudget, require_budget
from .checks import may_look, refuse_transforms, require, require_float
from .contexts import without_autocast
from .ops.select.narrow import MOST_8_BIT, step_of
from .ops.select.operators import coded, pruned, scattered


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
        return sum(x.nbytes for x in self.tensors())

    def tensors(self) -> list[Tensor]:
        """The parts that there are."""
        return [self.dense, self.values, self.indices, *([] if self.scale is None else [self.scale])]

    def to_dense(self) -> Tensor:
        """The coded rows as [..., D], with zeros where nothing was kept; float32 for 8-bit codes. Rows [B, H, N, D] are a
        transposed view of a contiguous [B, N, H, D]. Differentiable in dense and values, by the reverse mode."""
        refuse_transforms("FeatureCodes.to_dense", "use flashsfa.reference.code_rows", self.dense, self.values)
        if self.scale is not None:
            return self.to(torch.float32).to_dense()
        if not self.topk and not self.sparse_dims:
            return self.dense
        return scattered(self.dense, self.values, self.indices, self.head_dim)

    def map(self, change: Callable[..., Tensor], *others: FeatureCodes) -> FeatureCodes:
        """The codes with each tensor changed alike, in leading dimensions or device, together with its like of `others`."""
        return FeatureCodes(
            change(self.dense, *(x.dense for x in others)),
            change(self.values, *(x.values for x in others)),
            change(self.indices, *(x.indices for x in others)),
            self.head_dim,
            None if self.scale is None else change(self.scale, *(x.scale for x in others)),
        )

    def of_views(self, dense: Tensor, values: Tensor, indices: Tensor, scale: Tensor | None = None) -> FeatureCodes:
        """Codes of views of `tensors()`, alike of each: they fit one another as the parts do, and are not checked again, which
        would take the host as long as to make them."""
        codes = object.__new__(FeatureCodes)
        codes.__dict__.update(dense=dense, values=values, indices=indices, head_dim=self.head_dim, scale=scale)
        return codes

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
        with without_autocast(self.device):
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
        dense, values, indices = coded(x, topk, dense_dims)
    else:
        dense, values, indices = pruned(x, dense_dims)
        if topk < values.shape[-1]:  # the largest of these: in each group a row's largest two come before its others
            _, values, slots = coded(values, topk, 0)
            indices = indices.gather(-1, slots.long())
    return FeatureCodes(dense, values, indices, x.shape[-1])


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., C] in int8 and the float32 scale [...] of each row: x ≈ int8 · scale."""
    wide = x.float()
    scale = step_of(wide, MOST_8_BIT)
    return (wide / scale.where(scale > 0, 1)[..., None]).round().to(torch.int8), scale


def all_dense_codes(x: Tensor) -> FeatureCodes:
    """The code that keeps all of `x` [..., D] in its dense channel: how unsparsified queries are written."""
    nothing = (*x.shape[:-1], 0)
    return FeatureCodes(x, x.new_empty(nothing), x.new_empty(nothing, dtype=torch.uint8), x.shape[-1])


def code_queries(q: Tensor, budget: FeatureBudget) -> FeatureCodes:
    """The codes of queries q [..., D]."""
    if budget.keeps_queries:
        return all_dense_codes(q)
    return topk_codes(q, budget.topk_query, dense_dims=budget.dense_dims, pattern=budget.query_pattern)

"""Keys' codes and values in the widths of a `CodeFormat`: what a compressed cache holds.

Made from `FeatureCodes` and rows by `NarrowCodes.encode` and `NarrowRows.encode`, and read a block of keys at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .budget import require_budget
from .checks import require, require_float
from .codes import FeatureCodes, quantize_rows
from .formats import ROTATED_BITS, CodeFormat, index_bits, packed_bytes, row_bytes
from .ops.select.narrow import (
    centre_of,
    from_levels,
    pack,
    pack_bitmap,
    to_8_bits,
    to_levels,
    unpack,
    unpack_bitmap,
)
from .rotation import rotate


class Rows:
    """What codes and values share: tensors [..., C], named in `_wide`, and [...] or None, named in `_scales`."""

    _wide: ClassVar[tuple[str, ...]]
    _scales: ClassVar[tuple[str, ...]]

    def tensors(self) -> list[Tensor]:
        """The parts that there are, with their scales."""
        parts = (getattr(self, name) for name in (*self._wide, *self._scales))
        return [x for x in parts if x is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts and their scales."""
        return sum(x.nbytes for x in self.tensors())

    @property
    def device(self) -> torch.device:
        return getattr(self, self._wide[0]).device

    def map(self, change: Callable[..., Tensor], *others: Self) -> Self:
        """The same with each tensor changed alike, in leading dimensions or device, together with its like of `others`."""
        return self._changed(lambda name, x: change(x, *(getattr(other, name) for other in others)))

    def of_views(self, *views: Tensor) -> Self:
        """The same with `views` of its `tensors()`, alike of each: they fit one another as the parts do, and are not checked again."""
        made = object.__new__(type(self))
        names = (name for name in (*self._wide, *self._scales) if getattr(self, name) is not None)
        made.__dict__.update(self.__dict__ | dict(zip(names, views, strict=True)))
        return made

    def __getitem__(self, index: Any) -> Self:
        """Index the leading dimensions, as `x[index]` does for a tensor; a row stays whole."""
        index = index if isinstance(index, tuple) else (index,)
        whole = index
        if any(isinstance(i, EllipsisType) for i in index):
            whole = (*index, slice(None))
        else:
            leading = self.tensors()[0].ndim - 1
            require(len(index) <= leading, lambda: f"{len(index)} indices for {leading} leading dimensions")
        return self._changed(lambda name, x: x[whole if name in self._wide else index])

    def _check_rows(self) -> None:
        tensors = self.tensors()
        rows, device = tensors[0].shape[:-1], tensors[0].device
        leading = [getattr(self, name).shape[:-1] for name in self._wide]
        leading += [x.shape for x in (getattr(self, name) for name in self._scales) if x is not None]
        require(
            all(shape == rows for shape in leading) and all(x.device == device for x in tensors),
            lambda: f"all parts share rows and device; got {', '.join(f'{_words(x)} on {x.device}' for x in tensors)}",
        )

    def _changed(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        parts = {name: getattr(self, name) for name in (*self._wide, *self._scales)}
        return self._replaced({name: None if x is None else change(name, x) for name, x in parts.items()})

    def _replaced(self, parts: dict[str, Tensor | None]) -> Self:
        return replace(self, **parts)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class NarrowCodes(Rows):
    """Codes of rows with any leading shape `...`, as `FeatureCodes`, in the widths of a format.

    Attributes:
        dense: [..., M] the dense channel: int8 for 8 bits, else as it came.
        values: [..., K] the kept entries of the sparse part: int8 for 8 bits, else as they came; for 4 bits [..., ceil(K / 2)]
            uint8, two per byte.
        indices: [..., I] uint8, their positions in the form that the format takes for this budget.
        dense_scale, value_scale: [...] bfloat16 step of each row; None for parts in 16 bits, and for a dense channel of width 0.
        head_dim: width D of the coded rows.
        topk: kept entries K.
        format: the widths.

    Raises `ValueError` for parts whose shapes, dtypes or devices do not fit.
    """

    _wide = ("dense", "values", "indices")
    _scales = ("dense_scale", "value_scale")

    dense: Tensor
    values: Tensor
    indices: Tensor
    dense_scale: Tensor | None
    value_scale: Tensor | None
    head_dim: int
    topk: int
    format: CodeFormat

    def __post_init__(self) -> None:
        require_budget(self.topk, self.head_dim, self.dense_dims)
        wide, form = self.format, self.format.index_form(self.topk, self.sparse_dims)
        index_width = wide.index_bytes(self.topk, self.sparse_dims)
        _check_part("dense", self.dense, self.dense_scale, self.dense_dims, wide.dense_bits)
        _check_part("values", self.values, self.value_scale, self.topk, wide.value_bits)
        require(
            self.indices.shape[-1] == index_width and self.indices.dtype == torch.uint8,
            lambda: (
                f"{form} indices of {self.topk} in {self.sparse_dims} must be uint8 [..., {index_width}], got "
                f"{self.indices.dtype} {tuple(self.indices.shape)}"
            ),
        )
        self._check_rows()

    @classmethod
    def encode(cls, codes: FeatureCodes, format: CodeFormat) -> NarrowCodes:
        """`codes` in `format`, with topk >= 1. Indices are kept as they are; entries to half a step of their row's part, and a part with
        NaN or infinity as NaN. Raises `ValueError` for codes that are in 8 bits already."""
        require(codes.scale is None, "codes are quantised once: take them as topk_codes returns them, not in 8 bits")
        form = format.index_form(codes.topk, codes.sparse_dims)
        if form == "bitmap":
            indices = pack_bitmap(codes.indices, codes.sparse_dims)
        else:
            indices = codes.indices if form == "uint8" else pack(codes.indices, index_bits(codes.sparse_dims))
        dense, dense_scale = _encode_part(codes.dense, format.dense_bits)
        values, value_scale = _encode_part(codes.values, format.value_bits)
        return cls(dense, values, indices, dense_scale, value_scale, codes.head_dim, codes.topk, format)

    def to_codes(self, dtype: torch.dtype) -> FeatureCodes:
        """The codes in a floating dtype, their scales taken in."""
        return FeatureCodes(
            _decode_part(self.dense, self.dense_scale, self.dense_dims, self.format.dense_bits, dtype),
            _decode_part(self.values, self.value_scale, self.topk, self.format.value_bits, dtype),
            self._positions(),
            self.head_dim,
        )

    @property
    def shape(self) -> torch.Size:
        """The leading shape `...` of the coded rows followed by `head_dim`."""
        return torch.Size((*self.dense.shape[:-1], self.head_dim))

    @property
    def dense_dims(self) -> int:
        """Width M of the dense channel."""
        return self.dense.shape[-1]

    @property
    def sparse_dims(self) -> int:
        """Width D - M of the sparse part."""
        return self.head_dim - self.dense_dims

    def _positions(self) -> Tensor:
        form = self.format.index_form(self.topk, self.sparse_dims)
        if form == "bitmap":
            return unpack_bitmap(self.indices, self.sparse_dims, self.topk)
        return self.indices if form == "uint8" else unpack(self.indices, index_bits(self.sparse_dims), self.topk)


@dataclass(frozen=True, eq=False)
class NarrowRows(Rows):
    """Rows with any leading shape `...` in 16, 8, 4 or 3 bits: values, and, but for 3 bits, keys that keep every feature.

    Attributes:
        kept: [..., C] as they came for 16 bits, int8 for 8; of the rotated rows, for 4 bits [..., C / 2] uint8, two per byte, and
            for 3 bits [..., 3C / 8] uint8, as `pack_3_bits` lays them.
        scale: [...] step of each row: float32 for 8 bits, bfloat16 for 4 and 3, None for 16.
        centre: [...] bfloat16 middle of each row for 4 and 3 bits, else None.
        width: C.
        bits: 16, 8, 4 or 3.

    Raises `ValueError` for parts whose shapes, dtypes or devices do not fit.
    """

    _wide = ("kept",)
    _scales = ("scale", "centre")

    kept: Tensor
    scale: Tensor | None
    centre: Tensor | None
    width: int
    bits: int

    def __post_init__(self) -> None:
        row_bytes(self.width, self.bits)
        scale_dtype = torch.float32 if self.bits == 8 else torch.bfloat16
        _check_part("kept", self.kept, self.scale, self.width, self.bits, scale_dtype)
        require(
            (self.centre is not None) == self.is_rotated
            and (self.centre is None or self.centre.dtype == torch.bfloat16),
            lambda: f"rows of 4 and 3 bits need a bfloat16 centre, and others have none; got {_words(self.centre)}",
        )
        self._check_rows()

    @classmethod
    def encode(cls, x: Tensor, bits: int) -> NarrowRows:
        """x [..., C] in `bits`, to half a step of its row; a row with NaN or infinity as NaN.

        Raises `TypeError` or `ValueError` for what is no floating tensor, or a width that these bits cannot hold."""
        require_float("x", x)
        row_bytes(x.shape[-1], bits)
        kept, scale, centre = x, None, None
        if bits == 8:
            kept, scale = quantize_rows(x)
        elif bits in ROTATED_BITS:
            rotated = rotate(x.float())
            centre = centre_of(rotated)
            kept, scale = to_levels(rotated, bits, centre)
        return cls(kept, scale, centre, x.shape[-1], bits)

    @property
    def is_rotated(self) -> bool:
        """Whether `rows` are rotated, and so attention's output over them (`rotation.rotate` undoes it)."""
        return self.bits in ROTATED_BITS

    def rows(self, dtype: torch.dtype) -> Tensor:
        """[..., C] the rows as they are kept, rotated or not, in a floating dtype, their scales taken in."""
        return _decode_part(self.kept, self.scale, self.width, self.bits, dtype, self.centre)

    def to_dense(self, dtype: torch.dtype) -> Tensor:
        """[..., C] the rows in a floating dtype, rotated back."""
        if not self.is_rotated:
            return self.rows(dtype)
        return rotate(self.rows(torch.promote_types(torch.float32, dtype))).to(dtype)

    def where(self, seen: Tensor) -> NarrowRows:
        """The rows, read as zeros where `seen` (bool, broadcast against `...`) is False, whatever an unfilled buffer holds there."""
        if self.scale is None:
            return replace(self, kept=self.kept.where(seen[..., None], 0))
        centre = None if self.centre is None else self.centre.where(seen, 0)
        return replace(self, scale=self.scale.where(seen, 0), centre=centre)

    @property
    def shape(self) -> torch.Size:
        """The leading shape `...` followed by `width`."""
        return torch.Size((*self.kept.shape[:-1], self.width))


# ---- one part of a row


def _encode_part(x: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    if bits == 16:
        return x, None
    if not x.shape[-1]:
        return x.to(torch.int8), None
    return to_8_bits(x) if bits == 8 else to_levels(x, bits)


def _decode_part(
    x: Tensor, scale: Tensor | None, width: int, bits: int, dtype: torch.dtype, centre: Tensor | None = None
) -> Tensor:
    if scale is None:
        return x.to(dtype)
    wide = torch.promote_types(torch.float32, dtype)
    steps = x.to(wide) if bits == 8 else from_levels(x, bits, width, wide)
    rows = steps * scale.to(wide)[..., None]
    return (rows if centre is None else rows + centre.to(wide)[..., None]).to(dtype)


def _check_part(
    name: str, x: Tensor, scale: Tensor | None, width: int, bits: int, scale_dtype: torch.dtype = torch.bfloat16
) -> None:
    is_packed = bits in ROTATED_BITS
    stored, dtype = (packed_bytes(width, bits), torch.uint8) if is_packed else (width, torch.int8)
    require(
        x.shape[-1] == stored and (x.is_floating_point() if bits == 16 else x.dtype == dtype),
        lambda: (
            f"{name} of {width} entries in {bits} bits must be {'floating' if bits == 16 else dtype} [..., {stored}], got {_words(x)}"
        ),
    )
    wanted = bits < 16 and width > 0
    require(
        (scale is not None) == wanted and (scale is None or scale.dtype == scale_dtype),
        lambda: (
            f"{name} in {bits} bits need {f'a scale in {scale_dtype}' if wanted else 'no scale'}, got {_words(scale)}"
        ),
    )


def _words(x: Tensor | None) -> str:
    return "none" if x is None else f"{x.dtype} {tuple(x.shape)}"

"""The tensors of a `KVView` by the names that the decode kernels on a GPU have for them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...axes import AxisCodes
from ...codes import FeatureCodes
from ...formats import index_bits
from ...mask import Mask
from ...narrow import NarrowRows
from ...scores import ScoreRules
from ...stored import KVView

# Tensors of a view by the names that the kernels have for them: [B, Hkv, N, C] and [B, Hkv, N], or pools of pages; and tables of the
# axes [Hkv, D].
ROWS = ("CHANNEL", "VALUES", "INDICES", "V")
SCALES = ("CHANNEL_SCALE", "CHANNEL_CENTRE", "VALUE_SCALE", "V_SCALE", "V_CENTRE")
TABLES = ("AXIS", "IS_START", "TOP", "STEP", "CENTRE")
NAMES = (*ROWS, *SCALES, *TABLES)


@dataclass(frozen=True)
class Held:
    """What a view holds, as the kernels on a GPU read it.

    Attributes:
        tensors: those that there are, by name.
        channel, bits: places of the channel of a key, and their bits: 16, 8, 4, or 2 for slots of axes.
        topk, index_bits: kept entries of the other features, and the bits of the place of each; 0 for a bitmap.
        value_bits: of a feature of a value: 16, 8, 4 or 3; 32 of values in float32.
        width: of a value.
    """

    tensors: dict[str, Tensor]
    channel: int
    bits: int
    topk: int
    index_bits: int
    value_bits: int
    width: int

    @property
    def sizes(self) -> list[int]:
        """All but the tensors, in order."""
        return [self.channel, self.bits, self.topk, self.index_bits, self.value_bits, self.width]

    @classmethod
    def of(cls, kv: KVView) -> Held:
        """The tensors of a view."""
        codes, v = kv.codes, kv.v
        topk, place_bits = 0, 8
        parts: dict[str, Tensor | None]
        if isinstance(codes, NarrowRows):
            channel, bits = codes.width, codes.bits
            parts = {"CHANNEL": codes.kept, "CHANNEL_SCALE": codes.scale, "CHANNEL_CENTRE": codes.centre}
        elif isinstance(codes, AxisCodes):
            axes = codes.axes
            channel, bits = 4 * axes.key_bytes, 2
            parts = {"CHANNEL": codes.packed, "AXIS": axes.layout.axis, "IS_START": axes.layout.is_start}
            parts |= {"TOP": axes.layout.top, "STEP": axes.step, "CENTRE": axes.centre}
        else:
            channel, topk = codes.dense_dims, codes.topk
            if isinstance(codes, FeatureCodes):
                channel_scale = value_scale = codes.scale
            else:
                channel_scale, value_scale = codes.dense_scale, codes.value_scale
                form = codes.format.index_form(topk, codes.sparse_dims)
                place_bits = {"uint8": 8, "packed": index_bits(codes.sparse_dims), "bitmap": 0}[form]
            bits = 16 if channel_scale is None else 8
            parts = {"VALUES": codes.values, "INDICES": codes.indices, "VALUE_SCALE": value_scale}
            if channel:
                parts |= {"CHANNEL": codes.dense, "CHANNEL_SCALE": channel_scale}
        if isinstance(v, NarrowRows):
            value_bits = v.bits if v.bits < 16 else 8 * v.kept.itemsize
            parts |= {"V": v.kept, "V_SCALE": v.scale, "V_CENTRE": v.centre}
        else:
            value_bits = 8 * v.itemsize
            parts |= {"V": v, "V_SCALE": kv.v_scale}
        held = {name: x for name, x in parts.items() if x is not None}
        return cls(held, channel, bits, topk, place_bits, value_bits, v.shape[-1])


@dataclass(frozen=True)
class Call:
    """One decode over what is held, as `plain.decode` is asked for it, `topk_query` None for dense queries."""

    q: Tensor
    held: Held
    page_table: Tensor | None
    mask: Mask
    scores: ScoreRules
    value_tolerance: float
    topk_query: int | None

"""`Configuration`: what a cache keeps per token, and the one name it has in tables, pictures and the documentation."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ..checks import require
from ..formats import CodeFormat


def code_name(topk: int, dense_dims: int) -> str:
    """A key code's part of the name: `16+k16`."""
    return f"{dense_dims}+k{topk}" if dense_dims else f"k{topk}"


@dataclass(frozen=True)
class Configuration:
    """What a cache keeps of each token and kv head: `dense_dims` features and the `topk` largest of the others of a key, or
    `axis_bytes` of levels of all axes, and the value in full.

    Attributes:
        topk: None keeps all features.
        bits: 16, as they come; 8, keys and values with a float32 scale per row; 4, the default `CodeFormat`; 3, of values beside keys in
            bits per axis alone.
        skips: decode leaves out values that weigh little (`value_tolerance`).
        axis_bytes: bytes of a key in bits per axis (`AxisBits`), else None.
    """

    head_dim: int
    dense_dims: int = 0
    topk: int | None = None
    bits: int = 16
    skips: bool = False
    axis_bytes: int | None = None

    def __post_init__(self) -> None:
        require(
            self.bits != 3 or self.axis_bytes is not None,
            "values in 3 bits have a name beside keys in bits per axis alone",
        )

    @classmethod
    def named(cls, name: str, head_dim: int) -> Configuration:
        """The configuration of a `name` such as `16+k16-int8`. Raises `ValueError` for what is no such name."""
        found = re.fullmatch(r"(?:dense|(?:(\d+)\+)?k(\d+)|axes(\d+))(?:-int(3|4|8))?(-skip)?", name)
        require(
            found is not None and (found[3] is not None or found[4] != "3"),
            f"{name!r} names no configuration; names are such as dense-int8, k16, 16+k16-skip, 16+k16-int4, axes48-int4, axes48-int3",
        )
        assert found is not None
        dense_dims, topk, axis_bytes, bits, skips = found.groups()
        numbers = [None if x is None else int(x) for x in (topk, axis_bytes)]
        return cls(head_dim, int(dense_dims or 0), numbers[0], int(bits or 16), bool(skips), numbers[1])

    @property
    def name(self) -> str:
        kept = "dense" if self.topk is None else code_name(self.topk, self.dense_dims)
        if self.axis_bytes is not None:
            kept = f"axes{self.axis_bytes}"
        return kept + (f"-int{self.bits}" if self.bits < 16 else "") + ("-skip" if self.skips else "")

    @property
    def is_dense(self) -> bool:
        """Whether keys keep all features alike."""
        return self.topk is None and self.axis_bytes is None

    @property
    def code(self) -> tuple[int, int]:
        """`topk` and `dense_dims` of the key code that holds it."""
        return (self.head_dim, 0) if self.topk is None else (self.topk, self.dense_dims)

    @property
    def cache_dtype(self) -> torch.dtype | CodeFormat | None:
        """The `dtype` of a cache that holds it."""
        if self.is_dense and self.bits == 8:  # rows, not codes
            return CodeFormat(value_bits=8, v_bits=8)
        if self.bits < 8:
            return CodeFormat(v_bits=self.bits)
        return torch.int8 if self.bits == 8 else None

    @property
    def key_bytes(self) -> int:
        """Of a key in a 16-bit or 8-bit cache, where indices take a byte each, or in 4 bits."""
        if self.axis_bytes is not None:
            return self.axis_bytes
        if self.bits == 4:
            topk, dense_dims = self.code
            return CodeFormat().key_bytes(self.head_dim, dense_dims, topk)
        dense, sparse = (self.head_dim, 0) if self.topk is None else (self.dense_dims, self.topk)
        return dense + 2 * sparse + 4 if self.bits == 8 else 2 * dense + 3 * sparse

    @property
    def bytes(self) -> int:
        """Of key and value, of equal width."""
        return self.key_bytes + CodeFormat(v_bits=self.bits).v_bytes(self.head_dim)

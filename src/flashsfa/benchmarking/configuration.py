"""`Configuration`: what a cache keeps per token, and the one name it has in tables, pictures and the documentation."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..checks import require


def code_name(topk: int, dense_dims: int) -> str:
    """A key code's part of the name: `16+k16`."""
    return f"{dense_dims}+k{topk}" if dense_dims else f"k{topk}"


@dataclass(frozen=True)
class Configuration:
    """What a cache keeps of each token and kv head: `dense_dims` features and the `topk` largest of the others of a key, and
    the value in full.

    Attributes:
        topk: None keeps all features.
        is_int8: keys and values in 8 bits, each row with a float32 scale.
        skips: decode leaves out values that weigh little (`value_tolerance`).
    """

    head_dim: int
    dense_dims: int = 0
    topk: int | None = None
    is_int8: bool = False
    skips: bool = False

    @classmethod
    def named(cls, name: str, head_dim: int) -> Configuration:
        """The configuration of a `name` such as `16+k16-int8`. Raises `ValueError` for what is no such name."""
        found = re.fullmatch(r"(?:dense|(?:(\d+)\+)?k(\d+))(-int8)?(-skip)?", name)
        require(found is not None, f"{name!r} names no configuration; names are such as dense-int8, k16, 16+k16-skip")
        assert found is not None
        dense_dims, topk, is_int8, skips = found.groups()
        return cls(head_dim, int(dense_dims or 0), None if topk is None else int(topk), bool(is_int8), bool(skips))

    @property
    def name(self) -> str:
        kept = "dense" if self.topk is None else code_name(self.topk, self.dense_dims)
        return kept + ("-int8" if self.is_int8 else "") + ("-skip" if self.skips else "")

    @property
    def code(self) -> tuple[int, int]:
        """`topk` and `dense_dims` of the key code that holds it: all features are head_dim - 1 dense ones, and one more."""
        return (1, self.head_dim - 1) if self.topk is None else (self.topk, self.dense_dims)

    @property
    def key_bytes(self) -> int:
        """Of a key in a 16-bit or 8-bit cache; indices take a byte each."""
        dense, sparse = (self.head_dim, 0) if self.topk is None else (self.dense_dims, self.topk)
        return dense + 2 * sparse + 4 if self.is_int8 else 2 * dense + 3 * sparse

    @property
    def bytes(self) -> int:
        """Of key and value, of equal width."""
        return self.key_bytes + (self.head_dim + 4 if self.is_int8 else 2 * self.head_dim)

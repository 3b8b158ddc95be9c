"""`CodeFormat`: in how many bits a cache keeps each part of a key's code and of a value, and what that takes in bytes.

All bytes are per token and kv head, to the last scale and padding bit. Scales take two bytes (bfloat16), but for those of
8-bit values, which take four (float32, `quantize_rows`).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch

from .budget import require_budget
from .checks import require, require_choice, require_int

NAMES = "int4, int8, or widths such as d8s4v4, d8s4v3 or d8s4v4-packed"
INDEX_FORMS = ("uint8", "packed", "bitmap")
AUTO = "auto"
# Rows of so few bits are rotated, each in whole blocks at least so wide, over which the rotation mixes.
ROTATED_BITS, ROTATION_WIDTH = (4, 3), 16


@dataclass(frozen=True)
class CodeFormat:
    """Widths of what a cache keeps. 16 bits mean the model's own dtype, which is counted as two bytes.

    Attributes:
        dense_bits: of a feature of the dense channel, 16 or 8.
        value_bits: of a kept entry of the sparse part, 16, 8 or 4; of all features where a key keeps every one.
        index: "uint8", a byte per kept entry; "packed", the bits that a position in the sparse part needs; "bitmap", a bit
            per feature of the sparse part; "auto", the smallest of these for the budget, the first one where two are equal.
        v_bits: of a feature of a value, 16, 8, 4 or 3. Rows of 4 and 3 bits are rotated first (`rotation.rotate`).

    Raises `TypeError` or `ValueError` for other widths.
    """

    dense_bits: int = 8
    value_bits: int = 4
    index: str = AUTO
    v_bits: int = 4

    def __post_init__(self) -> None:
        for name, widths in (("dense_bits", (16, 8)), ("value_bits", (16, 8, 4)), ("v_bits", (16, 8, 4, 3))):
            bits = getattr(self, name)
            require_int(name, bits)
            require(bits in widths, f"{name} must be {' or '.join(map(str, widths))}, got {bits}")
        require_choice("index", self.index, (AUTO, *INDEX_FORMS))

    @classmethod
    def named(cls, name: str) -> CodeFormat:
        """The format of a `name` such as `d8s4v4` or `d8s4v4-packed`. Raises `ValueError` for what is no such name."""
        found = re.fullmatch(rf"d(16|8)s(16|8|4)v(16|8|4|3)(?:-({'|'.join(INDEX_FORMS)}))?", name)
        require(found is not None, f"{name!r} names no format of a cache; there are {NAMES}")
        assert found is not None
        dense_bits, value_bits, v_bits, index = found.groups()
        return cls(int(dense_bits), int(value_bits), index or AUTO, int(v_bits))

    @property
    def name(self) -> str:
        """What `named` reads."""
        index = "" if self.index == AUTO else f"-{self.index}"
        return f"d{self.dense_bits}s{self.value_bits}v{self.v_bits}{index}"

    def index_form(self, topk: int, sparse_dims: int) -> str:
        """The form that the indices take, with "auto" decided."""
        if self.index != AUTO:
            return self.index
        smallest = _smallest_index.__wrapped__ if torch.compiler.is_compiling() else _smallest_index
        return smallest(topk, sparse_dims)

    def index_bytes(self, topk: int, sparse_dims: int) -> int:
        """Of the indices of a key."""
        return _index_bytes(self.index_form(topk, sparse_dims), topk, sparse_dims)

    def key_bytes(self, head_dim: int, dense_dims: int, topk: int) -> int:
        """Of a key; with topk = head_dim of a row of `value_bits` without indices. Raises `ValueError` for a budget that does not
        fit the head, or a width that the format cannot hold."""
        require_budget(topk, head_dim, dense_dims)
        if topk == head_dim:
            return row_bytes(head_dim, self.value_bits)
        parts = _part_bytes(dense_dims, self.dense_bits) + _part_bytes(topk, self.value_bits)
        return parts + self.index_bytes(topk, head_dim - dense_dims)

    def v_bytes(self, v_dim: int) -> int:
        """Of a value. Raises `ValueError` for a width that the format cannot hold."""
        return row_bytes(v_dim, self.v_bits)

    def require_v_dim(self, v_dim: int) -> None:
        """Values of width `v_dim` can be kept in this format."""
        row_bytes(v_dim, self.v_bits)


def row_bytes(width: int, bits: int) -> int:
    """Of a row of `width` features in 16, 8, 4 or 3 bits, with its scale, and in 4 and 3 bits its centre. Raises `ValueError` for a
    width that these cannot hold."""
    require_int("width", width, 1)
    require(bits in (16, 8, *ROTATED_BITS), f"rows are kept in 16, 8, 4 or 3 bits, got {bits}")
    require(
        bits not in ROTATED_BITS or width % ROTATION_WIDTH == 0,
        lambda: (
            f"rows of {bits} bits are rotated in blocks of a power of two, so their width must be a multiple of {ROTATION_WIDTH}, got "
            f"{width}; take 8 bits"
        ),
    )
    return {16: 2 * width, 8: width + 4, 4: width // 2 + 4, 3: 3 * width // 8 + 4}[bits]


def cache_bits(name: str | None) -> torch.dtype | CodeFormat | None:
    """What a `cache_dtype` names: torch.int8 for "int8", the default `CodeFormat` for "int4", that of a name such as "d8s8v4", None
    for None. Raises `ValueError` for other names."""
    if name is None or (isinstance(name, str) and name == "int8"):
        return None if name is None else torch.int8
    require(isinstance(name, str), lambda: f"cache_dtype must be a name or None, got {type(name).__name__}")
    return CodeFormat() if name == "int4" else CodeFormat.named(name)


def index_bits(sparse_dims: int) -> int:
    """Bits of a packed index into a sparse part."""
    return max(1, (sparse_dims - 1).bit_length())


def packed_bytes(count: int, bits: int) -> int:
    """Of `count` numbers of `bits` bits, one after another."""
    return -(-count * bits // 8)


@functools.lru_cache(maxsize=256)  # each layer of each new cache asks
def _smallest_index(topk: int, sparse_dims: int) -> str:
    smallest = INDEX_FORMS[0]
    for form in INDEX_FORMS[1:]:  # a trace knows no `min` by a key
        if _index_bytes(form, topk, sparse_dims) < _index_bytes(smallest, topk, sparse_dims):
            smallest = form
    return smallest


def _index_bytes(form: str, topk: int, sparse_dims: int) -> int:
    if form == "uint8":
        return topk
    return packed_bytes(topk, index_bits(sparse_dims)) if form == "packed" else packed_bytes(sparse_dims, 1)


def _part_bytes(width: int, bits: int) -> int:
    scale = 2 if bits < 16 and width else 0
    return packed_bytes(width, bits) + scale

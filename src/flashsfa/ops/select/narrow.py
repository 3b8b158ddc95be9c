"""Rows in 8, 4 and 3 bits, and small numbers packed into bytes. Plain PyTorch for every device, without a host sync.

Rows are quantised against their scale as it is stored, in bfloat16: as wide a range as float32, and its rounding moves the
step, not the result. A row that holds NaN or infinity has a scale of NaN, and so is NaN when read.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_8_BIT = 127


def pack(numbers: Tensor, bits: int) -> Tensor:
    """`numbers` [..., n] uint8 below 2**bits, one after another from the lowest bit on: [..., ceil(n * bits / 8)] uint8."""
    if 8 % bits:  # some lie across two bytes: bit by bit
        numbers = (numbers[..., None] >> torch.arange(bits, device=numbers.device, dtype=torch.uint8) & 1).flatten(-2)
        bits = 1
    per_byte = 8 // bits
    numbers = torch.nn.functional.pad(numbers, (0, -numbers.shape[-1] % per_byte))
    packed = numbers[..., ::per_byte].clone(memory_format=torch.contiguous_format)
    for slot in range(1, per_byte):
        packed |= numbers[..., slot::per_byte] << slot * bits
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` numbers that `pack` wrote: [..., count] uint8."""
    mask = 2**bits - 1
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return (packed[..., None] >> shifts & mask).flatten(-2)[..., :count]
    first_bit = torch.arange(count, device=packed.device) * bits
    byte, shift = first_bit // 8, (first_bit % 8).to(torch.int16)
    next_byte = (byte + 1).clamp(max=packed.shape[-1] - 1)  # the last number needs none: its own byte again
    both = packed[..., byte].to(torch.int16) | packed[..., next_byte].to(torch.int16) << 8
    return (both >> shift & mask).to(torch.uint8)


def pack_3_bits(levels: Tensor) -> Tensor:
    """`levels` [..., C] uint8 below 8, C a multiple of 8, as [..., 3C / 8] uint8: all words of 16 bits, then all bytes.

    Eight levels that follow one another take a word and a byte: five in the word from its lowest bit on, two in the byte, and
    the last one's lowest bit in what the word has left, its others in what the byte has. So a kernel needs no more than a mask for most.
    """
    eights = levels.unflatten(-1, (-1, 8)).to(torch.int32) << _places_of_eight(levels.device)
    bits = eights.sum(-1, dtype=torch.int32)  # [..., C / 8], 24 of them
    word, byte = bits & 0x7FFF | bits >> 6 & 0x8000, bits >> 15 & 63 | bits >> 16 & 192
    return torch.cat((torch.stack((word & 255, word >> 8), -1).flatten(-2), byte), -1).to(torch.uint8)


def unpack_3_bits(packed: Tensor, width: int) -> Tensor:
    """The levels [..., width] that `pack_3_bits` wrote."""
    numbers = packed.to(torch.int32)
    (low, high), byte = numbers[..., : width // 4].unflatten(-1, (-1, 2)).unbind(-1), numbers[..., width // 4 :]
    bits = low | (high & 127) << 8 | (byte & 63) << 15 | high >> 7 << 21 | byte >> 6 << 22
    return (bits[..., None] >> _places_of_eight(packed.device) & 7).flatten(-2).to(torch.uint8)


def pack_bitmap(indices: Tensor, width: int) -> Tensor:
    """Ascending, distinct indices [..., K] uint8 below `width` as a bit each of [..., ceil(width / 8)] uint8."""
    bits = torch.zeros((*indices.shape[:-1], width), dtype=torch.uint8, device=indices.device)
    return pack(bits.scatter_(-1, indices.long(), 1), 1)


def unpack_bitmap(packed: Tensor, width: int, count: int) -> Tensor:
    """The indices [..., count] uint8 that `pack_bitmap` wrote. Other bitmaps give indices below `width`, whatever they hold."""
    bits = unpack(packed, 1, width).bool()
    slot = (bits.cumsum(-1) - 1).clamp(max=count).where(bits, count)  # those not set go past the end
    which = torch.arange(width, device=packed.device, dtype=torch.uint8).expand(slot.shape)
    return which.new_zeros((*slot.shape[:-1], count + 1)).scatter_(-1, slot, which)[..., :count]


def step_of(wide: Tensor, levels: float) -> Tensor:
    """[...] the step in which the largest magnitude of each float32 row of wide [..., C] is so many `levels`."""
    # By a number torch divides exactly on a CPU alone: a GPU multiplies by its reciprocal, and would hold other bits than the kernels write.
    largest = wide.abs().amax(-1)
    return largest / largest.new_full((), levels)


def to_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., C], C >= 1, in int8 and the bfloat16 scale [...] of each row: x ≈ int8 · scale, to half a scale."""
    wide = x.float()
    scale = _stored(step_of(wide, MOST_8_BIT))
    return _steps(wide, scale).round().clamp(-MOST_8_BIT, MOST_8_BIT).to(torch.int8), scale


def middle_of(bits: int) -> float:
    """What the levels 0 to 2**bits - 1 lie around."""
    return (2**bits - 1) / 2


def to_levels(x: Tensor, bits: int, centre: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [..., C], C >= 1, in 4 or 3 bits and the bfloat16 scale [...] of each row: x ≈ centre + (level - middle) · scale, to half a
    scale.

    The levels are packed: of 4 bits two per byte, of 3 bits as `pack_3_bits` does, for C a multiple of 8. Zero is no level around a
    centre of zero: it comes back as half a scale.
    """
    wide = x.float() if centre is None else x.float() - centre.float()[..., None]
    scale = _stored(step_of(wide, middle_of(bits)))
    levels = (_steps(wide, scale).floor() + 2 ** (bits - 1)).clamp(0, 2**bits - 1).to(torch.uint8)
    return pack_3_bits(levels) if bits == 3 else pack(levels, bits), scale


def from_levels(packed: Tensor, bits: int, width: int, dtype: torch.dtype) -> Tensor:
    """[..., width] levels less their middle, in `dtype`: times the scale, around the centre, the rows of `to_levels`."""
    levels = unpack_3_bits(packed, width) if bits == 3 else unpack(packed, bits, width)
    return levels.to(dtype) - middle_of(bits)


def centre_of(x: Tensor) -> Tensor:
    """[...] bfloat16 middle of the range of each row of x [..., C]."""
    low, high = x.float().aminmax(dim=-1)
    return (low / 2 + high / 2).to(torch.bfloat16)


def _places_of_eight(device: torch.device) -> Tensor:
    """The first bit of each of eight levels of three bits that follow one another."""
    return torch.arange(0, 24, 3, dtype=torch.int32, device=device)


def _stored(scale: Tensor) -> Tensor:
    return (scale + scale * 0).to(torch.bfloat16)  # infinity becomes NaN


def _steps(wide: Tensor, scale: Tensor) -> Tensor:
    """Rows in steps of their scale; zeros where that is zero or NaN."""
    scale = scale.float()[..., None]
    return (wide / scale).where(scale > 0, 0.0)

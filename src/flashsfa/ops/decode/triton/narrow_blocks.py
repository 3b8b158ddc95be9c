"""A block of keys or values of few bits in a decode kernel: levels are multiplied as they are stored, and scaled behind.

A key is a *channel*, a row that every key has, and beside it may be kept entries of other features. A channel comes in four
packings:

- 16: features as they came;
- 8: features in int8, one after another;
- 4: two features per byte, the even ones in the low halves;
- 2: slots of two bits, four per byte. An axis of 2, 4 or 8 bits starts in one and covers the next ones; it is masked out of its byte.

The parts of a byte are not put side by side: each is a block of its own, multiplied by its own part of the query. A level
becomes a float by one operation on its bits: set below the exponent of a power of two, it is that power plus the level. In float16 the
power is 1024, for what lies in the high half of a byte 64. What a level is then too large by goes with the query alone, so
`narrow_query_kernel` finds one number per query row for it, in the query as it was rounded: no error is added. Steps of
axes go into the query too; scales of rows are taken behind the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import query_row, rotated, ruled_scores

_LARGEST = tl.constexpr(256.0)  # folded queries in float16 are largest around here: the smallest then keep their digits


@triton.jit
def narrow_query_kernel(
    BY_FEATURE, TERMS, AXIS, IS_START, TOP, STEP, CENTRE, Q, q_sb, q_sh, q_sm, q_sd, kv_heads, group, m,
    D: tl.constexpr, DENSE: tl.constexpr, K: tl.constexpr, R: tl.constexpr, INTEGER: tl.constexpr, CHUNK: tl.constexpr,
    C: tl.constexpr, BITS: tl.constexpr, ROTATION: tl.constexpr,
):  # fmt: skip
    """One query row for a channel of levels, in the order of their places, rotated where keys are.

    It is scaled by a power of two, so that float16 has room for it. `TERMS` [heads, 3, R]: that power; the products of the query
    with what levels are too large by; and its sum, which the centre of a row goes with.
    """
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x = query_row(Q, head, row, q_sb, q_sh, q_sm, q_sd, kv_heads, group, m, D, DENSE, K, INTEGER, CHUNK).to(tl.float32)
    DTYPE: tl.constexpr = BY_FEATURE.dtype.element_ty
    d = tl.arange(0, x.shape[0])
    if ROTATION > 1:
        x = rotated(x, d, ROTATION)
    excess = 0.0
    if BITS == 2:
        h = head % kv_heads
        centre = tl.load(CENTRE + h * D + d, mask=d < D, other=0.0)
        excess -= tl.sum(tl.where(d < D, x * centre, 0.0), 0)
        x *= tl.load(STEP + h * D + d, mask=d < D, other=0.0)
    largest = tl.max(tl.abs(x), 0)
    power = tl.exp2(tl.floor(tl.log2(tl.where((largest > 2.0**-90) & (largest < 2.0**90), largest, 1.0)))) / _LARGEST
    x /= power
    excess /= power
    TABLE: tl.constexpr = C if BITS == 2 else D
    place = d
    if BITS == 2:  # an axis to the slot that it starts in
        place = tl.arange(0, triton.next_power_of_2(C))
        axis = tl.load(AXIS + h * C + place, mask=place < C, other=0).to(tl.int32)
        starts = tl.load(IS_START + h * C + place, mask=place < C, other=0) > 0
        unit = tl.exp2((place % 4 * 2).to(tl.float32))  # of a level that is not moved to the lowest bits of its byte
        x = (tl.where(starts, tl.gather(x, axis, 0), 0.0) / unit).to(DTYPE)
        half = tl.load(TOP + h * D + axis).to(tl.float32) * 0.5 * unit  # the centre is that of the range of the levels
        middle = tl.where(starts, half, 0.0) + level_zero(DTYPE, 0)
    else:
        x = x.to(DTYPE)
        middle = tl.where(
            place % 2 == 0,
            level_zero(DTYPE, 0 if BITS == 4 else 7),
            level_zero(DTYPE, 4 if BITS == 4 else 7),
        )
        middle += 7.5 if BITS == 4 else 0.0
    channel = tl.where(place < C, x.to(tl.float32), 0.0)
    tl.store(TERMS + head * 3 * R + row, power)
    tl.store(TERMS + (head * 3 + 1) * R + row, excess + tl.sum(channel * middle, 0))
    tl.store(TERMS + (head * 3 + 2) * R + row, tl.sum(channel, 0))
    tl.store(BY_FEATURE + (head * TABLE + place) * R + row, x, mask=place < TABLE)


@triton.constexpr_function
def level_zero(dtype, bit):
    """What `from_levels` makes of level 0 from `bit` on; for bit 7 of signed levels."""
    return {0: 1024.0, 4: 64.0, 7: 1152.0}[bit] if str(dtype) == "fp16" else 0.0


@triton.jit
def from_levels(x, DTYPE: tl.constexpr, BIT: tl.constexpr):
    """Levels in bytes x as numbers in `DTYPE`, larger by `level_zero`: unsigned from bit 0 or in bits 4 to 7 alone; signed (7)."""
    if tl.float16 == DTYPE:
        if BIT == 4:
            return (x.to(tl.int16) | 0x5400).to(tl.float16, bitcast=True)
        elif BIT == 7:
            return ((x.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
        else:
            return (x.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
    elif BIT == 4:
        return (x >> 4).to(DTYPE)
    else:
        return x.to(DTYPE)


@triton.jit
def narrow_scores(
    q, terms, channel, channel_scale, channel_centre, values, value_scale, indices, axis, is_start, top,
    key, live, first_row, length, m, window, scale, cap,
    S: tl.constexpr, C: tl.constexpr, BITS: tl.constexpr, K: tl.constexpr, INDEX_BITS: tl.constexpr, R: tl.constexpr,
    RT: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr, KC: tl.constexpr,
):  # fmt: skip
    """Scores [BN, RT] in log2 units of the keys at the row pointers [BN], -inf where a query does not see a key."""
    score = tl.zeros([key.shape[0], RT], tl.float32)
    if C > 0:
        score = _channel(q, channel, axis, is_start, top, live, C, BITS, R, RT)
        if BITS < 16:
            score -= tl.load(terms + R)[None, :]
        if channel_scale is not None:
            score *= tl.load(channel_scale, mask=live, other=0.0).to(tl.float32)[:, None]
        if channel_centre is not None:
            centre = tl.load(channel_centre, mask=live, other=0.0).to(tl.float32)
            score += centre[:, None] * tl.load(terms + 2 * R)[None, :]
    if K > 0:
        if INDEX_BITS == 0:
            kept = _counted(q + C * R, values, indices, live, S, K, R, RT)
        else:
            kept = _gathered(q + C * R, values, indices, live, S, K, INDEX_BITS, R, RT, KC)
        if value_scale is not None:
            kept *= tl.load(value_scale, mask=live, other=0.0).to(tl.float32)[:, None]
        score += kept
    if terms is not None:
        score *= tl.load(terms)[None, :]
    return ruled_scores(score, key, live, first_row, length, m, window, scale, cap, RT, CAUSAL, CAPPED, WINDOW)


@triton.jit
def _channel(
    q, row, axis, is_start, top, live, C: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr, RT: tl.constexpr
):  # fmt: skip
    """Products [BN, RT] of the query rows at q [RT] and of the channels at `row` [BN]."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    PARTS: tl.constexpr = 8 // BITS if BITS < 8 else 1  # of a byte
    STORED: tl.constexpr = C // PARTS
    DP: tl.constexpr = _chunk(DTYPE.primitive_bitwidth, STORED)
    score = tl.zeros([live.shape[0], RT], tl.float32)
    for first in tl.static_range(0, STORED, DP):
        c = first + tl.arange(0, DP)
        held = tl.load(row[:, None] + c[None, :], mask=live[:, None] & (c < STORED)[None, :], other=0)  # [BN, DP]
        for part in tl.static_range(0, PARTS):
            place = PARTS * c + part
            if BITS == 2:
                of = tl.load(axis + place, mask=place < C, other=0)
                field = tl.load(top + of) << part * 2
                field = tl.where(tl.load(is_start + place, mask=place < C, other=0) > 0, field, 0)
                x = from_levels(held & field[None, :], DTYPE, 0)
            elif BITS == 4:
                x = from_levels(held & (15 if part == 0 else 240), DTYPE, 4 * part)
            elif BITS == 8:
                x = from_levels(held, DTYPE, 7)
            else:
                x = held.to(DTYPE)
            query = tl.load(q[None, :] + place[:, None] * R, mask=(place < C)[:, None], other=0.0)  # [DP, RT]
            score = tl.dot(x, query, score, input_precision="ieee")
    return score


@triton.constexpr_function
def _chunk(bits, width):
    """Stored columns multiplied at a time: all, but without matrix units, of which a thread holds what it multiplies, 16."""
    return 16 if bits == 32 else max(16, triton.next_power_of_2(width))


@triton.jit
def _gathered(
    q, values, indices, live, S: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr, RT: tl.constexpr,
    KC: tl.constexpr,
):  # fmt: skip
    """Products [BN, RT] of the K kept entries of S features, from the matching features of the queries at q [RT]."""
    products = tl.zeros([live.shape[0], KC, RT], tl.float32)
    if K <= 8 * KC:
        for first in tl.static_range(0, K, KC):
            products += _kept(q, values, indices, live, first, S, K, BITS, R, KC)
    else:  # unrolled, more steps would not fit the registers
        for first in range(0, K, KC):
            products += _kept(q, values, indices, live, first, S, K, BITS, R, KC)
    return tl.sum(products, 1)


@triton.jit
def _kept(
    q, values, indices, live, first, S: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr,
    KC: tl.constexpr,
):  # fmt: skip
    """Products [BN, KC, RT] of the entries `first` to first + KC, whose indices take `BITS` each."""
    k = first + tl.arange(0, KC)
    inside = live[:, None] & (k < K)[None, :]  # [BN, KC]
    index = tl.load(indices[:, None] + (k * BITS // 8)[None, :], mask=inside, other=0).to(tl.int32)
    if BITS < 8:
        bit = k * BITS % 8
        crosses = inside & (bit + BITS > 8)[None, :]  # into the next byte, which others need not have
        behind = tl.load(indices[:, None] + (k * BITS // 8 + 1)[None, :], mask=crosses, other=0).to(tl.int32)
        index = ((index | behind << 8) >> bit[None, :]) & (2**BITS - 1)
    value = _entry(values[:, None], k[None, :], inside)
    feature = tl.minimum(index, S - 1)  # a corrupt index must not read outside of q
    return tl.load(q[None, None, :] + feature[:, :, None] * R).to(tl.float32) * value[:, :, None]


@triton.jit
def _counted(q, values, bitmap, live, S: tl.constexpr, K: tl.constexpr, R: tl.constexpr, RT: tl.constexpr):
    """As `_gathered`, of entries whose places are bits: a key takes its lowest bit at each step."""
    BYTES: tl.constexpr = (S + 7) // 8
    WORDS: tl.constexpr = (BYTES + 7) // 8
    first, second = _word(bitmap, live, 0, BYTES), _word(bitmap, live, 1, BYTES)
    third, fourth = _word(bitmap, live, 2, BYTES), _word(bitmap, live, 3, BYTES)
    score = tl.zeros([live.shape[0], RT], tl.float32)
    base = tl.zeros([live.shape[0]], tl.int32)
    for k in tl.range(0, K, loop_unroll_factor=4):
        for _ in tl.static_range(0, WORDS - 1):  # one that is used up gives way to the next
            is_empty = first == 0
            first, second = tl.where(is_empty, second, first), tl.where(is_empty, third, second)
            third, fourth = tl.where(is_empty, fourth, third), tl.where(is_empty, 0, fourth)
            base += tl.where(is_empty, 64, 0)
        lowest = (first & (0 - first)).to(tl.uint64, bitcast=True).to(tl.float32)
        bit = (lowest.to(tl.int32, bitcast=True) >> 23) - 127  # the exponent of a power of two
        feature = tl.minimum(tl.maximum(base + bit, 0), S - 1)
        value = _entry(values, k, first != 0)
        score += tl.load(q[None, :] + feature[:, None] * R).to(tl.float32) * value[:, None]
        first &= first - 1
    return score


@triton.jit
def _word(bitmap, live, place: tl.constexpr, BYTES: tl.constexpr):
    """Eight bytes [BN] of the bitmaps at [BN], 0 past their end. They need not be aligned."""
    word = tl.zeros([live.shape[0]], tl.int64)
    for part in tl.static_range(0, 8):
        if place * 8 + part < BYTES:
            word |= tl.load(bitmap + place * 8 + part, mask=live, other=0).to(tl.int64) << (8 * part)
    return word


@triton.jit
def _entry(values, k, inside):
    """The kept entries k of the rows at `values` in float32; 0 outside."""
    if values.dtype.element_ty == tl.uint8:  # two per byte
        level = (tl.load(values + k // 2, mask=inside, other=0).to(tl.int32) >> (k % 2 * 4)) & 15
        return tl.where(inside, level.to(tl.float32) - 7.5, 0.0)
    else:
        return tl.load(values + k, mask=inside, other=0).to(tl.float32)


@triton.jit
def add_values(
    p, v, v_scale, v_centre, live, low, high, unit, shrink, DTYPE: tl.constexpr, DV: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """The weighted values of a block added to what came before: low [RT, W], high [RT, W or 1], in units of `unit`.

    Args:
        p: [BN, RT] weights.
        v, v_scale, v_centre: row pointers [BN].
        low, high: sums of the columns; of 4 bits the even and the odd ones, else `low` has all. Both shrink by
            `shrink` [RT] first.
        unit: scalar, the largest scale of a row so far: a weight times its scale stays within the range of float16.
    """
    if BITS == 3:
        held = _eights(v, live, low.shape[1], DV)  # [BN, W]
    else:
        STORED: tl.constexpr = DV // 2 if BITS == 4 else DV
        c = tl.arange(0, low.shape[1])
        held = tl.load(v[:, None] + c[None, :], mask=live[:, None] & (c < STORED)[None, :], other=0)  # [BN, W]
    if v_scale is None:
        low = tl.dot(tl.trans(p).to(DTYPE), held.to(DTYPE), low * shrink[:, None], input_precision="ieee")
    else:
        step = tl.load(v_scale, mask=live, other=0.0).to(tl.float32)  # [BN]
        larger = tl.maximum(unit, tl.max(tl.where(step < 2.0**100, step, 0.0), 0))
        shrink *= unit / larger
        unit = larger
        weights = tl.trans(p * (step / unit)[:, None]).to(DTYPE)  # [RT, BN]
        mass = tl.sum(weights.to(tl.float32), 1)  # [RT]
        # what levels are too large by is taken off before they are added, so that sums never grow by it
        level = 0.0
        if v_centre is not None:
            centre = tl.load(v_centre, mask=live, other=0.0).to(tl.float32) / unit
            level = tl.sum(p * centre[:, None], 0) - (2**BITS - 1) / 2 * mass
        if BITS == 4:
            low = low * shrink[:, None] + (level - level_zero(DTYPE, 0) * mass)[:, None]
            low = tl.dot(weights, from_levels(held & 15, DTYPE, 0), low, input_precision="ieee")
            high = high * shrink[:, None] + (level - level_zero(DTYPE, 4) * mass)[:, None]
            high = tl.dot(weights, from_levels(held & 240, DTYPE, 4), high, input_precision="ieee")
        else:
            FIRST: tl.constexpr = 0 if BITS == 3 else 7
            low = low * shrink[:, None] + (level - level_zero(DTYPE, FIRST) * mass)[:, None]
            low = tl.dot(weights, from_levels(held, DTYPE, FIRST), low, input_precision="ieee")
    return low, high, unit


@triton.jit
def _eights(v, live, W: tl.constexpr, DV: tl.constexpr):
    """The levels [BN, W] of rows of 3 bits at v [BN]: eight in a word of 16 bits and a byte, as `pack_3_bits` lays them."""
    eight = tl.arange(0, W // 8)
    inside = live[:, None] & (eight < DV // 8)[None, :]
    low = tl.load(v[:, None] + (2 * eight)[None, :], mask=inside, other=0).to(tl.int32)  # [BN, W / 8]
    high = tl.load(v[:, None] + (2 * eight + 1)[None, :], mask=inside, other=0).to(tl.int32)
    byte = tl.load(v[:, None] + (DV // 4 + eight)[None, :], mask=inside, other=0).to(tl.int32)
    bits = low | (high & 127) << 8 | (byte & 63) << 15 | high >> 7 << 21 | byte >> 6 << 22
    levels = bits[:, :, None] >> (3 * tl.arange(0, 8))[None, None, :] & 7  # [BN, W / 8, 8]
    return tl.reshape(levels.to(tl.uint8), (v.shape[0], W))


@triton.jit
def store_values(at, low, high, unit, DV: tl.constexpr, HALVES: tl.constexpr):
    """Write the output [RT, DV] that `add_values` summed to the rows at [RT]."""
    c = tl.arange(0, low.shape[1])
    if HALVES:
        inside = (c < DV // 2)[None, :]
        tl.store(at[:, None] + 2 * c[None, :], low * unit, mask=inside)
        tl.store(at[:, None] + 2 * c[None, :] + 1, high * unit, mask=inside)
    else:
        tl.store(at[:, None] + c[None, :], low * unit, mask=(c < DV)[None, :])

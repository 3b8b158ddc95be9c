"""A block of keys or values of few bits in a decode kernel: levels are multiplied as they are stored, and scaled behind.

A key is a *channel*, a row of features that every key has, and beside it may be kept entries of other features. A channel
comes in three packings, told by the tensors that go with it:

- features of 16 or 8 bits, one after another;
- with a centre: two of 4 bits per byte. The low halves are the even features, the high halves the odd ones. Each half is a
  block of its own, multiplied by its own half of the query, so that no feature has to change its place;
- with places: axes of any width, each at its byte, shift and mask.

Levels are small whole numbers, exact in every dtype. What they are scaled by goes into the query (steps of axes), or behind the
product (scales of rows). That they count from their lowest, not from their middle, is put right by one number per query row, which
`decode_query_kernel` finds in the query as it was rounded, so that no error is added.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import ruled_scores


@triton.jit
def rows_of(X, outer, h, slot, sb, sh, sn: tl.constexpr):
    """Pointers [BN] to the rows of a cache tensor; None for none."""
    if X is None:
        return None
    else:
        return X + outer * sb + h * sh + slot * sn


@triton.jit
def narrow_scores(
    q, terms, channel, channel_scale, channel_centre, values, value_scale, indices, byte, shift, top,
    key, live, first_row, length, m, window, scale, cap,
    D: tl.constexpr, C: tl.constexpr, K: tl.constexpr, INDEX_BITS: tl.constexpr, R: tl.constexpr, RT: tl.constexpr,
    CAUSAL: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr, KC: tl.constexpr,
):  # fmt: skip
    """Scores [BN, RT] in log2 units of the keys at the row pointers [BN], -inf where a query does not see a key."""
    score = tl.zeros([key.shape[0], RT], tl.float32)
    if C > 0:
        score += _channel(q, channel, byte, shift, top, channel_centre is not None, live, C, R, RT)
        if channel_scale is not None:
            step = tl.load(channel_scale, mask=live, other=0.0).to(tl.float32)  # [BN]
            score *= step[:, None]
            if channel_centre is not None:
                middle = tl.load(channel_centre, mask=live, other=0.0).to(tl.float32) - 7.5 * step
                score += middle[:, None] * tl.load(terms + R)[None, :]
        elif terms is not None:
            score += tl.load(terms + R)[None, :]
        if terms is not None:
            score *= tl.load(terms)[None, :]
    if K > 0:
        if INDEX_BITS == 0:
            kept = _bitmap(q + C * R, values, indices, live, D - C, K, R, RT)
        else:
            kept = _gathered(q + C * R, values, indices, live, D - C, K, INDEX_BITS, R, RT, KC)
        if value_scale is not None:
            kept *= tl.load(value_scale, mask=live, other=0.0).to(tl.float32)[:, None]
        score += kept
    return ruled_scores(score, key, live, first_row, length, m, window, scale, cap, RT, CAUSAL, CAPPED, WINDOW)


@triton.jit
def _channel(
    q, row, byte, shift, top, HALVES: tl.constexpr, live, C: tl.constexpr, R: tl.constexpr, RT: tl.constexpr
):  # fmt: skip
    """Products [BN, RT] of the query rows at q [RT] and of the levels at `row` [BN]."""
    score = tl.zeros([live.shape[0], RT], tl.float32)
    STORED: tl.constexpr = C // 2 if HALVES else C
    DP: tl.constexpr = _chunk(q.dtype.element_ty.primitive_bitwidth, STORED)
    for first in tl.static_range(0, STORED, DP):
        d = first + tl.arange(0, DP)
        inside = live[:, None] & (d < STORED)[None, :]
        if HALVES:
            levels = tl.load(row[:, None] + d[None, :], mask=inside, other=0)
            score += _product(levels & 15, q, 2 * d, C, R, RT)
            score += _product(levels >> 4, q, 2 * d + 1, C, R, RT)
        elif byte is not None:
            at = tl.load(byte + d, mask=d < C, other=0)
            mask = tl.load(top + d, mask=d < C, other=0)
            inside &= (mask > 0)[None, :]
            levels = tl.load(row[:, None] + at[None, :], mask=inside, other=0)
            move = tl.load(shift + d, mask=d < C, other=0)
            score += _product((levels >> move[None, :]) & mask[None, :], q, d, C, R, RT)
        else:
            score += _product(tl.load(row[:, None] + d[None, :], mask=inside, other=0), q, d, C, R, RT)
    return score


@triton.constexpr_function
def _chunk(bits, width):
    """Features multiplied at a time: all, but without matrix units, of which a thread holds what it multiplies, 16."""
    return 16 if bits == 32 else max(16, triton.next_power_of_2(width))


@triton.jit
def _product(x, q, feature, C: tl.constexpr, R: tl.constexpr, RT: tl.constexpr):
    """Products [BN, RT] of features [DP] of the query rows at q [RT] and x [BN, DP]."""
    query = tl.load(q[None, :] + feature[:, None] * R, mask=(feature < C)[:, None], other=0.0)  # [DP, RT]
    if RT == 1:
        return tl.sum(x.to(tl.float32) * tl.trans(query).to(tl.float32), 1)[:, None]
    else:
        return tl.dot(x.to(query.dtype), query, input_precision="ieee")


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
    """Products [BN, KC, RT] of the entries `first` to first + KC."""
    k = first + tl.arange(0, KC)
    inside = live[:, None] & (k < K)[None, :]  # [BN, KC]
    index = tl.load(indices[:, None] + (k * BITS // 8)[None, :], mask=inside, other=0).to(tl.int32)
    if BITS < 8:
        bit = k * BITS % 8
        crosses = inside & (bit + BITS > 8)[None, :]  # into the next byte, which others need not have
        behind = tl.load(indices[:, None] + (k * BITS // 8 + 1)[None, :], mask=crosses, other=0).to(tl.int32)
        index = ((index | behind << 8) >> bit[None, :]) & (2**BITS - 1)
    value = _entry(values, k[None, :], inside)
    feature = tl.minimum(index, S - 1)  # a corrupt index must not read outside of q
    return tl.load(q[None, None, :] + feature[:, :, None] * R).to(tl.float32) * value[:, :, None]


@triton.jit
def _entry(values, k, inside):
    """The kept entries k [BN, C] of the rows at `values` [BN] in float32; 0 outside."""
    if values.dtype.element_ty == tl.uint8:  # two per byte
        both = tl.load(values[:, None] + k // 2, mask=inside, other=0).to(tl.int32)
        level = (both >> (k % 2 * 4)) & 15
        return tl.where(inside, level.to(tl.float32) - 7.5, 0.0)
    else:
        return tl.load(values[:, None] + k, mask=inside, other=0).to(tl.float32)


@triton.jit
def _bitmap(q, values, bitmap, live, S: tl.constexpr, K: tl.constexpr, R: tl.constexpr, RT: tl.constexpr):
    """As `_gathered`, of entries whose places are bits: a block of all S features, each with its entry at the rank of its bit."""
    SP: tl.constexpr = max(16, triton.next_power_of_2(S))
    c = tl.arange(0, SP // 8)
    held = tl.load(bitmap[:, None] + c[None, :], mask=live[:, None] & (c < (S + 7) // 8)[None, :], other=0)  # [BN, SP / 8]
    bits = (held[:, :, None].to(tl.int32) >> tl.arange(0, 8)[None, None, :]) & 1
    bits = tl.reshape(bits, [live.shape[0], SP])
    rank = tl.cumsum(bits, 1) - 1
    d = tl.arange(0, SP)
    entries = _entry(values, rank, (bits > 0) & (rank < K) & (d < S)[None, :])
    DP: tl.constexpr = SP
    return _product(entries.to(q.dtype.element_ty), q, tl.arange(0, DP), S, R, RT)


@triton.jit
def add_values(
    p, v, v_scale, v_centre, live, low, high, level,
    DTYPE: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """The weighted values of a block added to what came before: low [RT, W], high [RT, W or 1] and level [RT].

    Args:
        p: [BN, RT] weights.
        v, v_scale, v_centre: row pointers [BN].
        low, high: sums of the stored columns; of 4 bits the even and the odd ones, else `low` has all.
        level: what all columns have beside.
    """
    STORED: tl.constexpr = DV if v_centre is None else DV // 2
    c = tl.arange(0, low.shape[1])
    stored = tl.load(v[:, None] + c[None, :], mask=live[:, None] & (c < STORED)[None, :], other=0)  # [BN, W]
    unit = 1.0
    if v_scale is not None:
        step = tl.load(v_scale, mask=live, other=0.0).to(tl.float32)  # [BN]
        if v_centre is not None:
            level += tl.sum(p * tl.load(v_centre, mask=live, other=0.0).to(tl.float32)[:, None], 0)
        if tl.float16 == DTYPE:  # a weight times the scale of its row can leave its range
            unit = tl.max(step, 0)
            unit = tl.where((unit > 2.0**-100) & (unit < 2.0**100), unit, 1.0)
            step /= unit
        p *= step[:, None]
    weights = tl.trans(p).to(DTYPE)  # [RT, BN]
    if v_centre is not None:
        level -= 7.5 * unit * tl.sum(weights.to(tl.float32), 1)  # levels count from their lowest
        low = _weighed(weights, (stored & 15).to(DTYPE), low, unit)
        high = _weighed(weights, (stored >> 4).to(DTYPE), high, unit)
    else:
        low = _weighed(weights, stored.to(DTYPE), low, unit)
    return low, high, level


@triton.jit
def _weighed(weights, v, acc, unit):
    """acc [RT, W] + unit · weights [RT, BN] · v [BN, W]."""
    if weights.dtype == tl.float16:
        return acc + unit * tl.dot(weights, v)
    else:
        return tl.dot(weights, v, acc, input_precision="ieee")


@triton.jit
def store_values(at, low, high, level, DV: tl.constexpr, HALVES: tl.constexpr):
    """Write the output [RT, DV] that `add_values` summed to the rows at [RT]."""
    c = tl.arange(0, low.shape[1])
    if HALVES:
        inside = (c < DV // 2)[None, :]
        tl.store(at[:, None] + 2 * c[None, :], low + level[:, None], mask=inside)
        tl.store(at[:, None] + 2 * c[None, :] + 1, high + level[:, None], mask=inside)
    else:
        tl.store(at[:, None] + c[None, :], low, mask=(c < DV)[None, :])

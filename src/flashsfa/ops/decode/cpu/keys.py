"""Pass one: scores of chunks of coded keys for all query rows (query heads x query tokens) of a kv head.

A key is held as features, in the dtype of the queries or in 8 bits with a scale, or in levels of fewer bits. The latter are looked
up, not widened: a score is a sum over the key's half bytes, each of which can only take 16 values, so a table of what each
of them adds is made once per chunk and head.

Four query rows are scored together: a table holds what they share of a feature side by side.
"""

from __future__ import annotations

import numpy as np
import torch

from ...cpu.machine import jit, lowest_bit, prange, widen
from ...cpu.parts import Part, entries, is_there, like, place
from ...cpu.threads import Kernel
from .parts import Features, Levels, Seen
from .softmax import capped
from .tasks import chunk_of, tasks_per_head
from .vectors import add, add_scaled, filled4, load4, write_lanes

_SCORE_KEYS = 128  # keys scored for all rows before the next: their codes stay in the first-level cache
_LANES = 4  # query rows scored together
_TABLE_ROWS = 256  # a row for each uint8, so that no index can leave the table
_HALF = 16  # values of half a byte
# in entries of the table: the upper half of a byte, and the next byte; and what finds a half byte's row
_UPPER, _BYTE = np.uint64(_HALF * _LANES), np.uint64(2 * _HALF * _LANES)
_LOWER_BITS, _ROW_BITS, _TWO = np.uint64(15), np.uint64(15 * _LANES), np.uint64(2)
_UINT8, _FLOAT32, _BFLOAT16 = map(like, (torch.uint8, torch.float32, torch.bfloat16))
NO_INDICES, UINT8, PACKED, BITMAP = range(4)


def _score_features(q, like, at, topk, dense_dims, first, last, padding, kv_heads, n_first, n, cap, scores):
    """scores [heads, R, n] of coded keys, for q [heads, R, D] with the scale in it, of B·Hkv heads. `at` [4, 4] tells where the parts
    of `Features` lie, the first and third like `like`; further arguments are those of `Features` and `Seen`."""
    per_head = tasks_per_head(n)
    for task in prange(len(q) * per_head):
        _score_chunk(
            np.int64(task),
            per_head,
            q,
            like,
            at,
            topk,
            dense_dims,
            first,
            last,
            padding,
            kv_heads,
            n_first,
            n,
            cap,
            scores,
        )  # signed, as numba else compiles it twice


score_features = Kernel(_score_features)


def _score_levels(
    q, scale_like, at, level_bytes, byte, shift, bits, step, middle, is_signed, value_bits, index_bytes, form, index_bits, topk, dense_dims,
    first, last, padding, kv_heads, n_first, n, cap, scores,
):  # fmt: skip
    """As `_score_features`, for keys in `Levels`, whose parts lie at `at` [6, 4], with a scale like `scale_like`."""
    per_head = tasks_per_head(n)
    for task in prange(len(q) * per_head):
        _score_levels_of_chunk(
            np.int64(task), per_head, q, scale_like, at, level_bytes, byte, shift, bits, step, middle, is_signed, value_bits, index_bytes, form,
            index_bits, topk, dense_dims, first, last, padding, kv_heads, n_first, n, cap, scores,
        )  # fmt: skip


score_levels = Kernel(_score_levels)


@jit()
def _finish(q, seen, cap, b, start, end, scores):
    """Cap scores [R, n] of the keys start to end, and hide those that the row's query does not see. NaN in q [R, D] shows in each
    score, as in a dense product."""
    token, m = seen.n_first + start, seen.first.shape[1]
    hidden = seen.padding[b, token : token + end - start]
    for row in range(len(scores)):
        line = scores[row, start:end]
        poison = np.float32(0)
        for u in range(q.shape[1]):
            poison += q[row, u] * np.float32(0)
        if poison != 0:
            line[:] = poison
        if cap > 0:
            for key in range(len(line)):
                line[key] = capped(line[key], cap)
        line[: max(0, seen.first[b, row % m] - token)] = -np.inf
        line[max(0, seen.last[b, row % m] - token) :] = -np.inf
        for key in range(len(hidden)):
            if hidden[key]:
                line[key] = -np.inf


@jit()
def _scale_keys(scale, b, h, start, end, scores, row, rows):
    """Multiply the scores of the keys start to end by their factors, for rows from `row` on."""
    factors = entries(scale)
    for r in range(row, row + rows):
        for key in range(start, end):
            scores[r, key] *= widen(factors[place(scale, b, h, key)])


@jit()
def _feature_table(q, first):
    """q [up to 4, D] from feature `first` on, transposed so that a feature finds all lanes together, in one dimension."""
    table = np.zeros(_TABLE_ROWS * _LANES, np.float32)
    for lane in range(len(q)):
        for u in range(q.shape[1] - first):
            table[u * _LANES + lane] = q[lane, first + u]
    return table


# ---- features


@jit()
def _score_chunk(
    task, per_head, q, like, at, topk, dense_dims, first, last, padding, kv_heads, n_first, n, cap, scores
):
    seen = Seen(first, last, padding, kv_heads, n_first, n)
    keys = Features(Part(like, at[0]), Part(_UINT8, at[1]), Part(like, at[2]), Part(_FLOAT32, at[3]), topk, dense_dims)
    head, b, h, start, end = chunk_of(task, per_head, seen)
    for row in range(0, q.shape[1], _LANES):
        lanes = q[head, row : row + _LANES]
        table, dense_table = _feature_table(lanes, dense_dims), _feature_table(lanes, 0)
        for block in range(start, end, _SCORE_KEYS):
            _score_lanes(table, dense_table, keys, b, h, block, min(block + _SCORE_KEYS, end), scores[head], row)
    if is_there(keys.scale):
        _scale_keys(keys.scale, b, h, start, end, scores[head], 0, q.shape[1])
    _finish(q[head], seen, cap, b, start, end, scores[head])


@jit()
def _score_lanes(table, dense_table, keys, b, h, start, end, scores, row):
    """scores [R, n] of the keys start to end for up to four rows from `row` on: each code entry is read once for all."""
    values, indices, dense = entries(keys.values), entries(keys.indices), entries(keys.dense)
    four, last = np.uint64(_LANES), end - 1
    for k0 in range(start, end, 4):  # four keys at a time, so that no sum waits for its last product
        k1, k2, k3 = min(k0 + 1, last), min(k0 + 2, last), min(k0 + 3, last)
        s0 = s1 = s2 = s3 = filled4(0)
        v0, v1 = place(keys.values, b, h, k0), place(keys.values, b, h, k1)
        v2, v3 = place(keys.values, b, h, k2), place(keys.values, b, h, k3)
        i0, i1 = place(keys.indices, b, h, k0), place(keys.indices, b, h, k1)
        i2, i3 = place(keys.indices, b, h, k2), place(keys.indices, b, h, k3)
        for u in range(np.uint64(keys.topk)):
            s0 = add_scaled(s0, load4(table, four * np.uint64(indices[i0 + u])), widen(values[v0 + u]))
            s1 = add_scaled(s1, load4(table, four * np.uint64(indices[i1 + u])), widen(values[v1 + u]))
            s2 = add_scaled(s2, load4(table, four * np.uint64(indices[i2 + u])), widen(values[v2 + u]))
            s3 = add_scaled(s3, load4(table, four * np.uint64(indices[i3 + u])), widen(values[v3 + u]))
        d0, d1 = place(keys.dense, b, h, k0), place(keys.dense, b, h, k1)
        d2, d3 = place(keys.dense, b, h, k2), place(keys.dense, b, h, k3)
        for u in range(np.uint64(keys.dense_dims)):
            q = load4(dense_table, four * u)
            s0 = add_scaled(s0, q, widen(dense[d0 + u]))
            s1 = add_scaled(s1, q, widen(dense[d1 + u]))
            s2 = add_scaled(s2, q, widen(dense[d2 + u]))
            s3 = add_scaled(s3, q, widen(dense[d3 + u]))
        write_lanes(scores, row, k0, s0)
        write_lanes(scores, row, k1, s1)
        write_lanes(scores, row, k2, s2)
        write_lanes(scores, row, k3, s3)


# ---- levels


@jit()
def _score_levels_of_chunk(
    task, per_head, q, scale_like, at, level_bytes, byte, shift, bits, step, middle, is_signed, value_bits, index_bytes, form,
    index_bits, topk, dense_dims, first, last, padding, kv_heads, n_first, n, cap, scores,
):  # fmt: skip
    seen = Seen(first, last, padding, kv_heads, n_first, n)
    keys = Levels(
        Part(_UINT8, at[0]), level_bytes, byte, shift, bits, step, middle, is_signed, Part(scale_like, at[1]),
        Part(_BFLOAT16, at[2]), Part(_UINT8, at[3]), value_bits, Part(_UINT8, at[4]), index_bytes, form, index_bits, topk,
        dense_dims, Part(_BFLOAT16, at[5]),
    )  # fmt: skip
    head, b, h, start, end = chunk_of(task, per_head, seen)
    for row in range(0, q.shape[1], _LANES):
        lanes = q[head, row : row + _LANES]
        _look_up(_half_byte_table(lanes, keys, h), keys, b, h, start, end, scores[head], row)
        _scale_levels(lanes, keys, b, h, start, end, scores[head], row)
        if form != NO_INDICES:
            _add_sparse(_feature_table(lanes, dense_dims), keys, b, h, start, end, scores[head], row)
    _finish(q[head], seen, cap, b, start, end, scores[head])


@jit()
def _half_byte_table(q, keys, h):
    """What each half byte of a key adds to the scores of q [up to 4, D], the lower half of a byte first: four lanes for each of its
    16 values, in one dimension. Levels count from their middle, so that no large sums cancel."""
    own = h % len(keys.byte)  # all heads may share their fields
    byte, shift, bits, step = keys.byte[own], keys.shift[own], keys.bits[own], keys.step[own]
    table = np.zeros((2 * keys.level_bytes * _HALF, _LANES), np.float32)
    for feature in range(len(byte)):
        if bits[feature] == 0:
            continue
        lower = byte[feature] * 2 * _HALF
        for lane in range(len(q)):
            unit = q[lane, feature] * step[feature]
            if bits[feature] == 8:
                for x in range(_HALF):
                    table[lower + x, lane] += unit * (np.float32(x) - np.float32(7.5))
                    high = (x ^ 8) if keys.is_signed else x  # two's complement: -8 to 7, counted from its middle
                    table[lower + _HALF + x, lane] += unit * (np.float32(_HALF) * (np.float32(high) - np.float32(7.5)))
            else:
                half = lower + (_HALF if shift[feature] >= 4 else 0)
                highest = (1 << bits[feature]) - 1
                for x in range(_HALF):
                    level = (x >> (shift[feature] & 3)) & highest
                    table[half + x, lane] += unit * (np.float32(level) - np.float32(highest) / np.float32(2))
    return table.reshape(-1)


@jit()
def _look_up(table, keys, b, h, start, end, scores, row):
    """scores of the keys start to end for up to four rows from `row` on: the sum over their half bytes."""
    levels, count = entries(keys.rows), np.uint64(keys.level_bytes)
    for key in range(start, end):
        at, base = place(keys.rows, b, h, key), np.uint64(0)
        lower = upper = filled4(0)
        for c in range(at, at + count):
            x = np.uint64(levels[c])
            lower = add(lower, load4(table, base + ((x & _LOWER_BITS) << _TWO)))
            upper = add(upper, load4(table, base + _UPPER + ((x >> _TWO) & _ROW_BITS)))
            base += _BYTE
        write_lanes(scores, row, key, add(lower, upper))


@jit(reorder=True)
def _scale_levels(q, keys, b, h, start, end, scores, row):
    """Turn sums over levels into scores of q [up to 4, D]: what the middle between levels adds, the keys' scales and centres."""
    middle, centres = keys.middle[h % len(keys.middle)], entries(keys.centre)
    for lane in range(len(q)):
        constant = total = np.float32(0)
        for u in range(len(middle)):
            constant += q[lane, u] * middle[u]
            total += q[lane, u]
        line = scores[row + lane]
        for key in range(start, end):
            line[key] += constant
        if is_there(keys.scale):
            _scale_keys(keys.scale, b, h, start, end, scores, row + lane, 1)
        if is_there(keys.centre):
            for key in range(start, end):
                line[key] += total * widen(centres[place(keys.centre, b, h, key)])


@jit()
def _add_sparse(table, keys, b, h, start, end, scores, row):
    """Add the sparse entries of the keys start to end to the scores of up to four rows from `row` on."""
    values, indices, scales = entries(keys.values), entries(keys.indices), entries(keys.value_scale)
    places, rows = np.zeros(keys.topk, np.uint64), min(_LANES, len(scores) - row)
    sums = np.empty((_LANES, 1), np.float32)
    for key in range(start, end):
        at = place(keys.indices, b, h, key)
        _places(indices[at : at + np.uint64(keys.index_bytes)], keys.form, keys.index_bits, places)
        at = place(keys.values, b, h, key)
        total = filled4(0)
        for u in range(np.uint64(keys.topk)):
            if keys.value_bits == 8:
                x = np.float32(np.int8(values[at + u]))
            else:
                half = np.uint64(4) * (u & np.uint64(1))
                x = np.float32((np.uint64(values[at + (u >> np.uint64(1))]) >> half) & _LOWER_BITS) - np.float32(7.5)
            total = add_scaled(total, load4(table, places[u] << _TWO), x)
        write_lanes(sums, 0, 0, total)
        unit = widen(scales[place(keys.value_scale, b, h, key)])
        for lane in range(rows):
            scores[row + lane, key] += unit * sums[lane, 0]


@jit()
def _places(indices, form, index_bits, places):
    """Write the positions that the bytes `indices` of a key tell to places [K]; others than K set bits are as few or many, whatever
    an unfilled buffer holds."""
    if form == UINT8:
        for u in range(len(places)):
            places[u] = indices[u]
    elif form == PACKED:
        for u in range(len(places)):
            bit = u * index_bits
            both = np.int64(indices[bit // 8])
            if bit // 8 + 1 < len(indices):
                both |= np.int64(indices[bit // 8 + 1]) << 8
            places[u] = (both >> (bit % 8)) & ((1 << index_bits) - 1)
    else:
        found = 0
        for start in range(0, len(indices), 8):
            word = np.uint64(0)
            for c in range(start, min(start + 8, len(indices))):
                word |= np.uint64(indices[c]) << np.uint64(8 * (c - start))
            while word and found < len(places):
                places[found] = 8 * start + lowest_bit(word)
                word &= word - np.uint64(1)
                found += 1
        places[found:] = 0

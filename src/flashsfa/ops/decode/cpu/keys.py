"""Pass one: scores of chunks of coded keys for all query rows (query heads x query tokens) of a kv head.

A key is held as features, in the dtype of the queries or in 8 bits with a scale, or in levels of fewer bits. The latter are looked
up, not widened: a score is a sum over the key's half bytes, each of which can only take 16 values, so a table of what each
of them adds is made once per chunk and head.
"""

from __future__ import annotations

import numpy as np

from .machine import jit, lowest_bit, prange, widen
from .softmax import capped
from .tasks import chunk_of, rows_between, tasks_per_head
from .threads import Kernel

_SCORE_KEYS = 128  # keys scored for all rows before the next: their codes stay in the first-level cache
_LANES = 4  # query rows scored together
_TABLE_ROWS = 256  # a row for each uint8, so that no index can leave the table
_HALF = 16  # values of half a byte
# unsigned, as an index that may be negative is checked: rows of the table for a byte and its upper half, and what splits it
_BYTE, _UPPER, _LOWER, _BITS = np.uint64(2 * _HALF), np.uint64(_HALF), np.uint64(_HALF - 1), np.uint64(4)
NO_INDICES, UINT8, PACKED, BITMAP = range(4)


def _score_features(
    q, values, values_at, indices, indices_at, dense, dense_at, scale, scale_at, topk, dense_dims, first, last, padding, kv_heads,
    n_first, n, cap, scores,
):  # fmt: skip
    """scores [heads, R, n] of n coded keys after `n_first` tokens, for q [heads, R, D] with the scale in it, of B·Hkv heads. `x` and
    `x_at` are the bits of x [B, Hkv, n, W] and its strides; first and last [B, M] what each query sees of all tokens."""
    per_head = tasks_per_head(n)
    for task in prange(len(q) * per_head):
        head, b, h, start, end = chunk_of(task, per_head, kv_heads, first, last, n_first, n)
        chunk = scores[head, :, start:end]
        _score_chunk(
            q[head],
            rows_between(values, b * values_at[0] + h * values_at[1], start, end, topk),
            rows_between(indices, b * indices_at[0] + h * indices_at[1], start, end, topk),
            rows_between(dense, b * dense_at[0] + h * dense_at[1], start, end, dense_dims),
            chunk,
        )
        if len(scale):
            _scale_keys(chunk, rows_between(scale, b * scale_at[0] + h * scale_at[1], start, end, 1))
        _finish(q[head], chunk, cap, n_first + start, first[b], last[b], padding[b])


score_features = Kernel(_score_features)


def _score_levels(
    q, levels, levels_at, level_bytes, byte, shift, bits, step, middle, is_signed, scale, scale_at, centre, centre_at,
    values, values_at, value_bits, indices, indices_at, index_bytes, form, index_bits, topk, dense_dims, value_scale, value_scale_at,
    first, last, padding, kv_heads, n_first, n, cap, scores,
):  # fmt: skip
    """As `_score_features`, for keys of `level_bytes` and sparse entries in `value_bits` beside.

    The level l of a feature lies at bit `shift` of byte `byte`, all [1 or Hkv, C], and is read as
    (middle + (l - its middle level) * step) * scale + centre, with scale and centre of the key where it has them; in 8 bits
    `is_signed` says that l is.
    Sparse entries are int8 or levels around 7.5, times `value_scale`; their places are told by `form`.
    """
    per_head = tasks_per_head(n)
    for task in prange(len(q) * per_head):
        head, b, h, start, end = chunk_of(task, per_head, kv_heads, first, last, n_first, n)
        chunk = scores[head, :, start:end]
        own = h % len(byte)  # all heads may share their fields
        at = b * levels_at[0] + h * levels_at[1]
        scale_from, centre_from = b * scale_at[0] + h * scale_at[1], b * centre_at[0] + h * centre_at[1]
        values_from = b * values_at[0] + h * values_at[1]
        indices_from = b * indices_at[0] + h * indices_at[1]
        value_scale_from = b * value_scale_at[0] + h * value_scale_at[1]
        rows = q.shape[1]
        for row in range(0, rows, _LANES):
            lanes = q[head, row : row + _LANES]
            part = chunk[row : row + _LANES]
            table = _half_byte_table(lanes, level_bytes, byte[own], shift[own], bits[own], step[own], is_signed)
            _look_up(table, rows_between(levels, at, start, end, level_bytes), part)
            _scale_levels(
                lanes[:, : len(middle[own])], middle[own],
                scale[scale_from + start : scale_from + end] if len(scale) else scale,
                centre[centre_from + start : centre_from + end] if len(centre) else centre,
                part,
            )  # fmt: skip
            if form != NO_INDICES:
                width = topk if value_bits == 8 else (topk + 1) // 2
                _add_sparse(
                    _feature_table(lanes, dense_dims),
                    rows_between(values, values_from, start, end, width), value_bits,
                    rows_between(indices, indices_from, start, end, index_bytes), form, index_bits, topk,
                    value_scale[value_scale_from + start : value_scale_from + end],
                    part,
                )  # fmt: skip
        _finish(q[head], chunk, cap, n_first + start, first[b], last[b], padding[b])


score_levels = Kernel(_score_levels)


@jit()
def _finish(q, scores, cap, token, first, last, padding):
    """Cap scores [R, n] of the keys from `token` on, and hide those that the row's query does not see. NaN in q [R, D] shows in each
    score, as in a dense product."""
    for row in range(len(scores)):
        poison = np.float32(0)
        for u in range(q.shape[1]):
            poison += q[row, u] * np.float32(0)
        for key in range(scores.shape[1]):
            scores[row, key] += poison
    if cap > 0:
        for row in range(len(scores)):
            for key in range(scores.shape[1]):
                scores[row, key] = capped(scores[row, key], cap)
    hidden = padding[token : token + scores.shape[1]]
    m = len(first)
    for row in range(len(scores)):
        line, begin, end = scores[row], first[row % m] - token, last[row % m] - token
        line[: max(0, begin)] = -np.inf
        line[max(0, end) :] = -np.inf
        for key in range(len(hidden)):
            if hidden[key]:
                line[key] = -np.inf


# ---- features


@jit()
def _score_chunk(q, values, indices, dense, scores):
    """scores [R, n] of n keys: q [R, D] times the codes values and indices [n, K] and dense [n, M]."""
    rows, dims = q.shape[0], dense.shape[1]
    table = np.zeros((_TABLE_ROWS, _LANES), np.float32)  # q transposed, so that a code entry finds all lanes together
    dense_table = np.zeros((dims, _LANES), np.float32)
    for row in range(0, rows, _LANES):
        lanes = min(_LANES, rows - row)
        for lane in range(lanes):
            for u in range(dims):
                dense_table[u, lane] = q[row + lane, u]
            for u in range(q.shape[1] - dims):
                table[u, lane] = q[row + lane, dims + u]
        for start in range(0, len(values), _SCORE_KEYS):
            keys = slice(start, start + _SCORE_KEYS)
            if lanes == 1:
                _score_row(
                    table[:, 0].copy(), q[row, :dims], values[keys], indices[keys], dense[keys], scores[row, keys]
                )
            else:
                _score_lanes(
                    table, dense_table, values[keys], indices[keys], dense[keys], scores[row : row + lanes, keys]
                )


@jit()
def _score_row(table, dense_row, values, indices, dense, scores):
    """scores [n] of one query row."""
    for key in range(len(scores)):
        score = np.float32(0)
        for u in range(values.shape[1]):
            score += widen(values[key, u]) * table[indices[key, u]]
        for u in range(dense.shape[1]):
            score += widen(dense[key, u]) * dense_row[u]
        scores[key] = score


@jit()
def _score_lanes(table, dense_table, values, indices, dense, scores):
    """scores [lanes, n] of two to four query rows: each code entry is read once for all."""
    lanes = len(scores)
    for key in range(scores.shape[1]):
        s0 = s1 = s2 = s3 = np.float32(0)
        for u in range(values.shape[1]):
            x, row = widen(values[key, u]), indices[key, u]
            s0 += x * table[row, 0]
            s1 += x * table[row, 1]
            s2 += x * table[row, 2]
            s3 += x * table[row, 3]
        d0 = d1 = d2 = d3 = np.float32(0)  # apart, so that fewer sums wait for one another
        for u in range(dense.shape[1]):
            x = widen(dense[key, u])
            d0 += x * dense_table[u, 0]
            d1 += x * dense_table[u, 1]
            d2 += x * dense_table[u, 2]
            d3 += x * dense_table[u, 3]
        scores[0, key] = s0 + d0
        scores[1, key] = s1 + d1
        if lanes > 2:
            scores[2, key] = s2 + d2
        if lanes > 3:
            scores[3, key] = s3 + d3


@jit()
def _scale_keys(scores, scale):
    """Multiply scores [R, n] by the keys' factors [n, 1]."""
    for row in range(len(scores)):
        for key in range(len(scale)):
            scores[row, key] *= widen(scale[key, 0])


# ---- levels


@jit()
def _half_byte_table(q, level_bytes, byte, shift, bits, step, is_signed):
    """What each half byte of a key adds to the scores of q [up to 4, D]: [2 · level_bytes · 16, 4], the lower half of a byte first.
    Levels count from their middle, so that no large sums cancel."""
    table = np.zeros((2 * level_bytes * _HALF, _LANES), np.float32)
    for feature in range(len(byte)):
        if bits[feature] == 0:
            continue
        lower = byte[feature] * 2 * _HALF
        for lane in range(len(q)):
            unit = q[lane, feature] * step[feature]
            if bits[feature] == 8:
                for x in range(_HALF):
                    table[lower + x, lane] += unit * (np.float32(x) - np.float32(7.5))
                    high = (x ^ 8) if is_signed else x  # two's complement: -8 to 7, counted from its middle
                    table[lower + _HALF + x, lane] += unit * (np.float32(_HALF) * (np.float32(high) - np.float32(7.5)))
            else:
                half = lower + (_HALF if shift[feature] >= 4 else 0)
                highest = (1 << bits[feature]) - 1
                for x in range(_HALF):
                    level = (x >> (shift[feature] & 3)) & highest
                    table[half + x, lane] += unit * (np.float32(level) - np.float32(highest) / np.float32(2))
    return table


@jit()
def _look_up(table, levels, scores):
    """scores [up to 4, n] of keys levels [n, bytes]: the sum over their half bytes."""
    rows, count = len(scores), levels.shape[1]
    for key in range(len(levels)):
        s0 = s1 = s2 = s3 = np.float32(0)
        for c in range(0, count - 1, 2):  # two bytes a step: half as many sums wait for one another
            base, x, y = np.uint64(c) * _BYTE, np.uint64(levels[key, c]), np.uint64(levels[key, c + 1])
            i, j = base + (x & _LOWER), base + _UPPER + (x >> _BITS)
            u, v = base + _BYTE + (y & _LOWER), base + _BYTE + _UPPER + (y >> _BITS)
            s0 += (table[i, 0] + table[j, 0]) + (table[u, 0] + table[v, 0])
            s1 += (table[i, 1] + table[j, 1]) + (table[u, 1] + table[v, 1])
            s2 += (table[i, 2] + table[j, 2]) + (table[u, 2] + table[v, 2])
            s3 += (table[i, 3] + table[j, 3]) + (table[u, 3] + table[v, 3])
        if count % 2:
            base, x = np.uint64(count - 1) * _BYTE, np.uint64(levels[key, count - 1])
            i, j = base + (x & _LOWER), base + _UPPER + (x >> _BITS)
            s0 += table[i, 0] + table[j, 0]
            s1 += table[i, 1] + table[j, 1]
            s2 += table[i, 2] + table[j, 2]
            s3 += table[i, 3] + table[j, 3]
        scores[0, key] = s0
        if rows > 1:
            scores[1, key] = s1
        if rows > 2:
            scores[2, key] = s2
        if rows > 3:
            scores[3, key] = s3


@jit(reorder=True)
def _scale_levels(q, middle, scale, centre, scores):
    """Turn sums over levels [R, n] into scores of q [R, C]: what the middle between levels adds, the keys' scales and centres."""
    for row in range(len(scores)):
        constant = total = np.float32(0)
        for u in range(len(middle)):
            constant += q[row, u] * middle[u]
            total += q[row, u]
        line = scores[row]
        for key in range(len(line)):
            line[key] += constant
        for key in range(len(scale)):
            line[key] *= widen(scale[key])
        for key in range(len(centre)):
            line[key] += total * widen(centre[key])


@jit()
def _feature_table(q, dense_dims):
    """q [up to 4, D] behind the dense channel, transposed, with a row for each index that a buffer may hold."""
    table = np.zeros((_TABLE_ROWS, _LANES), np.float32)
    for lane in range(len(q)):
        for u in range(q.shape[1] - dense_dims):
            table[u, lane] = q[lane, dense_dims + u]
    return table


@jit()
def _add_sparse(table, values, value_bits, indices, form, index_bits, topk, value_scale, scores):
    """Add to scores [up to 4, n] the sparse entries of keys values [n, ...] at indices [n, ...]."""
    rows, places = len(scores), np.zeros(topk, np.int64)
    for key in range(len(values)):
        _places(indices[key], form, index_bits, places)
        s0 = s1 = s2 = s3 = np.float32(0)
        for u in range(topk):
            if value_bits == 8:
                x = np.float32(np.int8(values[key, u]))
            else:
                x = np.float32((values[key, u // 2] >> (4 * (u % 2))) & 15) - np.float32(7.5)
            place = places[u]
            s0 += x * table[place, 0]
            s1 += x * table[place, 1]
            s2 += x * table[place, 2]
            s3 += x * table[place, 3]
        unit = widen(value_scale[key])
        scores[0, key] += unit * s0
        if rows > 1:
            scores[1, key] += unit * s1
        if rows > 2:
            scores[2, key] += unit * s2
        if rows > 3:
            scores[3, key] += unit * s3


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

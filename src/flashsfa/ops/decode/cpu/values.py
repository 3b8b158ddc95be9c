"""Pass three: the weighted sum over the V rows that any query row of a kv head needs.

V of 4 and 3 bits is summed as it lies, rotated, and the sum is rotated back.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from ...cpu.machine import jit, prange, prefetch, widen
from ...cpu.parts import Part, entries, is_there, like, place
from ...cpu.threads import Kernel
from .parts import Seen
from .tasks import chunk_of, tasks_per_head
from .vectors import SIXTEEN, add, add_scaled, filled16, load16, load16_eights, load16_lower, load16_upper, store

_GROUP_KEYS = (
    32  # summed in registers before the sums are stored: often enough that their rows stay in the first-level cache
)
_LINE_BYTES = 64
_UINT8, _FLOAT32, _BFLOAT16 = map(like, (torch.uint8, torch.float32, torch.bfloat16))


def _sum_rows(weights, cuts, first, last, padding, kv_heads, n_first, n, like, at, sums, masses, out):
    """out [heads, R, Dv] of B·Hkv heads from weights [heads, R, n] of coded keys and from sums [heads, R, Dv] and masses [heads, R] of
    the exact ones. `at` [2, 4] tells where rows like `like` and their scales, if any, lie; further arguments are those of `Seen`."""
    heads, rows, dims = out.shape
    per_head = tasks_per_head(n)
    parts = np.empty((heads * per_head, rows, dims), np.float32)
    part_masses = np.empty((heads * per_head, rows), np.float32)
    for task in prange(heads * per_head):
        _sum_rows_of_chunk(
            np.int64(task), per_head, weights, cuts, first, last, padding, kv_heads, n_first, n, like, at, parts[task],
            part_masses[task],
        )  # fmt: skip
    _combine(parts, part_masses, sums, masses, 0, out)


sum_rows = Kernel(_sum_rows)


def _sum_levels(weights, cuts, first, last, padding, kv_heads, n_first, n, at, bits, rotation, sums, masses, out):
    """As `_sum_rows`, for values in 4 or 3 bits: centre[key] + (level - middle) * scale[key], two levels per byte or as `pack_3_bits` lays
    them, rotated in blocks of width `rotation`. `at` [3, 4] tells where the bytes, the scales and the centres lie."""
    heads, rows, dims = out.shape
    per_head = tasks_per_head(n)
    parts = np.empty((heads * per_head, rows, dims), np.float32)
    part_masses = np.empty((heads * per_head, rows), np.float32)
    for task in prange(heads * per_head):
        _sum_levels_of_chunk(
            np.int64(task), per_head, weights, cuts, first, last, padding, kv_heads, n_first, n, at, bits, parts[task],
            part_masses[task],
        )  # fmt: skip
    _combine(parts, part_masses, sums, masses, rotation, out)


sum_levels = Kernel(_sum_levels)


@jit()
def _sum_rows_of_chunk(
    task, per_head, weights, cuts, first, last, padding, kv_heads, n_first, n, like, at, out, masses
):
    head, b, h, start, end = chunk_of(task, per_head, Seen(first, last, padding, kv_heads, n_first, n))
    needed = _needed(weights[head], cuts[head], padding[b], n_first, start, end)
    kept = _kept(weights[head], needed, masses)
    scale = Part(_FLOAT32, at[1])
    if is_there(scale):
        _scale(kept, needed, scale, b, h)
    out[:] = 0
    _add_rows(kept, needed, Part(like, at[0]), b, h, out, 0, out.shape[1])


@jit()
def _sum_levels_of_chunk(
    task, per_head, weights, cuts, first, last, padding, kv_heads, n_first, n, at, bits, out, masses
):
    head, b, h, start, end = chunk_of(task, per_head, Seen(first, last, padding, kv_heads, n_first, n))
    needed = _needed(weights[head], cuts[head], padding[b], n_first, start, end)
    kept = _kept(weights[head], needed, masses)
    rows, width, centre = len(kept), out.shape[1] // 2, Part(_BFLOAT16, at[2])
    centres, base = entries(centre), np.zeros(len(kept), np.float32)
    for row in range(rows):
        for i in range(len(needed)):
            base[row] += kept[row, i] * widen(centres[place(centre, b, h, needed[i])])
    _scale(kept, needed, Part(_BFLOAT16, at[1]), b, h)
    levels = Part(_UINT8, at[0])
    if bits == 3:
        for row in range(rows):
            out[row] = base[row]
        _add_eights(kept, needed, levels, b, h, out, 0, out.shape[1])
        return
    # of the lower halves of the bytes, and of the upper ones behind them
    sums = np.zeros((rows, 2 * width), np.float32)
    _add_lower(kept, needed, levels, b, h, sums, 0, width)
    _add_upper(kept, needed, levels, b, h, sums, width, width)
    for row in range(rows):
        for c in range(width):
            out[row, 2 * c] = sums[row, c] + base[row]
            out[row, 2 * c + 1] = sums[row, width + c] + base[row]


@jit()
def _needed(weights, cuts, padding, n_first, start, end):
    """The keys start to end of weights [R, n] that are no padding and above the cut of some row, as unsigned integers."""
    needed, count = np.empty(end - start, np.uint64), 0
    is_exact = len(padding) == 0
    for cut in cuts:
        is_exact &= cut < 0
    if is_exact:
        for key in range(start, end):
            needed[key - start] = key
        return needed
    for key in range(start, end):
        keep = False
        for row in range(len(weights)):
            keep |= not weights[row, key] <= cuts[row]  # NaN is kept, to be seen in the output
        needed[count] = key
        count += keep and (len(padding) == 0 or not padding[n_first + key])
    return needed[:count]


@jit(reorder=True)
def _kept(weights, needed, masses):
    """The weights [R, kept] of the needed keys, and their sums to masses [R]."""
    kept = np.empty((len(weights), len(needed)), np.float32)
    for row in range(len(weights)):
        line, source, mass = kept[row], weights[row], np.float32(0)
        for i in range(len(needed)):
            weight = source[needed[i]]
            line[i] = weight
            mass += weight
        masses[row] = mass
    return kept


@jit()
def _scale(weights, needed, scale, b, h):
    """Multiply weights [R, kept] by the factors of the needed keys."""
    factors = entries(scale)
    for row in range(len(weights)):
        for i in range(len(needed)):
            weights[row, i] *= widen(factors[place(scale, b, h, needed[i])])


def _adder(load_vector, load_one, stored):
    """A function that adds to out[:, column : column + width] the weighted sum over needed keys of what lies in `part`, read by
    `load_vector(array, row, place, width)`, sixteen entries from `place` on of the row that begins at `row`, and, at the end of a row, by
    `load_one`. `stored(width)` items of the array hold a row."""

    @jit()
    def add_keys(weights, needed, part, b, h, out, column, width):
        rows, count = weights.shape
        v, per_line = entries(part), np.uint64(_LINE_BYTES // part.like.itemsize)
        is_scattered = count > 0 and needed[count - 1] - needed[0] >= count
        places = np.empty(count, np.uint64)
        for i in range(count):
            places[i] = place(part, b, h, needed[i])
        for start in range(0, count, _GROUP_KEYS):
            end = min(start + _GROUP_KEYS, count)
            if is_scattered:  # the machine foresees the next of adjacent rows by itself
                for ahead in range(end, min(end + _GROUP_KEYS, count)):
                    for line in range(places[ahead], places[ahead] + np.uint64(stored(width)), per_line):
                        prefetch(v, line)
            row = 0
            while row < rows:
                if rows - row > 2:
                    add_four(weights, v, places, start, end, out, row, column, width)
                    row += 4
                else:
                    add_one(weights, v, places, start, end, out, row, column, width)
                    row += 1
            for c in range(width - width % SIXTEEN, width):
                for row in range(rows):
                    for i in range(start, end):
                        out[row, column + c] += weights[row, i] * load_one(v, places[i], np.uint64(c), np.uint64(width))

    @jit()
    def add_four(weights, v, places, start, end, out, row, column, width):
        """Rows `row` to `row + 3`; in place of those that are not there the last is summed, again."""
        last = len(weights) - 1
        w0, w1 = weights[row], weights[min(row + 1, last)]
        w2, w3 = weights[min(row + 2, last)], weights[min(row + 3, last)]
        out0, out1, out2, out3 = out[row], out[min(row + 1, last)], out[min(row + 2, last)], out[min(row + 3, last)]
        for c in range(np.uint64(column), np.uint64(column + width - width % SIXTEEN), np.uint64(SIXTEEN)):
            s0, s1, s2, s3 = load16(out0, c), load16(out1, c), load16(out2, c), load16(out3, c)
            offset = c - np.uint64(column)
            for i in range(np.uint64(start), np.uint64(end)):
                x = load_vector(v, places[i], offset, np.uint64(width))
                s0, s1 = add_scaled(s0, x, w0[i]), add_scaled(s1, x, w1[i])
                s2, s3 = add_scaled(s2, x, w2[i]), add_scaled(s3, x, w3[i])
            store(out0, c, s0)
            store(out1, c, s1)
            store(out2, c, s2)
            store(out3, c, s3)

    @jit()
    def add_one(weights, v, places, start, end, out, row, column, width):
        w, line = weights[row], out[row]
        for c in range(np.uint64(column), np.uint64(column + width - width % SIXTEEN), np.uint64(SIXTEEN)):
            total, offset = load16(line, c), c - np.uint64(column)
            for i in range(np.uint64(start), np.uint64(end)):
                total = add_scaled(total, load_vector(v, places[i], offset, np.uint64(width)), w[i])
            store(line, c, total)

    return add_keys


@jit()
def _row(v, row, place, width):
    return load16(v, row + place)


@jit()
def _entry(v, row, place, width):
    return widen(v[row + place])


@jit()
def _lower(v, row, place, width):
    return add(load16_lower(v, row + place), filled16(-7.5))


@jit()
def _lower_entry(v, row, place, width):
    return np.float32(np.uint64(v[row + place]) & np.uint64(15)) - np.float32(7.5)


@jit()
def _upper(v, row, place, width):
    return add(load16_upper(v, row + place), filled16(-7.5))


@jit()
def _upper_entry(v, row, place, width):
    return np.float32(np.uint64(v[row + place]) >> np.uint64(4)) - np.float32(7.5)


@jit()
def _eights(v, row, place, width):
    """Two times eight levels: a word of 16 bits each and, behind all words, a byte."""
    four, eight = np.uint64(4), np.uint64(8)
    return add(load16_eights(v, row + place // four, row + width // four + place // eight), filled16(-3.5))


@jit()
def _no_entry(v, row, place, width):
    return np.float32(0)  # rows of 3 bits are a multiple of 16 wide: none has an end


@jit()
def _all(width):
    return width


@jit()
def _three_eighths(width):
    return width * 3 // 8


_add_rows, _add_lower = _adder(_row, _entry, _all), _adder(_lower, _lower_entry, _all)
_add_upper, _add_eights = _adder(_upper, _upper_entry, _all), _adder(_eights, _no_entry, _three_eighths)


@jit()
def _combine(parts, part_masses, sums, masses, rotation, out):
    """out [heads, R, Dv] from the tasks' sums [heads · tasks, R, Dv] and masses [heads · tasks, R] and those of the exact tokens. Not part of
    the kernel itself, where numba would share out each sum of two rows over the cores, and have them wait for one another."""
    heads, rows, _ = out.shape
    per_head = len(parts) // heads
    for head in range(heads):
        for row in range(rows):
            line, mass = out[head, row], masses[head, row]
            line[:] = 0
            for task in range(head * per_head, head * per_head + per_head):
                mass += part_masses[task, row]
                for j in range(len(line)):
                    line[j] += parts[task, row, j]
            if rotation:
                _rotate(line, rotation)
            for j in range(len(line)):
                line[j] += sums[head, row, j]
                if mass != 0:  # a row without weight sees nothing
                    line[j] /= mass


@jit()
def _rotate(x, width):
    """Rotate x [Dv] in place, block by block of a power of two: `rotation.rotate`."""
    for block in range(0, len(x), width):
        step = 1
        while step < width:
            for i in range(block, block + width, 2 * step):
                for j in range(i, i + step):
                    a, b = x[j], x[j + step]
                    x[j], x[j + step] = a + b, a - b
            step *= 2
    for j in range(len(x)):
        x[j] *= np.float32(1 / math.sqrt(width))

"""Pass three: the weighted sum over the V rows that any query row of a kv head needs.

V of 4 bits is summed as it lies, rotated, and the sum is rotated back.
"""

from __future__ import annotations

import math

import numpy as np

from .machine import jit, prange, prefetch, widen
from .tasks import chunk_of, tasks_per_head
from .threads import Kernel

_AHEAD_KEYS = 8  # V rows are asked for this many keys before they are used
_LINE_BYTES = 64


def _sum_values(
    weights, cuts, padding, v, v_at, scale, scale_at, centre, centre_at, rotation, first, last, kv_heads, n_first, n, sums, masses, out,
):  # fmt: skip
    """out [heads, R, Dv] of B·Hkv heads from weights [heads, R, n] of coded keys, which stand after `n_first` tokens, and from sums
    [heads, R, Dv] and masses [heads, R] of the exact ones. `x` and `x_at` are the bits of x [B, Hkv, n, W] and its strides. With
    `rotation` > 0 V is in 4 bits around a centre, and rotated in blocks of this width."""
    heads, rows, dims = out.shape
    per_head = tasks_per_head(n)
    parts = np.empty((heads * per_head, rows, dims), np.float32)
    part_masses = np.empty((heads * per_head, rows), np.float32)
    for task in prange(heads * per_head):
        head, b, h, start, end = chunk_of(task, per_head, kv_heads, first, last, n_first, n)
        at, scale_from = b * v_at[0] + h * v_at[1] + start * v_at[2], b * scale_at[0] + h * scale_at[1] + start
        needed = _needed(weights[head, :, start:end], cuts[head], padding[b, n_first + start : n_first + end])
        if rotation:
            _sum_levels(
                weights[head, :, start:end], needed, scale[scale_from:],
                centre[b * centre_at[0] + h * centre_at[1] + start :], v, at, v_at[2], parts[task], part_masses[task],
            )  # fmt: skip
        else:
            _sum_rows(
                weights[head, :, start:end], needed, scale[scale_from:], v, at, v_at[2], parts[task], part_masses[task]
            )
    _combine(parts, part_masses, sums, masses, rotation, out)


sum_values = Kernel(_sum_values)


@jit()
def _needed(weights, cuts, padding):
    """The keys of weights [R, n] that are no padding and above the cut of some row."""
    needed, count = np.empty(weights.shape[1], np.int64), 0
    for key in range(weights.shape[1]):
        keep = False
        for row in range(len(weights)):
            keep |= not weights[row, key] <= cuts[row]  # NaN is kept, to be seen in the output
        needed[count] = key
        count += keep and (len(padding) == 0 or not padding[key])
    return needed[:count]


@jit(reorder=True)
def _sum_rows(weights, needed, scale, v, start, stride, out, mass):
    """out [R, Dv] = sum over the needed keys of weights [R, n] times the V row at v[start + key * stride], times scale[key]
    unless that is empty, and mass [R], the sum of their weights."""
    count, last, dims = len(needed), len(needed) - 1, out.shape[1]
    out[:] = 0
    mass[:] = 0
    for i in range(0, count, 4):  # four keys a step: out is loaded and stored a fourth as often
        for ahead in range(i + _AHEAD_KEYS, min(i + _AHEAD_KEYS + 4, count)):
            at = start + needed[ahead] * stride
            for line in range(at, at + dims, _LINE_BYTES // v.itemsize):
                prefetch(v, line)
        k0, k1, k2, k3 = needed[i], needed[min(i + 1, last)], needed[min(i + 2, last)], needed[min(i + 3, last)]
        at0, at1 = np.uint64(start + k0 * stride), np.uint64(start + k1 * stride)
        at2, at3 = np.uint64(start + k2 * stride), np.uint64(start + k3 * stride)
        for row in range(len(weights)):
            w0 = weights[row, k0]
            w1 = weights[row, k1] if i + 1 < count else np.float32(0)
            w2 = weights[row, k2] if i + 2 < count else np.float32(0)
            w3 = weights[row, k3] if i + 3 < count else np.float32(0)
            mass[row] += (w0 + w1) + (w2 + w3)
            if len(scale):
                w0, w1 = w0 * widen(scale[k0]), w1 * widen(scale[k1])
                w2, w3 = w2 * widen(scale[k2]), w3 * widen(scale[k3])
            for j in range(np.uint64(dims)):
                out[row, j] += (w0 * widen(v[at0 + j]) + w1 * widen(v[at1 + j])) + (
                    w2 * widen(v[at2 + j]) + w3 * widen(v[at3 + j])
                )


@jit(reorder=True)
def _sum_levels(weights, needed, scale, centre, v, start, stride, out, mass):
    """As `_sum_rows`, for rows in 4 bits: centre[key] + (level - 7.5) * scale[key], two levels per byte."""
    count, rows, width = len(needed), len(weights), out.shape[1] // 2
    sums = np.zeros(
        (rows, 2 * width), np.float32
    )  # of the lower halves of the bytes, and of the upper ones behind them
    levels, base = np.empty((4, 2 * width), np.float32), np.zeros(rows, np.float32)
    mass[:] = 0
    for i in range(0, count, 4):
        keys = min(4, count - i)
        levels[: 4 - keys] = 0  # the last keys stand last
        for j in range(keys):
            at = np.uint64(start + needed[i + j] * stride)
            low, high = levels[4 - keys + j, :width], levels[4 - keys + j, width:]
            for c in range(np.uint64(width)):
                low[c] = np.float32(v[at + c] & 15) - np.float32(7.5)
                high[c] = np.float32(v[at + c] >> 4) - np.float32(7.5)
        for row in range(rows):
            w0 = w1 = w2 = w3 = np.float32(0)
            for j in range(keys):
                key = needed[i + j]
                weight = weights[row, key]
                mass[row] += weight
                base[row] += weight * widen(centre[key])
                w0, w1, w2, w3 = w1, w2, w3, weight * widen(scale[key])
            line = sums[row]
            for c in range(np.uint64(2 * width)):
                line[c] += (w0 * levels[0, c] + w1 * levels[1, c]) + (w2 * levels[2, c] + w3 * levels[3, c])
    for row in range(rows):
        for c in range(width):
            out[row, 2 * c] = sums[row, c] + base[row]
            out[row, 2 * c + 1] = sums[row, width + c] + base[row]


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

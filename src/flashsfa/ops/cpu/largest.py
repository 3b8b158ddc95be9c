"""The largest features of a row, as `topk_codes` picks them."""

from __future__ import annotations

import numpy as np

from .machine import jit


@jit()
def largest(bits, topk):
    """Places [topk], ascending, of the largest magnitudes of floats whose bits are `bits` [D], unsigned, D <= 256: ties to the lowest
    index, NaN above infinity."""
    no_sign = (1 << (8 * bits.itemsize - 1)) - 1
    order = np.empty(len(bits), np.int64)  # of equal ones the lowest index is the largest
    for u in range(len(order)):
        order[u] = (np.int64(bits[u]) & no_sign) << 8 | (255 - u)
    least = np.sort(order)[len(order) - topk]
    places, count = np.empty(topk, np.int64), 0
    for u in range(len(order)):
        if order[u] >= least:
            places[count] = u
            count += 1
    return places

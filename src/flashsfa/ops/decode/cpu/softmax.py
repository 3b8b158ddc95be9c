"""Pass two: the softmax of each query row, over the scores of coded keys and the tokens that are held as they came.

Exponents are to base 2; log2(e) is folded into the scale.
"""

from __future__ import annotations

import math

import numpy as np

from .machine import jit, prange, widen
from .threads import Kernel

LOG2_E = 1 / math.log(2)
_SUM_KEYS = 1024  # weights summed in float32 before float64 takes over
_CUT_OCTAVES, _CUT_STEPS = 40.0, 10  # the cut is sought from 2^-40 of the largest weight, to 1/25 octave
_CUT_SLACK = 1 - 1e-4  # more than the float32 sums can be off


def _weigh(
    q, first_k, first_k_at, first_v, first_v_at, n_first, recent_k, recent_k_at, recent_v, recent_v_at, n_recent, first, last,
    padding, kv_heads, n, cap, tolerance, scores, lse, cuts, sums, masses,
):  # fmt: skip
    """Turn scores [heads, R, n] of B·Hkv heads into weights relative to the row's largest. Write the row's log-sum-exp and its cut: a
    weight such that all weights up to it sum to at most the tolerance, found by bisection; the sum is taken, not estimated, so
    that it is certified. Of the exact tokens, `n_first` before the coded ones and `n_recent` after them, write the sum of the
    weighted values to sums [heads, R, Dv] and of the weights to masses [heads, R]."""
    heads, rows, _ = scores.shape
    m = first.shape[1]
    for line in prange(heads * rows):
        head, row = line // rows, line % rows
        b, h = head // kv_heads, head % kv_heads
        begin, end = first[b, row % m], last[b, row % m]
        exact = np.empty(n_first + n_recent, np.float32)
        at = b * first_k_at[0] + h * first_k_at[1]
        _score_exact(q[head, row], first_k, at, first_k_at[2], 0, begin, end, padding[b], cap, exact[:n_first])
        at = b * recent_k_at[0] + h * recent_k_at[1]
        _score_exact(
            q[head, row], recent_k, at, recent_k_at[2], n_first + n, begin, end, padding[b], cap, exact[n_first:]
        )
        # all that any row sees: what another row sees alone is hidden here
        coded = scores[head, row, max(0, first[b].min() - n_first) : max(0, min(n, last[b].max() - n_first))]
        largest = max(_largest(coded), _largest(exact))
        mass = _to_weights(exact, largest)
        total = _to_weights(coded, largest) + mass
        lse[head, row] = (largest + np.log2(total)) / LOG2_E if total != 0 else -np.inf
        cuts[head, row] = _find_cut(coded, tolerance * total * _CUT_SLACK) if tolerance > 0 else -1
        sums[head, row] = 0
        masses[head, row] = mass
        at = b * first_v_at[0] + h * first_v_at[1]
        _sum_exact(exact[:n_first], first_v, at, first_v_at[2], sums[head, row])
        at = b * recent_v_at[0] + h * recent_v_at[1]
        _sum_exact(exact[n_first:], recent_v, at, recent_v_at[2], sums[head, row])


weigh = Kernel(_weigh)


@jit()
def capped(score, cap):
    """`cap` times the hyperbolic tangent of a score that was divided by it; the score itself for a cap of 0."""
    return np.float32(cap) * np.tanh(score) if cap > 0 else score


@jit(reorder=True)
def _score_exact(q, k, at, stride, position, begin, end, padding, cap, scores):
    """scores [E] of q [D] over the rows of k from `at` on, tokens `position` and next; -inf for those that are not seen."""
    for key in range(len(scores)):
        token = position + key
        score = np.float32(-np.inf)
        if token >= begin and token < end and not (len(padding) and padding[token]):
            score = np.float32(0)
            row = at + key * stride
            for u in range(len(q)):
                score += q[u] * widen(k[row + u])
            score = capped(score, cap)
        scores[key] = score


@jit(reorder=True)
def _sum_exact(weights, v, at, stride, out):
    """Add to out [Dv] the rows of v from `at` on, by weights [E]."""
    for key in range(len(weights)):
        weight, row = weights[key], at + key * stride
        if weight != 0:  # what is not seen may hold anything
            for j in range(len(out)):
                out[j] += weight * widen(v[row + j])


@jit(reorder=True)
def _largest(scores):
    largest = np.float32(-np.inf)
    for score in scores:
        largest = max(largest, score)
    return largest


@jit(reorder=True)
def _to_weights(scores, largest):
    """Turn scores into weights relative to the largest; their sum."""
    total = 0.0
    for start in range(0, len(scores), _SUM_KEYS):
        block = scores[start : start + _SUM_KEYS]
        part = np.float32(0)
        for key in range(len(block)):
            block[key] = weight = _exp2(block[key] - largest) if block[key] != -np.inf else np.float32(0)
            part += weight
        total += part
    return total


@jit()
def _exp2(x):
    """2^x of a float32 x <= 0 to about an ulp; 0 below the normal numbers, NaN for NaN."""
    above = max(x, np.float32(-126))
    whole = np.floor(above + np.float32(0.5))
    f = above - whole  # [-0.5, 0.5]
    p = np.float32(1.5353362e-4)
    p = p * f + np.float32(1.3398874e-3)
    p = p * f + np.float32(9.6184373e-3)
    p = p * f + np.float32(5.5503324e-2)
    p = p * f + np.float32(2.4022648e-1)
    p = p * f + np.float32(6.9314720e-1)
    p = p * f + np.float32(1)
    power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    value = p * power if x >= np.float32(-126) else np.float32(0)
    return value if x == x else x


@jit(reorder=True)
def _find_cut(weights, allowed):
    """The largest cut tried such that the weights up to it sum to at most `allowed`; 0 if none does."""
    cut = np.float32(0)
    low, high = -_CUT_OCTAVES, 0.0  # log2 of the cut
    for _ in range(_CUT_STEPS):
        middle = (low + high) / 2
        candidate = np.float32(2.0**middle)
        dropped = 0.0
        for start in range(0, len(weights), _SUM_KEYS):
            block = weights[start : start + _SUM_KEYS]
            part = np.float32(0)
            for key in range(len(block)):
                part += block[key] if block[key] <= candidate else np.float32(0)
            dropped += part
        if dropped <= allowed:
            cut, low = candidate, middle
        else:
            high = middle
    return cut

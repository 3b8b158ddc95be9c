"""Pass two: the softmax of each query row, over the scores of coded keys and the tokens that are held as they came.

Exponents are to base 2; log2(e) is folded into the scale.
"""

from __future__ import annotations

import math

import numpy as np

from ...cpu.machine import jit, prange, widen
from ...cpu.parts import Part, entries, place
from ...cpu.threads import Kernel
from .parts import Exact, Seen

LOG2_E = 1 / math.log(2)
_SUM_KEYS = 1024  # weights summed in float32 before float64 takes over
_CUT_OCTAVES, _CUT_STEPS = 40.0, 10  # the cut is sought from 2^-40 of the largest weight, to 1/25 octave
_CUT_SLACK = 1 - 1e-4  # more than the float32 sums can be off


def _weigh(
    q,
    like,
    at,
    n_oldest,
    n_newest,
    first,
    last,
    padding,
    kv_heads,
    n_first,
    n,
    cap,
    tolerance,
    scores,
    lse,
    cuts,
    sums,
    masses,
):
    """Turn scores [heads, R, n] of B·Hkv heads into weights relative to the row's largest. Write the row's log-sum-exp and its cut: a
    weight such that all weights up to it sum to at most the tolerance, found by bisection; the sum is taken, not estimated, so
    that it is certified. Of the exact tokens, `n_oldest` before the coded ones and `n_newest` after them, write the sum of the
    weighted values to sums [heads, R, Dv] and of the weights to masses [heads, R]. `at` [4, 4] tells where k and v of the former
    and of the latter lie, which are like `like`; further arguments are those of `Seen`."""
    for line in prange(len(q) * q.shape[1]):
        _weigh_row(
            np.int64(line), q, like, at, n_oldest, n_newest, first, last, padding, kv_heads, n_first, n, cap, tolerance, scores, lse, cuts,
            sums, masses,
        )  # fmt: skip


weigh = Kernel(_weigh)


@jit()
def _weigh_row(
    line, q, like, at, n_oldest, n_newest, first, last, padding, kv_heads, n_first, n, cap, tolerance, scores, lse, cuts,
    sums, masses,
):  # fmt: skip
    seen = Seen(first, last, padding, kv_heads, n_first, n)
    oldest = Exact(Part(like, at[0]), Part(like, at[1]))
    newest = Exact(Part(like, at[2]), Part(like, at[3]))
    rows, m = q.shape[1], first.shape[1]
    head, row = line // rows, line % rows
    b, h = head // kv_heads, head % kv_heads
    exact = np.empty(n_oldest + n_newest, np.float32)
    _score_exact(q[head, row], oldest, seen, b, h, row % m, 0, cap, exact[:n_oldest])
    _score_exact(q[head, row], newest, seen, b, h, row % m, n_first + n, cap, exact[n_oldest:])
    # all that any row sees: what another row sees alone is hidden here
    coded = scores[head, row, max(0, first[b, 0] - n_first) : max(0, min(n, last[b, -1] - n_first))]
    largest = max(_largest(coded), _largest(exact))
    mass = _to_weights(exact, largest)
    total = _to_weights(coded, largest) + mass
    lse[head, row] = (largest + np.log2(total)) / LOG2_E if total != 0 else -np.inf
    cuts[head, row] = _find_cut(coded, tolerance * total * _CUT_SLACK) if tolerance > 0 else -1
    masses[head, row] = mass
    sums[head, row] = 0
    _sum_exact(exact[:n_oldest], oldest.v, b, h, sums[head, row])
    _sum_exact(exact[n_oldest:], newest.v, b, h, sums[head, row])


@jit()
def capped(score, cap):
    """`cap` times the hyperbolic tangent of a score that was divided by it; the score itself for a cap of 0."""
    return np.float32(cap) * np.tanh(score) if cap > 0 else score


@jit(reorder=True)
def _score_exact(q, tokens, seen, b, h, query, position, cap, scores):
    """scores [E] of q [D], the batch row's `query`, over `Exact` tokens from `position` on; -inf for those that are not seen."""
    k, padding = entries(tokens.k), seen.padding[b]
    for key in range(len(scores)):
        token = position + key
        score = np.float32(-np.inf)
        is_hidden = len(padding) > 0 and padding[token]
        if token >= seen.first[b, query] and token < seen.last[b, query] and not is_hidden:
            score = np.float32(0)
            at = place(tokens.k, b, h, key)
            for u in range(np.uint64(len(q))):
                score += q[u] * widen(k[at + u])
            score = capped(score, cap)
        scores[key] = score


@jit(reorder=True)
def _sum_exact(weights, part, b, h, out):
    """Add to out [Dv] the values of exact tokens, by weights [E]."""
    v = entries(part)
    for key in range(len(weights)):
        weight, at = weights[key], place(part, b, h, key)
        if weight != 0:  # what is not seen may hold anything
            for j in range(np.uint64(len(out))):
                out[j] += weight * widen(v[at + j])


@jit()
def _largest(scores):
    """The largest score [n], NaN where one is; -inf without any. Compared as integers of the same order, which vectorise."""
    highest = _order(np.float32(-np.inf))
    for x in scores.view(np.int32):
        highest = max(highest, _ordered(x))
    return np.int32(_ordered(highest)).view(np.float32)


@jit()
def _order(x):
    return _ordered(np.float32(x).view(np.int32))


@jit()
def _ordered(bits):
    """The bits of a float32, so that a larger number has larger ones as an int32; its own inverse."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


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

"""What the rows of a run say together: how steady the clock was, from which length on a configuration pays, which cases were lost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .cases import tokens_label
from .results import LEVEL, Row, compared

_WIDE = 0.2  # a spread from which on timings are doubtful


def findings(rows: Sequence[Row]) -> list[str]:
    """Lines for a reader, about rows that have a time and a rival that does the same job."""
    timed = [row for row in rows if row.timing is not None and row.fastest_baseline is not None]
    return [*_spread(timed), *_crossovers(timed), *_beside_dense_int8(timed), *_lost(timed)]


@dataclass(frozen=True)
class Crossover:
    """Where a curve begins to win: above `slower_at` and at most at `faster_at` tokens, `tokens` by interpolation.

    Attributes:
        slower_at: the most tokens at which it was measured slower; None if it never was.
        faster_at: the fewest tokens from which on it was always faster; None if it was not at the longest.
    """

    tokens: int
    slower_at: int | None
    faster_at: int | None

    def __str__(self) -> str:
        if self.faster_at is None:
            return f"does not pay up to {tokens_label(self.tokens)}"
        return f"{tokens_label(self.tokens)} or fewer" if self.slower_at is None else f"about {_rounded(self.tokens)}"


def crossover(rows: Sequence[Row]) -> Crossover:
    """Of the rows of one curve against their fastest baselines. Both times are taken to grow linearly between lengths."""
    gains = sorted((row.n, _gain(row)) for row in rows)
    lost = [i for i, (_, gain) in enumerate(gains) if gain <= 0]
    if not lost:
        return Crossover(gains[0][0], None, gains[0][0])
    (before, loss), *after = gains[lost[-1] :]
    if not after:
        return Crossover(before, before, None)
    n, gain = after[0]
    return Crossover(round(before + (n - before) * loss / (loss - gain)), before, n)


def _gain(row: Row) -> float:
    """Milliseconds that it saves."""
    assert row.timing is not None
    assert row.ratio is not None
    return (row.ratio - 1) * row.timing.median_ms


def _crossovers(rows: Sequence[Row]) -> list[str]:
    """A line a facet, of its curves that were measured at several lengths."""
    lines = []
    for facet, here in _grouped(rows, lambda row: row.facet).items():
        curves = _grouped(here, lambda row: row.curve)
        found = [(curve, crossover(own)) for curve, own in curves.items() if len({row.n for row in own}) > 1]
        pays = _listed([x for x in found if x[1].faster_at is not None])
        never = _listed([x for x in found if x[1].faster_at is None])
        parts = [*([f"pays from N tokens on; here N = {pays}"] if pays else []), *([never] if never else [])]
        if parts:
            lines.append(f"{facet}: {'; '.join(parts)}")
    return lines


def _listed(found: Sequence[tuple[str, Crossover]]) -> str:
    """Curves with the same crossover together: "8k or fewer (k16, k16-int8), about 9k (16+k16)"."""
    together: dict[str, list[str]] = defaultdict(list)
    for curve, where in found:
        together[str(where)].append(curve)
    return ", ".join(f"{where} ({'; '.join(curves)})" for where, curves in together.items())


def _beside_dense_int8(rows: Sequence[Row]) -> list[str]:
    """How the others compare with an 8-bit cache of all features, at the longest length of each facet."""
    lines = []
    for facet, here in _grouped(rows, lambda row: row.facet).items():
        longest = [row for row in here if row.n == max(other.n for other in here)]
        dense = next((row for row in longest if row.curve.startswith("dense-int8")), None)
        if dense is None:
            continue
        assert dense.timing is not None
        others = [
            f"{row.curve} {compared(dense.timing.median_ms / row.timing.median_ms)}"
            for row in longest
            if row is not dense and row.timing is not None
        ]
        if others:
            lines.append(f"{facet}, {tokens_label(dense.n)} tokens, beside dense-int8: {'; '.join(others)}")
    return lines


def _lost(rows: Sequence[Row]) -> list[str]:
    lines = []
    for facet, here in _grouped(rows, lambda row: row.facet).items():
        lost = [row for row in here if row.ratio is not None and row.ratio <= 1 - LEVEL]
        if lost:
            cases = "; ".join(f"{row.curve} at {tokens_label(row.n)}, {row.against}" for row in lost)
            lines.append(f"{facet}, lost in {len(lost)} of {len(here)} cases: {cases}")
    return lines


def _spread(rows: Sequence[Row]) -> list[str]:
    """A warning where a time, or that of a rival, is not to be trusted."""
    spreads = [
        (timing.spread, row.case)
        for row in rows
        for timing in (row.timing, *(x.timing for x in row.baselines.values() if x.competes))
        if timing is not None
    ]
    wide = {case for spread, case in spreads if spread > _WIDE}
    if not wide:
        return []
    worst, case = max(spreads)
    return [
        f"timings spread by up to {worst:.0%} ({case}), by more than {_WIDE:.0%} in {len(wide)} of {len(rows)} cases: other work on this machine?"
    ]


def _grouped(rows: Sequence[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return dict(groups)


def _rounded(n: int) -> str:
    return f"{n / 1024:.1f}k" if n < 10 * 1024 else f"{n / 1024:.0f}k"

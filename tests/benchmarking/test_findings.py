"""What a run says beside its table: where it pays, what was lost, and whether its clock can be trusted."""

import pytest

from flashsfa.benchmarking.findings import crossover, findings
from flashsfa.benchmarking.results import BaselineResult, Results, Row
from flashsfa.benchmarking.timing import Timing

K = 1024


def row(n, ours, theirs, curve="k16", facet="head size 128", spread=0.0, rival="cudnn"):
    def timing(median):
        return Timing(median, median * (1 - spread / 2), median * (1 + spread / 2))

    baselines = {
        rival: BaselineResult(timing(theirs), 1.0, theirs / ours, 1.0),
        "copy": BaselineResult(timing(ours / 100), 1.0, 0.01, 1.0, competes=False),
    }
    return Row(f"{curve}, n={n}", facet, curve, n, "ok", timing=timing(ours), baselines=baselines)


@pytest.mark.parametrize(
    ("times", "tokens", "slower_at", "faster_at", "words"),
    [
        # n: (ours, theirs)
        ({4 * K: (1.0, 2.0), 8 * K: (1.0, 3.0)}, 4 * K, None, 4 * K, "4k or fewer"),
        ({4 * K: (2.0, 1.0), 8 * K: (2.0, 3.0)}, 6 * K, 4 * K, 8 * K, "about 6.0k"),
        ({4 * K: (2.0, 1.0), 20 * K: (2.0, 5.0)}, 8 * K, 4 * K, 20 * K, "about 8.0k"),
        ({4 * K: (3.0, 1.0), 8 * K: (3.0, 2.0)}, 8 * K, 8 * K, None, "does not pay up to 8k"),
        ({4 * K: (1.0, 2.0), 8 * K: (3.0, 2.0), 12 * K: (3.0, 4.0)}, 10 * K, 8 * K, 12 * K, "about 10k"),
    ],
)
def test_crossover(times, tokens, slower_at, faster_at, words):
    found = crossover([row(n, *both) for n, both in reversed(times.items())])
    assert (found.tokens, found.slower_at, found.faster_at) == (tokens, slower_at, faster_at)
    assert str(found) == words


def test_where_it_pays_and_what_was_lost():
    rows = [
        row(4 * K, 2.0, 1.0), row(8 * K, 2.0, 3.0), row(4 * K, 1.0, 2.0, "k8"), row(8 * K, 1.0, 2.0, "k8"),
        row(4 * K, 2.0, 1.0, "k32"), row(8 * K, 3.0, 2.0, "k32"),
    ]  # fmt: skip
    pays, lost = findings(rows)
    assert pays == (
        "head size 128: pays from N tokens on; here N = about 6.0k (k16), 4k or fewer (k8); does not pay up to 8k (k32)"
    )
    assert lost == (
        "head size 128, lost in 3 of 6 cases: k16 at 4k, 2.00x slower than cuDNN; k32 at 4k, 2.00x slower than cuDNN; "
        "k32 at 8k, 1.50x slower than cuDNN"
    )


def test_one_length_says_nothing_of_a_crossover():
    assert findings([row(8 * K, 1.0, 2.0), row(4 * K, 1.0, 2.0, "k8")]) == []


def test_beside_an_8_bit_cache():
    rows = [
        row(8 * K, 2.0, 4.0, "dense-int8 by the same kernels"),
        row(8 * K, 1.0, 4.0),
        row(8 * K, 3.0, 4.0, "16+k16"),
    ]
    assert findings(rows) == ["head size 128, 8k tokens, beside dense-int8: k16 2.00x faster; 16+k16 1.50x slower"]


@pytest.mark.parametrize(("spread", "warned"), [(0.1, False), (0.3, True)])
def test_a_wide_spread_is_said_first(spread, warned):
    lines = findings([row(4 * K, 2.0, 1.0), row(8 * K, 2.0, 3.0, spread=spread)])
    assert lines[0].startswith("timings spread by up to 30%") == warned
    assert ("other work on this machine?" in lines[0]) == warned


def test_the_table_has_them_below():
    where = {"flashsfa": "0", "commit": None, "device": "none", "torch": "0"}
    rows = (row(4 * K, 2.0, 1.0), Row("b", "f", "c", 8, "failed", "wrong output"))
    caption = Results("decode", where, 1e9, rows).table(findings(rows)).caption
    assert caption.splitlines() == ["b: failed: wrong output", *findings(rows)]

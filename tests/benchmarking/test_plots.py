"""The picture of a run: a bar a case at the longest lengths, with its value."""

import pytest

pytest.importorskip("matplotlib")
import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from flashsfa.benchmarking import plots, results
from flashsfa.benchmarking.timing import Timing

WHERE = {"flashsfa": "0", "commit": "abc", "device": "a GPU", "torch": "0"}


def row(curve, n, ratio, rival="cudnn_grouped"):
    clock = Timing(1.0, 1.0, 1.0)
    baselines = {rival: results.BaselineResult(clock, 1.0, ratio, 1.0)}
    return results.Row(curve, "head size 128", curve, n, "ok", timing=clock, baselines=baselines)


def drawn(rows, path, monkeypatch):
    """All texts of the picture."""
    found = []
    monkeypatch.setattr(plt, "close", found.append)
    plots.draw(results.Results("decode", WHERE, 1e9, tuple(rows)), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (figure,) = found
    (axes,) = figure.axes
    return axes, [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def test_values_stand_on_the_bars(tmp_path, monkeypatch):
    rows = [
        row(curve, n, ratio)
        for curve, n, ratio in (("k16", 1024, 0.5), ("k16", 8192, 1.61), ("k16", 32768, 1.65), ("k8", 32768, 0.87))
    ]
    axes, texts = drawn(rows, tmp_path / "a.png", monkeypatch)
    assert sorted(bar.get_width() for bar in axes.patches) == [0.87, 1.61, 1.65]  # the two longest lengths
    for text in (
        "0.87x",
        "1.61x",
        "1.65x",
        "k16",
        "k8",
        "head size 128",
        "32k tokens",
        "8k tokens",
        "slower than the rival",
    ):
        assert text in texts
    assert axes.get_xscale() == "linear"
    assert axes.get_xlabel() == "times as fast as cuDNN (higher is better)"
    assert any("a GPU" in text and "commit abc" in text for text in texts)


def test_a_picture_of_nothing_says_so(tmp_path, monkeypatch):
    axes, texts = drawn([results.Row("a", "f", "c", 8, "failed", "wrong output")], tmp_path / "a.png", monkeypatch)
    assert not axes.patches
    assert any("nothing was timed" in text for text in texts)

"""`flashsfa bench` on the command line."""

import sys

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from flashsfa import benchmarking
from flashsfa.benchmarking.results import Results, Row
from flashsfa.extras import install_hint
from words_model import assert_refused


def test_bench_generate_without_transformers(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "flashsfa.benchmarking.generate", raising=False)
    monkeypatch.delattr(benchmarking, "generate", raising=False)
    command = ["bench", "generate", "--quick", "--device", "cpu", "-o", str(tmp_path / "a" / "out")]
    assert_refused(capsys, command, install_hint("hf"))
    assert not list(tmp_path.iterdir())


def test_results_that_cannot_be_written_leave_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("no space left")

    results = Results("topk", {"date": "2026-01-01", "commit": None}, 1.0, (Row("a", "f", "c", 8, "skipped"),))
    assert [results.save(tmp_path / "kept")] == list((tmp_path / "kept").iterdir())
    monkeypatch.setattr("flashsfa.benchmarking.results.json.dumps", full)
    with pytest.raises(OSError, match="no space left"):
        results.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()

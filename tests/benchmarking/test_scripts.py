"""Scripts of benchmarks/: which run the results page shows, and the time of the host."""

import json
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def page():
    """The names of the script in a dictionary that its functions look into."""
    main = runpy.run_path(str(ROOT / "benchmarks" / "results_page.py"))["main"]
    return main.__globals__


@pytest.mark.parametrize(
    ("commits", "shown"), [(("a", "b"), "b"), (("a", "b-dirty"), "a"), (("a-dirty", "b-dirty"), "b-dirty")]
)
def test_the_newest_run_of_a_clean_commit_is_shown(page, commits, shown, tmp_path, monkeypatch):
    monkeypatch.setitem(page, "RESULTS", tmp_path)
    for day, commit in enumerate(commits):
        where = {"date": f"2026-01-0{day + 1}", "device": "NVIDIA H100", "commit": commit}
        (tmp_path / f"decode-{commit}.json").write_text(json.dumps({"operation": "decode", "environment": where}))
    where = {"date": "2027-01-01", "device": "A CPU, 2 threads", "commit": "c"}
    (tmp_path / "decode-c.json").write_text(json.dumps({"operation": "decode", "environment": where}))
    assert page["_runs"]("decode")[-1] == f"decode-{shown}"
    assert page["_runs"]("decode", on_gpu=False) == ["decode-c"]


@pytest.mark.parametrize(
    ("spelt", "name"),
    [
        ("d=128, 16 dense + k=16, tolerance 0.01, 16/16 heads", "d=128, 16+k16-skip, 16/16 heads"),
        ("d=64, k=8, 8-bit, n=8k", "d=64, k8-int8, n=8k"),
        ("d=64, 22+k12, dense queries", "d=64, 22+k12, dense queries"),
    ],
)
def test_earlier_runs_have_the_same_names(page, spelt, name):
    assert page["_renamed"](spelt) == name


def test_results_are_json_alone():
    assert {path.suffix for path in (ROOT / "benchmarks" / "results").iterdir()} == {".json", ".md"}


@pytest.mark.cpu
def test_host_time(tmp_path, monkeypatch, capsys):
    main = runpy.run_path(str(ROOT / "benchmarks" / "host_time.py"))["main"]
    for name, value in {"CALLS": 2, "REPEATS": 2}.items():
        monkeypatch.setitem(main.__globals__, name, value)
    monkeypatch.setattr(sys, "argv", ["host_time.py", "-o", str(tmp_path)])
    main()
    (path,) = tmp_path.iterdir()
    document = json.loads(path.read_text())
    assert document["operation"] == "host"
    out = capsys.readouterr().out
    for case, row in document["rows"].items():
        assert case in out
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
    for part in (
        "SDPA",
        "sparse_feature_attention",
        "sparse_feature_decode",
        "value_tolerance",
        "SparseKVCache",
        "PagedSparseKVCache",
    ):
        assert any(part in case for case in document["rows"])

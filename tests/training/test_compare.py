"""Finished runs beside one another."""

import json

import numpy as np
import pytest

from flashsfa.cli import main
from tiny import refused


def finished(path, *, perplexity, seed=0, batch=4, step=0.5, **attention):
    """A run's directory with the result that it would have."""
    path.mkdir()
    training = {"tokens": 640, "batch": batch, "seed": seed}
    content = {"recipe": {"data": {"context": 16}, "training": training, "attention": attention}, "parameters": 7}
    content |= {"environment": {"date": "2026-01-02T03:04", "commit": "abc"}, "steps": 10, "perplexity": perplexity}
    content |= {"seconds_per_step": step, "peak_memory_bytes": None}
    content["curve"] = [{"step": step, "loss": np.log(perplexity) + 1 / step} for step in range(1, 11)]
    (path / "result.json").write_text(json.dumps(content))
    return str(path)


def test_runs_are_compared_seed_by_seed(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [finished(tmp_path / f"dense{s}", perplexity=p, seed=s, kind="dense") for s, p in ((0, 10.0), (1, 20.0))]
    runs += [finished(tmp_path / f"sfa{s}", perplexity=p, seed=s, kind="sfa") for s, p in ((0, 11.0), (1, 21.0))]
    assert main(["train", "compare", *runs, "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "+7.50 %" in out
    assert "+5.00 to +10.00" in out
    written = tmp_path / "out" / "training-2026-01-02-abc.json"
    dense, sfa = json.loads(written.read_text())["results"]
    assert (dense["runs"], sfa["seeds"]) == (["dense0", "dense1"], [0, 1])
    np.testing.assert_allclose(sfa["change"], [0.1, 0.05])
    assert written.with_suffix(".png").stat().st_size > 0


def test_figures_of_one_kind_are_means_over_its_seeds(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [finished(tmp_path / f"a{s}", perplexity=10.0, seed=s, step=step) for s, step in ((0, 0.5), (1, 0.7))]
    assert main(["train", "compare", *runs, "-o", str(tmp_path / "out")]) == 0
    (row,) = json.loads((tmp_path / "out" / "training-2026-01-02-abc.json").read_text())["results"]
    assert row["seconds_per_step"] == pytest.approx(0.6)
    assert row["peak_memory_bytes"] is None
    again = finished(tmp_path / "again", perplexity=12.0, seed=1)
    code = main(["train", "compare", *runs, again, "-o", str(tmp_path / "other")])
    refused(capsys, code, "a1 and again are runs of one recipe and seed")


def test_a_run_from_before_a_key_was_there_is_one_with_its_default(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    old = [
        finished(tmp_path / "dense0", perplexity=10.0, kind="dense"),
        finished(tmp_path / "sfa0", perplexity=11.0, kind="sfa"),
    ]
    new = [
        finished(tmp_path / "dense1", perplexity=20.0, seed=1, kind="dense", dense_share=0.0),
        finished(tmp_path / "sfa1", perplexity=21.0, seed=1, kind="sfa", dense_share=0.0),
    ]
    for run in new:  # keys beside the attention's: of the data, and beside all parts
        file = tmp_path / run / "result.json"
        content = json.loads(file.read_text())
        content["recipe"]["license"] = content["recipe"]["data"]["separator"] = None
        file.write_text(json.dumps(content))
    assert main(["train", "compare", *old, *new, "-o", str(tmp_path / "out")]) == 0
    late = finished(tmp_path / "late", perplexity=21.0, seed=1, kind="sfa", dense_share=0.5)
    assert main(["train", "compare", *old[:1], *new, late, "-o", str(tmp_path / "other")]) == 0
    kinds = [row["runs"] for row in json.loads(next((tmp_path / "other").glob("*.json")).read_text())["results"]]
    assert kinds == [["dense0", "dense1"], ["sfa1"], ["late"]]


def test_runs_too_short_for_a_curve_are_compared_without_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = finished(tmp_path / "a", perplexity=10.0)
    content = json.loads((tmp_path / "a" / "result.json").read_text())
    content["curve"] = content["curve"][:7]
    (tmp_path / "a" / "result.json").write_text(json.dumps(content))
    assert main(["train", "compare", run, "-o", str(tmp_path / "out")]) == 0
    assert "no picture: a curve takes 8 logged losses" in capsys.readouterr().out
    assert [path.suffix for path in (tmp_path / "out").iterdir()] == [".json"]


def test_runs_that_saw_other_data_are_not_compared(tmp_path, capsys):
    runs = [finished(tmp_path / "a", perplexity=10.0), finished(tmp_path / "b", perplexity=10.0, batch=8)]
    assert main(["train", "compare", *runs, "-o", str(tmp_path / "out")]) == 2
    assert "b saw other data or took other steps than a" in capsys.readouterr().err
    runs[1] = finished(tmp_path / "c", perplexity=10.0, seed=1, kind="sfa")
    assert main(["train", "compare", *runs, "-o", str(tmp_path / "out")]) == 2
    assert "c has seed 1, and a was not run with it" in capsys.readouterr().err
    assert main(["train", "compare", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def set_(content, key, value):
    *parents, last = key.split(".")
    for name in parents:
        content = content[name]
    if value is MISSING:
        del content[last]
    else:
        content[last] = value


MISSING = object()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("recipe", MISSING, "recipe.data.context is missing"),
        ("recipe", [], "recipe.data.context is missing"),
        ("recipe.training", None, "recipe.training.tokens is missing"),
        ("recipe.training.seed", MISSING, "recipe.training.seed is missing"),
        ("recipe.training.batch", 0, "recipe.training.batch is 0"),
        ("recipe.training.tokens", 10**400, "recipe.training.tokens is 1000"),
        ("recipe.attention", [1], "recipe.attention is no mapping"),
        ("perplexity", MISSING, "perplexity is missing"),
        ("perplexity", "10", "perplexity is '10'"),
        ("perplexity", None, "perplexity is None"),
        ("perplexity", float("nan"), "perplexity is nan"),
        ("perplexity", float("inf"), "perplexity is inf"),
        ("perplexity", 0, "perplexity is 0"),
        ("perplexity", True, "perplexity is True"),
        ("parameters", 1.5, "parameters is 1.5"),
        ("steps", "ten", "steps is 'ten'"),
        ("seconds_per_step", "1", "seconds_per_step is '1'"),
        ("peak_memory_bytes", MISSING, "peak_memory_bytes is missing"),
        ("environment", MISSING, "environment.date is missing"),
        ("environment", "here", "environment.date is missing"),
        ("environment.date", "../../x", "environment.date is no date"),
        ("environment.date", 5, "environment.date is no date"),
        ("environment.commit", "/../../x", "environment.commit is no commit"),
        ("environment.commit", "..", "environment.commit is no commit"),
        ("environment.commit", 7, "environment.commit is no commit"),
        ("curve", None, "curve is no list of rows"),
        ("curve", [], "curve holds no loss"),
        ("curve", [1, 2], "curve is no list of rows"),
        ("curve", [{"step": 1}], "curve holds no loss"),
        ("curve", [{"loss": 1.0}], "curve: step is None"),
        ("curve", [{"step": 1, "loss": float("nan")}], "curve: loss is nan"),
        ("curve", [{"step": 1, "loss": "x"}], "curve: loss is 'x'"),
    ],
)
def test_a_result_that_is_not_whole_is_refused_by_its_key(tmp_path, capsys, key, value, message):
    pytest.importorskip("matplotlib")
    path = finished(tmp_path / "a", perplexity=10.0)
    content = json.loads((tmp_path / "a" / "result.json").read_text())
    set_(content, key, value)
    (tmp_path / "a" / "result.json").write_text(json.dumps(content))
    refused(capsys, main(["train", "compare", path, "-o", str(tmp_path / "out")]), "a/result.json", message)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "text", [b"", b'{"recipe": {', b"null", b"[]", b"5", bytes(range(128, 256)), b"[" * 100_000, b"9" * 5000]
)
def test_a_result_that_is_no_object_is_refused(tmp_path, capsys, text):
    pytest.importorskip("matplotlib")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result.json").write_bytes(text)
    code = main(["train", "compare", str(tmp_path / "a"), "-o", str(tmp_path / "out")])
    refused(capsys, code, "a/result.json", "leave this run out, or run it again")
    assert not (tmp_path / "out").exists()


def test_two_runs_of_one_name_are_not_compared(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    runs = [finished(tmp_path / folder / "run", perplexity=10.0, seed=i) for i, folder in enumerate(("one", "other"))]
    refused(capsys, main(["train", "compare", *runs, "-o", str(tmp_path / "out")]), "two runs are named run")


def test_names_are_written_as_they_are_and_losses_far_apart_are_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [
        finished(tmp_path / "[red]$\\frac$", perplexity=10.0),
        finished(tmp_path / "b", perplexity=1e9, kind="sfa"),
    ]
    content = json.loads((tmp_path / "b" / "result.json").read_text())
    content["curve"] = [{"step": step, "loss": 5000.0} for step in (1, 2)]
    (tmp_path / "b" / "result.json").write_text(json.dumps(content))
    assert main(["train", "compare", *runs, "-o", str(tmp_path / "out")]) == 0
    assert "[red]$\\frac$" in capsys.readouterr().out
    content["curve"] = [{"step": 1000, "loss": 2.0}]  # no step in common
    (tmp_path / "b" / "result.json").write_text(json.dumps(content))
    assert main(["train", "compare", *runs, "-o", str(tmp_path / "out")]) == 0

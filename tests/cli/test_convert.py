"""`flashsfa convert`: one-line errors that leave nothing behind, and a whole conversion of a tiny model."""

import functools
import json
import re

import pytest
import torch

import flashsfa
from flashsfa.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
import flashsfa.convert  # noqa: E402
from flashsfa.huggingface.settings import BASIS_FILE  # noqa: E402
from words_model import assert_refused  # noqa: E402


@pytest.fixture
def short(monkeypatch):
    """Times of one short context alone."""
    settings = functools.partial(flashsfa.convert.ConvertSettings, contexts=(64,))
    monkeypatch.setattr(flashsfa.convert, "ConvertSettings", settings)


def arguments(model, text, output, *more):
    sizes = ["--topk", "2", "--dense-dims", "2", "--window", "32", "--windows", "2", "--dtype", "float32"]
    sizes += ["--cache-dtype", "auto", "--recent", "0", "--first", "0", "--prefill", "coded"]
    texts = ["--calibrate", str(text), "--eval", str(text)]
    return ["convert", str(model), "-o", str(output), *texts, *sizes, *more]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing text", "does not exist"),
        ("empty text", "is empty"),
        ("short text", "less than one window"),
        ("texts overlap", "lies inside the other"),
        ("no model", "config.json is missing"),
        ("no directory", "there is no such directory"),
        ("budget", "topk must be"),
        ("query budget", "topk_query must be"),
        ("window", "--window must be"),
    ],
)
def test_errors_leave_nothing(case, message, tiny, text, tmp_path, capsys):
    model, more = tiny, []
    if case == "missing text":
        text = tmp_path / "nowhere.txt"
    elif case == "empty text":
        text.write_text(" \n")
    elif case == "short text":
        text.write_text("word1 word2")
    elif case == "no directory":
        model = tmp_path / "nowhere"
    elif case == "no model":
        model = tmp_path / "folder"
        model.mkdir()
    elif case == "texts overlap":
        more = ["--calibrate", str(text.parent)]
    else:
        more = {"budget": ["--topk", "7"], "query budget": ["--topk-query", "7"], "window": ["--window", "1"]}[case]
    before = set(tmp_path.iterdir())
    assert_refused(capsys, arguments(model, text, tmp_path / "out", *more), message)
    assert set(tmp_path.iterdir()) == before


def test_a_code_that_is_larger_than_a_dense_cache_is_refused_before_any_work(tiny, text, tmp_path, capsys):
    command = arguments(tiny, text, tmp_path / "out", "--dense-dims", "4", "--topk", "4", "--dtype", "bfloat16")
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert (
        "4 dense + top-4, 16 bits takes 36 bytes per token and kv head, more than the 32 of a dense key and value"
        in err
    )
    assert "keep fewer features, or keep them in fewer bits" in err
    assert "calibrating" not in out
    assert not (tmp_path / "out").exists()


def test_output_that_exists_is_kept(tiny, text, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("data")
    before = set(tmp_path.iterdir())
    assert_refused(capsys, arguments(tiny, text, output), "exists already")
    assert_refused(capsys, arguments(tiny, text, text), "exists already")
    assert (output / "precious").read_text() == "data"
    assert set(tmp_path.iterdir()) == before


def test_convert(tiny, text, tmp_path, capsys, short):
    output = tmp_path / "out"
    output.mkdir()  # an empty directory is fine
    assert main(arguments(tiny, text, output)) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"out", "text.txt"}
    report = json.loads((output / "report.json").read_text())
    layers, kv_heads, head_dim = 2, 2, 8
    for name, token_bytes in (("dense", 64), ("dense_int8", 2 * (8 + 4)), ("topk", 4 * 2 + 5 * 2 + 32)):
        row = report["variants"][name]
        assert row["perplexity"] > 1
        assert row["kv_bytes_per_token"] == layers * kv_heads * token_bytes
    assert head_dim == report["settings"]["head_dim"]
    assert report["chosen"] == "topk"
    assert report["switched"]["topk"] == report["switched"]["dense_dims"] == 2
    assert report["versions"]["flashsfa"] == flashsfa.__version__
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    for phase in ("loading the model", "calibrating", "fitting the basis", "perplexity: dense", "timing attention"):
        assert re.search(rf"^ *\d+ s  {phase}", out, re.MULTILINE)  # a line each where no terminal is
    assert "Loss: perplexity " in out
    assert "Written: 2 dense + top-2, 16 bits, " in out
    assert "Decode here: " in out
    model = flashsfa.from_pretrained(output)
    assert model.config.sfa["topk"] == 2
    assert model(torch.tensor([[2, 3, 4]])).logits.isfinite().all()
    assert main(["info", str(output)]) == 0
    out = capsys.readouterr().out
    assert "topk: 2" in out
    assert "basis: dictionary" in out
    assert f"loss: {100 * report['perplexity_increase']:+.1f} %" in out


def test_convert_to_an_eight_bit_cache(tiny, text, tmp_path, short):
    output = tmp_path / "out"
    assert main(arguments(tiny, text, output, "--dense-dims", "5", "--cache-dtype", "int8")) == 0
    report = json.loads((output / "report.json").read_text())
    row = report["variants"]["topk"]
    assert row["key_bytes_per_token_and_head"] == 5 + 2 * 2 + 4
    assert row["value_bytes_per_token_and_head"] == 8 + 4
    assert report["settings"]["cache_dtype"] == "int8"
    assert flashsfa.from_pretrained(output).config.sfa["cache_dtype"] == "int8"


def test_convert_to_a_cache_with_exact_tokens(tiny, text, tmp_path, short):
    output = tmp_path / "out"
    assert main(arguments(tiny, text, output, "--recent", "1000", "--first", "3")) == 0
    report = json.loads((output / "report.json").read_text())
    dense, row = report["variants"]["dense"], report["variants"]["topk"]
    assert row["kv_bytes_per_token"] == dense["kv_bytes_per_token"]
    assert row["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-3)
    settings = flashsfa.from_pretrained(output).config.sfa
    assert (settings["recent"], settings["first"]) == (1000, 3)


@pytest.mark.parametrize("kilobytes", [1, 20])
def test_full_disk_leaves_nothing_but_what_was_measured(kilobytes, tiny, text, tmp_path, capsys, short):
    """No file may grow past a limit, which writers meet as they meet a full disk."""
    resource = pytest.importorskip("resource")
    before = set(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, limits[1]))
    try:
        code = main(arguments(tiny, text, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "flashsfa: error:" in error[0]
    assert "File too large" in error[0]
    kept = tmp_path / ".out.measured.json"
    assert set(tmp_path.iterdir()) == before | ({kept} if kilobytes > 1 else set(tmp_path.glob(kept.name)))
    assert (f"what was measured is kept in {kept}: the same command goes on from there" in error[0]) == kept.exists()


def without(command, *options):
    for option in options:
        at = command.index(option)
        command = command[:at] + command[at + 2 :]
    return command


def test_the_dense_channel_follows_the_head_size(tiny, text, tmp_path, short):
    assert main(without(arguments(tiny, text, tmp_path / "out", "--topk-query", "dense"), "--dense-dims")) == 0
    switched = json.loads((tmp_path / "out" / "report.json").read_text())["switched"]
    assert (switched["dense_dims"], switched["topk"], switched["topk_query"]) == (3, 2, 8)


@pytest.mark.parametrize("key_bytes", [None, 7])
def test_what_measures_best_for_the_bytes_is_written(key_bytes, tiny, text, tmp_path, short, capsys):
    output = tmp_path / "out"
    command = without(arguments(tiny, text, output), "--topk", "--dense-dims", "--cache-dtype", "--recent", "--first")
    command += ["--cache-dtype", "int8", "--recent", "2", "--first", "1"]
    assert main(command if key_bytes is None else [*command, "--key-bytes", str(key_bytes)]) == 0
    report = json.loads((output / "report.json").read_text())
    rows, of_key = report["variants"], key_bytes or 8
    assert list(rows) == ["dense", "dense_int8", "topk_16", "topk", "axes"]
    exact = 3 * 4 * 8  # of 32 tokens
    assert rows["axes"]["key_bytes_per_token_and_head"] == (29 * of_key + exact) / 32
    assert rows["topk"]["key_bytes_per_token_and_head"] <= (29 * of_key + exact) / 32
    assert report["chosen"] == min(("topk", "axes"), key=lambda name: rows[name]["perplexity"])
    model = flashsfa.from_pretrained(output)
    assert model.config.sfa["cache_dtype"] == "int8"
    assert (model.config.sfa["topk"] is None) == (report["chosen"] == "axes")
    assert (model.config.sfa["recent"], model.config.sfa["first"], model.config.sfa["prefill"]) == (2, 1, "coded")
    capsys.readouterr()
    assert main(["info", str(output)]) == 0
    assert f"basis: {report['switched']['basis']}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["scaled", "whitened"])
def test_bytes_in_a_basis_that_is_named_are_bits_per_axis(kind, tiny, text, tmp_path, short):
    command = without(arguments(tiny, text, tmp_path / "out"), "--topk", "--dense-dims", "--cache-dtype")
    assert main([*command, "--key-bytes", "3", "--basis", kind, "--cache-dtype", "int8"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["variants"]) == ["dense", "dense_int8", "axes"]
    assert (report["chosen"], report["switched"]["basis"]) == ("axes", kind)
    assert flashsfa.FeatureBasis.load(tmp_path / "out" / BASIS_FILE).axes.key_bytes == 3


def test_two_ways_to_say_what_a_key_keeps(tiny, text, tmp_path, capsys):
    assert_refused(capsys, arguments(tiny, text, tmp_path / "out", "--key-bytes", "4"), "give one of them")
    command = without(arguments(tiny, text, tmp_path / "out"), "--topk")
    assert_refused(capsys, command, "--dense-dims goes with --topk")
    command = without(command, "--dense-dims", "--cache-dtype")
    assert_refused(
        capsys, [*command, "--key-bytes", "4", "--basis", "pca"], "--basis must be scaled or whitened with --key-bytes"
    )
    message = "--key-bytes must be 1 to the model's head size, 8, got 9"
    assert_refused(capsys, [*command, "--cache-dtype", "int8", "--key-bytes", "9"], message)


def report_of(loss, *, topk_query=64):
    row = {
        "label": "",
        "kv_bytes_per_token": 100.0,
        "key_bytes_per_token_and_head": 8.0,
        "value_bytes_per_token_and_head": 8.0,
        "token_bytes": 16,
        "share": 1.0,
        "loss_error": None,
    }
    switched = {"dense_dims": 22, "topk": 12, "topk_query": topk_query, "recent": 32, "first": 4}
    times = [
        {"context": n, "decode_dense": 2.0, "decode_sfa": time}
        for n, time in ((1024, 1.0), (4096, 3.0), (16384, 1.5), (32768, 1.25))
    ]
    return {
        "variants": {"dense": row | {"perplexity": 10.0, "loss": 0.0}, "topk": row | {"perplexity": 10 * (1 + loss), "loss": loss}},
        "chosen": "topk", "switched": switched, "settings": {"head_dim": 64, "max_loss": None, "max_bytes": None, "preset": None}, "texts": {"sfa": "so", "dense": "on"},
        "perplexity_increase": loss, "attention_ms": times,
    }  # fmt: skip


@pytest.mark.parametrize(("loss", "topk_query"), [(0.04, 64), (0.06, 64), (0.06, 12)])
def test_a_large_loss_is_said_with_what_would_be_better(loss, topk_query, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flashsfa.convert, "convert", lambda *arguments: report_of(loss, topk_query=topk_query))
    assert main(["convert", "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert f"Loss: perplexity {10 * (1 + loss):.2f} against 10.00 dense, {100 * loss:+.2f} %" in out
    assert "Decode here: faster than dense from 16384 tokens on" in out
    is_large = loss > 0.05
    assert ("That is much (over 5 %)" in out) == is_large
    assert ("--dense-dims 28 --topk 12" in out) == is_large
    assert "--dense-dims 24 --topk 8" not in out  # fewer bytes than the budget has
    assert ("--topk-query dense" in out) == (topk_query != 64)


def test_a_model_of_few_positions(tiny, text, tmp_path):
    """Its continuation ends where its positions do."""
    sizes = {"vocab_size": 67, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)
    ).save_pretrained(tmp_path / "short")
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "short")
    more = ("--window", "32", "--topk", "4", "--cache-dtype", "int8")
    assert main(arguments(tmp_path / "short", text, tmp_path / "out", *more)) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["texts"]["sfa"].split()) <= 32

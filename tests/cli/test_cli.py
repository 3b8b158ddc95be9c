"""The command line: one-line errors that leave nothing behind, and a whole conversion of a tiny model."""

import functools
import json
import random
import sys

import pytest
import torch

import flashsfa
from flashsfa.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
import flashsfa.convert  # noqa: E402
from flashsfa import benchmarking  # noqa: E402
from flashsfa.benchmarking.results import Results, Row  # noqa: E402

WORDS = [f"word{i}" for i in range(60)] + ["The", "history", "of", "science", "is"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<pad>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", model_input_names=["input_ids", "attention_mask"]
    ).save_pretrained(folder)
    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 2, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=300)))
    return path


def arguments(model, text, output, *more):
    sizes = ["--topk", "2", "--dense-dims", "2", "--window", "32", "--windows", "2", "--dtype", "float32"]
    texts = ["--calibrate", str(text), "--eval", str(text)]
    return ["convert", str(model), "-o", str(output), *texts, *sizes, *more]


def assert_refused(capsys, command, message):
    assert main(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("flashsfa: error:")
    assert message in lines[0]


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
        ("query budget", "topk must be"),
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


def test_output_that_exists_is_kept(tiny, text, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("data")
    before = set(tmp_path.iterdir())
    assert_refused(capsys, arguments(tiny, text, output), "exists already")
    assert_refused(capsys, arguments(tiny, text, text), "exists already")
    assert (output / "precious").read_text() == "data"
    assert set(tmp_path.iterdir()) == before


def test_convert(tiny, text, tmp_path, capsys, monkeypatch):
    short = functools.partial(flashsfa.convert.ConvertSettings, contexts=(64,))
    monkeypatch.setattr(flashsfa.convert, "ConvertSettings", short)
    output = tmp_path / "out"
    output.mkdir()  # an empty directory is fine
    assert main(arguments(tiny, text, output)) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"out", "text.txt"}
    report = json.loads((output / "report.json").read_text())
    layers, kv_heads, head_dim = 2, 2, 8
    for name, key_bytes in (("dense", 4 * head_dim), ("sfa", 4 * 2 + 5 * 2)):
        assert report[name]["perplexity"] > 1
        assert report[name]["kv_bytes_per_token"] == layers * kv_heads * (key_bytes + 4 * head_dim)
    assert report["settings"]["topk"] == report["settings"]["dense_dims"] == 2
    assert report["versions"]["flashsfa"] == flashsfa.__version__
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    model = flashsfa.from_pretrained(output)
    assert model.config.sfa["topk"] == 2
    assert model(torch.tensor([[2, 3, 4]])).logits.isfinite().all()
    capsys.readouterr()
    assert main(["info", str(output)]) == 0
    assert "topk: 2" in capsys.readouterr().out


def test_convert_to_an_eight_bit_cache(tiny, text, tmp_path, monkeypatch):
    short = functools.partial(flashsfa.convert.ConvertSettings, contexts=(64,))
    monkeypatch.setattr(flashsfa.convert, "ConvertSettings", short)
    output = tmp_path / "out"
    assert main(arguments(tiny, text, output, "--dense-dims", "5", "--cache-dtype", "int8")) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["dense"]["kv_bytes_per_token"] == 2 * 2 * (4 * 8 + 4 * 8)
    assert report["sfa"]["key_bytes_per_token_and_head"] == 5 + 2 * 2 + 4
    assert report["sfa"]["value_bytes_per_token_and_head"] == 8 + 4
    assert report["plain_topk"]["label"] == "top-4 alone, int8"  # 12 of at most 13 bytes
    assert report["settings"]["cache_dtype"] == "int8"
    assert flashsfa.from_pretrained(output).config.sfa["cache_dtype"] == "int8"


@pytest.mark.parametrize("kilobytes", [1, 20])
def test_full_disk_leaves_nothing(kilobytes, tiny, text, tmp_path, capsys, monkeypatch):
    """No file may grow past a limit, which writers meet as they meet a full disk."""
    resource = pytest.importorskip("resource")
    short = functools.partial(flashsfa.convert.ConvertSettings, contexts=(64,))
    monkeypatch.setattr(flashsfa.convert, "ConvertSettings", short)
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
    assert set(tmp_path.iterdir()) == before


def test_bench_generate_without_transformers(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "flashsfa.benchmarking.generate", raising=False)
    monkeypatch.delattr(benchmarking, "generate", raising=False)
    command = ["bench", "generate", "--quick", "--device", "cpu", "-o", str(tmp_path / "a" / "out")]
    assert_refused(capsys, command, "pip install 'flashsfa[hf]'")
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


def test_info(tiny, tmp_path, capsys):
    assert main(["info"]) == 0
    assert f"flashsfa {flashsfa.__version__}" in capsys.readouterr().out
    assert_refused(capsys, ["info", str(tmp_path)], "config.json is missing")
    assert_refused(capsys, ["info", str(tiny)], "dense model")

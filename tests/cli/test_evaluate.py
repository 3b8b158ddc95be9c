"""`flashsfa eval`: the figures in the JSON and on screen, and errors that leave nothing."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

import flashsfa
from flashsfa.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from bytes_model import TEXT, byte_tokenizer, save_tiny  # noqa: E402
from flashsfa.evaluation import needle  # noqa: E402
from flashsfa.evaluation.perplexity import perplexity  # noqa: E402
from flashsfa.evaluation.subject import SWITCH_OPTIONS  # noqa: E402
from flashsfa.huggingface import SparseCache  # noqa: E402

SWITCH = [
    ["--topk-query", 8], ["--dense-dims", 2], ["--basis", "pca"], ["--max-position", 50], ["--calibrate", __file__],
    ["--cache-dtype", "int8"], ["--recent", 8], ["--first", 0],
]  # fmt: skip
BUDGET = ["--topk", "2", "--dense-dims", "2", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def evaluate(name, model, output, *more):
    return main(["eval", name, str(model), "-o", str(output), *map(str, more)])


def document(directory):
    (path,) = directory.glob("*.json")
    return json.loads(path.read_text())


def test_perplexity(tiny, text, tmp_path, capsys, monkeypatch):
    """The JSON's figure is exp of the mean loss over the same windows, though their logits are taken in parts."""
    monkeypatch.setattr("flashsfa.evaluation.perplexity._ROWS", 64)
    assert (
        evaluate(
            "perplexity", tiny, tmp_path / "out", "--text", text, "--window", 200, "--windows", 3, "--dense", *BUDGET
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "against dense" in out
    assert "± is the standard error over 3 windows" in out
    assert "200 (-22 %)" in out
    found = document(tmp_path / "out")
    assert found["results"]["dense"]["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    assert found["results"]["sfa"]["standard_error"] > 0
    assert found["settings"]["sfa"]["topk"] == 2
    assert found["settings"]["sfa"]["topk_query"] == 8
    assert found["settings"]["sfa"]["dense_dims"] == 2
    assert found["settings"]["sfa"]["max_position"] == 200
    assert found["settings"]["window"] == 200
    assert not set(SWITCH_OPTIONS) & set(found["settings"])  # as given, they need not be what was used
    assert {"date", "torch", "transformers", "flashsfa"} <= set(found["environment"])
    assert found["results"]["sfa"]["tokens"] == 600
    assert found["results"]["sfa"]["perplexity"] != found["results"]["dense"]["perplexity"]
    from flashsfa.evaluation.text import read_text, token_windows

    windows = token_windows(byte_tokenizer(), read_text(text), length=200, count=3, purpose="test")
    with torch.device("cpu"), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
        losses = [F.cross_entropy(model(w[None]).logits[0, :-1], w[1:]).item() for w in windows.cpu()]
    assert found["results"]["dense"]["perplexity"] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-4)


@pytest.mark.parametrize(
    ("windows", "advice"),
    [(1, "--windows 2 or more"), (5, "the text has no more: a longer text, or a shorter --window")],
)
def test_perplexity_of_one_window_says_what_would_show_its_error(windows, advice, tiny, tmp_path, capsys):
    (tmp_path / "short.txt").write_text(TEXT[:300])
    more = ["--text", tmp_path / "short.txt", "--window", 200, "--windows", windows, "--dense"]
    assert evaluate("perplexity", tiny, tmp_path / "out", *more) == 0
    assert f"of one window: {advice}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("kept", ["features", "features in 8 bits", "bits per axis"])
def test_perplexity_of_a_model_that_leaves_out_values(kept, tiny, text, tmp_path, capsys):
    """It is that of decode, token by token; in float64 that is plain PyTorch, which leaves out as much as it may."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    options = {"topk": 2, "dense_dims": 2, "topk_query": "dense", "value_tolerance": 0.3}
    if kept == "features in 8 bits":
        options["cache_dtype"] = "int8"
    elif kept == "bits per axis":
        options = {
            "basis": flashsfa.calibrate(model, torch.randint(2, 258, (2, 32)), key_bytes=4),
            "value_tolerance": 0.3,
        }
    flashsfa.enable(model, **options).save_pretrained(tmp_path / "skip")
    byte_tokenizer().save_pretrained(tmp_path / "skip")
    more = ["--text", text, "--window", 40, "--windows", 1, "--dtype", "float32", "--device", "cpu"]
    assert evaluate("perplexity", tmp_path / "skip", tmp_path / "out", *more) == 0
    ids = byte_tokenizer()(TEXT, return_tensors="pt")["input_ids"][0, :40].to(model.device)
    cache, losses = SparseCache(model.double()), []
    with torch.no_grad():
        for token, after in itertools.pairwise(ids):
            logits = model(token[None, None], past_key_values=cache).logits[0]
            losses.append(F.cross_entropy(logits, after[None]).item())
    found = document(tmp_path / "out")["results"]["sfa"]["perplexity"]
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    flashsfa.enable(flashsfa.disable(model.float()), **options, recent=4).save_pretrained(tmp_path / "skip")
    capsys.readouterr()
    assert evaluate("perplexity", tmp_path / "skip", tmp_path / "no", *more) == 2
    assert "leaves out values (value_tolerance=0.3) beside exact tokens" in capsys.readouterr().err


def test_perplexity_of_an_eight_bit_cache(tiny, text, tmp_path):
    """It is what the cache gives token by token."""
    command = ["--text", text, "--window", 60, "--windows", 2, *BUDGET, "--topk-query", 8, "--cache-dtype", "int8"]
    assert evaluate("perplexity", tiny, tmp_path / "out", *command) == 0
    assert document(tmp_path / "out")["settings"]["sfa"]["cache_dtype"] == "int8"
    with torch.device("cpu"), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
        windows = torch.randint(2, 258, (2, 40))
        flashsfa.enable(model, 2, dense_dims=2, cache_dtype="int8")
        found, total = perplexity(model, windows), 0.0
        for window in windows:
            cache = SparseCache(model)
            steps = [model(token[None, None], past_key_values=cache).logits[0] for token in window]
            total += F.cross_entropy(torch.cat(steps[:-1]), window[1:]).item()
        assert found == pytest.approx(math.exp(total / 2), rel=1e-5)
        assert perplexity(flashsfa.enable(model, 2, dense_dims=2), windows) != pytest.approx(found, rel=1e-5)


def test_perplexity_with_exact_tokens(tiny, text, tmp_path, capsys):
    command = ["--text", text, "--window", 60, "--windows", 2, *BUDGET, "--topk-query", 8]
    for name, more in (("codes", []), ("some", ["--recent", 8, "--first", 2]), ("all", ["--recent", 60, "--dense"])):
        assert evaluate("perplexity", tiny, tmp_path / name, *command, *more) == 0
    rows = {name: document(tmp_path / name)["results"] for name in ("codes", "some", "all")}
    assert document(tmp_path / "some")["settings"]["sfa"]["recent"] == 8
    assert rows["all"]["sfa"]["perplexity"] == pytest.approx(rows["all"]["dense"]["perplexity"], rel=1e-5)
    assert rows["all"]["sfa"]["kv_bytes_per_token"] == rows["all"]["dense"]["kv_bytes_per_token"]
    a_row, exact, coded = 2 * 2 / 60, 10 * 2 * 8 * 4, 50 * (8 * 4 + 4 * 4 + 2)
    assert rows["some"]["sfa"]["kv_bytes_per_token"] == pytest.approx(a_row * (exact + coded))
    assert rows["some"]["sfa"]["perplexity"] != rows["codes"]["sfa"]["perplexity"]
    assert "as decode sees it" in capsys.readouterr().out
    assert evaluate("perplexity", tiny, tmp_path / "none", *command, "--recent", -1) == 2
    assert "--recent must be 0 to" in capsys.readouterr().err


def test_converted_model_and_names(tiny, text, tmp_path, capsys):
    """A converted directory brings its settings; a second run stands beside the first, which is kept."""
    model = flashsfa.enable(transformers.AutoModelForCausalLM.from_pretrained(tiny), topk=3, topk_query=8)
    model.save_pretrained(tmp_path / "converted")
    byte_tokenizer().save_pretrained(tmp_path / "converted")
    command = ("perplexity", tmp_path / "converted", tmp_path / "out", "--text", text, "--window", 100, "--windows", 1)
    assert evaluate(*command, "--device", "cpu") == 0
    first = document(tmp_path / "out")
    assert first["settings"]["sfa"]["topk"] == 3
    assert list(first["results"]) == ["sfa"]
    assert evaluate(*command, "--device", "cpu", "--dense") == 0
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == 2
    assert any(json.loads(file.read_text()) == first for file in files)
    capsys.readouterr()
    for option, value in (["--topk", 2], *SWITCH):
        assert evaluate(*command, option, value) == 2
        assert f"converted already and brings its settings along; leave out {option}" in capsys.readouterr().err


def test_needle(tiny, text, tmp_path, capsys):
    more = ["--text", text, "--lengths", "500,450", "--depths", "0,100", "--task", "multikey", "--dense", *BUDGET]
    assert evaluate("needle", tiny, tmp_path / "out", *more) == 0
    assert "450 tokens" in capsys.readouterr().out
    found = document(tmp_path / "out")
    for name in ("sfa", "dense"):
        rows = found["results"][name]["rows"]
        assert [(r["length"], r["depth"]) for r in rows] == [(450, 0), (450, 1), (500, 0), (500, 1)]
        assert all(r["prompt_tokens"] == r["length"] - 24 and len(r["answers"]) == 1 for r in rows)
    sfa, dense = ([row["answers"] for row in found["results"][name]["rows"]] for name in ("sfa", "dense"))
    assert sfa == dense
    (picture,) = (tmp_path / "out").glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_lm_eval_on_local_tasks(tiny, text, tmp_path, capsys):
    """A multiple choice and a generated answer, from files alone; the model is switched while they are asked."""
    pytest.importorskip("lm_eval")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    asked = [
        {"question": f"{a} or {b}?", "choices": [" yes", " no"], "label": a % 2} for a in range(3) for b in range(2)
    ]
    (tasks / "data.jsonl").write_text("\n".join(map(json.dumps, asked)))
    head = "task: {}\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {}}}\ntest_split: test\n"
    shared = 'doc_to_text: "{{question}}"\n'
    (tasks / "choice.yaml").write_text(
        head.format("tiny_choice", tasks / "data.jsonl") + shared + "output_type: multiple_choice\n"
        "doc_to_choice: choices\ndoc_to_target: label\nmetric_list:\n  - metric: acc\n"
    )
    (tasks / "written.yaml").write_text(
        head.format("tiny_written", tasks / "data.jsonl") + shared + "output_type: generate_until\n"
        'doc_to_target: "{{choices[label]}}"\ngeneration_kwargs: {max_gen_toks: 4, until: ["x"]}\n'
        "metric_list:\n  - metric: exact_match\n"
    )
    command = ["--include-path", tasks, "--calibrate", text, "--batch-size", 2, "--dense", *BUDGET]
    assert evaluate("lm-eval", tiny, tmp_path / "out", "--tasks", "tiny_choice,tiny_written", *command) == 0
    assert "tiny_choice" in capsys.readouterr().out
    found = document(tmp_path / "out")
    for name in ("sfa", "dense"):
        results = found["results"][name]
        assert 0 <= results["results"]["tiny_choice"]["acc,none"] <= 1
        assert results["n-samples"]["tiny_written"]["effective"] == 6
    assert found["settings"]["batch_size"] == 2
    assert found["settings"]["sfa"]["max_position"] == 1024  # the model's
    more = ["--tasks", "tiny_choice", *command, "--limit", 1, "--max-position", 300]
    assert evaluate("lm-eval", tiny, tmp_path / "short", *more) == 0
    assert document(tmp_path / "short")["settings"]["sfa"]["max_position"] == 300


def test_contexts_fit_the_model_where_nothing_is_said(tiny, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text(TEXT * (1 + 3000 // len(TEXT)))
    assert evaluate("perplexity", tiny, tmp_path / "a", "--dense", "--text", text, "--windows", 1) == 0
    assert document(tmp_path / "a")["settings"]["window"] == 1024
    assert evaluate("needle", tiny, tmp_path / "b", "--dense", "--text", text, "--depths", "50") == 0
    assert document(tmp_path / "b")["settings"]["lengths"] == [512, 1024]


@pytest.mark.parametrize(("length", "least", "shape"), [(5, 10, (1600, 5)), (2048, 4, (4, 2048)), (768, 10, (11, 768))])
def test_calibration_takes_enough_tokens_however_short_its_windows(length, least, shape):
    from flashsfa.evaluation.text import calibration_windows

    tokenizer = byte_tokenizer()
    long = TEXT * (1 + 20_000 // len(TEXT))
    assert calibration_windows(tokenizer, long, length=length, least=least).shape == shape
    few = calibration_windows(tokenizer, long[:2500], length=length, least=least)
    assert few.shape == (2500 // length, length)


@pytest.mark.parametrize(("length", "warns"), [(3000, True), (30_000, False)])
def test_a_text_too_short_to_calibrate_on_is_told(length, warns, tiny, tmp_path, caplog):
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    text.write_text((TEXT * (1 + length // len(TEXT)))[:length])
    other.write_text(TEXT)
    given = ["--text", other, "--calibrate", text, "--window", 100, "--windows", 1, *BUDGET]
    assert evaluate("perplexity", tiny, tmp_path / "out", *given) == 0
    assert ("a basis may lose much" in caplog.text) == warns


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("perplexity", ["--window", 1], "--window must be"),
        ("perplexity", ["--dense", "--window", 2000], "1024 positions"),
        ("perplexity", ["--dense", "--text", "nowhere.txt"], "does not exist"),
        ("perplexity", ["--window", 100], "give --key-bytes or --topk"),
        ("perplexity", ["--topk", 7, "--dense-dims", 2, "--window", 100], "topk must be"),
        ("perplexity", ["--key-bytes", 9, "--window", 100], "--key-bytes must be 1 to the model's head size, 8"),
        ("perplexity", ["--key-bytes", 4, "--cache-dtype", "int4", "--window", 100], "take --cache-dtype int8"),
        ("perplexity", [*BUDGET, "--window", 200, "--max-position", 100], "--max-position must be"),
        *(("perplexity", ["--dense", "--window", 100, *given], f"leave out {given[0]}, or") for given in SWITCH),
        ("needle", ["--dense", "--depths", "0,101"], "percents"),
        ("needle", ["--dense", "--task", "common-words", "--depths", "50"], "--depths means nothing to common-words"),
        ("needle", ["--dense", "--trials", 0], "--trials must be"),
        ("needle", ["--dense", "--lengths", "100"], "too few"),
        ("needle", ["--dense", "--lengths", "0"], "--lengths must be"),
        ("needle", ["--dense", "--lengths", "4096"], "1024 positions"),
        ("needle", ["--dense", "--lengths", "450", "--task", "common-words"], "too few"),
        ("lm-eval", ["--dense", "--tasks", "a", "--limit", 0], "--limit must be"),
        ("lm-eval", ["--topk", 2, "--tasks", "a", "--max-position", 1], "--max-position must be"),
    ],
)
def test_errors_leave_nothing(name, more, message, tiny, text, tmp_path, capsys):
    if name != "lm-eval" and "--text" not in more:
        more = [*more, "--text", text]
    before = set(tmp_path.iterdir())
    assert evaluate(name, tiny, tmp_path / "out", "--device", "cpu", *more) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("flashsfa: error:")
    assert message in lines[0]
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--tasks", ","], "no task is named"), (["--tasks", "a", "--include-path", "no"], "is no folder")],
)
def test_lm_eval_refuses(more, message, tiny, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    assert evaluate("lm-eval", tiny, tmp_path / "out", "--dense", *more) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_output_that_is_a_file(tiny, text, tmp_path, capsys):
    assert evaluate("perplexity", tiny, text, "--dense", "--text", text) == 2
    assert f"cannot write results to {text}: {text}: Not a directory" in capsys.readouterr().err
    assert text.read_text() == TEXT


def test_a_picture_that_fails_leaves_nothing(tiny, text, tmp_path, capsys, monkeypatch):
    def full(title, grids, path):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(needle, "draw", full)
    more = ["--text", text, "--lengths", "300", "--depths", "0", "--dense", "--device", "cpu"]
    assert evaluate("needle", tiny, tmp_path / "out", *more) == 2
    assert "no space left" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [("eval", "perplexity"), ("train", "support")], ids=" ".join)
def test_a_model_without_a_tokenizer(command, tiny, text, tmp_path, capsys):
    if command[0] == "train":
        pytest.importorskip("accelerate")
        pytest.importorskip("yaml")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    flashsfa.enable(model, topk=3, topk_query=8).save_pretrained(tmp_path / "converted")
    capsys.readouterr()
    words = [*command, str(tmp_path / "converted"), "--text", str(text), "--window", "64", "--windows", "2"]
    words += ["-o", str(tmp_path / "out")]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "holds a model without a tokenizer: save it there too" in line
    assert "--tokenizer" in line
    assert main([*words, "--tokenizer", str(tiny)]) == 0

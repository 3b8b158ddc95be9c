"""`flashsfa eval`: prompts that can be solved and stand where they say, the figures in the JSON, and errors that leave nothing."""

import json
import math
import re
from collections import Counter
from random import Random

import pytest
import torch
import torch.nn.functional as F

import flashsfa
from flashsfa.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from flashsfa.evaluation import needle  # noqa: E402
from flashsfa.evaluation.haystack import TASKS, Haystack, Sample, samples  # noqa: E402
from flashsfa.evaluation.perplexity import perplexity  # noqa: E402
from flashsfa.evaluation.subject import SWITCH_OPTIONS, Subject, SubjectSettings  # noqa: E402
from flashsfa.evaluation.text import separate_texts  # noqa: E402
from flashsfa.huggingface import SparseCache  # noqa: E402

TEXT = " ".join(
    f"Sentence {i} tells of {a} and {b}." for i in range(40) for a in ("rivers", "stones") for b in ("wind", "rain")
)
SWITCH = [
    ["--topk-query", 8], ["--dense-dims", 2], ["--basis", "pca"], ["--max-position", 50], ["--calibrate", __file__],
    ["--cache-dtype", "int8"],
]  # fmt: skip
BUDGET = ["--topk", "2", "--dense-dims", "2", "--dtype", "float32", "--device", "cpu"]


def byte_tokenizer():
    """A token a byte, so that decoding gives back what was encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "<pad>": 1} | {c: i for i, c in enumerate(alphabet, 2)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    byte_tokenizer().save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=1, bos_token_id=0, eos_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cpu"):
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


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


def solve(task, prompt):
    """The answers, found in the prompt alone."""
    body, _, question = prompt.rpartition("Question: ")
    if task == "common-words":
        return [word for word, _ in Counter(re.findall(r"^\d+\. (\w+)$", body, re.MULTILINE)).most_common(10)]
    if task == "variable-tracking":
        held = {re.search(r"\d{5}", question).group()}
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", body):
            held |= {name} if source in held else set()
        return [name for name in held if name.isalpha()]
    key = re.search(r"for (\w+) in the text", question).group(1)
    return re.findall(rf"for {key} is (\d+)\.", body)


class Solver:
    """Stands in for a model: continues a prompt with its answers."""

    device = "cpu"

    def __init__(self, task, tokenizer):
        self.task, self.tokenizer = task, tokenizer

    def generate(self, input_ids, max_new_tokens, **kwargs):
        answer = " " + ", ".join(solve(self.task, self.tokenizer.decode(input_ids[0])))
        ids = self.tokenizer(answer, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :max_new_tokens]
        return torch.cat((input_ids, ids), 1)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_hold_their_answers(task, device):
    tokenizer = byte_tokenizer()
    words = " ".join(f"word{a}{b}" for a in "abcdefghij" for b in "abcdefghij")
    hay = Haystack(tokenizer, words + ". " + TEXT)
    lengths = [2500, 3001] if task == "common-words" else [1000, 2001]
    made = samples(task, hay, lengths, [0.0, 0.5, 1.0], trials=2, seed=0)
    assert len(made) == (4 if task == "common-words" else 12)
    for sample in made:
        prompt = tokenizer.decode(sample.prompt)
        room = sample.length - sample.new_tokens - len(sample.prompt)
        assert 0 <= room <= (40 if task == "common-words" else 0)
        assert sorted(solve(task, prompt)) == sorted(sample.answers)
    with torch.device("cpu"):
        rows = needle.find_needles(Solver(task, tokenizer), tokenizer, made)
    assert {row["score"] for row in rows} == {1.0}
    assert samples(task, hay, lengths[:1], [0.5], 1, 0) == samples(task, hay, lengths[:1], [0.5], 1, 0)
    assert samples(task, hay, lengths[:1], [0.5], 1, 0) != samples(task, hay, lengths[:1], [0.5], 1, 1)
    with pytest.raises(ValueError, match="too few"):
        samples(task, hay, [150], [0.5], 1, 0)


@pytest.mark.parametrize("tokens", [700, 5000])
def test_needles_stand_at_their_depth(tokens):
    """Between pieces of at most 64 tokens, in text that is repeated where it is too short."""
    tokenizer = byte_tokenizer()
    hay = Haystack(tokenizer, TEXT[:3000])
    facts = {0.0: "<first>", 0.3: "<third>", 0.5: "<half>", 1.0: "<last>"}
    ids = hay.body(Random(0), tokens, [(depth, facts[depth]) for depth in (1.0, 0.5, 0.0, 0.3)])
    assert len(ids) == tokens
    body = tokenizer.decode(ids)
    room = tokens - sum(len(fact) + 1 for fact in facts.values())
    before = 0
    for depth, fact in facts.items():
        assert abs(body.index(fact) - 1 - before - depth * room) <= 32
        before += len(fact) + 1
    plain = body
    for fact in facts.values():
        assert plain.count(fact) == 1
        plain = plain.replace(" " + fact, "")
    assert plain in ("\n\n" + TEXT[:3000].strip()) * 4


def test_score_counts_whole_words():
    sample = Sample(10, 0.5, [], ("1234567", "Cedar"), 5)
    assert sample.score("they are 1234567 and cedar.") == 1
    assert sample.score("they are 12345678 and cedar.") == 0.5
    assert sample.score("91234567, cedars") == 0


def test_perplexity(tiny, text, tmp_path, capsys, monkeypatch):
    """The JSON's figure is exp of the mean loss over the same windows, though their logits are taken in parts."""
    monkeypatch.setattr("flashsfa.evaluation.perplexity._ROWS", 64)
    assert (
        evaluate(
            "perplexity", tiny, tmp_path / "out", "--text", text, "--window", 200, "--windows", 3, "--dense", *BUDGET
        )
        == 0
    )
    assert "against dense" in capsys.readouterr().out
    found = document(tmp_path / "out")
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


def test_score_grid():
    rows = [
        {"depth": d, "length": n, "score": s}
        for n, d, s in ((8, 0.0, 1), (8, 0.0, 0), (8, 0.5, 1), (16, 0.0, 0), (16, 0.5, 0))
    ]
    grid = needle.ScoreGrid.of(rows)
    assert (grid.depths, grid.lengths) == (["0 %", "50 %"], [8, 16])
    assert grid.scores == [[0.5, 0], [1, 0]]
    assert grid.mean == 0.375


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


def test_usual_length(tiny, capsys):
    with torch.device("cpu"):
        subject = Subject(SubjectSettings(model=str(tiny), dense=True, device="cpu"))
    assert subject.usual_length == 1024
    subject.model.config.max_position_embeddings = 4096
    assert subject.usual_length == 2048
    for name, default in (("lm-eval", "2048, or the model's"), ("needle", "the longest measured")):
        with pytest.raises(SystemExit, match="0"):
            main(["eval", name, "--help"])
        assert f"(default: {default}" in " ".join(capsys.readouterr().out.split())


def test_separate_texts(text, tmp_path, monkeypatch):
    """Two spellings of one path are one text, which is split; one inside the other is refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for other in (text, "text.txt", "./link/text.txt"):
        first, second = separate_texts(other, str(text))
        assert first + second == TEXT
        assert abs(len(first) - len(second)) <= 1
    for one, other in ((text, tmp_path), (".", "link/text.txt")):
        with pytest.raises(ValueError, match="lies inside the other"):
            separate_texts(one, other)
    (tmp_path / "text.txt.md").write_text("another")
    assert separate_texts("text.txt.md", text) == ("another", TEXT)
    assert separate_texts(None, text)[1] == TEXT


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("perplexity", ["--window", 1], "--window must be"),
        ("perplexity", ["--dense", "--window", 2000], "1024 positions"),
        ("perplexity", ["--dense", "--text", "nowhere.txt"], "does not exist"),
        ("perplexity", ["--window", 100], "give --topk"),
        ("perplexity", ["--topk", 7, "--dense-dims", 2, "--window", 100], "topk must be"),
        ("perplexity", [*BUDGET, "--window", 200, "--max-position", 100], "--max-position must be"),
        *(("perplexity", ["--dense", "--window", 100, *given], f"leave out {given[0]}, or") for given in SWITCH),
        ("needle", ["--dense", "--depths", "0,101"], "percents"),
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

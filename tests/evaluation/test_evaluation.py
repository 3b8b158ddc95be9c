"""Evaluations: prompts that can be solved and stand where they say, scores, texts, and the spread of perplexity."""

import math
import re
from collections import Counter
from random import Random

import pytest
import torch

from flashsfa.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from bytes_model import TEXT, byte_tokenizer, save_tiny  # noqa: E402
from flashsfa.evaluation import needle  # noqa: E402
from flashsfa.evaluation.haystack import TASKS, Haystack, Sample, samples  # noqa: E402
from flashsfa.evaluation.perplexity import spread  # noqa: E402
from flashsfa.evaluation.subject import Subject, SubjectSettings  # noqa: E402
from flashsfa.evaluation.text import separate_texts  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


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


def test_score_grid():
    rows = [
        {"depth": d, "length": n, "score": s}
        for n, d, s in ((8, 0.0, 1), (8, 0.0, 0), (8, 0.5, 1), (16, 0.0, 0), (16, 0.5, 0))
    ]
    grid = needle.ScoreGrid.of(rows)
    assert (grid.depths, grid.lengths) == (["0 %", "50 %"], [8, 16])
    assert grid.scores == [[0.5, 0], [1, 0]]
    assert grid.mean == 0.375


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


def test_spread_is_the_standard_error_of_windows_and_of_pairs():
    value, error = spread([1.0, 2.0, 3.0])
    assert value == pytest.approx(math.exp(2))
    assert error == pytest.approx(math.exp(2) / math.sqrt(3))
    ratio, error = spread([1.1, 2.1, 3.1], [1.0, 2.0, 3.0])
    assert ratio == pytest.approx(math.exp(0.1))
    assert error == pytest.approx(0, abs=1e-12)
    assert spread([1.0])[1] is None

"""README: its blocks run, its links lead somewhere, its figures stand in the results; and the results page is what the files give."""

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
OWN_MODEL = (ROOT / "docs" / "tutorials" / "own-model.md").read_text()
HEAD_DIM, WINDOW = 64, 512


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


class Tokenizer:
    """Random ids in place of text."""

    def __call__(self, text, return_tensors=None, **options):
        ids = torch.randint(1, 128, (1, 4 if len(text) < 100 else 16 * WINDOW))
        return {"input_ids": ids if return_tensors else ids[0].tolist()}

    def decode(self, ids):
        return " ".join(map(str, ids.tolist()))

    def save_pretrained(self, path):
        (Path(path) / "tokenizer.json").write_text("{}")


@pytest.fixture
def small_models(monkeypatch):
    """transformers' Auto classes give a tiny model where the README names one of the hub; folders load as ever."""
    transformers = pytest.importorskip("transformers")
    auto = transformers.AutoModelForCausalLM
    load = auto.from_pretrained
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=HEAD_DIM, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, head_dim=HEAD_DIM,
        max_position_embeddings=8192, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip

    def from_pretrained(name, **options):
        return load(name, **options) if Path(name).exists() else auto.from_config(config)

    monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Tokenizer())


@pytest.mark.cpu
def test_the_blocks_of_the_readme_run_one_after_the_other(small_models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    code = blocks(README)
    assert len(code) >= 3
    for block in code:
        exec(block, names)
    assert "attention" in capsys.readouterr().out
    assert names["q"].grad.abs().sum() > 0


@pytest.mark.parametrize("code", blocks(OWN_MODEL))
def test_the_blocks_of_the_tutorial_on_own_models_run(code):
    import flashsfa

    exec(code, {"torch": torch, "flashsfa": flashsfa})


@pytest.mark.parametrize("name", ["convert", "lora"])
def test_the_blocks_of_the_tutorials_on_models_run(name, small_models, tmp_path, monkeypatch):
    if name == "lora":
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    Path("my_text.txt").write_text("any " * 100)
    code = blocks((ROOT / "docs" / "tutorials" / f"{name}.md").read_text())
    assert code
    for block in code:
        exec(block, {})


def anchors(page):
    """What a page can be entered at: its headings as they are turned into ids, and ids of its own."""
    headings = re.findall(r"^#+ (.*)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", x).strip().lower().replace(" ", "-") for x in headings} | set(
        re.findall(r'id="([^"]+)"', page)
    )


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "benchmarks/results/README.md",
        "docs/index.md",
        "docs/tutorials/serve.md",
    ],
)
def test_links_to_files_lead_somewhere(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith("http"):
            file, _, anchor = target.partition("#")
            assert (page.parent / file).exists(), target
            assert not anchor or anchor in anchors((page.parent / file).read_text()), target


def test_every_ratio_and_loss_of_the_readme_stands_in_the_results():
    results = (ROOT / "docs" / "results.md").read_text()
    figures = re.findall(r"\d\.\d+x|[+−]\d+\.\d %", README)
    assert len(figures) >= 5
    assert [x for x in figures if x not in results] == []


def test_the_results_page_and_the_index_are_what_the_files_give():
    for path, text in runpy.run_path(str(ROOT / "benchmarks" / "results_page.py"))["pages"]().items():
        assert path.read_text() == text, f"{path.name} is out of date: make results"

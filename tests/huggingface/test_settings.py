"""What is saved with a switched model: a strict schema for its settings, a basis that belongs to them, its class."""

import json
import shutil

import pytest
import torch

import flashsfa

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

from flashsfa.huggingface import SFASettings  # noqa: E402
from flashsfa.huggingface.settings import BASIS_FILE  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "eos_token_id": None,
}  # fmt: skip


@pytest.fixture
def ids():
    return torch.randint(1, 61, (2, 12))


@pytest.fixture
def saved(tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    basis = flashsfa.calibrate(model, torch.randint(1, 61, (2, 40)), 3, dense_dims=2)
    flashsfa.enable(model, 3, dense_dims=2, basis=basis).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def edit(folder, **fields):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["sfa"] |= fields
    file.write_text(json.dumps(config))


def greedy(model, ids):
    return model.generate(ids, max_new_tokens=4, do_sample=False)


def test_settings_are_stored_and_read(saved):
    model = flashsfa.from_pretrained(saved)
    assert SFASettings.from_config(model.config.sfa) == SFASettings(3, dense_dims=2, has_basis=True)
    assert SFASettings.from_config({"topk": 4}) == SFASettings(4)


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (None, "object with a topk, got null"),
        ([1], r"object with a topk, got \[1\]"),
        ("topk", 'object with a topk, got "topk"'),
        (3, "object with a topk, got 3"),
        (True, "object with a topk, got true"),
        ({}, "topk is missing"),
        ({"topk": 3, "bogus": 1, "extra": 2}, "knows no bogus, extra"),
        ({"topk": 6.5}, "topk must be an int, got 6.5"),
        ({"topk": 6.0}, "topk must be an int, got 6.0"),
        ({"topk": True}, "topk must be an int, got True"),
        ({"topk": None}, "without topk a basis says how keys are kept"),
        ({"topk": None, "has_basis": True, "dense_dims": 2}, "dense_dims goes with topk"),
        ({"topk": "6"}, "topk must be an int, got '6'"),
        ({"topk": 0}, "topk must be at least 1, got 0"),
        ({"topk": 3, "topk_query": 8.5}, "topk_query must be an int, got 8.5"),
        ({"topk": 3, "dense_dims": None}, "dense_dims must be an int, got None"),
        ({"topk": 3, "dense_dims": -1}, "dense_dims must be at least 0, got -1"),
        ({"topk": 3, "layers": [0.5]}, "indices: each must be an int, got 0.5"),
        ({"topk": 3, "layers": [-1]}, "indices: each must be at least 0, got -1"),
        ({"topk": 3, "layers": []}, "each layer to switch once"),
        ({"topk": 3, "layers": "01"}, "layers must be a list"),
        ({"topk": 3, "has_basis": "false"}, "has_basis must be True or False, got 'false'"),
        ({"topk": 3, "has_basis": None}, "has_basis must be True or False, got None"),
        ({"topk": 3, "has_basis": 1}, "has_basis must be True or False, got 1"),
        ({"topk": 3, "value_tolerance": "0"}, "value_tolerance must be a float"),
        ({"topk": 3, "value_tolerance": 1.0}, r"value_tolerance must be in \[0, 1\)"),
        ({"topk": 3, "positions": "rope"}, "positions must be one of channel, None; got 'rope'"),
        ({"topk": 3, "cache_dtype": 8}, "cache_dtype must be a name or None, got int"),
        ({"topk": 3, "query_pattern": ["2:4"]}, "query_pattern must be one of"),
        ({"topk": 3, "recent": -1}, "recent must be 0 to"),
        ({"topk": 3, "first": 4.0}, "first must be an int, got 4.0"),
    ],
)
def test_settings_that_are_none(saved, stored, words):
    file = saved / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sfa": stored}))
    for call in (lambda: SFASettings.from_config(stored), lambda: flashsfa.from_pretrained(saved)):
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert 'settings "sfa" in config.json' in str(error.value)
        assert "\n" not in str(error.value)


def test_settings_that_do_not_fit_the_model(saved):
    edit(saved, topk=9)
    with pytest.raises(ValueError, match="topk must be 1 to 6"):
        flashsfa.from_pretrained(saved)
    edit(saved, topk=3, layers=[2])
    with pytest.raises(ValueError, match="do not exist"):
        flashsfa.from_pretrained(saved)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: {k: x * torch.nan for k, x in b.items()}, "NaN or infinity"),
        (lambda b: {k: x * 0 for k, x in b.items()}, "undo one another"),
        (lambda b: {**b, "key": 2 * b["key"]}, "undo one another"),
        (lambda b: {**b, "query": b["query"].flip(0)}, "undo one another"),
        (lambda b: {k: x.to(torch.int8) for k, x in b.items()}, "torch.int8"),
        (lambda b: {**b, "more": torch.zeros(1)}, "but key, more, query"),
        (lambda b: {k: x[:1] for k, x in b.items()}, "needs"),
        (lambda b: {k: x[..., :4, :4] for k, x in b.items()}, "needs"),
    ],
)
def test_a_basis_that_does_not_fit(saved, damage, words):
    file = saved / BASIS_FILE
    basis = damage(load_file(file, device="cpu"))
    save_file({name: x.contiguous() for name, x in basis.items()}, file)
    with pytest.raises(ValueError, match=words) as error:
        flashsfa.from_pretrained(saved)
    assert "\n" not in str(error.value)


def test_has_basis_agrees_with_what_lies_there(saved):
    edit(saved, has_basis=False)
    with pytest.raises(ValueError, match="is there, but its settings name no basis"):
        flashsfa.from_pretrained(saved)
    edit(saved, has_basis=True)
    (saved / BASIS_FILE).unlink()
    with pytest.raises(ValueError, match=r"name a basis, but .* is missing"):
        flashsfa.from_pretrained(saved)


def test_the_class_that_was_saved_comes_back(tmp_path, ids):
    kind = transformers.LlamaForSequenceClassification
    model = flashsfa.enable(kind(transformers.LlamaConfig(**SIZES)).eval(), 3)
    model.save_pretrained(tmp_path)
    again = flashsfa.from_pretrained(tmp_path)
    assert type(again) is kind
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_a_model_in_the_hub_s_cache(saved, tmp_path, ids, monkeypatch):
    """Names, revisions and subfolders as transformers takes them; without a network, what the cache holds."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit, repository = "0" * 40, tmp_path / "hub" / "models--someone--sparse-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(saved, repository / "snapshots" / commit)
    shutil.copytree(saved, repository / "snapshots" / commit / "inside")
    expected = greedy(flashsfa.from_pretrained(saved), ids)
    for options in ({}, {"revision": "main"}, {"subfolder": "inside"}):
        model = flashsfa.from_pretrained("someone/sparse-model", cache_dir=tmp_path / "hub", **options)
        assert model.config.sfa["has_basis"]
        assert torch.equal(greedy(model, ids), expected)
    assert torch.equal(greedy(flashsfa.from_pretrained(saved.parent, subfolder="m"), ids), expected)
    with pytest.raises(ValueError, match=r"someone/dense holds no model.*connect") as error:
        flashsfa.from_pretrained("someone/dense", cache_dir=tmp_path / "hub")
    assert "\n" not in str(error.value)


def test_a_dense_model_is_named(tmp_path):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a dense model"):
        flashsfa.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="there is no such directory"):
        flashsfa.from_pretrained(tmp_path / "none")

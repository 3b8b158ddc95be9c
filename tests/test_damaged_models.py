"""Models that are damaged, foreign or none: each command answers with exit code 2 and one line, and leaves nothing."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from safetensors.torch import load_file, save_file  # noqa: E402

import flashsfa  # noqa: E402
from command_lines import assert_refused, command  # noqa: E402
from flashsfa.evaluation.perplexity import perplexity  # noqa: E402


def config(**fields):
    """Changes fields of config.json."""

    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def cut(name, share=0.5):
    def change(folder):
        file = folder / name
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return change


def content(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def weights(edit):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def bigger_tokenizer(folder):
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["foreign"] = 1000
    file.write_text(json.dumps(tokenizer))


DAMAGES = {
    "no config": (remove("config.json"), "config.json is missing"),
    "config cut": (cut("config.json"), "no valid JSON"),
    "config list": (content("config.json", b'["sfa"]'), "config.json"),
    "config deep": (content("config.json", b"[" * 100_000), "nested too deeply"),
    "config binary": (content("config.json", bytes(range(256))), "no valid JSON"),
    "more layers": (config(num_hidden_layers=3), "misses model.layers.2"),
    "fewer layers": (config(num_hidden_layers=1), "holds model.layers.1"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads"),
    "3 heads": (config(num_attention_heads=3), "attention heads"),
    "other width": (config(hidden_size=64), "other shapes"),
    "str": (config(max_position_embeddings="x"), "expected int"),
    "smaller vocabulary": (config(vocab_size=50), "[62, 32] for [50, 32]"),
    "weights cut": (cut("model.safetensors"), "damaged"),
    "header cut": (cut("model.safetensors", 0.001), "damaged"),
    "no bytes": (cut("model.safetensors", 0), "damaged"),
    "no weights": (remove("model.safetensors"), "model.safetensors"),
    "a tensor less": (weights(lambda w: w.pop("model.norm.weight")), "misses model.norm.weight"),
    "a tensor more": (weights(lambda w: w.update({"z": torch.zeros(1)})), "holds z"),
    "NaN": (weights(lambda w: w["lm_head.weight"].fill_(float("nan"))), "nan"),
    "no tokenizer": (lambda folder: [remove(f)(folder) for f in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
    "tokenizer cut": (cut("tokenizer.json"), "tokenizer"),
    "foreign tokenizer": (bigger_tokenizer, "token ids up to 1000, but a model of 62"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("line", ["convert dense", "perplexity converted", "perplexity dense --dense"])
def test_damaged_models(line, kind, work, capfd):
    damage, message = DAMAGES[kind]
    damage(work / line.split()[1])
    assert_refused(capfd, command(line), message)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("line", ["convert dense", "perplexity dense --topk 2 --dense-dims 2"])
def test_keys_that_are_not_finite(line, value, work, capfd):
    weights(lambda w: w["model.layers.1.self_attn.k_proj.weight"][0].fill_(value))(work / "dense")
    assert_refused(capfd, command(line), "queries or keys hold NaN or infinity")


@pytest.mark.parametrize("kind", ["generation_config.json", "config deep", "a tensor less", "foreign tokenizer"])
def test_damaged_models_among_needles(kind, work, capfd):
    damage, message = DAMAGES.get(kind) or (cut(kind), kind)
    damage(work / "converted")
    assert_refused(capfd, command("needle converted"), message)


@pytest.mark.parametrize("names", [[5], 5, "Llama", {"a": 1}])
def test_architectures_that_are_none(names, work, capfd):
    config(architectures=names)(work / "converted")
    assert_refused(capfd, command("info converted"), "architectures in config.json")


@pytest.mark.parametrize("settings", [None, [1], "topk", 3, True, False, {}, {"topk": "2"}, {"bogus": 1}])
@pytest.mark.parametrize("line", ["info converted", "perplexity converted", "needle converted"])
def test_settings_that_are_none(line, settings, work, capfd):
    config(sfa=settings)(work / "converted")
    assert_refused(capfd, command(line))


def test_a_model_of_another_kind(work, capfd):
    """What was switched and saved as a classifier loads as one."""
    model = transformers.LlamaForSequenceClassification.from_pretrained("dense", num_labels=3, pad_token_id=1)
    flashsfa.enable(model, topk=2).save_pretrained("converted")
    capfd.readouterr()
    assert_refused(capfd, command("perplexity converted"), "LlamaForSequenceClassification", "no causal language model")


class Certain(torch.nn.Module):
    """Stands in for a model: its logits are `value` for one token and 0 for the other."""

    device, dtype = "cpu", torch.float32

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, input_ids, **options):
        return SimpleNamespace(logits=torch.tensor([0, self.value]).expand(*input_ids.shape, 2))


@pytest.mark.cpu
def test_a_loss_without_perplexity():
    windows = torch.zeros(1, 4, dtype=torch.long)
    assert perplexity(Certain(3.0), windows) == pytest.approx(1 + math.exp(3))
    for value in (float("nan"), float("inf"), 1e5):
        with pytest.raises(ValueError, match="no working model has"):
            perplexity(Certain(value), windows)

"""Checkpoints are loaded whole, or refused in one line that says why."""

import json

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers import LlamaForSequenceClassification as LlamaClassifier

from flashsfa import from_pretrained
from flashsfa.huggingface.loading import load_tokenizer, load_weights, read_config

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    """A Llama's checkpoint to damage."""
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_weights(folder, edit):
    file = folder / "model.safetensors"
    weights = load_file(file, device="cpu")
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def refusal(load, source, capfd):
    """The one line that `load` refuses `source` with; nothing else is printed."""
    capfd.readouterr()
    with pytest.raises(ValueError, match=r"cannot be loaded|holds no model|has no tokenizer") as error:
        load(source)
    assert "".join(capfd.readouterr()) == ""
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(str(source))
    return line


def test_a_whole_checkpoint_is_loaded(saved):
    model, expected = load_weights(saved), AutoModelForCausalLM.from_pretrained(saved)
    assert type(model) is LlamaForCausalLM
    for (name, x), (_, y) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, msg=name)
    assert read_config(saved)["vocab_size"] == 61


@pytest.mark.parametrize("name", ["output_loading_info", "ignore_mismatched_sizes"])
def test_what_loading_decides_by_itself_is_refused(saved, name):
    with pytest.raises(ValueError, match=f"leave out {name}: every tensor is checked"):
        load_weights(saved, **{name: True})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), "misses model.layers.1.mlp.up_proj.weight"),
        (lambda w: w.pop("lm_head.weight"), "misses lm_head.weight"),
        (lambda w: [w.pop(x) for x in list(w) if ".layers.1." in x], "and 5 more"),
        (
            lambda w: w.update({"v_head.weight": torch.zeros(3)}),
            "holds v_head.weight, which the model has no place for",
        ),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), "model.norm.weight [3] for [32]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved, edit, words, capfd):
    edit_weights(saved, edit)
    assert words in refusal(load_weights, saved, capfd)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 3}, "misses model.layers.2.input_layernorm.weight"),
        ({"num_hidden_layers": 1}, "holds model.layers.1.input_layernorm.weight"),
        ({"num_hidden_layers": -1}, "num_hidden_layers in config.json"),
        ({"vocab_size": 50}, "[61, 32] for [50, 32]"),
        ({"vocab_size": 0}, "vocab_size in config.json"),
        ({"hidden_size": 64}, "other shapes than its config"),
        ({"hidden_size": "32"}, "got '32'"),
        ({"num_attention_heads": 0}, "at least 1, got 0"),
        ({"num_attention_heads": 3}, "multiple of the number of attention heads"),
        ({"num_key_value_heads": True}, "got True"),
        ({"head_dim": 8.0}, "got 8.0"),
        ({"max_position_embeddings": "x"}, "expected int, got str"),
        ({"hidden_act": "zzz"}, "zzz"),
        ({"model_type": "zzz"}, "zzz"),
        ({"model_type": "t5"}, "T5Config"),
        ({"dtype": "float3"}, "float3"),
        ({"model_type": "zzz", "auto_map": {"AutoConfig": "a.C", "AutoModelForCausalLM": "a.M"}}, "custom code"),
    ],
)
def test_a_config_that_fits_no_weights_is_refused(saved, fields, words, capfd):
    edit_config(saved, **fields)
    assert words in refusal(load_weights, saved, capfd)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no valid JSON"),
        (b'{"a": ', "no valid JSON"),
        (bytes(range(256)), "no valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'["a"]', "holds list"),
        (b"null", "holds NoneType"),
        (b"{}", "model_type"),
    ],
)
def test_a_damaged_config_is_refused(saved, content, words, capfd):
    (saved / "config.json").write_bytes(content)
    assert words in refusal(load_weights, saved, capfd)
    if content != b"{}":
        assert words in refusal(read_config, saved, capfd)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.99])
def test_cut_weights_are_refused(saved, share, capfd):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    assert "damaged" in refusal(load_weights, saved, capfd)


@pytest.mark.parametrize(
    ("name", "words"),
    [("config.json", "config.json is missing"), ("model.safetensors", "no file named model.safetensors")],
)
def test_a_missing_file_is_named(saved, name, words, capfd):
    (saved / name).unlink()
    assert words in refusal(load_weights, saved, capfd)


def test_a_damaged_generation_config_is_refused(saved, capfd):
    (saved / "generation_config.json").write_text("{")
    assert "generation_config.json is no valid JSON" in refusal(load_weights, saved, capfd)


def test_a_source_that_is_none_is_refused(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = tmp_path / "file"
    file.touch()
    for source, words in ((tmp_path / "none", "no such directory"), (file, "a file"), ("some-one/model", "connect")):
        assert words in refusal(load_weights, source, capfd)
    for load in (load_weights, load_tokenizer, read_config, from_pretrained):
        for source in ("nope", "nope/dir"):
            assert f": there is no folder {source} here, and as a name on the hub: " in refusal(load, source, capfd)
        assert words in refusal(load_tokenizer, source, capfd)
        assert words in refusal(read_config, source, capfd)


def test_a_missing_tokenizer_is_refused_in_a_whole_sentence(saved, capfd):
    assert "sentencepiece or tiktoken" in refusal(load_tokenizer, saved, capfd)


def test_a_checkpoint_of_another_class_is_refused(tmp_path, capfd):
    LlamaClassifier(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "m")
    line = refusal(load_weights, tmp_path / "m", capfd)
    assert "misses lm_head.weight" in line
    assert "holds score.weight" in line
    assert type(load_weights(tmp_path / "m", LlamaClassifier)) is LlamaClassifier


def test_what_a_class_does_without_is_no_fault(tmp_path):
    """Tied weights, and buffers of the mask and of rotary embeddings in files that older versions wrote."""
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=61, n_positions=32)).save_pretrained(tmp_path)
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    edit_weights(tmp_path, lambda w: w.update(masks))
    assert type(load_weights(tmp_path)) is GPT2LMHeadModel
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(tmp_path / "tied")
    edit_weights(tmp_path / "tied", lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    assert type(load_weights(tmp_path / "tied")) is LlamaForCausalLM

"""`flashsfa convert` of models that are more than text, or that cannot be switched."""

import functools
import json

import pytest

import flashsfa
from flashsfa.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
import flashsfa.convert  # noqa: E402
from multimodal import MODELS, config_of  # noqa: E402
from words_model import assert_refused, save_tiny  # noqa: E402
from words_model import convert_arguments as arguments  # noqa: E402


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Times of one short context alone."""
    settings = functools.partial(flashsfa.convert.ConvertSettings, contexts=(64,))
    monkeypatch.setattr(flashsfa.convert, "ConvertSettings", settings)


def save(folder, model):
    """A model beside the tokenizer of the tiny one."""
    save_tiny(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_of_text_and_images_is_converted_whole(kind, tiny, text, tmp_path, capsys):
    config = config_of(kind)
    config.text_config.vocab_size = 80  # of the tokenizer
    model = transformers.AutoModelForImageTextToText.from_config(config)
    source, output = save(tmp_path / "model", model), tmp_path / "out"
    (source / "preprocessor_config.json").write_text('{"size": 28}')
    assert main(["info", str(source)]) == 0
    assert "can be switched: yes, the part that generates text" in capsys.readouterr().out
    assert main(arguments(source, text, output, "--topk", "3", "--dense-dims", "4", "--tokenizer", str(tiny))) == 0
    assert type(flashsfa.from_pretrained(output)) is type(model)
    assert (output / "preprocessor_config.json").read_text() == '{"size": 28}'
    assert json.loads((output / "report.json").read_text())["switched"]["dense_dims"] == 4
    assert main(["info", str(output)]) == 0
    assert f"{type(model).__name__} with Sparse Feature Attention" in capsys.readouterr().out


SIZES = {
    "vocab_size": 80, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 128, "pad_token_id": 1, "eos_token_id": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("DeepseekV3", {"n_routed_experts": 2, "n_group": 1, "topk_group": 1}, "uses latent attention (MLA)"),
        (
            "Llama4Text",
            {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 40},
            "has chunked attention in layers [0, 1, 2]",
        ),
        (
            "FalconH1",
            {"num_key_value_heads": 2, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
            "layers that cache more",
        ),
    ],
)
def test_a_model_that_cannot_be_switched_is_refused_with_the_reason(kind, options, message, text, tmp_path, capsys):
    config = getattr(transformers, f"{kind}Config")(**SIZES | options)
    source = save(tmp_path / "model", transformers.AutoModelForCausalLM.from_config(config))
    before = set(tmp_path.iterdir())
    capsys.readouterr()
    for more in (["--topk", "3"], ["--max-loss", "1%"], ["--preset", "half"]):
        assert_refused(capsys, arguments(source, text, tmp_path / "out", *more), message)
    assert set(tmp_path.iterdir()) == before


def test_an_adapter_is_refused_by_name(text, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    source = save_tiny(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    adapters = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapters.save_pretrained(source)
    before = set(tmp_path.iterdir())
    capsys.readouterr()
    assert_refused(capsys, arguments(source, text, tmp_path / "out", "--topk", "3"), "it is an adapter")
    assert set(tmp_path.iterdir()) == before

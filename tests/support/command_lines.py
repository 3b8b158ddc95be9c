"""Two tiny models, and commands over them that are refused."""

import os

import pytest
import torch

from flashsfa import FeatureBasis
from flashsfa.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

import flashsfa  # noqa: E402

WORDS = ["<unk>", "<pad>", *(f"word{i}" for i in range(60))]


def save_models(folder):
    """A dense model and a converted one, of two layers, in folders "dense" and "converted" of `folder`."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", model_input_names=["input_ids", "attention_mask"]
    )
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = transformers.LlamaForCausalLM(config)
        basis = FeatureBasis(*(torch.eye(8).expand(2, 2, 8, 8) for _ in range(2)))
    for name in ("dense", "converted"):
        if name == "converted":
            flashsfa.enable(model, topk=2, dense_dims=2, basis=basis)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def command(line):
    """The words of `line`, with the options that every run of its command has; those in `line` come last and count."""
    name, rest = line.split(" ", 1)
    shared = {
        "convert": "convert --dtype float32 --topk 2 --dense-dims 2 --cache-dtype auto --window 32 --windows 2 --calibrate text.txt --eval text.txt -o out",
        "perplexity": "eval perplexity --dtype float32 --device cpu --window 32 --windows 2 --text text.txt -o out",
        "needle": "eval needle --dtype float32 --device cpu --lengths 200 --depths 50 --text text.txt -o out",
        "lm-eval": "eval lm-eval --tasks any -o out",
        "bench": "bench --quick --device cpu -o out",
        "info": "info",
    }
    return [*shared[name].split(), *(word.replace("''", "") for word in rest.split(" "))]


def assert_refused(capfd, arguments, *messages):
    """Exit code 2, one line on stderr with `messages`, and no file or folder more or less. Options that are no options bring the
    usage too."""
    before = everything()
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    error = capfd.readouterr().err
    assert code == 2, error
    lines = error.strip().splitlines()
    if lines[0].startswith("usage:"):
        lines = [line for line in lines if "error:" in line]
    assert len(lines) == 1, error
    assert lines[0].startswith("flashsfa")
    assert "error:" in lines[0]
    for message in messages:
        assert message in lines[0]
    assert everything() == before


def everything():
    """All files and folders here."""
    return sorted(os.path.join(parent, name) for parent, folders, files in os.walk(".") for name in (*folders, *files))

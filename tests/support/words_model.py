"""A tiny language model of whole words, and what every refusal of a command is."""

import pytest
import torch

from flashsfa.cli import main

transformers = pytest.importorskip("transformers")

WORDS = [f"word{i}" for i in range(60)] + ["The", "history", "of", "science", "is"]


def save_tiny(folder, head_dim=8):
    """Write a Llama of two layers with heads of `head_dim`, and its tokenizer, to `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<pad>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", model_input_names=["input_ids", "attention_mask"]
    ).save_pretrained(folder)
    transformers.utils.logging.disable_progress_bar()
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 2, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=128, pad_token_id=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def assert_refused(capsys, command, message):
    """Exit code 2, and one line on stderr that holds `message`."""
    assert main(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("flashsfa: error:")
    assert message in lines[0]


def convert_arguments(model, text, output, *more):
    """`flashsfa convert` of a tiny model, on short windows."""
    sizes = ["--window", "40", "--windows", "2", "--dtype", "float32"]
    return ["convert", str(model), "-o", str(output), "--calibrate", str(text), "--eval", str(text), *sizes, *more]

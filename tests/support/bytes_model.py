"""A tiny language model of bytes, so that decoding gives back what was encoded."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

TEXT = " ".join(
    f"Sentence {i} tells of {a} and {b}." for i in range(40) for a in ("rivers", "stones") for b in ("wind", "rain")
)


def byte_tokenizer():
    """A token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "<pad>": 1} | {c: i for i, c in enumerate(alphabet, 2)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def save_tiny(folder):
    """Write a Llama of two layers with heads of 8, and its tokenizer, to `folder`."""
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

"""A Llama of two layers with 4 query heads and 2 kv heads, in random weights whose attention is far from uniform."""

import pytest
import torch

transformers = pytest.importorskip("transformers")


def small_llama(head_dim=8):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=4 * head_dim, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()

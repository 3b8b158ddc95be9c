"""A switched model of two layers in float64 whose caches may keep exact tokens, and texts for it."""

import pytest
import torch

import flashsfa

transformers = pytest.importorskip("transformers")

WINDOW = 7


def make(sliding=False, topk=3, **options):
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 512, "initializer_range": 0.3}
    config = transformers.Qwen3Config(
        **sizes, head_dim=16, use_sliding_window=sliding, sliding_window=WINDOW, max_window_layers=1,
        layer_types=["sliding_attention" if sliding else "full_attention", "full_attention"],
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.Qwen3ForCausalLM(config).double().eval()
    return flashsfa.enable(model, topk, **{"dense_dims": 2, "recent": 3, "first": 2, **options})


def tokens(n, batch=2):
    return torch.randint(1, 61, (batch, n))

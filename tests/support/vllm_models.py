"""Tiny random models that vLLM serves, and what transformers generates with them."""

import random

import pytest
import torch

transformers = pytest.importorskip("transformers")
from bytes_model import byte_tokenizer  # noqa: E402
from flashsfa.huggingface import calibrate, enable  # noqa: E402

VOCABULARY, HEAD = 258, 64
UNEVEN = (1, 5, 16, 17, 37, 130, 300)  # tokens of prompts: around a page's, and several chunks
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": HEAD, "max_position_embeddings": 1024, "initializer_range": 0.3, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
_NEOX = {key: x for key, x in _SIZES.items() if key not in ("num_key_value_heads", "head_dim")} | {"hidden_size": 256}
_HALF_WINDOWED = {"sliding_window": 48, "layer_types": ["sliding_attention", "full_attention"]}
_CODE = {"topk": 8, "dense_dims": 16, "topk_query": 24}

# What each is of, and how it is switched.
MODELS = {
    "plain": ("Qwen3", {}, _CODE),
    "dense": ("Qwen3", {}, None),
    "basis": ("Qwen3", {}, _CODE),
    "channel": ("Qwen3", {}, _CODE | {"positions": "channel"}),
    "pattern": ("Llama", {}, _CODE | {"query_pattern": "2:4"}),
    "8 bits": ("Qwen3", {}, _CODE | {"cache_dtype": "int8"}),
    "whole keys in 8 bits": ("Qwen3", {}, {"topk": HEAD, "cache_dtype": "d8s8v8"}),
    "4 bits": ("Llama", {}, _CODE | {"cache_dtype": "int4"}),
    "values in 3 bits": ("Llama", {}, _CODE | {"cache_dtype": "d8s4v3"}),
    "windows": ("Mistral", {"sliding_window": 48}, _CODE),
    "Gemma 3": ("Gemma3", _HALF_WINDOWED | {"query_pre_attn_scalar": HEAD}, _CODE),
    "GPT-NeoX": ("GPTNeoX", {"rotary_pct": 0.25}, {"topk": 12, "topk_query": 48}),
    "one layer": ("Qwen3", {}, _CODE | {"layers": [1]}),
    "one layer in 4 bits": ("Llama", {}, _CODE | {"layers": [0], "cache_dtype": "int4"}),
    "one layer with a basis": ("Qwen3", {}, _CODE | {"layers": [1], "cache_dtype": "int8"}),
    "one layer of windows": ("Mistral", {"sliding_window": 48}, _CODE | {"layers": [0]}),
    "the windows of Gemma 3": ("Gemma3", _HALF_WINDOWED | {"query_pre_attn_scalar": HEAD}, _CODE | {"layers": [0]}),
}
SWITCHED = [name for name, (_, _, code) in MODELS.items() if code is not None]
# The same weights, not switched: what drafts for them.
MODELS |= {f"dense {name}": (*MODELS[name][:2], None) for name in SWITCHED}


def save(name, folder):
    """Write the model `name` and its tokenizer to `folder`."""
    family, config, code = MODELS[name]
    sizes = _NEOX if family == "GPTNeoX" else _SIZES
    config_class = getattr(transformers, f"{family}{'Text' * (family == 'Gemma3')}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config_class(**sizes | config)).eval()
    if name in ("basis", "one layer with a basis"):
        text = torch.randint(2, VOCABULARY, (4, 128))
        code = code | {"basis": calibrate(model, text, code["topk"], dense_dims=code["dense_dims"])}
    if code is not None:
        enable(model, **code)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def prompts(lengths, seed=0):
    """Lists of random tokens."""
    draw = random.Random(seed)
    return [[draw.randrange(2, VOCABULARY) for _ in range(n)] for n in lengths]


def generate(model, prompt, new):
    """The `new` most likely tokens after a prompt, in transformers."""
    ids = torch.tensor([prompt])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
    )
    return found[0, len(prompt) :].tolist()

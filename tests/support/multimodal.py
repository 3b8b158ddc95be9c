"""Tiny models of text and images in random weights, and inputs with an image for each."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

IMAGE = 60  # the token that stands for a piece of an image
WINDOW = 7
TEXT = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
TOKENS = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
SIGLIP = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "intermediate_size": 32}
QWEN = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 48}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
MODELS = {  # kind: text, vision, others, dense_dims by default
    "Gemma3": (
        TEXT | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW, "query_pre_attn_scalar": 16},
        SIGLIP | {"hidden_size": 32}, {"mm_tokens_per_image": 4, "image_token_index": IMAGE}, 0,
    ),
    "Qwen2_5_VL": (
        {k: v for k, v in TEXT.items() if k != "head_dim"} | {"hidden_size": 96, "rope_parameters": SECTIONS},
        QWEN | {"window_size": 16, "fullatt_block_indexes": [0], "out_hidden_size": 96}, TOKENS, 0,
    ),
    "Qwen3VL": (
        TEXT | {"rope_parameters": SECTIONS}, QWEN | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, TOKENS, 0,
    ),
    "Qwen3_5": (
        TEXT | LINEAR | {"rope_parameters": SECTIONS | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}},
        QWEN | {"num_position_embeddings": 16}, TOKENS, 4,
    ),
    "Llama4": (
        TEXT | {"num_local_experts": 2, "intermediate_size_mlp": 40, "layer_types": ["full_attention"] * 2},
        SIGLIP | {"hidden_size": 32, "intermediate_size": 128, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        {"image_token_index": IMAGE}, 0,
    ),
}  # fmt: skip


def config_of(kind):
    text, vision, others, _ = MODELS[kind]
    config = getattr(transformers, f"{kind}Config")(text_config=dict(text), vision_config=dict(vision), **others)
    config._experts_implementation = "eager"
    return config


def make(kind):
    torch.manual_seed(1)
    return transformers.AutoModelForImageTextToText.from_config(config_of(kind)).double().eval()


def inputs(kind, batch=1):
    """A text with one image in its middle."""
    count = {"Llama4": 1}.get(kind, 4)
    parts = [torch.randint(1, 59, (batch, 9)), torch.full((batch, count), IMAGE), torch.randint(1, 59, (batch, 8))]
    given = {"input_ids": torch.cat(parts, 1)}
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    if kind in ("Gemma3", "Llama4"):
        given["pixel_values"] = torch.randn(batch, 3, 28, 28, dtype=torch.float64)
    else:
        given["pixel_values"] = torch.randn(batch * 16, 3 * 2 * 4 * 4, dtype=torch.float64)
        given["image_grid_thw"] = torch.tensor([[1, 4, 4]] * batch)
    kinds = (given["input_ids"] == IMAGE).long()
    if kind == "Gemma3":
        given["token_type_ids"] = kinds
    elif kind != "Llama4":
        given["mm_token_type_ids"] = kinds
    return given

"""`flashsfa info`."""

import json

import pytest
import torch

import flashsfa
from flashsfa.cli import main

transformers = pytest.importorskip("transformers")
from flashsfa.huggingface.description import describe  # noqa: E402
from flashsfa.outlook import ways  # noqa: E402
from words_model import assert_refused  # noqa: E402


def test_info_names_versions_and_the_kernels_that_run(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"flashsfa {flashsfa.__version__}" in out
    for name in ("numba", "triton", "transformers"):
        assert f"  {name}: " in out
    for name in ("selection", "prefill", "decode"):
        (line,) = (line for line in out.splitlines() if line.startswith(f"  {name}: "))
        assert line.split(": ")[1].startswith(("fused (", "plain PyTorch ("))


def test_a_kernel_that_does_not_run_is_said(capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(flashsfa, "sparse_feature_decode", broken)
    assert main(["info"]) == 0
    assert "decode: does not run: RuntimeError: no compiler here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cache_dtype", "cache"),
    [(None, "200 bytes per token, dense 256 (-22 %)"), ("int8", "88 bytes per token, dense 256 (-66 %)")],
)
def test_info_of_a_converted_model(cache_dtype, cache, tiny, tmp_path, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    flashsfa.enable(model, topk=2, dense_dims=2, cache_dtype=cache_dtype).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for line in (
        "topk: 2",
        "dense_dims: 2",
        "basis: none",
        "positions: as in the dense model",
        f"KV cache: {cache}, in float32",
    ):
        assert f"  {line}\n" in out
    assert f"loss: not recorded; flashsfa eval perplexity {tmp_path}" in out
    report = {"switched": {"basis": "balanced"}, "perplexity_increase": 0.0432}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert main(["info", str(tmp_path)]) == 0
    assert "loss: +4.3 % of perplexity" in capsys.readouterr().out
    report["switched"]["topk"] = 3  # of the model that was there before this one was saved
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert main(["info", str(tmp_path)]) == 0
    assert "loss: not recorded" in capsys.readouterr().out
    (tmp_path / "report.json").write_text("[]")
    assert_refused(capsys, ["info", str(tmp_path)], "is no report of flashsfa convert")


def test_layers_that_were_left_dense_count_as_dense(tiny, tmp_path, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    flashsfa.enable(model, topk=2, dense_dims=2, layers=[1]).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    assert "KV cache: 228 bytes per token, dense 256" in capsys.readouterr().out


def test_info_refuses_what_is_no_model(tmp_path, capsys):
    assert_refused(capsys, ["info", str(tmp_path)], "config.json is missing")
    (tmp_path / "config.json").write_text('{"model_type": "such_a_model_there_is_none"}')
    assert_refused(capsys, ["info", str(tmp_path)], "holds no model that transformers knows")
    assert_refused(capsys, ["info", "--context", "8"], "--context is that of a model")
    assert_refused(capsys, ["info", str(tmp_path), "--context", "0"], "--context must be")


def test_info_of_a_dense_model(tiny, capsys):
    assert main(["info", str(tiny)]) == 0
    out = capsys.readouterr().out
    assert (
        "LlamaForCausalLM, dense, in bfloat16\n  can be switched: yes\n  heads: 4 of 8, 2 of keys and values\n" in out
    )
    assert "  layers 0 to 1: full attention, 64 bytes per token and layer\n" in out


SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
CONFIGS = {  # kind: options, lines of its description
    "Llama": (
        SIZES | {"num_hidden_layers": 2, "head_dim": 64},
        ["can be switched: yes", "layers 0 to 1: full attention, 512 bytes per token and layer, 144 switched",
         "KV cache: 288 bytes per token, dense 1024 (-72 %), as preset balanced keeps it"],
    ),
    "GPT2": (  # its config drops attention weights in training
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 64},
        ["can be switched: yes", "layers 0 to 1: full attention, 256 bytes"],
    ),
    "Gemma3Text": (
        SIZES | WINDOW | {"num_hidden_layers": 4, "head_dim": 64},
        ["can be switched: yes", "layers 0, 2: a sliding window of 16 tokens, 512 bytes", "layers 1, 3: full attention, 512"],
    ),
    "Gemma3": (
        {"text_config": SIZES | WINDOW | {"num_hidden_layers": 4, "head_dim": 64}, "vision_config": VISION},
        ["Gemma3ForConditionalGeneration, dense", "can be switched: yes, the part that generates text", "layers 1, 3: full attention, 512"],
    ),
    "Qwen3VL": (
        {"text_config": SIZES | {"num_hidden_layers": 2, "head_dim": 64}, "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2}},
        ["Qwen3VLForConditionalGeneration, dense", "can be switched: yes, the part that generates text", "layers 0 to 1: full attention, 512"],
    ),
    "Qwen3Next": (
        SIZES | LINEAR | EXPERTS | {"num_hidden_layers": 4, "head_dim": 32},
        ["can be switched: yes", "layers 0 to 2: a state of fixed size (linear attention)\n",
         "layer 3: full attention, 256 bytes per token and layer, 80 switched", "KV cache: 80 bytes per token, dense 256"],
    ),
    "DeepseekV3": (
        SIZES | {"num_hidden_layers": 2, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
        ["can be switched: no: DeepseekV3ForCausalLM uses latent attention (MLA)",
         "layers 0 to 1: latent attention (MLA), of which transformers caches rank 512 and 64 rotary features, 1152 bytes"],
    ),
    "Llama4Text": (
        SIZES | {"num_hidden_layers": 4, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64},
        ["can be switched: no: Llama4ForCausalLM has chunked attention in layers [0, 1, 2], which sfa does not replace: leave them dense with "
         "enable(layers=[3])", "layers 0 to 2: attention in chunks of 8192 tokens",
         "layer 3: full attention, 128 bytes"],
    ),
    "Gemma4Text": (
        SIZES | {"num_hidden_layers": 4, "head_dim": 16},
        ["can be switched: no: Gemma4ForCausalLM has no single head size", "heads: they differ from layer to layer"],
    ),
    "FalconH1": (
        SIZES | {"num_hidden_layers": 2, "head_dim": 16},
        ["can be switched: no: FalconH1ForCausalLM has layers that cache more", "full attention beside a state of fixed size"],
    ),
    "Mamba": ({"num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 32}, ["can be switched: no", "a state of fixed size"]),
    "T5": ({"num_layers": 2, "d_model": 32, "num_heads": 2, "d_kv": 16, "vocab_size": 64},
           ["can be switched: no: T5Model has cross-attention, which sfa does not replace: encoder-decoders cannot be switched"]),
    "Bart": ({"vocab_size": 64, "d_model": 32}, ["can be switched: no: BartForCausalLM has several attention modules in a layer, as models with cross-attention have"]),
    "Bert": (SIZES | {"num_hidden_layers": 2}, ["can be switched: no: BertLMHeadModel has attention that is not causal"]),
}  # fmt: skip


@pytest.mark.parametrize("context", [None, 100])
@pytest.mark.parametrize("kind", CONFIGS)
def test_info_of_any_model_from_its_config_alone(kind, context, tmp_path, capsys):
    config, (options, lines) = getattr(transformers, f"{kind}Config", None), CONFIGS[kind]
    if config is None:
        pytest.skip(f"this version of transformers has no {kind}")
    config(**options).save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["info", str(tmp_path), *([] if context is None else ["--context", str(context)])]) == 0
    out = capsys.readouterr().out
    for line in lines:
        assert line in out
    is_known = kind not in ("Gemma4Text", "Mamba")
    assert ("100 tokens, one sequence" in out) == (context is not None and is_known)
    assert ("preset balanced" in out) == ("can be switched: yes" in out)


def table(out):
    """The cells of a table, by the first of each row."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in rows}


def test_the_table_of_a_context(tmp_path, capsys):
    """4 query heads and 2 kv heads of 64 in two layers of which the first sees 1024 tokens; bfloat16."""
    config = SIZES | {"num_hidden_layers": 2, "head_dim": 64, "sliding_window": 1024, "max_window_layers": 1}
    transformers.Qwen3Config(
        **config, use_sliding_window=True, layer_types=["sliding_attention", "full_attention"]
    ).save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["info", str(tmp_path), "--context", "4096"]) == 0
    out = capsys.readouterr().out
    assert "forget a quarter of it at a time" in out
    assert "it was made for" not in out
    found, held = table(out), 1023 + 4096  # a layer keeps what the next token sees beside itself
    pairs = 4096 * 4097 // 2 + 1024 * 1025 // 2 + 3072 * 1024
    assert found["dense"] == [
        f"{held * 512 / 2**20:.1f} MiB", "100 %", f"{4 * held * 128:.3g}", "100 %", f"{4 * pairs * 128:.3g}", "100 %",
    ]  # fmt: skip
    exact = 2 * 36
    nbytes = (held - exact) * 2 * 72 + exact * 512
    assert found["preset balanced"][:4] == [
        f"{nbytes / 2**20:.1f} MiB", f"{100 * nbytes / (held * 512):.0f} %", f"{4 * held * 128:.3g}", "100 %"
    ]  # fmt: skip
    assert found["preset half"][1] == "53 %"


def test_a_context_past_the_model_s_positions_is_said(tmp_path, capsys):
    transformers.Qwen3Config(**SIZES | {"max_position_embeddings": 64}).save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["info", str(tmp_path), "--context", "100"]) == 0
    assert "it was made for 64 positions: for 100 tokens what follows is by formula alone" in capsys.readouterr().out


def test_the_table_of_a_converted_model_with_exact_tokens(tiny, tmp_path, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    flashsfa.enable(
        model, topk=3, dense_dims=2, topk_query="dense", recent=8, first=2, prefill="dense"
    ).save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["info", str(tmp_path), "--context", "40"]) == 0
    found = table(capsys.readouterr().out)["as converted"]
    products = (
        2 * 4 * (10 * 16 + 30 * (5 + 8))
    )  # the newest and the first are met with all 8 features, the others with 5
    assert found[2:] == [
        f"{products:.3g}",
        f"{100 * products / (2 * 4 * 40 * 16):.0f} %",
        f"{2 * 4 * 820 * 16:.3g}",
        "100 %",
    ]


def test_a_window_takes_what_a_live_cache_of_it_does(tmp_path):
    config = transformers.Qwen3Config(
        **SIZES | WINDOW | {"num_hidden_layers": 4, "head_dim": 16, "use_sliding_window": True}
    )
    config.save_pretrained(tmp_path)
    cache = transformers.DynamicCache(config=config)
    transformers.Qwen3ForCausalLM(config).eval()(torch.arange(50)[None], past_key_values=cache)
    model = describe(tmp_path, torch.float32)
    assert ways(model)[0].cache_bytes(model, 50) == flashsfa.huggingface.cache_nbytes(cache)["total"]


def test_latents_take_what_a_live_cache_of_them_does(tmp_path):
    sizes = {"kv_lora_rank": 24, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2}
    config = transformers.DeepseekV3Config(
        **SIZES | sizes | experts | {"num_hidden_layers": 2, "num_key_value_heads": 4}
    )
    config.save_pretrained(tmp_path)
    cache = transformers.DynamicCache(config=config)
    transformers.DeepseekV3ForCausalLM(config).eval()(torch.arange(10)[None], past_key_values=cache)
    model = describe(tmp_path, torch.float32)
    (dense,) = ways(model)
    assert dense.cache_bytes(model, 10) == flashsfa.huggingface.cache_nbytes(cache)["total"]
    assert dense.multiplications(model, 10, is_prompt=False) == 2 * 4 * 10 * (16 + 8 + 16)


def test_the_table_of_a_converted_model(tiny, tmp_path, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    flashsfa.enable(model, topk=3, dense_dims=2, topk_query=3, layers=[1]).save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["info", str(tmp_path), "--context", "1000"]) == 0
    out = capsys.readouterr().out
    assert (
        "layers 0 to 1: full attention, 128 bytes per token and layer, 110 switched" in out
    )  # 2 * (4 * 2 + 5 * 3 + 32)
    found = table(out)
    assert list(found) == ["dense", "as converted"]
    kept = 2 + 2 + 8  # a sparse query and key share 3 * 3 / 6 features, and a half is rounded to even
    assert found["as converted"] == [
        f"{1000 * (128 + 110) / 2**20:.1f} MiB", "93 %", f"{4 * 1000 * (16 + kept):.3g}", "88 %",
        f"{4 * 500500 * (16 + kept):.3g}", "88 %",
    ]  # fmt: skip
    assert "  decode: " in out

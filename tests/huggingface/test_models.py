"""The model families: each one generates from codes, in every kind of cache, what it computes without a cache."""

import pytest
import torch

import flashsfa

transformers = pytest.importorskip("transformers")
from flashsfa.huggingface import SparseCache, StaticSparseCache  # noqa: E402
from flashsfa.huggingface.switch import attention_shape, default_dense_dims  # noqa: E402
from support_page import assert_listed  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

WINDOW, PROMPT, NEW = 7, 24, 6
COMMON = {"vocab_size": 61, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1, "attention_dropout": 0.0}
COMMON |= {"initializer_range": 0.3}  # attention far from uniform
SIZES = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6}
SIZES |= {"max_position_embeddings": 64}
GROUPED = {"num_key_value_heads": 2}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2}
LINEAR |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
# family: config class, its options beside the common ones, dense_dims by default
FAMILIES = {
    "gpt2": ("GPT2Config", {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64, "attn_pdrop": 0.0}, 0),
    "llama": ("LlamaConfig", SIZES | GROUPED, 0),
    "qwen2": ("Qwen2Config", SIZES | GROUPED, 0),
    "qwen3": ("Qwen3Config", SIZES | GROUPED | {"head_dim": 16}, 0),
    "mistral": ("MistralConfig", SIZES | GROUPED | {"sliding_window": WINDOW}, 0),
    "gemma3": (
        "Gemma3TextConfig",
        SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": WINDOW}
        | {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 256},
        0,
    ),
    "gemma2": (
        "Gemma2Config",
        SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": WINDOW}
        | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
        0,
    ),
    "gpt_oss": (
        "GptOssConfig",
        SIZES | GROUPED | {"head_dim": 16, "sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
        0,
    ),
    "gpt_neox": ("GPTNeoXConfig", SIZES | PARTIAL, 4),
    "phi": ("PhiConfig", SIZES | GROUPED | PARTIAL, 4),
    "stablelm": ("StableLmConfig", SIZES | GROUPED | PARTIAL, 4),
    "qwen3_next": (
        "Qwen3NextConfig",
        SIZES | GROUPED | LINEAR | {"head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
        | {"shared_expert_intermediate_size": 8},
        4,
    ),
    "qwen3_5": ("Qwen3_5TextConfig", SIZES | GROUPED | LINEAR | {"head_dim": 16}, 4),
    "glm4_moe": (
        "Glm4MoeConfig",
        SIZES | GROUPED | PARTIAL | {"head_dim": 8, "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8},
        4,
    ),
    "glm4": ("Glm4Config", SIZES | GROUPED | PARTIAL | {"head_dim": 8}, 4),
}  # fmt: skip
NAMES = {
    "gpt2": "GPT-2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "gemma3": "Gemma 3 text", "gemma2": "Gemma 2",
    "gpt_oss": "gpt-oss", "gpt_neox": "GPT-NeoX", "phi": "Phi", "stablelm": "StableLM", "qwen3_next": "Qwen3-Next", "qwen3_5": "Qwen3.5 text",
    "glm4_moe": "GLM-4 MoE", "glm4": "GLM-4",
}  # fmt: skip


def test_the_page_lists_what_is_tested():
    assert_listed({NAMES[family]: dense_dims for family, (*_, dense_dims) in FAMILIES.items()})


def make(family):
    kind, sizes, _ = FAMILIES[family]
    config = getattr(transformers, kind)(**COMMON, **sizes)
    config._experts_implementation = "eager"  # the grouped kernels know no float64
    # some versions of transformers run Gemma 2 by SDPA on a GPU, without its cap
    options = {"attn_implementation": "eager"} if family == "gemma2" else {}
    return transformers.AutoModelForCausalLM.from_config(config, **options).double().eval()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return flashsfa.enable(make(family), 3)


@pytest.fixture
def ids():
    return torch.randint(1, 61, (3, PROMPT))


@pytest.fixture
def mask(ids):
    """Left padding of 5 and 0 tokens, and of all but one."""
    return (torch.arange(PROMPT) >= torch.tensor([5, 0, PROMPT - 1])[:, None]).long()


def logits(model, ids, mask=None):
    position_ids = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits


def generate(model, ids, mask, **options):
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(ids, attention_mask=mask, **{**settings, **options})


def is_hybrid(model):
    return "linear_attention" in (getattr(model.config, "layer_types", None) or [])


def assert_equals_no_cache(model, found, mask):
    mask = torch.nn.functional.pad(mask, (0, found.sequences.shape[1] - mask.shape[1]), value=1)
    expected = logits(model, found.sequences, mask)[:, PROMPT - 1 : -1]
    # generate() hands its logits out in float32, and RMSNorm computes in it: on a GPU its sums depend on the length
    # the states of linear attention are in float32 too, and go by chunks or token by token
    close = {"rtol": 1e-3, "atol": 2e-4} if is_hybrid(model) else {"rtol": 1e-5, "atol": 2e-5}
    torch.testing.assert_close(torch.stack(found.logits, 1), expected.float(), **close)


@pytest.mark.parametrize("chunk", [None, 7, 18], ids=["whole", "few", "many"])
@pytest.mark.parametrize("implementation", [None, "static"], ids=["dynamic", "static"])
def test_generation_equals_no_cache(model, ids, mask, implementation, chunk):
    found = generate(model, ids, mask, cache_implementation=implementation, prefill_chunk_size=chunk)
    assert type(found.past_key_values) is (StaticSparseCache if implementation else SparseCache)
    assert_equals_no_cache(model, found, mask)


@pytest.mark.parametrize("implementation", [None, "static"], ids=["dynamic", "static"])
def test_beams(model, ids, mask, implementation):
    options = {"num_beams": 3, "return_dict_in_generate": False, "output_logits": False}
    beams = generate(model, ids, mask, cache_implementation=implementation, **options)
    assert torch.equal(beams, generate(model, ids, mask, use_cache=False, **options))


def test_prompt_lookup(model, ids):
    ids = ids[:1, :6].repeat(1, 4)
    mask = torch.ones_like(ids)
    plain = generate(model, ids, mask)
    if is_hybrid(model):  # transformers cannot take back a state
        with pytest.raises(ValueError, match="not supported with stateful models"):
            generate(model, ids, mask, prompt_lookup_num_tokens=3)
        return
    assert torch.equal(generate(model, ids, mask, prompt_lookup_num_tokens=3).sequences, plain.sequences)


def test_switch_and_back(family, ids):
    model = make(family)
    dense = logits(model, ids)
    flashsfa.enable(model, 2)
    assert model.config.sfa["dense_dims"] == default_dense_dims(model) == FAMILIES[family][2]
    assert (logits(model, ids) - dense).abs().max() > 1e-5
    generate(model, ids, torch.ones_like(ids))
    flashsfa.disable(model)
    assert torch.equal(logits(model, ids), dense)


def test_full_budget_equals_dense(family, ids, mask):
    model = make(family)
    dense = logits(model, ids, mask)
    _, _, head_dim = attention_shape(model)
    flashsfa.enable(model, head_dim, dense_dims=0)
    # in float64 Gemma 2's own attention gives NaN where a padded query of a sliding window sees nothing, and spreads it
    seen = mask.bool() & ~dense.isnan().any(-1)
    assert seen[1].all()
    close = 1e-3 if family == "gemma2" else 1e-8  # its own attention takes the softmax in float32
    torch.testing.assert_close(logits(model, ids, mask)[seen], dense[seen], rtol=close, atol=close)


def test_save_and_load(family, ids, tmp_path):
    model = flashsfa.enable(make(family), 2, topk_query=3)
    model.save_pretrained(tmp_path)
    loaded = flashsfa.from_pretrained(tmp_path, dtype=torch.float64).eval()
    loaded.config._experts_implementation = "eager"
    assert loaded.config.sfa == model.config.sfa
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=1e-5, atol=1e-5)

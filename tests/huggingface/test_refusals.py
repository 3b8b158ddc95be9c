"""What sfa does not know is refused by name: kinds of models and layers, arguments of attention, caches, dropout."""

import functools

import pytest
import torch

import flashsfa

transformers = pytest.importorskip("transformers")
from transformers.cache_utils import (  # noqa: E402
    Cache,
    DynamicLayer,
    EncoderDecoderCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from flashsfa.huggingface import SparseCache, StaticSparseCache  # noqa: E402
from flashsfa.huggingface.structure import attention_layers  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}


def make(kind="Llama", **options):
    config = getattr(transformers, f"{kind}Config", None)
    if config is None:
        pytest.skip(f"this version of transformers has no {kind}")
    return transformers.AutoModelForCausalLM.from_config(config(**SIZES | options)).eval()


@pytest.fixture
def ids():
    return torch.randint(1, 61, (2, 20))


def run(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("Bert", {}, "not causal"),
        ("Doge", GROUPED | {"head_dim": 8}, "masks keys in a way of its own"),
        ("MiniMax", GROUPED | {"head_dim": 8, "num_local_experts": 2}, "a cache of its own"),
        ("JetMoe", {"num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 2}, "in a way of its own"),
        ("FalconH1", GROUPED | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8}, "cache more than"),
        ("HrmText", GROUPED | {"head_dim": 8}, "several attention modules in a layer"),
        ("Bloom", {"n_layer": 1, "n_head": 2}, "AttentionInterface"),
        ("DeepseekV3", {"n_routed_experts": 2, "n_group": 1, "topk_group": 1}, r"latent attention \(MLA\)"),
        (
            "Llama4Text",
            GROUPED | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 40},
            "chunked attention",
        ),
        ("Gemma4Text", GROUPED | {"head_dim": 8}, "no single head size"),
        ("Phimoe", GROUPED | {"num_local_experts": 2, "sliding_window": 7}, "a sliding window that it does not hand"),
    ],
)
def test_models_that_are_not_exactly_known(kind, options, words):
    model = make(kind, **options)
    with pytest.raises(ValueError, match=words) as error:
        flashsfa.enable(model, 3)
    assert "\n" not in str(error.value)
    assert not any(hasattr(module, "sfa") for module in model.modules())
    if kind not in ("Bloom", "Llama4Text"):  # whose other layers can be switched
        with pytest.raises(ValueError, match=words):
            flashsfa.calibrate(model, torch.randint(1, 61, (1, 20)), 3)


def test_a_window_that_hides_nothing_needs_no_hand(ids):
    model = make("Phimoe", **GROUPED, num_local_experts=2, sliding_window=64)
    dense = run(model, ids)
    torch.testing.assert_close(run(flashsfa.enable(model, 8), ids), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("indices", [(0, 0), (0, -1), (0, None), (0, 2)])
def test_attention_modules_that_are_not_their_layers(indices):
    model = make()
    for layer, index in zip(model.model.layers, indices, strict=True):
        layer.self_attn.layer_idx = index
    with pytest.raises(ValueError, match=r"layer_idx|in layers \[0, 2\]"):
        flashsfa.enable(model, 3)


def test_layers_are_those_of_the_model(ids):
    """In a model with attention in a few layers, `layers` counts the others too, and a basis does not."""
    model = make("Lfm2", **GROUPED, num_hidden_layers=4, layer_types=["conv", "full_attention"] * 2, block_dim=32)
    basis = flashsfa.calibrate(model, torch.randint(1, 61, (2, 40)), 3)
    assert basis.key.shape[0] == 2
    with pytest.raises(
        ValueError, match=r"layers \[0\] do not exist: Lfm2ForCausalLM has attention in layers \[1, 3\]"
    ):
        flashsfa.enable(model, 3, layers=[0, 1])
    flashsfa.enable(model, 3, layers=[3], basis=basis)
    assert [hasattr(module, "sfa") for module in attention_layers(model)] == [False, True]
    assert torch.equal(attention_layers(model)[1].sfa.key.cpu(), basis.key[1].cpu())
    for cache in (SparseCache(model), StaticSparseCache(model, 32)):
        found = torch.cat([run(model, part, past_key_values=cache) for part in ids.split((17, 1, 1, 1), 1)], 1)
        torch.testing.assert_close(found, run(model, ids, use_cache=False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "argument",
    [
        {"sinks": torch.zeros(4)}, {"position_bias": torch.zeros(1, 4, 20, 20)},
        {"head_mask": torch.ones(2, 4)}, {"cu_seq_lens_q": torch.tensor([0, 20])}, {"max_length_q": 20}, {"block_indices": [0]},
        {"something": "new"}, {"is_causal": False}, {"output_attentions": True}, {"seq_idx": torch.zeros(2, 20)},
    ],
    ids=lambda x: next(iter(x)),
)  # fmt: skip
def test_arguments_of_another_attention(argument, ids):
    model = make(**GROUPED)
    flashsfa.enable(model, 3)
    with pytest.raises(ValueError, match=f"{next(iter(argument))}|sfa runs causal masks"):
        run(model, ids, **argument)
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    with pytest.raises(ValueError, match=next(iter(argument))):
        transformers.AttentionInterface()["sfa"](attention_layers(model)[0], q, k, k, None, **argument)


def test_arguments_without_effect_on_attention(ids):
    model = flashsfa.enable(make(**GROUPED), 3)
    expected = run(model, ids)
    off = dict.fromkeys(("softcap", "s_aux", "sinks", "position_bias", "head_mask", "cu_seq_lens_q"))
    on = {
        "num_items_in_batch": torch.tensor(40), "output_hidden_states": True, "is_causal": True, "output_attentions": False,
        "position_ids": torch.arange(20)[None], "labels": ids,
    }  # fmt: skip
    assert torch.equal(run(model, ids, **off, **on), expected)


class Wider(DynamicLayer):
    """A growing layer that may do anything with its keys."""


def caches(model):
    config = model.config
    static = transformers.StaticCache(config=config, max_cache_len=32)
    mixed = transformers.DynamicCache(config=config)
    mixed.layers[1] = StaticLayer(32)
    yield static
    yield mixed
    yield Cache(layers=[StaticLayer(32), StaticLayer(32)])
    yield Cache(layers=[StaticSlidingWindowLayer(32, 8), StaticSlidingWindowLayer(32, 8)])
    yield Cache(layers=[Wider(), Wider()])
    yield Cache(layer_class_to_replicate=functools.partial(StaticLayer, 32))
    yield Cache(layer_class_to_replicate=Wider)
    yield EncoderDecoderCache(static, transformers.DynamicCache())


@pytest.mark.parametrize("number", range(8))
def test_caches_of_layers_that_sfa_does_not_read(number, ids):
    model = flashsfa.enable(make(**GROUPED), 8)
    for call in (
        lambda cache: run(model, ids, past_key_values=cache),
        lambda cache: model.generate(ids, past_key_values=cache, max_new_tokens=2),
        lambda cache: model.model(ids, None, None, cache),
    ):
        with pytest.raises(ValueError, match=r"holds dense keys.*StaticSparseCache"):
            call(list(caches(model))[number])


def test_growing_dense_caches_are_read(ids):
    model = make(**GROUPED)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    flashsfa.enable(model, 8)
    for cache in (
        transformers.DynamicCache(),
        transformers.DynamicCache(config=model.config),
        Cache(layers=[DynamicLayer(), DynamicLayer()]),
    ):
        assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False), expected)


def test_a_model_that_works_on_cached_keys_is_told():
    model = flashsfa.enable(make(**GROUPED), 3)
    keys, values = SparseCache(model).update(torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8), 0)
    assert keys.shape == (2, 2, 5, 8)
    for work in (
        lambda: keys.repeat(1, 2, 1, 1),
        lambda: keys.transpose(1, 2),
        lambda: torch.cat((keys, values), 2),
        lambda: torch.nn.functional.pad(keys, (0, 1)),
        lambda: keys[:, :, None],
    ):
        with pytest.raises(ValueError, match=r"works on the keys in its cache.*use_cache=False"):
            work()


def test_values_in_8_bits_reach_attention_unchanged(ids):
    model = make("DiffLlama", **GROUPED)
    dense = run(model, ids)
    flashsfa.enable(model, 8)
    torch.testing.assert_close(run(model, ids, past_key_values=SparseCache(model)), dense, rtol=1e-4, atol=1e-4)
    flashsfa.enable(model, 8, cache_dtype="int8")
    with pytest.raises(ValueError, match=r"works on the values.*cache_dtype=None"):
        run(model, ids, past_key_values=SparseCache(model))


def test_attention_output_may_be_viewed():
    model = flashsfa.enable(make(**GROUPED), 3)
    attend = transformers.AttentionInterface()["sfa"]
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    out, _ = attend(attention_layers(model)[0], q, k, k, None)
    assert out.shape == (2, 5, 4, 8)
    out.view(2, 5, 32)
    cached, values = SparseCache(model).update(k, k, 0)
    out, _ = attend(attention_layers(model)[0], q, cached, values, None)
    out.view(2, 5, 32)


@pytest.mark.parametrize(
    ("kind", "options", "advice"),
    [
        (
            "GPT2",
            {"n_embd": 32, "n_layer": 2, "n_head": 2, "attn_pdrop": 0.1},
            "attn_dropout.p = 0.0 on each GPT2Attention",
        ),
        ("Llama", {"attention_dropout": 0.1}, "attention_dropout = 0.0 on each LlamaAttention"),
        (
            "OPT",
            {"attention_dropout": 0.1, "ffn_dim": 40, "word_embed_proj_dim": 32},
            "dropout = 0.0 on each OPTAttention",
        ),
    ],
)
def test_dropout_is_refused_early_and_the_advice_works(kind, options, advice, ids):
    model = make(kind, **options)
    with pytest.raises(ValueError, match=advice):
        flashsfa.enable(model.train(), 3)
    flashsfa.enable(model.eval(), 3)
    run(model, ids)
    with pytest.raises(ValueError, match=advice):
        model.train()(ids)
    name = advice.split(" = ")[0].split(".")
    for module in attention_layers(model):
        setattr(getattr(module, name[0]) if len(name) == 2 else module, name[-1], 0.0)
    model(ids, labels=ids).loss.backward()
    flashsfa.enable(model, 3)

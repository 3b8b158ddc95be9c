"""transformers' models: switching, generating from codes, saving, restoring, refusing."""

import pytest
import torch

import flashsfa

transformers = pytest.importorskip("transformers")
from flashsfa.huggingface import SparseCache  # noqa: E402
from flashsfa.huggingface.cache import SparseCacheLayer  # noqa: E402
from flashsfa.huggingface.calibration import gather_moments  # noqa: E402
from flashsfa.huggingface.switch import is_enabled  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CLOSE = {"rtol": 1e-8, "atol": 1e-8}
HEAD_DIMS = {"llama": 8, "gpt2": 12, "qwen3": 16}


def make(kind, **options):
    common = {"vocab_size": 97, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1}
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128}
    if kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**common, **sizes, **options}))
    elif kind == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**common, **sizes, head_dim=16))
    else:
        config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=128, attn_pdrop=0.0, **common)
        model = transformers.GPT2LMHeadModel(config)
    return model.double().eval()


@pytest.fixture(params=list(HEAD_DIMS))
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return make(kind)


@pytest.fixture
def ids():
    return torch.randint(1, 97, (2, 20))


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def switch(model, **options):
    basis = flashsfa.calibrate(model, torch.randint(1, 97, (2, 64)), 3, dense_dims=2)
    head_dim = HEAD_DIMS[model.config.model_type]
    return flashsfa.enable(model, 3, **{"topk_query": head_dim, "dense_dims": 2, "basis": basis, **options})


def greedy(model, ids, tokens=6, **options):
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, **options)


def test_calibration_covers_positions_up_to_the_maximum(model, ids):
    positions = []

    def note(module, args, kwargs):
        positions.append(kwargs["position_ids"].flatten().tolist())

    hook = model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    near, far = (gather_moments(model, ids.repeat(2, 1), max_position=n) for n in (None, 100))
    hook.remove()
    assert positions[:4] == [list(range(20))] * 4
    assert [p[0] for p in positions[4:]] == [0] * 4  # the first token stays where it is
    assert [p[1] for p in positions[4:]] == [1, 27, 54, 81]
    assert positions[-1][-1] == 99
    assert far[0].count == near[0].count == 80
    for wrong in (19, 129):
        with pytest.raises(ValueError, match="max_position must hold"):
            gather_moments(model, ids, max_position=wrong)
    with pytest.raises(ValueError, match="token ids"):
        gather_moments(model, ids[0])


def test_full_budget_equals_dense_and_disable_restores(model, kind, ids):
    dense = logits(model, ids)
    basis = flashsfa.calibrate(model, torch.randint(1, 97, (2, 64)), HEAD_DIMS[kind] // 2)
    assert torch.equal(logits(model, ids), dense)
    assert flashsfa.enable(model, HEAD_DIMS[kind]) is model
    torch.testing.assert_close(logits(model, ids), dense, **CLOSE)
    flashsfa.enable(model, HEAD_DIMS[kind], basis=basis)  # float32 coordinates
    torch.testing.assert_close(logits(model, ids), dense, rtol=1e-4, atol=1e-4)
    flashsfa.enable(model, 2)
    assert (logits(model, ids) - dense).abs().max() > 1e-3
    flashsfa.disable(model)
    assert torch.equal(logits(model, ids), dense)
    assert not is_enabled(model)
    assert not hasattr(model.config, "sfa")
    assert flashsfa.disable(model) is model


@pytest.mark.parametrize("layers", [None, [0]])
def test_cached_generation_equals_no_cache(model, ids, layers):
    switch(model, layers=layers)
    mask = torch.ones_like(ids)
    found = greedy(model, ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True)
    cache = found.past_key_values
    assert isinstance(cache, SparseCache)
    assert [isinstance(x, SparseCacheLayer) for x in cache.layers] == [True, layers is None]
    expected = logits(model, found.sequences, use_cache=False)[:, 19:-1]
    # generate() hands its logits out in float32
    torch.testing.assert_close(torch.stack(found.logits, 1), expected.float(), rtol=1e-5, atol=1e-6)


def test_left_padding(model, ids):
    switch(model)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    padded = greedy(model, ids, attention_mask=mask)
    alone = greedy(model, ids[:1, 7:], attention_mask=mask[:1, 7:])
    assert torch.equal(padded[0, 7:], alone[0])


def test_beams_and_prompt_lookup(model, ids):
    switch(model)
    mask = torch.ones_like(ids)
    beams = greedy(model, ids, attention_mask=mask, num_beams=3)
    assert torch.equal(beams, greedy(model, ids, attention_mask=mask, num_beams=3, use_cache=False))
    ids = ids[:1, :5].repeat(1, 4)
    plain = greedy(model, ids, attention_mask=torch.ones_like(ids))
    looked_up = greedy(model, ids, attention_mask=torch.ones_like(ids), prompt_lookup_num_tokens=3)
    assert torch.equal(plain, looked_up)


def test_save_and_load(model, ids, tmp_path):
    expected = logits(switch(model), ids)
    model.save_pretrained(tmp_path)
    loaded = flashsfa.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.config.sfa == model.config.sfa
    torch.testing.assert_close(logits(loaded, ids), expected, **CLOSE)


def test_load_refuses_what_is_not_switched(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        flashsfa.from_pretrained(tmp_path)
    make("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dense model"):
        flashsfa.from_pretrained(tmp_path)


def latent(model):
    model.config.kv_lora_rank = 8


def softcap(model):
    model.model.layers[1].self_attn.attn_logit_softcapping = 30.0


@pytest.mark.parametrize(
    ("config", "change", "arguments", "message"),
    [
        ({}, latent, {}, "MLA"),
        ({}, softcap, {}, "softcap"),
        ({"head_dim": 258}, None, {}, "at most 256"),
        ({}, None, {"topk": 0}, "topk"),
        ({}, None, {"topk": 9}, "topk"),
        ({}, None, {"topk_query": 9}, "topk"),
        ({}, None, {"dense_dims": 8}, "dense_dims"),
        ({}, None, {"value_tolerance": 1.0}, "value_tolerance"),
        ({}, None, {"layers": [0, 2]}, "do not exist"),
        ({}, None, {"layers": []}, "each layer to switch once"),
        ({}, None, {"layers": [1, 1]}, "each layer to switch once"),
        ({}, None, {"basis": flashsfa.FeatureBasis(*torch.eye(8).expand(2, 1, 2, 8, 8))}, "calibrate on"),
    ],
)
def test_refusal_leaves_the_model_unchanged(config, change, arguments, message, ids):
    model = make("llama", **config)
    if change is not None:
        change(model)
    dense, implementation = logits(model, ids), model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        flashsfa.enable(model, **{"topk": 3, **arguments})
    assert not is_enabled(model)
    assert not hasattr(model.config, "sfa")
    assert not any(hasattr(m, "sfa") for m in model.modules())
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits(model, ids), dense)


def test_dropout_and_static_cache_refused(ids):
    model = switch(make("llama", attention_dropout=0.1))
    logits(model, ids)  # evaluation drops nothing
    with pytest.raises(ValueError, match="dropout"):
        model.train()(ids)
    with pytest.raises(ValueError, match="cache_implementation"):
        greedy(model.eval(), ids, cache_implementation="static")

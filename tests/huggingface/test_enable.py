"""transformers' models: switching, generating from codes, saving, restoring, refusing."""

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flashsfa

transformers = pytest.importorskip("transformers")
from flashsfa.budget import FeatureBudget  # noqa: E402
from flashsfa.huggingface import SparseCache, StaticSparseCache  # noqa: E402
from flashsfa.huggingface import switch as switching  # noqa: E402
from flashsfa.huggingface.attention import LayerCoding  # noqa: E402
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
    near, far = (gather_moments(model, ids.repeat(2, 1), max_position=n) for n in (20, 100))
    hook.remove()
    assert positions[:4] == [list(range(20))] * 4
    assert far[0].count == near[0].count == 80
    if (
        model.config.model_type == "gpt2"
    ):  # positions are in the weights: the windows are moved, the first token stays where it is
        assert [p[0] for p in positions[4:]] == [0] * 4
        assert [p[1] for p in positions[4:]] == [1, 27, 54, 81]
        assert positions[-1][-1] == 99
    else:  # the model runs once near and once far, to see that its rotation is known; then what it gives is turned
        assert positions[4:6] == [list(range(8)), list(range(92, 100))]
        assert positions[6:] == [list(range(20))] * 4
        for x, y in zip(near, far, strict=True):
            torch.testing.assert_close(x.sample.norm(dim=-1).sort().values, y.sample.norm(dim=-1).sort().values)
            assert not torch.allclose(x.key_outer, y.key_outer)
    for wrong in (19, 129):
        with pytest.raises(ValueError, match="max_position must hold"):
            gather_moments(model, ids, max_position=wrong)
    with pytest.raises(ValueError, match="token ids"):
        gather_moments(model, ids[0])


def test_full_budget_equals_dense_and_disable_restores(model, kind, ids):
    dense = logits(model, ids)
    basis = flashsfa.calibrate(model, torch.randint(1, 97, (2, 64)), HEAD_DIMS[kind], dense_dims=0)
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
    assert not model.base_model._forward_pre_hooks
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


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_left_padding(model, ids, cache_dtype):
    switch(model, cache_dtype=cache_dtype)
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


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_save_and_load(model, ids, tmp_path, cache_dtype):
    expected = logits(switch(model, cache_dtype=cache_dtype), ids)
    model.save_pretrained(tmp_path)
    loaded = flashsfa.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.config.sfa == model.config.sfa
    assert loaded.config.sfa["cache_dtype"] == cache_dtype
    torch.testing.assert_close(logits(loaded, ids), expected, **CLOSE)


def test_saving_again_leaves_no_old_basis(ids, tmp_path):
    model = switch(make("llama"))
    model.save_pretrained(tmp_path)
    assert [x.name for x in tmp_path.glob("*.safetensors")] == ["model.safetensors"]  # what others take for weights
    flashsfa.enable(model, 3).save_pretrained(tmp_path)
    assert not (tmp_path / switching.BASIS_FILE).exists()
    loaded = flashsfa.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), **CLOSE)


def test_load_refuses_an_incomplete_model(tmp_path):
    switch(make("llama")).save_pretrained(tmp_path)
    (tmp_path / switching.BASIS_FILE).unlink()
    with pytest.raises(ValueError, match="saved without flashsfa, or is incomplete"):
        flashsfa.from_pretrained(tmp_path)


def test_the_basis_is_uploaded_too(tmp_path, monkeypatch):
    uploaded = []

    def upload(self, directory, repo_id, files_timestamps, **options):
        changed = [x for x in Path(directory).iterdir() if x.stat().st_mtime > files_timestamps.get(x.name, 0)]
        uploaded.append({y.name for x in changed for y in (x.iterdir() if x.is_dir() else [x])})

    model, modeling = switch(make("llama")), transformers.modeling_utils
    hub = SimpleNamespace(create_repo=lambda repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(modeling, "hf_api", lambda: hub)
    monkeypatch.setattr(modeling, "create_and_tag_model_card", lambda *args, **options: SimpleNamespace(save=str))
    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    for _ in range(2):
        model.save_pretrained(tmp_path, push_to_hub=True)
    names = {"config.json", "model.safetensors", "basis.safetensors"}
    assert [names - found for found in uploaded] == [set(), set()]


def test_only_the_main_process_saves_the_basis(tmp_path):
    model = switch(make("llama"))
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.rglob("*"))
    model.save_pretrained(tmp_path, True)
    flashsfa.enable(model, 3).save_pretrained(tmp_path, is_main_process=False)
    assert (tmp_path / switching.BASIS_FILE).exists()


@pytest.mark.parametrize("convert", [torch.nn.Module.bfloat16, torch.nn.Module.half, lambda m: m.to(torch.float16)])
def test_changing_the_dtype_does_not_round_the_basis(convert):
    model = switch(make("llama"))
    coding = model.model.layers[0].self_attn.sfa
    query, key = coding.query.clone(), coding.key.clone()
    assert next(convert(model).parameters()).itemsize == 2
    assert coding.query.dtype == coding.key.dtype == torch.float32
    assert torch.equal(coding.query, query)
    assert torch.equal(coding.key, key)
    assert torch.equal(coding.to("meta").key, key)  # weights there are elsewhere, a basis would be lost


@pytest.mark.parametrize("kind", ["none", "dense", "dynamic", "static", "int8"])
def test_autocast(ids, device, kind):
    """Norms leave queries and keys in float32 beside values in 16 bits; a basis is not rounded."""
    model = switch(make("qwen3"), cache_dtype="int8" if kind == "int8" else None).float()
    expected = logits(model, ids, use_cache=False)
    caches = {"none": lambda: None, "dense": transformers.DynamicCache, "dynamic": lambda: SparseCache(model)}
    caches["int8"] = caches["dynamic"]
    cache = {**caches, "static": lambda: StaticSparseCache(model, 32)}[kind]()
    with torch.autocast(device.type, torch.bfloat16):
        parts = (ids,) if cache is None else ids.split((17, 1, 2), dim=1)
        found = torch.cat([logits(model, x, past_key_values=cache, use_cache=cache is not None) for x in parts], dim=1)
    error = (found - expected).norm() / expected.norm()
    assert error < 0.05
    if kind in ("dynamic", "static"):
        assert cache.layers[0].store.v.dtype == cache.layers[0].store.codes.dtype == torch.bfloat16


def test_generation_under_autocast(ids, device):
    model, mask = switch(make("qwen3")).float(), torch.ones_like(ids)
    with torch.autocast(device.type, torch.bfloat16):
        for options in ({}, {"cache_implementation": "static"}):
            whole, chunks = (
                greedy(model, ids, attention_mask=mask, prefill_chunk_size=n, **options) for n in (None, 7)
            )
            assert whole.shape == chunks.shape == (2, 26)


def test_autocast_does_not_round_a_basis(device):
    """Of a basis with very unlike sides."""
    scale = torch.diag(torch.logspace(-3, 3, 8)) @ torch.linalg.qr(torch.randn(8, 8)).Q
    basis = flashsfa.FeatureBasis(torch.linalg.inv(scale).mT.expand(1, 8, 8), scale.expand(1, 8, 8))
    coding, x = LayerCoding(FeatureBudget.of(8, 8), basis=basis), torch.randn(1, 1, 5, 8)
    with torch.autocast(device.type, torch.bfloat16):
        q, k = coding.queries(x), coding.keys(x)
    assert torch.equal(q, basis.transform_query(x))
    assert torch.equal(k, basis.transform_key(x))


def test_training_runs_without_a_cache_of_codes(ids):
    model = switch(make("llama"))
    model(ids).logits.sum().backward()  # with transformers' own cache, as by default
    with pytest.raises(ValueError, match=r"no gradient: use torch\.no_grad"):
        model(ids, past_key_values=SparseCache(model))
    with pytest.raises(ValueError, match=r"no gradient: use torch\.no_grad"):
        model(ids, past_key_values=StaticSparseCache(model, 32))
    model.requires_grad_(False)(ids, past_key_values=SparseCache(model))


def test_another_attention_chosen_later_generates_dense(ids):
    model = make("llama")
    dense = greedy(model, ids)
    flashsfa.enable(model, 2).set_attn_implementation("sdpa")
    assert torch.equal(greedy(model, ids), dense)


def test_load_refuses_what_is_not_switched(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        flashsfa.from_pretrained(tmp_path)
    make("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dense model"):
        flashsfa.from_pretrained(tmp_path)


def latent(model):
    model.config.kv_lora_rank = 8


def sizes_by_layer(model):
    def fail(config):
        raise RuntimeError("'head_dim' is a per-layer attribute")

    model.config.__class__ = type("SizesByLayer", (type(model.config),), {"head_dim": property(fail)})


def softcap(model):
    model.model.layers[1].self_attn.attn_logit_softcapping = 30.0


@pytest.mark.parametrize(
    ("config", "change", "arguments", "message"),
    [
        ({}, latent, {}, "MLA"),
        ({}, softcap, {}, "softcap"),
        ({}, sizes_by_layer, {}, "no single head size"),
        ({"head_dim": 258}, None, {}, "at most 256"),
        ({}, None, {"topk": 0}, "topk"),
        ({}, None, {"topk": 9}, "topk"),
        ({}, None, {"topk_query": 9}, "topk"),
        ({}, None, {"dense_dims": 8}, "dense_dims"),
        ({}, None, {"value_tolerance": 1.0}, "value_tolerance"),
        ({}, None, {"topk_query": 8, "query_pattern": "2:4"}, "at most half"),
        ({}, None, {"query_pattern": "1:2"}, "query_pattern must be one of 2:4, None; got '1:2'"),
        (
            {},
            None,
            {"cache_dtype": "fp8"},
            "'fp8' names no format of a cache; there are int4, int8, or widths such as d8s4v4",
        ),
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"basis": "dictionary"}, "basis must be a FeatureBasis, as calibrate returns, or None; got str"),
        ({"layers": 1}, "layers must be a list of layer indices or None for all, got 1"),
        ({"layers": "01"}, "layers must be a list"),
        ({"layers": [None, 1]}, "layers must hold indices: each must be an int, got None"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(arguments, words):
    with pytest.raises(TypeError, match=words):
        flashsfa.enable(make("llama"), 3, **arguments)


def test_dropout_and_dense_caches_refused(ids):
    model = switch(make("llama", attention_dropout=0.1))
    logits(model, ids)  # evaluation drops nothing
    with pytest.raises(ValueError, match="dropout"):
        model.train()(ids)
    with pytest.raises(ValueError, match="cache_implementation"):
        greedy(model.eval(), ids, cache_implementation="quantized")
    with pytest.raises(ValueError, match="StaticSparseCache"):
        logits(model, ids, past_key_values=transformers.StaticCache(config=model.config, max_cache_len=32))


def test_packed_sequences_equal_separate_ones(ids):
    model = switch(make("llama"))
    found = logits(model, ids, position_ids=torch.arange(20).remainder(10)[None], use_cache=False)
    assert "mask of its own" in flashsfa.explain()
    expected = torch.cat([logits(model, part, use_cache=False) for part in ids.split(10, 1)], 1)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_masks_of_the_callers_own_refused(ids):
    model = switch(make("llama"))
    with pytest.raises(ValueError, match="2D attention mask"):
        logits(model, ids, attention_mask=torch.ones(2, 1, 20, 20).tril().bool())


def test_failure_on_the_way_leaves_the_model_dense(ids, monkeypatch):
    model = make("llama")
    dense = logits(model, ids)
    monkeypatch.setattr(switching, "extend", lambda model, basis: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        flashsfa.enable(model, 3)
    assert not is_enabled(model)
    assert not hasattr(model.config, "sfa")
    assert torch.equal(logits(model, ids), dense)


def test_left_padding_without_positions_warns_once(model, ids):
    flashsfa.enable(model, 3)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, ids, attention_mask=mask.flip(1))
        logits(model, ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
        greedy(model, ids, attention_mask=mask)
    with pytest.warns(UserWarning, match="left-padded"):
        logits(model, ids, attention_mask=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, ids, attention_mask=mask)


def test_untested_version_warns_once(monkeypatch):
    monkeypatch.setattr(switching.transformers, "__version__", "6.1.0.dev0")
    switching._warn_of_untested_version.cache_clear()
    with pytest.warns(UserWarning, match=r"tested with transformers 5\.17 to 5\.23, not 6\.1"):
        flashsfa.enable(make("llama"), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flashsfa.enable(make("llama"), 3)
    switching._warn_of_untested_version.cache_clear()


def test_a_copy_is_a_model_of_its_own(ids, tmp_path):
    model = switch(make("llama"))
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.lm_head.weight.mul_(2)
    copied.save_pretrained(tmp_path)
    loaded = flashsfa.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(logits(loaded, ids), 2 * logits(model, ids), **CLOSE)
    flashsfa.disable(copied)
    assert is_enabled(model)
    assert not is_enabled(copied)

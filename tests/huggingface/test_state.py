"""A switched model that is copied, pickled, offloaded or quantised, whose cache changes hands, or whose generate() fails."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch

import flashsfa

transformers = pytest.importorskip("transformers")
from flashsfa.huggingface import SparseCache, StaticSparseCache  # noqa: E402
from flashsfa.huggingface.switch import is_enabled  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def make(layers=3, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, eos_token_id=None,
        **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def switched(**options):
    model = make()
    basis = flashsfa.calibrate(model, torch.randint(1, 61, (2, 40)), 3)
    return flashsfa.enable(model, 3, basis=basis, **options)


@pytest.fixture
def ids():
    return torch.randint(1, 61, (2, 12))


def greedy(model, ids, **options):
    return model.generate(ids, max_new_tokens=5, do_sample=False, **options)


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save])
def test_a_copy_is_switched_and_its_own(copied, ids, tmp_path):
    model = switched(cache_dtype="int8")
    expected = greedy(model, ids)
    again = copied(model)
    assert is_enabled(again)
    flashsfa.disable(model)
    found = greedy(again, ids, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected)
    assert found.past_key_values.layers[0].store.coder.bits == torch.int8
    again.save_pretrained(tmp_path)
    assert (tmp_path / "sfa" / "basis.safetensors").is_file()
    flashsfa.disable(again)
    assert torch.equal(greedy(again, ids), greedy(model, ids))


def test_a_pickled_model_runs_in_a_process_that_has_not_switched_one(ids, tmp_path):
    model = switched()
    torch.save((model, ids, greedy(model, ids)), tmp_path / "model.pt")
    code = (
        f"import torch; model, ids, expected = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_models_of_one_config_are_switched_alone(ids, tmp_path):
    first = make()
    config = first.config
    second = transformers.LlamaForCausalLM(config).eval()
    flashsfa.enable(first, 3)
    assert second.config is config
    assert config._attn_implementation != "sfa"
    assert not hasattr(config, "sfa")
    flashsfa.disable(flashsfa.enable(second, 3))
    assert second.config._attn_implementation == config._attn_implementation
    first.save_pretrained(tmp_path)
    assert torch.equal(greedy(flashsfa.from_pretrained(tmp_path), ids), greedy(first, ids))


def test_what_wraps_a_model_sees_its_config():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make(), peft.LoraConfig(target_modules=["q_proj"]))
    flashsfa.enable(model, 3)
    assert model.config is model.base_model.model.config is model.base_model.model.model.layers[1].self_attn.config
    assert model.config.sfa["topk"] == 3


def test_a_converted_model_that_was_loaded_dense_loses_its_settings(ids, tmp_path):
    flashsfa.enable(make(), 3).save_pretrained(tmp_path)
    dense = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert dense.config.sfa["topk"] == 3
    flashsfa.disable(dense).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a dense model"):
        flashsfa.from_pretrained(tmp_path)


def test_gpt2_with_a_channel_is_copied_with_its_hooks(ids):
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=61, eos_token_id=None)
    model = flashsfa.enable(transformers.GPT2LMHeadModel(config).eval(), 3, dense_dims=4, positions="channel")
    expected = greedy(model, ids)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(greedy(again, ids), expected)


@pytest.mark.parametrize("place", ["before", "after", "disk"])
@pytest.mark.cpu  # offloaded to it
def test_a_basis_stays_with_offloaded_layers(place, ids, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = make()
    basis = flashsfa.calibrate(model, torch.randint(1, 61, (2, 40)), 3)
    expected = greedy(flashsfa.enable(model, 3, basis=basis), ids)
    if place == "disk":
        model.save_pretrained(tmp_path / "model")
        parts = ("embed_tokens", "layers.0", "norm", "rotary_emb")
        where = {f"model.{part}": "cpu" for part in parts} | {
            "lm_head": "cpu",
            "model.layers.1": "disk",
            "model.layers.2": "disk",
        }
        model = flashsfa.from_pretrained(tmp_path / "model", device_map=where, offload_folder=tmp_path / "weights")
    elif place == "before":
        accelerate.cpu_offload(flashsfa.disable(model), "cpu")
        flashsfa.enable(model, 3, basis=basis)
    else:
        accelerate.cpu_offload(model, "cpu")
    assert model.model.layers[1].self_attn.q_proj.weight.is_meta
    assert torch.equal(greedy(model, ids), expected)


@pytest.mark.cpu
def test_an_offloaded_model_is_calibrated(ids):
    accelerate = pytest.importorskip("accelerate")
    model, windows = make(), torch.randint(1, 61, (2, 40))
    expected = flashsfa.calibrate(model, windows, 3, kind="balanced")
    accelerate.cpu_offload(model, "cpu")
    found = flashsfa.calibrate(model, windows, 3, kind="balanced")
    torch.testing.assert_close(found.key, expected.key)


def test_layers_without_parameters_are_switched(ids):
    """Quantised linear layers keep their weights in buffers."""
    model = make()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            projection = getattr(layer.self_attn, name)
            weight = projection.weight.detach()
            del projection.weight
            projection.register_buffer("weight", weight)
    basis = flashsfa.calibrate(model, torch.randint(1, 61, (2, 40)), 3)
    flashsfa.enable(model, 3, basis=basis)
    assert greedy(model, ids).shape == (2, 17)


class Fails(transformers.StoppingCriteria):
    """Stops a generation after some calls, as an interrupt does."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, *args, **kwargs):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return torch.zeros(1, dtype=torch.bool)


@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_an_early_exit_that_fails_leaves_the_model_whole(calls, ids):
    model = switched()
    expected = greedy(model, ids[:1])
    assert torch.equal(greedy(model, ids[:1], assistant_early_exit=1), expected)
    with pytest.raises(KeyboardInterrupt):
        greedy(model, ids[:1], assistant_early_exit=1, stopping_criteria=[Fails(calls)])
    assert model.config.num_hidden_layers == 3
    assert len(SparseCache(model).layers) == 3
    assert torch.equal(greedy(model, ids[:1]), expected)


@pytest.mark.parametrize("kind", ["dynamic", "int8", "static"])
@pytest.mark.parametrize(("first", "then"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_a_cache_goes_on_in_another_dtype(kind, first, then, ids):
    model = flashsfa.enable(make(), 8, cache_dtype="int8" if kind == "int8" else None)
    expected = model(ids, use_cache=False).logits[:, -4:]
    cache = StaticSparseCache(model, 32) if kind == "static" else SparseCache(model)
    with torch.no_grad():
        model.to(first)(ids[:, :8], past_key_values=cache)
        found = model.to(then)(ids[:, 8:], past_key_values=cache).logits
    assert found.dtype == then
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_prefix_under_autocast_goes_on_without(kind, ids):
    model = flashsfa.enable(make(), 8)
    expected = model(ids, use_cache=False).logits[:, -4:]
    cache = StaticSparseCache(model, 32) if kind == "static" else SparseCache(model)
    with torch.no_grad():
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            model(ids[:, :8], past_key_values=cache)
        found = model(ids[:, 8:], past_key_values=cache).logits
        with torch.autocast(ids.device.type, dtype=torch.bfloat16):
            model(ids[:, :3], past_key_values=cache)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    "change", [{"topk": 4}, {"dense_dims": 2}, {"basis": None}, {"basis": "another"}, {"layers": [0]}]
)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_of_other_settings_is_refused(kind, change, ids):
    model = make()
    bases = [flashsfa.calibrate(model, torch.randint(1, 61, (2, 40)), 3) for _ in range(2)]
    flashsfa.enable(model, 3, basis=bases[0])
    cache = StaticSparseCache(model, 32) if kind == "static" else SparseCache(model)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        flashsfa.enable(model, 3, basis=bases[0], topk_query=8)  # of queries alone, and an equal basis
        model(ids[:, :1], past_key_values=copy.deepcopy(cache))
        options = {"topk": 3, "basis": bases[0], **change}
        options["basis"] = bases[1] if options["basis"] == "another" else options["basis"]
        if change.keys() & {"topk", "dense_dims"}:
            options["basis"] = None
        flashsfa.enable(model, **options)
        with pytest.raises(ValueError, match="made for other settings"):
            model(ids[:, :1], past_key_values=cache)

"""Models in wrappers: PEFT, torch.compile, data parallelism. What is switched is the model that generates."""

import pytest
import torch

import flashsfa

transformers = pytest.importorskip("transformers")
from flashsfa.huggingface import SparseCache, StaticSparseCache, attention_shape  # noqa: E402
from flashsfa.huggingface.switch import is_enabled  # noqa: E402
from small_llama import small_llama  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

HEAD_DIM = 8


def lora(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def tuners(model):
    return lora(model).base_model


def data_parallel(model):
    return torch.nn.DataParallel(model)


def compiled(model):
    return torch.compile(model, backend="eager")


class Own(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


WRAPPERS = [lora, tuners, compiled, data_parallel, Own, lambda model: compiled(lora(model))]


@pytest.fixture
def ids():
    return torch.randint(1, 61, (2, 12))


def inner(model):
    return next(m for m in model.modules() if isinstance(m, transformers.LlamaForCausalLM))


def greedy(model, ids, **options):
    return model.generate(input_ids=ids, max_new_tokens=5, do_sample=False, **options)


def changes(model):
    """What differs on an instance from an untouched one."""
    return sorted(set(vars(model)) - set(vars(small_llama())))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_the_model_inside_is_switched(wrap, ids):
    model = wrap(small_llama())
    core = inner(model)
    dense = greedy(core, ids)
    with torch.no_grad():
        logits = core(ids).logits
    before = changes(core)
    assert flashsfa.enable(model, HEAD_DIM) is model
    assert is_enabled(model)
    assert is_enabled(core)
    for implementation in (None, "static"):
        options = {"disable_compile": True} if implementation else {}
        assert torch.equal(greedy(core, ids, cache_implementation=implementation, **options), dense)
    basis = flashsfa.calibrate(model, torch.randint(1, 61, (2, 40)), 3)
    assert attention_shape(model) == (4, 2, HEAD_DIM)
    flashsfa.enable(model, 3, basis=basis, cache_dtype="int8")
    found = greedy(core, ids, return_dict_in_generate=True).past_key_values
    assert type(found) is SparseCache
    assert {type(x).__name__ for x in found.layers} == {"SparseCacheLayer"}
    assert found.layers[0].store.coder.bits == torch.int8
    assert len(SparseCache(model).layers) == 2
    flashsfa.enable(model, 3)
    assert len(StaticSparseCache(model, 32).layers) == 2
    with torch.no_grad():
        assert (core(ids).logits - logits).abs().max() > 1e-3
        assert flashsfa.disable(model) is model
        torch.testing.assert_close(core(ids).logits, logits, rtol=0, atol=0)
    assert changes(core) == before
    assert not is_enabled(model)


def test_a_compiled_wrapper_follows_the_switch(ids):
    model = small_llama()
    fast, options = compiled(model), {"use_cache": False, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        dense = fast(ids, **options).logits
        flashsfa.enable(fast, 3)
        sparse = fast(ids, **options).logits
        torch.testing.assert_close(sparse, model(ids, use_cache=False).logits)
        assert (sparse - dense).abs().max() > 1e-3
        flashsfa.disable(fast)
        torch.testing.assert_close(fast(ids, **options).logits, dense)


def test_the_inside_of_a_model_is_refused():
    model = small_llama()
    with pytest.raises(ValueError, match="the inside of a model"):
        flashsfa.enable(model.model, 3)
    with pytest.raises(ValueError, match="no transformers model"):
        flashsfa.enable(torch.nn.Linear(2, 2), 3)
    with pytest.raises(ValueError, match="got int"):
        flashsfa.enable(3, 3)
    assert not is_enabled(model)


def test_adapters_are_peft_s_to_save(ids, tmp_path):
    peft = pytest.importorskip("peft")
    model = flashsfa.enable(lora(small_llama()), 3)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not list((tmp_path / "other").glob("*"))
    model.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter_config.json").is_file()
    again = peft.PeftModel.from_pretrained(flashsfa.enable(small_llama(), 3), tmp_path / "adapters").eval()
    assert torch.equal(greedy(again, ids), greedy(model, ids))


def test_adapters_after_the_switch(ids, tmp_path):
    model = lora(flashsfa.enable(small_llama(), 3))
    expected = greedy(flashsfa.enable(lora(small_llama()), 3), ids)
    found = greedy(model, ids, return_dict_in_generate=True)
    assert type(found.past_key_values) is SparseCache
    assert torch.equal(found.sequences, expected)
    merged = model.merge_and_unload()
    assert is_enabled(merged)
    assert torch.equal(greedy(merged, ids), expected)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(greedy(flashsfa.from_pretrained(tmp_path / "merged"), ids), expected)


def test_prefix_tuning(ids):
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(small_llama(), config).eval()
    dense = greedy(model, ids, attention_mask=torch.ones_like(ids))
    flashsfa.enable(model, HEAD_DIM)
    assert torch.equal(greedy(model, ids, attention_mask=torch.ones_like(ids)), dense)


def test_a_cache_of_codes_is_a_dynamic_cache_that_hands_out_no_keys(ids):
    model = flashsfa.enable(small_llama(), 3)
    cache = greedy(model, ids, return_dict_in_generate=True).past_key_values
    assert isinstance(cache, transformers.DynamicCache)
    with pytest.raises(TypeError, match="pass the cache itself"):
        list(cache)

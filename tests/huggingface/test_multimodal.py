"""Models of text and images: the text part's attention is switched, a vision tower's is not."""

import inspect

import pytest
import torch

import flashsfa

transformers = pytest.importorskip("transformers")
from transformers.masking_utils import create_chunked_causal_mask  # noqa: E402

from flashsfa.huggingface import SparseCache, StaticSparseCache, calibrate  # noqa: E402
from flashsfa.huggingface.loading import load_weights  # noqa: E402
from flashsfa.huggingface.structure import attention_layers, default_dense_dims, text_part  # noqa: E402
from multimodal import MODELS, TEXT, inputs, make  # noqa: E402
from support_page import assert_listed  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

NEW = 6
CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # the states of linear attention and generate()'s logits are in float32


NAMES = {
    "Gemma3": "Gemma 3, ",
    "Qwen2_5_VL": "Qwen2.5-VL",
    "Qwen3VL": "Qwen3-VL",
    "Qwen3_5": "Qwen3.5 with images",
    "Llama4": "Llama 4 with images",
}


def test_the_page_lists_what_is_tested():
    assert_listed({NAMES[kind]: dense_dims for kind, (*_, dense_dims) in MODELS.items()})


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


@pytest.fixture
def given(kind):
    torch.manual_seed(2)
    return inputs(kind)


def logits(model, given):
    with torch.no_grad():
        return model(**given, use_cache=False).logits


def generate(model, given, **options):
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**given, **settings | options)


def implementations(model):
    """Of the parts: those of text and the others."""
    parts = {type(x).__name__: x.config for x in model.modules() if isinstance(x, transformers.PreTrainedModel)}
    text = text_part(model).config
    return [{c._attn_implementation for c in parts.values() if (c is text) == is_text} for is_text in (True, False)]


def test_the_text_part_is_switched_alone(kind, given):
    model = make(kind)
    dense, before = logits(model, given), implementations(model)
    flashsfa.enable(model, 2)
    assert implementations(model) == [{"sfa"}, before[1]]
    switched = {module for module in model.modules() if hasattr(module, "sfa")}
    assert switched == set(attention_layers(model)) <= set(text_part(model).modules())
    assert model.config.sfa["dense_dims"] == default_dense_dims(model) == MODELS[kind][3]
    assert (logits(model, given) - dense).abs().max() > 1e-5
    flashsfa.disable(model)
    assert implementations(model) == before
    assert torch.equal(logits(model, given), dense)


def test_full_budget_equals_dense(kind, given):
    """Of a text with an image, whose tokens some models let see one another both ways."""
    model = make(kind)
    dense = logits(model, given)
    flashsfa.enable(model, 16, dense_dims=0)
    torch.testing.assert_close(logits(model, given), dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("implementation", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    "options", [{}, {"cache_dtype": "int8", "recent": 4, "first": 2, "prefill": "dense"}], ids=["16 bits", "exact"]
)
def test_generation_equals_dense_at_the_full_budget_and_goes_on_from_an_image(kind, given, implementation, options):
    model = make(kind)
    expected = generate(model, given)
    flashsfa.enable(model, 16, dense_dims=0, **options)
    found = generate(model, given, cache_implementation=implementation)
    assert type(found.past_key_values) is (StaticSparseCache if implementation else SparseCache)
    close = {"rtol": 0.2, "atol": 0.2} if options else CLOSE
    torch.testing.assert_close(
        found.logits[0], expected.logits[0], **CLOSE if options.get("prefill") == "dense" else close
    )
    if not options:
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(found.logits, expected.logits, **close)


@pytest.mark.parametrize("implementation", [None, "static"], ids=["dynamic", "static"])
def test_generation_equals_no_cache(kind, given, implementation):
    model = flashsfa.enable(make(kind), 3)
    found = generate(model, given, cache_implementation=implementation)
    whole = given | {"input_ids": found.sequences[:, :-1], "attention_mask": torch.ones_like(found.sequences[:, :-1])}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in given:
            whole[name] = torch.nn.functional.pad(given[name], (0, NEW - 1))
    expected = logits(model, whole)[:, -NEW:]
    torch.testing.assert_close(torch.stack(found.logits, 1), expected.float(), **CLOSE)


def test_save_and_load(kind, given, tmp_path):
    model = flashsfa.enable(make(kind), 2, topk_query=3)
    model.save_pretrained(tmp_path)
    loaded = flashsfa.from_pretrained(tmp_path, dtype=torch.float64).eval()
    loaded.config.get_text_config()._experts_implementation = "eager"
    assert type(loaded) is type(model)
    assert loaded.config.sfa == model.config.sfa
    torch.testing.assert_close(logits(loaded, given), logits(model, given), rtol=1e-5, atol=1e-5)
    flashsfa.disable(loaded).save_pretrained(tmp_path / "dense")
    assert type(load_weights(tmp_path / "dense")) is type(model)


@pytest.mark.parametrize("budget", [{"topk": 3, "dense_dims": 2}, {"key_bytes": 9}], ids=["topk", "key bytes"])
def test_calibration_of_the_text_part(kind, given, budget):
    model = make(kind)
    dense = logits(model, given)
    basis = calibrate(model, torch.randint(1, 59, (4, 64)), **budget)
    assert basis.key.shape == (len(attention_layers(model)), 2, 16, 16)
    assert torch.equal(logits(model, given), dense)
    flashsfa.enable(model, basis=basis, **({} if "key_bytes" in budget else budget))
    assert generate(model, given).sequences.shape[1] == given["input_ids"].shape[1] + NEW


def test_speculative_decoding(kind, given):
    model = flashsfa.enable(make(kind), 3, recent=3, first=2, prefill="dense")
    if kind == "Qwen3_5":
        with pytest.raises(ValueError, match="not supported with stateful models"):
            generate(model, given, prompt_lookup_num_tokens=3)
        return
    plain = generate(model, given, max_new_tokens=16).sequences
    assert torch.equal(generate(model, given, max_new_tokens=16, prompt_lookup_num_tokens=3).sequences, plain)
    with pytest.raises(ValueError, match="takes the first layers of a model of text alone"):
        generate(model, given, assistant_early_exit=1)


def llama4(**options):
    config = (
        TEXT
        | {"num_hidden_layers": 4, "num_local_experts": 2, "intermediate_size_mlp": 40, "attention_chunk_size": 8}
        | options
    )
    config = transformers.Llama4TextConfig(**config)
    config._experts_implementation = "eager"
    torch.manual_seed(1)
    return transformers.Llama4ForCausalLM(config).double().eval()


@pytest.mark.parametrize("implementation", [None, "static"], ids=["dynamic", "static"])
def test_layers_with_chunks_stay_dense_beside_switched_ones(implementation):
    if implementation and "block_sequence_ids" not in inspect.signature(create_chunked_causal_mask).parameters:
        pytest.skip("this version of transformers makes no masks of chunks for static caches")
    model, ids = llama4(), torch.randint(1, 59, (2, 21))
    mask = (torch.arange(21) >= torch.tensor([5, 0])[:, None]).long()
    given = {"input_ids": ids, "attention_mask": mask}
    expected = generate(model, given)
    with pytest.raises(
        ValueError, match=r"chunked attention in layers \[0, 1, 2\].*leave them dense with enable\(layers=\[3\]\)"
    ):
        flashsfa.enable(model, 3)
    flashsfa.enable(model, 16, dense_dims=0, layers=[3])
    found = generate(model, given, cache_implementation=implementation)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    flashsfa.enable(model, 3, layers=[3])
    assert (
        generate(model, given, cache_implementation=implementation).logits[0] - expected.logits[0]
    ).abs().max() > 1e-3
    basis = calibrate(flashsfa.disable(model), torch.randint(1, 59, (4, 64)), 3)
    flashsfa.enable(model, 3, basis=basis, layers=[3])


def test_the_inside_of_a_model_is_refused():
    with pytest.raises(ValueError, match="is the inside of a model"):
        flashsfa.enable(make("Gemma3").model, 3)

"""vLLM generates what transformers generates: real engines in float32, on a GPU if vLLM has one, else on the CPU."""

import pytest
import torch

pytest.importorskip("vllm")
from vllm_models import MODELS, SWITCHED, UNEVEN, prompts

NEW = 24
OURS, DENSE = "ours", "vLLM's own"
MIXED = [name for name in SWITCHED if "layers" in MODELS[name][2]]
# vLLM wants the layers of a draft in one group, and its GPT-NeoX changes transformers' class, of which then no second model is made.
DRAFTED = [name for name in SWITCHED if "Gemma" not in name and name != "GPT-NeoX"]


def counted(engine, name):
    """What vLLM counts under a name, since the engine started."""
    return sum(x.value for x in engine.get_metrics() if x.name == f"vllm:{name}")


def attentions(engine):
    """Whose classes run attention."""
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    layers = runner.compilation_config.static_forward_context.values()
    kinds = {type(layer.impl) for layer in layers if hasattr(layer, "impl")}
    return {OURS if kind.__name__ == "SparseFeatureImpl" else DENSE for kind in kinds}


@pytest.mark.parametrize("name", SWITCHED)
def test_models(folder, start, complete, name):
    """Requests of unequal lengths, in chunks of 64 tokens at most, and again from shared pages."""
    asked = prompts(UNEVEN)
    expected = folder.expected(name, asked, NEW)
    engine = start(name, **({"block_size": 32} if name in MIXED else {}))
    assert attentions(engine) == ({OURS, DENSE} if name in MIXED else {OURS})
    before = counted(engine, "prefix_cache_hits")
    assert complete(engine, asked, NEW) == expected
    assert complete(engine, asked, NEW) == expected
    assert counted(engine, "prefix_cache_hits") > before


def test_requests_that_begin_alike(folder, start, complete):
    asked = [prompts([200], 1)[0] + rest for rest in prompts([3, 40, 90], 2)]
    assert complete(start("plain"), asked, NEW) == folder.expected("plain", asked, NEW)


@pytest.mark.parametrize("arguments", [{"enable_prefix_caching": False, "max_num_batched_tokens": 512}, {"max_num_batched_tokens": 48}], ids=["whole", "chunks"])  # fmt: skip
@pytest.mark.parametrize("name", ["plain", "8 bits"])
def test_requests_that_lose_their_pages(folder, start, complete, name, arguments):
    asked = prompts([60] * 8, 3)
    expected = folder.expected(name, asked, 64)
    engine = start(name, num_gpu_blocks_override=36, **arguments)
    assert complete(engine, asked, 64) == expected
    assert counted(engine, "num_preemptions") > 0


@pytest.mark.parametrize("size", [48, 256])
def test_pages_of_other_sizes(folder, start, complete, size):
    asked = prompts(UNEVEN)
    assert complete(start("plain", block_size=size), asked, NEW) == folder.expected("plain", asked, NEW)


def test_a_compiled_model(folder, start, complete):
    asked = prompts(UNEVEN)
    expected = folder.expected("plain", asked, NEW)
    torch.use_deterministic_algorithms(False)
    assert complete(start("plain", enforce_eager=False), asked, NEW) == expected


@pytest.mark.parametrize("guesses", [3, 20])  # up to 15 decode, more are read as prompts
@pytest.mark.parametrize("name", ["plain", "8 bits", "4 bits", "basis", "windows", "one layer in 4 bits"])
def test_guessed_tokens(folder, start, complete, name, guesses):
    """Speculative decoding by n-grams, of requests of which some repeat themselves."""
    asked = prompts([5, 40], 4) + [part * 12 for part in prompts([6, 9], 5)]
    expected = folder.expected(name, asked, 64)
    method = {"method": "ngram", "num_speculative_tokens": guesses, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    engine = start(name, block_size=32, speculative_config=method)
    assert complete(engine, asked, 64) == expected
    assert counted(engine, "spec_decode_num_accepted_tokens") > 0


@pytest.mark.parametrize("name", DRAFTED)
def test_tokens_of_a_draft_model(folder, start, complete, name):
    """Guesses of the same model, dense: some are right. Its pages lie beside those of codes, and are wider. Longer than what
    transformers is asked for, where rounding decides which features are the largest."""
    asked = prompts(UNEVEN)
    alone = complete(start(name, block_size=32), asked, 64)
    assert [tokens[:NEW] for tokens in alone] == folder.expected(name, asked, NEW)
    draft = {"method": "draft_model", "model": folder(f"dense {name}"), "num_speculative_tokens": 3}
    engine = start(name, block_size=32, speculative_config=draft)
    assert attentions(engine) == {OURS, DENSE}
    assert complete(engine, asked, 64) == alone
    assert complete(engine, asked, 64) == alone  # from shared pages
    assert counted(engine, "spec_decode_num_accepted_tokens") > 0


@pytest.mark.parametrize("name", ["plain", "4 bits"])
def test_tokens_of_a_draft_model_that_guesses_as_many_as_it_may(folder, start, complete, name):
    asked = prompts([1, 5, 90])
    alone = complete(start(name, block_size=32), asked, 64)
    draft = {"method": "draft_model", "model": folder(f"dense {name}"), "num_speculative_tokens": 15}
    assert complete(start(name, block_size=32, speculative_config=draft), asked, 64) == alone


def test_a_dense_model_is_served_as_before(folder, start, complete):
    asked = prompts(UNEVEN)
    expected = folder.expected("dense", asked, NEW)
    engine = start("dense", block_size=32)
    assert attentions(engine) == {DENSE}
    assert complete(engine, asked, NEW) == expected


def test_settings_from_the_command_line(folder, start, complete):
    asked = prompts(UNEVEN)
    engine = start("dense", hf_overrides={"sfa": {"topk": 8, "dense_dims": 16, "topk_query": 24}})
    assert complete(engine, asked, NEW) == folder.expected("plain", asked, NEW)


def test_a_switched_model_is_served_dense_on_request(folder, start, complete):
    asked = prompts(UNEVEN)
    engine = start("plain", hf_overrides={"sfa": None}, block_size=32)
    assert complete(engine, asked, NEW) == folder.expected("dense", asked, NEW)

"""Speculative decoding in transformers: whatever the cache keeps, the tokens are those of plain greedy decoding, or it is refused
before the first of them."""

import pytest
import torch

import flashsfa

transformers = pytest.importorskip("transformers")
from exact_models import make, tokens  # noqa: E402
from flashsfa.huggingface import SparseCache, StaticSparseCache  # noqa: E402
from flashsfa.huggingface.cache import SparseCacheLayer  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

NEW = 16
NONE, FIRST, RING = {"recent": 0, "first": 0}, {"recent": 0, "first": 2}, {"recent": 5, "first": 2}
FORMATS = {
    "16 bits": NONE,
    "16 bits, ring": RING,
    "int8": {"cache_dtype": "int8"} | NONE,
    "int4, first exact": {"cache_dtype": "int4"} | FIRST,
    "int4, dense prompts": {"cache_dtype": "int4", "prefill": "dense"} | NONE,
    "axes": {"cache_dtype": "int4"} | NONE,
    "axes, ring, dense prompts": {"cache_dtype": "int4", "prefill": "dense"} | RING,  # as presets have it
}


@pytest.fixture(params=[False, True], ids=["full", "sliding"])
def sliding(request):
    return request.param


@pytest.fixture(params=FORMATS)
def model(request, sliding):
    return made(sliding, request.param)


def made(sliding, name):
    options = FORMATS[name]
    if "axes" not in name:
        return make(sliding, **options)
    dense = flashsfa.disable(make(sliding))
    basis = flashsfa.calibrate(dense, tokens(64, 4), key_bytes=9)
    return flashsfa.enable(dense, basis=basis, **options)


def greedy(model, ids, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **options)


def counted(model, monkeypatch):
    """The tokens of each call of the model."""
    calls, forward = [], model.forward

    def count(*args, **kwargs):
        calls.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", count)
    return calls


def twin(model):
    """A dense assistant that guesses well, and now and then wrong: the same weights, a little off."""
    assistant = flashsfa.disable(make())
    assistant.load_state_dict(model.state_dict())
    with torch.no_grad():
        assistant.lm_head.weight += 0.02 * torch.randn_like(assistant.lm_head.weight)
    return assistant


def test_prompt_lookup(model, monkeypatch):
    ids = tokens(7, 1).repeat(1, 4)
    plain = greedy(model, ids)
    calls = counted(model, monkeypatch)
    found = greedy(model, ids, prompt_lookup_num_tokens=3, return_dict_in_generate=True)
    assert type(found.past_key_values) is SparseCache
    assert torch.equal(found.sequences, plain)
    assert max(calls[1:]) > 1  # guesses were tried


@pytest.mark.gpu
def test_an_offloaded_cache(model):
    model, ids = model.cuda(), tokens(7, 1).repeat(1, 4).cuda()
    found = greedy(model, ids, prompt_lookup_num_tokens=3, cache_implementation="offloaded")
    assert torch.equal(found, greedy(model, ids))


@pytest.mark.parametrize("name", ["int4, first exact", "axes, ring, dense prompts"])
def test_layers_that_move_to_another_device_between_calls(name, sliding, monkeypatch):
    """As an offloaded cache moves them, here to where they are."""
    model, ids, update = made(sliding, name), tokens(7, 1).repeat(1, 4), SparseCacheLayer.update

    def moving(layer, *args):
        layer.prefetch()
        found = update(layer, *args)
        layer.offload()
        return found

    expected = greedy(model, ids)
    monkeypatch.setattr(SparseCacheLayer, "update", moving)
    assert torch.equal(greedy(model, ids, prompt_lookup_num_tokens=3), expected)


@pytest.mark.parametrize("is_switched", [False, True], ids=["dense assistant", "switched assistant"])
def test_an_assistant(model, is_switched, monkeypatch):
    ids, assistant = tokens(20, 1), twin(model)
    if is_switched:
        flashsfa.enable(assistant, 8, cache_dtype="int4", topk_query="dense", **RING)
    assistant.generation_config.num_assistant_tokens = 2 * RING["recent"]
    assistant.generation_config.assistant_confidence_threshold = 0.0  # however unsure
    plain = greedy(model, ids)
    calls = counted(model, monkeypatch)
    found = greedy(model, ids, assistant_model=assistant, return_dict_in_generate=True)
    assert type(found.past_key_values) is SparseCache
    assert torch.equal(found.sequences, plain)
    assert max(calls[1:]) > 1
    assert sum(calls) > 20 + NEW  # guesses were taken back


def test_an_early_exit(model):
    ids = tokens(20, 1)
    assert torch.equal(greedy(model, ids, assistant_early_exit=1), greedy(model, ids))


@pytest.mark.parametrize("name", ["int4, first exact", "axes, ring, dense prompts"])
def test_a_cache_that_goes_on(name, sliding):
    """A cache of the caller's, filled by speculative decoding, in plain decoding; the other way round transformers cannot."""
    model, ids = made(sliding, name), tokens(7, 1).repeat(1, 4)
    cache, expected = SparseCache(model), SparseCache(model)
    once = greedy(model, ids, past_key_values=cache, prompt_lookup_num_tokens=3)
    assert torch.equal(once, greedy(model, ids, past_key_values=expected))
    more = torch.cat((once, tokens(9, 1)), 1)
    again = greedy(model, more, past_key_values=cache)
    assert torch.equal(again, greedy(model, more, past_key_values=expected))
    with pytest.raises(ValueError, match="runs the whole prompt again whatever a cache holds"):
        greedy(model, again, past_key_values=cache, prompt_lookup_num_tokens=3)


SPECULATIVE = {
    "lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "assistant": lambda model: {"assistant_model": twin(model)},
    "early exit": lambda model: {"assistant_early_exit": 1},
}


@pytest.mark.parametrize("kind", SPECULATIVE)
@pytest.mark.parametrize("name", ["16 bits", "axes, ring, dense prompts"])
def test_static_caches_are_refused_before_anything_runs(kind, name, sliding, monkeypatch):
    model, ids = made(sliding, name), tokens(20, 1)
    options = SPECULATIVE[kind](model)
    calls = counted(model, monkeypatch)
    for static in ({"cache_implementation": "static"}, {"past_key_values": StaticSparseCache(model, 64)}):
        with pytest.raises(ValueError, match="takes back tokens that were guessed wrong, and a static cache") as error:
            greedy(model, ids, **static, **options)
        assert "\n" not in str(error.value)
    assert not calls


def test_an_assistant_with_a_static_cache_is_refused_too(monkeypatch):
    model, ids = made(False, "16 bits"), tokens(20, 1)
    assistant = flashsfa.enable(twin(model), 8)
    assistant.generation_config.cache_implementation = "static"
    calls = counted(model, monkeypatch)
    with pytest.raises(ValueError, match="a static cache has overwritten others"):
        greedy(model, ids, assistant_model=assistant)
    assert not calls

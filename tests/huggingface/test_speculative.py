"""Speculative decoding in transformers: whatever the cache keeps, but for the newest tokens exact, the tokens are those of plain
greedy decoding."""

import pytest
import torch

import flashsfa

transformers = pytest.importorskip("transformers")
from exact_models import make, tokens  # noqa: E402
from flashsfa.huggingface import SparseCache  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

NEW = 24
RING, FIRST = {"recent": 5, "first": 2}, {"recent": 0, "first": 2}
FORMATS = {
    "16 bits": {"recent": 0, "first": 0},
    "16 bits, first exact": FIRST,
    "int8": {"cache_dtype": "int8", "recent": 0, "first": 0},
    "int4": {"cache_dtype": "int4", "recent": 0, "first": 0},
    "int4, first exact": {"cache_dtype": "int4"} | FIRST,
    "axes": {"cache_dtype": "int4", "recent": 0, "first": 0},
    "axes, first exact": {"cache_dtype": "int4"} | FIRST,
}


@pytest.fixture(params=[False, True], ids=["full", "sliding"])
def sliding(request):
    return request.param


@pytest.fixture(params=FORMATS)
def model(request, sliding):
    return made(sliding, request.param, FORMATS[request.param])


def made(sliding, name, options):
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
    """A dense assistant that guesses well: the same weights, a little off."""
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


@pytest.mark.parametrize("is_switched", [False, True], ids=["dense assistant", "switched assistant"])
def test_an_assistant(model, is_switched, monkeypatch):
    ids, assistant = tokens(20, 1), twin(model)
    if is_switched:
        flashsfa.enable(assistant, 8, cache_dtype="int4", topk_query="dense", **RING)
    plain = greedy(model, ids)
    calls = counted(model, monkeypatch)
    found = greedy(model, ids, assistant_model=assistant, return_dict_in_generate=True)
    assert type(found.past_key_values) is SparseCache
    assert torch.equal(found.sequences, plain)
    assert max(calls[1:]) > 1


def test_an_early_exit(model):
    ids = tokens(20, 1)
    assert torch.equal(greedy(model, ids, assistant_early_exit=1), greedy(model, ids))


@pytest.mark.parametrize("name", ["int4", "axes"])
@pytest.mark.parametrize("prefill", ["coded", "dense"])
def test_a_ring_is_said_to_change_tokens(name, prefill, recwarn):
    """Tokens that are checked together see one ring, where plain decoding moves it on with each of them."""
    model, ids = made(False, name, {"cache_dtype": "int4", "prefill": prefill} | RING), tokens(20, 1)
    greedy(model, ids)
    assert not [x for x in recwarn if "speculative" in str(x.message)]
    with pytest.warns(UserWarning, match=r"speculative decoding.*recent=5.*Enable the model with recent=0"):
        found = greedy(model, ids, prompt_lookup_num_tokens=3)
    assert found.shape == (1, 20 + NEW)

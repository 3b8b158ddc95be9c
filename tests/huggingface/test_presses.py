"""kvpress' presses on a switched model: a scorer drops tokens of the prompt, others are refused by name."""

import functools
import sys
import types

import pytest
import torch

import flashsfa

transformers = pytest.importorskip("transformers")
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from flashsfa.huggingface import SparseCache, StaticSparseCache, cache_nbytes, pruning  # noqa: E402
from flashsfa.huggingface.calibration import gather_moments  # noqa: E402
from small_llama import small_llama  # noqa: E402

transformers.utils.logging.set_verbosity_error()

PROMPT, NEW = 40, 6


@pytest.fixture
def ids():
    return torch.randint(1, 61, (2, PROMPT))


def greedy(model, ids, **options):
    options = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    } | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


class ScorerPress:
    """As kvpress' class of this name, in what matters here."""

    def __init__(self, compression_ratio=0.5):
        self.compression_ratio, self.seen = compression_ratio, []

    def post_init_from_model(self, model):
        self.model = model

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        assert attentions is None
        assert hidden_states.shape[:2] == keys[:, 0, :, 0].shape
        assert kwargs["position_embeddings"][0].shape[1] == keys.shape[2]
        assert module.rotary_emb is self.model.model.rotary_emb
        self.seen.append((keys, values))
        return -keys.norm(dim=-1)

    def compress(self):
        raise AssertionError

    def forward_hook(self):
        raise AssertionError


class Newest(ScorerPress):
    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        return torch.arange(keys.shape[2]).expand(keys.shape[:3])


def test_a_pruned_prompt_cannot_be_taken_back(ids):
    model, cache = flashsfa.enable(small_llama(), 3), None
    with pruning(model, ScorerPress()):
        cache = greedy(model, ids).past_key_values
    cache.crop(1 - NEW)
    with pytest.raises(ValueError, match="1 tokens cannot be taken back: some are of a prompt that was pruned"):
        cache.crop(-1)
    assert cache.get_seq_length() == PROMPT


@pytest.mark.parametrize(
    "options", [{}, {"cache_dtype": "int8"}, {"recent": 4, "first": 2}, {"prefill": "dense"}], ids=str
)
def test_the_cache_holds_codes_of_the_best_tokens_alone(options, ids):
    model, press = flashsfa.enable(small_llama(), 3, dense_dims=2, **options), ScorerPress(0.6)
    state = set(model.state_dict())
    with pruning(model, press):
        assert set(model.state_dict()) == state
        found = greedy(model, ids)
    cache, plain = found.past_key_values, greedy(model, ids).past_key_values
    assert cache.get_seq_length() == plain.get_seq_length() == PROMPT + NEW - 1
    held = int(PROMPT * 0.4)
    assert [len(layer.store) for layer in cache.layers] == [held + NEW - 1] * 2
    assert cache_nbytes(cache)["total"] < 0.6 * cache_nbytes(plain)["total"]
    expected = SparseCache(model)
    for i, (keys, values) in enumerate(press.seen):
        kept = keys.norm(dim=-1).topk(held, largest=False).indices.sort(-1).values[..., None].expand(-1, -1, -1, 8)
        expected.update(keys.gather(2, kept), values.gather(2, kept), i)
    for layer, other in zip(cache.layers, expected.layers, strict=True):
        layer.crop(1 - NEW)
        for x, y in zip(layer.store.kv.tensors(), other.store.kv.tensors(), strict=True):
            n = min(x.shape[2], y.shape[2])  # tokens that left the ring since are codes
            assert torch.equal(x[:, :, :n], y[:, :, :n])
    assert not any(module._forward_hooks or hasattr(module, "rotary_emb") for module in attention_modules(model))


def attention_modules(model):
    return [layer.self_attn for layer in model.model.layers]


def test_nothing_dropped_changes_nothing(ids):
    model = flashsfa.enable(small_llama(), 3)
    expected = greedy(model, ids)
    with pruning(model, ScorerPress(0.0)):
        found = greedy(model, ids)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits)


def test_positions_go_on_from_the_whole_prompt(ids):
    """Of a model whose prompt is seen through a window, the newest tokens are all that there is."""
    model = flashsfa.enable(small_llama().double(), 8)
    with pruning(model, Newest(0.5)):
        found = greedy(model, ids)
    with torch.no_grad():
        cache = transformers.DynamicCache()
        flashsfa.disable(model)(ids, past_key_values=cache)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, PROMPT // 2 :], layer.values[:, :, PROMPT // 2 :]
        for i in range(NEW - 1):
            token = found.sequences[:, PROMPT + i : PROMPT + i + 1]
            expected = model(token, past_key_values=cache, position_ids=torch.tensor([[PROMPT + i]])).logits[:, -1]
            torch.testing.assert_close(found.logits[i + 1].double(), expected, rtol=1e-4, atol=1e-4)


def test_calls_that_a_press_does_not_compose_with(ids):
    model = flashsfa.enable(small_llama(), 3)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with pruning(model, ScorerPress()):
        for options, words in (
            ({"past_key_values": StaticSparseCache(model, 64)}, "a static cache holds every token"),
            ({"attention_mask": mask, "past_key_values": SparseCache(model)}, "would score padding"),
            ({}, "not from a DynamicCache"),
        ):
            with pytest.raises(ValueError, match=words), torch.no_grad():
                model(ids, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **options)
        with pytest.raises(ValueError, match="would score: decode without"):
            greedy(model, ids[:1], prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="is dense"), pruning(flashsfa.disable(model), ScorerPress()):
        pass


class ThinKPress:
    pass


class PyramidKVPress(ScorerPress):
    def compress(self):
        pass


class ObservedAttentionPress(ScorerPress):
    pass


@pytest.mark.parametrize(
    ("press", "words"),
    [
        (ThinKPress, "does more than to score tokens"),
        (PyramidKVPress, "by a rule of its own"),
        (ObservedAttentionPress, "needs attention weights"),
    ],
)
def test_presses_that_do_not_compose(press, words):
    model = flashsfa.enable(small_llama(), 3)
    with (
        pytest.raises(ValueError, match=f"{press.__name__} .*{words}.*take a press.*KnormPress") as error,
        pruning(model, press()),
    ):
        pass
    assert "\n" not in str(error.value)


def test_a_press_that_hooks_on_by_itself_is_refused(ids, monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", types.ModuleType("kvpress"))
    own = type("KnormPress", (), {"__module__": "kvpress.presses", "forward_hook": lambda self, *args: None})()
    model = flashsfa.enable(small_llama(), 3)
    handles = [module.register_forward_hook(own.forward_hook) for module in attention_modules(model)]
    with pytest.raises(ValueError, match=r"KnormPress of kvpress.*pruning\(model, press\)"):
        greedy(model, ids)
    for handle in handles:
        handle.remove()
    greedy(model, ids)


def test_dropout_may_come_by_place():
    """As kvpress hands it on once it is imported."""
    model = flashsfa.enable(small_llama(), 3)
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    attend, module = transformers.AttentionInterface()["sfa"], attention_modules(model)[0]
    assert torch.equal(attend(module, q, k, k, None, 0.0)[0], attend(module, q, k, k, None)[0])


def test_a_model_is_calibrated_again_after_attention_functions_were_wrapped(ids, functions):
    """As kvpress does to all that there are when it is imported."""
    model = small_llama()
    before = gather_moments(model, ids)
    for name, function in list(functions.items()):
        functions[name] = functools.partial(function)
    for x, y in zip(gather_moments(model, ids), before, strict=True):
        assert torch.equal(x.key_outer, y.key_outer)


@pytest.fixture(scope="module")
def functions():
    """Attention functions as models look them up. What is put there for all models of the process goes after the tests of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ALL_ATTENTION_FUNCTIONS, "_local_mapping", {})
        yield ALL_ATTENTION_FUNCTIONS


# The library itself, where it is installed


@pytest.fixture(scope="module")
def kvpress(functions):
    return pytest.importorskip("kvpress", exc_type=ImportError)


SCORERS = {
    "KnormPress": {}, "SnapKVPress": {"window_size": 8}, "ExpectedAttentionPress": {}, "TOVAPress": {}, "KeyDiffPress": {},
    "StreamingLLMPress": {}, "RandomPress": {},
}  # fmt: skip


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_of_the_library(name, kvpress, ids):
    model = flashsfa.enable(small_llama(), 3, dense_dims=2, cache_dtype="int8")
    press = getattr(kvpress, name)(compression_ratio=0.5, **SCORERS[name])
    with pruning(model, press):
        found = greedy(model, ids)
    assert [len(layer.store) for layer in found.past_key_values.layers] == [PROMPT // 2 + NEW - 1] * 2
    assert found.past_key_values.get_seq_length() == PROMPT + NEW - 1


@pytest.mark.parametrize(
    "make",
    [
        lambda k: k.ThinKPress(), lambda k: k.SimLayerKVPress(), lambda k: k.PyramidKVPress(), lambda k: k.ObservedAttentionPress(),
        lambda k: k.AdaKVPress(k.KnormPress()), lambda k: k.KeyRerotationPress(k.KnormPress()), lambda k: k.ChunkPress(k.KnormPress()),
        lambda k: k.ComposedPress([k.KnormPress()]), lambda k: k.DecodingPress(k.KnormPress()), lambda k: k.KVzipPress(),
        lambda k: k.DuoAttentionPress(), lambda k: k.FinchPress(), lambda k: k.BlockPress(k.KnormPress()),
    ],
)  # fmt: skip
def test_other_presses_of_the_library(make, kvpress):
    press = make(kvpress)
    with (
        pytest.raises(ValueError, match=f"{type(press).__name__} .*take a press"),
        pruning(flashsfa.enable(small_llama(), 3), press),
    ):
        pass


def test_a_press_of_the_library_on_its_own(kvpress, ids):
    model = flashsfa.enable(small_llama(), 3)
    with kvpress.KnormPress(0.5)(model), pytest.raises(ValueError, match="KnormPress of kvpress"):
        greedy(model, ids)

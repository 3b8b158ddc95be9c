"""Calibration of a model of transformers: which basis it makes, and what it refuses before the model runs."""

import pytest
import torch

import flashsfa
from flashsfa.axes import AxisCodes

transformers = pytest.importorskip("transformers")


@pytest.fixture
def model():
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def windows():
    return torch.randint(1, 61, (2, 40))


@pytest.mark.parametrize("options", [{}, {"kind": "whitened"}, {"max_position": 60}])
def test_bits_per_axis(model, windows, options, tmp_path):
    basis = flashsfa.calibrate(model, windows, key_bytes=3, **options)
    basis.check()
    assert basis.axes.bits.shape == (2, 2, 8)
    assert basis.axes.key_bytes == 3
    basis.save(tmp_path / "basis.safetensors")
    layer = flashsfa.FeatureBasis.load(tmp_path / "basis.safetensors")[1]
    codes = AxisCodes.encode(layer.transform_key(torch.randn(1, 2, 5, 8, device="cpu")), layer.axes)
    assert codes.packed.shape == (1, 2, 5, 3)


def test_a_budget_makes_a_dictionary_without_bits(model, windows):
    basis = flashsfa.calibrate(model, windows, 3, dense_dims=2)
    assert basis.axes is None
    assert torch.equal(basis.key, flashsfa.calibrate(model, windows, 3, dense_dims=2, kind="dictionary").key)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {},
            TypeError,
            "needs topk, with or without dense_dims, or key_bytes alone; got topk=None, dense_dims=None, key_bytes=None",
        ),
        ({"topk": 3, "key_bytes": 3}, TypeError, "got topk=3, dense_dims=None, key_bytes=3"),
        ({"dense_dims": 2, "key_bytes": 3}, TypeError, "got topk=None, dense_dims=2, key_bytes=3"),
        ({"key_bytes": 0}, ValueError, "key_bytes must be 1 to 8, got 0"),
        ({"key_bytes": 9}, ValueError, "key_bytes must be 1 to 8, got 9"),
        ({"key_bytes": 3.5}, TypeError, "key_bytes must be an int"),
        ({"key_bytes": 3, "kind": "dictionary"}, ValueError, "key_bytes go with the kind 'whitened', got 'dictionary'"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_runs(model, windows, options, error, words, monkeypatch):
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(error, match=words) as raised:
        flashsfa.calibrate(model, windows, **options)
    assert "\n" not in str(raised.value)


def test_a_basis_with_bits_fits_no_budget(model, windows):
    basis = flashsfa.calibrate(model, windows, key_bytes=3)
    with pytest.raises(ValueError, match="has bits per axis, 3 bytes of a key, and fits no topk=3"):
        flashsfa.enable(model, 3, basis=basis)

"""Calibration of a model of transformers: which basis it makes, and what it refuses before the model runs."""

import pytest
import torch

import flashsfa
from flashsfa.axes import AxisCodes

transformers = pytest.importorskip("transformers")
from flashsfa.huggingface import calibration  # noqa: E402
from flashsfa.huggingface.attention import attention_mask, dense_forward  # noqa: E402
from flashsfa.huggingface.calibration import gather_moments  # noqa: E402
from flashsfa.huggingface.structure import attending_by  # noqa: E402
from small_llama import small_llama  # noqa: E402


@pytest.fixture
def model():
    return small_llama()


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


SIZES = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 61, "bos_token_id": None, "eos_token_id": None}


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (small_llama, "scaled"),
        (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=64, **SIZES)), "whitened"),
    ],
)
def test_bits_are_shared_out_in_the_basis_that_suits_positions(make, kind, windows):
    model = make().eval()
    found, expected = (flashsfa.calibrate(model, windows, key_bytes=3, **more) for more in ({}, {"kind": kind}))
    assert torch.equal(found.key, expected.key)
    other = {"scaled": "whitened", "whitened": "scaled"}[kind]
    assert not torch.equal(found.key, flashsfa.calibrate(model, windows, key_bytes=3, kind=other).key)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(model, windows, dtype):
    expected = flashsfa.calibrate(model, windows, key_bytes=3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        basis = flashsfa.calibrate(model, windows, key_bytes=3)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(basis.axes.bits, expected.axes.bits)
    torch.testing.assert_close(basis.key, expected.key)


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
        ({"topk": 3, "max_position": "512"}, TypeError, "max_position must be an int, got '512'"),
        (
            {"topk": 3, "windows": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"int64 token ids, got torch.bool \(2, 4\)",
        ),
        ({"topk": 3, "windows": None, "text": b"bytes", "tokenizer": str}, TypeError, "text must be a str, got bytes"),
        (
            {"key_bytes": 3, "kind": "dictionary"},
            ValueError,
            "key_bytes go with the kinds scaled and whitened, got 'dictionary'",
        ),
        ({"topk": 3, "kind": "whiten"}, ValueError, "kind must be one of dictionary"),
        ({"topk": 100}, ValueError, "topk"),
        ({"topk": 3, "dense_dims": 99}, ValueError, "dense_dims"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_runs(model, windows, options, error, words, monkeypatch):
    monkeypatch.setattr(type(model), "forward", None)
    with pytest.raises(error, match=words) as raised:
        flashsfa.calibrate(model, **{"windows": windows, **options})
    assert "\n" not in str(raised.value)


def test_a_basis_with_bits_fits_no_budget(model, windows):
    basis = flashsfa.calibrate(model, windows, key_bytes=3)
    with pytest.raises(ValueError, match="a basis with bits per axis takes the place of topk: leave topk out"):
        flashsfa.enable(model, 3, basis=basis)


@pytest.mark.parametrize("kind", ["Llama", "GPTNeoX", "Glm4", "Cohere", "Phi"])
def test_turned_keys_are_those_of_the_model_further_on(kind):
    """Rotations of halves, of neighbours and of a part of the head."""
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=61,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        **({"num_key_value_heads": 2, "head_dim": 16} if kind in ("Llama", "Glm4") else {}),
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(1, 61, (1, 30))
    at_once = gather_moments(model, ids, max_position=31)  # by 0 or 1
    positions = torch.arange(30)
    held = {}

    def record(module, query, key, *args, **kwargs):
        held.setdefault(module.layer_idx, []).append(key)
        return dense_forward(module, query, key, *args, **kwargs)

    with torch.no_grad(), attending_by(model, "look", record, attention_mask):
        for start in (0, 1):
            calibration._run(model, ids, positions + start)
    for layer, (near, far) in held.items():
        rows = at_once[layer].sample.to(near[0].device)  # in the order of their lots
        both = torch.cat((near[0], far[0]), dim=1).float()
        assert (torch.cdist(rows, both).amin(-1) < 1e-3).all()
        assert (torch.cdist(rows, near[0].float()).amin(-1) > 1e-2).any()

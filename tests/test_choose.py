"""`choose`: candidates for limits, what is picked, and measurements that are kept."""

import json

import pytest
import torch

from flashsfa.candidates import Exact, by_bytes, ladder
from flashsfa.formats import CodeFormat, cache_bits

transformers = pytest.importorskip("transformers")
from flashsfa import choose as module  # noqa: E402
from flashsfa.choose import Kept, Limits, NothingFitsError, choose  # noqa: E402
from flashsfa.huggingface.switch import is_enabled  # noqa: E402
from small_llama import small_llama  # noqa: E402

HEAD_DIM = 16
EXACT = Exact(recent=2, first=1)


@pytest.fixture
def model():
    return small_llama(HEAD_DIM)


@pytest.fixture
def windows():
    return torch.randint(1, 61, (4, 40)), torch.randint(1, 61, (3, 40))


def chosen(model, windows, limits, **options):
    return choose(model, *windows, limits, exact=EXACT, **options)


ROWS = {
    name: {"label": name, "token_bytes": nbytes, "loss": loss, "share": nbytes / 256}
    for name, nbytes, loss in (
        ("dense", 256, 0.0), ("a", 136, 0.001), ("b", 72, 0.006), ("c", 72, 0.004), ("d", 60, 0.02), ("e", 64, 0.009),
    )
}  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "share", "expected"),
    [
        (0.01, None, "e"),
        (0.005, None, "c"),
        (0.009, None, "e"),  # the limit itself is within
        (0.0, None, None),
        (None, 0.25, "e"),
        (None, 0.3, "c"),
        (None, 0.9, "a"),
        (None, 0.2, None),
        (0.01, 0.24, None),
        (0.03, 0.24, "d"),
        (None, None, "a"),
    ],
)
def test_the_fewest_bytes_within_the_loss_or_the_least_loss_within_the_bytes(loss, share, expected):
    assert Limits(loss, share).pick(ROWS, [name for name in ROWS if name != "dense"]) == expected


def test_bytes_on_the_edge_are_within():
    """Though 0.29 * 400 is less than 116."""
    rows = {"dense": ROWS["dense"] | {"token_bytes": 400}, "a": ROWS["a"] | {"token_bytes": 116}}
    assert Limits(max_bytes=0.29).pick(rows, ["a"]) == "a"
    assert Limits(max_bytes=0.2899).pick(rows, ["a"]) is None


@pytest.mark.parametrize("options", [{"max_loss": -0.1}, {"max_loss": 1.0}, {"max_bytes": 0.0}, {"max_bytes": 1.0}])
def test_limits_that_are_none(options):
    with pytest.raises(ValueError, match="100 %"):
        Limits(**options)


def test_a_basis_is_fitted_once(model, windows, monkeypatch):
    """Not again for the one that is chosen, nor for the same keys beside other values."""
    fits, fit = [], module.FeatureBasis.from_layers
    monkeypatch.setattr(module.FeatureBasis, "from_layers", lambda *a, fitted, **k: fits.append(str(k)) or fit(*a, **k))
    choice = chosen(model, windows, Limits(max_loss=0.9))
    assert choice.basis is not None
    assert len(fits) == len({*fits})
    assert str(choice.candidate.fit) in fits


@pytest.mark.parametrize("head_dim", [1, 4, 8, 16, 40, 64, 80, 128, 256])
@pytest.mark.parametrize("share", [None, 0.25, 0.3, 0.6])
def test_the_ladder_has_what_fits(head_dim, share):
    most = None if share is None else share * 4 * head_dim
    found = ladder(head_dim, most, EXACT)
    assert next(iter(found)) == "dense"
    assert "dense_int8" in found
    able = [x for x in found.values() if x.may_win]
    assert len(able) <= 12
    for x in able:
        assert most is None or x.token_bytes <= most
        form = CodeFormat.named(x.options["cache_dtype"])
        kept = x.fit or {"topk": head_dim, "dense_dims": 0}
        keys = kept.get("key_bytes") or form.key_bytes(head_dim, kept["dense_dims"], kept["topk"])
        assert x.token_bytes == keys + form.v_bytes(head_dim)
    if share is not None and head_dim == 64:  # one fills the bytes, with values in 3 bits too
        filled = f"axes_{min(64, int(most) - 28)}_v3"
        assert found[filled].may_win
        assert max(x.token_bytes for x in able if "axes" in x.label or x.fit) == min(int(most), 64 + 68)


@pytest.mark.parametrize("cache_dtype", [None, "int8", "int4", "d16s8v8"])
def test_what_may_be_written_for_a_cache_dtype_has_it(cache_dtype):
    able = {name: x for name, x in by_bytes(64, None, cache_dtype, EXACT).items() if x.may_win}
    dense = ["dense_int4"] if cache_dtype == "int4" else []  # as many bytes, and nobody asked for bits per axis
    assert list(able) == [*dense, "topk", "axes"]
    assert all(cache_bits(x.options["cache_dtype"]) == cache_bits(cache_dtype) for x in able.values())
    asked = by_bytes(64, 36, cache_dtype, EXACT)
    assert [name for name, x in asked.items() if x.may_win] == ["topk", "axes"]


def test_bytes_of_candidates_are_those_of_live_caches(model, windows):
    choice = chosen(model, windows, Limits(max_bytes=0.5))
    token = 4 * 2 * HEAD_DIM  # float32
    for name, row in choice.rows.items():
        if name != "dense":
            assert row["token_bytes"] == choice.candidates[name].token_bytes
        assert row["share"] == row["token_bytes"] / token
        coded, exact = (40 - 3) * row["token_bytes"], 3 * token
        live = row["kv_bytes_per_token"] / (2 * 2)
        assert live == pytest.approx(token if name == "dense" else (coded + exact) / 40)


def test_the_model_is_switched_to_the_choice(model, windows):
    choice = chosen(model, windows, Limits(max_bytes=0.3))
    able = {name: row for name, row in choice.rows.items() if choice.candidates[name].may_win}
    assert choice.name == min(able, key=lambda name: able[name]["loss"])
    settings = model.config.sfa
    assert (settings["recent"], settings["first"], settings["prefill"]) == (2, 1, "dense")
    assert settings["cache_dtype"] == choice.candidate.options["cache_dtype"]
    assert choice.rows["dense"]["loss"] == 0
    loose = chosen(model, windows, Limits(max_loss=0.99))
    assert loose.rows[loose.name]["token_bytes"] == min(
        row["token_bytes"] for name, row in loose.rows.items() if name != "dense" and row["loss"] <= 0.99
    )


@pytest.mark.parametrize(
    ("limits", "words", "is_measured"),
    [(Limits(max_bytes=0.01), "at most 1 % of the bytes", False), (Limits(0.0, 0.2), "a loss of at most 0 %", True)],
)
def test_nothing_fits(limits, words, is_measured, model, windows, monkeypatch):
    if is_measured:  # random models may lose less than nothing
        monkeypatch.setattr(module, "_against", lambda row, dense: {"loss": 0.1, "loss_error": None, "share": 0.2})
    else:
        monkeypatch.setattr(module, "gather_moments", None)  # refused before any work
    with pytest.raises(NothingFitsError, match=words) as error:
        chosen(model, windows, limits)
    assert "the nearest is" in str(error.value)
    assert 0 < len(error.value.rows) <= 3
    assert all(("loss" in row) == is_measured for row in error.value.rows)
    assert not is_enabled(model)


def test_measurements_of_a_stopped_run_are_reused(model, windows, tmp_path, monkeypatch):
    limits, output, count = Limits(max_bytes=0.3), tmp_path / "new" / "out", []
    whole = module.window_losses

    def stopping(*arguments):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(1)
        return whole(*arguments)

    expected = chosen(model, windows, limits)
    module.disable(model)
    monkeypatch.setattr(module, "window_losses", stopping)
    with pytest.raises(KeyboardInterrupt):
        chosen(model, windows, limits, kept=Kept(output))
    assert not is_enabled(model)
    (file,) = output.parent.iterdir()
    assert file.name.startswith(".out")
    kept = json.loads(file.read_text())
    assert len(kept["rows"]) == 2

    said, measured = [], []
    monkeypatch.setattr(module, "window_losses", lambda *rest: measured.append(1) or whole(*rest))
    again = Kept(output)

    def progress(description, steps):
        said.append(description)
        return lambda: None

    choice = chosen(model, windows, limits, kept=again, progress=progress)
    assert len(measured) == len(choice.rows) - 2
    assert [x for x in said if x.startswith("measured before")] == [
        "measured before: dense",
        "measured before: dense, int8",
    ]
    assert (choice.name, choice.rows) == (expected.name, expected.rows)
    again.remove()
    assert not file.exists()

    measured.clear()
    file.write_text(json.dumps(kept))
    module.disable(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1  # another model: nothing that is kept is of it
    chosen(model, windows, limits, kept=Kept(output))
    assert len(measured) == len(choice.rows)

    measured.clear()
    module.disable(model)
    model.config.rms_norm_eps *= 2  # as where config.json was changed
    chosen(model, windows, limits, kept=Kept(output))
    assert len(measured) == len(choice.rows)


def test_a_model_in_training_mode_is_measured_without_dropout(windows):
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=60, attn_pdrop=0.0, resid_pdrop=0.5
    )
    model, found = transformers.GPT2LMHeadModel(config), []
    for training in (False, True):
        model.train(training)
        model.transformer.h[1].eval()  # what is frozen stays so
        ids = windows[0][:, :32] % 60
        found.append(module.choose(model, ids, ids, Limits(max_bytes=0.5)).rows)
        assert model.training is training
        assert not model.transformer.h[1].mlp.training
        module.disable(model)
    assert found[0] == found[1]


@pytest.mark.parametrize("content", ["", "[]", '{"of": 1}', '{"of": "x", "rows": 3}'])
def test_a_damaged_file_of_measurements_counts_as_none(content, tmp_path):
    kept = Kept(tmp_path / "out")
    kept.path.write_text(content)
    kept.open("x")
    assert kept.find("a") is None
    kept.add("a", {"perplexity": 1.0})
    again = Kept(tmp_path / "out")
    again.open("x")
    assert again.find("a") == {"perplexity": 1.0}


def test_folders_that_measurements_needed_go_with_them(tmp_path):
    kept = Kept(tmp_path / "a" / "b" / "out")
    kept.open("x")
    kept.add("a", {})
    kept.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        (torch.full((3, 40), 61), "evaluation must hold token ids below 61"),
        (torch.ones(40, dtype=torch.int64), r"evaluation must be \[S, W\]"),
        (torch.ones(3, 1, dtype=torch.int64), "windows of two tokens or more"),
    ],
    ids=["ids", "one", "short"],
)
def test_evaluation_is_checked_before_the_model_runs(model, windows, evaluation, message, monkeypatch):
    monkeypatch.setattr(module, "gather_moments", None)
    with pytest.raises(ValueError, match=message):
        choose(model, windows[0], evaluation, Limits(0.01))

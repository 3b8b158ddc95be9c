"""Trained models beside one another: each form of their caches, tolerances, and the recorded times of decode."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import flashsfa
from flashsfa.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from bytes_model import TEXT, byte_tokenizer, save_tiny  # noqa: E402
from flashsfa.benchmarking.configuration import Configuration  # noqa: E402
from flashsfa.benchmarking.decode import DecodeCase  # noqa: E402
from flashsfa.evaluation import tolerance  # noqa: E402
from flashsfa.evaluation.frontier import decode_ms, forms, read_recorded  # noqa: E402
from flashsfa.evaluation.perplexity import window_losses  # noqa: E402
from flashsfa.evaluation.tolerance import tolerance_losses  # noqa: E402
from flashsfa.huggingface import SFASettings, SparseCache  # noqa: E402


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a dense model and of two that are switched, one with a basis, as runs leave them; and a text."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "dense" / "model")
    with torch.device("cpu"):
        for name, options in (("k2", {"dense_dims": 2}), ("mapped", {"basis": flashsfa.FeatureBasis.identity(2, 8)})):
            model = transformers.AutoModelForCausalLM.from_pretrained(folder / "dense" / "model")
            if "basis" in options:
                options["basis"] = flashsfa.FeatureBasis(
                    *(x.repeat(2, 1, 1, 1) for x in (options["basis"].query, options["basis"].key))
                )
            flashsfa.enable(model, 2, topk_query=8 if name == "k2" else 2, **options).save_pretrained(
                folder / name / "model"
            )
            byte_tokenizer().save_pretrained(folder / name / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


def frontier(models, output, *more, names=("dense", "k2", "mapped")):
    """Of the fixture's models by name, and of others by their folder."""
    command = [
        "eval",
        "frontier",
        *(str(models / name / "model" if isinstance(name, str) else name) for name in names),
        "--text",
        str(models / "text.txt"),
    ]
    return main([*command, "--device", "cpu", "--dtype", "float32", "-o", str(output), *map(str, more)])


def recorded(path, cases, baselines, device="A GPU"):
    """A file of `flashsfa bench decode` with milliseconds of cases, and of their baselines."""
    rows = [
        {
            "facet": case.facet, "curve": case.curve, "n": case.n, "status": "ok", "timing": {"median_ms": ms},
            "baselines": {name: {"timing": {"median_ms": x}, "competes": name != "limit"} for name, x in baselines.items()},
        }
        for case, ms in cases.items()
    ]  # fmt: skip
    path.write_text(json.dumps({"operation": "decode", "environment": {"device": device}, "rows": rows}))
    return path


def case(name, n, has_dense_queries=False, heads=(4, 2), head_dim=8):
    return DecodeCase(
        1, *heads, n, Configuration.named(name, head_dim), torch.float32, torch.device("cpu"), has_dense_queries
    )


def test_a_row_for_each_form_of_each_model(models, tmp_path, capsys):
    cases = {
        case("2+k2", 4096): 9.0, case("2+k2", 4096, True): 3.0, case("2+k2", 4096, True, heads=(4, 4)): 8.0,
        case("k2-int8", 4096): 2.0, case("dense-int8", 4096): 4.0, case("2+k2", 8192, True): 6.0,
    }  # fmt: skip
    bench = recorded(tmp_path / "decode.json", cases, {"sdpa": 5.0, "grouped": 4.5, "limit": 1.0})
    more = ["--lengths", "400", "--windows", 3, "--tolerances", "0.1", "--decode", bench]
    assert frontier(models, tmp_path / "out", *more) == 0
    out = capsys.readouterr().out
    (file,) = (tmp_path / "out").glob("*.json")
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    document = json.loads(file.read_text())
    assert list(document) == ["evaluation", "settings", "environment", "results"]
    found = document["results"]
    assert {name: list(model["forms"]) for name, model in found.items()} == {
        "dense": ["dense", "dense-int8"], "k2": ["2+k2", "2+k2-int8"], "mapped": ["k2", "k2-int8"],
    }  # fmt: skip
    assert [form["token_bytes"] for form in found["k2"]["forms"].values()] == [
        2 * 4 + 2 * 5 + 8 * 4,
        2 + 2 * 2 + 4 + 8 + 4,
    ]
    assert found["dense"]["forms"]["dense"]["lengths"]["400"]["loss"] == 0
    losses = [form["lengths"]["400"]["loss"] for model in found.values() for form in model["forms"].values()]
    assert len(set(losses)) == 6
    times = {name: form["decode_ms"] for model in found.values() for name, form in model["forms"].items()}
    assert times["dense"] == {"4096": 4.5, "8192": 4.5}
    assert times["dense-int8"] == {"4096": 4.0}
    assert times["2+k2"] == {"4096": 3.0, "8192": 6.0}
    assert times["k2-int8"] == {"4096": 2.0}
    assert times["k2"] == times["2+k2-int8"] == {}
    for name, model in found.items():
        assert 0 < model["tolerances"]["0.1"]["400"]["v_rows_read"] < 1
        assert name in out
        assert all(0 <= form["needles"]["400"] <= 1 for form in model["forms"].values())


def test_keys_in_bits_per_axis_have_values_of_each_width(models, tmp_path):
    with torch.device("cpu"):
        model = transformers.AutoModelForCausalLM.from_pretrained(models / "dense" / "model")
    basis = flashsfa.calibrate(model, torch.randint(2, 258, (2, 32)), key_bytes=3)
    flashsfa.enable(model, basis=basis).save_pretrained(tmp_path / "axes")
    byte_tokenizer().save_pretrained(tmp_path / "axes")
    bench = recorded(tmp_path / "decode.json", {case("axes3-int8", 4096, True): 2.0}, {"sdpa": 5.0})
    more = ["--lengths", "40", "--windows", 2, "--trials", 0, "--tolerances", "0.1", "--decode", bench]
    assert frontier(models, tmp_path / "out", *more, names=("dense", tmp_path / "axes")) == 0
    (file,) = (tmp_path / "out").glob("*.json")
    found = json.loads(file.read_text())["results"]["axes"]
    assert {name: form["token_bytes"] for name, form in found["forms"].items()} == {
        "axes3": 3 + 32,
        "axes3-int8": 3 + 12,
    }
    assert found["forms"]["axes3-int8"]["decode_ms"] == {"4096": 2.0}
    assert 0 < found["tolerances"]["0.1"]["40"]["v_rows_read"] < 1


def stopped(models, tmp_path, monkeypatch, is_last):
    """The file of a run that is stopped at the first model that `is_last`, and what it holds."""

    def stop(model, *_):
        if is_last(model):
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr("flashsfa.evaluation.frontier.find_needles", stop)
    assert (
        frontier(models, tmp_path, "--tolerances", "0.1", "--windows", "2", "--trials", "0", "--lengths", "32") == 130
    )
    (path,) = tmp_path.glob("*.json")
    return path, json.loads(path.read_text())


def test_what_was_measured_when_it_stops_is_written(models, tmp_path, monkeypatch, capsys):
    path, document = stopped(models, tmp_path, monkeypatch, lambda model: hasattr(model.config, "sfa"))
    assert document["incomplete"] == "0 of 3 models"
    assert (
        f"flashsfa: stopped; incomplete results are written: {path}, {path.with_suffix('.png')}"
        in capsys.readouterr().err
    )
    found = document["results"]
    assert list(found) == ["dense"]
    assert list(found["dense"]["forms"]) == ["dense"]  # in the next it is switched
    assert found["dense"]["tolerances"]["0.1"]["32"]["loss"] is not None
    assert path.with_suffix(".png").exists()


def test_a_model_of_which_nothing_was_measured_is_left_out(models, tmp_path, monkeypatch):
    _, document = stopped(
        models, tmp_path, monkeypatch, lambda model: getattr(model.config, "sfa", {}).get("topk") == 2
    )
    assert (document["incomplete"], list(document["results"])) == ("1 of 3 models", ["dense"])


@pytest.fixture(params=["all rows at once", "seven at a time"])
def in_parts(request, monkeypatch):
    """Called with a model and its windows: how many rows of attention weights are made at a time."""

    def use(model, windows):
        if request.param == "seven at a time":
            a_row = model.config.num_attention_heads * windows.shape[1]
            monkeypatch.setattr(tolerance, "_MOST_WEIGHTS", 7 * a_row)

    return use


def test_tolerance_is_what_decode_leaves_out(models, in_parts):
    with torch.device("cpu"), torch.no_grad():
        model = flashsfa.from_pretrained(models / "k2" / "model", dtype=torch.float64).eval()
        windows = torch.randint(2, 258, (2, 40))
        in_parts(model, windows)
        found, share = tolerance_losses(model, windows, 0.2)
        settings = SFASettings.from_config(model.config.sfa).arguments() | {"value_tolerance": 0.2}
        flashsfa.enable(model, **settings)
        for window, loss in zip(windows, found, strict=True):
            cache = SparseCache(model)
            steps = [model(token[None, None], past_key_values=cache).logits[0] for token in window]
            assert loss == pytest.approx(F.cross_entropy(torch.cat(steps[:-1]), window[1:]).item(), rel=1e-6)
        assert 0 < share < 1
        exact, all_rows = tolerance_losses(model, windows, 1e-12)
        assert exact == pytest.approx(window_losses(model, windows), rel=1e-6)
        assert all_rows == 1
        dense = flashsfa.disable(model)
        assert tolerance_losses(dense, windows, 1e-12)[0] == pytest.approx(window_losses(dense, windows), rel=1e-6)


def test_tolerance_beside_sinks_and_a_window(in_parts):
    """gpt-oss: a sink takes its share of the weight of each head."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = transformers.GptOssConfig(
        **sizes, head_dim=8, vocab_size=40, num_local_experts=2, num_experts_per_tok=1, sliding_window=8
    )
    model = transformers.GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, 2.0)
    windows = torch.randint(0, 40, (2, 24))
    in_parts(model, windows)
    dense = tolerance_losses(model, windows, 0.0)[0]
    assert dense == pytest.approx(window_losses(model, windows), rel=1e-5)


def test_tolerance_of_a_model_that_views_its_attention_output():
    config = transformers.JetMoeConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8, intermediate_size=16,
        num_local_experts=2, num_experts_per_tok=2,
    )  # fmt: skip
    model, windows = transformers.JetMoeForCausalLM(config).eval(), torch.randint(0, 40, (2, 24))
    assert tolerance_losses(model, windows, 0.0)[0] == pytest.approx(window_losses(model, windows), rel=1e-5)


def test_exact_tokens_are_refused_before_any_model_is_measured(models, tmp_path, capsys):
    model = flashsfa.from_pretrained(models / "k2" / "model")
    flashsfa.enable(flashsfa.disable(model), 2, dense_dims=2, topk_query=8, recent=8, first=2).save_pretrained(
        tmp_path / "exact"
    )
    assert frontier(models, tmp_path / "out", names=("dense", tmp_path / "exact")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "exact keeps its newest 8 and first 2 tokens exact" in line
    assert "flashsfa eval perplexity" in line


def test_the_strongest_rival_stands_for_a_dense_cache(tmp_path):
    rows = json.loads(recorded(tmp_path / "a.json", {case("k2", 64): 1.0}, {"sdpa": 3.0, "limit": 0.1}).read_text())[
        "rows"
    ]
    rows += json.loads(recorded(tmp_path / "b.json", {case("2+k2", 64): 1.0}, {"sdpa": 2.0}).read_text())["rows"]
    assert decode_ms(rows, Configuration(8), False, 2) == {64: 2.0}
    assert decode_ms(rows, Configuration(8), False, 4) == {}
    assert decode_ms(rows, Configuration(16), False, 2) == {}


def test_times_of_two_devices_are_not_mixed(tmp_path):
    files = [
        recorded(tmp_path / f"{name}.json", {case("k2", 64): 1.0}, {"sdpa": 3.0}, name) for name in ("H100", "H200")
    ]
    with pytest.raises(ValueError, match="times of H100, batch 1 and H200, batch 1 do not compare"):
        read_recorded(files)
    assert read_recorded(files[:1])[1] == "H100, batch 1"
    assert read_recorded([]) == ([], "")


def test_forms_of_wide_heads_have_four_bits():
    assert [form.configuration.name for form in forms(None, 64)] == ["dense", "dense-int8", "dense-int4"]
    assert [form.configuration.name for form in forms(SFASettings(8, dense_dims=32), 128)] == [
        "32+k8",
        "32+k8-int8",
        "32+k8-int4",
    ]


def test_values_beside_bits_per_axis_have_three_bits_too():
    axes = flashsfa.AxisBits.fit(torch.randn(2, 40, 16), 6)[1]
    basis = replace(flashsfa.FeatureBasis.identity(2, 16), axes=axes)
    found = forms(SFASettings(None, has_basis=True), 16, basis)
    assert {form.configuration.name: form.options["cache_dtype"] for form in found} == {
        "axes6": None,
        "axes6-int8": "int8",
        "axes6-int4": "int4",
        "axes6-int3": "d8s4v3",
    }


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (("k2", "dense"), [], "is switched: name the dense model first"),
        (("dense", "dense"), [], "two of the models are named alike: dense, dense"),
        (("dense",), ["--lengths", "2000"], "1024 positions, fewer than the 2000 tokens"),
        (("dense",), ["--lengths", "1"], "--lengths must be 2 to"),
        (("dense",), ["--windows", "0"], "--windows must be"),
        (("dense",), ["--trials", "-1"], "--trials must be"),
        (("dense",), ["--tolerances", "1.5"], "each of --tolerances must be"),
        (("dense",), ["--decode", "none.json"], "none.json does not exist"),
        (("dense",), ["--decode", "text.txt"], "holds no results of flashsfa bench decode"),
        (("dense",), ["--text", "nowhere.txt"], "does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(models, tmp_path, capsys, monkeypatch, names, more, message):
    monkeypatch.chdir(models)
    assert frontier(models, tmp_path / "out", "--lengths", "400", *more, names=names) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


def test_times_of_another_benchmark_are_no_decode_times(models, tmp_path, capsys):
    path = recorded(tmp_path / "times.json", {case("dense", 64): 1.0}, {"sdpa": 1.0})
    path.write_text(path.read_text().replace('"decode"', '"prefill"', 1))
    assert frontier(models, tmp_path / "out", "--lengths", "64", "--decode", str(path), names=("dense",)) == 2
    assert "holds no results of flashsfa bench decode" in capsys.readouterr().err


def test_models_of_other_tokenizers_are_not_compared(models, tmp_path, capsys, monkeypatch):
    """And nothing is measured in vain before."""
    monkeypatch.setattr("flashsfa.evaluation.frontier.measure_model", None)
    save_tiny(tmp_path / "other")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["word"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    model.resize_token_embeddings(259)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    capsys.readouterr()
    more = ("--lengths", "64", "--trials", "0")
    assert frontier(models, tmp_path / "out", *more, names=("dense", tmp_path / "other")) == 2
    assert "has another tokenizer than" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

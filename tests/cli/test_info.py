"""`flashsfa info`."""

import json

import pytest

import flashsfa
from flashsfa.cli import main

transformers = pytest.importorskip("transformers")
from words_model import assert_refused  # noqa: E402


def test_info_names_versions_and_the_kernels_that_run(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"flashsfa {flashsfa.__version__}" in out
    for name in ("numba", "triton", "transformers"):
        assert f"  {name}: " in out
    for name in ("selection", "prefill", "decode"):
        (line,) = (line for line in out.splitlines() if line.startswith(f"  {name}: "))
        assert line.split(": ")[1].startswith(("fused (", "plain PyTorch ("))


def test_a_kernel_that_does_not_run_is_said(capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(flashsfa, "sparse_feature_decode", broken)
    assert main(["info"]) == 0
    assert "decode: does not run: RuntimeError: no compiler here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cache_dtype", "cache"),
    [(None, "200 bytes per token, dense 256 (-22 %)"), ("int8", "88 bytes per token, dense 256 (-66 %)")],
)
def test_info_of_a_converted_model(cache_dtype, cache, tiny, tmp_path, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    flashsfa.enable(model, topk=2, dense_dims=2, cache_dtype=cache_dtype).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for line in ("topk: 2", "dense_dims: 2", "basis: none", "positions: as in the dense model", f"KV cache: {cache}"):
        assert f"  {line}\n" in out
    assert f"loss: not recorded; flashsfa eval perplexity {tmp_path}" in out
    report = {"switched": {"basis": "balanced"}, "perplexity_increase": 0.0432}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert main(["info", str(tmp_path)]) == 0
    assert "loss: +4.3 % of perplexity" in capsys.readouterr().out
    (tmp_path / "report.json").write_text("[]")
    assert_refused(capsys, ["info", str(tmp_path)], "is no report of flashsfa convert")


def test_layers_that_were_left_dense_count_as_dense(tiny, tmp_path, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    flashsfa.enable(model, topk=2, dense_dims=2, layers=[1]).save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    assert "KV cache: 228 bytes per token, dense 256" in capsys.readouterr().out


def test_info_refuses_what_is_no_converted_model(tiny, tmp_path, capsys):
    assert_refused(capsys, ["info", str(tmp_path)], "config.json is missing")
    assert_refused(capsys, ["info", str(tiny)], "dense model")

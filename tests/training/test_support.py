"""Statistics of supports."""

import json

import numpy as np
import pytest
import torch

import flashsfa
from flashsfa import reference
from flashsfa.cli import main
from flashsfa.training.support import SupportStatistics, support_statistics
from tiny import QWEN3, VOCABULARY, logits, refused, transformers


@pytest.mark.parametrize("queries", [(3, None), (4, "2:4")], ids=str)
def test_support_statistics_count_what_the_operator_keeps(queries):
    model = flashsfa.enable(
        transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=VOCABULARY, **QWEN3)).eval(),
        3,
        topk_query=queries[0],
        dense_dims=4,
        query_pattern=queries[1],
        layers=[1],
    )
    windows = torch.randint(0, VOCABULARY, (2, 9))
    statistics = support_statistics(model, windows)
    assert statistics.entropy[0].isnan().all()
    seen = []

    def look(module, query, key, value, *args, **kwargs):
        seen.append((query, key))
        return flashsfa.huggingface.attention.attention_forward(module, query, key, value, *args, **kwargs)

    transformers.AttentionInterface.register("look", look)
    model.set_attn_implementation("look")
    counts, overlaps, effective = torch.zeros(2, 12), [], []
    for window in windows:
        seen.clear()
        logits(model, window[None])
        codes = zip(seen[1], (queries, (3, None)), strict=True)
        query, key = (reference.topk_rows(x, k, dense_dims=4, pattern=p)[0, :, :, 4:] for x, (k, p) in codes)
        counts += (key != 0).sum(1)
        shared = ((query != 0).float() @ (key != 0).float().repeat_interleave(2, 0).mT > 0).tril()
        overlaps.append(shared.sum((1, 2)).view(2, 2).sum(1) / (2 * 45))
        effective.append((key.square().sum(-1).square() / key.pow(4).sum(-1)).mean(-1))
    shares = (counts / counts.sum(-1, keepdim=True)).cpu()
    torch.testing.assert_close(statistics.entropy[1], torch.special.entr(shares).sum(-1) / np.log(12))
    torch.testing.assert_close(statistics.overlap[1], torch.stack(overlaps).mean(0).cpu())
    torch.testing.assert_close(statistics.effective_topk[1], torch.stack(effective).mean(0).cpu())


@pytest.mark.parametrize(
    ("entropy", "overlap", "effective", "topk_query", "verdict"),
    [
        (0.9, 0.6, 3.0, 4, "good"),
        (0.8, 0.6, 3.0, 4, "low entropy"),
        (0.9, 0.43, 3.0, 4, "overlap no better than chance"),
        (0.9, 1.0, 3.0, None, "good"),
        (0.9, 0.6, 1.9, 4, "few features carry a key"),
        (0.8, 0.43, 1.9, 4, "low entropy, overlap no better than chance, few features carry a key"),
        (float("nan"), float("nan"), float("nan"), 4, "dense"),
    ],
)
def test_the_worst_head_decides_the_verdict(entropy, overlap, effective, topk_query, verdict):
    best = (1.0, 1.0, 4.0)
    columns = (torch.tensor([[good, x]]) for good, x in zip(best, (entropy, overlap, effective), strict=True))
    statistics = SupportStatistics(*columns, topk=4, topk_query=topk_query, sparse_dims=32)
    assert statistics.chance == (1.0 if topk_query is None else pytest.approx(1 - 20475 / 35960))  # C(28, 4) / C(32, 4)
    assert statistics.verdict(0) == verdict


def test_supports_on_the_command_line(tmp_path, converted, tokens, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "results"
    command = ["train", "support", str(converted), "--text", str(tokens), "--window", "16", "-o", str(out)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "effective k of 3" in shown
    assert "entropy from 0.85, overlap 1 as queries" in shown
    (report,) = out.glob("support-*.json")
    rows = json.loads(report.read_text())["results"]
    assert [(row["layer"], row["head"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(row["overlap"] == 1 and 0 < row["entropy"] <= 1 and 1 <= row["effective_topk"] <= 3 for row in rows)
    assert report.with_suffix(".png").stat().st_size > 0
    assert main([*command[:3], "--window", "1"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "1"], "--window must be at least 2 tokens"),
        (["--window", "64"], "--window 64: the model has 32 positions"),
        (["--window", "16", "--text", "none.npy"], "--text: token file none.npy does not exist"),
        (["--window", "16", "--text", "none.txt"], "none.txt"),
    ],
)
def test_wrong_options_of_support_are_refused(tmp_path, converted_model, capsys, options, message):
    pytest.importorskip("matplotlib")
    refused(capsys, main(["train", "support", str(converted_model), *options, "-o", str(tmp_path / "out")]), message)
    assert not (tmp_path / "out").exists()


def test_keys_in_bits_per_axis_have_no_supports(tmp_path, converted, tokens, capsys):
    pytest.importorskip("matplotlib")
    model = flashsfa.disable(flashsfa.from_pretrained(converted))
    basis = flashsfa.calibrate(model, torch.randint(0, VOCABULARY, (4, 32)), key_bytes=8)
    flashsfa.enable(model, basis=basis).save_pretrained(converted)
    capsys.readouterr()
    command = ["train", "support", str(converted), "--text", str(tokens), "--window", "16"]
    refused(capsys, main([*command, "-o", str(tmp_path / "out")]), "has no topk: its keys are in bits per axis")
    assert not (tmp_path / "out").exists()


def test_supports_of_a_model_that_diverged_are_refused(tmp_path, converted, tokens, capsys):
    pytest.importorskip("matplotlib")
    model = flashsfa.from_pretrained(converted)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_norm.weight.fill_(torch.nan)
    model.save_pretrained(converted)
    capsys.readouterr()
    command = ["train", "support", str(converted), "--text", str(tokens), "--window", "16"]
    refused(capsys, main([*command, "-o", str(tmp_path / "out")]), "NaN")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(tmp_path, converted, capsys):
    pytest.importorskip("matplotlib")
    saved = json.loads((converted / "tokenizer.json").read_text())
    saved["model"]["vocab"]["w3"], saved["pre_tokenizer"] = 300, {"type": "WhitespaceSplit"}
    (converted / "tokenizer.json").write_text(json.dumps(saved))
    (tmp_path / "text.txt").write_text("w3 w3 w3")
    command = ["train", "support", str(converted), "--text", str(tmp_path / "text.txt"), "--window", "2"]
    refused(capsys, main([*command, "-o", str(tmp_path / "out")]), "token 300, past the model's vocabulary of 40")

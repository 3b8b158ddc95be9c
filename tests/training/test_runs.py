"""Whole runs of tiny models: killed, stopped, full disks, and what they learn."""

import itertools
import shutil

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers.integrations import TensorBoardCallback

import flashsfa
from flashsfa import FeatureBasis
from flashsfa.budget import FeatureBudget
from flashsfa.huggingface.settings import BASIS_FILE
from flashsfa.huggingface.switch import load_basis
from flashsfa.training import needle, pretrain, recipe
from flashsfa.training.run import Annealing, RunDirectory, RunTrainer
from tiny import (
    CONTEXT,
    GPT2,
    MODELS,
    QWEN3,
    VOCABULARY,
    Coding,
    kill_at,
    losses,
    refused,
    result,
    run,
    saved_loss,
    stopped_and_gone_on,
)  # fmt: skip


def test_a_run_that_was_killed_goes_on_with_the_same_losses(tmp_path, content, monkeypatch):
    content["attention"] |= {"anneal": {"share": 0.8}, "topk_query": 16, "equalize": True}
    content["model"]["config"]["resid_pdrop"] = 0.1  # random numbers go on too
    assert run(tmp_path, content, name="whole") == 0
    kill_at(monkeypatch, 3)
    assert run(tmp_path, content) == 130
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if "runs" not in p.name) == [
        "checkpoint-2",
        "recipe.yaml",
    ]
    monkeypatch.undo()
    (tmp_path / "run" / ".partial" / "checkpoint-3").mkdir(parents=True)  # what a kill in the middle of saving leaves
    assert run(tmp_path, content) == 0
    assert losses(tmp_path) == losses(tmp_path, "whole")
    assert result(tmp_path)["seconds_per_step"] > 0
    assert len(losses(tmp_path)) == 5
    assert result(tmp_path)["perplexity"] == result(tmp_path, "whole")["perplexity"]
    weights = [flashsfa.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "run")]
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_run_begins_with_the_weights_of_another(tmp_path, content, capsys):
    """On a longer context, with another budget; its first loss is what the other one ends with, or near it."""
    content["model"] = {"architecture": "qwen3", "config": {**QWEN3, "vocab_size": VOCABULARY}}
    content["training"] |= {"tokens": 40 * 4 * CONTEXT, "log_every": 1, "warmup": 1}
    assert run(tmp_path, content, name="before") == 0
    content["model"]["start"] = str(tmp_path / "before")
    content["data"]["context"] = 2 * CONTEXT
    content["attention"]["topk"] = 6
    assert run(tmp_path, content) == 0
    first, start, end = losses(tmp_path, "before")[0], losses(tmp_path)[0], losses(tmp_path, "before")[-1]
    assert start < first - (first - end) / 2
    for change, message in (
        ({"start": str(tmp_path / "nowhere")}, "holds no model"),
        (
            {"config": {**QWEN3, "vocab_size": VOCABULARY, "hidden_size": 64}},
            "are not those of this recipe (lm_head.weight",
        ),
        (
            {"config": {**QWEN3, "vocab_size": VOCABULARY, "num_hidden_layers": 3}},
            "are not those of this recipe (model.layers.2",
        ),
    ):
        wrong = {**content, "model": {**content["model"], **change}}
        capsys.readouterr()
        refused(capsys, run(tmp_path, wrong, name="wrong"), "model.start", message)
        assert not (tmp_path / "wrong").exists()


def test_a_run_killed_after_its_last_step_is_finished(tmp_path, content, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("flashsfa.training.pretrain.save", killed)
    assert run(tmp_path, content) == 130
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-5"]
    monkeypatch.undo()
    assert run(tmp_path, content) == 0
    assert len(losses(tmp_path)) == 5


def test_a_trained_basis_goes_on_after_a_kill_and_is_in_the_model(tmp_path, content, tokens, monkeypatch, capsys):
    content["attention"]["train_basis"] = True
    assert run(tmp_path, content, name="whole") == 0
    assert stopped_and_gone_on(tmp_path, content, monkeypatch, 3) == losses(tmp_path, "whole")
    assert saved_loss(tmp_path, tokens) == pytest.approx(result(tmp_path)["validation_loss"], rel=1e-4)
    content["model"]["start"], content["attention"]["train_basis"] = str(tmp_path / "run"), False
    capsys.readouterr()
    refused(
        capsys,
        run(tmp_path, content, name="on"),
        "model.start",
        "a basis that was trained, which a run cannot go on with",
    )


def test_a_directory_holds_one_run(tmp_path, content, capsys):
    assert run(tmp_path, content) == 0
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    assert run(tmp_path, content) == 2
    assert "holds a finished run" in capsys.readouterr().err
    (tmp_path / "run" / "result.json").rename(tmp_path / "result.json")
    assert run(tmp_path, content, "--set", "training.seed=1") == 2
    assert "another recipe (training.seed differ)" in capsys.readouterr().err
    (tmp_path / "result.json").rename(tmp_path / "run" / "result.json")
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*")) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert run(tmp_path, content, name="other") == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(tmp_path, content, capsys, monkeypatch):
    step = RunTrainer.training_step

    def poisoned(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        return loss * torch.nan if self.state.global_step == 3 else loss

    monkeypatch.setattr(RunTrainer, "training_step", poisoned)
    content["training"]["log_every"] = 100
    assert run(tmp_path, content) == 2
    assert (
        f"loss is nan at step 4; the last good checkpoint is {tmp_path / 'run' / 'checkpoint-2'}"
        in capsys.readouterr().err
    )
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_full_disk_loses_no_checkpoint(tmp_path, content, capsys, monkeypatch):
    save = RunTrainer._save_optimizer_and_scheduler

    def full(self, directory):
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        return save(self, directory)

    monkeypatch.setattr(RunTrainer, "_save_optimizer_and_scheduler", full)
    assert run(tmp_path, content) == 2
    assert "checkpoint of step 4 could not be written" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "run").glob("*check*")) == ["checkpoint-2"]
    assert not (tmp_path / "run" / ".partial").exists()
    monkeypatch.undo()
    assert run(tmp_path, content) == 0


def test_a_result_that_cannot_be_written_loses_no_checkpoint(tmp_path, content, capsys, monkeypatch):
    def full(self, result):
        raise RuntimeError("No space left on device")  # safetensors' error is no OSError

    monkeypatch.setattr(RunDirectory, "close", full)
    assert run(tmp_path, content) == 2
    assert (
        f"result could not be written: No space left on device; the last good checkpoint is {tmp_path / 'run' / 'checkpoint-5'}"
        in capsys.readouterr().err
    )
    monkeypatch.undo()
    assert run(tmp_path, content) == 0
    assert run(tmp_path, content, name="whole") == 0
    assert result(tmp_path)["validation_loss"] == result(tmp_path, "whole")["validation_loss"]


def test_tensorboard_shows_the_losses(tmp_path, content):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(tmp_path, content) == 0
    shown = events.EventAccumulator(str(next((tmp_path / "run").rglob("events.out.*")).parent)).Reload()
    np.testing.assert_allclose([x.value for x in shown.Scalars("train/loss")], losses(tmp_path), rtol=1e-3)


def test_gradient_checkpointing_and_micro_batches_change_no_loss(tmp_path, content):
    assert run(tmp_path, content, name="plain") == 0
    assert run(tmp_path, content, "--set", "training.checkpointing=true", "--set", "training.micro_batch=4") == 0
    np.testing.assert_allclose(losses(tmp_path), losses(tmp_path, "plain"), rtol=1e-5)


@pytest.mark.parametrize("attention", [{"kind": "dense"}, {"kind": "sfa", "topk": 4}], ids=["dense", "sfa"])
def test_needles_are_learned_with_and_without_sparse_features(tmp_path, content, attention):
    content["attention"] = attention
    content["data"] = {"train": "needle", "validation": "needle", "context": 8, "validation_windows": 4}
    content["model"]["config"] = GPT2
    content["training"] |= {"tokens": 120 * 32 * 8, "batch": 32, "micro_batch": 32, "warmup": 10, "learning_rate": 2e-2}
    content["training"] |= {"log_every": 40, "evaluate_every": 1000, "save_every": 1000}
    assert run(tmp_path, content) == 0
    assert result(tmp_path)["needle"]["8"] > 0.9
    assert losses(tmp_path)[0] == pytest.approx(np.log(needle.VOCABULARY), rel=0.1)


def test_annealing_halves_the_budget_down_to_its_own():
    codings = [Coding(), Coding()]
    codings[1].budget = FeatureBudget(16, 3, 8, 2)
    annealing = Annealing(codings, 14, recipe.Anneal(share=0.5), steps=12)
    seen = []
    for step in range(12):
        annealing.on_step_begin(None, type("State", (), {"global_step": step}), None)
        seen.append((codings[0].budget.topk, codings[0].budget.topk_query, codings[1].budget.topk_query))
    assert seen == [(14, 14, 14)] * 3 + [(7, 7, 8)] * 3 + [(3, 3, 8)] * 6


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"attention": {"kind": "short", "width": 4, "topk": None}}, ("attention.width", "are not as short")),
        ({"config": {"n_head": 4}}, ("model.start", "another n_head, 2 and not 4")),
        ({"config": {"layer_norm_epsilon": 0.1}}, ("model.start", "another layer_norm_epsilon")),
        ({"attention": {"temperature": 2.0}}, ("attention.temperature", "set it to 1")),
        ({"attention": {"sparse_temperature": 2.0}}, ("attention.sparse_temperature", "set it to null")),
        ({"data": {"context": 2 * CONTEXT}}, ("data.context", "wpe")),
    ],
    ids=lambda x: next(iter(x)) if x and isinstance(x, dict) else None,
)
def test_a_start_that_would_compute_something_else_is_refused(tmp_path, content, capsys, change, parts):
    assert run(tmp_path, content, name="before") == 0
    content["model"]["start"] = str(tmp_path / "before")
    content["model"]["config"] = {**content["model"]["config"], **change.get("config", {})}
    content["attention"] |= change.get("attention", {})
    content["data"] |= change.get("data", {})
    capsys.readouterr()
    refused(capsys, run(tmp_path, content), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_short_heads_go_on_with_short_heads(tmp_path, content, architecture):
    content["model"] = {"architecture": architecture, "config": {**MODELS[architecture], "vocab_size": VOCABULARY}}
    content["attention"] = {"kind": "short", "width": 4}
    assert run(tmp_path, content, name="before") == 0
    content["model"]["start"] = str(tmp_path / "before")
    assert run(tmp_path, content) == 0
    assert losses(tmp_path)[0] < losses(tmp_path, "before")[0]


def test_a_run_goes_on_in_the_basis_of_another(tmp_path, content, capsys, monkeypatch):
    """On a longer context; from the first step with codes, in bases that are fitted anew as the weights move on."""
    content["model"] = {
        "architecture": "qwen3",
        "config": {**QWEN3, "vocab_size": VOCABULARY, "initializer_range": 0.3},
    }
    content["attention"] |= {"dense_share": 0.5, "topk_query": 16, "dense_dims": 2}
    content["training"] |= {"tokens": 20 * 4 * CONTEXT, "learning_rate": 0.01}
    assert run(tmp_path, content, name="before") == 0
    content["model"]["start"] = str(tmp_path / "before")
    content["attention"]["dense_share"] = 0

    content["training"] |= {"tokens": 4 * CONTEXT, "learning_rate": 1e-12}
    assert run(tmp_path, content, name="same") == 0
    assert result(tmp_path, "same")["validation_loss"] == pytest.approx(
        result(tmp_path, "before")["validation_loss"], rel=1e-5
    )

    content["data"]["context"] = 2 * CONTEXT
    content["training"] |= {"tokens": 20 * 4 * CONTEXT, "learning_rate": 0.01}
    assert run(tmp_path, content, name="whole") == 0
    assert stopped_and_gone_on(tmp_path, content, monkeypatch, 5) == losses(tmp_path, "whole")
    before, after = (load_basis(tmp_path / name / "model") for name in ("before", "run"))
    assert after.topk == before.topk == content["attention"]["topk"]
    assert not torch.allclose(after.key, before.key, rtol=0.01)

    for change, message in (
        ({"topk": 5}, "fits none of topk=5"),
        (
            {"kind": "dense", "topk": None, "topk_query": None, "dense_dims": 0},
            "attention.kind dense cannot go on with",
        ),
        ({"train_basis": True}, "attention.train_basis cannot go on with"),
        ({"anneal": {"share": 0.5}}, "attention.anneal cannot go on with"),
    ):
        wrong = {**content, "attention": content["attention"] | change}
        capsys.readouterr()
        refused(capsys, run(tmp_path, wrong, name="wrong"), "model.start", message)
        assert not (tmp_path / "wrong").exists()

    file = tmp_path / "before" / "model" / BASIS_FILE
    FeatureBasis(before.query[:1], before.key[:1], topk=before.topk).save(file)
    refused(
        capsys, run(tmp_path, content, name="wrong"), "model.start: the basis of", "(1, 2, 16, 16)", "(2, 2, 16, 16)"
    )
    file.write_bytes(file.read_bytes()[:-9])
    refused(capsys, run(tmp_path, content, name="wrong"), "model.start:", "damaged")
    file.unlink()
    refused(capsys, run(tmp_path, content, name="wrong"), "model.start:", "do not agree on whether it has a basis")


@pytest.mark.parametrize("attention", [{"window": 8}, {"kind": "int8", "topk": None}], ids=str)
def test_a_run_that_keeps_no_model_says_so_first(tmp_path, content, attention, caplog):
    content["attention"] |= attention
    content["training"]["warmup"] = 5
    assert run(tmp_path, content) == 0
    assert "no model: nothing loads one with attention." in caplog.text
    assert "the learning rate rises for 5 steps, and this run has 5" in caplog.text
    assert result(tmp_path)["model"] is None


def test_shards_want_processes(tmp_path, content, capsys):
    content["training"]["fsdp"] = True
    refused(capsys, run(tmp_path, content), "training.fsdp", "torchrun --standalone --nproc-per-node")
    assert not (tmp_path / "run").exists()


def test_a_gradient_to_all_features_ends_when_it_is_said_to(tmp_path, content, monkeypatch):
    """Until then losses are those of a run with it throughout; then they part, and a run that was stopped there goes on alike."""
    content["attention"] |= {"topk": 2, "topk_query": 16, "gradient": "all"}
    content["training"] |= {"tokens": 6 * 4 * CONTEXT, "learning_rate": 0.03, "warmup": 1}
    assert run(tmp_path, content, name="throughout") == 0
    content["attention"]["gradient_share"] = 0.5
    assert run(tmp_path, content) == 0
    ended, throughout = losses(tmp_path), losses(tmp_path, "throughout")
    assert len(ended) == 6
    assert ended[:4] == throughout[:4]  # that of step four is found before its own gradient
    assert ended[4] != throughout[4]

    assert stopped_and_gone_on(tmp_path, content, monkeypatch, 5, "stopped") == ended


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [("gpt2", {}), ("gpt2", {"window": 8, "topk_query": 2}), ("qwen3", {"layers": [1]})],
    ids=str,
)
def test_codes_that_begin_after_a_dense_start(tmp_path, content, tokens, monkeypatch, architecture, attention):
    """Until then losses are those of a dense run. Then a basis is fitted, from which nothing changes with every feature kept. A run that
    was stopped before or after goes on alike, and what is saved computes what was trained."""
    if architecture == "qwen3":
        content["model"] = {"architecture": "qwen3", "config": {**QWEN3, "vocab_size": VOCABULARY}}
    content["training"] |= {"tokens": 6 * 4 * CONTEXT, "learning_rate": 0.03, "warmup": 1, "save_every": 1}
    content["model"]["config"]["initializer_range"] = 0.3  # so that a budget matters
    window = {name: value for name, value in attention.items() if name == "window"}
    runs = {
        "dense": {"kind": "dense", **window},
        "all": {"kind": "sfa", "topk": 16, "dense_share": 0.5, **window},
        "run": {"kind": "sfa", "topk": 3, "dense_dims": 2, "topk_query": 14, "dense_share": 0.5, **attention},
    }
    for name, of_run in runs.items():
        content["attention"] = of_run
        assert run(tmp_path, content, name=name) == 0
    dense, whole, sparse = (losses(tmp_path, name) for name in runs)
    assert len(dense) == 6
    assert dense[:3] == whole[:3] == sparse[:3]
    assert whole == pytest.approx(dense, rel=1e-4)
    assert sparse[3] != pytest.approx(dense[3], rel=1e-4)
    for step in (2, 3, 4):
        assert stopped_and_gone_on(tmp_path, content, monkeypatch, step, f"stopped{step}") == sparse
    if attention.get("window"):
        return
    assert load_basis(tmp_path / "run" / "model").topk == 3  # which its gain is fitted to
    assert result(tmp_path)["dense_steps"] == 3
    assert saved_loss(tmp_path, tokens) == pytest.approx(result(tmp_path)["validation_loss"], rel=1e-4)


@pytest.mark.parametrize("share", [0.05, 0.95])
def test_a_dense_start_leaves_steps_of_both_kinds(tmp_path, content, capsys, share):
    content["attention"]["dense_share"] = share
    refused(
        capsys,
        run(tmp_path, content),
        "attention.dense_share",
        f"{share} leaves {5 * (share > 0.5)} dense steps, and this run has 5",
    )
    assert not (tmp_path / "run").exists()


def test_a_basis_is_fitted_anew_as_the_weights_move_on(tmp_path, content, monkeypatch):
    found, fit_bases = [], flashsfa.training.run.fit_bases

    def noted(model, cores, batches):
        fit_bases(model, cores, batches)
        found.append(cores[0].basis.key.clone())

    monkeypatch.setattr("flashsfa.training.run.fit_bases", noted)
    content["attention"] |= {"dense_share": 0.5, "topk_query": 16}
    content["training"] |= {"tokens": 40 * 4 * CONTEXT, "save_every": 100, "learning_rate": 0.03}
    assert run(tmp_path, content) == 0
    assert len(found) == 4  # after 20, 24, 28 and 32 of 40 steps: the last tenth is left alone
    assert all(not torch.allclose(one, other, rtol=0.01) for one, other in itertools.pairwise(found))
    assert torch.equal(load_basis(tmp_path / "run" / "model").key[0], found[-1].cpu())


def test_a_model_that_no_basis_fits_says_what_to_lower(tmp_path, content, capsys, monkeypatch):
    content["attention"]["dense_share"] = 0.5

    def spoilt(moments):
        raise ValueError("the model's queries or keys hold NaN")

    monkeypatch.setattr("flashsfa.basis.Moments.require_finite", spoilt)
    refused(
        capsys,
        run(tmp_path, content),
        "training stopped at step 2",
        "hold NaN",
        "A lower training.learning_rate",
    )


def test_a_budget_that_shrinks_to_the_end_is_evaluated_as_it_is_saved(tmp_path, content, tokens):
    content["attention"] |= {"topk": 2, "anneal": {"share": 1.0}}
    content["model"]["config"]["initializer_range"] = 0.3  # so that a budget matters
    assert run(tmp_path, content) == 0
    assert result(tmp_path)["validation_loss"] == pytest.approx(saved_loss(tmp_path, tokens), rel=1e-4)


def test_where_curves_are_written_is_said(tmp_path, content, capsys, monkeypatch):
    fit = pretrain.fit

    def logged(trainer, place):
        trainer.remove_callback(TensorBoardCallback)
        folder = place.path / "runs" / "now"
        folder.mkdir(parents=True)
        (folder / "events.out.tfevents.1").touch()
        return fit(trainer, place)

    monkeypatch.setattr(pretrain, "fit", logged)
    assert run(tmp_path, content) == 0
    folder = tmp_path / "run"
    said = f"curves are in {folder / 'runs' / 'now'}; to see them: tensorboard --logdir {folder}"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["sfa", "dense"])
def test_a_model_has_a_card_that_says_how_to_load_it(tmp_path, content, kind):
    content["attention"] = {"kind": kind, "topk": 4} if kind == "sfa" else {"kind": kind}
    content["license"] = "cc-by-4.0"
    if kind == "dense":
        content["data"]["validation"] = str(shutil.copy(content["data"]["train"], tmp_path / "other.npy"))
    assert run(tmp_path, content) == 0
    folder = tmp_path / "run" / "model"
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.library_name == "transformers"
    found = result(tmp_path)
    for figure in (f"{found['perplexity']:.4g}", f"{found['parameters']:,}", found["environment"]["torch"]):
        assert f"{figure}" in card.text
    assert f"| tokens of training | {5 * 4 * content['data']['context']} |" in card.text
    assert str(tmp_path) not in card.text  # where the text lay is no one's business
    recipe_of_card = yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])
    assert recipe_of_card["training"]["learning_rate"] == content["training"]["learning_rate"]
    assert f"| perplexity, {'held-out text' if kind == 'dense' else 'the text that was trained on'} |" in card.text
    code = card.text.split("```python")[1].split("```")[0].replace("FOLDER", str(folder))
    names = {}
    exec(code, names)
    assert names["model"].num_parameters() == found["parameters"]

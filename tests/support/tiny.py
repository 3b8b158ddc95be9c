"""Tiny models, recipes and runs that the tests of training share."""

import json

import numpy as np
import pytest
import torch

import flashsfa
from flashsfa.budget import FeatureBudget
from flashsfa.cli import main
from flashsfa.coder import Coder

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("rich")
yaml = pytest.importorskip("yaml")
from flashsfa.training import recipe  # noqa: E402
from flashsfa.training.models import build  # noqa: E402
from flashsfa.training.run import RunTrainer  # noqa: E402

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2}
QWEN3 = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN3 |= {"num_key_value_heads": 2, "head_dim": 16}
MODELS = {"gpt2": GPT2, "qwen3": QWEN3}
CONTEXT, VOCABULARY = 16, 40


def write(path, content):
    path.write_text(yaml.safe_dump(content))
    return path


def run(tmp_path, content, *more, name="run", command="pretrain"):
    return main(["train", command, str(write(tmp_path / f"{name}.yaml", content)), "-o", str(tmp_path / name), *more])


def refused(capsys, code, *parts):
    """The command that just ended with `code` was refused in one line that holds `parts`."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("flashsfa: error:")
    assert all(part in lines[0] for part in parts), lines[0]


def result(tmp_path, name="run"):
    return json.loads((tmp_path / name / "result.json").read_text())


def kill_at(monkeypatch, count):
    """Have a run be stopped from outside in the step after `count`."""
    step = RunTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == count:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", killed)


def stopped_and_gone_on(tmp_path, content, monkeypatch, count, name="run"):
    """The losses of a run that was stopped in the step after `count`, and started again."""
    kill_at(monkeypatch, count)
    assert run(tmp_path, content, name=name) == 130
    monkeypatch.undo()
    assert run(tmp_path, content, name=name) == 0
    return losses(tmp_path, name)


def saved_loss(tmp_path, tokens, name="run"):
    """What the model that a run saved loses on the windows that it was validated on."""
    model = flashsfa.from_pretrained(tmp_path / name / "model").eval()
    ids = torch.from_numpy(np.load(tokens)[: 8 * CONTEXT].astype(np.int64)).view(8, CONTEXT).to(model.device)
    with torch.no_grad():
        return float(model(ids, labels=ids, use_cache=False).loss)


def losses(tmp_path, name="run"):
    return [row["loss"] for row in result(tmp_path, name)["curve"] if "loss" in row]


def make(architecture, seed=0, context=CONTEXT, config=None, **attention):
    model = recipe.Model(architecture, {**MODELS[architecture], **(config or {})})
    return build(model, recipe.Attention(**attention), context, VOCABULARY, seed)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


class Coding(torch.nn.Module):
    budget, coder = FeatureBudget(16, 3, 3, 2), Coder(3, 2)

    def queries(self, q):
        return q

    keys = queries


def distill_content(content, converted, **settings):
    return {k: content[k] for k in ("data", "training")} | {"model": str(converted), "distill": settings}

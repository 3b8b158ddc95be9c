"""What a run writes is whole, with the modes of the umask; what is damaged is refused in one line."""

import json
import os
import shutil
import stat

import pytest
import torch

import flashsfa
from flashsfa.training.run import RunTrainer
from tiny import distill_content, kill_at, losses, refused, result, run


@pytest.fixture
def stopped(tmp_path, content, monkeypatch, capsys):
    """A run that was stopped after its checkpoint of step 2."""
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        assert run(tmp_path, content) == 130
    capsys.readouterr()
    return tmp_path / "run"


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_all_files_have_the_modes_of_the_umask(tmp_path, content, stopped, umask):
    before = os.umask(umask)
    try:
        shutil.rmtree(stopped)
        assert run(tmp_path, content, "--set", "training.save_every=5") == 0
        modes = {p: stat.S_IMODE(p.stat().st_mode) for p in stopped.rglob("*")}
    finally:
        os.umask(before)
    assert (stopped / "model" / "model.safetensors") in modes
    for path, mode in modes.items():
        assert mode == ((0o777 if path.is_dir() else 0o666) & ~umask), path


def test_checkpoints_have_the_modes_of_the_umask(stopped):
    for path in (stopped / "checkpoint-2").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o644, path


def test_going_on_does_not_write_the_recipe_again(tmp_path, content, stopped):
    recipe = stopped / "recipe.yaml"
    before = recipe.stat()
    recipe.chmod(0o444)
    assert run(tmp_path, content) == 0
    assert (recipe.stat().st_ino, recipe.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert len(losses(tmp_path)) == 5


def test_what_a_kill_left_half_written_is_swept_before_training(tmp_path, content, monkeypatch):
    left = tmp_path / "run"
    left.mkdir()
    (left / ".recipe.yaml-1234abcd").write_text("mod")
    (left / ".recipe.yaml-12345678.partial").mkdir()
    hidden = []
    step = RunTrainer.training_step

    def look(self, *args, **kwargs):
        hidden.extend(left.glob(".*"))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", look)
    assert run(tmp_path, content) == 0
    assert not hidden
    assert sorted(p.name for p in left.iterdir() if p.name != "runs") == ["model", "recipe.yaml", "result.json"]


def test_half_a_checkpoint_makes_room_for_the_next(tmp_path, content, stopped, monkeypatch):
    (stopped / ".partial" / "checkpoint-3").mkdir(parents=True)
    loaded = []
    load = RunTrainer._load_from_checkpoint
    monkeypatch.setattr(
        RunTrainer, "_load_from_checkpoint", lambda *args: loaded.extend(stopped.glob(".*")) or load(*args)
    )
    assert run(tmp_path, content) == 0
    assert not loaded


def test_a_run_killed_between_its_model_and_its_result_is_finished(tmp_path, content, monkeypatch):
    def killed(path, content):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("flashsfa.training.run.write_whole", killed)
        assert run(tmp_path, content) == 130
    assert (tmp_path / "run" / "model").is_dir()
    assert run(tmp_path, content) == 0
    flashsfa.from_pretrained(tmp_path / "run" / "model")
    assert not list((tmp_path / "run").glob(".*"))


def test_a_recipe_that_cannot_be_written_leaves_nothing(tmp_path, content, capsys, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flashsfa.training.recipe.write_whole", full)
    refused(capsys, run(tmp_path, content, "-o", str(tmp_path / "new" / "run")), "No space left")
    assert not (tmp_path / "new").exists()


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path, content, capsys):
    (tmp_path / "file").touch()
    refused(capsys, run(tmp_path, content, "-o", str(tmp_path / "file" / "run")), "cannot write")


def cut(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def drop_a_tensor(path):
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    weights.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(weights, path)


DAMAGES = {
    "cut weights": (lambda c: cut(c / "model.safetensors", 0.5), "damaged"),
    "empty weights": (lambda c: cut(c / "model.safetensors", 0), "damaged"),
    "a tensor missing": (lambda c: drop_a_tensor(c / "model.safetensors"), "it lacks transformer.h.1.mlp.c_fc.weight"),
    "no weights": (lambda c: (c / "model.safetensors").unlink(), "damaged"),
    "cut optimizer": (lambda c: cut(c / "optimizer.pt", 0.5), "damaged"),
    "no optimizer": (lambda c: (c / "optimizer.pt").unlink(), "optimizer* missing"),
    "no scheduler": (lambda c: (c / "scheduler.pt").unlink(), "scheduler.pt missing"),
    "cut random state": (lambda c: cut(c / "rng_state.pth", 0.5), "damaged"),
    "no random state": (lambda c: (c / "rng_state.pth").unlink(), "rng_state*.pth missing"),
    "a foreign object": (lambda c: torch.save(print, c / "optimizer.pt"), "damaged"),
    "cut state": (lambda c: cut(c / "trainer_state.json", 0.5), "damaged"),
    "deep state": (lambda c: (c / "trainer_state.json").write_text("[" * 100_000), "damaged"),
    "state of another step": (lambda c: (c / "trainer_state.json").write_text('{"global_step": 4}'), "another step"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named(tmp_path, content, stopped, capsys, name):
    damage, message = DAMAGES[name]
    damage(stopped / "checkpoint-2")
    code = run(tmp_path, content)
    lines = [x for x in capsys.readouterr().err.replace("\r", "\n").splitlines() if x.startswith("flashsfa")]
    assert code == 2
    assert len(lines) == 1
    assert f"{stopped / 'checkpoint-2'} is damaged" in lines[0]
    assert message in lines[0]
    assert "remove it to start anew" in lines[0]
    assert not (stopped / "result.json").exists()


def test_a_disk_that_fails_is_no_damaged_checkpoint(tmp_path, content, stopped, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.Trainer._load_rng_state", full)
    assert run(tmp_path, content) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "damaged" not in error


def test_a_foreign_checkpoint_is_refused(tmp_path, content, stopped, capsys):
    (stopped / "checkpoint-new").mkdir()
    refused(capsys, run(tmp_path, content), "checkpoint-new: no checkpoint of this run")


@pytest.mark.parametrize("text", ["", "model:\n  archi", "[" * 5000])
def test_a_run_whose_recipe_is_damaged_is_refused(tmp_path, content, stopped, capsys, text):
    (stopped / "recipe.yaml").write_text(text)
    refused(capsys, run(tmp_path, content), "holds a run that cannot go on", "name a new directory with -o")
    assert (stopped / "recipe.yaml").read_text() == text


def test_a_run_out_of_memory_ends_in_one_line(tmp_path, content, capsys, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 256000000000 bytes.")

    monkeypatch.setattr(RunTrainer, "training_step", full)
    assert run(tmp_path, content) == 2
    assert "out of memory: lower training.micro_batch" in capsys.readouterr().err


def test_a_loss_without_a_perplexity_is_written(tmp_path, content, monkeypatch):
    step = RunTrainer.prediction_step
    monkeypatch.setattr(
        RunTrainer, "prediction_step", lambda *args, **kwargs: (1000 + step(*args, **kwargs)[0], None, None)
    )
    assert run(tmp_path, content) == 0
    assert result(tmp_path)["perplexity"] == float("inf")
    assert result(tmp_path)["validation_loss"] > 1000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"rank": 10**9}}, "distill.lora.rank must be at most the model's hidden size of 32"),
        ({"lora": {"rank": 2, "alpha": -1.0}}, "distill.lora.alpha must be above 0"),
        ({"lora": {"rank": True}}, "distill.lora.rank: must be a number, got True"),
        ({"layers": [0, 0]}, "distill.layers: name each layer once"),
        ({"layers": []}, "distill.layers: name each layer once"),
        ({"weight": float("nan")}, "distill.weight: must be a finite number"),
        ({"logits": float("inf")}, "distill.logits: must be a finite number"),
        ({"anneal": {"share": 0}}, "anneal.share must be in (0, 1]"),
        ({"warmup": {"text": "x", "tokens": 10**17}}, "distill.warmup.tokens must be 1 to"),
    ],
)
def test_settings_of_distillation_that_mean_nothing_are_refused(
    tmp_path, content, converted_model, capsys, settings, message
):
    code = run(tmp_path, distill_content(content, converted_model, **settings), command="distill")
    refused(capsys, code, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "share"),
    [("model.safetensors", 0.5), ("model.safetensors", 0), ("config.json", 0.5), ("tokenizer.json", 0.3)],
)
def test_a_damaged_model_is_not_distilled(tmp_path, content, converted, capsys, name, share):
    cut(converted / name, share)
    code = run(tmp_path, distill_content(content, converted), command="distill")
    refused(capsys, code, str(converted))
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_tensor_is_not_distilled(tmp_path, content, converted, capsys):
    from safetensors.torch import load_file, save_file

    weights = load_file(converted / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, converted / "model.safetensors", metadata={"format": "pt"})
    code = run(tmp_path, distill_content(content, converted), command="distill")
    refused(capsys, code, "model.layers.1.mlp.up_proj.weight")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [{"topk": 6.5}, {"topk": True}, {"layers": [0.5]}, {"has_basis": "false"}, []])
def test_a_model_with_bad_settings_is_not_distilled(tmp_path, content, converted, capsys, settings):
    config = json.loads((converted / "config.json").read_text())
    config["sfa"] = config["sfa"] | settings if settings else settings
    (converted / "config.json").write_text(json.dumps(config))
    code = run(tmp_path, distill_content(content, converted), command="distill")
    refused(capsys, code, str(converted))
    assert not (tmp_path / "run").exists()

"""The scripts of recipes/: which runs they start, where, and what they do with those that are there already."""

import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from flashsfa.training import recipe

ROOT = Path(__file__).parents[2]
STUDIES = sorted(p.name for p in (ROOT / "recipes").glob("*.sh") if p.name not in ("heal.sh", "long.sh", "queue.sh"))
pytestmark = pytest.mark.skipif(shutil.which("xargs") is None or shutil.which("bash") is None, reason="needs a shell")

# Stands in for flashsfa, and behind torchrun's options too: notes its arguments, and a run ends with a result.
COMMAND = """#!/usr/bin/env bash
echo "${CUDA_VISIBLE_DEVICES:-all} $(basename "$0") $*" >> "$NOTES"
[[ $1 != convert ]] || { mkdir -p "$4"; exit 0; }
while [[ $1 != train ]]; do shift; done
[[ $2 != compare ]] || exit 0
[[ $* != *broken* ]] || { echo "out of memory" >&2; exit 2; }
mkdir -p "$5"
sleep 0.2
echo "validation perplexity 9.5 after 3 steps"
echo {} > "$5/result.json"
"""


def script(tmp_path, name, *arguments, rows="", gpus=2, jobs=None, picked=None):
    """What a script of recipes/ prints, and the commands that it started, in the order of their names."""
    for command in ("flashsfa", "torchrun"):
        file = tmp_path / "bin" / command
        file.parent.mkdir(exist_ok=True)
        file.write_text(COMMAND)
        file.chmod(0o755)
    notes = tmp_path / "notes"
    notes.write_text("")
    own = {"PATH": f"{file.parent}{os.pathsep}{os.environ['PATH']}", "NOTES": str(notes), "GPUS": str(gpus)}
    own |= {} if jobs is None else {"JOBS": str(jobs)}
    own |= {} if picked is None else {"ROWS": picked}
    done = subprocess.run(
        [str(ROOT / "recipes" / name), *arguments], cwd=ROOT, env=os.environ | own, input=rows, text=True, capture_output=True,
        timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line.split() for line in notes.read_text().splitlines()]


ROWS = """
a-dense gpt2-27m
a-sparse gpt2-27m  attention.kind=sfa attention.topk=8
a-broken gpt2-27m training.seed=1
b-dense qwen3-29m
"""


def test_runs_are_spread_over_gpus_and_those_that_are_there_stay(tmp_path):
    out = tmp_path / "out"
    (out / "b-dense").mkdir(parents=True)
    (out / "b-dense" / "result.json").write_text("{}")
    printed, commands = script(tmp_path, "queue.sh", str(out), "a-dense none", "training.batch=2", rows=ROWS)
    runs = {Path(words[6]).name: words for words in commands if words[3] == "pretrain"}
    assert set(runs) == {"a-dense", "a-sparse", "a-broken"}
    assert {words[0] for words in runs.values()} <= {"0", "1"}
    assert {runs["a-dense"][0], runs["a-sparse"][0]} == {"0", "1"}
    assert runs["a-sparse"][4] == "recipes/gpt2-27m.yaml"
    assert runs["a-sparse"][7:] == [
        "--set", "attention.kind=sfa", "--set", "attention.topk=8", "--set", "training.batch=2"
    ]  # fmt: skip
    assert "failed: a-broken: out of memory" in printed
    assert re.search(r"a-dense: \d+ s, validation perplexity 9.5 after", printed)
    compared = [words[2:] for words in commands if words[3] == "compare"]
    assert compared == [["train", "compare", f"{out}/a-dense", f"{out}/a-sparse", "-o", f"{out}/compared"]]
    _, commands = script(tmp_path, "queue.sh", str(out), "b-dense")  # no rows: the comparison alone
    assert [words[3:5] for words in commands] == [["compare", f"{out}/b-dense"]]


def test_a_row_of_two_processes_sees_both_gpus(tmp_path):
    row = "a gpt2-27m processes=2 training.fsdp=true"
    _, ((gpus, command, *words),) = script(tmp_path, "queue.sh", str(tmp_path / "out"), "", rows=row, jobs=1)
    assert (gpus, command) == ("all", "torchrun")
    assert words[:6] == ["--standalone", "--nproc-per-node", "2", "-m", "flashsfa.cli", "train"]
    assert words[-2:] == ["--set", "training.fsdp=true"]


def test_without_a_gpu_runs_come_one_by_one(tmp_path):
    _, commands = script(tmp_path, "queue.sh", str(tmp_path / "out"), "", rows=ROWS, gpus=0)
    assert [words[0] for words in commands] == 4 * ["all"]
    assert [Path(words[6]).name for words in commands] == ["a-dense", "a-sparse", "a-broken", "b-dense"]


@pytest.mark.parametrize("study", STUDIES)
def test_each_row_of_a_study_is_a_recipe_of_its_own(tmp_path, study):
    _, commands = script(tmp_path, study, str(tmp_path / "out"), jobs=8)
    runs, recipes = [words for words in commands if "pretrain" in words], set()
    for words in runs:
        at = words.index("pretrain")
        settings = [word for before, word in itertools.pairwise(words) if before == "--set"]
        read = recipe.read(recipe.PretrainRecipe, ROOT / words[at + 1], settings)
        processes = "torchrun" in words[1]
        recipes.add(json.dumps([repr(read), processes]))
    assert len(recipes) == len(runs) > 2
    baselines = [words[words.index("compare") + 1] for words in commands if "compare" in words]
    names = [words[words.index("-o") + 1] for words in runs]
    assert baselines
    assert set(baselines) <= set(names)


def test_finished_runs_go_on_at_a_longer_context(tmp_path):
    """By their own recipes, and once."""
    runs = [tmp_path / "dense", tmp_path / "sparse"]
    for run in runs:
        run.mkdir()
        shutil.copy(ROOT / "recipes" / "qwen3-d128.yaml", run / "recipe.yaml")
    _, commands = script(tmp_path, "long.sh", *map(str, runs))
    assert [words[6] for words in commands] == [f"{run}-8k" for run in runs]
    settings = [word for before, word in itertools.pairwise(commands[1]) if before == "--set"]
    read = recipe.read(recipe.PretrainRecipe, Path(commands[1][4]), settings)
    assert read.model.start == str(runs[1])
    assert read.data.context == 8192
    assert read.attention.topk == 16
    assert script(tmp_path, "long.sh", *map(str, runs))[1] == []


def test_rows_of_a_study_are_picked_by_their_names(tmp_path):
    _, commands = script(tmp_path, "scale.sh", str(tmp_path / "out"), picked="qwen3-dense|gpt2-k8")
    names = {Path(words[words.index("-o") + 1]).name for words in commands if "pretrain" in words}
    assert names == {"qwen3-dense", "gpt2-k8"}


def test_a_dense_model_is_converted_once_and_trained_on(tmp_path):
    out, text = tmp_path / "out", tmp_path / "text"
    arguments = str(out), "dense-model", str(text), "training.batch=2"
    _, commands = script(tmp_path, "heal.sh", *arguments, picked="dense|16.*", jobs=1)
    converted = [words[2:] for words in commands if words[2] == "convert"]
    names = ["dense", "16+16", "16+8"]
    assert [words[:4] for words in converted] == [
        ["convert", "dense-model", "-o", f"{out}/converted/{x}"] for x in names
    ]
    assert all(words[-2:] == ["--calibrate", str(text)] for words in converted)
    for name, words in zip(names, (words for words in commands if words[2] == "train"), strict=True):
        assert words[2:7] == ["train", "distill", "recipes/heal.yaml", "-o", f"{out}/{name}"]
        read = recipe.read(recipe.DistillRecipe, ROOT / words[4], words[8::2])
        assert (read.model, read.training.batch) == (f"{out}/converted/{name}", 2)
    assert script(tmp_path, "heal.sh", *arguments, picked="dense|16.*", jobs=1)[1] == []

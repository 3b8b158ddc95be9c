"""Two processes, started by torchrun, train as one does; on the CPU, through gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import flashsfa
from flashsfa.cli import main

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
yaml = pytest.importorskip("yaml")


SHARDED = Path(__file__).parents[1] / "support" / "sharded_cli.py"


def start(folder, name, *more):
    """Start the run of `folder` in two processes, with its output in `name`."""
    program = [str(SHARDED)] if "training.fsdp=true" in more else ["-m", "flashsfa.cli"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", *program, "train", "pretrain", str(folder / "run.yaml")]
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    source = str(Path(__file__).parents[2] / "src")
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [*command, "-o", str(folder / name), *more], env=os.environ | quiet | {"PYTHONPATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def losses(output):
    """Each step's loss and gradient norm, and the validation loss."""
    result = json.loads((output / "result.json").read_text())
    rows = [value for row in result["curve"] if "loss" in row for value in (row["loss"], row["grad_norm"])]
    return np.array([*rows, result["validation_loss"]])


@pytest.mark.cpu
@pytest.mark.parametrize(
    "attention", [{"gradient": "all", "equalize": True}, {"dense_dims": 2, "dense_share": 0.5}], ids=["all", "late"]
)
def test_two_processes_train_as_one_does(tmp_path, attention):
    random = np.random.default_rng(0)
    ids = random.integers(1, 40, 40)[np.arange(1500) % 37]
    ids[random.integers(0, 1500, 150)] = 0  # documents of many lengths, so that no two batches predict as many tokens
    np.save(tmp_path / "tokens.npy", ids.astype(np.uint16))
    file = str(tmp_path / "tokens.npy")
    training = {
        "tokens": 4 * 8 * 16,
        "batch": 8,
        "micro_batch": 2,  # of nine validation windows one is left over for the last batches
        "learning_rate": 1e-2,
        "warmup": 1,
        "precision": "fp32",
    }
    training |= {"save_every": 2, "evaluate_every": 4, "log_every": 1}
    content = {
        "model": {"architecture": "gpt2", "config": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 40}},
        "attention": {"kind": "sfa", "topk": 4, "topk_query": 16, **attention},
        "data": {
            "train": file, "validation": file, "context": 16, "separator": 0, "packed": True, "validation_windows": 9
        },
        "training": training,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    assert main(["train", "pretrain", str(tmp_path / "run.yaml"), "-o", str(tmp_path / "one")]) == 0
    runs = {
        "two": start(tmp_path, "two"),
        "sharded": start(tmp_path, "sharded", "--set", "training.fsdp=true"),
        "recomputed": start(tmp_path, "recomputed", "--set", "training.checkpointing=true"),
    }
    for run in runs.values():
        printed, _ = run.communicate(timeout=240)
        assert run.returncode == 0, printed
        assert printed.count("validation perplexity") == 1  # by the process that writes
    found = {name: losses(tmp_path / name) for name in ("one", *runs)}
    models = {name: sorted(p.name for p in (tmp_path / name / "model").iterdir()) for name in found}
    weights = {name: flashsfa.from_pretrained(tmp_path / name / "model").state_dict() for name in found}
    for name in runs:
        np.testing.assert_allclose(found[name], found["one"], rtol=1e-4, err_msg=name)
        assert models["one"] == [n for n in models[name] if n != "training_args.bin"]
        torch.testing.assert_close(weights[name], weights["one"], rtol=1e-3, atol=1e-4)

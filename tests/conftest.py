"""Every test starts from one seed, and unwritten memory is NaN; GPU tests are skipped without a GPU.

`pytest --device cuda` makes every tensor on the GPU, so that the whole suite tests the CUDA paths.
"""

import contextlib
import os
import random
import shutil

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it once, when the first kernel is defined

torch.set_num_threads(1)  # the tensors are tiny, and pytest-xdist runs tests side by side


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tests make their tensors: cpu (default) or cuda")


@pytest.fixture(autouse=True)
def device(request):
    device = torch.device(request.config.getoption("--device"))
    with contextlib.nullcontext() if device.type == "cpu" else device:
        yield device


def pytest_collection_modifyitems(config, items):
    on_gpu = config.getoption("--device") != "cpu"
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "cpu" in item.keywords and on_gpu:
            item.add_marker(pytest.mark.skip(reason="happens on the CPU alone"))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch fills torch.empty and its kin with NaN (integers: their maximum) in deterministic mode."""
    torch.manual_seed(0)
    # On CUDA some fused backwards have no deterministic form: warn, but still poison.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders "dense" and "converted" with a model each, to be read."""
    from command_lines import save_models

    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture
def work(models, tmp_path, monkeypatch):
    """A folder of our own, the current one, with both models, a text and a folder of texts."""
    from command_lines import WORDS

    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    text = " ".join(random.Random(0).choices(WORDS[2:], k=600))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path

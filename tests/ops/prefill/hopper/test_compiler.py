"""The compiled prefill kernel is kept on disk: whole, the user's own, or compiled again. Needs neither NVRTC nor a GPU."""

import os
import shutil
import stat
import threading
from pathlib import Path

import pytest
import torch

from flashsfa.ops import compiled as compiled_code
from flashsfa.ops import nvrtc
from flashsfa.ops.nvrtc import cuda
from flashsfa.ops.prefill.hopper import compiler, prefill

pytestmark = pytest.mark.cpu
TILE = compiler.Tile(torch.bfloat16, 64, 64)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The compilations so far; each has its number in its code."""
    count = []
    monkeypatch.setenv("FLASHSFA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled_code, "_announced", set())
    monkeypatch.setattr(cuda, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(cuda, "compile_cubin", lambda *_: count.append(1) or b"code %d" % len(count))
    return count


def kept(tmp_path):
    (path,) = (tmp_path / "cache" / "kernels").iterdir()
    return path


def test_a_kept_one_is_read_and_is_the_users_alone(compiled, tmp_path):
    old = os.umask(0)
    try:
        assert [compiler.compile_cubin(TILE) for _ in range(2)] == [b"code 1"] * 2
    finally:
        os.umask(old)
    assert len(compiled) == 1
    for folder in (tmp_path / "cache", tmp_path / "cache" / "kernels"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert compiler.compile_cubin(TILE, afresh=True) == b"code 2"
    assert compiler.compile_cubin(TILE) == b"code 2"


@pytest.mark.parametrize("name", sorted(path.name for path in compiler.SOURCES.glob("*.cu*")))
def test_another_source_is_compiled_again(name, compiled, monkeypatch, tmp_path):
    """Whichever of the CUDA files changed."""
    compiler.compile_cubin(TILE)
    sources = tmp_path / "sources"
    shutil.copytree(compiler.SOURCES, sources)
    monkeypatch.setattr(compiler, "SOURCES", sources)
    assert compiler.compile_cubin(TILE) == b"code 1"
    (sources / name).write_text((sources / name).read_text() + "//")
    assert compiler.compile_cubin(TILE) == b"code 2"


def written(content):
    return lambda path, tmp_path: path.write_bytes(content(path.read_bytes()))


def linked(path, tmp_path):
    (tmp_path / "elsewhere").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")


def pipe(path, tmp_path):
    path.unlink()
    os.mkfifo(path)


def of_another(path, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(path, 65534, 65534)


def under_another_name(path, tmp_path):
    """What was compiled for other sizes, whole as it is."""
    ours = path.read_bytes()
    path.unlink()
    compiler.compile_cubin(compiler.Tile(torch.bfloat16, 128, 128))
    other = kept(tmp_path)
    assert other.name != path.name
    assert other.read_bytes() != ours
    other.rename(path)


@pytest.mark.parametrize(
    "damage",
    [
        written(lambda content: b""),
        written(lambda content: content[: len(content) // 2]),
        written(lambda content: content[:-1]),
        written(lambda content: content[:32]),
        written(lambda content: content + b"more"),
        written(lambda content: content[:-1] + b"!"),
        written(lambda content: b"planted"),
        lambda path, tmp_path: path.chmod(0o666),
        linked,
        pipe,
        of_another,
        under_another_name,
    ],
    ids=[
        "empty",
        "half",
        "cut",
        "headless",
        "longer",
        "changed",
        "planted",
        "writable",
        "linked",
        "pipe",
        "of-another",
        "under-another-name",
    ],
)
def test_what_cannot_be_believed_is_compiled_again_and_replaced(damage, compiled, tmp_path):
    compiler.compile_cubin(TILE)
    path = kept(tmp_path)
    damage(path, tmp_path)
    before = len(compiled)
    for _ in range(2):
        assert compiler.compile_cubin(TILE) == b"code %d" % (before + 1)
    assert path.is_file()
    assert not path.is_symlink()
    assert not path.stat().st_mode & 0o022


def open_folder(cache, tmp_path):
    (cache / "kernels").mkdir(parents=True)
    (cache / "kernels").chmod(0o777)


def open_cache(cache, tmp_path):
    """Whoever may write it could put another `kernels` in its place."""
    cache.mkdir()
    cache.chmod(0o777)


def linked_folder(cache, tmp_path):
    cache.mkdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (cache / "kernels").symlink_to(tmp_path / "elsewhere")


def folder_of_another(cache, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root gives folders away")
    (cache / "kernels").mkdir(parents=True, mode=0o700)
    os.chown(cache / "kernels", 65534, 65534)


def file_instead(cache, tmp_path):
    cache.write_text("")


@pytest.mark.parametrize("place", [open_folder, open_cache, linked_folder, folder_of_another, file_instead])
def test_no_place_to_keep_it(place, compiled, tmp_path, caplog):
    place(tmp_path / "cache", tmp_path)
    assert [compiler.compile_cubin(TILE) for _ in range(2)] == [b"code 1", b"code 2"]
    assert not [path for path in tmp_path.rglob("*.cubin")]
    assert caplog.text.count("compiled code cannot be kept in") == 1


def test_a_user_without_a_home(compiled, monkeypatch, caplog):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("FLASHSFA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert compiler.compile_cubin(TILE) == b"code 1"
    assert "there is no home" in caplog.text


def test_a_sticky_cache_folder_serves(compiled, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o1777)
    assert [compiler.compile_cubin(TILE) for _ in range(2)] == [b"code 1"] * 2


def test_a_full_disk_costs_the_next_start(compiled, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nvrtc, "write_whole", full)
    assert [compiler.compile_cubin(TILE) for _ in range(2)] == [b"code 1", b"code 2"]


@pytest.mark.parametrize("refused", [1, 9])
def test_an_image_that_the_driver_refuses_is_compiled_once_more(refused, compiled, monkeypatch):
    loaded = []

    def load(cubin, *_):
        loaded.append(cubin)
        if len(loaded) <= refused:
            raise cuda.CompilationError("refused")
        return cubin

    monkeypatch.setattr(cuda, "load_kernel", load)
    tile = compiler.Tile(torch.float16, 64, 64, stages=3 + refused)
    compiler.compile_cubin(tile)
    if refused == 1:
        assert prefill._load(tile, 0).loaded == b"code 2"
    else:
        for _ in range(2):
            with pytest.raises(cuda.CompilationError, match="refused"):
                prefill._load(tile, 0)
    assert loaded == [b"code 1", b"code 2"]


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_long_compilation_is_logged(seconds, compiled, monkeypatch, caplog):
    """At once here, or never."""
    monkeypatch.setattr(compiled_code, "_SLOW_SECONDS", seconds)
    ended = threading.Event()
    say = compiled_code._say_compiling
    monkeypatch.setattr(compiled_code, "_say_compiling", lambda what: (say(what), ended.set()))
    monkeypatch.setattr(cuda, "compile_cubin", lambda *_: [ended.wait(5 if seconds == 0 else 0), b"code"][1])
    compiler.compile_cubin(TILE)
    assert ("compiling the prefill kernel" in caplog.text) == (seconds == 0)

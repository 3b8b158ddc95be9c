"""Files and folders are whole or not there, follow the umask, and what a killed writer left is swept."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flashsfa.files import beside, cache_folder, locked, require_place, whole_file, whole_folder, write_whole

UMASKS = [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]


@pytest.fixture(params=UMASKS, ids=lambda umask: oct(umask[0]))
def modes(request):
    """The modes of a file and a folder under an umask that is set."""
    umask, *modes = request.param
    before = os.umask(umask)
    yield modes
    os.umask(before)


def mode(path):
    return path.stat().st_mode & 0o777


def private(path):
    path.write_text("x")
    path.chmod(0o600)


def test_modes_follow_the_umask(modes, tmp_path):
    of_file, of_folder = modes
    with whole_file(tmp_path / "weights.bin") as file:
        assert file.name == "weights.bin"  # some writers go by the suffix
        private(file)
    with whole_folder(tmp_path / "above" / "model") as folder:
        private(folder / "weights.bin")
        (folder / "inner").mkdir(mode=0o700)
        private(folder / "inner" / "basis.bin")
    model = tmp_path / "above" / "model"
    files = [tmp_path / "weights.bin", model / "weights.bin", model / "inner" / "basis.bin"]
    assert [mode(path) for path in files] == [of_file] * 3
    assert [mode(path) for path in (model, model / "inner")] == [of_folder] * 2


@pytest.mark.parametrize(
    ("whole", "place"), [(whole_file, "kept"), (whole_file, "new/a"), (whole_folder, "new/b/c"), (beside, "new/d")]
)
@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(failure, whole, place, tmp_path):
    write_whole(tmp_path / "kept", "old")

    def fail():
        with whole(tmp_path / place) as path:
            (path / "half" if path.is_dir() else path).write_text("half")
            raise failure

    with pytest.raises(failure):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "old"


def test_a_folder_takes_the_place_of_an_empty_one_alone(tmp_path):
    def fill(name):
        with whole_folder(tmp_path / name) as folder:
            (folder / "new").touch()

    (tmp_path / "empty").mkdir()
    fill("empty")
    with pytest.raises(OSError, match="not empty"):
        fill("empty")
    assert [path.name for path in tmp_path.rglob("*")] == ["empty", "new"]


def test_names_may_be_long_and_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_whole("x" * 255, b"content")
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir("inside")
    with whole_folder(".") as folder:
        (folder / "new").touch()
    assert {path.name for path in tmp_path.rglob("*")} == {"x" * 255, "inside", "new"}


def test_the_next_writer_sweeps_what_a_killed_one_left(tmp_path):
    code = """
import os, signal, sys
from flashsfa.files import whole_folder
with whole_folder(sys.argv[1]) as folder:
    (folder / "half").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")])
        assert killed.returncode == -signal.SIGKILL
        assert len(list(tmp_path.iterdir())) == 1  # the second sweeps the first one's
    (tmp_path / ".out-mine").mkdir()
    with whole_folder(tmp_path / "out") as slow:  # another one of this process: alive
        with whole_folder(tmp_path / "out") as folder:
            (folder / "new").touch()
            assert slow.exists()
        (tmp_path / "out" / "new").unlink()
    assert {path.name for path in tmp_path.iterdir()} == {".out-mine", "out"}


def test_many_writers_side_by_side(tmp_path):
    def write(number):
        for _ in range(20):
            write_whole(tmp_path / "file", str(number) * 1000)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert len((tmp_path / "file").read_text()) == 1000


def test_a_lock_is_waited_for(tmp_path):
    order = []

    def second():
        with locked(tmp_path / "lock"):
            order.append("second")

    with locked(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize(
    "place", ["file", "file/below", "dangling", "loop/x", "x" * 300, "new/" + "x" * 300, "/proc/x"]
)
def test_places_that_cannot_be_written_are_refused(place, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="cannot write results to"):
        require_place(tmp_path / place)
    require_place(tmp_path / "new" / "folder")
    assert set(tmp_path.rglob("*")) == before


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("FLASHSFA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/someone/.cache/flashsfa")

    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    assert cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/flashsfa")
    monkeypatch.setenv("FLASHSFA_CACHE", "/own")
    assert cache_folder() == Path("/own")

"""Files and folders that are whole or not there, with the permissions that the umask allows; and the user's cache folder.

What is written lies in a hidden folder beside its place until it is whole. The folder is locked by its writer, so that the
next writer to the same place can tell what a killed one left, and removes it.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a Unix: nothing is locked, and nothing swept
    fcntl = None  # type: ignore[assignment]

_SUFFIX = ".partial"
_SHOWN_NAME = 40  # characters of a name in that of its hidden folder, which may be no longer than any other


def cache_folder() -> Path | None:
    """Where this package keeps what it can make again: FLASHSFA_CACHE, else flashsfa in XDG_CACHE_HOME, else in ~/.cache. None
    for a user without a home, who named no folder. Nothing is created."""
    if named := os.environ.get("FLASHSFA_CACHE"):
        return Path(named)
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home, "flashsfa")
    try:
        return Path.home() / ".cache" / "flashsfa"
    except RuntimeError:
        return None


def private_folder(name: str) -> Path | None:
    """The folder `name` in the cache folder, for machine code: both are made with mode 0700 where they are missing. None where
    they cannot be made, or where another user could put something into them."""
    if (cache := cache_folder()) is None:
        return None
    folder = cache / name
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        for path in (cache, folder):
            with suppress(FileExistsError):
                path.mkdir(mode=0o700)
        private = folder.is_dir() and is_private(folder.lstat()) and _keeps_its_entries(cache.stat())
    except OSError:
        return None
    return folder if private else None


def is_private(status: os.stat_result) -> bool:
    """Whether a file or folder is no link, the user's own, and nobody else may write it."""
    if stat.S_ISLNK(status.st_mode):
        return False
    return not _HAS_USERS or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)


def _keeps_its_entries(status: os.stat_result) -> bool:
    """Whether no other user can put another folder in the place of one of the user's own; in a sticky folder nobody can."""
    ours = not _HAS_USERS or status.st_uid in (0, os.geteuid())
    return ours and (not status.st_mode & 0o022 or bool(status.st_mode & stat.S_ISVTX))


_HAS_USERS = hasattr(os, "geteuid")  # not on Windows, where a user's folders are the user's own


def require_place(folder: Path) -> None:
    """Raise `OSError` if files cannot be written to `folder`, which may not exist yet. Nothing is created."""
    there = folder.absolute()
    missing: list[str] = []
    while not os.path.lexists(there):
        there, missing = there.parent, [*missing, there.name]
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        for name in missing:
            with suppress(FileNotFoundError):  # another error than that of a name that is too long
                os.lstat(there / name)
    except OSError as error:
        raise OSError(f"cannot write results to {folder}: {there}: {error.strerror or error}") from error


@contextmanager
def beside(path: str | Path) -> Iterator[Path]:
    """A new hidden folder beside `path`, gone when the block ends; what is to stay is renamed out of it. Folders above `path`
    are made, and removed again if the block fails."""
    path = Path(path).absolute()
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name[:_SHOWN_NAME]}-"
    try:
        _sweep(path.parent, prefix)
        with _locked_folder(path.parent, prefix) as folder:
            yield folder
    except BaseException:
        for parent in made:
            with suppress(OSError):  # by now others have files there
                parent.rmdir()
        raise


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write a file to. It takes the name `path` when the block ends well, and is gone when it does not, with what stood
    at `path` unchanged. The file gets the mode that the umask allows, whatever the writer chose."""
    path = Path(path).absolute()
    with beside(path) as folder:
        file = folder / path.name
        yield file
        follow_umask(folder)
        file.replace(path)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path`, whole or not at all."""
    with whole_file(path) as file:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A new folder to fill. It takes the name `path`, where at most an empty folder may stand, when the block ends well, and is
    gone when it does not. Modes as the umask allows, for all that was written into it."""
    path = Path(path).absolute()
    with beside(path) as folder:
        inner = folder / path.name
        inner.mkdir()
        yield inner
        follow_umask(inner)
        inner.rename(path)  # takes the place of an empty folder, and of nothing else


def follow_umask(folder: Path) -> None:
    """Give `folder` and all in it the modes that the umask allows: some libraries write files for their user alone."""
    mode = _file_mode(folder)
    executable = mode >> 2 & 0o111  # whoever may read a folder may enter it
    for parent, _, names in os.walk(folder):
        os.chmod(parent, mode | executable)
        for name in names:
            file = Path(parent, name)
            if not file.is_symlink():
                file.chmod(mode)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process that locks the file `path` is inside too; they wait. The file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        _lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _locked_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder that is removed at the end, and that `_sweep` leaves alone as long as this process lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=_SUFFIX, dir=parent))
        with suppress(FileNotFoundError):  # swept before it was locked: another one
            descriptor = os.open(folder, os.O_RDONLY)
            _lock(descriptor, wait=True)
            if folder.exists():
                break
            os.close(descriptor)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove the hidden folders of `prefix` whose writers are dead."""
    name = re.compile(re.escape(prefix) + r"\w{8}" + re.escape(_SUFFIX))
    for folder in [Path(entry) for entry in os.scandir(parent) if name.fullmatch(entry.name)]:
        with suppress(OSError):  # another user's, or swept by another process
            descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
            try:
                if _lock(descriptor, wait=False):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock an open file until it is closed or its process ends. False if another one holds it, or nothing can be locked here."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _file_mode(folder: Path) -> int:
    """The mode that the umask gives a file. (`os.umask` can only be read by changing it for all threads.)"""
    probe = folder / f".mode-{secrets.token_hex(4)}"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    probe.unlink()
    return mode

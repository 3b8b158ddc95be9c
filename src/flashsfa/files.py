"""Files and folders that are whole or not there, with the permissions that the umask allows; and the user's cache folder."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write a file to. It takes the name `path` when the block ends well, and is gone when it does not,
    with what stood at `path` unchanged. The file gets the mode that the umask allows, whatever the writer chose."""
    path = Path(path)
    beside, mode = _new_file(path.parent, path.name)
    try:
        yield beside
        beside.chmod(mode)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `path`, whole or not at all."""
    with whole_file(path) as beside:
        beside.write_bytes(content if isinstance(content, bytes) else content.encode())


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A new folder beside `path` to fill. It takes the name `path`, where at most an empty folder may stand, when the block ends
    well, and is gone when it does not. Modes as the umask allows, for all that was written into it."""
    path = Path(path)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield beside
        follow_umask(beside)
        beside.rename(path)  # takes the place of an empty folder, and of nothing else
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def follow_umask(folder: Path) -> None:
    """Give `folder` and all in it the modes that the umask allows: some libraries write files for their user alone."""
    probe, mode = _new_file(folder, "mode")
    probe.unlink()
    executable = mode >> 2 & 0o111  # whoever may read a folder may enter it
    for parent, _, names in os.walk(folder):
        os.chmod(parent, mode | executable)
        for name in names:
            file = Path(parent, name)
            if not file.is_symlink():
                file.chmod(mode)


def _new_file(folder: Path, name: str) -> tuple[Path, int]:
    """An empty file of a name that nothing else has, and the mode that the umask gave it. (`os.umask` can only be read by
    changing it for all threads.)"""
    while True:
        path = folder / f".{name}-{secrets.token_hex(4)}"
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            continue
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        return path, mode

"""Rows of a benchmark, where they were measured, the table on screen and the files that keep them."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from .timing import Timing

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class BaselineResult:
    """A baseline measured in the same interleaved runs as its case.

    Attributes:
        gb_per_s: bytes it must move over its median time.
        ratio: its median time over the case's: above 1 where the case is faster.
        moved_per_token: bytes it must move a token and kv head.
        competes: as in `cases.Baseline`.
    """

    timing: Timing
    gb_per_s: float
    ratio: float
    moved_per_token: float
    competes: bool = True


@dataclass(frozen=True)
class Row:
    """A case's outcome: "ok" with its figures, or "failed" or "skipped" with a note and no figures.

    Attributes:
        timing: milliseconds.
        gb_per_s: bytes that must be moved over the median time.
        roofline_percent: that, as a share of the bandwidth of a copy.
        bytes_moved: bytes a call must move.
        bytes_per_token: bytes held a token and kv head.
        moved_per_token: bytes that must be moved a token and kv head.
        v_rows_read: share of V rows that must be read, where only some are.
        error: norm of the output's error relative to fp64.
        backend, reason: what it ran on and why, as `flashsfa.explain()` says.
    """

    case: str
    facet: str
    curve: str
    n: int
    status: str
    note: str = ""
    timing: Timing | None = None
    gb_per_s: float | None = None
    roofline_percent: float | None = None
    bytes_moved: int | None = None
    bytes_per_token: float | None = None
    moved_per_token: float | None = None
    v_rows_read: float | None = None
    error: float | None = None
    backend: str = ""
    reason: str = ""
    baselines: Mapping[str, BaselineResult] = field(default_factory=dict)

    @property
    def fastest_baseline(self) -> str | None:
        """The baseline that competes and takes the least time."""
        names = [name for name, result in self.baselines.items() if result.competes]
        return min(names, key=lambda name: self.baselines[name].ratio, default=None)

    @property
    def ratio(self) -> float | None:
        """Time of the fastest baseline over the case's own."""
        fastest = self.fastest_baseline
        return None if fastest is None else self.baselines[fastest].ratio

    def summary(self) -> str:
        """One line, for the log of a run."""
        if self.timing is None:
            return f"{self.case}: {self.status}: {self.note}"
        ratio = "" if self.ratio is None else f", {self.ratio:.2f}x {self.fastest_baseline}"
        return f"{self.case}: {self.timing.median_ms:.4g} ms{ratio}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Results:
    """All rows of one run of `operation`.

    Attributes:
        environment: device, versions, commit and date, see `environment`.
        copy_bytes_per_s: the measured roofline.
    """

    operation: str
    environment: Mapping[str, str | None]
    copy_bytes_per_s: float
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        where = self.environment
        commit = f", commit {where['commit']}" if where["commit"] else ""
        return (
            f"flashsfa {where['flashsfa']}{commit}, {where['device']}, torch {where['torch']}; "
            f"copy {self.copy_bytes_per_s / 1e9:.0f} GB/s"
        )

    def save(self, directory: Path) -> list[Path]:
        """Write JSON and CSV under a name that carries date and commit and is free; returns their paths.

        Raises `OSError`, with neither left behind, if either cannot be written.
        """
        parts = [self.operation, str(self.environment["date"])[:10], self.environment["commit"]]
        document = {
            "operation": self.operation,
            "environment": dict(self.environment),
            "copy_gb_per_s": self.copy_bytes_per_s / 1e9,
            "rows": [asdict(row) | {"fastest_baseline": row.fastest_baseline, "ratio": row.ratio} for row in self.rows],
        }
        records = [_record(row) | dict(self.environment) for row in self.rows]
        columns = list(dict.fromkeys(column for record in records for column in record))
        directory.mkdir(parents=True, exist_ok=True)
        target = free_json(directory, "-".join(part for part in parts if part))
        paths = [target, target.with_suffix(".csv")]
        with all_or_none(paths):
            target.write_text(json.dumps(document, indent=1) + "\n")
            with paths[1].open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(records)
        return paths

    def table(self) -> Table:
        """The rows as a rich table, the notes of failed and skipped ones below it."""
        from rich.table import Table

        names = _baseline_names(self.rows)
        with_v_rows = any(row.v_rows_read is not None for row in self.rows)
        notes = [row.summary() for row in self.rows if row.note]
        table = Table(
            title=f"{self.operation}: {self.title}", title_justify="left",
            caption="\n".join(notes) or None, caption_justify="left",
        )  # fmt: skip
        table.add_column("case", no_wrap=True)
        figures = [
            "ms",
            "p20 to p80",
            "GB/s",
            "% of copy",
            "bytes a token",
            *(["V rows"] if with_v_rows else []),
            "error",
        ]
        for heading in (*figures, *(f"x {name.replace('_', ' ')}" for name in names), "x fastest"):
            table.add_column(heading, justify="right", no_wrap=heading in ("ms", "p20 to p80"))
        table.add_column("backend")
        for row in self.rows:
            if row.timing is None:
                table.add_row(row.case, row.status)
                continue
            timing, v_rows = row.timing, None if row.v_rows_read is None else 100 * row.v_rows_read
            table.add_row(
                row.case, f"{timing.median_ms:.4g}", f"{timing.p20_ms:.4g} to {timing.p80_ms:.4g}",
                _number(row.gb_per_s, ".4g"), _number(row.roofline_percent, ".3g"), _number(row.bytes_per_token, ".0f"),
                *([_number(v_rows, ".0f", " %")] if with_v_rows else []), _number(row.error, ".1e"),
                *(_number(row.baselines[n].ratio if n in row.baselines else None, ".2f") for n in names),
                _number(row.ratio, ".2f"), row.backend,
            )  # fmt: skip
        return table


def environment(device: torch.device) -> dict[str, str | None]:
    """What a figure depends on; None where something is not installed, or no commit is known."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "flashsfa": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "numba": _version("numba"),
        "python": platform.python_version(),
    }


def require_place(directory: Path) -> None:
    """Raise `OSError` if results cannot be written to `directory`, which may not exist yet; makes nothing."""
    there = directory.absolute()
    while not os.path.lexists(there):
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(f"cannot write results to {directory}: {there}: {error.strerror or error}") from error


@contextmanager
def all_or_none(paths: Iterable[Path]) -> Iterator[None]:
    """Removes the files at `paths` if what runs inside, which is to write them, fails."""
    try:
        yield
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise


def free_json(directory: Path, stem: str) -> Path:
    """An empty file of our own: `stem.json`, or with a number where earlier results stand."""
    for number in range(1, 10_000):
        path = directory / f"{stem}{f'-{number}' if number > 1 else ''}.json"
        taken = any(path.with_suffix(suffix).exists() for suffix in (".csv", ".png"))
        try:
            if not taken:
                path.touch(exist_ok=False)
                return path
        except FileExistsError:
            pass
    raise OSError(f"{directory} is full of results named {stem}: move some away")


def _record(row: Row) -> dict[str, Any]:
    """A row without nesting, for CSV."""
    record = {name: value for name, value in vars(row).items() if name not in ("timing", "baselines")}
    if row.timing:
        record |= asdict(row.timing)
    record |= {"fastest_baseline": row.fastest_baseline, "ratio": row.ratio}
    for name, result in row.baselines.items():
        record |= {f"{name}_{figure}": value for figure, value in asdict(result.timing).items()}
        record |= {f"{name}_gb_per_s": result.gb_per_s, f"{name}_ratio": result.ratio}
    return record


def _baseline_names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.baselines))


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = (line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line)
        name = next(models, name)
    return f"{name}, {torch.get_num_threads()} threads"


def _commit() -> str | None:
    """The commit of this source tree, "-dirty" with changes of its own; None outside a checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed copy inside another project's tree is not ours
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(here.parents[1]))
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None

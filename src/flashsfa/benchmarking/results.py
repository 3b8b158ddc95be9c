"""Rows of a benchmark, where they were measured, the table on screen and the files that keep them."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import __version__
from ..checks import require
from ..files import beside, write_whole
from .cases import rival_name
from .timing import Timing

if TYPE_CHECKING:
    from rich.table import Table


LEVEL = 0.005  # times that differ by less are called level


@dataclass(frozen=True)
class Generation:
    """What one side of a whole model's case takes beside the time of a token.

    Attributes:
        first_token_ms: reading one prompt, up to the first token; None where that was not timed.
        tokens_per_s: tokens of all sequences a second, after the first.
        peak_bytes: the most that was allocated at a time: weights, cache and work space; None where it was not measured.
        kv_bytes: of the whole cache, by arithmetic.
        kv_allocated: of the whole cache, as the allocator counts on a GPU.
    """

    first_token_ms: float | None
    tokens_per_s: float
    peak_bytes: int | None
    kv_bytes: int
    kv_allocated: int


@dataclass(frozen=True)
class Serving:
    """What one server gives and takes.

    Attributes:
        requests: at a time.
        tokens_per_s: output tokens of all requests a second.
        token_ms: from a token of a request to its next, the median.
        first_token_ms: reading one prompt that is not in the cache, up to the first token.
        capacity: tokens that the cache holds.
    """

    requests: int
    tokens_per_s: float
    token_ms: float
    first_token_ms: float
    capacity: int


@dataclass(frozen=True)
class BaselineResult:
    """A baseline measured beside its case.

    Attributes:
        gb_per_s: bytes it must move over its median time; None of a server.
        ratio: its median time over the case's: above 1 where the case is faster.
        moved_per_token: bytes it must move a token and kv head; None of a server.
        competes: as in `cases.Baseline`.
    """

    timing: Timing
    gb_per_s: float | None
    ratio: float
    moved_per_token: float | None
    competes: bool = True
    generation: Generation | None = None
    serving: Serving | None = None

    @property
    def whole(self) -> Generation | Serving | None:
        """What there is beside times, where a whole model was run."""
        return self.generation or self.serving


@dataclass(frozen=True)
class Row:
    """A case's outcome: "ok" with its figures, or "failed" or "skipped" with a note and no figures.

    Attributes:
        timing: milliseconds.
        gb_per_s: bytes that must be moved over the median time.
        tflops: 10^12 operations of the dense computation a second, where they are of interest.
        roofline_percent: that, as a share of the bandwidth of a copy.
        bytes_moved: bytes a call must move.
        bytes_per_token: bytes held a token and kv head.
        moved_per_token: bytes that must be moved a token and kv head.
        v_rows_read: share of V rows that must be read, where only some are.
        generation: of a whole model; `timing` is then that of a token.
        serving: of a server; `timing` is then that of an output token, whichever request's.
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
    tflops: float | None = None
    roofline_percent: float | None = None
    bytes_moved: int | None = None
    bytes_per_token: float | None = None
    moved_per_token: float | None = None
    v_rows_read: float | None = None
    generation: Generation | None = None
    serving: Serving | None = None
    error: float | None = None
    backend: str = ""
    reason: str = ""
    baselines: Mapping[str, BaselineResult] = field(default_factory=dict)

    @property
    def whole(self) -> Generation | Serving | None:
        """What there is beside times, where a whole model was run."""
        return self.generation or self.serving

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

    @property
    def against(self) -> str:
        """How it compares with the fastest baseline: "1.61x faster than cuDNN"."""
        fastest = self.fastest_baseline
        return "" if fastest is None else compared(self.baselines[fastest].ratio, rival_name(fastest))

    def summary(self) -> str:
        """One line, for the log of a run."""
        if self.timing is None:
            return f"{self.case}: {self.status}: {self.note}"
        ratio = f", {self.against}" if self.against else ""
        if self.whole is not None and self.whole.first_token_ms is not None:
            against = _against(
                self, "first_token_ms", lambda ours, theirs: f", {compared(theirs / ours, 'the fastest')}"
            )
            ratio += f", first token {self.whole.first_token_ms:.4g} ms{against}"
        return f"{self.case}: {self.timing.median_ms:.4g} ms{ratio}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Results:
    """All rows of one run of `operation`.

    Attributes:
        environment: device, versions, commit and date, see `environment`.
        copy_bytes_per_s: the measured roofline.
        incomplete: how much a run that was stopped has of what was to be measured; None of a whole one.
    """

    operation: str
    environment: Mapping[str, str | None]
    copy_bytes_per_s: float
    rows: tuple[Row, ...]
    incomplete: str | None = None

    @property
    def title(self) -> str:
        where = self.environment
        commit = f", commit {where['commit']}" if where["commit"] else ""
        versions = ", ".join(
            f"{name} {where[name]}" for name in ("torch", "triton", "numba", "vllm") if where.get(name)
        )
        stopped = "" if self.incomplete is None else f"; incomplete: {self.incomplete}"
        return (
            f"flashsfa {where['flashsfa']}{commit}, {where['device']}, {versions}; "
            f"copy {self.copy_bytes_per_s / 1e9:.0f} GB/s{stopped}"
        )

    def save(self, directory: Path, path: Path | None = None) -> Path:
        """Write JSON to `path`, which an earlier save of the run returned, or under a name in `directory` that carries date and commit
        and is free; returns its path.

        Raises `OSError`, with nothing left behind, if it cannot be written.
        """
        parts = [self.operation, str(self.environment["date"])[:10], self.environment["commit"]]
        document = {
            "operation": self.operation,
            **({} if self.incomplete is None else {"incomplete": self.incomplete}),
            "environment": dict(self.environment),
            "copy_gb_per_s": self.copy_bytes_per_s / 1e9,
            "rows": [asdict(row) | {"fastest_baseline": row.fastest_baseline, "ratio": row.ratio} for row in self.rows],
        }
        stem = "-".join(part for part in parts if part)
        content = json.dumps(document, indent=1) + "\n"
        if path is not None:
            write_whole(path, content)
            return path
        (path,) = write_results(directory, stem, {".json": lambda path: path.write_text(content)})
        return path

    def table(self, findings: Sequence[str] = ()) -> Table:
        """The rows as a rich table; below it the notes of rows, and what all say together (`findings.findings`)."""
        from rich.table import Table

        notes = [*(row.summary() for row in self.rows if row.note), *findings]
        table = Table(
            title=f"{self.operation}: {self.title}", title_justify="left",
            caption="\n".join(notes) or None, caption_justify="left",
        )  # fmt: skip
        columns = self._columns()
        table.add_column("case", no_wrap=True)
        for heading in columns:
            table.add_column(heading, justify="right", no_wrap=heading in ("ms", "p20 to p80"))
        table.add_column("backend")
        for row in self.rows:
            if row.timing is None:
                table.add_row(row.case, row.status)
            else:
                table.add_row(row.case, *(figure(row) for figure in columns.values()), row.backend)
        return table

    def _columns(self) -> dict[str, Callable[[Row], str]]:
        """What the table says of a row with a time, by heading."""
        if any(row.generation is not None for row in self.rows):
            columns = dict(_OF_MODELS)
        elif any(row.serving is not None for row in self.rows):
            columns = dict(_OF_SERVERS)
        else:
            columns = dict(_OF_KERNELS)
            if all(row.v_rows_read is None for row in self.rows):
                del columns["V rows"]
            if all(row.tflops is None for row in self.rows):
                del columns["dense TFLOP/s"]

        def ratio(row: Row, name: str) -> str:
            return _number(row.baselines[name].ratio if name in row.baselines else None, ".2f")

        columns |= {f"x {name.replace('_', ' ')}": partial(ratio, name=name) for name in _baseline_names(self.rows)}
        return columns | {"strongest rival": lambda row: row.against}


def compared(ratio: float, with_what: str = "") -> str:
    """A ratio of times in words: 1.61 as "1.61x faster", with "than" and `with_what` where it is named."""
    if abs(ratio - 1) < LEVEL:
        return f"level with {with_what}" if with_what else "level"
    words = f"{ratio:.2f}x faster" if ratio > 1 else f"{1 / ratio:.2f}x slower"
    return f"{words} than {with_what}" if with_what else words


def environment(device: torch.device) -> dict[str, str | None]:
    """What a figure depends on; None where something is not installed, or no commit is known."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "flashsfa": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "numba": _version("numba"),
        "vllm": _version("vllm"),
        "python": platform.python_version(),
    }


def write_results(directory: Path, stem: str, writers: Mapping[str, Callable[[Path], object]]) -> list[Path]:
    """Write a file a suffix (".json" first), all of one name: `stem`, or with a number where earlier results stand. Returns their
    paths.

    Raises `OSError`, with none of them there, if one cannot be written, and `ValueError` for a `stem` that is no file's name.
    """
    require(Path(stem).name == stem, f"results are named by their date and commit, and {stem!r} is no name of a file")
    try:
        with beside(directory / stem) as folder:
            for suffix, write in writers.items():
                write(folder / f"{stem}{suffix}")
            return _rename_together([folder / f"{stem}{suffix}" for suffix in writers], _free_json(directory, stem))
    except OSError as error:
        raise OSError(
            f"could not write results to {directory}: {error.strerror or error}; make room, or choose another place with -o"
        ) from error


def incomplete_note(paths: Sequence[Path]) -> str:
    """What an interrupt says of the files that it leaves."""
    return f"incomplete results are written: {', '.join(map(str, paths))}"


def _rename_together(files: Sequence[Path], target: Path) -> list[Path]:
    """Give all `files` the name of `target`, with their own suffixes, or none. Returns the new paths."""
    paths = [target.with_suffix(file.suffix) for file in files]
    try:
        for file, path in zip(files, paths, strict=True):
            file.replace(path)
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    return paths


def _free_json(directory: Path, stem: str) -> Path:
    """An empty file of our own: `stem.json`, or with a number where earlier results stand."""
    for number in range(1, 10_000):
        path = directory / f"{stem}{f'-{number}' if number > 1 else ''}.json"
        try:
            if not path.with_suffix(".png").exists():
                path.touch(exist_ok=False)
                return path
        except FileExistsError:
            pass
    raise OSError(f"{directory} is full of results named {stem}: move some away")


def _baseline_names(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.baselines))


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


_OF_KERNELS: dict[str, Callable[[Row], str]] = {
    "ms": lambda row: _of(row.timing, "median_ms", ".4g"),
    "p20 to p80": lambda row: f"{_of(row.timing, 'p20_ms', '.4g')} to {_of(row.timing, 'p80_ms', '.4g')}",
    "dense TFLOP/s": lambda row: _of(row, "tflops", ".0f"),
    "GB/s": lambda row: _of(row, "gb_per_s", ".4g"),
    "% of copy": lambda row: _of(row, "roofline_percent", ".3g"),
    "bytes per token": lambda row: _of(row, "bytes_per_token", ".0f"),
    "V rows": lambda row: _of(row, "v_rows_read", ".0%"),
    "error": lambda row: _of(row, "error", ".1e"),
}
# Beside the times: the most memory of all, and of the cache by arithmetic and by the allocator.
_OF_MODELS: dict[str, Callable[[Row], str]] = {
    "first token ms": lambda row: _of(row.generation, "first_token_ms", ".4g"),
    "first token": lambda row: _against(row, "first_token_ms", lambda ours, theirs: compared(theirs / ours)),
    "token ms": lambda row: _of(row.timing, "median_ms", ".4g"),
    "tokens/s": lambda row: _of(row.generation, "tokens_per_s", ".4g"),
    "peak GiB": lambda row: _of(row.generation, "peak_bytes", ".1f", 2**30),
    "KV GiB": lambda row: _of(row.generation, "kv_bytes", ".2f", 2**30),
    "allocated": lambda row: _of(row.generation, "kv_allocated", ".2f", 2**30),
    "less KV": lambda row: _against(row, "kv_allocated", lambda ours, theirs: f"{1 - ours / theirs:.1%}"),
    "error": lambda row: _of(row, "error", ".1e"),
}

# Beside the times: how many tokens fit, against the most of the others.
_OF_SERVERS: dict[str, Callable[[Row], str]] = {
    "requests": lambda row: _of(row.serving, "requests", ".0f"),
    "tokens/s": lambda row: _of(row.serving, "tokens_per_s", ".4g"),
    "token ms": lambda row: _of(row.serving, "token_ms", ".4g"),
    "first token ms": lambda row: _of(row.serving, "first_token_ms", ".4g"),
    "first token": lambda row: _against(row, "first_token_ms", lambda ours, theirs: compared(theirs / ours)),
    "capacity": lambda row: _of(row.serving, "capacity", ",.0f"),
    "x capacity": lambda row: _against(row, "capacity", lambda ours, theirs: f"{ours / theirs:.2f}", max),
    "error": lambda row: _of(row, "error", ".1e"),
}


def _of(owner: Any, figure: str, form: str, unit: int = 1) -> str:
    value = getattr(owner, figure, None)
    return "" if value is None else f"{value / unit:{form}}"


def _against(row: Row, figure: str, compare: Callable[[float, float], str], best: Callable[..., float] = min) -> str:
    """A figure of a whole model's row beside the best of the baselines, the smallest or the largest."""
    theirs = [getattr(result.whole, figure, None) for result in row.baselines.values()]
    known = [x for x in theirs if x is not None]
    ours = getattr(row.whole, figure, None)
    return compare(ours, best(known)) if ours is not None and known else ""


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

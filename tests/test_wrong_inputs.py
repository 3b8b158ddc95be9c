"""Inputs that are foreign or mean nothing: each command answers with exit code 2 and one line, and leaves nothing."""

import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest

from flashsfa.cli import main

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
import flashsfa.convert
from command_lines import assert_refused, command, everything

MOST = "1073741824"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("convert dense --topk 0", "--topk must be 1 to"),
        ("convert dense --topk 1.5", "invalid int"),
        ("convert dense --topk-query 0", "--topk-query must be 1 to"),
        ("convert dense --dense-dims -1", "--dense-dims must be 0 to"),
        ("convert dense --dense-dims 8", "dense_dims must be 0 to head_dim - 1 = 7"),
        ("convert dense --window 1", "--window must be 2 to"),
        ("convert dense --windows 100000000000000000000", f"--windows must be 1 to {MOST}"),
        ("convert dense --max-position 0", "--max-position must be"),
        ("convert dense --max-position 100000000000000000000", "--max-position must be"),
        ("convert dense --max-position 31", "--max-position must be at least the 32 tokens of a window"),
        ("convert dense --max-position 257", "and at most the model’s 256, got 257"),
        ("convert dense --window 300", "--window must be at most the model's 256 positions, got 300"),
        ("convert dense --dtype int8", "invalid choice"),
        ("convert dense -o ''", "-o/--output: '' names nothing"),
        ("convert dense --eval ''", "--eval: '' names nothing"),
        ("convert dense --calibrate a\0b", "names nothing"),
        ("convert ''", "MODEL: '' names nothing"),
        ("perplexity converted --window -2", "--window must be 2 to"),
        ("perplexity converted --windows 0", "--windows must be 1 to"),
        ("perplexity converted --window 300", "256 positions"),
        ("perplexity dense --topk 0", "--topk must be 1 to"),
        ("perplexity dense --topk 2 --dense-dims -1", "--dense-dims must be 0 to"),
        ("perplexity dense --topk 2 --max-position -5", "--max-position must be 2 to"),
        ("perplexity converted --text ''", "--text: '' names nothing"),
        ("perplexity converted -o ''", "names nothing"),
        ("perplexity converted --topk 2", "is converted already"),
        ("needle converted --lengths=-5,200", "--lengths must be 1 to"),
        ("needle converted --lengths 1" + 20 * "0", "--lengths must be 1 to"),
        ("needle converted --lengths ,", "no list of whole numbers"),
        ("needle converted --lengths ''", "no list of whole numbers"),
        ("needle converted --depths 50,101", "percents from 0 to 100"),
        ("needle converted --depths=-1", "percents from 0 to 100"),
        ("needle converted --depths nan", "no list of whole numbers"),
        ("needle converted --trials 0", "--trials must be 1 to"),
        ("lm-eval converted --limit 0", "--limit must be 1 to"),
        ("lm-eval converted --num-fewshot -1", "--num-fewshot must be 0 to"),
        ("lm-eval converted --batch-size 0", "--batch-size must be 1 to"),
        ("lm-eval dense --topk 2 --max-position 1", "--max-position must be 2 to"),
        ("bench decode --only nothing", "no case of decode has 'nothing' in its name; it has "),
        ("bench decode --only ''", "names nothing"),
        ("bench nothing", "invalid choice"),
        ("info nowhere/at/all", "no such directory"),
        ("info text.txt", "a file, not a directory"),
    ],
)
def test_options_that_mean_nothing(line, message, work, capfd, monkeypatch):
    monkeypatch.setattr("flashsfa.choose.gather_moments", None)  # before any calibration
    assert_refused(capfd, command(line), message)


@pytest.mark.parametrize("name", ["convert", "perplexity", "needle", "bench"])
@pytest.mark.parametrize("place", ["text.txt", "text.txt/below", "dangling", "x" * 300, "new/" + "x" * 300, "/proc/x"])
def test_places_that_cannot_be_written(name, place, work, capfd):
    (work / "dangling").symlink_to("nowhere")
    model = {"convert": "dense", "bench": "topk"}.get(name, "converted")
    assert_refused(capfd, command(f"{name} {model} -o {place}"))


def loop(path):
    path.symlink_to(path)


TEXTS = {
    "missing": (lambda path: None, "does not exist"),
    "loop": (loop, "is a broken link"),
    "broken link": (lambda path: path.symlink_to("nowhere"), "is a broken link"),
    "pipe": (os.mkfifo, "or no file"),
    "NUL": (lambda path: path.write_bytes(b"word1 \0 word2" * 900), "NUL"),
    "not UTF-8": (lambda path: path.write_bytes(b"\xff\xfe" * 900), "not UTF-8"),
    "blank": (lambda path: path.write_text(" \n\x1e\n"), "is empty"),
    "folder of none": (os.mkdir, "holds no .txt"),
    "folder of folders": (lambda path: (path / "a.txt").mkdir(parents=True), "holds no .txt"),
    "folder with a broken link": (lambda path: (path.mkdir(), loop(path / "a.txt")), "a.txt cannot be read"),
    "short": (lambda path: path.write_text("word1"), ""),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize(
    "line", ["convert dense --calibrate bad", "convert dense --eval bad", "perplexity converted --text bad"]
)
def test_texts_that_are_none(line, kind, work, capfd, monkeypatch):
    if kind != "short":  # which the tokenizer finds
        monkeypatch.setattr("flashsfa.convert.load_model", None)
        monkeypatch.setattr("flashsfa.evaluation.subject.load_model", None)
    make, message = TEXTS[kind]
    make(work / "bad")
    assert_refused(capfd, command(line), message)


@pytest.mark.parametrize("kind", [kind for kind in TEXTS if kind != "short"])  # hay is repeated
def test_hay_that_is_none(kind, work, capfd):
    make, message = TEXTS[kind]
    make(work / "bad")
    assert_refused(capfd, command("needle converted --text bad"), message)


def test_a_converted_model_is_not_converted_again(work, capfd):
    assert_refused(capfd, command("convert converted"), "is converted already", "flashsfa eval")


@pytest.mark.parametrize("missing", ["matplotlib", "rich", "transformers"])
@pytest.mark.parametrize("line", ["convert dense", "perplexity converted", "bench topk"])
def test_modules_that_are_missing(line, missing, work, capfd, monkeypatch):
    """Before any work: no model is loaded."""
    if line.startswith("bench") and missing == "transformers":
        line = "bench generate"
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr("flashsfa.models.load_model", None)
    for name in ("flashsfa.benchmarking.generate", "flashsfa.convert"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("flashsfa.benchmarking.generate", raising=False)
    assert_refused(capfd, command(line), missing, "pip install")


def test_names_are_no_markup(work, capfd):
    (work / "converted").rename(work / "a$[b]$\\x")
    assert main(command("needle a$[b]$\\x")) == 0
    (work / "dense").rename(work / "[nowhere]")
    assert main(command("perplexity [nowhere] --dense")) == 0
    assert "[nowhere]: perplexity" in capfd.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("line", ["convert dense -o new/out", "perplexity converted -o new/out"])
def test_signals_leave_no_results(line, number, code, work, capfd, monkeypatch):
    """They come while results are written, and SIGTERM again while these are removed. What convert has measured is kept, as it says, for
    the next run, which removes it."""

    stopped = []

    def ended(*args, **kwargs):
        stopped.append(number)
        os.kill(os.getpid(), number)
        raise AssertionError("still here")

    def remove(*args, **kwargs):
        if stopped == [signal.SIGTERM]:
            os.kill(os.getpid(), number)
        rmtree(*args, **kwargs)

    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", remove)
    short = lambda **options: CONVERT_SETTINGS(**options, contexts=(64,))  # noqa: E731
    monkeypatch.setattr(flashsfa.convert, "ConvertSettings", short)
    monkeypatch.setattr(Path, "write_text", ended)
    before = everything()
    handler = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert main(command(line)) == code
    finally:
        signal.signal(signal.SIGINT, interrupt)
    kept = ["./new", "./new/.out.measured.json"] if line.startswith("convert") else []
    said = f"; what was measured is kept in {work / kept[1]}: the same command goes on from there" if kept else ""
    assert capfd.readouterr().err.strip() == f"flashsfa: stopped{said}"
    assert everything() == sorted([*before, *kept])
    assert signal.getsignal(signal.SIGTERM) == handler
    if kept:
        monkeypatch.undo()
        monkeypatch.chdir(work)
        monkeypatch.setattr(flashsfa.convert, "ConvertSettings", short)
        assert main(command(line)) == 0
        assert "measured before: dense" in capfd.readouterr().out
        assert not os.path.exists(kept[1])


CONVERT_SETTINGS = flashsfa.convert.ConvertSettings


def test_commands_run_in_other_threads(work, capfd):
    """Which may not set signals."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["info", "converted"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_converted_model_can_be_read_by_those_whom_the_umask_lets(work, monkeypatch):
    short = lambda **options: CONVERT_SETTINGS(**options, contexts=(64,))  # noqa: E731
    monkeypatch.setattr(flashsfa.convert, "ConvertSettings", short)
    before = os.umask(0o027)
    try:
        assert main(command("convert dense -o new/out")) == 0
        assert main(command("perplexity new/out -o results")) == 0
    finally:
        os.umask(before)
    written = [*(work / "new").rglob("*"), work / "new", work / "results", *(work / "results").rglob("*")]
    assert {oct(path.stat().st_mode & 0o777) for path in written if path.is_file()} == {"0o640"}
    assert {oct(path.stat().st_mode & 0o777) for path in written if path.is_dir()} == {"0o750"}
    assert (work / "new" / "out" / "sfa" / "basis.safetensors") in written

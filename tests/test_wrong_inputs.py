"""Inputs that are damaged, foreign or mean nothing: each command answers with exit code 2 and one line, and leaves nothing."""

import json
import math
import os
import random
import shutil
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashsfa import FeatureBasis
from flashsfa.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from safetensors.torch import load_file, save_file  # noqa: E402

import flashsfa  # noqa: E402
import flashsfa.convert  # noqa: E402
from flashsfa.evaluation.perplexity import perplexity  # noqa: E402

WORDS = ["<unk>", "<pad>", *(f"word{i}" for i in range(60))]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dense model and a converted one, of two layers, in folders "dense" and "converted"."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", model_input_names=["input_ids", "attention_mask"]
    )
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=1, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = transformers.LlamaForCausalLM(config)
        basis = FeatureBasis(*(torch.eye(8).expand(2, 2, 8, 8) for _ in range(2)))
    folder = tmp_path_factory.mktemp("models")
    for name in ("dense", "converted"):
        if name == "converted":
            flashsfa.enable(model, topk=2, dense_dims=2, basis=basis)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def work(models, tmp_path, monkeypatch):
    """A folder of our own, the current one, with both models, a text and a folder of texts."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    text = " ".join(random.Random(0).choices(WORDS[2:], k=600))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(line):
    """The words of `line`, with the options that every run of its command has; those in `line` come last and count."""
    name, rest = line.split(" ", 1)
    shared = {
        "convert": "convert --dtype float32 --topk 2 --dense-dims 2 --window 32 --windows 2 --calibrate text.txt --eval text.txt -o out",
        "perplexity": "eval perplexity --dtype float32 --device cpu --window 32 --windows 2 --text text.txt -o out",
        "needle": "eval needle --dtype float32 --device cpu --lengths 200 --depths 50 --text text.txt -o out",
        "lm-eval": "eval lm-eval --tasks any -o out",
        "bench": "bench --quick --device cpu -o out",
        "info": "info",
    }
    return [*shared[name].split(), *(word.replace("''", "") for word in rest.split(" "))]


def assert_refused(capfd, arguments, *messages):
    """Exit code 2, one line on stderr with `messages`, and no file or folder more or less. Options that are no options bring the
    usage too."""
    before = everything()
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    error = capfd.readouterr().err
    assert code == 2, error
    lines = error.strip().splitlines()
    if lines[0].startswith("usage:"):
        lines = [line for line in lines if "error:" in line]
    assert len(lines) == 1, error
    assert lines[0].startswith("flashsfa")
    assert "error:" in lines[0]
    for message in messages:
        assert message in lines[0]
    assert everything() == before


def everything():
    """All files and folders here."""
    return sorted(os.path.join(parent, name) for parent, folders, files in os.walk(".") for name in (*folders, *files))


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
        ("bench decode --only nothing", "no case of decode has 'nothing'"),
        ("bench decode --only ''", "names nothing"),
        ("bench nothing", "invalid choice"),
        ("info nowhere/at/all", "no such directory"),
        ("info text.txt", "a file, not a directory"),
        ("info dense", "holds a dense model"),
    ],
)
def test_options_that_mean_nothing(line, message, work, capfd):
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
def test_texts_that_are_none(line, kind, work, capfd):
    make, message = TEXTS[kind]
    make(work / "bad")
    assert_refused(capfd, command(line), message)


@pytest.mark.parametrize("kind", [kind for kind in TEXTS if kind != "short"])  # hay is repeated
def test_hay_that_is_none(kind, work, capfd):
    make, message = TEXTS[kind]
    make(work / "bad")
    assert_refused(capfd, command("needle converted --text bad"), message)


def config(**fields):
    """Changes fields of config.json."""

    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def cut(name, share=0.5):
    def change(folder):
        file = folder / name
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])

    return change


def content(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: (folder / name).unlink()


def weights(edit):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def bigger_tokenizer(folder):
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["model"]["vocab"]["foreign"] = 1000
    file.write_text(json.dumps(tokenizer))


DAMAGES = {
    "no config": (remove("config.json"), "config.json is missing"),
    "config cut": (cut("config.json"), "no valid JSON"),
    "config list": (content("config.json", b'["sfa"]'), "config.json"),
    "config deep": (content("config.json", b"[" * 100_000), "nested too deeply"),
    "config binary": (content("config.json", bytes(range(256))), "no valid JSON"),
    "more layers": (config(num_hidden_layers=3), "misses model.layers.2"),
    "fewer layers": (config(num_hidden_layers=1), "holds model.layers.1"),
    "no heads": (config(num_attention_heads=0), "num_attention_heads"),
    "3 heads": (config(num_attention_heads=3), "attention heads"),
    "other width": (config(hidden_size=64), "other shapes"),
    "str": (config(max_position_embeddings="x"), "expected int"),
    "smaller vocabulary": (config(vocab_size=50), "[62, 32] for [50, 32]"),
    "weights cut": (cut("model.safetensors"), "damaged"),
    "header cut": (cut("model.safetensors", 0.001), "damaged"),
    "no bytes": (cut("model.safetensors", 0), "damaged"),
    "no weights": (remove("model.safetensors"), "model.safetensors"),
    "a tensor less": (weights(lambda w: w.pop("model.norm.weight")), "misses model.norm.weight"),
    "a tensor more": (weights(lambda w: w.update({"z": torch.zeros(1)})), "holds z"),
    "NaN": (weights(lambda w: w["lm_head.weight"].fill_(float("nan"))), "nan"),
    "no tokenizer": (lambda folder: [remove(f)(folder) for f in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
    "tokenizer cut": (cut("tokenizer.json"), "tokenizer"),
    "foreign tokenizer": (bigger_tokenizer, "token ids up to 1000, but a model of 62"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("line", ["convert dense", "perplexity converted", "perplexity dense --dense"])
def test_damaged_models(line, kind, work, capfd):
    damage, message = DAMAGES[kind]
    damage(work / line.split()[1])
    assert_refused(capfd, command(line), message)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("line", ["convert dense", "perplexity dense --topk 2 --dense-dims 2"])
def test_keys_that_are_not_finite(line, value, work, capfd):
    weights(lambda w: w["model.layers.1.self_attn.k_proj.weight"][0].fill_(value))(work / "dense")
    assert_refused(capfd, command(line), "queries or keys hold NaN or infinity")


@pytest.mark.parametrize("kind", ["generation_config.json", "config deep", "a tensor less", "foreign tokenizer"])
def test_damaged_models_among_needles(kind, work, capfd):
    damage, message = DAMAGES.get(kind) or (cut(kind), kind)
    damage(work / "converted")
    assert_refused(capfd, command("needle converted"), message)


@pytest.mark.parametrize("names", [[5], 5, "Llama", {"a": 1}])
def test_architectures_that_are_none(names, work, capfd):
    config(architectures=names)(work / "converted")
    assert_refused(capfd, command("info converted"), "architectures in config.json")


@pytest.mark.parametrize("settings", [None, [1], "topk", 3, True, False, {}, {"topk": "2"}, {"bogus": 1}])
@pytest.mark.parametrize("line", ["info converted", "perplexity converted", "needle converted"])
def test_settings_that_are_none(line, settings, work, capfd):
    config(sfa=settings)(work / "converted")
    assert_refused(capfd, command(line))


def test_a_model_of_another_kind(work, capfd):
    """What was switched and saved as a classifier loads as one."""
    model = transformers.LlamaForSequenceClassification.from_pretrained("dense", num_labels=3, pad_token_id=1)
    flashsfa.enable(model, topk=2).save_pretrained("converted")
    capfd.readouterr()
    assert_refused(capfd, command("perplexity converted"), "LlamaForSequenceClassification", "no causal language model")


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


class Certain:
    """Stands in for a model: its logits are `value` for one token and 0 for the other."""

    device, dtype = "cpu", torch.float32

    def __init__(self, value):
        self.value = value

    def __call__(self, input_ids, **options):
        return SimpleNamespace(logits=torch.tensor([0, self.value]).expand(*input_ids.shape, 2))


@pytest.mark.cpu
def test_a_loss_without_perplexity():
    windows = torch.zeros(1, 4, dtype=torch.long)
    assert perplexity(Certain(3.0), windows) == pytest.approx(1 + math.exp(3))
    for value in (float("nan"), float("inf"), 1e5):
        with pytest.raises(ValueError, match="no working model has"):
            perplexity(Certain(value), windows)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("line", ["convert dense -o new/out", "perplexity converted -o new/out"])
def test_signals_leave_nothing(line, number, code, work, capfd, monkeypatch):
    """They come while results are written, and SIGTERM again while these are removed."""

    def ended(*args, **kwargs):
        os.kill(os.getpid(), number)
        raise AssertionError("still here")

    def remove(*args, **kwargs):
        if number == signal.SIGTERM:
            os.kill(os.getpid(), number)
        rmtree(*args, **kwargs)

    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", remove)
    short = lambda **options: CONVERT_SETTINGS(**options, contexts=(64,))  # noqa: E731
    monkeypatch.setattr(flashsfa.convert, "ConvertSettings", short)
    monkeypatch.setattr(Path, "write_text", ended)
    before = everything()
    handler = signal.getsignal(signal.SIGTERM)
    assert main(command(line)) == code
    assert capfd.readouterr().err.strip() == "flashsfa: stopped"
    assert everything() == before
    assert signal.getsignal(signal.SIGTERM) == handler


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

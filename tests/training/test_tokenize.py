"""Token files and the tokenizer beside them: written together or not at all; damaged ones are refused."""

import os
import stat

import numpy as np
import pytest

from flashsfa.cli import main
from tiny import VOCABULARY, refused, run, transformers


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("w3")
    return path


def tokenize(text, tokenizer, output):
    return main(["train", "tokenize", str(text), "--tokenizer", str(tokenizer), "-o", str(output)])


def another(converted, path):
    """A tokenizer of another vocabulary."""
    saved = (converted / "tokenizer.json").read_text().replace('"w3"', '"x3"')
    path.mkdir()
    (path / "tokenizer.json").write_text(saved)
    (path / "tokenizer_config.json").write_text((converted / "tokenizer_config.json").read_text())
    return path


def test_tokenize_writes_a_token_file_and_its_tokenizer(tmp_path, converted_model, text, capsys):
    out = tmp_path / "out.npy"
    assert tokenize(text, converted_model, out) == 0
    assert np.load(out).tolist() == [3, 0]
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")) == VOCABULARY
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE((tmp_path / "tokenizer/tokenizer.json").stat().st_mode)
    capsys.readouterr()
    refused(capsys, tokenize(text, converted_model, out), "name a new file")
    (tmp_path / "link.npy").symlink_to("nowhere")
    refused(capsys, tokenize(text, converted_model, tmp_path / "link.npy"), "name a new file")


def test_token_files_of_one_tokenizer_share_a_folder(tmp_path, converted_model, text):
    assert tokenize(text, converted_model, tmp_path / "one.npy") == 0
    before = (tmp_path / "tokenizer" / "tokenizer.json").stat().st_ino
    assert tokenize(text, tmp_path / "tokenizer", tmp_path / "two.npy") == 0
    assert (tmp_path / "tokenizer" / "tokenizer.json").stat().st_ino == before


def test_another_tokenizer_is_not_replaced(tmp_path, converted_model, text, capsys):
    (tmp_path / "data").mkdir()
    assert tokenize(text, another(converted_model, tmp_path / "another"), tmp_path / "data" / "one.npy") == 0
    kept = (tmp_path / "data" / "tokenizer" / "tokenizer.json").read_text()
    capsys.readouterr()
    refused(
        capsys, tokenize(text, converted_model, tmp_path / "data" / "two.npy"), "is not the tokenizer of these tokens"
    )
    assert (tmp_path / "data" / "tokenizer" / "tokenizer.json").read_text() == kept
    assert not (tmp_path / "data" / "two.npy").exists()


def test_what_stands_in_the_tokenizers_place_stays(tmp_path, converted_model, text, capsys):
    (tmp_path / "tokenizer").write_text("mine")
    refused(capsys, tokenize(text, converted_model, tmp_path / "out.npy"), "is not the tokenizer of these tokens")
    (tmp_path / "tokenizer").unlink()
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "notes").touch()
    refused(capsys, tokenize(text, converted_model, tmp_path / "out.npy"), "is not the tokenizer of these tokens")
    assert not (tmp_path / "out.npy").exists()
    (tmp_path / "tokenizer" / "notes").unlink()
    assert tokenize(text, converted_model, tmp_path / "out.npy") == 0


@pytest.mark.parametrize("blank", ["", "\n \n\t\n", "\x1e\n\x1e\n\x1e\n"])
def test_a_text_without_words_makes_no_token_file(tmp_path, converted_model, capsys, blank):
    (tmp_path / "blank.txt").write_text(blank)
    code = tokenize(tmp_path / "blank.txt", converted_model, tmp_path / "out.npy")
    refused(capsys, code, "blank.txt")
    assert not (tmp_path / "out.npy").exists()
    assert not (tmp_path / "tokenizer").exists()


@pytest.mark.parametrize("name", ["pipe.txt", "loop.txt", "folder.txt"])
def test_what_is_no_text_file_is_refused(tmp_path, converted_model, capsys, name):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("w3")
    if name == "pipe.txt":
        os.mkfifo(folder / name)
    elif name == "loop.txt":
        (folder / name).symlink_to(name)
    else:
        (folder / name).mkdir()
    refused(
        capsys, tokenize(folder, converted_model, tmp_path / "out.npy"), f"{name} is no file that can be read as text"
    )
    assert tokenize(folder / name, converted_model, tmp_path / "out.npy") == 2


@pytest.mark.parametrize("part", ["tokens", "tokenizer"])
def test_a_full_disk_leaves_neither_tokens_nor_tokenizer(tmp_path, converted_model, text, capsys, monkeypatch, part):
    def full(*_, **__):
        raise (OSError(28, "No space left on device") if part == "tokens" else Exception("No space left on device"))

    where = "numpy.save" if part == "tokens" else "transformers.PreTrainedTokenizerFast.save_pretrained"
    monkeypatch.setattr(where, full)
    refused(capsys, tokenize(text, converted_model, tmp_path / "out.npy"), "out.npy could not be written")
    assert [p.name for p in tmp_path.iterdir()] == [text.name]


def npy(path, header, body=b""):
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body)


DAMAGED = {
    "no header": lambda p: p.write_bytes(b""),
    "junk": lambda p: p.write_bytes(bytes(range(256))),
    "pickle": lambda p: np.save(p, np.array([{1: 2}], dtype=object), allow_pickle=True),
    "archive": lambda p: np.savez(p.open("wb"), ids=np.ones(100, np.uint16)),
    "open brackets": lambda p: npy(p, b"{" * 118),
    "deep brackets": lambda p: npy(p, b"(" * 5000 + b"\n"),
    "long header": lambda p: p.write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 118),
    "huge shape": lambda p: npy(p, b"{'descr': '<u2', 'fortran_order': False, 'shape': (%d,)}\n" % 10**30),
    "negative shape": lambda p: npy(p, b"{'descr': '<u2', 'fortran_order': False, 'shape': (-5,)}\n", b"0" * 100),
    "cut": lambda p: (np.save(p, np.ones(1000, np.uint16)), p.write_bytes(p.read_bytes()[:1001])),
    "floats": lambda p: np.save(p, np.ones(1000, np.float32)),
    "two rows": lambda p: np.save(p, np.ones((2, 100), np.uint16)),
    "no rows": lambda p: np.save(p, np.uint16(3)),
    "big-endian": lambda p: np.save(p, np.ones(1000, ">u2")),
    "folder": lambda p: p.mkdir(),
    "loop": lambda p: p.symlink_to(p),
    "no tokens": lambda p: np.save(p, np.empty(0, np.uint16)),
    "ids past the vocabulary": lambda p: np.save(p, np.full(1000, 60000, np.uint16)),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_token_file_is_refused_by_every_command(tmp_path, content, converted_model, capsys, name):
    pytest.importorskip("matplotlib")
    path = tmp_path / "ids.npy"
    DAMAGED[name](path)
    refused(capsys, run(tmp_path, content, "--set", f"data.train={path}"), "data.train")
    command = ["train", "support", str(converted_model), "--text", str(path), "--window", "16"]
    refused(capsys, main([*command, "-o", str(tmp_path / "out")]), "--text")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out").exists()

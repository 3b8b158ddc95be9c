"""Data: documents, token files, windows and needles."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flashsfa.training import needle
from flashsfa.training.data import IGNORED, Collator, TokenStream, Windows, read_stream, tokenize


class Letters:
    """A tokenizer of one token a character."""

    eos_token_id = 0

    def __init__(self, size=128):
        self._size = size

    def __len__(self):
        return self._size

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def test_text_becomes_documents_that_end_with_the_separator(tmp_path):
    (tmp_path / "a.txt").write_text("ab\n\x1e\ncd\n")
    (tmp_path / "b.md").write_text("e")
    (tmp_path / "c.py").write_text("no text")
    ids = read_stream(str(tmp_path), "data.train", Letters(), None).ids
    assert "".join(map(chr, ids)) == "ab\n\0cd\n\0e\0"
    assert ids.dtype == np.uint16
    assert tokenize(iter(["a"]), Letters(1 << 17), 0).dtype == np.uint32
    with pytest.raises(ValueError, match="does not fit uint32"):
        tokenize(iter(["a"]), Letters((1 << 32) + 1), 0)


def test_an_empty_text_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"data.train: folder .* holds no"):
        read_stream(str(tmp_path), "data.train", Letters(), None)
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="is empty"):
        read_stream(str(tmp_path), "data.train", Letters(), None)


def test_datasets_are_a_source(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text('{"text": "ab"}\n{"text": "c"}\n')
    ids = read_stream(f"datasets:{tmp_path}:train", "data.train", Letters(), None).ids
    assert "".join(map(chr, ids)) == "ab\0c\0"
    with pytest.raises(ValueError, match=r"data.train: datasets:.* cannot be loaded"):
        read_stream(f"datasets:{tmp_path}:nothing", "data.train", Letters(), None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [('{"text": 1}\n{"text": 2}\n', "the column text of datasets:"), ('{"body": "a"}\n', "has no column text")],
)
def test_datasets_without_text_are_refused(tmp_path, rows, message):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=message):
        read_stream(f"datasets:{tmp_path}:train", "data.train", Letters(), None)


def test_rows_of_datasets_without_text_are_left_out(tmp_path, capfd):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text('{"text": "ab"}\n{"text": null}\n{"text": " "}\n{"text": "c"}\n')
    ids = read_stream(f"datasets:{tmp_path}:train", "data.train", Letters(), None).ids
    assert "".join(map(chr, ids)) == "ab\0c\0"
    assert "100%" not in capfd.readouterr().err


def test_ids_past_the_vocabulary_are_an_error():
    with pytest.raises(ValueError, match="ids past its vocabulary of 128"):
        tokenize(iter(["\U0001f600"]), Letters(), 0)
    assert tokenize(iter(["a"]), Letters(), 1 << 16).tolist() == [ord("a"), 1 << 16]  # a separator of a larger model


def test_each_pass_shows_every_window_once_in_another_order():
    stream = TokenStream(np.arange(100, dtype=np.uint16), None)
    windows = Windows(stream, 10, 20, seed=3)
    starts = [int(windows[i]["input_ids"][0]) for i in range(20)]
    assert sorted(starts[:10]) == sorted(starts[10:]) == list(range(0, 100, 10))
    assert starts[:10] != starts[10:]
    again = Windows(stream, 10, 20, seed=3)
    assert [int(again[i]["input_ids"][0]) for i in (12, 3, 19)] == [starts[i] for i in (12, 3, 19)]


def test_packed_documents_have_bounds_positions_and_no_label_across_them():
    batch = Collator(separator=0)([{"input_ids": torch.tensor(ids)} for ids in ([5, 0, 6, 7], [8, 9, 0, 0])])
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 4, 7, 8]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 2, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 0, IGNORED, 7], [IGNORED, 9, 0, IGNORED]]


def test_needles_are_found_where_they_were_hidden():
    windows = needle.NeedleWindows(12, 50, seed=1)
    for window in (windows[i] for i in range(50)):
        ids, (answer,) = window["input_ids"], (window["labels"] != IGNORED).nonzero()[0].tolist()
        assert ids[answer - 1] == needle.QUESTION
        assert (ids == ids[answer]).sum() == 2
        assert (ids == needle.HAY).sum() == 12 - 3
    assert torch.equal(windows[7]["input_ids"], needle.NeedleWindows(12, 9, seed=1)[7]["input_ids"])

    class Oracle:
        device = "cpu"

        def __call__(self, input_ids, **_):
            needles = input_ids[input_ids >= needle.FIRST_NEEDLE]
            assert input_ids[0, -1] == needle.QUESTION
            return type("Out", (), {"logits": F.one_hot(needles[None] + self.shift, needle.VOCABULARY + 1)})

    Oracle.shift = 0
    assert needle.needle_accuracy(Oracle(), [8, 12], 5, seed=0) == {8: 1.0, 12: 1.0}
    Oracle.shift = 1
    assert needle.needle_accuracy(Oracle(), [8], 5, seed=0) == {8: 0.0}

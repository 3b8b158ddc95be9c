"""Decode compiled by numba in processes of all kinds: forked ones, ones that can keep no compiled code, other defaults of torch."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from decode_cases import DecodeRules, decode
from flashsfa import sparse_feature_decode, topk_codes
from flashsfa.ops.cpu import threads
from flashsfa.ops.decode import cpu as decode_numba
from flashsfa.ops.decode.cpu import values
from numba_marks import NUMBA

pytestmark = NUMBA

PROGRAM = """
import multiprocessing, os, threading
import torch, flashsfa
torch.set_num_threads(1)
torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 6, 16) for _ in range(3))
codes = flashsfa.topk_codes(k, 4)
def decode(*_):
    out = flashsfa.sparse_feature_decode(q, codes, v)
    return "one thread" in flashsfa.explain(), out.tolist()
def in_fork():
    "What a forked child decodes, through a pipe."
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, repr(decode()).encode())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    os.close(write)
    with os.fdopen(read) as file:
        return eval(file.read())
"""


def run(program, **environment):
    """What a program prints, and what it logs."""
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM + program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    return found.stdout, found.stderr


@pytest.mark.parametrize(
    "program",
    [
        "one, expected = decode(); assert not one; assert in_fork() == (True, expected)",
        "one, expected = in_fork(); assert not one; assert decode() == (False, expected)",  # no thread had started
        # two generations
        """
expected = decode()[1]
if (child := os.fork()) == 0:
    assert in_fork() == (True, expected) == decode()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert decode() == (False, expected)
""",
        """
expected = decode()[1]
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(decode, range(4)) == [(True, expected)] * 4
""",
        # other threads are decoding, one of them holding the lock
        """
expected, ended = decode()[1], threading.Event()
def many():
    while not ended.is_set():
        decode()
threads = [threading.Thread(target=many) for _ in range(3)]
for thread in threads: thread.start()
for _ in range(5): assert in_fork() == (True, expected)
ended.set()
for thread in threads: thread.join()
""",
    ],
    ids=["after a decode", "before any", "twice", "pool", "beside threads"],
)
def test_forked_children_decode(program):
    run(program)


def test_a_child_says_that_it_has_one_thread():
    _, log = run("decode(); in_fork()")
    assert log.count("on one thread: this process was forked") == 1


def test_without_a_place_for_compiled_code():
    printed, log = run("print(decode()[0])", FLASHSFA_CACHE="/dev/null/nowhere", NUMBA_CACHE_DIR="")
    assert printed == "False\n"
    assert log.count("compiled code cannot be kept in /dev/null/nowhere") == 1


def draw(m=1, n=70):
    return torch.randn(2, 6, m, 16), topk_codes(torch.randn(2, 2, n, 16), 4), torch.randn(2, 2, n, 24)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "cannot be kept in"),
        (EOFError("Ran out of input"), "is damaged"),
        (pickle.UnpicklingError("pickle data was truncated"), "is damaged"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else "",
)
def test_compiled_code_that_cannot_be_kept_or_read(error, said, monkeypatch, caplog, tmp_path):
    """The kernel runs, one line says so, and what is damaged is gone."""
    q, codes, v = draw()
    expected = decode(decode_numba, q, codes, v, DecodeRules(), 1.0, 0.0)
    kernel, errors = values.sum_rows._compiled[True], [error]
    (damaged := tmp_path / "kept").mkdir()

    def first_fails(*arguments):
        if errors:
            raise errors.pop()
        kernel(*arguments)

    monkeypatch.setattr(values.sum_rows, "_called", set())
    monkeypatch.setattr(values.sum_rows, "_compiled", {})
    monkeypatch.setattr(threads, "_folder", lambda parallel: damaged)
    monkeypatch.setattr(values.sum_rows, "_compile", lambda parallel, folder: first_fails)
    for found, same in zip(decode(decode_numba, q, codes, v, DecodeRules(), 1.0, 0.0), expected, strict=True):
        torch.testing.assert_close(found, same, rtol=0, atol=0)
    assert caplog.text.count(said) == 1
    assert damaged.exists() == (said != "is damaged")


def test_the_users_numba_settings_stay():
    import numba

    q, codes, v = draw()
    before = numba.config.CACHE_DIR, numba.config.SLP_VECTORIZE, numba.get_num_threads()
    decode(decode_numba, q, codes, v, DecodeRules(), 1.0, 0.0)
    assert (numba.config.CACHE_DIR, numba.config.SLP_VECTORIZE, numba.get_num_threads()) == before


@pytest.mark.parametrize(
    ("change", "back"),
    [
        (lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)),
        (lambda: torch.set_default_dtype(torch.bfloat16), lambda: torch.set_default_dtype(torch.float32)),
        (lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)),
    ],
    ids=["float64", "bfloat16", "meta"],
)
@pytest.mark.parametrize("topk_query", [None, 16])
def test_other_defaults_of_torch(change, back, topk_query):
    q, codes, v = draw(m=3)
    rules = {"kv_lens": torch.tensor([70, 31]), "window": 20, "topk_query": topk_query, "return_lse": True}
    expected = sparse_feature_decode(q, codes, v, **rules)
    try:
        change()
        found = sparse_feature_decode(q, codes, v, **rules)
    finally:
        back()
    for x, y in zip(found, expected, strict=True):
        assert (x.dtype, x.device) == (y.dtype, y.device)
        assert np.array_equal(x.numpy(), y.numpy())


@pytest.mark.parametrize("topk_query", [None, 16])
@pytest.mark.parametrize(("batch", "m", "n"), [(2, 0, 70), (0, 1, 70), (2, 1, 0), (2, 3, 0), (0, 0, 0)])
def test_nothing_to_decode(batch, m, n, topk_query):
    q, k, v = torch.randn(batch, 6, m, 16), torch.randn(batch, 2, n, 16), torch.randn(batch, 2, n, 24)
    out, lse = sparse_feature_decode(q, topk_codes(k, 4), v, topk_query=topk_query, return_lse=True)
    assert out.shape == (batch, 6, m, 24)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()

"""`flashsfa bench serve` without a server: what a row says of what servers gave. With them: tests/vllm/test_bench."""

import json
import sys
from dataclasses import replace

import pytest
import torch

from flashsfa import benchmarking
from flashsfa.benchmarking.results import Results, Serving
from flashsfa.benchmarking.timing import Timing
from flashsfa.cli import main

pytest.importorskip("transformers")
from flashsfa.benchmarking import serve
from flashsfa.benchmarking.cases import UnavailableError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def served(token_ms, capacity, error=1e-3, first=50.0, most=4):
    """A server that makes a token in `token_ms` and takes up to `most` requests."""
    load = Timing(token_ms, token_ms, token_ms), Serving(most, 1e3 / token_ms, most * token_ms, first, capacity)
    return serve._Served(error, {1: load, 4: load if most >= 4 else None})


@pytest.fixture
def row(monkeypatch):
    """`row(ours, requests, **dense)`: of servers that gave these, or failed for these reasons."""

    def row(ours, requests=4, **dense):
        case = serve.ServeCase("tiny", "8+k8", False, 512, requests, (1, 4), CPU)
        monkeypatch.setattr(serve.ServeCase, "_dense", lambda self: {name: name for name in dense})
        monkeypatch.setattr(serve, "_measured", lambda side, quick: dense.get(side, ours))
        return benchmarking.run_case(case, 1e9, quick=True)

    return row


def test_a_row_compares_servers(row):
    found = row(served(2.0, 3000, first=40.0), cpu_float32=served(3.0, 1000), cpu_fp8=served(2.5, 2000))
    assert (found.status, found.note) == ("ok", "")
    assert found.ratio == pytest.approx(1.25)
    assert found.fastest_baseline == "cpu_fp8"
    assert found.serving.tokens_per_s == pytest.approx(500)
    assert found.summary() == (
        "tiny, eager, 8+k8, 4 requests, n=512: 2 ms, 1.25x faster than cpu fp8, first token 40 ms, 1.25x faster than the fastest"
    )
    results = Results("serve", {"flashsfa": "0", "commit": None, "device": "x", "vllm": "0.32.0"}, 1e9, (found,))
    assert "vllm 0.32.0" in results.title
    columns = {column.header: next(column.cells) for column in results.table().columns}
    assert columns["x capacity"] == "1.50"
    assert columns["capacity"] == "3,000"


def test_a_side_that_fails_is_a_note(row):
    found = row(
        served(2.0, 3000),
        cpu_float32=served(3.0, 1000, most=1),
        cpu_fp8=RuntimeError("the server ended: ValueError: no"),
    )
    assert found.status == "ok"
    assert found.baselines == {}
    assert found.note == "cpu_fp8: the server ended: ValueError: no; cpu_float32: fewer than 4 requests fit its cache"


def test_a_busy_host_is_a_note(row, monkeypatch):
    monkeypatch.setattr(serve.os, "cpu_count", lambda: 32)
    for load, note in ((5.0, ""), (60.2, "the host was busy, with a load of 60 on 32 cores")):
        monkeypatch.setattr(serve.os, "getloadavg", lambda load=load: (load, 1.0, 1.0))
        assert serve._busy() == note
    found = row(replace(served(2.0, 3000), host=note), cpu_float32=served(3.0, 1000))
    assert (found.status, found.note) == ("ok", f"ours: {note}")


@pytest.mark.parametrize(
    ("ours", "dense", "status", "words"),
    [
        (
            served(2.0, 3000, error=4e-3),
            served(3.0, 1000),
            "failed",
            "made tokens are 4.0e-03 from read ones, allowed 3.0e-03",
        ),
        (served(2.0, 3000, error=float("nan")), served(3.0, 1000), "failed", "made tokens are nan"),
        (
            RuntimeError("the server ended: ValueError: no"),
            served(3.0, 1000),
            "failed",
            "the server ended: ValueError: no",
        ),
        (served(2.0, 3000), RuntimeError("it said nothing"), "skipped", "no dense server ran: it said nothing"),
        (served(2.0, 3000, most=1), served(3.0, 1000), "skipped", "fewer than 4 requests fit"),
        (UnavailableError("vLLM does not see the plugin"), served(3.0, 1000), "skipped", "does not see the plugin"),
    ],
)
def test_what_is_no_figure(row, ours, dense, status, words):
    found = row(ours, cpu_float32=dense)
    assert (found.status, found.timing) == (status, None)
    assert words in found.note


def test_a_run_is_written(tmp_path, monkeypatch):
    def measured(side, quick):
        found = served(2.0 if "sfa" in side.arguments[0] else 3.0, 3000)
        return serve._Served(found.error, dict.fromkeys(side.at_a_time, found.load(4)))

    monkeypatch.setattr(serve, "_measured", measured)
    names = []
    _, (path, picture) = benchmarking.run(
        "serve", device=CPU, quick=True, directory=tmp_path, only=["8+k8-int8"], on_start=names.append,
        on_row=lambda row: names.append(row.case),
    )  # fmt: skip
    assert names == [2, "tiny, eager, 8+k8-int8, 2 requests, n=512", "tiny, eager, 8+k8-int8, all that fit, n=512"]
    assert picture.stat().st_size > 0
    document = json.loads(path.read_text())
    assert "vllm" in document["environment"]
    for row in document["rows"]:
        assert row["status"] == "ok"
        assert row["ratio"] == pytest.approx(1.5)
        assert row["serving"]["capacity"] == row["baselines"]["cpu_fp8"]["serving"]["capacity"] == 3000


def test_the_cases_of_a_gpu():
    """Two shapes, eager and with graphs, two lengths, three caches, three numbers of requests; servers are asked in a row."""
    cases = serve.cases(CUDA, quick=False)
    assert len({case.name for case in cases}) == len(cases) == 72
    assert {case.n for case in cases} == {8192, 32768}
    case = next(case for case in cases if case.name == "qwen3-8b, CUDA graphs, 16+k16-int8, all that fit, n=32k")
    settings = {"topk": 16, "topk_query": "dense", "dense_dims": 16, "cache_dtype": "int8", "has_basis": True}
    assert case._settings() == settings
    whole = next(case for case in cases if case.code == "dense-int8")
    assert whole._settings() == settings | {"topk": 128, "dense_dims": 0, "cache_dtype": "d8s8v8"}
    ours = case._side(f"--hf-overrides={json.dumps({'sfa': settings})}").command("model", 8000)
    bf16, fp8 = (side.command("model", 8000) for side in case._dense().values())
    assert [*bf16[:-1], ours[-1]] == ours
    assert bf16[-1] == "--attention-backend=FLASH_ATTN"
    assert fp8 == [*bf16, "--kv-cache-dtype=fp8"]
    assert "--enforce-eager" not in ours
    assert ours[ours.index("--dtype") + 1] == "bfloat16"


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "INFO a\n(pid=1) ERROR ValueError: no room\nRuntimeError: Engine core initialization failed.\n",
            "ValueError: no room",
        ),
        ("killed\n", "killed"),
        ("", "it said nothing"),
    ],
)
def test_the_reason_in_a_log(log, reason):
    assert serve._reason(log) == reason


def test_without_vllm_the_command_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main(["bench", "serve"]) == 2
    assert "[vllm]" in capsys.readouterr().err


def test_prompts_have_no_more_characters_than_their_tokens_can_have():
    """vLLM refuses those before it reads them."""
    words = serve._tokenizer(2000)
    text = words.decode(range(990, 1010))
    assert words(text).input_ids == [*range(990, 1010)]
    assert len(text) <= 20 * max(map(len, words.get_vocab()))

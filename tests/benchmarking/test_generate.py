"""`flashsfa bench generate`: whole models, checked before they are timed, each side with the memory to itself."""

import json

import pytest
import torch

from flashsfa import benchmarking
from flashsfa.benchmarking import results, timing

pytest.importorskip("transformers")
from flashsfa.benchmarking import generate, models, plain
from flashsfa.benchmarking.generate import GenerateCase
from flashsfa.cli import main

CPU = torch.device("cpu")


def case(batch=2, n=256, dense_dims=8):
    return GenerateCase("tiny", 8, dense_dims, batch, n, torch.float32, CPU)


def test_a_row_holds_times_and_bytes():
    row = benchmarking.run_case(case(), 1e9, quick=True)
    assert row.status == "ok", row.note
    a_token = 8 * 4 + 8 * 5 + 64 * 4
    assert row.bytes_per_token == a_token
    assert set(row.baselines) == {"sdpa", "sdpa_unmasked"}
    assert row.ratio > 0
    sides = [row.generation, *(baseline.generation for baseline in row.baselines.values())]
    rows = 2 * 256 * 2 * 2  # sequences, tokens, kv heads, layers
    assert [side.kv_bytes for side in sides] == [rows * a_token, *2 * [rows * 2 * 64 * 4]]
    assert [side.kv_allocated for side in sides] == [side.kv_bytes for side in sides]
    assert all(side.first_token_ms > 0 and side.peak_bytes is None for side in sides)
    assert row.generation.tokens_per_s == pytest.approx(2e3 / row.timing.median_ms)


def test_a_long_prompt_is_not_read(monkeypatch):
    monkeypatch.setattr(generate, "LONGEST_PROMPT", 255)
    row = benchmarking.run_case(case(), 1e9, quick=True)
    assert row.status == "ok", row.note
    assert row.generation.first_token_ms is None


def test_a_captured_step_that_differs_is_no_time(monkeypatch):
    step = GenerateCase._step

    def ten_percent_off(*args):
        run = step(*args)
        return lambda: 1.1 * run()

    monkeypatch.setattr(GenerateCase, "_step", ten_percent_off)
    row = benchmarking.run_case(case(), 1e9, quick=True)
    assert (row.status, row.timing) == ("failed", None)
    assert "from the plain one" in row.note


def test_a_cache_that_gives_other_tokens_is_no_time(monkeypatch):
    from flashsfa.huggingface import attention

    attend = attention.attend_cached
    monkeypatch.setattr(attention, "attend_cached", lambda *args, **rules: 1.1 * attend(*args, **rules))
    row = benchmarking.run_case(case(), 1e9, quick=True)
    assert (row.status, row.timing) == ("failed", None)
    assert "from those without one" in row.note


def test_what_does_not_fit_is_skipped_with_its_size(monkeypatch):
    huge = GenerateCase("qwen3-8b", 16, 16, 8, 32768, torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * 2**30, 80 * 2**30))
    row = benchmarking.run_case(huge, 1e9, quick=True)
    assert (row.status, row.timing) == ("skipped", None)
    weights, cache = 8.19e9 * 2, 8 * 32768 * 8 * 36 * (16 * 2 + 16 * 3 + 256)
    assert row.note == f"needs {(weights + cache) / 2**30:.0f} GiB, 30 GiB are free"


def test_running_out_of_memory_is_no_crash(monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")

    monkeypatch.setattr(GenerateCase, "_filled", fail)
    row = benchmarking.run_case(case(), 1e9, quick=True)
    assert (row.status, row.note) == ("skipped", "does not fit in memory: CUDA out of memory. Tried to allocate 1 GiB")


def test_a_baseline_that_does_not_run_is_noted(monkeypatch):
    side = GenerateCase._side

    def dense_fails(self, model, *, sparse, quick):
        if not sparse:
            raise RuntimeError("no such kernel")
        return side(self, model, sparse=sparse, quick=quick)

    monkeypatch.setattr(GenerateCase, "_side", dense_fails)
    row = benchmarking.run_case(case(), 1e9, quick=True)
    assert row.status == "ok"
    assert row.note == "sdpa: no such kernel; sdpa_unmasked: no such kernel"
    assert row.ratio is None


def test_the_largest_cases_are_those_of_the_targets():
    names = [x.name for x in generate.cases(torch.device("cuda"), quick=False)]
    assert len(set(names)) == len(names)
    for name in ("16+k16, batch 8, n=32k", "16+k16, batch 2, n=128k", "k16, batch 8, n=32k"):
        assert f"qwen3-8b, {name}" in names


@pytest.mark.parametrize(("shape", "millions"), [("gpt2", 124.44), ("qwen3-0.6b", 596.05), ("qwen3-8b", 8190.74)])
def test_published_shapes(shape, millions):
    model = models.skeleton(shape, torch.bfloat16)
    positions = model.transformer.wpe.weight if shape == "gpt2" else None  # more of them than were published
    more = 0 if positions is None else positions.numel() - 1024 * 768
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters - more == pytest.approx(millions * 1e6, rel=1e-4)
    looked_up = {"gpt2": positions, "qwen3-0.6b": None, "qwen3-8b": model.get_input_embeddings().weight}[shape]
    assert models.weight_bytes(model) == 2 * (parameters - (0 if looked_up is None else looked_up.numel()))


def test_the_command_runs_named_cases_alone(tmp_path, capsys):
    command = ["bench", "generate", "--quick", "--device", "cpu", "-o", str(tmp_path), "--only"]
    assert main([*command, "tiny", "k9"]) == 2
    assert (
        "no case of generate has 'tiny' and 'k9' in its name; it has 2, such as: tiny, 8+k8" in capsys.readouterr().err
    )
    assert main([*command, "batch 1", "tiny"]) == 0
    out = capsys.readouterr().out
    assert "1 cases on cpu" in out
    (file,) = tmp_path.glob("*.json")
    (row,) = json.loads(file.read_text())["rows"]
    assert row["case"] == "tiny, 8+k8, batch 1, n=512"
    assert row["generation"]["kv_bytes"] < row["baselines"]["sdpa"]["generation"]["kv_bytes"]
    for side in (row, row["baselines"]["sdpa"]):
        assert {"first_token_ms", "tokens_per_s", "peak_bytes", "kv_bytes", "kv_allocated"} <= set(side["generation"])


def test_plain_generate(tmp_path):
    """Each cache as generate() makes it, growing and of fixed size, in 16 and 8 bits, beside the dense one of its kind."""
    assert main(["bench", "generate", "--plain", "--quick", "--device", "cpu", "-o", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("generate-plain-*.json")
    rows = {row["curve"]: row for row in json.loads(file.read_text())["rows"]}
    assert set(rows) == {f"8+k8{x}, {cache} cache, batch 2" for x in ("", "-int8") for cache in ("growing", "static")}
    for row in rows.values():
        assert row["status"] == "ok", row["note"]
        assert set(row["baselines"]) == {"sdpa"}
        for side in (row["generation"], row["baselines"]["sdpa"]["generation"]):
            assert side["first_token_ms"] > 0
            assert side["tokens_per_s"] > 0
    held = rows["8+k8, growing cache, batch 2"]["generation"]["kv_bytes"]
    assert held == 2 * 511 * 2 * 2 * (8 * 4 + 8 * 5 + 64 * 4)  # sequences, tokens, kv heads, layers
    assert rows["8+k8-int8, growing cache, batch 2"]["generation"]["kv_bytes"] < held / 2


def test_plain_is_for_generate_alone(tmp_path, capsys):
    assert main(["bench", "decode", "--plain", "--device", "cpu", "-o", str(tmp_path)]) == 2
    assert "--plain is a way to time generate, not decode" in capsys.readouterr().err


def test_wrong_tokens_of_a_plain_cache_are_no_time(monkeypatch):
    from flashsfa.huggingface import attention

    attend = attention.attend_cached
    monkeypatch.setattr(
        attention,
        "attend_cached",
        lambda q, *rest, **rules: (1.1 if q.shape[2] == 1 else 1) * attend(q, *rest, **rules),
    )
    (case, *_) = plain.cases(CPU, quick=True)
    row = benchmarking.run_case(case, 1e9, quick=True)
    assert (row.status, row.timing) == ("failed", None)
    assert "from those without one" in row.note


@pytest.mark.parametrize(("budget", "count"), [(0.0, 1), (1e9, timing._QUICK_REPEATS)])
def test_a_slow_run_is_timed_once(monkeypatch, budget, count):
    calls = []
    monkeypatch.setattr(timing, "_REPEAT_MS", budget)
    found = timing.repeat(lambda: calls.append(1), CPU, quick=True)
    assert len(calls) == 1 + count
    assert found.p20_ms <= found.median_ms <= found.p80_ms


def test_columns_of_whole_models():
    clock = timing.Timing(12.0, 11.0, 13.0)
    ours = results.Generation(100.0, 640.0, 50 * 2**30, 24 * 2**30, 25 * 2**30)
    theirs = results.Generation(125.0, 500.0, 60 * 2**30, 36 * 2**30, 37 * 2**30)
    baseline = results.BaselineResult(clock, 1.0, 1.25, 1.0, generation=theirs)
    row = results.Row("a", "f", "c", 8, "ok", timing=clock, generation=ours, baselines={"sdpa": baseline})
    where = {"flashsfa": "0", "commit": None, "device": "none", "torch": "0"}
    table = results.Results("generate", where, 1e9, (row,)).table()
    found = {column.header: next(iter(column.cells)) for column in table.columns}
    assert found == {
        "case": "a", "first token ms": "100", "first token": "1.25x faster", "token ms": "12", "tokens/s": "640",
        "peak GiB": "50.0", "KV GiB": "24.00", "allocated": "25.00", "less KV": "32.4%", "error": "", "x sdpa": "1.25",
        "strongest rival": "1.25x faster than SDPA", "backend": "",
    }  # fmt: skip


@pytest.mark.gpu
def test_a_small_model_on_a_gpu():
    gpu = torch.device("cuda")
    (small, _) = generate.cases(gpu, quick=True)
    row = benchmarking.run_case(small, 1e12, quick=True)
    assert row.status == "ok", row.note
    assert not row.note
    assert set(row.baselines) == {"sdpa", "sdpa_fa2", "sdpa_cudnn"}
    assert row.generation.kv_bytes <= row.generation.kv_allocated < 1.05 * row.generation.kv_bytes + 2**16
    assert row.generation.peak_bytes > row.generation.kv_allocated

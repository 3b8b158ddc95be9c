"""`flashsfa bench serve` with real servers on the CPU."""

import pytest
import torch

pytest.importorskip("vllm")
from flashsfa import benchmarking
from flashsfa.benchmarking import serve

CPU = torch.device("cpu")


@pytest.fixture
def servers(vllm, monkeypatch):
    """Servers that find what vLLM's tests set for engines in this process."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@pytest.mark.parametrize("code", ["8+k8", "8+k8-int8", "dense-int8"])
def test_a_row_of_real_servers(servers, code):
    rows = [
        benchmarking.run_case(case, 1e9, quick=True)
        for case in serve.cases(CPU, quick=True)
        if f" {code}," in case.name
    ]
    assert [row.status for row in rows] == ["ok", "ok"], [row.note for row in rows]
    few, all_that_fit = rows
    dense = few.baselines["cpu_float32"].serving
    assert few.serving.requests == dense.requests == 2
    assert few.serving.capacity > 1.2 * dense.capacity
    assert all_that_fit.serving.requests == few.serving.capacity // 512
    for side in (side for row in rows for side in (row.serving, *(x.serving for x in row.baselines.values()))):
        assert side.first_token_ms > 0
        assert 0.4 < side.token_ms * side.tokens_per_s / 1e3 / side.requests < 1.2

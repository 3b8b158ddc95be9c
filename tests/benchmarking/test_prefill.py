"""`flashsfa bench prefill`: a case is timed when its output is right, and only then."""

import dataclasses

import pytest
import torch

pytest.importorskip("matplotlib")
from flashsfa.benchmarking import prefill, run_case, timing

CASE = prefill.PrefillCase(2, 4, 2, 48, 32, 4, torch.float32, torch.device("cpu"))


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setitem(timing._FLUSH_BYTES, "cpu", 1024)


@pytest.mark.cpu
@pytest.mark.parametrize("n", [1, 48, 300])  # 300: more queries than are checked
def test_right_case_is_timed(n):
    row = run_case(dataclasses.replace(CASE, n=n), 1e9, quick=True)
    assert row.status == "ok", row.note
    assert row.timing.median_ms > 0
    assert row.error < 1e-5
    assert set(row.baselines) == {"sdpa"}


@pytest.mark.cpu
@pytest.mark.parametrize("options", [{"topk_query": 16}, {"topk_query": 8, "dense_dims": 16}], ids=str)
def test_queries_in_the_pattern(options):
    row = run_case(dataclasses.replace(CASE, query_pattern="2:4", **options), 1e9, quick=True)
    assert row.status == "ok", row.note
    assert row.tflops == pytest.approx(2 * 2 * 4 * 48**2 * 32 / row.timing.median_ms / 1e9)
    assert "no sparse tensor cores" in row.reason


@pytest.mark.cpu
def test_wrong_output_is_not_timed(monkeypatch):
    attend = prefill.sparse_feature_attention
    monkeypatch.setattr(
        prefill, "sparse_feature_attention", lambda q, k, v, **kw: attend(q, k, v, topk=3, is_causal=True)
    )
    row = run_case(CASE, 1e9, quick=True)
    assert row.status == "failed"
    assert "wrong output" in row.note
    assert row.timing is None

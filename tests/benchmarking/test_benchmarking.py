"""`flashsfa bench`: a wrong kernel gets no time, every case gets a row, and earlier results are never overwritten."""

import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from flashsfa import SparseKVCache, reference, sparse_feature_decode, topk_codes
from flashsfa.cli import main

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from flashsfa import benchmarking
from flashsfa.benchmarking import decode, prefill, timing, topk
from flashsfa.benchmarking.configuration import Configuration
from flashsfa.benchmarking.results import Results
from flashsfa.stored import KVView

CPU = torch.device("cpu")


def decode_case(batch, query_heads, kv_heads, n, name, **rules):
    return decode.DecodeCase(
        batch, query_heads, kv_heads, n, Configuration.named(name, 32), torch.float32, CPU, **rules
    )


DECODE = [
    decode_case(1, 4, 4, 64, "k4"),
    decode_case(2, 4, 1, 1024, "8+k4"),
    decode_case(1, 4, 1, 128, "k4-skip"),
    decode_case(1, 4, 2, 64, "8+k4-int8", has_dense_queries=True),
    decode_case(1, 4, 2, 64, "dense-int8", has_dense_queries=True),
    decode_case(1, 4, 2, 64, "8+k4-int4"),
    decode_case(1, 4, 2, 64, "dense-int4", has_dense_queries=True),
    decode_case(2, 4, 2, 64, "axes12-int4", has_dense_queries=True),
]
TOPK = [topk.TopkCase(2, 2, n, 32, 4, dense, torch.bfloat16, CPU) for n in (16, 48) for dense in (0, 8)]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setitem(benchmarking.CASES, "decode", lambda device, quick: DECODE)
    monkeypatch.setitem(benchmarking.CASES, "topk", lambda device, quick: TOPK)
    monkeypatch.setitem(timing._FLUSH_BYTES, "cpu", 1024)
    monkeypatch.setitem(timing._COPY_BYTES, "cpu", 1 << 16)


def bench(operation, directory, *more):
    return main(["bench", operation, "--quick", "--device", "cpu", "-o", str(directory), *more])


def only(directory, suffix):
    (path,) = directory.glob(f"*{suffix}")
    return path


def rows_in(directory):
    return json.loads(only(directory, ".json").read_text())["rows"]


def test_a_run_that_is_ended_keeps_its_rows(tmp_path, capsys, monkeypatch):
    def ended():
        os.kill(os.getpid(), signal.SIGTERM)

    last = SimpleNamespace(name="last", facet="", curve="", n=1, device=CPU, prepare=ended)
    monkeypatch.setitem(benchmarking.CASES, "topk", lambda device, quick: [TOPK[0], last])
    assert bench("topk", tmp_path) == 143
    assert [row["case"] for row in rows_in(tmp_path)] == [TOPK[0].name]
    json_file, picture = only(tmp_path, ".json"), only(tmp_path, ".png")
    assert json.loads(json_file.read_text())["incomplete"] == "1 of 2 cases"
    assert f"flashsfa: stopped; incomplete results are written: {json_file}, {picture}" in capsys.readouterr().err


def test_rows_are_kept_as_soon_as_they_are_there(tmp_path, monkeypatch):
    """For a run that nobody can stop in peace: a machine that is gone, a process that is killed."""
    seen = []
    last = SimpleNamespace(
        name="last", facet="", curve="", n=1, device=CPU,
        prepare=lambda: seen.append(json.loads(only(tmp_path, ".json").read_text())),
    )  # fmt: skip
    monkeypatch.setitem(benchmarking.CASES, "topk", lambda device, quick: [TOPK[0], last])
    bench("topk", tmp_path)
    (kept,) = seen
    assert kept["incomplete"] == "1 of 2 cases"
    assert [row["case"] for row in kept["rows"]] == [TOPK[0].name]
    assert "incomplete" not in json.loads(only(tmp_path, ".json").read_text())


def test_a_title_says_what_is_incomplete():
    where = {"flashsfa": "0", "commit": None, "device": "x"}
    whole = Results("topk", where, 1e9, ())
    assert "incomplete" not in whole.title
    assert replace(whole, incomplete="1 of 2 cases").title == f"{whole.title}; incomplete: 1 of 2 cases"


@pytest.mark.parametrize(("operation", "cases"), [("decode", DECODE), ("topk", TOPK)])
def test_whole_run(operation, cases, tmp_path, capsys):
    directory = tmp_path / "new" / "results"
    assert bench(operation, directory) == 0
    out = capsys.readouterr().out
    document = json.loads(only(directory, ".json").read_text())
    assert list(document) == ["operation", "environment", "copy_gb_per_s", "rows"]
    assert document["copy_gb_per_s"] > 0
    where = document["environment"]
    assert where["torch"] == torch.__version__
    assert {"date", "device", "flashsfa", "commit", "triton", "numba"} <= set(where)
    assert only(directory, ".json").stem.startswith(f"{operation}-{where['date'][:10]}")
    assert [row["case"] for row in document["rows"]] == [case.name for case in cases]
    for row in document["rows"]:
        assert row["status"] == "ok", row["note"]
        assert 0 < row["timing"]["p20_ms"] <= row["timing"]["median_ms"] <= row["timing"]["p80_ms"]
        assert row["gb_per_s"] == pytest.approx(row["bytes_moved"] / row["timing"]["median_ms"] / 1e6)
        assert row["roofline_percent"] == pytest.approx(100 * row["gb_per_s"] / document["copy_gb_per_s"])
        for baseline in row["baselines"].values():
            assert baseline["ratio"] == pytest.approx(baseline["timing"]["median_ms"] / row["timing"]["median_ms"])
        competing = [baseline["ratio"] for baseline in row["baselines"].values() if baseline["competes"]]
        assert row["ratio"] == min(competing)
        assert row["case"] in out
    for what in (where["device"], f"torch {where['torch']}", f"commit {where['commit']}", "strongest rival"):
        assert what in " ".join(out.split())
    assert only(directory, ".png").read_bytes().startswith(b"\x89PNG")
    assert len(list(directory.iterdir())) == 2


def test_bytes_of_decode(tmp_path):
    bench("decode", tmp_path)
    plain, dense, tolerant, int8, all_kept, int4, rows, axes = rows_in(tmp_path)
    queries = 2 * 4 * 32 * 4  # q in, output out: heads, width, bytes
    assert plain["bytes_per_token"] == 5 * 4 + 4 * 32
    assert plain["bytes_moved"] == 4 * 64 * plain["bytes_per_token"] + queries
    assert dense["bytes_per_token"] == 4 * 8 + 5 * 4 + 4 * 32
    assert dense["bytes_moved"] == 2 * 1024 * dense["bytes_per_token"] + 2 * queries
    assert int8["bytes_per_token"] == 8 + 2 * 4 + 4 + 32 + 4
    assert all_kept["bytes_per_token"] == 32 + 4 + 32 + 4
    assert 1e-4 < int8["error"] < 0.1  # against unquantised codes
    assert 1e-4 < all_kept["error"] < 0.1
    v_in_4_bits = 32 // 2 + 4
    assert int4["bytes_per_token"] == 8 + 2 + 4 // 2 + 2 + 3 + v_in_4_bits  # scales of two bytes, a bitmap of 24 bits
    assert rows["bytes_per_token"] == 2 * v_in_4_bits
    assert axes["bytes_per_token"] == 12 + v_in_4_bits
    assert all(1e-3 < row["error"] < 0.6 for row in (int4, rows, axes))
    assert plain["v_rows_read"] is None
    assert tolerant["bytes_moved"] == 128 * (5 * 4) + round(tolerant["v_rows_read"] * 128 * 4 * 32) + queries
    assert {name: b["moved_per_token"] for name, b in plain["baselines"].items()} == {
        "sdpa": 2 * 4 * 32 + queries / 256
    }
    assert set(tolerant["baselines"]) == {"sdpa", "sdpa_grouped"}
    assert plain["backend"] in ("torch", "numba")


def assert_no_times(directory, capsys, message):
    """Every row failed with `message`, and no time or ratio was printed or kept."""
    text = capsys.readouterr().out
    assert " ms" not in text.replace(" ms ", "")  # the table's heading alone
    for row in rows_in(directory):
        assert row["status"] == "failed"
        assert message in row["note"]
        assert all(row[name] is None for name in ("timing", "gb_per_s", "roofline_percent", "ratio"))
        assert row["baselines"] == {}
        assert f"{row['case']}: failed: " in text


def drop_last_key(q, codes, v, *, v_scale, **options):
    v_scale = None if v_scale is None else v_scale[:, :, :-1]
    return sparse_feature_decode(q, codes[:, :, :-1], v[:, :, :-1], v_scale=v_scale, **options)


def swap_heads(q, codes, v, **options):
    return sparse_feature_decode(q, codes, v, **options).flip(1)


def one_nan(q, codes, v, **options):
    out = sparse_feature_decode(q, codes, v, **options)
    out[-1, -1, -1, -1] = torch.nan
    return out


@pytest.mark.parametrize("broken", [drop_last_key, swap_heads, one_nan])
def test_wrong_decode_gets_no_time(broken, tmp_path, capsys, monkeypatch):
    cases = [case for case in DECODE if broken is not drop_last_key or not case.value_tolerance]
    monkeypatch.setitem(benchmarking.CASES, "decode", lambda device, quick: cases)
    monkeypatch.setattr(decode, "sparse_feature_decode", broken)
    monkeypatch.setattr(benchmarking, "measure", lambda *_: pytest.fail("a wrong kernel was timed"))
    assert bench("decode", tmp_path) == 1
    assert_no_times(tmp_path, capsys, "wrong output")


def last_features(x, k, *, dense_dims):
    codes = topk_codes(x, k, dense_dims=dense_dims)
    codes.indices[..., -1] = codes.sparse_dims - 1
    return codes


def unsorted(x, k, *, dense_dims):
    codes = topk_codes(x, k, dense_dims=dense_dims)
    for part in (codes.values, codes.indices):
        part.copy_(part.flip(-1))
    return codes


@pytest.mark.parametrize(("broken", "message"), [(last_features, "other entries"), (unsorted, "ascending")])
def test_wrong_topk_gets_no_time(broken, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(topk, "topk_codes", broken)
    monkeypatch.setattr(benchmarking, "measure", lambda *_: pytest.fail("a wrong kernel was timed"))
    assert bench("topk", tmp_path) == 1
    assert_no_times(tmp_path, capsys, message)


def test_a_crash_is_one_row(tmp_path, monkeypatch):
    def out_of_memory(q, codes, v, **options):
        if v.shape[2] == 1024:
            raise RuntimeError("out of memory\nand a long trace")
        return sparse_feature_decode(q, codes, v, **options)

    monkeypatch.setattr(decode, "sparse_feature_decode", out_of_memory)
    assert bench("decode", tmp_path) == 1
    assert [row["status"] for row in rows_in(tmp_path)] == ["ok", "failed", *["ok"] * 6]
    assert rows_in(tmp_path)[1]["note"] == "RuntimeError: out of memory"


def test_a_baseline_that_does_not_run_is_named(tmp_path, monkeypatch, capsys):
    def unsupported():
        raise RuntimeError("no kernel for these shapes")

    real = decode.baselines
    monkeypatch.setattr(
        decode, "baselines", lambda *qkv: real(*qkv) | {"cudnn": benchmarking.cases.Baseline(unsupported, 1)}
    )
    assert bench("decode", tmp_path) == 0
    for row in rows_in(tmp_path):
        assert row["note"] == "cudnn does not run: no kernel for these shapes"
        assert "cudnn" not in row["baselines"]
        assert row["timing"]
    assert "no kernel for these shapes" in capsys.readouterr().out


def test_earlier_results_stay(tmp_path):
    for _ in range(2):
        assert bench("topk", tmp_path) == 0
    assert len(list(tmp_path.iterdir())) == 4
    # what is left of a run, any one file, still holds its name
    first, second = sorted(tmp_path.glob("*.json"), key=lambda path: len(path.name))
    for path in (first.with_suffix(".png"), second):
        path.unlink()
    kept = {path: path.read_bytes() for path in (first, second.with_suffix(".png"))}
    assert bench("topk", tmp_path) == 0
    assert len(list(tmp_path.glob("*-3.*"))) == 2
    assert {path: path.read_bytes() for path in kept} == kept


def assert_refused(capsys, code, message):
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("flashsfa: error:")
    assert message in line


def test_wrong_input(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmarking, "copy_bandwidth", lambda *_: pytest.fail("measured before the check"))
    in_the_way = tmp_path / "file"
    in_the_way.write_text("data")
    assert_refused(capsys, bench("decode", in_the_way), f"cannot write results to {in_the_way}")
    assert_refused(capsys, bench("decode", in_the_way / "below"), "cannot write results")
    assert in_the_way.read_text() == "data"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(capsys, main(["bench", "decode", "--device", "cuda", "-o", str(tmp_path)]), "no CUDA device")
    for wrong in (["bench", "backward"], ["bench", "decode", "--device", "tpu"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)


def test_a_name_that_no_case_has_is_answered_with_a_few(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(
        benchmarking.CASES, "decode", lambda device, quick: [SimpleNamespace(name=f"c{i}") for i in range(9)]
    )
    message = "no case of decode has 'zzz' in its name; it has 9, such as: c0; c1; c2"
    assert_refused(capsys, bench("decode", tmp_path, "--only", "zzz"), message)


def test_target_cases_are_registered():
    on_gpu = {
        (c.batch, c.query_heads, c.kv_heads, c.n, c.configuration.head_dim, c.configuration.name, c.has_dense_queries)
        for c in decode.cases(torch.device("cuda"), quick=False)
    }
    assert on_gpu == {
        (8, *heads, n, *code)
        for heads in ((16, 16), (32, 8))
        for n in (8192, 32768, 131072)
        for code in (
            (128, "k16", False), (128, "16+k16", False), (64, "k8", False), (128, "k16-int8", False), (128, "16+k16-int8", False),
            (128, "k16-skip", False), (128, "k16-int8-skip", False), (128, "k16-int4-skip", False), (128, "dense-int8", True), (64, "dense-int8", True), (64, "22+k12", True),
            (64, "28+k12-int8", True), (128, "k16-int4", False), (128, "16+k16-int4", False), (128, "dense-int4", True),
            *((128, code + bits, True) for code in ("32+k16", "16+k8") for bits in ("", "-int8", "-int4")),
            *((64, "k8" + bits, True) for bits in ("", "-int8", "-int4")),
            (128, "axes32-int4", True), (64, "axes24", True), (64, "axes24-int4", True), (64, "axes24-int3", True), (128, "axes48-int4", True), (128, "axes48-int3", True), (64, "22+k12-int4", True), (64, "axes36-int4", True), (64, "dense-int4", True),
        )
    }  # fmt: skip
    assert (8, 16, 32768, 128, 16, 0) in {
        (c.batch, c.heads, c.n, c.head_dim, c.topk, c.dense_dims) for c in topk.cases(torch.device("cuda"), quick=False)
    }


@pytest.mark.parametrize("module", [decode, prefill])
@pytest.mark.parametrize(("device", "longest"), [("cuda", 32768), ("cpu", 4096)])
def test_quick_cases_are_long_enough_to_say_where_it_pays(module, device, longest):
    cases = module.cases(torch.device(device), quick=True)
    for curve in {(case.facet, case.curve) for case in cases}:
        lengths = {case.n for case in cases if (case.facet, case.curve) == curve}
        assert len(lengths) == 2
        assert max(lengths) >= longest
    assert "dense-int8" in " ".join(case.name for case in decode.cases(torch.device(device), quick=True))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("quick", [False, True])
def test_names_are_unique(device, quick):
    for module in (decode, prefill, topk):
        cases = module.cases(torch.device(device), quick)
        assert len({case.name for case in cases}) == len(cases)
        assert len({(case.facet, case.curve, case.n) for case in cases}) == len(cases)


@pytest.mark.parametrize("groups", [1, 4])
def test_shaped_queries_have_the_share(groups):
    n, tolerance, share = 2048, 1e-2, 0.22
    cache = SparseKVCache(8, dense_dims=8)
    cache.append(torch.randn(2, 4, n, 64), torch.randn(2, 4, n, 64))
    q = decode.shaped_queries(torch.randn(2, 4 * groups, 1, 64), KVView(cache.codes, cache.v), tolerance, share=share)
    counted = []
    sparse_q = reference.topk_rows(q, 8, dense_dims=8).double()
    for b in range(2):
        for h in range(4):
            heavy = set()
            for g in range(groups):
                scores = cache.codes.to_dense()[b, h].double() @ sparse_q[b, h * groups + g, 0] / 8
                weights, mass = scores.softmax(0), 0.0
                for j in weights.argsort(descending=True).tolist():
                    if mass >= 1 - tolerance:
                        break
                    heavy.add(j)
                    mass += float(weights[j])
            counted.append(len(heavy) / n)
    mean = sum(counted) / len(counted)
    assert decode.needed_share(q, KVView(cache.codes, cache.v), tolerance) == pytest.approx(mean, abs=2e-3)
    assert mean == pytest.approx(share, abs=0.06)  # the factor is found on the first sequence


def test_baselines_compute_attention():
    q, k, v = (torch.randn(2, *shape, 16, device=CPU) for shape in ((6, 1), (2, 50), (2, 50)))
    expected, _ = reference.attention(q.double(), k.double(), v.double())
    found = decode.baselines(q, k, v)
    assert set(found) == {"sdpa", "sdpa_grouped"}
    for baseline in found.values():
        torch.testing.assert_close(baseline.run().reshape(q.shape).double(), expected, rtol=1e-4, atol=1e-5)


def test_summary_of_times():
    assert timing.summary([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == timing.Timing(3.5, 2.0, 5.0)


@pytest.mark.gpu
def test_whole_run_on_a_gpu(tmp_path, monkeypatch):
    device = torch.device("cuda")
    cases = [case for case in decode.cases(device, quick=True) if case.n == 8192]
    monkeypatch.setitem(benchmarking.CASES, "decode", lambda device, quick: cases)
    assert main(["bench", "decode", "--quick", "--device", "cuda", "-o", str(tmp_path)]) == 0
    for row in rows_in(tmp_path):
        assert row["status"] == "ok", row["note"]
        assert 0 < row["timing"]["p20_ms"] <= row["timing"]["median_ms"] <= row["timing"]["p80_ms"]
        assert {"fa2", "cudnn"} <= set(row["baselines"])

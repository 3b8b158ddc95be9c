"""The numbers by which the last thread block of a tile knows itself: who shares them with whom, and that a CUDA graph sets none to 0."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from flashsfa import explain, sparse_feature_decode, topk_codes
from flashsfa.ops.decode.hopper import counters
from flashsfa.ops.nvrtc import cuda
from flashsfa.stored import KVView
from held_cases import draw

HERE = torch.device("cpu")


@pytest.fixture
def at(monkeypatch):
    """`address` on a stream, in a graph, of a device with room for 4096 numbers."""
    for name in ("_rooms", "_taken"):
        monkeypatch.setattr(counters, name, {})
    monkeypatch.setattr(counters, "_lasting", [])

    class Room(counters._Room):
        def __init__(self, device):
            self._next, self._end = 1 << 40, (1 << 40) + 4 * 4096

    monkeypatch.setattr(counters, "_Room", Room)

    def address(tiles, stream, graph=None):
        monkeypatch.setattr(counters, "_current", lambda device: (stream, graph))
        return counters.address(tiles, HERE)

    return address


def test_each_stream_and_each_graph_has_its_own(at):
    calls = [(1024, 0), (700, 5), (3, 5, 8), (1024, 7, 8)]
    found = [at(*call) for call in calls]
    assert all(abs(x - y) >= 4 * 1024 for x, y in itertools.combinations(found, 2))
    assert [at(*call) for call in calls] == found
    assert all(1 << 40 <= x <= (1 << 40) + 4 * 3072 for x in found)


def test_more_tiles_take_others(at):
    few, more = at(1, 0), at(2000, 0)
    assert more >= few + 4 * 1024
    assert at(1, 0) == at(2000, 0) == more


def test_without_room_torch_sets_them_to_zero(at):
    """For good those of a stream, and those of a graph at each launch."""
    at(4096, 0)
    found = at(1500, 1)
    (kept,) = counters._lasting
    assert (kept.data_ptr(), len(kept), kept.any()) == (found, 1500, False)
    assert at(1500, 1) == found
    assert not 1 << 40 <= at(10, 1, 3) < 1 << 41
    assert (HERE, 1, 3) not in counters._taken
    assert len(counters._lasting) == 1


def test_nothing_is_loaded_while_a_graph_is_captured(at):
    at(10, 1, 3)
    assert not counters._rooms
    at(10, 1)
    assert at(10, 1, 3) == at(10, 1, 3)


@pytest.mark.cpu
@pytest.mark.usefixtures("nvrtc")
def test_the_compiler_keeps_the_variable():
    cubin = cuda.compile_cubin(counters.SOURCE, "counters", ["--gpu-architecture=sm_90a"])
    assert b"\0counters\0" in cubin
    assert len(cubin) < 10_000  # it takes no room there


def cases():
    """Queries, a view and where its output goes, of two kinds."""
    for n in (3000, 500):
        q, k, v = draw(b=2, hkv=2, group=4, n=n, dtype=torch.bfloat16)
        yield q, KVView(topk_codes(k, 5), v), torch.zeros_like(q)


def captured(q, kv, out, count):
    sparse_feature_decode(q, kv, out=out)
    assert "decode: hopper" in explain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            sparse_feature_decode(q, kv, out=out)
    return graph


@pytest.mark.gpu
def test_a_graph_holds_kernels_alone(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    graph = captured(*next(cases()), 3)
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    names = [x.name for x in profile.events() if x.device_type == torch.autograd.DeviceType.CUDA]
    assert names == ["decode_kernel"] * 3


@pytest.mark.gpu
def test_graphs_beside_one_another():
    """And calls beside them."""
    made = list(cases())
    expected = [sparse_feature_decode(q, kv) for q, kv, _ in made]
    graphs, streams = [captured(*case, 20) for case in made], [torch.cuda.Stream() for _ in made]
    for _ in range(50):
        for *_, out in made:
            out.zero_()
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        beside = [sparse_feature_decode(q, kv) for q, kv, _ in made]
        torch.cuda.synchronize()
        for (*_, out), other, right in zip(made, beside, expected, strict=True):
            assert torch.equal(out, right)
            assert torch.equal(other, right)

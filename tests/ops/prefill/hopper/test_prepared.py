"""What the layers of a model have alike is prepared by the first: each call is of its own tensors, as if nothing had been before."""

from types import SimpleNamespace

import pytest
import torch

from flashsfa import explain
from flashsfa.budget import FeatureBudget
from flashsfa.mask import Mask
from flashsfa.ops import nvrtc
from flashsfa.ops.nvrtc import cuda
from flashsfa.ops.prefill import operator, prepared
from flashsfa.ops.prefill.hopper import prefill
from flashsfa.ops.select.hopper import sparse
from flashsfa.scores import ScoreRules
from hopper_cases import BF16, hopper, packing

SCALE = 0.1


def layers(count, n_q, n_k, device, heads=(4, 2), head_dim=128):
    """q, k, v and out of so many layers, in the order of memory that vLLM has, each out NaN."""
    found = []
    for _ in range(count):
        rows = (
            torch.randn(n, h, head_dim, device=device, dtype=BF16)
            for n, h in ((n_q, heads[0]), (n_k, heads[1]), (n_k, heads[1]))
        )
        out = torch.full((n_q, heads[0], head_dim), float("nan"), device=device, dtype=BF16)
        found.append([x.transpose(0, 1)[None] for x in (*rows, out)])
    return found


@pytest.fixture
def launched(monkeypatch):
    """The grid, parameters and maps of each launch, of kernels that do nothing: no GPU is needed."""
    seen = []

    class Kernel:
        def launch(self, grid, params, *maps):
            seen.append((grid, type(params).from_buffer_copy(params), [m.at for m in maps]))

    monkeypatch.setattr(nvrtc, "load_kernel", lambda *_: Kernel())
    monkeypatch.setattr(nvrtc, "is_hopper", lambda _: True)
    monkeypatch.setattr(nvrtc, "obstacle", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=2))
    monkeypatch.setattr(cuda, "tensor_map", lambda x, rows: SimpleNamespace())
    monkeypatch.setattr(cuda, "move_map", lambda map, x: setattr(map, "at", x.data_ptr()))
    kept = prefill._prepared, sparse._prepared
    for cache in kept:
        cache.cache_clear()
    yield seen
    for cache in kept:
        cache.cache_clear()


@pytest.mark.cpu
def test_each_call_is_of_its_own_tensors(launched):
    mask = Mask(True)
    tensors = layers(3, 2048, 2048, "cpu")
    call = prefill.Prepared(*tensors[0], mask=mask, scale=SCALE)
    for q, k, v, out in tensors:
        call(q, k, v, out)
        grid, params, maps = launched[-1]
        launched.clear()
        attention = prefill.Prepared(q, k, v, out, mask=mask, scale=SCALE)
        attention(q, k, v, out)
        alone_grid, alone, alone_maps = launched[-1]
        different = {name for name, _ in params._fields_ if getattr(params, name) != getattr(alone, name)}
        assert different <= {"lse", "tile_counter"}
        assert (grid, maps) == (alone_grid, alone_maps)


@pytest.mark.cpu
def test_a_counter_is_0_when_it_is_used(launched):
    """Each launch counts in a place of its own; those that are used again are set to 0 before."""
    (tensors,) = layers(1, 2048, 2048, "cpu")
    call = prefill.Prepared(*tensors, mask=Mask(True), scale=SCALE)
    assert call._counters is not None
    for _ in range(3 * prefill._CALLS + 1):
        call(*tensors)
        place = (launched[-1][1].tile_counter - call._counters.data_ptr()) // 4
        assert call._counters[place] == 0
        call._counters[place] = 1  # as the kernel leaves it


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("n_q", "n_k", "rules", "taken"),
    [
        (20, 20, {}, True),
        (300, 2048, {}, True),
        (300, 2049, {}, False),  # few queries over many keys: FlashAttention-2 splits the keys
        (512, 4096, {}, True),
        (300, 8192, {"window": 128}, True),
        (600, 600, {"topk_query": 8}, False),
        (600, 600, {"head_dim": 80}, False),
    ],
    ids=str,
)
def test_which_are_prepared(launched, n_q, n_k, rules, taken):
    head_dim = rules.get("head_dim", 128)
    (tensors,) = layers(1, n_q, n_k, "cpu", head_dim=head_dim)
    budget = FeatureBudget.of(head_dim, 8, topk_query=rules.get("topk_query", head_dim))
    found = prepared.prepare(*tensors, budget, Mask(True, rules.get("window")), SCALE)
    assert (found is not None) == taken


@hopper
@pytest.mark.parametrize("lengths", [[20], [300, 17, 77], [2000], [7680], [3000, 4096]], ids=str)
@pytest.mark.parametrize("topk", [16, 112])
def test_as_the_operator(lengths, topk):
    total = sum(lengths)
    mask = Mask(True, None, **packing(lengths, lengths))
    budget = FeatureBudget.of(128, topk, topk_query=128, dense_dims=16)
    tensors = layers(35, total, total, "cuda")
    call = prepared.prepare(*tensors[0], budget, mask, SCALE)
    assert "prepared" in str(explain())
    for q, k, v, out in tensors:
        call(q, k, v, out)
        expected, _ = operator.attend(
            q, k, v, budget, mask, ScoreRules.of(q, SCALE, None, None), gradient_of_all=False, backend="auto"
        )
        assert (out.float() - expected.float()).abs().max() <= 2**-7 * expected.float().abs().max()

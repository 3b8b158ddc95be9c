"""Steps over a growing cache that holds tokens as they came, by kernels for Hopper that are prepared once: on such a GPU where there is one, else
lane by lane on the CPU."""

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import emulated
from append_cases import DEVICE, use_kernel
from decode_cases import assert_graph_follows
from flashsfa import FeatureBasis, SparseKVCache, explain, reference, sparse_feature_decode
from flashsfa import decode as module
from flashsfa.budget import FeatureBudget
from flashsfa.mask import Mask
from flashsfa.ops import nvrtc
from flashsfa.ops.decode import gpu
from flashsfa.ops.plan import DecodePlan
from flashsfa.scores import ScoreRules
from flashsfa.stored import ExactKV, KVView
from held_cases import AXES, CODES, coded

BATCH, HEADS, DIM = 2, 2, 64


@pytest.fixture(autouse=True)
def again(monkeypatch):
    """What was computed by what had been prepared, one entry a call: None where it could not be."""
    use_kernel(monkeypatch)
    if emulated.is_needed(DEVICE):
        monkeypatch.setattr(nvrtc, "load_kernel", emulated.load_kernel)
        monkeypatch.setattr(module, "plan_decode", lambda q, kv: DecodePlan("hopper", "asked for", fuses_exact=True))
    outs, attend_again = [], gpu.attend_again
    monkeypatch.setattr(gpu, "attend_again", lambda *given: outs.append(attend_again(*given)) or outs[-1])
    return outs


def normal(*shape):
    return torch.randn(shape, device=DEVICE).bfloat16()


def assert_step(cache, k, v, **rules):
    """A step by what is prepared, if anything is, has the bits of one that prepares nothing; the view."""
    view, q = cache.append(k, v), normal(len(k), 2 * HEADS, k.shape[2], DIM)
    other = replace(view)
    assert other.prepared is None
    for options in (rules, {**rules, "topk_query": "dense", "softcap": 3.0}):
        out, expected = sparse_feature_decode(q, view, **options), sparse_feature_decode(q, other, **options)
        assert torch.equal(out, expected)
    return view


@pytest.mark.parametrize(("recent", "first", "dtype"), [(5, 2, None), (4, 0, torch.int8), (0, 3, torch.int8)], ids=str)
def test_steps_follow_a_growing_cache(monkeypatch, again, recent, first, dtype):
    """Through moves of the newest tokens, growth of the coded ones, a choice of sequences, a copy, and tokens taken back."""
    cache = SparseKVCache(8, dense_dims=16, capacity=45, recent=recent, first=first, dtype=dtype)
    k, v = normal(2, BATCH, HEADS, 70, DIM)

    def step(start, end, cache=cache, **rules):
        return assert_step(cache, k[:, :, start:end], v[:, :, start:end], **rules)

    cache.append(k[:, :, :30], v[:, :, :30])
    step(30, 31)  # fewer coded tokens than the kernel takes
    step(31, 39)  # several queries
    again.clear()
    made, prepared = [], gpu.prepared
    monkeypatch.setattr(gpu, "prepared", lambda *given: made.append(given) or prepared(*given))
    for end in range(40, 54):  # over the capacity, and twice through the buffer of the newest
        step(end - 1, end)
    assert "tokens held as they came by a kernel for Hopper" in explain()
    assert len(again) == 2 * 14
    assert not any(out is None for out in again)
    assert len(made) == 2 * 2  # for two forms of queries, and for the grown buffers again
    view = step(53, 54, key_padding_mask=torch.rand(BATCH, 54, device=DEVICE) < 0.3)
    assert len(again) == 2 * 15
    step(54, 55, window=9)
    assert len(again) == 2 * 15
    assert copy.deepcopy(view).prepared is None
    other = copy.deepcopy(cache)
    step(55, 56, cache=other)
    step(55, 56)
    cache.select_batch(torch.tensor([1, 1], device=DEVICE))
    step(56, 57)
    cache.crop(45)
    step(57, 58)
    assert len(again) == 2 * 19


def test_a_step_into_rows_of_a_buffer(again):
    cache = SparseKVCache(8, dense_dims=16, recent=5, first=2)
    view, q = cache.append(*normal(2, BATCH, HEADS, 50, DIM)), normal(BATCH, 2 * HEADS, 1, DIM)
    expected = sparse_feature_decode(q, replace(view))
    buffer = normal(BATCH + 1, 2 * HEADS, DIM)
    behind = buffer[BATCH].clone()
    for rows in (buffer[:BATCH], normal(2 * HEADS, BATCH, DIM).transpose(0, 1)):  # the second are copied to
        out = rows[:, :, None]
        assert sparse_feature_decode(q, view, out=out) is out
        assert (again[-1] is out) == rows.is_contiguous()
        assert torch.equal(out, expected)
    assert torch.equal(buffer[BATCH], behind)


def test_queries_at_odd_addresses(again):
    cache = SparseKVCache(8, dense_dims=16, recent=5, first=2)
    view = cache.append(*normal(2, BATCH, HEADS, 50, DIM))
    memory = normal(1 + BATCH * HEADS * DIM)
    even, odd = (memory[i : i + BATCH * HEADS * DIM].view(BATCH, HEADS, 1, DIM) for i in (0, 1))
    odd_copy = odd.clone()
    sparse_feature_decode(even, view)
    assert torch.equal(sparse_feature_decode(odd, view), sparse_feature_decode(odd_copy, view))
    assert [out is None for out in again] == [False, False]  # those at odd addresses have no kernels


def test_steps_of_a_layer_with_a_gain(monkeypatch, again):
    """A converted model's exact keys are read where they lie, by what was prepared; another factor is another preparation."""
    pytest.importorskip("transformers")
    from flashsfa.huggingface import attention
    from flashsfa.huggingface.cache import SparseCacheLayer

    turn = torch.linalg.qr(torch.randn(HEADS, DIM, DIM)).Q
    gain = torch.cat((torch.ones(16), torch.full((DIM - 16,), 1.5)))
    budget = FeatureBudget.of(DIM, 8, dense_dims=16, topk_query="dense")
    settings = attention.SFASettings(8, dense_dims=16, recent=5, first=2)
    layer = torch.nn.Module()
    layer.sfa = attention.LayerCoding(budget, basis=FeatureBasis(turn * gain, turn), settings=settings).to(DEVICE)
    cache, views, attend = SparseCacheLayer(layer.sfa), [], attention.attend_cached
    monkeypatch.setattr(
        attention, "attend_cached", lambda q, kv, *rest, **rules: views.append(kv) or attend(q, kv, *rest, **rules)
    )
    made, prepared = [], gpu.prepared
    monkeypatch.setattr(gpu, "prepared", lambda *given: made.append(given) or prepared(*given))
    k, v = normal(2, BATCH, HEADS, 60, DIM)

    def step(start, end):
        keys, values = cache.update(k[:, :, start:end], v[:, :, start:end])
        q = normal(BATCH, 2 * HEADS, end - start, DIM)
        return q, attention.attention_forward(layer.eval(), q, keys, values, None)[0].transpose(1, 2)

    step(0, 48)
    again.clear()
    for end in range(49, 55):
        q, found = step(end - 1, end)
        view = views[-1]
        assert view.recent.k.data_ptr() == cache.store.kv.recent.k.data_ptr()
        assert view.first.k.data_ptr() == cache.store.kv.first.k.data_ptr()
        factor = layer.sfa.exact_factor
        torch.testing.assert_close(layer.sfa.exact_factor[0].cpu(), 1 / gain)
        coordinates = layer.sfa.queries(q)
        assert torch.equal(found, attend(coordinates, replace(view), budget, exact_factor=factor))
        rows = view.rows(torch.float32).map(torch.Tensor.float)
        is_exact = view.is_exact()[0].nonzero()[:, 0]
        rows.k[:, :, is_exact] *= layer.sfa.exact_factor[:, None]
        expected, _ = reference.attend(
            coordinates.float(), rows.k, rows.v, Mask(True), ScoreRules(DIM**-0.5, exact_factor=factor)
        )
        torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
    assert len(again) == 6
    assert not any(out is None for out in again)
    assert len(made) == 1
    layer.sfa.exact_factor = layer.sfa.exact_factor * 0.1
    q, found = step(54, 55)
    assert len(made) == 2
    factor = layer.sfa.exact_factor
    assert torch.equal(found, attend(layer.sfa.queries(q), replace(views[-1]), budget, exact_factor=factor))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [*AXES, *CODES[:2]])
def test_a_graph_follows_kv_lens(kind):
    """Few bits, and exact tokens in place of codes."""
    k, v = normal(2, 2, HEADS, 3000, DIM)
    lens = torch.tensor([3000, 1], device=DEVICE)
    positions = torch.tensor([[0, 1, 2999, 2998, 16, 15], [0, 1, 63, 62, 2899, -1]], device=DEVICE)
    slots = positions.clamp(min=0)[:, None, :, None].expand(-1, HEADS, -1, DIM)
    exact = ExactKV(k.gather(2, slots), v.gather(2, slots), positions)
    kv, q = KVView(coded(kind, k), v, kv_lens=lens, recent=exact), normal(2, 2 * HEADS, 1, DIM)

    def step():
        return sparse_feature_decode(q, kv, topk_query="dense", return_lse=True)

    assert_graph_follows(step, lens)
    assert "tokens held as they came by a kernel for Hopper" in explain()

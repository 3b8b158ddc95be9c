"""The decode kernel for Hopper against plain decode: on such a GPU where there is one, else lane by lane on the CPU."""

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import emulated
from decode_cases import DecodeRules, assert_graph_follows
from flashsfa import SparseKVCache, explain, sparse_feature_decode, topk_codes
from flashsfa.mask import Mask
from flashsfa.narrow import NarrowRows
from flashsfa.ops import nvrtc
from flashsfa.ops.decode import gpu
from flashsfa.ops.decode.hopper import decode as hopper
from flashsfa.scores import ScoreRules
from flashsfa.stored import KVView
from held_cases import AXES, CODES, DEVICE, ROWS, assert_decodes, coded, draw, run

DTYPES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    if emulated.is_needed(DEVICE):
        monkeypatch.setattr(nvrtc, "load_kernel", emulated.load_kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ROWS + CODES + AXES)
def test_every_kind_of_keys(kind, dtype):
    q, k, v = draw(group=3, n=141, dtype=dtype)
    assert_decodes("hopper", q, KVView(coded(kind, k), v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dv", [64, 128])
@pytest.mark.parametrize("bits", [16, 8, 4, 3])
def test_every_kind_of_values(bits, dv, dtype):
    q, k, v = draw(group=2, n=141, dv=dv, dtype=dtype)
    v[0, 0, 3] *= 1000  # one row's scale is far above the others'
    v[1, 1] *= 1e-4
    assert_decodes("hopper", q, KVView(topk_codes(k, 5), NarrowRows.encode(v, bits)))


LENGTHS = [141, 0]
VISIBILITY = {
    "lengths": lambda: DecodeRules(torch.tensor(LENGTHS, device=DEVICE)),
    "32-bit lengths": lambda: DecodeRules(torch.tensor([70, 33], dtype=torch.int32, device=DEVICE)),
    "window": lambda: DecodeRules(window=50),
    "window of lengths": lambda: DecodeRules(torch.tensor([140, 20], device=DEVICE), window=33),
    "padding": lambda: DecodeRules(key_padding_mask=torch.rand(2, 141, device=DEVICE) < 0.3),
}


@pytest.mark.parametrize(("kind", "v_bits"), [("rows 8", 4), ("9 d8s4-bitmap", 4), ("axes", 3)])
@pytest.mark.parametrize("rules", VISIBILITY)
def test_who_sees_what(rules, kind, v_bits):
    q, k, v = draw(group=2, m=3, n=141, dtype=torch.bfloat16)
    assert_decodes("hopper", q, KVView(coded(kind, k), NarrowRows.encode(v, v_bits)), VISIBILITY[rules]())


@pytest.mark.parametrize("kind", ["rows 4", "0 d8s4-packed", "axes"])
@pytest.mark.parametrize(("group", "m"), [(1, 1), (4, 1), (7, 1), (3, 5), (1, 16)])
def test_any_number_of_query_rows(kind, group, m):
    q, k, v = draw(b=1, group=group, m=m, n=70, dtype=torch.float16)
    assert_decodes("hopper", q, KVView(coded(kind, k), NarrowRows.encode(v, 4)), softcap=2.0 if m == 5 else None)


@pytest.mark.parametrize("tolerance", [0.0, 0.02])
@pytest.mark.parametrize(("kind", "v_bits"), [("rows 8", 8), ("9 d8s4-bitmap", 3), ("9 d16s16-uint8", 8)])
def test_pages(kind, v_bits, tolerance):
    """In any order, with whatever lies in the rest of the pool."""
    q, k, v = draw(group=2, n=160, dtype=torch.bfloat16)
    kv, lens = KVView(coded(kind, k), NarrowRows.encode(v, v_bits)), torch.tensor([141, 50], device=DEVICE)
    table = torch.randperm(16, device=DEVICE)[:10].to(torch.int32).reshape(2, 5)

    def paged(x):  # [B, Hkv, N, ...] to [pages, Hkv, 32, ...]
        pool = torch.full((16, x.shape[1], 32, *x.shape[3:]), 77, device=DEVICE).to(x.dtype)
        pool[table.long()] = x.unflatten(2, (5, 32)).transpose(1, 2)
        return pool

    run("hopper", q, kv.map(paged), DecodeRules(lens, page_table=table), tolerance=tolerance)
    found = run("hopper", q, kv.map(paged), DecodeRules(lens, page_table=table), tolerance=tolerance)
    torch.testing.assert_close(found, run("hopper", q, kv, DecodeRules(lens), tolerance=tolerance), rtol=0, atol=0)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("bits", [16, 8])
def test_pages_prepared_once_are_read_at_each_step_s_lengths(m, bits, monkeypatch):
    """Steps of one form over the same pools: the newest tokens, lengths and tables of each count."""
    if emulated.is_needed(DEVICE):
        monkeypatch.setattr(nvrtc, "is_hopper", lambda device: True)
        monkeypatch.setattr(nvrtc, "obstacle", lambda: None)
    _, k, v = draw(b=16, n=32, dtype=torch.bfloat16)  # 16 pages of 32 tokens
    pools, rules = KVView(coded("9 d16s16-uint8", k), NarrowRows.encode(v, bits)), ScoreRules(0.1, None)
    prepared = None
    for seed in range(3):
        q = draw(group=2, m=m, n=1, dtype=torch.bfloat16)[0]
        lens = torch.tensor([[141, 50], [160, m], [33, 96]][seed], dtype=torch.int32, device=DEVICE)
        table = torch.randperm(16, device=DEVICE)[:10].to(torch.int32).reshape(2, 5)
        kv, mask = replace(pools, kv_lens=lens, page_table=table), Mask(True, kv_lens=lens)
        if prepared is None:
            prepared = gpu.prepared_paged(q, kv, mask, rules, 0.0, None)
            assert "prepared" in str(explain())
        out = torch.full((*q.shape[:3], v.shape[-1]), torch.nan, dtype=q.dtype, device=DEVICE)
        assert prepared.over(lens, table).attend(q, out, None) is None
        expected, _ = gpu.decode(q, kv, mask, rules, 0.0, None, "hopper")
        assert torch.equal(out, expected)


@pytest.mark.parametrize("bits", [16, 8, 4, 3])
@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("n", [40, 700, 1500])
def test_values_of_little_weight_are_left_out(n, group, bits):
    """Within the tolerance, and not read: they may hold NaN. What all values have in common stays."""
    q, k, v = draw(b=1, hkv=1, group=group, n=n, dtype=torch.bfloat16)
    q[:] = q[:, :1]  # all queries need the same

    def scores(codes):
        return (q.float() @ codes.to_codes(torch.float32).to_dense().mT)[0, 0, 0]

    k[:, :, ::32] = k[:, :, scores(coded("0 d16s16-bitmap", k)).argmax()]  # of any 32 keys one has much weight
    kv, tolerance = KVView(coded("0 d16s16-bitmap", k), NarrowRows.encode(v, bits)), 0.05
    exact, lse = run("hopper", q, kv, DecodeRules(), scale=1.0)
    shares = scores(kv.codes).softmax(-1)
    light = shares < shares.max() * tolerance / n / 2  # far below any cut
    assert n < 100 or light.sum() > n / 10
    spoilt = v.masked_fill(light[None, None, :, None], float("nan"))
    kv = KVView(kv.codes, NarrowRows.encode(spoilt, bits))
    out, other_lse = run("hopper", q, kv, DecodeRules(), scale=1.0, tolerance=tolerance)
    torch.testing.assert_close(other_lse, lse, rtol=0, atol=2e-5)
    assert (out.float() - exact.float()).norm(dim=-1).max() <= 2 * tolerance * v.float().norm(dim=-1).max()
    alike = KVView(kv.codes, NarrowRows.encode(torch.ones_like(v), bits))
    out = run("hopper", q, alike, DecodeRules(), scale=1.0, tolerance=tolerance)[0]
    row = alike.rows(torch.float32).v[0, 0, 0]
    torch.testing.assert_close(out[0, 0, 0].float(), row, rtol=0, atol=0.02)


@pytest.mark.parametrize(("group", "bits"), [(1, 16), (4, 8), (8, 4), (2, 3)])
def test_keys_that_are_light_one_by_one_are_heavy_together(group, bits, monkeypatch):
    """All weights are equal, each far below the tolerance. The output counts the tokens of each 64 that are read."""
    monkeypatch.setattr(hopper, "processors", lambda device: 1)  # few warps, of many keys each
    q, k, v = draw(b=1, hkv=1, group=group, n=4000, dtype=torch.bfloat16)
    k[:], tolerance = k[:, :, :1], 0.3
    v[:] = torch.nn.functional.one_hot(torch.arange(4000, device=DEVICE) // 64, v.shape[-1])
    kv = KVView(coded("0 d16s16-bitmap", k), NarrowRows.encode(v, bits))
    exact, out = (run("hopper", q, kv, DecodeRules(), tolerance=x)[0].float() for x in (0.0, tolerance))
    assert 0.01 < (out - exact).abs().sum(-1).max() / 2 <= tolerance


@pytest.mark.parametrize("kind", ["rows 4", "9 d8s4-bitmap", "9 d8s8-packed", "axes"])
def test_a_tolerance_over_every_kind_of_keys(kind):
    q, k, v = draw(group=2, m=2, n=600, dtype=torch.float16)
    kv, rules = KVView(coded(kind, k), NarrowRows.encode(v, 4)), DecodeRules(torch.tensor([600, 90], device=DEVICE))
    exact, lse = run("hopper", q, kv, rules)
    out, other_lse = run("hopper", q, kv, rules, tolerance=0.03)
    torch.testing.assert_close(other_lse, lse, rtol=0, atol=2e-5)
    assert (out != exact).any()
    assert (out.float() - exact.float()).norm(dim=-1).max() <= 0.06 * v.float().norm(dim=-1).max()


@pytest.mark.parametrize(("dv", "bits"), [(64, 16), (128, 8), (128, 4)])
@pytest.mark.parametrize("lengths", [[2900, 2900], [700, 2900], [0, 33]])
def test_many_blocks_share_the_keys(lengths, dv, bits, monkeypatch):
    """As many as the longest sequence asks for; those without keys of a shorter one leave, and the others are merged."""
    monkeypatch.setattr(hopper, "processors", lambda device: 132)
    q, k, v = draw(hkv=1, group=2, n=2900, dv=dv, dtype=torch.bfloat16)
    kv = KVView(coded("9 d16s16-uint8", k), NarrowRows.encode(v, bits))
    assert_decodes("hopper", q, kv, DecodeRules(torch.tensor(lengths, device=DEVICE)))


@pytest.mark.parametrize("tolerance", [0.0, 1e-6])
def test_an_infinite_value_stays_one(tolerance):
    q, k, v = draw(group=2, n=40, dtype=torch.bfloat16)
    v[..., 3] = float("inf")
    out, _ = run("hopper", q, KVView(coded("9 d16s16-uint8", k), v), DecodeRules(), tolerance=tolerance)
    assert (out.isinf() == (torch.arange(64, device=DEVICE) == 3)).all()


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_no_number_is_lost(tolerance):
    """A query of NaN gives NaN, and no other."""
    q, k, v = draw(group=2, n=50, dtype=torch.bfloat16)
    q[0, 1, 0, 3] = float("nan")
    out, lse = run("hopper", q, KVView(coded("9 d16s16-uint8", k), v), DecodeRules(), tolerance=tolerance)
    assert out[0, 1].isnan().all()
    assert lse[0, 1].isnan().all()
    assert out.isnan().sum() == 64
    assert lse.isnan().sum() == 1


def test_few_keys_are_left_to_the_next_kernel(caplog):
    q, k, v = draw(n=31, dtype=torch.float16)
    assert_decodes("hopper", q, KVView(coded("rows 8", k), v))
    assert "at least 32 keys, not 31" in explain()


@pytest.mark.gpu
@pytest.mark.parametrize("tolerance", [0.0, 0.02])
@pytest.mark.parametrize("kind", [*ROWS, *CODES[:2], *AXES])
def test_public_function_is_deterministic(kind, tolerance):
    q, k, v = draw(b=4, hkv=4, group=4, n=5000, dtype=torch.bfloat16)
    kv = KVView(coded(kind, k), NarrowRows.encode(v, 4), kv_lens=torch.tensor([5000, 1, 17, 4000], device=DEVICE))
    options = {"return_lse": True, "topk_query": "dense", "value_tolerance": tolerance}
    found = sparse_feature_decode(q, kv, **options)
    assert "decode: hopper" in explain()
    for _ in range(3):
        torch.testing.assert_close(sparse_feature_decode(q, kv, **options), found, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["rows 4", "9 d8s4-bitmap", "axes"])
def test_cuda_graph_follows_kv_lens(kind):
    q, k, v = draw(group=4, n=3000, dtype=torch.bfloat16)
    kv, lens = KVView(coded(kind, k), NarrowRows.encode(v, 4)), torch.tensor([3000, 1], device=DEVICE)

    def step():
        return run("hopper", q, kv, DecodeRules(lens))

    assert_graph_follows(step, lens)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "d"), [("9 d16s16-uint8", 64), ("0 d8s8-packed", 80), ("9 d8s4-bitmap", 64), ("rows 4", 96)]
)
@pytest.mark.parametrize("topk_query", [1, 7, 40])
def test_queries_are_pruned_as_they_are_read(topk_query, kind, d, dtype):
    """Ties to the lowest index. Queries of any strides, many equal."""
    q, k, v = draw(group=2, m=3, n=70, d=d, dv=64, dtype=dtype)
    q = (
        (q * 2).round().mT.contiguous().mT
        if topk_query == 7
        else (q * 2).round().transpose(1, 2).contiguous().transpose(1, 2)
    )
    assert_decodes("hopper", q, KVView(coded(kind, k), v), topk_query=topk_query)


@pytest.mark.parametrize("has_padding", [False, True])
def test_what_is_prepared_follows_a_growing_cache(has_padding):
    q, k, v = draw(group=2, n=200, dtype=torch.bfloat16)
    buffers = KVView(coded("9 d16s16-uint8", k), NarrowRows.encode(v, 8))

    def held(n):
        return buffers.map(lambda x: x[:, :, :n])

    none_hidden = torch.zeros(2, 40, dtype=torch.bool, device=DEVICE) if has_padding else None
    prepared = gpu.prepared(q, held(40), Mask(True, None, none_hidden), ScoreRules(0.125), 0.0, None)
    for n in (40, 33, 200):
        other = torch.randn_like(q)
        padding = torch.rand(2, n, device=DEVICE) < 0.3 if has_padding else None
        expected, _ = run("hopper", other, held(n), DecodeRules(key_padding_mask=padding))
        assert torch.equal(gpu.attend_again(other, prepared, "why", held(n), padding), expected)
    assert gpu.attend_again(q, prepared, "why", held(31), None if none_hidden is None else none_hidden[:, :31]) is None
    few = gpu.prepared(q, held(1), Mask(True), ScoreRules(0.125), 0.0, None)
    assert few is None  # a single key has any stride


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"dtype": torch.int8}], ids=["16 bits", "8 bits"])
def test_steps_over_a_growing_cache(options):
    """What is prepared at a step holds for the next ones, and not for other buffers: those of a full cache that grew, of a copy, of
    other rows of the batch."""
    k, v = draw(b=2, hkv=2, n=400, dtype=torch.bfloat16)[1:]
    cache = SparseKVCache(8, dense_dims=16, capacity=300, **options)

    def step(cache, start, end, **rules):
        q = torch.randn(len(k), 4, end - start, 64, device=DEVICE, dtype=k.dtype)
        view = cache.append(k[:, :, start:end], v[:, :, start:end])
        other = KVView(*view, view.v_scale)
        assert view.prepared is not None
        assert other.prepared is None
        for options in (rules, {**rules, "topk_query": "dense"}, {**rules, "window": 20}):
            out = sparse_feature_decode(q, view, **options)
            assert "decode: hopper" in explain()
            assert torch.equal(out, sparse_feature_decode(q, other, **options))
        return view

    short = SparseKVCache(8, dense_dims=16, **options)
    for end in range(1, 40):
        q = torch.randn(2, 4, 1, 64, device=DEVICE, dtype=k.dtype)
        view = short.append(k[:, :, end - 1 : end], v[:, :, end - 1 : end])
        expected = sparse_feature_decode(q, KVView(*view, view.v_scale))
        assert torch.equal(sparse_feature_decode(q, view), expected)
    cache.append(k[:, :, :290], v[:, :, :290])
    for end in range(291, 312):
        view = step(cache, end - 1, end)
    step(cache, 311, 315)
    step(cache, 315, 316, key_padding_mask=torch.rand(2, 316, device=DEVICE) < 0.2)
    copied = copy.deepcopy(view)
    assert copied.prepared is None
    other = copy.deepcopy(cache)
    step(other, 316, 317)
    step(cache, 316, 317)
    cache.select_batch(torch.tensor([1, 1]))
    step(cache, 317, 318)
    cache.crop(100)
    step(cache, 318, 319)

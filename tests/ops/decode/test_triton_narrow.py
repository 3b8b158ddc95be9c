"""The Triton decode kernel for few bits against plain decode: on the GPU where there is one, else through Triton's interpreter."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from decode_cases import DecodeRules, assert_graph_follows
from flashsfa import explain, sparse_feature_decode, topk_codes
from flashsfa.narrow import NarrowRows
from flashsfa.ops.decode import held
from flashsfa.ops.decode.hopper import decode as hopper
from flashsfa.stored import KVView
from held_cases import AXES, CODES, DEVICE, ROWS, assert_decodes, coded, draw, run

# The interpreter multiplies bfloat16's bit patterns; but levels are multiplied in float16, and those of bfloat16 queries too.
DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ROWS + CODES + AXES)
def test_every_kind_of_keys(kind, dtype):
    q, k, v = draw(group=3, dtype=dtype)
    assert_decodes("triton", q, KVView(coded(kind, k), v))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [16, 8, 4, 3])
def test_every_kind_of_values(bits, dtype):
    q, k, v = draw(group=2, dv=48, dtype=dtype)
    v[0, 0, 3] *= 1000  # one row's scale is far above the others'
    v[1, 1] *= 1e-4
    assert_decodes("triton", q, KVView(topk_codes(k, 5), NarrowRows.encode(v, bits)))


@pytest.mark.parametrize("kind", ["rows 8", "rows 4", "axes"])
def test_levels_do_not_depend_on_the_dtype_of_queries(kind):
    """Queries in bfloat16 over levels: no product is in bfloat16."""
    q, k, v = draw(group=2, dtype=torch.bfloat16)
    assert_decodes("triton", q, KVView(coded(kind, k), NarrowRows.encode(v, 4)))


@pytest.mark.parametrize("factor", [1e-5, 3e3])
@pytest.mark.parametrize("kind", ["rows 4", "axes", "9 d8s4-bitmap"])
def test_small_and_large_queries(kind, factor):
    """Folded queries are scaled, so float16 neither loses nor overflows them."""
    q, k, v = draw(dtype=torch.float16)
    scale = 0.125 / factor
    assert_decodes("triton", q * factor, KVView(coded(kind, k), NarrowRows.encode(v, 8)), scale=scale)


@pytest.mark.parametrize(("d", "dv"), [(96, 96), (128, 64), (256, 128), (32, 16)])
@pytest.mark.parametrize(("kind", "v_bits"), [("rows 4", 4), ("9 d8s4-packed", 3), ("0 d8s4-bitmap", 4), ("axes", 3)])
def test_widths(kind, v_bits, d, dv):
    q, k, v = draw(b=1, group=3, n=35, d=d, dv=dv)
    assert_decodes("triton", q, KVView(coded(kind, k, topk=7), NarrowRows.encode(v, v_bits)))


@pytest.mark.parametrize("topk", [1, 23])
@pytest.mark.parametrize("kind", ["9 d8s4-packed", "9 d8s4-bitmap", "0 d16s8-uint8"])
def test_kept_entries(kind, topk):
    q, k, v = draw(b=1, n=35)
    k[0, 0, :, 30:] *= 9  # the first words of a bitmap are empty
    assert_decodes("triton", q, KVView(coded(kind, k, topk), v), topk_query=4 if topk == 1 else None)


@pytest.mark.parametrize("n", [0, 1, 15, 17, 130])
@pytest.mark.parametrize(("group", "m"), [(1, 1), (8, 1), (3, 2), (1, 16), (2, 16)])
def test_lengths_and_query_rows(n, group, m):
    q, k, v = draw(b=1, group=group, m=m, n=n, d=32)
    assert_decodes("triton", q, KVView(coded("rows 4", k), NarrowRows.encode(v, 4)))


def spoilt(kv, unseen):
    """The view with NaN, or all bits set, wherever `unseen` [B, 1, N] is."""

    def spoil(x):
        rows = unseen.reshape(*unseen.shape, *[1] * (x.ndim - 3))
        return x.masked_fill(rows, math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

    return kv.map(spoil)


LENGTHS = {"all": None, "some": (70, 3), "none": (0, 57)}


@pytest.mark.parametrize("lens", LENGTHS)
@pytest.mark.parametrize("window", [None, 1, 30])
@pytest.mark.parametrize(("kind", "v_bits"), [("rows 4", 4), ("9 d8s4-bitmap", 8), ("9 d8s4-packed", 3), ("axes", 16)])
def test_visibility(kind, v_bits, window, lens):
    """kv_lens, window and padding, with NaN wherever no query looks."""
    q, k, v = draw(hkv=1, group=2, m=2, n=70)
    padding = torch.zeros(2, 70, dtype=torch.bool, device=DEVICE)
    padding[0, :20], padding[1, 2], padding[1, 50:56] = True, True, True
    rules = DecodeRules(None if LENGTHS[lens] is None else torch.tensor(LENGTHS[lens], device=DEVICE), window, padding)
    kv = KVView(coded(kind, k), NarrowRows.encode(v, v_bits))
    unseen = ~rules.visible(2, 70, DEVICE).any(1)[:, None]
    assert_decodes("triton", q, kv, rules, read=spoilt(kv, unseen), softcap=2.0)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize(("kind", "v_bits"), [("rows 4", 4), ("9 d8s4-bitmap", 4), ("axes", 3)])
def test_pages(kind, v_bits, page_size):
    q, k, v = draw(group=2, m=2, n=128)
    kv = KVView(coded(kind, k), NarrowRows.encode(v, v_bits))
    lens = torch.tensor([101, 128], device=DEVICE)
    table = torch.randperm(2 * 128 // page_size, device=DEVICE).to(torch.int32).unflatten(0, (2, -1))

    def paged(x):
        pool = x.new_full(
            (2 * 128 // page_size + 3, x.shape[1], page_size, *x.shape[3:]), 255 if x.dtype == torch.uint8 else 100
        )
        if x.is_floating_point():
            pool.fill_(math.nan)
        pool[table.long()] = x.unflatten(2, (-1, page_size)).transpose(1, 2)
        return pool

    pools = kv.map(paged)
    table[0, -(-101 // page_size) :] = -7  # never read
    found = assert_decodes("triton", q, kv, DecodeRules(lens, 60, page_table=table), read=pools)
    whole = run("triton", q, kv, DecodeRules(lens, 60))
    torch.testing.assert_close(found, whole, rtol=0, atol=0)


def test_strided_caches():
    """Any strides but the last: a cache laid out [B, N, Hkv, C], and a slice of a larger one."""
    q, k, v = draw(group=3)
    kv = KVView(coded("9 d8s4-packed", k), NarrowRows.encode(v, 4))
    turned = kv.map(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
    assert_decodes("triton", q, kv, read=turned)
    assert_decodes("triton", q, kv.coded(3, 38))
    wrong = replace(kv, v=replace(kv.v, kept=kv.v.kept.mT.contiguous().mT))
    with pytest.raises(ValueError, match="last dimension of v"):
        run("triton", q, wrong, DecodeRules())


@pytest.mark.parametrize("kind", ["rows 8", "9 d8s4-bitmap"])
def test_nan_of_a_seen_token_is_seen(kind):
    q, k, v = draw(b=1, hkv=1, group=2)
    q[0, 1, 0, 3] = math.nan
    kv = KVView(coded(kind, k), NarrowRows.encode(v, 4))
    out, lse = run("triton", q, kv, DecodeRules())
    assert out.isnan().all(-1).flatten().tolist() == lse.isnan().flatten().tolist() == [False, True]
    q, v[0, 0, 5, 7] = q.nan_to_num(), math.inf
    out, lse = run("triton", q, KVView(coded(kind, k), NarrowRows.encode(v, 4)), DecodeRules())
    assert out.isnan().all()
    assert lse.isfinite().all()
    k[0, 0, 5, :30] = math.nan
    assert run("triton", q, KVView(coded(kind, k), NarrowRows.encode(v, 4)), DecodeRules())[1].isnan().all()


def test_values_in_8_bits_with_a_scale_beside():
    """Axes in a cache of 8 bits: v and v_scale as `FeatureCodes` have them."""
    q, k, v = draw(group=2)
    rows = NarrowRows.encode(v, 8)
    codes = coded("axes", k)
    found = run("triton", q, KVView(codes, rows.kept, rows.scale), DecodeRules())
    torch.testing.assert_close(found, run("triton", q, KVView(codes, rows), DecodeRules()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["rows 4", "9 d8s4-bitmap", "axes"])
def test_compiled_equals_eager(kind):
    q, k, v = draw(group=2)
    kv = KVView(coded(kind, k), NarrowRows.encode(v, 4))
    lens = torch.tensor([41, 9], device=DEVICE)

    def step(q, kv, lens):
        return run("triton", q * 2, kv, DecodeRules(lens, 30))[0] + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, kv, lens), step(q, kv, lens), rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "v_bits"), [("rows 4", 4), ("9 d8s4-bitmap", 4), ("axes", 3)])
def test_opcheck(kind, v_bits):
    q, k, v = draw(group=2, n=20)
    what = held.Held.of(KVView(coded(kind, k), NarrowRows.encode(v, v_bits)))
    tensors = [what.tensors.get(name) for name in held.NAMES]
    lens = torch.tensor([20, 9], device=DEVICE)
    given = (
        q,
        tensors,
        what.sizes,
        None,
        lens,
        torch.zeros(2, 20, dtype=torch.bool, device=DEVICE),
        5,
        [0.1, 0.0, 0.0],
        None,
        "triton",
    )
    torch.library.opcheck(torch.ops.flashsfa.decode_held.default, given)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ROWS[1:] + CODES[:2] + AXES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_public_function_runs_triton(kind, dtype, monkeypatch):
    monkeypatch.setattr(hopper, "obstacle", lambda *_: "another kernel is tested here")
    q, k, v = draw(b=4, hkv=4, group=4, n=5000, dtype=dtype)
    kv = KVView(coded(kind, k), NarrowRows.encode(v, 4), kv_lens=torch.tensor([5000, 1, 17, 4000], device=DEVICE))
    found = sparse_feature_decode(q, kv, return_lse=True, topk_query="dense")
    assert "decode: triton" in explain()
    assert_decodes("triton", q, kv, DecodeRules(kv.kv_lens))
    for _ in range(3):
        again = sparse_feature_decode(q, kv, return_lse=True, topk_query="dense")
        torch.testing.assert_close(again, found, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["rows 4", "9 d8s4-bitmap", "axes"])
def test_cuda_graph_follows_kv_lens(kind):
    q, k, v = draw(group=4, n=3000, dtype=torch.bfloat16)
    kv, lens = KVView(coded(kind, k), NarrowRows.encode(v, 4)), torch.tensor([3000, 1], device=DEVICE)

    def step():
        return run("triton", q, kv, DecodeRules(lens))

    assert_graph_follows(step, lens)

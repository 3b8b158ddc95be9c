"""Raw pages hold what a paged cache holds, and decode reads them in place."""

from dataclasses import replace

import pytest
import torch

from append_cases import DEVICE, use_kernel
from decode_cases import DecodeRules, decode
from flashsfa import FeatureCodes, sparse_feature_decode, topk_codes
from flashsfa.cache.paged import PagedSparseKVCache
from flashsfa.coder import Coder
from flashsfa.formats import cache_bits
from flashsfa.ops import record
from flashsfa.stored import KVView
from flashsfa.vllm.layout import PageLayout, PageStore
from vllm_server import CODING, DENSE, DV, HKV, PAGE, TOPK, D, cache_views

DTYPES = [torch.float32, torch.bfloat16]


def raw_pages(layout, pages, heads=HKV, page_size=PAGE, gap=0, device="cpu"):
    """[P, Hkv, page_size, C] uint8 in a buffer of 255s: NaN in any float, an index past any head; `gap` between pages."""
    cell = layout.token_bytes
    stride = heads * page_size * cell + gap
    raw = torch.full((pages * stride,), 255, dtype=torch.uint8, device=device)
    return raw.as_strided((pages, heads, page_size, cell), (stride, page_size * cell, cell, 1))


def paged(topk, dense, dtype, bits=None, width=D, v_width=DV):
    return PageLayout(Coder(topk, dense, cache_bits(bits)), width, v_width, dtype)


@pytest.mark.parametrize(("dense", "topk", "dtype", "bits", "expected"), [
    (0, 16, torch.bfloat16, None, 304), (16, 16, torch.bfloat16, None, 336), (0, 15, torch.float16, None, 302),
    (3, 5, torch.float32, None, 552), (16, 16, torch.bfloat16, "int8", 184),
])  # fmt: skip
def test_bytes_of_a_token(dense, topk, dtype, bits, expected):
    assert paged(topk, dense, dtype, bits, 128, 128).token_bytes == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dense", "topk", "page_size"), [(0, 5, 16), (4, 5, 16), (4, 8, 64), (31, 1, 16)])
def test_views_are_disjoint_aligned_and_cover_the_page(dense, topk, page_size, dtype):
    layout = paged(topk, dense, dtype)
    pages = raw_pages(layout, 3, page_size=page_size)
    views = layout.views(pages).tensors()
    for x, width in zip(views, (dense, topk, topk, DV), strict=True):
        assert x.shape == (3, HKV, page_size, width)
        assert x.untyped_storage().data_ptr() == pages.untyped_storage().data_ptr()
        assert (x.storage_offset() * x.itemsize) % 16 == 0
        assert all(x.stride(i) * x.itemsize % 16 == 0 for i in (0, 1))
        assert x.stride()[2:] == (width, 1) or width == 0
    for x in views:  # the last one written would overwrite its neighbours
        x.fill_(1)
    used = sum(x.nbytes for x in views)
    assert [int(x.double().sum()) for x in views] == [x.numel() for x in views]
    assert int((pages == 255).sum()) == pages.numel() - used
    assert pages.numel() - used == 3 * HKV * page_size * (-topk % dtype.itemsize)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [(torch.bfloat16, bits) for bits in (None, "int8", "int4", "d8s8v8", "d16s8v4-packed", "d8s4v16-bitmap", "d8s4v4-uint8", "d8s4v3")]
    + [(torch.float16, bits) for bits in (None, "int8", "d16s8v4-packed", "d8s4v3")],
    ids=str,
)  # fmt: skip
def test_one_launch_writes_and_reads_what_pytorch_does(dtype, bits, monkeypatch):
    """On a Hopper GPU; padding goes to page 0 or nowhere. Keys and values are parts of wider rows."""
    layout = paged(TOPK, DENSE, dtype, bits, v_width=32)
    slots = torch.tensor([PAGE, 3 * PAGE - 1, -1, PAGE + 7, -1, 2 * PAGE], device=DEVICE)
    rows = torch.randn(len(slots), HKV, D + 32).to(DEVICE, dtype).transpose(0, 1)[None]
    found, expected = (raw_pages(layout, 3, gap=64, device=DEVICE) for _ in range(2))
    layout.write(expected, slots.clamp(min=0), layout.coder.encode(rows[..., :D], rows[..., D:]))
    held = slots[slots > 0].repeat(2)
    due = layout.read(expected, held).rows(dtype)
    use_kernel(monkeypatch)
    store = PageStore(layout)
    for part in (slice(0, 4), slice(4, None)):
        store.write(found, slots[part], rows[:, :, part, :D], rows[:, :, part, D:])
    assert torch.equal(found[1:], expected[1:])
    assert record.last_choice("append").backend == "hopper"
    read = store.rows(expected, held)
    assert record.last_choice("read").backend == "hopper"
    assert torch.equal(read.k, due.k)
    is_rotated = bits is not None and cache_bits(bits) is not torch.int8 and cache_bits(bits).v_bits < 8
    torch.testing.assert_close(
        read.v, due.v, rtol=torch.finfo(dtype).eps if is_rotated else 0, atol=1e-6 if is_rotated else 0
    )
    nowhere = store.rows(expected, torch.tensor([-1, 3 * PAGE], device=DEVICE))
    assert nowhere.k.isnan().all()
    assert nowhere.v.isnan().all()


@pytest.mark.parametrize(("pages", "heads"), [(1, 1), (3, 1), (1, 2)])
def test_a_single_page_or_head(pages, heads, monkeypatch):
    """Its stride may be any number."""
    layout = paged(TOPK, DENSE, torch.bfloat16)
    slots = torch.arange(2, 7) + PAGE * (pages - 1)
    k, v = torch.randn(1, heads, 5, D).bfloat16(), torch.randn(1, heads, 5, DV).bfloat16()
    found, expected = (raw_pages(layout, pages, heads) for _ in range(2))
    layout.write(expected, slots, layout.coder.encode(k, v))
    use_kernel(monkeypatch)
    store = PageStore(layout)
    store.write(found, slots, k, v)
    assert torch.equal(found, expected)
    assert torch.equal(store.rows(found, slots).v, v)


@pytest.mark.parametrize("bits", ["int4", "d8s8v8", "d8s16v16"])
def test_keys_that_keep_every_feature_are_read(bits, monkeypatch):
    layout = PageLayout(Coder(D, 0, cache_bits(bits)), D, 32, torch.bfloat16)
    pages, slots = raw_pages(layout, 2), torch.arange(PAGE, PAGE + 5)
    layout.write(pages, slots, layout.coder.encode(*torch.randn(2, 1, HKV, 5, D).bfloat16()))
    due = layout.read(pages, slots).rows(torch.bfloat16)
    use_kernel(monkeypatch)
    read = PageStore(layout).rows(pages, slots)
    for one, another in ((read.k, due.k), (read.v, due.v)):
        torch.testing.assert_close(one, another, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dense", "bits"), [(0, None), (DENSE, None), (DENSE, "int8"), (DENSE, "d8s8v8")])
def test_decode_reads_raw_pages_as_it_reads_a_paged_cache(dense, bits, dtype):
    layout = paged(TOPK, dense, dtype, bits)
    cache = PagedSparseKVCache(TOPK, dense_dims=dense, pages=9, page_size=PAGE, dtype=cache_bits(bits))
    pages = raw_pages(layout, 9, gap=64)
    sequences = [cache.add() for _ in range(3)]
    for sequence, n in zip(sequences, (1, PAGE, 2 * PAGE + 3), strict=True):  # each its own length
        cache.append([sequence], torch.randn(1, HKV, n, D, dtype=dtype), torch.randn(1, HKV, n, DV, dtype=dtype))
    # then all together past the ends of pages
    cache.append(sequences, torch.randn(3, HKV, 2, D, dtype=dtype), torch.randn(3, HKV, 2, DV, dtype=dtype))
    held = cache.view(sequences)
    for row, length in zip(held.page_table.tolist(), held.kv_lens.tolist(), strict=True):
        slots = torch.tensor([row[i // PAGE] * PAGE + i % PAGE for i in range(length)])
        taken = held.map(lambda x, slots=slots: x[slots // PAGE, :, slots % PAGE].transpose(0, 1)[None])
        layout.write(pages, slots, taken)
        for x, y in zip(layout.read(pages, slots).tensors(), taken.tensors(), strict=True):
            assert torch.equal(x, y)
    q = torch.randn(3, 2 * HKV, 1, D, dtype=dtype)
    raw = replace(layout.views(pages), kv_lens=held.kv_lens, page_table=held.page_table)
    for rules in ({}, {"window": 7}, {"topk_query": D}):
        expected = sparse_feature_decode(q, held, **rules)
        out = sparse_feature_decode(q, raw, **rules)
        assert not out.isnan().any()
        assert torch.equal(out, expected)


def test_the_fused_kernel_reads_raw_pages_in_place():
    decode_triton = pytest.importorskip("flashsfa.ops.decode.triton.decode")
    layout = paged(TOPK, DENSE, torch.float32)
    pages = raw_pages(layout, 4, gap=32, device=DEVICE)
    k, v = (torch.randn(40, HKV, width, device=DEVICE) for width in (D, DV))
    table = torch.tensor([[3, 1, 2]], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([int(table[0, i // PAGE]) * PAGE + i % PAGE for i in range(40)], device=DEVICE)
    codes = topk_codes(k, TOPK, dense_dims=DENSE)
    layout.write(pages, slots, KVView(codes, v).map(lambda x: x.transpose(0, 1)[None]))
    q = torch.randn(1, 2 * HKV, 1, D, device=DEVICE)
    rules = DecodeRules(kv_lens=torch.tensor([40], dtype=torch.int32, device=DEVICE), page_table=table)
    out, _ = decode(decode_triton, q, *layout.views(pages), rules, D**-0.5, 0.0, topk_query=D)
    pool, pool_v = layout.views(pages)
    apart = FeatureCodes(*(x.contiguous() for x in (pool.dense, pool.values, pool.indices)), D)
    expected, _ = decode(decode_triton, q, apart, pool_v.contiguous(), rules, D**-0.5, 0.0, topk_query=D)
    assert torch.equal(out, expected)
    plain = sparse_feature_decode(q, pool, pool_v, kv_lens=rules.kv_lens, page_table=table, topk_query=D)
    torch.testing.assert_close(out, plain)


def test_pages_that_do_not_fit_are_refused():
    layout = paged(TOPK, DENSE, torch.bfloat16)
    pages = raw_pages(layout, 2)
    with pytest.raises(ValueError, match=f"C of {layout.token_bytes} bytes"):
        layout.views(pages[..., :-2])
    with pytest.raises(ValueError, match=r"must be contiguous.*LBHNC"):
        layout.views(pages.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match="whole elements of 2 bytes"):
        layout.views(raw_pages(layout, 2, gap=1))
    with pytest.raises(ValueError, match="topk must be"):
        paged(D, DENSE, torch.bfloat16)
    with pytest.raises(ValueError, match="floating dtype"):
        paged(TOPK, DENSE, torch.int8)


def test_pages_lie_as_vllm_lays_them(vllm, serve):
    from vllm.v1.kv_cache_interface import KVCacheTensor, compute_layout_strides, create_kv_cache_views
    from vllm.v1.worker.utils import customize_attention_spec

    from flashsfa.vllm.backend import SparseFeatureBackend

    serve(**CODING)
    spec = vllm.FullAttentionSpec(block_size=PAGE, num_kv_heads=HKV, head_size=D, head_size_v=DV, dtype=torch.float16)
    spec = customize_attention_spec(SparseFeatureBackend, spec)
    for layout in SparseFeatureBackend.supported_kv_cache_layouts():
        strides = compute_layout_strides(spec, 6, 2, layout)
        raw = torch.zeros(2 * 6 * spec.page_size_bytes, dtype=torch.int8)
        tensor = KVCacheTensor(raw.numel(), ["first", "second"], strides[0], strides[1])
        theirs = create_kv_cache_views(raw, spec, 6, layout, tensor)
        for x, y in zip(theirs, cache_views(spec, 6, layout), strict=True):
            assert (x.shape, x.stride(), x.storage_offset()) == (y.shape, y.stride(), y.storage_offset())
            paged(TOPK, DENSE, torch.float16).views(x)


def test_a_page_costs_what_its_codes_cost(vllm, serve):
    from flashsfa.vllm.backend import SparseFeatureBackend

    serve(topk=16, dense_dims=16)
    dense = vllm.FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=128, head_size_v=128, dtype=torch.bfloat16)
    spec = SparseFeatureBackend.customize_spec(dense)
    assert (dense.page_size_bytes, spec.page_size_bytes) == (16 * 8 * 512, 16 * 8 * 336)

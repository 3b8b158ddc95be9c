"""Prefill on sparse tensor cores: the queries' operand against the instruction set's tables, the kernel on Hopper."""

import ctypes
import dataclasses
import math
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import flashsfa
from flashsfa import reference, sparse_feature_attention
from flashsfa.codes import FeatureCodes, all_dense_codes, topk_codes
from flashsfa.mask import Mask
from flashsfa.ops.prefill import fused as dense
from flashsfa.ops.prefill.hopper import compiler, cuda, prefill

BF16, FP16 = torch.bfloat16, torch.float16


def coded(q, dense_dims=0):
    """q [..., D] as the kernel takes it: all that the 2:4 pattern holds beside the dense channel."""
    sparse_dims = q.shape[-1] - dense_dims
    return topk_codes(q, sparse_dims // 2, dense_dims=dense_dims, pattern="2:4") if sparse_dims else all_dense_codes(q)


# ---- the queries' operand, as the PTX ISA (wgmma.mma_async(.sp), m64nNk16 and k32) lays it out

HARNESS = """
#include <string.h>
#define __device__
#define __forceinline__ inline
%s
extern "C" void operand(const char* dense, const char* values, const char* indices, int tile, int n, char* to, u32* p) {
  const int first = 64 * tile, rows = n - first;
  auto copy = [&](int at, const char* from, bool there) { there ? memcpy(to + at, from, 16) : memset(to + at, 0, 16); };
  for (int thread = 0; thread < 128; ++thread)
    stage_queries(dense + 32 * DENSE_STEPS * first, 32 * DENSE_STEPS, values + 32 * SPARSE_STEPS * first,
                  indices + 16 * SPARSE_STEPS * first, rows, thread, copy);
  for (int thread = 0; thread < 128; ++thread) {
    const int row = thread / 32 * 16 + thread %% 32 / 4;
    const u64* features = (const u64*)(to + STEP_BYTES * STEPS) + 2 * SPARSE_STEPS * row;
    u32 words[WORDS];
    load_places(words, features, row < rows, row + 8 < rows, thread %% 32);
    for (int i = 0; i < WORDS; ++i) p[i * 128 + thread] = words[i];
  }
}
"""


@pytest.fixture(scope="module")
def operand(tmp_path_factory):
    """queries.cu, compiled for the host: entries [steps, 64, 16] of a tile and metadata [words, 128]."""
    compiler_path = shutil.which("c++")
    if compiler_path is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("queries")
    text = (compiler.SOURCES / "queries.cu").read_text()

    def load(codes, tile):
        sizes = [f"-DHEAD_DIM={codes.head_dim}", f"-DDENSE_DIMS={codes.dense_dims}"]
        library = folder / f"{codes.head_dim}-{codes.dense_dims}.so"
        if not library.exists():
            (folder / "queries.cpp").write_text(HARNESS % text)
            command = [compiler_path, "-std=c++17", "-w", "-O1", "-shared", "-fPIC", *sizes, folder / "queries.cpp"]
            subprocess.run([*command, "-o", library], check=True)
        steps = codes.dense_dims // 16 + codes.sparse_dims // 32
        index_entries = codes.sparse_dims // 4 * 64  # a byte for each of two features of four, in entries of two bytes
        staged = torch.full((steps * 1024 + index_entries,), math.nan, dtype=codes.dtype)
        places = torch.empty(max(1, -(-codes.sparse_dims // 64)), 128, dtype=torch.int32)
        parts = [ctypes.c_void_p(x.data_ptr()) for x in (codes.dense, codes.values, codes.indices)]
        outputs = [ctypes.c_void_p(x.data_ptr()) for x in (staged, places)]
        ctypes.CDLL(str(library)).operand(*parts, tile, codes.values.shape[0], *outputs)
        entries = staged[: steps * 1024].view(steps, 2, 64, 8)  # halves of the columns, rows
        return entries.transpose(1, 2).reshape(steps, 64, 16), places

    return load


def multiplied(entries, metadata, head_dim, dense_dims):
    """The rows [64, D] that the instructions would multiply."""
    tile = torch.zeros(64, head_dim, dtype=entries.dtype)
    for step in range(dense_dims // 16):
        tile[:, 16 * step : 16 * step + 16] = entries[step]
    for step in range((head_dim - dense_dims) // 32):
        places = torch.full((64, 8), -1)  # four bits a group
        for t in range(128):
            lane = t % 32
            if lane % 4 // 2 != step % 2:
                continue  # the selector picks two lanes of four
            for bit in range(0, 32, 4):
                r = t // 32 * 16 + lane // 4 + 8 * (bit // 16)
                places[r, lane % 2 * 4 + bit % 16 // 4] = int(metadata[step // 2, t]) >> bit & 15
        assert (places >= 0).all()
        first, second = places & 3, places >> 2
        assert (first < second).all()
        begin = dense_dims + 32 * step
        groups = tile[:, begin : begin + 32].unflatten(1, (8, 4))
        groups.scatter_(2, torch.stack((first, second), 2), entries[dense_dims // 16 + step].unflatten(1, (8, 2)))
    return tile


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("head_dim", "dense_dims"),
    [(64, 0), (64, 32), (64, 64), (128, 0), (128, 32), (128, 64), (128, 96), (128, 128), (256, 0), (256, 32)],
)
@pytest.mark.parametrize("n", [1, 64, 73])
def test_instructions_multiply_the_coded_rows(operand, head_dim, dense_dims, n):
    codes = coded(torch.randn(n, head_dim).to(BF16), dense_dims)
    tiles = -(-n // 64)
    expected = torch.zeros(tiles * 64, head_dim, dtype=BF16)
    expected[:n] = codes.to_dense()
    for tile in range(tiles):
        found = multiplied(*operand(codes, tile), head_dim, dense_dims)
        assert torch.equal(found, expected[64 * tile : 64 * (tile + 1)])


@pytest.mark.parametrize("dense_dims", [0, 32])
def test_a_smaller_budget_fills_the_pattern_with_zeros(dense_dims):
    codes = topk_codes(torch.randn(2, 3, 5, 128), 9, dense_dims=dense_dims, pattern="2:4")
    dense, values, indices = prefill.in_pairs(codes)
    assert values.shape[-1] == (128 - dense_dims) // 2
    groups = indices.unflatten(-1, (-1, 2)).long() // 4
    assert torch.equal(groups, torch.arange(groups.shape[-2], device=groups.device)[:, None].expand_as(groups))
    assert torch.equal(FeatureCodes(dense, values, indices, 128).to_dense(), codes.to_dense())


# ---- the pattern on the public path, on whatever device and backend


def slope(out):
    """A fixed gradient; float16 cannot count more than 65504 entries."""
    return torch.linspace(-1, 1, out.numel(), device=out.device).to(out.dtype).view(out.shape)


def attend(q, k, v, **options):
    """Output, log-sum-exp and gradients under a fixed output gradient."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = sparse_feature_attention(q, k, v, return_lse=True, **options)
    out.backward(slope(out))
    return out.detach(), lse, q.grad, k.grad, v.grad


def plain(q, k, v, *, topk, topk_query, dense_dims, is_causal):
    """The same by `reference`, in the dtype of the inputs, in full."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out, lse = reference.sparse_feature_attention(
        q, k, v, topk=topk, topk_query=topk_query, dense_dims=dense_dims, query_pattern="2:4",
        mask=Mask(is_causal),
    )  # fmt: skip
    out.backward(slope(out))
    return out.detach(), lse.detach(), q.grad, k.grad, v.grad


def check_public(q, k, v, backend="auto", **options):
    """The error rule for outputs and gradients. Inputs select alike in every dtype."""
    found = attend(q, k, v, query_pattern="2:4", backend=backend, **options)
    truth = plain(q.double(), k.double(), v.double(), **options)
    rough = plain(q, k, v, **options)
    # dq and dk are differences of terms as large as grad_out · out; where these cancel, their rounding stays.
    terms = q.shape[-1] ** -0.5 * truth[0].abs().sum(-1).max()  # |grad_out| <= 1
    terms = (0, 0, terms * k.abs().max(), terms * q.abs().max(), 0)
    eps = torch.finfo(q.dtype).eps
    for x, exact, same, term in zip(found, truth, rough, terms, strict=True):
        seen = exact.isfinite()
        assert torch.equal(x.isfinite(), seen)
        error, allowed = ((y.double() - exact)[seen].abs().max() for y in (x, same))
        assert error <= 2 * allowed + eps * (4 * exact[seen].abs().max() + term)


BUDGETS = [(64, 64, 8, 8, 0), (64, 64, 8, 32, 0), (64, 32, 8, 16, 32), (32, 16, 3, 5, 4)]  # D, Dv, topk, topk_query, M


@pytest.mark.parametrize("backend", ["auto", "dense", "reference"])
@pytest.mark.parametrize(("head_dim", "value_dim", "topk", "topk_query", "dense_dims"), BUDGETS)
def test_every_backend_prunes_alike(head_dim, value_dim, topk, topk_query, dense_dims, backend):
    q = torch.randn(2, 4, 9, head_dim)
    k, v = torch.randn(2, 2, 13, head_dim), torch.randn(2, 2, 13, value_dim)
    check_public(q, k, v, backend, topk=topk, topk_query=topk_query, dense_dims=dense_dims, is_causal=True)


@pytest.mark.parametrize("dense_dims", [0, 4])
def test_opcheck_selection(dense_dims):
    x = torch.randn(2, 3, 16, requires_grad=True)
    torch.library.opcheck(torch.ops.flashsfa.prune_24.default, (x, dense_dims))


def test_a_query_keeps_its_features_in_the_pattern():
    q, k, v = (torch.randn(1, 1, 6, 16, requires_grad=True) for _ in "qkv")
    sparse_feature_attention(q, k, v, topk=16, topk_query=5, query_pattern="2:4").sum().backward()
    kept = q.grad != 0
    assert torch.equal(kept, topk_codes(q.detach(), 5, pattern="2:4").to_dense() != 0)
    assert (kept.unflatten(-1, (-1, 4)).sum(-1) <= 2).all()


def test_packed_sequences_take_the_pattern():
    q, k, v = (torch.randn(11, 2, 16) for _ in "qkv")
    bounds = torch.tensor([0, 4, 11], dtype=torch.int32)
    options = {"topk": 3, "topk_query": 8, "query_pattern": "2:4", "is_causal": True}
    out = flashsfa.sparse_feature_attention_varlen(q, k, v, bounds, bounds, **options)
    for a, b in ((0, 4), (4, 11)):
        one = sparse_feature_attention(*(x[a:b].transpose(0, 1)[None] for x in (q, k, v)), **options)
        torch.testing.assert_close(out[a:b], one[0].transpose(0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk_query": 9}, "at most half"),
        ({"topk_query": 16}, "at most half"),
        ({"dense_dims": 2}, "whole groups of four"),
        ({"query_pattern": "1:2"}, "'2:4' or None"),
    ],
    ids=str,
)
def test_budgets_that_the_pattern_cannot_hold(options, message):
    x = torch.randn(1, 1, 3, 16)
    with pytest.raises(ValueError, match=message):
        sparse_feature_attention(x, x, x, **{"topk": 3, "query_pattern": "2:4"} | options)


@pytest.mark.cpu
def test_what_the_kernel_cannot_take_is_explained(caplog):
    x = torch.randn(1, 1, 3, 64).to(BF16)
    sparse_feature_attention(x, x, x, topk=8, query_pattern="2:4")
    assert "attention: dense (" in flashsfa.explain()
    assert "no sparse tensor cores" in flashsfa.explain()
    assert "Hopper" in flashsfa.explain()


@pytest.mark.cpu
def test_a_kernel_that_cannot_be_compiled_falls_back(monkeypatch):
    def refuse(*_, **__):
        raise cuda.CompilationError("no NVRTC here")

    monkeypatch.setattr(prefill, "obstacle", lambda *_: None)
    monkeypatch.setattr(prefill, "forward", refuse)
    x = torch.randn(1, 2, 9, 64).to(BF16)
    check_public(x, x, x, topk=8, topk_query=32, dense_dims=0, is_causal=True)
    assert "cannot be compiled: no NVRTC here" in flashsfa.explain()


# ---- compilation, which needs NVRTC but no GPU


@pytest.fixture
def nvrtc(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHSFA_CACHE", str(tmp_path))
    try:
        cuda.nvrtc_version()
    except cuda.CompilationError as error:
        pytest.skip(str(error))


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("head_dim", "value_dim", "dense_dims", "much"),
    [
        (64, 64, 0, True),
        (128, 128, 0, True),
        (128, 128, 128, True),
        (128, 128, 128, False),
        (64, 128, 32, True),
        (128, 64, 128, True),
        (128, 64, 64, False),
        (128, 128, 96, False),
        (256, 256, 0, False),
        (64, 256, 32, True),
        (256, 64, 192, False),
    ],
)
def test_compiles_once(nvrtc, tmp_path, monkeypatch, dtype, head_dim, value_dim, dense_dims, much):
    tile = prefill.default_tile(dtype, head_dim, value_dim, dense_dims, much=much)
    assert tile.shared_bytes <= 227 * 1024
    cubin = compiler.compile_cubin(tile)
    assert cubin.startswith(b"\x7fELF")
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".cubin"]
    monkeypatch.setattr(cuda, "compile_cubin", lambda *_: pytest.fail("compiled again"))
    assert compiler.compile_cubin(tile) == cubin


@pytest.mark.cpu
def test_refused_source_says_why(nvrtc, monkeypatch):
    monkeypatch.setattr(compiler, "source", lambda tile: "no CUDA")
    with pytest.raises(cuda.CompilationError, match="no CUDA"):
        compiler.compile_cubin(compiler.Tile(BF16, 64, 64))


@pytest.mark.cpu
def test_what_cannot_be_compiled_is_not_tried_again(monkeypatch):
    tries = []

    def refuse(tile, afresh):
        tries.append(tile)
        raise cuda.CompilationError("refused")

    monkeypatch.setattr(compiler, "compile_cubin", refuse)
    for _ in range(2):
        with pytest.raises(cuda.CompilationError, match="refused"):
            prefill._load(compiler.Tile(BF16, 64, 64, stages=7), 0)
    assert len(tries) == 1


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("n_q", "n_k", "rival", "rules", "faster"),
    [
        (2048, 2048, dense.CudaCudnn, {}, True),
        (2047, 2047, dense.CudaCudnn, {}, False),
        (512, 16384, dense.CudaCudnn, {}, True),
        (511, 16384, dense.CudaCudnn, {}, False),
        (1024, 1024, dense.CudaFlash, {}, True),
        (4096, 4096, dense.CudaFlash, {"window": 256}, True),
        (4096, 4096, dense.CudaFlash, {"window": 255}, False),
        (4096, 4096, dense.CudaFlash, {"window": 128, "is_causal": False}, True),  # on both sides
        (4096, 4096, dense.CudaFlash, {"lengths": [3000, 600, 496]}, True),
        (4096, 4096, dense.CudaFlash, {"lengths": [500] * 8 + [96]}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_dense_queries_for_the_kernel(monkeypatch, n_q, n_k, rival, rules, faster, dtype):
    monkeypatch.setattr(prefill, "_is_hopper", lambda _: True)
    monkeypatch.setattr(dense, "choose_kernel", lambda *_: (rival(), ""))
    q, k = (torch.empty(1, 2, n, 128, dtype=dtype, device="meta") for n in (n_q, n_k))
    packed = {}
    if lengths := rules.get("lengths"):
        packed = {
            "cu_seqlens_q": torch.empty(len(lengths) + 1),
            "max_seqlen_q": max(lengths),
            "max_seqlen_k": max(lengths),
        }
    mask = Mask(rules.get("is_causal", True), rules.get("window"), **packed)
    assert prefill.is_faster(q, k, k, mask, 0.1) == (faster and dtype == BF16)


@pytest.mark.parametrize(
    ("rows", "seen", "much"),
    [(16 * 8192, 8192, True), (16 * 4096, 4096, False), (16 * 16384, 4095, False), (101376, 4096, True), (101375, 4096, False)],
)  # fmt: skip
def test_long_contexts_take_three_consumers(rows, seen, much):
    assert prefill.is_much(rows, seen, multiprocessors=132) == much
    assert prefill.default_tile(BF16, 128, 128, 0, much=much).consumers == (3 if much else 2)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "n", "together"),
    [(16, 16, 4096, 16), (16, 16, 16384, 4), (16, 16, 65536, 1), (32, 8, 65536, 4), (7, 7, 16384, 4)],
)
def test_heads_that_share_the_cache_are_mixed(heads, kv_heads, n, together):
    assert prefill.heads_together(heads, kv_heads, n * (128 + 128) * 2) == together


# ---- the kernel

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def check(q, k, v, is_causal, window=None, lengths=None, **changes):
    """The error rule for out and log-sum-exp, against fp64, with tiles for little and for much. `q` are codes, packed where
    there are `lengths` (of their sequences and of the keys'); barriers trap instead of hanging."""
    scale = q.head_dim**-0.5
    mask = Mask(is_causal, window, **(packing(*lengths) if lengths else {}))
    assert prefill.obstacle(q, k, v, mask, scale) is None
    rows = q.to_dense()
    truth, true_lse = reference.attention(rows.double(), k.double(), v.double(), mask=mask, scale=scale)
    plain, plain_lse = reference.attention(rows, k, v, mask=mask, scale=scale)
    allowed = 2 * (plain.double() - truth).abs().max() + 4 * torch.finfo(q.dtype).eps * truth.abs().max()
    seen = true_lse.isfinite()
    if seen.any():
        lse_allowed = 2 * (plain_lse.double() - true_lse)[seen].abs().max() + 1e-5 * true_lse[seen].abs().max()
    usual = [prefill.default_tile(q.dtype, q.head_dim, v.shape[-1], q.dense_dims, much=much) for much in (False, True)]
    for tile in dict.fromkeys(dataclasses.replace(tile, spin_limit=1 << 22, **changes) for tile in usual):
        out, lse = prefill.forward(q, k, v, mask=mask, scale=scale, tile=tile)
        assert out.shape == truth.shape
        assert out.dtype == q.dtype
        assert (out.double() - truth).abs().max() <= allowed
        assert torch.equal(lse == -torch.inf, ~seen)
        if seen.any():
            assert (lse.double() - true_lse)[seen].abs().max() <= lse_allowed
        again, _ = prefill.forward(q, k, v, mask=mask, scale=scale, tile=tile)
        assert torch.equal(out, again)


def packing(q_lengths, k_lengths):
    """What an `Mask` says about packed sequences of these lengths."""
    bounds = [torch.tensor([0, *n], device="cuda").cumsum(0, dtype=torch.int32) for n in (q_lengths, k_lengths)]
    return {"cu_seqlens_q": bounds[0], "cu_seqlens_k": bounds[1],
            "max_seqlen_q": max(q_lengths), "max_seqlen_k": max(k_lengths)}  # fmt: skip


def normal(*shape, dtype=BF16):
    return torch.randn(*shape, dtype=dtype, device="cuda")


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("heads", "n_q", "n_k", "head_dim", "value_dim", "dense_dims", "dtype"),
    [
        ((1, 1), 1, 1, 64, 64, 0, BF16),
        ((2, 2), 1, 777, 128, 128, 0, BF16),
        ((7, 1), 513, 65, 128, 128, 0, BF16),
        ((4, 2), 300, 300, 128, 128, 0, FP16),
        ((3, 1), 65, 1023, 64, 64, 0, FP16),
        ((8, 2), 1000, 1000, 64, 64, 0, BF16),
        ((2, 1), 190, 260, 64, 128, 0, BF16),
        ((2, 1), 190, 260, 128, 64, 0, BF16),
        ((2, 2), 1, 65, 64, 64, 32, BF16),
        ((4, 1), 513, 129, 128, 128, 32, BF16),
        ((3, 1), 300, 1023, 64, 64, 32, FP16),
        ((2, 2), 700, 700, 128, 128, 64, BF16),
        ((2, 1), 190, 260, 128, 64, 96, FP16),
        ((2, 1), 333, 333, 64, 128, 64, BF16),
        ((2, 1), 333, 333, 128, 128, 128, BF16),
        ((3, 1), 300, 1023, 256, 256, 0, BF16),
        ((2, 1), 190, 260, 256, 64, 32, FP16),
        ((2, 2), 513, 129, 64, 256, 0, BF16),
    ],
)
def test_forward(heads, n_q, n_k, head_dim, value_dim, dense_dims, dtype, is_causal):
    q = coded(3 * normal(2, heads[0], n_q, head_dim, dtype=dtype), dense_dims)
    k, v = (normal(2, heads[1], n_k, width, dtype=dtype) for width in (head_dim, value_dim))
    check(q, k, v, is_causal)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [1, 63, 200, 5000])
@pytest.mark.parametrize(("n_q", "n_k", "head_dim"), [(700, 700, 128), (65, 900, 64), (900, 65, 64), (513, 1000, 256)])
def test_windows(n_q, n_k, head_dim, window, is_causal):
    q = coded(3 * normal(2, 4, n_q, head_dim))
    k, v = (normal(2, 2, n_k, head_dim) for _ in "kv")
    check(q, k, v, is_causal, window)


PACKED = [  # lengths of query and of key sequences
    ([200, 1, 0, 333, 129], [200, 1, 0, 333, 129]),
    ([1, 65, 0, 190, 7, 300], [513, 64, 5, 1023, 0, 77]),
    ([0, 128, 1], [3, 0, 128]),
    ([700], [701]),
]


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize(("is_causal", "window"), [(False, None), (True, None), (False, 63), (True, 200)])
@pytest.mark.parametrize(
    ("heads", "head_dim", "value_dim", "dense_dims"),
    [((4, 2), 128, 128, 0), ((3, 1), 64, 64, 0), ((2, 2), 128, 128, 32), ((4, 1), 256, 256, 0), ((2, 1), 64, 128, 32)],
)
@pytest.mark.parametrize("lengths", PACKED, ids=str)
def test_packed_sequences(lengths, heads, head_dim, value_dim, dense_dims, is_causal, window):
    q = coded(3 * normal(1, heads[0], sum(lengths[0]), head_dim), dense_dims)
    k, v = (normal(1, heads[1], sum(lengths[1]), width) for width in (head_dim, value_dim))
    check(q, k, v, is_causal, window, lengths)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_packed_sequences_are_their_own(head_dim):
    """The same bits as alone, between sequences of NaN, with bounds that are not contiguous."""
    lengths = [190, 65, 300]
    q, k, v = (normal(1, 2, sum(lengths), head_dim) for _ in "qkv")
    one = slice(190, 255)
    for x in (k, v):
        x[:, :, : one.start] = x[:, :, one.stop :] = math.nan
    tile = dataclasses.replace(prefill.default_tile(BF16, head_dim, head_dim, 0, much=True), spin_limit=1 << 22)
    options = {"scale": 0.125, "tile": tile}
    rules = packing(lengths, lengths)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        rules[name] = rules[name].repeat_interleave(2)[::2]
    for is_causal in (False, True):
        out, lse = prefill.forward(coded(q), k, v, mask=Mask(is_causal, **rules), **options)
        parts = coded(q[:, :, one]), k[:, :, one], v[:, :, one]
        alone, alone_lse = prefill.forward(*parts, mask=Mask(is_causal), **options)
        assert torch.equal(out[:, :, one], alone)
        assert torch.equal(lse[:, :, one], alone_lse)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "dense_dims"), [(64, 0), (64, 32), (128, 0), (128, 32), (128, 64), (128, 96), (256, 0), (256, 32)]
)
def test_each_query_is_multiplied_as_coded(head_dim, dense_dims):
    """With one key a feature and V the identity, a query's weights show all of its features."""
    q = coded(normal(1, 1, 200, head_dim), dense_dims)
    k = v = torch.eye(head_dim, dtype=BF16, device="cuda")[None, None]
    out, lse = prefill.forward(q, k, v, mask=Mask(), scale=1.0)
    scores = out.float().log() + lse[..., None]
    torch.testing.assert_close(scores, q.to_dense().float(), rtol=0, atol=0.02)


@hopper
@pytest.mark.gpu
def test_forward_over_strides():
    packed = normal(2, 200, 3, 2, 64)  # [B, N, (q, k, v), H, D]
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    q = coded(q)
    check(q, k, v, True)
    unaligned = normal(2, 2, 200, 65)[..., 1:]
    check(q, unaligned, v.expand(2, 2, 200, 64), True)
    check(q, k[:1].expand_as(k), v, False)
    # codes that are views: of a longer code, and at odd addresses
    held = coded(normal(2, 2, 230, 64), 32)
    check(held[:, :, 30:], k, v, True)
    shifted = [torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x)
               for x in (q.dense, q.values, q.indices)]  # fmt: skip
    check(FeatureCodes(*shifted, 64), k, v, True)
    # dense queries as they lie: within packed rows, every second head, rows that start between words
    queries = normal(2, 200, 3, 4, 64)[:, :, 0].transpose(1, 2)
    for rows in (queries, queries[:, ::2], queries[:1].expand_as(queries), normal(2, 2, 200, 65)[..., 1:]):
        check(all_dense_codes(rows), k, v, True)


@hopper
@pytest.mark.gpu
def test_fewer_features_than_the_pattern_holds():
    k, v = normal(1, 2, 333, 128), normal(1, 2, 333, 128)
    for dense_dims in (0, 32):
        check(topk_codes(3 * normal(1, 2, 333, 128), 16, dense_dims=dense_dims, pattern="2:4"), k, v, True)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize(("consumers", "block_n", "stages"), [(1, 128, 3), (3, 64, 3), (2, 160, 2), (2, 128, 2)])
def test_other_tiles(consumers, block_n, stages):
    k, v = (normal(1, 2, 2048, 128) for _ in "kv")
    check(coded(3 * normal(1, 2, 1999, 128)), k, v, True, consumers=consumers, block_n=block_n, stages=stages)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 63])
@pytest.mark.parametrize("heads", [5, 15])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_more_blocks_than_multiprocessors(head_dim, heads, window):
    """Two for each at most, and more: blocks are dealt in reverse, or counted."""
    q = coded(3 * normal(1, heads, 5000, head_dim))
    k, v = (normal(1, heads, 5000, head_dim) for _ in "kv")
    check(q, k, v, True, window)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_more_packed_blocks_than_multiprocessors(head_dim, heads):
    """Many sequences of a tile or none, which follow one another closely; most have fewer blocks than the longest."""
    lengths = [*torch.randint(0, 150, (60,)).tolist(), 600, 0, 1]
    q = coded(3 * normal(1, heads, sum(lengths), head_dim))
    k, v = (normal(1, heads, sum(lengths), head_dim) for _ in "kv")
    for is_causal, window in ((True, None), (False, 63)):
        check(q, k, v, is_causal, window, (lengths, lengths))


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("sizes", [(60, 0.1), (0.1, 60), (3, 60, 0.1, 8, 8), (2e-3, 60, 2e-3)], ids=str)
def test_scores_that_grow_and_fall_along_the_keys(sizes, head_dim, dtype):
    """By hundreds between tiles: weights relative to earlier maxima would be infinite, or all zero."""
    n = 1000
    along = torch.tensor(sizes)[None, None].float()
    size = torch.nn.functional.interpolate(along, n, mode="linear", align_corners=True)[0, 0]
    k = (torch.randn(1, 2, n, head_dim) * size[:, None]).to("cuda", dtype)
    q, v = coded(3 * normal(1, 2, n, head_dim, dtype=dtype)), normal(1, 2, n, head_dim, dtype=dtype)
    for is_causal in (False, True):
        check(q, k, v, is_causal)
        check(all_dense_codes(q.to_dense()), k, v, is_causal)


@hopper
@pytest.mark.gpu
def test_nan_stays_where_it_is_seen():
    q = coded(normal(1, 1, 200, 64))
    k, v = (normal(1, 1, 200, 64) for _ in "kv")
    k[0, 0, 150] = math.nan  # in all features: one whose group a query does not hold is never multiplied
    v[0, 0, 0, 3] = math.nan  # every query sees the first key; a weight of zero times NaN would spread it further
    out, lse = prefill.forward(q, k, v, mask=Mask(True), scale=0.125)
    rows = q.to_dense().float()
    expected, expected_lse = reference.attention(rows, k.float(), v.float(), mask=Mask(True), scale=0.125)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(lse.isnan(), expected_lse.isnan())


# ---- the public path on Hopper


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("head_dim", "topk_query", "dense_dims", "n_q", "n_k"),
    [(64, 32, 0, 200, 200), (128, 64, 0, 129, 300), (64, 16, 32, 65, 65), (128, 48, 32, 200, 200), (128, 16, 0, 100, 100),
     (128, 16, 32, 300, 129)],
)  # fmt: skip
def test_public_path_and_gradients(head_dim, topk_query, dense_dims, n_q, n_k, dtype):
    q = normal(2, 4, n_q, head_dim, dtype=dtype)
    k, v = (normal(2, 2, n_k, head_dim, dtype=dtype) for _ in "kv")
    check_public(q, k, v, topk=16, topk_query=topk_query, dense_dims=dense_dims, is_causal=True)
    assert "attention: hopper (" in flashsfa.explain()
    assert "attention_backward: dense (" in flashsfa.explain()


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "window"), [(64, None), (128, None), (128, 900), (256, None)])
def test_dense_queries_take_the_kernel_where_it_is_faster(head_dim, window):
    """The error rule against fp64, gradients included; short prompts stay with torch."""
    options = {"topk": 16, "topk_query": head_dim, "is_causal": True, "window": window}

    def results(dtype, n, backend):
        torch.manual_seed(1)
        rows = [torch.randn(1, 1, n, head_dim, device="cuda").to(BF16).to(dtype).requires_grad_() for _ in "qkv"]
        out, lse = sparse_feature_attention(*rows, return_lse=True, backend=backend, **options)
        out.backward(slope(out))
        return out.detach(), lse, *(x.grad for x in rows)

    results(BF16, 100, "auto")
    assert "attention: dense (" in flashsfa.explain()
    found = results(BF16, 4100, "auto")
    assert "attention: hopper (the kernel for Hopper, with dense queries)" in flashsfa.explain()
    for x, exact, same in zip(
        found, results(torch.float64, 4100, "reference"), results(BF16, 4100, "dense"), strict=True
    ):
        error, allowed = ((y.double() - exact).abs().max() for y in (x, same))
        assert error <= 2 * allowed + 4 * torch.finfo(BF16).eps * exact.abs().max()


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
def test_public_path_of_packed_sequences(is_causal):
    """Outputs and gradients as one by one."""
    q_lengths, k_lengths = [200, 1, 0, 65], [300, 1, 0, 64]
    q, k, v = (normal(sum(n), heads, 128) for n, heads in ((q_lengths, 4), (k_lengths, 2), (k_lengths, 2)))
    options = {"topk": 16, "topk_query": 64, "query_pattern": "2:4", "is_causal": is_causal, "return_lse": True}

    def results(attend):
        rows = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = attend(*rows)
        out.backward(slope(out))
        return out.detach(), lse, *(x.grad for x in rows)

    def together(q, k, v):
        bounds = packing(q_lengths, k_lengths)
        return flashsfa.sparse_feature_attention_varlen(q, k, v, **bounds, **options)

    def one_by_one(q, k, v):
        sequences = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
        heads_first = [[x.transpose(0, 1)[None] for x in one] for one in sequences if len(one[0])]
        parts = [sparse_feature_attention(*one, **options) for one in heads_first]
        return torch.cat([out[0].transpose(0, 1) for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1)

    expected, found = results(one_by_one), results(together)
    assert "attention: hopper (" in flashsfa.explain()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    for gradient, other in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(gradient, other, rtol=0.02, atol=0.02 * float(other.abs().max()))


@hopper
@pytest.mark.gpu
def test_public_path_compiles():
    q, k, v = (normal(1, 2, 150, 64) for _ in "qkv")
    options = {"topk": 8, "topk_query": 32, "query_pattern": "2:4", "is_causal": True}
    eager = attend(q, k, v, **options)

    @torch.compile(fullgraph=True)
    def compiled(q, k, v):
        return sparse_feature_attention(q, k, v, return_lse=True, **options)

    out, lse = compiled(q, k, v)
    assert torch.equal(out, eager[0])
    assert torch.equal(lse, eager[1])
    assert out.stride() == eager[0].stride()
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    compiled(q, k, v)[0].sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@hopper
@pytest.mark.gpu
def test_runs_in_a_fresh_thread():
    """Which has no CUDA context of its own, and allocates nothing anew."""
    q = all_dense_codes(normal(1, 1, 700, 128))
    options = {"mask": Mask(True), "scale": 0.1}
    expected, _ = prefill.forward(q, q.dense, q.dense, **options)
    del _
    with ThreadPoolExecutor(1) as pool:
        found, _ = pool.submit(prefill.forward, q, q.dense, q.dense, **options).result()
    assert torch.equal(found, expected)


@hopper
@pytest.mark.gpu
def test_public_path_in_a_cuda_graph():
    q, k, v = (normal(1, 2, 150, 128) for _ in "qkv")
    options = {"topk": 16, "topk_query": 64, "query_pattern": "2:4", "is_causal": True}
    expected = sparse_feature_attention(q, k, v, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse_feature_attention(q, k, v, **options)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"key_padding_mask": True}, "no padding"),
        ({"scale": -1.0}, "positive scale"),
        ({"dense_dims": 16}, "multiple of 32"),
        ({"dtype": torch.float32}, "float16 and bfloat16"),
        ({"n": 0}, "nothing to attend"),
    ],
    ids=str,
)
def test_obstacles_are_explained(options, reason):
    x = normal(1, 1, options.pop("n", 70), 64, dtype=options.pop("dtype", BF16))
    if "key_padding_mask" in options:
        options["key_padding_mask"] = torch.zeros(1, 70, dtype=torch.bool, device="cuda")
    sparse_feature_attention(x, x, x, topk=8, query_pattern="2:4", **options)
    assert reason in flashsfa.explain()


@hopper
@pytest.mark.gpu
def test_codes_past_two_billion_entries():
    n = (1 << 31) // 64 // 2 + 77  # values of 64 entries a row, more than 2^31 with the heads
    q = coded(normal(1, 1, n, 128).expand(1, 2, n, 128))
    k, v = (normal(1, 2, 64, 128) for _ in "kv")
    out, _ = prefill.forward(q, k, v, mask=Mask(), scale=0.1)
    last, _ = prefill.forward(q[:, :, -128:], k, v, mask=Mask(), scale=0.1)
    assert torch.equal(out[:, :, -128:], last)

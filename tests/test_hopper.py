"""Prefill on sparse tensor cores: the layouts against the instruction set's tables on the CPU, the kernel on Hopper."""

import dataclasses

import pytest
import torch

from flashsfa import reference
from flashsfa.masks import AttentionMask

pytest.importorskip("triton")
from flashsfa.kernels.hopper import compiler, cuda, pack, prefill

BF16, FP16 = torch.bfloat16, torch.float16


def rows_2_of_4(*shape, dtype=BF16, density=0.5):
    """Rows with at most two nonzero entries in each aligned group of four, fewer in most."""
    x = torch.randn(shape)
    four = x.unflatten(-1, (-1, 4))
    keep = torch.zeros_like(four).scatter(-1, four.abs().topk(2, -1).indices, 1.0) * (torch.rand_like(four) < density)
    return (four * keep).flatten(-2).to(dtype)


# ---- layouts: fragments and metadata as the PTX ISA (wgmma.mma_async.sp, m64nNk32) lays them out over 128 threads


def fragment_places():
    """Row and column [128, 8] of a thread's eight entries of a 64 x 16 operand."""
    thread, entry = torch.arange(128)[:, None], torch.arange(8)[None, :]
    row = thread // 32 * 16 + thread % 32 // 4 + 8 * (entry // 2 % 2)
    column = thread % 4 * 2 + entry % 2 + 8 * (entry // 4)
    return row, column


def unpack_sparse(values, metadata, head_dim):
    """The rows [64, D] of one tile that an instruction would multiply."""
    row, column = fragment_places()
    tile = torch.zeros(64, head_dim, dtype=values.dtype)
    for step in range(head_dim // 32):
        kept = torch.empty(64, 16, dtype=values.dtype)
        kept[row, column] = values[step]
        places = torch.full((64, 8), -1)  # four bits a group
        for thread in range(128):
            lane = thread % 32
            if lane % 4 // 2 != step % 2:
                continue  # the selector picks two lanes of four
            for bit in range(0, 32, 4):
                r = thread // 32 * 16 + lane // 4 + 8 * (bit // 16)
                places[r, lane % 2 * 4 + bit % 16 // 4] = int(metadata[step // 2, thread]) >> bit & 15
        assert (places >= 0).all()
        first, second = places & 3, places >> 2
        assert (first < second).all()
        groups = tile[:, 32 * step : 32 * (step + 1)].unflatten(1, (8, 4))
        groups.scatter_(2, torch.stack((first, second), 2), kept.unflatten(1, (8, 2)))
    return tile


@pytest.mark.cpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("n", [1, 64, 130])
def test_packed_rows_are_what_the_instruction_reads(head_dim, n):
    q = rows_2_of_4(2, n, 2, head_dim).transpose(1, 2)  # [B, H, N, D]
    values, metadata = pack.pack_sparse(q)
    tiles = -(-n // 64)
    expected = torch.zeros(4, tiles * 64, head_dim, dtype=BF16)
    expected[:, :n] = q.flatten(0, 1)
    values = values.view(BF16).unflatten(0, (4, tiles))  # [B * H, tiles, steps, 128, 8]
    for head in range(4):
        for tile in range(tiles):
            found = unpack_sparse(values[head, tile], metadata.unflatten(0, (4, tiles))[head, tile], head_dim)
            torch.testing.assert_close(found, expected[head, 64 * tile : 64 * (tile + 1)], rtol=0, atol=0)


@pytest.mark.cpu
def test_packed_dense_rows():
    q = torch.randn(1, 2, 70, 64).to(FP16)
    values = pack.pack_dense(q).view(FP16).unflatten(0, (2, 2))  # [H, tiles, steps, 128, 8]
    row, column = fragment_places()
    expected = torch.zeros(2, 128, 64, dtype=FP16)
    expected[:, :70] = q[0]
    found = torch.empty_like(expected)
    for tile in range(2):
        for step in range(4):
            found[:, 64 * tile + row, 16 * step + column] = values[:, tile, step]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


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
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (128, 128), (64, 128), (128, 64)])
def test_compiles_once(nvrtc, tmp_path, monkeypatch, dtype, head_dim, value_dim):
    tile = prefill.default_tile(dtype, head_dim, value_dim)
    assert tile.shared_bytes <= 227 * 1024
    cubin = compiler.compile_cubin(tile)
    assert cubin.startswith(b"\x7fELF")
    assert [path.suffix for path in tmp_path.iterdir()] == [".cubin"]
    monkeypatch.setattr(cuda, "compile_cubin", lambda *_: pytest.fail("compiled again"))
    assert compiler.compile_cubin(tile) == cubin


@pytest.mark.cpu
def test_refused_source_says_why(nvrtc, monkeypatch):
    monkeypatch.setattr(compiler, "source", lambda tile: "no CUDA")
    with pytest.raises(cuda.CompilationError, match="no CUDA"):
        compiler.compile_cubin(compiler.Tile(BF16, 64, 64))


@pytest.mark.cpu
def test_what_the_kernel_cannot_take_is_named():
    q = torch.empty(1, 1, 8, 64, dtype=BF16)
    assert "Hopper" in prefill.obstacle(q, q, q, AttentionMask(), 1.0)


# ---- the kernel

hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def default_tile(q, v, **changes):
    """The default sizes, with barriers that trap instead of hanging."""
    tile = prefill.default_tile(q.dtype, q.shape[-1], v.shape[-1])
    return dataclasses.replace(tile, spin_limit=1 << 22, **changes)


def check(q, k, v, is_causal, **changes):
    """The error rule for out and log-sum-exp, against fp64."""
    tile = default_tile(q, v, **changes)
    scale = q.shape[-1] ** -0.5
    mask = AttentionMask(is_causal)
    assert prefill.obstacle(q, k, v, mask, scale) is None
    out, lse = prefill.forward(q, k, v, is_causal=is_causal, scale=scale, tile=tile)
    truth, true_lse = reference.attention(q.double(), k.double(), v.double(), mask=mask, scale=scale)
    plain, plain_lse = reference.attention(q, k, v, mask=mask, scale=scale)
    assert out.shape == truth.shape
    assert out.dtype == q.dtype
    eps = torch.finfo(q.dtype).eps
    allowed = 2 * (plain.double() - truth).abs().max() + 4 * eps * truth.abs().max()
    assert (out.double() - truth).abs().max() <= allowed
    seen = true_lse.isfinite()
    assert torch.equal(lse == -torch.inf, ~seen)
    if seen.any():
        allowed = 2 * (plain_lse.double() - true_lse)[seen].abs().max() + 1e-5 * true_lse[seen].abs().max()
        assert (lse.double() - true_lse)[seen].abs().max() <= allowed
    again, _ = prefill.forward(q, k, v, is_causal=is_causal, scale=scale, tile=tile)
    assert torch.equal(out, again)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("heads", "n_q", "n_k", "head_dim", "value_dim", "dtype"),
    [
        ((1, 1), 1, 1, 64, 64, BF16),
        ((2, 2), 1, 777, 128, 128, BF16),
        ((7, 1), 513, 65, 128, 128, BF16),
        ((4, 2), 300, 300, 128, 128, FP16),
        ((3, 1), 65, 1023, 64, 64, FP16),
        ((8, 2), 1000, 1000, 64, 64, BF16),
        ((2, 1), 190, 260, 64, 128, BF16),
        ((2, 1), 190, 260, 128, 64, BF16),
    ],
)
def test_forward(heads, n_q, n_k, head_dim, value_dim, dtype, is_causal):
    q = 3 * rows_2_of_4(2, heads[0], n_q, head_dim, dtype=dtype).cuda()
    k = torch.randn(2, heads[1], n_k, head_dim, dtype=dtype, device="cuda")
    v = torch.randn(2, heads[1], n_k, value_dim, dtype=dtype, device="cuda")
    check(q, k, v, is_causal)


@hopper
@pytest.mark.gpu
def test_forward_over_strides():
    packed = torch.randn(2, 200, 3, 2, 64, dtype=BF16, device="cuda")  # [B, N, (q, k, v), H, D]
    _, k, v = packed.permute(2, 0, 3, 1, 4)
    q = rows_2_of_4(2, 200, 2, 64).cuda().transpose(1, 2)
    check(q, k, v, True)
    unaligned = torch.randn(2, 2, 200, 65, dtype=BF16, device="cuda")[..., 1:]
    check(q, unaligned, v.expand(2, 2, 200, 64), True)
    check(q, k[:1].expand_as(k), v, False)


@hopper
@pytest.mark.gpu
def test_dense_rows_of_any_kind():
    q, k, v = (torch.randn(1, 2, 333, 128, dtype=BF16, device="cuda") for _ in "qkv")
    check(q, k, v, True, is_sparse=False)


@hopper
@pytest.mark.gpu
@pytest.mark.parametrize(
    "changes", [{"consumers": 1}, {"consumers": 3, "block_n": 64}, {"block_n": 160}, {"stages": 3}], ids=str
)
def test_other_tiles(changes):
    q = 3 * rows_2_of_4(1, 2, 1999, 128).cuda()
    k, v = (torch.randn(1, 2, 2048, 128, dtype=BF16, device="cuda") for _ in "kv")
    check(q, k, v, True, **changes)


@hopper
@pytest.mark.gpu
def test_nan_stays_where_it_is_seen():
    q = rows_2_of_4(1, 1, 200, 64).cuda()
    k, v = (torch.randn(1, 1, 200, 64, dtype=BF16, device="cuda") for _ in "kv")
    k[0, 0, 150] = torch.nan  # in all features: one that a query does not hold is never multiplied
    v[0, 0, 170, 3] = torch.nan
    out, lse = prefill.forward(q, k, v, is_causal=True, scale=0.125, tile=default_tile(q, v))
    expected, expected_lse = reference.attention(q.float(), k.float(), v.float(), mask=AttentionMask(True), scale=0.125)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(lse.isnan(), expected_lse.isnan())

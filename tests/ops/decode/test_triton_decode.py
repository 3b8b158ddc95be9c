"""The Triton decode kernels against the reference: on the GPU where there is one, else through Triton's interpreter."""

import math

import pytest
import torch

pytest.importorskip("triton")

from decode_cases import DecodeRules, assert_graph_follows, decode
from flashsfa import FeatureCodes, explain, reference, sparse_feature_decode, topk_codes
from flashsfa.budget import FeatureBudget
from flashsfa.codes import code_queries
from flashsfa.mask import Mask
from flashsfa.ops.decode import plain as decode_torch
from flashsfa.ops.decode.hopper import decode as hopper
from flashsfa.ops.decode.triton import decode as decode_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# the interpreter multiplies bfloat16's bit patterns
DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
EXACT = {"rtol": 0, "atol": 0}


def draw(b=2, hkv=2, group=1, m=1, n=150, d=64, dv=None, dtype=torch.float32):
    shapes = (b, hkv * group, m, d), (b, hkv, n, d), (b, hkv, n, d if dv is None else dv)
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def coded(q, k, topk, dense_dims, topk_query=None):
    return code_queries(
        q, FeatureBudget.of(q.shape[-1], topk, topk_query=topk_query, dense_dims=dense_dims)
    ).to_dense(), topk_codes(k, topk, dense_dims=dense_dims)


def expected(q, codes, v, rules, dtype):
    """The reference's out and lse in `dtype`, sequence by sequence."""
    parts = []
    q, k, v = q.to(dtype), codes.to_dense().to(dtype), v.to(dtype)
    for b in range(q.shape[0]):
        row, n = slice(b, b + 1), v.shape[2] if rules.kv_lens is None else int(rules.kv_lens[b])
        padding = None if rules.key_padding_mask is None else rules.key_padding_mask[row, :n]
        mask = Mask(is_causal=True, window=rules.window, key_padding_mask=padding)
        parts.append(reference.attention(q[row], k[row, :, :n], v[row, :, :n], mask=mask, scale=q.shape[-1] ** -0.5))
    return [torch.cat(x) for x in zip(*parts, strict=True)]


def assert_decodes(q, codes, v, rules, *, run_codes=None, run_v=None, run_rules=None):
    """Kernel error against float64 at most twice that of the reference in the same dtype, plus one rounding."""
    out, lse = decode(
        decode_triton,
        q,
        run_codes or codes,
        v if run_v is None else run_v,
        run_rules or rules,
        q.shape[-1] ** -0.5,
        0.0,
    )
    truth, plain = (expected(q, codes, v, rules, dtype) for dtype in (torch.float64, v.dtype))
    assert out.dtype == v.dtype
    assert lse.dtype == torch.float32
    assert not out.isnan().any()
    # one rounding of the output, and the 2 units of error of a GPU's base-2 exponential
    rounding = (torch.finfo(v.dtype).eps + 4 * torch.finfo(torch.float32).eps) * truth[0].abs().max()
    assert (out - truth[0]).abs().max() <= 2 * (plain[0] - truth[0]).abs().max() + rounding
    torch.testing.assert_close(lse.double(), truth[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "m"), [(1, 1), (3, 1), (4, 5), (7, 2), (8, 1), (16, 1), (1, 16), (16, 2), (2, 16)])
def test_query_rows(group, m, dtype):
    q, k, v = draw(group=group, m=m, dtype=dtype)
    assert_decodes(*coded(q, k, 8, 16), v, DecodeRules())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (64, 80), (128, 48)])
def test_widths(d, dv, dtype):
    q, k, v = draw(group=3, d=d, dv=dv, dtype=dtype)
    assert_decodes(*coded(q, k, 8, 0), v, DecodeRules())


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("topk_query", [None, 64])
@pytest.mark.parametrize("dense_dims", [0, 16, 22])
@pytest.mark.parametrize("topk", [1, 8, 12, 16, 26])
def test_budgets(topk, dense_dims, topk_query, group):
    q, k, v = draw(b=1, group=group)
    assert_decodes(*coded(q, k, topk, dense_dims, topk_query), v, DecodeRules())


def test_every_feature_kept():
    q, k, v = draw(b=1, hkv=1, group=2, d=256, dv=64)
    assert_decodes(*coded(q, k, 256, 0), v, DecodeRules())


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 513, 1100])
@pytest.mark.parametrize(("group", "m"), [(1, 1), (3, 2)])
def test_lengths(n, group, m):
    q, k, v = draw(group=group, m=m, n=n)
    assert_decodes(*coded(q, k, 8, 0), v, DecodeRules())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize("lens", [None, (600, 3), (0, 257)])
@pytest.mark.parametrize(("group", "m"), [(1, 1), (3, 1), (2, 5)])
def test_visibility(group, m, lens, window, padded):
    """kv_lens, window and padding, with NaN and wild indices wherever no query looks."""
    q, k, v = draw(group=group, m=m, n=600)
    q, codes = coded(q, k, 8, 4)
    padding = torch.zeros(2, 600, dtype=torch.bool, device=DEVICE)
    padding[0, :100], padding[1, 2], padding[1, 250:256] = True, True, True
    lens = None if lens is None else torch.tensor(lens, device=DEVICE)
    rules = DecodeRules(lens, window, padding if padded else None)
    visible = rules.visible(m, 600, DEVICE)
    seen = torch.ones(2, 600, dtype=torch.bool, device=DEVICE) if visible is None else visible.any(1).expand(2, -1)
    unseen = ~seen[:, None, :, None]
    spoilt = FeatureCodes(
        codes.dense.masked_fill(unseen, torch.nan),
        codes.values.masked_fill(unseen, torch.nan),
        codes.indices.masked_fill(unseen, 255),
        codes.head_dim,
    )
    assert_decodes(q, codes, v, rules, run_codes=spoilt, run_v=v.masked_fill(unseen, torch.nan))


def paged(x, page_table, page_size):
    """x [B, Hkv, N, C] in a pool of pages [P, Hkv, page_size, C], NaN or 255 in pages that no sequence holds."""
    pool = x.new_full((int(page_table.max()) + 3, x.shape[1], page_size, x.shape[-1]), 255)
    if x.dtype.is_floating_point:
        pool.fill_(torch.nan)
    pool[page_table.long()] = x.unflatten(2, (-1, page_size)).transpose(1, 2)
    return pool


@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize(("group", "m", "window"), [(1, 1, None), (3, 2, 40)])
def test_pages_equal_contiguous(page_size, group, m, window):
    q, k, v = draw(group=group, m=m, n=512)
    v[0, :, 301:] = torch.nan
    q, codes = coded(q, k, 8, 4)
    table = torch.randperm(2 * 512 // page_size, device=DEVICE).to(torch.int32).unflatten(0, (2, -1))
    parts = [paged(x, table, page_size) for x in (codes.dense, codes.values, codes.indices, v)]
    pages = FeatureCodes(*parts[:3], codes.head_dim), parts[3]
    lens = torch.tensor([301, 512], device=DEVICE)
    table[0, -(-301 // page_size) :] = -7  # never read
    rules = DecodeRules(lens, window, page_table=table)
    for tau in (0.0, 0.1):
        whole = decode(decode_triton, q, codes, v, DecodeRules(lens, window), 0.125, tau)
        torch.testing.assert_close(decode(decode_triton, q, *pages, rules, 0.125, tau), whole, **EXACT)
    plain = [decode(backend, q, *pages, rules, 0.125, 0.0) for backend in (decode_triton, decode_torch)]
    torch.testing.assert_close(*plain, rtol=1e-5, atol=1e-5)


SCORES = ["random", "equal", "giant", "geometric", "zeros", "two-levels"]


def shaped(shape, n, group, dtype):
    """q, codes and v [1, 1, N, ...] whose scores have a hostile shape: one feature carries the score of each key."""
    steps = torch.arange(n, device=DEVICE, dtype=torch.float32)
    score = {
        "random": 3 * torch.randn(n, device=DEVICE),
        "equal": torch.full_like(steps, 1.0),
        "giant": torch.where(steps == n // 3, 40.0, 0.0),
        "geometric": -0.25 * steps[torch.randperm(n)],
        "zeros": torch.zeros_like(steps),
        "two-levels": torch.where(steps < 3, 6.9, 0.0),  # the light ones carry about a share of the tolerances
    }[shape]
    k = torch.zeros(1, 1, n, 16, device=DEVICE)
    k[..., 0], k[..., 1] = score, score.flip(0)
    q = torch.zeros(1, group, 1, 16, device=DEVICE)
    q[:, ::2, :, 0], q[:, 1::2, :, 1] = 1, 1  # every other head ranks the keys the other way round
    v = 100 * torch.where(score > score.median(), 1.0, -1.0)[:, None].expand(1, 1, n, 16)  # opposed: dropping shows
    return *coded(q.to(dtype), k.to(dtype), 2, 0), v.to(dtype).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("tolerance", [1e-6, 1e-3, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("shape", SCORES)
def test_tolerance_bound(shape, group, tolerance, dtype):
    """The output moves by at most 2·τ·max‖v‖, the log-sum-exp not at all."""
    q, codes, v = shaped(shape, 500, group, dtype)
    truth, truth_lse = decode(decode_torch, q.double(), codes.to(torch.float64), v.double(), DecodeRules(), 1.0, 0.0)
    out, lse = decode(decode_triton, q, codes, v, DecodeRules(), 1.0, tolerance)
    largest = v.double().norm(dim=-1).max()
    rounding = (2**-8 if dtype == torch.bfloat16 else 1e-5) * largest
    assert (out - truth).norm(dim=-1).max() <= 2 * tolerance * largest + rounding
    torch.testing.assert_close(lse.double(), truth_lse, rtol=1e-5, atol=1e-5)


def test_tolerance_leaves_rows_out():
    """Rows below the cut are not read: their NaN does not show. Rows above it are."""
    q, codes, v = shaped("giant", 500, 1, torch.float32)
    giant = 500 // 3
    spoilt = v.clone()
    spoilt[:, :, :giant], spoilt[:, :, giant + 1 :] = torch.nan, torch.nan
    out, _ = decode(decode_triton, q, codes, spoilt, DecodeRules(), 1.0, 1e-3)
    torch.testing.assert_close(out[0, 0, 0], v[0, 0, giant])


@pytest.mark.parametrize("sign", [1, -1])
def test_tolerance_keeps_nan(sign):
    """A query that is NaN, of either sign, has a NaN output, and the others of its kv head do not."""
    q, codes, v = shaped("random", 500, 3, torch.float32)
    q[0, 1] = math.copysign(math.nan, sign)
    out, _ = decode(decode_triton, q, codes, v, DecodeRules(), 1.0, 1e-3)
    assert out.isnan().all(-1).flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize(("hkv", "group", "m"), [(2, 1, 1), (2, 3, 2), (1, 16, 2)])
def test_tolerance_and_visibility(hkv, group, m, window, padded):
    """A tolerance that leaves nothing out equals exact decode, NaN where no query looks."""
    q, k, v = draw(hkv=hkv, group=group, m=m, n=330)
    q, codes = coded(q, k, 8, 4)
    padding = torch.zeros(2, 330, dtype=torch.bool, device=DEVICE)
    padding[0, :100], padding[0, 290:296] = True, True
    rules = DecodeRules(torch.tensor([330, 3], device=DEVICE), window, padding if padded else None)
    unseen = ~rules.visible(m, 330, DEVICE).any(1)[:, None, :, None]
    exact = decode(decode_triton, q, codes, v, rules, 0.125, 0.0)
    for tolerance, error in ((1e-12, 1e-5), (0.02, 0.04 * float(v.norm(dim=-1).max()))):
        out, lse = decode(decode_triton, q, codes, v.masked_fill(unseen, torch.nan), rules, 0.125, tolerance)
        assert (out - exact[0]).norm(dim=-1).max() <= error
        torch.testing.assert_close(lse, exact[1])


def flat(q, codes, v, **rules):
    """The arguments of the operator behind `decode`."""
    given = DecodeRules(**rules)
    masks = given.page_table, given.kv_lens, given.key_padding_mask, given.window
    return q, codes.dense, codes.values, codes.indices, v, None, None, *masks, [0.125, 0.0, 0.0], 3


@pytest.mark.parametrize("dense_dims", [0, 4])
def test_opcheck(dense_dims):
    q, k, v = draw(group=2, m=2)
    q, codes = coded(q, k, 8, dense_dims)
    op = torch.ops.flashsfa.decode.default
    padding = torch.zeros(2, 150, dtype=torch.bool, device=DEVICE)
    torch.library.opcheck(op, flat(q, codes, v))
    lens = torch.tensor([150, 9], device=DEVICE)
    torch.library.opcheck(op, flat(q, codes, v, kv_lens=lens, key_padding_mask=padding, window=5))


def test_compiled_equals_eager():
    q, k, v = draw(group=2)
    q, codes = coded(q, k, 8, 4)

    def step(q, codes, v):
        return decode(decode_triton, q * 2, codes, v, DecodeRules(window=90), 0.125, 0.0)[0] + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, codes, v), step(q, codes, v), **EXACT)


def test_strided_caches():
    """Any strides but the last: a cache laid out [B, N, Hkv, D], and a slice of a larger one."""
    q, k, v = draw(group=3)
    q, codes = coded(q, k, 8, 4)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (codes.dense, codes.values, codes.indices, v)]
    assert not turned[3].is_contiguous()
    assert_decodes(q, codes, v, DecodeRules(), run_codes=FeatureCodes(*turned[:3], codes.head_dim), run_v=turned[3])
    assert_decodes(q, codes[:, :, 3:77], v[:, :, 3:77], DecodeRules())
    with pytest.raises(ValueError, match="last dimension of v"):
        decode(decode_triton, q, codes, v.mT.contiguous().mT, DecodeRules(), 1.0, 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_public_function_runs_triton(dtype, monkeypatch):
    monkeypatch.setattr(hopper, "obstacle", lambda *_: "another kernel is tested here")
    q, k, v = draw(group=4, dtype=dtype)
    codes = topk_codes(k, 8, dense_dims=4)
    out, lse = sparse_feature_decode(q, codes, v, return_lse=True)
    assert "decode: triton" in explain()
    direct = decode(decode_triton, *coded(q, k, 8, 4), v, DecodeRules(), 0.125, 0.0)
    torch.testing.assert_close((out, lse), direct, **EXACT)
    sparse_feature_decode(q.double(), codes.to(torch.float64), v.double())
    assert "decode: torch" in explain()


@pytest.mark.gpu
@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_deterministic(tolerance):
    q, k, v = draw(b=4, hkv=4, group=4, n=20000, dtype=torch.bfloat16)
    run = [*coded(q, k, 8, 4), v, DecodeRules(), 0.125, tolerance]
    first = decode(decode_triton, *run)
    for _ in range(5):
        torch.testing.assert_close(decode(decode_triton, *run), first, **EXACT)


@pytest.mark.gpu
@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_cuda_graph_follows_kv_lens(tolerance):
    q, k, v = draw(group=4, n=3000, dtype=torch.bfloat16)
    q, codes = coded(q, k, 8, 4)
    lens = torch.tensor([3000, 1], device=DEVICE)

    def step():
        return decode(decode_triton, q, codes, v, DecodeRules(lens), 0.125, tolerance)

    assert_graph_follows(step, lens)


@pytest.mark.gpu
def test_offsets_past_two_to_the_31():
    n, d = 2**17 + 64, 128
    q, _, _ = draw(b=1, group=2, n=0, d=d, dtype=torch.bfloat16)
    v = torch.zeros(1, n, 129, d, dtype=torch.bfloat16, device=DEVICE)[:, :, :2].transpose(1, 2)
    assert (n - 1) * v.stride(2) > 2**31
    k = torch.zeros(1, 2, n, d, dtype=torch.bfloat16, device=DEVICE)
    k[:, :, -1] = 30 * q[:, ::2, 0].sign()
    v[:, :, -1] = 1
    q, codes = coded(q, k, 16, 0)
    out, _ = decode(decode_triton, q, codes, v, DecodeRules(), 1.0, 0.0)
    torch.testing.assert_close(out[:, ::2], torch.ones_like(out[:, ::2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "m", "d", "dense_dims"), [(1, 1, 64, 0), (3, 2, 96, 16), (4, 1, 256, 22)])
@pytest.mark.parametrize("topk_query", [1, 7, None])
def test_queries_are_coded_on_the_way(topk_query, group, m, d, dense_dims, dtype):
    """The kernel keeps the features of a query that `topk_codes` keeps, ties and NaN included."""
    q, k, v = draw(group=group, m=m, d=d, n=40, dtype=dtype)
    q[0, 0] = q[0, 0].sign()  # ties everywhere
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    sparse, codes = coded(q, k, 5, dense_dims, topk_query or d)
    expected = decode(decode_triton, sparse, codes, v, DecodeRules(), 0.125, 0.0)
    torch.testing.assert_close(
        decode(decode_triton, q, codes, v, DecodeRules(), 0.125, 0.0, topk_query=topk_query), expected, **EXACT
    )


def test_strided_rules():
    """Lengths, padding and pages may be views with gaps; the kernels get them whole."""
    q, k, v = draw(n=256)
    q, codes = coded(q, k, 8, 0)
    lens = torch.tensor([[200, 1], [77, 1]], device=DEVICE)[:, 0]
    padding = (torch.arange(256, device=DEVICE)[:, None] < torch.tensor([3, 40], device=DEVICE)).T
    for rules in (
        DecodeRules(lens),
        DecodeRules(torch.tensor([9], device=DEVICE).expand(2)),
        DecodeRules(None, None, padding),
    ):
        assert_close_to_torch(q, codes, v, rules)


def assert_close_to_torch(q, codes, v, rules):
    for got, expected in zip(
        decode(decode_triton, q, codes, v, rules, 0.125, 0.0),
        decode(decode_torch, q, codes, v, rules, 0.125, 0.0),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)

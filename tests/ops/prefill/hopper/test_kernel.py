"""The prefill kernel on a Hopper GPU, against the reference."""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flashsfa import reference
from flashsfa.codes import FeatureCodes, all_dense_codes, topk_codes
from flashsfa.mask import Mask
from flashsfa.ops.prefill.hopper import prefill
from hopper_cases import BF16, FP16, check, coded, hopper, normal, packing

pytestmark = [hopper, pytest.mark.gpu]


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


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_packed_sequences_are_their_own(head_dim):
    """The same bits as alone, between sequences of NaN, with bounds that are not contiguous."""
    lengths = [190, 65, 300]
    q, k, v = (normal(1, 2, sum(lengths), head_dim) for _ in "qkv")
    one = slice(190, 255)
    for x in (k, v):
        x[:, :, : one.start] = x[:, :, one.stop :] = math.nan
    tile = dataclasses.replace(prefill.default_tile(BF16, head_dim, head_dim, 0, long_context=True), spin_limit=1 << 22)
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


def test_fewer_features_than_the_pattern_holds():
    k, v = normal(1, 2, 333, 128), normal(1, 2, 333, 128)
    for dense_dims in (0, 32):
        check(topk_codes(3 * normal(1, 2, 333, 128), 16, dense_dims=dense_dims, pattern="2:4"), k, v, True)


@pytest.mark.parametrize(("consumers", "block_n", "stages"), [(1, 128, 3), (3, 64, 3), (2, 160, 2), (2, 128, 2)])
def test_other_tiles(consumers, block_n, stages):
    k, v = (normal(1, 2, 2048, 128) for _ in "kv")
    check(coded(3 * normal(1, 2, 1999, 128)), k, v, True, consumers=consumers, block_n=block_n, stages=stages)


@pytest.mark.parametrize("window", [None, 63])
@pytest.mark.parametrize("heads", [5, 15])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_more_blocks_than_multiprocessors(head_dim, heads, window):
    """Two for each at most, and more: blocks are dealt in reverse, or counted."""
    q = coded(3 * normal(1, heads, 5000, head_dim))
    k, v = (normal(1, heads, 5000, head_dim) for _ in "kv")
    check(q, k, v, True, window)


@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_more_packed_blocks_than_multiprocessors(head_dim, heads):
    """Many sequences of a tile or none, which follow one another closely; most have fewer blocks than the longest."""
    lengths = [*torch.randint(0, 150, (60,)).tolist(), 600, 0, 1]
    q = coded(3 * normal(1, heads, sum(lengths), head_dim))
    k, v = (normal(1, heads, sum(lengths), head_dim) for _ in "kv")
    for is_causal, window in ((True, None), (False, 63)):
        check(q, k, v, is_causal, window, (lengths, lengths))


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


def test_nan_stays_where_it_is_seen():
    q = coded(normal(1, 1, 200, 64))
    k, v = (normal(1, 1, 200, 64) for _ in "kv")
    k[0, 0, 150] = math.nan  # in all features: one whose group a query does not hold is never multiplied
    v[0, 0, 0, 3] = math.nan  # every query sees the first key; a weight of zero times NaN would reach further
    out, lse = prefill.forward(q, k, v, mask=Mask(True), scale=0.125)
    rows = q.to_dense().float()
    expected, expected_lse = reference.attention(rows, k.float(), v.float(), mask=Mask(True), scale=0.125)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(lse.isnan(), expected_lse.isnan())


def test_runs_in_a_fresh_thread():
    """Which has no CUDA context of its own, and allocates nothing anew."""
    q = all_dense_codes(normal(1, 1, 700, 128))
    options = {"mask": Mask(True), "scale": 0.1}
    expected, _ = prefill.forward(q, q.dense, q.dense, **options)
    del _
    with ThreadPoolExecutor(1) as pool:
        found, _ = pool.submit(prefill.forward, q, q.dense, q.dense, **options).result()
    assert torch.equal(found, expected)


def test_codes_past_two_billion_entries():
    n = (1 << 31) // 64 // 2 + 77  # values of 64 entries a row, more than 2^31 with the heads
    q = coded(normal(1, 1, n, 128).expand(1, 2, n, 128))
    k, v = (normal(1, 2, 64, 128) for _ in "kv")
    out, _ = prefill.forward(q, k, v, mask=Mask(), scale=0.1)
    last, _ = prefill.forward(q[:, :, -128:], k, v, mask=Mask(), scale=0.1)
    assert torch.equal(out[:, :, -128:], last)

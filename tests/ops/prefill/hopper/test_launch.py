"""What the host chooses: whether dense queries run on the kernel, its tile, and the L2 swizzle."""

import pytest
import torch

from flashsfa.mask import Mask
from flashsfa.ops import plan
from flashsfa.ops.prefill import fused as dense
from flashsfa.ops.prefill.hopper import prefill
from hopper_cases import BF16


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
    monkeypatch.setattr(prefill, "is_hopper", lambda _: True)
    monkeypatch.setattr(plan, "choose_kernel", lambda *_: (rival(), ""))
    q, k = (torch.empty(1, 2, n, 128, dtype=dtype, device="meta") for n in (n_q, n_k))
    packed = {}
    if lengths := rules.get("lengths"):
        packed = {
            "cu_seqlens_q": torch.empty(len(lengths) + 1),
            "max_seqlen_q": max(lengths),
            "max_seqlen_k": max(lengths),
        }
    mask = Mask(rules.get("is_causal", True), rules.get("window"), **packed)
    assert plan.hopper_is_faster(q, k, k, mask, 0.1) == (faster and dtype == BF16)


@pytest.mark.parametrize(
    ("rows", "seen", "long_context"),
    [(16 * 8192, 8192, True), (16 * 4096, 4096, False), (16 * 16384, 4095, False), (101376, 4096, True), (101375, 4096, False)],
)  # fmt: skip
def test_long_contexts_take_three_consumers(rows, seen, long_context):
    assert prefill.is_long_context(rows, seen, multiprocessors=132) == long_context
    assert prefill.default_tile(BF16, 128, 128, 0, long_context=long_context).consumers == (3 if long_context else 2)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "n", "per_group"),
    [(16, 16, 4096, 16), (16, 16, 16384, 4), (16, 16, 65536, 1), (32, 8, 65536, 4), (7, 7, 16384, 4)],
)
def test_heads_that_share_the_cache_are_interleaved(heads, kv_heads, n, per_group):
    assert prefill.heads_per_l2_group(heads, kv_heads, n * (128 + 128) * 2) == per_group

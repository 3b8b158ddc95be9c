"""The operator against its definition: outputs, gradients, masks, layouts, saved memory and input errors."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import flashsfa
from attention_cases import assert_error_rule, inputs, outputs_and_gradients
from flashsfa import FeatureCodes, topk_codes
from flashsfa import sparse_feature_attention as attention
from flashsfa import sparse_feature_attention_varlen as attention_varlen
from flashsfa.mask import Mask
from flashsfa.ops.prefill import fused as dense

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def padding(n_k):
    """Batch 0 is all padding; batch 1 is padded on the left, so that causal queries see nothing there too."""
    mask = torch.zeros(2, n_k, dtype=torch.bool)
    mask[0] = True
    mask[1, : n_k // 3 + 1] = True
    return mask


SHAPES = [(1, 1), (1, 17), (5, 33), (33, 5), (0, 4), (4, 0), (65, 65), (300, 300)]
MASKS = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"window": 7},
    "causal-window": {"is_causal": True, "window": 7},
    "wide-window": {"is_causal": True, "window": 150},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("n_q", "n_k"), SHAPES[:-1])
def test_mask_is_its_written_definition(n_q, n_k, mask, device):
    """The mask that the other tests take for the truth, pair by pair."""
    is_causal, window = MASKS[mask].get("is_causal", False), MASKS[mask].get("window", math.inf)
    visible = Mask(**MASKS[mask], key_padding_mask=padding(n_k)).to_bool(n_q, n_k, device)
    for i in range(n_q):
        p = i + n_k - n_q
        seen = [(not is_causal or j <= p) and abs(p - j) < window for j in range(n_k)]
        assert visible[0, 0, i].tolist() == [False] * n_k
        assert visible[1, 0, i].tolist() == [x and j > n_k // 3 for j, x in enumerate(seen)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("n_q", "n_k"), SHAPES)
def test_masks(n_q, n_k, mask, padded, dtype):
    visible = MASKS[mask] | ({"key_padding_mask": padding(n_k)} if padded else {})
    out, lse, *grads = assert_error_rule(*inputs(n_q, n_k, dtype=dtype), topk=6, **visible)
    unseen = ~Mask(**visible).to_bool(n_q, n_k, out.device).any(-1).expand(out.shape[:-1])
    assert (out[unseen] == 0).all()
    assert lse[unseen].isneginf().all()
    assert (grads[0][unseen] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("shape", "budget"),
    [
        ({"heads": (3, 1)}, {"topk": 4}),
        ({"heads": (6, 2)}, {"topk": 1}),
        ({"heads": (4, 1), "d": 64}, {"topk": 8, "topk_query": 64}),
        ({"heads": (7, 1), "d": 96, "d_v": 32}, {"topk": 12}),
        ({"heads": (8, 1), "d": 128, "d_v": 64}, {"topk": 16, "topk_query": 4}),
        ({"heads": (1, 1), "d": 256}, {"topk": 16, "dense_dims": 64}),
        ({"d": 80, "d_v": 96}, {"topk": 8, "dense_dims": 16}),
        ({"d": 33, "d_v": 1}, {"topk": 32, "dense_dims": 1}),
        ({"d": 40}, {"topk": 5, "scale": 0.7}),
        ({"d": 40}, {"topk": 5, "dense_dims": 8, "topk_query": 40}),
        ({"heads": (4, 2), "strided": True, "d_v": 48}, {"topk": 8, "dense_dims": 4}),
        ({"strided": True}, {"topk": 8, "topk_query": 32}),
        ({}, {"topk": 5, "backend": "reference"}),
        ({}, {"topk": 5, "backend": "dense"}),
        ({"heads": (4, 2)}, {"topk": 5, "gradient": "all"}),
        ({"d_v": 48}, {"topk": 5, "topk_query": 32, "gradient": "all"}),
        ({}, {"topk": 5, "dense_dims": 4, "gradient": "all", "backend": "reference"}),
    ],
    ids=str,
)
def test_shapes_and_budgets(shape, budget, is_causal, dtype):
    assert_error_rule(*inputs(19, 45, dtype=dtype, **shape), **budget, is_causal=is_causal)


@pytest.mark.parametrize("n", [16, 45])
@pytest.mark.parametrize("width", [1, 32, 64])
def test_noncontiguous_upstream_gradient(n, width):
    q, k, v = inputs(n, 45)
    gradient = torch.randn(2, 2, 1, width)[..., :: max(1, width // 32)]
    assert_error_rule(q, k, v, gradient.expand_as(q), topk=6, is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_full_budget_is_dense_attention(dtype, is_causal):
    q, k, v = inputs(40, 40, heads=(4, 2), dtype=dtype)
    grad_out = torch.randn_like(q)

    def ours(q, k, v):
        return attention(q, k, v, topk=32, is_causal=is_causal, return_lse=True)

    def torchs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True), q.new_zeros(0)

    got, expected = (outputs_and_gradients(f, q, k, v, grad_out) for f in (ours, torchs))
    for x, y in zip(got[:1] + got[2:], expected[:1] + expected[2:], strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_pairs_without_a_shared_feature_keep_weight_one(backend):
    q = torch.tensor([[2.0, 0, 0, 1]])[None, None]  # keeps feature 0
    k = torch.tensor([[1.0, 3, 0, 0], [1, 0, 0.5, 0]])[None, None]  # keep features 1 and 0: scores 0 and 2
    v = torch.eye(2)[None, None]
    out, lse = attention(q, k, v, topk=1, scale=1.0, return_lse=True, backend=backend)
    total = 1 + math.exp(2)
    torch.testing.assert_close(out.flatten(), torch.tensor([1 / total, math.exp(2) / total]))
    torch.testing.assert_close(lse.item(), math.log(total))


@pytest.mark.parametrize("backend", ["dense", "reference"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "dense_dims": 2}, {"window": 2, "topk_query": 8}], ids=str)
def test_gradcheck(options, backend):
    def separated(heads, n):  # magnitudes 0.1 apart: a small step cannot change the kept features
        order = torch.rand(1, heads, n, 8).argsort(-1).double()
        return ((order + 1) / 10 * torch.randn_like(order).sign()).requires_grad_()

    q, k, v = separated(2, 3), separated(1, 5), separated(1, 5)
    if q.is_cuda and backend == "dense":
        pytest.skip("no fused CUDA kernel takes float64")
    # away from ties the straight-through gradient is the exact derivative
    assert torch.autograd.gradcheck(lambda *x: attention(*x, topk=3, backend=backend, **options), (q, k, v))


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True, "gradient": "all"}, {"is_causal": True, "window": 3, "dense_dims": 2}], ids=str
)
@pytest.mark.parametrize(
    "lengths", [([5, 0, 9, 1], [5, 3, 9, 7]), ([4, 6, 2], [4, 0, 1]), ([0], [0]), ([], [])], ids=str
)
def test_packed_sequences_equal_separate_ones(lengths, options):
    q, k, v = inputs(sum(lengths[0]), sum(lengths[1]), heads=(4, 2), batch=1, dtype=torch.float64)
    grad_out = torch.randn_like(q)
    options = options | {"topk": 4, "return_lse": True}
    bounds = [torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32) for n in lengths]

    def packed(q, k, v):
        out, lse = attention_varlen(*(x[0].transpose(0, 1) for x in (q, k, v)), *bounds, **options)
        return out.transpose(0, 1)[None], lse[None]

    def separate(q, k, v):
        parts = zip(q.split(lengths[0], 2), k.split(lengths[1], 2), v.split(lengths[1], 2), strict=True)
        outs = [attention(*part, **options) for part in parts]
        return torch.cat([out for out, _ in outs], 2), torch.cat([lse for _, lse in outs], 2)

    got = outputs_and_gradients(packed, q, k, v, grad_out)
    if not lengths[0]:
        assert [x.numel() for x in got] == [0] * 5
        return
    for x, y in zip(got, outputs_and_gradients(separate, q, k, v, grad_out), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dense_dims", [0, 4])
def test_keys_given_as_codes(dense_dims):
    q, k, v = inputs(9, 21, heads=(4, 2))
    codes = topk_codes(k, 5, dense_dims=dense_dims)
    expected = attention(q, k, v, topk=5, dense_dims=dense_dims, is_causal=True)
    assert torch.equal(attention(q, codes, v, is_causal=True), expected)
    assert torch.equal(attention(q, codes, v, topk=5, dense_dims=dense_dims, is_causal=True), expected)


def test_autograd_keeps_codes_not_rows():
    q, k, v = (x.requires_grad_() for x in inputs(64, 64, heads=(4, 2), d=128, d_v=32))
    saved = {}

    def pack(x):
        saved[x.data_ptr(), x.shape] = x.nbytes
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out, lse = attention(q, k, v, topk=8, dense_dims=4, is_causal=True, return_lse=True)
    codes = [topk_codes(x, 8, dense_dims=4) for x in (q, k)]
    assert sum(saved.values()) <= sum(x.nbytes for x in (*codes, v, out, lse))
    assert sum(x.nbytes for x in codes) < 0.2 * (q.nbytes + k.nbytes)
    assert out.requires_grad
    assert not lse.requires_grad


def test_explain_names_the_backend():
    for backend in ("dense", "reference"):
        attention(*inputs(3, 3), topk=2, backend=backend)
        named = {"dense": "sparse features through a dense kernel"}.get(backend, backend)
        assert f"attention: {named} (" in flashsfa.explain()


Q = torch.ones(2, 4, 3, 8)
KV = torch.ones(2, 2, 5, 8)
PAST = FeatureCodes(KV[..., :0], KV[..., :1], torch.full((2, 2, 5, 1), 8, dtype=torch.uint8), 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, r"q must be \[B, H, N, D\]"),
        ({"v": KV[0]}, ValueError, r"v must be \[B, H, N, D\]"),
        ({"q": Q.long()}, TypeError, "q must be float16"),
        ({"k": KV.tolist()}, TypeError, "k must be a torch.Tensor, got list"),
        ({"k": KV.double()}, TypeError, "cast them to one dtype"),
        ({"v": KV.half()}, TypeError, "cast them to one dtype"),
        ({"v": KV.to("meta")}, ValueError, "move them together"),
        ({"q": Q[..., :4]}, ValueError, "share head_dim, got 4 and 8"),
        ({"v": KV[:, :, :4]}, ValueError, r"k and v must share \[B, Hkv, N_k\]"),
        ({"q": Q[:1]}, ValueError, "q has batch 1"),
        ({"q": Q[:, :3]}, ValueError, "multiple of kv heads, got 3 and 2"),
        ({"k": KV[:, :0], "v": KV[:, :0]}, ValueError, "multiple of kv heads"),
        ({"v": KV[..., :0]}, ValueError, "at least one feature"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"gradient": "some"}, ValueError, "gradient must be one of"),
        ({"key_padding_mask": torch.zeros(2, 5)}, ValueError, "key_padding_mask must be bool"),
        (
            {"key_padding_mask": torch.zeros(2, 3, dtype=torch.bool)},
            ValueError,
            "key_padding_mask must be bool",
        ),
        ({"topk": None}, ValueError, "topk is needed"),
        ({"topk": 9}, ValueError, "topk must be 1 to 8"),
        ({"topk": 7, "dense_dims": 2}, ValueError, "topk must be 1 to 6"),
        ({"topk_query": 0}, ValueError, "topk_query must be 1 to 8"),
        ({"topk_query": 9}, ValueError, "topk_query must be 1 to 8"),
        ({"dense_dims": 8}, ValueError, "dense_dims must be 0 to"),
        ({"k": topk_codes(KV, 3)}, ValueError, "the key codes hold topk=3"),
        ({"k": topk_codes(KV, 2), "dense_dims": 1}, ValueError, "the key codes hold topk=2, dense_dims=0"),
        ({"k": PAST, "topk": None}, ValueError, "a code index is 8, past the sparse part"),
    ],
)
def test_bad_inputs(change, error, message):
    with pytest.raises(error, match=message):
        attention(**({"q": Q, "k": KV, "v": KV, "topk": 2} | change))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_checked_mode_finds_nan(name):
    bad = {"q": Q, "k": KV, "v": KV} | {name: torch.full_like(Q if name == "q" else KV, math.nan)}
    with flashsfa.checked(), pytest.raises(ValueError, match=f"{name} holds NaN"):
        attention(**bad, topk=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q}, r"q must be packed as \[T, H, D\]"),
        ({"cu_seqlens_q": torch.tensor([0, 3])}, "cu_seqlens_q must be a 1-D int32"),
        ({"cu_seqlens_q": torch.tensor(0, dtype=torch.int32)}, "cu_seqlens_q must be a 1-D int32"),
        ({"cu_seqlens_k": torch.tensor([0, 4], dtype=torch.int32)}, "cu_seqlens_k must rise from 0 to the 5"),
        ({"cu_seqlens_k": torch.tensor([1, 5], dtype=torch.int32)}, "cu_seqlens_k must rise"),
        ({"cu_seqlens_k": torch.tensor([0, 6, 5], dtype=torch.int32)}, "cu_seqlens_k must rise"),
        ({"cu_seqlens_k": torch.tensor([0, 2, 5], dtype=torch.int32)}, "count 1 and 2 sequences"),
    ],
)
@pytest.mark.cpu
def test_bad_packing(change, message):
    good = {"q": Q[0].transpose(0, 1), "k": KV[0].transpose(0, 1), "v": KV[0].transpose(0, 1)}
    good |= {f"cu_seqlens_{x}": torch.tensor([0, n], dtype=torch.int32) for x, n in (("q", 3), ("k", 5))}
    with pytest.raises(ValueError, match=message):
        attention_varlen(**(good | change), topk=2)


def test_cudnn_always_gets_outputs_and_gradients_in_one_order(monkeypatch):
    """torch keeps one backward plan for q, k and v of the same strides, and runs it on outputs and gradients of any."""
    seen = []

    def backward(grad_out, q, k, v, out, *_, **__):
        seen.append((grad_out.stride(), out.stride(), torch.equal(grad_out, expected)))
        return q, k, v

    monkeypatch.setattr(dense, "_aten", SimpleNamespace(_scaled_dot_product_cudnn_attention_backward=backward))
    q = torch.randn(2, 5, 6, 16).transpose(1, 2)  # [B, H, N, D] in the memory order [B, N, H, D]
    expected = torch.randn(2, 6, 5, 16)
    for grad_out in (expected, expected.transpose(1, 2).contiguous().transpose(1, 2)):
        for out in (torch.empty_like(q), torch.empty(q.shape)):
            dense.CudaCudnn().backward(grad_out, q, q, q, out, torch.randn(2, 6, 5), None, True, 0.25)
    assert seen == [(q.stride(), q.stride(), True)] * 4


@pytest.mark.gpu
def test_gradients_do_not_depend_on_the_order_of_what_comes_back():
    shapes = [(2, h, 256, 64) for h in (6, 2, 2)]
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    grad = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)
    found = []
    for grad_out in (grad, grad.transpose(1, 2).contiguous().transpose(1, 2)):
        out = flashsfa.sparse_feature_attention(q, k, v, topk=8, is_causal=True)
        found.append(torch.autograd.grad(out, (q, k, v), grad_out))
    torch.testing.assert_close(*found)

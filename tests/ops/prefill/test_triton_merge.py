"""Parts of attention that meet by their log-sum-exp: the Triton kernel against the formula in fp64, and chunks of a prompt.

Without a GPU the kernel runs in Triton's interpreter, on small shapes.
"""

import math

import pytest
import torch

pytest.importorskip("triton")

from flashsfa import reference, sparse_feature_attention
from flashsfa.mask import Mask
from flashsfa.ops import plan, record
from flashsfa.ops.prefill import fused as dense
from flashsfa.ops.prefill.triton.merge import merge_parts

NOTHING = -math.inf


@pytest.fixture(scope="module")
def where():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def by_token(x, room):
    """x in the memory order [B, N, H, D], as a view between `room` rows of NaN on both sides; and the memory."""
    batch, heads, n, *width = x.shape
    memory = torch.full((batch, n + 2 * room, heads, *width), math.nan, dtype=x.dtype, device=x.device)
    view = memory.transpose(1, 2)[:, :, room : room + n]
    view.copy_(x)
    return view, memory


def sides(shape, dtype, device):
    """Two outputs and log-sum-exps; of the first rows of each head neither, only one or only the other saw keys."""
    out, part = (torch.randn(shape, device=device).to(dtype) for _ in "op")
    lse, part_lse = (30 * torch.randn(shape[:-1], device=device) for _ in "op")
    part_lse[..., 4:] = lse[..., 4:] + torch.randn_like(lse[..., 4:])  # both weigh
    for x, x_lse, empty in ((out, lse, [0, 1]), (part, part_lse, [0, 2])):
        x[:, :, empty], x_lse[:, :, empty] = 0, NOTHING
    return out, lse, part, part_lse


def folded(out, lse, part, part_lse):
    """The formula of plain PyTorch, on copies in the dtypes given."""
    copies = out.clone(), lse.clone()
    total = torch.logaddexp(lse, part_lse)
    weights = [torch.where(total == NOTHING, 0, (x - total).exp())[..., None] for x in (lse, part_lse)]
    copies[0].copy_(out * weights[0] + part * weights[1])
    return copies[0], total


def assert_error_rule(found, same_dtype, truth):
    for x, y, ref in zip(found, same_dtype, truth, strict=True):
        seen = ref > NOTHING
        assert torch.equal(x == NOTHING, ref == NOTHING)
        error, plain = ((z.double() - ref)[seen].abs().max().item() for z in (x, y))
        assert error <= 2 * plain + 2 * torch.finfo(x.dtype).eps * ref[seen].abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 4, 1), (2, 3, 37, 40), (1, 2, 65, 64), (2, 1, 33, 128), (1, 2, 21, 256)], ids=str
)
def test_two_sides_meet_as_in_fp64(shape, dtype, where):
    given = sides(shape, dtype, where)
    truth = folded(*(x.double() for x in given))
    expected = folded(*given)
    out, lse = given[0].clone(), given[1].clone()
    merge_parts(out, lse, *given[2:])
    assert_error_rule((out, lse), expected, truth)
    assert (out[:, :, 0] == 0).all()  # no key on either side
    assert torch.equal(out[:, :, 1], given[2][:, :, 1])  # keys on one side only: that side, to the bit
    assert torch.equal(out[:, :, 2], given[0][:, :, 2])


def test_views_in_another_memory_order(where):
    """Every tensor with strides of its own, between NaN that is neither read nor written."""
    given = sides((2, 3, 37, 40), torch.bfloat16, where)
    truth = folded(*(x.double() for x in given))
    (out, out_memory), (lse, lse_memory) = by_token(given[0], room=5), by_token(given[1], room=3)
    part = torch.nn.functional.pad(given[2], (0, 8), value=math.nan)[..., :40]  # rows further apart
    part_lse = torch.nn.functional.pad(given[3], (0, 7), value=math.nan)[..., :37]
    merge_parts(out, lse, part, part_lse)
    assert_error_rule((out, lse), folded(*given), truth)
    assert out_memory.isnan().sum() == 2 * 10 * 3 * 40
    assert lse_memory.isnan().sum() == 2 * 6 * 3


def test_no_rows(where):
    empty = torch.empty(1, 2, 0, 8, device=where), torch.empty(1, 2, 0, device=where)
    merge_parts(*empty, *empty)
    assert empty[0].shape == (1, 2, 0, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threshold", [0, math.inf], ids=["pieces", "one call"])
@pytest.mark.parametrize(("n_q", "n_k"), [(128, 320), (100, 613), (320, 128)])
@pytest.mark.parametrize("width", [40, 128])
def test_chunks_on_both_sides_of_the_rule(width, n_q, n_k, threshold, dtype, monkeypatch):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN is chosen from Hopper on")
    monkeypatch.setattr(plan, "_CUDNN_CHUNK_FLOPS", threshold)
    monkeypatch.setattr(plan, "_plans", {})
    q = torch.randn(2, 4, n_q, width, device="cuda", dtype=dtype)
    k, v = (torch.randn(2, 2, n_k, width, device="cuda", dtype=dtype) for _ in "kv")
    found = sparse_feature_attention(q, k, v, topk=width, is_causal=True, return_lse=True, backend="dense")
    reason = record.last_choice("attention").reason
    assert ("cuDNN" if threshold == 0 else "FlashAttention-2") in reason
    mask = Mask(is_causal=True)
    expected = reference.attention(q, k, v, mask=mask)
    truth = reference.attention(*(x.double() for x in (q, k, v)), mask=mask)
    assert_error_rule(found, expected, truth)


@pytest.mark.gpu
def test_a_long_chunk_runs_in_pieces_and_a_short_one_in_one_call():
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN is chosen from Hopper on")
    causal = Mask(is_causal=True)

    def kernel(n_q, n_k):
        rows = (torch.empty(1, 16, n, 128, device="cuda", dtype=torch.bfloat16) for n in (n_q, n_k))
        return type(plan.choose_kernel(*rows, causal)[0])

    assert kernel(128, 4096) is dense.CudaFlash
    assert kernel(16384, 32768) is dense.CudaCudnn
    assert kernel(4096, 4096) is dense.CudaCudnn
    assert kernel(128, 128) is dense.CudaCudnn

"""Keys and values of every kind that decode on a GPU reads, and the error that its kernels may have."""

from dataclasses import replace
from functools import partial

import torch

from decode_cases import DecodeRules
from flashsfa import AxisBits, topk_codes
from flashsfa.axes import AxisCodes
from flashsfa.formats import CodeFormat
from flashsfa.narrow import NarrowCodes, NarrowRows
from flashsfa.ops.decode import gpu, plain
from flashsfa.scores import ScoreRules
from flashsfa.stored import KVView

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Keys of every kind: rows in some bits; codes of a dense channel in some bits, kept entries in some bits, and an index form; axes.
ROWS = ["rows 16", "rows 8", "rows 4"]
CODES = ["0 d8s4-packed", "9 d8s4-bitmap", "9 d16s16-uint8", "9 d8s8-packed", "0 d16s16-bitmap", "9 d16s4-uint8"]
AXES = ["axes"]


def draw(*, b=2, hkv=2, group=1, m=1, n=41, d=64, dv=None, dtype=torch.float32):
    shapes = (b, hkv * group, m, d), (b, hkv, n, d), (b, hkv, n, dv or d)
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def axis_bits(heads, d):
    """Another split of a key's bits per head, with fields of all widths and an odd number of 4 bits."""
    bits = torch.tensor([8] * (d // 8) + [4] * 3 + [2] * (d // 2 - 2) + [0] * d)[:d]
    other = torch.tensor([8] * (d // 8) + [4] * (3 + d // 4 - 1) + [0] * d)[:d]
    bits = torch.stack([bits if h % 2 == 0 else other for h in range(heads)]).to(torch.uint8)
    assert len(set(bits.sum(-1).tolist())) == 1
    step = 3.0 / 2.0 ** bits.float() * (1 + torch.rand(heads, d))
    return AxisBits(bits, step, torch.randn(heads, d)).to(DEVICE)


def coded(kind, k, topk=5):
    """Keys as `kind` of `ROWS`, `CODES` or `AXES` holds them."""
    if kind == "axes":
        return AxisCodes.encode(k, axis_bits(*k.shape[1::2]))
    first, second = kind.split()
    if first == "rows":
        return NarrowRows.encode(k, int(second))
    form = CodeFormat.named(second.replace("-", "v16-"))
    return NarrowCodes.encode(topk_codes(k, topk, dense_dims=int(first)), form)


def run(backend, q, kv, rules, *, topk_query=None, softcap=None, scale=None, tolerance=0.0):
    kv = replace(kv, kv_lens=rules.kv_lens, page_table=rules.page_table)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    decode = plain.decode if backend == "plain" else partial(gpu.decode, backend=backend)
    return decode(q, kv, rules.mask, ScoreRules(scale, softcap), tolerance, topk_query)


def dequantised(q, kv, rules, dtype, *, topk_query=None, **options):
    """Plain decode in `dtype` over keys and values rounded to the dtype of q: what a program without this kernel computes."""
    rows = kv.rows(torch.float64)
    exact = KVView(NarrowRows(rows.k.to(dtype), None, None, rows.k.shape[-1], 16), rows.v.to(dtype))
    if topk_query is not None:
        q = topk_codes(q, topk_query, dense_dims=kv.key_budget[1]).to_dense()
    return run("plain", q.to(dtype), exact, rules, **options)


def assert_decodes(backend, q, kv, rules=None, *, read=None, **options):
    """Kernel error against float64 at most twice that of plain decode over rows of the same dtype, plus one rounding: of the output,
    and of the queries that are folded, whose errors mostly cancel in a score. `read` is what the kernel reads where it differs in what
    nobody sees."""
    rules = rules or DecodeRules()
    out, lse = run(backend, q, read or kv, rules, **options)
    rules = replace(rules, page_table=None)
    truth = dequantised(q, kv, rules, torch.float64, **options)
    same = dequantised(q, kv, rules, q.dtype, **options)
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    for got, exact, rounded, eps in zip(
        (out, lse), truth, same, (torch.finfo(q.dtype).eps, torch.finfo(q.dtype).eps / 16), strict=True
    ):
        seen = exact.isfinite()
        assert torch.equal(got.isfinite(), seen)
        assert torch.equal(got.double()[~seen], exact[~seen])
        if seen.any():
            got, exact, rounded = (x.double()[seen] for x in (got, exact, rounded))
            # one rounding, and in float32 those of sums over as many levels as a row has features
            slack = (2 * eps + 32 * torch.finfo(torch.float32).eps) * exact.abs().max().clamp(min=1)
            assert (got - exact).abs().max() <= 2 * (rounded - exact).abs().max() + slack
    return out, lse

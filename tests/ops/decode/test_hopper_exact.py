"""The kernel for tokens that a view holds as they came, beside coded ones in plain PyTorch: on a Hopper GPU where there is one, else lane by lane
on the CPU. Against float64, and the same in plain PyTorch."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import emulated
from flashsfa import decode as module
from flashsfa import explain, reference, sparse_feature_decode, topk_codes
from flashsfa.mask import Mask
from flashsfa.ops import nvrtc
from flashsfa.ops.decode.hopper.exact import exact as kernels
from flashsfa.ops.plan import DecodePlan
from flashsfa.scores import ScoreRules
from flashsfa.stored import ExactKV, KVView

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float16, torch.bfloat16]
B, HKV = 2, 2


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The launches of the kernel so far."""
    if emulated.is_needed(DEVICE):
        monkeypatch.setattr(nvrtc, "load_kernel", emulated.load_kernel)
        monkeypatch.setattr(nvrtc, "obstacle", lambda: None)
    return emulated.note_launches(monkeypatch)


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, device=DEVICE, dtype=torch.float64).to(dtype)


def ring(count, d, dv, dtype, batch=B):
    """So many exact tokens within buffers of NaN."""

    def slots(width):
        buffer = torch.full((batch, HKV, count + 5, width), math.nan, device=DEVICE, dtype=dtype)
        buffer[:, :, 3 : count + 3] = normal(batch, HKV, count, width, dtype=dtype)
        return buffer[:, :, 3 : count + 3]

    return ExactKV(slots(d), slots(dv)) if count else None


def coded(n, d, dv, dtype, batch=B):
    return KVView(topk_codes(normal(batch, HKV, n, d, dtype=dtype), 3), normal(batch, HKV, n, dv, dtype=dtype))


def growing(first, n, recent, *, d=64, dv=64, dtype=torch.bfloat16, batch=B):
    """A view of coded tokens between exact ones."""
    kv = coded(n, d, dv, dtype, batch)
    return replace(kv, first=ring(first, d, dv, dtype, batch), recent=ring(recent, d, dv, dtype, batch))


def placed(positions, n, lengths=None, *, d=64, dv=64, dtype=torch.bfloat16):
    """A view of exact tokens in place of codes, with NaN wherever nothing is held."""
    positions = torch.tensor(positions, device=DEVICE)
    kv, slots = coded(n, d, dv, dtype), ring(positions.shape[1], d, dv, dtype)
    ends = torch.full((B,), n, device=DEVICE) if lengths is None else torch.tensor(lengths, device=DEVICE)
    is_empty = ((positions < 0) | (positions >= ends[:, None]))[:, None, :, None]
    slots = slots.map(lambda x: x.masked_fill_(is_empty.expand(len(x), -1, -1, -1), math.nan))
    hidden = torch.arange(n, device=DEVICE) >= ends[:, None]
    kv = replace(kv, v=kv.v.masked_fill(hidden[:, None, :, None], math.nan))
    return replace(kv, kv_lens=None if lengths is None else ends, recent=ExactKV(slots.k, slots.v, positions))


def times(kv, factor):
    """The view in float64, its exact keys times the factor."""

    def change(part):
        return part and replace(part.map(torch.Tensor.double), k=part.k.double() * factor.double()[:, None])

    return replace(kv, first=change(kv.first), recent=change(kv.recent))


def run(q, kv, *, is_fused=True, factor=None, **rules):
    """out and lse, the coded tokens in plain PyTorch. `factor` is the rules' `exact_factor`."""
    plan, of = DecodePlan("torch", "asked for", fuses_exact=is_fused), ScoreRules.of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "plan_decode", lambda q, kv: plan)
        patch.setattr(ScoreRules, "of", lambda *given: replace(of(*given), exact_factor=factor))
        return sparse_feature_decode(q, kv, topk_query="dense", return_lse=True, **rules)


def assert_decodes(launches, q, kv, **rules):
    """Errors against float64 at most twice those in plain PyTorch, and a rounding; the same bits again."""
    found = run(q, kv, **rules)
    assert len(launches) == 1
    mask = Mask(True, rules.get("window"), rules.get("key_padding_mask"), kv_lens=kv.kv_lens)
    scores = ScoreRules.of(q, rules.get("scale"), rules.get("softcap"), rules.get("sinks"))
    rows = kv.rows(torch.float64) if rules.get("factor") is None else times(kv, rules["factor"]).rows(torch.float64)
    truth = reference.attend(q.double(), rows.k.double(), rows.v.double(), mask, scores)
    plain = run(q, kv, is_fused=False, **rules)
    assert found[0].dtype == q.dtype
    assert found[1].dtype == torch.float32
    for got, exact, rounded, eps in zip(
        found, truth, plain, (torch.finfo(q.dtype).eps, 16 * torch.finfo(torch.float32).eps), strict=True
    ):
        seen = exact.isfinite()
        assert torch.equal(got.isfinite(), seen)
        assert torch.equal(got.double()[~seen], exact[~seen])
        if seen.any():
            got, exact, rounded = (x.double()[seen] for x in (got, exact, rounded))
            slack = eps * exact.abs().max().clamp(min=1)
            assert (got - exact).abs().max() <= 2 * (rounded - exact).abs().max() + slack
    for one, again in zip(found, run(q, kv, **rules), strict=True):
        assert torch.equal(one, again)


def queries(kv, group=2, m=1):
    d, dtype = kv.codes.shape[-1], kv.exact[0].k.dtype
    return normal(len(kv.exact[0].k), HKV * group, m, d, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (128, 128), (8, 8), (80, 72), (96, 256), (256, 200)])
def test_widths(launches, d, dv, dtype):
    kv = growing(3, 20, 30, d=d, dv=dv, dtype=dtype)
    assert_decodes(launches, queries(kv), kv)


@pytest.mark.parametrize(
    ("first", "n", "recent"), [(1, 9, 0), (0, 9, 1), (4, 9, 64), (7, 9, 1), (4, 9, 293), (4, 0, 5), (3, 1, 0)]
)
def test_any_number_of_tokens(launches, first, n, recent):
    kv = growing(first, n, recent, dtype=torch.float16, batch=1)
    assert_decodes(launches, queries(kv), kv)


@pytest.mark.parametrize(("group", "m"), [(1, 1), (3, 1), (4, 2), (1, 7), (5, 3), (2, 20)])
def test_any_number_of_query_rows(launches, group, m):
    kv = growing(2, 11, 22)
    assert_decodes(launches, queries(kv, group, m), kv)


PADDING = {
    "none": lambda n: None,
    "some": lambda n: torch.rand(B, n, device=DEVICE) < 0.4,
    "all": lambda n: torch.ones(B, n, dtype=torch.bool, device=DEVICE),
    "exact": lambda n: (torch.arange(n, device=DEVICE) >= 15).repeat(B, 1),
}


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("window", [None, 1, 7, 30])
@pytest.mark.parametrize("m", [1, 4])
def test_who_sees_what(launches, m, window, padding):
    kv = growing(3, 12, 17)
    assert_decodes(launches, queries(kv, m=m), kv, window=window, key_padding_mask=PADDING[padding](kv.n))


RULES = {
    "scale": {"scale": 0.7},
    "negative scale": {"scale": -0.1},
    "softcap": {"softcap": 1.5},
    "large scores": {"scale": 30.0},
    "sinks": {"sinks": torch.tensor([0.5, -9.0, 3.0, 30.0])},
}


@pytest.mark.parametrize("rules", RULES)
def test_rules_of_scores(launches, rules):
    kv = growing(3, 12, 17, dtype=torch.float16)
    given = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in RULES[rules].items()}
    assert_decodes(launches, queries(kv), kv, **given)


PLACES = {
    "one for all": ([[0, 1, -1, 20, 18, 19]], None),
    "some empty": ([[0, 99, -1, 20, 18, 19], [3, -7, 2, 25, 24, 21]], [21, 26]),
    "all empty": ([[-1, 99, 40], [-1, -1, -1]], [20, 9]),
    "of several lengths": ([[0, 4, 2], [3, 29, 1]], [5, 0]),
    "longer than there is room": ([[0, 29, 28], [3, 27, 1]], [45, 30]),
}


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("places", PLACES)
def test_exact_tokens_in_place_of_codes(launches, places, m, window, is_padded):
    kv = placed(*[PLACES[places][0]], 30, PLACES[places][1])
    padding = torch.rand(B, 30, device=DEVICE) < 0.3 if is_padded else None
    if places == "longer than there is room":
        kv = replace(kv, kv_lens=kv.kv_lens.int())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "may_look", lambda x: False)  # as on a GPU
        assert_decodes(launches, queries(kv, m=m), kv, window=window, key_padding_mask=padding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d", "dv", "group", "m"), [(64, 64, 1, 1), (128, 128, 4, 1), (8, 8, 8, 2), (80, 72, 5, 3), (256, 200, 1, 7)]
)
def test_queries_times_a_factor(launches, d, dv, group, m, dtype):
    """The bits of queries that PyTorch multiplied in their dtype, through several rounds of a warp; and within the rule for errors."""
    factor = normal(HKV, d).float().abs()
    for recent in (30, 150):
        kv = growing(3, 20, recent, d=d, dv=dv, dtype=dtype)
        q = queries(kv, group, m)
        launches.clear()
        assert_decodes(launches, q, kv, factor=factor, softcap=3.0 if m == 2 else None)
        alone = growing(3, 0, recent, d=d, dv=dv, dtype=dtype)
        multiplied = ScoreRules(1.0, exact_factor=factor).exact_queries(q)
        for one, other in zip(run(q, alone, factor=factor), run(multiplied, alone), strict=True):
            assert torch.equal(one, other)


def test_factors_of_any_strides():
    kv, factor = growing(3, 12, 17), normal(65, HKV).float().T
    q = queries(kv)
    expected = run(q, kv, factor=factor.contiguous()[:, 1:].contiguous())
    for given in (factor[:, 1:], factor[:, 1:].contiguous()):
        for one, other in zip(run(q, kv, factor=given), expected, strict=True):
            assert torch.equal(one, other)


def test_a_factor_at_an_odd_address_is_left_to_plain_pytorch(launches):
    kv, memory = growing(3, 12, 17), normal(1 + HKV * 64).float()
    q, odd = queries(kv), memory[1:].view(HKV, 64)
    expected = run(q, kv, is_fused=False, factor=odd)
    for one, other in zip(run(q, kv, factor=odd), expected, strict=True):
        assert torch.equal(one, other)
    assert not launches


def test_queries_of_any_strides(launches):
    kv = growing(3, 12, 17)
    q = normal(B, 3, 4, 64, dtype=torch.bfloat16).transpose(1, 2)  # as a model's
    assert_decodes(launches, q, kv)
    launches.clear()
    assert_decodes(launches, normal(B, 4, 1, 65, dtype=torch.bfloat16)[..., 1:], kv)


def test_keys_and_values_of_any_strides(launches):
    kv = growing(3, 12, 17)
    turned = kv.recent.map(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2))
    of_one = kv.first.map(lambda x: x[:1].expand(B, -1, -1, -1))
    kv = replace(kv, first=of_one, recent=turned)
    assert_decodes(launches, queries(kv), kv)


SPOILT = {
    "query": lambda q, kv: q[0, 1, 0, 3],
    "key": lambda q, kv: kv.recent.k[1, 0, -1, 0],
    "value": lambda q, kv: kv.recent.v[1, 0, 2, 5],
    "newest value": lambda q, kv: kv.recent.v[1, 0, -1, 5],
    "first value": lambda q, kv: kv.first.v[0, 1, 0, 63],
    "code": lambda q, kv: kv.codes.values[0, 0, 4, 1],
}


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("what", SPOILT)
def test_nan_shows_where_it_is_seen_and_nowhere_else(what, m):
    kv = growing(3, 12, 17)
    q = queries(kv, m=m)
    SPOILT[what](q, kv).fill_(math.nan)
    out, lse = run(q, kv)
    plain, plain_lse = run(q, kv, is_fused=False)
    assert out.isnan().any()
    assert torch.equal(out.isnan(), plain.isnan())
    assert torch.equal(lse.isnan(), plain_lse.isnan())


def test_an_infinite_score_is_not_a_number():
    kv = growing(3, 12, 17)
    kv.recent.k[0, 0, 3] = math.inf
    q = queries(kv).abs()
    assert run(q, kv)[0][0, :2].isnan().all()
    assert run(q, kv)[0][0, 2:].isfinite().all()


def test_a_query_that_sees_no_exact_token_keeps_its_bits():
    kv = growing(0, 12, 17)
    padding = (torch.arange(29, device=DEVICE) >= 12).repeat(B, 1)
    q = queries(kv)
    expected = run(q, kv.coded(0, 12))
    for one, other in zip(run(q, kv, key_padding_mask=padding), expected, strict=True):
        assert torch.equal(one, other)


def test_other_forms_are_left_to_plain_pytorch(monkeypatch):
    kv = growing(3, 12, 17)
    q = queries(kv)
    assert kernels.obstacle(q, kv) is None
    assert "not torch.float32" in kernels.obstacle(q.float(), kv)
    odd = growing(3, 12, 17, d=36)
    assert "multiples of 8 up to 256, not 36 and 64" in kernels.obstacle(queries(odd), odd)
    wide = growing(3, 12, 17, dv=264)
    assert "not 64 and 264" in kernels.obstacle(queries(wide), wide)
    shifted = replace(kv, recent=kv.recent.map(lambda x: torch.nn.functional.pad(x, (4, 4))[..., 4:-4]))
    assert "multiples of 16 bytes" in kernels.obstacle(q, shifted)
    turned = replace(kv, recent=kv.recent.map(lambda x: x.mT.contiguous().mT))
    assert "multiples of 16 bytes" in kernels.obstacle(q, turned)
    monkeypatch.setattr(nvrtc, "obstacle", lambda: "NVRTC is missing here")
    assert "NVRTC is missing here" in kernels.obstacle(q, kv)


def test_a_kernel_that_cannot_be_built_is_told(monkeypatch, caplog):
    kv = growing(3, 12, 17)
    q = queries(kv)
    expected = run(q, kv, is_fused=False)
    monkeypatch.setattr(nvrtc, "load_kernel", lambda *_: "the driver is too old")
    for one, other in zip(run(q, kv), expected, strict=True):
        assert torch.equal(one, other)
    assert "tokens held as they came in plain PyTorch beside: the driver is too old" in explain()
    assert caplog.text.count("the driver is too old") == 1

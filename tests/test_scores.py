"""Softcap and attention sinks: in the operator, its gradients and every decode backend, as their definitions say."""

import pytest
import torch

import flashsfa
from attention_cases import assert_error_rule, inputs, largest
from decode_cases import DecodeRules, decode
from flashsfa import reference, sparse_feature_attention, sparse_feature_decode, topk_codes
from flashsfa.ops.decode import cpu, plain

MASKS = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": 7},
    "two-sided": {"window": 9},
}
RULES = {"softcap": (3.0, False), "sinks": (None, True), "both": (2.0, True)}


def rules(name, heads):
    softcap, has_sinks = RULES[name]
    return {"softcap": softcap, "sinks": torch.linspace(-2, 3, heads) if has_sinks else None}


def definition(q, k, v, visible, softcap, sinks):
    """Entry by entry, in loops over rows."""
    out, lse = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype), torch.zeros(q.shape[:-1], dtype=q.dtype)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n, device="cpu") for n in q.shape[:3])).tolist():
        kv_head = h * k.shape[1] // q.shape[1]
        scores = k[b, kv_head] @ q[b, h, i] / q.shape[-1] ** 0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.exp() * visible[i]
        total = weights.sum() + (0 if sinks is None else sinks[h].exp())
        out[b, h, i], lse[b, h, i] = weights @ v[b, kv_head] / total.clamp(min=1e-300), total.log()
    return out, lse


@pytest.mark.parametrize("name", RULES)
def test_reference_is_the_written_definition(name):
    q, k, v = (x.double() for x in inputs(6, 9, heads=(4, 2), d=8))
    visible = torch.rand(6, 9) > 0.4
    visible[3] = False
    given = rules(name, 4)
    sinks = None if given["sinks"] is None else given["sinks"].double()
    mask = type("Given", (), {"to_bool": lambda *_: visible[None, None]})()
    out, lse = reference.attention(q, k, v, mask=mask, softcap=given["softcap"], sinks=sinks)
    expected, expected_lse = definition(q, k, v, visible, given["softcap"], sinks)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", RULES)
def test_operator_and_gradients(name, mask, padded, dtype):
    q, k, v = inputs(21, 33, heads=(4, 2), dtype=dtype)
    visible = dict(MASKS[mask])
    if padded:
        visible["key_padding_mask"] = torch.arange(33) < torch.tensor([5, 30])[:, None]
    assert_error_rule(q, k, v, topk=8, dense_dims=4, **rules(name, 4), **visible)


@pytest.mark.parametrize("name", RULES)
def test_packed_sequences_are_their_own(name):
    lengths = (5, 0, 17)
    q, k, v = (torch.randn(22, heads, 16) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 5, 5, 22], dtype=torch.int32)
    options = {"topk": 4, "is_causal": True, **rules(name, 4)}
    packed = sparse_feature_attention(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, **options)
    for one, rows in zip(packed.split(lengths), zip(*(x.split(lengths) for x in (q, k, v)), strict=True), strict=True):
        alone = sparse_feature_attention(*(x.transpose(0, 1)[None] for x in rows), **options)
        torch.testing.assert_close(one, alone[0].transpose(0, 1))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["sinks", "both"])
def test_sinks_have_a_gradient(name, backend):
    q, k, v = inputs(12, 20, heads=(4, 2))
    given = rules(name, 4)
    grad_out = torch.randn(2, 4, 12, 32)

    def gradient(function, sinks, *tensors):
        sinks = sinks.clone().requires_grad_()
        return torch.autograd.grad(function(*tensors, sinks), sinks, grad_out.to(tensors[0].dtype))[0]

    def ours(q, k, v, sinks):
        return sparse_feature_attention(
            q, k, v, topk=8, is_causal=True, softcap=given["softcap"], sinks=sinks, backend=backend
        )

    def truth(q, k, v, sinks):
        mask = flashsfa.mask.Mask(is_causal=True)
        return reference.sparse_feature_attention(q, k, v, topk=8, mask=mask, softcap=given["softcap"], sinks=sinks)[0]

    expected = gradient(truth, given["sinks"].double(), q.double(), k.double(), v.double())
    found = gradient(ours, given["sinks"], q, k, v)
    assert largest(expected) > 0.1
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_gradcheck():
    q, k, v = (x.double().requires_grad_() for x in inputs(4, 6, heads=(2, 1), d=6, batch=1))
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def operator(q, k, v, sinks):
        return sparse_feature_attention(q, k, v, topk=6, is_causal=True, softcap=1.5, sinks=sinks)

    torch.autograd.gradcheck(operator, (q, k, v, sinks))


BACKENDS = ["plain", "cpu", "triton"]


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap_in_every_decode_backend(backend, m, tolerance):
    if backend == "cpu" and not cpu.is_available():
        pytest.skip("needs numba")
    where = "cpu" if backend == "cpu" else None
    module = {"plain": plain, "cpu": cpu}.get(backend) or pytest.importorskip("flashsfa.ops.decode.triton.decode")
    with torch.device(where) if where else torch.device(torch.get_default_device()):
        q, k, v = torch.randn(2, 4, m, 32), torch.randn(2, 2, 150, 32), torch.randn(2, 2, 150, 16)
        codes, lens = topk_codes(3 * k, 8, dense_dims=4), torch.tensor([150, 77])
    given = DecodeRules(lens, window=100)
    out, lse = decode(module, q, codes, v, given, 0.3, tolerance, softcap=2.0)
    mask = given.mask
    wide = (x.double() for x in (q, codes.to_dense(), v))
    expected, expected_lse = reference.attention(*wide, mask=mask, scale=0.3, softcap=2.0)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    bound = 2 * tolerance * float(v.norm(dim=-1).max())
    assert largest((out.double() - expected).norm(dim=-1)) <= bound + 1e-5
    uncapped, _ = decode(module, q, codes, v, given, 0.3, tolerance)
    assert largest(uncapped - out) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_decode_equals_attention(name, dtype):
    q, k, v = inputs(3, 40, heads=(4, 2), dtype=dtype)
    given = rules(name, 4)
    codes = topk_codes(k, 8, dense_dims=4)
    out, lse = sparse_feature_decode(q, codes, v, **given, return_lse=True)
    expected, expected_lse = sparse_feature_attention(q, codes, v, is_causal=True, **given, return_lse=True)
    tight = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(out, expected, **tight)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=tight["atol"])


def test_a_row_that_sees_nothing_has_its_sink_alone():
    q, k, v = inputs(2, 4)
    sinks = torch.tensor([0.5, -1.0])
    for backend in ("auto", "reference"):
        out, lse = sparse_feature_attention(
            q, k, v, topk=4, sinks=sinks, key_padding_mask=torch.ones(2, 4, dtype=torch.bool), return_lse=True,
            backend=backend,
        )  # fmt: skip
        assert not out.any()
        torch.testing.assert_close(lse, sinks[:, None].expand(2, 2, 2))


def test_explain_names_the_path():
    q, k, v = inputs(4, 4)
    sparse_feature_attention(q, k, v, topk=4, softcap=30.0)
    assert "caps scores" in flashsfa.explain()
    assert "blocks" in flashsfa.explain()
    with pytest.raises(ValueError, match="backend='dense' cannot run: no fused kernel caps scores"):
        sparse_feature_attention(q, k, v, topk=4, softcap=30.0, backend="dense")


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"softcap": -3}, ValueError, "softcap must be positive"),
        ({"softcap": float("nan")}, ValueError, "softcap must be finite"),
        ({"softcap": torch.tensor(3.0)}, TypeError, "softcap must be a float"),
        ({"softcap": [3.0]}, TypeError, "softcap must be a float, got list"),
        ({"softcap": True}, TypeError, "softcap must be a float, got bool"),
        ({"scale": {}}, TypeError, "scale must be a float, got dict"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks must be floating \[Hq\] = \[2\]"),
        ({"sinks": torch.zeros(2, dtype=torch.int64)}, ValueError, "sinks must be floating"),
        ({"sinks": 0.5}, TypeError, "sinks must be a torch.Tensor"),
        ({"attn_mask": torch.ones(4, 4)}, TypeError, "takes no attn_mask: pass is_causal"),
        ({"dropout_p": 0.1}, TypeError, "takes no dropout_p"),
        ({"heads": 2}, TypeError, "unexpected keyword argument 'heads'"),
    ],
)
def test_what_is_refused(options, kind, words):
    q, k, v = inputs(4, 4)
    with pytest.raises(kind, match=words):
        sparse_feature_attention(q, k, v, topk=4, **options)


def test_numbers_of_symbolic_traces():
    """Which cannot be looked up."""
    q, k, v = inputs(1, 9)

    def attend(q, k, v):
        return sparse_feature_decode(q, topk_codes(k, 4), v, softcap=3.0)

    traced = torch.fx.experimental.proxy_tensor.make_fx(attend, tracing_mode="symbolic")(q, k, v)
    torch.testing.assert_close(traced(q, k, v), attend(q, k, v))


def test_sdpas_harmless_arguments_pass():
    q, k, v = inputs(4, 4, heads=(4, 2))
    found = sparse_feature_attention(q, k, v, topk=4, enable_gqa=True, dropout_p=0.0, attn_mask=None)
    assert torch.equal(found, sparse_feature_attention(q, k, v, topk=4))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_sink_of_minus_infinity_takes_nothing(backend):
    """Nor does it spoil queries that see no key."""
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=torch.float64) for _ in range(3))
    padding, sinks = (
        (torch.arange(5) < 2)[None],
        torch.tensor([-torch.inf, 0.5], dtype=torch.float64, requires_grad=True),
    )
    options = {"topk": 3, "is_causal": True, "key_padding_mask": padding, "backend": backend}
    out, lse = sparse_feature_attention(q, k, v, sinks=sinks, return_lse=True, **options)
    plain, plain_lse = sparse_feature_attention(q, k, v, return_lse=True, **options)
    torch.testing.assert_close(out[:, 0], plain[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(lse[:, 0], plain_lse[:, 0], rtol=0, atol=0)
    assert (out[:, :, :2] == 0).all()
    out.sum().backward()
    assert sinks.grad[0] == 0
    assert sinks.grad[1].isfinite()
    nothing = sparse_feature_decode(q[:, :, :1], topk_codes(k, 3), v, kv_lens=torch.tensor([0]), sinks=sinks.detach())
    assert (nothing == 0).all()

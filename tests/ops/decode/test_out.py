"""`out` of `sparse_feature_decode`: the bits of a call without it, by kernels on a GPU written in place. Where there is no GPU, those for Hopper run lane
by lane on the CPU, and Triton's in its interpreter."""

import pytest
import torch

pytest.importorskip("triton")

import emulated
from flashsfa import decode as module
from flashsfa import sparse_feature_decode, topk_codes
from flashsfa.narrow import NarrowRows
from flashsfa.ops import nvrtc
from flashsfa.ops.plan import DecodePlan
from flashsfa.stored import ExactKV, KVView
from held_cases import DEVICE, coded, draw

GPU = ["hopper", "triton", "triton, few bits"]


@pytest.fixture
def in_place(monkeypatch):
    """Whether a kernel wrote `out`, one entry a call."""
    told, put = [], module._put
    monkeypatch.setattr(module, "_put", lambda found, out: told.append(found is out) or put(found, out))
    return told


@pytest.fixture
def on(monkeypatch):
    """Makes a backend that of all calls."""

    def choose(backend):
        if backend == "hopper" and emulated.is_needed(DEVICE):
            monkeypatch.setattr(nvrtc, "load_kernel", emulated.load_kernel)
        if backend == "numba":
            pytest.importorskip("numba")
            if DEVICE.type == "cuda":
                pytest.skip("runs on the CPU")
        plan = DecodePlan(backend.split(",")[0], "asked for", fuses_exact=backend == "hopper")
        monkeypatch.setattr(module, "plan_decode", lambda q, kv: plan)

    return choose


def case(backend, m=1, **sizes):
    """q [3, 4, M, 64] and a view of 70 keys."""
    q, k, v = draw(b=3, group=2, m=m, n=70, dtype=torch.bfloat16, **sizes)
    if backend == "triton, few bits":
        return q, KVView(coded("9 d8s4-bitmap", k), NarrowRows.encode(v, 4))
    return q, KVView(topk_codes(k, 5, dense_dims=9), v)


def served(q, width=64, rows=2):
    """As vLLM has them: `out` of q, and the rows [T, Hq, Dv] that it is a view of, with further ones behind."""
    batch, heads, m, _ = q.shape
    buffer = torch.full((batch * m + rows, heads, width), 7.0, dtype=q.dtype, device=q.device)
    return buffer[: batch * m].unflatten(0, (batch, m)).transpose(1, 2), buffer


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("options", [{}, {"value_tolerance": 0.02}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("backend", [*GPU, "torch", "numba"])
def test_bits_are_those_without_it(on, in_place, backend, options, m):
    on(backend)
    q, kv = case(backend, m)
    if "sinks" in options:
        options = {"sinks": torch.randn(4, device=DEVICE)}
    expected = sparse_feature_decode(q, kv, return_lse=True, **options)
    out, buffer = served(q)
    found, lse = sparse_feature_decode(q, kv, return_lse=True, out=out, **options)
    assert found is out
    assert torch.equal(buffer[: 3 * m].unflatten(0, (3, m)).transpose(1, 2), expected[0])
    assert torch.equal(lse, expected[1])
    assert (buffer[3 * m :] == 7).all()
    assert in_place[-1] == (backend in GPU and m == 1 and "sinks" not in options)


@pytest.mark.parametrize("n", [0, 31, 70])
def test_few_keys_and_none(on, in_place, n):
    """Of none the output is 0; fewer than the kernel for Hopper takes are left to Triton's, which writes in place too."""
    on("hopper")
    q, kv = case("hopper")
    kv = kv.map(lambda x: x[:, :, :n])
    out, buffer = served(q)
    expected = sparse_feature_decode(q, kv)
    sparse_feature_decode(q, kv, out=out)
    assert torch.equal(out, expected)
    assert (buffer[3:] == 7).all()
    assert in_place[-1] == (n > 0)


def test_tokens_in_place_of_codes_are_folded_in_there(on, in_place):
    on("hopper")
    q, kv = case("hopper")
    positions = torch.tensor([[69, 68, 0]], device=DEVICE)
    exact = ExactKV(*draw(b=3, n=3, dtype=torch.bfloat16)[1:], positions)
    kv = KVView(kv.codes, kv.v, recent=exact)
    out, buffer = served(q)
    expected = sparse_feature_decode(q, kv, topk_query="dense")
    sparse_feature_decode(q, kv, topk_query="dense", out=out)
    assert torch.equal(out, expected)
    assert (buffer[3:] == 7).all()
    assert in_place[-1]


@pytest.mark.parametrize("backend", GPU)
def test_what_a_kernel_reads_is_not_written_before(on, in_place, backend):
    """`out` in the memory of queries, of values, of lengths or of sinks; and at an odd address."""
    on(backend)
    q, kv = case(backend)
    memory = torch.zeros(4, *q.shape[1:], dtype=q.dtype, device=DEVICE)
    expected = sparse_feature_decode(q, kv)
    memory[:3] = q
    assert torch.equal(sparse_feature_decode(memory[:3], kv, out=memory[1:]), expected)
    if isinstance(kv.v, torch.Tensor):
        values = kv.v.clone()
        there = values.view(-1)[values.numel() - q.numel() :].view(q.shape)
        assert torch.equal(sparse_feature_decode(q, KVView(kv.codes, values), out=there), expected)
    memory = torch.zeros(2 * 4 * 64, dtype=torch.int64, device=DEVICE)
    lens = memory[-3:].copy_(torch.tensor([70, 33, 50]))
    expected = sparse_feature_decode(q, KVView(kv.codes, kv.v, kv_lens=lens.clone()))
    there = memory.view(torch.bfloat16)[-q.numel() :].view(q.shape)
    assert torch.equal(sparse_feature_decode(q, KVView(kv.codes, kv.v, kv_lens=lens), out=there), expected)
    memory = torch.zeros(q.numel(), dtype=q.dtype, device=DEVICE)
    sinks = memory[:4].normal_()
    expected = sparse_feature_decode(q, kv, sinks=sinks.clone())
    assert torch.equal(sparse_feature_decode(q, kv, sinks=sinks, out=memory.view(q.shape)), expected)
    expected = sparse_feature_decode(q, kv)
    odd = torch.zeros(q.numel() + 1, dtype=q.dtype, device=DEVICE)[1:].view(q.shape)
    assert torch.equal(sparse_feature_decode(q, kv, out=odd), expected)
    assert not any(in_place)


@pytest.mark.parametrize("backend", ["hopper", "torch"])
def test_autograd_sees_that_it_has_changed(on, backend):
    on(backend)
    q, kv = case(backend)
    out, x = torch.zeros_like(q), torch.ones_like(q, requires_grad=True)
    y = x * out
    sparse_feature_decode(q, kv, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (lambda q: q[:, :, 0], ValueError, r"out must be \[B, Hq, M, Dv\] = \(3, 4, 1, 64\), got \(3, 4, 64\)"),
        (lambda q: q[..., :32].contiguous(), ValueError, "out must be"),
        (lambda q: q.float(), TypeError, r"out is torch.float32 but q is torch.bfloat16"),
        (lambda q: q.to("meta"), ValueError, "out is on meta"),
        (lambda q: torch.zeros_like(q, requires_grad=True), ValueError, "no gradient"),
        (lambda q: q.tolist(), TypeError, "out must be a"),
    ],
)
def test_what_does_not_fit_is_refused(out, error, message):
    q, kv = case("torch")
    with pytest.raises(error, match=message):
        sparse_feature_decode(q, kv, out=out(q))


def test_traced_it_is_a_copy():
    q, kv = case("torch")
    out, buffer = served(q)

    def step(q, out):
        return sparse_feature_decode(q, kv, out=out)

    torch.compile(step, fullgraph=True, backend="aot_eager")(q, out)
    torch.testing.assert_close(out, sparse_feature_decode(q, kv), rtol=0.02, atol=0.02)
    assert (buffer[3:] == 7).all()

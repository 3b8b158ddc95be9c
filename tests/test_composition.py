"""What composes with what: torch's transforms either give the right derivative or are refused in one sentence (docs/reference/composition.md)."""

import copy

import pytest
import torch
import torch._dynamo.testing
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

import flashsfa
from flashsfa import SparseFeatureAttention, SparseKVCache, topk_codes
from flashsfa import sparse_feature_attention as attention
from flashsfa import sparse_feature_attention_varlen as attention_varlen
from flashsfa import sparse_feature_decode as decode

WIDTH = 8


def heads_of(n=5, **options):
    return torch.randn(1, 2, n, WIDTH, dtype=torch.float64, **options)


def plain(q, k, v):
    """Attention of all features, in torch alone."""
    return torch.softmax(q @ k.mT / WIDTH**0.5, -1) @ v


def everything(q, k, v, backend="reference"):
    return attention(q, k, v, topk=WIDTH, backend=backend)


# Transforms over backend="reference"

TRANSFORMS = {
    "grad": lambda f: grad(lambda q, k, v: f(q, k, v).sum(), argnums=(0, 1, 2)),
    "jvp": lambda f: lambda *x: jvp(f, x, tuple(torch.ones_like(t) for t in x)),
    "vjp": lambda f: lambda *x: (lambda out, pull: pull(torch.ones_like(out)))(*vjp(f, *x)),
    "jacrev": lambda f: jacrev(f),
    "jacfwd": lambda f: jacfwd(f),
    "hessian": lambda f: hessian(lambda q, k, v: f(q, k, v).square().sum()),
    "vmap": lambda f: lambda *x: vmap(f)(*(torch.stack((t, 2 * t)) for t in x)),
    "vmap of grad": lambda f: lambda *x: vmap(grad(lambda *x: f(*x).sum()))(*(torch.stack((t, 2 * t)) for t in x)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_reference_under_transforms(name):
    x = [heads_of() for _ in range(3)]
    torch.testing.assert_close(TRANSFORMS[name](everything)(*x), TRANSFORMS[name](plain)(*x))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("backend", ["auto", "dense"])
def test_other_backends_refuse_transforms(name, backend):
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        TRANSFORMS[name](lambda *x: everything(*x, backend=backend))(*(heads_of() for _ in range(3)))


@pytest.mark.parametrize("gradient", ["kept", "all"])
def test_forward_mode_derivatives_are_those_of_the_reverse_mode(gradient):
    x, tangents = [heads_of() for _ in range(3)], [heads_of() for _ in range(3)]

    def sparse(q, k, v):
        return attention(q, k, v, topk=3, dense_dims=2, is_causal=True, gradient=gradient, backend="reference")

    _, tangent = jvp(sparse, tuple(x), tuple(tangents))
    weights = torch.randn_like(tangent)
    leaves = [t.requires_grad_() for t in x]
    grads = torch.autograd.grad(
        (weights * attention(*leaves, topk=3, dense_dims=2, is_causal=True, gradient=gradient)).sum(), leaves
    )
    pairs = zip(grads, tangents, strict=True)
    torch.testing.assert_close((weights * tangent).sum(), sum((g * t).sum() for g, t in pairs))


def test_second_derivatives():
    x = [heads_of(requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradgradcheck(lambda *x: attention(*x, topk=3, backend="reference"), x)
    (first,) = torch.autograd.grad(attention(*x, topk=3).sum(), x[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives: pass backend='reference'"):
        first.square().sum().backward()


def calls():
    q, k, v = (heads_of() for _ in range(3))
    codes, rows = topk_codes(k, 3), k[0].transpose(0, 1)
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    return {
        "attention": lambda x: attention(x, k, v, topk=3),
        "keys": lambda x: attention(q, x, v, topk=3),
        "values": lambda x: attention(q, k, x, topk=3),
        "varlen": lambda x: attention_varlen(x[0].transpose(0, 1), rows, rows, bounds, bounds, topk=3),
        "topk_codes": lambda x: topk_codes(x, 3).values,
        "2:4": lambda x: topk_codes(x, 3, pattern="2:4").values,
        "to_dense": lambda x: flashsfa.FeatureCodes(x[..., :0], x[..., :3], codes.indices, WIDTH).to_dense(),
        "decode": lambda x: decode(x, codes, v),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_no_derivative_is_zero_without_a_word(name):
    call, x = calls()[name], heads_of()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        call(forward_ad.make_dual(x, torch.ones_like(x)))
    with forward_ad.dual_level():
        call(x)  # no tangent, nothing to lose
    for transform in (lambda: jvp(call, (x,), (x,)), lambda: vmap(call)(x[None])):
        with pytest.raises(NotImplementedError, match=r"torch\.func"):
            transform()


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_is_refused():
    for name in ("attention", "topk_codes", "decode"):
        with pytest.raises(NotImplementedError, match=r"torch\.export or torch\.compile"):
            torch.jit.trace(calls()[name], heads_of(), check_trace=False)


# The module


def layer_of(**options):
    torch.manual_seed(0)
    return SparseFeatureAttention(16, 2, topk=3, positions="none", **options).double()


def test_per_sample_gradients_of_the_module(device):
    layer, x = layer_of(backend="reference").to(device), torch.randn(3, 5, 16, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return functional_call(layer, parameters, (x[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        loss(parameters, x[i]).backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(found[name][i], p.grad)
            p.grad = None


def test_a_cache_refuses_to_lose_gradients(device):
    layer, x = layer_of().to(device), torch.randn(1, 5, 16, dtype=torch.float64)
    cache = layer.make_cache()
    with pytest.raises(ValueError, match="no gradient"):
        layer(x, cache)
    assert len(cache) == 0
    with torch.no_grad():
        layer(x, cache)
    wrong = SparseKVCache(4, dense_dims=0)
    with pytest.raises(ValueError, match="the cache keeps topk=4"), torch.no_grad():
        layer(x, wrong)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("order", ["inside", "before", "after"])
def test_a_cache_filled_under_autocast_goes_on_outside_and_back(norm, order, device):
    layer = SparseFeatureAttention(16, 2, topk=3, positions="none", qk_norm=norm).to(device)
    x = torch.randn(1, 6, 16)
    cache = layer.make_cache()
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast(device.type, torch.bfloat16, enabled=order != "after"):
            first = layer(x[:, :5], cache)
        with torch.autocast(device.type, torch.bfloat16, enabled=order != "before"):
            second = layer(x[:, 5:], cache)
    found = torch.cat((first.float(), second.float()), dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


@pytest.mark.cpu
def test_norms_in_float32_under_autocast():
    """As CUDA's autocast does from torch 2.12 on: queries and keys are wider than values."""
    lib = torch.library.Library("aten", "IMPL", "AutocastCPU")

    def widening(x, shape, weight=None, eps=None):
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return torch.rms_norm(x.float(), shape, None if weight is None else weight.float(), eps)

    lib.impl("rms_norm", widening)
    layer = SparseFeatureAttention(16, 2, topk=3, positions="none", qk_norm=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for cache in (None, layer.make_cache()):
            assert layer(torch.randn(1, 5, 16), cache).dtype == torch.bfloat16
    lib._destroy()


def test_autocast_does_not_reach_plain_pytorch(device):
    q, k, v = (heads_of().float() for _ in range(3))
    cache = flashsfa.PagedSparseKVCache(3, pages=4, page_size=16)
    sequence = cache.add()
    cache.append([sequence], k, v)

    def results():
        yield decode(q, cache.view([sequence]))
        yield decode(q.half(), topk_codes(k.half(), 3), v.half())
        for backend in ("auto", "reference"):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            with torch.autocast(device.type, torch.bfloat16, enabled=torch.is_autocast_enabled(device.type)):
                out = attention(*leaves, topk=3, backend=backend)
            with torch.autocast(device.type, enabled=False):  # backward passes belong outside
                yield from (out.detach(), *torch.autograd.grad(out.sum(), leaves))

    expected = list(results())
    with torch.autocast(device.type, torch.bfloat16):
        found = list(results())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# Inference mode


def test_what_inference_mode_filled_goes_on_outside():
    k, v = (torch.randn(1, 2, 6, WIDTH) for _ in range(2))

    def growing():
        cache = SparseKVCache(3, capacity=4)
        yield lambda: cache.append(k, v)  # allocates
        yield lambda: cache.append(k, v)  # grows
        yield lambda: cache.select_batch(torch.tensor([0, 0]))
        yield lambda: cache.append(*(x.expand(2, -1, -1, -1) for x in (k, v)))
        yield lambda: cache.keep_last(5, 64)
        yield lambda: cache.append(*(x.expand(2, -1, -1, -1) for x in (k, v)))

    def paged():
        cache = flashsfa.PagedSparseKVCache(3, pages=8, page_size=16)
        names = [cache.add()]
        yield lambda: cache.append(names, k, v)
        yield lambda: names.append(cache.fork(names[0]))
        yield lambda: cache.append(names, *(x.expand(2, -1, -1, -1) for x in (k, v)))

    for steps in (growing, paged):
        for inside in (0, 1):  # every other step inside
            for i, step in enumerate(steps()):
                with torch.inference_mode(i % 2 == inside):
                    step()


# torch.compile, torch.export


@pytest.mark.cpu  # torch 2.11 cannot trace unflatten while another device is the default
def test_one_graph_for_all_cache_lengths(device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    layer = SparseFeatureAttention(16, 2, topk=3, positions="none").to(device)
    compiled, cache, plain = (
        torch.compile(layer, backend=counter, fullgraph=True),
        layer.make_cache(),
        layer.make_cache(),
    )
    with torch.no_grad():
        for _ in range(9):
            x = torch.randn(1, 1, 16)
            torch.testing.assert_close(compiled(x, cache), layer(x, plain))
    assert counter.frame_count <= 3  # an empty cache, one token, any number
    torch._dynamo.reset()


def test_export(device):
    layer, x = SparseFeatureAttention(16, 2, topk=3, positions="none").to(device), torch.randn(2, 5, 16)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({1: torch.export.Dim("n", min=2, max=512)},))
    for n in (5, 9):
        x = torch.randn(2, n, 16)
        torch.testing.assert_close(exported.module()(x), layer(x))


# Training wrappers


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, device):
    layer = layer_of().to(device)
    x = torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        layer.zero_grad()
        run(x).square().sum().backward()
        results.append([p.grad.clone() for p in layer.parameters()])
    torch.testing.assert_close(*results)


def test_copies_and_state(tmp_path, device):
    layer, x = layer_of().to(device), torch.randn(1, 5, 16, dtype=torch.float64)
    expected = layer(x)
    torch.save(layer, tmp_path / "layer.pt")
    for other in (copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)):
        torch.testing.assert_close(other(x), expected)


@pytest.fixture
def process_group(tmp_path, device):
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    kind = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(kind, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_distributed_wrappers(wrapper, process_group, device):
    layer, x = layer_of().to(device), torch.randn(2, 5, 16, dtype=torch.float64)
    layer(x).square().sum().backward()
    expected = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    if wrapper == "DDP":
        wrapped = nn.parallel.DistributedDataParallel(layer)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        wrapped = fully_shard(layer, mesh=init_device_mesh(device.type, (1,)))
    wrapped(x).square().sum().backward()
    found = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in wrapped.parameters()]
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
def test_cuda_graph():
    q, k, v = (torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    codes = topk_codes(k, 8)

    def step():
        return attention(q, k, v, topk=8, is_causal=True), decode(q[:, :, -1:], codes, v)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(captured, step())


# Default dtype and device


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_another_default_dtype(default):
    q, k, v = (heads_of().float() for _ in range(3))
    layer = SparseFeatureAttention(16, 2, topk=3, positions="none").to(torch.float32)
    x = torch.randn(1, 5, 16)

    def results():
        codes = topk_codes(k, 3)
        cache = SparseKVCache(3, dtype=torch.int8)
        held, values = cache.append(k, v)
        yield attention(q, k, v, topk=3, is_causal=True)
        yield decode(q, codes, v)
        yield decode(q, held, values, v_scale=cache.v_scale)
        with torch.no_grad():
            yield layer.to(q.device)(x, layer.make_cache())

    expected = list(results())
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = list(results())
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.cpu
def test_another_default_device():
    q, k, v = (heads_of().float() for _ in range(3))
    codes = topk_codes(k, 3)
    expected = decode(q, codes, v), attention(q, k, v, topk=3)
    with torch.device("meta"):
        found = decode(q, codes, v), attention(q, k, v, topk=3)
        cache = SparseKVCache(3)
        held, values = cache.append(k, v)
        again = decode(q, held, values)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(again, expected[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{"recent": 4}, {"dtype": torch.int8}, {"recent": 3, "first": 2, "dtype": torch.int8}], ids=str
)
def test_caches_of_one_16_bit_dtype_under_autocast_to_another(options, device):
    k, v = (torch.randn(1, 2, 12, 16, dtype=torch.float16) for _ in range(2))
    plain, cast = (flashsfa.SparseKVCache(4, **options) for _ in range(2))
    pages = flashsfa.PagedSparseKVCache(4, pages=2, page_size=16, **options)
    sequence = pages.add()
    for part in range(0, 12, 3):
        rows = k[:, :, part : part + 3], v[:, :, part : part + 3]
        plain.append(*rows)
        with torch.autocast(device.type, torch.bfloat16):
            cast.append(*rows)
            pages.append([sequence], *rows)
            pages.view([sequence])
    for x, y in zip(plain.kv.tensors(), cast.kv.tensors(), strict=True):
        assert torch.equal(x, y)


def test_sinks_that_ask_for_a_gradient_are_refused_by_decode():
    q, (k, v) = torch.randn(1, 2, 1, 8), (torch.randn(1, 2, 5, 8) for _ in range(2))
    sinks = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="carry no gradient"):
        decode(q, topk_codes(k, 3), v, sinks=sinks)

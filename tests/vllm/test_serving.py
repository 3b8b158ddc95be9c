"""The backend, driven as vLLM drives it, equals the operator. Whole models: test_engine."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flashsfa import FeatureBasis, sparse_feature_decode
from flashsfa.ops.decode import gpu
from flashsfa.ops.prefill import operator
from flashsfa.scores import ScoreRules
from vllm_server import CODING, DENSE, DV, HKV, PAGE, STEPS, D, Server


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC", "BHLNC", "LHBNC"])
@pytest.mark.parametrize("window", [None, 12])
def test_serving_equals_the_operator(vllm, serve, window, layout):
    server = Server(vllm, serve(**CODING), window=window, layout=layout)
    for i, new in enumerate(STEPS):
        server.assert_attends(server.step(new, padding=i % 3))


@pytest.mark.parametrize(("dtype", "hq", "hkv"), [(torch.bfloat16, 4, 2), (torch.float32, 3, 1), (torch.float32, 6, 2)])
def test_dtypes_and_heads_with_dense_queries(vllm, serve, dtype, hq, hkv):
    server = Server(vllm, serve(**CODING, topk_query=D), dtype=dtype, hq=hq, hkv=hkv)
    for new in STEPS[:4]:
        server.assert_attends(server.step(new), topk_query=D)


def test_queries_in_a_pattern(vllm, serve):
    queries = {"topk_query": 6, "query_pattern": "2:4"}
    server = Server(vllm, serve(**CODING, **queries))
    for new in STEPS[:4]:
        server.assert_attends(server.step(new), **queries)


def test_positions_in_the_channel(vllm, serve):
    """vLLM's RoPE leaves the pairs of the channel apart: they are brought to the front, as a basis would."""
    pytest.importorskip("transformers")
    from flashsfa.huggingface.positions import channel_first

    order = channel_first(torch.eye(D), DENSE).expand(HKV, -1, -1)
    rope = {"rope_type": "proportional", "partial_rotary_factor": DENSE / D, "rope_theta": 1e4}
    server = Server(vllm, serve(**CODING, positions="channel", model_type="qwen3", rope=rope))
    for new in STEPS[:3]:
        server.assert_attends(server.step(new), basis=FeatureBasis(order, order))
    whole = {"rope_type": "default", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="does not turn the channel alone"):
        Server(vllm, serve(**CODING, positions="channel", model_type="qwen3", rope=whole))
    with pytest.raises(ValueError, match="Qwen3 models alone"):
        Server(vllm, serve(**CODING, positions="channel", model_type="gpt2"))


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1), (4, 3)])
def test_a_basis_beside_the_checkpoint(vllm, serve, ranks, rank):
    key = torch.randn(3, HKV, D, D)  # three layers
    basis = FeatureBasis(torch.linalg.inv(key).mT.contiguous(), key)
    hkv = max(1, HKV // ranks)
    server = Server(vllm, serve(basis, rank, ranks, **CODING), hq=2 * hkv, hkv=hkv)
    first = rank * HKV // ranks
    mine = FeatureBasis(basis.query[1, first : first + hkv], basis.key[1, first : first + hkv])
    for new in STEPS[:3]:
        server.assert_attends(server.step(new), basis=mine)


@pytest.mark.parametrize("window", [None, 12])
def test_vllms_own_attention_layer(vllm, serve, window, monkeypatch):
    """vLLM builds the layer with the backend and calls it, through its forward context."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.attention import Attention

    import flashsfa.vllm
    from flashsfa.vllm.backend import SparseFeatureBackend

    flashsfa.vllm.register()
    server = Server(vllm, serve(**CODING), window=window, dtype=torch.float16)
    config = VllmConfig(device_config=DeviceConfig("cpu"))
    name = server.layer.layer_name
    with set_current_vllm_config(config):
        layer = Attention(
            server.hq, D, D**-0.5, HKV, prefix=name, per_layer_sliding_window=window, head_size_v=DV,
            attn_backend=SparseFeatureBackend,
        )  # fmt: skip
    layer.kv_cache = server.kv_cache
    assert layer.get_kv_cache_spec(config).head_size_v == DV

    def run(query, key, value, metadata):
        with set_forward_context({name: metadata}, config):
            return layer(query.flatten(1), key.flatten(1), value.flatten(1)).unflatten(-1, (-1, DV))

    monkeypatch.setattr(server, "run", run)
    for new in STEPS:
        server.assert_attends(server.step(new, padding=2))


def test_padding_tokens_leave_every_page_but_the_null_block_alone(vllm, serve):
    server = Server(vllm, serve(**CODING))
    server.step({"a": 20})
    before = server.kv_cache.clone()
    rows = torch.randn(3, server.hq, D), torch.randn(3, HKV, D), torch.randn(3, HKV, DV)
    server.run(*rows, replace(server.metadata, tokens=0, slots=torch.full((2,), -1), prefills=[]))
    assert torch.equal(server.kv_cache[1:].view(torch.uint8), before[1:].view(torch.uint8))


def test_empty_requests_that_fill_up_a_cuda_graph(vllm, serve):
    """A graph replays what was captured: what a step reads must not lie in tables that are made for each step."""
    server = Server(vllm, serve(**CODING))
    server.step({"a": 20, "b": 3})
    assert server.builder.get_cudagraph_support(None, None) == vllm.AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    server.assert_attends(server.step({"a": 1, "b": 1}, padding=3, empty=2))
    (decode,) = server.metadata.decodes
    assert decode.rows == slice(0, 4)
    assert decode.block_table.shape[0] == 4
    assert not server.metadata.prefills


@pytest.mark.parametrize("window", [None, 12])
def test_a_few_new_tokens_are_decoded_beside_single_ones(vllm, serve, window):
    """By their number, codes read where they lie: pages that have left a window belong to others, and are not looked at."""
    server = Server(vllm, serve(**CODING), window=window)
    server.step({"a": 50, "b": 3, "c": 40})

    def counts():
        return [(len(x.seq_lens), isinstance(x.rows, slice)) for x in server.metadata.decodes]

    server.assert_attends(server.step({"a": 16, "b": 1, "c": 2, "d": 5}, padding=1))
    assert counts() == [(1, True), (1, True), (1, True), (1, True)]
    assert not server.metadata.prefills
    server.kv_cache[0].view(torch.uint8).fill_(255)  # NaN, in what no request holds
    server.assert_attends(server.step({"a": 2, "b": 3, "c": 2}))  # two of one number, which do not follow one another
    assert counts() == [(2, False), (1, True)]
    server.assert_attends(server.step({"a": 17, "b": 2, "c": 1, "d": 1}))
    assert counts() == [(2, True), (1, True)]
    assert len(server.metadata.prefills) == 1


def test_decode_is_handed_the_rows_of_the_output(vllm, serve, monkeypatch):
    """Where requests have one new token each, those at the start, one after another: a kernel writes there."""
    from flashsfa.vllm import backend

    decode, handed, outputs = backend.sparse_feature_decode, [], []
    server = Server(vllm, serve(**CODING))
    forward = server.impl.forward
    monkeypatch.setattr(
        backend, "sparse_feature_decode", lambda *given, out, **options: handed.append(out) or decode(*given, out=out, **options)
    )  # fmt: skip
    monkeypatch.setattr(
        server.impl, "forward", lambda *given, output: outputs.append(output) or forward(*given, output=output)
    )
    server.step({"a": 20, "b": 3})
    handed.clear()
    server.assert_attends(server.step({"a": 1, "b": 1}, padding=3, empty=2))
    (out,), output = handed, outputs[-1]
    assert out.is_contiguous()
    assert out.data_ptr() == output.data_ptr()
    assert out.shape == (4, 4, 1, DV)
    handed.clear()
    server.assert_attends(server.step({"a": 2, "b": 3, "c": 2}))
    assert [None if out is None else tuple(out.shape) for out in handed] == [None, (1, 4, 3, DV)]


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_layers_of_a_batch_call_what_the_first_has_prepared(vllm, serve, monkeypatch, cache_dtype):
    """Of two groups of prompts each is prepared once, and a layer of another window by itself; each call is of its own tensors."""
    from flashsfa.vllm import backend

    made, called = [], []

    def prepare(q, k, v, out, budget, mask, scale):
        made.append((q.shape[2], budget.keeps_keys, mask.window))

        def prompt(q, k, v, out):
            called.append(q.shape[2])
            scores = ScoreRules.of(q, scale, None, None)
            out.copy_(operator.attend(q, k, v, budget, mask, scores, gradient_of_all=False, backend="auto")[0])

        return prompt

    monkeypatch.setattr(backend, "prepare", prepare)
    server = Server(vllm, serve(**CODING, longest=60, cache_dtype=cache_dtype))
    first = server.step({"a": 40, "b": 30})
    if cache_dtype is None:
        server.assert_attends(first)
        assert made == [(70, False, None)]
    else:
        assert made == [(40, True, None), (30, True, None)]
    prepared = made.copy()
    query, key, value = (torch.cat([server.requests[name][i] for name in "ab"]) for i in range(3))
    again = server.run(query, key, value, server.metadata)
    assert torch.equal(again, torch.cat([*first.values()]))
    other = server.run(2 * query, key, value.flip(0), server.metadata)
    assert not torch.equal(other, again)
    assert made == prepared
    server.impl._window = 5
    server.run(query, key, value, server.metadata)
    assert made == prepared + [(*x[:2], 5) for x in prepared]
    assert called == 4 * [tokens for tokens, *_ in prepared]  # a layer at a time


class _PreparedDecode:
    """Stands for the kernel for Hopper, prepared for pages of codes."""

    def __init__(self, kv, scale, topk_query, called):
        self._called, self._kv, self._options = called, kv, {"scale": scale, "topk_query": topk_query}

    def over(self, lengths, table):
        self._kv = replace(self._kv, kv_lens=lengths, page_table=table)
        return self

    def attend(self, q, out, lse):
        self._called.append(tuple(q.shape[::2]))
        out.copy_(sparse_feature_decode(q, self._kv, **self._options))


def test_steps_call_what_the_first_of_a_form_has_prepared(vllm, serve, monkeypatch):
    """A form is how many requests have how many new tokens; each step reads its own pages and lengths, and writes to its own rows."""
    made, called = [], []

    def prepared(q, kv, mask, scores, value_tolerance, topk_query):
        made.append(tuple(q.shape[::2]))
        return _PreparedDecode(kv, scores.scale, topk_query, called)

    monkeypatch.setattr(gpu, "prepared_paged", prepared)
    server = Server(vllm, serve(**CODING))
    server.assert_attends(server.step({"a": 20, "b": 3, "c": 34}))
    assert made == [(1, 3)]
    for _ in range(3):
        server.assert_attends(server.step({"a": 1, "b": 1, "c": 1}, padding=1))
    assert made == [(1, 3), (3, 1)]
    for new in ({"a": 2, "b": 3, "c": 2}, {"a": 3, "b": 2, "c": 3}, {"a": 17, "b": 1, "c": 1}):
        server.assert_attends(server.step(new))
    assert made == [(1, 3), (3, 1), (2, 2), (1, 2), (2, 3), (2, 1)]  # three tokens of one request were met before
    assert called == [(1, 3), *3 * [(3, 1)], (2, 2), (1, 3), (1, 2), (2, 3), (2, 1)]


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_the_profiling_run_takes_the_memory_of_the_longest_context(vllm, serve, monkeypatch, cache_dtype):
    """The spread keys and values of a group of prompts are no longer than that, and the largest that attention makes."""
    server = Server(vllm, serve(**CODING, longest=97, cache_dtype=cache_dtype))
    for new in ({"a": 50, "b": 40}, {"a": 10, "b": 20}, {"a": 20, "b": 20}):
        server.step(new)
    asked = {name: 17 for name in server.requests}
    made, whole = [], server.builder.build

    def build(*arguments):
        metadata = whole(*arguments)
        made.extend(int(x.cu_seqlens_k[-1]) for x in metadata.prefills)
        return metadata

    monkeypatch.setattr(server.builder, "build", build)
    server.step(asked)
    assert sorted(made) == [97, 97]
    with _Sizes() as sizes:
        q, k, v = torch.randn(3, 4, D), torch.randn(3, HKV, D), torch.randn(3, HKV, DV)
        server.impl.forward(server.layer, q, k, v, torch.tensor([]), None, output=torch.empty(3, 4, DV))
    assert {(1, HKV, 97, D), (1, HKV, 97, DV)} <= sizes.seen


def test_the_profiling_run_uses_what_is_compiled_at_its_first_use(vllm, serve, monkeypatch):
    """Short prompts, a prompt over pages and each small number of new tokens: the first request of a kind waits for no compiler."""
    from flashsfa.vllm import backend

    server, prompts, decoded = Server(vllm, serve(**CODING)), [], []
    attend, decode = server.impl._attend, backend.sparse_feature_decode

    def noted_attend(q, k, v, budget, prefill, output):
        prompts.append((q.shape[2], budget.keeps_keys))
        attend(q, k, v, budget, prefill, output)

    def noted_decode(q, kv, **options):
        decoded.append((q.shape[2], len(q), kv.codes.shape[2], kv.page_table.shape[1] * PAGE))
        return decode(q, kv, **options)

    monkeypatch.setattr(server.impl, "_attend", noted_attend)
    monkeypatch.setattr(backend, "sparse_feature_decode", noted_decode)
    monkeypatch.setattr(backend, "_rehearsed", set())
    q, k, v = torch.randn(100, 4, D), torch.randn(100, HKV, D), torch.randn(100, HKV, DV)
    for _ in range(2):  # two layers of a kind
        server.impl.forward(server.layer, q, k, v, torch.tensor([]), None, output=torch.empty(100, 4, DV))
    assert prompts == [(100, False), (32, False), (64, False), (16, True), (100, False)]
    # of one request, and of as many as there may be with so many tokens, of which each may have the longest context
    assert decoded == [(count, many, PAGE, 256) for count in range(1, 17) for many in (1, min(30, 100 // count))]


class _Sizes(TorchDispatchMode):
    """Collects the shapes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        found = function(*arguments, **(options or {}))
        self.seen |= {tuple(x.shape) for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, torch.Tensor)}
        return found

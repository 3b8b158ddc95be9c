"""The caches of codes: growth, windows, fixed buffers, batch and length changes, compilation, offloading."""

import copy

import pytest
import torch

import flashsfa
from flashsfa.codes import quantize_rows, topk_codes
from flashsfa.ops import record

transformers = pytest.importorskip("transformers")
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer  # noqa: E402

import exact_models  # noqa: E402
from exact_models import WINDOW, tokens  # noqa: E402
from flashsfa.huggingface import SparseCache, StaticSparseCache  # noqa: E402
from flashsfa.huggingface.cache import cache_nbytes  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CAPACITY = 48
CLOSE = {"rtol": 1e-8, "atol": 1e-8}
CLOSE_IN_FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}  # of scales


def make(sliding=False, **options):
    """All tokens coded."""
    return exact_models.make(sliding, **{"recent": 0, "first": 0, **options})


def cache_for(model, kind):
    return SparseCache(model) if kind == "dynamic" else StaticSparseCache(model, CAPACITY)


def run(model, ids, cache=None):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=cache is not None).logits


@pytest.mark.parametrize(
    "options", [{}, {"recent": 3, "first": 2}, {"cache_dtype": "int8"}, {"cache_dtype": "d8s8v16"}], ids=str
)
def test_what_changes_between_steps_is_not_what_was_prepared(options):
    """In float32 and over 32 tokens, for which the kernels of a CPU prepare steps; nothing is prepared in checked mode."""
    model, ids = make(**options).float(), tokens(52)
    layers, sides = model.model.layers, {"prepared": [], "afresh": []}
    for side, found in sides.items():
        cache = SparseCache(model)
        with flashsfa.checked(side == "afresh"):
            run(model, ids[:, :40], cache)
            for i in range(40, 52):
                mask = torch.ones(2, i + 1, dtype=torch.int64)
                mask[1, : 2 * (i % 3)] = 0
                for layer in layers:
                    layer.self_attn.sfa.value_tolerance = 0.3 if i in (44, 45) else 0.0
                    layer.self_attn.scaling = 0.5 if i in (46, 47) else 0.25
                with torch.no_grad():
                    found.append(model(ids[:, i : i + 1], attention_mask=mask, past_key_values=cache).logits)
    for prepared, afresh in zip(*sides.values(), strict=True):
        torch.testing.assert_close(prepared, afresh, **CLOSE_IN_FLOAT32)
    assert len({x.sum().item() for x in sides["prepared"]}) == 12


@pytest.fixture(params=[False, True], ids=["full", "sliding"])
def model(request):
    return make(request.param)


@pytest.fixture(params=["dynamic", "static"])
def kind(request):
    return request.param


@pytest.mark.parametrize("steps", [(20, 1, 1, 1), (1,) * 20, (3, 5, 17, 1, 4), (4, 4, 4, 4, 4), (20, 20)], ids=str)
@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "some"])
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_any_steps_equal_no_cache(sliding, layers, kind, steps):
    model, ids = make(sliding, layers=layers), tokens(sum(steps))
    cache = cache_for(model, kind)
    found = torch.cat([run(model, part, cache) for part in ids.split(steps, dim=1)], dim=1)
    assert cache.get_seq_length() == sum(steps)
    torch.testing.assert_close(found, run(model, ids), **CLOSE)


@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_queries_in_a_pattern_in_any_steps_equal_no_cache(sliding, kind):
    model, ids = make(sliding, dense_dims=4, topk_query=6, query_pattern="2:4"), tokens(40)
    cache, plain = cache_for(model, kind), run(make(sliding, dense_dims=4, topk_query=6), ids)
    found = torch.cat([run(model, part, cache) for part in ids.split((20, 1, 3, 16), dim=1)], dim=1)
    torch.testing.assert_close(found, run(model, ids), **CLOSE)
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    "queries", [{}, {"dense_dims": 4, "topk_query": 6, "query_pattern": "2:4"}], ids=["top-k", "2:4"]
)
def test_float32(kind, queries):
    """The fused code for this device, where there is any, takes windows, padding and fixed buffers too."""
    model, ids = make(sliding=True, **queries).float(), tokens(30)
    mask = (torch.arange(30) >= torch.tensor([4, 0])[:, None]).long()
    position_ids, cache = (mask.cumsum(-1) - 1).clamp(min=0), cache_for(model, kind)
    found, start = [], 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
        for count in (20, 3, 1, 1, 4, 1):
            stop = start + count
            here = {"attention_mask": mask[:, :stop], "position_ids": position_ids[:, start:stop]}
            found.append(model(ids[:, start:stop], past_key_values=cache, **here).logits)
            start = stop
    torch.testing.assert_close(torch.cat(found, 1)[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def rounded(model):
    """Its twin that rounds keys and values to 8 bits as they come: what it computes without a cache."""

    def round_values(module, args, v):
        kept, scale = quantize_rows(v.unflatten(-1, (2, 16)))
        return (kept * scale[..., None].to(v.dtype)).flatten(-2)

    twin = copy.deepcopy(model)
    for attention in (layer.self_attn for layer in twin.model.layers if hasattr(layer.self_attn, "sfa")):
        attention.sfa.keys = lambda k: topk_codes(k, 3, dense_dims=2).quantize().to(k.dtype).to_dense()
        attention.v_proj.register_forward_hook(round_values)
    return twin


@pytest.mark.parametrize("steps", [(20, 1, 1, 1), (1,) * 20, (3, 5, 17, 1, 4), (20, 20)], ids=str)
@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "some"])
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_eight_bits_in_any_steps_equal_rounded_keys_and_values(sliding, layers, steps):
    model, ids = make(sliding, layers=layers, cache_dtype="int8"), tokens(sum(steps))
    cache = SparseCache(model)
    found = torch.cat([run(model, part, cache) for part in ids.split(steps, dim=1)], dim=1)
    torch.testing.assert_close(found, run(rounded(model), ids), **CLOSE_IN_FLOAT32)
    torch.testing.assert_close(found, run(model, ids), **CLOSE_IN_FLOAT32)  # as without a cache
    whole = flashsfa.enable(copy.deepcopy(model), topk=3, dense_dims=2, layers=layers)
    assert (found - run(whole, ids)).abs().max() > 1e-3
    held = 2 * sum(len(layer.store) for layer in cache.layers if hasattr(layer, "store"))  # rows of a kv head
    dense = 0 if layers is None else cache.layers[0].keys.nbytes
    found = cache_nbytes(cache)
    assert (found["keys"], found["values"]) == (2 * held * (2 + 2 * 3 + 4) + dense, 2 * held * (16 + 4) + dense)
    assert found["total"] == cache.nbytes == found["keys"] + found["values"]


def test_gradients_pass_through_the_rounding():
    """To the features that are kept."""
    model, ids = make(cache_dtype="int4"), tokens(12)
    model(ids, labels=ids, use_cache=False).loss.backward()
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            assert projection.weight.grad.abs().max() > 0


@pytest.mark.parametrize("changed", [{"cache_dtype": "int8"}, {"recent": 4}, {"first": 2}])
def test_a_cache_of_other_settings_is_refused(changed):
    model, ids = make(), tokens(9)
    cache = SparseCache(model)
    run(model, ids[:, :8], cache)
    flashsfa.enable(model, topk=3, dense_dims=2, **changed)
    with pytest.raises(ValueError, match="made for other settings"):
        run(model, ids[:, 8:], cache)


def test_a_dense_cache_is_said_once(monkeypatch, caplog):
    """A loop of one's own that takes what the model returns keeps keys in full."""
    monkeypatch.setattr(record, "_last", {})
    monkeypatch.setattr(record, "_announced", set())
    model, ids = make(), tokens(9)
    out = model(ids[:, :8], use_cache=True)
    assert "SparseCache" not in flashsfa.explain()
    for _ in range(2):
        model(ids[:, 8:], past_key_values=out.past_key_values)
    assert "past_key_values=flashsfa.huggingface.SparseCache(model)" in flashsfa.explain()
    assert caplog.text.count("dense cache") == 1


@pytest.mark.parametrize("change", ["reorder", "select", "repeat", "reset", "crop"])
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_changes_in_eight_bits(sliding, change):
    model, ids = make(sliding, cache_dtype="int8"), tokens(20)
    cache = SparseCache(model)
    if change == "crop":
        cache.activate_past_recording()
    run(model, ids, cache)
    ids = changed(cache, ids, change)
    more = tokens(3, len(ids))
    found = torch.cat([run(model, more[:, :2], cache), run(model, more[:, 2:], cache)], dim=1)
    expected = run(rounded(model), torch.cat((ids, more), dim=1))[:, -3:]
    torch.testing.assert_close(found, expected, **CLOSE_IN_FLOAT32)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 9}], ids=str)
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_generate_in_eight_bits(sliding, options):
    model, ids = make(sliding, cache_dtype="int8"), tokens(24)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    found = model.generate(ids, **settings, **options, return_dict_in_generate=True)
    assert {layer.store.v.dtype for layer in found.past_key_values.layers} == {torch.int8}
    beams = {"num_beams": options.get("num_beams", 1)}
    assert torch.equal(found.sequences, rounded(model).generate(ids, **settings, **beams, use_cache=False))


def changed(cache, ids, change):
    if change == "reorder":
        index = torch.tensor([1, 1])
        cache.reorder_cache(index)
        return ids[index]
    if change == "select":
        cache.batch_select_indices(torch.tensor([1]))
        return ids[1:]
    if change == "repeat":
        cache.batch_repeat_interleave(2)
        return ids.repeat_interleave(2, dim=0)
    if change == "reset":
        cache.reset()
        return ids[:, :0]
    cache.crop(-3)
    return ids[:, :-3]


@pytest.mark.parametrize("change", ["reorder", "select", "repeat", "reset", "crop"])
def test_changes(model, kind, change):
    cache, ids = cache_for(model, kind), tokens(20)
    if change == "crop":
        if kind == "static" and any(cache.is_sliding):
            assert not cache.is_croppable
            with pytest.raises(ValueError, match="cannot take tokens back"):
                cache.crop(-3)
            return
        cache.activate_past_recording()
    run(model, ids, cache)
    ids = changed(cache, ids, change)
    more = tokens(3, len(ids))
    found = torch.cat([run(model, more[:, :2], cache), run(model, more[:, 2:], cache)], dim=1)
    torch.testing.assert_close(found, run(model, torch.cat((ids, more), dim=1))[:, -3:], **CLOSE)


def test_changes_of_an_empty_cache(model, kind):
    cache = cache_for(model, kind)
    cache.reset()
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.crop(0)
    if kind == "dynamic":
        cache.crop(-1)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="negative"):
        cache.crop(2)


def test_a_growing_layer_seldom_reallocates():
    model = make()
    cache, places = SparseCache(model), set()
    run(model, tokens(20), cache)
    for token in tokens(240).split(1, dim=1):
        run(model, token, cache)
        places.add(cache.layers[0].store.v.data_ptr())
    assert len(places) <= 2
    assert cache.nbytes == 2 * 2 * 2 * 260 * (8 * (16 + 2 + 3) + 3)  # layers, batch, heads, tokens, bytes


def test_a_sliding_layer_keeps_the_window_alone():
    model = make(sliding=True)
    cache = SparseCache(model)
    run(model, tokens(40), cache)
    assert len(cache.layers[0].store) == WINDOW - 1
    for token in tokens(20).split(1, dim=1):
        run(model, token, cache)
        assert WINDOW - 1 <= len(cache.layers[0].store) <= WINDOW + WINDOW // 4
        assert cache.layers[0].store.capacity < 30
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-5)
    static = StaticSparseCache(model, CAPACITY)
    run(model, tokens(40), static)
    assert static.layers[0].store.v.shape[2] == WINDOW


def test_static_buffers_stay_in_place():
    model = make(sliding=True)
    cache = StaticSparseCache(model, CAPACITY)

    def places():
        stores = [layer.store for layer in cache.layers]
        return [x.data_ptr() for s in stores for x in (s.codes.dense, s.codes.values, s.codes.indices, s.v)]

    run(model, tokens(9), cache)
    before = places()
    for part in tokens(24).split((1, 20, 3), dim=1):
        run(model, part, cache)
    cache.reset()
    run(model, tokens(5), cache)
    assert places() == before


@pytest.mark.cpu
def test_a_full_static_cache_refuses_and_stays_as_it_is(model):
    cache, ids = StaticSparseCache(model, CAPACITY), tokens(CAPACITY)
    with pytest.raises(ValueError, match="49 tokens do not fit a cache of 48 that holds 0"):
        run(model, tokens(CAPACITY + 1), cache)
    run(model, ids[:, :-2], cache)
    with pytest.raises(ValueError, match="3 tokens do not fit a cache of 48 that holds 46"):
        run(model, tokens(3), cache)
    found = run(model, ids[:, -2:], cache)
    torch.testing.assert_close(found, run(model, ids)[:, -2:], **CLOSE)


def test_a_failed_write_does_not_count(monkeypatch):
    model = make()
    cache, ids = StaticSparseCache(model, CAPACITY), tokens(20)
    run(model, ids[:, :5], cache)
    with monkeypatch.context() as patch:
        patch.setattr(type(cache.layers[0].store), "append_at", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, ids[:, 5:], cache)
    found = run(model, ids[:, 5:], cache)
    torch.testing.assert_close(found, run(model, ids)[:, 5:], **CLOSE)


def test_nbytes_of_an_empty_cache(kind):
    model = make(layers=[1])  # the other one holds dense keys
    cache = cache_for(model, kind)
    assert cache.nbytes == 0
    run(model, tokens(3), cache)
    assert cache.nbytes > 0


def test_nbytes_of_a_hybrid_cache():
    cache = transformers.DynamicCache()
    cache.layers = [LinearAttentionLayer(), DynamicLayer(), DynamicLayer()]
    cache.layers[1].update(torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 4))
    assert cache_nbytes(cache) == {"keys": 96, "values": 48, "total": 144}


def test_arguments_of_a_wrong_type_are_named():
    for make_cache in (SparseCache, lambda model: StaticSparseCache(model, 4)):
        with pytest.raises(TypeError, match="model must be one of transformers that enable switched, got NoneType"):
            make_cache(None)
    with pytest.raises(TypeError, match="cache must be a Cache of transformers, got NoneType"):
        cache_nbytes(None)


def test_static_refusals():
    model = make()
    with pytest.raises(ValueError, match="max_cache_len"):
        StaticSparseCache(model, 0)
    flashsfa.disable(model)
    with pytest.raises(ValueError, match="not switched"):
        StaticSparseCache(model, 4)


@pytest.mark.cpu  # torch cannot trace Tensor.unflatten under a default device
def test_compiled_static_decode_equals_eager(model):
    torch._dynamo.reset()
    ids = tokens(30)
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    cache = StaticSparseCache(model, CAPACITY)
    run(model, ids[:, :20], cache)  # a prompt runs as it is
    compiled = torch.compile(model, fullgraph=True, backend=count)
    found = torch.cat([run(compiled, token, cache) for token in ids[:, 20:].split(1, dim=1)], dim=1)
    assert len(graphs) == 1  # no step compiles again
    torch.testing.assert_close(found, run(model, ids)[:, 20:], **CLOSE)


def test_the_first_call_with_a_growing_cache_compiles_in_one_graph(model):
    torch._dynamo.reset()
    ids = tokens(20)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, ids, SparseCache(model)), run(model, ids, SparseCache(model)), **CLOSE)


@pytest.mark.cpu  # torch cannot trace Tensor.unflatten under a default device
@pytest.mark.parametrize(("model", "chunk"), [(False, None), (True, 18)], indirect=["model"])
def test_generate_compiles_with_a_static_cache(model, chunk):
    torch._dynamo.reset()
    ids = tokens(24)
    compile_config = transformers.CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True  # on the CPU too
    settings = {"cache_implementation": "static", "max_new_tokens": 6, "do_sample": False}
    settings |= {"prefill_chunk_size": chunk, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings, compile_config=compile_config), expected)


@pytest.mark.filterwarnings("error:Dynamo detected")
@pytest.mark.cpu
@pytest.mark.parametrize(
    "options", [{}, {"cache_dtype": "int8"}, {"cache_dtype": "int4", "recent": 3, "first": 2}], ids=str
)
def test_what_a_compiled_step_writes_to_has_a_fixed_address(options):
    """Else torch makes no CUDA graph of it."""
    torch._dynamo.reset()
    model, ids, moving = make(**options).float(), tokens(21), []

    def look(module, inputs):
        given = module.graph.find_nodes(op="placeholder")
        moving.extend(node.name for node in given if "_dynamo_static_input_type" not in node.meta["tensor_dict"])
        return module.forward

    cache = StaticSparseCache(model, CAPACITY)
    run(model, ids[:, :20], cache)
    run(torch.compile(model, fullgraph=True, backend=look), ids[:, 20:], cache)
    assert len(moving) == 1  # the token


def test_a_copy_of_a_model_that_was_compiled_runs_by_itself():
    """generate() keeps what it compiled with the model."""
    dense, ids = flashsfa.disable(make()), tokens(9)
    dense.get_compiled_call(transformers.CompileConfig(backend="eager", mode=None))
    model = flashsfa.enable(copy.deepcopy(dense), 3)
    compiled = model.get_compiled_call(transformers.CompileConfig(backend="eager", mode=None))
    torch.testing.assert_close(run(compiled, ids, SparseCache(model)), run(model, ids, SparseCache(model)), **CLOSE)


@pytest.mark.cpu
def test_a_shorter_text_is_generated_by_what_a_longer_one_compiled(model):
    torch._dynamo.reset()
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    compile_config = transformers.CompileConfig(fullgraph=True, backend=count, mode=None)
    compile_config._compile_all_devices = True
    settings = {
        "cache_implementation": "static",
        "max_new_tokens": 4,
        "do_sample": False,
        "compile_config": compile_config,
    }
    for n in (24, 9, 17):
        model.generate(tokens(n), attention_mask=torch.ones_like(tokens(n)), **settings)
    assert len(graphs) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_offloaded_equals_dynamic(model, cache_dtype):
    model, ids = flashsfa.enable(model, 3, dense_dims=2, cache_dtype=cache_dtype).cuda(), tokens(24).cuda()
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings)
    found = model.generate(ids, **settings, cache_implementation="offloaded", return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected)
    assert {layer.store.v.device.type for layer in found.past_key_values.layers} <= {"cpu", "cuda"}
    assert found.past_key_values.layers[-1].store.v.device.type == "cpu"


@pytest.mark.gpu
def test_static_decode_in_a_cuda_graph(model):
    model, ids = model.float().cuda(), tokens(30).cuda()
    cache = StaticSparseCache(model, CAPACITY)
    run(model, ids[:, :19], cache)
    token = ids[:, 19:20].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(model, token, cache)  # warm up: compile the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # recorded, not run
        out = run(model, token, cache)
    found = []
    for i in range(20, 30):
        token.copy_(ids[:, i : i + 1])
        graph.replay()
        found.append(out.clone())
    torch.testing.assert_close(torch.cat(found, 1), run(model, ids)[:, 20:], rtol=1e-3, atol=1e-3)

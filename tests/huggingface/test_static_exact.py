"""Static caches that keep the newest and the first tokens as they came do what growing ones do, in any steps, and compiled."""

import pytest
import torch

import flashsfa

transformers = pytest.importorskip("transformers")
from exact_models import make, tokens  # noqa: E402
from flashsfa.huggingface import SparseCache, StaticSparseCache  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CAPACITY = 60
CLOSE = {"rtol": 1e-8, "atol": 1e-8}
EXACT = [(3, 2), (0, 2), (3, 0), (9, 4), (99, 0), (1, 99)]


def run(model, ids, cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


def in_steps(model, ids, cache, steps):
    return torch.cat([run(model, part, cache) for part in ids.split(steps, dim=1)], dim=1)


@pytest.mark.parametrize("prefill", ["coded", "dense"])
@pytest.mark.parametrize("queries", [{}, {"topk_query": "dense"}], ids=str)
@pytest.mark.parametrize("steps", [(20, 1, 1, 4), (1, 2, 20, 1), (3, 5, 17, 1), (1,) * 26], ids=str)
@pytest.mark.parametrize(("recent", "first"), EXACT)
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_any_steps_equal_a_growing_cache(sliding, recent, first, steps, queries, prefill):
    model, ids = make(sliding, recent=recent, first=first, prefill=prefill, **queries), tokens(sum(steps))
    expected = in_steps(model, ids, SparseCache(model), steps)
    found = in_steps(model, ids, StaticSparseCache(model, CAPACITY), steps)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.fixture(scope="module")
def axes():
    """A basis with bits per axis of the model of `make`."""
    return flashsfa.calibrate(flashsfa.disable(make()), tokens(40), key_bytes=6)


@pytest.fixture(scope="module")
def gained():
    """A basis with a gain of the model of `make`."""
    return flashsfa.calibrate(flashsfa.disable(make()), tokens(40), 3, dense_dims=2)


@pytest.mark.parametrize("queries", [{"topk_query": "dense"}, {}], ids=str)
@pytest.mark.parametrize("prefill", ["coded", "dense"])
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_a_gain(sliding, prefill, queries, gained):
    model, ids, steps = make(sliding, basis=gained, prefill=prefill, **queries), tokens(45), (20, 1, 2, 20, 1, 1)
    expected = in_steps(model, ids, SparseCache(model), steps)
    found = in_steps(model, ids, StaticSparseCache(model, CAPACITY), steps)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(("queries", "prefill"), [("dense", "dense"), (None, "coded")])
def test_a_gain_compiles(queries, prefill, gained):
    """A chunk of a prompt, and steps."""
    model, ids, steps = make(basis=gained, prefill=prefill, topk_query=queries), tokens(44), (20, 1, 1)
    cache, grown = StaticSparseCache(model, CAPACITY), SparseCache(model)
    for x in (cache, grown):
        run(model, ids[:, :22], x)
    expected = in_steps(model, ids[:, 22:], grown, steps)
    torch._dynamo.reset()
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(in_steps(step, ids[:, 22:], cache, steps), expected, **CLOSE)


def with_format(sliding, kind, axes, **options):
    if kind != "axes":
        return make(sliding, cache_dtype=kind, **options)
    return flashsfa.enable(flashsfa.disable(make(sliding)), basis=axes, cache_dtype="int4", **options)


@pytest.mark.parametrize("kind", ["int8", "int4", "d16s4v8", "axes"])
@pytest.mark.parametrize(("recent", "first"), [(0, 0), (3, 2)])
@pytest.mark.parametrize("steps", [(20, 1, 1, 4), (3, 5, 17, 1)], ids=str)
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_fewer_bits_equal_a_growing_cache(sliding, steps, recent, first, kind, axes):
    model, ids = with_format(sliding, kind, axes, recent=recent, first=first), tokens(sum(steps))
    expected = in_steps(model, ids, SparseCache(model), steps)
    found = in_steps(model, ids, StaticSparseCache(model, CAPACITY), steps)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # 8-bit codes are widened to float32


@pytest.mark.parametrize("kind", ["int8", "int4", "axes"])
def test_fewer_bits_compile(kind, axes):
    model, ids = with_format(False, kind, axes, recent=3, first=2), tokens(12)
    expected = in_steps(model, ids, StaticSparseCache(model, CAPACITY), (9, 1, 1, 1))
    cache = StaticSparseCache(model, CAPACITY)
    first = run(model, ids[:, :9], cache)
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = torch.cat([first, *(run(step, part, cache) for part in ids[:, 9:].split(1, dim=1))], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_caches_of_two_capacities_compile_in_one_process():
    model, ids = with_format(False, "int8", None, recent=3, first=2), tokens(12)
    for capacity in (CAPACITY, 40):
        cache = StaticSparseCache(model, capacity)
        run(model, ids[:, :9], cache)
        step = torch.compile(model, backend="aot_eager", fullgraph=True)
        found = in_steps(step, ids[:, 9:], cache, 1)
        expected = in_steps(model, ids, StaticSparseCache(model, capacity), (9, 1, 1, 1))[:, 9:]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_generate_in_fewer_bits(kind, axes):
    model, ids = with_format(False, kind, axes), tokens(9)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings)
    found = model.generate(ids, **settings, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("prefill", ["coded", "dense"])
@pytest.mark.parametrize("seed", range(6))
def test_any_changes_equal_a_growing_cache(seed, prefill):
    torch.manual_seed(seed)
    recent, first = EXACT[seed % len(EXACT)]
    model = make(recent=recent, first=first, prefill=prefill)
    grown, cache = SparseCache(model), StaticSparseCache(model, CAPACITY)
    rows, held = 2, 0
    for _ in range(25):
        kind = int(torch.randint(0, 8, ()))
        if kind == 7 and held:
            index = torch.randint(0, rows, (2,))
            for x in (grown, cache):
                x.reorder_cache(index)
        elif kind == 6 and held:
            count = int(torch.randint(0, min(held, 8), ()))
            for x in (grown, cache):
                x.crop(-count)
            held -= count
        elif held > 35 or (kind == 5 and held):
            grown.reset()
            cache.reset()
            held = 0
        else:
            count = (1, 1, 2, 5, 21)[kind % 5]
            ids = tokens(count, rows)
            torch.testing.assert_close(run(model, ids, cache), run(model, ids, grown), **CLOSE)
            held += count


@pytest.mark.parametrize("change", ["select", "repeat"])
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_changes_of_the_batch(sliding, change):
    model, ids = make(sliding), tokens(20)
    caches = SparseCache(model), StaticSparseCache(model, CAPACITY)
    for cache in caches:
        run(model, ids, cache)
        if change == "select":
            cache.batch_select_indices(torch.tensor([1]))
        else:
            cache.batch_repeat_interleave(2)
    more = tokens(4, 1 if change == "select" else 4)
    grown, found = (in_steps(model, more, cache, (1, 2, 1)) for cache in caches)
    torch.testing.assert_close(found, grown, **CLOSE)


@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_other_batches_are_refused(sliding):
    model = make(sliding, recent=3, first=2)
    cache = StaticSparseCache(model, CAPACITY)
    run(model, tokens(9, 2), cache)
    cache.reset()
    with pytest.raises(ValueError, match=r"holds keys \[2, .*make a new one for another batch size"):
        run(model, tokens(9, 1), cache)


@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_what_unfilled_slots_hold_is_not_looked_at(sliding):
    model, ids = make(sliding, recent=9, first=4), tokens(26)
    cache = StaticSparseCache(model, CAPACITY)
    run(model, tokens(30), cache)
    for layer in cache.layers:
        for x in layer.store.kv.exact[0].k, layer.store.kv.exact[0].v, layer.store.v, layer.store.codes.values:
            x.fill_(torch.nan)
    cache.reset()
    steps = (2, 1, 1, 20, 1, 1)
    found = in_steps(model, ids, cache, steps)
    torch.testing.assert_close(found, in_steps(model, ids, SparseCache(model), steps), **CLOSE)


@pytest.mark.parametrize("prefill", ["coded", "dense"])
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_generate(sliding, prefill):
    ids = tokens(24)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"max_new_tokens": 8, "do_sample": False}
    for options in ({}, {"prefill_chunk_size": 18}, {"num_beams": 3}):
        model = make(sliding, first=0, prefill=prefill)
        expected = model.generate(ids, attention_mask=mask, **settings, **options)
        found = model.generate(ids, attention_mask=mask, **settings, **options, cache_implementation="static")
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="first=0"):
        make(sliding).generate(ids, attention_mask=mask, **settings, cache_implementation="static")


def test_buffers_stay_in_place_and_their_bytes_count():
    model = make(recent=3, first=2)
    cache = StaticSparseCache(model, CAPACITY)

    def places():
        exact = [layer.store.kv.exact[0] for layer in cache.layers]
        return [x.data_ptr() for part in exact for x in (part.k, part.v, part.positions)]

    run(model, tokens(9), cache)
    before = places()
    in_steps(model, tokens(24), cache, (1, 20, 3))
    cache.reset()
    run(model, tokens(5), cache)
    assert places() == before
    assert cache.nbytes == 2 * 2 * 2 * (CAPACITY * (8 * (16 + 2 + 3) + 3) + 5 * 8 * 32)


@pytest.mark.cpu  # torch cannot trace Tensor.unflatten under a default device
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_compiled_decode_equals_eager(sliding):
    torch._dynamo.reset()
    model, ids, graphs = make(sliding), tokens(30), []

    def count(module, inputs):
        graphs.append(module)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    cache = StaticSparseCache(model, CAPACITY)
    run(model, ids[:, :20], cache)
    compiled = torch.compile(model, fullgraph=True, backend=count)
    found = in_steps(compiled, ids[:, 20:], cache, 1)
    assert len(graphs) == 1
    expected = in_steps(model, ids, SparseCache(model), (20, *(1,) * 10))[:, 20:]
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.cpu  # torch cannot trace Tensor.unflatten under a default device
@pytest.mark.parametrize("prefill", ["coded", "dense"])
def test_compiled_chunks_equal_eager(prefill):
    torch._dynamo.reset()
    model, ids, cache = make(True, prefill=prefill), tokens(46), None
    cache = StaticSparseCache(model, CAPACITY)
    run(model, ids[:, :6], cache)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    found = in_steps(compiled, ids[:, 6:], cache, 20)
    expected = in_steps(model, ids, SparseCache(model), (6, 20, 20))[:, 6:]
    torch.testing.assert_close(found, expected, **CLOSE)

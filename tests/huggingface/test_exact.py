"""Models whose caches keep the newest and the first tokens as they came: in any steps, without a cache, saved, and refused."""

import pytest
import torch

import flashsfa

transformers = pytest.importorskip("transformers")
from exact_models import make, tokens  # noqa: E402
from flashsfa.huggingface import SFASettings, SparseCache, attention  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CLOSE = {"rtol": 1e-8, "atol": 1e-8}
EXACT = [(3, 2), (0, 2), (3, 0), (9, 4)]


def run(model, ids, cache=None, **options):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=cache is not None, **options).logits


def one_by_one(model, ids, cache=None):
    cache = SparseCache(model) if cache is None else cache
    return torch.cat([run(model, token, cache) for token in ids.split(1, dim=1)], dim=1)


@pytest.mark.parametrize(("recent", "first"), EXACT)
@pytest.mark.parametrize(
    "queries", [{}, {"topk_query": "dense"}, {"dense_dims": 4, "topk_query": 6, "query_pattern": "2:4"}], ids=str
)
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_without_a_cache_each_token_sees_what_decode_sees(sliding, queries, recent, first):
    model, ids = make(sliding, recent=recent, first=first, **queries), tokens(26)
    expected = one_by_one(model, ids)
    torch.testing.assert_close(run(model, ids), expected, **CLOSE)
    assert (run(make(sliding, recent=0, first=0, **queries), ids) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
@pytest.mark.parametrize("steps", [(20, 1, 1, 4), (18, 8), (1, 19, 6)], ids=str)
def test_all_exact_is_dense_in_any_steps(sliding, steps):
    model, ids = make(sliding, recent=99), tokens(26)
    cache = SparseCache(model)
    found = torch.cat([run(model, part, cache) for part in ids.split(steps, dim=1)], dim=1)
    torch.testing.assert_close(found, run(flashsfa.disable(model), ids), **CLOSE)


@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "some"])
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
@pytest.mark.parametrize("change", ["reorder", "select", "crop"])
def test_changes(change, sliding, layers):
    """A beam's reorder, a row's end, and tokens taken back out of the ring."""
    model, ids = make(sliding, layers=layers), tokens(20)
    cache = SparseCache(model)
    cache.activate_past_recording()
    one_by_one(model, ids, cache)
    if change == "crop":  # the ring is one token shorter then, which the next one fills
        run(model, tokens(1), cache)
        cache.crop(-1)
        index = torch.tensor([0, 1])
    else:
        index = torch.tensor([1, 1]) if change == "reorder" else torch.tensor([1])
        (cache.reorder_cache if change == "reorder" else cache.batch_select_indices)(index)
    more = tokens(3, len(index))
    expected = run(model, torch.cat((ids[index], more), dim=1))[:, -3:]
    torch.testing.assert_close(one_by_one(model, more, cache), expected, **CLOSE)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 9}, {"prompt_lookup_num_tokens": 3}], ids=str
)
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
@pytest.mark.parametrize("cache_dtype", [None, "int8", "int4"])
def test_generate(sliding, options, cache_dtype):
    """With a ring that holds all, dense; with a small one, through the same cache."""
    ids = tokens(24, 1 if "prompt_lookup_num_tokens" in options else 2)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    model = make(sliding, recent=99, cache_dtype=cache_dtype)
    found = model.generate(ids, **settings)
    assert torch.equal(found, flashsfa.disable(model).generate(ids, **settings))
    result = make(sliding, cache_dtype=cache_dtype).generate(ids, **settings, return_dict_in_generate=True)
    cache = result.past_key_values
    assert cache.layers[1].store.kv.recent.k.dtype == torch.float64
    held = cache.layers[1].store
    assert 2 + 1 <= len(held) - held.codes.shape[2] <= 2 + 3  # fewer after tokens that were guessed wrong


@pytest.mark.parametrize("prefill", ["coded", "dense"])
def test_a_cache_outlives_its_guesses(prefill):
    """What comes after speculative decoding are tokens, together, as in a cache that saw none."""
    ids, more = tokens(24, 1), tokens(12, 1)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    model, caches = make(prefill=prefill), []
    for guesses in ({}, {"prompt_lookup_num_tokens": 3}):
        given = SparseCache(model)
        made = model.generate(ids, past_key_values=given, return_dict_in_generate=True, **settings, **guesses)
        caches += [given, model.generate(ids, return_dict_in_generate=True, **settings, **guesses).past_key_values]
    last = torch.cat((made.sequences[:, -1:], more), dim=1)
    expected, *others = (run(model, last, cache) for cache in caches)
    for found in others:
        torch.testing.assert_close(found, expected, **CLOSE)


def test_sliding_layers_forget_the_first_tokens():
    model = make(sliding=True)
    cache = SparseCache(model)
    one_by_one(model, tokens(20), cache)
    assert cache.layers[0].store.kv.first is None
    assert cache.layers[1].store.kv.first.k.shape[2] == 2


def test_nbytes_count_keys_and_values_of_every_part():
    model = make(layers=[1])
    cache = SparseCache(model)
    run(model, tokens(20), cache)
    coded = 15 * (8 * (2 + 3) + 3), 15 * 8 * 16
    keys = 2 * 2 * (coded[0] + 5 * 8 * 16 + 20 * 8 * 16)
    values = 2 * 2 * (coded[1] + 5 * 8 * 16 + 20 * 8 * 16)
    assert flashsfa.huggingface.cache_nbytes(cache) == {"keys": keys, "values": values, "total": keys + values}


def test_save_and_load(tmp_path):
    model, ids = make(), tokens(20)
    model.save_pretrained(tmp_path)
    again = flashsfa.from_pretrained(tmp_path, dtype=torch.float64)
    assert SFASettings.from_config(again.config.sfa) == SFASettings(3, dense_dims=2, recent=3, first=2)
    torch.testing.assert_close(one_by_one(again, ids), one_by_one(model, ids), **CLOSE)


@pytest.mark.parametrize("options", [{"recent": -1}, {"first": -2}, {"recent": 1.5}, {"first": True}], ids=str)
def test_sizes_that_are_none(options):
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        make(**options)


def test_left_padding():
    """A ring ends where each sequence ends; first tokens do not begin where a padded one begins."""
    ids, mask = tokens(12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    with pytest.raises(ValueError, match="first=0"):
        run(make(), ids, attention_mask=mask, position_ids=position_ids)
    with pytest.raises(ValueError, match="first=0"):
        make().generate(ids, attention_mask=mask, max_new_tokens=2)
    for kind in ("dynamic", "static"):  # where a prompt's first call has one token, as a step has
        with pytest.raises(ValueError, match="first=0"):
            make().generate(
                ids,
                attention_mask=mask,
                max_new_tokens=2,
                prefill_chunk_size=1,
                cache_implementation=kind,
                disable_compile=True,
            )
    with pytest.raises(ValueError, match="first=0"):
        make().model(ids, mask, position_ids)  # by place
    model = make(first=0)
    found = run(model, ids, attention_mask=mask, position_ids=position_ids)
    torch.testing.assert_close(found[:1, 4:], run(model, ids[:1, 4:]), **CLOSE)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    alone = model.generate(ids[:1, 4:], attention_mask=mask[:1, 4:], max_new_tokens=4, do_sample=False)
    assert torch.equal(found[:1, 4:], alone)


def test_a_dense_cache_that_drops_the_first_tokens():
    """What it has left of a layer with a window begins anywhere: refused once tokens are gone, where first tokens are kept."""
    ids = tokens(26)
    for options in ({"first": 0}, {"first": 0, "recent": 0}, {"layers": [1]}):  # the window is that of layer 0
        model = make(True, **options)
        windows = [
            layer.sliding_window for layer in transformers.DynamicCache(config=model.config).layers if layer.is_sliding
        ]
        cache = transformers.DynamicCache(config=model.config)
        parts = [run(model, part, cache) for part in ids.split(5, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), run(model, ids), **CLOSE)
    model = make(True)
    cache = transformers.DynamicCache(config=model.config)
    held = min(windows) - 1
    begin = [run(model, part, cache) for part in (ids[:, :2], ids[:, 2:held], ids[:, held : held + 3])]
    torch.testing.assert_close(torch.cat(begin, dim=1), run(model, ids[:, : held + 3]), **CLOSE)
    with pytest.raises(ValueError, match=r"drops the first tokens .* pass past_key_values=flashsfa"):
        run(model, ids[:, held + 3 :], cache)
    with pytest.raises(ValueError, match="drops the first tokens"):
        model.generate(ids, max_new_tokens=12, guidance_scale=1.5)  # makes a cache of its own


@pytest.mark.parametrize("queries", [{}, {"topk_query": "dense"}], ids=str)
@pytest.mark.parametrize("layers", [None, [1]], ids=["all", "some"])
@pytest.mark.parametrize("cache_dtype", [None, "int8", "int4"])
@pytest.mark.parametrize("sliding", [False, True], ids=["full", "sliding"])
def test_a_dense_prompt_sees_its_own_keys_and_leaves_the_same_cache(sliding, cache_dtype, layers, queries, monkeypatch):
    options = {"layers": layers, "cache_dtype": cache_dtype, **queries}
    ids, model = tokens(20), make(sliding, prefill="dense", **options)
    cache = SparseCache(model)
    found = run(model, ids, cache)
    torch.testing.assert_close(found, run(flashsfa.disable(make(sliding)), ids), **CLOSE)
    store, sizes = cache.layers[1].store, (2, 15, 3)
    kv = store.kv
    assert (kv.first.k.shape[2], kv.v.shape[2], kv.recent.k.shape[2]) == sizes
    seen, attend = [], attention.attend_cached
    monkeypatch.setattr(
        attention, "attend_cached", lambda q, kv, *rest, **rules: (seen.append(kv), attend(q, kv, *rest, **rules))[1]
    )
    run(model, tokens(4), cache)
    assert (seen[-1].first.k.shape[2], seen[-1].v.shape[2], seen[-1].recent.k.shape[2]) == (2, 15, 3 + 4)
    run(model, tokens(1), cache)
    assert (seen[-1].first.k.shape[2], seen[-1].v.shape[2], seen[-1].recent.k.shape[2]) == (2, 20, 3)


@pytest.mark.parametrize("exact", [{"recent": 0, "first": 0}, {"recent": 3, "first": 2}], ids=str)
@pytest.mark.parametrize("cache_dtype", [None, "int8", "int4", "d16s8v8"])
def test_one_by_one_a_dense_prompt_changes_nothing(exact, cache_dtype):
    ids, options = tokens(20), {**exact, "cache_dtype": cache_dtype}
    model = make(prefill="dense", **options)
    expected = one_by_one(make(**options), ids)
    torch.testing.assert_close(one_by_one(model, ids), expected, **CLOSE)
    torch.testing.assert_close(run(model, ids), expected, rtol=1e-5, atol=1e-5)


def test_prompts_of_no_known_kind():
    with pytest.raises(ValueError, match="prefill must be one of coded, dense"):
        make(prefill="sparse")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_dtype": "int8"},
        {"cache_dtype": "int4"},
        {"topk": 16, "dense_dims": 0, "cache_dtype": "int4"},
        {"topk": 16, "dense_dims": 0, "cache_dtype": "d8s8v8", "recent": 0, "first": 0},
        {"recent": 0, "first": 0, "prefill": "dense"},
        {"recent": 0, "first": 0, "cache_dtype": "d8s4v4-uint8"},
    ],
    ids=str,
)
def test_a_loss_is_that_of_decode(options):
    perplexity = pytest.importorskip("flashsfa.evaluation.perplexity")
    model, windows = make(**options), tokens(24, 3)
    found = perplexity.window_losses(model, windows)
    for loss, ids in zip(found, windows, strict=True):
        expected = torch.nn.functional.cross_entropy(one_by_one(model, ids[None])[0, :-1], ids[1:])
        assert loss == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("cache_dtype", [None, "int4"])
@pytest.mark.parametrize("exact", [{}, {"recent": 3, "first": 2}], ids=str)
def test_a_loss_in_bits_per_axis_is_that_of_decode(exact, cache_dtype):
    perplexity = pytest.importorskip("flashsfa.evaluation.perplexity")
    dense, windows = flashsfa.disable(make()), tokens(24, 2)
    whole = perplexity.perplexity(dense, windows)
    basis = flashsfa.calibrate(dense, tokens(40), key_bytes=5)
    model = flashsfa.enable(dense, basis=basis, cache_dtype=cache_dtype, **exact)
    found = perplexity.window_losses(model, windows)
    for loss, ids in zip(found, windows, strict=True):
        expected = torch.nn.functional.cross_entropy(one_by_one(model, ids[None])[0, :-1], ids[1:])
        assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert perplexity.perplexity(model, windows) != pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("cache_dtype", ["int8", "int4"])
def test_gradients_without_a_cache(cache_dtype):
    model, ids = make(cache_dtype=cache_dtype), tokens(9)
    model(ids, use_cache=False, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("kind", ["dictionary", "balanced"])
def test_exact_tokens_have_no_part_in_the_gain_of_a_basis(kind):
    """It makes up for what codes drop."""
    ids, dense = tokens(20), flashsfa.disable(make())
    expected = run(dense, ids)
    basis = flashsfa.calibrate(dense, tokens(40), 3, dense_dims=2, kind=kind)
    model = flashsfa.enable(dense, 3, dense_dims=2, topk_query="dense", basis=basis, recent=99)
    cache = SparseCache(model)
    in_steps = torch.cat([run(model, part, cache) for part in ids.split((10, 1, 9), dim=1)], dim=1)
    for found in (run(model, ids), in_steps):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    model = flashsfa.enable(dense, 3, dense_dims=2, basis=basis, recent=3, first=2, prefill="dense")
    torch.testing.assert_close(run(model, ids, SparseCache(model)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(model, ids), one_by_one(model, ids), **CLOSE)


@pytest.mark.parametrize("kind", ["axes", "features"])
def test_exact_keys_are_read_where_they_lie(kind, monkeypatch):
    """Without a copy, and by the views for which decode is prepared; and coded as they came when they are no longer among the newest."""
    dense, ids = flashsfa.disable(make()), tokens(20)
    options = {"key_bytes": 5} if kind == "axes" else {"topk": 3, "dense_dims": 2}
    basis = flashsfa.calibrate(dense, tokens(40), **options)
    options.pop("key_bytes", None)
    model = flashsfa.enable(dense, **options, basis=basis, recent=3, first=2)
    seen, attend = [], attention.attend_cached
    monkeypatch.setattr(
        attention, "attend_cached", lambda *given, **rules: seen.append((*given, rules)) or attend(*given, **rules)
    )
    cache, kept = SparseCache(model), [x.self_attn.sfa for x in model.model.layers]
    run(model, ids[:, :-1], cache)
    newest = [layer.store.kv.recent.k[:, :, 0].clone() for layer in cache.layers]
    views, append = [], flashsfa.SparseKVCache.append
    monkeypatch.setattr(flashsfa.SparseKVCache, "append", lambda *given: views.append(append(*given)) or views[-1])
    seen.clear()
    run(model, ids[:, -1:], cache)
    for (_, kv, _, rules), view, layer, coding, key in zip(seen, views, cache.layers, kept, newest, strict=True):
        assert kv is view
        assert kv.recent.k.data_ptr() == layer.store.kv.recent.k.data_ptr()
        code = coding.coder.encode(key[:, :, None], key[:, :, None]).rows(torch.float64).k[:, :, 0]
        torch.testing.assert_close(kv.coded(14, 15).rows(torch.float64).k[:, :, 0], code, rtol=0, atol=0)
        if kind == "axes":
            assert rules["exact_factor"] is None
        else:
            gain = (coding.key.double() * coding.query.double()).sum(-2)
            factor = rules["exact_factor"].double()
            torch.testing.assert_close(factor * gain, torch.ones(2, 16).double(), rtol=1e-5, atol=1e-5)
            assert (gain[:, 2:] > 1.001).all()

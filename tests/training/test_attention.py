"""What each kind of attention computes while training, and what is saved of it."""

import pytest
import torch
import torch.nn.functional as F

import flashsfa
from flashsfa import reference
from flashsfa.huggingface.attention import LayerCoding
from flashsfa.huggingface.positions import channel_first
from flashsfa.training import recipe
from flashsfa.training.attention import SparseCore, Visible, install
from flashsfa.training.baselines import PerformerCore, QuantizedCore
from flashsfa.training.data import Collator
from flashsfa.training.models import finish
from flashsfa.training.run import Equalizing
from tiny import CONTEXT, MODELS, VOCABULARY, Coding, logits, make, transformers

SPARSE = {
    "learned": ("gpt2", {"topk": 4}),
    "full": ("qwen3", {"topk": 4, "topk_query": 16}),
    "channel": ("qwen3", {"topk": 3, "dense_dims": 4, "positions": "channel"}),
    "gpt2 channel": ("gpt2", {"topk": 3, "dense_dims": 4, "positions": "channel"}),
    "window": ("qwen3", {"topk": 4, "window": 5}),
    "pattern": ("gpt2", {"topk": 4, "topk_query": 8, "query_pattern": "2:4", "gradient": "all"}),
    "one layer": ("qwen3", {"topk": 3, "dense_dims": 4, "positions": "channel", "layers": [1]}),
}


@pytest.mark.parametrize("name", SPARSE)
def test_what_was_trained_is_what_loads_again(tmp_path, name):
    architecture, options = SPARSE[name]
    attention = recipe.Attention(kind="sfa", **options)
    model = make(architecture, kind="sfa", **options).eval()
    ids = torch.randint(0, VOCABULARY, (2, CONTEXT))
    trained = logits(model, ids)
    finish(model, attention)
    torch.testing.assert_close(logits(model, ids), trained)
    model.save_pretrained(tmp_path / "model")
    loaded = flashsfa.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(logits(loaded, ids), trained)
    continued = loaded.generate(ids[:, :8], max_new_tokens=4, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(continued[:, 8:9], logits(loaded, ids[:, :8])[:, -1:].argmax(-1))


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("qwen3", {"topk": 4}),
        ("qwen3", {"topk": 3, "dense_dims": 4, "topk_query": 16, "layers": [1], "window": 5}),
        ("gpt2", {"topk": 4, "topk_query": 16, "gradient": "all", "equalize": True}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_trained_basis_begins_as_the_identity_and_goes_with_the_model(tmp_path, architecture, options):
    options = {"kind": "sfa", **options}
    model, plain = make(architecture, train_basis=True, **options), make(architecture, **options)
    ids = torch.randint(1, VOCABULARY, (2, CONTEXT))  # generate takes 0 for padding
    torch.testing.assert_close(logits(model, ids), logits(plain, ids))
    maps = [x for name, x in model.named_parameters() if name.endswith("basis.factors")]
    assert len(maps) == len(options.get("layers", (0, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model.zero_grad()
        model.train()(ids, labels=ids, use_cache=False).loss.backward()
        assert all(x.grad.flatten(1).norm(dim=1).min() > 0 for x in maps)  # of each head
        optimizer.step()
        equalize(model)
    trained = logits(model.eval(), ids)
    finish(model, recipe.Attention(train_basis=True, **options))
    torch.testing.assert_close(logits(model, ids), trained, rtol=1e-4, atol=1e-5)
    basis = [layer.key for layer in model.modules() if isinstance(layer, LayerCoding)]
    assert min(float((x - torch.eye(16)).abs().amax()) for x in basis) > 1e-3
    model.save_pretrained(tmp_path / "model")
    loaded = flashsfa.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(logits(loaded, ids), trained, rtol=1e-4, atol=1e-5)
    continued = loaded.generate(ids[:, :8], max_new_tokens=4, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(continued[:, 8:9], logits(loaded, ids[:, :8])[:, -1:].argmax(-1))


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize(
    "options", [{"kind": "dense"}, {"kind": "short", "width": 8}, {"kind": "low_rank", "width": 8}]
)
def test_baselines_that_are_plain_models_load_as_such(tmp_path, architecture, options):
    model = make(architecture, **options).eval()
    ids = torch.randint(0, VOCABULARY, (2, CONTEXT))
    before = logits(model, ids)
    finish(model, recipe.Attention(**options))
    model.save_pretrained(tmp_path / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(logits(loaded, ids), before)


def scores_rank(model, ids):
    """Rank of each layer's query-key products, over heads: at most the width of queries and keys."""
    ranks = []

    def look(module, query, key, value, *args, **kwargs):
        for q, k in zip(query[0], key[0].repeat_interleave(query.shape[1] // key.shape[1], 0), strict=True):
            ranks.append(int(torch.linalg.matrix_rank(q.double() @ k.double().mT, rtol=1e-5)))
        return value.transpose(1, 2).repeat_interleave(query.shape[1] // key.shape[1], 2), None

    transformers.AttentionInterface.register("look", look)
    model.set_attn_implementation("look")
    model(ids)
    return max(ranks)


@pytest.mark.parametrize("architecture", MODELS)
def test_short_queries_and_keys_stay_short_in_training(architecture):
    model = make(architecture, context=32, kind="short", width=6)
    ids = torch.randint(0, VOCABULARY, (2, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    # A rotation is no product of few features, so there the features themselves are counted.
    if architecture == "gpt2":
        assert scores_rank(model, ids) == 6
    weight = (
        model.transformer.h[0].attn.c_attn.weight.mT[:32]
        if architecture == "gpt2"
        else model.model.layers[0].self_attn.q_proj.weight
    )
    assert (weight.unflatten(0, (-1, 16)).abs().sum((0, 2)) > 0).sum() == 6


def test_low_rank_projections_keep_their_rank():
    for architecture in MODELS:
        model = make(architecture, kind="low_rank", width=5)
        finish(model, recipe.Attention(kind="low_rank", width=5))
        weight = (
            model.transformer.h[0].attn.c_attn.weight[:, 32:64]
            if architecture == "gpt2"
            else model.model.layers[0].self_attn.k_proj.weight
        )
        assert torch.linalg.matrix_rank(weight, rtol=1e-5) == 5
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_int8_rounds_and_passes_gradients_straight_through():
    q, k, v = (torch.randn(1, 2, 6, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = QuantizedCore()(q, k, v, Visible(0.25))

    def rounded(x):
        scale = x.abs().amax(-1, keepdim=True) / 127
        return ((x / scale).round() * scale).detach().requires_grad_()

    one, other = rounded(q), rounded(k)
    expected = F.scaled_dot_product_attention(one, other, v, is_causal=True, scale=0.25)
    torch.testing.assert_close(out, expected)
    seed = torch.randn_like(out)
    grads, wanted = torch.autograd.grad(out, (q, k), seed), torch.autograd.grad(expected, (one, other), seed)
    torch.testing.assert_close(grads, wanted)


def test_performer_approaches_softmax_attention_with_many_features():
    q, k, v = (0.5 * torch.randn(1, 2, 12, 16) for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    few, many = (PerformerCore(16, n, seed=0).to(q.device)(q, k, v, Visible(0.25)) for n in (16, 4096))
    assert (many - exact).norm() < 0.05 * exact.norm()
    assert (many - exact).norm() < (few - exact).norm()


@pytest.mark.parametrize("options", [{"kind": "dense"}, {"kind": "sfa", "topk": 4}, {"kind": "int8"}])
@pytest.mark.parametrize("architecture", MODELS)
def test_packed_documents_see_themselves_alone(architecture, options):
    model = make(architecture, **options).eval()
    ids = torch.randint(1, VOCABULARY, (2, CONTEXT))
    ids[0, 4] = ids[0, 11] = ids[1, 7] = 0
    batch = Collator(separator=0)([{"input_ids": row} for row in ids])
    with torch.no_grad():
        packed = model(**batch).logits
    # An entry at the edge between two of its 8-bit steps may fall to either side.
    close = {"rtol": 0, "atol": 1e-3} if options["kind"] == "int8" else {}
    for row, start, end in ((0, 0, 5), (0, 5, 12), (0, 12, 16), (1, 0, 8), (1, 8, 16)):
        alone = logits(model, ids[row : row + 1, start:end])
        torch.testing.assert_close(packed[row : row + 1, start:end], alone, **close)


def test_the_channel_alone_carries_positions():
    model = make(
        "qwen3",
        kind="sfa",
        topk=3,
        dense_dims=4,
        positions="channel",
        config={"rope_parameters": {"rope_theta": 500.0}},
    )
    rotary = model.model.rotary_emb
    turned, still = rotary.inv_freq[:2], rotary.inv_freq[2:]
    torch.testing.assert_close(turned, 500.0 ** -torch.tensor([0.0, 0.5]))  # those of a head of four features
    assert (still == 0).all()
    x = torch.randn(1, 1, 5, 16)
    cos, sin = rotary(x, torch.arange(5)[None])
    rotated, _ = transformers.models.qwen3.modeling_qwen3.apply_rotary_pos_emb(x, x, cos, sin)
    before, after = channel_first(x, 4), channel_first(rotated, 4)
    torch.testing.assert_close(after[..., 4:], before[..., 4:])
    assert ((after - before)[0, 0, 1:, :4] != 0).all()


def equalize(model):
    """What the trainer does after a step."""
    for callback in Equalizing.of(model):
        callback.on_step_end(None, None, None)


@pytest.mark.parametrize("window", [None, 5])
def test_equal_features_are_chosen_by_what_they_do_to_scores_and_end_in_the_weights(window):
    options = {"kind": "sfa", "topk": 3, "topk_query": 16, "window": window}
    model, plain = make("gpt2", equalize=True, **options), make("gpt2", **options)
    ids = torch.randint(0, VOCABULARY, (2, CONTEXT))
    stretch = torch.linspace(0.2, 5, 16).repeat(2)  # dense scores stay, but large queries hide small keys
    with torch.no_grad():
        for block in (*model.transformer.h, *plain.transformer.h):
            block.attn.c_attn.weight[:, :32] *= stretch
            block.attn.c_attn.weight[:, 32:64] /= stretch
        model.train()(ids, use_cache=False)
    equalize(model)
    before = logits(model.eval(), ids)
    assert not torch.allclose(before, logits(plain.eval(), ids), atol=1e-4)
    finish(model, recipe.Attention(equalize=True, **options))
    hidden = model.transformer.h[0].ln_1(model.transformer.wte(ids) + model.transformer.wpe.weight[:CONTEXT])
    query = model.transformer.h[0].attn.c_attn(hidden)[..., :32].unflatten(-1, (2, 16))
    size = query.square().mean((0, 1)).sqrt()
    torch.testing.assert_close(size, size.mean(-1, keepdim=True).expand_as(size), rtol=1e-2, atol=0)
    if window is None:
        torch.testing.assert_close(logits(model, ids), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"kind": "dense"}, {"kind": "short", "width": 8}], ids=lambda o: o["kind"])
def test_equal_features_change_no_dense_score(options):
    model, plain = make("gpt2", equalize=True, **options), make("gpt2", **options)
    weight = model.transformer.h[0].attn.c_attn.weight.clone()
    ids = torch.randint(0, VOCABULARY, (2, CONTEXT))
    expected = logits(plain, ids)
    for _ in range(2):
        torch.testing.assert_close(logits(model.train(), ids), expected, rtol=1e-4, atol=1e-5)
        equalize(model)
    finish(model, recipe.Attention(equalize=True, **options))
    torch.testing.assert_close(logits(model.eval(), ids), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.transformer.h[0].attn.c_attn.weight, weight)


SCALED = {
    "dense": ("gpt2", {}),
    "features": ("gpt2", {"kind": "sfa", "topk": 4, "topk_query": 16, "equalize": True}),
    "short": ("gpt2", {"kind": "short", "width": 8, "window": 9}),
    "dense, norms": ("qwen3", {}),
    "features, norms": ("qwen3", {"kind": "sfa", "topk": 3, "dense_dims": 4, "positions": "channel"}),
    "short, norms": ("qwen3", {"kind": "short", "width": 8}),
}


@pytest.mark.parametrize(("architecture", "options"), SCALED.values(), ids=SCALED)
def test_a_scale_of_scores_stays_and_becomes_part_of_the_weights(architecture, options):
    model, warm = make(architecture, score_scale=3.0, **options), make(architecture, temperature=3.0, **options)
    ids = torch.randint(0, VOCABULARY, (2, CONTEXT))
    torch.testing.assert_close(logits(model, ids), logits(warm, ids))
    assert not torch.allclose(logits(model, ids), logits(make(architecture, **options), ids), atol=1e-6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # biases that are 0 at the start count, too
    for _ in range(2):
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
        equalize(model)
    trained = logits(model.eval(), ids)
    finish(model, recipe.Attention(score_scale=3.0, **options))
    if "window" not in options:  # which is not GPT-2's
        torch.testing.assert_close(logits(model, ids), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", MODELS)
def test_scores_start_at_their_temperature(architecture):
    channel = {"dense_dims": 4, "positions": "channel"} if architecture == "qwen3" else {"dense_dims": 4}
    found = {}

    def record(index, module):
        class Recorder(torch.nn.Module):
            def forward(self, q, k, v, visible):
                found[index] = module.sfa.queries(q) if hasattr(module, "sfa") else q
                return torch.zeros_like(q)

        return Recorder()

    def queries(**attention):
        model = make(architecture, **attention)
        ids = torch.arange(CONTEXT)[None]
        install(model, record)
        logits(model, ids)
        return found[0]

    sparse = {"kind": "sfa", "topk": 3, **channel}
    one, warm = queries(**sparse), queries(**sparse, temperature=2.0, sparse_temperature=3.0)
    torch.testing.assert_close(warm[..., :4], 2 * one[..., :4])
    torch.testing.assert_close(warm[..., 4:], 3 * one[..., 4:])
    mixed = {**sparse, "layers": [1]}  # the dense first layer has no sparse features
    torch.testing.assert_close(queries(**mixed, temperature=2, sparse_temperature=3), 2 * queries(**mixed))
    torch.testing.assert_close(
        queries(kind="low_rank", width=5, temperature=2.0), 2 * queries(kind="low_rank", width=5)
    )


def test_a_gradient_to_all_is_that_of_features_that_were_kept():
    q, k, v = (torch.randn(1, h, 6, 16, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    coding = Coding()
    kept = SparseCore(coding)(q, k, v, Visible(0.3))
    out = SparseCore(coding, "all")(q, k, v, Visible(0.3))
    torch.testing.assert_close(out, kept)
    masked = [reference.topk_rows(x.detach(), 3, dense_dims=2).requires_grad_() for x in (q, k)]
    expected = F.scaled_dot_product_attention(*masked, v, is_causal=True, scale=0.3, enable_gqa=True)
    seed = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), seed), torch.autograd.grad(expected, (*masked, v), seed)
    )


@pytest.mark.parametrize("options", [{}, {"gradient": "all"}, {"gradient": "all", "topk_query": 16}], ids=str)
def test_a_layer_keeps_codes_and_values_alone_for_its_backward_pass(options):
    model = make("gpt2", kind="sfa", topk=4, context=64, **options)
    module, hidden = model.transformer.h[0].attn.train(), torch.randn(2, 64, 32)
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    q, k, v = (x.unflatten(-1, (2, 16)).transpose(1, 2) for x in module.c_attn(hidden).chunk(3, -1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        module.sfa_core(q, k, v, Visible(0.25))
    rows = 2 * 64 * 2
    code = 4 * (1 + 4)  # indices and float32 values
    query = 16 * 4 if "topk_query" in options else code
    assert sum(storages.values()) == rows * (query + code + 2 * 16 * 4 + 4)  # v, out and a log-sum-exp


def test_mixed_precision_brings_queries_keys_and_values_to_one_dtype():
    model = make("qwen3", kind="sfa", topk=4)
    ids = torch.randint(0, VOCABULARY, (1, CONTEXT))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids, use_cache=False).loss  # a cache would bring values to the keys' dtype
    loss.backward()
    assert loss.isfinite()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.isfinite().all()

"""Training: recipes, data, what each kind of attention computes, and whole runs of tiny models."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import flashsfa
from flashsfa import reference
from flashsfa.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("rich")
yaml = pytest.importorskip("yaml")
from flashsfa.huggingface.positions import channel_first  # noqa: E402
from flashsfa.huggingface.switch import BASIS_FILE  # noqa: E402
from flashsfa.training import needle, recipe  # noqa: E402
from flashsfa.training.attention import DistillCore, SparseCore, TargetCore, TrainedBasis, Visible, install  # noqa: E402
from flashsfa.training.baselines import PerformerCore, QuantizedCore  # noqa: E402
from flashsfa.training.data import IGNORED, Collator, TokenStream, Windows, read_stream, tokenize  # noqa: E402
from flashsfa.training.distill import DistillTrainer  # noqa: E402
from flashsfa.training.models import build, finish  # noqa: E402
from flashsfa.training.run import Annealing, RunDirectory, RunTrainer  # noqa: E402
from flashsfa.training.support import support_statistics  # noqa: E402

transformers.utils.logging.disable_progress_bar()

GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2}
QWEN3 = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
QWEN3 |= {"num_key_value_heads": 2, "head_dim": 16}
MODELS = {"gpt2": GPT2, "qwen3": QWEN3}
CONTEXT, VOCABULARY = 16, 40


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A token file with documents that end with token 0."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.npy"
    random = np.random.default_rng(0)
    ids = random.integers(1, VOCABULARY, 40)[np.arange(4000) % 37]
    ids[random.integers(0, 4000, 300)] = 0
    ids[7] = VOCABULARY - 1
    np.save(path, ids.astype(np.uint16))
    return path


@pytest.fixture
def content(tokens):
    """A recipe of five steps."""
    data = {
        "train": str(tokens),
        "validation": str(tokens),
        "context": CONTEXT,
        "separator": 0,
        "validation_windows": 8,
    }
    training = {"tokens": 5 * 4 * CONTEXT, "batch": 4, "micro_batch": 2, "learning_rate": 1e-2, "warmup": 1}
    training |= {"precision": "fp32", "save_every": 2, "evaluate_every": 5, "log_every": 1}
    model = {"architecture": "gpt2", "config": {**GPT2, "vocab_size": VOCABULARY}}
    return {"model": model, "attention": {"kind": "sfa", "topk": 4}, "data": data, "training": training}


def write(path, content):
    path.write_text(yaml.safe_dump(content))
    return path


def run(tmp_path, content, *more, name="run", command="pretrain"):
    return main(["train", command, str(write(tmp_path / f"{name}.yaml", content)), "-o", str(tmp_path / name), *more])


def result(tmp_path, name="run"):
    return json.loads((tmp_path / name / "result.json").read_text())


def losses(tmp_path, name="run"):
    return [row["loss"] for row in result(tmp_path, name)["curve"] if "loss" in row]


def make(architecture, seed=0, context=CONTEXT, config=None, **attention):
    model = recipe.Model(architecture, {**MODELS[architecture], **(config or {})})
    return build(model, recipe.Attention(**attention), context, VOCABULARY, seed)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


# --- recipes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.train=", "data.train: must be text"),
        ("data.trian=x", "data.trian: unknown key"),
        ("training.tokens=many", "training.tokens: must be a number"),
        ("training.batch=2.5", "training.batch: must be a whole number"),
        ("training.compile=1", "training.compile: must be true or false"),
        ("training.micro_batch=3", "training.micro_batch"),
        ("training.precision=fp8", "training.precision: must be one of"),
        ("data=[1]", "data: must be a mapping"),
        ("data.train=/nowhere.npy", "data.train: token file /nowhere.npy does not exist"),
        ("data.train=/nowhere", "data.tokenizer: missing"),
        ("data.context=5000", "data.train has 4000 tokens"),
        ("data.separator=null", "data.separator: missing"),
        ("model.architecture=bert", "model.architecture: must be one of"),
        ("model.config.n_heads=2", "model.config.n_heads: GPT2Config has no such field"),
        ("model.config.n_head=5", "model.config: `embed_dim` must be divisible"),
        ("model.config.n_positions=8", "model.config: the positions are data.context"),
        ("model.config.vocab_size=39", "data.train holds token 39"),
        ("model.config.vocab_size=text", "model.config"),
        ("attention.topk=17", "attention: topk must be 1 to 16"),
        ("attention.topk=null", "attention.topk: missing"),
        ("attention.layers=[2]", "attention: layers [2] do not exist"),
        ("attention.gradient=some", "attention.gradient: must be one of"),
        ("attention.temperature=0", "attention.temperature must be above 0"),
        ("attention.width=4", "attention.width: only for kinds"),
        ("attention.equalize=true training.checkpointing=true", "attention.equalize: not with training.fsdp or"),
        ("attention.kind=int8 attention.topk=null attention.equalize=true", "attention.equalize: only for kinds dense"),
        ("attention.query_pattern=2:4 attention.topk_query=12", "attention: a 2:4 pattern keeps at most half"),
        ("attention.query_pattern=2:4 attention.anneal.share=0.5", "anneal: not with query_pattern"),
        ("attention.sparse_temperature=-1", "attention.sparse_temperature must be above 0"),
        ("attention.positions=full", "attention.positions: gpt2 cannot have full positions"),
        ("attention.positions=channel", "attention: positions='channel' turns the dense channel in pairs"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_the_key(tmp_path, content, capsys, change, message):
    content["data"]["packed"] = True
    assert run(tmp_path, content, *(x for setting in change.split() for x in ("--set", setting))) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("flashsfa: error:")
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


def test_missing_keys_and_files_are_named(tmp_path, content, capsys):
    del content["training"]["batch"]
    assert run(tmp_path, content) == 2
    assert "training.batch: missing" in capsys.readouterr().err
    assert main(["train", "pretrain", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml does not exist" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("a: [")
    assert main(["train", "pretrain", str(tmp_path / "bad.yaml")]) == 2
    assert "is no YAML" in capsys.readouterr().err


def test_a_recipe_survives_being_written_and_read(tmp_path, content):
    first = recipe.read(recipe.PretrainRecipe, write(tmp_path / "a.yaml", content), ["training.learning_rate=1e-4"])
    assert first.training.learning_rate == 1e-4
    recipe.write(first, tmp_path / "b.yaml")
    again = recipe.read(recipe.PretrainRecipe, tmp_path / "b.yaml")
    assert again == first
    other = recipe.read(recipe.PretrainRecipe, tmp_path / "b.yaml", ["model.config.n_embd=64"])
    assert recipe.differences(first, other) == ["model.config.n_embd"]


RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_row_of_a_recipe_is_one(path):
    """The rows are comments of the file: settings that follow one another in a line."""
    text = path.read_text()
    kind = recipe.DistillRecipe if "\ndistill:" in text else recipe.PretrainRecipe
    comments = re.sub(r" *\\\n#", "", "\n".join(line for line in text.splitlines() if line.startswith("#")))
    rows = [re.findall(r"\w+(?:\.\w+)+=[^\s)]+", line) for line in comments.splitlines()]
    assert len(list(filter(None, rows))) >= 2
    for row in rows:
        recipe.read(kind, path, row)


# --- data ------------------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one token a character."""

    eos_token_id = 0

    def __init__(self, size=128):
        self._size = size

    def __len__(self):
        return self._size

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def test_text_becomes_documents_that_end_with_the_separator(tmp_path):
    (tmp_path / "a.txt").write_text("ab\n\x1e\ncd\n")
    (tmp_path / "b.md").write_text("e")
    (tmp_path / "c.py").write_text("no text")
    ids = read_stream(str(tmp_path), "data.train", Letters(), None).ids
    assert "".join(map(chr, ids)) == "ab\n\0cd\n\0e\0"
    assert ids.dtype == np.uint16
    assert tokenize(iter(["a"]), Letters(1 << 17), 0).dtype == np.uint32
    with pytest.raises(ValueError, match="does not fit uint32"):
        tokenize(iter(["a"]), Letters((1 << 32) + 1), 0)


def test_an_empty_text_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"data.train: folder .* holds no"):
        read_stream(str(tmp_path), "data.train", Letters(), None)
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="is empty"):
        read_stream(str(tmp_path), "data.train", Letters(), None)


def test_datasets_are_a_source(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text('{"text": "ab"}\n{"text": "c"}\n')
    ids = read_stream(f"datasets:{tmp_path}:train", "data.train", Letters(), None).ids
    assert "".join(map(chr, ids)) == "ab\0c\0"
    with pytest.raises(ValueError, match=r"data.train: datasets:.* cannot be loaded"):
        read_stream(f"datasets:{tmp_path}:nothing", "data.train", Letters(), None)


def test_each_pass_shows_every_window_once_in_another_order():
    stream = TokenStream(np.arange(100, dtype=np.uint16), None)
    windows = Windows(stream, 10, 20, seed=3)
    starts = [int(windows[i]["input_ids"][0]) for i in range(20)]
    assert sorted(starts[:10]) == sorted(starts[10:]) == list(range(0, 100, 10))
    assert starts[:10] != starts[10:]
    again = Windows(stream, 10, 20, seed=3)
    assert [int(again[i]["input_ids"][0]) for i in (12, 3, 19)] == [starts[i] for i in (12, 3, 19)]


def test_packed_documents_have_bounds_positions_and_no_label_across_them():
    batch = Collator(separator=0)([{"input_ids": torch.tensor(ids)} for ids in ([5, 0, 6, 7], [8, 9, 0, 0])])
    assert batch["cu_seq_lens_q"].tolist() == [0, 2, 4, 7, 8]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 2, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 0, IGNORED, 7], [IGNORED, 9, 0, IGNORED]]


def test_needles_are_found_where_they_were_hidden():
    windows = needle.NeedleWindows(12, 50, seed=1)
    for window in (windows[i] for i in range(50)):
        ids, (answer,) = window["input_ids"], (window["labels"] != IGNORED).nonzero()[0].tolist()
        assert ids[answer - 1] == needle.QUESTION
        assert (ids == ids[answer]).sum() == 2
        assert (ids == needle.HAY).sum() == 12 - 3
    assert torch.equal(windows[7]["input_ids"], needle.NeedleWindows(12, 9, seed=1)[7]["input_ids"])

    class Oracle:
        device = "cpu"

        def __call__(self, input_ids, **_):
            needles = input_ids[input_ids >= needle.FIRST_NEEDLE]
            assert input_ids[0, -1] == needle.QUESTION
            return type("Out", (), {"logits": F.one_hot(needles[None] + self.shift, needle.VOCABULARY + 1)})

    Oracle.shift = 0
    assert needle.needle_accuracy(Oracle(), [8, 12], 5, seed=0) == {8: 1.0, 12: 1.0}
    Oracle.shift = 1
    assert needle.needle_accuracy(Oracle(), [8], 5, seed=0) == {8: 0.0}


# --- attention -------------------------------------------------------------------------------------------------------------

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
    finish(model, recipe.Attention(equalize=True, **options))
    torch.testing.assert_close(logits(model.eval(), ids), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.transformer.h[0].attn.c_attn.weight, weight)


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


# --- Eq. 8 -----------------------------------------------------------------------------------------------------------------


class Coding(torch.nn.Module):
    topk, topk_query, query_budget, dense_dims, query_pattern = 3, None, 3, 2, None

    def queries(self, q):
        return q

    keys = queries


def test_eq8_is_the_distance_to_its_target():
    q, k, v = (torch.randn(2, h, 6, 8, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    core = DistillCore(Coding())
    core.target = target = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    out, loss = core(q, k, v, Visible(0.3)), core.distance
    repeated = [x.repeat_interleave(2, 1) for x in (k, v)]
    keep = [reference.topk_rows(x, 3, dense_dims=2).detach() != 0 for x in (q, repeated[0])]
    sparse = F.scaled_dot_product_attention(q * keep[0], repeated[0] * keep[1], repeated[1], is_causal=True, scale=0.3)
    torch.testing.assert_close(out, sparse)
    expected = (sparse - target).square().sum(-1).mean((0, 2))  # [Hq]
    torch.testing.assert_close(loss, expected.float(), check_dtype=False)
    grads = torch.autograd.grad(loss.mean(), (q, k, v))
    torch.testing.assert_close(grads, torch.autograd.grad(expected.mean(), (q, k, v)), rtol=1e-5, atol=1e-7)
    silent = DistillCore(Coding())
    silent(q, k, v, Visible(0.3))
    assert silent.distance is None
    silent.target = target
    silent.eval()(q, k, v, Visible(0.3))
    assert silent.distance is None


def test_the_target_of_eq8_is_dense_attention():
    q, k, v = (torch.randn(2, h, 6, 8, dtype=torch.float64) for h in (4, 2, 2))
    core = TargetCore()
    out = core(q, k, v, Visible(0.3))
    repeated = [x.repeat_interleave(2, 1) for x in (k, v)]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, *repeated, is_causal=True, scale=0.3))
    assert core.out is out


def test_a_trained_basis_changes_no_score_before_topk():
    start = flashsfa.FeatureBasis.identity(2, 8)
    trained = TrainedBasis(start)
    with torch.no_grad():
        trained.key += 0.1 * torch.randn_like(trained.key)
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    basis = trained()
    scores = basis.transform_query(q) @ basis.transform_key(k).repeat_interleave(2, 1).mT
    torch.testing.assert_close(scores, q @ k.repeat_interleave(2, 1).mT, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_layer_reports_its_distance_once(checkpointing):
    model = flashsfa.enable(transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=VOCABULARY, **QWEN3)), 4)
    install(model, lambda index, module: DistillCore(module.sfa))
    model.model.layers[1].self_attn.sfa_core.target = torch.zeros(2, 4, 8, 16)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()(torch.randint(0, VOCABULARY, (2, 8)), use_cache=False)
    first, second = (layer.self_attn for layer in model.model.layers)
    assert first.sfa_core.distance is None
    assert second.sfa_core.distance.shape == (4,)
    second.sfa_core.distance.sum().backward()
    assert first.v_proj.weight.grad.abs().sum() > 0  # through the hidden states
    assert second.q_proj.weight.grad.abs().sum() > 0
    assert second.o_proj.weight.grad is None


# --- runs ------------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_goes_on_with_the_same_losses(tmp_path, content, monkeypatch):
    content["attention"] |= {"anneal": {"share": 0.8}, "topk_query": 16, "equalize": True}
    content["model"]["config"]["resid_pdrop"] = 0.1  # random numbers go on too
    assert run(tmp_path, content, name="whole") == 0
    step = RunTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "training_step", killed)
    assert run(tmp_path, content) == 130
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if "runs" not in p.name) == [
        "checkpoint-2",
        "recipe.yaml",
    ]
    monkeypatch.undo()
    (tmp_path / "run" / ".partial" / "checkpoint-3").mkdir(parents=True)  # what a kill in the middle of saving leaves
    assert run(tmp_path, content) == 0
    assert losses(tmp_path) == losses(tmp_path, "whole")
    assert result(tmp_path)["seconds_per_step"] > 0
    assert len(losses(tmp_path)) == 5
    assert result(tmp_path)["perplexity"] == result(tmp_path, "whole")["perplexity"]
    weights = [flashsfa.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "run")]
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_run_killed_after_its_last_step_is_finished(tmp_path, content, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("flashsfa.training.pretrain.save", killed)
    assert run(tmp_path, content) == 130
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-5"]
    monkeypatch.undo()
    assert run(tmp_path, content) == 0
    assert len(losses(tmp_path)) == 5


def test_a_directory_holds_one_run(tmp_path, content, capsys):
    assert run(tmp_path, content) == 0
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    assert run(tmp_path, content) == 2
    assert "holds a finished run" in capsys.readouterr().err
    (tmp_path / "run" / "result.json").rename(tmp_path / "result.json")
    assert run(tmp_path, content, "--set", "training.seed=1") == 2
    assert "another recipe (training.seed differ)" in capsys.readouterr().err
    (tmp_path / "result.json").rename(tmp_path / "run" / "result.json")
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*")) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert run(tmp_path, content, name="other") == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(tmp_path, content, capsys, monkeypatch):
    step = RunTrainer.training_step

    def poisoned(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        return loss * torch.nan if self.state.global_step == 3 else loss

    monkeypatch.setattr(RunTrainer, "training_step", poisoned)
    content["training"]["log_every"] = 100
    assert run(tmp_path, content) == 2
    assert (
        f"loss is nan at step 4; the last good checkpoint is {tmp_path / 'run' / 'checkpoint-2'}"
        in capsys.readouterr().err
    )
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_full_disk_loses_no_checkpoint(tmp_path, content, capsys, monkeypatch):
    save = RunTrainer._save_optimizer_and_scheduler

    def full(self, directory):
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        return save(self, directory)

    monkeypatch.setattr(RunTrainer, "_save_optimizer_and_scheduler", full)
    assert run(tmp_path, content) == 2
    assert "checkpoint of step 4 could not be written" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "run").glob("*check*")) == ["checkpoint-2"]
    assert not (tmp_path / "run" / ".partial").exists()
    monkeypatch.undo()
    assert run(tmp_path, content) == 0


def test_a_result_that_cannot_be_written_loses_no_checkpoint(tmp_path, content, capsys, monkeypatch):
    def full(self, result):
        raise RuntimeError("No space left on device")  # safetensors' error is no OSError

    monkeypatch.setattr(RunDirectory, "close", full)
    assert run(tmp_path, content) == 2
    assert (
        f"result could not be written: No space left on device; the last good checkpoint is {tmp_path / 'run' / 'checkpoint-5'}"
        in capsys.readouterr().err
    )
    monkeypatch.undo()
    assert run(tmp_path, content) == 0
    assert run(tmp_path, content, name="whole") == 0
    assert result(tmp_path)["validation_loss"] == result(tmp_path, "whole")["validation_loss"]


def test_tensorboard_shows_the_losses(tmp_path, content):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(tmp_path, content) == 0
    shown = events.EventAccumulator(str(next((tmp_path / "run").rglob("events.out.*")).parent)).Reload()
    np.testing.assert_allclose([x.value for x in shown.Scalars("train/loss")], losses(tmp_path), rtol=1e-3)


def test_gradient_checkpointing_and_micro_batches_change_no_loss(tmp_path, content):
    assert run(tmp_path, content, name="plain") == 0
    assert run(tmp_path, content, "--set", "training.checkpointing=true", "--set", "training.micro_batch=4") == 0
    np.testing.assert_allclose(losses(tmp_path), losses(tmp_path, "plain"), rtol=1e-5)


@pytest.mark.parametrize("attention", [{"kind": "dense"}, {"kind": "sfa", "topk": 4}], ids=["dense", "sfa"])
def test_needles_are_learned_with_and_without_sparse_features(tmp_path, content, attention):
    content["attention"] = attention
    content["data"] = {"train": "needle", "validation": "needle", "context": 8, "validation_windows": 4}
    content["model"]["config"] = GPT2
    content["training"] |= {"tokens": 150 * 64 * 8, "batch": 64, "micro_batch": 64, "warmup": 10, "save_every": 1000}
    content["training"] |= {"log_every": 50, "evaluate_every": 1000}
    assert run(tmp_path, content) == 0
    assert result(tmp_path)["needle"]["8"] > 0.9
    assert losses(tmp_path)[0] == pytest.approx(np.log(needle.VOCABULARY), rel=0.1)


def test_annealing_halves_the_budget_down_to_its_own():
    codings = [Coding(), Coding()]
    codings[1].topk_query = 8
    annealing = Annealing(codings, 14, recipe.Anneal(share=0.5), steps=12)
    seen = []
    for step in range(12):
        annealing.on_step_begin(None, type("State", (), {"global_step": step}), None)
        seen.append((codings[0].topk, codings[0].topk_query, codings[1].topk_query))
    assert seen == [(14, None, 14)] * 3 + [(7, None, 8)] * 3 + [(3, None, 8)] * 6


# --- distillation ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def converted(tmp_path):
    """A converted model with a basis."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY, max_position_embeddings=32, bos_token_id=None, eos_token_id=None, **QWEN3
    )
    model = transformers.Qwen3ForCausalLM(config)
    basis = flashsfa.calibrate(model, torch.randint(0, VOCABULARY, (4, 32)), 3, dense_dims=2)
    flashsfa.enable(model, 3, topk_query=16, dense_dims=2, basis=basis).save_pretrained(tmp_path / "converted")
    words = {f"w{i}": i for i in range(VOCABULARY)}
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0").save_pretrained(
        tmp_path / "converted"
    )
    return tmp_path / "converted"


def distill_content(content, converted, **settings):
    return {k: content[k] for k in ("data", "training")} | {"model": str(converted), "distill": settings}


def test_distillation_brings_sparse_outputs_to_dense_ones(tmp_path, content, converted, tokens):
    content["training"] |= {"tokens": 20 * 4 * CONTEXT, "learning_rate": 3e-3}
    settings = {"weight": 10.0, "logits": 1.0, "train_basis": True, "anneal": {"share": 0.1}}
    settings["warmup"] = {"text": str(tokens), "tokens": 64}
    assert run(tmp_path, distill_content(content, converted, **settings), command="distill") == 0
    rows = [row for row in result(tmp_path)["curve"] if "loss" in row]
    for name in ("attention_distance", "divergence", "lm_loss"):
        assert all(np.isfinite(row[name]) for row in rows)
    for row in rows:
        total = row["lm_loss"] + 10 * row["attention_distance"] + row["divergence"]
        assert row["loss"] == pytest.approx(total, rel=1e-4)
    assert rows[-1]["loss"] < rows[3]["loss"]
    before, after = (flashsfa.FeatureBasis.load(d / BASIS_FILE) for d in (converted, tmp_path / "run" / "model"))
    assert not torch.equal(before.key, after.key)
    torch.testing.assert_close(after.key.mT @ after.query, before.key.mT @ before.query, rtol=1e-4, atol=1e-4)
    model = flashsfa.from_pretrained(tmp_path / "run" / "model")
    assert model.config.sfa["topk"] == 3
    assert model.config.use_cache
    ids = torch.from_numpy(np.load(tokens)[: 8 * CONTEXT].astype(np.int64)).view(8, CONTEXT).to(model.device)
    loss = model.eval()(ids, labels=ids, use_cache=False).loss
    assert float(loss.detach()) == pytest.approx(result(tmp_path)["validation_loss"], rel=1e-4)


def head_outputs(model, ids):
    """What each layer's heads give to the output projection, [layers, B, N, Hq · Dv]."""
    seen = []
    modules = [layer.self_attn.o_proj for layer in model.model.layers]
    hooks = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for module in modules]
    with torch.no_grad():
        model.eval()(ids.to(model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def test_distillation_brings_heads_to_the_dense_model_as_it_was(tmp_path, content, converted, tokens):
    """Dense attention of the weights that are being trained is another target, and runs away from them."""
    sparse = flashsfa.from_pretrained(converted)
    with torch.no_grad():
        for layer in sparse.model.layers:
            layer.self_attn.q_norm.weight *= 3  # attention that is not flat
    sparse.save_pretrained(converted)
    content["training"] |= {"tokens": 100 * 4 * CONTEXT, "learning_rate": 3e-3, "warmup": 5}
    assert run(tmp_path, distill_content(content, converted, weight=1e4), command="distill") == 0
    ids = torch.from_numpy(np.load(tokens)[: 8 * CONTEXT].astype(np.int64)).view(8, CONTEXT)
    before = head_outputs(sparse, ids)
    dense = head_outputs(flashsfa.disable(sparse), ids)
    after = head_outputs(flashsfa.from_pretrained(tmp_path / "run" / "model"), ids)
    assert (after - dense).norm() < 0.8 * (before - dense).norm()


def test_distillation_without_a_loss_term_is_plain_fine_tuning(tmp_path, content, converted):
    assert run(tmp_path, distill_content(content, converted, weight=0.0, layers=[1]), command="distill") == 0
    rows = [row for row in result(tmp_path)["curve"] if "loss" in row]
    assert all(row["loss"] == pytest.approx(row["lm_loss"]) for row in rows)


def test_distillation_with_adapters(tmp_path, content, converted):
    pytest.importorskip("peft")
    assert run(tmp_path, distill_content(content, converted, lora={"rank": 2}), command="distill") == 0
    model = flashsfa.from_pretrained(tmp_path / "run" / "model")
    before = flashsfa.from_pretrained(converted)
    changed = {
        n for (n, a), b in zip(model.named_parameters(), before.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert changed
    assert all("proj" in name for name in changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [7]}, "distill.layers: layers [7] are not sparse"),
        ({"weight": -1}, "distill.weight must not be negative"),
        ({"lora": {"rank": 2}, "train_basis": True}, "distill.train_basis: not together with distill.lora"),
        (
            {"warmup": {"text": "/nowhere.npy", "tokens": 5}},
            "distill.warmup.text: token file /nowhere.npy does not exist",
        ),
    ],
)
def test_a_wrong_distillation_is_refused(tmp_path, content, converted, capsys, settings, message):
    assert run(tmp_path, distill_content(content, converted, **settings), command="distill") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_distillation_starts_from_a_converted_model(tmp_path, content, capsys):
    assert run(tmp_path, distill_content(content, tmp_path / "nothing"), command="distill") == 2
    assert "model: " in capsys.readouterr().err
    assert DistillTrainer.compute_loss is not RunTrainer.compute_loss


# --- supports --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [(3, None), (4, "2:4")], ids=str)
def test_support_statistics_count_what_the_operator_keeps(queries):
    model = flashsfa.enable(
        transformers.Qwen3ForCausalLM(transformers.Qwen3Config(vocab_size=VOCABULARY, **QWEN3)).eval(),
        3,
        topk_query=queries[0],
        dense_dims=4,
        query_pattern=queries[1],
        layers=[1],
    )
    windows = torch.randint(0, VOCABULARY, (2, 9))
    statistics = support_statistics(model, windows)
    assert statistics.entropy[0].isnan().all()
    seen = []

    def look(module, query, key, value, *args, **kwargs):
        seen.append((query, key))
        return flashsfa.huggingface.attention.attention_forward(module, query, key, value, *args, **kwargs)

    transformers.AttentionInterface.register("look", look)
    model.set_attn_implementation("look")
    counts, overlaps, effective = torch.zeros(2, 12), [], []
    for window in windows:
        seen.clear()
        logits(model, window[None])
        codes = zip(seen[1], (queries, (3, None)), strict=True)
        query, key = (reference.topk_rows(x, k, dense_dims=4, pattern=p)[0, :, :, 4:] for x, (k, p) in codes)
        counts += (key != 0).sum(1)
        shared = ((query != 0).float() @ (key != 0).float().repeat_interleave(2, 0).mT > 0).tril()
        overlaps.append(shared.sum((1, 2)).view(2, 2).sum(1) / (2 * 45))
        effective.append((key.square().sum(-1).square() / key.pow(4).sum(-1)).mean(-1))
    shares = (counts / counts.sum(-1, keepdim=True)).cpu()
    torch.testing.assert_close(statistics.entropy[1], torch.special.entr(shares).sum(-1) / np.log(12))
    torch.testing.assert_close(statistics.overlap[1], torch.stack(overlaps).mean(0).cpu())
    torch.testing.assert_close(statistics.effective_topk[1], torch.stack(effective).mean(0).cpu())


def test_supports_on_the_command_line(tmp_path, converted, tokens, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "results"
    command = ["train", "support", str(converted), "--text", str(tokens), "--window", "16", "-o", str(out)]
    assert main(command) == 0
    assert "effective k of 3" in capsys.readouterr().out
    (report,) = out.glob("support-*.json")
    rows = json.loads(report.read_text())["results"]
    assert [(row["layer"], row["head"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(row["overlap"] == 1 and 0 < row["entropy"] <= 1 and 1 <= row["effective_topk"] <= 3 for row in rows)
    assert report.with_suffix(".png").stat().st_size > 0
    assert main([*command[:3], "--window", "1"]) == 2


def test_tokenize_writes_a_token_file(tmp_path, converted, capsys):
    (tmp_path / "text.txt").write_text("w3")
    command = [
        "train",
        "tokenize",
        str(tmp_path / "text.txt"),
        "--tokenizer",
        str(converted),
        "-o",
        str(tmp_path / "out.npy"),
    ]
    assert main(command) == 0
    assert np.load(tmp_path / "out.npy").tolist() == [3, 0]
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")) == VOCABULARY
    assert main(command) == 2
    assert "name a new file" in capsys.readouterr().err


# --- comparing runs --------------------------------------------------------------------------------------------------------


def finished(path, *, perplexity, seed=0, batch=4, **attention):
    """A run's directory with the result that it would have."""
    path.mkdir()
    training = {"tokens": 640, "batch": batch, "seed": seed}
    content = {"recipe": {"data": {"context": 16}, "training": training, "attention": attention}, "parameters": 7}
    content |= {"environment": {"date": "2026-01-02T03:04", "commit": "abc"}, "steps": 10, "perplexity": perplexity}
    content |= {"seconds_per_step": 0.5, "peak_memory_bytes": None}
    content["curve"] = [{"step": step, "loss": np.log(perplexity) + 1 / step} for step in range(1, 11)]
    (path / "result.json").write_text(json.dumps(content))
    return str(path)


def test_runs_are_compared_seed_by_seed(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    runs = [finished(tmp_path / f"dense{s}", perplexity=p, seed=s, kind="dense") for s, p in ((0, 10.0), (1, 20.0))]
    runs += [finished(tmp_path / f"sfa{s}", perplexity=p, seed=s, kind="sfa") for s, p in ((0, 11.0), (1, 21.0))]
    assert main(["train", "compare", *runs, "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "+7.50 %" in out
    assert "+5.00 to +10.00" in out
    written = tmp_path / "out" / "training-2026-01-02-abc.json"
    dense, sfa = json.loads(written.read_text())["results"]
    assert (dense["runs"], sfa["seeds"]) == (["dense0", "dense1"], [0, 1])
    np.testing.assert_allclose(sfa["change"], [0.1, 0.05])
    assert written.with_suffix(".png").stat().st_size > 0


def test_runs_that_saw_other_data_are_not_compared(tmp_path, capsys):
    runs = [finished(tmp_path / "a", perplexity=10.0), finished(tmp_path / "b", perplexity=10.0, batch=8)]
    assert main(["train", "compare", *runs, "-o", str(tmp_path / "out")]) == 2
    assert "b saw other data or took other steps than a" in capsys.readouterr().err
    runs[1] = finished(tmp_path / "c", perplexity=10.0, seed=1, kind="sfa")
    assert main(["train", "compare", *runs, "-o", str(tmp_path / "out")]) == 2
    assert "c has seed 1, and a was not run with it" in capsys.readouterr().err
    assert main(["train", "compare", str(tmp_path), "-o", str(tmp_path / "out")]) == 2
    assert "holds no finished run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

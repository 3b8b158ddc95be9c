"""Recipes: read strictly, written whole, refused in one line."""

import re
from pathlib import Path

import pytest

from flashsfa.cli import main
from flashsfa.training import recipe
from tiny import QWEN3, VOCABULARY, refused, run, write


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
        ("attention.gradient=all attention.gradient_share=0", "attention.gradient_share must be in (0, 1]"),
        ("attention.gradient_share=0.5", "attention.gradient_share: only for gradient all"),
        ("attention.dense_share=1", "attention.dense_share must be at least 0 and less than 1, got 1.0"),
        (
            "attention.kind=dense attention.topk=null attention.dense_share=0.5",
            "attention.dense_share: only for kind sfa",
        ),
        ("attention.dense_share=0.5 attention.anneal.share=0.5", "attention.dense_share: not with attention.anneal"),
        ("attention.dense_share=0.5 attention.equalize=true", "attention.dense_share: not with attention.equalize"),
        (
            "attention.dense_share=0.5 attention.gradient=all attention.gradient_share=0.5",
            "codes begin after dense_share=0.5",
        ),
        ("attention.temperature=0", "attention.temperature must be above 0"),
        ("attention.width=4", "attention.width: only for kinds"),
        ("attention.kind=int8 attention.topk=null attention.equalize=true", "attention.equalize: only for kinds dense"),
        ("attention.query_pattern=2:4 attention.topk_query=12", "attention: a 2:4 pattern keeps at most half"),
        ("attention.query_pattern=2:4 attention.anneal.share=0.5", "anneal: not with query_pattern"),
        ("attention.sparse_temperature=-1", "attention.sparse_temperature must be above 0"),
        ("attention.score_scale=0", "attention.score_scale must be above 0"),
        ("attention.kind=int8 attention.topk=null attention.score_scale=2", "attention.score_scale: only for kinds"),
        ("model.start=/nowhere attention.score_scale=2", "attention.score_scale: what a run of model.start"),
        (
            "attention.kind=dense attention.topk=null attention.train_basis=true",
            "attention.train_basis: only for kind sfa",
        ),
        ("attention.train_basis=true attention.positions=channel", "attention.train_basis: not with positions channel"),
        ("attention.train_basis=true training.fsdp=true", "training.fsdp: not with attention.train_basis"),
        ("attention.positions=full", "attention.positions: gpt2 cannot have full positions"),
        ("attention.positions=channel", "attention: positions='channel' turns the dense channel in pairs"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_the_key(tmp_path, content, capsys, change, message):
    content["data"]["packed"] = True
    refused(
        capsys, run(tmp_path, content, *(x for setting in change.split() for x in ("--set", setting))), message
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


# Values that no run has: each was accepted once, or refused only after a folder was made, or by a traceback.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.tokens=1:20:30", "training.tokens: must be a number, got '1:20:30'"),
        ("training.tokens='320'", "training.tokens: must be a number, got '320'"),
        ("training.tokens=true", "training.tokens: must be a number, got True"),
        ("training.tokens=1" + 40 * "0", "training.tokens: must be a finite number below 2^63"),
        ("training.tokens=1" + 18 * "0", "training.tokens must be 1 to"),
        ("training.tokens=63", "training.tokens 63 are less than one step of training.batch 4 windows"),
        ("training.batch=1000000000000", "training.batch must be 1 to"),
        ("training.learning_rate=.inf", "training.learning_rate: must be a finite number"),
        ("training.learning_rate=.nan", "training.learning_rate: must be a finite number"),
        ("training.learning_rate=nan", "training.learning_rate: must be a number, got 'nan'"),
        ("training.learning_rate=1e30", "training.learning_rate: must be a finite number below 2^63, got 1e+30"),
        ("training.learning_rate=1.5", "training.learning_rate must be above 0 and at most 1"),
        ("training.weight_decay=.nan", "training.weight_decay: must be a finite number"),
        ("training.weight_decay=-0.1", "training.weight_decay must be at least 0"),
        ("training.weight_decay=100", "training.weight_decay must be at least 0 and less than 1 /"),
        ("training.clip=.nan", "training.clip: must be a finite number"),
        ("training.clip=-1", "training.clip must be above 0, or 0 for none"),
        ("training.clip=true", "training.clip: must be a number, got True"),
        ("training.warmup=-1", "training.warmup must be at least 0"),
        ("training.seed=-1", "training.seed must be 0 to 4294967295"),
        ("training.seed=4294967296", "training.seed must be 0 to 4294967295"),
        ("data.separator=-1", "data.separator must be a token id"),
        ("data.separator=40", "data.separator: 40 lies past the model's vocabulary of 40"),
        ("data.validation_windows=100000000000", "data.validation_windows must be 1 to"),
        ("data.context=10000000000", "data.context must be 2 to"),
        ("attention.temperature=.inf", "attention.temperature: must be a finite number"),
        ("attention.temperature=1e9", "attention.temperature must be 0.001 to 1000.0"),
        ("attention.sparse_temperature=1e-9", "attention.sparse_temperature must be 0.001 to 1000.0"),
        ("attention.topk=0", "attention.topk must be at least 1"),
        ("attention.topk=4.5", "attention.topk: must be a whole number"),
        ("attention.dense_dims=-1", "attention.dense_dims must not be negative"),
        ("attention.layers=[true]", "attention.layers: must be a number, got True"),
        ("attention.layers=[0,0]", "attention: layers must name each layer to switch once"),
        ("attention.anneal.share=.nan", "attention.anneal.share: must be a finite number"),
        ("attention.kind=performer attention.topk=null attention.width=4", "data.packed: not with attention.kind perf"),
        ("model.config.n_head=0", "model.config.n_head: must be 1 to 4611686018427387904, got 0"),
        (
            "model.config.num_attention_heads=0",
            "model.config.num_attention_heads: must be 1 to 4611686018427387904, got 0",
        ),
        ("model.config.n_embd=0", "model.config.n_embd: must be 1 to 4611686018427387904, got 0"),
        ("model.config.n_layer=0", "model.config.n_layer: must be 1 to 4096, got 0"),
        ("model.config.n_layer=1000000000", "model.config.n_layer: must be 1 to 4096"),
        ("model.config.n_embd=1" + 400 * "0", "model.config.n_embd: must be 1 to"),
        ("model.config.n_layer=true", "model.config: Validation error for field 'n_layer'"),
        ("model.config.n_inner=-4", "model.config.n_inner: must be 1 to 4611686018427387904, got -4"),
        ("model.config.vocab_size=0", "model.config.vocab_size: must be 1 to 4611686018427387904, got 0"),
        ("model.config.n_embd=100000000", "GiB in float32, more than this machine's memory"),
        ("model.config.activation_function=zzz", "model.config.activation_function: must be one of gelu"),
        ("model.config.activation_function=[]", "model.config.activation_function: must be one of gelu"),
        ("model.config.layer_norm_epsilon=.nan", "model.config.layer_norm_epsilon: must be 0 to"),
        ("model.config.initializer_range=-1.0", "model.config.initializer_range: must be 0 to"),
        ("model.config.initializer_range=1.0e+18", "model.config: a model like this cannot be run"),
        ("model.config.resid_pdrop=2", "model.config.resid_pdrop: must be 0 to 1, got 2"),
        ("model.config.attn_pdrop=0.5", "model.config.attn_pdrop: attention drops no weights"),
        ("model.config.eos_token_id=40", "model.config.eos_token_id: [40] lies past the vocabulary of 40"),
        ("model.config.bos_token_id=-1", "model.config.bos_token_id: must be 0 to"),
        ("model.config.scale_attn_weights=false", "model.config.scale_attn_weights: GPT2Config has no such field"),
        ("model.config.reorder_and_upcast_attn=true", "model.config.reorder_and_upcast_attn: GPT2Config has no such"),
        ("model.config.architectures=5", "model.config.architectures: GPT2Config has no such field"),
        ("model.config._name_or_path=../x", "model.config._name_or_path: GPT2Config has no such field"),
        ("model.config.dtype=zzz", "model.config.dtype: GPT2Config has no such field"),
    ],
)
def test_values_that_no_run_has_are_refused_before_anything_is_written(tmp_path, content, capsys, change, message):
    content["data"]["packed"] = "performer" in change
    settings = [x for setting in change.split() for x in ("--set", setting)]
    refused(capsys, run(tmp_path, content, *settings), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("head_dim", 15, "model.config"),
        ("num_key_value_heads", 3, "model.config"),
        ("num_key_value_heads", 0, "model.config.num_key_value_heads: must be 1 to"),
        ("sliding_window", 0, "model.config.sliding_window: must be 1 to"),
        ("hidden_act", "zzz", "model.config.hidden_act: must be one of"),
        ("layer_types", ["zzz", "zzz"], "model.config"),
        ("rope_parameters", {"rope_theta": float("nan")}, "model.config: a model like this cannot be run"),
        ("rope_parameters", {"rope_type": "zzz"}, "model.config"),
        ("attention_dropout", 0.1, "model.config.attention_dropout: attention drops no weights"),
    ],
)
def test_a_model_that_cannot_be_run_is_refused_before_anything_is_written(
    tmp_path, content, capsys, field, value, message
):
    content["model"] = {"architecture": "qwen3", "config": {**QWEN3, "vocab_size": VOCABULARY, field: value}}
    refused(capsys, run(tmp_path, content), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "holds no mapping"),
        (b"- 1\n- 2", "holds no mapping"),
        (bytes(range(128, 256)), "is no YAML: 'utf-8' codec"),
        (b"a: " + 20_000 * b"[", "is nested too deeply to be a recipe"),
        (20_000 * b"{a: ", "is nested too deeply to be a recipe"),
        (b"a: &a [1]\nb: *a", "is no YAML: a recipe has no aliases"),
        (b"model: &a {architecture: gpt2, config: *a}", "is no YAML: a recipe has no aliases"),
        (b"data: {context: 4}\ndata: {context: 5}", "is no YAML: the key data comes twice"),
        (b"model: 2020-13-45", "is no YAML: month must be in"),
        (b"model: " + 5000 * b"9", "is no YAML: Exceeds the limit"),
        (b'model: !!python/object/apply:os.system ["true"]', "is no YAML: could not determine a constructor"),
        (b"? [1]\n: 2", "is no YAML"),
        (b"? " + 300 * b"x" + b"\n: 1", "xxx ...: unknown key"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text)
    refused(capsys, main(["train", "pretrain", str(path), "-o", str(tmp_path / "run")]), message)
    assert not (tmp_path / "run").exists()


def test_an_override_that_is_no_yaml_is_named(tmp_path, content, capsys):
    refused(capsys, run(tmp_path, content, "--set", "training.seed=["), "--set training.seed=[ is no YAML")


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("2.5E+2", 250.0), (".5e1", 5.0), ("1_000", 1000.0)])
def test_numbers_are_written_as_people_write_them(tmp_path, content, text, value):
    path = write(tmp_path / "a.yaml", content)
    read = recipe.read(recipe.PretrainRecipe, path, [f"training.tokens={text}" if value > 1 else "training.tokens=64"])
    assert value < 1 or read.training.tokens == value
    tiny = recipe.read(recipe.PretrainRecipe, path, [f"model.config.layer_norm_epsilon={text}"])
    assert tiny.model.config["layer_norm_epsilon"] == value


def test_missing_keys_and_files_are_named(tmp_path, content, capsys):
    del content["training"]["batch"]
    assert run(tmp_path, content) == 2
    assert "training.batch: missing" in capsys.readouterr().err
    assert main(["train", "pretrain", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml does not exist" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text("a: [")
    assert main(["train", "pretrain", str(tmp_path / "bad.yaml")]) == 2
    assert "is no YAML" in capsys.readouterr().err


def test_a_missing_tokenizer_folder_is_said_with_how_to_make_it(tmp_path, content, capsys):
    content["data"]["tokenizer"] = str(tmp_path / "tokenizer")
    assert run(tmp_path, content) == 2
    said = capsys.readouterr().err
    assert "data.tokenizer: " in said
    assert "there is no such directory. To make the folder: flashsfa train tokenize TEXT -o FILE.npy" in said


def test_a_recipe_survives_being_written_and_read(tmp_path, content):
    first = recipe.read(recipe.PretrainRecipe, write(tmp_path / "a.yaml", content), ["training.learning_rate=1e-4"])
    assert first.training.learning_rate == 1e-4
    recipe.write(first, tmp_path / "b.yaml")
    again = recipe.read(recipe.PretrainRecipe, tmp_path / "b.yaml")
    assert again == first
    other = recipe.read(recipe.PretrainRecipe, tmp_path / "b.yaml", ["model.config.n_embd=64"])
    assert recipe.differences(first, other) == ["model.config.n_embd"]


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


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

"""`flashsfa train pretrain`: a model from scratch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch.utils.data import ConcatDataset, Dataset
from transformers import TrainerCallback

from ..basis import FeatureBasis
from ..checks import require
from ..huggingface import loading
from ..huggingface.switch import attention_layers, attention_shape, load_basis
from . import needle
from .attention import use_bases
from .card import write_card
from .data import Collator, TokenStream, Windows, check_stream, read_stream
from .models import build, finish, why_not_kept
from .needle import NeedleWindows, needle_accuracy
from .recipe import Attention, Data, DistillRecipe, PretrainRecipe, Training
from .run import MODEL, Annealing, Equalizing, Fitting, RunDirectory, RunTrainer, Settling, fit, prepare, total_steps

_log = logging.getLogger("flashsfa")
_NEEDLES_A_LENGTH = 200


@dataclass(frozen=True)
class Corpus:
    """The data of a run: windows to train on and to validate on, and how they become a batch."""

    train: Dataset
    validation: Dataset
    collate: Collator


def pretrain(recipe: PretrainRecipe, directory: Path) -> dict[str, Any]:
    """Run `recipe` in `directory`; returns the figures that stand in its `result.json`.

    Raises `ValueError`, with nothing written, for a recipe that does not fit.
    """
    with RunDirectory(directory, recipe) as place:
        return _pretrain(recipe, place)


def _pretrain(recipe: PretrainRecipe, place: RunDirectory) -> dict[str, Any]:
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    is_needle = recipe.data.train == "needle"
    vocab_size = needle.VOCABULARY if is_needle else None if tokenizer is None else len(tokenizer)
    model = build(recipe.model, recipe.attention, recipe.data.context, vocab_size, recipe.training.seed)
    if recipe.model.start is not None:
        _begin_from(model, Path(recipe.model.start), recipe.attention)
    corpus = load_corpus(recipe.data, recipe.training, tokenizer, model.config.vocab_size)
    steps = total_steps(recipe.training, recipe.data.context)
    fitting = Fitting.of(model, recipe.attention, steps, corpus.train, corpus.collate)
    callbacks: list[TrainerCallback] = [
        *Annealing.of(model, recipe.attention.anneal, steps),
        *Settling.of(model, recipe.attention, steps),
        *fitting,
        *Equalizing.of(model),
    ]
    trainer = prepare(
        RunTrainer, place, model, corpus.train, corpus.validation, corpus.collate, recipe.training, recipe.data.context,
        callbacks,
    )  # fmt: skip
    not_kept = why_not_kept(recipe.model.architecture, recipe.attention)
    if not_kept is not None and trainer.args.should_save:
        _log.warning("this run will keep its figures and curve, and no model: nothing loads one with %s", not_kept)
    result = fit(trainer, place)
    if recipe.attention.dense_share:
        result["dense_steps"] = fitting[0].dense_steps
    if is_needle and trainer.args.should_save and not recipe.training.fsdp:
        lengths = [recipe.data.context >> i for i in range(4) if recipe.data.context >> i >= needle.SHORTEST]
        result["needle"] = needle_accuracy(model.eval(), lengths, _NEEDLES_A_LENGTH, recipe.training.seed + 1)
    fold = (lambda: finish(model, recipe.attention)) if not_kept is None else None
    save(trainer, place, recipe, result, tokenizer if not_kept is None else None, fold)
    return result


def _begin_from(model: Any, run: Path, attention: Attention) -> None:
    """Give a `build`-ed model the weights that an earlier run wrote.

    Raises `ValueError` that names the key of the recipe if there are none, or they do not fit.
    """
    for name, nothing in (("score_scale", 1.0), ("temperature", 1.0), ("sparse_temperature", None)):
        require(
            getattr(attention, name) == nothing,
            f"attention.{name}: what a run of model.start was trained with is part of its weights; set it to "
            f"{'null' if nothing is None else '1'}",
        )
    files = sorted((run / MODEL).glob("*.safetensors"))
    require(
        bool(files),
        f"model.start: {run} holds no model: name the folder of a run that ended and whose model can be loaded",
    )
    before = _config_of(model.config, run)
    _require_same_function(model.config, before, run)
    basis = _basis_of(run, before, model)
    if basis is not None:
        _require_own_basis(basis, run, attention)
    weights = {name: x for file in files for name, x in load_file(file).items()}
    own = model.state_dict()
    unlike = [name for name, x in weights.items() if name not in own or own[name].shape != x.shape]
    given = {own[name].data_ptr() for name in weights if name in own}
    lacking = [name for name, x in own.items() if x.data_ptr() not in given and ".sfa_core." not in name]
    require(
        not unlike and not lacking,
        lambda: (
            f"model.start: the weights of {run} are not those of this recipe ({', '.join((*unlike, *lacking)[:3])}): give "
            "model.config, attention and, for learned positions, data.context the sizes of that run"
        ),
    )
    if attention.kind == "short":  # what a short head leaves out is zero
        whole = [name for name, x in weights.items() if x.ndim == 2 and bool(x[own[name] == 0].any())]
        require(
            not whole,
            lambda: (
                f"attention.width: the heads of {run} are not as short ({whole[0]}): begin with a run of kind short and width "
                f"{attention.width}, or leave model.start out"
            ),
        )
    model.load_state_dict(weights, strict=False)
    if basis is not None:
        use_bases(model, basis)


def _config_of(config: Any, run: Path) -> dict[str, Any]:
    """The config of an earlier run's model, which is of the class of `config`."""
    try:
        found: dict[str, Any] = type(config).from_json_file(run / MODEL / "config.json").to_dict()
    except (OSError, ValueError) as error:
        raise ValueError(f"model.start: the model of {run} has no config that can be read: {error}") from error
    return found


def _basis_of(run: Path, config: dict[str, Any], model: Any) -> FeatureBasis | None:
    """That of an earlier run's model, which has `config`; None if it has none. Raises `ValueError` for one that is not of `model`'s sizes."""
    try:
        basis = load_basis(run / MODEL)
    except ValueError as error:
        raise ValueError(f"model.start: {error}") from error
    require(
        (config.get("sfa") or {}).get("has_basis", False) == (basis is not None),
        f"model.start: the model of {run} is incomplete: its config and its files do not agree on whether it has a basis",
    )
    if basis is not None:
        _, kv_heads, head_dim = attention_shape(model)
        expected, found = (len(attention_layers(model)), kv_heads, head_dim, head_dim), tuple(basis.key.shape)
        require(found == expected, f"model.start: the basis of {run} is {found}, and the model needs {expected}")
    return basis


def _require_own_basis(basis: FeatureBasis, run: Path, attention: Attention) -> None:
    """Raise `ValueError` if training with `attention` cannot go on in the basis of an earlier run."""
    for name, is_there in (
        (f"attention.kind {attention.kind}", attention.kind != "sfa"),
        ("attention.train_basis", attention.train_basis),
        ("attention.equalize", attention.equalize),
        ("attention.positions channel", attention.positions == "channel"),
        ("attention.anneal", attention.anneal is not None),
    ):
        require(not is_there, f"model.start: the model of {run} has a basis, which {name} cannot go on with")
    require(
        basis.topk is not None,
        f"model.start: the model of {run} has a basis that was trained, which a run cannot go on with",
    )
    try:
        basis.check(attention.topk, attention.dense_dims)
    except ValueError as error:
        raise ValueError(f"model.start: the model of {run} has a basis, and {error}") from error


def _require_same_function(config: Any, before: dict[str, Any], run: Path) -> None:
    """Raise `ValueError` if a model of `config` would compute something else by the weights of an earlier run, whose config was `before`,
    though their shapes fit."""
    own = config.to_dict()
    unlike = [name for name in _FUNCTION if own.get(name) != before.get(name)]
    require(
        not unlike,
        lambda: (
            f"model.start: the model of {run} has another {unlike[0]}, {before.get(unlike[0])} and not {own.get(unlike[0])}: give "
            "model.config what that run had"
        ),
    )


# What no shape of a weight tells.
_FUNCTION = (
    "n_head", "num_attention_heads", "num_key_value_heads", "activation_function", "hidden_act", "rope_parameters", "layer_norm_epsilon",
    "rms_norm_eps", "scale_attn_by_inverse_layer_idx", "sliding_window",
)  # fmt: skip


def save(
    trainer: RunTrainer,
    place: RunDirectory,
    recipe: PretrainRecipe | DistillRecipe,
    result: dict[str, Any],
    tokenizer: Any | None,
    finish: Callable[[], None] | None,
) -> None:
    """Write the result and, after `finish`, the model with its card; no model if `finish` is None.

    Raises `OSError` that names the last checkpoint, which is kept, if something cannot be written.
    """
    trainer.model.config.use_cache = True  # which the Trainer turned off
    model = place.partial / MODEL
    try:
        if finish is not None and trainer.is_fsdp_enabled:
            finish()
            trainer.save_model(str(model))  # gathers the shards
        elif finish is not None and trainer.args.should_save:
            finish()
            trainer.model.save_pretrained(model)
        if trainer.args.should_save:
            if tokenizer is not None:
                tokenizer.save_pretrained(model)
            if finish is not None:  # without what was trained beside the weights, and is part of them now
                result["parameters"] = sum(p.numel() for p in trainer.model.parameters())
                write_card(model, recipe, result)
            place.close(result | {"model": None if finish is None else MODEL})
    except Exception as error:  # a full disk is another error in each of the libraries that write here
        place.sweep()
        raise OSError(f"the result could not be written: {error}; {trainer.last_good()}") from error


def load_tokenizer(name: str | None) -> Any | None:
    """transformers' tokenizer of a directory or hub name. Raises `ValueError` that names the key of the recipe."""
    if name is None:
        return None
    try:
        return loading.load_tokenizer(name)
    except ValueError as error:
        way_out = ". To make the folder: flashsfa train tokenize TEXT -o FILE.npy writes it beside FILE.npy"
        raise ValueError(f"data.tokenizer: {error}{'' if Path(name).is_dir() else way_out}") from error


def load_corpus(
    data: Data, training: Training, tokenizer: Any | None, vocab_size: int, before: tuple[str, int] | None = None
) -> Corpus:
    """The data of a run. `before`: a text, and tokens of it, to train on first."""
    count = training.batch * total_steps(training, data.context)
    require(
        data.separator is None or data.separator < vocab_size,
        f"data.separator: {data.separator} lies past the model's vocabulary of {vocab_size}",
    )
    if data.train == "needle":
        require(vocab_size >= needle.VOCABULARY, f"model.config.vocab_size: needle takes {needle.VOCABULARY} tokens")
        require(data.context >= needle.SHORTEST, f"data.context: needle takes at least {needle.SHORTEST} tokens")
        require(not data.packed and data.validation == "needle", "data: needle is validated on needle, not packed")
        return Corpus(
            NeedleWindows(data.context, count, training.seed),
            NeedleWindows(data.context, data.validation_windows, training.seed + 1, at_end=True),
            Collator(),
        )  # fmt: skip

    def stream(source: str, key: str) -> tuple[TokenStream, int]:
        found = read_stream(source, key, tokenizer, data.separator)
        return found, check_stream(found, key, data.context, vocab_size)

    (train, _), (validation, available) = stream(data.train, "data.train"), stream(data.validation, "data.validation")
    require(
        not data.packed or train.separator is not None,
        "data.separator: missing; packed documents need the token that ends them",
    )
    windows: Dataset = Windows(train, data.context, count, training.seed)
    if before is not None:
        first, _ = stream(before[0], "distill.warmup.text")
        early = min(count, -(-before[1] // data.context))
        later = Windows(train, data.context, count - early, training.seed)
        windows = ConcatDataset([Windows(first, data.context, early, training.seed), later])
    return Corpus(
        windows, Windows(validation, data.context, min(available, data.validation_windows)),
        Collator(train.separator if data.packed else None),
    )  # fmt: skip

"""The YAML of a run: dataclasses, read strictly. Every error names the key it is about."""

from __future__ import annotations

import re
import types
import typing
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..attention import GRADIENTS
from ..checks import MOST_TOKENS, require, require_int
from ..files import write_whole

ARCHITECTURES = ("gpt2", "qwen3")
KINDS = ("dense", "sfa", "short", "low_rank", "int8", "performer")
POSITIONS = ("learned", "full", "channel")
_LONGEST_RUN = 10**15  # tokens, far more than anyone has trained on
_LARGEST_BATCH, _LARGEST_COUNT, _LARGEST_SEED = 2**24, 2**20, 2**32 - 1
_TEMPERATURES = (1e-3, 1e3)
_SHOWN = 80  # characters of a wrong value in a message
T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    """A model from scratch.

    Attributes:
        architecture: "gpt2" or "qwen3".
        config: fields of transformers' config that differ from its defaults. The context is the data's; GPT-2's dropout
            is 0 unless given; the vocabulary is the tokenizer's unless `vocab_size` is given.
        start: folder of an earlier run, whose weights it begins with in place of random ones: on longer contexts, say. They must be those
            of the same architecture and sizes; what attention makes of them is the recipe's own, but for the size of scores, which is in
            the weights, and a basis that was fitted (`Attention.dense_share`), which it begins with.
    """

    architecture: str
    config: dict[str, Any] = field(default_factory=dict)
    start: str | None = None

    def __post_init__(self) -> None:
        _one_of("model.architecture", self.architecture, ARCHITECTURES)


@dataclass(frozen=True)
class Anneal:
    """A budget that shrinks: from all features to `topk` in halvings, spread evenly over the first `share` of the steps."""

    share: float = 0.5

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, f"anneal.share must be in (0, 1], got {self.share}")


@dataclass(frozen=True)
class Attention:
    """Which attention a model is trained with.

    Attributes:
        kind: "dense"; "sfa"; or a baseline: "short" (queries and keys `width` wide), "low_rank" (query and key projections
            of rank `width`), "int8" (8-bit queries and keys, straight-through), "performer" (`width` random features).
        topk, topk_query, dense_dims, query_pattern: budgets of "sfa", as in `flashsfa.sparse_feature_attention`.
        layers: those that are sparse, the others stay dense; None for all.
        gradient: of "sfa": "kept" or "all", as in `flashsfa.sparse_feature_attention`.
        gradient_share: a gradient to "all" ends after this share of the training, and is one to the "kept" from then on: it helps while
            supports are being found, and is not the loss's own.
        equalize: of "dense", "short" or "sfa", in a GPT-2 with learned positions, best with dense queries: keep the features of a
            head's queries at one size, and let the keys' take it up, so that top-k of keys drops what scores need least.
            Dense scores stay as they are, and learn at other speeds. Part of the weights at the end.
        temperature: scores start so many times as large (Qwen3: its norm of queries begins there).
        sparse_temperature: of "sfa": the same for the features outside the dense channel, to make up for what top-k drops;
            None for `temperature`.
        score_scale: scores are so many times as large throughout, of "dense", "sfa" and "short": few features make smaller ones, and weights
            take steps to make up for it. Part of the weights at the end. With a gradient to "all" beside it a GPT-2 of 124M diverged.
        positions: "learned" (GPT-2) or "full", RoPE on the whole head (Qwen3), the defaults; "channel": RoPE on the
            `dense_dims` alone, in place of either.
        train_basis: of "sfa", for models without a channel: learn a linear map of each kv head's keys between RoPE and top-k, which
            begins as the identity. The paper has one in its Qwen3, "to isolate positional dimensions" (appendix A.1), and leaves open
            whether queries and keys share it. Here the queries of the head get its inverse, transposed: the map decides what top-k
            drops, and with every feature kept all scores are those of the dense model, which depend on distances alone. At the end it
            is the model's basis.
        window: see the `window` most recent tokens only.
        dense_share: of "sfa": train dense for this share of the steps. Then a basis is fitted to the model's queries and keys, as `flashsfa
            convert` does, and the rest is trained with codes in it; the basis is fitted anew after each tenth of the steps. The best that
            is known here for learned positions: all features find out what to attend to, and the rest of the training makes up for what
            codes drop. With RoPE convert the trained model and train on.
        width: of a baseline, see `kind`.
        anneal: shrink the budget of "sfa" during training.
    """

    kind: str = "dense"
    topk: int | None = None
    topk_query: int | None = None
    dense_dims: int = 0
    query_pattern: str | None = None
    layers: list[int] | None = None
    gradient: str = "kept"
    gradient_share: float = 1.0
    equalize: bool = False
    temperature: float = 1.0
    score_scale: float = 1.0
    sparse_temperature: float | None = None
    positions: str | None = None
    train_basis: bool = False
    dense_share: float = 0.0
    window: int | None = None
    width: int | None = None
    anneal: Anneal | None = None

    def __post_init__(self) -> None:
        _one_of("attention.kind", self.kind, KINDS)
        if self.positions is not None:
            _one_of("attention.positions", self.positions, POSITIONS)
        sparse, wide = self.kind == "sfa", self.kind in ("short", "low_rank", "performer")
        require((self.topk is not None) == sparse, f"attention.topk: {'missing' if sparse else 'only for kind sfa'}")
        require(
            (self.width is not None) == wide,
            f"attention.width: {'missing' if wide else 'only for kinds short, low_rank and performer'}",
        )
        _one_of("attention.gradient", self.gradient, GRADIENTS)
        require(0 < self.gradient_share <= 1, f"attention.gradient_share must be in (0, 1], got {self.gradient_share}")
        require(
            self.gradient == "all" or self.gradient_share == 1,
            "attention.gradient_share: only for gradient all, which it ends",
        )
        for name in (
            "topk_query",
            "anneal",
            "query_pattern",
            "layers",
            "gradient",
            "sparse_temperature",
            "train_basis",
            "dense_share",
        ):
            default = getattr(Attention, name)
            require(sparse or getattr(self, name) == default, f"attention.{name}: only for kind sfa")
        for name in ("equalize", "score_scale"):
            is_default = getattr(self, name) == getattr(Attention, name)
            require(
                self.kind in ("dense", "sfa", "short") or is_default,
                f"attention.{name}: only for kinds dense, sfa and short",
            )
        for name in ("temperature", "score_scale", "sparse_temperature"):
            value = getattr(self, name)
            require(value is None or value > 0, f"attention.{name} must be above 0, got {value}")
            least, most = _TEMPERATURES
            require(value is None or least <= value <= most, f"attention.{name} must be {least} to {most}, got {value}")
        require(
            sparse or self.dense_dims == 0 or self.positions == "channel",
            "attention.dense_dims: only for kind sfa or positions channel",
        )
        for name in ("topk", "topk_query", "window", "width"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"attention.{name} must be at least 1, got {value}")
        require(
            not self.train_basis or self.positions != "channel",
            "attention.train_basis: not with positions channel, whose features stay in their places",
        )
        self._check_dense_share()
        require(self.dense_dims >= 0, f"attention.dense_dims must not be negative, got {self.dense_dims}")
        require(self.kind != "performer" or self.window is None, "attention.window: not with kind performer")

    def _check_dense_share(self) -> None:
        share = self.dense_share
        require(0 <= share < 1, f"attention.dense_share must be at least 0 and less than 1, got {share}")
        other = {
            "attention.positions channel, whose features stay in their places": self.positions == "channel",
            "attention.train_basis, which learns one from the start": self.train_basis,
            "attention.equalize, which the basis takes the place of": self.equalize,
            "attention.anneal: from a basis on a budget need not shrink": self.anneal is not None,
            "attention.sparse_temperature, as no feature is sparse at the start": self.sparse_temperature is not None,
        }
        for name, is_there in other.items():
            require(not (share and is_there), f"attention.dense_share: not with {name}")
        require(
            self.gradient == "kept" or self.gradient_share > share,
            f"attention.gradient_share: a gradient to all ends after {self.gradient_share} of the steps, and codes begin after "
            f"dense_share={share}",
        )


@dataclass(frozen=True)
class Data:
    """What is read.

    Attributes:
        train, validation: a text file or a folder of them (.txt, .md, .rst; a line holding only U+001E ends a document
            within a file), a token file (.npy, uint16 or uint32), "datasets:NAME:SPLIT" (a hub name or local folder of the
            datasets package, its column "text"), or "needle" for the synthetic task of `flashsfa.training.needle`.
        context: tokens of a window.
        tokenizer: directory or hub name; needed for text.
        separator: token id that ends documents; the tokenizer's end-of-text token by default.
        packed: tokens see their own document only, through the packed form of attention.
        validation_windows: at most so many windows of the validation data are used.
    """

    train: str
    validation: str
    context: int
    tokenizer: str | None = None
    separator: int | None = None
    packed: bool = False
    validation_windows: int = 512

    def __post_init__(self) -> None:
        require(2 <= self.context <= MOST_TOKENS, f"data.context must be 2 to {MOST_TOKENS} tokens, got {self.context}")
        require_int("data.validation_windows", self.validation_windows, 1, _LARGEST_COUNT)
        require(
            self.separator is None or self.separator >= 0,
            f"data.separator must be a token id, which is not negative; got {self.separator}",
        )


@dataclass(frozen=True)
class Training:
    """How it is trained; AdamW with betas 0.9 and 0.95, a linear warm-up and a cosine to a tenth.

    Attributes:
        tokens: of the whole run, passes over the data as needed.
        batch: windows a step, over all processes.
        micro_batch: windows a process holds at a time; None for all of its share.
        learning_rate: at most 1.
        weight_decay: AdamW's; a step takes learning_rate · weight_decay of each weight away.
        warmup: steps until the full learning rate.
        clip: gradients whose norm is larger are scaled down to it; 0 for none.
        precision: "bf16" (mixed, float32 weights) or "fp32".
        compile: torch.compile.
        checkpointing: recompute activations in the backward pass.
        fsdp: shard weights, gradients and optimizer over the processes of torchrun (FSDP2).
        save_every, evaluate_every, log_every: steps.
    """

    tokens: int
    batch: int
    micro_batch: int | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup: int = 100
    clip: float = 1.0
    seed: int = 0
    precision: str = "bf16"
    compile: bool = False
    checkpointing: bool = False
    fsdp: bool = False
    save_every: int = 500
    evaluate_every: int = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        require_int("training.tokens", self.tokens, 1, _LONGEST_RUN)
        require_int("training.batch", self.batch, 1, _LARGEST_BATCH)
        for name in ("save_every", "evaluate_every", "log_every"):
            require_int(f"training.{name}", getattr(self, name), 1)
        require(self.micro_batch is None or self.micro_batch >= 1, "training.micro_batch must be at least 1")
        require(
            0 < self.learning_rate <= 1,
            f"training.learning_rate must be above 0 and at most 1, got {self.learning_rate}",
        )
        require(
            self.weight_decay >= 0 and self.learning_rate * self.weight_decay < 1,
            f"training.weight_decay must be at least 0 and less than 1 / training.learning_rate, got {self.weight_decay}",
        )
        require_int("training.warmup", self.warmup, 0)
        require(self.clip >= 0, f"training.clip must be above 0, or 0 for none; got {self.clip}")
        require_int("training.seed", self.seed, 0, _LARGEST_SEED)
        _one_of("training.precision", self.precision, ("bf16", "fp32"))


@dataclass(frozen=True)
class PretrainRecipe:
    """`flashsfa train pretrain`.

    Attributes:
        license: of the model, as its card names it, such as "apache-2.0"; None leaves it open.
    """

    model: Model
    data: Data
    training: Training
    attention: Attention = field(default_factory=Attention)
    license: str | None = None

    def __post_init__(self) -> None:
        require(
            not (self.data.packed and self.attention.kind == "performer"),
            "data.packed: not with attention.kind performer, which mixes all that comes before",
        )
        require(
            not (self.training.fsdp and self.attention.kind == "low_rank"),
            "training.fsdp: not with attention.kind low_rank, whose products are not sharded",
        )
        require(
            not (self.training.fsdp and self.attention.train_basis),
            "training.fsdp: not with attention.train_basis, which is not sharded",
        )


@dataclass(frozen=True)
class Warmup:
    """Text that is trained on before the data: `text` as `data.train`, `tokens` of it."""

    text: str
    tokens: int

    def __post_init__(self) -> None:
        require_int("distill.warmup.tokens", self.tokens, 1, _LONGEST_RUN)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on all linear layers (peft), merged into the weights at the end."""

    rank: int
    alpha: float | None = None  # twice the rank by default

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"distill.lora.rank must be at least 1, got {self.rank}")
        require(self.alpha is None or self.alpha > 0, f"distill.lora.alpha must be above 0, got {self.alpha}")


@dataclass(frozen=True)
class Distill:
    """The terms of the loss: language modelling + weight · Eq. 8 + logits · KL(dense model ‖ sparse model).

    Attributes:
        weight: λ of Eq. 8: squared distance of each head's output from its output in the dense model as it was before,
            summed over features, averaged over tokens, heads and layers.
        layers: those Eq. 8 looks at; None for all that are sparse.
        logits: weight of the Kullback-Leibler divergence a token from that dense model.
        train_basis: train the basis too; its two sides stay inverse to one another, gains apart.
        anneal: shrink the budget during training; a basis's gain is that of the last one.
        warmup, lora: see there.
    """

    weight: float = 1.0
    layers: list[int] | None = None
    logits: float = 0.0
    train_basis: bool = False
    anneal: Anneal | None = None
    warmup: Warmup | None = None
    lora: Lora | None = None

    def __post_init__(self) -> None:
        for name in ("weight", "logits"):
            require(getattr(self, name) >= 0, f"distill.{name} must not be negative, got {getattr(self, name)}")
        require(
            self.layers is None or 0 < len(self.layers) == len(set(self.layers)),
            f"distill.layers: name each layer once, got {self.layers}; leave it out for all that are sparse",
        )
        require(not (self.lora and self.train_basis), "distill.train_basis: not together with distill.lora")


@dataclass(frozen=True)
class DistillRecipe:
    """`flashsfa train distill`.

    Attributes:
        model: directory that `flashsfa convert` wrote; its tokenizer is the data's unless that names another.
        license: as in `PretrainRecipe`.
    """

    model: str
    data: Data
    training: Training
    distill: Distill = field(default_factory=Distill)
    license: str | None = None

    def __post_init__(self) -> None:
        require(
            not (self.training.fsdp and (self.distill.train_basis or self.distill.lora)),
            "training.fsdp: not with distill.train_basis or distill.lora",
        )


def read(kind: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """The recipe in a YAML file, with `key.key=value` overrides put in.

    Raises `ValueError` that names the key for one that is missing, unknown or of another type, or the file if it is no YAML.
    """
    require(path.is_file(), f"recipe {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    content = _parsed(text, str(path))
    require(isinstance(content, dict), f"{path} holds no mapping of keys to values")
    for override in overrides:
        key, equals, value = override.partition("=")
        require(bool(equals), f"--set {override}: write it as key=value")
        _put(content, key.strip().split("."), _parsed(value, f"--set {override}"))
    return _build(kind, content, "")


def write(recipe: Any, path: Path) -> None:
    """Write a recipe with all its values, defaults too, so that `read` gives it back. The file is whole or not there."""
    import yaml

    write_whole(path, yaml.safe_dump(asdict(recipe), sort_keys=False))


def differences(one: Any, other: Any) -> list[str]:
    """The keys in which two recipes differ."""
    flat_one, flat_other = _flat(asdict(one)), _flat(asdict(other))
    return sorted(k for k in flat_one.keys() | flat_other.keys() if flat_one.get(k) != flat_other.get(k))


def _parsed(text: str, where: str) -> Any:
    """YAML, more strictly: 1e-3 is a number, as in YAML 1.2; 2:4 and 1:20:30 are text, and not numbers to the base of 60; no key
    comes twice, and there are no aliases.

    Raises `ValueError` that begins with `where` for what is none.
    """
    import yaml
    from yaml.composer import ComposerError

    class Loader(yaml.SafeLoader):
        def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
            tag = super().resolve(kind, value, implicit)
            if kind is yaml.ScalarNode and ":" in value and tag in ("tag:yaml.org,2002:int", _FLOAT_TAG):
                return self.DEFAULT_SCALAR_TAG
            return _FLOAT_TAG if kind is yaml.ScalarNode and implicit[0] and _EXPONENTIAL.fullmatch(value) else tag

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ComposerError(None, None, "a recipe has no aliases", self.peek_event().start_mark)
            return super().compose_node(parent, index)

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            twice = [key for key, count in keys.items() if count > 1]
            if twice:
                raise ComposerError(None, None, f"the key {twice[0]} comes twice", node.start_mark)
            return node

    try:
        return yaml.load(text, Loader)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply to be a recipe") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: the thirteenth month, a number of ten thousand digits
        raise ValueError(f"{where} is no YAML: {' '.join(str(error).split())}") from error


_FLOAT_TAG = "tag:yaml.org,2002:float"
_EXPONENTIAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def _put(content: dict[str, Any], keys: list[str], value: Any) -> None:
    *parents, last = keys
    for key in parents:
        inner = content.get(key)
        content[key] = content = inner if isinstance(inner, dict) else {}
    content[last] = value


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict) or not content:
        return {prefix: content}
    parts = (_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in content.items())
    return {key: value for part in parts for key, value in part.items()}


def _build(kind: type[T], content: Any, prefix: str) -> T:
    """A dataclass from a mapping, recursively."""
    require(
        isinstance(content, Mapping), f"{prefix.rstrip('.') or 'the recipe'}: must be a mapping, got {_shown(content)}"
    )
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    for key in content:
        require(key in known, f"{prefix}{_shown(key, str)}: unknown key; there are {', '.join(known)}")
    for name, f in known.items():
        needed = f.default is MISSING and f.default_factory is MISSING
        require(not needed or name in content, f"{prefix}{name}: missing")
    hints = typing.get_type_hints(kind)
    return kind(**{key: _value(hints[key], value, f"{prefix}{key}") for key, value in content.items()})


def _value(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint`, or an error that names the key."""
    if isinstance(hint, types.UnionType):  # X | None
        return None if value is None else _value(typing.get_args(hint)[0], value, key)
    if is_dataclass(hint):
        return _build(hint, value, f"{key}.")  # type: ignore[arg-type]
    if typing.get_origin(hint) is list:
        require(isinstance(value, list), f"{key}: must be a list, got {_shown(value)}")
        return [_value(typing.get_args(hint)[0], item, key) for item in value]
    if typing.get_origin(hint) is dict:
        require(isinstance(value, dict), f"{key}: must be a mapping, got {_shown(value)}")
        return dict(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    require(hint not in (int, float) or is_number, f"{key}: must be a number, got {_shown(value)}")
    if is_number:
        require(abs(value) < 2**63, f"{key}: must be a finite number below 2^63, got {_shown(value)}")  # not NaN either
        if hint is float:
            value = float(value)
        elif hint is int and value == int(value):  # 1e6 is a whole number
            value = int(value)
    require(type(value) is hint, f"{key}: must be {_NAMES[hint]}, got {_shown(value)}")
    return value


_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _shown(value: Any, text: Callable[[Any], str] = repr) -> str:
    """A wrong value as it stands in a message: on one line, and not at full length."""
    found = " ".join(text(value).split())
    return found if len(found) <= _SHOWN else found[:_SHOWN] + " ..."


def _one_of(key: str, value: str, choices: Sequence[str]) -> None:
    require(value in choices, f"{key}: must be one of {', '.join(choices)}; got {_shown(value)}")

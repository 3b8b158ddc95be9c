"""The model under test: loaded once, measured switched to Sparse Feature Attention, dense, or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..basis import default_kind
from ..budget import DENSE, query_features
from ..checks import named_device, require
from ..huggingface import calibrate, disable, enable
from ..huggingface.structure import default_shared_kind, most_positions, require_whole
from ..huggingface.switch import attention_shape
from ..models import BUNDLED_NAME, is_converted, load_model
from ..presets import default_budget, require_key_bytes, require_one_way, require_width
from .text import calibration_windows

Progress = Callable[[str, int], Callable[[], None]]  # (description, steps) -> call once a step

SWITCH_OPTIONS = (
    "key_bytes",
    "topk",
    "topk_query",
    "dense_dims",
    "basis",
    "max_position",
    "calibrate",
    "cache_dtype",
    "recent",
    "first",
    "prefill",
)

_USUAL_TOKENS = 2048
_CALIBRATION_LENGTH, _CALIBRATION_WINDOWS = 768, 10


@dataclass(frozen=True)
class SubjectSettings:
    """Which model, and how it is measured. Fields as the options of `flashsfa eval`; see its help.

    Those in `SWITCH_OPTIONS` say how a dense model is switched: without `key_bytes` or `topk`, all of them must be None.

    Attributes:
        key_bytes, topk: one of them, as in `flashsfa convert`; None for both leaves a dense model as it is.
        topk_query: a number, or "dense", which is also what None stands for.
        dense_dims: None for that of `default_budget`.
        basis: None for "dictionary" with dense queries and "balanced" with sparse ones, and with key_bytes for `default_shared_kind`'s.
        max_position: None for the longest context that is measured.
        calibrate: the text to calibrate on, for the record; None for `read_text`'s own.
        cache_dtype: as `enable`'s.
        recent, first, prefill: as `enable`'s; None for 0, 0 and "coded".
        tokenizer: directory or hub name; None for the model's own.
    """

    model: str | None = None
    dense: bool = False
    key_bytes: int | None = None
    topk: int | None = None
    topk_query: int | str | None = None
    dense_dims: int | None = None
    basis: str | None = None
    max_position: int | None = None
    calibrate: str | None = None
    cache_dtype: str | None = None
    recent: int | None = None
    first: int | None = None
    prefill: str | None = None
    dtype: str = "bfloat16"
    device: str = "auto"
    tokenizer: str | None = None


class Subject:
    """A model and its tokenizer, and the variants of it that are to be measured.

    Raises `ValueError` if there is no such model or it cannot be switched as asked.

    Attributes:
        settings: as given.
        switched: the settings of the switch once it is made, with its calibration if that was made here; None for a model
            that stays dense.
    """

    def __init__(self, settings: SubjectSettings) -> None:
        self.settings = settings
        self._device = named_device(settings.device)
        self.name = settings.model or BUNDLED_NAME
        self.switched: dict[str, Any] | None = None
        converted = is_converted(settings.model)
        given = [f"--{name.replace('_', '-')}" for name in SWITCH_OPTIONS if getattr(settings, name) is not None]
        require(
            not (converted and given),
            f"{self.name} is converted already and brings its settings along; leave out {', '.join(given)}",
        )
        self._switches = settings.topk is not None or settings.key_bytes is not None
        require(
            not given or self._switches,
            f"without --key-bytes or --topk {self.name} stays dense; leave out {', '.join(given)}, or give one of them to switch it",
        )
        require(
            converted or self._switches or settings.dense,
            f"{self.name} is no converted model's directory: give --key-bytes or --topk to switch a dense model, --dense to measure it "
            "as it is, or both",
        )
        require_one_way(settings.key_bytes, settings.topk, settings.topk_query, settings.dense_dims, settings.basis)
        dtype = getattr(torch, settings.dtype)
        self.model, self.tokenizer = load_model(settings.model, dtype, settings.tokenizer)
        self.model.to(self._device)
        if converted:
            self.switched = self.model.config.sfa
        elif self._switches:  # what does not fit is refused before any long work
            require_whole(self.model)
            *_, head_dim = attention_shape(self.model)
            require_width(f"--cache-dtype {settings.cache_dtype}", settings.cache_dtype, head_dim)
            require_key_bytes(settings.key_bytes, head_dim)
            if settings.topk is not None:
                enable(self.model, **self._options())
                disable(self.model)

    @property
    def usual_length(self) -> int:
        """Tokens of a context where nothing says how long it will be: 2048, or the model's positions if fewer."""
        return min(_USUAL_TOKENS, self._limit or _USUAL_TOKENS)

    def fitting(self, lengths: Sequence[int]) -> list[int]:
        """Of `lengths` those that the model has positions for, or all its positions."""
        limit = self._limit
        return [n for n in lengths if limit is None or n <= limit] or [limit or min(lengths)]

    def require_length(self, longest: int, option: str) -> None:
        """Raise `ValueError` unless the model has positions for the `longest` tokens of an `option`, and `max_position` covers them."""
        limit = self._limit
        require(
            limit is None or longest <= limit,
            f"{self.name} has {limit} positions, fewer than the {longest} tokens of {option}: give fewer",
        )
        furthest = self.settings.max_position
        require(
            furthest is None or (longest <= furthest and (limit is None or furthest <= limit)),
            f"--max-position must be at least the {longest} tokens measured"
            f"{'' if limit is None else f' and at most the model’s {limit}'}, got {furthest}",
        )

    def calibration_windows(self, text: str, longest: int) -> Tensor | None:
        """[S, W] token ids to calibrate on; None for a model that is not calibrated here."""
        if not self._switches:
            return None
        return calibration_windows(
            self.tokenizer, text, length=min(_CALIBRATION_LENGTH, longest), least=_CALIBRATION_WINDOWS
        )

    def variants(self, calibration: Tensor | None, longest: int, progress: Progress) -> Iterator[str]:
        """The names of the variants, "sfa" and "dense"; when a name comes, `model` is that variant.

        Args:
            calibration: from `calibration_windows`.
            longest: tokens of the longest context that will be measured.
        """
        if calibration is not None:
            options, furthest = self._options(), self.settings.max_position or longest
            fit: dict[str, Any]
            if self.settings.topk is None:
                kind, fit = default_shared_kind(self.model), {"key_bytes": self.settings.key_bytes}
            else:
                kind = default_kind(options["topk_query"], attention_shape(self.model)[2])
                fit = {"topk": options["topk"], "dense_dims": options["dense_dims"]}
            kind = self.settings.basis or kind
            bar = progress("calibrating", len(calibration))
            basis = calibrate(self.model, calibration, kind=kind, max_position=furthest, progress=bar, **fit)
            enable(self.model, basis=basis, **options)
            calibrated = {"basis": kind, "max_position": furthest, "calibrate": self.settings.calibrate}
            self.switched = self.model.config.sfa | calibrated
        if self.switched is not None:
            yield "sfa"
        if self.settings.dense:
            disable(self.model)
            yield "dense"

    @property
    def _limit(self) -> int | None:
        return most_positions(self.model)

    def _options(self) -> dict[str, Any]:
        """`enable`'s, the basis apart."""
        settings = self.settings
        *_, head_dim = attention_shape(self.model)
        options: dict[str, Any] = {
            "cache_dtype": settings.cache_dtype, "recent": settings.recent or 0, "first": settings.first or 0,
            "prefill": settings.prefill or "coded",
        }  # fmt: skip
        if settings.topk is None:
            return options
        dense_dims = default_budget(head_dim).dense_dims if settings.dense_dims is None else settings.dense_dims
        queries = query_features(settings.topk_query or DENSE, head_dim)
        return {"topk": settings.topk, "topk_query": queries, "dense_dims": dense_dims, **options}

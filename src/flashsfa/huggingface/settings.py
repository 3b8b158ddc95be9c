"""`SFASettings`: how a model was switched, as it stands in its config.json."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from ..budget import DENSE, FeatureBudget
from ..checks import MOST_TOKENS, require, require_bool, require_choice, require_int, require_tolerance
from ..formats import cache_bits

# In a folder, for some programs load every *.safetensors file beside config.json as weights.
BASIS_FILE = "sfa/basis.safetensors"


@dataclass(frozen=True)
class SFASettings:
    """What `enable` was told; stored as `config.sfa` and so in config.json. Fields as `enable`'s arguments, and whether
    a basis belongs to them, which a saved model keeps in `BASIS_FILE`. `topk` is None where that basis says how keys are kept.

    Raises `TypeError` or `ValueError` for a field that is none; whether the budgets fit a model is for `enable` to say.
    """

    topk: int | None
    topk_query: int | str | None = None
    dense_dims: int = 0
    layers: list[int] | None = None
    value_tolerance: float = 0.0
    has_basis: bool = False
    positions: str | None = None
    cache_dtype: str | None = None
    query_pattern: str | None = None
    recent: int = 0
    first: int = 0
    prefill: str = "coded"

    def __post_init__(self) -> None:
        if self.topk is None:
            self._check_axes()
        else:
            require_int("topk", self.topk, 1)
        if self.topk_query not in (None, DENSE):
            require_int("topk_query", self.topk_query, 1)
        require_int("dense_dims", self.dense_dims, 0)
        if self.layers is not None:
            require_layers(self.layers)
            require(
                0 < len(self.layers) == len(set(self.layers)),
                f"layers must name each layer to switch once, got {self.layers}; leave it None for all",
            )
        require_tolerance(self.value_tolerance)
        require_bool("has_basis", self.has_basis)
        require_choice("positions", self.positions, ("channel", None))
        cache_bits(self.cache_dtype)
        require_choice("query_pattern", self.query_pattern, ("2:4", None))
        require_int("recent", self.recent, 0, MOST_TOKENS)
        require_int("first", self.first, 0, MOST_TOKENS)
        require_choice("prefill", self.prefill, ("coded", "dense"))

    @classmethod
    def from_config(cls, stored: Any) -> SFASettings:
        """The settings that stand under "sfa" in a config.json. Raises `ValueError` if they are none."""
        try:
            require(isinstance(stored, dict), f"they must be an object with a topk, got {_shown(stored)}")
            unknown = sorted(set(stored) - {field.name for field in fields(cls)})
            require(not unknown, f"this version knows no {', '.join(map(str, unknown))}")
            missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in stored]
            require(not missing, f"{', '.join(missing)} is missing")
            return cls(**stored)
        except (TypeError, ValueError) as error:
            raise ValueError(f'the settings "sfa" in config.json are not those of a switched model: {error}') from error

    def budget(self, head_dim: int) -> FeatureBudget:
        """The budget of a head. Raises `ValueError` if it does not fit."""
        return FeatureBudget.of(
            head_dim,
            head_dim if self.topk is None else self.topk,
            topk_query=self.topk_query,
            dense_dims=self.dense_dims,
            query_pattern=self.query_pattern,
        )

    def _check_axes(self) -> None:
        """Keys in the bits of their axes have every feature, and so have the queries."""
        require(self.has_basis, "without topk a basis says how keys are kept: calibrate with key_bytes, or give topk")
        others = {
            "topk_query": self.topk_query not in (None, DENSE), "dense_dims": bool(self.dense_dims),
            "query_pattern": self.query_pattern is not None, "positions": self.positions is not None,
        }  # fmt: skip
        given = [name for name, is_given in others.items() if is_given]
        require(not given, lambda: f"{', '.join(given)} goes with topk: a basis with bits per axis has neither")

    @property
    def rounds(self) -> bool:
        """Whether dynamic caches hold keys or values in fewer bits than they come in."""
        return self.cache_dtype is not None or self.topk is None

    @property
    def shows_exact(self) -> bool:
        """Whether queries see keys or values that are not as dynamic caches hold coded ones."""
        return bool(self.recent or self.first or self.prefill == "dense")

    def arguments(self) -> dict[str, Any]:
        """What `enable` takes for them, the basis apart."""
        return {name: value for name, value in asdict(self).items() if name != "has_basis"}


def require_layers(layers: Any) -> None:
    """`layers` are indices of layers."""
    if not isinstance(layers, (list, tuple, range, set)):
        raise TypeError(f"layers must be a list of layer indices or None for all, got {layers!r}")
    for index in layers:
        require_int("layers must hold indices: each", index, 0)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 40 else f"a {type(value).__name__}"

"""Budgets of keys to begin with, by head size, for models that are converted without training.

They were measured at head size 64 (SmolLM2-135M, dense queries, dictionary basis: docs/results.md, "Converted models"). Other
head sizes get the same shares of their features, which has not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from .checks import require
from .formats import CodeFormat

MEASURED_HEAD_DIM = 64


@dataclass(frozen=True)
class Preset:
    """A budget of keys.

    Attributes:
        dense_dims, topk: as in `sparse_feature_attention`.
        loss: perplexity against dense, less 1, at head size 64 with a cache of 16 bits.
    """

    dense_dims: int
    topk: int
    loss: float

    @property
    def key_bytes(self) -> int:
        """Bytes of a key in 16 bits."""
        return 2 * self.dense_dims + 3 * self.topk

    def scaled(self, head_dim: int) -> Preset:
        """The same shares of `head_dim` features, at least one of each kind where there is room."""
        topk = max(1, round(self.topk * head_dim / MEASURED_HEAD_DIM))
        dense_dims = min(head_dim - topk, round(self.dense_dims * head_dim / MEASURED_HEAD_DIM))
        return Preset(max(0, dense_dims), min(topk, head_dim), self.loss)


_DEFAULT = Preset(22, 12, 0.043)
_PRESETS = (Preset(16, 8, 0.218), Preset(24, 8, 0.082), _DEFAULT, Preset(32, 8, 0.026), Preset(28, 12, 0.019))


def default_budget(head_dim: int) -> Preset:
    """What `flashsfa convert` takes where no budget is asked for: 22 dense features and 12 others of 64, and so in proportion."""
    return _DEFAULT.scaled(head_dim)


def require_one_way(
    key_bytes: int | None, topk: int | None, topk_query: int | str | None, dense_dims: int | None, basis: str | None
) -> None:
    """Raise `ValueError` unless options of a command say in one way what a key keeps: by its bytes, or by `topk` and what goes with
    it."""
    require(
        topk is None or key_bytes is None,
        "--topk and --key-bytes are two ways to say what a key keeps: give one of them",
    )
    others = {"topk_query": topk_query, "dense_dims": dense_dims, "basis": basis}
    given = [f"--{name.replace('_', '-')}" for name, value in others.items() if value is not None]
    require(
        topk is not None or not given, f"{', '.join(given)} goes with --topk: without it keys are kept in bits per axis"
    )


def default_key_bytes(head_dim: int) -> int:
    """Bytes of a key in bits per axis where nothing is asked for: those of a dense key in 4 bits, with its scale and centre."""
    return min(head_dim, head_dim // 2 + 4)


def largest_budget(head_dim: int, key_bytes: int, form: CodeFormat) -> tuple[int, int] | None:
    """dense_dims and topk, in the shares of `default_budget`, of the largest key code that `form` holds in `key_bytes`; None for no
    code."""
    for dense_dims in range(head_dim - 1, -1, -1):
        topk = max(1, round(dense_dims * _DEFAULT.topk / _DEFAULT.dense_dims))
        if dense_dims + topk < head_dim and form.key_bytes(head_dim, dense_dims, topk) <= key_bytes:
            return dense_dims, topk
    return None


def larger_budgets(dense_dims: int, topk: int, head_dim: int) -> list[Preset]:
    """The presets for `head_dim` whose keys take more bytes than those of the given budget, the smallest first."""
    own = Preset(dense_dims, topk, 0.0).key_bytes
    return sorted(
        (p for p in (preset.scaled(head_dim) for preset in _PRESETS) if p.key_bytes > own), key=lambda p: p.key_bytes
    )

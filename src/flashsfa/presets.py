"""Settings to begin with, for models that are converted without training: presets by name, and budgets of keys by head size.

They were measured at head size 64 (SmolLM2-135M and its instructed twin, dense queries: docs/results.md, "Converted models",
"Caches of few bits" and "Values in 3 bits"). Bytes of keys lie on a line through those of heads of 64 and 128, of which
`small` was measured at both; budgets of other head sizes are the same shares of their features, which has not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from .basis import SHARED
from .checks import require
from .formats import ROTATED_BITS, ROTATION_WIDTH, CodeFormat, cache_bits

MEASURED_HEAD_DIM = 64
DEFAULT_CACHE_DTYPE = "int4"  # of `flashsfa convert`, where nothing is said


@dataclass(frozen=True)
class Preset:
    """A way to keep the cache, by name. Sizes are those of a head of 64.

    Attributes:
        purpose: when to take it, in words.
        token_bytes: of a coded key and its value, per token and kv head, where a dense one has 256 in 16 bits.
        loss: what it cost SmolLM2-135M, in words: perplexity against dense.
        cache_dtype, recent, first, prefill: as `enable`'s.
        key_bytes: of a key in bits per axis, at heads of 64 and of 128; None for whole keys, in the bits of features.
    """

    purpose: str
    token_bytes: int
    loss: str
    cache_dtype: str
    recent: int = 32
    first: int = 4
    prefill: str = "dense"
    key_bytes: tuple[int, int] | None = None

    def key_bytes_of(self, head_dim: int) -> int | None:
        """`key_bytes` for any head: on the line through both, and at most a byte for each feature."""
        if self.key_bytes is None:
            return None
        narrow, wide = self.key_bytes
        return max(1, min(head_dim, round(narrow + (wide - narrow) * (head_dim / MEASURED_HEAD_DIM - 1))))


PRESETS = {
    "near-lossless": Preset("where nothing may be lost", 120, "under 0.1 %", "d8s8v8", key_bytes=(52, 104)),
    "half": Preset(
        "half of the bytes without calibration, and what vLLM serves", 136, "some 0.1 %", "d8s8v8", recent=0, first=0, prefill="coded"
    ),
    "balanced": Preset(
        "what is taken where nothing is said", 72, "+0.3 to +0.4 %", "int4", key_bytes=(36, 68)
    ),
    "small": Preset("where memory counts most", 60, "+0.4 to +0.7 %, over contexts of 8k +0.6 %", "d8s4v3", key_bytes=(32, 48)),
}  # fmt: skip


@dataclass(frozen=True)
class Shares:
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

    def scaled(self, head_dim: int) -> Shares:
        """The same shares of `head_dim` features, at least one of each kind where there is room."""
        topk = max(1, round(self.topk * head_dim / MEASURED_HEAD_DIM))
        dense_dims = min(head_dim - topk, round(self.dense_dims * head_dim / MEASURED_HEAD_DIM))
        return Shares(max(0, dense_dims), min(topk, head_dim), self.loss)


_DEFAULT = Shares(22, 12, 0.043)
_BUDGETS = (Shares(16, 8, 0.218), Shares(24, 8, 0.082), _DEFAULT, Shares(32, 8, 0.026), Shares(28, 12, 0.019))


def default_budget(head_dim: int) -> Shares:
    """What `flashsfa convert` takes where no budget is asked for: 22 dense features and 12 others of 64, and so in proportion."""
    return _DEFAULT.scaled(head_dim)


def require_one_way(
    key_bytes: int | None, topk: int | None, topk_query: int | str | None, dense_dims: int | None, basis: str | None
) -> None:
    """Raise `ValueError` unless options of a command say in one way what a key keeps: by its bytes, and of `SHARED` the basis that they are
    shared out in, or by `topk` and what goes with it."""
    require(
        topk is None or key_bytes is None,
        "--topk and --key-bytes are two ways to say what a key keeps: give one of them",
    )
    others = {"topk_query": topk_query, "dense_dims": dense_dims, "basis": basis if key_bytes is None else None}
    given = [f"--{name.replace('_', '-')}" for name, value in others.items() if value is not None]
    require(
        topk is not None or not given,
        f"{', '.join(given)} goes with --topk: without it keys are kept in bits per axis"
        + (", in a basis that --key-bytes must stand beside" if "--basis" in given else ""),
    )
    require(
        key_bytes is None or basis in (None, *SHARED),
        f"--basis must be {' or '.join(SHARED)} with --key-bytes, got {basis}: in others the bits of an axis say little of its scores",
    )


def require_key_bytes(key_bytes: int | None, head_dim: int) -> None:
    """Raise `ValueError` if a key of `head_dim` features cannot be kept in so many bytes; None fits."""
    require(
        key_bytes is None or 1 <= key_bytes <= head_dim,
        f"--key-bytes must be 1 to the model's head size, {head_dim}, got {key_bytes}",
    )


def require_width(said: str, cache_dtype: str | None, head_dim: int) -> None:
    """Raise `ValueError` if an option that was `said` keeps values in 4 or 3 bits, and `head_dim` is no width for these."""
    bits = cache_bits(cache_dtype)
    v_bits = bits.v_bits if isinstance(bits, CodeFormat) else 16
    require(
        v_bits not in ROTATED_BITS or head_dim % ROTATION_WIDTH == 0,
        f"{said} keeps values in {v_bits} bits, which goes with head sizes that are a multiple of {ROTATION_WIDTH}; the model's is "
        f"{head_dim}: take --cache-dtype int8 in its place",
    )


def default_key_bytes(head_dim: int) -> int:
    """Bytes of a key in bits per axis where nothing is asked for: those of a dense key in 4 bits, with its scale and centre."""
    return min(head_dim, head_dim // 2 + 4)


def largest_budget(head_dim: int, key_bytes: int, form: CodeFormat) -> tuple[int, int] | None:
    """dense_dims and topk, in the shares of `default_budget`, of the largest key code that `form` holds in `key_bytes`; None for no
    code."""
    for dense_dims in range(head_dim - 1, 0, -1):
        topk = max(1, round(dense_dims * _DEFAULT.topk / _DEFAULT.dense_dims))
        if dense_dims + topk < head_dim and form.key_bytes(head_dim, dense_dims, topk) <= key_bytes:
            return dense_dims, topk
    return None


def larger_budgets(dense_dims: int, topk: int, head_dim: int) -> list[Shares]:
    """The budgets for `head_dim` whose keys take more bytes than those of the given budget, the smallest first."""
    own = Shares(dense_dims, topk, 0.0).key_bytes
    return sorted(
        (p for p in (shares.scaled(head_dim) for shares in _BUDGETS) if p.key_bytes > own), key=lambda p: p.key_bytes
    )

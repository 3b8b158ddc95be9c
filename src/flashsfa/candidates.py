"""Ways to keep the cache of a model that `flashsfa convert` measures: how the model is switched, and what a token then takes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .basis import default_kind
from .budget import DENSE, query_features
from .checks import require_int
from .formats import ROTATION_WIDTH, CodeFormat, cache_bits
from .presets import DEFAULT_CACHE_DTYPE, Preset, default_budget, default_key_bytes, largest_budget

# Of the ladder: sixteenths of the head size that are bytes of a key, beside values in so many bits. In few bytes larger keys beside values
# of 3 bits lose less (docs/results.md, "Values in 3 bits").
_LADDER = ((6, 3), (7, 3), (8, 3), (9, 3), (8, 4), (9, 4), (11, 4), (10, 8), (13, 8))
_MOST_STEPS = 4  # of the ladder, beside candidates that are made for a budget of bytes
_FEWEST = 3 / 16  # of the head size: below so many bytes of a key nothing is worth a measurement


@dataclass(frozen=True)
class Candidate:
    """A way to keep the cache.

    Attributes:
        label: as people read it.
        options: `enable`'s, the basis apart; None for the dense model.
        fit: `FeatureBasis.from_layers`'; None for no basis. Its kind may be None until `of_kind` gives that of the model.
        may_win: whether it may be chosen; others are measured to compare with.
        token_bytes: of a coded key and its value, per token and kv head, where they follow from the widths alone.
    """

    label: str
    options: dict[str, Any] | None = None
    fit: dict[str, Any] | None = None
    may_win: bool = False
    token_bytes: int | None = None

    def of_kind(self, kind: str) -> Candidate:
        """The same with the basis `kind`, where it has one and none was named."""
        return self if self.fit is None or self.fit["kind"] else replace(self, fit=self.fit | {"kind": kind})


Candidates = dict[str, Candidate]  # by name


@dataclass(frozen=True)
class Exact:
    """What caches keep as it comes: `enable`'s arguments of these names."""

    recent: int = 32
    first: int = 4
    prefill: str = "dense"

    def options(self) -> dict[str, Any]:
        return {"recent": self.recent, "first": self.first, "prefill": self.prefill}


def rivals(head_dim: int, exact: Exact = Exact(), *, may_win: bool = False) -> Candidates:
    """The dense model, and its keys and values in 8 and in 4 bits."""
    found = {"dense": Candidate("dense")}
    for form in (CodeFormat(8, 8, v_bits=8), CodeFormat()):
        if form.v_bits == 8 or head_dim % ROTATION_WIDTH == 0:
            found[f"dense_int{form.v_bits}"] = _whole(head_dim, form, exact, may_win=may_win)
    return found


def by_topk(
    head_dim: int, topk: int, dense_dims: int | None, topk_query: int | str | None, basis: str | None,
    cache_dtype: str | None, exact: Exact,
) -> Candidates:  # fmt: skip
    """What was asked for by its features, beside the rivals. None as in `flashsfa convert`."""
    dense_dims = default_budget(head_dim).dense_dims if dense_dims is None else dense_dims
    queries = query_features(topk_query or DENSE, head_dim)
    kind = basis or default_kind(queries, head_dim)
    kept = "16 bits" if cache_dtype is None else cache_dtype
    asked = _features(dense_dims, topk, queries, kind, kept, {**exact.options(), "cache_dtype": cache_dtype})
    return rivals(head_dim, exact) | {"topk": asked}


def by_bytes(
    head_dim: int, key_bytes: int | None, cache_dtype: str | None, exact: Exact, basis: str | None = None
) -> Candidates:
    """Two candidates of `key_bytes` beside the rivals and the code that was the default before; with a `basis` to share them out in,
    that one alone. None stands for `default_key_bytes`; the dense model in as many bytes, 4 bits, may win then."""
    if basis is not None:
        assert key_bytes is not None
        return rivals(head_dim, exact) | {"axes": _axes(head_dim, key_bytes, cache_dtype, exact, basis)}
    found, usual = rivals(head_dim, exact), default_budget(head_dim)
    found["topk_16"] = _features(
        usual.dense_dims, usual.topk, head_dim, "dictionary", "16 bits, nothing exact", {}, may_win=False
    )
    if key_bytes is None:
        key_bytes = default_key_bytes(head_dim)
        if cache_dtype == DEFAULT_CACHE_DTYPE:  # as many bytes
            found["dense_int4"] = _whole(head_dim, CodeFormat(), exact, may_win=True)
    if (code := _largest_code(head_dim, key_bytes, cache_dtype, exact)) is not None:
        found["topk"] = code
    found["axes"] = _axes(head_dim, key_bytes, cache_dtype, exact)
    return found


def by_preset(head_dim: int, preset: Preset) -> Candidates:
    """The preset beside the dense model alone."""
    exact, key_bytes = Exact(preset.recent, preset.first, preset.prefill), preset.key_bytes_of(head_dim)
    dense = {"dense": Candidate("dense")}
    if key_bytes is None:
        form = _form(preset.cache_dtype)
        return dense | {f"dense_int{form.v_bits}": _whole(head_dim, form, exact, may_win=True)}
    return dense | {"axes": _axes(head_dim, key_bytes, preset.cache_dtype, exact)}


def ladder(head_dim: int, most_bytes: float | None, exact: Exact) -> Candidates:
    """From few bytes to many: bits per axis with values of 3, 4 and 8 bits, codes of few bits, and the dense model's own in fewer bits.

    Args:
        most_bytes: per token and kv head. Some candidates are then made to fill them, beside the largest of the others that fit.
    """
    is_rotated = head_dim % ROTATION_WIDTH == 0
    widths = [
        (max(1, round(sixteenths * head_dim / 16)), v_bits)
        for sixteenths, v_bits in _LADDER
        if v_bits == 8 or is_rotated
    ]
    form, most_key = CodeFormat(v_bits=4 if is_rotated else 8), default_key_bytes(head_dim)
    if most_bytes is not None:
        widths = [(keys, v_bits) for keys, v_bits in widths if keys + _v_bytes(head_dim, v_bits) <= most_bytes]
        widths = sorted(widths, key=lambda width: width[0] + _v_bytes(head_dim, width[1]))[-_MOST_STEPS:]
        for v_bits in (8, 4, 3) if is_rotated else (8,):
            keys = min(head_dim, int(most_bytes) - _v_bytes(head_dim, v_bits))
            if keys >= max(1, _FEWEST * head_dim):
                widths.append((keys, v_bits))
                if v_bits == form.v_bits:
                    most_key = keys
    found = rivals(head_dim, exact, may_win=True)
    if (code := _largest_code(head_dim, most_key, form.name, exact)) is not None:
        found["topk"] = code
    for keys, v_bits in sorted(set(widths)):
        found[f"axes_{keys}_v{v_bits}"] = _axes(
            head_dim, keys, CodeFormat(8, 8 if v_bits == 8 else 4, v_bits=v_bits).name, exact
        )
    if most_bytes is None:
        return found
    return {  # rivals of more bytes are beside all the same
        name: x if x.token_bytes is None or x.token_bytes <= most_bytes else replace(x, may_win=False)
        for name, x in found.items()
        if name.startswith("dense") or x.token_bytes is None or x.token_bytes <= most_bytes
    }


def _largest_code(head_dim: int, key_bytes: int, cache_dtype: str | None, exact: Exact) -> Candidate | None:
    """The largest code of features in the widths of `cache_dtype` that `key_bytes` hold; None for none."""
    require_int("key_bytes", key_bytes, 1, head_dim)
    form = _form(cache_dtype)
    fitting = largest_budget(head_dim, key_bytes, form)
    if fitting is None:
        return None
    options = {**exact.options(), "cache_dtype": cache_dtype}
    nbytes = None if cache_dtype is None else form.key_bytes(head_dim, *fitting) + form.v_bytes(head_dim)
    return _features(*fitting, head_dim, "dictionary", f"values {form.v_bits} bits", options, token_bytes=nbytes)


def _whole(head_dim: int, form: CodeFormat, exact: Exact, *, may_win: bool) -> Candidate:
    """Keys and values of the dense model in fewer bits."""
    options = {"topk": head_dim, "dense_dims": 0, "topk_query": DENSE, "cache_dtype": form.name, **exact.options()}
    nbytes = form.key_bytes(head_dim, 0, head_dim) + form.v_bytes(head_dim)
    return Candidate(f"dense, int{form.v_bits}", options, None, may_win, nbytes)


def _axes(head_dim: int, key_bytes: int, cache_dtype: str | None, exact: Exact, kind: str | None = None) -> Candidate:
    require_int("key_bytes", key_bytes, 1, head_dim)
    form = _form(cache_dtype)
    form.require_v_dim(head_dim)
    nbytes = None if cache_dtype is None else key_bytes + form.v_bytes(head_dim)
    label = f"bits per axis, {key_bytes} bytes a key, values {form.v_bits} bits" + (f", {kind}" if kind else "")
    options = {**exact.options(), "cache_dtype": cache_dtype}
    return Candidate(label, options, {"kind": kind, "key_bytes": key_bytes}, True, nbytes)


def _features(
    dense_dims: int, topk: int, queries: int, kind: str, kept: str, options: dict[str, Any], *,
    may_win: bool = True, token_bytes: int | None = None,
) -> Candidate:  # fmt: skip
    return Candidate(
        f"{dense_dims} dense + top-{topk}, {kept}",
        {"topk": topk, "dense_dims": dense_dims, "topk_query": queries, **options},
        {"kind": kind, "topk": topk, "dense_dims": dense_dims},
        may_win,
        token_bytes,
    )


def _form(cache_dtype: str | None) -> CodeFormat:
    """The widths that `enable` takes for a `cache_dtype`; the one scale of an "int8" key takes as much as two here."""
    bits = cache_bits(cache_dtype)
    if isinstance(bits, CodeFormat):
        return bits
    width = 16 if bits is None else 8
    return CodeFormat(width, width, "uint8", width)


def _v_bytes(head_dim: int, v_bits: int) -> int:
    return CodeFormat(v_bits=v_bits).v_bytes(head_dim)

"""What ways to keep a model's cache take and multiply at a context, by formula: the tables of `flashsfa info`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .axes import AxisBits
from .budget import DENSE, query_features
from .candidates import Candidate, by_preset, rivals
from .coder import Coder
from .formats import cache_bits
from .huggingface.description import LayerKind, ModelDescription
from .huggingface.settings import SFASettings
from .presets import PRESETS, Preset


@dataclass(frozen=True)
class Way:
    """A way to keep the cache of a model.

    Attributes:
        label: as people read it.
        coder: of the switched layers; None for a dense cache.
        exact: tokens that they keep as they come.
        queries: features of a query that meet coded keys.
        layers: the switched ones; None for all with attention.
        prefill: as `enable`'s: "dense" for prompts that attend to their own keys as they come.
    """

    label: str
    coder: Coder | None = None
    exact: int = 0
    queries: int = 0
    layers: tuple[int, ...] | None = None
    prefill: str = "coded"

    def layer_bytes(self, model: ModelDescription, kind: LayerKind) -> int:
        """Of one more token in a switched layer of a kind."""
        assert kind.token_bytes is not None
        if self.coder is None or model.shape is None or not kind.token_bytes:
            return kind.token_bytes
        _, kv_heads, head_dim = model.shape
        token = torch.zeros(1, kv_heads, 1, head_dim, dtype=model.dtype)
        return self.coder.encode(token, token).nbytes

    def token_bytes(self, model: ModelDescription) -> int:
        """Of one more token in all layers, while no window is full."""
        return sum(self._per_kind(kind, self.layer_bytes(model, kind), kind.token_bytes or 0) for kind in model.kinds)

    def cache_bytes(self, model: ModelDescription, context: int) -> int:
        """Of a cache of `context` tokens."""

        def held(kind: LayerKind) -> int:
            tokens, dense = kind.held(context), kind.token_bytes or 0
            exact = min(self.exact, tokens)
            return self._per_kind(
                kind, exact * dense + (tokens - exact) * self.layer_bytes(model, kind), tokens * dense
            )

        return sum(held(kind) for kind in model.kinds)

    def multiplications(self, model: ModelDescription, context: int, *, is_prompt: bool) -> int:
        """Of the attention of all layers: of a prompt of `context` tokens, or of the one that comes after as many."""
        assert model.shape is not None
        heads, _, head_dim = model.shape

        def of(kind: LayerKind) -> int:
            pairs = kind.pairs(context) if is_prompt else kind.held(context)
            coded = pairs if is_prompt else max(0, pairs - self.exact)
            if self.coder is None or not kind.width or (is_prompt and self.prefill == "dense"):
                coded = 0
            saved = coded * (head_dim - self._score_width(head_dim)) if coded else 0
            return self._per_kind(kind, heads * (pairs * kind.width - saved), heads * pairs * kind.width)

        return sum(of(kind) for kind in model.kinds)

    def _per_kind(self, kind: LayerKind, switched: int, dense: int) -> int:
        count = sum(self.layers is None or layer in self.layers for layer in kind.layers)
        return count * switched + (len(kind.layers) - count) * dense

    def _score_width(self, head_dim: int) -> int:
        """Products of a query and a coded key: of the dense channel, and of what both keep of the rest where it is spread evenly."""
        assert self.coder is not None
        if self.coder.topk is None or self.coder.topk == head_dim:
            return head_dim
        sparse_dims = head_dim - self.coder.dense_dims
        shared = self.coder.topk * (min(self.queries, sparse_dims) / sparse_dims)
        return self.coder.dense_dims + round(shared)


def ways(model: ModelDescription) -> list[Way]:
    """The dense cache, its keys and values in 8 and 4 bits, and the presets; of a model that cannot be switched the first alone."""
    found = [Way("dense")]
    if model.obstacle is not None or model.shape is None:
        return found
    *_, head_dim = model.shape
    for name, candidate in rivals(head_dim).items():
        if name != "dense":
            found.append(_way(candidate.label, candidate, model))
    for name, preset in PRESETS.items():
        if _fits(preset, head_dim):
            *_, candidate = by_preset(head_dim, preset).values()
            found.append(_way(f"preset {name}", candidate, model))
    return found


def converted(settings: SFASettings, model: ModelDescription, axes: AxisBits | None) -> Way:
    """How a converted model keeps its cache; `axes` [H, D] where its basis has them."""
    assert model.shape is not None
    *_, head_dim = model.shape
    budget, bits = settings.budget(head_dim), cache_bits(settings.cache_dtype)
    coder = Coder(None, 0, bits, axes) if axes is not None else Coder(budget.topk, budget.dense_dims, bits)
    layers = None if settings.layers is None else tuple(settings.layers)
    exact = settings.recent + settings.first
    return Way("as converted", coder, exact, budget.topk_query, layers, settings.prefill)


def _way(label: str, candidate: Candidate, model: ModelDescription) -> Way:
    assert model.shape is not None
    assert candidate.options is not None
    _, kv_heads, head_dim = model.shape
    options, bits = candidate.options, cache_bits(candidate.options["cache_dtype"])
    if "topk" in options:
        coder = Coder(options["topk"], options["dense_dims"], bits)
    else:
        assert candidate.fit is not None
        sample = torch.linspace(-1, 1, 16)[:, None].expand(
            kv_heads, -1, head_dim
        )  # any keys: bytes do not depend on them
        coder = Coder(None, 0, bits, AxisBits.fit(sample, candidate.fit["key_bytes"])[1])
    queries = query_features(options.get("topk_query", DENSE), head_dim)
    exact = options.get("recent", 0) + options.get("first", 0)
    return Way(label, coder, exact, queries, prefill=options.get("prefill", "coded"))


def _fits(preset: Preset, head_dim: int) -> bool:
    """Whether a preset holds heads so wide: 4 and 3 bits want whole blocks."""
    try:
        by_preset(head_dim, preset)
    except ValueError:
        return False
    return True

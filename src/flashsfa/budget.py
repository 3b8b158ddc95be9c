"""`FeatureBudget`: how many features a key and a query keep."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .checks import require, require_int

PATTERNS = ("2:4",)
DENSE = "dense"


@dataclass(frozen=True)
class FeatureBudget:
    """Kept features, resolved against a head: no field is None where a number is meant.

    Attributes:
        head_dim: width D of a row, 1 to 256.
        topk: features of a key beside the dense channel, 1 to D - dense_dims. D with dense_dims=0 keeps all.
        topk_query: those of a query. D keeps all of it, whatever the dense channel, where there is no pattern.
        dense_dims: leading features that both sides always keep.
        query_pattern: "2:4" for at most two kept query features in each aligned group of four, else None.
    """

    head_dim: int
    topk: int
    topk_query: int
    dense_dims: int = 0
    query_pattern: str | None = None

    @classmethod
    def of(
        cls,
        head_dim: int,
        topk: int,
        *,
        topk_query: int | str | None = None,
        dense_dims: int = 0,
        query_pattern: str | None = None,
    ) -> FeatureBudget:
        """The budget that users name: a `topk_query` of None keeps as many features of a query as of a key, "dense" (or D) all.

        Raises `TypeError` or `ValueError` for one that does not fit a head or its pattern.
        """
        if torch.compiler.is_compiling():
            return _resolve(head_dim, topk, topk_query, dense_dims, query_pattern)
        try:
            return _resolve_once(head_dim, topk, topk_query, dense_dims, query_pattern)
        except TypeError:  # of what cannot be looked up, too
            return _resolve(head_dim, topk, topk_query, dense_dims, query_pattern)

    @classmethod
    def lossless(cls, head_dim: int) -> FeatureBudget:
        """The code that keeps every feature: all but the last in the dense channel, which leaves top-1 of one."""
        return cls.of(head_dim, 1, topk_query=DENSE, dense_dims=head_dim - 1)

    def with_keys_kept(self) -> FeatureBudget:
        """The budget for keys that are sparse already."""
        return FeatureBudget(self.head_dim, self.head_dim, self.topk_query, self.dense_dims, self.query_pattern)

    def with_queries_kept(self) -> FeatureBudget:
        """The budget for queries that are sparse already."""
        return FeatureBudget(self.head_dim, self.topk, self.head_dim, self.dense_dims)

    @property
    def sparse_dims(self) -> int:
        """Width D - dense_dims of the sparse part."""
        return self.head_dim - self.dense_dims

    @property
    def keeps_queries(self) -> bool:
        """Whether queries stay as they are."""
        return self.topk_query == self.head_dim and self.query_pattern is None

    @property
    def keeps_keys(self) -> bool:
        """Whether keys stay as they are."""
        return self.topk == self.head_dim


def _resolve(
    head_dim: int, topk: int, topk_query: int | str | None, dense_dims: int, query_pattern: str | None
) -> FeatureBudget:
    require_budget(topk, head_dim, dense_dims)
    if topk_query is None:
        topk_query = topk
    elif isinstance(topk_query, str):
        require(topk_query == DENSE, f"topk_query must be an int, 'dense' or None, got {topk_query!r}")
        topk_query = head_dim
    require_int("topk_query", topk_query)
    budget = FeatureBudget(head_dim, topk, int(topk_query), dense_dims, query_pattern)
    if not budget.keeps_queries:
        require_budget(topk_query, head_dim, dense_dims, query_pattern, name="topk_query")
    return budget


# A decode step names the same budget again and again; `typed` tells True from 1.
_resolve_once = functools.lru_cache(maxsize=256, typed=True)(_resolve)


def query_features(topk_query: int | str, head_dim: int) -> int:
    """`topk_query` as a number: head_dim for "dense"."""
    return head_dim if topk_query == DENSE else int(topk_query)


def require_budget(
    topk: int, head_dim: int, dense_dims: int, pattern: str | None = None, *, name: str = "topk"
) -> None:
    """`topk` features can be kept of the `head_dim - dense_dims` sparse ones, in `pattern` None or "2:4"."""
    require_int(name, topk)
    require_int("dense_dims", dense_dims)
    require(1 <= head_dim <= 256, lambda: f"head_dim must be 1 to 256 (indices are uint8), got {head_dim}")
    require(
        0 <= dense_dims < head_dim,
        lambda: f"dense_dims must be 0 to head_dim - 1 = {head_dim - 1}, got {dense_dims}",
    )
    sparse_dims = head_dim - dense_dims
    require(
        1 <= topk <= sparse_dims,
        lambda: f"{name} must be 1 to {sparse_dims} (head_dim {head_dim} less dense_dims {dense_dims}), got {topk}",
    )
    if pattern is None:
        return
    require(pattern in PATTERNS, lambda: f"the pattern must be '2:4' or None, got {pattern!r}")
    require(
        sparse_dims % 4 == 0 and 2 * topk <= sparse_dims,
        lambda: (
            f"a 2:4 pattern keeps at most half of a sparse part of whole groups of four; got {name} {topk} of {sparse_dims} "
            f"(head_dim {head_dim} less dense_dims {dense_dims})"
        ),
    )

"""`FeatureBasis`: a change of coordinates per kv head that makes a dense checkpoint's queries and keys sparse.

q' = q Q and k' = k K with Q Kᵀ = 1, so q'·k' = q·k: before top-k no score changes. Q and K are chosen so that
what top-k drops matters least.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checks import require

_log = logging.getLogger("flashsfa")

KINDS = ("whitened", "balanced", "pca", "identity")
_MAX_CONDITION = 1e8


@dataclass(frozen=True)
class FeatureBasis:
    """Coordinates of H kv heads, for one layer or stacked for many (leading `...`).

    Attributes:
        query: [..., H, D, D] Q.
        key: [..., H, D, D] K, with Q Kᵀ the identity.
    """

    query: Tensor
    key: Tensor

    def __getitem__(self, layer: int) -> FeatureBasis:
        return FeatureBasis(self.query[layer], self.key[layer])

    def transform_query(self, q: Tensor) -> Tensor:
        """q [B, Hq, N, D] in the coordinates of its kv head."""
        grouped = q.unflatten(1, (self.query.shape[0], -1))  # [B, H, G, N, D]
        return (grouped @ self.query[:, None].to(q.dtype)).flatten(1, 2)

    def transform_key(self, k: Tensor) -> Tensor:
        """k [B, H, N, D] in the coordinates of its head."""
        return k @ self.key.to(k.dtype)

    @classmethod
    def identity(cls, num_kv_heads: int, head_dim: int) -> FeatureBasis:
        """The coordinates the model already has."""
        one = torch.eye(head_dim).expand(num_kv_heads, -1, -1)
        return cls(one.clone(), one.clone())

    @classmethod
    def from_moments(cls, moments: Moments, kind: str = "whitened") -> FeatureBasis:
        """The basis of one layer from its calibration moments.

        "whitened": E[q'q'ᵀ] = 1, so the largest entries of a key are the ones whose loss costs a dense query's
        scores most; keys stand on their principal axes, largest first. "balanced": the same axes, scaled so that
        E[q'q'ᵀ] = E[k'k'ᵀ] are one diagonal matrix and a feature counts equally on both sides, for queries that
        are sparse too. "pca": principal axes of the keys alone. "identity": no change.

        Raises `ValueError` for an unknown kind or moments of no token; a nearly singular moment matrix is
        regularised, with a warning.
        """
        require(kind in KINDS, f"basis must be one of {', '.join(KINDS)}; got {kind!r}")
        require(moments.count > 0, "no token was seen: calibrate on some text first")
        heads, head_dim, _ = moments.key_outer.shape
        if kind == "identity":
            return cls.identity(heads, head_dim)
        key_moment = _regularised(moments.key_outer / moments.count, "key")
        if kind == "pca":
            axes = torch.linalg.eigh(key_moment).eigenvectors.flip(-1)
            return cls(axes.float(), axes.float())
        query_moment = _regularised(moments.query_outer / moments.query_count, "query")
        root = torch.linalg.cholesky(query_moment)  # L, E[qqᵀ] = L Lᵀ
        # Whitened queries are q L⁻ᵀ, and their keys k L: the principal axes of these diagonalise both sides.
        spectrum, axes = torch.linalg.eigh(root.mT @ key_moment @ root)
        spectrum, axes = spectrum.flip(-1), axes.flip(-1)  # [H, D] descending, [H, D, D]
        query, key = torch.linalg.solve_triangular(root.mT, axes, upper=True), root @ axes
        if kind == "balanced":
            scale = spectrum.clamp(min=torch.finfo(spectrum.dtype).tiny)[..., None, :] ** 0.25
            query, key = query * scale, key / scale
        return cls(query.float(), key.float())

    @classmethod
    def stack(cls, layers: list[FeatureBasis]) -> FeatureBasis:
        """One basis of many layers, with the layer as leading dimension."""
        return cls(*(torch.stack([getattr(x, name) for x in layers]) for name in ("query", "key")))

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        path = Path(path)
        beside = path.with_name(path.name + ".partial")
        try:
            save_file({name: getattr(self, name).contiguous() for name in ("query", "key")}, beside)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> FeatureBasis:
        """Read what `save` wrote. Raises `ValueError` for a file that holds no basis."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return cls(**load_file(path))
        except (SafetensorError, TypeError) as error:
            raise ValueError(f"{path} holds no feature basis: {error}") from error


class Moments:
    """Second moments of a layer's queries and keys, streamed in float64: O(D²) memory a head, any amount of text."""

    def __init__(self, num_kv_heads: int, head_dim: int) -> None:
        square = (num_kv_heads, head_dim, head_dim)
        self.key_outer = torch.zeros(square, dtype=torch.float64)
        self.query_outer = torch.zeros(square, dtype=torch.float64)
        self.count = self.query_count = 0

    def update(self, q: Tensor, k: Tensor) -> None:
        """Add the tokens of q [B, Hq, N, D] and k [B, H, N, D]."""
        heads = self.key_outer.shape[0]
        keys = k.detach().transpose(0, 1).flatten(1, 2).double()  # [H, B·N, D]
        queries = q.detach().unflatten(1, (heads, -1)).transpose(0, 1).flatten(1, 3).double()  # [H, B·G·N, D]
        self.key_outer += (keys.mT @ keys).cpu()
        self.query_outer += (queries.mT @ queries).cpu()
        self.count += keys.shape[1]
        self.query_count += queries.shape[1]


def _regularised(moment: Tensor, side: str) -> Tensor:
    """`moment` [H, D, D] with a multiple of the identity added where its condition number is past 1e8."""
    values = torch.linalg.eigvalsh(moment)  # [H, D] ascending
    floor = values[..., -1].clamp(min=torch.finfo(values.dtype).tiny) / _MAX_CONDITION
    lift = (floor - values[..., 0]).clamp(min=0)  # [H]
    if bool((lift > 0).any()):
        _log.warning(
            "%d of %d %s moment matrices are nearly singular and were regularised; calibrate on more text",
            int((lift > 0).sum()), lift.numel(), side,
        )  # fmt: skip
    return moment + lift[..., None, None] * torch.eye(moment.shape[-1], dtype=moment.dtype)

"""`ScoreRules`: what becomes of q·k before the softmax, and what else stands in its sum."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .checks import require, require_number, require_tensor


@dataclass(frozen=True)
class ScoreRules:
    """Scores s = scale · q kᵀ, softly capped, and attention sinks beside them.

    Attributes:
        scale: factor of the products.
        softcap: c > 0 turns s into c · tanh(s / c), before any mask (Gemma 2); None leaves it.
        sinks: [Hq] logit of each query head that joins the softmax's sum and has no value (gpt-oss): its weight is lost to the
            output. A query that sees no key gets output 0 and its head's sink as log-sum-exp. None for none.
        exact_factor: [Hkv, D] float32 factor of a query where it meets tokens that a cache holds as they came: it takes back what queries
            have on account of codes, the gain of a basis. None for 1. Of use where exact tokens are told from coded ones alone.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    exact_factor: Tensor | None = None

    @classmethod
    def of(
        cls,
        q: Tensor,
        scale: float | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        exact_factor: Tensor | None = None,
    ) -> ScoreRules:
        """The rules for queries q [B, Hq, N, D]: a scale of None is 1/sqrt(D). Raises `TypeError` or `ValueError` for others than the
        class tells."""
        head_dim = q.shape[-1]
        is_usual = type(head_dim) is int and type(scale) in _KEPT and type(softcap) in _KEPT
        make = _without_sinks_once if is_usual and not torch.compiler.is_compiling() else _without_sinks
        rules = make(head_dim, scale, softcap)
        if sinks is None:
            return rules if exact_factor is None else replace(rules, exact_factor=exact_factor)
        require_tensor("sinks", sinks)
        require(
            sinks.shape == q.shape[1:2] and sinks.is_floating_point() and sinks.device == q.device,
            lambda: (
                f"sinks must be floating [Hq] = [{q.shape[1]}] on {q.device}, got {sinks.dtype} {tuple(sinks.shape)} on "
                f"{sinks.device}"
            ),
        )
        return cls(rules.scale, rules.softcap, sinks, exact_factor)

    def cap(self, scores: Tensor) -> Tensor:
        """The scores after the cap."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def exact_queries(self, q: Tensor) -> Tensor:
        """q [B, Hq, N, D] as exact tokens meet it, in its dtype."""
        if self.exact_factor is None:
            return q
        grouped = q.unflatten(1, (len(self.exact_factor), -1))  # [B, Hkv, G, N, D]
        return (grouped * self.exact_factor[:, None, None]).to(q.dtype).flatten(1, 2)

    def exact_keys(self, k: Tensor) -> Tensor:
        """Exact keys k [B, Hkv, N, D] with the factor in place of the queries, for rows that are scored together with coded ones. A copy."""
        return k if self.exact_factor is None else (k * self.exact_factor[:, None]).to(k.dtype)

    def slope(self, capped: Tensor) -> Tensor | float:
        """The derivative of `cap`, from what it returned."""
        return 1.0 if self.softcap is None else 1 - (capped / self.softcap).square()

    def with_sinks(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """out [B, Hq, N, Dv] and lse [B, Hq, N] of attention without sinks as those of attention with them. Exact: a sink only
        takes weight away from all values alike."""
        if self.sinks is None:
            return out, lse
        sinks = self.sinks.to(lse.dtype)[:, None]  # [Hq, 1]
        return out * torch.sigmoid(_finite(lse) - sinks)[..., None].to(out.dtype), torch.logaddexp(lse, sinks)

    def sink_gradient(self, grad_out: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """[Hq] gradient of the sinks, for out [B, Hq, N, Dv] and lse [B, Hq, N] with sinks."""
        assert self.sinks is not None
        share = (self.sinks.to(lse.dtype)[:, None] - _finite(lse)).exp()  # [B, Hq, N]
        return -(share * (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)).sum((0, 2)).to(self.sinks.dtype)


def _without_sinks(head_dim: int, scale: float | None, softcap: float | None) -> ScoreRules:
    if softcap is not None:
        require_number("softcap", softcap)
        require(softcap > 0, f"softcap must be positive, or None for no cap; got {softcap}")
    return ScoreRules(checked_scale(scale, head_dim), None if softcap is None else float(softcap))


_KEPT = (int, float, type(None))  # what can be looked up; traces have numbers of their own
_without_sinks_once = functools.lru_cache(maxsize=1024, typed=True)(_without_sinks)  # each layer of each step asks


def _finite(lse: Tensor) -> Tensor:
    """-infinity, where a query sees no key, as the lowest number: a sink of -infinity takes nothing from it."""
    return lse.clamp(min=torch.finfo(lse.dtype).min)


def checked_scale(scale: float | None, head_dim: int) -> float:
    """`scale` as a float, 1/sqrt(head_dim) for None. Raises for a tensor, which would get no gradient, and NaN or infinity."""
    if scale is None:
        return 1 / math.sqrt(head_dim)
    require_number("scale", scale, "it gets no gradient, so multiply q by a learned scale and pass scale=1.0")
    return float(scale)

"""What a value tolerance costs and saves: each token of a window attends as decode with that tolerance lets it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import require
from ..codes import code_queries
from ..huggingface.settings import SFASettings
from ..huggingface.structure import attending_by
from ..huggingface.switch import is_enabled
from ..ops.decode.plain import needed_rows
from ..scores import ScoreRules
from .perplexity import window_losses

_NAME = "sfa_tolerance"
_LAST_TOKENS = 64  # of a window, whose context is about its length
_MOST_WEIGHTS = 1 << 26  # attention weights at a time


def decode_losses(model: Any, windows: Tensor, progress: Callable[[], None] = lambda: None) -> list[float]:
    """Losses as `window_losses`', of a model that is switched with a `value_tolerance` too. Raises `ValueError` where that stands beside
    exact tokens, of which it is not measured."""
    settings = SFASettings.from_config(model.config.sfa) if is_enabled(model) else None
    if settings is None or not settings.value_tolerance:
        return window_losses(model, windows, progress)
    require(
        not (settings.recent or settings.first),
        f"the model leaves out values (value_tolerance={settings.value_tolerance:g}) beside exact tokens, and perplexity is not "
        "measured of both: save it switched with value_tolerance=0, or measure needles",
    )
    return tolerance_losses(model, windows, settings.value_tolerance, progress)[0]


@torch.no_grad()
def tolerance_losses(
    model: Any, windows: Tensor, tolerance: float, progress: Callable[[], None] = lambda: None
) -> tuple[list[float], float]:
    """Losses as `window_losses`', and the share of V rows that the last tokens of a window read, of those that they see.

    Args:
        model: a causal language model of transformers, dense, or switched to a cache without exact tokens.
        windows: [S, W] int64 token ids.
        tolerance: as in `sparse_feature_decode`: which rows are read is what the kernels must find, in plain PyTorch.
    """
    shares: list[float] = []

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float | None = None,
        sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        coding: Any = getattr(module, "sfa", None)
        if coding is not None:
            query = code_queries(coding.queries(query), coding.budget).to_dense()
            kept = coding.coder.rounded(coding.keys(key), value)
            key, value = kept.k, kept.v
        scores = ScoreRules.of(query, scaling, softcap, s_aux)
        out, share = _attend(query[0], key[0], value[0], scores, sliding_window, tolerance)
        shares.append(share)
        return out[None].to(query.dtype).contiguous(), None  # some models look at it by .view

    with attending_by(model, _NAME, attend, lambda *args, **kwargs: None):
        losses = window_losses(model, windows, progress)
    return losses, statistics.fmean(shares)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scores: ScoreRules, window: int | None, tolerance: float
) -> tuple[Tensor, float]:
    """Output [N, Hq, Dv] of q [Hq, N, D] over k, v [Hkv, N, ...], and the share of V rows that the last tokens read."""
    n, group = q.shape[1], q.shape[0] // k.shape[0]
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = q.to(dtype).unflatten(0, (-1, group)).transpose(1, 2)  # [Hkv, N, G, D]
    k, v = k.to(dtype), v.to(dtype)
    positions = torch.arange(n, device=q.device)
    parts, sums, read, seen = [], [], 0.0, 0.0
    at_a_time = max(1, _MOST_WEIGHTS // (q.shape[0] * n))
    for start in range(0, n, at_a_time):
        some = positions[start : start + at_a_time]  # [M]
        # all that one of them sees: what is sorted takes the time
        keys = slice(0 if window is None else max(0, start - window + 1), start + len(some))  # K of them
        visible = positions[keys] <= some[:, None]  # [M, K]
        if window is not None:
            visible &= positions[keys] > some[:, None] - window
        products = (rows[:, some].flatten(1, 2) @ k[:, keys].mT).unflatten(1, (-1, group))  # [Hkv, M, G, K]
        s = scores.cap(scores.scale * products).masked_fill(~visible[:, None], -torch.inf)
        sums.append(s.logsumexp(-1))  # [Hkv, M, G]
        weights = s.softmax(-1)
        needed = needed_rows(weights, tolerance)  # [Hkv, M, K]
        weights = weights * needed[:, :, None]
        weights = weights / weights.sum(-1, keepdim=True)
        parts.append((weights.flatten(1, 2) @ v[:, keys]).unflatten(1, (-1, group)))  # [Hkv, M, G, Dv]
        late = some >= n - _LAST_TOKENS
        read += float(needed[:, late].sum())
        seen += float(visible[late].sum()) * k.shape[0]
    out, lse = torch.cat(parts, dim=1), torch.cat(sums, dim=1).transpose(1, 2).flatten(0, 1)  # lse [Hq, N]
    out = scores.with_sinks(out.transpose(1, 2).flatten(0, 1)[None], lse[None])[0][0]  # [Hq, N, Dv]
    return out.transpose(0, 1), read / seen

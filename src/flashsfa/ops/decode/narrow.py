"""Decode over codes and values in the widths of a `CodeFormat`, in plain PyTorch, for every device."""

from __future__ import annotations

from torch import Tensor

from ...mask import Mask
from ...narrow import NarrowCodes, NarrowValues
from ...rotation import rotate
from ...scores import ScoreRules
from . import plain


def decode_narrow(
    q: Tensor,
    codes: NarrowCodes,
    v: NarrowValues,
    mask: Mask,
    scores: ScoreRules,
    value_tolerance: float = 0.0,
    topk_query: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the last M tokens over narrow codes and values, as `plain.decode`: without sinks.

    Args:
        q: [B, Hq, M, D] queries.
        codes: [B, Hkv, N, ...] key codes.
        v: [B, Hkv, N, Dv] values.

    Returns:
        out [B, Hq, M, Dv] in q's dtype and lse [B, Hq, M] float32 (float64 for float64).
    """
    q = plain.coded_queries(q, topk_query, codes.dense_dims)
    out, lse = plain.attend(q, codes, v, mask, scores, value_tolerance)
    return (rotate(out) if v.is_rotated else out).to(q.dtype), lse

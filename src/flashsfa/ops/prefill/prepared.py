"""Attention of a prompt that the layers of a model have alike, prepared by the first of them: the kernel for Hopper, for little of the
host's time."""

from __future__ import annotations

from torch import Tensor

from ...budget import FeatureBudget
from ...checks import runs_plainly
from ...mask import Mask
from .. import record
from ..nvrtc.cuda import CompilationError
from ..plan import hopper_is_faster
from ..select import operators as select
from ..select.plain import empty_rows
from .hopper import prefill as hopper

# Keys that a query sees at most, up to which the kernel for Hopper takes some microseconds however few queries there are: less than
# the host takes for another kernel.
_FEW_KEYS = 2048


class Prompt:
    """Attention of q [B, Hq, N_q, D] over k [B, Hkv, N_k, D] and v [B, Hkv, N_k, Dv], written to out [B, Hq, N_q, Dv]: of tensors of one
    form, wherever they lie."""

    def __init__(self, attention: hopper.Prepared, budget: FeatureBudget, rows: Tensor | None) -> None:
        self._attention, self._budget, self._rows = attention, budget, rows

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """That all have the form is the caller's to know."""
        if self._rows is not None:
            select.write_coded_rows(k, self._budget.topk, self._budget.dense_dims, self._rows)
            k = self._rows
        self._attention(q, k, v, out)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, budget: FeatureBudget, mask: Mask, scale: float
) -> Prompt | None:
    """What attends for tensors such as these, with queries that keep all their features; None where `operator.attend` does it. Recorded for
    `explain()`."""
    mask = mask.without_idle_window(q.shape[2], k.shape[2])
    if not budget.keeps_queries or budget.query_pattern is not None or not runs_plainly(q, k, v):
        return None
    if hopper.obstacle(q, q.shape[-1], k, v, mask, scale) is not None:
        return None
    _, _, longest_k = hopper.sequences(q, k, mask)
    few = hopper.most_visible(longest_k, mask.is_causal, mask.window) <= _FEW_KEYS
    if not (few or hopper_is_faster(q, k, v, mask, scale)) or not all(map(hopper.lies_by_16_bytes, (q, v, out))):
        return None
    rows = None
    if not budget.keeps_keys:
        rows = empty_rows(k, k.shape[-1])
        if not select.write_coded_rows(k, budget.topk, budget.dense_dims, rows):
            return None
    elif not hopper.lies_by_16_bytes(k):
        return None
    try:
        attention = hopper.Prepared(q, k if rows is None else rows, v, out, mask=mask, scale=scale)
    except CompilationError:  # which `operator.attend` tells
        return None
    record.record("attention", "hopper", "the kernel for Hopper, prepared for all layers")
    return Prompt(attention, budget, rows)

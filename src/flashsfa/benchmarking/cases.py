"""What a case is: a name, a shape, and a factory of inputs that brings its own check and baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops.record import Choice


class UnavailableError(Exception):
    """A case that cannot run here, with the reason: its row says skipped, not failed."""


class WrongOutputError(Exception):
    """An output that breaks its rule, with what was found: its row says failed, and there is no time."""


@dataclass(frozen=True)
class Verdict:
    """Outcome of the correctness check.

    Attributes:
        passed: the output keeps the error rule.
        error: norm of the output's error relative to the norm of the truth, as found.
        note: what was wrong, for a case that did not pass.
    """

    passed: bool
    error: float
    note: str = ""


@dataclass(frozen=True)
class Baseline:
    """Something to be compared with.

    Attributes:
        run: does the work once.
        nbytes: bytes it must move.
        competes: does the same job, and so counts when the fastest baseline is looked for; False for a limit.
    """

    run: Callable[[], Any]
    nbytes: int
    competes: bool = True


@dataclass(frozen=True)
class Workload:
    """A prepared case, its inputs on the device.

    Attributes:
        run: the call under test; returns its output.
        check: judges that output.
        nbytes: bytes the call must move at least.
        tokens: rows of cache or input, one a token and kv head, that these bytes are counted over.
        bytes_per_token: bytes the result or cache holds of such a row.
        choice: the backend the call last ran on.
        flops: multiplications and additions of the dense computation, where a rate of them is of interest.
        v_rows_read: share of the V rows that must be read, where only some are.
    """

    run: Callable[[], Any]
    check: Callable[[Any], Verdict]
    nbytes: int
    tokens: int
    bytes_per_token: float
    choice: Callable[[], Choice | None]
    flops: int | None = None
    v_rows_read: float | None = None
    baselines: Mapping[str, Baseline] = field(default_factory=dict)


class Named(Protocol):
    """What every registered case has. Rows of one `facet` compare with one another; those of one `curve` in it differ in `n` alone."""

    @property
    def name(self) -> str: ...
    @property
    def facet(self) -> str: ...
    @property
    def curve(self) -> str: ...
    @property
    def n(self) -> int: ...
    @property
    def device(self) -> torch.device: ...


class Case(Named, Protocol):
    """A case that is checked and timed here."""

    def prepare(self) -> Workload: ...


@runtime_checkable
class MeasuredCase(Named, Protocol):
    """A case that checks and times itself."""

    def measure(self, bandwidth: float, quick: bool) -> dict[str, Any]:
        """The fields of its `results.Row`; `bandwidth` and `quick` as in `run_case`."""
        ...


def sdpa_backends(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """SDPA of q, k and v, its keyword arguments after them, by torch's fastest backends on `device`. Grouped query heads are
    given as such (`enable_gqa`)."""
    if device.type != "cuda":
        return {"sdpa": _sdpa}
    backends = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    return {name: partial(_sdpa, backend=backend) for name, backend in backends.items()}


def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, backend: SDPBackend | None = None, **rules: Any) -> Tensor:
    rules["enable_gqa"] = q.shape[1] != k.shape[1]
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, **rules)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, **rules)


_KERNELS = {
    "flash": "FlashAttention",
    "fa2": "FlashAttention-2",
    "fa4": "FlashAttention-4",
    "cudnn": "cuDNN",
    "sdpa": "SDPA",
}


def rival_name(baseline: str) -> str:
    """A baseline as a reader knows it: "cudnn_grouped" is "cuDNN grouped"."""
    return " ".join(_KERNELS.get(word, word) for word in baseline.split("_"))


def facet_name(head_dim: int, query_heads: int, kv_heads: int, batch: int) -> str:
    """The shape that the rows of a facet share."""
    return f"head size {head_dim}, {query_heads} query and {kv_heads} kv heads, batch {batch}"


def tokens_label(n: int) -> str:
    """8192 as "8k"."""
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)

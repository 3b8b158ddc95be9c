"""What surrounds a call and must not reach into it: autocast, inference mode and traces."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Matrix products keep the dtype of their operands: plain PyTorch forms are as exact as the fused ones."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if kind != "meta" and torch.is_autocast_enabled(kind) else nullcontext()


def lasting_tensors() -> AbstractContextManager:
    """What is allocated here can be written to after `torch.inference_mode()` has ended."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():  # a graph is made outside of the mode
        return nullcontext()
    return torch.inference_mode(False)


def asked_once(function: _Function) -> _Function:
    """`functools.cache` for what cannot be traced: torch.compile calls it at its trace, too."""
    known = functools.cache(function)  # which a trace would look behind, and warn of

    @functools.wraps(function)
    def ask(*args: Any) -> Any:
        return known(*args)

    return constant_in_traces(ask)  # type: ignore[return-value]


def constant_in_traces(function: _Function) -> _Function:
    """Have torch.compile call `function` once, at its trace, in place of tracing it: as `torch.compiler.assume_constant_result` does, which
    imports all of torch.compile."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function

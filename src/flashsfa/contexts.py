"""What surrounds a call and must not reach into it: autocast and inference mode."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Matrix products keep the dtype of their operands: plain PyTorch forms are as exact as the fused ones."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if kind != "meta" and torch.is_autocast_enabled(kind) else nullcontext()


def lasting_tensors() -> AbstractContextManager:
    """What is allocated here can be written to after `torch.inference_mode()` has ended."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():  # a graph is made outside of the mode
        return nullcontext()
    return torch.inference_mode(False)

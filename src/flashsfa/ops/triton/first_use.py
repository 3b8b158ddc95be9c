"""Say that a kernel of this package is being compiled where that takes long: its first use on a machine may seem to hang.

Triton keeps what it compiled (in TRITON_CACHE_DIR, by default ~/.triton/cache), so it is once a machine.
"""

from __future__ import annotations

import threading
from typing import Any

from triton import knobs

from .. import compiled

_running: dict[Any, threading.Timer] = {}  # by kernel and specialisation


def announce() -> None:
    """Log a line when a kernel has been compiling for a second, from now on. Hooks that others set stay."""
    hooks = knobs.runtime
    hooks.jit_cache_hook = _followed_by(hooks.jit_cache_hook, _begin)
    hooks.jit_post_compile_hook = _followed_by(hooks.jit_post_compile_hook, _end)


def _followed_by(other: Any, ours: Any) -> Any:
    def hook(**event: Any) -> Any:
        if event["fn"].module.startswith("flashsfa."):
            ours((event["fn"].name, event["key"]))
        return other(**event) if other else None

    return hook


def _begin(key: Any) -> None:
    _running[key] = compiled.compiling("the GPU kernels")


def _end(key: Any) -> None:
    if timer := _running.pop(key, None):
        timer.cancel()

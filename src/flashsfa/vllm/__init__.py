"""Experimental: vLLM serves a switched model from pages of feature codes. It is tested inside vLLM 0.32 and 0.33 on the CPU, and measured
on a GPU beside vLLM's own attention.

vLLM finds `register` through the entry point group `vllm.general_plugins`. A model whose config.json has settings "sfa" is then
served by `backend.SparseFeatureBackend` in the layers that they switch (`choice`), others as before. docs/reference/serving.md says what is proven.
"""

from __future__ import annotations

import logging

_log = logging.getLogger("flashsfa")


def register() -> None:
    """Make vLLM's attention backend CUSTOM this package's, unless another plugin has taken it, and have switched models served by
    it. Runs in every vLLM process, and more than once in some."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from .choice import BACKEND, watch_layers, watch_platform

    custom = AttentionBackendEnum.CUSTOM
    if not custom.is_overridden():
        register_backend(custom, BACKEND)
    elif custom.get_path() != BACKEND:
        _log.warning(
            "vLLM's attention backend CUSTOM is already %s; set VLLM_PLUGINS to choose one plugin", custom.get_path()
        )
    watch_platform()
    watch_layers()

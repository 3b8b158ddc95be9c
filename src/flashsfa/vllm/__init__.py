"""Experimental: vLLM serves a model from pages of feature codes. Written against vLLM 0.33, never run inside it.

vLLM finds `register` through the entry point group `vllm.general_plugins`; `--attention-backend CUSTOM` then selects
`backend.SparseFeatureBackend`. docs/reference/serving.md says what is proven.
"""

from __future__ import annotations

import logging

_log = logging.getLogger("flashsfa")
_BACKEND = "flashsfa.vllm.backend.SparseFeatureBackend"


def register() -> None:
    """Make vLLM's attention backend CUSTOM this package's, unless another plugin has taken it. Runs in every vLLM
    process, so it imports no more than vLLM's registry."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    custom = AttentionBackendEnum.CUSTOM
    if not custom.is_overridden():
        register_backend(custom, _BACKEND)
    elif custom.get_path() != _BACKEND:
        _log.warning(
            "vLLM's attention backend CUSTOM is already %s; set VLLM_PLUGINS to choose one plugin", custom.get_path()
        )

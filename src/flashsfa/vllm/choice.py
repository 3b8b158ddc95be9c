"""Which attention backend vLLM runs: ours for the layers that the settings "sfa" in a model's config.json switch, or an error at
start-up; its own choice for all other layers, those of a draft model too.

vLLM has no hook for it. Two methods of its platform are wrapped: the one that completes every config, in the process that the user
started, and on the CPU the one that picks a backend, which there answers CPU_ATTN whatever was asked for. A third wrap is around the
layer's constructor, for vLLM picks a backend by the shape of a layer and knows nothing of its place.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.config.utils import replace
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ..checks import require

BACKEND = "flashsfa.vllm.backend.SparseFeatureBackend"
_CUSTOM = AttentionBackendEnum.CUSTOM
_WATCHED = "_watched_by_flashsfa"


def watch_platform() -> None:
    """From now on each config of this process goes through `choose`. Doing it again changes nothing."""
    platform = type(current_platform)
    if hasattr(platform, _WATCHED):
        return
    complete, pick = platform.check_and_update_config, platform.get_attn_backend_cls

    @functools.wraps(complete)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        complete(vllm_config)
        choose(vllm_config)

    @functools.wraps(pick)
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **rest: Any
    ) -> Any:
        if selected_backend is not _CUSTOM:
            return pick(selected_backend, attn_selector_config, *args, **rest)
        reasons = _CUSTOM.get_class().validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:  # in the words of vLLM's CUDA platform
            raise ValueError(f"Selected backend {_CUSTOM} is not valid for this configuration. Reason: {reasons}")
        return _CUSTOM.get_path()

    platform.check_and_update_config = classmethod(check_and_update_config)
    if current_platform.is_cpu():
        platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    setattr(platform, _WATCHED, True)


def watch_layers() -> None:
    """From now on a layer of this process that is not to be coded gets the backend that vLLM would pick without us. Doing it again
    changes nothing."""
    from vllm.model_executor.layers.attention import Attention

    if hasattr(Attention, _WATCHED):
        return
    build = Attention.__init__

    @functools.wraps(build)
    def build_by_place(self: Any, *args: Any, **named: Any) -> None:
        from .settings import is_coded

        attention = get_current_vllm_config().attention_config
        if attention.backend is not _CUSTOM or not _is_ours() or is_coded(named.get("prefix", "")):
            return build(self, *args, **named)
        attention.backend = None
        try:
            build(self, *args, **named)
        finally:
            attention.backend = _CUSTOM

    Attention.__init__ = build_by_place
    setattr(Attention, _WATCHED, True)


def choose(vllm_config: Any) -> None:
    """Name CUSTOM in the config of a switched model. Other models keep what they have, and a draft model what vLLM picks.

    Raises `ValueError` for a switched model that another backend is to serve, or whose settings or config ours does not run.
    """
    model, attention = vllm_config.model_config, vllm_config.attention_config
    if model is None:
        return
    if model.runner_type == "draft":  # its config is made from that of the model that it drafts for
        if attention.backend is _CUSTOM:
            vllm_config.attention_config = replace(attention, backend=None)
        return
    named = {backend for backend in (attention.backend, *attention.backend_per_kind.values()) if backend is not None}
    if getattr(model.hf_config, "sfa", None) is None:
        if _is_ours() and _CUSTOM in named:
            _require_served(vllm_config)  # says what is missing
        return
    others = sorted(backend.name for backend in named if backend is not _CUSTOM)
    require(
        not others,
        f'{model.model} has settings "sfa", which the attention backend {", ".join(others)} would ignore: leave the backend to '
        "flashsfa, or serve the model dense with --hf-overrides '{\"sfa\": null}'",
    )
    require(
        _is_ours(),
        lambda: (
            f'{model.model} has settings "sfa", and CUSTOM is the backend {_CUSTOM.get_path()}: name flashsfa alone in VLLM_PLUGINS'
        ),
    )
    _require_served(vllm_config)
    attention.backend, attention.backend_per_kind = _CUSTOM, {}


def _is_ours() -> bool:
    return _CUSTOM.is_overridden() and _CUSTOM.get_path() == BACKEND


def _require_served(vllm_config: Any) -> None:
    from .settings import require_served

    require_served(vllm_config)

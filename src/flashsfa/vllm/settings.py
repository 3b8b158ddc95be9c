"""What vLLM's workers need to know of a model: the budgets and the basis that `flashsfa.enable` saved with it."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from safetensors import safe_open
from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from ..basis import FeatureBasis
from ..checks import require
from ..huggingface import SFASettings
from ..huggingface.positions import is_channel
from ..huggingface.switch import BASIS_FILE

_log = logging.getLogger("flashsfa")
_seen: SFASettings | None = None


def current_settings() -> SFASettings:
    """The settings of the model that this process serves.

    vLLM asks for the shape of the KV cache where no config is set, after the layers were built: the last one counts then.

    Raises `ValueError` if the model's config.json has no settings, or some that this backend does not run.
    """
    global _seen
    config = get_current_vllm_config_or_none()
    if config is not None and config.model_config is not None:
        _seen = _read(config.model_config.hf_config)
    if _seen is None:
        raise ValueError("flashsfa's vLLM backend was asked for a cache before vLLM built a layer")
    return _seen


class BasisFile:
    """The basis beside the checkpoint, if there is one, as the kv heads of this tensor-parallel rank see it.

    Made where vLLM's config is set; `load` works anywhere. `path` is None where there is no basis.
    """

    def __init__(self) -> None:
        model = Path(get_current_vllm_config().model_config.model)
        self.path = model / BASIS_FILE if (model / BASIS_FILE).is_file() else None
        self.share = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        if not model.is_dir():
            _warn_remote(model)

    def load(self, layer_name: str, num_kv_heads: int) -> FeatureBasis:
        """The basis [Hkv, D, D] of a layer that vLLM calls `layer_name` and that holds `num_kv_heads` heads here."""
        index = next(int(part) for part in layer_name.split(".") if part.isdecimal())
        rank, ranks = self.share
        with safe_open(self.path, "pt") as file:
            heads = file.get_slice("key").get_shape()[1]
            first = rank * heads // ranks  # ranks beyond the number of heads share them, as vLLM's projections do
            query, key = (file.get_slice(name)[index, first : first + num_kv_heads] for name in ("query", "key"))
        return FeatureBasis(query, key)


@functools.cache
def _warn_remote(model: Path) -> None:
    _log.warning("%s is no local folder, so a feature basis beside its weights is not seen", model)


def _read(hf_config: Any) -> SFASettings:
    stored = getattr(hf_config, "sfa", None)
    if stored is None:
        raise ValueError(
            'the model\'s config.json has no settings "sfa": serve a model that was saved after flashsfa.enable, or pass '
            """--hf-overrides '{"sfa": {"topk": 16, "dense_dims": 32, "topk_query": 128}}'"""
        )
    settings = SFASettings(**stored)
    require(settings.layers is None, "vLLM's backend codes every layer: enable the model with layers=None")
    require(
        settings.cache_dtype is None,
        "vLLM's backend keeps codes and values in the model's dtype: enable the model with cache_dtype=None",
    )
    require(
        settings.positions is None or hf_config.model_type == "qwen3",
        "vLLM's backend runs positions='channel' in Qwen3 models alone: vLLM's own GPT-2 has learned positions",
    )
    require(
        settings.positions is None or is_channel(hf_config.rope_parameters, settings.dense_dims, hf_config.head_dim),
        "positions='channel' is for a model that was saved after flashsfa.enable: this one's config.json does not turn the "
        "channel alone",
    )
    return settings

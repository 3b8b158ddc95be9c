"""What a config says of a model, without its weights: whether `enable` can switch it, what its layers cache, what attention multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from .loading import auto_class, refusing
from .structure import attention_shape, dense_cache_layers, require_whole, text_config


@dataclass(frozen=True)
class LayerKind:
    """Layers that cache alike.

    Attributes:
        name: in words.
        layers: their indices.
        token_bytes: of a token's key and value in one layer as transformers caches them; 0 for a state of fixed size, None where
            layers of the kind differ.
        window: tokens that a query sees at most, its own among them; None for all.
        width: products of a query head's with one token: with the key, and with the value.
    """

    name: str
    layers: tuple[int, ...]
    token_bytes: int | None
    window: int | None = None
    width: int = 0

    def held(self, context: int) -> int:
        """Tokens that a layer holds of a context: those that the next one sees."""
        return context if self.window is None else min(context, self.window - 1)

    def pairs(self, context: int) -> int:
        """Pairs of a query and a key that it sees, in a prompt of `context` tokens."""
        seen = context if self.window is None else min(context, self.window)
        return seen * (seen + 1) // 2 + (context - seen) * seen


@dataclass(frozen=True)
class ModelDescription:
    """A model of transformers.

    Attributes:
        name: of its class.
        config: of the part that generates.
        dtype: of its weights, and so of its cache.
        shape: query heads, kv heads and head_dim; None where they differ from layer to layer.
        kinds: its layers, kind by kind.
        obstacle: why `enable` does not switch it; None where it does.
        is_part: whether it has other parts than the one that generates text: `enable` leaves them as they are.
    """

    name: str
    config: Any
    dtype: torch.dtype
    shape: tuple[int, int, int] | None
    kinds: tuple[LayerKind, ...]
    obstacle: str | None
    is_part: bool

    @property
    def has_bytes(self) -> bool:
        """Whether there are keys, and their bytes are known."""
        return all(kind.token_bytes is not None for kind in self.kinds) and any(kind.token_bytes for kind in self.kinds)


def describe(source: str | Path, dtype: torch.dtype | None = None) -> ModelDescription:
    """The model of a directory or hub name, of which config.json alone is read.

    Args:
        dtype: in which it will be loaded; None for that of the config.

    Raises `ValueError` of one line if there is none, or one of a kind that transformers does not know.
    """
    with refusing(f"{source} holds no model that transformers knows"), _silent():
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        model = _skeleton(config)
        try:
            require_whole(model)
            obstacle = None
        except ValueError as error:
            obstacle = str(error)
        try:
            shape = attention_shape(model)
        except (AttributeError, RuntimeError, ValueError):
            shape = None
        dtype = dtype or getattr(config, "dtype", None) or getattr(text_config(model), "dtype", None) or torch.float32
        text = text_config(model)
        kinds, is_part = _kinds(model, shape, dtype), text is not model.config
        return ModelDescription(type(model).__name__, text, dtype, shape, kinds, obstacle, is_part)


def _skeleton(config: Any) -> Any:
    """The model of a config without weights, in the mode in which models are loaded: dropout is of training alone."""
    with torch.device("meta"):
        auto = auto_class(config)
        return (auto if type(config) in auto._model_mapping else AutoModel).from_config(config).eval()


def _kinds(model: Any, shape: tuple[int, int, int] | None, dtype: torch.dtype) -> tuple[LayerKind, ...]:
    config = text_config(model)
    named = getattr(config, "layer_types", None) or []
    found: dict[tuple[str, int | None, int | None, int], list[int]] = {}
    for index, layer in enumerate(dense_cache_layers(model)):
        is_chunked = index < len(named) and named[index] == "chunked_attention"
        kind = _kind(config, layer, is_chunked, shape, dtype)
        found.setdefault(kind, []).append(index)
    return tuple(
        LayerKind(name, tuple(layers), nbytes, window, width) for (name, nbytes, window, width), layers in found.items()
    )


def _kind(
    config: Any, layer: Any, is_chunked: bool, shape: tuple[int, int, int] | None, dtype: torch.dtype
) -> tuple[str, int | None, int | None, int]:
    """Name, bytes per token, window and width of a layer that transformers would cache in."""
    plain, width = (None, 0) if shape is None else (2 * shape[1] * shape[2] * dtype.itemsize, 2 * shape[2])
    if not isinstance(layer, CacheLayerMixin):
        return "a state of fixed size (linear attention)", 0, None, 0
    if getattr(config, "kv_lora_rank", None):
        rope = config.qk_rope_head_dim or 0
        kept = config.kv_lora_rank + rope + (config.index_head_dim if hasattr(layer, "indexer_keys") else 0)
        name = f"latent attention (MLA), of which transformers caches rank {config.kv_lora_rank} and {rope} rotary features"
        return name, kept * dtype.itemsize, None, (config.qk_nope_head_dim or 0) + rope + config.v_head_dim
    if isinstance(layer, DynamicSlidingWindowLayer):
        window = layer.sliding_window
        return f"{'attention in chunks' if is_chunked else 'a sliding window'} of {window} tokens", plain, window, width
    if hasattr(layer, "conv_states") or hasattr(layer, "recurrent_states"):
        return "full attention beside a state of fixed size", plain, None, width
    return "full attention", plain, None, width


@contextmanager
def _silent() -> Iterator[None]:
    """transformers says nothing of ids and widths that it corrects."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)

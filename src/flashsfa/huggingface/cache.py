"""`SparseCache`: transformers' cache interface over `SparseKVCache`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from ..codes import FeatureCodes
from ..kv_cache import SparseKVCache
from .attention import LayerCoding


class SparseCacheLayer(CacheLayerMixin):
    """One layer: keys as codes in the layer's coordinates, values as they are.

    `update` returns the codes in place of dense keys; the attention function knows both.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, coding: LayerCoding) -> None:
        super().__init__()
        self._coding = coding
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[FeatureCodes, Tensor]:
        self.is_initialized = True
        return self.store.append(self._coding.keys(key_states), value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return len(self.store) + query_length, 0

    def get_seq_length(self) -> int:
        return len(self.store)

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.store = SparseKVCache(self._coding.topk, dense_dims=self._coding.dense_dims)
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove -`tokens_to_remove` tokens from the end, as transformers counts."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the negative number of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove:
            self.store.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.store.select_batch(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.store.select_batch(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if len(self.store):
            self.store.select_batch(torch.arange(self.store.v.shape[0]).repeat_interleave(repeats))

    def offload(self) -> None:
        raise NotImplementedError("a SparseCache cannot be offloaded yet; use cache_implementation=None")

    prefetch = offload


class SparseCache(Cache):
    """The cache of a model that `enable` switched; `generate()` makes one by itself.

    Layers that were left dense keep transformers' own dynamic layer.
    """

    def __init__(self, model: Any) -> None:
        codings = {m.layer_idx: m.sfa for m in model.modules() if isinstance(getattr(m, "sfa", None), LayerCoding)}
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        layers = [SparseCacheLayer(codings[i]) if i in codings else DynamicLayer() for i in range(count)]
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of keys (codes) and values of the tokens held, read from the live tensors."""
        return cache_nbytes(self)["total"]


def cache_nbytes(cache: Cache) -> dict[str, int]:
    """Bytes of the tokens held by any dynamic cache: {"keys", "values", "total"}, read from the live tensors."""
    keys = values = 0
    for layer in cache.layers:
        if isinstance(layer, SparseCacheLayer):
            keys += layer.store.codes.nbytes
            values += layer.store.v.nbytes
        else:
            keys += layer.keys.nbytes
            values += layer.values.nbytes
    return {"keys": keys, "values": values, "total": keys + values}

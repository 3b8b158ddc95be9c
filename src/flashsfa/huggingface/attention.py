"""The attention and mask functions that transformers calls under the name "sfa"."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from ..attention import sparse_feature_attention
from ..basis import FeatureBasis
from ..codes import FeatureCodes
from ..decode import attend_cached

NAME = "sfa"


class LayerCoding(nn.Module):
    """How one attention layer codes its queries and keys: budgets and, as buffers that follow the model, its basis.

    The buffers are not part of the state dict: the checkpoint stays the dense model's, the basis has its own file.
    """

    def __init__(
        self,
        topk: int,
        topk_query: int | None,
        dense_dims: int,
        value_tolerance: float,
        basis: FeatureBasis | None,
    ) -> None:
        super().__init__()
        self.topk, self.topk_query, self.dense_dims = topk, topk_query, dense_dims
        self.value_tolerance = value_tolerance
        self.has_basis = basis is not None
        if basis is not None:
            for name in ("query", "key"):
                self.register_buffer(name, getattr(basis, name), persistent=False)

    def queries(self, q: Tensor) -> Tensor:
        """q [B, Hq, N, D] in the layer's coordinates."""
        return self._basis().transform_query(q) if self.has_basis else q

    def keys(self, k: Tensor) -> Tensor:
        """k [B, Hkv, N, D] in the layer's coordinates."""
        return self._basis().transform_key(k) if self.has_basis else k

    def _basis(self) -> FeatureBasis:
        return FeatureBasis(self.get_buffer("query"), self.get_buffer("key"))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | FeatureCodes,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer, with the signature of transformers' AttentionInterface.

    `key` are the codes of a `SparseCache`, or dense keys where the caller keeps no cache or a dense one;
    `attention_mask` is what `attention_mask` below returned. A layer left dense by `enable(layers=...)` runs
    with every feature kept.
    """
    if dropout:
        raise ValueError("sfa does not drop attention weights: set the config's attention dropout to 0")
    coding: LayerCoding | None = getattr(module, "sfa", None)
    rules: dict[str, Any] = {"scale": scaling, "window": sliding_window, "key_padding_mask": attention_mask}
    out: Any
    if coding is None:
        out = sparse_feature_attention(query, key, value, topk=query.shape[-1], is_causal=True, **rules)
    elif isinstance(key, FeatureCodes):
        out = attend_cached(
            coding.queries(query),
            key,
            value,
            topk_query=coding.topk_query,
            value_tolerance=coding.value_tolerance,
            **rules,
        )
    else:
        out = sparse_feature_attention(
            coding.queries(query), coding.keys(key), value, topk=coding.topk, topk_query=coding.topk_query,
            dense_dims=coding.dense_dims, is_causal=True, **rules,
        )  # fmt: skip
    return out.transpose(1, 2), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """[B, kv_length] bool, True where a key is padding, or None. Causality and the window are the operator's own."""
    plain = mask_function is causal_mask_function or (local_size is not None and allow_is_causal_skip)
    if not plain or kv_length != int(q_offset) - kv_offset + q_length:
        raise ValueError(
            "sfa runs causal masks, with or without a sliding window and padding, over a cache that grows; this call asks "
            "for another mask (packed sequences by position_ids, a custom mask or a static cache)"
        )
    if attention_mask is None:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length] == 0
    return padding if bool(padding.any()) else None


def register() -> None:
    """Make "sfa" known to transformers."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)

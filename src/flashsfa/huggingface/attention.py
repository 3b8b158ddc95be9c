"""The attention and mask functions that transformers calls under the name "sfa"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from ..attention import sparse_feature_attention
from ..basis import FeatureBasis
from ..checks import require
from ..codes import FeatureCodes, code_queries
from ..decode import FEW_QUERIES, attend_cached, sparse_feature_decode
from ..kernels.decode_torch import DecodeRules
from .positions import channel_first

NAME = "sfa"


class LayerCoding(nn.Module):
    """How one attention layer codes its queries and keys: budgets, the place of its channel, and as buffers its basis.

    `channel` rotary features are brought to the front, where the dense channel is (`positions.channel_first`); 0 for none.
    `cache_dtype` is that of the layer's growing cache: torch.int8, or None for that of what comes in. `query_pattern` is
    that of `sparse_feature_attention`.

    The buffers follow the model from device to device, but keep their precision: rounded to 16 bits the two sides of a
    basis no longer undo one another. They are not part of the state dict: the checkpoint stays the dense
    model's, the basis has its own file.
    """

    def __init__(
        self,
        topk: int,
        topk_query: int | None,
        dense_dims: int,
        value_tolerance: float,
        basis: FeatureBasis | None,
        channel: int = 0,
        cache_dtype: torch.dtype | None = None,
        query_pattern: str | None = None,
    ) -> None:
        super().__init__()
        self.topk, self.topk_query, self.dense_dims = topk, topk_query, dense_dims
        self.value_tolerance, self.channel, self.cache_dtype = value_tolerance, channel, cache_dtype
        self.query_pattern = query_pattern
        self.has_basis = basis is not None
        if basis is not None:
            for name in ("query", "key"):
                self.register_buffer(name, getattr(basis, name), persistent=False)

    @classmethod
    def lossless(cls, head_dim: int) -> LayerCoding:
        """The code that keeps every feature: all but the last in the dense channel, which leaves top-1 of one."""
        return cls(1, head_dim, head_dim - 1, 0.0, None)

    @property
    def query_budget(self) -> int:
        """Kept features of a query: `topk_query`, or the keys' where that is None."""
        return self.topk if self.topk_query is None else self.topk_query

    def queries(self, q: Tensor) -> Tensor:
        """q [B, Hq, N, D] in the layer's coordinates."""
        if self.channel:
            return channel_first(q, self.channel)
        return self._basis().transform_query(q) if self.has_basis else q

    def keys(self, k: Tensor) -> Tensor:
        """k [B, Hkv, N, D] in the layer's coordinates."""
        if self.channel:
            return channel_first(k, self.channel)
        return self._basis().transform_key(k) if self.has_basis else k

    def _basis(self) -> FeatureBasis:
        return FeatureBasis(self.get_buffer("query"), self.get_buffer("key"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerCoding:
        return super()._apply(lambda x: x.to(fn(x).device), recurse)


@dataclass(frozen=True)
class StaticCodes:
    """What a cache of fixed size hands to the attention function in place of keys.

    Attributes:
        codes: [B, Hkv, N, ...] key codes.
        kv_lens: [B] int64 slots filled so far, from the first on; None for all.
        positions: [N] int64 position in the sequence of each slot's token, negative for an empty slot; None where
            slot j holds token j. One query sees all tokens held, in any order; several need them in order, up to the
            last query's own.
    """

    codes: FeatureCodes
    kv_lens: Tensor | None = None
    positions: Tensor | None = None


@dataclass(frozen=True)
class EightBitCodes:
    """What a cache in 8 bits hands to the attention function in place of keys, beside int8 values.

    Attributes:
        codes: [B, Hkv, N, ...] int8 key codes with their scale.
        v_scale: [B, Hkv, N] float32 factor of each row of the values.
        dtype: of the values as they came, and so of the attention's output.
    """

    codes: FeatureCodes
    v_scale: Tensor
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> EightBitCodes:
        """Index the leading dimensions, as `FeatureCodes` does."""
        return EightBitCodes(self.codes[index], self.v_scale[index], self.dtype)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | FeatureCodes | StaticCodes | EightBitCodes,
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
    dtype, v_scale = value.dtype, None
    if isinstance(key, EightBitCodes):
        v_scale, dtype, key = key.v_scale, key.dtype, key.codes
    rules: dict[str, Any] = {
        "topk_query": query.shape[-1] if coding is None else coding.topk_query,
        "query_pattern": None if coding is None else coding.query_pattern,
        "scale": scaling,
        "window": sliding_window,
        "key_padding_mask": _padding(attention_mask, key),
    }
    query = query.to(dtype)  # under autocast, norms and RoPE leave queries and keys in float32
    query = query if coding is None else coding.queries(query)
    out: Any
    if isinstance(key, Tensor):
        key = key.to(dtype)
        if coding is None:
            rules["topk"] = key.shape[-1]
        else:
            key, rules["topk"], rules["dense_dims"] = coding.keys(key), coding.topk, coding.dense_dims
        out = sparse_feature_attention(query, key, value, is_causal=True, **rules)
    else:
        rules["value_tolerance"] = 0.0 if coding is None else coding.value_tolerance
        if isinstance(key, StaticCodes):
            out = _attend_static(query, key, value, **rules)
        else:
            out = attend_cached(query, key, value, v_scale=v_scale, **rules)
    return out.transpose(1, 2), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """[B, 1, 1, kv_length] bool, False where a key is padding, or None. Causality and the window are the operator's.

    A mask of four dimensions is one that transformers hands on as it is. transformers never allows a skip in the
    decode steps of a static cache, so there a sliding window is known by `use_vmap`, which any other mask sets.
    """
    may_skip = allow_is_causal_skip or (q_length == 1 and not use_vmap)
    require(
        mask_function is causal_mask_function or (local_size is not None and may_skip),
        "sfa runs causal masks, with or without a sliding window and padding; this call asks for another mask (packed "
        "sequences by position_ids, or a custom mask)",
    )
    if attention_mask is None:
        return None
    visible = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if _may_look(visible, q_length) and bool(visible.all()):
        return None
    return F.pad(visible, (0, kv_length - visible.shape[1]))[:, None, None]


def register() -> None:
    """Make "sfa" known to transformers."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)


def _may_look(mask: Tensor, q_length: int) -> bool:
    """Whether to look at a mask's values: on a GPU that is a sync, worth it for a prompt, which runs faster unmasked."""
    return not torch.compiler.is_compiling() and (mask.device.type == "cpu" or q_length > FEW_QUERIES)


def _padding(mask: Tensor | None, key: Tensor | FeatureCodes | StaticCodes) -> Tensor | None:
    """[B, N] bool, True where a slot of `key` holds padding or nothing."""
    keys, positions = (key.codes, key.positions) if isinstance(key, StaticCodes) else (key, None)
    n = keys.shape[2]
    if mask is None:
        return None if positions is None else (positions < 0).expand(keys.shape[0], -1)
    require(
        mask.ndim == 4 and mask.shape[1:3] == (1, 1) and mask.dtype == torch.bool
        and (mask.shape[3] == n or isinstance(key, StaticCodes)),
        f"sfa takes a 2D attention mask of ones and zeros, one for each of {n} keys, or none; got a mask "
        f"{tuple(mask.shape)} of {mask.dtype}",
    )  # fmt: skip
    padding = ~mask[:, 0, 0]  # [B, tokens]
    if positions is None:
        return padding[:, :n]  # a static cache announces its capacity, and may hand out fewer keys
    return padding[:, positions.clamp(min=0)] | (positions < 0)


def _attend_static(q: Tensor, key: StaticCodes, v: Tensor, **rules: Any) -> Tensor:
    """`attend_cached` over a cache of fixed size, without a host sync."""
    codes, n_q = key.codes, q.shape[2]
    if key.kv_lens is None:
        return attend_cached(q, codes, v, **rules)
    out: Any
    if n_q <= FEW_QUERIES:
        out = sparse_feature_decode(q, codes, v, kv_lens=key.kv_lens, **rules)
    else:  # a chunk of a prompt in a compiled model, where the host does not know the number of keys
        visible = DecodeRules(key.kv_lens, rules["window"], rules["key_padding_mask"]).visible(
            n_q, v.shape[2], q.device
        )
        q = code_queries(q, codes.topk, rules["topk_query"], codes.dense_dims, rules["query_pattern"]).to_dense()
        mask = None if visible is None else visible[:, None]  # [B, 1, M, N]
        out = F.scaled_dot_product_attention(q, codes.to_dense(), v, mask, scale=rules["scale"], enable_gqa=True)
    return out

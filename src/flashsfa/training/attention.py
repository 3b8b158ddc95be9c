"""Attention while training: one function for transformers' AttentionInterface, and the forms it can take.

`install` hangs a `Core` on each attention layer; the function prepares queries, keys and values and calls it. Models that
are switched (`flashsfa.enable`) keep their settings, so that what is saved loads with `flashsfa.from_pretrained`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ..attention import sparse_feature_attention, sparse_feature_attention_varlen
from ..basis import FeatureBasis
from ..huggingface.attention import LayerCoding
from ..huggingface.switch import attention_layers

NAME = "sfa_training"


@dataclass(frozen=True)
class Visible:
    """What a query sees beside causality, and the scale of scores.

    Attributes:
        scale: of the scores.
        window: the most recent tokens only.
        bounds: [S + 1] int32 cumulative lengths of packed documents, over the batch laid end to end.
        longest: at least the length of the longest document.
    """

    scale: float
    window: int | None = None
    bounds: Tensor | None = None
    longest: int = 0


class Core(nn.Module):
    """One layer's attention of q [B, Hq, N, D], k [B, Hkv, N, D], v [B, Hkv, N, Dv], all of one dtype.

    Returns out [B, Hq, N, Dv], and a loss a query head, [Hq], or None.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


class DenseCore(Core):
    """Dense attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, None]:
        return dense_attention(q, k, v, visible), None


class SparseCore(Core):
    """Sparse Feature Attention in the model's own coordinates.

    Args:
        coding: the budgets; read at each call, so that they may change during training.
        channel: rotary dimensions to bring to the front, where the dense channel is; 0 for none.
    """

    def __init__(self, coding: LayerCoding, channel: int = 0) -> None:
        super().__init__()
        self.coding, self._channel = coding, channel

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, None]:
        if self._channel:
            q, k = channel_first(q, self._channel), channel_first(k, self._channel)
        return sparse_attention(q, k, v, visible, self.coding), None


class DistillCore(Core):
    """Sparse Feature Attention in a basis, and while training Eq. 8's distance from dense attention of the same q, k, v.

    Args:
        coding: budgets and basis of the layer.
        has_loss: whether the layer counts in Eq. 8.
        trained: the basis to use in place of the coding's.
    """

    def __init__(self, coding: LayerCoding, has_loss: bool, trained: TrainedBasis | None = None) -> None:
        super().__init__()
        self.coding, self._has_loss, self.trained = coding, has_loss, trained

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> tuple[Tensor, Tensor | None]:
        coding = self.coding
        if self.trained is not None:
            basis = self.trained()
            sparse_q, sparse_k = basis.transform_query(q), basis.transform_key(k)
        else:
            sparse_q, sparse_k = coding.queries(q), coding.keys(k)
        out = sparse_attention(sparse_q, sparse_k, v, visible, coding)
        if not (self.training and self._has_loss):
            return out, None
        with torch.no_grad():
            target = dense_attention(q, k, v, visible)
        return out, (out - target).float().square().sum(-1).mean((0, 2))


class TrainedBasis(nn.Module):
    """A basis of one layer as a parameter: the keys' side; the queries' is its inverse, transposed."""

    def __init__(self, basis: FeatureBasis) -> None:
        super().__init__()
        self.key = nn.Parameter(basis.key.float().clone())

    def forward(self) -> FeatureBasis:
        with torch.autocast(self.key.device.type, enabled=False):  # rounded, the sides would not be inverse
            return FeatureBasis(torch.linalg.inv(self.key).mT, self.key)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """Causal dense attention: SDPA where it knows the mask."""
    if visible.window is None and visible.bounds is None:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=visible.scale, enable_gqa=grouped)
    # The code that keeps every feature: all but the last in the dense channel, which leaves top-1 of one.
    return _attend(q, k, v, visible, topk=1, topk_query=q.shape[-1], dense_dims=q.shape[-1] - 1)


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, visible: Visible, coding: LayerCoding) -> Tensor:
    """Causal Sparse Feature Attention with the budgets of `coding`."""
    budgets = {"topk": coding.topk, "topk_query": coding.topk_query, "dense_dims": coding.dense_dims}
    return _attend(q, k, v, visible, **budgets)


def channel_first(x: Tensor, dims: int) -> Tensor:
    """x [..., D] with the `dims` features of its first rotary pairs in front: pair i of RoPE is features i and i + D/2."""
    pairs = x.unflatten(-1, (2, -1))
    return torch.cat((pairs[..., : dims // 2].flatten(-2), pairs[..., dims // 2 :].flatten(-2)), dim=-1)


def channel_basis(layers: int, kv_heads: int, head_dim: int, dims: int) -> FeatureBasis:
    """`channel_first` as the basis of a model, for the switched model that is saved."""
    order = channel_first(torch.eye(head_dim), dims).expand(layers, kv_heads, -1, -1)
    return FeatureBasis(order.clone(), order.clone())


def install(model: Any, make: Callable[[int, nn.Module], Core]) -> None:
    """Let `model` compute attention by `make(layer, attention module)`, layer by layer."""
    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, _no_mask)
    for index, module in enumerate(attention_layers(model)):
        module.sfa_core = make(index, module)
    model.set_attn_implementation(NAME)


def uninstall(model: Any, implementation: str) -> None:
    """Take the cores off again, and let `model` compute attention by transformers' `implementation`."""
    for module in attention_layers(model):
        del module.sfa_core
    model.set_attn_implementation(implementation)


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function that transformers calls; a core's loss travels as "attention weights"."""
    if dropout:
        raise ValueError("attention weights are not dropped here: set the config's attention dropout to 0")
    if torch.is_autocast_enabled(query.device.type):  # norms and RoPE leave float32 beside values of 16 bits
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    core: Any = module.sfa_core
    out, loss = core(query, key, value, Visible(scale, sliding_window, cu_seq_lens_q, max_length_q))
    return out.transpose(1, 2), loss


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Windows are full, causality and documents are the cores' business."""


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Visible, **budgets: Any) -> Tensor:
    rules: dict[str, Any] = {"is_causal": True, "scale": visible.scale, "window": visible.window, **budgets}
    out: Any
    if visible.bounds is None:
        out = sparse_feature_attention(q, k, v, **rules)
        return out
    batch = q.shape[0]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B·N, H, D]
    bounds, longest = visible.bounds, visible.longest
    out = sparse_feature_attention_varlen(q, k, v, bounds, bounds, longest, longest, **rules)
    return out.unflatten(0, (batch, -1)).transpose(1, 2)

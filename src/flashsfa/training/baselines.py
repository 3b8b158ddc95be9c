"""What Sparse Feature Attention is compared with under the same recipe.

"short" and "low_rank" are ways to start and to parametrise a plain model, whose attention is then dense; "int8" and
"performer" are cores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..checks import require
from ..huggingface.switch import attention_layers
from .attention import Core, Visible, dense_attention, scale_queries

_LARGEST_INT8 = 127


class QuantizedCore(Core):
    """Dense attention of queries and keys rounded to 8 bits, one scale a row; rounding passes gradients straight through."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        return dense_attention(_rounded(q), _rounded(k), v, visible)


class PerformerCore(Core):
    """Causal kernel attention over positive random features (Performer, Choromanski et al. 2021, section 2.3).

    Its N x N matrix of feature products is built in full: this form is for comparing quality, not speed.

    Args:
        head_dim: D.
        features: random features.
        seed: of the projection, orthogonal in blocks of D.
    """

    projection: Tensor  # [F, D]

    def __init__(self, head_dim: int, features: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        blocks = torch.randn(-(-features // head_dim), head_dim, head_dim, generator=generator, device="cpu")
        directions = torch.linalg.qr(blocks).Q.flatten(0, 1)[:features]
        norms = torch.randn(features, head_dim, generator=generator, device="cpu").norm(dim=-1, keepdim=True)
        self.register_buffer("projection", directions * norms, persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        require(visible.bounds is None, "performer does not take packed documents: set data.packed to false")
        group = q.shape[1] // k.shape[1]
        with torch.autocast(q.device.type, enabled=False):
            root = visible.scale**0.5
            # A common factor of a query's features, or of all keys', leaves the weights as they are.
            q_features = self._features(root * q.float(), (-1,))  # [B, H, N, F]
            k_features = self._features(root * k.repeat_interleave(group, 1).float(), (-2, -1))
            weights = (q_features @ k_features.mT).tril()  # [B, H, N, N]
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        return weights.to(v.dtype) @ v.repeat_interleave(group, 1)

    def _features(self, x: Tensor, common: tuple[int, ...]) -> Tensor:
        """exp(w·x - |x|²/2), divided by the largest over the dimensions `common`."""
        logits = x @ self.projection.mT - x.square().sum(-1, keepdim=True) / 2
        return (logits - logits.amax(common, keepdim=True)).exp()


def shorten(model: Any, width: int) -> None:
    """Start queries and keys of `model` with `width` features a head and the rest at zero, where they stay.

    Where both sides are zero neither gets a gradient. Kept are the features of the first rotary pairs. Scores start as
    those of a head of this width would.
    """
    modules: list[Any] = attention_layers(model)
    for module in modules:
        head_dim = module.head_dim
        dropped = torch.ones(2, head_dim // 2, dtype=torch.bool)
        dropped[:, : width // 2] = False
        with torch.no_grad():
            for weight in _query_key_weights(module):
                weight.unflatten(0, (-1, head_dim))[:, dropped.flatten()] = 0  # [H, D, hidden]
        # Qwen3's norms bring what is left to the length of the whole.
        scale_queries(module, (width / head_dim) ** (0.5 if hasattr(module, "q_norm") else -0.5))


def factorise(model: Any, rank: int) -> None:
    """Parametrise the query and key projections of `model` as products of rank `rank`."""
    modules: list[Any] = attention_layers(model)
    for module in modules:
        if hasattr(module, "c_attn"):
            parametrize.register_parametrization(module.c_attn, "weight", _Products(rank, blocks=3, factorised=2))
        else:
            for projection in (module.q_proj, module.k_proj):
                parametrize.register_parametrization(projection, "weight", _Products(rank, blocks=1, factorised=1))


def multiply(model: Any) -> None:
    """Turn the products of `factorise` into plain weights."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def _query_key_weights(module: Any) -> tuple[Tensor, Tensor]:
    """The weights of queries and of keys, [H·D, hidden] each, as views."""
    if hasattr(module, "c_attn"):
        query, key, _ = module.c_attn.weight.mT.chunk(3)  # GPT-2 keeps the three side by side, [hidden, 3·H·D]
        return query, key
    return module.q_proj.weight, module.k_proj.weight


class _Products(nn.Module):
    """A weight [a, b] of `blocks` equal column blocks, the first `factorised` of them products of rank `rank`."""

    def __init__(self, rank: int, blocks: int, factorised: int) -> None:
        super().__init__()
        self._rank, self._blocks, self._factorised = rank, blocks, factorised

    def forward(self, *parts: Tensor) -> Tensor:
        split = 2 * self._factorised
        products = [left @ right for left, right in zip(parts[:split:2], parts[1:split:2], strict=True)]
        return torch.cat((*products, *parts[split:]), dim=1)

    def right_inverse(self, weight: Tensor) -> list[Tensor]:
        blocks, parts = weight.chunk(self._blocks, dim=1), []
        for block in blocks[: self._factorised]:
            left, values, right = torch.linalg.svd(block, full_matrices=False)
            kept = values[: self._rank]
            root = (kept * values.norm() / kept.norm()).sqrt()  # the product is as large as the block was
            parts += [left[:, : self._rank] * root, root[:, None] * right[: self._rank]]
        return [*parts, *blocks[self._factorised :]]


def _rounded(x: Tensor) -> Tensor:
    """x at 8 bits a feature, with the gradient of x."""
    scale = x.detach().abs().amax(-1, keepdim=True).clamp(min=1e-12) / _LARGEST_INT8
    return x + ((x / scale).round() * scale - x).detach()

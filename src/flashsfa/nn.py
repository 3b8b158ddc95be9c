"""`SparseFeatureAttention`: a drop-in self-attention module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import BACKENDS, GRADIENTS, sparse_feature_attention
from .budget import FeatureBudget
from .cache.contiguous import SparseKVCache
from .checks import (
    require,
    require_bool,
    require_choice,
    require_float,
    require_int,
    require_no_gradient,
    require_number,
)
from .decode import attend_cached
from .mask import checked_window

POSITIONS = ("channel", "full", "none")


class SparseFeatureAttention(nn.Module):
    """Causal self-attention with k-sparse queries and keys, grouped kv heads and rotary positions.

    Args:
        embed_dim: width of the input and output.
        num_heads: query heads; num_kv_heads: key and value heads, num_heads by default.
        topk, topk_query, dense_dims, query_pattern: budgets, as in `sparse_feature_attention`.
        head_dim: embed_dim / num_heads by default.
        positions: "channel" turns the dense channel alone by RoPE (needs an even dense_dims >= 2) and keeps the
            sparse features free of position, which costs the least quality; "full" turns the whole head before
            top-k; "none" leaves positions to the caller (learned embeddings, say).
        qk_norm: RMS-normalise queries and keys per head.
        window: see only the `window` most recent tokens.
        gradient, backend: as in `sparse_feature_attention`; a call with a cache has one backend.
        bias: biases in the projections.
        rope_theta: base of the rotary frequencies.

    Raises `TypeError` or `ValueError` for sizes that do not fit.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        topk: int,
        topk_query: int | str | None = None,
        dense_dims: int = 0,
        query_pattern: str | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        positions: str = "channel",
        qk_norm: bool = False,
        window: int | None = None,
        gradient: str = "kept",
        backend: str = "auto",
        bias: bool = False,
        rope_theta: float = 10000.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
            require_int(name, size, 1)
        if head_dim is None:
            require(
                embed_dim % num_heads == 0,
                f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}; give head_dim",
            )
            head_dim = embed_dim // num_heads
        require(
            num_heads % num_kv_heads == 0,
            f"num_heads {num_heads} must be a multiple of num_kv_heads {num_kv_heads}",
        )
        self.budget = FeatureBudget.of(
            head_dim, topk, topk_query=topk_query, dense_dims=dense_dims, query_pattern=query_pattern
        )
        require_choice("gradient", gradient, GRADIENTS)
        require_choice("backend", backend, BACKENDS)
        require_choice("positions", positions, POSITIONS)
        require_bool("qk_norm", qk_norm)
        require_bool("bias", bias)
        require_number("rope_theta", rope_theta)
        require(rope_theta > 0, f"rope_theta must be positive, got {rope_theta}")
        self.rotary_dims = {"channel": dense_dims, "full": head_dim, "none": 0}[positions]
        require(
            self.rotary_dims % 2 == 0 and (positions != "channel" or dense_dims >= 2),
            f"positions={positions!r} turns {self.rotary_dims} features in pairs: choose an even width of at least 2 "
            "(dense_dims for 'channel'), or positions='none'",
        )
        self.embed_dim = embed_dim
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.positions, self.window, self.rope_theta = positions, checked_window(window), rope_theta
        self.gradient, self.backend = gradient, backend
        self.q_proj = nn.Linear(embed_dim, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, embed_dim, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()

    def make_cache(self, capacity: int = 256) -> SparseKVCache:
        """An empty cache for `forward`, with this module's key code."""
        return SparseKVCache(self.budget.topk, dense_dims=self.budget.dense_dims, capacity=capacity)

    def forward(self, x: Tensor, cache: SparseKVCache | None = None) -> Tensor:
        """x [B, N, embed_dim] to the same shape. With a cache, of `make_cache` or an 8-bit one of this module's budgets, the N
        tokens follow those it holds, and join them; no gradient then, and a call that asks for one is refused."""
        require_float("x", x)
        require(
            x.ndim == 3 and x.shape[-1] == self.embed_dim,
            lambda: f"x must be [B, N, embed_dim] with embed_dim = {self.embed_dim}, got shape {tuple(x.shape)}",
        )
        if cache is not None and not isinstance(cache, SparseKVCache):
            raise TypeError(f"cache must be a SparseKVCache, such as one of make_cache(), got {type(cache).__name__}")
        seen = 0 if cache is None else cache.length
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.num_heads, -1))).transpose(1, 2)  # [B, Hq, N, D]
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.num_kv_heads, -1))).transpose(1, 2)  # [B, Hkv, N, D]
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        if self.rotary_dims:
            positions = torch.arange(seen, seen + x.shape[1], device=x.device)
            turn = rotation(positions, self.rotary_dims, self.rope_theta)
            q, k = rotate(q, *turn), rotate(k, *turn)
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast norms and RoPE are in float32
        budget = self.budget
        if cache is None:
            out = sparse_feature_attention(
                q, k, v, topk=budget.topk, topk_query=budget.topk_query, dense_dims=budget.dense_dims,
                query_pattern=budget.query_pattern, is_causal=True, window=self.window, gradient=self.gradient,
                backend=self.backend,
            )  # fmt: skip
        else:
            require_no_gradient(q, k, v)
            require(
                (cache.topk, cache.dense_dims) == (budget.topk, budget.dense_dims),
                lambda: (
                    f"the cache keeps topk={cache.topk}, dense_dims={cache.dense_dims}, the module topk={budget.topk}, "
                    f"dense_dims={budget.dense_dims}: take one of make_cache()"
                ),
            )
            kept = v.dtype if cache.input_dtype is None else cache.input_dtype  # autocast may have come or gone since
            kv = cache.append(k.to(kept), v.to(kept))
            out = attend_cached(q.to(kept), kv, budget, window=self.window).to(v.dtype)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, topk={self.budget.topk}, "
            f"topk_query={self.budget.topk_query}, dense_dims={self.budget.dense_dims}, query_pattern={self.budget.query_pattern!r}, "
            f"positions={self.positions!r}, gradient={self.gradient!r}"
        )


def rotation(positions: Tensor, dims: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [..., dims / 2], float32, of the rotary angles of positions [...]."""
    frequency = theta ** (-torch.arange(0, dims, 2, device=positions.device, dtype=torch.float32) / dims)
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first dims features of x [..., D], half-split pairs, by cos and sin [..., dims / 2]; the rest stays."""
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

"""Attention while training: one function for transformers' AttentionInterface, and the forms it can take.

`install` hangs a `Core` on each attention layer; the function prepares queries, keys and values and calls it. Models that
are switched (`flashsfa.enable`) keep their settings, so that what is saved loads with `flashsfa.from_pretrained`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ..attention import sparse_feature_attention
from ..basis import FeatureBasis, Moments, default_kind
from ..budget import FeatureBudget
from ..huggingface import SFASettings, enable
from ..huggingface.attention import LayerCoding
from ..huggingface.structure import attention_layers, evaluating, set_attention
from ..ops.select.plain import by_token

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
    """One layer's attention of q [B, Hq, N, D], k [B, Hkv, N, D], v [B, Hkv, N, Dv], all of one dtype: out [B, Hq, N, Dv]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        raise NotImplementedError


class DenseCore(Core):
    """Dense attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        return dense_attention(q, k, v, visible)


class EqualizedCore(Core):
    """A core whose query features are kept at one size: of q / s and k · s, where s is the running size of each.

    No dense score changes, and a key's largest entries become those that scores depend on most, as in a "whitened" basis.
    `fold` makes it part of the weights.

    The sizes of a step are those before it: `update`, called once after each step, takes in what its forward passes saw. So every
    process, every part of a batch and a forward pass that is computed again see the same ones.

    Attributes:
        square: [H, 1, D] float32, running mean of squared query entries.
    """

    square: Tensor
    _sum: Tensor
    _passes: Tensor
    _SHARE = 0.02  # of a step in the running mean

    def __init__(self, core: Core, heads: int, head_dim: int) -> None:
        super().__init__()
        self.core = core
        # Almost nothing: equal sizes before the first step, and no weight afterwards.
        self.register_buffer("square", torch.full((heads, 1, head_dim), 1e-12))
        # Of this process and step.
        self.register_buffer("_sum", torch.zeros(heads, 1, head_dim), persistent=False)
        self.register_buffer("_passes", torch.zeros(()), persistent=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        if self.training:
            with torch.no_grad():
                self._sum += q.float().square().mean((0, 2))[:, None]
                self._passes += 1
        size = self.size()
        return self.core(q / size.to(q.dtype), k * size.to(k.dtype), v, visible)

    @torch.no_grad()
    def update(self) -> None:
        """Take in the forward passes since the last update, at least one, of all processes."""
        mean = self._sum / self._passes
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean /= torch.distributed.get_world_size()
        self.square.lerp_(mean, self._SHARE)
        self._sum.zero_()
        self._passes.zero_()

    def size(self) -> Tensor:
        """s [H, 1, D], 1 in the mean over a head's features."""
        size = self.square.sqrt()
        return (size / size.mean(-1, keepdim=True)).clamp(min=1e-3)  # a feature that died must not divide by zero

    def fold(self, module: Any) -> None:
        """Change the projections of a GPT-2 attention module so that they do what this does."""
        size = self.size().flatten()
        _multiply_projections(module, 1 / size, size)


class ScaledCore(Core):
    """A core whose scores are `factor` times as large. `fold` makes it part of the weights."""

    def __init__(self, core: Core, factor: float) -> None:
        super().__init__()
        self.core, self._factor = core, factor

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        scaled = Visible(visible.scale * self._factor, visible.window, visible.bounds, visible.longest)
        return self.core(q, k, v, scaled)

    def fold(self, module: Any) -> None:
        """Change the queries of an attention module so that they do what this does."""
        scale_queries(module, self._factor)


class SparseCore(Core):
    """Sparse Feature Attention in the coordinates of the layer's coding, or in those of a basis that the run finds.

    Keys in bits per axis, and their values, are those that the layer's cache would hold; gradients pass straight through the rounding.
    Codes of topk are not rounded.

    All attributes are read at each call, so that they may change during training.

    Attributes:
        coding: the budgets.
        gradient: as in `flashsfa.sparse_feature_attention`.
        basis: the basis to use in place of the coding's.
        is_dense: all features count for now, in the model's own coordinates.
        seen: takes in the queries and keys of each call; None for no need.
    """

    def __init__(
        self, coding: LayerCoding, gradient: str = "kept", basis: TrainedBasis | FittedBasis | None = None
    ) -> None:
        super().__init__()
        self.coding, self.basis, self.gradient = coding, basis, gradient
        self.is_dense = False
        self.seen: Moments | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        if self.seen is not None:
            self.seen.update(q, k)
        if self.is_dense:
            return dense_attention(q, k, v, visible)
        if self.basis is not None:
            q, k = self.basis().transform(q, k)
        else:
            q, k = self.coding.queries(q), self.coding.keys(k)
        if self.coding.coder.axes is not None:
            kept = self.coding.coder.rounded(k, v)
            return dense_attention(q, kept.k.to(k.dtype), kept.v.to(v.dtype), visible)
        # Rows that are kept whole for the backward pass are kept by themselves: as views they would hold all that GPT-2
        # projects together.
        budget = self.coding.budget
        q, k = by_token(q) if budget.keeps_queries else q, by_token(k) if budget.keeps_keys else k
        return _attend(q, k, by_token(v), visible, budget, self.gradient)


class TargetCore(DenseCore):
    """Dense attention of the frozen model, which keeps its output: the target of Eq. 8.

    Attributes:
        out: [B, Hq, N, Dv] of the last forward pass; None before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.out: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        self.out = super().forward(q, k, v, visible)
        return self.out


class DistillCore(SparseCore):
    """Sparse Feature Attention, and while training Eq. 8's distance from a target.

    Attributes:
        target: [B, Hq, N, Dv] without gradient, set before each forward pass; None for no distance.
        distance: [Hq] of the last forward pass, the mean over its tokens; None if there is none.
    """

    def __init__(self, coding: LayerCoding, basis: TrainedBasis | None = None) -> None:
        super().__init__(coding, basis=basis)
        self.target: Tensor | None = None
        self.distance: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
        out = super().forward(q, k, v, visible)
        if self.training and self.target is not None:
            self.distance = (out.float() - self.target.float()).square().sum(-1).mean((0, 2))
        return out


class TrainedBasis(nn.Module):
    """A basis of one layer that is trained. The keys' side is that it begins with, times L·D·U, unit triangular L and U and a positive
    diagonal D, which has an inverse whatever is learned; the queries' side is the inverse of the keys', transposed, times the gains.

    Attributes:
        factors: [H, D, D] what is learned: below its diagonal L, above it U, on it the logarithms of D, all divided by `step`. 0 changes
            nothing, and weight decay draws towards it.
        step: of the basis, to one of the factors. From scratch 1/√D: an optimiser moves all factors alike, and D of them add up, until
            the basis is all but singular.
    """

    key: Tensor
    inverse: Tensor  # of the key's side, transposed
    gain: Tensor  # [H, 1, D]

    def __init__(self, basis: FeatureBasis, step: float = 1.0) -> None:
        super().__init__()
        self.step = step
        self.factors = nn.Parameter(torch.zeros_like(basis.key, dtype=torch.float32))
        gain = (basis.key.double() * basis.query.double()).sum(-2, keepdim=True)
        for name, x in (("key", basis.key), ("inverse", basis.query / gain), ("gain", gain)):
            self.register_buffer(name, x.float(), persistent=False)

    def forward(self) -> FeatureBasis:
        with torch.autocast(self.factors.device.type, enabled=False):
            factors = self.step * self.factors.double()  # rounded, as in TF32, the sides would not be inverse
            one = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)
            size = factors.diagonal(dim1=-2, dim2=-1).exp()[..., None]  # [H, D, 1]
            turn = (factors.tril(-1) + one) @ (size * (factors.triu(1) + one))
            undone = torch.linalg.solve_triangular(factors, one.expand_as(factors), upper=False, unitriangular=True)
            undone = torch.linalg.solve_triangular(factors, undone / size, upper=True, unitriangular=True)
            query, key = self.inverse.double() @ undone.mT * self.gain, self.key.double() @ turn
        return FeatureBasis(query.float(), key.float())


class FittedBasis(nn.Module):
    """A basis of one layer that `fit_bases` finds during the run, the identity before that. Its sides [H, D, D] are part of a checkpoint; `topk` is
    the budget that it is fitted to, for its gain."""

    query: Tensor
    key: Tensor

    def __init__(self, num_kv_heads: int, head_dim: int, topk: int | None) -> None:
        super().__init__()
        self.topk = topk
        one = FeatureBasis.identity(num_kv_heads, head_dim)
        self.register_buffer("query", one.query)
        self.register_buffer("key", one.key)

    def forward(self) -> FeatureBasis:
        return FeatureBasis(self.query, self.key, topk=self.topk)

    @torch.no_grad()
    def take(self, basis: FeatureBasis) -> None:
        """Be `basis`: that of the first process, in all of them."""
        for own, found in ((self.query, basis.query), (self.key, basis.key)):
            own.copy_(found)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.broadcast(own, 0)


def use_bases(model: Any, basis: FeatureBasis) -> None:
    """Let the sparse layers of a model that `install` prepared begin with theirs of `basis`, which are then fitted anew."""
    _, kv_heads, head_dim, _ = basis.key.shape
    for index, module in enumerate(attention_layers(model)):
        for core in module.sfa_core.modules():  # type: ignore[union-attr]
            if isinstance(core, SparseCore):
                core.basis = FittedBasis(kv_heads, head_dim, basis.topk)
                core.basis.take(basis[index])


@torch.no_grad()
def fit_bases(model: Any, cores: Sequence[SparseCore], batches: Iterable[dict[str, Any]]) -> None:
    """Fit the bases of a model's sparse layers, which are `FittedBasis`, to the queries and keys of `batches`, as `flashsfa convert` does.

    Raises `ValueError` if these hold NaN or infinity.
    """
    bases: list[Any] = [core.basis for core in cores]
    moments = [Moments(*basis.key.shape[:2]) for basis in bases]
    for core, seen in zip(cores, moments, strict=True):
        core.seen = seen
    # Moments lie on the CPU and grow: nothing for a compiled graph.
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        for batch in batches:
            model(**batch, use_cache=False)
    for core in cores:
        core.seen = None
    budget = cores[0].coding.budget
    kind = default_kind(budget.topk_query, bases[0].key.shape[-1])
    found = FeatureBasis.from_layers(moments, kind, topk=budget.topk, dense_dims=budget.dense_dims)
    for index, basis in enumerate(bases):
        basis.take(found[index])


def dense_attention(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """Causal dense attention: SDPA where it knows the mask."""
    if visible.window is None and visible.bounds is None:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=visible.scale, enable_gqa=grouped)
    return _attend(q, k, v, visible, FeatureBudget.lossless(q.shape[-1]))


def install(model: Any, make: Callable[[int, nn.Module], Core]) -> None:
    """Let `model` compute attention by `make(layer, attention module)`, layer by layer."""
    AttentionInterface.register(NAME, _attention_forward)
    AttentionMaskInterface.register(NAME, _no_mask)
    for index, module in enumerate(attention_layers(model)):
        module.sfa_core = make(index, module)
    set_attention(model, NAME)


def uninstall(model: Any, implementation: str) -> None:
    """Take the cores off again, and let `model` compute attention by transformers' `implementation`."""
    for module in attention_layers(model):
        del module.sfa_core
    set_attention(model, implementation)


def uninstall_sparse(model: Any, basis: FeatureBasis | None = None) -> None:
    """Take the cores off a switched model; if they have found a basis, theirs goes into their layers of `basis`, the identity by default,
    and `basis` to the model."""
    modules: list[Any] = attention_layers(model)
    with torch.no_grad():
        own = {
            i: core.basis()
            for i, module in enumerate(modules)
            for core in module.sfa_core.modules()
            if isinstance(core, SparseCore) and core.basis is not None
        }
    uninstall(model, "sfa")
    if not own:
        return
    if basis is None:
        first = next(iter(own.values()))
        one = FeatureBasis.identity(*first.key.shape[:2])
        query, key = (x.repeat(len(modules), 1, 1, 1) for x in (one.query, one.key))
        basis = FeatureBasis(query, key, topk=first.topk)
    for index, found in own.items():
        basis.query[index], basis.key[index] = found.query.cpu(), found.key.cpu()
    enable(model, basis=basis, **SFASettings.from_config(model.config.sfa).arguments())


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
) -> tuple[Tensor, None]:
    """The function that transformers calls."""
    if dropout:
        raise ValueError("attention weights are not dropped here: set the config's attention dropout to 0")
    if torch.is_autocast_enabled(query.device.type):  # norms and RoPE leave float32 beside values of 16 bits
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    core: Any = module.sfa_core
    out = core(query, key, value, Visible(scale, sliding_window, cu_seq_lens_q, max_length_q))
    return out.transpose(1, 2), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Windows are full, causality and documents are the cores' business."""


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Visible, budget: FeatureBudget, gradient: str = "kept") -> Tensor:
    bounds, longest, batch = visible.bounds, visible.longest, q.shape[0]
    if bounds is not None:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B·N, H, D]
    out = sparse_feature_attention(
        q, k, v, topk=budget.topk, topk_query=budget.topk_query, dense_dims=budget.dense_dims,
        query_pattern=budget.query_pattern, is_causal=True, scale=visible.scale, window=visible.window, cu_seqlens_q=bounds,
        cu_seqlens_k=bounds, max_seqlen_q=None if bounds is None else longest, max_seqlen_k=None if bounds is None else longest,
        gradient=gradient,
    )  # fmt: skip
    return out if bounds is None else out.unflatten(0, (batch, -1)).transpose(1, 2)


@torch.no_grad()
def scale_queries(module: Any, factor: float | Tensor) -> None:
    """Make the queries of an attention module `factor` times as large, a number or one for each feature of a head [D]."""
    if hasattr(module, "q_norm"):
        module.q_norm.weight *= factor
        return
    weight = module.c_attn.weight  # [hidden, 3·H·D]
    a_head = torch.as_tensor(factor, dtype=weight.dtype, device=weight.device).expand(module.head_dim)
    queries = a_head.repeat(weight.shape[1] // (3 * module.head_dim))
    _multiply_projections(module, queries, torch.ones_like(queries))


@torch.no_grad()
def _multiply_projections(module: Any, queries: Tensor, keys: Tensor) -> None:
    """Multiply what a GPT-2 attention module makes queries and keys of by factors [H·D]."""
    factors = torch.cat((queries, keys, torch.ones_like(keys)))
    for x in (module.c_attn.weight, module.c_attn.bias):  # [..., 3·H·D]
        x *= distribute_tensor(factors, x.device_mesh) if isinstance(x, DTensor) else factors

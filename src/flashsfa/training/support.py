"""Statistics of supports: which features queries and keys of a switched model keep, layer by layer and head by head."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import checked, require
from ..codes import code_queries, topk_codes
from ..extras import pyplot
from ..huggingface.attention import attention_forward, attention_mask
from ..huggingface.structure import attending_by, text_config
from ..huggingface.switch import is_enabled

_NAME = "sfa_support"


@dataclass(frozen=True)
class SupportStatistics:
    """Means over text, [L, H] each for L layers and H kv heads; NaN for a layer that was left dense.

    `verdict` calls a layer good if every head passes three tests:

    - entropy of at least 0.85, the lowest that the paper reports of trained models (0.85 to 0.98); below, few features take most
      of the keys and the others are wasted.
    - overlap above `chance`, that of supports drawn at random: a pair that shares nothing scores 0, whatever it means. Dense
      queries share a feature with every key, and pass.
    - effective k of at least half of `topk`, a threshold of ours: below, half of a key's features hardly count, and a smaller
      `topk` would cost little.

    Attributes:
        entropy: of how often each sparse feature is among a key's largest, divided by that of equal shares: 1 if all are
            used alike.
        overlap: share of causal pairs whose query and key share a sparse feature, over the query heads of the kv head.
            1 for dense queries.
        effective_topk: features that carry a key: (Σ|x|²)² / Σ|x|⁴ over its kept sparse ones, 1 to topk.
        topk: features that a key keeps of the sparse ones.
        topk_query: those that a query keeps; None for dense queries.
        sparse_dims: features that are not always kept.
    """

    entropy: Tensor
    overlap: Tensor
    effective_topk: Tensor
    topk: int
    topk_query: int | None
    sparse_dims: int

    LEAST_ENTROPY: ClassVar[float] = 0.85

    @property
    def chance(self) -> float:
        """The overlap of supports that are drawn at random."""
        if self.topk_query is None:
            return 1.0
        apart = math.comb(self.sparse_dims - self.topk_query, self.topk) if self.topk_query < self.sparse_dims else 0
        return 1 - apart / math.comb(self.sparse_dims, self.topk)

    @property
    def least_effective(self) -> float:
        """The effective k from which on a layer is called good."""
        return self.topk / 2

    def verdict(self, layer: int) -> str:
        """ "good", or what is bad about a layer; "dense" for one that was left dense."""
        entropy, overlap, effective = (x[layer] for x in (self.entropy, self.overlap, self.effective_topk))
        if bool(entropy.isnan().any()):
            return "dense"
        faults = (
            ("low entropy", float(entropy.min()) < self.LEAST_ENTROPY),
            ("overlap no better than chance", self.topk_query is not None and float(overlap.min()) <= self.chance),
            ("few features carry a key", float(effective.min()) < self.least_effective),
        )
        return ", ".join(fault for fault, is_found in faults if is_found) or "good"

    def rows(self) -> list[dict[str, float]]:
        """A row for each layer and head."""
        layers, heads = self.entropy.shape
        columns = {name: getattr(self, name) for name in _COLUMNS}
        return [
            {"layer": layer, "head": head, **{name: float(x[layer, head]) for name, x in columns.items()}}
            for layer in range(layers)
            for head in range(heads)
        ]


_COLUMNS = ("entropy", "overlap", "effective_topk")


@torch.no_grad()
def support_statistics(model: Any, windows: Tensor, progress: Callable[[], None] = lambda: None) -> SupportStatistics:
    """The statistics of a model that `flashsfa.enable` switched, over windows [S, W] of token ids.

    Args:
        progress: called after each window.

    Raises `ValueError` for a model that is not switched, that keeps no topk, or whose queries or keys hold NaN.
    """
    require(is_enabled(model), f"{type(model).__name__} is dense: flashsfa convert or flashsfa.enable makes it sparse")
    require(
        model.config.sfa["topk"] is not None,
        f"{type(model).__name__} has no topk: its keys are in bits per axis, and keep every feature; supports are those of a model "
        "that is converted with --topk",
    )
    found: dict[int, _Sums] = {}
    layers = text_config(model).num_hidden_layers

    def record(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        coding = getattr(module, "sfa", None)
        if coding is not None:
            sums = found.setdefault(module.layer_idx, _Sums(key.shape[1], coding))
            sums.add(coding, coding.queries(query), coding.keys(key))
        return attention_forward(module, query, key, *args, **kwargs)

    with attending_by(model, _NAME, record, attention_mask), checked():
        for window in windows:
            model(input_ids=window[None].to(model.device), use_cache=False)
            progress()
    heads = next(iter(found.values())).counts.shape[0]
    missing = torch.full((heads,), math.nan, device="cpu")
    means = [found[i].means() if i in found else (missing,) * 3 for i in range(layers)]
    entropy, overlap, effective_topk = (torch.stack(columns) for columns in zip(*means, strict=True))
    return SupportStatistics(entropy, overlap, effective_topk, **next(iter(found.values())).budgets)


def draw(title: str, statistics: SupportStatistics, path: Path) -> None:
    """Write three maps, layers over heads, as a PNG."""
    plt = pyplot()
    layers, heads = statistics.entropy.shape
    figure, panels = plt.subplots(1, 3, figsize=(10, 1.8 + 0.16 * max(layers, 8)), layout="constrained", sharey=True)
    figure.suptitle(title, fontsize=11)
    labels = (
        ("entropy", "entropy of keys' features", 1.0), ("overlap", "pairs that share a feature", 1.0),
        ("effective_topk", f"effective features of {statistics.topk}", float(statistics.topk)),
    )  # fmt: skip
    for axes, (name, label, most) in zip(panels, labels, strict=True):
        values = getattr(statistics, name)
        image = axes.imshow(values.numpy(), vmin=0, vmax=most, cmap="YlGnBu", aspect="auto")
        axes.set_title(f"{label}\nmean {float(values.nanmean()):.2f}", fontsize=10)
        axes.set_xlabel("kv head")
        axes.set_xticks(range(heads) if heads <= 16 else range(0, heads, heads // 8))
        figure.colorbar(image, ax=axes)
    panels[0].set_ylabel("layer")
    figure.savefig(path, dpi=130)
    plt.close(figure)


class _Sums:
    """What is added up of one layer."""

    def __init__(self, kv_heads: int, coding: Any) -> None:
        budget = coding.budget
        self.budgets: dict[str, Any] = {
            "topk": budget.topk, "topk_query": None if budget.keeps_queries else budget.topk_query, "sparse_dims": budget.sparse_dims,
        }  # fmt: skip
        self.counts = torch.zeros(kv_heads, budget.sparse_dims, dtype=torch.float64, device="cpu")
        self.overlap = torch.zeros(kv_heads, dtype=torch.float64, device="cpu")
        self.effective = torch.zeros(kv_heads, dtype=torch.float64, device="cpu")
        self.windows = 0

    def add(self, coding: Any, q: Tensor, k: Tensor) -> None:
        """q [1, Hq, N, D] and k [1, H, N, D] of one window, in the layer's coordinates."""
        heads, n = k.shape[1], k.shape[2]
        budget = coding.budget
        codes = topk_codes(k, budget.topk, dense_dims=budget.dense_dims)
        kept = _support(codes.indices, codes.sparse_dims)[0]  # [H, N, D - M]
        self.counts += kept.sum(1).double().cpu()
        power = codes.values[0].double().square()  # [H, N, K]
        ratio = power.sum(-1).square() / power.square().sum(-1).clamp(min=torch.finfo(power.dtype).tiny)
        self.effective += ratio.mean(-1).cpu()
        if budget.topk_query == q.shape[-1]:
            self.overlap += 1
        else:
            indices = code_queries(q, budget).indices
            queries = _support(indices, codes.sparse_dims)[0].unflatten(0, (heads, -1))  # [H, G, N, D - M]
            share = (queries @ kept[:, None].mT > 0).tril().sum((1, 2, 3))  # [H]
            self.overlap += (share.double() / (queries.shape[1] * n * (n + 1) / 2)).cpu()
        self.windows += 1

    def means(self) -> tuple[Tensor, Tensor, Tensor]:
        """Entropy, overlap and effective features, [H] each."""
        shares = self.counts / self.counts.sum(-1, keepdim=True)
        entropy = torch.special.entr(shares).sum(-1) / math.log(max(2, shares.shape[-1]))
        return tuple(x.float() for x in (entropy, self.overlap / self.windows, self.effective / self.windows))  # type: ignore[return-value]


def _support(indices: Tensor, dims: int) -> Tensor:
    """[..., N, dims] float32: 1 where a feature is kept."""
    kept = torch.zeros((*indices.shape[:-1], dims), device=indices.device)
    return kept.scatter_(-1, indices.long(), 1.0)

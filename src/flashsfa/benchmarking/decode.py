"""Cases of `sparse_feature_decode`: one new token over a cache of codes, beside SDPA over the dense keys.

Caches of all features in 8 and 4 bits, `dense-int8` and `dense-int4`, are cases like the others, read by the same kernels as codes
of as many bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..axes import AxisBits
from ..cache.contiguous import SparseKVCache
from ..codes import topk_codes
from ..decode import sparse_feature_decode
from ..narrow import NarrowRows
from ..ops.decode.plain import needed_rows
from ..ops.record import last_choice
from ..stored import ExactKV, KeyCodes, KVView
from .cases import Baseline, Verdict, Workload, facet_name, sdpa_backends, tokens_label
from .configuration import Configuration

# By head size, and whether queries are dense: as converted models and those of recipes/scale.sh run, and over a cache that keeps all
# features.
_CONFIGURATIONS = {
    (128, False): (
        "k16",
        "16+k16",
        "k16-int8",
        "16+k16-int8",
        "k16-int4",
        "16+k16-int4",
        "k16-skip",
        "k16-int8-skip",
        "k16-int4-skip",
    ),
    (128, True): (
        "32+k16",
        "32+k16-int8",
        "32+k16-int4",
        "16+k8",
        "16+k8-int8",
        "16+k8-int4",
        "dense-int8",
        "dense-int4",
        "axes48-int4",
        "axes48-int3",
        "axes32-int4",
    ),
    (64, False): ("k8",),
    (64, True): (
        "k8",
        "k8-int8",
        "k8-int4",
        "22+k12",
        "28+k12-int8",
        "22+k12-int4",
        "axes36-int4",
        "axes24",
        "axes24-int4",
        "axes24-int3",
        "dense-int8",
        "dense-int4",
    ),
}
_QUICK = ("k16", "k16-int8", "k16-int4", "22+k12", "28+k12-int8", "axes48-int4", "dense-int8", "dense-int4")
_APPEND_TOKENS = 8192  # coding a long context at once would need several times its memory
_SAMPLE_TOKENS = 2048  # that the bits of axes are fitted to
_TOLERANCE = 1e-2
_UNION_SHARE = 0.22  # of V rows that carry 1 - 1e-2 of the weight: a trained model's heads at 8000 tokens


def cases(device: torch.device, quick: bool) -> list[DecodeCase]:
    """Every configuration, head count and context length; on the CPU in float32 and smaller. Quick: some configurations, one
    head count, and two lengths of which it should pay at the longer one."""
    on_gpu = device.type == "cuda"
    batch = 8 if on_gpu else 1
    layouts: tuple[tuple[int, int], ...] = ((16, 16), (32, 8)) if on_gpu else ((8, 8), (16, 4))
    lengths: tuple[int, ...] = (8192, 32768, 131072) if on_gpu else (4096, 32768)
    if quick:
        layouts, lengths = layouts[:1], (8192, 32768) if on_gpu else (4096, 16384)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    return [
        DecodeCase(batch, *heads, n, Configuration.named(name, head_dim), dtype, device, has_dense_queries)
        for (head_dim, has_dense_queries), names in _CONFIGURATIONS.items()
        for name in names
        if not quick or name in _QUICK
        for heads in layouts
        for n in lengths
    ]


@dataclass(frozen=True)
class DecodeCase:
    """One decode step: q [batch, query_heads, 1, head_dim] over n tokens of kv_heads heads. Queries keep as many features as
    keys, or all.

    Where the configuration skips values, the queries are shaped so that the scores look like a trained model's, see
    `shaped_queries`.
    """

    batch: int
    query_heads: int
    kv_heads: int
    n: int
    configuration: Configuration
    dtype: torch.dtype
    device: torch.device
    has_dense_queries: bool = False

    @property
    def name(self) -> str:
        width = self.configuration.head_dim
        return f"d={width}, {self.curve}, {self.query_heads}/{self.kv_heads} heads, n={tokens_label(self.n)}"

    @property
    def facet(self) -> str:
        return facet_name(self.configuration.head_dim, self.query_heads, self.kv_heads, self.batch)

    @property
    def curve(self) -> str:
        if self.configuration.is_dense:
            return f"{self.configuration.name} by the same kernels"
        return self.configuration.name + (", dense queries" if self.has_dense_queries else "")

    @property
    def value_tolerance(self) -> float:
        return _TOLERANCE if self.configuration.skips else 0.0

    def prepare(self) -> Workload:
        """Random keys and values of unit variance, in a cache; queries alike or shaped."""
        generator = torch.Generator(self.device).manual_seed(0)
        draw = partial(torch.randn, generator=generator, dtype=self.dtype, device=self.device)
        k, v = (draw(self.batch, self.kv_heads, self.n, self.configuration.head_dim) for _ in "kv")
        axes = None
        if self.configuration.axis_bytes is not None:
            order, axes = AxisBits.fit(k[0, :, :_SAMPLE_TOKENS], self.configuration.axis_bytes)
            k = k.gather(-1, order[:, None].expand_as(k))
        cache: Any = self._filled_cache(k, v, axes)
        q = draw(self.batch, self.query_heads, 1, self.configuration.head_dim)
        v_rows_read = None
        if self.value_tolerance:
            stored = KVView(cache.codes, cache.v, cache.v_scale)
            q = shaped_queries(q, stored, self.value_tolerance, self.has_dense_queries)
            v_rows_read = needed_share(q, stored, self.value_tolerance, self.has_dense_queries)
        options: dict[str, Any] = {"value_tolerance": self.value_tolerance, "v_scale": cache.v_scale}
        if self.has_dense_queries:
            options["topk_query"] = self.configuration.head_dim
        codes, stored_v = cache.codes, cache.v
        tokens, v_bytes = self.batch * self.kv_heads * self.n, cache.nbytes - codes.nbytes
        read = codes.nbytes + (v_bytes if v_rows_read is None else round(v_rows_read * v_bytes))
        return Workload(
            run=lambda: sparse_feature_decode(q, codes, stored_v, **options),
            check=lambda out: self._check(out, q, k, v, codes, stored_v, cache.v_scale),
            nbytes=read + 2 * q.nbytes,  # the output is as large as q
            tokens=tokens,
            bytes_per_token=cache.nbytes / tokens,
            choice=lambda: last_choice("decode"),
            v_rows_read=v_rows_read,
            baselines=baselines(q, k, v),
        )

    def _filled_cache(self, k: Tensor, v: Tensor, axes: AxisBits | None) -> SparseKVCache:
        topk, dense_dims = (None, 0) if axes is not None else self.configuration.code
        cache = SparseKVCache(
            topk, dense_dims=dense_dims, axes=axes, capacity=self.n, dtype=self.configuration.cache_dtype
        )
        for start in range(0, self.n, _APPEND_TOKENS):
            chunk = slice(start, start + _APPEND_TOKENS)
            cache.append(k[:, :, chunk], v[:, :, chunk])
        return cache

    def _check(
        self,
        out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        codes: KeyCodes,
        stored_v: Tensor | NarrowRows,
        v_scale: Tensor | None,
    ) -> Verdict:
        """The error rule, by the norm of each output row: at most twice the error of SDPA over the same stored
        codes in the same dtype, both against fp64, and a few roundings; a tolerance τ adds its bound 2·τ·max‖v‖.

        The error that is reported is taken against unquantised codes and values.
        """
        stored = KVView(codes, stored_v, v_scale)
        topk, dense_dims = self.configuration.code
        kept_q = q if self.has_dense_queries else topk_codes(q, topk, dense_dims=dense_dims).to_dense()
        sparse_q = _grouped(kept_q, self.kv_heads)
        out = _grouped(out, self.kv_heads)  # [B, Hkv, G, Dv], and so is sparse_q
        worst = torch.zeros(4, dtype=torch.float64, device=out.device)  # of: ours, SDPA's error, ‖truth‖, ‖v‖
        squares = torch.zeros(2, dtype=torch.float64, device=out.device)  # of: ours against unquantised, that truth
        for head, held in _kv_heads(stored):
            keys, values = (x[:, head[1]].double() for x in (held.k, held.v))
            rows, got = sparse_q[head], out[head].double()
            truth, _ = reference.attention(rows.double(), keys, values)  # [1, 1, G, Dv]
            plain = F.scaled_dot_product_attention(rows, keys.to(q.dtype), values.to(q.dtype)).double()
            found = [x.norm(dim=-1).max() for x in (got - truth, plain - truth, truth, values)]
            worst = torch.maximum(worst, torch.stack(found))
            if self.configuration.bits < 16:
                exact = k[head]
                if self.configuration.topk is not None:
                    exact = topk_codes(exact, topk, dense_dims=dense_dims).to_dense()
                truth, _ = reference.attention(rows.double(), exact.double(), v[head].double())
            squares += torch.stack([(got - truth).square().sum(), truth.square().sum()])
        ours, sdpa, size, largest_v = worst.tolist()
        allowed = 2 * sdpa + 4 * torch.finfo(q.dtype).eps * size + 2 * self.value_tolerance * largest_v
        passed = ours <= allowed  # False for NaN
        note = "" if passed else f"wrong output: error {ours:.3g}, allowed {allowed:.3g} (largest norm of a row)"
        return Verdict(passed, math.sqrt(squares[0] / squares[1]), note)


def baselines(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Baseline]:
    """SDPA over dense k and v by its fastest backends, given grouped query heads as such (`enable_gqa`) and, as one
    new token allows, as the rows of one query per kv head, which reads a kv head once for all of its queries."""
    forms = {"": q} if q.shape[1] == k.shape[1] else {"": q, "_grouped": _grouped(q, k.shape[1])}
    nbytes = k.nbytes + v.nbytes + 2 * q.nbytes
    return {
        name + suffix: Baseline(partial(attend, queries, k, v), nbytes)
        for name, attend in sdpa_backends(q.device).items()
        for suffix, queries in forms.items()
    }


def shaped_queries(
    q: Tensor, stored: KVView, tolerance: float, has_dense_queries: bool = False, share: float = _UNION_SHARE
) -> Tensor:
    """Queries whose softmax over `stored` keys is as peaked as a trained model's.

    The query heads of a kv head are given a part in common, as they attend to related things, and all are scaled by
    one factor, found by bisection, so that `share` of the V rows carry all but `tolerance` of the
    weight, counted as `needed_share` does. Weights are then about log-normal, and the heavy rows lie scattered: no
    runs of neighbours help the kernel.

    Args:
        q: [B, Hq, 1, D] normal.
        stored: keys [B, Hkv, N, ...].

    Returns:
        [B, Hq, 1, D] in the dtype of q.
    """
    groups = q.unflatten(1, (stored.v.shape[1], -1))  # [B, Hkv, G, 1, D]
    common = math.sqrt(groups.shape[2]) * groups.mean(2, keepdim=True)  # of the variance of each query
    q = (groups + common).flatten(1, 2)
    sample = next(iter(_scores(q, stored, has_dense_queries)))  # one sequence, all of its heads
    low, high = 0.0, 64.0 / float(sample.std())
    for _ in range(24):
        factor = (low + high) / 2
        if float(_needed(factor * sample, tolerance).mean()) > share:
            low = factor  # too flat
        else:
            high = factor
    return q * high


def needed_share(q: Tensor, stored: KVView, tolerance: float, has_dense_queries: bool = False) -> float:
    """Share of V rows outside the lightest ones that sum to at most `tolerance` of the weight, as the union over
    the query heads of a kv head, mean over all kv heads: the least that must be read."""
    shares = [_needed(scores, tolerance).mean() for scores in _scores(q, stored, has_dense_queries)]
    return float(torch.stack(shares).mean())


def _scores(q: Tensor, stored: KVView, has_dense_queries: bool) -> Iterator[Tensor]:
    """Scores [Hkv, G, N] of each sequence in turn, float32."""
    topk, dense_dims = stored.key_budget
    kept = q if has_dense_queries else topk_codes(q, topk, dense_dims=dense_dims).to_dense()
    rows = _grouped(kept, stored.v.shape[1]).float() / math.sqrt(q.shape[-1])
    for b in range(q.shape[0]):
        yield rows[b] @ stored.map(lambda x: x[b : b + 1]).rows(torch.float32).k[0].float().mT  # noqa: B023 (called at once)


def _needed(scores: Tensor, tolerance: float) -> Tensor:
    """Which V rows [Hkv, N] the scores [Hkv, G, N] need, 0 or 1."""
    return needed_rows(scores.softmax(-1), tolerance).to(scores.dtype)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """x [B, Hq, 1, D] as [B, Hkv, G, D]."""
    return x.unflatten(1, (kv_heads, -1)).squeeze(3)


def _kv_heads(stored: KVView) -> Iterator[tuple[tuple[slice, slice], ExactKV]]:
    """An index a kv head, that keeps both leading dimensions, and the rows of its sequence: fp64 scores of all heads at once would not
    fit."""
    for b in range(stored.v.shape[0]):
        rows = stored.map(lambda x: x[b : b + 1]).rows(torch.float64)  # noqa: B023 (called at once)
        for h in range(stored.v.shape[1]):
            yield (slice(b, b + 1), slice(h, h + 1)), rows

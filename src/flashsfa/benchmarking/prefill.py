"""Cases of causal prefill: attention over whole sequences, beside the dense kernels that are installed.

A case runs the operator as a model does, top-k of queries and keys included, over the same random q, k and v that the
baselines take dense. On Hopper `kernel_alone` is this package's kernel over codes made before, on sparse tensor cores for
queries in the 2:4 pattern, and on dense ones for others.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..attention import sparse_feature_attention
from ..budget import FeatureBudget
from ..codes import FeatureCodes, all_dense_codes, code_queries, topk_codes
from ..mask import Mask
from ..ops.prefill.hopper import prefill as hopper
from ..ops.record import last_choice
from .cases import Baseline, Verdict, Workload, facet_name, sdpa_backends, tokens_label
from .configuration import code_name

_CHECKED_QUERIES = 256  # the last ones, which see most keys: fp64 scores of all would not fit


def cases(device: torch.device, quick: bool) -> list[PrefillCase]:
    """Both published codes, with queries as sparse as keys, dense, and in the 2:4 pattern without and with a dense channel, at
    three lengths; smaller and in float32 on the CPU. Quick: two lengths of which it should pay at the longer one."""
    on_gpu = device.type == "cuda"
    lengths: tuple[int, ...] = (4096, 16384, 65536) if on_gpu else (1024, 4096)
    if quick:
        lengths = (8192, 32768) if on_gpu else (1024, 4096)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    heads = 16 if on_gpu else 2
    codes: list[dict[str, Any]] = [
        {"head_dim": head_dim, "topk": topk, **queries}
        for head_dim, topk in ((128, 16), (64, 8))
        for queries in (
            {},
            {"topk_query": head_dim},
            {"topk_query": head_dim // 2, "query_pattern": "2:4"},
            {"topk_query": (head_dim - 32) // 2, "dense_dims": 32, "query_pattern": "2:4"},
        )
    ]
    return [PrefillCase(1, heads, heads, n, dtype=dtype, device=device, **code) for code in codes for n in lengths]


@dataclass(frozen=True)
class PrefillCase:
    """Causal attention of q [batch, query_heads, n, head_dim] to as many keys of kv_heads heads."""

    batch: int
    query_heads: int
    kv_heads: int
    n: int
    head_dim: int
    topk: int
    dtype: torch.dtype
    device: torch.device
    topk_query: int | None = None
    dense_dims: int = 0
    query_pattern: str | None = None

    @property
    def name(self) -> str:
        heads = f"{self.query_heads}/{self.kv_heads} heads"
        return f"d={self.head_dim}, {self.curve}, {heads}, n={tokens_label(self.n)}"

    @property
    def facet(self) -> str:
        return facet_name(self.head_dim, self.query_heads, self.kv_heads, self.batch)

    @property
    def curve(self) -> str:
        kind = "dense" if self.topk_query == self.head_dim else self.query_pattern
        name = code_name(self.topk, self.dense_dims)
        return name if kind is None else f"{name}, {kind} queries"

    def prepare(self) -> Workload:
        generator = torch.Generator(self.device).manual_seed(0)
        draw = partial(torch.randn, generator=generator, dtype=self.dtype, device=self.device)
        q = draw(self.batch, self.query_heads, self.n, self.head_dim)
        k, v = (draw(self.batch, self.kv_heads, self.n, self.head_dim) for _ in "kv")
        tokens = self.batch * self.kv_heads * self.n
        nbytes = 2 * q.nbytes + k.nbytes + v.nbytes  # the output is as large as q
        found = {name: Baseline(run, nbytes) for name, run in baselines(q, k, v).items()}
        found |= self._kernel_alone(q, k, v, nbytes)
        return Workload(
            run=lambda: sparse_feature_attention(
                q,
                k,
                v,
                topk=self.topk,
                topk_query=self.topk_query,
                dense_dims=self.dense_dims,
                query_pattern=self.query_pattern,
                is_causal=True,
            ),
            check=lambda out: self._check(out, q, k, v),
            flops=2 * self.batch * self.query_heads * self.n**2 * self.head_dim,  # QKᵀ and PV, dense, half of all pairs
            nbytes=nbytes,
            tokens=tokens,
            bytes_per_token=(k.nbytes + v.nbytes) / tokens,
            choice=lambda: last_choice("attention"),
            baselines=found,
        )

    def _codes(self, q: Tensor, k: Tensor) -> tuple[FeatureCodes, FeatureCodes]:
        k_codes = topk_codes(k, self.topk, dense_dims=self.dense_dims)
        budget = FeatureBudget.of(
            self.head_dim,
            self.topk,
            topk_query=self.topk_query,
            dense_dims=self.dense_dims,
            query_pattern=self.query_pattern,
        )
        return code_queries(q, budget), k_codes

    def _kernel_alone(self, q: Tensor, k: Tensor, v: Tensor, nbytes: int) -> dict[str, Baseline]:
        q_codes, k_codes = self._codes(q, k)
        if self.query_pattern is None:
            q_codes = all_dense_codes(q_codes.to_dense())
        scale, rows = self.head_dim**-0.5, k_codes.to_dense()
        mask = Mask(is_causal=True)
        if hopper.obstacle(q, q_codes.dense_dims, rows, v, mask, scale) is not None:
            return {}
        run = partial(hopper.forward, q_codes, rows, v, mask=mask, scale=scale)
        return {"kernel_alone": Baseline(run, nbytes, competes=False)}

    def _check(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Verdict:
        """The error rule for the last queries of one head at a time: at most twice the error of a plain run over the
        same codes in the same dtype, both against fp64, and a few roundings."""
        group = self.query_heads // self.kv_heads
        rows = slice(max(0, self.n - _CHECKED_QUERIES), None)
        codes = [x.to_dense() for x in self._codes(q[..., rows, :], k)]
        worst = torch.zeros(3, dtype=torch.float64, device=out.device)  # of: ours, the plain run's error, the truth
        squares = torch.zeros(2, dtype=torch.float64, device=out.device)
        for b in range(self.batch):
            for h in range(self.query_heads):
                one = (slice(b, b + 1), slice(h, h + 1))
                kv = (slice(b, b + 1), slice(h // group, h // group + 1))
                parts = codes[0][one], codes[1][kv], v[kv]
                attend = partial(reference.attention, mask=Mask(is_causal=True))
                truth, _ = attend(*(x.double() for x in parts))
                plain, _ = attend(*parts)
                error, got = plain.double() - truth, out[one][..., rows, :].double() - truth
                worst = torch.maximum(worst, torch.stack([x.abs().max() for x in (got, error, truth)]))
                squares += torch.stack([got.square().sum(), truth.square().sum()])
        ours, plain_error, size = worst.tolist()
        allowed = 2 * plain_error + 4 * torch.finfo(self.dtype).eps * size
        passed = ours <= allowed  # False for NaN
        note = "" if passed else f"wrong output: error {ours:.3g}, allowed {allowed:.3g} (largest entry)"
        return Verdict(passed, float((squares[0] / squares[1]).sqrt()), note)


def baselines(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Any]]:
    """Causal dense attention by torch's fastest backends, and FlashAttention-4 where it is installed."""
    found: dict[str, Callable[[], Any]] = {
        name: partial(attend, q, k, v, is_causal=True) for name, attend in sdpa_backends(q.device).items()
    }
    if q.device.type != "cuda":
        return found
    if importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
        flash_attn_func = importlib.import_module("flash_attn.cute.interface").flash_attn_func
        by_token = [x.transpose(1, 2).contiguous() for x in (q, k, v)]  # [B, N, H, D], its layout
        found["fa4"] = lambda: flash_attn_func(*by_token, causal=True)
    return found

"""Cases of `topk_codes`, beside `torch.topk` of the same rows and a plain copy of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..codes import FeatureCodes, topk_codes
from ..ops.record import last_choice
from .cases import Baseline, Verdict, Workload, tokens_label
from .configuration import code_name


def cases(device: torch.device, quick: bool) -> list[TopkCase]:
    """The codes of the decode cases and one of a calibrated basis, over rows of 16 heads (8 on the CPU)."""
    on_gpu = device.type == "cuda"
    batch, heads = (8, 16) if on_gpu else (1, 8)
    lengths: tuple[int, ...] = (2048, 8192, 32768) if on_gpu else (1024, 4096, 16384)
    if quick:
        lengths = (512, 2048) if on_gpu else (128, 256)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    return [
        TopkCase(batch, heads, n, head_dim, topk, dense_dims, dtype, device)
        for head_dim, topk, dense_dims in ((128, 16, 0), (128, 16, 16), (64, 8, 0), (64, 12, 22))
        for n in lengths
    ]


@dataclass(frozen=True)
class TopkCase:
    """Coding x [batch, heads, n, head_dim]."""

    batch: int
    heads: int
    n: int
    head_dim: int
    topk: int
    dense_dims: int
    dtype: torch.dtype
    device: torch.device

    @property
    def name(self) -> str:
        return f"d={self.head_dim}, {self.curve}, [{self.batch}, {self.heads}, {tokens_label(self.n)}, {self.head_dim}]"

    @property
    def facet(self) -> str:
        return f"head size {self.head_dim}, {self.batch * self.heads} heads"

    @property
    def curve(self) -> str:
        return code_name(self.topk, self.dense_dims)

    def prepare(self) -> Workload:
        generator = torch.Generator(self.device).manual_seed(0)
        x = torch.randn(
            self.batch, self.heads, self.n, self.head_dim, generator=generator, dtype=self.dtype, device=self.device
        )
        magnitude = x[..., self.dense_dims :].abs()
        target = torch.empty_like(x)
        tokens = self.batch * self.heads * self.n
        code_bytes = x.itemsize * (self.dense_dims + self.topk) + self.topk  # indices are a byte each
        int64_and_value = 8 + x.itemsize  # what torch.topk writes an entry
        return Workload(
            run=lambda: topk_codes(x, self.topk, dense_dims=self.dense_dims),
            check=lambda codes: self._check(codes, x),
            nbytes=x.nbytes + tokens * code_bytes,
            tokens=tokens,
            bytes_per_token=code_bytes,
            choice=lambda: last_choice("topk_codes"),
            baselines={
                # of magnitudes made beforehand, in any order: the least that torch could do
                "torch_topk": Baseline(
                    lambda: magnitude.topk(self.topk, sorted=False),
                    magnitude.nbytes + tokens * self.topk * int64_and_value,
                ),
                "copy": Baseline(lambda: target.copy_(x), 2 * x.nbytes, competes=False),
            },
        )

    def _check(self, codes: FeatureCodes, x: Tensor) -> Verdict:
        """Bit for bit the rows of the reference, with ascending indices."""
        for b in range(self.batch):
            expected = reference.topk_rows(x[b], self.topk, dense_dims=self.dense_dims)
            if not torch.equal(codes[b].to_dense(), expected):
                return Verdict(False, float("nan"), "wrong output: other entries kept than by the reference")
            if not bool((codes.indices[b].int().diff(dim=-1) > 0).all()):
                return Verdict(False, float("nan"), "wrong output: indices are not in ascending order")
        return Verdict(True, 0.0)

"""Attention to the exact tokens of a view, folded into that to its coded ones, in one launch.

They are few, so that the time is that of one way to memory and back: each block asks for all that it reads at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .....mask import Mask
from .....scores import ScoreRules
from .....stored import KVView
from .... import nvrtc
from ....triton.rows import next_power_of_2
from . import compiler
from .compiler import Variant
from .params import Entries, Params

_WIDEST = 256
_MOST_SEQUENCES = 65535  # the third dimension of a grid


def obstacle(q: Tensor, kv: KVView) -> str | None:
    """Why the kernel cannot take the exact tokens of a view on a Hopper GPU, or None if it can. Looks at no values."""
    if nvrtc.obstacle() is not None:
        return f"the CUDA kernel is compiled at run time: {nvrtc.obstacle()}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the CUDA kernel takes float16 and bfloat16, not {q.dtype}"
    widths = q.shape[-1], kv.v.shape[-1]
    if any(width % 8 or not 8 <= width <= _WIDEST for width in widths):
        return f"the CUDA kernel takes widths that are multiples of 8 up to {_WIDEST}, not {widths[0]} and {widths[1]}"
    if len(q) > _MOST_SEQUENCES:
        return f"the CUDA kernel takes at most {_MOST_SEQUENCES} sequences, not {len(q)}"
    if not all(is_aligned(x) for part in kv.exact for x in (part.k, part.v)):
        return "the CUDA kernel takes exact tokens whose rows begin at multiples of 16 bytes"
    return None


@dataclass
class Prepared:
    """The kernel for queries and exact tokens of one form: where they lie and how many there are may change.

    Attributes:
        params: what the kernel is passed but for addresses and numbers of tokens.
        grid: of thread blocks.
        lasting: what the kernel reads beside the view and the queries.
    """

    kernel: nvrtc.Kernel
    params: Params
    grid: tuple[int, int, int]
    lasting: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, q: Tensor, kv: KVView, mask: Mask, scores: ScoreRules) -> Prepared | str:
        """For q [B, Hq, M, D] with rows as those of exact tokens, a view and a mask of all its tokens, without the padding of the mask, which
        each call brings; or why it cannot be built."""
        (batch, q_heads, m, head_dim), kv_heads, value_dim = q.shape, kv.v.shape[1], kv.v.shape[-1]
        group = q_heads // kv_heads
        most = 8 if max(head_dim, value_dim) <= 128 else 4  # what is summed lies in registers
        variant = Variant(q.dtype == torch.bfloat16, head_dim, value_dim, min(next_power_of_2(group * m), most))
        kernel = nvrtc.load_kernel(compiler.compile_cubin, variant, "exact_kernel", q.device.index)
        if isinstance(kernel, str):
            return kernel
        params = Params(rows=group * m, m=m, group=group, window=mask.window or 0)
        params.q_batch, params.q_head, params.q_token, _ = q.stride()
        for name, part in (("first", kv.first), ("recent", kv.recent)):
            if part is not None:
                setattr(params, f"{name}_k", _entries(part.k))
                setattr(params, f"{name}_v", _entries(part.v))
        positions, lengths = None if kv.recent is None else kv.recent.positions, mask.kv_lens
        if positions is not None:
            positions = positions.contiguous()
            params.positions = positions.data_ptr()
            params.positions_batch = positions.shape[1] if len(positions) > 1 else 0
        if lengths is not None:
            lengths = lengths.to(q.device).contiguous()
            params.lengths, params.lengths_are_64_bit = lengths.data_ptr(), lengths.dtype == torch.int64
        factor = None if scores.exact_factor is None else scores.exact_factor.contiguous()
        if factor is not None:
            params.factor = factor.data_ptr()
        softcap = scores.softcap
        params.scale = scores.scale if softcap is None else scores.scale / softcap
        params.cap = softcap or 0.0
        grid = (-(-group * m // variant.rows), kv_heads, batch)
        return cls(kernel, params, grid, (positions, lengths, factor, scores.exact_factor))

    def attend(self, q: Tensor, kv: KVView, padding: Tensor | None, out: Tensor, lse: Tensor) -> str | None:
        """Fold the exact tokens into out [B, Hq, M, Dv] and lse [B, Hq, M] float32 of the coded ones, both contiguous, in place; or say why
        it cannot be done. `padding` [B, N] bool."""
        params, first, recent = self.params, kv.first, kv.recent
        if q.data_ptr() % 16 or (params.factor or 0) % 16:
            return "the CUDA kernel takes queries, and what they are multiplied by, whose rows begin at multiples of 16 bytes"
        if first is not None:
            params.first_k.data, params.first_v.data = first.k.data_ptr(), first.v.data_ptr()
        if recent is not None:
            params.recent_k.data, params.recent_v.data = recent.k.data_ptr(), recent.v.data_ptr()
        n, n_first = kv.n, 0 if first is None else first.k.shape[2]
        params.n_first, params.n_exact = n_first, n_first + (0 if recent is None else recent.k.shape[2])
        params.n, params.n_coded = n, kv.n_coded
        padding = None if padding is None else padding.contiguous()
        params.padding, params.padding_batch = None if padding is None else padding.data_ptr(), n
        params.q, params.out, params.lse = q.data_ptr(), out.data_ptr(), lse.data_ptr()
        self.kernel.launch(self.grid, params)
        return None


def attend(q: Tensor, kv: KVView, mask: Mask, scores: ScoreRules, out: Tensor, lse: Tensor) -> str | None:
    """`Prepared.attend` for one call, whatever the strides of q."""
    q = q if is_aligned(q) else q.clone(memory_format=torch.contiguous_format)
    with torch.cuda.device_of(q):
        prepared = Prepared.of(q, kv, mask, scores)
        return prepared if isinstance(prepared, str) else prepared.attend(q, kv, mask.key_padding_mask, out, lse)


def is_aligned(x: Tensor) -> bool:
    """Whether all rows of x [B, H, N, C] are contiguous and begin at multiples of 16 bytes, a token within 2^31 entries from the next."""
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    return (
        (x.shape[-1] == 1 or x.stride(-1) == 1)
        and x.data_ptr() % 16 == 0
        and all(stride % 8 == 0 and stride < 1 << 31 for stride in strides[:-1])
    )


def _entries(x: Tensor) -> Entries:
    """How x [B, H, N, C] lies, but for where."""
    return Entries(None, *x.stride()[:3])

"""The fused attention kernels of torch, each behind one interface."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...mask import Mask
from ..select.plain import by_token

_aten = torch.ops.aten


class Kernel:
    """A fused kernel of torch: full or square causal attention with an optional additive bias.

    forward returns out and lse [B, Hq, N]; backward takes them back and returns dq, dk, dv.
    """

    multiple = 1  # the head width must be a multiple of this
    loses_nan = False  # whether NaN and infinity can become finite output

    def pad(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Zero columns until q, k and v share one width: they change no score and no kept output column."""
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # kernels assume rows in one piece
        width = max(q.shape[-1], v.shape[-1])
        width += -width % self.multiple
        return tuple(F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q, k, v))  # type: ignore[return-value]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        bias: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


class CpuFlash(Kernel):
    """torch's blocked CPU kernel: all float dtypes, any head ratio, bias together with causality."""

    loses_nan = True

    def forward(self, q, k, v, bias, is_causal, scale):  # type: ignore[no-untyped-def]
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)

    def backward(self, grad_out, q, k, v, out, lse, bias, is_causal, scale):  # type: ignore[no-untyped-def]
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, is_causal, attn_mask=bias, scale=scale
        )


class CudaFlash(Kernel):
    """FlashAttention-2 as torch carries it. It knows bottom-right causality, windows and packing itself, so it
    takes whole masks (`forward_masked`), never pieces."""

    multiple = 8

    def forward_masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        rows = [self._rows(x, mask) for x in (q, k, v)]
        out, lse, *_ = _aten._flash_attention_forward(
            *rows, **self._mask_arguments(q, k, mask, scale), return_debug_mask=False
        )
        lse, out = lse if lse.ndim == 3 else lse[None], self._heads(out, mask)
        # FA2 writes +inf for rows that see nothing, whose output is 0, and for rows with NaN
        unseen = out[..., 0].to(lse.dtype).where(out[..., 0].isnan(), -math.inf)
        return out, lse.where(lse != math.inf, unseen)

    def backward_masked(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: Mask,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        lse = lse.masked_fill(lse == -math.inf, math.inf)
        arguments = self._mask_arguments(q, k, mask, scale)
        rng = torch.zeros(2, dtype=torch.uint64, device=q.device)
        grads = _aten._flash_attention_backward(
            *(self._rows(x, mask) for x in (grad_out, q, k, v, out)),
            lse if mask.cu_seqlens_q is None else lse[0],
            rng_state=rng,
            unused=torch.empty(0, device=q.device),
            **arguments,
        )
        dq, dk, dv = (self._heads(x, mask) for x in grads)
        return dq, dk, dv

    @staticmethod
    def _rows(x: Tensor, mask: Mask) -> Tensor:
        """[B, H, N, D] as the kernel wants it: [B, N, H, D], or [T, H, D] when packed."""
        rows = x.transpose(1, 2)
        return rows if mask.cu_seqlens_q is None else rows[0]

    @staticmethod
    def _heads(x: Tensor, mask: Mask) -> Tensor:
        return (x if mask.cu_seqlens_q is None else x[None]).transpose(1, 2)

    @staticmethod
    def _mask_arguments(q: Tensor, k: Tensor, mask: Mask, scale: float) -> dict:
        packed = mask.cu_seqlens_q is not None
        window = -1 if mask.window is None else mask.window - 1
        return {
            "cum_seq_q": mask.cu_seqlens_q,
            "cum_seq_k": mask.cu_seqlens_k,
            "max_q": mask.max_seqlen_q if packed else q.shape[-2],
            "max_k": mask.max_seqlen_k if packed else k.shape[-2],
            "dropout_p": 0.0,
            "is_causal": mask.is_causal,
            "scale": scale,
            "window_size_left": window,
            "window_size_right": 0 if mask.is_causal else window,
        }


class CudaCudnn(Kernel):
    """cuDNN's fused attention: half precision, head widths to 128."""

    multiple = 16  # it accepts 8, and returns wrong gradients for a width of 40

    def forward(self, q, k, v, bias, is_causal, scale):  # type: ignore[no-untyped-def]
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            q, k, v, bias, True, 0.0, is_causal, False, scale=scale
        )
        return out, lse.view(q.shape[:-1])

    def backward(self, grad_out, q, k, v, out, lse, bias, is_causal, scale):  # type: ignore[no-untyped-def]
        # torch keeps one plan for q, k and v of the same strides, whatever those of out and grad_out: one order always
        grad_out, out = by_token(grad_out), by_token(out)
        no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
        return _aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, q, k, v, out, lse[..., None], no_dropout, no_dropout, bias, None, None,
            q.shape[-2], k.shape[-2], 0.0, is_causal, scale=scale,
        )  # fmt: skip


class CudaEfficient(Kernel):
    """torch's memory-efficient kernel: float32 as well, bias, no head groups (k and v are repeated)."""

    multiple = 8
    _rows_multiple = 32  # its log-sum-exp is padded to this

    def forward(self, q, k, v, bias, is_causal, scale):  # type: ignore[no-untyped-def]
        k, v = self._repeat(q, k), self._repeat(q, v)
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
            q, k, v, self._aligned(bias, q, k), True, 0.0, is_causal, scale=scale
        )
        return out, lse[..., : q.shape[-2]]

    def backward(self, grad_out, q, k, v, out, lse, bias, is_causal, scale):  # type: ignore[no-untyped-def]
        group = q.shape[1] // k.shape[1]
        lse = F.pad(lse, (0, -lse.shape[-1] % self._rows_multiple), value=math.inf)
        no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
            grad_out, q, self._repeat(q, k), self._repeat(q, v), self._aligned(bias, q, k), out, lse,
            no_dropout, no_dropout, 0.0, [True, True, True, False], is_causal, scale=scale,
        )  # fmt: skip
        return dq, *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))

    @staticmethod
    def _repeat(q: Tensor, x: Tensor) -> Tensor:
        return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) if x.shape[1] < q.shape[1] else x

    @staticmethod
    def _aligned(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """The kernel reads bias rows 16 bytes at a time: give them a padded pitch, then the expected shape."""
        if bias is None:
            return None
        n_k = k.shape[-2]
        padded = F.pad(bias, (0, -n_k % 16))[..., :n_k]
        return padded.expand(q.shape[0], q.shape[1], q.shape[-2], n_k)

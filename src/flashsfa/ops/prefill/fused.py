"""The dense backend: sparse rows, spread back to dense tiles, through the best attention kernel torch has.

torch's fused kernels know full and square causal attention, and some of them an additive bias. A mask is cut
into pieces of those two shapes (`_pieces`), each piece runs fused, and the parts meet by their log-sum-exp. So
bottom-right causality, windows, padding and packed sequences work on every device without an N x N matrix.
Gradients use the same pieces: a fused backward that is handed the *global* output and log-sum-exp returns its
piece's exact share.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...mask import AttentionMask
from ..select.operators import triton_is_installed
from ..select.plain import by_token

_aten = torch.ops.aten
_CUDNN_SHORTEST = 64  # cuDNN refuses some shorter sequences, and is no faster on them
# cuDNN's causality is square: a chunk of queries after earlier keys is two calls and a merge, FlashAttention-2's is
# one call. At some 600 and 350 TFLOP/s on an H100 cuDNN saves 1.2 us per GFLOP; two more launches cost about 50 us.
_CUDNN_CHUNK_FLOPS = 40e9
_SMALLEST_SCALE = 1e-30  # well within float32, in which kernels scale
_ROWS_AT_ONCE = 128  # rows computed anew: their scores are kept in full


def choose_kernel(q: Tensor, v: Tensor, mask: AttentionMask) -> tuple[Kernel | None, str]:
    """The fastest fused kernel for these tensors, and why; None where torch has none."""
    width = max(q.shape[-1], v.shape[-1])
    if q.device.type == "cpu":
        return CpuFlash(), "torch's fused CPU kernel"
    if q.device.type != "cuda":
        return None, f"torch has no fused attention with log-sum-exp on {q.device.type}"
    if q.dtype == torch.float64:
        return None, "no fused CUDA kernel takes float64"
    if q.dtype == torch.float32 or mask.key_padding_mask is not None:
        return CudaEfficient(), "torch's memory-efficient CUDA kernel: the one that takes float32 and padding"
    if width > 256:
        return CudaEfficient(), "torch's memory-efficient CUDA kernel: the one that takes heads wider than 256"
    n_q, n_k = q.shape[-2], v.shape[-2]
    plain = mask.window is None and mask.cu_seqlens_q is None
    two_sided = mask.window is not None and not mask.is_causal
    if two_sided and (mask.cu_seqlens_q is not None or n_q > n_k):
        return CudaEfficient(), "torch's memory-efficient CUDA kernel: FlashAttention-2 misplaces such a window"
    shorter = min(n_q, n_k)
    flops = 4 * q.shape[0] * q.shape[1] * width * shorter * (n_k - shorter / 2)  # if causal
    if (
        torch.cuda.get_device_capability(q.device) >= (9, 0)
        and plain
        and width <= 128
        and shorter >= _CUDNN_SHORTEST
        and (not mask.is_causal or n_q == n_k or flops >= _CUDNN_CHUNK_FLOPS)
    ):
        return CudaCudnn(), "cuDNN, the fastest dense kernel torch has for this mask on Hopper and later"
    if torch.cuda.get_device_capability(q.device) >= (8, 0):
        return CudaFlash(), "FlashAttention-2 of torch"
    return CudaEfficient(), "torch's memory-efficient CUDA kernel: FlashAttention-2 needs sm_80"


def forward(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of q [B, Hq, N_q, D], k [B, Hkv, N_k, D], v [B, Hkv, N_k, Dv] under `mask`: out [B, Hq, N_q, Dv]
    and lse [B, Hq, N_q] (float32, or float64 for float64 inputs). Rows that see nothing: 0 and -inf."""
    v_dim = v.shape[-1]
    if not q.numel():
        return q.new_zeros((*q.shape[:-1], v_dim)), q.new_full(q.shape[:-1], -math.inf, dtype=lse_dtype(q.dtype))
    q, scale, _ = _positive(q, scale)
    q, k, v = kernel.pad(q, *_blank_padding(mask, k, v))
    if isinstance(kernel, CudaFlash) and min(q.shape[-2], k.shape[-2]) > 0:
        out, lse = kernel.forward_masked(q, k, v, mask, scale)
        return out[..., :v_dim], lse

    def attend(piece: _Piece) -> tuple[Tensor, Tensor]:
        rows, keys = piece.rows, piece.keys
        part, part_lse = kernel.forward(
            q[..., rows, :], k[..., keys, :], v[..., keys, :], piece.bias(q.dtype), piece.is_causal, scale
        )
        if piece.empty_rows is not None:
            part_lse = part_lse.masked_fill(piece.empty_rows, -math.inf)
            part = part.masked_fill(piece.empty_rows[..., None], 0)
        if kernel.loses_nan or piece.hidden is not None:  # NaN plus a mask's -inf is NaN where nobody sees it
            _restore_nan(part, part_lse, q[..., rows, :], k[..., keys, :], v[..., keys, :], piece, scale)
        return part, part_lse

    pieces = _pieces(mask, q.shape[-2], k.shape[-2], q.device)
    if pieces and pieces[0].rows == slice(0, q.shape[-2]):  # what the others are folded into
        out, lse = attend(pieces.pop(0))
    else:
        out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
        lse = torch.full(q.shape[:-1], -math.inf, dtype=lse_dtype(q.dtype), device=q.device)
    for piece in pieces:
        _merge(out[..., piece.rows, :], lse[..., piece.rows], *attend(piece))
    return out[..., :v_dim], lse


def backward(
    kernel: Kernel,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: AttentionMask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for `forward`'s result."""
    if not q.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    q, scale, factor = _positive(q, scale)
    dq, dk, dv = _backward(kernel, grad_out, q, *_blank_padding(mask, k, v), out, lse, mask, scale)
    return dq if factor == 1 else dq * factor, dk, dv


def _backward(
    kernel: Kernel,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: AttentionMask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    k_dim, v_dim = k.shape[-1], v.shape[-1]
    q, k, v = kernel.pad(q, k, v)
    if v.shape[-1] > v_dim:  # F.pad copies even where there is nothing to pad
        out, grad_out = (F.pad(x, (0, v.shape[-1] - v_dim)) for x in (out, grad_out))
    if isinstance(kernel, CudaFlash) and min(q.shape[-2], k.shape[-2]) > 0:
        grads = kernel.backward_masked(grad_out, q, k, v, out, lse, mask, scale)
        return grads[0][..., :k_dim], grads[1][..., :k_dim], grads[2][..., :v_dim]
    pieces = _pieces(mask, q.shape[-2], k.shape[-2], q.device)
    whole = len(pieces) == 1 and pieces[0].covers(q, k)
    if not whole or pieces[0].empty_rows is not None:
        # A row that sees nothing has no gradient; +inf makes every weight exp(score - lse) of it zero.
        lse = lse.masked_fill(lse == -math.inf, math.inf)
    if whole:
        grads = kernel.backward(grad_out, q, k, v, out, lse, pieces[0].bias(q.dtype), pieces[0].is_causal, scale)
        return grads[0][..., :k_dim], grads[1][..., :k_dim], grads[2][..., :v_dim]
    # Several pieces add up in fp32 (or fp64), or their number would show in the rounding.
    totals = [torch.zeros(x.shape, dtype=lse_dtype(x.dtype), device=x.device) for x in (q, k, v)]
    for piece in pieces:
        rows, keys = piece.rows, piece.keys
        parts = kernel.backward(
            grad_out[..., rows, :],
            q[..., rows, :],
            k[..., keys, :],
            v[..., keys, :],
            out[..., rows, :],
            lse[..., rows],
            piece.bias(q.dtype),
            piece.is_causal,
            scale,
        )
        for total, part, where in zip(totals, parts, (rows, keys, keys), strict=True):
            total[..., where, :] += part
    dq, dk, dv = (total.to(q.dtype) for total in totals)
    return dq[..., :k_dim], dk[..., :k_dim], dv[..., :v_dim]


def _positive(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """q, its scale and the factor taken into q, such that the scale is positive: kernels take row maxima before they scale, or
    scale a mask's -inf, and return NaN for others."""
    if scale >= _SMALLEST_SCALE:
        return q, scale, 1.0
    factor, scale = (-1.0, -scale) if scale <= -_SMALLEST_SCALE else (scale, 1.0)
    return q * factor, scale, factor


def _blank_padding(mask: AttentionMask, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v [B, H, N, D] with zeros where a key is padding: whatever stands there, NaN too, must not reach a sum."""
    if mask.key_padding_mask is None:
        return k, v
    padding = mask.key_padding_mask[:, None, :, None]  # [B, 1, N, 1]
    return k.masked_fill(padding, 0), v.masked_fill(padding, 0)


def _restore_nan(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, piece: _Piece, scale: float) -> None:
    """Compute anew, in place and in plain PyTorch, the rows of out [B, Hq, R, D] and lse [B, Hq, R] in which a kernel may have lost
    NaN, or found some where it is hidden: torch's CPU kernel takes the maximum of a row of NaN for -inf, and returns 0 with a
    log-sum-exp of 0."""
    lost = ~lse.isfinite() | out[..., 0].isnan()
    if piece.empty_rows is not None:
        lost &= ~piece.empty_rows
    zero = lse == 0  # of honest rows too, so their output is looked at
    if bool(zero.any()):
        lost[zero] = (out[zero] == 0).all(-1)
    if not bool(lost.any()):
        return
    keys, values = (x.to(lse.dtype)[:, :, None] for x in (k, v))  # [B, Hkv, 1, N, D]
    for rows in lost.flatten(0, 1).any(0).nonzero()[:, 0].split(_ROWS_AT_ONCE):
        queries = q[:, :, rows].to(lse.dtype).unflatten(1, (k.shape[1], -1))  # [B, Hkv, G, R, D]
        scores = (scale * (queries @ keys.mT)).flatten(1, 2)  # [B, Hq, R, N]
        if piece.is_causal:
            scores = scores.masked_fill(torch.arange(k.shape[2], device=q.device) > rows[:, None], -math.inf)
        if piece.hidden is not None:
            hidden = piece.hidden if piece.hidden.shape[-2] == 1 else piece.hidden[..., rows, :]
            scores = scores.masked_fill(hidden, -math.inf)
        total = scores.logsumexp(-1)  # [B, Hq, R]
        finite = total.clamp(min=torch.finfo(total.dtype).min)
        weights = (scores - finite[..., None]).exp().unflatten(1, (k.shape[1], -1))
        rebuilt = (weights @ values).flatten(1, 2).to(out.dtype)
        again = lost[:, :, rows]
        lse[:, :, rows] = total.where(again, lse[:, :, rows])
        out[:, :, rows] = rebuilt.where(again[..., None], out[:, :, rows])


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a log-sum-exp over inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Fold a part over further keys into out [B, H, N, D] and lse [B, H, N], in place."""
    if out.is_cuda and triton_is_installed():
        from .triton import merge as merge_parts

        with torch.cuda.device_of(out):
            merge_parts.merge_parts(out, lse, part, part_lse)
        return
    total = torch.logaddexp(lse, part_lse)
    finite = total.clamp(min=torch.finfo(total.dtype).min)  # rows without any key yet: exp(-inf - finite) = 0
    keep, add = (lse - finite).exp(), (part_lse - finite).exp()
    out.copy_(out * keep[..., None] + part * add[..., None])
    lse.copy_(total)


@dataclass(frozen=True)
class _Piece:
    """A rectangle of the mask that a fused kernel runs: query rows x keys, square if causal."""

    rows: slice
    keys: slice
    is_causal: bool
    hidden: Tensor | None = None  # [B or 1, 1, rows, keys] or broadcastable, True where invisible
    empty_rows: Tensor | None = None  # [B or 1, 1, rows] True where a row sees nothing here

    def covers(self, q: Tensor, k: Tensor) -> bool:
        return self.rows == slice(0, q.shape[-2]) and self.keys == slice(0, k.shape[-2])

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        if self.hidden is None:
            return None
        return torch.zeros(self.hidden.shape, dtype=dtype, device=self.hidden.device).masked_fill(
            self.hidden, -math.inf
        )


def _pieces(mask: AttentionMask, n_q: int, n_k: int, device: torch.device) -> list[_Piece]:
    """Cut `mask` into rectangles for fused kernels; queries that see nothing at all are in none of them."""
    pieces = []
    for rows, keys in mask.segments(n_q, n_k):
        rows_n, keys_n = rows.stop - rows.start, keys.stop - keys.start
        for r, c, is_causal, hidden in _segment_pieces(mask, rows_n, keys_n, device):
            piece_rows = slice(rows.start + r.start, rows.start + r.stop)
            piece_keys = slice(keys.start + c.start, keys.start + c.stop)
            empty = None if hidden is None else hidden.all(-1)[None, None]  # [1, 1, rows]
            if mask.key_padding_mask is not None:
                padding = mask.key_padding_mask[:, None, None, piece_keys]  # [B, 1, 1, keys]
                if hidden is not None:
                    hidden = hidden[None, None] | padding
                    empty = hidden.all(-1)
                else:
                    hidden = padding
                    # a causal row is empty while all keys up to it are padding
                    empty = padding.cummin(-1).values[:, :, 0] if is_causal else padding.all(-1)
            elif hidden is not None:
                hidden = hidden[None, None]
            if empty is not None and not bool(empty.any()):
                empty = None
            pieces.append(_Piece(piece_rows, piece_keys, is_causal, hidden, empty))
    return pieces


def _segment_pieces(
    mask: AttentionMask, n_q: int, n_k: int, device: torch.device
) -> list[tuple[slice, slice, bool, Tensor | None]]:
    """Rows, keys, causal and hidden [rows, keys] of the pieces of one sequence; empty ones are left out."""
    pieces: list[tuple[slice, slice, bool, Tensor | None]] = []
    if n_q == 0 or n_k == 0:
        return pieces
    if mask.window is not None:
        # Blocks of queries against the band they see. Half a window each keeps the masked-out share low.
        start, end = mask.key_ranges(n_q, n_k, device)  # [n_q], [n_q]
        block = max(128, mask.window // 2)
        for row in range(0, n_q, block):
            rows = slice(row, min(row + block, n_q))
            keys = slice(int(start[rows].min()), int(end[rows].max()))
            if keys.stop > keys.start:
                key = torch.arange(keys.start, keys.stop, device=device)
                hidden = (key < start[rows, None]) | (key >= end[rows, None])
                pieces.append((rows, keys, False, hidden))
        return pieces
    if not mask.is_causal:
        return [(slice(0, n_q), slice(0, n_k), False, None)]
    past = n_k - n_q
    if past > 0:
        pieces.append((slice(0, n_q), slice(0, past), False, None))
    pieces.append((slice(max(0, -past), n_q), slice(max(0, past), n_k), True, None))
    return pieces


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

    def forward_masked(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float
    ) -> tuple[Tensor, Tensor]:
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
        mask: AttentionMask,
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
    def _rows(x: Tensor, mask: AttentionMask) -> Tensor:
        """[B, H, N, D] as the kernel wants it: [B, N, H, D], or [T, H, D] when packed."""
        rows = x.transpose(1, 2)
        return rows if mask.cu_seqlens_q is None else rows[0]

    @staticmethod
    def _heads(x: Tensor, mask: AttentionMask) -> Tensor:
        return (x if mask.cu_seqlens_q is None else x[None]).transpose(1, 2)

    @staticmethod
    def _mask_arguments(q: Tensor, k: Tensor, mask: AttentionMask, scale: float) -> dict:
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

"""A mask cut into what fused kernels know.

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

from ...mask import Mask
from ..select.operators import triton_is_installed
from .blocks import lse_dtype
from .fused import CudaFlash, Kernel

_SMALLEST_SCALE = 1e-30  # well within float32, in which kernels scale
_ROWS_AT_ONCE = 128  # rows computed anew: their scores are kept in full


def forward(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
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
        merge(out[..., piece.rows, :], lse[..., piece.rows], *attend(piece))
    return out[..., :v_dim], lse


def backward(
    kernel: Kernel,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
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
    mask: Mask,
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


def _blank_padding(mask: Mask, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
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


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Fold a part over further keys into out [B, H, N, D] and lse [B, H, N], in place."""
    if out.is_cuda and out.dtype != torch.float64 and triton_is_installed():  # the kernel computes in float32
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


def _pieces(mask: Mask, n_q: int, n_k: int, device: torch.device) -> list[_Piece]:
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
    mask: Mask, n_q: int, n_k: int, device: torch.device
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

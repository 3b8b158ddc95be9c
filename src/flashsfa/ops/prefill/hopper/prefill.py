"""Attention forward on Hopper's tensor cores, sparse ones for queries in the 2:4 pattern: codes of queries as they are, K
and V through the copy engine."""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from ....codes import FeatureCodes
from ....mask import Mask
from ...select.operators import prune_24_op
from ...select.plain import empty_rows
from .. import fused as dense
from . import compiler, cuda
from .compiler import Tile

_WIDTHS = (64, 128, 256)
_L2_BYTES = 40 << 20  # of 50 MiB
_MUCH_KEYS, _MUCH_BLOCKS = (
    4096,
    4,
)  # from how many on three consumers were measured faster: keys seen, and blocks a multiprocessor


def obstacle(q: Tensor, dense_dims: int, k: Tensor, v: Tensor, mask: Mask, scale: float) -> str | None:
    """Why the kernel cannot take these, with `dense_dims` features of a query in its dense channel (all of them for dense queries), or
    None if it can. Looks at no values."""
    if not _is_hopper(q):
        return "the sparse tensor cores of this kernel (wgmma) are Hopper's (sm_90)"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] not in _WIDTHS or v.shape[-1] not in _WIDTHS:
        return f"the kernel takes heads of width 64, 128 and 256, not {q.shape[-1]} and {v.shape[-1]}"
    if dense_dims % 32:
        return f"the kernel takes a dense channel of a multiple of 32 features, not {dense_dims}"
    if mask.key_padding_mask is not None:
        return "the kernel knows causality, windows and packed sequences, no padding"
    sequences = _sequences(q, k, mask)
    if 0 in (*q.shape, *k.shape, *sequences):
        return "there is nothing to attend"
    if sequences[0] * q.shape[1] * math.ceil(sequences[1] / 64) >= 1 << 31:
        return "the kernel counts less than 2^31 blocks of queries, all sequences taken as long as the longest"
    if not ctypes.c_float(scale).value > 0:
        return f"row maxima are taken before scaling, which needs a positive scale in float32, not {scale}"
    return None


def is_faster(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> bool:
    """Whether dense queries q run here, and faster than on torch's kernels, as measured on an H100 (docs/notes/2026-11-27-prefill.md):
    FlashAttention-2 splits the keys of few queries over more blocks, and cuDNN begins a block sooner."""
    if not _is_hopper(q):
        return False
    _, longest_q, longest_k = _sequences(q, k, mask)
    seen = _most_seen(longest_k, mask)
    if longest_q < 512 or seen < 256:
        return False
    rival, _ = dense.choose_kernel(q, v, mask)
    if isinstance(rival, dense.CudaCudnn) and seen < 2048:
        return False
    return obstacle(q, q.shape[-1], k, v, mask, scale) is None


def default_tile(dtype: torch.dtype, head_dim: int, value_dim: int, dense_dims: int, *, much: bool) -> Tile:
    """The fastest of the sizes that were measured on an H100 (docs/notes/2026-11-27-prefill.md).

    Args:
        much: several blocks for each multiprocessor, of thousands of keys each. At widths of 128 three consumers then hide
            more than their larger blocks cost.
    """
    widest = max(head_dim, value_dim)
    if widest == 256:
        sizes = {"block_n": 80}
    elif widest == 64 or much:
        sizes = {"block_n": 96 if value_dim == 64 else 64, "consumers": 3, "stages": 4}
    else:
        sizes = {"stages": 3}
    return Tile(dtype, head_dim, value_dim, dense_dims, **sizes)


def forward(
    q: FeatureCodes,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v for queries in the 2:4 pattern (or all dense), with no `obstacle`.

    Args:
        q: [B, Hq, N_q, ...] of D features, at most two of each aligned group of four after the dense channel.
        k: [B, Hkv, N_k, D]; v: [B, Hkv, N_k, Dv]; any strides (a copy is made where the copy engine needs one).
        mask: causality, a window, packed sequences; no padding.
        tile: sizes to measure; `default_tile` by default.

    Returns:
        out [B, Hq, N_q, Dv], the transpose of a contiguous [B, N_q, Hq, Dv], and lse [B, Hq, N_q] float32. A query
        that sees no key gets 0 and -inf.

    Raises:
        CompilationError: the kernel cannot be built.
    """
    batch, heads, n_q, _ = q.shape
    n_k = k.shape[2]
    sequences, longest_q, longest_k = _sequences(q, k, mask)
    longest_k = min(longest_k, n_k)  # who packs may name more
    multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
    if tile is None:
        much = is_much(batch * heads * n_q, _most_seen(longest_k, mask), multiprocessors)
        tile = default_tile(q.dtype, q.head_dim, v.shape[-1], q.dense_dims, much=much)
    with torch.cuda.device(q.device):
        kernel = _load(tile, v.device.index)
        channel, values, indices = in_pairs(q)
        channel, values, indices = _by_16_bytes(channel), _aligned(values), _aligned(indices)
        bounds = [None if x is None else x.contiguous() for x in (mask.cu_seqlens_q, mask.cu_seqlens_k)]
        k, v = _by_16_bytes(k), _by_16_bytes(v)
        out = empty_rows(q.values, v.shape[-1])
        lse = v.new_empty((batch, heads, n_q), dtype=torch.float32)
        width = math.ceil(longest_q / tile.block_m) * heads
        blocks = width * sequences
        thread_blocks = min(blocks, multiprocessors)
        taken = torch.zeros(1, dtype=torch.int32, device=q.device) if blocks > 2 * thread_blocks else None
        head_bytes = longest_k * (k.shape[3] + v.shape[3]) * k.element_size()
        params = _Params(
            channel.data_ptr(), *(2 * stride for stride in channel.stride()[:3]),
            values.data_ptr(), indices.data_ptr(), out.data_ptr(), lse.data_ptr(),
            *out.stride()[:3], *(None if x is None else x.data_ptr() for x in bounds),
            n_q, n_k, heads, heads // k.shape[1], mask.is_causal, width, blocks, None if taken is None else taken.data_ptr(),
            n_q + n_k if mask.window is None else min(n_q + n_k, mask.window), heads_together(heads, k.shape[1], head_bytes), scale,
        )  # fmt: skip
        maps = [cuda.tensor_map(x, tile.block_n) for x in (k, v)]
        cuda.launch(kernel, (thread_blocks, 1, 1), tile.threads, tile.shared_bytes, (params, *maps))
    return out, lse


def _is_hopper(q: Tensor) -> bool:
    return q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) == (9, 0)


def _sequences(q: FeatureCodes | Tensor, k: Tensor, mask: Mask) -> tuple[int, int, int]:
    """How many there are, and the most queries and keys of one."""
    if mask.cu_seqlens_q is None:
        return q.shape[0], q.shape[2], k.shape[2]
    return mask.cu_seqlens_q.numel() - 1, mask.max_seqlen_q, mask.max_seqlen_k


def is_much(rows: int, seen: int, multiprocessors: int) -> bool:
    """Whether `rows` queries of all heads that see `seen` keys are worth three consumers."""
    return seen >= _MUCH_KEYS and rows >= _MUCH_BLOCKS * 3 * 64 * multiprocessors


def _most_seen(longest_k: int, mask: Mask) -> int:
    """Keys that a query sees at most."""
    if mask.window is None:
        return longest_k
    return min(longest_k, mask.window if mask.is_causal else 2 * mask.window)


def in_pairs(q: FeatureCodes) -> tuple[Tensor, Tensor, Tensor]:
    """Dense channel, values and indices of a code with exactly two entries a group, which may be zero."""
    if 2 * q.topk == q.sparse_dims:
        return q.dense, q.values, q.indices
    return prune_24_op(q.to_dense(), q.dense_dims)


def heads_together(heads: int, kv_heads: int, head_bytes: int) -> int:
    """Query heads whose blocks are mixed: as many as have keys and values, `head_bytes` each, that fit the L2 cache beside
    one another."""
    fitting = max(1, _L2_BYTES // head_bytes) * (heads // kv_heads)
    return math.ceil(heads / math.ceil(heads / fitting))


class _Params(ctypes.Structure):
    """`Params` of prefill.cu."""

    _fields_ = (
        ("q_dense", ctypes.c_void_p),
        ("q_dense_batch", ctypes.c_longlong),
        ("q_dense_head", ctypes.c_longlong),
        ("q_dense_row", ctypes.c_longlong),
        ("q_values", ctypes.c_void_p),
        ("q_indices", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("out_batch", ctypes.c_longlong),
        ("out_head", ctypes.c_longlong),
        ("out_row", ctypes.c_longlong),
        ("q_bounds", ctypes.c_void_p),
        ("k_bounds", ctypes.c_void_p),
        ("n_q", ctypes.c_int),
        ("n_k", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("group", ctypes.c_int),
        ("causal", ctypes.c_int),
        ("width", ctypes.c_int),
        ("blocks", ctypes.c_int),
        ("taken", ctypes.c_void_p),
        ("window", ctypes.c_int),
        ("together", ctypes.c_int),
        ("scale", ctypes.c_float),
    )


def _load(tile: Tile, device: int) -> ctypes.c_void_p:
    """The kernel of one specialisation, ready to launch on `device`. What failed once is not tried again."""
    kernel = _load_once(tile, device)
    if isinstance(kernel, str):
        raise cuda.CompilationError(kernel)
    return kernel


@functools.cache
def _load_once(tile: Tile, device: int) -> ctypes.c_void_p | str:
    def load(afresh: bool) -> ctypes.c_void_p:
        cubin = compiler.compile_cubin(tile, afresh=afresh)
        try:
            return cuda.load_kernel(cubin, "prefill_kernel", tile.shared_bytes, device)
        except cuda.CompilationError:
            if afresh:
                raise
        return load(afresh=True)  # what was kept may not be what the compiler makes

    try:
        return load(afresh=False)
    except cuda.CompilationError as error:
        return str(error)


def _aligned(x: Tensor) -> Tensor:
    """x contiguous, at a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _by_16_bytes(x: Tensor) -> Tensor:
    """x [B, H, N, D], copied unless it can be read by 16 bytes: rows in one piece, at addresses that are multiples."""
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    aligned = all(stride % 8 == 0 and stride > 0 for stride in strides) and x.data_ptr() % 16 == 0
    return x if x.stride(-1) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)

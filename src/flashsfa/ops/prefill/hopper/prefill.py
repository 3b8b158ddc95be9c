"""Attention forward on Hopper's tensor cores, sparse ones for queries in the 2:4 pattern: codes of queries as they are, K
and V through the copy engine."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ....codes import FeatureCodes
from ....mask import Mask
from ... import nvrtc
from ...nvrtc import cuda
from ...select.operators import pruned
from ...select.plain import empty_rows
from . import compiler
from .compiler import Tile
from .params import Params

_WIDTHS = (64, 128, 256)
_CALLS = 32  # layers or so, for which counters are set to 0 at once
# Measured on an H100 (docs/notes/2026-11-27-prefill.md):
_L2_BYTES = 40 << 20  # of K and V that stay in the L2 cache, which has 50 MiB
_LONG_KEYS, _LONG_WORK_TILES = (
    4096,
    4,
)  # visible keys, and work tiles per multiprocessor, from which on three consumers are faster


def obstacle(q: Tensor, dense_dims: int, k: Tensor, v: Tensor, mask: Mask, scale: float) -> str | None:
    """Why the kernel cannot take these, with `dense_dims` features of a query in its dense channel (all of them for dense queries), or
    None if it can. Looks at no values."""
    if not is_hopper(q):
        return "the sparse tensor cores of this kernel (wgmma) are Hopper's (sm_90)"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"the kernel takes float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] not in _WIDTHS or v.shape[-1] not in _WIDTHS:
        return f"the kernel takes heads of width 64, 128 and 256, not {q.shape[-1]} and {v.shape[-1]}"
    if dense_dims % 32:
        return f"the kernel takes a dense channel of a multiple of 32 features, not {dense_dims}"
    if mask.key_padding_mask is not None:
        return "the kernel knows causality, windows and packed sequences, no padding"
    count, longest_q, longest_k = sequences(q, k, mask)
    if 0 in (*q.shape, *k.shape, count, longest_q, longest_k):
        return "there is nothing to attend"
    if count * q.shape[1] * math.ceil(longest_q / 64) >= 1 << 31:
        return "the kernel counts less than 2^31 tiles of queries, all sequences taken as long as the longest"
    if not ctypes.c_float(scale).value > 0:
        return f"row maxima are taken before scaling, which needs a positive scale in float32, not {scale}"
    return None


def default_tile(dtype: torch.dtype, head_dim: int, value_dim: int, dense_dims: int, *, long_context: bool) -> Tile:
    """The fastest of the sizes that were measured on an H100 (docs/notes/2026-11-27-prefill.md).

    Args:
        long_context: several work tiles per multiprocessor, of thousands of keys each. At widths of 128 three consumers then
            hide more than their larger work tiles cost.

    Waiting early for K gains only with values of width 64.
    """
    widest = max(head_dim, value_dim)
    if widest == 256:
        sizes = {"block_n": 80}
    elif widest == 64 or long_context:
        sizes = {"block_n": 96 if value_dim == 64 else 64, "consumers": 3, "stages": 4}
    else:
        sizes = {"stages": 3}
    return Tile(dtype, head_dim, value_dim, dense_dims, **sizes, early_k_wait=value_dim == 64)


def forward(
    q: FeatureCodes | Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v for queries in the 2:4 pattern (or all dense), with no `obstacle`.

    Args:
        q: [B, Hq, N_q, ...] of D features, at most two of each aligned group of four after the dense channel; or dense queries.
        k: [B, Hkv, N_k, D]; v: [B, Hkv, N_k, Dv]; any strides (a copy is made where the copy engine needs one).
        mask: causality, a window, packed sequences; no padding.
        tile: sizes to measure; `default_tile` by default.

    Returns:
        out [B, Hq, N_q, Dv], the transpose of a contiguous [B, N_q, Hq, Dv], and lse [B, Hq, N_q] float32. A query
        that sees no key gets 0 and -inf.

    Raises:
        CompilationError: the kernel cannot be built.
    """
    values = indices = None
    if isinstance(q, Tensor):
        channel = q
    else:
        channel, values, indices = as_24_pattern(q)
        values, indices = _aligned(values), _aligned(indices)
    channel, k, v = (
        x if lies_by_16_bytes(x) else x.clone(memory_format=torch.contiguous_format) for x in (channel, k, v)
    )
    out = empty_rows(channel, v.shape[3])
    attention = Prepared(channel, k, v, out, mask=mask, scale=scale, tile=tile)
    attention(channel, k, v, out, values, indices)
    return out, attention.lse


class Prepared:
    """The kernel over tensors of one form, for little of the host's time: of layers that are alike, the first prepares it and each calls it.

    Attributes:
        lse: [B, Hq, N_q] float32 of the last call.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, mask: Mask, scale: float, tile: Tile | None = None
    ) -> None:
        """For queries such as q [B, Hq, N_q, M], their dense channel or dense ones, k [B, Hkv, N_k, D], v [B, Hkv, N_k, Dv] and `out`
        [B, Hq, N_q, Dv], all of which lie by 16 bytes. Raises `CompilationError` where the kernel cannot be built."""
        launch = _prepared(
            q.device.index, q.dtype, q.shape, q.stride(), k.shape, v.shape[3], *sequences(q, k, mask), mask.is_causal, mask.window,
            scale, tile,
        )  # fmt: skip
        self.lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        self._bounds = [None if x is None else x.contiguous() for x in (mask.cu_seqlens_q, mask.cu_seqlens_k)]
        # each call takes one that is still 0
        self._counters = torch.zeros(_CALLS, dtype=torch.int32, device=q.device) if launch.counts else None
        self._calls = 0
        self._kernel, self._grid = launch.kernel, launch.grid
        self._params = params = Params.from_buffer_copy(launch.params)
        params.out_batch, params.out_head, params.out_row = out.stride()[:3]
        params.lse = self.lse.data_ptr()
        params.cu_seqlens_q, params.cu_seqlens_k = (None if x is None else x.data_ptr() for x in self._bounds)
        self._maps = [cuda.tensor_map(x, launch.block_n) for x in (k, v)]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, values: Tensor | None = None, indices: Tensor | None = None
    ) -> None:
        """Attention into `out`. That all have the form is the caller's to know."""
        params = self._params
        params.q_dense, params.out = q.data_ptr(), out.data_ptr()
        params.q_values, params.q_indices = (None if x is None else x.data_ptr() for x in (values, indices))
        if self._counters is not None:
            place = self._calls % _CALLS
            if self._calls and not place:
                self._counters.zero_()
            self._calls += 1
            params.tile_counter = self._counters.data_ptr() + 4 * place
        for made, x in zip(self._maps, (k, v), strict=True):
            cuda.move_map(made, x)
        self._kernel.launch(self._grid, params, *self._maps)


class _Launch(NamedTuple):
    """What launches over tensors of one form have in common.

    Attributes:
        params: all but addresses.
        block_n: keys of a tile.
        counts: whether work tiles are dealt by a counter, which must be zero first: 2 us.
    """

    kernel: nvrtc.Kernel
    grid: tuple[int, int, int]
    params: Params
    block_n: int
    counts: bool


@functools.lru_cache(maxsize=1024)  # each layer of a model asks for the same
def _prepared(
    device: int,
    dtype: torch.dtype,
    q_shape: torch.Size,
    q_strides: tuple[int, ...],
    k_shape: torch.Size,
    value_dim: int,
    count: int,
    longest_q: int,
    longest_k: int,
    is_causal: bool,
    window: int | None,
    scale: float,
    tile: Tile | None,
) -> _Launch:
    """For a dense channel of `q_shape` and `q_strides`, keys of `k_shape` and values as wide as said, in `count` sequences."""
    batch, heads, n_q, dense_dims = q_shape
    _, kv_heads, n_k, head_dim = k_shape
    longest_k = min(longest_k, n_k)  # who packs may name more
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    if tile is None:
        visible = most_visible(longest_k, is_causal, window)
        long_context = is_long_context(batch * heads * n_q, visible, multiprocessors)
        tile = default_tile(dtype, head_dim, value_dim, dense_dims, long_context=long_context)
    tiles_per_sequence = math.ceil(longest_q / tile.block_m) * heads
    work_tiles = tiles_per_sequence * count
    thread_blocks = min(work_tiles, multiprocessors)
    params = Params(
        q_dense_batch=2 * q_strides[0],
        q_dense_head=2 * q_strides[1],
        q_dense_row=2 * q_strides[2],
        n_q=n_q,
        n_k=n_k,
        heads=heads,
        heads_per_kv_head=heads // kv_heads,
        is_causal=is_causal,
        tiles_per_sequence=tiles_per_sequence,
        work_tiles=work_tiles,
        window=n_q + n_k if window is None else min(n_q + n_k, window),
        heads_per_l2_group=heads_per_l2_group(heads, kv_heads, longest_k * (head_dim + value_dim) * dtype.itemsize),
        scale=scale,
    )
    # Where a thread block gets two work tiles at most, they are dealt without a counter.
    return _Launch(
        _load(tile, device), (thread_blocks, 1, 1), params, tile.block_n, counts=work_tiles > 2 * thread_blocks
    )


def is_hopper(q: Tensor) -> bool:
    return nvrtc.is_hopper(q.device)


def sequences(q: FeatureCodes | Tensor, k: Tensor, mask: Mask) -> tuple[int, int, int]:
    """How many there are, and the most queries and keys of one."""
    if mask.cu_seqlens_q is None:
        return q.shape[0], q.shape[2], k.shape[2]
    return mask.cu_seqlens_q.numel() - 1, mask.max_seqlen_q, mask.max_seqlen_k


def is_long_context(queries: int, visible: int, multiprocessors: int) -> bool:
    """Whether `queries` of all heads that see `visible` keys are worth three consumers."""
    return visible >= _LONG_KEYS and queries >= _LONG_WORK_TILES * 3 * 64 * multiprocessors


def most_visible(longest_k: int, is_causal: bool, window: int | None) -> int:
    """Keys that a query sees at most."""
    if window is None:
        return longest_k
    return min(longest_k, window if is_causal else 2 * window)


def as_24_pattern(q: FeatureCodes) -> tuple[Tensor, Tensor, Tensor]:
    """Dense channel, values and indices of a code with exactly two entries per group, which may be zero."""
    if 2 * q.topk == q.sparse_dims:
        return q.dense, q.values, q.indices
    return pruned(q.to_dense(), q.dense_dims)


def heads_per_l2_group(heads: int, kv_heads: int, head_bytes: int) -> int:
    """L2 swizzle: how many query heads interleave their work tiles. As many as have keys and values, `head_bytes` per head, that
    fit the L2 cache beside one another."""
    fitting = max(1, _L2_BYTES // head_bytes) * (heads // kv_heads)
    return math.ceil(heads / math.ceil(heads / fitting))


def lies_by_16_bytes(x: Tensor) -> bool:
    """Whether x [B, H, N, D] can be read and written by 16 bytes: rows in one piece, at addresses that are multiples."""
    return _lie_by_16_bytes(x.shape, x.stride()) and x.data_ptr() % 16 == 0


def _load(tile: Tile, device: int) -> nvrtc.Kernel:
    """The kernel of one specialisation, ready to launch on `device`. What failed once is not tried again."""
    kernel = nvrtc.load_kernel(compiler.compile_cubin, tile, "prefill_kernel", device)
    if isinstance(kernel, str):
        raise cuda.CompilationError(kernel)
    return kernel


def _aligned(x: Tensor) -> Tensor:
    """x contiguous, at a multiple of 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


@functools.lru_cache(maxsize=1024)
def _lie_by_16_bytes(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    *of_rows, of_entries = strides
    between = [stride for stride, size in zip(of_rows, shape[:-1], strict=True) if size > 1]
    return of_entries == 1 and all(stride % 8 == 0 and stride > 0 for stride in between)

"""Top-k codes on the GPU: the dense channel, the kept values and their sorted indices in one pass over x.

One pass means reading 2·D bytes per row of x and writing 2·M + 3·K; at the speed of memory that leaves few instructions
per entry, so a row is held in the registers of one thread (or a few lanes) and no network crosses lanes for long.

`network` (16-bit dtypes, K <= 16): an entry becomes the integer key `magnitude << 17 | 255 - index`, which orders by
magnitude and then by lowest index, so ties never arise. Neighbouring entries meet first. The winners are cut into lists
of K keys; each is sorted by Batcher's odd-even merge sort, and two sorted lists a, b become one by keeping
max(a[i], b[K-1-i]), which is the top K of both. Where an entry is among the top K, so is the winner of its first meeting: only the
K winners' partners must still be looked at. The indices left over are sorted, and the values fetched from the L1 cache.

`bisect` (any dtype and K): the row's threshold is found by bisection on the integer magnitude with one count per round,
then one prefix sum over the row gives every kept entry its slot.

`rank` (any dtype and K, few rows): four warps per row compare each entry with all others. More work for each row, but all rows
run at once, as a decode step's do; and the code is short: it compiles in a second, where a network takes up to ten.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....checks import require
from ...triton.rows import as_batch_head_row, block_of_rows, cdiv, in_units, next_power_of_2
from ..plain import empty_code


class Launch(NamedTuple):
    """How the kernel is launched, as measured on an H100 (docs/notes/2026-11-24-decode.md)."""

    method: str  # "network", "bisect" or "rank"
    rows: int  # of x per program
    lanes: int  # neighbouring threads that share a row
    num_warps: int


_RANK_ROWS = 512  # of all heads, at most, are coded by `rank`: a few programs per multiprocessor


def launch_for(dtype: torch.dtype, topk: int, rows: int) -> Launch:
    """The launch parameters for `rows` rows of x, those of all heads."""
    if rows <= _RANK_ROWS:
        return Launch("rank", rows=1, lanes=32, num_warps=4)
    if dtype.itemsize == 2 and topk <= 16:  # the network of a larger K takes 10 s to compile
        return Launch("network", rows=32, lanes=1, num_warps=1)
    return Launch("bisect", rows=8, lanes=4, num_warps=1)


def encode(x: Tensor, topk: int, dense_dims: int, launch: Launch | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Dense channel [..., M], values [..., K] and uint8 indices [..., K] of x [..., D], as `plain.select_topk` selects.

    Args:
        x: [..., D] float16, bfloat16 or float32 on CUDA, any strides, D <= 256.
        topk: K, 1 to D - dense_dims.
        dense_dims: M, 0 to D - 1.
        launch: launch parameters to measure; `launch_for` by default.
    """
    rows = as_batch_head_row(x)  # [B, H, N, D]
    dense, values, indices = empty_code(x, topk, dense_dims)
    _launch(rows, None, dense, values, indices, None, rows.shape[2], 0, launch)
    return dense, values, indices


def topk_rows(
    x: Tensor,
    topk: int,
    dense_dims: int,
    out: Tensor,
    code: tuple[Tensor, Tensor, Tensor] | None = None,
    launch: Launch | None = None,
) -> bool:
    """Write x [..., D] to `out`, zero but for its dense channel and what `encode` keeps, in one pass; and the code.

    Args:
        x, topk, dense_dims: as in `encode`.
        out: [B, H, N, D] if x is, else contiguous as x; last dimension contiguous, other strides multiples of 8.
        code: contiguous dense channel [..., M], values [..., K] and uint8 indices [..., K], to be written beside; None for
            rows alone.
        launch: launch parameters to measure; `launch_for` by default.

    Returns:
        False, with nothing written, where the pass over codes is needed: fewer rows, other dtypes and budgets than `network`
        takes, a dense channel of no multiple of 8, rows that are not whole words.
    """
    rows, target = (x, out) if x.ndim == 4 else (as_batch_head_row(x), as_batch_head_row(out))
    batch, heads, n, head_dim = rows.shape
    method, block, lanes, num_warps = launch or launch_for(x.dtype, topk, batch * heads * n)
    if method != "network" or not in_units(rows, 8) or dense_dims % 8 or target.shape != rows.shape:
        return False
    if x.numel():
        dense, values, indices = (None, None, None) if code is None else code
        topk_rows_kernel[(cdiv(n, block) * batch * heads,)](
            rows, rows.view(torch.int32), target.view(torch.int32),
            dense.view(torch.int32) if dense is not None and dense_dims else None, values, indices, *(s // 2 for s in rows.stride()[:3]), rows.stride(-1),
            *(s // 2 for s in target.stride()[:3]), heads, n,
            D=head_dim, M=dense_dims, K=topk, K_PAD=next_power_of_2(topk), CHUNKS=cdiv(head_dim - dense_dims, 8 * lanes),
            W=4 * lanes, R=block, PIECE=16, num_warps=num_warps,
        )  # fmt: skip
    return True


def append(
    k: Tensor,
    v: Tensor,
    dense_buf: Tensor,
    values_buf: Tensor,
    indices_buf: Tensor,
    v_buf: Tensor,
    start: int | Tensor,
    launch: Launch | None = None,
) -> None:
    """Code the keys k and write codes and v into a cache's buffers at token `start`, in one launch.

    Args:
        k: [B, H, N, D] any strides; v: [B, H, N, Dv] any strides; same dtype as the buffers, on CUDA.
        dense_buf: [B, H, C, M]; values_buf: [B, H, C, K]; indices_buf: [B, H, C, K] uint8; v_buf: [B, H, C, Dv]:
            contiguous, written at tokens start to start + N.
        start: an int; or, for CUDA graphs, an integer tensor on the device, [] or [B]. The device's numbers are not
            seen here: tokens that would fall outside the C tokens are not written.

    Raises:
        ValueError: buffers that do not fit k and v, or an int `start` that leaves no room.
    """
    batch, heads, n, _ = k.shape
    capacity = values_buf.shape[2]
    for name, buffer in (("dense", dense_buf), ("values", values_buf), ("indices", indices_buf), ("v", v_buf)):
        require(
            buffer.is_contiguous() and buffer.shape[:3] == (batch, heads, capacity) and buffer.device == k.device,
            f"the {name} buffer must be contiguous [{batch}, {heads}, {capacity}, ...] on {k.device}, "
            f"got {tuple(buffer.shape)} on {buffer.device}",
        )
    require(
        v.shape == (batch, heads, n, v_buf.shape[-1]) and v.dtype == v_buf.dtype and v.device == k.device,
        f"v {tuple(v.shape)} {v.dtype} fits neither k {tuple(k.shape)} nor its buffer {tuple(v_buf.shape)} {v_buf.dtype}",
    )
    require(
        dense_buf.dtype == values_buf.dtype == k.dtype and indices_buf.dtype == torch.uint8,
        f"k is {k.dtype}, its buffers {dense_buf.dtype} and {values_buf.dtype}, indices {indices_buf.dtype}",
    )
    if isinstance(start, Tensor):
        require(
            start.shape in ((), (batch,)) and not start.is_floating_point() and start.device == k.device,
            f"start must be an int or an integer tensor [] or [{batch}] on {k.device}, got {tuple(start.shape)}",
        )
    else:
        require(0 <= start <= capacity - n, f"{n} tokens at {start} do not fit buffers of {capacity}")
    _launch(k, v, dense_buf, values_buf, indices_buf, v_buf, capacity, start, launch)


def _launch(
    x: Tensor,
    v: Tensor | None,
    dense: Tensor,
    values: Tensor,
    indices: Tensor,
    v_out: Tensor | None,
    capacity: int,
    start: int | Tensor,
    launch: Launch | None,
) -> None:
    batch, heads, n, head_dim = x.shape
    if x.numel() == 0:
        return
    topk, dense_dims = values.shape[-1], dense.shape[-1]
    method, rows, lanes, num_warps = launch or launch_for(x.dtype, topk, batch * heads * n)
    halves = 2 if x.itemsize == 2 else 1
    whole_words = in_units(x, halves)
    word = 4 * halves  # entries of one 16-byte load
    first = dense_dims // word * word  # loads start at a multiple of 16 bytes, perhaps within the dense channel
    on_device = isinstance(start, Tensor)
    topk_kernel[(cdiv(n, rows) * batch * heads,)](
        x,
        x.view(torch.int32) if whole_words else None,
        v,
        dense,
        values,
        indices,
        v_out,
        start if on_device else None,
        0 if on_device else start,
        *x.stride(),
        *((0, 0, 0, 0) if v is None else v.stride()),
        start.stride(0) if isinstance(start, Tensor) and start.ndim else 0,
        heads,
        n,
        capacity,
        D=head_dim,
        M=dense_dims,
        M_PAD=next_power_of_2(dense_dims),
        K=topk,
        K_PAD=next_power_of_2(topk),
        DV=0 if v is None else v.shape[-1],
        DV_PAD=0 if v is None else next_power_of_2(v.shape[-1]),
        FIRST=first,
        CHUNKS=cdiv(head_dim - first, word * lanes),
        W=4 * lanes,
        HALVES=halves,
        METHOD=method,
        R=rows,
        num_warps=num_warps,
    )


@triton.jit(do_not_specialize=["start", "heads", "n", "capacity"])  # each variant compiles for seconds
def topk_kernel(
    X, WORDS, V, DENSE, VALUES, INDICES, V_OUT, START, start,
    x_sb, x_sh, x_sn, x_sd, v_sb, v_sh, v_sn, v_sd, start_sb, heads, n, capacity,
    D: tl.constexpr, M: tl.constexpr, M_PAD: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
    DV: tl.constexpr, DV_PAD: tl.constexpr, FIRST: tl.constexpr, CHUNKS: tl.constexpr, W: tl.constexpr,
    HALVES: tl.constexpr, METHOD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    batch, head, batch_head, row, there = block_of_rows(heads, n, R)
    if START is not None:
        start = tl.load(START + batch * start_sb)
        there = there & (row + start >= 0) & (row + start < capacity)
    x_row = X + batch * x_sb + head * x_sh + row * x_sn  # [R] pointers
    out_row = batch_head * capacity + start + row  # [R]

    if METHOD == "rank":
        _store_by_rank(x_row, x_sd, VALUES + out_row * K, INDICES + out_row * K, there, M, D, K)
    else:
        word_row = x_row
        if WORDS is not None:  # x as int32
            word_row = WORDS + batch * (x_sb // HALVES) + head * (x_sh // HALVES) + row * (x_sn // HALVES)
        words = _load_words(
            x_row, word_row, x_sd, there, FIRST, M, D, CHUNKS, W, HALVES, WORDS is not None
        )  # CHUNKS times [R, W]
        if METHOD == "network":
            index = _select_by_network(
                x_row, x_sd, there, words, FIRST, M, D, CHUNKS, W, K, K_PAD, R
            )  # [R, K_PAD]  # fmt: skip
            _store_kept(index, x_row, x_sd, VALUES, INDICES, out_row[:, None], there, M, K, K_PAD)
        else:
            threshold = _threshold(words, D - M, CHUNKS, W, HALVES, K, R)  # [R]
            _store_by_scan(
                words, threshold, VALUES + out_row * K, INDICES + out_row * K, there,
                M, FIRST, D, CHUNKS, W, HALVES, K, R, X.dtype.element_ty,
            )  # fmt: skip
    if M > 0:
        column = tl.arange(0, M_PAD)[None, :]  # [1, M_PAD]
        inside = there[:, None] & (column < M)
        dense = tl.load(x_row[:, None] + column.to(tl.int64) * x_sd, mask=inside)  # [R, M_PAD]
        tl.store(DENSE + out_row[:, None] * M + column, dense, mask=inside)
    if DV > 0:
        column = tl.arange(0, DV_PAD)[None, :]  # [1, DV_PAD]
        inside = there[:, None] & (column < DV)
        v_row = V + batch * v_sb + head * v_sh + row * v_sn  # [R]
        v = tl.load(v_row[:, None] + column.to(tl.int64) * v_sd, mask=inside)  # [R, DV_PAD]
        tl.store(V_OUT + out_row[:, None] * DV + column, v, mask=inside)


@triton.jit(do_not_specialize=["heads", "n"])
def topk_rows_kernel(
    X, WORDS, OUT, DENSE, VALUES, INDICES, x_sb, x_sh, x_sn, x_sd, out_sb, out_sh, out_sn, heads, n,
    D: tl.constexpr, M: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr, CHUNKS: tl.constexpr, W: tl.constexpr,
    R: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """R rows of WORDS, OUT and DENSE, int32 of two entries, with strides in words; X are the same rows by entry."""
    batch, head, batch_head, row, there = block_of_rows(heads, n, R)
    code_row = (batch_head * n + row)[:, None]  # [R, 1]
    word_row = WORDS + batch * x_sb + head * x_sh + row * x_sn  # [R] pointers
    x_row = X + 2 * (batch * x_sb + head * x_sh + row * x_sn)
    out_row = (OUT + batch * out_sb + head * out_sh + row * out_sn)[:, None]  # [R, 1]
    words = _load_words(x_row, word_row, x_sd, there, M, M, D, CHUNKS, W, 2, True)  # CHUNKS times [R, W]
    best = _best_by_network(x_row, x_sd, there, words, M, M, D, CHUNKS, W, K, K_PAD, R)
    least = best[0]  # [R] the K-th key: keys differ, so that K of them are not below it
    for i in tl.static_range(1, K):
        least = tl.minimum(least, best[i])
    # The rows once more, out of the L1 cache: side by side, as memory likes them, and in few registers at a time.
    for c in tl.static_range((D // 2 + PIECE - 1) // PIECE):
        word_index = c * PIECE + tl.arange(0, PIECE)[None, :]  # [1, PIECE] words
        inside = there[:, None] & (word_index < D // 2)
        word = tl.load(word_row[:, None] + word_index, mask=inside, other=0)  # [R, PIECE]
        low, high = _keys(word, 2 * word_index - M)
        kept = tl.where(low >= least[:, None], word & 0xFFFF, 0) | tl.where(high >= least[:, None], word & -0x10000, 0)
        tl.store(out_row + word_index, tl.where(word_index < M // 2, word, kept), mask=inside)
        if DENSE is not None:
            tl.store(DENSE + code_row * (M // 2) + word_index, word, mask=inside & (word_index < M // 2))
    if VALUES is not None:
        _store_kept(_ascending(best, K, K_PAD, R), x_row, x_sd, VALUES, INDICES, code_row, there, M, K, K_PAD)


@triton.jit
def _store_kept(
    index, x_row, x_sd, VALUES, INDICES, out_row, there, M: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr
):
    """The entries of x at `index` [R, K_PAD] of its sparse part, and the index, to row `out_row` [R, 1] of a code."""
    slot = tl.arange(0, K_PAD)[None, :]  # [1, K_PAD]
    kept = there[:, None] & (slot < K)
    value = tl.load(x_row[:, None] + (index + M).to(tl.int64) * x_sd, mask=kept)  # [R, K_PAD]
    tl.store(VALUES + out_row * K + slot, value, mask=kept)
    tl.store(INDICES + out_row * K + slot, index.to(tl.uint8), mask=kept)


@triton.jit
def _store_by_rank(x_row, x_sd, VALUES, INDICES, there, M: tl.constexpr, D: tl.constexpr, K: tl.constexpr):
    """Store the entries that fewer than K others go before, in order; VALUES, INDICES [R]."""
    CHUNK: tl.constexpr = 32  # others at a time
    index = tl.arange(0, triton.next_power_of_2(D - M))  # [N], the row's sparse part
    x, key = _entries_and_keys(x_row, x_sd, there, index, M, D)  # [R, N]
    rank = tl.zeros(key.shape, tl.int32)
    for first in tl.static_range(0, D - M, CHUNK):
        _, other = _entries_and_keys(x_row, x_sd, there, first + tl.arange(0, CHUNK), M, D)  # [R, CHUNK]
        rank += tl.sum((other[:, None, :] > key[:, :, None]).to(tl.int32), 2)
    kept = there[:, None] & (index < D - M)[None, :] & (rank < K)
    slot = tl.cumsum(kept.to(tl.int32), 1) - 1
    tl.store(VALUES[:, None] + slot, x, mask=kept)
    tl.store(INDICES[:, None] + slot, index[None, :].to(tl.uint8), mask=kept)


@triton.jit
def _entries_and_keys(x_row, x_sd, there, index, M: tl.constexpr, D: tl.constexpr):
    """Entries of x at `index` [N] of its sparse part and keys `magnitude << 8 | 255 - index`, [R, N]; 0 past the end."""
    inside = there[:, None] & (index < D - M)[None, :]
    x = tl.load(x_row[:, None] + (M + index)[None, :].to(tl.int64) * x_sd, mask=inside, other=0)
    if x.dtype.primitive_bitwidth == 16:
        key = (x.to(tl.uint16, bitcast=True).to(tl.uint32) & 0x7FFF) << 8
    else:
        key = (x.to(tl.uint32, bitcast=True).to(tl.uint64) & 0x7FFFFFFF) << 8
    return x, tl.where(inside, key | (255 - index)[None, :].to(key.dtype), 0)


@triton.jit
def _keys(words, index):
    """Keys of the low and the high entry of `words` [R, W]: magnitude << 17 | 255 - index, `index` [1, W] the low one's."""
    word = words.to(tl.uint32, bitcast=True)
    return (word << 17) | (255 - index).to(tl.uint32), ((word & 0x7FFF0000) << 1) | (254 - index).to(tl.uint32)


@triton.jit
def _load_words(x_row, word_row, x_sd, there, FIRST: tl.constexpr, M: tl.constexpr, D: tl.constexpr, CHUNKS: tl.constexpr,
                W: tl.constexpr, HALVES: tl.constexpr, WHOLE_WORDS: tl.constexpr):  # fmt: skip
    """Columns FIRST to D of each row as a tuple of int32 [R, W] words of 1 or 2 entries, zero before M and past D. A
    chunk is 4 words, 16 bytes, per thread: loading chunk by chunk is what keeps a row within few lanes."""
    words = ()
    for c in tl.static_range(CHUNKS):
        word_index = c * W + tl.arange(0, W)[None, :]  # [1, W]
        column = FIRST + word_index * HALVES
        inside = there[:, None] & (column < D)  # [R, W]
        if WHOLE_WORDS:
            word_index += FIRST // HALVES  # the mask in whole words: the compiler sees that it cuts no 16-byte load
            word = tl.load(word_row[:, None] + word_index, mask=there[:, None] & (word_index < D // HALVES), other=0)
        elif HALVES == 1:
            word = tl.load(x_row[:, None] + column.to(tl.int64) * x_sd, mask=inside, other=0).to(tl.int32, bitcast=True)
        else:
            entry = x_row[:, None] + column.to(tl.int64) * x_sd
            low = tl.load(entry, mask=inside, other=0).to(tl.int16, bitcast=True)
            high = tl.load(entry + x_sd, mask=inside & (column + 1 < D), other=0).to(tl.int16, bitcast=True)
            word = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
        if FIRST + c * W * HALVES < M:  # the chunk holds entries of the dense channel
            word = tl.where(column + HALVES > M, word, 0)
            if HALVES == 2:
                word = tl.where(column >= M, word, word & -0x10000)
        words = words + (word,)  # noqa: RUF005
    return words


@triton.jit
def _exchange(a, b):
    return tl.maximum(a, b), tl.minimum(a, b)


@triton.jit
def _merge_sorted(items, N: tl.constexpr):
    """Batcher's odd-even merge: two descending halves of a tuple of N become one descending tuple."""
    if N == 2:
        high, low = _exchange(items[0], items[1])
        merged = (high, low)
    else:
        even = _merge_sorted(items[0:N:2], N // 2)
        odd = _merge_sorted(items[1:N:2], N // 2)
        merged = (even[0],)
        for i in tl.static_range(N // 2 - 1):
            high, low = _exchange(odd[i], even[i + 1])
            merged = merged + (high, low)  # noqa: RUF005
        merged = merged + (odd[N // 2 - 1],)  # noqa: RUF005
    return merged


@triton.jit
def _sort(items, N: tl.constexpr):
    """A tuple of N in descending order (Batcher's odd-even merge sort), N a power of two."""
    result = items
    if N > 1:
        result = _merge_sorted(_sort(items[: N // 2], N // 2) + _sort(items[N // 2 :], N // 2), N)
    return result


@triton.jit
def _sort_bitonic(items, N: tl.constexpr):
    """A bitonic tuple of N in descending order, N a power of two."""
    if N == 1:
        result = items
    else:
        high = ()
        low = ()
        for i in tl.static_range(N // 2):
            h, l = _exchange(items[i], items[i + N // 2])  # noqa: E741
            high = high + (h,)  # noqa: RUF005
            low = low + (l,)  # noqa: RUF005
        result = _sort_bitonic(high, N // 2) + _sort_bitonic(low, N // 2)
    return result


@triton.jit
def _larger_half(a, b, N: tl.constexpr):
    """The N largest of two descending tuples of N, as a bitonic tuple."""
    result = ()
    for i in tl.static_range(N):
        result = result + (tl.maximum(a[i], b[N - 1 - i]),)  # noqa: RUF005
    return result


@triton.jit
def _select_by_network(x_row, x_sd, there, words, FIRST: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
                       CHUNKS: tl.constexpr, W: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
                       R: tl.constexpr):  # fmt: skip
    """Ascending indices [R, K_PAD] (int32) of the K largest magnitudes; whatever beyond K."""
    return _ascending(_best_by_network(x_row, x_sd, there, words, FIRST, M, D, CHUNKS, W, K, K_PAD, R), K, K_PAD, R)


@triton.jit
def _ascending(best, K: tl.constexpr, K_PAD: tl.constexpr, R: tl.constexpr):
    """Indices [R, K_PAD] (int32) of K keys, ascending; whatever beyond K."""
    order = ()
    for i in tl.static_range(K_PAD):
        order = order + ((best[i] & 0xFF).to(tl.int32) if i < K else tl.full([R], -1, tl.int32),)  # noqa: RUF005
    return 255 - _stack(_sort(order, K_PAD), K_PAD, R)


@triton.jit
def _best_by_network(x_row, x_sd, there, words, FIRST: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
                     CHUNKS: tl.constexpr, W: tl.constexpr, K: tl.constexpr, K_PAD: tl.constexpr,
                     R: tl.constexpr):  # fmt: skip
    """Keys of the K largest magnitudes, the first K of a tuple of K_PAD times [R], in some order."""
    keys = ()  # uint32 [R, W] each
    for c in tl.static_range(CHUNKS):
        index = FIRST - M + 2 * (c * W + tl.arange(0, W)[None, :])  # [1, W] of the low entry
        low, high = _keys(words[c], index)
        if FIRST + 2 * c * W < M:  # entries of the dense channel rank below all others
            low = tl.where(index >= 0, low, 0)
            high = tl.where(index + 1 >= 0, high, 0)
        keys = keys + (tl.maximum(low, high),)  # noqa: RUF005
    best = _sort_bitonic(_largest(keys, CHUNKS, W, K_PAD, R), K_PAD)  # [R] each
    index = 255 - (_stack(best, K_PAD, R) & 0xFF).to(tl.int32)  # [R, K_PAD]; 255 where there is no key
    partner = ((index + M) ^ 1) - M
    inside = there[:, None]
    if M % 2 or D % 2 or D - M < 2 * K_PAD:  # some of the best may have no partner, or not exist
        inside = inside & (index < D - M) & (partner >= 0) & (partner < D - M)
    entry = tl.load(x_row[:, None] + (partner + M).to(tl.int64) * x_sd, mask=inside, other=0).to(
        tl.uint16, bitcast=True
    )
    key = tl.where(inside, (entry.to(tl.uint32) << 17) | (255 - partner).to(tl.uint32), 0)
    best = _larger_half(best, _sort(_unstack(key, K_PAD, R), K_PAD), K_PAD)
    if K < K_PAD:
        best = _sort_bitonic(best, K_PAD)
    return best


@triton.jit
def _largest(keys, COUNT: tl.constexpr, W: tl.constexpr, N: tl.constexpr, R: tl.constexpr):
    """The N largest keys of each row of COUNT times [R, W], as a bitonic tuple of N times [R]."""
    LISTS: tl.constexpr = (COUNT + N - 1) // N
    for _ in tl.static_range(LISTS * N - COUNT):
        keys = keys + (tl.zeros([R, W], tl.uint32),)  # noqa: RUF005
    best = _sort(keys[:N], N)
    for g in tl.static_range(1, LISTS):
        best = _sort_bitonic(_larger_half(best, _sort(keys[g * N : (g + 1) * N], N), N), N)
    return _fold_columns(best, W, N, R)


@triton.jit
def _fold_columns(lists, W: tl.constexpr, N: tl.constexpr, R: tl.constexpr):
    """The N largest of W descending lists side by side, a tuple of N times [R, W]; N times [R], bitonic."""
    left = ()
    right = ()
    for i in tl.static_range(N):
        a, b = tl.split(tl.reshape(lists[i], [R, W // 2, 2]))  # [R, W // 2] each
        left = left + (a,)  # noqa: RUF005
        right = right + (b,)  # noqa: RUF005
    half = _larger_half(left, right, N)
    if W > 2:
        result = _fold_columns(_sort_bitonic(half, N), W // 2, N, R)
    else:
        result = ()
        for i in tl.static_range(N):
            result = result + (tl.reshape(half[i], [R]),)  # noqa: RUF005
    return result


@triton.jit
def _stack(items, N: tl.constexpr, R: tl.constexpr):
    """A tuple of N times [R] as [R, N]."""
    if N == 1:
        stacked = items[0][:, None]
    else:
        even = _stack(items[0:N:2], N // 2, R)  # [R, N // 2]
        odd = _stack(items[1:N:2], N // 2, R)
        stacked = tl.reshape(tl.join(even, odd), [R, N])
    return stacked


@triton.jit
def _unstack(x, N: tl.constexpr, R: tl.constexpr):
    """[R, N] as a tuple of N times [R], in some order."""
    if N == 1:
        items = (tl.reshape(x, [R]),)
    else:
        even, odd = tl.split(tl.reshape(x, [R, N // 2, 2]))
        items = _unstack(even, N // 2, R) + _unstack(odd, N // 2, R)
    return items


@triton.jit
def _count(words, threshold, CHUNKS: tl.constexpr, W: tl.constexpr, HALVES: tl.constexpr, R: tl.constexpr):
    """[R] entries whose magnitude is at least `threshold` [R] >= 1."""
    total = tl.zeros([R, W], tl.int32)
    if HALVES == 2:
        # Both halves at once: with its top bit set a half keeps it through the subtraction if it is large enough.
        both = (threshold | (threshold << 16))[:, None]
        for c in tl.static_range(CHUNKS):
            total += (((words[c] | -0x7FFF8000) - both) >> 15) & 0x00010001
        total = (total & 0xFFFF) + (total >> 16)
    else:
        for c in tl.static_range(CHUNKS):
            total += ((words[c] & 0x7FFFFFFF) >= threshold[:, None]).to(tl.int32)
    return tl.sum(total, 1)


@triton.jit
def _threshold(words, entries: tl.constexpr, CHUNKS: tl.constexpr, W: tl.constexpr, HALVES: tl.constexpr,
               K: tl.constexpr, R: tl.constexpr):  # fmt: skip
    """The largest magnitude [R] (as an integer) that at least K of a row's entries reach."""
    largest = tl.zeros([R, W], tl.int32)
    for c in tl.static_range(CHUNKS):
        if HALVES == 2:
            largest = tl.maximum(largest, tl.maximum(words[c] & 0x7FFF, (words[c] >> 16) & 0x7FFF))
        else:
            largest = tl.maximum(largest, words[c] & 0x7FFFFFFF)
    high = tl.max(largest, 1)
    # `low` is reached by `count` >= K entries, `high + 1` by fewer. The first step is an octave, then they double.
    low = tl.zeros([R], tl.int32)
    count = tl.full([R], entries, tl.int32)
    step = 128 if HALVES == 2 else 1 << 23
    while tl.max(((high > low) & (count != K)).to(tl.int32), 0) > 0:
        middle = tl.maximum(high - step, low + (high - low) // 2) + 1
        middle = tl.minimum(middle, tl.maximum(high, 1))
        reached = _count(words, middle, CHUNKS, W, HALVES, R)
        enough = reached >= K
        low = tl.where(enough, middle, low)
        count = tl.where(enough, reached, count)
        high = tl.where(enough, high, middle - 1)
        step = tl.minimum(step, 1 << 29) * 2
    return low


@triton.jit
def _store_by_scan(words, threshold, VALUES, INDICES, there, M: tl.constexpr, FIRST: tl.constexpr, D: tl.constexpr,
                   CHUNKS: tl.constexpr, W: tl.constexpr, HALVES: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
                   DTYPE: tl.constexpr):  # fmt: skip
    """Store the entries above `threshold` [R], and of those at it the first that still fit; VALUES, INDICES [R]."""
    above = tl.zeros([R, W], tl.int32)
    for c in tl.static_range(CHUNKS):
        for h in tl.static_range(HALVES):
            above += (_magnitude(words[c], h, HALVES) > threshold[:, None]).to(tl.int32)
    room = (K - tl.sum(above, 1))[:, None]  # [R, 1] slots left for entries at the threshold
    before = tl.zeros([R], tl.int32)
    for c in tl.static_range(CHUNKS):
        index = FIRST - M + (c * W + tl.arange(0, W)[None, :]) * HALVES  # [1, W] of the word's first entry
        flag = _flag(words[c], 0, index, threshold, D - M, HALVES)  # [R, W]
        both = flag
        if HALVES == 2:
            both += _flag(words[c], 1, index, threshold, D - M, HALVES)
        position = (
            before[:, None] + tl.cumsum(both, 1) - both
        )  # entries before: above in the low half, tied in the high
        before += tl.sum(both, 1)
        for h in tl.static_range(HALVES):
            if h == 1:
                position += flag
                flag = both - flag
            tied = position >> 16
            slot = (position & 0xFFFF) + tl.minimum(tied, room)
            kept = there[:, None] & ((flag == 1) | ((flag > 1) & (tied < room)))
            if HALVES == 2:
                value = (words[c] >> (16 * h)).to(tl.int16).to(DTYPE, bitcast=True)
            else:
                value = words[c].to(DTYPE, bitcast=True)
            tl.store(VALUES[:, None] + slot, value, mask=kept)
            tl.store(INDICES[:, None] + slot, (index + h).to(tl.uint8), mask=kept)


@triton.jit
def _flag(word, h: tl.constexpr, index, threshold, entries: tl.constexpr, HALVES: tl.constexpr):
    """1 where a word's entry h is above the threshold [R], 1 << 16 where at it, else 0."""
    magnitude = _magnitude(word, h, HALVES)
    flag = tl.where(magnitude > threshold[:, None], 1, tl.where(magnitude == threshold[:, None], 1 << 16, 0))
    return tl.where((index + h >= 0) & (index + h < entries), flag, 0)


@triton.jit
def _magnitude(word, h: tl.constexpr, HALVES: tl.constexpr):
    """The magnitude bits of a word's entry h, as a nonnegative int32."""
    return word & 0x7FFFFFFF if HALVES == 1 else (word >> (16 * h)) & 0x7FFF

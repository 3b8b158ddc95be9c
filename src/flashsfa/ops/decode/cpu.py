"""Decode on the CPU, compiled by numba: codes and V are read once, in their own dtype or 8 bits, by all cores.

Three passes over a scratch array [rows, N] of float32, small beside the cache (4 bytes a key and query row):

1. `_score_chunk`: scores of a chunk of keys for all rows (query heads x query tokens) of a kv head.
2. `_weigh_row`: the row's maximum, softmax weights and log-sum-exp and, with a tolerance, the cut: a weight such that
   all weights up to it sum to at most the tolerance, found by bisection. The sum is taken, not estimated, so the cut
   is certified.
3. `_sum_chunk`: the weighted sum over the V rows that any query row of the kv head needs.

A pass is parallel over chunks of keys, so that one head uses all cores, and the chunks do not depend on the number of
threads, so neither does the result. Exponents are to base 2; log2(e) is folded into the scale.

numba is optional (`pip install flashsfa[cpu]`). The first call with a dtype compiles for about ten seconds, once a machine:
the machine code is kept in NUMBA_CACHE_DIR, else in the folder `numba` of the cache folder (`files.cache_folder`).

numba's threads do not survive a fork: a process that was forked after they had started decodes on one thread, with the same
kernel compiled so.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...codes import topk_codes
from ...mask import Mask
from ...scores import ScoreRules
from ...stored import KVView
from .. import compiled

try:
    import numba
    import numba.extending
    from llvmlite import ir
    from numba import prange
except ImportError:
    numba, prange = None, range

_UNSIGNED = {torch.float32: torch.uint32, torch.bfloat16: torch.uint16}  # numba knows no bfloat16: it sees the bits
_CHUNK_KEYS = 1024  # keys a task: long enough to stream, short enough to share out evenly
_SCORE_KEYS = 128  # keys scored for all rows before the next: their codes stay in the first-level cache
_LANES = 4  # query rows scored together
_TABLE_ROWS = 256  # a row for each uint8, so that no index can leave the table
_AHEAD_KEYS = 8  # V rows are asked for this many keys before they are used
_LINE_BYTES = 64
_SUM_KEYS = 1024  # weights summed in float32 before float64 takes over
_CUT_OCTAVES, _CUT_STEPS = 40.0, 10  # the cut is sought from 2^-40 of the largest weight, to 1/25 octave
_CUT_SLACK = 1 - 1e-4  # more than the float32 sums can be off
_LOG2_E = 1 / math.log(2)

_log = logging.getLogger("flashsfa")
_one_at_a_time = threading.RLock()  # numba's fallback threading layer ends the process on concurrent kernels
_threads_are_lost = False  # in a process that was forked after numba had started threads


def is_available() -> bool:
    """Whether numba can be imported."""
    return numba is not None


def supports(dtype: torch.dtype) -> bool:
    """Whether `decode` takes queries of `dtype`: float32 and bfloat16."""
    return dtype in _UNSIGNED


def decode(
    q: Tensor, kv: KVView, mask: Mask, scores: ScoreRules, value_tolerance: float, topk_query: int | None = None
) -> tuple[Tensor, Tensor]:
    """As `plain.decode`, for q on the CPU of a supported dtype.

    Codes and values have the dtype of q or are int8 with a scale, with any strides of B and Hkv; they are copied first if the code
    rows of a head are not adjacent or the entries of a V row are not. No pages.
    """
    codes, v = kv.codes, kv.v
    if topk_query is not None:
        q = topk_codes(q, topk_query, dense_dims=codes.dense_dims).to_dense()
    batch, kv_heads, n, value_dim = v.shape
    m, rows = q.shape[2], q.shape[1] // kv_heads * q.shape[2]
    # scores come in log2 units; under a cap, which stands before them, as what its tanh takes
    cap = 0.0 if scores.softcap is None else scores.softcap * _LOG2_E
    factor = scores.scale * _LOG2_E if scores.softcap is None else scores.scale / scores.softcap
    grouped = (q.detach().float() * factor).reshape(batch * kv_heads, rows, q.shape[-1])
    grouped = grouped + (grouped * 0).sum(-1, keepdim=True)  # NaN shows in every score, as in a dense product
    first, last = _visible(batch, m, n, mask)
    padding = np.zeros((batch, 0), np.bool_)
    if mask.key_padding_mask is not None:
        padding = mask.key_padding_mask.contiguous().numpy()
    chunks = _chunks(first.min(1, initial=n), last.max(1, initial=0), kv_heads)
    no_scale = torch.empty(0, 0, 0, 1, dtype=torch.float32, device="cpu")
    scales = (no_scale if x is None else x[..., None] for x in (codes.scale, kv.v_scale))
    parts = [part for x in (codes.values, codes.indices, codes.dense, *scales) for part in _flat(x, adjacent=True)]
    out = np.empty((batch * kv_heads, rows, value_dim), np.float32)
    lse = np.empty((batch * kv_heads, rows), np.float32)
    with _one_at_a_time:
        _run(
            grouped.contiguous().numpy(), *parts, codes.topk, codes.dense_dims, *_flat(v), first, last, padding,
            chunks, kv_heads, n, cap, float(value_tolerance), out, lse,
        )  # fmt: skip
    shape = (batch, q.shape[1], m)
    return torch.from_numpy(out).view(*shape, value_dim).to(q.dtype), torch.from_numpy(lse).view(shape)


def manner() -> str:
    """How `decode` runs in this process, for `explain()`."""
    return f"compiled for this CPU{_ONE_THREAD if _threads_are_lost else ''}"


_ONE_THREAD = ", on one thread: this process was forked after numba's threads had started"


def _run(*arguments: Any) -> None:
    """Run the kernel on torch's number of threads."""
    if _threads_are_lost:
        _call(False, arguments)
        return
    # numba's first question starts its OpenMP threads, which sets OpenMP's number of them, torch's too, to all cores
    threads, before = torch.get_num_threads(), numba.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    try:
        _call(True, arguments)
    finally:
        numba.set_num_threads(before)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _call(parallel: bool, arguments: tuple) -> None:
    """Run the kernel for all cores or for one; the first time with these dtypes it is compiled, or read from where it is kept."""
    types = parallel, *(x.dtype for x in arguments if isinstance(x, np.ndarray))
    if types in _called:
        _kernels[parallel](*arguments)
        return
    if not parallel and parallel not in _kernels:
        _log.warning("decode runs on the numba backend: %s", manner())
    folder = _folder(parallel)
    with compiled.said_if_slow("decode for the CPU"):
        try:
            if parallel not in _kernels:
                _kernels[parallel] = _compiled(parallel, folder)
            _kernels[parallel](*arguments)
        except OSError as error:  # a full disk
            _log.warning("decode is compiled, but cannot be kept in %s: %s", folder, error)
            _kernels[parallel](*arguments)
        except (EOFError, pickle.UnpicklingError) as error:
            _log.warning("decode is compiled again, as what was kept in %s is damaged: %s", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
            _kernels[parallel] = _compiled(parallel, folder)
            _kernels[parallel](*arguments)
    _called.add(types)


_kernels: dict[bool, Callable] = {}  # `_decode_kernel` compiled for all cores (True) or for one
_called: set[tuple] = set()  # forms and dtypes that are compiled


def _folder(parallel: bool) -> Path | None:
    """Where the machine code is kept; numba itself does not tell the two forms apart."""
    folder = numba.config.CACHE_DIR or compiled.code_folder("numba")
    return Path(folder, "flashsfa-all-cores" if parallel else "flashsfa-one-core") if folder else None


def _compiled(parallel: bool, folder: Path | None) -> Callable:
    """`_decode_kernel`, to be compiled at its first call or read from `folder`."""
    named = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder or "")  # read when the function is decorated
    try:
        return numba.njit(**_OPTIONS, parallel=parallel, cache=folder is not None)(_decode_kernel)
    finally:
        numba.config.CACHE_DIR = named


def _before_fork() -> None:
    """A child has no other thread that could finish a decode: it is waited for."""
    _one_at_a_time.acquire()


def _after_fork_in_child() -> None:
    global _threads_are_lost
    _one_at_a_time.release()
    try:
        numba.threading_layer()
    except ValueError:  # no threads were started
        return
    _threads_are_lost = True


if numba and hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_one_at_a_time.release, after_in_child=_after_fork_in_child
    )


def _visible(batch: int, m: int, n: int, mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """Each query's first visible key and the one past its last, both [B, M]; padding apart."""
    lengths = np.full(batch, n) if mask.kv_lens is None else mask.kv_lens.numpy().astype(np.int64)
    last = lengths[:, None] - m + np.arange(1, m + 1)  # [B, M]
    first = np.zeros_like(last) if mask.window is None else last - mask.window
    return first.clip(0, n), last.clip(0, n)


def _chunks(first: np.ndarray, last: np.ndarray, kv_heads: int) -> np.ndarray:
    """The tasks [chunks, 3]: kv head (of B·Hkv), first key and the one past the last, covering first [B] to last [B]."""
    tasks = [
        (b * kv_heads + h, start, min(start + _CHUNK_KEYS, end))
        for b, (begin, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True))
        for h in range(kv_heads)
        for start in range(begin, end, _CHUNK_KEYS)
    ]
    return np.array(tasks, np.int64).reshape(-1, 3)


def _flat(x: Tensor, adjacent: bool = False) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The bits of x [B, Hkv, N, W] from its first element on, as one dimension, and the strides of B, Hkv and N. x is
    copied if the entries of a row are not adjacent or, with `adjacent`, the rows of a head."""
    x = x.detach()
    if x.stride(3) != 1 or (adjacent and x.stride(2) != x.shape[3]):
        x = x.contiguous()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    bits = x if x.dtype in (torch.uint8, torch.int8) else x.view(_UNSIGNED[x.dtype])
    return bits.as_strided((extent,), (1,)).numpy(), x.stride()[:3]


_OPTIONS = {"fastmath": {"contract"}, "nogil": True}


def _jit(reorder: bool = False) -> Callable:
    """`numba.njit`, or the function itself where numba is missing. With `reorder` sums may be, so that they
    vectorise; NaN and infinity always keep their meaning."""
    if numba is None:
        return lambda function: function
    return numba.njit(**_OPTIONS | ({"fastmath": {"contract", "reassoc", "nsz"}} if reorder else {}))


def _decode_kernel(
    q, values, values_at, indices, indices_at, dense, dense_at, scale, scale_at, v_scale, v_scale_at, topk, dense_dims,
    v, v_at, first, last, padding, chunks, kv_heads, n, cap, tolerance, out, lse,
):  # fmt: skip
    """The three passes. q [heads, R, D] with the scale in it, out [heads, R, Dv] and lse [heads, R] of B·Hkv heads;
    `x` and `x_at` as `_flat` returns them."""
    heads, rows, value_dim = out.shape
    scores = np.empty((heads, rows, n), np.float32)  # from the second pass on the weights
    cuts = np.empty((heads, rows), np.float32)
    sums = np.empty((len(chunks), rows, value_dim), np.float32)
    masses = np.empty((len(chunks), rows), np.float32)
    for chunk in prange(len(chunks)):
        head, start, end = chunks[chunk]
        b, h = head // kv_heads, head % kv_heads
        _score_chunk(
            q[head],
            _rows_between(values, b * values_at[0] + h * values_at[1], start, end, topk),
            _rows_between(indices, b * indices_at[0] + h * indices_at[1], start, end, topk),
            _rows_between(dense, b * dense_at[0] + h * dense_at[1], start, end, dense_dims),
            scores[head, :, start:end],
        )
        if len(scale):
            _scale_keys(
                scores[head, :, start:end], _rows_between(scale, b * scale_at[0] + h * scale_at[1], start, end, 1)
            )
        if cap > 0:
            _cap(scores[head, :, start:end], cap)
        _hide(scores[head, :, start:end], start, first[b], last[b], padding[b, start:end])
    for line in prange(heads * rows):
        head, row = line // rows, line % rows
        _weigh_row(
            scores[head, row], first[head // kv_heads], last[head // kv_heads], tolerance, row, lse[head], cuts[head]
        )
    for chunk in prange(len(chunks)):
        head, start, end = chunks[chunk]
        b, h = head // kv_heads, head % kv_heads
        _sum_chunk(
            scores[head, :, start:end], cuts[head], padding[b, start:end],
            v_scale[b * v_scale_at[0] + h * v_scale_at[1] + start :], v, b * v_at[0] + h * v_at[1] + start * v_at[2], v_at[2], sums[chunk], masses[chunk],
        )  # fmt: skip
    _combine(chunks, sums, masses, out)


@_jit()
def _rows_between(flat, at, start, end, width):
    """Rows start to end of a head, [end - start, width], whose first row is at `flat[at]`."""
    return flat[at + start * width : at + end * width].reshape((end - start, width))


@_jit()
def _score_chunk(q, values, indices, dense, scores):
    """scores [R, n] of n keys: q [R, D] times the codes values and indices [n, K] and dense [n, M]."""
    rows, dims = q.shape[0], dense.shape[1]
    table = np.zeros((_TABLE_ROWS, _LANES), np.float32)  # q transposed, so that a code entry finds all lanes together
    dense_table = np.zeros((dims, _LANES), np.float32)
    for row in range(0, rows, _LANES):
        lanes = min(_LANES, rows - row)
        for lane in range(lanes):
            for u in range(dims):
                dense_table[u, lane] = q[row + lane, u]
            for u in range(q.shape[1] - dims):
                table[u, lane] = q[row + lane, dims + u]
        for start in range(0, len(values), _SCORE_KEYS):
            keys = slice(start, start + _SCORE_KEYS)
            if lanes == 1:
                _score_row(
                    table[:, 0].copy(), q[row, :dims], values[keys], indices[keys], dense[keys], scores[row, keys]
                )
            else:
                _score_lanes(
                    table, dense_table, values[keys], indices[keys], dense[keys], scores[row : row + lanes, keys]
                )


@_jit()
def _score_row(table, dense_row, values, indices, dense, scores):
    """scores [n] of one query row."""
    for key in range(len(scores)):
        score = np.float32(0)
        for u in range(values.shape[1]):
            score += _widen(values[key, u]) * table[indices[key, u]]
        for u in range(dense.shape[1]):
            score += _widen(dense[key, u]) * dense_row[u]
        scores[key] = score


@_jit()
def _score_lanes(table, dense_table, values, indices, dense, scores):
    """scores [lanes, n] of two to four query rows: each code entry is read once for all."""
    lanes = len(scores)
    for key in range(scores.shape[1]):
        s0 = s1 = s2 = s3 = np.float32(0)
        for u in range(values.shape[1]):
            x, row = _widen(values[key, u]), indices[key, u]
            s0 += x * table[row, 0]
            s1 += x * table[row, 1]
            s2 += x * table[row, 2]
            s3 += x * table[row, 3]
        for u in range(dense.shape[1]):
            x = _widen(dense[key, u])
            s0 += x * dense_table[u, 0]
            s1 += x * dense_table[u, 1]
            s2 += x * dense_table[u, 2]
            s3 += x * dense_table[u, 3]
        scores[0, key] = s0
        scores[1, key] = s1
        if lanes > 2:
            scores[2, key] = s2
        if lanes > 3:
            scores[3, key] = s3


@_jit()
def _scale_keys(scores, scale):
    """Multiply scores [R, n] by the keys' factors [n, 1]."""
    for row in range(len(scores)):
        for key in range(len(scale)):
            scores[row, key] *= _widen(scale[key, 0])


@_jit()
def _cap(scores, cap):
    """Turn scores [R, n], divided by the cap, into `cap` times their hyperbolic tangent."""
    for row in range(len(scores)):
        for key in range(scores.shape[1]):
            scores[row, key] = np.float32(cap) * np.tanh(scores[row, key])


@_jit()
def _hide(scores, start, first, last, padding):
    """Set scores [R, n] of the keys from `start` on to -inf where the row's token, one of M, sees none."""
    m = len(first)
    for row in range(len(scores)):
        line, begin, end = scores[row], first[row % m] - start, last[row % m] - start
        line[: max(0, begin)] = -np.inf
        line[max(0, end) :] = -np.inf
        for key in range(len(padding)):
            if padding[key]:
                line[key] = -np.inf


@_jit(reorder=True)
def _weigh_row(scores, first, last, tolerance, row, lse, cuts):
    """Turn the scores [N] of a row into weights relative to the largest; write the row's log-sum-exp and its cut."""
    scores = scores[first.min() : last.max()]
    lse[row], cuts[row] = -np.inf, -1
    largest = np.float32(-np.inf)
    for score in scores:
        largest = max(largest, score)
    total = 0.0
    for start in range(0, len(scores), _SUM_KEYS):
        block = scores[start : start + _SUM_KEYS]
        part = np.float32(0)
        for key in range(len(block)):
            block[key] = weight = _exp2(block[key] - largest) if block[key] != -np.inf else np.float32(0)
            part += weight
        total += part
    if total != 0:
        lse[row] = (largest + np.log2(total)) / _LOG2_E
    if tolerance > 0:
        cuts[row] = _find_cut(scores, tolerance * total * _CUT_SLACK)


@_jit()
def _exp2(x):
    """2^x of a float32 x <= 0 to about an ulp; 0 below the normal numbers, NaN for NaN."""
    above = max(x, np.float32(-126))
    whole = np.floor(above + np.float32(0.5))
    f = above - whole  # [-0.5, 0.5]
    p = np.float32(1.5353362e-4)
    p = p * f + np.float32(1.3398874e-3)
    p = p * f + np.float32(9.6184373e-3)
    p = p * f + np.float32(5.5503324e-2)
    p = p * f + np.float32(2.4022648e-1)
    p = p * f + np.float32(6.9314720e-1)
    p = p * f + np.float32(1)
    power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    value = p * power if x >= np.float32(-126) else np.float32(0)
    return value if x == x else x


@_jit(reorder=True)
def _find_cut(weights, allowed):
    """The largest cut tried such that the weights up to it sum to at most `allowed`; 0 if none does."""
    cut = np.float32(0)
    low, high = -_CUT_OCTAVES, 0.0  # log2 of the cut
    for _ in range(_CUT_STEPS):
        middle = (low + high) / 2
        candidate = np.float32(2.0**middle)
        dropped = 0.0
        for start in range(0, len(weights), _SUM_KEYS):
            block = weights[start : start + _SUM_KEYS]
            part = np.float32(0)
            for key in range(len(block)):
                part += block[key] if block[key] <= candidate else np.float32(0)
            dropped += part
        if dropped <= allowed:
            cut, low = candidate, middle
        else:
            high = middle
    return cut


@_jit()
def _needed(weights, cuts, padding):
    """The keys of weights [R, n] that are no padding and above the cut of some row."""
    needed, count = np.empty(weights.shape[1], np.int64), 0
    for key in range(weights.shape[1]):
        keep = False
        for row in range(len(weights)):
            keep |= not weights[row, key] <= cuts[row]  # NaN is kept, to be seen in the output
        needed[count] = key
        count += keep and (len(padding) == 0 or not padding[key])
    return needed[:count]


@_jit(reorder=True)
def _sum_chunk(weights, cuts, padding, scale, v, start, stride, out, mass):
    """out [R, Dv] = sum over the needed keys of weights [R, n] times the V row at v[start + key * stride], times scale[key]
    unless that is empty, and mass [R], the sum of their weights."""
    needed = _needed(weights, cuts, padding)
    count, last, dims = len(needed), len(needed) - 1, out.shape[1]
    out[:] = 0
    mass[:] = 0
    for i in range(0, count, 4):  # four keys a step: out is loaded and stored a fourth as often
        for ahead in range(i + _AHEAD_KEYS, min(i + _AHEAD_KEYS + 4, count)):
            at = start + needed[ahead] * stride
            for line in range(at, at + dims, _LINE_BYTES // v.itemsize):
                _prefetch(v, line)
        k0, k1, k2, k3 = needed[i], needed[min(i + 1, last)], needed[min(i + 2, last)], needed[min(i + 3, last)]
        at0, at1 = np.uint64(start + k0 * stride), np.uint64(start + k1 * stride)
        at2, at3 = np.uint64(start + k2 * stride), np.uint64(start + k3 * stride)
        for row in range(len(weights)):
            w0 = weights[row, k0]
            w1 = weights[row, k1] if i + 1 < count else np.float32(0)
            w2 = weights[row, k2] if i + 2 < count else np.float32(0)
            w3 = weights[row, k3] if i + 3 < count else np.float32(0)
            mass[row] += (w0 + w1) + (w2 + w3)
            if len(scale):
                w0, w1 = w0 * _widen(scale[k0]), w1 * _widen(scale[k1])
                w2, w3 = w2 * _widen(scale[k2]), w3 * _widen(scale[k3])
            for j in range(np.uint64(dims)):
                out[row, j] += (w0 * _widen(v[at0 + j]) + w1 * _widen(v[at1 + j])) + (
                    w2 * _widen(v[at2 + j]) + w3 * _widen(v[at3 + j])
                )


def _widen_code(typing: Any, bits: Any) -> Any:
    """The float32 of an int8, or whose upper bits are `bits`: bfloat16 is float32's upper half, uint32 bits are all of it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if bits.signed:
            return builder.sitofp(arguments[0], ir.FloatType())
        word = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(word, ir.IntType(32)(32 - bits.bitwidth)), ir.FloatType())

    return numba.types.float32(bits), generate


def _prefetch_code(typing: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of array[index]: scattered V rows arrive about a tenth sooner."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(array)(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        i32 = ir.IntType(32)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [address.type], ir.FunctionType(ir.VoidType(), [address.type, i32, i32, i32])
        )
        read, keep, data_cache = i32(0), i32(3), i32(1)
        builder.call(prefetch, [address, read, keep, data_cache])
        return context.get_dummy_value()

    return numba.types.void(array, index), generate


_widen, _prefetch = map(numba.extending.intrinsic, (_widen_code, _prefetch_code)) if numba else (None, None)


@_jit()
def _combine(chunks, sums, masses, out):
    """out [heads, R, Dv], the chunks' sums over their masses; 0 for a row without weight."""
    heads, rows, value_dim = out.shape
    out[:] = 0
    mass = np.zeros((heads, rows), np.float32)
    for chunk in range(len(chunks)):
        head = chunks[chunk, 0]
        for row in range(rows):
            mass[head, row] += masses[chunk, row]
            for j in range(value_dim):
                out[head, row, j] += sums[chunk, row, j]
    for head in range(heads):
        for row in range(rows):
            if mass[head, row] != 0:
                for j in range(value_dim):
                    out[head, row, j] /= mass[head, row]

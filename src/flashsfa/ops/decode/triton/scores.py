"""What the decode kernels share: the problem as the host sees it, and a block's scores from its codes.

The G query heads of a kv head times M query tokens are the rows of one small matrix, R = G·M. A program takes one
split of one sequence's keys for up to 16 of these rows; a code's index fetches the matching feature of all rows
with one contiguous load. Scores are in log2 units: softmax runs in base 2.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....mask import Mask
from ....scores import ScoreRules
from ....stored import KVView
from ...triton.rows import cdiv, next_power_of_2

LOG2_E = math.log2(math.e)
_ROW_TILE = 16  # query rows a program: more would not fit the registers beside a block of keys


class Problem:
    """Sizes of one decode call and the keyword arguments of its kernels, whatever the keys and values are held in.

    Attributes:
        heads: B·Hkv pairs of a sequence and a kv head; rows: R query rows of each.
        padded_rows: R up to a power of two, cut into `tiles` tiles of `tile` rows.
        keys: N keys at most; splits of a sequence follow its own length on the device, so that a launch depends on
            shapes alone.
        rotation: width of the blocks in which the output is to be rotated back (`rotation.rotate`); 1 for an output as it is.
        visibility, places, ruled: arguments of `split_range`, `locate` and `ruled_scores`.
    """

    rotation = 1

    def __init__(self, q: Tensor, v: Tensor, page_table: Tensor | None, mask: Mask, rules: ScoreRules) -> None:
        # small, and read entry by entry: the kernels count on adjacent ones
        kv_lens, padding, page_table = (
            None if x is None else x.contiguous() for x in (mask.kv_lens, mask.key_padding_mask, page_table)
        )
        (batch, q_heads, m, _), self.kv_heads = q.shape, v.shape[1]
        self.device, self.dtype = q.device, q.dtype
        self.keys = v.shape[2] * (1 if page_table is None else page_table.shape[1])
        self.heads, self.rows = batch * self.kv_heads, q_heads // self.kv_heads * m
        self.padded_rows = next_power_of_2(self.rows)
        self.tile = min(self.padded_rows, _ROW_TILE)
        self.tiles = self.padded_rows // self.tile
        self.visibility: dict[str, Any] = {
            "LENS": kv_lens, "kv_heads": self.kv_heads, "n": self.keys, "m": m, "window": mask.window or 0,
            "R": self.padded_rows, "RT": self.tile, "WINDOW": mask.window is not None,
        }  # fmt: skip
        self.places: dict[str, Any] = {
            "PAGES": page_table,
            "pages_sb": 0 if page_table is None else page_table.stride(0),
            "PAGE": 0 if page_table is None else v.shape[2],
        }
        self.ruled: dict[str, Any] = {
            "PADDING": padding,
            # log2 units; under a cap, which stands before them, in units of it
            "scale": rules.scale * LOG2_E if rules.softcap is None else rules.scale / rules.softcap,
            "cap": (rules.softcap or 0.0) * LOG2_E,
            "padding_sb": 0 if padding is None else padding.stride(0),
            "CAUSAL": m > 1, "CAPPED": rules.softcap is not None,
        }  # fmt: skip

    def splits(self, block: int, waves: int) -> int:
        """Splits of each sequence: at most `waves` programs a processor, so that no last few run alone, but none with
        fewer than 2 blocks of keys, where the combine would cost as much as the keys."""
        wanted = waves * processors(self.device) // (self.heads * self.tiles)
        return max(1, min(wanted, self.keys // (2 * block)))

    def scratch(self, *shape: int) -> Tensor:
        """Uninitialised float32 [heads, *shape]."""
        return torch.empty(self.heads, *shape, dtype=torch.float32, device=self.device)

    def by_feature(self, q: Tensor, dense_dims: int, topk_query: int | None) -> Tensor:
        """Sparsified q [B, Hq, M, D] as [heads, D, R]: a feature of all rows is one contiguous load. Padding rows hold
        anything."""
        by_feature = q.new_empty((self.heads, q.shape[-1], self.padded_rows))
        decode_query_kernel[self.heads, self.rows](
            by_feature, **self.query_arguments(q, dense_dims, topk_query), num_warps=4
        )
        return by_feature

    def query_arguments(self, q: Tensor, dense_dims: int, topk_query: int | None) -> dict[str, Any]:
        """Arguments of `query_row`."""
        m, d = q.shape[2:]
        return {
            "Q": q, **dict(zip(("q_sb", "q_sh", "q_sm", "q_sd"), q.stride(), strict=True)),
            "kv_heads": self.kv_heads, "group": self.rows // m, "m": m,
            "D": d, "DENSE": dense_dims, "K": topk_query or d, "R": self.padded_rows,
            "INTEGER": tl.int32 if q.itemsize == 4 else tl.int16, "CHUNK": min(next_power_of_2(d), 64 if d <= 128 else 32),
        }  # fmt: skip


class FeatureProblem(Problem):
    """One decode call over `FeatureCodes`.

    Attributes:
        coded, valued: arguments of `block_scores` and of V's rows.
    """

    def __init__(self, q: Tensor, kv: KVView, mask: Mask, rules: ScoreRules, topk_query: int | None) -> None:
        codes, v = kv.codes, kv.v
        super().__init__(q, v, kv.page_table, mask, rules)
        self.topk, self.dense_dims, self.width = codes.topk, codes.dense_dims, v.shape[-1]
        self.is_8_bit = v.dtype == torch.int8
        # of a V row in a block; float32 is multiplied without matrix units, from wide rows in shared memory
        self.row_bytes = next_power_of_2(self.width) * (4 if q.itemsize == 4 else v.itemsize)
        self.coded: dict[str, Any] = {
            "Q": self.by_feature(q, self.dense_dims, topk_query), **self.ruled,
            **strided("DENSE_K", codes.dense), **strided("VALUES", codes.values), **strided("INDICES", codes.indices),
            **strided("CODE_SCALE", codes.scale),
            "D": q.shape[-1], "DENSE": self.dense_dims, "K": self.topk,
        }  # fmt: skip
        self.valued: dict[str, Any] = {
            **strided("V", v), **strided("V_SCALE", kv.v_scale), "DV": self.width,
            # a weight times the scale of its row can leave the range of float16
            "DTYPE": tl.bfloat16 if kv.v_scale is not None and q.dtype == torch.float16 else TRITON_DTYPES[q.dtype],
        }  # fmt: skip


def block_keys(problem: FeatureProblem) -> int:
    """Keys a block: 128 where their V rows fit in 32 KB. Without matrix units a thread holds the weights of all keys of a block
    for some of the rows: fewer for more rows then."""
    keys = max(16, min(128, 32768 // problem.row_bytes))
    return min(keys, 512 // problem.tile) if problem.dtype == torch.float32 else keys


def chunk(topk: int, rows: int) -> int:
    """Sparse features that a block reads at a time for `rows` query rows: a power of two, with at most 8 steps over a code where
    the products fit the registers."""
    return min(next_power_of_2(topk), max(4, min(next_power_of_2(cdiv(topk, 8)), 64 // rows)))


def channel_words(dense_dims: int, dtype: torch.dtype) -> int:
    """Registers that the dense channel of a key takes."""
    return next_power_of_2(dense_dims) * dtype.itemsize // 4 if dense_dims else 0


TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def strided(name: str, x: Tensor | None) -> dict[str, Any]:
    """A cache tensor [B, Hkv, N, ...] and its strides as kernel arguments."""
    lower = name.lower()
    if x is None or x.shape[-1] == 0:  # not read; its strides would ask for variants of the kernel
        return {name: x, f"{lower}_sb": 0, f"{lower}_sh": 0, f"{lower}_sn": 0}
    return {name: x, f"{lower}_sb": x.stride(0), f"{lower}_sh": x.stride(1), f"{lower}_sn": x.stride(2)}


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for what stands in for one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def decode_query_kernel(
    BY_FEATURE, Q, q_sb, q_sh, q_sm, q_sd, kv_heads, group, m,
    D: tl.constexpr, DENSE: tl.constexpr, K: tl.constexpr, R: tl.constexpr, INTEGER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One query row to its place."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x = query_row(Q, head, row, q_sb, q_sh, q_sm, q_sd, kv_heads, group, m, D, DENSE, K, INTEGER, CHUNK)
    d = tl.arange(0, x.shape[0])
    tl.store(BY_FEATURE + (head * D + d) * R + row, x, mask=d < D)


@triton.jit
def query_row(
    Q, head, row, q_sb, q_sh, q_sm, q_sd, kv_heads, group, m,
    D: tl.constexpr, DENSE: tl.constexpr, K: tl.constexpr, INTEGER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One query row [DP]: its dense channel and K largest magnitudes of the rest, ties to the lowest index; all for K = D."""
    b, h = head // kv_heads, head % kv_heads * group + row // m
    q = Q + b * q_sb + h * q_sh + (row % m) * q_sm
    DP: tl.constexpr = triton.next_power_of_2(D)
    d = tl.arange(0, DP)
    x = tl.load(q + d * q_sd, mask=d < D, other=0.0)  # [DP]
    if K < D:
        size = _magnitude(x, d, DENSE, D, INTEGER)
        rank = tl.zeros([DP], tl.int32)
        for first in tl.static_range(0, DP, CHUNK):
            e = first + tl.arange(0, CHUNK)
            other = _magnitude(tl.load(q + e * q_sd, mask=e < D, other=0.0), e, DENSE, D, INTEGER)  # [CHUNK]
            before = (other[None, :] > size[:, None]) | ((other[None, :] == size[:, None]) & (e[None, :] < d[:, None]))
            rank += tl.sum(before.to(tl.int32), 1)
        x = tl.where((d < DENSE) | (rank < K), x, 0.0)
    return x + tl.sum(x.to(tl.float32) * 0, 0).to(x.dtype)  # NaN shows in every score, as in a dense product


@triton.jit
def rotated(x, d, WIDTH: tl.constexpr):
    """`rotation.rotate` of x [DP], d its indices, in blocks of `WIDTH` features."""
    for step in tl.static_range(0, 8):
        if 2**step < WIDTH:
            other = tl.gather(x, d ^ 2**step, 0)
            x = tl.where((d & 2**step) == 0, other + x, other - x)
    return x * WIDTH**-0.5


@triton.jit
def _magnitude(x, d, DENSE: tl.constexpr, D: tl.constexpr, INTEGER: tl.constexpr):
    """|x| as an integer in the same order, NaN above infinity; -1 outside of the sparse part."""
    LARGEST: tl.constexpr = 0x7FFF if tl.int16 == INTEGER else 0x7FFFFFFF
    return tl.where((d >= DENSE) & (d < D), x.to(INTEGER, bitcast=True).to(tl.int32) & LARGEST, -1)


@triton.jit
def split_range(LENS, b, n, m, window, WINDOW: tl.constexpr, BN: tl.constexpr):
    """Length of sequence b, and this program's share of the keys that its queries see, in whole blocks."""
    length = n
    if LENS is not None:
        length = tl.minimum(tl.load(LENS + b).to(tl.int32), n)
    first = 0
    if WINDOW:
        first = tl.maximum(length - m - window + 1, 0) // BN * BN
    share = tl.cdiv(tl.cdiv(length - first, tl.num_programs(1)), BN) * BN
    begin = first + tl.program_id(1) * share
    return length, begin, tl.minimum(begin + share, length)


@triton.jit
def live_keys(padding, key, length, m, window, WINDOW: tl.constexpr):
    """[BN] whether any query sees these keys."""
    live = key < length
    if WINDOW:
        live &= key > length - m - window
    if padding is not None:
        live &= tl.load(padding + key, mask=live, other=1) == 0
    return live


@triton.jit
def locate(pages, b, key, live, PAGE: tl.constexpr):
    """Where keys [BN] lie: index into the leading dimension of the cache tensors, and position in their third."""
    if PAGE == 0:
        return b, key.to(tl.int64)
    else:
        return tl.load(pages + key // PAGE, mask=live, other=0).to(tl.int64), (key % PAGE).to(tl.int64)


@triton.jit
def block_scores(
    q, dense_row, values_row, indices_row, scale_row, key, live, first_row, length, m, window, scale, cap,
    D: tl.constexpr, DENSE: tl.constexpr, K: tl.constexpr, R: tl.constexpr, RT: tl.constexpr,
    CAUSAL: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr, BN: tl.constexpr, KC: tl.constexpr,
):  # fmt: skip
    """Scores [BN, RT] in log2 units of the keys at the row pointers [BN], -inf where a query does not see a key."""
    products = tl.zeros([BN, KC, RT], tl.float32)
    if K <= 8 * KC:
        for first in tl.static_range(0, K, KC):
            products += _products(q, values_row, indices_row, live, first, D, DENSE, K, R, KC)
    else:  # unrolled, more steps would not fit the registers
        for first in range(0, K, KC):
            products += _products(q, values_row, indices_row, live, first, D, DENSE, K, R, KC)
    score = tl.sum(products, 1)  # [BN, RT]
    if DENSE > 0:
        WHOLE: tl.constexpr = max(16, triton.next_power_of_2(DENSE))
        # without matrix units, a thread holds all the dims that are multiplied at a time
        DP: tl.constexpr = WHOLE if q.dtype.element_ty.primitive_bitwidth == 16 else 16
        for first in tl.static_range(0, DENSE, DP):
            d = first + tl.arange(0, DP)
            channel = tl.load(dense_row[:, None] + d[None, :], mask=live[:, None] & (d < DENSE)[None, :], other=0.0)
            query = tl.load(q[None, :] + d[:, None] * R, mask=(d < DENSE)[:, None], other=0.0)  # [DP, RT]
            if RT == 1:
                score += tl.sum(channel.to(tl.float32) * tl.trans(query).to(tl.float32), 1)[:, None]
            else:
                score += tl.dot(channel.to(query.dtype), query, input_precision="ieee")
    if scale_row is not None:
        score *= tl.load(scale_row, mask=live, other=0.0)[:, None]
    return ruled_scores(
        score, key, live, first_row, length, m, window, scale, cap, RT, CAUSAL, CAPPED, WINDOW
    )  # fmt: skip


@triton.jit
def ruled_scores(
    score, key, live, first_row, length, m, window, scale, cap,
    RT: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Scores [BN, RT] in log2 units of products of queries and keys, -inf where a query does not see a key."""
    score *= scale
    if CAPPED:
        score = cap * (2 * tl.sigmoid(2 * score) - 1)  # tanh
    if CAUSAL:
        position = length - m + (first_row + tl.arange(0, RT)) % m  # [RT]
        seen = live[:, None] & (key[:, None] <= position[None, :])
        if WINDOW:
            seen &= key[:, None] > position[None, :] - window
        return tl.where(seen, score, float("-inf"))
    return tl.where(live[:, None], score, float("-inf"))


@triton.jit
def _products(q, values_row, indices_row, live, first, D: tl.constexpr, DENSE: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
              KC: tl.constexpr):  # fmt: skip
    """Products [BN, KC, RT] of the sparse features `first` to first + KC of the code rows [BN] and of the query rows at q [RT]."""
    k = first + tl.arange(0, KC)
    kept = live[:, None] & (k < K)[None, :]  # [BN, KC]
    index = tl.load(indices_row[:, None] + k[None, :], mask=kept, other=0).to(tl.int32)
    value = tl.load(values_row[:, None] + k[None, :], mask=kept, other=0.0).to(tl.float32)
    feature = DENSE + tl.minimum(index, D - DENSE - 1)  # a corrupt index must not read outside of q
    return tl.load(q[None, None, :] + feature[:, :, None] * R).to(tl.float32) * value[:, :, None]

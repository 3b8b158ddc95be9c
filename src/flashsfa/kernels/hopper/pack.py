"""Query rows in the order in which a warpgroup's matrix instruction reads them from registers.

The sparse instruction multiplies 64 rows by 32 features a step. Of each aligned group of four features it takes two,
in ascending order, and four bits that say which: bits 0-1 the place of the first, bits 2-3 of the second. A thread
(lane l = 4g + c of warp w) holds in its register r the pair of group c + 4 * (r // 2) in row 16w + g + 8 * (r % 2);
its word of metadata covers four groups, those from 4 * (c % 2) on: of row 16w + g in the low half, of row 16w + g + 8
in the high half. Lanes with c < 2 serve even steps, the others odd ones: the instruction's selector picks them.

The dense instruction multiplies 64 rows by 16 features a step, and the same register holds features
2c + 8 * (r // 2) and the next.
"""

# What Triton compiles is not Python to a type checker.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64  # of a tile: what one warpgroup multiplies


def pack_sparse(q: Tensor) -> tuple[Tensor, Tensor]:
    """Values and metadata of 2:4-sparse rows, tile by tile; rows past the end are zero.

    Args:
        q: [B, H, N, D] float16 or bfloat16, with at most two nonzero entries in each aligned group of four (of more, the
            first two are taken); D a multiple of 64.

    Returns:
        values [B * H * tiles, D / 32, 128, 4] int32, two entries a word, and metadata [B * H * tiles, D / 64, 128] int32.
    """
    batch, heads, n, head_dim = q.shape
    tiles = triton.cdiv(n, ROWS)
    values = q.new_empty((batch * heads * tiles, head_dim // 32, 128, 4), dtype=torch.int32)
    metadata = q.new_empty((batch * heads * tiles, head_dim // 64, 128), dtype=torch.int32)
    groups = _in_words(q, torch.int64)
    pack_sparse_kernel[(tiles, heads, batch)](
        groups, values, metadata, *groups.stride()[:3], n, STEPS=head_dim // 32, num_warps=4
    )
    return values, metadata


def pack_dense(q: Tensor) -> Tensor:
    """Any rows q [B, H, N, D] (D a multiple of 16) likewise: values [B * H * tiles, D / 16, 128, 4] int32."""
    batch, heads, n, head_dim = q.shape
    tiles = triton.cdiv(n, ROWS)
    values = q.new_empty((batch * heads * tiles, head_dim // 16, 128, 4), dtype=torch.int32)
    pairs = _in_words(q, torch.int32)
    pack_dense_kernel[(tiles, heads, batch)](pairs, values, *pairs.stride()[:3], n, STEPS=head_dim // 16, num_warps=4)
    return values


def _in_words(q: Tensor, word: torch.dtype) -> Tensor:
    """q [B, H, N, D] with the entries of a row in words; copied if its strides or address do not allow that."""
    entries = word.itemsize // q.itemsize
    whole = q.stride(-1) == 1 and all(s % entries == 0 for s in (*q.stride()[:3], q.storage_offset()))
    return (q if whole else q.contiguous()).view(word)


@triton.jit
def pack_sparse_kernel(q_ptr, values_ptr, metadata_ptr, stride_batch, stride_head, stride_row, n, STEPS: tl.constexpr):
    tile, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    tile_index = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + tile
    q_ptr += batch * stride_batch + head * stride_head
    # An output word lies at (step, warp, g; c; r // 2; r % 2): four axes, of which the metadata sums the second and fourth.
    outer = tl.arange(0, STEPS * 32)[:, None, None, None]  # [STEPS * 32, 1, 1, 1]
    c = tl.arange(0, 4)[None, :, None, None]  # [1, 4, 1, 1]
    upper = tl.arange(0, 2)[None, None, :, None]  # [1, 1, 2, 1]
    below = tl.arange(0, 2)[None, None, None, :]  # [1, 1, 1, 2]
    step, warp, g = outer // 32, outer // 8 % 4, outer % 8
    row = tile * 64 + warp * 16 + g + below * 8  # [STEPS * 32, 1, 1, 2]
    group = step * 8 + c + 4 * upper  # [STEPS * 32, 4, 2, 1]
    entries = q_ptr + row.to(tl.int64) * stride_row + group
    four = tl.load(entries, mask=row < n, other=0)  # [STEPS * 32, 4, 2, 2] int64, 16 bits an entry
    e0, e1, e2, e3 = four & 0xFFFF, (four >> 16) & 0xFFFF, (four >> 32) & 0xFFFF, (four >> 48) & 0xFFFF
    # The places of the first two nonzero entries; -0.0 is a zero. A lone entry takes place 3 beside it, or 0 below it.
    n0, n1, n2 = (e0 & 0x7FFF) != 0, (e1 & 0x7FFF) != 0, (e2 & 0x7FFF) != 0
    first = tl.where(n0, 0, tl.where(n1, 1, tl.where(n2, 2, 0)))
    second = tl.where(n1 & (first < 1), 1, tl.where(n2 & (first < 2), 2, 3))
    low = tl.where(first == 0, e0, tl.where(first == 1, e1, e2))
    high = tl.where(second == 1, e1, tl.where(second == 2, e2, e3))
    word = outer * 16 + c * 4 + 2 * upper + below  # [STEPS * 32, 4, 2, 2]
    tl.store(values_ptr + tile_index * (STEPS * 512) + word, (low | (high << 16)).to(tl.int32))
    bits = (first | (second << 2)) << (4 * c + 16 * below)
    bits = tl.sum(tl.sum(bits, 3), 1)  # [STEPS * 32, 2]
    outer = tl.arange(0, STEPS * 32)[:, None]
    thread = outer % 32 * 4 + 2 * (outer // 32 % 2) + tl.arange(0, 2)[None, :]  # [STEPS * 32, 2]
    tl.store(metadata_ptr + tile_index * (STEPS * 64) + outer // 64 * 128 + thread, bits.to(tl.int32))


@triton.jit
def pack_dense_kernel(q_ptr, values_ptr, stride_batch, stride_head, stride_row, n, STEPS: tl.constexpr):
    tile, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    tile_index = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + tile
    q_ptr += batch * stride_batch + head * stride_head
    word = tl.arange(0, STEPS * 512)  # [STEPS * 512]: step, warp, g, c, r
    step, warp, g, c, r = word // 512, word // 128 % 4, word // 16 % 8, word // 4 % 4, word % 4
    row = tile * 64 + warp * 16 + g + r % 2 * 8
    pair = step * 8 + c + r // 2 * 4
    two = tl.load(q_ptr + row.to(tl.int64) * stride_row + pair, mask=row < n, other=0)
    tl.store(values_ptr + tile_index * (STEPS * 512) + word, two)

"""The queries' operand, as the PTX ISA (wgmma.mma_async(.sp), m64nNk16 and k32) lays it out: queries.cuh on the host."""

import ctypes
import math
import shutil
import subprocess

import pytest
import torch

from flashsfa.codes import FeatureCodes, topk_codes
from flashsfa.ops.prefill.hopper import compiler, prefill
from hopper_cases import BF16, coded

HARNESS = """
#include <string.h>
#define __device__
#define __forceinline__ inline
%s
extern "C" void operand(const char* dense, const char* values, const char* indices, int tile, int n, char* to, u32* p) {
  const int first = 64 * tile, rows = n - first;
  auto copy = [&](int at, const char* from, bool there) { there ? memcpy(to + at, from, 16) : memset(to + at, 0, 16); };
  for (int thread = 0; thread < 128; ++thread)
    stage_queries(dense + 32 * DENSE_STEPS * first, 32 * DENSE_STEPS, values + 32 * SPARSE_STEPS * first,
                  indices + 16 * SPARSE_STEPS * first, rows, thread, copy);
  for (int thread = 0; thread < 128; ++thread) {
    const int row = thread / 32 * 16 + thread %% 32 / 4;
    const u64* features = (const u64*)(to + STEP_BYTES * STEPS) + 2 * SPARSE_STEPS * row;
    u32 words[METADATA_WORDS];
    load_metadata(words, features, row < rows, row + 8 < rows, thread %% 32);
    for (int i = 0; i < METADATA_WORDS; ++i) p[i * 128 + thread] = words[i];
  }
}
"""


@pytest.fixture(scope="module")
def operand(tmp_path_factory):
    """queries.cuh, compiled for the host: entries [steps, 64, 16] of a tile and metadata [words, 128]."""
    compiler_path = shutil.which("c++")
    if compiler_path is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("queries")
    text = (compiler.SOURCES / "queries.cuh").read_text()

    def load(codes, tile):
        sizes = [f"-DHEAD_DIM={codes.head_dim}", f"-DDENSE_DIMS={codes.dense_dims}"]
        library = folder / f"{codes.head_dim}-{codes.dense_dims}.so"
        if not library.exists():
            (folder / "queries.cpp").write_text(HARNESS % text)
            command = [compiler_path, "-std=c++17", "-w", "-O1", "-shared", "-fPIC", *sizes, folder / "queries.cpp"]
            subprocess.run([*command, "-o", library], check=True)
        steps = codes.dense_dims // 16 + codes.sparse_dims // 32
        index_entries = codes.sparse_dims // 4 * 64  # a byte for each of two features of four, in entries of two bytes
        staged = torch.full((steps * 1024 + index_entries,), math.nan, dtype=codes.dtype)
        metadata = torch.empty(max(1, -(-codes.sparse_dims // 64)), 128, dtype=torch.int32)
        parts = [ctypes.c_void_p(x.data_ptr()) for x in (codes.dense, codes.values, codes.indices)]
        outputs = [ctypes.c_void_p(x.data_ptr()) for x in (staged, metadata)]
        ctypes.CDLL(str(library)).operand(*parts, tile, codes.values.shape[0], *outputs)
        entries = staged[: steps * 1024].view(steps, 2, 64, 8)  # halves of the columns, rows
        return entries.transpose(1, 2).reshape(steps, 64, 16), metadata

    return load


def multiplied(entries, metadata, head_dim, dense_dims):
    """The rows [64, D] that the instructions would multiply."""
    tile = torch.zeros(64, head_dim, dtype=entries.dtype)
    for step in range(dense_dims // 16):
        tile[:, 16 * step : 16 * step + 16] = entries[step]
    for step in range((head_dim - dense_dims) // 32):
        kept = torch.full((64, 8), -1)  # four bits per group: which two of its features
        for t in range(128):
            lane = t % 32
            if lane % 4 // 2 != step % 2:
                continue  # the selector picks two lanes of four
            for bit in range(0, 32, 4):
                r = t // 32 * 16 + lane // 4 + 8 * (bit // 16)
                kept[r, lane % 2 * 4 + bit % 16 // 4] = int(metadata[step // 2, t]) >> bit & 15
        assert (kept >= 0).all()
        first, second = kept & 3, kept >> 2
        assert (first < second).all()
        begin = dense_dims + 32 * step
        groups = tile[:, begin : begin + 32].unflatten(1, (8, 4))
        groups.scatter_(2, torch.stack((first, second), 2), entries[dense_dims // 16 + step].unflatten(1, (8, 2)))
    return tile


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("head_dim", "dense_dims"),
    [(64, 0), (64, 32), (64, 64), (128, 0), (128, 32), (128, 64), (128, 96), (128, 128), (256, 0), (256, 32)],
)
@pytest.mark.parametrize("n", [1, 64, 73])
def test_instructions_multiply_the_coded_rows(operand, head_dim, dense_dims, n):
    codes = coded(torch.randn(n, head_dim).to(BF16), dense_dims)
    tiles = -(-n // 64)
    expected = torch.zeros(tiles * 64, head_dim, dtype=BF16)
    expected[:n] = codes.to_dense()
    for tile in range(tiles):
        found = multiplied(*operand(codes, tile), head_dim, dense_dims)
        assert torch.equal(found, expected[64 * tile : 64 * (tile + 1)])


@pytest.mark.parametrize("dense_dims", [0, 32])
def test_a_smaller_budget_fills_the_pattern_with_zeros(dense_dims):
    codes = topk_codes(torch.randn(2, 3, 5, 128), 9, dense_dims=dense_dims, pattern="2:4")
    dense, values, indices = prefill.as_24_pattern(codes)
    assert values.shape[-1] == (128 - dense_dims) // 2
    groups = indices.unflatten(-1, (-1, 2)).long() // 4
    assert torch.equal(groups, torch.arange(groups.shape[-2], device=groups.device)[:, None].expand_as(groups))
    assert torch.equal(FeatureCodes(dense, values, indices, 128).to_dense(), codes.to_dense())

"""Run-time compilation of the prefill kernel with NVRTC: no nvcc, nothing at install time.

One `Tile` is one specialisation. Its compiled code is kept in memory and, named by a hash of its source, options and
compiler, in a cache directory on disk (`FLASHSFA_CACHE`, by default `~/.cache/flashsfa`).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from . import cuda

_OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17", "--device-as-default-execution-space")
_REGISTERS = {1: (24, 240), 2: (24, 240), 3: (32, 160)}  # of a producer's and a consumer's thread, by consumers


@dataclass(frozen=True)
class Tile:
    """Sizes that the kernel is compiled for.

    Attributes:
        dtype: float16 or bfloat16.
        head_dim: width of queries and keys, 64 or 128; value_dim: width of values, likewise.
        block_n: keys a tile, a multiple of 16.
        consumers: warpgroups of 64 queries, 1 to 3.
        stages: tiles of K and of V in flight.
        is_sparse: queries are 2:4 sparse and take half the matrix time; else the dense instruction.
        spin_limit: trap after this many failed waits at a barrier; 0 waits forever.
    """

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    block_n: int = 128
    consumers: int = 2
    stages: int = 2
    is_sparse: bool = True
    spin_limit: int = 0

    @property
    def depth(self) -> int:
        """Entries of a query row that one matrix instruction takes."""
        return 32 if self.is_sparse else 16

    @property
    def block_m(self) -> int:
        return 64 * self.consumers

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.block_n * 2 * (self.head_dim + self.value_dim) + 32)  # tiles and barriers


def source(tile: Tile) -> str:
    """The CUDA source of one specialisation."""
    producer, consumer = _REGISTERS[tile.consumers]
    constants = {
        "HEAD_DIM": tile.head_dim,
        "VALUE_DIM": tile.value_dim,
        "BLOCK_N": tile.block_n,
        "CONSUMERS": tile.consumers,
        "STAGES": tile.stages,
        "SPARSE": int(tile.is_sparse),
        "QK_DEPTH": tile.depth,
        "SPIN_LIMIT": tile.spin_limit,
        "PRODUCER_REGISTERS": producer,
        "CONSUMER_REGISTERS": consumer,
        "PACK_PAIR": f'"cvt.rn.{_ptx_type(tile.dtype)}x2.f32"',
    }
    defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    body = Path(__file__).with_name("prefill.cu").read_text()
    return defines + _matrix_functions(tile) + body


def _ptx_type(dtype: torch.dtype) -> str:
    return {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]


def _matrix_functions(tile: Tile) -> str:
    """`wgmma_qk` and `wgmma_pv`: the instruction lists its accumulators one by one, so its text depends on the sizes."""
    element = _ptx_type(tile.dtype)

    def call(n: int, depth: int, sparse: bool, transposed: int, accumulate: str) -> str:
        count = n // 2  # accumulators of a thread
        a = ", ".join(f"%{count + i}" for i in range(4))
        accumulators = ", ".join(f"%{i}" for i in range(count))
        metadata = f"%{count + 6}, %{count + 7}, " if sparse else ""
        operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
        metadata_operands = ', "r"(meta), "n"(SELECTOR)' if sparse else ""
        return (
            f'  asm volatile("wgmma.mma_async{".sp" if sparse else ""}.sync.aligned.m64n{n}k{depth}.f32.{element}.{element} "\n'
            f'               "{{{accumulators}}}, {{{a}}}, %{count + 4}, {metadata}%{count + 5}, 1, 1, {transposed};"\n'
            f"               : {operands}\n"
            f'               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "n"({accumulate}){metadata_operands});\n'
        )

    return (
        "template <int SELECTOR, bool ACCUMULATE>\n"
        f"__device__ __forceinline__ void wgmma_qk(float (&d)[{tile.block_n // 2}], const uint4& a, unsigned long long b, unsigned meta) {{\n"
        f"{call(tile.block_n, tile.depth, tile.is_sparse, 0, 'int(ACCUMULATE)')}}}\n"
        f"__device__ __forceinline__ void wgmma_pv(float (&d)[{tile.value_dim // 2}], const uint4& a, unsigned long long b) {{\n"
        f"{call(tile.value_dim, 16, False, 1, '1')}}}\n"
    )


def compile_cubin(tile: Tile) -> bytes:
    """Machine code of one specialisation for sm_90a, from the disk cache where it is there. Needs no GPU.

    Raises `CompilationError` if there is no NVRTC or it refuses.
    """
    text = source(tile)
    key = hashlib.sha256(f"{cuda.nvrtc_version()}{_OPTIONS}{text}".encode()).hexdigest()[:32]
    path = _cache_directory() / f"prefill-sm_90a-{key}.cubin"
    if path.is_file():
        return path.read_bytes()
    cubin = cuda.compile_cubin(text, "prefill.cu", _OPTIONS)
    _write_whole(path, cubin)
    return cubin


def _cache_directory() -> Path:
    return Path(os.environ.get("FLASHSFA_CACHE", Path.home() / ".cache" / "flashsfa"))


def _write_whole(path: Path, content: bytes) -> None:
    """Another process sees the whole file or none; a directory that cannot be written costs only the next start."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as beside:
            (Path(beside) / path.name).write_bytes(content)
            (Path(beside) / path.name).replace(path)
    except OSError:
        pass

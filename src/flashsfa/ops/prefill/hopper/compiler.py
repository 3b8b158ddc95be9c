"""The source of the prefill kernel: one `Tile` is one specialisation."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from ... import nvrtc
from ...nvrtc import cuda
from .params import Params

SOURCES = Path(__file__).parent
_FILES = (  # in the order in which they use one another
    "queries.cuh", "params.cuh", "barriers.cuh", "copies.cuh", "math.cuh", "wgmma.cuh", "mask.cuh", "softmax.cuh",
    "scheduler.cuh", "consumer.cuh", "epilogue.cuh", "prefill.cu",
)  # fmt: skip
_REGISTERS = {1: (24, 240), 2: (24, 240), 3: (32, 160)}  # per thread of the producer and of a consumer, by consumers


@dataclass(frozen=True)
class Tile:
    """Sizes that the kernel is compiled for.

    Attributes:
        dtype: float16 or bfloat16.
        head_dim: width of queries and keys, 64, 128 or 256; value_dim: width of values, likewise.
        dense_dims: leading features of a query that are dense, a multiple of 32; the rest is 2:4 sparse and takes half the
            matrix time.
        block_n: keys per tile, a multiple of 16.
        consumers: warpgroups of 64 queries, 1 to 3.
        stages: tiles of K and of V in flight, at least 2.
        early_k_wait: wait for the next tile of K while the scores of this one are computed.
        spin_limit: trap after this many failed waits at a barrier; 0 waits forever.
    """

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    dense_dims: int = 0
    block_n: int = 128
    consumers: int = 2
    stages: int = 2
    early_k_wait: bool = False
    spin_limit: int = 0

    @property
    def block_m(self) -> int:
        return 64 * self.consumers

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    @property
    def shared_bytes(self) -> int:
        tiles = self.stages * self.block_n * 2 * (self.head_dim + self.value_dim)
        sparse_dims = self.head_dim - self.dense_dims
        query = 2 * self.dense_dims + sparse_dims + sparse_dims // 2  # entries, and the features of the sparse ones
        barriers = 32 * self.stages + 12 * (self.stages + 1)  # of tiles of K and V; of the queue of work tiles, with it
        return tiles + self.block_m * query + barriers


def source(tile: Tile) -> str:
    """The CUDA source of one specialisation: its sizes, its matrix instructions, and all files, each under its name and lines."""
    producer, consumer = _REGISTERS[tile.consumers]
    constants = {
        "HEAD_DIM": tile.head_dim,
        "VALUE_DIM": tile.value_dim,
        "DENSE_DIMS": tile.dense_dims,
        "BLOCK_N": tile.block_n,
        "CONSUMERS": tile.consumers,
        "STAGES": tile.stages,
        "EARLY_K_WAIT": int(tile.early_k_wait),
        "SPIN_LIMIT": tile.spin_limit,
        "PRODUCER_REGISTERS": producer,
        "CONSUMER_REGISTERS": consumer,
        "PACK_INSTRUCTION": f'"cvt.rn.{_ptx_type(tile.dtype)}x2.f32"',
        "PARAMS_BYTES": ctypes.sizeof(Params),
        "TENSOR_MAP_BYTES": cuda.TENSOR_MAP_BYTES,
        "SHARED_BYTES": tile.shared_bytes,
    }
    return nvrtc.defines(constants) + _matrix_functions(tile) + nvrtc.listed(SOURCES, _FILES)


def _ptx_type(dtype: torch.dtype) -> str:
    return {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]


def _matrix_functions(tile: Tile) -> str:
    """One function per shape of instruction, which lists its accumulators one by one, so that its text depends on the sizes."""
    element = _ptx_type(tile.dtype)

    def function(name: str, template: str, n: int, depth: int, a_type: str, transposed: str, accumulate: str) -> str:
        count = n // 2  # accumulators of a thread
        accumulators = ", ".join(f"%{i}" for i in range(count))
        operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
        in_registers, sparse = a_type == "const uint4&", depth == 32
        a_operands = '"r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w)' if in_registers else '"l"(a)'
        after_a = count + (4 if in_registers else 1)
        a = "{" + ", ".join(f"%{i}" for i in range(count, after_a)) + "}" if in_registers else f"%{count}"
        metadata = f"%{after_a + 2}, %{after_a + 3}, " if sparse else ""
        metadata_operands = ', "r"(metadata), "n"(SELECTOR)' if sparse else ""
        return (
            f"{template}__device__ __forceinline__ void {name}(float (&d)[{count}], {a_type} a, unsigned long long b"
            f"{', unsigned metadata' if sparse else ''}) {{\n"
            f'  asm volatile("wgmma.mma_async{".sp" if sparse else ""}.sync.aligned.m64n{n}k{depth}.f32.{element}.{element} "\n'
            f'               "{{{accumulators}}}, {a}, %{after_a}, "\n'
            f'               "{metadata}%{after_a + 1}, 1, 1, {transposed};"\n'
            f"               : {operands}\n"
            f'               : {a_operands}, "l"(b), "n"({accumulate}){metadata_operands});\n}}\n'
        )

    from_shared = ("unsigned long long", "0, 0", "int(ACCUMULATE)")  # A by descriptor; neither operand transposed
    return (
        function("wgmma_qk_dense", "template <bool ACCUMULATE>\n", tile.block_n, 16, *from_shared)
        + function("wgmma_qk_sparse", "template <int SELECTOR, bool ACCUMULATE>\n", tile.block_n, 32, *from_shared)
        + function("wgmma_pv", "", tile.value_dim, 16, "const uint4&", "1", "1")  # V is read across its rows
    )


def compile_cubin(tile: Tile, *, afresh: bool = False) -> bytes:
    """Machine code of one specialisation for sm_90a, as `nvrtc.machine_code` finds or makes it."""
    return nvrtc.machine_code("prefill", source(tile), afresh=afresh)

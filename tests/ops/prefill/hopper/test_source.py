"""The prefill kernel compiles for all of its tiles, and refuses structures that Python lays out otherwise. Needs NVRTC, no GPU."""

import ctypes
import shutil

import pytest

from flashsfa.ops.nvrtc import cuda
from flashsfa.ops.prefill.hopper import compiler, prefill
from flashsfa.ops.prefill.hopper.params import Params
from hopper_cases import BF16, FP16

pytestmark = pytest.mark.cpu
TILE = compiler.Tile(BF16, 64, 64)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("head_dim", "value_dim", "dense_dims", "long_context"),
    [
        (64, 64, 0, True),
        (128, 128, 0, True),
        (128, 128, 128, True),
        (128, 128, 128, False),
        (64, 128, 32, True),
        (128, 64, 128, True),
        (128, 64, 64, False),
        (128, 128, 96, False),
        (256, 256, 0, False),
        (64, 256, 32, True),
        (256, 64, 192, False),
    ],
)
def test_compiles_once(nvrtc, tmp_path, monkeypatch, dtype, head_dim, value_dim, dense_dims, long_context):
    tile = prefill.default_tile(dtype, head_dim, value_dim, dense_dims, long_context=long_context)
    assert tile.shared_bytes <= 227 * 1024
    cubin = compiler.compile_cubin(tile)
    assert cubin.startswith(b"\x7fELF")
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".cubin"]
    monkeypatch.setattr(cuda, "compile_cubin", lambda *_: pytest.fail("compiled again"))
    assert compiler.compile_cubin(tile) == cubin


def test_errors_name_the_file_and_the_line(nvrtc, monkeypatch, tmp_path):
    shutil.copytree(compiler.SOURCES, tmp_path / "sources")
    monkeypatch.setattr(compiler, "SOURCES", tmp_path / "sources")
    mask = tmp_path / "sources" / "mask.cuh"
    mask.write_text("\n\nno CUDA\n" + mask.read_text())
    with pytest.raises(cuda.CompilationError, match=r"mask\.cuh\(3\): error: .*\n *no CUDA"):
        compiler.compile_cubin(TILE)


class LongerParams(ctypes.Structure):
    _fields_ = (*Params._fields_, ("more", ctypes.c_int), ("and_more", ctypes.c_int))


@pytest.mark.parametrize(
    ("place", "name", "value", "message"),
    [
        (compiler, "Params", LongerParams, "params.py lays out Params of another size"),
        (cuda, "TENSOR_MAP_BYTES", 64, "cuda.py holds a tensor map of another size"),
        (compiler.Tile, "shared_bytes", 1 << 15, "compiler.py asks for shared memory of another size"),
    ],
    ids=["params", "tensor-map", "shared-memory"],
)
def test_structures_of_another_size_are_refused(nvrtc, monkeypatch, place, name, value, message):
    monkeypatch.setattr(place, name, value)
    with pytest.raises(cuda.CompilationError, match=message):
        compiler.compile_cubin(TILE)


def test_what_cannot_be_compiled_is_not_tried_again(monkeypatch):
    tries = []

    def refuse(tile, afresh):
        tries.append(tile)
        raise cuda.CompilationError("refused")

    monkeypatch.setattr(compiler, "compile_cubin", refuse)
    for _ in range(2):
        with pytest.raises(cuda.CompilationError, match="refused"):
            prefill._load(compiler.Tile(BF16, 64, 64, stages=7), 0)
    assert len(tries) == 1

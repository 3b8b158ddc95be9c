"""The decode kernel for Hopper on the CPU: compiled by g++ over `tests/ops/decode/emulator.h`, a fiber per thread."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

from flashsfa.ops.decode.hopper import compiler

COMPILER = shutil.which("g++")
_HEADER = Path(__file__).with_name("emulator.h")
_DRIVER = """
extern "C" void run(const Params* p, int x, int y) {
  static_assert(sizeof(Shared) <= sizeof(dynamic));
  gridDim = {x, y};
  for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x) run_block(32 * WARPS, [p] { decode_kernel(*p); });
}
"""


def launch(variant, grid, params):
    """Stands for `hopper.decode.launch`."""
    _library(variant).run(ctypes.byref(params), *grid[:2])


@functools.cache
def _library(variant):
    files = [(compiler.SOURCES / name).read_text() for name in compiler.FILES if name != "warp.cuh"]
    source = "\n".join([compiler.constants(variant), _HEADER.read_text(), *files, _DRIVER])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel"
        path.with_suffix(".cpp").write_text(source)
        command = [COMPILER, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", f"{path}.so", f"{path}.cpp"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:3000]
        return ctypes.CDLL(f"{path}.so")

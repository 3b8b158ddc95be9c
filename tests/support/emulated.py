"""The kernels for Hopper that are compiled at run time, on the CPU: by g++ over `emulator.h`, a fiber per thread."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from flashsfa.ops import nvrtc
from flashsfa.ops.decode.hopper import compiler as decode_compiler
from flashsfa.ops.decode.hopper.exact import compiler as exact_compiler
from flashsfa.ops.select.hopper import compiler as append_compiler

COMPILER = shutil.which("g++")
_HEADER = Path(__file__).with_name("emulator.h")
_DRIVER = """
extern "C" void run(const Params* p, int x, int y, int z) {{
  static_assert({shared_bytes} <= sizeof(dynamic));
  gridDim = {{x, y, z}};
  for (blockIdx.z = 0; blockIdx.z < z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x) run_block({threads}, [p] {{ {kernel}(*p); }});
}}
"""


def is_needed(device):
    """Whether the CPU is to stand in for a Hopper GPU. Skips the test where there is neither such a GPU nor a compiler."""
    if device.type == "cuda":
        if not nvrtc.is_hopper(torch.empty(0, device=device).device):
            pytest.skip("needs a Hopper GPU, or none")
        return False
    if COMPILER is None:
        pytest.skip("needs g++ to stand in for a GPU")
    return True


def launch(variant, grid, params):
    """Stands for `launch` of decode."""
    _library(decode_compiler, "decode_kernel", variant).run(ctypes.byref(params), *grid)


def launch_exact(variant, grid, params):
    """Stands for `launch` of decode's exact tokens."""
    _library(exact_compiler, "exact_kernel", variant).run(ctypes.byref(params), *grid)


def load_append(variant, name, device):
    """Stands for `load` of append; `launch_append` runs what it returns."""
    return _library(append_compiler, name, variant)


def launch_append(kernel, batch, params):
    """Stands for `launch` of append."""
    kernel.loaded.run(ctypes.byref(params), -(-params.tokens // kernel.variant.tokens), batch * params.heads, 1)


@functools.cache
def _library(compiler, kernel, variant):
    files = [(compiler.SOURCES / name).read_text() for name in compiler.FILES if Path(name).name != "warp.cuh"]
    driver = _DRIVER.format(kernel=kernel, threads=variant.threads, shared_bytes=variant.shared_bytes)
    source = "\n".join([compiler.constants(variant), _HEADER.read_text(), *files, driver])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel"
        path.with_suffix(".cpp").write_text(source)
        command = [COMPILER, "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", f"{path}.so", f"{path}.cpp"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:3000]
        return ctypes.CDLL(f"{path}.so")

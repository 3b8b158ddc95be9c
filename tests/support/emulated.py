"""The kernels for Hopper that are compiled at run time, on the CPU: by g++ over `emulator.h`, a fiber per thread."""

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from flashsfa.ops import nvrtc

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


class Kernel:
    """Stands for `nvrtc.Kernel`."""

    def __init__(self, library):
        self._library = library

    def launch(self, grid, params):
        self._library.run(ctypes.byref(params), *grid)


def load_kernel(compile_cubin, variant, name, device):
    """Stands for `nvrtc.load_kernel`, for all kernels but that of prefill."""
    return Kernel(_library(sys.modules[compile_cubin.__module__], name, variant))


def note_launches(monkeypatch):
    """A list that gets an entry per launch of a kernel that is loaded from now on."""
    load, made = nvrtc.load_kernel, []

    class Noted:
        def __init__(self, kernel):
            self._kernel = kernel

        def launch(self, *given):
            made.append(given)
            self._kernel.launch(*given)

    def load_noted(*given):
        kernel = load(*given)
        return kernel if isinstance(kernel, str) else Noted(kernel)

    monkeypatch.setattr(nvrtc, "load_kernel", load_noted)
    return made


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

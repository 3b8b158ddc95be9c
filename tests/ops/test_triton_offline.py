"""Every Triton kernel compiles for every part it is meant for, and fits it: without a GPU, at the sizes that launchers choose."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.cpu

# Bytes of shared memory that a program may have, by compute capability (CUDA C++ Programming Guide, table of technical
# specifications). 80 and 89 are left out: Triton has 86's code for both, but for 8-bit floats, and their limits are its own or wider.
SHARED = {86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Bytes a thread: four registers, which the assembler gives up now and then so that one more program fits. Triton 3.6 takes more of them
# for some kernels of decode.
SPILLED = 64 if triton.__version__.startswith("3.6.") else 16
HERE = Path(__file__).parents[1] / "support"

KERNELS = {
    "rows": {
        "topk_kernel", "topk_rows_kernel", "scatter_words_kernel", "scatter_over_zeros_kernel", "keep_support_kernel", "prune_24_kernel", "merge_parts_kernel",
        "write_8_bit_kernel",
    },
    "decode": {
        "decode_query_kernel", "decode_partial_kernel", "decode_combine_kernel", "decode_score_kernel", "decode_count_kernel",
        "decode_value_kernel", "transform_kernel",
    },
    "narrow": {"decode_query_kernel", "narrow_query_kernel", "decode_narrow_kernel", "decode_combine_kernel"},
}  # fmt: skip


LENGTHS = """
import json
import triton_offline as offline
from triton.runtime import driver
from triton.runtime.jit import JITFunction

driver.set_active(offline.Part(90))
run, found = JITFunction.run, {}
def compile_only(kernel, *arguments, grid, warmup, **options):
    found.setdefault(f"{what} {kernel.fn.__name__}", set()).add(run(kernel, *arguments, grid=grid, warmup=True, **options).hash)
JITFunction.run = compile_only
what = "rows"
for n in (1, 7, 16, 100):
    x = offline.rows(offline.FP32, n, 64)
    offline.selection.encode(x, 16, 0)
for n in (8000, 8001, 8192):
    what = "decode"
    offline.decode_case(offline.BF16, 1, 1, 64, 16, 0, "lengths", 0.01, n)
    what = "narrow"
    offline.narrow_case(offline.BF16, 1, 1, 64, "dense", "d8s4v4", "lengths", n)
print(json.dumps({name: len(hashes) for name, hashes in found.items()}))
"""


def run(*command, folder):
    """What Python prints and logs, with Triton as it is on a GPU and a cache of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command], cwd=HERE, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


# Parts in brackets share their intermediate code; decode's multiplies matrices, which each generation has its own units for. Rows on
# 120 are left out: they share 100's, and 86 has 120's limit.
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("rows", (90, 86)), ("rows", (100,)),
        ("decode", (86,)), ("decode", (90,)), ("decode", (100,)), ("decode", (120,)),
        ("narrow", (90,)),
    ],
    ids=str,
)  # fmt: skip
def test_kernels_fit(name, parts, tmp_path):
    printed, log = run("triton_offline.py", name, *map(str, parts), folder=tmp_path)
    kernels = [json.loads(line) for line in printed.splitlines()]
    assert {(found["part"], found["kernel"]) for found in kernels} == {
        (part, kernel) for part in parts for kernel in KERNELS[name]
    }
    assert not [found for found in kernels if found["shared"] > SHARED[found["part"]] or found["stack"] > SPILLED]
    assert name != "rows" or log.count("compiling the GPU kernels") == 1  # the first of those that take long


def test_lengths_share_their_kernels(tmp_path):
    """A prompt or a cache of another length compiles nothing."""
    printed, _ = run("-c", LENGTHS, folder=tmp_path)
    assert set(json.loads(printed).values()) == {1}, printed

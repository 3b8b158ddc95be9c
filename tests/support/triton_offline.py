"""Compile Triton kernels for one part or several, without a GPU, at the sizes that their launchers choose: `python
triton_offline.py rows 90 86`.

The launch functions of the package run as they are, on the CPU; a launch compiles its kernel for the part and ends there. One
line of JSON per kernel: what it is, and the shared memory, registers and stack (which holds what registers do not) it needs.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from decode_cases import DecodeRules
from decode_cases import decode as run
from flashsfa.axes import AxisBits
from flashsfa.coder import Coder
from flashsfa.codes import FeatureCodes
from flashsfa.formats import CodeFormat
from flashsfa.ops.decode import gpu
from flashsfa.ops.decode.triton import decode
from flashsfa.ops.decode.triton import scores as decode_scores
from flashsfa.ops.prefill.triton import merge as merge_parts
from flashsfa.ops.select.plain import empty_code
from flashsfa.ops.select.triton import prune_24, quantize, scatter
from flashsfa.ops.select.triton import topk as selection
from flashsfa.ops.transform.triton import transform

BF16, FP32 = torch.bfloat16, torch.float32


class Part:
    """A GPU of one compute capability that compiles and does not run, as Triton asks for it."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def main(kernels, capability, *relatives):
    """Compile the kernels of `KERNELS` for a part and for `relatives`: parts for which Triton makes the same intermediate code, up
    to their name in it."""
    driver.set_active(Part(capability))
    decode_scores.processors = lambda device: 132
    run, seen = JITFunction.run, set()

    def compile_only(kernel, *arguments, grid, warmup, **options):
        compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            for part, code in [(capability, compiled), *((part, retargeted(compiled, part)) for part in relatives)]:
                found = {"part": part, "kernel": kernel.fn.__name__, "case": case, "shared": code.metadata.shared}
                print(json.dumps(found | usage(code.asm["cubin"])), flush=True)

    JITFunction.run = compile_only
    for case, launch in KERNELS[kernels]():  # noqa: B007 (told above)
        launch()


def retargeted(compiled, part):
    """The machine code for another part, from the intermediate code of `compiled`: what comes before takes most of the time."""
    target = compiled.metadata.target
    with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
        file.write(compiled.asm["ttgir"].replace(f'"cuda:{target.arch}"', f'"cuda:{part}"'))
        file.flush()
        return triton.compile(
            file.name, target=GPUTarget("cuda", part, 32), options={"num_warps": compiled.metadata.num_warps}
        )


def usage(cubin):
    """Registers and stack bytes of a thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    fields = dict(field.split(":") for field in printed.split() if field.startswith(("REG:", "STACK:")))
    return {"registers": int(fields["REG"]), "stack": int(fields["STACK"])}


def row_cases():
    """Names and launches, one at least for each choice of a launcher and its widest blocks."""
    for dtype, head_dim, topk, dense_dims, n in [
        (BF16, 64, 8, 16, 300),  # network, rows and words
        (BF16, 128, 12, 22, 1),  # rank
        (BF16, 256, 16, 0, 1),
        (FP32, 256, 128, 0, 1),
        (BF16, 256, 128, 64, 300),  # bisect, scattered over zeros
        (FP32, 64, 8, 0, 300),
        (FP32, 256, 128, 22, 300),
    ]:
        yield from coding(dtype, head_dim, topk, dense_dims, n)
    # The widest network takes Triton long: of its two kernels the one that holds more registers stands for both.
    x = rows(BF16, 300, 256)
    yield "topk_rows of 256", partial(selection.topk_rows, x, 16, 0, torch.empty_like(x), empty_code(x, 16, 0))
    for dtype, head_dim, dense_dims in [(BF16, 64, 0), (BF16, 128, 32), (FP32, 256, 0)]:
        x = rows(dtype, 300, head_dim)
        yield f"prune_24 {dtype} {head_dim} {dense_dims}", partial(prune_24.prune_24, x, dense_dims)
    for dtype, head_dim in [(BF16, 40), (BF16, 128), (FP32, 256)]:
        x, lse = rows(dtype, 300, head_dim), torch.empty(1, 2, 300)
        yield f"merge_parts {dtype} {head_dim}", partial(merge_parts.merge_parts, x, lse, x, lse)


def decode_cases():
    for case in [
        (BF16, 1, 1, 64, 8, 0, "dense"),
        (BF16, 4, 1, 128, 16, 0, "int8"),
        (BF16, 4, 1, 128, 16, 16, "lengths"),
        (BF16, 5, 3, 80, 26, 22, "padding"),
        (BF16, 16, 1, 256, 128, 64, "pages"),
        (FP32, 4, 2, 64, 8, 0, "int8"),
        (FP32, 16, 1, 256, 128, 64, "dense"),
    ]:
        for tolerance in (0.0, 0.01):
            yield f"decode {case} {tolerance}", partial(decode_case, *case, tolerance)
    for dtype, head_dim, n in [(BF16, 64, 1), (BF16, 128, 300), (torch.float16, 128, 300), (torch.float16, 256, 300)]:
        x, matrix = rows(dtype, n, head_dim), torch.empty(1, head_dim, head_dim)
        yield f"transform {dtype} {head_dim} {n}", partial(transform, (x, matrix), (x, matrix))


def narrow_cases():
    for case in [  # a few: wide heads with many rows take minutes to compile
        (BF16, 4, 1, 128, "dense", "d8s4v4", "lengths"),
        (BF16, 1, 1, 128, "axes", "d8s4v3", "dense"),
        (BF16, 16, 1, 128, "axes", "d8s4v8", "pages"),
        (BF16, 1, 1, 128, "dense", "d8s16v16", "pages"),
        (BF16, 4, 1, 128, "dense", "d8s8v8", "dense"),
        (BF16, 1, 1, 128, (16, 0), "d8s4v4", "dense"),
        (BF16, 1, 1, 128, (16, 0), "d16s16v8-bitmap", "pages"),
        (BF16, 4, 1, 128, (16, 22), "d16s8v16-packed", "pages"),
        (BF16, 3, 1, 64, (12, 22), "d8s4v4-bitmap", "lengths"),
        (BF16, 5, 3, 80, (26, 22), "d8s8v8-uint8", "padding"),
        (FP32, 4, 2, 64, "dense", "d8s4v4", "lengths"),
    ]:
        yield f"narrow {case}", partial(narrow_case, *case)


KERNELS = {"rows": row_cases, "decode": decode_cases, "narrow": narrow_cases}


def coding(dtype, head_dim, topk, dense_dims, n):
    """Codes, rows in one pass with their codes and without, the way back, and appending."""
    x = rows(dtype, n, head_dim)
    out, code = torch.empty_like(x), empty_code(x, topk, dense_dims)
    buffers = [torch.empty(1, 2, 1024, part.shape[-1], dtype=part.dtype) for part in (*code, x)]
    name = f"{dtype} {head_dim}, {topk} beside {dense_dims}"
    yield f"topk {name}", partial(selection.encode, x, topk, dense_dims)
    yield f"topk_rows {name}", partial(selection.topk_rows, x, topk, dense_dims, out, code)
    yield f"scatter {name}", partial(scatter.scatter, *code, out)
    yield f"keep_support {name}", partial(scatter.keep_support, x, dense_dims, code[2], out)
    narrow = [part.to(torch.int8) if part.dtype != torch.uint8 else part for part in buffers]
    scales = [torch.empty(1, 2, 1024) for _ in range(2)]
    yield (
        f"write_8_bit {name}",
        partial(quantize.write_8_bit, code, x, (*narrow[:3], scales[0], narrow[3], scales[1]), 3),
    )
    if n == 1:
        yield f"append {name}", partial(selection.append, x, x, *buffers, torch.tensor(3))


def rows(dtype, n, head_dim):
    return torch.empty(1, n, 2, head_dim, dtype=dtype).transpose(1, 2)


def decode_case(dtype, group, m, head_dim, topk, dense_dims, storage, tolerance, n=8192):
    pages = storage == "pages"
    v = torch.empty(stored_shape(n, head_dim, pages), dtype=torch.int8 if storage == "int8" else dtype)
    code, scale = empty_code(v, topk, dense_dims), None
    if storage == "int8":
        scale = torch.empty(1, 1, n)
    q = torch.empty(1, group, m, head_dim, dtype=dtype)
    codes = FeatureCodes(*code, head_dim, scale)
    run(decode, q, codes, v, rules_of(storage, n), 0.1, tolerance, topk_query=topk, v_scale=scale)


def narrow_case(dtype, group, m, head_dim, keys, form, storage, n=8192):
    """Keys "dense", "axes" or of a budget of kept and dense features."""
    if keys == "axes":
        bits = torch.tensor([8, 4, 2, 0], dtype=torch.uint8).repeat_interleave(head_dim // 4)[None]
        axes = AxisBits(bits, torch.ones(bits.shape), torch.zeros(bits.shape))
        coder = Coder(None, 0, CodeFormat.named(form), axes)
    else:
        coder = Coder(*((head_dim, 0) if keys == "dense" else keys), CodeFormat.named(form))
    x = torch.zeros(stored_shape(n, head_dim, storage == "pages"), dtype=dtype)
    view = coder.empty(x.shape[2], x[:, :, :1], x[:, :, :1])
    q = torch.empty(1, group, m, head_dim, dtype=dtype)
    run(
        SimpleNamespace(decode=partial(gpu.decode, backend="triton")),
        q,
        view.codes,
        view.v,
        rules_of(storage, n),
        0.1,
        0.0,
    )


def stored_shape(n, width, pages):
    return (n // 64, 1, 64, width) if pages else (1, 1, n, width)


def rules_of(storage, n):
    return DecodeRules(
        torch.tensor([n]) if storage != "dense" else None,
        window=4096 if storage == "padding" else None,
        key_padding_mask=torch.zeros(1, n, dtype=torch.bool) if storage == "padding" else None,
        page_table=torch.zeros(1, n // 64, dtype=torch.int32) if storage == "pages" else None,
    )


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main(sys.argv[1], *map(int, sys.argv[2:]))

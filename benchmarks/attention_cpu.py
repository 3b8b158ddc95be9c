"""Time and memory of `sparse_feature_attention` beside torch's SDPA on the CPU, in one process a memory figure.

    python benchmarks/attention_cpu.py

A case is timed only after its output is checked against the reference. Peak memory is the growth of the
process's resident set over a stack of attention layers, forward and backward, each in a fresh process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import flashsfa
from flashsfa import reference
from flashsfa.benchmarking.results import compared, environment
from flashsfa.mask import Mask

HEADS, LAYERS = 8, 8


def main() -> None:
    """Print both tables; `--memory KIND D TOPK N` is the child that measures one figure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory", nargs=4, metavar=("KIND", "D", "TOPK", "N"))
    options = parser.parse_args()
    if options.memory:
        kind, *sizes = options.memory
        print(_peak_growth(kind, *map(int, sizes)))
        return
    where = environment(torch.device("cpu"))
    print(f"{where['device']}, torch {where['torch']}, flashsfa {where['flashsfa']}, commit {where['commit']}")
    print(f"float32, B=1, H={HEADS}, causal")
    for d, topk in ((64, 8), (128, 16)):
        _check(d, topk)
        _time(d, topk, 4096)
        _memory(d, topk, 8192)


def _inputs(d: int, n: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, n, d) for _ in range(3)]


def _check(d: int, topk: int) -> None:
    q, k, v = _inputs(d, 512)
    out = flashsfa.sparse_feature_attention(q, k, v, topk=topk, is_causal=True)
    truth, _ = reference.sparse_feature_attention(
        q.double(), k.double(), v.double(), topk=topk, mask=Mask(is_causal=True)
    )
    torch.testing.assert_close(out.double(), truth, rtol=1e-4, atol=1e-5)


def _time(d: int, topk: int, n: int) -> None:
    q, k, v = _inputs(d, n)
    runs: dict[str, Callable[[], object]] = {
        "SDPA": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        "SFA": lambda: flashsfa.sparse_feature_attention(q, k, v, topk=topk, is_causal=True),
        "SFA, dense queries": lambda: flashsfa.sparse_feature_attention(
            q, k, v, topk=topk, topk_query=d, is_causal=True
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(9):  # interleaved, so that noise meets all alike
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    base = statistics.median(times["SDPA"])
    for name, values in times.items():
        median = statistics.median(values)
        print(
            f"d={d} k={topk} N={n} forward  {name:<20} {median:7.1f} ms  {compared(base / median, 'SDPA')}", flush=True
        )


def _memory(d: int, topk: int, n: int) -> None:
    # glibc keeps freed blocks of up to 32 MiB for reuse; with a fixed threshold it returns them, and what is seen is
    # what tensors need.
    for allocator, setting in (("glibc default", {}), ("freed memory returned", {"MALLOC_MMAP_THRESHOLD_": "65536"})):
        for kind in ("sdpa", "sfa"):
            command = [sys.executable, str(Path(__file__)), "--memory", kind, str(d), str(topk), str(n)]
            run = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | setting)
            print(
                f"d={d} k={topk} N={n} forward + backward, {LAYERS} layers, {allocator:<21} {kind:<5} "
                f"peak growth {run.stdout.strip()} MiB",
                flush=True,
            )


def _peak_growth(kind: str, d: int, topk: int, n: int) -> str:
    torch.manual_seed(0)
    width = HEADS * d
    projections = [torch.nn.Linear(width, 3 * width, bias=False) for _ in range(LAYERS)]
    _stack(kind, projections, torch.randn(16, width), topk).sum().backward()  # code loads and weight gradients exist
    x = torch.randn(n, width)
    before = _resident("VmRSS")
    h = _stack(kind, projections, x, topk)
    after_forward = _resident("VmRSS")
    h.sum().backward()
    return f"{_resident('VmHWM') - before:.0f} (held after forward: {after_forward - before:.0f})"


def _stack(kind: str, projections: list[torch.nn.Linear], h: torch.Tensor, topk: int) -> torch.Tensor:
    n, width = h.shape
    for projection in projections:
        q, k, v = projection(h).view(1, n, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        if kind == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            # V is copied out of the joint projection, whose queries and keys would otherwise stay alive through it
            out = flashsfa.sparse_feature_attention(q, k, v.clone(), topk=topk, is_causal=True)
            assert isinstance(out, torch.Tensor)
        h = out.transpose(1, 2).reshape(n, width)
    return h


def _resident(field: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()

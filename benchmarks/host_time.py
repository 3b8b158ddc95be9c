"""What a call costs the host: microseconds of Python and launches, beside those of torch's SDPA.

    python benchmarks/host_time.py [-o DIR]

On a GPU calls are only queued within the time and the device is waited for outside of it, so the figures bound how fast an uncompiled
model can go. On the CPU the work itself is part of a call: inputs are small, so that most of the time is not work. Prints a table and
writes DIR/host-DATE-COMMIT.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from flashsfa import PagedSparseKVCache, SparseKVCache, explain, sparse_feature_attention, sparse_feature_decode
from flashsfa.benchmarking.results import environment, write_results

BATCH, HEADS, HEAD_DIM = 1, 8, 128
TOKENS = {"cuda": 4096, "cpu": 64}  # of the prompt and in the caches
TOPK, DENSE_DIMS, PAGE_SIZE = 16, 16, 64
CALLS, REPEATS = 20, 30  # few calls a repeat: a GPU that falls far behind makes the host wait

Call = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("results"), metavar="DIR", help="for the JSON")
    output = parser.parse_args().output
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        found = {name: _host_us(call, device) for name, call in _calls(device).items()}
    where = environment(device)
    print(f"{where['device']}, torch {where['torch']}, flashsfa {where['flashsfa']}, commit {where['commit']}")
    print(f"{'host time per call':<52}{'median':>12}{'p20 to p80':>22}")
    for name, row in found.items():
        print(f"{name:<52}{row['median_us']:>9.1f} us{row['p20_us']:>12.1f} to {row['p80_us']:.1f}")
    print(explain())
    settings = {
        "batch": BATCH, "heads": HEADS, "head_dim": HEAD_DIM, "tokens": TOKENS[device.type], "topk": TOPK, "dense_dims": DENSE_DIMS,
        "page_size": PAGE_SIZE, "calls": CALLS, "repeats": REPEATS,
    }  # fmt: skip
    content = (
        json.dumps({"operation": "host", "environment": where, "settings": settings, "rows": found}, indent=1) + "\n"
    )
    stem = "-".join(part for part in ("host", str(where["date"])[:10], where["commit"]) if part)
    (path,) = write_results(output, stem, {".json": lambda file: file.write_text(content)})
    print(f"written: {path}")


def _calls(device: torch.device) -> dict[str, Call]:
    """What is measured, by name. Caches are as large as all calls together need."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = TOKENS[device.type]

    def draw(n: int) -> torch.Tensor:
        return torch.randn(BATCH, HEADS, n, HEAD_DIM, dtype=dtype, device=device)

    prompt, (k, v) = [draw(tokens) for _ in range(3)], (draw(tokens) for _ in range(2))
    q, token = draw(1), (draw(1), draw(1))
    appended = CALLS * (REPEATS + 1)
    budget = {"topk": TOPK, "dense_dims": DENSE_DIMS}
    read, grown = (SparseKVCache(TOPK, dense_dims=DENSE_DIMS, capacity=tokens + appended) for _ in range(2))
    grown.append(k, v)
    view = read.append(k, v)
    paged = PagedSparseKVCache(
        TOPK, dense_dims=DENSE_DIMS, pages=BATCH * (1 + (tokens + appended) // PAGE_SIZE), page_size=PAGE_SIZE
    )
    sequences = [paged.add() for _ in range(BATCH)]
    paged.append(sequences, k, v)
    return {
        f"SDPA, {tokens} tokens, causal": lambda: F.scaled_dot_product_attention(*prompt, is_causal=True),
        f"sparse_feature_attention, {tokens} tokens, causal": lambda: sparse_feature_attention(
            *prompt, **budget, is_causal=True
        ),
        "SDPA, one token": lambda: F.scaled_dot_product_attention(q, k, v),
        "sparse_feature_decode, one token": lambda: sparse_feature_decode(q, view),
        "sparse_feature_decode, value_tolerance=0.01": lambda: sparse_feature_decode(q, view, value_tolerance=0.01),
        "SparseKVCache.append, one token": lambda: grown.append(*token),
        "PagedSparseKVCache.append, one token": lambda: paged.append(sequences, *token),
    }


def _host_us(call: Call, device: torch.device) -> dict[str, float]:
    """Microseconds per call, after a first group of calls, which may compile."""

    def group() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - start) / CALLS * 1e6

    group()
    times = [group() for _ in range(REPEATS)]
    p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return {"median_us": statistics.median(times), "p20_us": p20, "p80_us": p80}


if __name__ == "__main__":
    main()

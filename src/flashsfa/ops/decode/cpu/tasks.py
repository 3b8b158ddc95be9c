"""The tasks of a pass: chunks of the coded keys of a kv head. They do not depend on the number of threads, so neither does the
result."""

from __future__ import annotations

from ...cpu.machine import jit

CHUNK_KEYS = 1024  # long enough to stream, short enough to share out evenly


@jit()
def chunk_of(task, per_head, seen):
    """Of task `task` the head (of B·Hkv), batch row, kv head, and the first of its coded keys and the one past the last that any
    query sees: later queries see later ones."""
    head = task // per_head
    b = head // seen.kv_heads
    begin = max(0, seen.first[b, 0] - seen.n_first)
    end = min(seen.n, seen.last[b, -1] - seen.n_first)
    start = begin + task % per_head * CHUNK_KEYS
    return head, b, head % seen.kv_heads, start, max(start, min(start + CHUNK_KEYS, end))


@jit()
def tasks_per_head(n):
    """Tasks per head for n coded keys."""
    return (n + CHUNK_KEYS - 1) // CHUNK_KEYS

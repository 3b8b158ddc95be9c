"""The tasks of a pass: chunks of the coded keys of a kv head. They do not depend on the number of threads, so neither does the
result."""

from __future__ import annotations

from .machine import jit

CHUNK_KEYS = 1024  # long enough to stream, short enough to share out evenly


@jit()
def chunk_of(task, per_head, kv_heads, first, last, n_first, n):
    """Of task `task` the head (of B·Hkv), batch row, kv head, and the first of its coded keys and the one past the last. Queries
    see the tokens `first` to `last` [B, M], of which `n` after the first `n_first` are coded."""
    head = task // per_head
    b = head // kv_heads
    begin = max(0, first[b].min() - n_first)
    end = min(n, last[b].max() - n_first)
    start = begin + task % per_head * CHUNK_KEYS
    return head, b, head % kv_heads, start, max(start, min(start + CHUNK_KEYS, end))


@jit()
def tasks_per_head(n):
    """Tasks per head for n coded keys."""
    return (n + CHUNK_KEYS - 1) // CHUNK_KEYS


@jit()
def rows_between(flat, at, start, end, width):
    """Rows start to end of a head, [end - start, width], whose first row is at `flat[at]`."""
    return flat[at + start * width : at + end * width].reshape((end - start, width))

"""Caches of key codes and values: `contiguous` for one batch that grows, `paged` for many sequences in one pool."""

"""Prefill on Hopper's sparse tensor cores: queries that are 2:4 sparse take half the matrix time of dense ones.

`prefill.forward` is the entrance, `compiler` builds the kernel at first use: `prefill.cu`, and `queries.cu`, which brings
codes to shared memory as the instruction wants them. docs/notes/2026-11-27-prefill.md tells the design and what was measured.
"""

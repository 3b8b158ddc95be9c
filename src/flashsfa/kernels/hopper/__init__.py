"""Prefill on Hopper's sparse tensor cores: queries that are 2:4 sparse take half the matrix time of dense ones.

`prefill.forward` is the entrance; `pack` writes queries as the instruction reads them, `compiler` builds the kernel at
first use. docs/hopper-prefill.md tells the design and what was measured.
"""

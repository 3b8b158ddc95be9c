"""Prefill on Hopper's sparse tensor cores: queries that are 2:4 sparse take half the matrix time of dense ones.

`prefill.forward` is the entrance and holds all tuning; `compiler` builds the kernel at first use, `cuda` calls NVRTC and the
driver, `params` mirrors what the kernel takes. The kernel is `prefill.cu`, with its main loops, and one header per job.
docs/notes/2026-11-27-prefill.md tells the design and what was measured.
"""

"""Appending to a cache, and sparse rows, by CUDA kernels for Hopper that are compiled at run time: for little of the host's time."""

# Rows of all heads, where Triton's kernels do the same: on the GPU these are faster, and a launch takes the host ten times as long.
MOST_ROWS = 1 << 16
MOST_HEADS = 65535  # of all sequences, as a grid has so many rows

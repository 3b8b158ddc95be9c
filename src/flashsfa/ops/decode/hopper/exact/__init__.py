"""Attention to tokens that are held as they came, beside coded ones, by a CUDA kernel for Hopper, compiled at run time."""

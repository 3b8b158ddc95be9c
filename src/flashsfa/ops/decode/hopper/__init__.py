"""Decode by a CUDA kernel for Hopper, compiled at run time."""

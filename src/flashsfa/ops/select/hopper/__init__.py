"""Appending a few tokens to a cache by a CUDA kernel for Hopper, compiled at run time."""

"""Appending a few tokens to a cache on the CPU, compiled by numba."""

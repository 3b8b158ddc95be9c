"""Decode on a GPU; the functions that launch are in `decode`."""

from ...triton import first_use as first_use

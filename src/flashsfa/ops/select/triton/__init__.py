"""The selection on a GPU."""

from ...triton import first_use as first_use

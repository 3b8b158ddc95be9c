"""`Params` of params.cuh. The kernel compiles only if both have one size."""

from __future__ import annotations

import ctypes

_POINTERS = (
    "k", "v", "values", "stored_v", "dense", "indices", "scale", "value_scale", "centre", "v_scale", "v_centre", "axis",
    "is_start", "top", "low", "per_step", "recent_k", "recent_v", "slots",
)  # fmt: skip
_STRIDES = ("k_batch", "k_head", "k_token", "v_batch", "v_head", "v_token")
_PAGES = ("page_rows", "head_rows", "page_bytes", "head_bytes", "all_slots")
_COUNTS = ("tokens", "heads", "capacity", "start", "recent_capacity", "leaving", "oldest", "newest", "page_size")


class Params(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_longlong) for name in (*_STRIDES, *_PAGES)),
        *((name, ctypes.c_int) for name in _COUNTS),
    )

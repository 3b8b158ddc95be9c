"""`Params` of params.cuh. The kernel compiles only if both have one size."""

from __future__ import annotations

import ctypes

ROWS = ("channel", "channel_scale", "channel_centre", "kept", "kept_scale", "indices", "v", "v_scale", "v_centre")


class Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("outer", ctypes.c_longlong),
        ("head", ctypes.c_longlong),
        ("key", ctypes.c_int),
        ("page", ctypes.c_int),
    )


class Params(ctypes.Structure):
    _fields_ = (
        *((name, Rows) for name in ROWS),
        ("q", ctypes.c_void_p),
        ("axis", ctypes.c_void_p),
        ("is_start", ctypes.c_void_p),
        ("top", ctypes.c_void_p),
        ("step", ctypes.c_void_p),
        ("centre", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("padding", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("partial", ctypes.c_void_p),
        ("peak", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("ended", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("q_batch", ctypes.c_longlong),
        ("q_head", ctypes.c_longlong),
        ("q_token", ctypes.c_longlong),
        ("padding_batch", ctypes.c_longlong),
        ("pages_batch", ctypes.c_longlong),
        ("kv_heads", ctypes.c_int),
        ("n", ctypes.c_int),
        ("m", ctypes.c_int),
        ("topk_query", ctypes.c_int),
        ("window", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("padded_rows", ctypes.c_int),
        ("lengths_are_64_bit", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("tolerance", ctypes.c_float),
    )

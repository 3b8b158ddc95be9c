"""`Params` of params.cuh. The kernel compiles only if both have one size."""

from __future__ import annotations

import ctypes


class Params(ctypes.Structure):
    _fields_ = (
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("indices", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("stored_v", ctypes.c_void_p),
        ("v_scale", ctypes.c_void_p),
        ("recent_k", ctypes.c_void_p),
        ("recent_v", ctypes.c_void_p),
        ("k_batch", ctypes.c_longlong),
        ("k_head", ctypes.c_longlong),
        ("k_token", ctypes.c_longlong),
        ("v_batch", ctypes.c_longlong),
        ("v_head", ctypes.c_longlong),
        ("v_token", ctypes.c_longlong),
        ("heads", ctypes.c_int),
        ("capacity", ctypes.c_int),
        ("start", ctypes.c_int),
        ("recent_capacity", ctypes.c_int),
        ("leaving", ctypes.c_int),
        ("oldest", ctypes.c_int),
        ("newest", ctypes.c_int),
    )

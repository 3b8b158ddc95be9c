"""`Params` of params.cuh. The kernel compiles only if both have one size."""

from __future__ import annotations

import ctypes


class Entries(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_longlong),
        ("head", ctypes.c_longlong),
        ("token", ctypes.c_int),
    )


class Params(ctypes.Structure):
    _fields_ = (
        ("first_k", Entries),
        ("first_v", Entries),
        ("recent_k", Entries),
        ("recent_v", Entries),
        ("q", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("lengths", ctypes.c_void_p),
        ("padding", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("q_batch", ctypes.c_longlong),
        ("q_head", ctypes.c_longlong),
        ("q_token", ctypes.c_longlong),
        ("positions_batch", ctypes.c_longlong),
        ("padding_batch", ctypes.c_longlong),
        ("rows", ctypes.c_int),
        ("m", ctypes.c_int),
        ("group", ctypes.c_int),
        ("n", ctypes.c_int),
        ("n_first", ctypes.c_int),
        ("n_coded", ctypes.c_int),
        ("n_exact", ctypes.c_int),
        ("window", ctypes.c_int),
        ("lengths_are_64_bit", ctypes.c_int),
        ("scale", ctypes.c_float),
        ("cap", ctypes.c_float),
    )

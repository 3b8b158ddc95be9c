"""`Params` of params.cuh. The kernel compiles only if both have one size."""

from __future__ import annotations

import ctypes


class Params(ctypes.Structure):
    _fields_ = (
        ("q_dense", ctypes.c_void_p),
        ("q_dense_batch", ctypes.c_longlong),
        ("q_dense_head", ctypes.c_longlong),
        ("q_dense_row", ctypes.c_longlong),
        ("q_values", ctypes.c_void_p),
        ("q_indices", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("lse", ctypes.c_void_p),
        ("out_batch", ctypes.c_longlong),
        ("out_head", ctypes.c_longlong),
        ("out_row", ctypes.c_longlong),
        ("cu_seqlens_q", ctypes.c_void_p),
        ("cu_seqlens_k", ctypes.c_void_p),
        ("n_q", ctypes.c_int),
        ("n_k", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("heads_per_kv_head", ctypes.c_int),
        ("is_causal", ctypes.c_int),
        ("tiles_per_sequence", ctypes.c_int),
        ("work_tiles", ctypes.c_int),
        ("tile_counter", ctypes.c_void_p),
        ("window", ctypes.c_int),
        ("heads_per_l2_group", ctypes.c_int),
        ("scale", ctypes.c_float),
    )

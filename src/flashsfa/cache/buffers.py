"""A cache's buffers for the kernels that write to it: those that append a step, and those of pages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from ..axes import AxisCodes
from ..checks import has_values, runs_plainly
from ..codes import FeatureCodes
from ..formats import index_bits
from ..narrow import NarrowRows
from ..ops import nvrtc
from ..ops.select.hopper.append import Buffers, Paged
from ..ops.select.hopper.compiler import Form
from ..ops.select.operators import prepared_paged
from ..stored import KeyCodes, KVView


def has_kernel(k: Tensor, v: Tensor) -> bool:
    """Whether tokens such as k and v may be appended by the kernel for Hopper. In checked mode what codes looks at the values."""
    return nvrtc.is_hopper(k.device) and runs_plainly(k, v)


def prepares_steps(device: torch.device) -> bool:
    """Whether there may be kernels for a step of a cache there, which are prepared once: on the CPU, and on a Hopper GPU."""
    return device.type == "cpu" or nvrtc.is_hopper(device)


def has_writer(k: Tensor, v: Tensor) -> bool:
    """As `has_kernel`, for a cache's steps."""
    return prepares_steps(k.device) and runs_plainly(k, v)


class PagedKernels:
    """What writes to pools of pages, or reads them, as it was prepared: by where the pools lie and the form of keys and values. A copy has
    pools of its own, and starts anew."""

    def __init__(self) -> None:
        self._prepared: dict[Hashable, Paged | None] = {}

    def __reduce__(self) -> tuple[type[PagedKernels], tuple[()]]:
        return PagedKernels, ()

    def find(
        self, where: Hashable, pools: Callable[[], KVView], k: Tensor, v: Tensor, *, reads: bool = False
    ) -> Paged | None:
        """That for keys such as k [B, H, N, D] and values such as v [B, H, N, Dv]; None where PyTorch does it. `pools` are asked for
        once."""
        if not has_kernel(k, v):
            return None
        form = (reads, where, k.device, k.dtype, k.shape[1], k.shape[3], k.stride(3), v.dtype, v.shape[3], v.stride(3))
        if form not in self._prepared:
            self._prepared[form] = prepared_paged(k, v, *buffers_of(pools()), reads=reads)
        return self._prepared[form]


def traced_form(k: Tensor, v: Tensor, kv: KVView) -> tuple[int, ...] | None:
    """The form of the coded buffers of `kv`, as `append_held_op` takes it, where it can be had for tokens such as k and v; else None."""
    if not nvrtc.is_hopper(k.device) or not has_values(k):
        return None
    form, buffers = buffers_of(kv, with_recent=False)
    return None if prepared_paged(k, v, form, buffers) is None else _numbers(form)


@functools.lru_cache(maxsize=256)  # each layer of each new cache asks
def _numbers(form: Form) -> tuple[int, ...]:
    return tuple(int(x) for x in astuple(form))


def put_in_pages(pools: KVView, slots: Tensor, coded: KVView) -> None:
    """Store codes and values [B, H, N, ...] at `slots` [B, N] int64, page · page_size + place in the page, of pools [P, H, page_size, ...],
    in place and without a host sync. Slots outside of the pools are an error that only the CPU reports."""
    for pool, new in zip(pools.tensors(), coded.tensors(), strict=True):
        pool[slots // pool.shape[2], :, slots % pool.shape[2]] = new.transpose(1, 2)  # [B, N, H, ...]


def buffers_of(kv: KVView, *, with_recent: bool = True) -> tuple[Form, Buffers]:
    """The form of its codes and values, and the buffers, the tables of its axes among them, and the newest tokens if there are any."""
    form, buffers = _keys(kv.codes)
    v = kv.v
    if isinstance(v, NarrowRows):
        v_bits = v.bits
        buffers |= {"v": v.kept, "v_scale": v.scale, "v_centre": v.centre}
    else:
        v_bits = 16 if kv.v_scale is None else 8
        buffers |= {"v": v, "v_scale": kv.v_scale}
    if with_recent and kv.recent is not None:
        buffers |= {"recent_k": kv.recent.k, "recent_v": kv.recent.v}
    return Form(v_bits, **form), Buffers(**buffers)


def _keys(codes: KeyCodes) -> tuple[dict[str, Any], dict[str, Any]]:
    """What keys add to the form, and their buffers."""
    if isinstance(codes, AxisCodes):
        names = ("axis", "is_start", "top", "low", "per_step")
        tables = {name: getattr(codes.axes.layout, name).contiguous() for name in names}
        return {"axis_bytes": codes.axes.key_bytes}, {"values": codes.packed, **tables}
    if isinstance(codes, NarrowRows):
        return {"kept_bits": codes.bits}, {"values": codes.kept, "scale": codes.scale, "centre": codes.centre}
    parts = {"dense": codes.dense, "values": codes.values, "indices": codes.indices}
    form: dict[str, Any] = {"kept": codes.topk, "dense_dims": codes.dense_dims}
    if isinstance(codes, FeatureCodes):
        bits = 16 if codes.scale is None else 8
        form |= {"kept_bits": bits, "dense_bits": bits, "index_bits": 8, "shares_scale": bits == 8}
        return form, {**parts, "scale": codes.scale}
    index = codes.format.index_form(codes.topk, codes.sparse_dims)
    form |= {
        "kept_bits": codes.format.value_bits,
        "dense_bits": codes.format.dense_bits,
        "is_bitmap": index == "bitmap",
    }
    form["index_bits"] = index_bits(codes.sparse_dims) if index == "packed" else 8
    return form, {**parts, "scale": codes.dense_scale, "value_scale": codes.value_scale}

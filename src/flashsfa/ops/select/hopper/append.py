"""A few tokens appended to a cache for little of the host's time: what can be known before is prepared once.

A warp codes a key and another stores its value, or they store both as they come and code what leaves the newest tokens for them. What a launch
passes is ready but for the addresses of keys and values and the places they go to.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ....checks import require
from ... import nvrtc
from ...nvrtc import cuda
from . import compiler
from .compiler import Variant
from .params import Params

_MOST_ROWS = 512  # of all heads: of more, the bytes are what takes time
_MOST_VALUE_DIM = 1024  # the warp of a value holds it in registers


class Buffers(NamedTuple):
    """Those of a cache, contiguous [B, H, C, ...], named as in `FeatureCodes` and `KVView`: int8 where they have scales [B, H, C] float32.
    And [B, H, R, ...] the newest tokens as they came, where they are kept so."""

    dense: Tensor
    values: Tensor
    indices: Tensor
    v: Tensor
    scale: Tensor | None = None
    v_scale: Tensor | None = None
    recent_k: Tensor | None = None
    recent_v: Tensor | None = None


class Ring(NamedTuple):
    """Where the newest tokens lie in their buffers: the `leaving` ones from slot `oldest` on are coded in place of what is appended, which
    goes to slot `newest` and the next ones."""

    leaving: int
    oldest: int
    newest: int


class Append:
    """Writes tokens of one form (shape, strides, dtype and device of keys and values) to buffers that lie where they lay."""

    def __init__(self, kernel: ctypes.c_void_p, device: int, grid: tuple[int, int, int], params: Params) -> None:
        self._kernel, self._device, self._grid, self._params = kernel, device, grid, params
        self._capacity, self._recent_capacity = params.capacity, params.recent_capacity

    def __call__(self, k: Tensor, v: Tensor, start: int, ring: Ring | None = None) -> None:
        """Code k and write it with v at token `start`; what leaves the `ring` in their place, for buffers with newest tokens. That both
        have the form is the caller's to know."""
        n, params = self._grid[0], self._params
        coded = n
        if self._recent_capacity:
            assert ring is not None
            coded, oldest, newest = ring
            require(
                0 <= oldest <= oldest + coded <= newest <= self._recent_capacity - n and coded <= n,
                lambda: f"{n} of the newest tokens do not fit {self._recent_capacity} slots as {ring}",
            )
            params.leaving, params.oldest, params.newest = ring
        last = self._capacity - coded
        require(0 <= start <= last, lambda: f"{coded} tokens at {start} do not fit: {last} is the last place")
        params.k, params.v, params.start = k.data_ptr(), v.data_ptr(), start
        launch(self._kernel, self._device, self._grid, params)


def prepare(k: Tensor, v: Tensor, buffers: Buffers) -> Append | str | None:
    """What appends tokens such as k [B, H, N, D] and v [B, H, N, Dv] to buffers of a cache on a Hopper GPU; None for those that are
    left to Triton, and in words why the kernel cannot be had.

    Raises `ValueError` for buffers that do not fit k and v.
    """
    if not _takes(k, v):
        return None
    if nvrtc.obstacle() is not None:
        return f"the CUDA kernel that appends is compiled at run time: {nvrtc.obstacle()}"
    _require_fit(k, v, buffers)
    (batch, heads, n, head_dim), capacity, device = k.shape, buffers.v.shape[2], k.device.index
    variant = Variant(
        is_bf16=k.dtype == torch.bfloat16,
        head_dim=head_dim,
        dense_dims=buffers.dense.shape[-1],
        kept=buffers.values.shape[-1],
        value_dim=v.shape[-1],
        is_8_bit=buffers.scale is not None,
        has_recent=buffers.recent_k is not None,
    )
    kernel = load(variant, device)
    if isinstance(kernel, str):
        return kernel
    dense, values, indices, stored_v, scale, v_scale, *exact = (None if x is None else x.data_ptr() for x in buffers)
    strides = *k.stride()[:3], *v.stride()[:3]
    params = Params(
        None, None, dense, values, indices, scale, stored_v, v_scale, *exact, *strides, heads, capacity,
        recent_capacity=0 if buffers.recent_k is None else buffers.recent_k.shape[2],
    )  # fmt: skip
    return Append(kernel, device, (n, batch * heads, 1), params)


@functools.cache
def load(variant: Variant, device: int) -> ctypes.c_void_p | str:
    """The kernel of one specialisation, ready to launch on `device`, or why there is none: what failed once is not tried again."""
    return nvrtc.load_kernel(
        lambda afresh: compiler.compile_cubin(variant, afresh=afresh), "append_kernel", variant.shared_bytes, device
    )


def launch(kernel: ctypes.c_void_p, device: int, grid: tuple[int, int, int], params: Params) -> None:
    """Run the kernel on torch's current stream of `device`."""
    if torch.cuda.current_device() == device:
        cuda.launch(kernel, grid, Variant.threads, Variant.shared_bytes, (params,))
        return
    with torch.cuda.device(device):
        cuda.launch(kernel, grid, Variant.threads, Variant.shared_bytes, (params,))


def _takes(k: Tensor, v: Tensor) -> bool:
    """Whether the kernel is for keys and values of this form: few, of 16 bits, contiguous in the last dimension."""
    return (
        k.dtype in (torch.float16, torch.bfloat16)
        and 1 <= k.shape[:3].numel() <= _MOST_ROWS
        and 1 <= v.shape[-1] <= _MOST_VALUE_DIM
        and all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (k, v))
    )


def _require_fit(k: Tensor, v: Tensor, buffers: Buffers) -> None:
    """The buffers are those of a cache of such keys and values."""
    (batch, heads, n, head_dim), topk, dense_dims = k.shape, buffers.values.shape[-1], buffers.dense.shape[-1]
    require(
        v.shape[:3] == k.shape[:3] and v.dtype == k.dtype and v.device == k.device,
        lambda: f"k {tuple(k.shape)} {k.dtype} on {k.device} does not fit v {tuple(v.shape)} {v.dtype} on {v.device}",
    )
    require(
        topk >= 1 and dense_dims + topk <= head_dim <= 256,
        lambda: f"keys of {head_dim} features (at most 256) cannot leave {dense_dims} dense and {topk} kept ones",
    )
    require((buffers.scale is None) == (buffers.v_scale is None), "codes and values have scales both or neither")
    stored, capacity = k.dtype if buffers.scale is None else torch.int8, buffers.v.shape[2]
    expected = {
        "dense": ((dense_dims,), stored),
        "values": ((topk,), stored),
        "indices": ((topk,), torch.uint8),
        "v": ((v.shape[-1],), stored),
        "scale": ((), torch.float32),
        "v_scale": ((), torch.float32),
    }
    exact = {"recent_k": ((head_dim,), k.dtype), "recent_v": ((v.shape[-1],), k.dtype)}
    require(
        (buffers.recent_k is None) == (buffers.recent_v is None),
        "the newest tokens are keys and values both or neither",
    )
    room = capacity if buffers.recent_k is None else buffers.recent_k.shape[2]
    for name, (width, dtype) in (expected | exact).items():
        buffer = getattr(buffers, name)
        if buffer is None:
            continue
        shape = (batch, heads, capacity if name in expected else room, *width)
        require(
            buffer.is_contiguous() and buffer.shape == shape and buffer.dtype == dtype and buffer.device == k.device,
            f"the {name} buffer must be contiguous {dtype} {[*shape]} on {k.device}, got {buffer.dtype} {tuple(buffer.shape)} on "
            f"{buffer.device}",
        )
    require(n <= room, f"{n} tokens do not fit buffers of {room}")

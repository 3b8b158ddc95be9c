"""Tokens appended to a cache, and read back from pages, for little of the host's time: what can be known before is prepared once.

Of a few tokens a warp codes a key and another its value, of many a warp both; or they store them as they come and code what leaves the
newest tokens. What a launch passes is ready but for the addresses of keys and values and the places they go to.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ....checks import require
from ....formats import ROTATED_BITS, packed_bytes
from ... import nvrtc
from . import MOST_HEADS, MOST_ROWS, compiler
from .compiler import Form, Variant
from .params import Params

_MOST_HEAD_DIM = 256
_MOST_VALUE_DIM = 1024  # the warp of a value holds it in registers
_FEW_TOKENS, _BLOCK_TOKENS = 16, 4  # of more than so many, a block has so many: blocks take time to start


class Buffers(NamedTuple):
    """Those of a cache, contiguous [B, H, C, ...], that its form has; or pools of pages [P, H, page_size, ...]. And [B, H, R, ...] the newest
    tokens as they came, where they are kept so.

    Attributes:
        values, scale: kept entries of keys, whole rows or levels of axes; with the scale of a row, for codes that of the dense channel.
        v, v_scale, v_centre: of values.
        dense, indices, value_scale: of codes.
        centre: of keys that are whole rows.
        axis, is_start, top, low, per_step: the tables [H, ...] of an `AxisLayout`.
    """

    values: Tensor
    v: Tensor
    dense: Tensor | None = None
    indices: Tensor | None = None
    scale: Tensor | None = None
    value_scale: Tensor | None = None
    centre: Tensor | None = None
    v_scale: Tensor | None = None
    v_centre: Tensor | None = None
    axis: Tensor | None = None
    is_start: Tensor | None = None
    top: Tensor | None = None
    low: Tensor | None = None
    per_step: Tensor | None = None
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

    def __init__(self, kernel: nvrtc.Kernel, grid: tuple[int, int, int], params: Params) -> None:
        self._kernel, self._grid, self._params = kernel, grid, params
        self._capacity, self._recent_capacity = params.capacity, params.recent_capacity

    def __call__(self, k: Tensor, v: Tensor, start: int, ring: Ring | None = None) -> None:
        """Code k and write it with v at token `start`; what leaves the `ring` in their place, for buffers with newest tokens. That both
        have the form is the caller's to know."""
        params = self._params
        params.leaving, params.oldest, params.newest = require_room(
            params.tokens, start, ring, self._capacity, self._recent_capacity
        )
        params.k, params.v, params.start = k.data_ptr(), v.data_ptr(), start
        self._kernel.launch(self._grid, params)


class Paged:
    """Writes tokens of one form (heads, widths, dtype and device of keys and values) to pools of pages that lie where they lay, or reads them
    there."""

    def __init__(self, few: nvrtc.Kernel, many: nvrtc.Kernel, params: Params, tables: list[Tensor]) -> None:
        self._few, self._many, self._params = few, many, params
        self._tables = tables  # which `params` knows by their addresses; the pools are whoever's they are

    def __call__(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        """Code k [B, H, N, D] and write it with v [B, H, N, Dv] at `slots` [B, N] int64, contiguous: page * page_size + place in the page;
        outside of the pools, nothing. Or fill k and v with what lies there, spread out; with NaN outside of the pools. That k and v have the
        form, and features one after another, is the caller's to know."""
        (batch, _, n), params = k.shape[:3], self._params
        require(
            slots.shape == (batch, n)
            and slots.dtype == torch.int64
            and slots.is_contiguous()
            and slots.device == k.device,
            lambda: (
                f"slots must be contiguous int64 {[batch, n]} on {k.device}, got {slots.dtype} {tuple(slots.shape)} on {slots.device}"
            ),
        )
        if not slots.numel():
            return
        params.k, params.v, params.slots, params.tokens = k.data_ptr(), v.data_ptr(), slots.data_ptr(), n
        _set_strides(params, k, v)
        kernel = self._few if n <= _FEW_TOKENS else self._many
        kernel.launch(_grid(n, batch * params.heads), params)


def require_room(n: int, start: int, ring: Ring | None, capacity: int, recent_capacity: int) -> tuple[int, int, int]:
    """leaving, oldest and newest of the ring; without newest tokens all `n` leave at once. Raises `ValueError` for tokens that do not fit where
    they go."""
    leaving, oldest, newest = n, 0, 0
    if recent_capacity:
        assert ring is not None
        leaving, oldest, newest = ring
        if not (0 <= oldest <= oldest + leaving <= newest <= recent_capacity - n and leaving <= n):
            raise ValueError(f"{n} of the newest tokens do not fit {recent_capacity} slots as {ring}")
    last = capacity - leaving
    if not 0 <= start <= last:
        raise ValueError(f"{leaving} tokens at {start} do not fit: {last} is the last place")
    return leaving, oldest, newest


def prepare(k: Tensor, v: Tensor, form: Form, buffers: Buffers) -> Append | str | None:
    """What appends tokens such as k [B, H, N, D] and v [B, H, N, Dv] to buffers of a cache on a Hopper GPU; None for those that the kernel
    is not for, and in words why it cannot be had.

    Raises `ValueError` for buffers that do not fit k, v and the form.
    """
    (batch, heads, n), recent = k.shape[:3], buffers.recent_k
    rows = batch * heads * n
    if not _takes(k, v) or not rows or (form.is_of_features and rows > MOST_ROWS):
        return None
    require_fit(k, v, form, buffers, is_paged=False)
    kernel = _kernel(k, v, form, "append_kernel", n, has_recent=recent is not None)
    if isinstance(kernel, str):
        return kernel
    params = _params(k, buffers)
    if recent is not None:
        params.recent_capacity = recent.shape[2]
    room = params.recent_capacity or params.capacity
    require(n <= room, f"{n} tokens do not fit buffers of {room}")
    params.tokens = n
    _set_strides(params, k, v)
    return Append(kernel, _grid(n, batch * heads), params)


def prepare_paged(k: Tensor, v: Tensor, form: Form, pools: Buffers, *, reads: bool = False) -> Paged | str | None:
    """As `prepare`, for pools [P, H, page_size, ...] that are contiguous, or whose pages and heads all lie equally many bytes apart, and any
    number of tokens; with `reads` what reads them."""
    if not _takes(k, v):
        return None
    require_fit(k, v, form, pools, is_paged=True)
    name = "read_kernel" if reads else "append_kernel"
    few, many = (_kernel(k, v, form, name, n, is_paged=True) for n in (1, _FEW_TOKENS + 1))
    if isinstance(few, str) or isinstance(many, str):
        return few if isinstance(few, str) else str(many)
    params = _params(k, pools)
    (pages, heads, page_size), filled = pools.v.shape[:3], [x for x in pools if x is not None and x.numel()]
    params.page_size, params.all_slots = page_size, pages * page_size
    if all(x.is_contiguous() for x in filled):
        params.page_rows, params.head_rows = heads * page_size, page_size
    else:
        # the stride of a single page or head is any number
        (params.page_bytes, params.head_bytes), *others = {
            (x.stride(0) * x.itemsize * (pages > 1), x.stride(1) * x.itemsize * (heads > 1)) for x in filled
        }
        require(
            not others,
            "pools that are not contiguous need pages and heads that lie equally many bytes apart in all of them",
        )
    return Paged(few, many, params, [getattr(pools, name) for name in _tables(k.shape[-1], form)])


def _kernel(
    k: Tensor, v: Tensor, form: Form, name: str, n: int, *, has_recent: bool = False, is_paged: bool = False
) -> nvrtc.Kernel | str:
    """For n tokens a head, or in words why it cannot be had."""
    if nvrtc.obstacle() is not None:
        return f"the CUDA kernel that appends is compiled at run time: {nvrtc.obstacle()}"
    variant = Variant(
        k.dtype == torch.bfloat16, k.shape[-1], v.shape[-1], has_recent, is_paged, form, _tokens_per_block(n)
    )
    return nvrtc.load_kernel(compiler.compile_cubin, variant, name, k.device.index)


def _tokens_per_block(n: int) -> int:
    return 1 if n <= _FEW_TOKENS else _BLOCK_TOKENS


def _grid(n: int, heads: int) -> tuple[int, int, int]:
    """Of thread blocks for n tokens a head of so many heads."""
    return -(-n // _tokens_per_block(n)), heads, 1


def _params(k: Tensor, buffers: Buffers) -> Params:
    """What all launches have in common."""
    addresses = (None if x is None else x.data_ptr() for x in buffers)
    return Params(None, None, *addresses, heads=k.shape[1], capacity=buffers.v.shape[2])


def _set_strides(params: Params, k: Tensor, v: Tensor) -> None:
    params.k_batch, params.k_head, params.k_token = k.stride()[:3]
    params.v_batch, params.v_head, params.v_token = v.stride()[:3]


def _takes(k: Tensor, v: Tensor) -> bool:
    """Whether the kernel is for keys and values like these: of 16 bits, contiguous in the last dimension."""
    return (
        k.dtype in (torch.float16, torch.bfloat16)
        and k.shape[-1] <= _MOST_HEAD_DIM
        and k.shape[0] * k.shape[1] <= MOST_HEADS
        and 1 <= v.shape[-1] <= _MOST_VALUE_DIM
        and all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (k, v))
    )


def require_fit(k: Tensor, v: Tensor, form: Form, buffers: Buffers, *, is_paged: bool) -> None:
    """The buffers are those of a cache of such keys and values."""
    batch, heads, _, head_dim = k.shape
    rows = (buffers.v.shape[0] if is_paged else batch, heads, buffers.v.shape[2])
    require(
        v.shape[:3] == k.shape[:3] and v.dtype == k.dtype and v.device == k.device,
        lambda: f"k {tuple(k.shape)} {k.dtype} on {k.device} does not fit v {tuple(v.shape)} {v.dtype} on {v.device}",
    )
    require(
        form.dense_dims + form.kept <= head_dim and (form.kept >= 1) == (form.index_bits >= 1),
        lambda: f"keys of {head_dim} features cannot leave {form.dense_dims} dense and {form.kept} kept ones",
    )
    recent = None if buffers.recent_k is None else (batch, heads, buffers.recent_k.shape[2])
    expected, coded = _expected(form, k.dtype, head_dim, v.shape[-1], rows, recent)
    given = {name: x for name, x in zip(Buffers._fields, buffers, strict=True) if x is not None}
    require(
        given.keys() == expected.keys(),
        lambda: f"the buffers of {form} must be {', '.join(sorted(expected))}; got {', '.join(sorted(given))}",
    )
    for name, buffer in given.items():
        shape, dtype = expected[name]
        may_lie_apart = is_paged and name in coded and buffer.shape == shape  # pages and heads, anywhere
        whole = buffer[0, 0] if may_lie_apart else buffer
        require(
            whole.is_contiguous() and buffer.shape == shape and buffer.dtype == dtype and buffer.device == k.device,
            f"the {name} buffer must be contiguous {dtype} {[*shape]} on {k.device}, got {buffer.dtype} {tuple(buffer.shape)} on "
            f"{buffer.device}",
        )


_Part: TypeAlias = tuple[tuple[int, ...], torch.dtype]
_Rows: TypeAlias = tuple[int, int, int]


@functools.lru_cache(maxsize=1024)  # each layer of each new cache asks for the same
def _expected(
    form: Form, dtype: torch.dtype, head_dim: int, v_dim: int, rows: _Rows, recent: _Rows | None
) -> tuple[dict[str, _Part], frozenset[str]]:
    """Shape and dtype of each buffer, and the names of those of coded tokens, `rows` [B or P, H, C] of them; `recent` [B, H, R]."""
    parts = _parts(form, dtype, head_dim, v_dim)
    expected: dict[str, _Part] = {name: ((*rows, *width), its) for name, (width, its) in parts.items()}
    expected |= {name: ((rows[1], *width), its) for name, (width, its) in _tables(head_dim, form).items()}
    if recent is not None:
        expected |= {"recent_k": ((*recent, head_dim), dtype), "recent_v": ((*recent, v_dim), dtype)}
    return expected, frozenset(parts)


def _parts(form: Form, dtype: torch.dtype, head_dim: int, v_dim: int) -> dict[str, _Part]:
    """Width and dtype of each buffer of coded tokens, of keys and values of `dtype`."""
    parts = _row("v", "v_scale", "v_centre", v_dim, dtype, form.v_bits)
    if form.axis_bytes:
        return parts | {"values": ((form.axis_bytes,), torch.uint8)}
    if not form.index_bits:
        return parts | _row("values", "scale", "centre", head_dim, dtype, form.kept_bits)
    index_bytes = (
        packed_bytes(head_dim - form.dense_dims, 1) if form.is_bitmap else packed_bytes(form.kept, form.index_bits)
    )
    parts["dense"] = (form.dense_dims,), _stored(dtype, form.dense_bits)
    parts["values"] = (
        (packed_bytes(form.kept, form.kept_bits) if form.kept_bits < 8 else form.kept,),
        _stored(dtype, form.kept_bits),
    )
    parts["indices"] = (index_bytes,), torch.uint8
    if form.shares_scale:
        return parts | {"scale": ((), torch.float32)}
    if form.dense_bits < 16 and form.dense_dims:
        parts["scale"] = (), torch.bfloat16
    if form.kept_bits < 16:
        parts["value_scale"] = (), torch.bfloat16
    return parts


def _row(name: str, scale: str, centre: str, features: int, dtype: torch.dtype, bits: int) -> dict[str, _Part]:
    """Those of rows of so many features, as of `NarrowRows`."""
    is_rotated = bits in ROTATED_BITS
    width = packed_bytes(features, bits) if is_rotated else features
    parts: dict[str, _Part] = {name: ((width,), _stored(dtype, bits))}
    if bits < 16:
        parts[scale] = (), torch.float32 if bits == 8 else torch.bfloat16
    return parts | {centre: ((), torch.bfloat16)} if is_rotated else parts


def _stored(dtype: torch.dtype, bits: int) -> torch.dtype:
    return {16: dtype, 8: torch.int8}.get(bits, torch.uint8)


def _tables(head_dim: int, form: Form) -> dict[str, _Part]:
    """Width and dtype of each table of axes."""
    if not form.axis_bytes:
        return {}
    slots = (4 * form.axis_bytes,)
    tables: dict[str, _Part] = {
        "axis": (slots, torch.int64),
        "is_start": (slots, torch.uint8),
        "top": ((head_dim,), torch.uint8),
    }
    return tables | {name: ((head_dim,), torch.float32) for name in ("low", "per_step")}

"""Which form selects features and scatters codes: CUDA or Triton on a GPU, plain PyTorch everywhere else; and both as operators of torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ...checks import runs_plainly
from ...contexts import asked_once
from .. import nvrtc, record
from .hopper import sparse
from .plain import at_support, empty_code, empty_rows, plain_prune_24, plain_scatter, plain_topk

if TYPE_CHECKING:
    from .cpu.append import Append as CpuAppend
    from .hopper.append import Append, Buffers, Paged
    from .hopper.compiler import Form

_Kernel = TypeVar("_Kernel")
_ROWS = "one launch over the rows"

# ---- what callers take, which carries gradients


def coded(x: Tensor, topk: int, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dense channel, values and indices of x [..., D]."""
    return encode(x, topk, dense_dims) if runs_plainly(x) else topk_op(x, topk, dense_dims)


def pruned(x: Tensor, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """The code of the two largest of each aligned group of four of x [..., D], and its dense channel."""
    return prune_24(x, dense_dims) if runs_plainly(x) else prune_24_op(x, dense_dims)


def scattered(dense: Tensor, values: Tensor, indices: Tensor, head_dim: int) -> Tensor:
    """A code as dense rows [..., D], as `FeatureCodes.to_dense`."""
    run = scatter if runs_plainly(dense, values) and dense.shape[-1] < head_dim else scatter_op
    return run(dense, values, indices, head_dim)


# ---- the operators

topk_op = torch.library.custom_op("flashsfa::topk", plain_topk, mutates_args=())


@topk_op.register_fake
def _(x: Tensor, topk: int, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    return empty_code(x, topk, dense_dims)


prune_24_op = torch.library.custom_op("flashsfa::prune_24", plain_prune_24, mutates_args=())


@prune_24_op.register_fake
def _(x: Tensor, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    return empty_code(x, (x.shape[-1] - dense_dims) // 2, dense_dims)


scatter_op = torch.library.custom_op("flashsfa::scatter", plain_scatter, mutates_args=())


@scatter_op.register_fake
def _(dense: Tensor, values: Tensor, indices: Tensor, head_dim: int) -> Tensor:
    return empty_rows(values, head_dim)


def _topk_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, *budgets = inputs
    ctx.head_dim, ctx.budgets = x.shape[-1], len(budgets)
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(output[2])


def _topk_backward(ctx: Any, grad_dense: Tensor, grad_values: Tensor, _: Tensor | None) -> tuple:
    (indices,) = ctx.saved_tensors
    return scatter_op(grad_dense, grad_values, indices, ctx.head_dim), *(None,) * ctx.budgets


topk_op.register_autograd(_topk_backward, setup_context=_topk_setup)
prune_24_op.register_autograd(_topk_backward, setup_context=_topk_setup)


def _scatter_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    dense, _, indices, _ = inputs
    ctx.dense_dims = dense.shape[-1]
    ctx.save_for_backward(indices)


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple:
    (indices,) = ctx.saved_tensors
    return *at_support(grad, ctx.dense_dims, indices), None, None


scatter_op.register_autograd(_scatter_backward, setup_context=_scatter_setup)


# ---- their insides, which carry none


def encode(x: Tensor, topk: int, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dense channel, values and indices of x [..., D]. This and the functions below are the insides of operators: they
    carry no gradients."""
    if not has_fused(x):
        return plain_topk(x, topk, dense_dims)
    from .triton import topk as kernels

    with torch.cuda.device_of(x):
        return kernels.encode(x, topk, dense_dims)


def coded_rows(
    x: Tensor, topk: int, dense_dims: int, keep: bool
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """x [..., D], zero but for what its code keeps, and with `keep` the code; in one pass where one can."""
    if not has_fused(x):
        code = plain_topk(x, topk, dense_dims)
        return plain_scatter(*code, x.shape[-1]), code if keep else None
    out = empty_rows(x, x.shape[-1])
    if not keep and write_coded_rows(x, topk, dense_dims, out):
        return out, None
    from .triton import scatter as scatter_kernels
    from .triton import topk as kernels

    with torch.cuda.device_of(x):
        kept = empty_code(x, topk, dense_dims) if keep else None
        if kernels.topk_rows(x, topk, dense_dims, out, kept):
            return out, kept
        code = kernels.encode(x, topk, dense_dims)
        return scatter_kernels.scatter(*code, out), code if keep else None


def write_coded_rows(x: Tensor, topk: int, dense_dims: int, out: Tensor) -> bool:
    """Write x [B, H, N, D] to `out`, zero but for what its code keeps, for little of the host's time. False, with nothing written, where there
    is no kernel for it."""
    written = sparse.prune(x, topk, dense_dims, out)
    if written:
        record.record("topk", "hopper", _ROWS)
    return written


def prune_24(x: Tensor, dense_dims: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `pruned`."""
    if not has_fused(x):
        return plain_prune_24(x, dense_dims)
    from .triton import prune_24 as kernels

    with torch.cuda.device_of(x):
        return kernels.prune_24(x, dense_dims)


def scatter(dense: Tensor, values: Tensor, indices: Tensor, head_dim: int) -> Tensor:
    """As `scattered`."""
    if dense.shape[-1] == head_dim:
        return dense
    if not has_fused(values):
        return plain_scatter(dense, values, indices, head_dim)
    out = empty_rows(values, head_dim)
    if sparse.scatter(dense, values, indices, out):
        record.record("topk", "hopper", _ROWS)
        return out
    from .triton import scatter as kernels

    with torch.cuda.device_of(values):
        return kernels.scatter(dense, values, indices, out)


def keep_support(rows: Tensor, dense_dims: int, indices: Tensor) -> Tensor:
    """rows [..., D], zero but for the first `dense_dims` entries and those at `indices` [..., K] of the rest."""
    if not has_fused(rows):
        return plain_scatter(*at_support(rows, dense_dims, indices), indices, rows.shape[-1])
    from .triton import scatter as kernels

    with torch.cuda.device_of(rows):
        out = empty_rows(rows, rows.shape[-1])
        if kernels.keep_support(rows, dense_dims, indices, out):
            return out
        return kernels.scatter(*at_support(rows, dense_dims, indices), indices, out)


topk_op.register_kernel("cuda")(encode)
prune_24_op.register_kernel("cuda")(prune_24)
scatter_op.register_kernel("cuda")(scatter)


def has_fused(x: Tensor) -> bool:
    """Whether the fused kernel selects from x; recorded for `explain()`."""
    if not x.is_cuda:
        return False
    installed = triton_is_installed()
    if installed and x.dtype != torch.float64:
        record.record("topk", "triton", "one pass over the rows")
        return True
    reason = (
        f"the Triton kernel takes no {x.dtype}" if installed else "the fused kernel needs Triton: pip install triton"
    )
    record.record("topk", "torch", reason, fallback=True)
    return False


@asked_once
def triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def append(
    k: Tensor, v: Tensor, dense: Tensor, values: Tensor, indices: Tensor, v_buffer: Tensor, start: int | Tensor
) -> None:
    """Code k [B, H, N, D] and write the code and v [B, H, N, Dv] at token `start` of a cache's contiguous buffers [B, H, C, ...], in
    one launch. Only where `has_fused(k)`."""
    from .triton import topk as kernels

    with torch.cuda.device_of(k):
        kernels.append(k, v, dense, values, indices, v_buffer, start)


def append_8_bit(
    k: Tensor, v: Tensor, buffers: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], start: int
) -> None:
    """As `append`, in 8 bits, in two launches. Buffers of dense channel, values, indices, their scales, v and its scales."""
    from .triton import quantize
    from .triton import topk as kernels

    with torch.cuda.device_of(k):
        code = kernels.encode(k, buffers[1].shape[-1], buffers[0].shape[-1])
        quantize.write_8_bit(code, v, buffers, start)


def prepared_append(k: Tensor, v: Tensor, form: Form, buffers: Buffers) -> Append | CpuAppend | None:
    """What codes tokens such as k and v and writes them for little of the host's time, on a Hopper GPU in one launch and on the CPU in one
    call; None where it is left to other ways. Recorded for `explain()`."""
    if nvrtc.is_hopper(k.device):
        from .hopper import append as hopper

        other = "triton" if form.is_of_features and has_fused(k) else "torch"
        usual = "the kernel for Hopper takes keys and values in 16 bits, and so many rows at most where Triton takes them too"
        found = hopper.prepare(k, v, form, buffers)
        return _recorded(found, "append", "hopper", "one launch for all tokens that come", other, usual)
    from .cpu import append as cpu

    usual = "the fused CPU code takes few tokens at a time, in float32 or 16 bits, kept as features as they come or in 8 bits"
    how = "compiled for this CPU: one call for all tokens that come"
    return _recorded(cpu.prepare(k, v, form, buffers), "append", "numba", how, "torch", usual)


def prepared_paged(k: Tensor, v: Tensor, form: Form, pools: Buffers, *, reads: bool = False) -> Paged | None:
    """As `prepared_append`, for pools of pages and any number of tokens; with `reads` what spreads them out again."""
    from .hopper import append as kernels

    operation = "read" if reads else "append"
    how = f"one launch for all tokens that {'leave' if reads else 'come to'} pages"
    found = kernels.prepare_paged(k, v, form, pools, reads=reads)
    return _recorded(found, operation, "hopper", how, "torch", "the kernel for Hopper takes tokens in 16 bits")


def _recorded(
    found: _Kernel | str | None, operation: str, backend: str, how: str, other: str, usual: str
) -> _Kernel | None:
    """A kernel that was `found`, recorded on its `backend` with `how` it runs; else None, and the backend that runs in its place with what
    stands in the way, or the `usual` reason."""
    if found is None or isinstance(found, str):
        record.record(operation, other, found or usual, fallback=found is not None)
        return None
    record.record(operation, backend, how)
    return found


def _append_plain(
    k: Tensor, v: Tensor, dense: Tensor, values: Tensor, indices: Tensor, v_buffer: Tensor, start: Tensor
) -> None:
    parts = (*plain_topk(k, values.shape[-1], dense.shape[-1]), v)
    slots = start + torch.arange(k.shape[2], device=k.device)
    for buffer, new in zip((dense, values, indices, v_buffer), parts, strict=True):
        buffer.index_copy_(2, slots, new)


# `append` with `start` [] on the device, for CUDA graphs and torch.compile.
append_op = torch.library.custom_op(
    "flashsfa::append", _append_plain, mutates_args=("dense", "values", "indices", "v_buffer")
)


@append_op.register_kernel("cuda")
def _(k: Tensor, v: Tensor, dense: Tensor, values: Tensor, indices: Tensor, v_buffer: Tensor, start: Tensor) -> None:
    (append if has_fused(k) else _append_plain)(k, v, dense, values, indices, v_buffer, start)


@append_op.register_fake
def _(*_: Tensor) -> None:
    """Nothing is returned."""


def append_held(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    form: Sequence[int],
    values: Tensor,
    stored_v: Tensor,
    dense: Tensor | None,
    indices: Tensor | None,
    scale: Tensor | None,
    value_scale: Tensor | None,
    centre: Tensor | None,
    v_scale: Tensor | None,
    v_centre: Tensor | None,
    axis: Tensor | None,
    is_start: Tensor | None,
    top: Tensor | None,
    low: Tensor | None,
    per_step: Tensor | None,
) -> None:
    """What `prepared_paged` prepares, at `slots` [B, N] of buffers whose form is that of `Form`."""
    from .hopper.append import Buffers
    from .hopper.compiler import Form

    coded = values, stored_v, dense, indices, scale, value_scale, centre, v_scale, v_centre
    buffers = Buffers(*coded, axis, is_start, top, low, per_step)
    write = prepared_paged(k, v, Form(*form), buffers)  # type: ignore[arg-type]
    assert write is not None  # so it was found for such tokens when the buffers were made
    write(k, v, slots)


# For torch.compile.
append_held_op = torch.library.custom_op(
    "flashsfa::append_held",
    append_held,
    mutates_args=(
        "values", "stored_v", "dense", "indices", "scale", "value_scale", "centre", "v_scale", "v_centre",
    ),
)  # fmt: skip


@append_held_op.register_fake
def _(*_: Any) -> None:
    """Nothing is returned."""

"""Decode on a GPU whatever is held: one operator for torch.compile, and the next kernel where one cannot run.

No host sync and no shape that depends on data: the launches can be captured in a CUDA graph. Deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ...mask import Mask
from ...scores import ScoreRules
from ...stored import KVView
from .. import nvrtc, record
from ..nvrtc import cuda
from .held import NAMES, ROWS, Call, Held

if TYPE_CHECKING:
    from .hopper.decode import Prepared
    from .hopper.exact.exact import Prepared as PreparedExact

FEWEST_KEYS = 32  # that the kernel for Hopper takes; the strides of fewer need not be those of more


def decode(
    q: Tensor,
    kv: KVView,
    mask: Mask,
    scores: ScoreRules,
    value_tolerance: float,
    topk_query: int | None,
    backend: str,
    held: Held | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `plain.decode`, for float16, bfloat16 and float32, on `backend` "triton" or "hopper". No gradients. `held` is what the view holds,
    where that is known; `out` [B, Hq, M, Dv], contiguous, a place for the output outside of traces.

    Raises `ValueError` if a cache tensor's last dimension is not contiguous: copying a cache a step would cost more
    than decoding it.
    """
    held = held or Held.of(kv)
    for name in ROWS:
        x = held.tensors.get(name)
        if x is not None and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"the last dimension of {name.lower()} must be contiguous, got strides {tuple(x.stride())}"
            )
    if not torch.compiler.is_compiling():
        return _run(Call(q, held, kv.page_table, mask, scores, value_tolerance, topk_query), backend, out)
    return _decode_op(
        q, [held.tensors.get(name) for name in NAMES], held.sizes, kv.page_table, mask.kv_lens, mask.key_padding_mask, mask.window,
        [scores.scale, scores.softcap or 0.0, value_tolerance], topk_query, backend,
    )  # fmt: skip


class Kernels(NamedTuple):
    """Those for queries of one form over the buffers of a cache: for coded tokens, and for exact ones where there are any. `width` is that of
    a value."""

    coded: Prepared
    exact: PreparedExact | None
    width: int


def prepared(
    q: Tensor, kv: KVView, mask: Mask, scores: ScoreRules, value_tolerance: float, topk_query: int | None
) -> Kernels | None:
    """The kernels for queries of this form over the buffers of `kv`, of which they see `FEWEST_KEYS` coded tokens at least, on a Hopper GPU
    and where they take them. Beside exact tokens one query sees all, padding apart. None elsewhere."""
    from .hopper import decode as hopper
    from .hopper.exact import exact as hopper_exact

    held, exact = Held.of(kv), None
    if q.stride(-1) != 1 or kv.n_coded < FEWEST_KEYS or hopper.obstacle(q, held) is not None:
        return None
    if kv.exact:
        if not hopper_exact.is_aligned(q) or hopper_exact.obstacle(q, kv) is not None:
            return None
        made = hopper_exact.Prepared.of(q, kv, mask, scores)
        if isinstance(made, str):
            return None
        exact = made
    found = hopper.Prepared.of(Call(q, held, None, mask, scores, value_tolerance, topk_query))
    return None if isinstance(found, str) else Kernels(found, exact, held.width)


def prepared_paged(
    q: Tensor, kv: KVView, mask: Mask, scores: ScoreRules, value_tolerance: float, topk_query: int | None
) -> Prepared | None:
    """The kernel for queries of this form over the pages of `kv`, whatever the lengths and the table are when it runs, on a Hopper GPU and where
    it takes them; None elsewhere. Recorded for `explain()`."""
    if not nvrtc.is_hopper(q.device) or q.stride(-1) != 1:
        return None
    from .hopper import decode as hopper

    held = Held.of(kv)
    if hopper.obstacle(q, held) is not None:
        return None
    found = hopper.Prepared.of(Call(q, held, kv.page_table, mask, scores, value_tolerance, topk_query))
    if isinstance(found, str):
        return None
    record.record("decode", "hopper", "the kernel for Hopper, split over the keys, prepared for all steps")
    return found


def attend_again(
    q: Tensor, prepared: Kernels, choice: record.Choice, kv: KVView, padding: Tensor | None, out: Tensor | None = None
) -> Tensor | None:
    """The output [B, Hq, M, Dv] of what was `prepared`, over a view of the same buffers, of which `padding` [B, N] are not seen, in `out`
    if there is one, contiguous; None where a kernel cannot run."""
    if q.is_cuda and cuda.current_device() != q.device.index:
        with torch.cuda.device(q.device):
            return attend_again(q, prepared, choice, kv, padding, out)
    (coded, exact, width), keys = prepared, kv.n_coded
    out = q.new_empty((*q.shape[:3], width)) if out is None else out
    if exact is None:
        obstacle = coded.attend(q, out, None, keys, padding)
    else:
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        hidden = None if padding is None else padding[:, kv.n_first : kv.n_first + keys]
        obstacle = coded.attend(q, out, lse, keys, hidden) or exact.attend(q, kv, padding, out, lse)
    if obstacle is not None:
        return None
    record.again("decode", choice)
    return out


def _run(call: Call, backend: str, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    q = call.q
    out = q.new_empty((*q.shape[:3], call.held.width)) if out is None else out
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if not out.numel():
        return out, lse
    from .triton import narrow

    with torch.cuda.device_of(q):
        if backend == "hopper":
            from .hopper import decode as hopper

            obstacle = hopper.attend(call, out, lse)
            if obstacle is None:
                return out, lse
            record.record("decode", "triton", f"kernels split over the keys; {obstacle}", fallback=True)
        narrow.attend(call, out, lse)
    return out, lse


# For torch.compile, which cannot look into a launch. Eager calls save its cost to the host.
@torch.library.custom_op("flashsfa::decode_held", mutates_args=())
def _decode_op(
    q: Tensor,
    tensors: Sequence[Tensor | None],
    sizes: Sequence[int],
    page_table: Tensor | None,
    kv_lens: Tensor | None,
    key_padding_mask: Tensor | None,
    window: int | None,
    real: Sequence[float],
    topk_query: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    scale, softcap, value_tolerance = real
    named = zip(NAMES, tensors, strict=True)
    held = Held({name: x for name, x in named if x is not None}, *sizes)
    mask = Mask(True, window, key_padding_mask, kv_lens=kv_lens)
    rules = ScoreRules(scale, softcap or None)
    return _run(Call(q, held, page_table, mask, rules, value_tolerance, topk_query), backend)


@_decode_op.register_fake
def _(q: Tensor, tensors: Sequence[Tensor | None], sizes: Sequence[int], *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:3], sizes[-1])), q.new_empty(q.shape[:3], dtype=torch.float32)

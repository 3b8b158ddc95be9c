"""Input checks shared by the public functions, and the checked mode for those that cost a device sync."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_TOKENS = 2**30  # no sequence is longer; two such numbers still add up within int32, in which kernels count

_checked: ContextVar[bool] = ContextVar("flashsfa_checked", default=False)


@contextmanager
def checked(enabled: bool = True) -> Iterator[None]:
    """Inside this context, values are checked too: NaN inputs and out-of-range indices raise `ValueError`.

    Shapes, dtypes and devices are always checked. Values cost a device synchronisation on a GPU, so
    they are looked at only here. A context variable: other threads and tasks keep their own mode.
    """
    token = _checked.set(enabled)
    try:
        yield
    finally:
        _checked.reset(token)


def is_checked() -> bool:
    """Whether `checked()` is in force in this thread or task."""
    return not torch.compiler.is_compiling() and _checked.get()


def named_device(name: str) -> torch.device:
    """The device of an option --device: "cuda", "cpu" or "auto". Raises `ValueError` for a GPU that is not there."""
    on_gpu = torch.cuda.is_available()
    require(
        name != "cuda" or on_gpu, "--device cuda, but torch finds no CUDA device here; leave it out to run on the CPU"
    )
    return torch.device(("cuda" if on_gpu else "cpu") if name == "auto" else name)


def has_values(x: Tensor) -> bool:
    """Whether x holds numbers: not on the meta device, nor while something traces or transforms the call."""
    if torch.compiler.is_compiling() or type(x) not in _HOLDING or x.is_meta:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


_HOLDING = Tensor, torch.nn.Parameter  # fake tensors are a class of their own


def runs_plainly(*tensors: Tensor) -> bool:
    """Whether nothing traces, transforms or differentiates a call over these, nor looks at their values (`checked`): the inside of an
    operator may then be called at once, which saves the host what torch's dispatch of a custom operator costs (some 40 µs), and what
    was checked for such tensors before holds."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _checked.get()
    ):
        return False  # the first of these first: the rest cannot be traced
    may_differentiate = torch.is_grad_enabled()
    for x in tensors:  # noqa: SIM110 (spelt out: `has_values`, or a generator, would take the host as long again for each)
        if type(x) not in _HOLDING or x.is_meta or (may_differentiate and x.requires_grad):
            return False
    return True


def may_look(x: Tensor) -> bool:
    """Whether a check may look at x's values: on a GPU that is a sync, for checked mode alone."""
    return has_values(x) and (x.device.type == "cpu" or is_checked())


def refuse_transforms(operation: str, way_out: str, *tensors: Tensor | None) -> None:
    """Raise `NotImplementedError` inside a transform that would get wrong derivatives of an operator, or an error from deep
    inside it: forward-mode differentiation of `tensors`, torch.func, torch.jit.trace. torch.compile and torch.export pass."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(f"{operation} runs under no torch.func transform (grad, vmap, jvp ...): {way_out}")
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise NotImplementedError(f"{operation} has no forward-mode derivative: {way_out}")
    if torch.jit.is_tracing():
        raise NotImplementedError(f"{operation} cannot be traced by torch.jit: use torch.export or torch.compile")


def require_no_gradient(*tensors: Tensor | None) -> None:
    """No tensor asks for a gradient, which caches of codes do not carry."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError(
            "caches of codes carry no gradient: call under torch.no_grad(), or without a cache (sparse_feature_attention)"
        )


def require(condition: bool, message: str | Callable[[], str]) -> None:
    """Raise `ValueError(message)` unless `condition` holds.

    Where a check runs at each decode step the message is a function: putting shapes into words costs more than to check
    them.
    """
    if not condition:
        raise ValueError(message if isinstance(message, str) else message())


def require_int(name: str, value: Any, least: int | None = None, most: int | None = None) -> None:
    """`value` is a whole number, from `least` to `most` where these are given. A bool and a float are none: `TypeError`."""
    if type(value) is not int and (not isinstance(value, (Integral, torch.SymInt)) or isinstance(value, bool)):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    number: Any = value
    if (least is not None and number < least) or (most is not None and number > most):
        span = f"at least {least}" if most is None else f"at most {most}" if least is None else f"{least} to {most}"
        raise ValueError(f"{name} must be {span}, got {value}")


def require_number(name: str, value: Any, hint: str = "") -> None:
    """`value` is a finite int or float. `hint` says what to do where it is a tensor."""
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat, torch.SymInt))
    ):
        also = f"; {hint}" if hint and isinstance(value, Tensor) else ""
        raise TypeError(f"{name} must be a float, got {type(value).__name__}{also}")
    if not isinstance(value, (torch.SymFloat, torch.SymInt)) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def require_bool(name: str, value: Any) -> None:
    """`value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")


def require_choice(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")


def require_tolerance(value_tolerance: float, name: str = "value_tolerance") -> None:
    """0 <= value_tolerance < 1."""
    require_number(name, value_tolerance)
    require(0 <= value_tolerance < 1, lambda: f"{name} must be in [0, 1), got {value_tolerance}")


def require_float(name: str, x: Tensor, *, may_hold_nan: bool = False) -> None:
    """`x` is a tensor of a supported floating dtype; in checked mode without NaN, unless it `may_hold_nan`."""
    require_tensor(name, x)
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if is_checked() and not may_hold_nan and has_values(x) and bool(x.isnan().any()):
        raise ValueError(f"{name} holds NaN; find where it arises, or leave flashsfa.checked() to let it through")


def require_tensor(name: str, x: Any) -> None:
    """`x` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def require_alike(**tensors: Tensor) -> None:
    """All tensors share one dtype and one device."""
    (first_name, first), *rest = tensors.items()
    for name, x in rest:
        if x.dtype != first.dtype:
            raise TypeError(f"{name} is {x.dtype} but {first_name} is {first.dtype}; cast them to one dtype")
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device} but {first_name} is on {first.device}; move them together")


def require_padding(mask: Tensor, batch: int, n_k: int, device: torch.device) -> None:
    """`mask` is a key padding mask [batch, n_k]."""
    require_tensor("key_padding_mask", mask)
    require(
        mask.dtype == torch.bool and mask.shape == (batch, n_k),
        lambda: (
            f"key_padding_mask must be bool [B, N_k] = [{batch}, {n_k}], True where a key is padding; "
            f"got {mask.dtype} {tuple(mask.shape)}"
        ),
    )
    require(mask.device == device, lambda: f"key_padding_mask is on {mask.device}, q on {device}; move them together")


def require_keys_and_values(k: Tensor, v: Tensor) -> None:
    """Keys [B, Hkv, N, D] and values [B, Hkv, N, Dv] that can be stored together."""
    for name, x in (("k", k), ("v", v)):
        require_float(name, x)
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, Hkv, N, D], got shape {tuple(x.shape)}")
    require_alike(k=k, v=v)
    require(
        k.shape[:3] == v.shape[:3],
        lambda: f"k and v must share [B, Hkv, N], got {tuple(k.shape)} and {tuple(v.shape)}",
    )


class Seen:
    """Forms of inputs that were found to fit, some thousands at most: to look at them again would take the host longer."""

    def __init__(self) -> None:
        self._forms: set[Hashable] = set()

    def __contains__(self, form: Hashable) -> bool:
        return form in self._forms

    def add(self, form: Hashable) -> None:
        if len(self._forms) >= _MOST_FORMS:
            self._forms.clear()
        self._forms.add(form)


_MOST_FORMS = 4096  # lengths differ from call to call in some programs


def require_page_size(page_size: int) -> None:
    """Pages of a size that the kernels know."""
    require_int("page_size", page_size)
    require(
        16 <= page_size <= 256 and page_size & (page_size - 1) == 0,
        f"page_size must be a power of two from 16 to 256, got {page_size}",
    )

"""Keys in a fixed number of bits per axis: `AxisBits`, calibrated once, and `AxisCodes`, the keys of a cache in them.

In a basis whose axes count by their size alone ("scaled", "whitened"), the axes of a head get 0, 2, 4 or 8 bits each, the same for every
token. So a code has no indices and no scale of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .checks import has_values, may_look, require, require_float, require_int
from .contexts import lasting_tensors
from .narrow import Rows

WIDTHS = (0, 2, 4, 8)
_CLIPS = (
    *(0.85**i for i in range(24)),
    0.0,
)  # where a quantiser ends, of an axis' largest entry; 0 reads all as the centre
_SLOT = 2  # bits: every field starts at a multiple of it


@dataclass(frozen=True, eq=False)
class AxisBits:
    """In how many bits each axis of H heads is kept, and with what step, for one layer or stacked for many (leading `...`).

    The level l of an axis of b bits is read as `centre + (l + 0.5 - 2**(b - 1)) * step`; an axis of 0 bits as its centre. The levels
    of a key lie one after another from the lowest bit of its first byte on. As the widths descend, none lies across two bytes.

    Attributes:
        bits: [..., H, D] uint8, each 0, 2, 4 or 8, descending within a head. All heads have the same sum, of whole bytes.
        step: [..., H, D] float32, at least 0.
        centre: [..., H, D] float32.
        key_bytes: bytes of a key, which follow.
        layout: where each level lies, which follows too.

    Raises `TypeError` or `ValueError` for what does not fit. Looks at the values, which is a device sync on a GPU.
    """

    bits: Tensor
    step: Tensor
    centre: Tensor
    key_bytes: int = field(init=False, repr=False)
    layout: AxisLayout = field(
        init=False, repr=False
    )  # made at once: a trace that came first would leave its own tensors here
    copies: dict[torch.device, AxisBits] = field(init=False, repr=False, default_factory=dict)  # on other devices

    def __post_init__(self) -> None:
        for name in ("bits", "step", "centre"):  # kernels know them by their addresses
            object.__setattr__(self, name, getattr(self, name).contiguous())
        bits, parts = self.bits, self.tensors()
        require(
            bits.ndim >= 2 and bits.numel() > 0 and all(x.shape == bits.shape for x in parts),
            f"axis bits need bits, step and centre [..., H, D]; got {', '.join(str(tuple(x.shape)) for x in parts)}",
        )
        dtypes = [x.dtype for x in parts]
        if dtypes != [torch.uint8, torch.float32, torch.float32]:
            raise TypeError(
                f"axis bits need bits in uint8, step and centre in float32; got {', '.join(map(str, dtypes))}"
            )
        require(
            all(x.device == bits.device for x in parts) and has_values(bits),
            f"axis bits need their values, all on one device; got {', '.join(str(x.device) for x in parts)}",
        )
        widths, totals = bits.unique().tolist(), bits.sum(-1).unique().tolist()
        require(set(widths) <= set(WIDTHS), f"an axis has 0, 2, 4 or 8 bits; got {', '.join(map(str, widths))}")
        require(
            bool((bits[..., 1:] <= bits[..., :-1]).all()),
            "the bits of a head's axes must descend: order the axes by them",
        )
        require(
            len(totals) == 1 and totals[0] > 0 and totals[0] % 8 == 0,
            f"all heads need the same number of whole bytes; their axes have {', '.join(map(str, totals))} bits",
        )
        require(
            bool(self.step.isfinite().all() and (self.step >= 0).all() and self.centre.isfinite().all()),
            "the steps of axes must be finite and at least 0, their centres finite",
        )
        object.__setattr__(self, "key_bytes", totals[0] // 8)
        object.__setattr__(self, "layout", _layout(self))

    @property
    def device(self) -> torch.device:
        return self.bits.device

    def tensors(self) -> list[Tensor]:
        """bits, step and centre."""
        return [self.bits, self.step, self.centre]

    def to(self, device: torch.device | str) -> AxisBits:
        """The same on `device`, moved there once."""
        target = torch.device(device)
        if target == self.device:
            return self
        if target not in self.copies:
            with lasting_tensors():
                self.copies[target] = AxisBits(*(x.to(target) for x in self.tensors()))
        return self.copies[target]

    def __getitem__(self, layer: int) -> AxisBits:
        return AxisBits(*(x[layer] for x in self.tensors()))

    @classmethod
    def stack(cls, layers: list[AxisBits]) -> AxisBits:
        """Those of many layers as one, with the layer as leading dimension."""
        return cls(*(torch.stack(parts) for parts in zip(*(x.tensors() for x in layers), strict=True)))

    @classmethod
    def fit(cls, keys: Tensor, key_bytes: int) -> tuple[Tensor, AxisBits]:
        """The bits that lose least of `keys`, squared, and the order in which the axes then stand.

        Args:
            keys: [H, S, D] floating, S >= 1, a sample in coordinates where the error of a key is that of its scores.
            key_bytes: bytes of a key, 1 to D.

        Returns:
            A permutation [H, D] int64: axis i of the AxisBits is axis `permutation[:, i]` of `keys`. And the AxisBits [H, D].

        Raises `TypeError` or `ValueError` for what does not fit, NaN and infinity included.
        """
        return cls.shared_out(AxisErrors.of(keys), key_bytes)

    @classmethod
    def shared_out(cls, known: AxisErrors, key_bytes: int) -> tuple[Tensor, AxisBits]:
        """As `fit`, of what is known of the keys: each head shares out `8 * key_bytes` bits greedily, to the axis and width whose error
        falls most per bit."""
        require_int("key_bytes", key_bytes, 1, known.centre.shape[-1])
        choice = _allocate(known.errors, 8 * key_bytes)
        bits = torch.tensor(WIDTHS, device=choice.device)[choice]
        order = bits.argsort(dim=-1, descending=True, stable=True)
        step = known.steps.gather(-1, choice[..., None])[..., 0]
        parts = (x.gather(-1, order) for x in (bits.to(torch.uint8), step.float(), known.centre.float()))
        return order, cls(*parts)


class AxisErrors(NamedTuple):
    """What each axis of keys loses in each of `WIDTHS`.

    Attributes:
        centre: [H, D] mean of each axis.
        steps, errors: [H, D, 4] the best step around it, and the mean squared error then.
    """

    centre: Tensor
    steps: Tensor
    errors: Tensor

    @classmethod
    def of(cls, keys: Tensor) -> AxisErrors:
        """Of a sample of keys [H, S, D] floating, S >= 1. Raises `TypeError` or `ValueError` for others, NaN and infinity included."""
        require_float("keys", keys)
        require(
            keys.ndim == 3 and keys.numel() > 0,
            f"axis bits are fitted to keys [H, S, D], at least one; got {tuple(keys.shape)}",
        )
        require(bool(keys.isfinite().all()), "the sample of keys holds NaN or infinity: calibrate again")
        keys = keys.to(torch.promote_types(torch.float32, keys.dtype))
        centre = keys.mean(1)
        return cls(centre, *_quantisers(keys - centre[:, None]))


class AxisLayout(NamedTuple):
    """What turns levels into bytes and back. Each a table per head: [..., H, D] by axis, [..., H, 4 * key_bytes] by slot of 2 bits.

    Attributes:
        byte, shift: int64 and uint8, the byte and the bit in it at which an axis' level starts.
        top: uint8, an axis' highest level, which is also its mask.
        axis, is_start: int64 and uint8, the axis whose level starts in a slot, and 1 where there is one.
        origin: float32, what level 0 is read as.
        low: float32, where level 0 begins.
        per_step: float32, 1 / step; 0 for a step of 0 or next to it.
    """

    byte: Tensor
    shift: Tensor
    top: Tensor
    axis: Tensor
    is_start: Tensor
    origin: Tensor
    low: Tensor
    per_step: Tensor


@dataclass(frozen=True, eq=False)
class AxisCodes(Rows):
    """Keys [B, H, N, D] in the bits of their axes.

    Indexing takes batch and tokens, `x[:, :, a:b]` and `x[rows]`: the heads stay whole, as each has its own bits.

    Attributes:
        packed: [B, H, N, key_bytes] uint8.
        axes: the bits [H, D] of this layer. They follow `packed` to another device in `map`.

    Raises `ValueError` for parts that do not fit.
    """

    _wide: ClassVar[tuple[str, ...]] = ("packed",)
    _scales: ClassVar[tuple[str, ...]] = ()

    packed: Tensor
    axes: AxisBits

    def __post_init__(self) -> None:
        packed, axes = self.packed, self.axes
        require(axes.bits.ndim == 2, lambda: f"codes are of one layer, axes [H, D]; got {tuple(axes.bits.shape)}")
        heads = axes.bits.shape[0]
        require(
            packed.ndim == 4 and packed.shape[1] == heads and packed.shape[3] == axes.key_bytes,
            lambda: (
                f"axis codes must be [B, {heads}, N, {axes.key_bytes}] with all heads of their axes, got {tuple(packed.shape)}"
            ),
        )
        require(packed.dtype == torch.uint8, lambda: f"axis codes must be uint8, got {packed.dtype}")
        require(
            packed.device == axes.device,
            lambda: f"axis codes on {packed.device} need their axes there, not on {axes.device}",
        )

    @classmethod
    def encode(cls, keys: Tensor, axes: AxisBits) -> AxisCodes:
        """keys [B, H, N, D], in the basis that `axes` were made in, to half a step within the range of each axis and to its end
        beyond.

        Raises `TypeError` or `ValueError` for keys that do not fit, and for NaN or infinity, which these codes cannot hold: on the
        CPU always, on a GPU in checked mode. Elsewhere such a key is read as a finite one.
        """
        require_float("keys", keys)
        require(
            keys.ndim == 4 and axes.bits.ndim == 2 and (keys.shape[1], keys.shape[3]) == axes.bits.shape,
            lambda: (
                f"keys must be [B, H, N, D] for axes [H, D] of one layer; got {tuple(keys.shape)} and {tuple(axes.bits.shape)}"
            ),
        )
        if may_look(keys):
            require(
                bool(keys.isfinite().all()),
                "keys hold NaN or infinity, which axis bits cannot hold; find where it arises, or keep keys in a code with scales",
            )
        layout = axes.layout
        wide = torch.promote_types(torch.float32, keys.dtype)
        places = (keys.detach().to(wide) - _per_token(layout.low)) * _per_token(layout.per_step)
        places = places.nan_to_num(0.0)  # whatever a key holds, its levels stay in their own bits
        levels = places.floor().clamp(min=0).minimum(_per_token(layout.top).to(wide)).to(torch.uint8)
        fields = _gather(levels << _per_token(layout.shift), layout.axis) * _per_token(layout.is_start)
        packed = fields.unflatten(-1, (axes.key_bytes, 8 // _SLOT)).sum(-1, dtype=torch.uint8)  # they share no bit
        return cls(packed, axes)

    def to_dense(self, dtype: torch.dtype) -> Tensor:
        """The keys [B, H, N, D] in a floating dtype, in the basis."""
        layout, wide = self.axes.layout, torch.promote_types(torch.float32, dtype)
        levels = _gather(self.packed, layout.byte) >> _per_token(layout.shift) & _per_token(layout.top)
        step, origin = (_per_token(x).to(wide) for x in (self.axes.step, layout.origin))
        return torch.addcmul(origin, levels.to(wide), step).to(dtype)

    @property
    def shape(self) -> torch.Size:
        """[B, H, N, D], as of the keys."""
        return torch.Size((*self.packed.shape[:-1], self.head_dim))

    @property
    def head_dim(self) -> int:
        """Width D of the keys."""
        return self.axes.bits.shape[-1]

    def _replaced(self, parts: dict[str, Tensor | None]) -> AxisCodes:
        packed = parts["packed"]
        assert packed is not None
        return replace(self, packed=packed, axes=self.axes.to(packed.device))


# ---- details


def _layout(axes: AxisBits) -> AxisLayout:
    bits, slots = axes.bits.long(), axes.key_bytes * 8 // _SLOT
    start = bits.cumsum(-1) - bits  # [..., H, D] first bit of each axis
    is_kept = bits > 0
    place = (start // _SLOT).where(is_kept, slots)  # axes without bits go past the end, which is cut off
    number = torch.arange(bits.shape[-1], device=bits.device).expand(bits.shape)
    axis = number.new_full((*bits.shape[:-1], slots + 1), -1).scatter(-1, place, number)[..., :slots]
    half = 2.0 ** (bits - 1)
    return AxisLayout(
        byte=(start // 8).clamp(max=axes.key_bytes - 1),
        shift=(start % 8).to(torch.uint8),
        top=(2**bits - 1).to(torch.uint8),
        axis=axis.clamp(min=0),
        is_start=(axis >= 0).to(torch.uint8),
        origin=axes.centre + (0.5 - half) * axes.step,
        low=axes.centre - half * axes.step,
        per_step=_inverse(axes.step),
    )


def _per_token(table: Tensor) -> Tensor:
    """[H, C] as [H, 1, C], for rows [B, H, N, C]."""
    return table[:, None]


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, N, C] at the places [H, E] of each head: [B, H, N, E]."""
    return x.gather(-1, _per_token(index).expand(*x.shape[:-1], -1))


def _inverse(step: Tensor) -> Tensor:
    """1 / step; 0 where the step is 0, or too small for that."""
    inverse = 1 / step
    return inverse.where(inverse.isfinite(), 0)


def _quantisers(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Best step, and mean squared error with it, of each axis of rows [H, S, D] around zero: both [H, D, 4], one per width."""
    largest = rows.abs().amax(1)
    steps, errors = [torch.zeros_like(largest)], [rows.square().mean(1)]
    for half in (2 ** (bits - 1) for bits in WIDTHS[1:]):
        step, error = steps[0], errors[0]
        for clip in _CLIPS:
            tried = largest * (clip / half)
            levels = (rows * _inverse(tried)[:, None]).floor().clamp(-half, half - 1) + 0.5
            found = torch.addcmul(rows, levels, tried[:, None], value=-1).square().mean(1)
            step, error = tried.where(found < error, step), found.minimum(error)
        steps.append(step)
        errors.append(error)
    return torch.stack(steps, -1), torch.stack(errors, -1)


def _allocate(errors: Tensor, total: int) -> Tensor:
    """[H, D] int64 which width of `WIDTHS` each axis gets, from errors [H, D, 4]; each head spends all of `total` bits.

    `total` is a multiple of 8, at most 8 per axis. So nothing is left over: of 4 bits or more any axis below 8 takes some, and where
    2 are left an axis has 2 and takes them.
    """
    heads, axes, _ = errors.shape
    widths = torch.tensor(WIDTHS, device=errors.device)
    cost = widths - widths[:, None]  # [from, to]
    drop = (errors[..., :, None] - errors[..., None, :]) / cost.clamp(min=1)  # [H, D, from, to]
    drop = drop.masked_fill(cost <= 0, -torch.inf).flatten(0, 1)
    choice, left = errors.new_zeros(heads * axes, dtype=torch.long), torch.full((heads,), total, device=errors.device)
    each, head = torch.arange(heads * axes, device=errors.device), torch.arange(heads, device=errors.device)
    while bool((left > 0).any()):
        is_affordable = cost[choice] <= left.repeat_interleave(axes)[:, None]  # [H D, to]
        gain = drop[each, choice].masked_fill(~is_affordable, -torch.inf).view(heads, -1)
        best, place = gain.max(-1)
        axis, to = head * axes + place // len(WIDTHS), place % len(WIDTHS)
        spends = best > -torch.inf
        left = left - cost[choice[axis], to].where(spends, 0)
        choice[axis] = to.where(spends, choice[axis])
    return choice.view(heads, axes)

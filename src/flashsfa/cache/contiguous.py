"""`SparseKVCache`: the key codes and values of the tokens seen so far, in preallocated buffers.

A key costs 2·M + 3·K bytes in 16-bit dtypes (M dense dims, K kept features) instead of 2·D; values stay dense. In 8 bits
a key costs M + 2·K + 4 bytes and a value Dv + 4, the 4 being a float32 scale; `CodeFormat` counts what narrower ones cost. The
newest tokens and the first ones of a sequence can be kept as they come: a token is coded once, when it is no longer among the newest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..axes import AxisBits
from ..checks import (
    MOST_TOKENS,
    Seen,
    require,
    require_alike,
    require_int,
    require_keys_and_values,
    require_no_gradient,
    require_tensor,
    runs_plainly,
)
from ..coder import Coded, Coder
from ..codes import FeatureCodes
from ..contexts import lasting_tensors
from ..formats import CodeFormat
from ..narrow import NarrowRows
from ..ops import nvrtc, record
from ..ops.select.hopper import MOST_HEADS, MOST_ROWS
from ..ops.select.hopper.append import Buffers, Ring
from ..ops.select.hopper.compiler import Form
from ..ops.select.operators import (
    append,
    append_8_bit,
    append_held_op,
    append_op,
    has_fused,
    prepared_append,
)
from ..stored import ExactKV, KeyCodes, KVView, Prepared, Slices
from .buffers import PagedKernels, buffers_of, has_kernel, has_writer, prepares_steps, traced_form
from .exact import ExactSlots

_GROWTH_TOKENS = 256


class SparseKVCache(Coded):
    """Codes and values of up to `capacity` tokens; grows by a quarter (at least 256 tokens) when full.

    A call that raises, for whatever reason, leaves the cache as it was. What `torch.inference_mode()` filled can be continued
    outside of it. With `recent` or `first`, `len()` counts all tokens, and `codes`, `v` and `v_scale` are those of the coded ones.

    Args:
        topk, dense_dims: the key code, as in `topk_codes`.
        axes: in place of topk, the bits [Hkv, D] of each axis of keys that come in the coordinates of a basis.
        capacity: coded tokens to allocate on the first `append`, which also fixes batch, heads, widths, dtype and device.
        dtype: torch.int8 to keep codes and values in 8 bits with a scale a row, a `CodeFormat` for its widths, None to keep them as
            they come.
        recent: newest tokens that are kept as they come, whatever `dtype`. After a `crop` that reached into coded tokens, which
            stay coded, fewer; but see `mark`.
        first: first tokens of the sequence that are kept as they come, whatever `dtype`.
    """

    def __init__(
        self,
        topk: int | None = None,
        *,
        dense_dims: int = 0,
        axes: AxisBits | None = None,
        capacity: int = _GROWTH_TOKENS,
        dtype: torch.dtype | CodeFormat | None = None,
        recent: int = 0,
        first: int = 0,
    ) -> None:
        self.coder = Coder(topk, dense_dims, dtype, axes)
        require_int("capacity", capacity, 1)
        require_int("recent", recent, 0, MOST_TOKENS)
        require_int("first", first, 0, MOST_TOKENS)
        self.recent, self.first = recent, first
        self._first_capacity = capacity
        self._tokens = _Tokens()
        self._held: _Held | None = None
        self._mark: _Mark | None = None
        self._is_fixed = False

    def __len__(self) -> int:
        """Tokens held."""
        return self._tokens.held

    @property
    def length(self) -> int:
        """Tokens of the sequence so far: those held, and those before them that `keep_last` forgot."""
        return self._tokens.forgotten + self._tokens.held

    @property
    def capacity(self) -> int:
        """Coded tokens that fit without growing."""
        return self._first_capacity if self._held is None else self._held.capacity

    @property
    def input_dtype(self) -> torch.dtype | None:
        """The dtype that keys and values come in; None before the first."""
        return None if self._held is None else self._held.input_dtype

    @property
    def kv(self) -> KVView:
        """Codes, values and scales of the held tokens, [B, Hkv, N, ...], and the exact ones: views of the buffers."""
        return self._buffers().view(self._tokens)

    @property
    def codes(self) -> KeyCodes:
        """Codes of the coded keys, [B, Hkv, N, ...]: a view of the buffers."""
        return self.kv.codes

    @property
    def v(self) -> Tensor | NarrowRows:
        """[B, Hkv, N, Dv] values of the coded tokens: a view of the buffer."""
        return self.kv.v

    @property
    def v_scale(self) -> Tensor | None:
        """[B, Hkv, N] float32 scales of a `v` in int8, else None."""
        return None if self._held is None else self.kv.v_scale

    @property
    def nbytes(self) -> int:
        """Bytes of the held tokens: codes, values, scales and exact tokens."""
        return 0 if self._held is None else self.kv.nbytes

    @property
    def key_nbytes(self) -> int:
        """Bytes of the keys among `nbytes`."""
        if self._held is None:
            return 0
        kv = self.kv
        return kv.codes.nbytes + sum(part.k.nbytes for part in kv.exact)

    @property
    def nbytes_allocated(self) -> int:
        """Bytes of the buffers. That of the newest tokens has room for twice as many."""
        return 0 if self._held is None else self._held.kv.nbytes

    def append(self, k: Tensor, v: Tensor) -> KVView:
        """Code the keys k [B, Hkv, N, D], store them with v [B, Hkv, N, Dv], and return all that is held: what
        `sparse_feature_decode` takes. Of the tokens held and new, the `recent` newest and the `first` of the sequence stay as
        they came.

        Raises `TypeError` or `ValueError` if k and v do not fit each other or the cache, or ask for a gradient.
        """
        again = self._append_again(k, v)
        if again is not None:
            return again
        require(not self._is_fixed, "a cache of fixed size is filled by append_at, not append")
        form = (self.coder, _form(k, v)) if self.coder.axes is None and runs_plainly(k, v) else None
        if form is None or form not in _fitting:
            require_keys_and_values(k, v)
            require_no_gradient(k, v)
            self.coder.require_fit(k, v)
            if form is not None:
                _fitting.add(form)
        step = self._tokens.step(k.shape[2], self.first, self.recent)
        coded, held = self._tokens.coded + step.old + step.new, self._held
        if held is None:
            held = self._allocate(max(self._first_capacity, coded), k, v)
        else:
            for name, new, old in (("k", k, held.kv.codes.shape), ("v", v, held.kv.v.shape)):
                if new.shape[:2] != old[:2] or new.shape[-1] != old[-1]:
                    raise ValueError(
                        f"{name} {tuple(new.shape)} does not fit a cache of [B, Hkv, D] = {[*old[:2], old[-1]]}"
                    )
            _require_like(held, k)
            if coded > self.capacity:
                more = max(_GROWTH_TOKENS, self.capacity // 4)
                held = held.with_coded(0, self._tokens.coded, max(coded, self.capacity + more))
        held, tokens = self._write(held, k, v, step)
        seen, mark = held.view(tokens), self._mark
        if mark is not None:  # copies: the caller may use its own again
            mark = mark.followed_by(ExactKV(k.detach().clone(), v.detach().clone()))
        self._held, self._tokens, self._mark = held, tokens, mark
        return seen

    def allocate(self, k: Tensor, v: Tensor) -> None:
        """Allocate `capacity` zeroed tokens for the codes of keys such as k [B, Hkv, any, D] and values such as v, and
        hold them all: a cache of fixed size and address, filled by `append_at` and `write_at`. It codes every token, and holds the
        `first` ones and the `recent` newest as they came beside."""
        require_alike(k=k, v=v)
        self.coder.require_fit(k, v)
        held = self._allocate(self.capacity, k, v)
        for buffer in held.kv.tensors():
            buffer.zero_()
        with lasting_tensors():
            exact = ExactSlots(self.first, self.recent).empty(k, v)
        held = replace(held, kv=replace(held.kv, first=None, recent=exact))
        if not torch.compiler.is_compiling():
            for buffer in (*held.kv.tensors(), *held.kv.exact_tensors()):
                torch._dynamo.mark_static_address(buffer)  # else no CUDA graph is made of steps that write there
            if not self._is_wide:  # `append_op` takes those
                held = replace(held, traced_form=traced_form(k, v, held.kv))
        self._held, self._tokens, self._is_fixed = held, _Tokens(coded=held.kv.v.shape[2]), True

    def append_at(self, k: Tensor, v: Tensor, start: Tensor, slot: Tensor | None = None) -> KVView:
        """Code the keys k [B, Hkv, N, D] and store them with v [B, Hkv, N, Dv] from token `start` ([] int64, on the
        device) of an allocated cache on, in place and without a host sync, by one kernel on a Hopper GPU, of codes and values as they come on
        others too; return all that is held. Exact tokens take a few launches more, and have their positions in the sequence. `slot` is where in
        the buffers the codes go, if not to `start`. Whether there is room is the caller's to know: on a GPU what finds none may be left out."""
        at = start if slot is None else slot
        self._check_shapes(k, v)
        require_no_gradient(k, v)
        _require_like(self._buffers(), k)
        require_keys_and_values(k, v)
        if not self._write_in_one_launch(k, v, at):
            self._write_elsewhere(k, v, at)
        self.keep_exact(k, v, start)
        return self.kv

    def keep_exact(self, k: Tensor, v: Tensor, start: Tensor) -> None:
        """Of the keys k and values v at token `start` and the next ones, keep as they come what is among the first tokens or the
        newest, as `append_at` does; their codes are written by `write_at`."""
        held = self._buffers().kv.recent
        if held is None:
            return
        new = ExactSlots(self.first, self.recent).written(held, ExactKV(k.detach(), v.detach()), start.reshape(1))
        for buffer, x in ((held.k, new.k), (held.v, new.v), (held.positions, new.positions)):
            assert buffer is not None
            assert x is not None
            buffer.copy_(x)

    def write_at(self, coded: KVView, slots: Tensor) -> KVView:
        """Overwrite the tokens `slots` [N] (int64, on the device) of an allocated cache with `coded` ones [B, Hkv, N, ...], which
        `coder.encode` made, in place and without a host sync; return all that is held."""
        kv = self._buffers().kv
        fits = [(x.dtype, x.device, x.shape[:2], x.shape[3:]) for x in kv.tensors()]
        given = [(x.dtype, x.device, x.shape[:2], x.shape[3:]) for x in coded.tensors()]
        require(
            fits == given and all(x.shape[2] == slots.numel() for x in coded.tensors()),
            lambda: (
                f"coded tokens of {[tuple(x.shape) for x in coded.tensors()]} do not fit {slots.numel()} slots of a cache of "
                f"{[tuple(x.shape) for x in kv.tensors()]}; take those of its coder"
            ),
        )
        for buffer, new in zip(kv.tensors(), coded.tensors(), strict=True):
            buffer.index_copy_(2, slots, new.detach())
        return self.kv

    def mark(self) -> None:
        """From here on `crop` takes tokens back as if they had not come: what was coded on account of them is as it was. Until the
        next mark the cache holds the tokens that `append` brings as they come, too; to crop or to move ahead forgets the mark."""
        self._mark = _Mark(self._held, self._tokens)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens; a negative `length` forgets that many from the end."""
        require_int("length", length)
        kept = len(self) + length if length < 0 else length
        require(kept >= 0, lambda: f"cannot crop {len(self)} tokens to {kept}")
        mark, self._mark = self._mark, None
        if mark is None or not mark.tokens.held <= kept < len(self):
            self._tokens = self._tokens.cropped(kept)
            return
        self._held, self._tokens = mark.held or self._held, mark.tokens
        again = None if mark.since is None else mark.since.tokens(0, kept - len(self))
        if again is not None:
            self.append(again.k, again.v)

    def keep_last(self, length: int, capacity: int) -> None:
        """Forget all but the last `length` tokens and move those of them that are coded to buffers of `capacity` tokens. The first
        tokens of the sequence are forgotten like others, and none take their place."""
        require(0 <= length <= capacity, f"{length} tokens do not fit a capacity of {capacity}")
        before, tokens = self._tokens, self._tokens.without(len(self) - length)
        held = self._buffers().with_coded(before.coded - tokens.coded, before.coded, capacity)
        if held.kv.first is not None and tokens.first < before.first:
            held = held.with_first(before.first - tokens.first, before.first)
        self._held, self._tokens, self._mark = held, tokens, None

    def to(self, device: torch.device | str) -> None:
        """Move the buffers to `device`; further tokens must come from there."""
        self._change(lambda x: x.to(device))
        if self._held is not None:
            recent = self._held.kv.recent
            if recent is not None and recent.positions is not None:
                recent = replace(recent, positions=recent.positions.to(device))
                self._held = replace(self._held, kv=replace(self._held.kv, recent=recent))

    def select_batch(self, index: Tensor) -> None:
        """Keep the batch rows `index` [B'] (int64), in that order, repeats allowed: beam search, batch filters."""
        require_tensor("index", index)
        require(
            index.ndim == 1 and not index.is_floating_point(),
            lambda: f"index must be row numbers [B'], got {tuple(index.shape)} {index.dtype}",
        )
        if self._held is not None:
            index = index.to(self._held.kv.v.device)
            self._change(lambda x: x[index])

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every buffer alike, and what the mark holds."""
        before, mark = self._held, self._mark
        held = None if before is None else before.map(change)
        if mark is not None:
            marked = held if mark.held is before or mark.held is None else mark.held.map(change)
            mark = replace(mark, held=marked, since=None if mark.since is None else mark.since.map(change))
        self._held, self._mark = held, mark

    def _append_again(self, k: Tensor, v: Tensor) -> KVView | None:
        """As `append`, for tokens of a form that came before to the same buffers, as at each step of decode: what was checked then is
        not checked again. None for all other cases."""
        held = self._held
        if held is None or not held.writers or self._mark is not None or not runs_plainly(k, v):
            return None
        write, before = held.writers.get(_form(k, v)), self._tokens
        if write is None:
            return None
        first, recent = self.first, self.recent
        if not first and not recent:
            start, end = before.coded, before.coded + k.shape[2]
            if end > held.capacity:
                return None
            write(k, v, start)
            tokens = before._replace(coded=end)
        else:
            step = before.step(k.shape[2], first, recent)
            tokens = before.after(step)
            if not step.is_usual or not held.has_room(tokens):
                return None
            before.write(write, k, v, step)
        self._tokens = tokens
        return held.deferred(tokens)

    def _write(self, held: _Held, k: Tensor, v: Tensor, step: _Step) -> tuple[_Held, _Tokens]:
        """Store k and v where nothing is held yet: the first tokens of the sequence and the newest as they are, and codes of those
        that leave the newest. The buffers, others where they are full, and what they hold then."""
        tokens, fresh = self._tokens, ExactKV(k, v)
        if not held.has_room(tokens.after(step)):
            held, tokens = held.with_recent(tokens.slot, tokens.slot + tokens.recent), tokens._replace(slot=0)
        kv, after = held.kv, tokens.after(step)
        write = held.writer(k, v) if step.is_usual else None
        if write is not None:
            tokens.write(write, k, v, step)
            return held, after
        if kv.first is not None and step.first:
            _put(kv.first, fresh.tokens(0, step.first), tokens.first)
        new = fresh.tokens(step.first, step.first + step.new)
        if kv.recent is not None and step.old:
            old = kv.recent.map(lambda x: x[:, :, tokens.slot : tokens.slot + step.old])
            new = old if new is None else old.followed_by(new)
        if new is not None:
            self._code(held, new.k, new.v, tokens.coded)
        if kv.recent is not None and step.recent:
            _put(kv.recent, fresh.tokens(k.shape[2] - step.recent), after.slot + after.recent - step.recent)
        return held, after

    def _code(self, held: _Held, k: Tensor, v: Tensor, start: int) -> None:
        """Code k and write it with v at coded token `start`, where nothing is held yet."""
        kv, codes, write = held.kv, held.kv.codes, None
        if has_kernel(k, v):
            write = prepared_append(k, v, *buffers_of(kv, with_recent=False))
        if write is not None:
            write(k, v, start)
            return
        if isinstance(codes, FeatureCodes) and isinstance(kv.v, Tensor) and has_fused(k):
            parts = codes.dense, codes.values, codes.indices
            if codes.scale is None:
                append(k, v, *parts, kv.v, start)
            else:
                assert kv.v_scale is not None
                append_8_bit(k, v, (*parts, codes.scale, kv.v, kv.v_scale), start)
            return
        for buffer, new in zip(kv.tensors(), self.coder.encode(k, v).tensors(), strict=True):
            buffer[:, :, start : start + new.shape[2]] = new

    def _write_in_one_launch(self, k: Tensor, v: Tensor, at: Tensor) -> bool:
        """Code k and write it with v at slot `at` and the next of buffers of fixed size, on a Hopper GPU; False, with nothing written,
        elsewhere."""
        (batch, heads, n, _), held, capacity = k.shape, self._buffers(), self.capacity
        if not nvrtc.is_hopper(k.device) or batch * heads > MOST_HEADS:
            return False
        if self._is_wide and batch * heads * n > MOST_ROWS:
            return False  # Triton's kernel is faster
        traced, form = torch.compiler.is_compiling(), held.traced_form
        if traced and form is None:
            return False
        slots = at + torch.arange(n, device=at.device)
        # [B, N], as of a pool with a page per sequence
        rows = torch.arange(batch, device=at.device)[:, None] * capacity + slots
        rows = rows.where((slots >= 0) & (slots < capacity), -1)  # not written, rather than to another sequence
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k.detach(), v.detach()))
        if form is not None and traced:
            _, buffers = buffers_of(held.kv, with_recent=False)
            append_held_op(k, v, rows, list(form), *buffers[:-2])
            return True
        write = held.pools.find((), lambda: replace(held.kv, recent=None), k, v)
        if write is not None:
            write(k, v, rows)
        return write is not None

    def _write_elsewhere(self, k: Tensor, v: Tensor, at: Tensor) -> None:
        """As `_write_in_one_launch`, on other devices, and for what its kernel is not for."""
        if not self._is_wide:
            self.write_at(self.coder.encode(k, v), at + torch.arange(k.shape[2], device=at.device))
            return
        kv = self._buffers().kv
        assert isinstance(kv.codes, FeatureCodes)
        assert isinstance(kv.v, Tensor)
        record.record("append", "triton" if has_fused(k) else "torch", "into a cache of fixed size")
        write = append if runs_plainly(k, v) and has_fused(k) else append_op
        write(k.detach(), v.detach(), kv.codes.dense, kv.codes.values, kv.codes.indices, kv.v, at)

    @property
    def _is_wide(self) -> bool:
        """Whether codes and values are kept as they come."""
        return self.coder.bits is None and self.coder.axes is None

    def _check_shapes(self, k: Tensor, v: Tensor) -> None:
        kv = self._buffers().kv
        batch, heads, _, head_dim = kv.codes.shape
        v_dim = kv.v.shape[-1]
        require(
            k.ndim == v.ndim == 4
            and k.shape[:3] == v.shape[:3]
            and (*k.shape[:2], k.shape[3], v.shape[3]) == (batch, heads, head_dim, v_dim),
            lambda: (
                f"k {tuple(k.shape)} and v {tuple(v.shape)} do not fit a cache of [B, Hkv, D] = {[batch, heads, head_dim]} and "
                f"Dv = {v_dim}"
            ),
        )

    def _buffers(self) -> _Held:
        if self._held is None:
            raise RuntimeError("the cache is empty: append keys and values first")
        return self._held

    def _allocate(self, capacity: int, k: Tensor, v: Tensor) -> _Held:
        """New buffers of `capacity` tokens for keys such as k and values such as v."""

        def exact(tokens: int) -> ExactKV | None:
            return ExactKV(k, v).map(lambda x: x.new_empty((*x.shape[:2], tokens, x.shape[3]))) if tokens else None

        with lasting_tensors():
            kv = self.coder.empty(capacity, k, v)
            if self.first or self.recent:
                # with twice the room, the newest tokens move to a new buffer once in `recent` tokens at most
                kv = replace(kv, first=exact(self.first), recent=exact(2 * self.recent))
            return _Held(kv, k.dtype)


class _Tokens(NamedTuple):
    """How many tokens are held, and where.

    Attributes:
        forgotten: tokens of the sequence before the held ones.
        first, coded, recent: tokens in each of the three buffers, in the order of the sequence.
        slot: where the newest tokens begin in their buffer; the other two begin at 0.
    """

    forgotten: int = 0
    first: int = 0
    coded: int = 0
    recent: int = 0
    slot: int = 0

    @property
    def held(self) -> int:
        return self.first + self.coded + self.recent

    def step(self, count: int, first: int, recent: int) -> _Step:
        """Where `count` more tokens go, if `first` of the sequence and `recent` newest ones are exact."""
        to_first = min(count, max(0, first - self.forgotten - self.held))
        count -= to_first
        leaving = max(0, self.recent + count - recent)
        old = min(leaving, self.recent)
        return _Step(to_first, old, leaving - old, count - (leaving - old))

    def after(self, step: _Step) -> _Tokens:
        """What is held after a step, in buffers that have room for it."""
        first, coded = self.first + step.first, self.coded + step.old + step.new
        return _Tokens(self.forgotten, first, coded, self.recent - step.old + step.recent, self.slot + step.old)

    def write(self, write: _Writer, k: Tensor, v: Tensor, step: _Step) -> None:
        """Have `write` do a step that is a usual one."""
        write(k, v, self.coded, Ring(step.old, self.slot, self.slot + self.recent) if step.recent else None)

    def cropped(self, length: int) -> _Tokens:
        """The first `length` of the held tokens."""
        first = min(self.first, length)
        coded = min(self.coded, length - first)
        return self._replace(first=first, coded=coded, recent=min(self.recent, length - first - coded))

    def without(self, count: int) -> _Tokens:
        """The held tokens but the first `count`."""
        count = max(0, count)
        first = min(self.first, count)
        coded = min(self.coded, count - first)
        recent = count - first - coded
        return _Tokens(
            self.forgotten + count, self.first - first, self.coded - coded, self.recent - recent, self.slot + recent
        )


class _Step(NamedTuple):
    """Where the tokens of an append go: the next `first` to the first ones, `old` of the newest held and the next `new` to the coded
    ones, and the last `recent` to the newest."""

    first: int
    old: int
    new: int
    recent: int

    @property
    def is_usual(self) -> bool:
        """Whether all new tokens go to one place: the newest, or where none are kept the coded ones."""
        return not self.first and not (self.new and self.recent)


@dataclass(frozen=True)
class _Held:
    """Buffers of `capacity` coded tokens and of the exact ones, and the dtype that keys and values come in.

    `writers` are what was prepared for tokens of a form that fits, None for those that are written otherwise; `readers` what attention
    prepared; `pools` what writes to buffers of fixed size, and `traced_form` their form for torch.compile.
    """

    kv: KVView
    input_dtype: torch.dtype
    traced_form: tuple[int, ...] | None = None
    writers: dict[_Form, _Writer | None] = field(init=False, default_factory=dict)
    _firsts: dict[int, ExactKV | None] = field(init=False, default_factory=dict)  # views of so many first tokens

    def __reduce__(self) -> tuple[type[_Held], tuple[KVView, torch.dtype]]:
        return _Held, (self.kv, self.input_dtype)  # a copy has buffers of its own, and what writes to them

    def has_room(self, tokens: _Tokens) -> bool:
        """Whether the buffers hold so many, where they lie."""
        recent = self.kv.recent
        return tokens.coded <= self.capacity and (recent is None or tokens.slot + tokens.recent <= recent.k.shape[2])

    def writer(self, k: Tensor, v: Tensor) -> _Writer | None:
        """What does a usual step of tokens such as k and v for less of the host's time, where something does."""
        if not has_writer(k, v):
            return None
        form = _form(k, v)
        if form not in self.writers:
            self.writers[form] = prepared_append(k, v, *self._buffers)
        return self.writers[form]

    def view(self, tokens: _Tokens) -> KVView:
        """The tokens held."""
        # a compiler cannot trace how layouts are kept, and tokens with places have no order that a count could tell
        return self._sliced(tokens) if self.kv.is_placed or torch.compiler.is_compiling() else self.deferred(tokens)

    def deferred(self, tokens: _Tokens) -> KVView:
        """As `view`, of tensors that nothing traces and that lie one token after another."""
        readers = self.readers if self._prepares_steps else None
        if not self._has_exact:
            return KVView.deferred(self, tokens.coded, readers)
        first, recent = self._exact_layouts
        if tokens.first not in self._firsts:
            self._firsts[tokens.first] = _exact_tokens(first, 0, tokens.first)
        exact = self._firsts[tokens.first], _exact_tokens(recent, tokens.slot, tokens.recent)
        return KVView.deferred(self, tokens.coded, readers, *exact)

    @functools.cached_property
    def readers(self) -> Prepared:
        """What attention prepared. Made when it is asked for, as a compiler cannot trace how."""
        return Prepared()

    @functools.cached_property
    def pools(self) -> PagedKernels:
        """What writes to buffers of fixed size."""
        return PagedKernels()

    @functools.cached_property
    def _prepares_steps(self) -> bool:
        return prepares_steps(self.kv.codes.device)

    def _sliced(self, tokens: _Tokens) -> KVView:
        """As `view`, of tensors that are placed or traced."""
        kv = self.kv.map(lambda x: x[:, :, : tokens.coded])
        if self.kv.is_placed or not self.kv.exact:
            return kv
        first = None if self.kv.first is None else self.kv.first.tokens(0, tokens.first)
        recent = None if self.kv.recent is None else self.kv.recent.tokens(tokens.slot, tokens.slot + tokens.recent)
        return replace(kv, first=first, recent=recent)

    def codes(self, count: int) -> KeyCodes:
        """Of so many tokens: for a third of the host's time of slices, as strides are known and parts that fit one another still do."""
        if torch.compiler.is_compiling():
            return Slices(self.kv).codes(count)
        if count == self.capacity:  # as after a first prompt
            return self.kv.codes.of_views(*(x.detach() for x in self.kv.codes.tensors()))
        return self.kv.codes.of_views(*(x.tokens(0, count) for x in self._code_layouts))

    def values(self, count: int) -> tuple[Tensor | NarrowRows, Tensor | None]:
        """v and v_scale of so many tokens, likewise."""
        if torch.compiler.is_compiling():
            return Slices(self.kv).values(count)
        if count == self.capacity:
            return self.kv.values_of([x.detach() for x in self.kv.value_tensors()])
        return self.kv.values_of([x.tokens(0, count) for x in self._value_layouts])

    @property
    def capacity(self) -> int:
        """Coded tokens that there is room for."""
        return self.kv.v.shape[2]

    @functools.cached_property
    def _has_exact(self) -> bool:
        return bool(self.kv.exact)

    @functools.cached_property
    def _buffers(self) -> tuple[Form, Buffers]:
        return buffers_of(self.kv)

    @functools.cached_property
    def _code_layouts(self) -> list[_Layout]:
        return list(map(_Layout.of, self.kv.codes.tensors()))

    @functools.cached_property
    def _value_layouts(self) -> list[_Layout]:
        return list(map(_Layout.of, self.kv.value_tensors()))

    @functools.cached_property
    def _exact_layouts(self) -> list[list[_Layout]]:
        """Of the first tokens, and of the newest."""
        return [[] if x is None else [_Layout.of(x.k), _Layout.of(x.v)] for x in (self.kv.first, self.kv.recent)]

    def map(self, change: Callable[[Tensor], Tensor]) -> _Held:
        """Every buffer changed alike."""
        with lasting_tensors():
            first, recent = (None if x is None else x.map(change) for x in (self.kv.first, self.kv.recent))
            return replace(self, kv=replace(self.kv.map(change), first=first, recent=recent))

    def with_coded(self, start: int, end: int, capacity: int) -> _Held:
        """The coded tokens `start` to `end` at the front of new buffers of `capacity`."""
        with lasting_tensors():
            return replace(self, kv=self.kv.map(lambda x: _moved(x, start, end, capacity)))

    def with_first(self, start: int, end: int) -> _Held:
        """As `with_coded`, for the first tokens of the sequence."""
        assert self.kv.first is not None
        with lasting_tensors():
            return replace(
                self, kv=replace(self.kv, first=self.kv.first.map(lambda x: _moved(x, start, end, x.shape[2])))
            )

    def with_recent(self, start: int, end: int) -> _Held:
        """As `with_coded`, for the newest tokens. What attention prepared is of the coded ones, and stays; what writes has the old places."""
        assert self.kv.recent is not None
        with lasting_tensors():
            held = replace(
                self, kv=replace(self.kv, recent=self.kv.recent.map(lambda x: _moved(x, start, end, x.shape[2])))
            )
        if "readers" in vars(self):
            held.readers.update(self.readers)
        return held


class _Layout(NamedTuple):
    """A buffer [B, H, C, ...]: its [B, H], what follows C, its strides, and where it begins."""

    buffer: Tensor
    heads: tuple[int, ...]
    width: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, x: Tensor) -> _Layout:
        return cls(x, x.shape[:2], x.shape[3:], x.stride(), int(x.storage_offset()))

    def tokens(self, start: int, count: int) -> Tensor:
        """A view of `count` tokens from `start` on."""
        shape = *self.heads, count, *self.width
        return self.buffer.as_strided(shape, self.strides, self.offset + start * self.strides[2])


def _exact_tokens(layouts: list[_Layout], start: int, count: int) -> ExactKV | None:
    if not layouts or not count:
        return None
    k, v = layouts
    return ExactKV(k.tokens(start, count), v.tokens(start, count))


@dataclass(frozen=True)
class _Mark:
    """What a cache held at a mark, and the tokens that came `since`. Appends write behind it, so its buffers are as they were."""

    held: _Held | None
    tokens: _Tokens
    since: ExactKV | None = None

    def followed_by(self, new: ExactKV) -> _Mark:
        return replace(self, since=new if self.since is None else self.since.followed_by(new))


# Coders, and forms of keys and values: each layer of each new cache meets the same, but for axes, which are of one layer.
_fitting = Seen()
_Form: TypeAlias = tuple[object, ...]
_Writer: TypeAlias = Callable[..., None]  # an `Append`, for Hopper or the CPU


def _form(k: Tensor, v: Tensor) -> _Form:
    """All that checks of keys and values look at, but for numbers and gradients."""
    return k.shape, k.stride(), v.shape, v.stride(), k.dtype, v.dtype, k.device, v.device


def _moved(x: Tensor, start: int, end: int, capacity: int) -> Tensor:
    """A new buffer of `capacity` tokens that begins with the tokens `start` to `end` of x [B, H, N, C]."""
    new = torch.empty((*x.shape[:2], capacity, *x.shape[3:]), dtype=x.dtype, device=x.device)
    new[:, :, : end - start] = x[:, :, start:end]
    return new


def _put(buffer: ExactKV, tokens: ExactKV | None, start: int) -> None:
    """Write `tokens` to the slots of `buffer` from `start` on."""
    assert tokens is not None
    for x, new in ((buffer.k, tokens.k), (buffer.v, tokens.v)):
        x[:, :, start : start + new.shape[2]] = new


def _require_like(held: _Held, k: Tensor) -> None:
    """k comes in the dtype and from the device of what is held."""
    if k.dtype != held.input_dtype:
        raise TypeError(f"k is {k.dtype} but the cache holds {held.input_dtype}; cast them to one dtype")
    require(
        k.device == held.kv.v.device,
        lambda: f"k is on {k.device} but the cache is on {held.kv.v.device}; move them together",
    )

"""`KVView`: what a cache holds, as decode reads it; `ExactKV`: tokens of it that are not coded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from .axes import AxisCodes
from .codes import FeatureCodes, all_dense_codes
from .contexts import without_autocast
from .narrow import NarrowCodes, NarrowRows

# How the keys of a cache may be held.
KeyCodes: TypeAlias = FeatureCodes | NarrowCodes | NarrowRows | AxisCodes


@dataclass(frozen=True, eq=False)
class ExactKV:
    """Tokens held as they came: keys k [B, Hkv, E, D] and values v [B, Hkv, E, Dv].

    Without `positions` they are tokens without a code, in order. `positions` [B or 1, E] int64 name the key of a view, 0 to N - 1, in
    place of whose code each of them stands; a position that is none of these, or not held yet, marks an empty slot.
    """

    k: Tensor
    v: Tensor
    positions: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.k.nbytes + self.v.nbytes

    def tensors(self) -> list[Tensor]:
        """Keys and values, and positions where there are any."""
        return [self.k, self.v] if self.positions is None else [self.k, self.v, self.positions]

    def map(self, change: Callable[..., Tensor], *others: ExactKV) -> ExactKV:
        """Keys and values changed alike, together with their like of `others`; positions stay."""
        return ExactKV(change(self.k, *(x.k for x in others)), change(self.v, *(x.v for x in others)), self.positions)

    def followed_by(self, further: ExactKV) -> ExactKV:
        """These tokens and `further` ones, both with positions or both without."""
        positions = None
        if self.positions is not None and further.positions is not None:
            positions = torch.cat((self.positions, further.positions), dim=1)
        with without_autocast(self.k.device):
            return replace(self.map(lambda held, new: torch.cat((held, new), dim=2), further), positions=positions)

    def tokens(self, start: int, end: int | None = None) -> ExactKV | None:
        """The tokens `start` to `end`; None for none."""
        positions = None if self.positions is None else self.positions[:, start:end]
        part = ExactKV(self.k[:, :, start:end], self.v[:, :, start:end], positions)
        return part if part.k.shape[2] else None


class Source(Protocol):
    """Whatever makes the tensors of a deferred view: codes, and v and v_scale, of so many tokens of the buffers `kv`."""

    @property
    def kv(self) -> KVView: ...

    def codes(self, count: int) -> KeyCodes: ...

    def values(self, count: int) -> tuple[Tensor | NarrowRows, Tensor | None]: ...


class Prepared:
    """What was prepared for calls over the same buffers: whatever serves calls of a form, None where nothing does."""

    def __init__(self) -> None:
        self._by_form: dict[tuple[Any, ...], Any] = {}
        self._last: tuple[tuple[Any, ...], Any] = (), None

    def find(self, form: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What serves `form`, which `make` makes when it comes first."""
        last, found = self._last
        if last != form:  # as a rule it is the same: to compare costs the host less than to hash
            if form not in self._by_form:
                self._by_form[form] = make()
            found = self._by_form[form]
            self._last = form, found
        return found

    def update(self, other: Prepared) -> None:
        """Have all that `other` has."""
        self._by_form.update(other._by_form)


@dataclass(frozen=True, eq=False)
class KVView:
    """Stored keys and values: what a cache's `append` returns and `sparse_feature_decode` takes. Unpacks as `codes, v`.

    The tokens of a sequence are `first`, the coded ones and `recent`, in this order; or, where the exact ones have positions, all
    tokens are coded and these are seen in place of their codes.

    Attributes:
        codes: key codes [B, Hkv, N, ...], or pools of pages [P, Hkv, page_size, ...]; `NarrowRows` of keys that keep every feature,
            `AxisCodes` of keys in a number of bits per axis.
        v: [B, Hkv, N, Dv] values, or a pool of pages; `NarrowRows` where a format packs them.
        v_scale: [B, Hkv, N] float32 factor of each row of an int8 v, else None.
        kv_lens: [B] integer number of valid keys of each sequence; None for all N.
        page_table: [B, max_pages] int32 for pools of pages, else None: key j of sequence b is slot j % page_size of page
            `page_table[b, j // page_size]`.
        first, recent: tokens before and after the coded ones that are held as they came; None for none. Those with positions are
            `recent`, whatever they are, and have lengths and pages beside them.
        prepared: what attention has prepared for views of the same buffers of coded tokens, which differ in their numbers of tokens and
            where exact ones lie, and which the cache keeps on the CPU and on a Hopper GPU; None for other views, and for whatever is
            made of a view.
    """

    codes: KeyCodes
    v: Tensor | NarrowRows
    v_scale: Tensor | None = None
    kv_lens: Tensor | None = None
    page_table: Tensor | None = None
    first: ExactKV | None = None
    recent: ExactKV | None = None
    prepared: Prepared | None = field(default=None, init=False, repr=False)
    _source: Source | None = field(default=None, init=False, repr=False)
    _count: int = field(default=0, init=False, repr=False)

    @classmethod
    def deferred(
        cls,
        source: Source,
        n_coded: int,
        prepared: Prepared | None = None,
        first: ExactKV | None = None,
        recent: ExactKV | None = None,
    ) -> KVView:
        """A view of `n_coded` tokens, whose codes, and v and v_scale, the `source` makes when they are asked for, between exact ones: what was
        prepared for the buffers asks for none, and to make them takes the host as long as to launch it."""
        view = object.__new__(cls)
        view.__dict__.update(_source=source, _count=n_coded, prepared=prepared, first=first, recent=recent)
        return view

    def __getattr__(self, name: str) -> Any:
        source = self._source
        if source is not None and name == "codes":
            self.__dict__["codes"] = source.codes(self._count)
        elif source is not None and name in ("v", "v_scale"):
            v, v_scale = source.values(self._count)
            self.__dict__.update(v=v, v_scale=v_scale)
        else:
            raise AttributeError(f"a {type(self).__name__} has no {name}")
        return self.__dict__[name]

    def __getstate__(self) -> dict[str, Any]:
        # a copy has tensors of its own
        return {x.name: getattr(self, x.name) for x in fields(self)} | {"prepared": None, "_source": None, "_count": 0}

    def __iter__(self) -> Iterator[KeyCodes | Tensor | NarrowRows]:
        return iter((self.codes, self.v))

    @property
    def form(self) -> KVView:
        """A view whose tensors are there, of any number of tokens, coded as those of this one."""
        return self if self._source is None else self._source.kv

    @property
    def is_deferred(self) -> bool:
        """Whether its codes and values are what a source holds, so that they fit one another. Its exact tokens may be anyone's."""
        return self._source is not None

    @property
    def is_narrow(self) -> bool:
        """Whether codes or values are packed in the widths of a format, which `widened` turns into floats."""
        form = self.form
        return not isinstance(form.codes, FeatureCodes) or isinstance(form.v, NarrowRows)

    @property
    def has_wide_values(self) -> bool:
        """Whether values are held as they came, without a scale."""
        form = self.form
        return form.v_scale is None and isinstance(form.v, Tensor)

    @property
    def plain_values(self) -> Tensor | None:
        """`v` where it holds the values of all tokens as they came; else None."""
        if self.first is not None or self.recent is not None or not self.has_wide_values:
            return None
        assert isinstance(self.v, Tensor)
        return self.v

    @property
    def key_budget(self) -> tuple[int, int]:
        """topk and dense_dims of the key code."""
        codes = self.form.codes
        return (codes.shape[-1], 0) if isinstance(codes, (NarrowRows, AxisCodes)) else (codes.topk, codes.dense_dims)

    @property
    def key_shape(self) -> tuple[int, int, int, int]:
        """[B, Hkv, N, D] of the coded keys, or that of pools of pages."""
        batch, heads, _, head_dim = self.form.codes.shape
        return batch, heads, self.n_coded, head_dim

    @property
    def n_coded(self) -> int:
        """Keys with a code per sequence, or per page."""
        return self.v.shape[2] if self._source is None else self._count

    @property
    def n(self) -> int:
        """Keys that there is room for per sequence, coded or not."""
        n, first, recent = self.n_coded, self.first, self.recent
        if self.page_table is not None:
            return self.page_table.shape[1] * n
        if recent is not None:
            if recent.positions is not None:
                return n
            n += recent.k.shape[2]
        return n if first is None else n + first.k.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, values and exact tokens, scales included."""
        return sum(x.nbytes for x in self.tensors()) + sum(part.nbytes for part in self.exact)

    @property
    def exact(self) -> list[ExactKV]:
        """Those of `first` and `recent` that there are."""
        return [part for part in (self.first, self.recent) if part is not None]

    @property
    def is_placed(self) -> bool:
        """Whether there are exact tokens, and they stand in place of codes."""
        return self.recent is not None and self.recent.positions is not None

    @property
    def n_first(self) -> int:
        """Tokens before the coded ones."""
        return 0 if self.first is None else self.first.k.shape[2]

    def tensors(self) -> list[Tensor]:
        """Codes, values and their scales; not the exact tokens."""
        return [*self.codes.tensors(), *self.value_tensors()]

    def exact_tensors(self) -> list[Tensor]:
        """Those of the exact tokens."""
        return [x for part in self.exact for x in part.tensors()]

    def value_tensors(self) -> list[Tensor]:
        """Values and their scales."""
        if isinstance(self.v, NarrowRows):
            return self.v.tensors()
        return [self.v] if self.v_scale is None else [self.v, self.v_scale]

    def of_views(self, codes: list[Tensor], values: list[Tensor]) -> KVView:
        """A view with others in place of `codes.tensors()` and `value_tensors()`, alike of each: what fits is not checked again, which
        would take the host as long as to make them."""
        return KVView(self.codes.of_views(*codes), *self.values_of(values))

    def values_of(self, views: list[Tensor]) -> tuple[Tensor | NarrowRows, Tensor | None]:
        """v and v_scale, likewise."""
        if isinstance(self.v, NarrowRows):
            return self.v.of_views(*views), None
        return views[0], views[1] if len(views) == 2 else None

    def map(self, change: Callable[..., Tensor], *others: KVView) -> KVView:
        """The view with each tensor of `tensors()` changed alike, together with its like of `others`, which keep them the same way."""
        v_scale = None if self.v_scale is None else change(self.v_scale, *(x.v_scale for x in others))
        codes: Any = self.codes.map(change, *(x.codes for x in others))  # type: ignore[arg-type]
        if isinstance(self.v, NarrowRows):
            v: Tensor | NarrowRows = self.v.map(change, *(x.v for x in others))  # type: ignore[arg-type]
        else:
            v = change(self.v, *(x.v for x in others))
        return KVView(codes, v, v_scale, self.kv_lens, self.page_table, self.first, self.recent)

    def coded(self, start: int, end: int) -> KVView:
        """The coded tokens `start` to `end`, counted from the first coded one, alone."""
        return replace(self.map(lambda x: x[:, :, start:end]), first=None, recent=None)

    def exact_alone(self, exact: ExactKV) -> KVView:
        """A view of `exact` tokens and no coded one."""
        return KVView.deferred(Slices(self.form), 0, recent=exact)

    def since(self, start: int) -> KVView:
        """The view without the first `start` tokens."""
        after_first = max(0, start - self.n_first)
        after_coded = max(0, after_first - self.n_coded)
        first = None if self.first is None else self.first.tokens(start)
        recent = None if self.recent is None else self.recent.tokens(after_coded)
        return replace(self.map(lambda x: x[:, :, after_first:]), first=first, recent=recent)

    def followed_by(self, further: ExactKV) -> KVView:
        """The view with `further` tokens behind, as they are."""
        if self.recent is not None:
            further = self.recent.followed_by(further)
        return replace(self, recent=further)

    def all_exact(self) -> ExactKV:
        """`first` and `recent` in one, with their positions."""
        if self.is_placed:
            assert self.recent is not None
            return self.recent
        here = torch.arange(self.n, device=self.v.device)[None]
        positions = torch.cat((here[:, : self.n_first], here[:, self.n_first + self.n_coded :]), dim=1)
        parts = self.exact
        return replace(parts[0].map(lambda *x: torch.cat(x, dim=2), *parts[1:]), positions=positions)

    def is_exact(self) -> Tensor:
        """[B or 1, N] bool, True for keys that are seen as they came."""
        keys = self._replaced_keys()
        found = torch.zeros(len(keys), self.n + 1, dtype=torch.bool, device=keys.device)
        return found.scatter(1, keys, True)[:, : self.n]

    def _replaced_keys(self) -> Tensor:
        """[B or 1, E] the key in place of which each of `all_exact()` is seen; n for an empty slot."""
        positions = self.all_exact().positions
        assert positions is not None
        return positions.where((positions >= 0) & (positions < self.n), self.n)

    def rows(self, dtype: torch.dtype) -> ExactKV:
        """All tokens in order in `dtype`, the coded keys as sparse rows."""
        if not self.n_coded and len(self.exact) == 1 and not self.is_placed:
            return self.exact[0]
        coded = self.widened(dtype)
        assert isinstance(coded.codes, FeatureCodes)
        assert isinstance(coded.v, Tensor)
        rows = ExactKV(coded.codes.to_dense(), coded.v)
        if self.is_placed:
            return self._placed(rows)
        parts = [self.first, rows, self.recent]
        there = [part for part in parts if part is not None]
        return there[0] if len(there) == 1 else there[0].map(lambda *x: torch.cat(x, dim=2), *there[1:])

    def _placed(self, rows: ExactKV) -> ExactKV:
        """`rows` of all tokens with the exact ones in their places."""
        keys = self._replaced_keys()[:, None, :, None]

        def put(x: Tensor, exact: Tensor) -> Tensor:
            at = keys.expand(*exact.shape)
            return F.pad(x, (0, 0, 0, 1)).scatter(2, at, exact.to(x.dtype))[:, :, : self.n]

        return rows.map(put, self.all_exact())

    def contiguous_pages(self) -> KVView:
        """The pages gathered to [B, Hkv, max_pages * page_size, ...]; a view without pages as it is."""
        if self.page_table is None:
            return self
        # entries past a sequence's length may hold anything
        pages = self.page_table.long().clamp(0, self.v.shape[0] - 1)

        def gather(pool: Tensor) -> Tensor:
            return pool[pages].transpose(1, 2).flatten(2, 3)  # [B, max_pages, Hkv, page_size, ...] before

        return replace(self.map(gather), page_table=None)

    def scaled(self, dtype: torch.dtype) -> KVView:
        """Codes and values in 8 bits beside a scale in `dtype`, their scales taken in; others, packed ones too, as they are."""
        codes, v = self.codes, self.v
        if isinstance(codes, FeatureCodes) and codes.scale is not None:
            codes = codes.to(dtype)
        if self.v_scale is not None:
            assert isinstance(v, Tensor)
            v = (v.float() * self.v_scale[..., None]).to(dtype)
        return replace(self, codes=codes, v=v, v_scale=None)

    def widened(self, dtype: torch.dtype) -> KVView:
        """Codes and values of fewer bits in `dtype`, their scales taken in; others as they are."""
        if isinstance(self.codes, FeatureCodes) and self.codes.scale is None and self.has_wide_values:
            return self
        kv = self.scaled(dtype)
        codes, v = kv.codes, kv.v
        if isinstance(codes, (NarrowRows, AxisCodes)):
            codes = all_dense_codes(codes.to_dense(dtype))
        elif isinstance(codes, NarrowCodes):
            codes = codes.to_codes(dtype)
        if isinstance(v, NarrowRows):
            v = v.to_dense(dtype)
        return replace(kv, codes=codes, v=v)


class Slices(NamedTuple):
    """The first tokens of `kv`, as slices: a `Source` that PyTorch can trace."""

    kv: KVView

    def codes(self, count: int) -> KeyCodes:
        return self.kv.coded(0, count).codes

    def values(self, count: int) -> tuple[Tensor | NarrowRows, Tensor | None]:
        coded = self.kv.coded(0, count)
        return coded.v, coded.v_scale


del KVView.v_scale  # a default is an attribute of the class, too, and a deferred view would have it without being asked

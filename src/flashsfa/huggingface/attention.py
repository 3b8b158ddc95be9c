"""The attention and mask functions that transformers calls under the name "sfa"."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from ..attention import sparse_feature_attention
from ..basis import FeatureBasis
from ..budget import FeatureBudget
from ..checks import require
from ..coder import Coder
from ..codes import FeatureCodes, all_dense_codes, topk_codes
from ..decode import attend_cached
from ..formats import cache_bits
from ..mask import Mask, checked_window
from ..ops.prefill import exact_band, masked
from ..scores import ScoreRules
from ..stored import ExactKV, KVView
from .positions import channel_first
from .settings import SFASettings
from .structure import require_no_dropout

NAME = "sfa"


class LayerCoding(nn.Module):
    """How one attention layer codes its queries and keys: budget, the place of its channel, and as buffers its basis.

    `channel` rotary features are brought to the front, where the dense channel is (`positions.channel_first`); 0 for none.
    `coder` is that of the layer's growing cache; `settings` tell which tokens it keeps, and shows to prompts, as they come.

    The buffers follow the model from device to device, and the coder's bits per axis with them, but keep their precision: rounded to 16
    bits the two sides of a basis no longer undo one another. They are not part of the state dict: the checkpoint stays the dense
    model's, the basis has its own file.
    """

    query: Tensor
    key: Tensor
    exact_factor: Tensor | None

    def __init__(
        self,
        budget: FeatureBudget,
        value_tolerance: float = 0.0,
        basis: FeatureBasis | None = None,
        channel: int = 0,
        settings: SFASettings | None = None,
    ) -> None:
        super().__init__()
        self.budget, self.value_tolerance, self.channel = budget, value_tolerance, channel
        self.settings = settings or SFASettings(budget.topk)
        self._axes = axes = None if basis is None else basis.axes
        bits = cache_bits(self.settings.cache_dtype)
        self.coder = Coder(budget.topk, budget.dense_dims, bits) if axes is None else Coder(None, 0, bits, axes)
        self._basis_digest = None if basis is None else _digest(basis.key)
        in_axes = None if axes is None else axes.key_bytes
        self._kept_as = (channel, self._basis_digest, in_axes, bits, self.settings.recent, self.settings.first)
        if basis is not None:
            for name in ("query", "key"):
                self.register_buffer(name, getattr(basis, name), persistent=False)
        factor = None
        if basis is not None and axes is None:
            gain = (basis.key.double() * basis.query.double()).sum(-2)  # [Hkv, D]
            gain[:, : budget.dense_dims] = 1
            factor = (1 / gain).float()
        self.register_buffer("exact_factor", factor, persistent=False)

    @classmethod
    def lossless(cls, head_dim: int) -> LayerCoding:
        """The code that keeps every feature: all but the last in the dense channel, which leaves top-1 of one."""
        return cls(FeatureBudget.lossless(head_dim))

    @property
    def key_code(self) -> tuple[Any, ...]:
        """What a cached key and value depend on: two layers of one key code can go on with each other's caches."""
        return (self.budget.topk, self.budget.dense_dims, *self._kept_as)

    def queries(self, q: Tensor) -> Tensor:
        """q [B, Hq, N, D] in the layer's coordinates."""
        if self.channel:
            return channel_first(q, self.channel)
        return q if self._basis_digest is None else self._basis(q.device).transform_query(q)

    def keys(self, k: Tensor) -> Tensor:
        """k [B, Hkv, N, D] in the layer's coordinates."""
        if self.channel:
            return channel_first(k, self.channel)
        return k if self._basis_digest is None else self._basis(k.device).transform_key(k)

    @property
    def factor(self) -> Tensor | None:
        """That of `ScoreRules` for the layer's `queries`: exact tokens are scored as the dense model does, as the gain of a basis makes up for
        what codes drop. It lies where the queries are."""
        return self._buffers["exact_factor"]  # which takes the host less than an attribute

    def _basis(self, device: torch.device) -> FeatureBasis:
        """The basis on the device of what it is for: that of an offloaded layer is known when it runs."""
        if self.query.device != device:
            self.to(device)
        return FeatureBasis(self.query, self.key)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerCoding:
        def moved(x: Tensor) -> Tensor:
            device = fn(x).device
            return (
                x if device.type == "meta" else x.to(device)
            )  # weights on "meta" lie elsewhere; a basis would be lost

        super()._apply(moved, recurse)
        if self._axes is not None:  # moved now, as a compiled call cannot: it sees no values
            axes = self._axes.to(self.key.device)
            if axes is not self.coder.axes:
                self.coder = replace(self.coder, axes=axes)
        return self


class SeenKV(NamedTuple):
    """Keys and values that some queries of a call see.

    Attributes:
        kv: the keys and values, up to that of the last of the queries.
        queries: how many queries.
        start: where kv begins among the tokens that the cache holds.
    """

    kv: KVView
    queries: int
    start: int = 0


class CachedKeys:
    """What a cache of codes hands to the attention function in place of keys.

    Models pass it on as they do keys; a model that does more with them is told so.

    Attributes:
        views: codes and values, and exact tokens, that the queries of the call see one after another: one view for all, or several.
            The lengths of a cache of fixed size are the slots filled so far.
        coding: of the layer that coded them; None for lossless codes.
        values: what is handed out beside these keys: all values, or where the cache holds some otherwise those that `came`.
        dtype: of the values as the call brought them, and so of the attention's output.
        positions: [N] int64 position in the sequence of each slot's token, negative for an empty slot; None where
            slot j holds token j. One query sees all tokens held, in any order; several need them in order, up to the
            last query's own.
        is_static: whether the cache is of fixed size, and may be announced as longer than what it hands out.
    """

    def __init__(
        self,
        views: Sequence[SeenKV],
        coding: LayerCoding | None,
        came: Tensor,
        dtype: torch.dtype,
        *,
        positions: Tensor | None = None,
        is_static: bool = False,
    ) -> None:
        self.views, self.coding, self.dtype, self.positions, self.is_static = views, coding, dtype, positions, is_static
        self.kv = kv = views[-1].kv  # what the last query sees
        values = kv.plain_values
        self.values = came if values is None else values

    @property
    def shape(self) -> torch.Size:
        """[B, Hkv, N, D] of the keys that the call sees, coded or not."""
        batch, heads, _, head_dim = self.kv.key_shape
        n = self.views[-1].start - self.views[0].start + self.kv.n
        return torch.Size((batch, heads, n, head_dim))

    def per_view(self) -> list[tuple[slice, slice, KVView]]:
        """Each view, with its queries among those of the call and its keys among those that the call sees."""
        parts, done, first = [], 0, self.views[0].start
        for view in self.views:
            begin = view.start - first
            parts.append((slice(done, done + view.queries), slice(begin, begin + view.kv.n), view.kv))
            done += view.queries
        return parts

    def __getitem__(self, index: Any) -> Any:
        raise ValueError(_WORKS_ON_KEYS.format("indexing"))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what pickle and copy ask for
            raise AttributeError(name)
        raise ValueError(_WORKS_ON_KEYS.format(name))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ValueError(_WORKS_ON_KEYS.format(getattr(function, "__name__", function)))


_WORKS_ON_KEYS = (
    "a cache of codes holds no keys, and this model asks for them ({}): if it is dense, pass a dense cache or none; if it is switched, it "
    "works on the keys in its cache before it attends to them: call it with use_cache=False, or disable it"
)


class OtherMask:
    """A mask of several queries that is more than causality, a window and padding. It is made when a layer asks for it: some models
    have masks made that none of their layers uses."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make

    @functools.cached_property
    def visible(self) -> Tensor:
        """[B, 1, N_q, tokens] bool, True where a query sees a token."""
        return self._make()

    def contiguous(self) -> OtherMask:
        """Itself: generate() asks it of every mask that it hands on."""
        return self

    def of(self, key: Tensor | CachedKeys) -> Tensor:
        """[B, 1, N_q, N] bool: `visible` at the slots of `key`."""
        visible = self.visible.to(key.device if isinstance(key, Tensor) else key.values.device)
        positions = None if isinstance(key, Tensor) else key.positions
        if positions is None:
            return visible[..., : key.shape[2]]  # a static cache announces its capacity, and may hand out fewer keys
        return visible[..., positions.clamp(min=0)] & (positions >= 0)


# What models and their callers hand to an attention function that changes nothing in it: positions are in queries and keys, and
# the rest concerns what becomes of the output.
_WITHOUT_EFFECT = frozenset(
    (
        "cache_position", "deterministic", "logits_to_keep", "num_items_in_batch", "output_hidden_states", "output_router_logits",
        "position_ids", "return_dict", "use_cache",
    )
)  # fmt: skip


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | CachedKeys,
    value: Tensor,
    attention_mask: Tensor | OtherMask | None,
    dropout: float = 0.0,  # some libraries hand it on by place
    **rest: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer, with the signature of transformers' AttentionInterface.

    `key` are those of a cache of codes, or dense keys where the caller keeps no cache or a dense one;
    `attention_mask` is what `attention_mask` below returned. A layer left dense by `enable(layers=...)` runs
    with every feature kept. `softcap` is Gemma 2's, `s_aux` [Hq] the sinks of gpt-oss.

    Raises `ValueError` for an argument that would change the result of attention in a way unknown here, by its name.
    """
    return _attend(module, getattr(module, "sfa", None), query, key, value, attention_mask, dropout, **rest)


def dense_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | OtherMask | None,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[Tensor, None]:
    """`attention_forward` with every feature kept, whatever the layer's code."""
    return _attend(module, None, query, key, value, attention_mask, dropout, **rest)


def _attend(
    module: nn.Module,
    coding: LayerCoding | None,
    query: Tensor,
    key: Tensor | CachedKeys,
    value: Tensor,
    attention_mask: Tensor | OtherMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    # each layer of each step comes by: what is not asked for is not called
    if dropout:
        require_no_dropout(module, dropout)
    if is_causal is not None or not kwargs.keys() <= _WITHOUT_EFFECT:
        _require_known(module, is_causal, kwargs)
    padding = visible = None
    if attention_mask is not None or (isinstance(key, CachedKeys) and key.positions is not None):
        if isinstance(attention_mask, OtherMask):
            visible = attention_mask.of(key)
        else:
            padding = _padding(attention_mask, key)
    window = None if sliding_window is None else checked_window(sliding_window)
    rules = _Rules(coding, padding, visible, window, scaling, softcap, s_aux)
    if isinstance(key, CachedKeys):
        out = _attend_held(query, key, value, rules)
    else:
        out = _attend_at_once(query, key, value, rules)
    return out.transpose(1, 2).contiguous(), None  # some models look at it by .view


class _Rules(NamedTuple):
    """What a layer's call asks for beside queries, keys and values: as `_attend`'s arguments, with `padding` [B, N], or `visible`
    [B, 1, N_q, N] where the mask is another one."""

    coding: LayerCoding | None
    padding: Tensor | None
    visible: Tensor | None
    window: int | None
    scaling: float | None
    softcap: float | None
    sinks: Tensor | None

    def scores(self, query: Tensor) -> ScoreRules:
        factor = None if self.coding is None else self.coding.factor
        return ScoreRules.of(query, self.scaling, self.softcap, self.sinks, factor)


def _attend_at_once(query: Tensor, key: Tensor, value: Tensor, rules: _Rules) -> Tensor:
    """[B, Hq, N_q, Dv] over keys as they come, of a call without a cache or with a dense one: pruned and rounded as a cache would."""
    coding = rules.coding
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, norms and RoPE leave them in float32
    if coding is None:
        budget = FeatureBudget.of(key.shape[-1], key.shape[-1])
    else:
        query, key, budget = coding.queries(query), coding.keys(key), coding.budget
    shows_exact = coding is not None and coding.settings.shows_exact
    if coding is not None and coding.settings.rounds and not shows_exact:
        rounded = coding.coder.rounded(key, value)
        key, value = rounded.k.to(key.dtype), rounded.v.to(value.dtype)
        # a kept feature that was rounded to zero is one still, for its gradient
        budget = replace(budget, topk=budget.sparse_dims)
    if rules.visible is not None:
        require(
            not shows_exact,
            "recent, first and prefill='dense' go without a cache with causal masks alone, and this call asks for another: call the "
            "model with a cache, or without packed sequences and images",
        )
        return masked.attend(query, KVView(_codes(key, budget), value), budget, rules.visible, rules.scores(query))
    if shows_exact:
        assert coding is not None
        exact, coded = ExactKV(key, value), coding.coder.rounded(key, value)
        mask, recent, first = Mask(True, rules.window, rules.padding), coding.settings.recent, coding.settings.first
        return exact_band.attend(query, exact, coded, budget, mask, rules.scores(query), recent=recent, first=first)
    return sparse_feature_attention(
        query, key, value, topk=budget.topk, topk_query=budget.topk_query, dense_dims=budget.dense_dims,
        query_pattern=budget.query_pattern, is_causal=True, scale=rules.scaling, softcap=rules.softcap, sinks=rules.sinks,
        window=rules.window, key_padding_mask=rules.padding,
    )  # fmt: skip


def _attend_held(query: Tensor, key: CachedKeys, value: Tensor, rules: _Rules) -> Tensor:
    """[B, Hq, N_q, Dv] over what a cache of codes holds."""
    coding = rules.coding
    if coding is not key.coding or value is not key.values:
        _require_own_cache(coding, key, value)
    query = query.to(value.dtype)
    if coding is not None:
        query = coding.queries(query)
    if len(key.views) == 1:
        kv = key.kv if value is key.values else replace(key.kv, v=value)  # a model may have worked on the values
        out = _attend_view(query, kv, rules)
    else:
        outs = [
            _attend_view(
                query[:, :, rows], kv, rules._replace(
                    padding=None if rules.padding is None else rules.padding[:, keys],
                    visible=None if rules.visible is None else rules.visible[..., rows, keys],
                ),
            )
            for rows, keys, kv in key.per_view()
        ]  # fmt: skip
        out = torch.cat(outs, dim=2)
    return out.to(key.dtype)


def _attend_view(query: Tensor, kv: KVView, rules: _Rules) -> Tensor:
    """[B, Hq, N_q, Dv] of queries in the coordinates of the keys."""
    coding = rules.coding
    if coding is None:
        budget, tolerance, factor = FeatureBudget.lossless(query.shape[-1]), 0.0, None
    else:
        budget, tolerance, factor = coding.budget, coding.value_tolerance, coding.factor
    if rules.visible is not None:
        return masked.attend(query, kv, budget, rules.visible, rules.scores(query))
    return attend_cached(
        query, kv, budget, window=rules.window, key_padding_mask=rules.padding, scale=rules.scaling, softcap=rules.softcap,
        sinks=rules.sinks, exact_factor=factor, value_tolerance=tolerance,
    )  # fmt: skip


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | OtherMask | None:
    """[B, 1, 1, kv_length] bool, False where a key is padding, or None. Causality and the window are the operator's. An `OtherMask`
    for several queries and a mask that is more than these.

    A mask of four dimensions is one that transformers hands on as it is. transformers never allows a skip in the
    decode steps of a static cache, so there a sliding window is known by `use_vmap`, which any other mask sets.
    """
    may_skip = allow_is_causal_skip or (q_length == 1 and not use_vmap)
    is_window = local_size is not None and may_skip and local_size != getattr(config, "attention_chunk_size", None)
    if mask_function is not causal_mask_function and not is_window:
        require(
            not torch.compiler.is_compiling() or q_length == 1,
            "compiled models run causal masks, with or without a sliding window and padding; this call asks for another mask (packed "
            "sequences by position_ids, or a custom mask; a compiled model that is called without a cache cannot tell, and takes an "
            "attention_mask of ones)",
        )
        other = OtherMask(
            functools.partial(
                sdpa_mask, batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size,
                allow_is_causal_skip=False, use_vmap=use_vmap, **kwargs,
            )
        )  # fmt: skip
        return other.visible if q_length == 1 else other  # what one query does not see is padding to it
    if attention_mask is None:
        return None
    visible = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    if _may_look(visible) and bool(visible.all()):
        return None
    return F.pad(visible, (0, kv_length - visible.shape[1]))[:, None, None]


# Known to transformers from import on: a pickled model that is switched imports this module, and nothing else of ours.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)


def _require_known(module: nn.Module, is_causal: bool | None, kwargs: dict[str, Any]) -> None:
    """Raise `ValueError` for an argument that asks for another attention."""
    require(is_causal in (None, True), "sfa is causal attention, and this call asks for is_causal=False")
    require(
        not kwargs.get("output_attentions"),
        "sfa forms no attention weights that could be returned: leave out output_attentions=True",
    )
    unknown = [
        name for name, value in kwargs.items() if name not in _WITHOUT_EFFECT and (isinstance(value, Tensor) or value)
    ]
    require(
        not unknown,
        lambda: (
            f"{type(module).__name__} is given {', '.join(sorted(unknown))}, which may change its attention in a way that sfa does "
            "not know: leave it out of the call, or disable the model"
        ),
    )


def _require_own_cache(coding: LayerCoding | None, key: CachedKeys, value: Tensor) -> None:
    """Raise `ValueError` if a layer is to go on with keys that were coded for another one, or with values that were changed."""
    due, made = (None if x is None else x.key_code for x in (coding, key.coding))
    require(
        made == due,
        "the cache was made for other settings than the model has now: make a new one after enable",
    )
    if value is key.values:
        return
    require(
        key.kv.v_scale is None and not key.kv.is_narrow,
        "this model works on the values in its cache before it attends to them, which fewer bits do not allow: enable it with "
        "cache_dtype=None",
    )
    require(
        not key.kv.exact and len(key.views) == 1,
        "this model works on the values in its cache before it attends to them, which exact tokens do not allow: enable it with "
        "recent=0 and first=0",
    )


def _may_look(mask: Tensor) -> bool:
    """Whether to look at a mask's values. On a GPU that is a sync, but one for all layers, which run faster unmasked."""
    return not torch.compiler.is_compiling() and not (mask.is_cuda and torch.cuda.is_current_stream_capturing())


def _padding(mask: Tensor | None, key: Tensor | CachedKeys) -> Tensor | None:
    """[B, N] bool, True where a slot of `key` holds padding or nothing."""
    positions = None if isinstance(key, Tensor) else key.positions
    if mask is None:
        return None if positions is None else (positions < 0).expand(key.shape[0], -1)
    n = key.shape[2]
    require(
        mask.ndim == 4 and mask.shape[1:3] == (1, 1) and mask.dtype == torch.bool
        and (mask.shape[3] == n or (isinstance(key, CachedKeys) and key.is_static)),
        f"sfa takes a 2D attention mask of ones and zeros, one for each of {n} keys, or none; got a mask "
        f"{tuple(mask.shape)} of {mask.dtype}",
    )  # fmt: skip
    padding = ~mask[:, 0, 0]  # [B, tokens]
    if positions is None:
        return padding[:, :n]  # a static cache announces its capacity, and may hand out fewer keys
    return padding[:, positions.clamp(min=0)] | (positions < 0)


def _codes(k: Tensor, budget: FeatureBudget) -> FeatureCodes:
    """The codes of keys k [B, Hkv, N, D], which a budget of all features leaves as they are."""
    if budget.topk + budget.dense_dims == budget.head_dim:
        return all_dense_codes(k)
    return topk_codes(k, budget.topk, dense_dims=budget.dense_dims)


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.detach().to("cpu", torch.float64).contiguous().numpy().tobytes()).hexdigest()

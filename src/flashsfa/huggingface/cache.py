"""`SparseCache` and `StaticSparseCache`: transformers' cache interface over `SparseKVCache`.

A layer's `update` returns codes in place of dense keys; the attention function knows both. Layers whose config has a
sliding window keep the codes of the window alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from ..cache.contiguous import SparseKVCache
from ..checks import require, require_int
from ..contexts import lasting_tensors
from ..decode import FEW_QUERIES
from ..stored import ExactKV, KVView
from .attention import CachedKeys, LayerCoding, SeenKV
from .structure import DENSE_LAYERS, dense_cache_layers, unwrap


class SparseCache(DynamicCache):
    """The cache of a model that `enable` switched; it grows with the tokens, and `generate()` makes one by itself.

    Layers that were left dense keep transformers' own layer. With `enable(cache_dtype="int8")` the others keep codes and
    values in 8 bits, with `enable(recent=, first=)` the newest and the first tokens as they come. A `DynamicCache` to whoever asks, for it does what that does.

    Args:
        model: the switched model.
        offloading: keep all layers but the one at work in the memory of the CPU, as transformers' offloaded cache does.
    """

    def __init__(self, model: Any, *, offloading: bool = False) -> None:
        codings, layers = _codings(model), dense_cache_layers(model)
        for index, coding in codings.items():
            if index < len(layers):  # an assistant that exits early runs the first layers alone
                window = _window(layers[index])
                layers[index] = SparseCacheLayer(coding) if window is None else SparseSlidingLayer(coding, window)
        Cache.__init__(self, layers=layers, offloading=offloading, offload_only_non_sliding=False)

    def expect_guesses(self, after: int | None) -> None:
        """Of the tokens to come, those behind the first `after` of the sequence are guesses, as in speculative decoding; None for
        none. Each then sees, and leaves behind, what it would if it came alone, whatever the cache keeps as it comes, and `crop`
        takes guesses back as if they had not come."""
        for layer in self.layers:
            if isinstance(layer, SparseCacheLayer):
                layer.guesses_after = after

    def __iter__(self) -> Iterator[NoReturn]:
        raise TypeError("a cache of codes holds no keys that could be handed out layer by layer: pass the cache itself")

    @property
    def nbytes(self) -> int:
        """Bytes of keys (codes) and values of the tokens held, read from the live tensors."""
        return cache_nbytes(self)["total"]


class StaticSparseCache(Cache):
    """The cache of a switched model in buffers of fixed size and address, for torch.compile and CUDA graphs.

    Layers that were left dense hold lossless codes.

    Args:
        model: the switched model.
        max_cache_len: tokens that fit.

    Raises `ValueError` for a model that is not switched.
    """

    def __init__(self, model: Any, max_cache_len: int) -> None:
        require_int("max_cache_len", max_cache_len, 1)
        codings, layers = _codings(model), []
        for index, dense in enumerate(dense_cache_layers(model)):
            if not isinstance(dense, CacheLayerMixin):  # the state of a layer without attention, of fixed size as it is
                layers.append(dense)
                continue
            window, coding = _window(dense), codings.get(index)
            kind = StaticSparseLayer if window is None or window >= max_cache_len else StaticSparseSlidingLayer
            layers.append(kind(coding, max_cache_len if window is None else min(window, max_cache_len), max_cache_len))
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return cache_nbytes(self)["total"]


def cache_nbytes(cache: Cache) -> dict[str, int]:
    """Bytes of the tokens held by any dynamic cache, or of a static one's buffers: {"keys", "values", "total"}, scales
    included, read from the live tensors; 0 before the first token. Layers that hold no keys do not count."""
    if not isinstance(cache, Cache):
        raise TypeError(f"cache must be a Cache of transformers, got {type(cache).__name__}")
    keys = values = 0
    for layer in cache.layers:
        if isinstance(layer, _CodedLayer):
            if layer.is_initialized and len(layer.store):
                keys += layer.store.key_nbytes
                values += layer.store.nbytes - layer.store.key_nbytes
        elif getattr(layer, "keys", None) is not None:
            keys += layer.keys.nbytes
            values += layer.values.nbytes
    return {"keys": keys, "values": values, "total": keys + values}


def require_readable(cache: Any) -> None:
    """Raise `ValueError` if a cache that a switched model is called with, of whichever class, has layers that hold keys neither
    as codes nor all of them as they are: layers of fixed size, in fewer bits, or unknown."""
    cache = _of_self_attention(cache)
    if cache is None:
        return
    kinds = {type(layer) for layer in cache.layers}
    if cache.layer_class_to_replicate is not None:
        kinds.add(cache.layer_class_to_replicate)
    for kind in kinds:
        if not _is_readable(kind):
            raise ValueError(
                f"a {type(cache).__name__} of {getattr(kind, '__name__', kind)} holds dense keys in a form that sfa does not read: "
                "pass flashsfa.huggingface.SparseCache(model) or StaticSparseCache(model, max_cache_len), or no cache"
            )


def require_first_tokens(model: Any, cache: Any) -> None:
    """Raise `ValueError` if a dense cache that a switched model is called with has dropped tokens from the front of a layer that keeps the
    first ones as they came: which those are its keys do not tell."""
    cache = _of_self_attention(cache)
    if cache is None:
        return
    dropped = {
        index for index, layer in enumerate(cache.layers)
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.get_mask_sizes(1)[1]
    }  # fmt: skip
    if dropped:
        kept = [index for index, coding in _codings(model).items() if index in dropped and coding.settings.first]
        require(
            not kept,
            lambda: (
                f"a {type(cache).__name__} drops the first tokens of layers with a sliding window (here {kept}), and first keeps them as they "
                "came: pass past_key_values=flashsfa.huggingface.SparseCache(model), or enable the model with first=0"
            ),
        )


def _of_self_attention(argument: Any) -> Cache | None:
    """The cache among what a model is called with, of an encoder and a decoder that of the latter; None for all else."""
    if isinstance(argument, EncoderDecoderCache):
        argument = argument.self_attention_cache
    return argument if isinstance(argument, Cache) else None


def _is_readable(kind: Any) -> bool:
    if not isinstance(kind, type):
        return False
    return kind in DENSE_LAYERS or issubclass(kind, _CodedLayer) or not issubclass(kind, CacheLayerMixin)


class _CodedLayer(CacheLayerMixin):
    """What the layers share: codes and values in a `SparseKVCache`."""

    is_croppable = True
    store: SparseKVCache
    dtype: torch.dtype  # of the first keys and values, which later ones are brought to
    device: torch.device

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self.store.select_batch(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.store.v.shape[0]).repeat_interleave(repeats))

    def offload(self) -> None:
        if self.is_initialized:
            self.store.to("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self.store.to(self.device)


class SparseCacheLayer(_CodedLayer):
    """One layer that grows, in preallocated chunks."""

    is_sliding = False

    def __init__(self, coding: LayerCoding) -> None:
        super().__init__()
        self._coding = coding
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device, self.dtype = value_states.device, value_states.dtype
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[CachedKeys, Tensor]:
        _require_no_gradient(key_states, value_states)
        dtype, coding = self.dtype if self.is_initialized else value_states.dtype, self._coding
        k, v = coding.keys(key_states.to(dtype)), value_states.to(dtype)  # autocast leaves keys in float32
        if self.guesses_after is None:
            views = [self._append(k, v)]
        else:
            views = [self._append(*part) for part in self._apart(k, v, self.guesses_after)]
        if not self.is_initialized:  # after all that may fail
            self.lazy_initialization(key_states, value_states)
        keys = CachedKeys(views, coding, v, value_states.dtype)
        return keys, keys.values

    def _apart(self, k: Tensor, v: Tensor, guesses_after: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The tokens of a call, in the order in which the cache takes them: together, but for guesses where what a token sees
        depends on how many come at once."""
        settings, count = self._coding.settings, k.shape[2]
        together = count
        if settings.recent or settings.prefill == "dense":
            together = min(count, max(0, guesses_after - self.get_seq_length()))
        if together == count:
            yield k, v
            return
        if together:
            yield k[:, :, :together], v[:, :, :together]
        self.store.mark()
        for i in range(together, count):
            yield k[:, :, i : i + 1], v[:, :, i : i + 1]

    def _append(self, k: Tensor, v: Tensor) -> SeenKV:
        """Store tokens; what their queries see."""
        start, count, store = self._first_seen(), k.shape[2], self.store
        sees_dense = count > 1 and self._coding.settings.prefill == "dense"
        earlier = store.kv if sees_dense and len(store) else None
        kv = store.append(k, v)
        if sees_dense:
            own = ExactKV(k, v)
            kv = kv.exact_alone(own) if earlier is None else earlier.followed_by(own)
        return SeenKV(kv.since(start) if start else kv, count, start)

    def replace_prompt(self, k: Tensor, v: Tensor) -> None:
        """Hold the keys k [B, Hkv, N, D] and values v of fewer tokens in place of all that is held. The sequence is as long as it was."""
        before = self.get_seq_length()
        self.reset()
        self.update(k, v)
        self._pruned, self._kept_prompt = before - len(self.store), len(self.store)

    def _first_seen(self) -> int:
        """The first token held that the next query sees."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return len(self.store) + query_length, self._pruned

    def get_seq_length(self) -> int:
        return self._pruned + len(self.store)

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        coder, settings = self._coding.coder, self._coding.settings
        self.guesses_after: int | None = None
        self._pruned = self._kept_prompt = 0  # tokens of a prompt that are gone, and those left of it
        self.store = SparseKVCache(
            **coder.arguments(), recent=settings.recent,
            first=settings.first,
        )  # fmt: skip
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove -`tokens_to_remove` tokens from the end, as transformers counts."""
        _require_removal(tokens_to_remove)
        removed = int(tokens_to_remove)  # some versions of transformers pass a tensor
        require(
            not self._pruned or len(self.store) + removed >= self._kept_prompt,
            f"{-removed} tokens cannot be taken back: some are of a prompt that was pruned, which keeps too few to tell. Take back no more than came "
            "after it, or make a new cache",
        )
        if self.get_seq_length():
            self.store.crop(removed or len(self.store))  # of 0 it would forget all


class SparseSlidingLayer(SparseCacheLayer):
    """One layer with a sliding window: it forgets what no later query sees, a quarter of a window at a time."""

    is_sliding = True

    def __init__(self, coding: LayerCoding, window: int) -> None:
        self.sliding_window = window
        self.record_past = False
        super().__init__(coding)

    def activate_past_recording(self) -> None:
        """From now on forget in `crop` alone, so that tokens can be taken back."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[CachedKeys, Tensor]:
        keys, values = super().update(key_states, value_states)
        if not self.record_past:
            self._forget()
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        seen = self.get_seq_length()
        offset = max(0, seen - self.sliding_window + 1)
        return seen - offset + query_length, offset

    def get_seq_length(self) -> int:
        return self.store.length

    def get_max_length(self) -> int:
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        _require_removal(tokens_to_remove)
        if not self.get_seq_length():
            return
        tokens_to_remove = int(tokens_to_remove)
        remaining = self.get_seq_length() + tokens_to_remove
        if len(self.store) + tokens_to_remove < min(remaining, self.sliding_window - 1):
            raise RuntimeError(
                f"{-tokens_to_remove} tokens cannot be taken back: the window has moved on. Call "
                "activate_past_recording() before the first of them"
            )
        super().crop(tokens_to_remove)
        self._forget()

    def _first_seen(self) -> int:
        return max(0, len(self.store) - self.sliding_window + 1)

    def _forget(self) -> None:
        window = self.sliding_window
        if len(self.store) > window + window // 4:
            self.store.keep_last(window - 1, capacity=window + window // 4 + FEW_QUERIES)


class StaticSparseLayer(_CodedLayer):
    """One layer in buffers of fixed size, written at positions that stay on the device.

    Args:
        coding: the layer's code; None for lossless codes.
        slots: tokens held; max_cache_len: tokens that the whole sequence may have.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, coding: LayerCoding | None, slots: int, max_cache_len: int) -> None:
        super().__init__()
        self._coding, self._slots, self.max_cache_len = coding, slots, max_cache_len
        self._coded_by = coding  # None for a layer that is dense, whatever codes it is kept in
        self._is_empty = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if self._coding is None:
            self._coding = LayerCoding.lossless(key_states.shape[-1])
        self.device, self.dtype, self._kv_heads = value_states.device, value_states.dtype, key_states.shape[1]
        coder = self._coding.coder
        recent, first = (
            min(x, self.max_cache_len) for x in (self._coding.settings.recent, self._coding.settings.first)
        )
        self.store = SparseKVCache(
            **coder.arguments(), capacity=self._slots,
            recent=recent, first=first,
        )  # fmt: skip
        self.store.allocate(key_states.to(self.dtype), value_states)
        with lasting_tensors():
            self._kv_lens = torch.zeros(key_states.shape[0], dtype=torch.int64, device=self.device)  # [B], all the same
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self._kv_lens)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[CachedKeys, Tensor]:
        _require_no_gradient(key_states, value_states)
        count, was_empty = key_states.shape[2], self._is_empty
        # the number held is on the device: looked at where that costs no sync
        looks = not was_empty and key_states.device.type == "cpu" and not torch.compiler.is_compiling()
        held = int(self._kv_lens[0]) if looks else 0
        require(
            held + count <= self.max_cache_len,
            lambda: f"{count} tokens do not fit a cache of {self.max_cache_len} that holds {held}",
        )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._coding is not None
        batch, heads = self._kv_lens.shape[0], self._kv_heads
        require(
            key_states.shape[:2] == (batch, heads),
            lambda: (
                f"a cache of fixed size holds keys [{batch}, {heads}, ...], got {tuple(key_states.shape)}: make a new one for another batch size or "
                "model"
            ),
        )
        coordinates = self._coding.keys(key_states.to(self.dtype))  # autocast leaves keys in float32
        values = value_states.to(self.dtype)
        seen, positions = self._store(coordinates, values, was_empty)
        self._kv_lens.add_(count)  # in place: `seen` may hold this tensor
        self._is_empty = False
        keys = CachedKeys(
            [SeenKV(seen, count)], self._coded_by, values, value_states.dtype, positions=positions, is_static=True
        )
        return keys, keys.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self) -> int | Tensor:
        """Tokens seen: the live tensor on the device, which grows with the next `update`; 0 before the first."""
        return self._kv_lens[0] if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def reset(self) -> None:
        self._is_empty = True
        if self.is_initialized:
            self._kv_lens.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        _require_removal(tokens_to_remove)
        if self.is_initialized:
            self._kv_lens.add_(tokens_to_remove).clamp_(min=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.is_initialized:
            with lasting_tensors():
                self._kv_lens = self._kv_lens[indices.to(self.device)]

    def _store(self, k: Tensor, v: Tensor, was_empty: bool) -> tuple[KVView, Tensor | None]:
        """Write the next tokens, keys k [B, Hkv, N, D] and values v; what their queries attend to, and its positions where a slot
        is not one."""
        count, start = k.shape[2], self._kv_lens[0]
        shown = self._shown(k, v, start)
        kv = self.store.append_at(k, v, start)
        if shown is not None:
            if was_empty and not torch.compiler.is_compiling():
                return kv.exact_alone(ExactKV(k, v)), None
            kv = replace(kv, recent=shown)
        if count <= FEW_QUERIES or torch.compiler.is_compiling():
            return replace(kv, kv_lens=self._kv_lens), None
        # a prompt pays one sync a chunk, and none for the first, to see only the slots that are filled
        held = count if was_empty else int(start) + count
        return kv.map(lambda x: x[:, :, :held]), None

    def _shown(self, k: Tensor, v: Tensor, start: Tensor) -> ExactKV | None:
        """The exact tokens that a prompt of dense keys k and values v sees: its own, and what is held before it is stored. None for
        others, which see what is held after."""
        assert self._coding is not None
        if self._coding.settings.prefill != "dense" or k.shape[2] == 1:
            return None
        own = ExactKV(k, v, (start + torch.arange(k.shape[2], device=self.device))[None])
        held = self.store.kv.recent
        if held is None:
            return own
        assert held.positions is not None
        before = held.positions.where(held.positions < start, -1)
        return replace(held.map(torch.clone), positions=before).followed_by(own)


class StaticSparseSlidingLayer(StaticSparseLayer):
    """One layer with a sliding window: a ring of its tokens, the token at position p in slot p modulo the window."""

    is_sliding = True
    is_croppable = False

    def crop(self, tokens_to_remove: int) -> None:
        _require_removal(tokens_to_remove)
        require(not tokens_to_remove, "a static cache with a sliding window cannot take tokens back")

    def _store(self, k: Tensor, v: Tensor, was_empty: bool) -> tuple[KVView, Tensor | None]:
        assert self._coding is not None
        count, slots, start = k.shape[2], self._slots, self._kv_lens[0]
        slot, shown = torch.arange(slots, device=self.device), self._shown(k, v, start)
        if count == 1:
            kv = self.store.append_at(k, v, start, start % slots)
            exact = None if kv.recent is None else _placed_at(kv.recent, start - slots + 1, start + 1, slots)
            return replace(kv, recent=exact), start - (start - slot) % slots
        fresh = self.store.coder.encode(k.detach(), v.detach())
        position = start + torch.arange(count, device=self.device)  # [N]
        last = (fresh.map(lambda x: x[:, :, -slots:]), position[-slots:] % slots)
        self.store.keep_exact(k, v, start)
        exact = self.store.kv.recent if shown is None else shown
        if was_empty:
            self.store.write_at(*last)
            exact = None if exact is None else _placed_at(exact, start, start + count)
            return replace(fresh, recent=exact), None
        # Several tokens overwrite keys that the first of them still see, so these attend to a copy, in order.
        earlier = position[0] - slots + slot[1:]  # [slots - 1] positions
        order = earlier % slots
        seen = self.store.kv.map(lambda held, new: torch.cat((held[:, :, order], new), dim=2), fresh)
        self.store.write_at(*last)
        exact = None if exact is None else _placed_at(exact, start - slots + 1, start + count)
        return replace(seen, recent=exact), torch.cat((earlier, position))


def _placed_at(exact: ExactKV, begin: Tensor, end: Tensor, ring: int | None = None) -> ExactKV:
    """Exact tokens of the sequence as those of a view of its tokens `begin` to `end`: in order, or token p in slot p modulo `ring`."""
    position = exact.positions
    assert position is not None
    place = position - begin if ring is None else position % ring
    return replace(exact, positions=place.where((position >= begin) & (position < end), -1))


def _require_no_gradient(k: Tensor, v: Tensor) -> None:
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        raise ValueError("caches of codes carry no gradient: use torch.no_grad(), or no cache (use_cache=False)")


def _require_removal(tokens_to_remove: int) -> None:
    if tokens_to_remove > 0:
        raise ValueError(f"crop takes the negative number of tokens to remove, got {tokens_to_remove}")


def _codings(model: Any) -> dict[int, LayerCoding]:
    """The codes of the switched layers by layer index."""
    model = unwrap(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be one of transformers that enable switched, got {type(model).__name__}")
    found, left = {}, [model]
    while left:  # in a tenth of the time of `modules()`, which names each: generate() makes a cache at each call
        module = left.pop()
        coding = module._modules.get("sfa")
        if isinstance(coding, LayerCoding):
            found[module.layer_idx] = coding
        left.extend(child for child in reversed(module._modules.values()) if child is not None)
    require(bool(found), f"{type(model).__name__} is not switched: call enable first")
    return found


def _window(layer: Any) -> int | None:
    return layer.sliding_window if getattr(layer, "is_sliding", False) else None

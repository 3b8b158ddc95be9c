"""Cases of `model.generate()` as a user calls it first: nothing compiled or captured by hand, the caches that it makes itself.

A growing cache, or with "static" one of fixed size, around which transformers compiles the model by itself on a GPU. On small
models the host binds: what it does for a token is part of the time. Weights and cached tokens are random. What is timed has met its lengths
before: each of a growing cache, which tokens are taken back from, and the one of a cache of fixed size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from ..huggingface import SparseCache, StaticSparseCache, enable
from ..huggingface.cache import cache_nbytes
from ..huggingface.switch import attention_shape
from .cases import tokens_label
from .configuration import code_name
from .generate import LONGEST_PROMPT
from .models import check_tokens, figures, fill, random_model, token_ids, twin
from .results import Generation
from .timing import Timing, release, wall_clock

_TOKENS, _CALLS = 16, 5  # made per call of generate, and calls that are timed
_QUICK_TOKENS, _QUICK_CALLS = 4, 2
_STATIC_ROOM = (_CALLS + 1) * _TOKENS  # that calls append


def cases(device: torch.device, quick: bool) -> list[PlainCase]:
    """The published shapes on a GPU, in three formats each; a small one elsewhere."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    formats: list[tuple[int, int, str | None]]
    if device.type != "cuda" or quick:
        sizes, formats = [("tiny", 2, 512)], [(8, 8, None), (8, 8, "int8")]
    else:
        sizes = [("qwen3-0.6b", 1, 4096), ("qwen3-0.6b", 8, 8192), ("qwen3-8b", 1, 8192), ("qwen3-8b", 4, 32768)]
        formats = [(16, 0, None), (16, 16, None), (16, 16, "int8")]
    return [
        PlainCase(*size, *kept, is_static, dtype, device)
        for size in sizes
        for is_static in (False, True)
        for kept in formats
    ]


@dataclass(frozen=True)
class PlainCase:
    """A model of `shape` whose `generate` goes on for `batch` sequences of n tokens, and reads one prompt of n (up to 32k)."""

    shape: str
    batch: int
    n: int
    topk: int
    dense_dims: int
    cache_dtype: str | None
    is_static: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def name(self) -> str:
        return f"{self.shape}, {self.curve}, n={tokens_label(self.n)}"

    @property
    def facet(self) -> str:
        return f"{self.shape}: time of a token"

    @property
    def curve(self) -> str:
        bits = "" if self.cache_dtype is None else f"-{self.cache_dtype}"
        cache = "static" if self.is_static else "growing"
        return f"{code_name(self.topk, self.dense_dims)}{bits}, {cache} cache, batch {self.batch}"

    # a static cache of another length is another shape
    @torch._dynamo.config.patch(recompile_limit=64)
    def measure(self, bandwidth: float, quick: bool) -> dict[str, Any]:
        """The figures of the case's row. Raises `WrongOutputError` before anything is timed."""
        model = random_model(self.shape, self.dtype, self.device)
        sparse = enable(twin(model), self.topk, dense_dims=self.dense_dims, cache_dtype=self.cache_dtype)
        error = check_tokens(model, sparse, SparseCache)
        sides = {"ours": sparse, "sdpa": model}
        first = self._first_token_ms(sides, quick) if self.n <= LONGEST_PROMPT else {}
        release(self.device)
        caches = {name: self._cache(side, sparse=side is sparse) for name, side in sides.items()}
        for name, side in sides.items():
            fill(caches[name], side, self.batch, self.n - 1)
        held = {name: cache_nbytes(cache)["total"] for name, cache in caches.items()}
        tokens, calls = (_QUICK_TOKENS, _QUICK_CALLS) if quick else (_TOKENS, _CALLS)
        ids = token_ids(self.batch, self.n + _STATIC_ROOM, self.device)

        def go_on(name: str) -> None:
            cache = caches[name]
            held = cache.get_seq_length()
            _generate(sides[name], ids[:, : held + 1], tokens, past_key_values=cache)
            if not self.is_static:
                # The next call meets the same lengths: a new one costs torch's SDPA some 40 ms on a GPU.
                made = cache.get_seq_length() - held
                for layer in cache.layers:
                    layer.crop(-made)

        found = {}
        for name, whole in wall_clock({name: partial(go_on, name) for name in sides}, self.device, calls).items():
            timing = Timing(*(x / tokens for x in (whole.median_ms, whole.p20_ms, whole.p80_ms)))
            found[name] = timing, Generation(
                first_token_ms=first.get(name), tokens_per_s=1e3 * self.batch / timing.median_ms, peak_bytes=None,
                kv_bytes=held[name], kv_allocated=held[name],
            )  # fmt: skip
        rows = self.batch * self.n * attention_shape(model)[1] * model.config.num_hidden_layers
        ours = found.pop("ours")
        return figures(model, rows, bandwidth, ours, found) | {"note": "", "error": error}

    def _first_token_ms(self, sides: dict[str, Any], quick: bool) -> dict[str, float]:
        """`generate` of one token after a prompt of n, in the cache that it makes."""
        ids, kind = token_ids(1, self.n, self.device), {"cache_implementation": "static"} if self.is_static else {}
        runs = {name: partial(_generate, model, ids, 1, **kind) for name, model in sides.items()}
        found = wall_clock(runs, self.device, _QUICK_CALLS if quick else _CALLS)
        return {name: timing.median_ms for name, timing in found.items()}

    def _cache(self, model: Any, sparse: bool) -> Any:
        if not self.is_static:
            return SparseCache(model) if sparse else DynamicCache(config=model.config)
        slots = self.n + _STATIC_ROOM
        return StaticSparseCache(model, slots) if sparse else StaticCache(model.config, max_cache_len=slots)


def _generate(model: Any, ids: torch.Tensor, tokens: int, **options: Any) -> None:
    """Exactly so many tokens after `ids`, of which a cache that is given holds all but the last."""
    mask = torch.ones_like(ids)
    model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=0,
        **options,
    )

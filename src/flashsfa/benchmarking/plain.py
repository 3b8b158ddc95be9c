"""Cases of `model.generate()` as a user calls it first: nothing compiled or captured by hand, the caches that it makes itself.

A growing cache, or with "static" one of fixed size, around which transformers compiles the model by itself on a GPU. On small
models the host binds: what it does for a token is part of the time. Weights and cached tokens are random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

from ..huggingface import SparseCache, StaticSparseCache, enable
from ..huggingface.cache import cache_nbytes
from ..huggingface.switch import attention_shape
from .cases import UnavailableError, tokens_label
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
        ours = self._side(sparse, sparse=True, quick=quick)
        baselines, note = {}, ""
        try:
            baselines["sdpa"] = self._side(model, sparse=False, quick=quick)
        except (UnavailableError, RuntimeError) as reason:
            note = f"sdpa: {str(reason).strip().partition(chr(10))[0]}"
        rows = self.batch * self.n * attention_shape(model)[1] * model.config.num_hidden_layers
        return figures(model, rows, bandwidth, ours, baselines) | {"note": note, "error": error}

    def _side(self, model: Any, *, sparse: bool, quick: bool) -> tuple[Timing, Generation]:
        """Time of a token, and what else one side takes; nothing of it stays in memory."""
        on_gpu = self.device.type == "cuda"
        first = self._first_token_ms(model, quick) if self.n <= LONGEST_PROMPT else None
        release(self.device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        cache = self._cache(model, sparse)
        fill(cache, model, self.batch, self.n - 1)
        kv_bytes = cache_nbytes(cache)["total"]
        tokens, calls = (_QUICK_TOKENS, _QUICK_CALLS) if quick else (_TOKENS, _CALLS)
        ids = token_ids(self.batch, self.n + _STATIC_ROOM, self.device)

        def go_on() -> None:
            seen = ids[:, : cache.get_seq_length() + 1]
            _generate(model, seen, tokens, past_key_values=cache)

        whole = wall_clock(go_on, self.device, calls)
        timing = Timing(*(x / tokens for x in (whole.median_ms, whole.p20_ms, whole.p80_ms)))
        generation = Generation(
            first_token_ms=first, tokens_per_s=1e3 * self.batch / timing.median_ms,
            peak_bytes=torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
            kv_bytes=kv_bytes, kv_allocated=kv_bytes,
        )  # fmt: skip
        return timing, generation

    def _first_token_ms(self, model: Any, quick: bool) -> float:
        """`generate` of one token after a prompt of n, in the cache that it makes."""
        ids, kind = token_ids(1, self.n, self.device), {"cache_implementation": "static"} if self.is_static else {}
        calls = _QUICK_CALLS if quick else _CALLS
        return wall_clock(lambda: _generate(model, ids, 1, **kind), self.device, calls).median_ms

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

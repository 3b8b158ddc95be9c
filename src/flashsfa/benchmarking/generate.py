"""Cases of whole models: reading a prompt, and making tokens after a long context, beside the same model dense.

Weights and cached tokens are random: they decide nothing about speed. The sides run one after the other, so that each has
the memory to itself and its peak is its own. On a GPU, on all sides, norms and MLPs are compiled and a token is one CUDA
graph: what surrounds attention takes the time that it takes where one serves models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.masking_utils import AttentionMaskInterface

from ..huggingface import SparseCache, StaticSparseCache, enable
from ..huggingface.cache import cache_nbytes
from ..huggingface.switch import attention_shape
from .cases import UnavailableError, WrongOutputError, sdpa_backends, tokens_label
from .configuration import code_name
from .models import (
    check_tokens,
    figures,
    fill,
    published_config,
    random_model,
    relative,
    skeleton,
    token_ids,
    twin,
)
from .results import Generation
from .timing import release, repeat

_ROOM = 128  # tokens that warm-up, checks and repeats append to a cache
LONGEST_PROMPT = 32768  # tokens: beyond, reading a prompt on every side takes minutes
_SHARE_OF_MEMORY = 0.97  # of what is free: the rest goes to fragments, handles and graphs


def cases(device: torch.device, quick: bool) -> list[GenerateCase]:
    """The published shapes on a GPU; a small one elsewhere. The last four are the largest: 60 GB with their weights."""
    if device.type != "cuda" or quick:
        sizes: list[tuple[str, int, int, int, int]] = [("tiny", 8, 8, 1, 512), ("tiny", 8, 0, 2, 1024)]
    else:
        sizes = [("gpt2", 8, 0, batch, n) for batch, n in ((16, 4096), (8, 32768))]
        sizes += [("qwen3-0.6b", 16, 16, batch, n) for batch, n in ((1, 4096), (1, 32768), (8, 32768), (1, 131072))]
        sizes += [("qwen3-8b", 16, 16, batch, n) for batch, n in ((1, 4096), (16, 4096), (1, 32768))]
        sizes += [("qwen3-8b", 16, dense, batch, n) for dense in (16, 0) for batch, n in ((8, 32768), (2, 131072))]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [GenerateCase(*size, dtype, device) for size in sizes]


@dataclass(frozen=True)
class GenerateCase:
    """A model of `shape` that makes tokens for `batch` sequences of n, and reads one prompt of n tokens (up to 32k)."""

    shape: str
    topk: int
    dense_dims: int
    batch: int
    n: int
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
        return f"{code_name(self.topk, self.dense_dims)}, batch {self.batch}"

    # a few shapes a side and case; beyond the limit they run uncompiled
    @torch._dynamo.config.patch(recompile_limit=64)
    def measure(self, bandwidth: float, quick: bool) -> dict[str, Any]:
        """The figures of the case's row. Raises `WrongOutputError` before anything is timed."""
        self._require_memory(sparse=True)
        model = random_model(self.shape, self.dtype, self.device)
        sparse = enable(twin(model), self.topk, dense_dims=self.dense_dims)
        error = check_tokens(model, sparse)
        ours = self._side(sparse, sparse=True, quick=quick)
        baselines, notes = {}, []
        for name, baseline in _baselines(model, self.device).items():
            try:
                self._require_memory(sparse=False)
                baselines[name] = self._side(baseline, sparse=False, quick=quick)
            except (UnavailableError, RuntimeError) as reason:
                notes.append(f"{name}: {str(reason).strip().partition(chr(10))[0]}")
        found = figures(model, self._rows(model), bandwidth, ours, baselines)
        return found | {"note": "; ".join(notes), "error": error}

    def _side(self, model: Any, *, sparse: bool, quick: bool) -> tuple[Any, Generation]:
        """Time of a token, and what else one side takes; nothing of it stays in memory."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            _compile_parts(model)
        first = self._first_token_ms(model, sparse, quick) if self.n <= LONGEST_PROMPT else None
        release(self.device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        cache, allocated = self._filled(model, sparse)
        step = self._step(model, cache)
        if sparse:
            self._check_step(model, cache, step())
        timing = repeat(step, self.device, quick)
        generation = Generation(
            first_token_ms=first, tokens_per_s=1e3 * self.batch / timing.median_ms,
            peak_bytes=torch.cuda.max_memory_allocated(self.device) if on_gpu else None,
            kv_bytes=self._kv_bytes(model, sparse), kv_allocated=allocated,
        )  # fmt: skip
        del cache, step
        release(self.device)
        return timing, generation

    def _first_token_ms(self, model: Any, sparse: bool, quick: bool) -> float:
        """Reading one prompt of n tokens into a growing cache, up to the logits of the next."""
        ids = token_ids(1, self.n, self.device)

        @torch.no_grad()
        def read() -> Tensor:
            cache = SparseCache(model) if sparse else DynamicCache(config=model.config)
            return model(ids, logits_to_keep=1, use_cache=True, past_key_values=cache).logits

        return repeat(read, self.device, quick).median_ms

    def _filled(self, model: Any, sparse: bool) -> tuple[Any, int]:
        """A static cache with all but its last tokens random, and the bytes that it took."""
        on_gpu = self.device.type == "cuda"
        before = torch.cuda.memory_allocated(self.device) if on_gpu else 0
        cache = StaticSparseCache(model, self.n) if sparse else StaticCache(model.config, max_cache_len=self.n)
        fill(cache, model, self.batch, self.n - _ROOM)
        if on_gpu:  # what the allocator gave; the CPU's keeps no account
            return cache, torch.cuda.memory_allocated(self.device) - before
        return cache, cache_nbytes(cache)["total"]

    def _step(self, model: Any, cache: Any) -> Callable[[], Tensor]:
        """The next token as a call; on a GPU a captured graph of it."""
        token = token_ids(self.batch, 1, self.device)

        @torch.no_grad()
        def step() -> Tensor:
            return model(token, past_key_values=cache, use_cache=True).logits

        return step if self.device.type != "cuda" else _graphed(step)

    def _check_step(self, model: Any, cache: Any, out: Tensor) -> None:
        """The step as timed against the same step run plainly."""
        for layer in cache.layers:
            layer.crop(-1)
        with torch.no_grad():
            plain = model(token_ids(self.batch, 1, self.device), past_key_values=cache, use_cache=True).logits
        error = relative(out, plain)
        if not error < 1e-2:
            raise WrongOutputError(f"the captured step is {error:.1e} from the plain one")

    def _require_memory(self, *, sparse: bool) -> None:
        """Raise `UnavailableError` if the weights and one side's cache or prompt do not fit the GPU."""
        if self.device.type != "cuda":
            return
        config = published_config(self.shape, self.dtype)
        cached = self._kv_bytes(skeleton(self.shape, self.dtype), sparse)
        width = 4 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size) + 8 * config.hidden_size
        prompt = min(self.n, LONGEST_PROMPT)
        reading = cached * prompt // (self.batch * self.n) + prompt * width * self.dtype.itemsize
        needed = sum(p.nbytes for p in skeleton(self.shape, self.dtype).parameters()) + max(cached, reading)
        free, _ = torch.cuda.mem_get_info(self.device)
        free = int(_SHARE_OF_MEMORY * (free + torch.cuda.memory_reserved(self.device)))
        if needed > free:
            raise UnavailableError(f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")

    def _kv_bytes(self, model: Any, sparse: bool) -> int:
        """Bytes of a full cache by arithmetic."""
        _, _, head_dim = attention_shape(model)
        key = self.dtype.itemsize * head_dim
        if sparse:
            key = self.dtype.itemsize * (self.dense_dims + self.topk) + self.topk  # an index is a byte
        return self._rows(model) * (key + self.dtype.itemsize * head_dim)

    def _rows(self, model: Any) -> int:
        """Tokens and kv heads of all layers."""
        return self.batch * self.n * attention_shape(model)[1] * model.config.num_hidden_layers


def _baselines(model: Any, device: torch.device) -> dict[str, Any]:
    """The dense model as transformers runs it, with the mask of a static cache; and without a mask, which hides nothing in
    a full cache, for only so does torch choose its fastest kernels: each of them by name."""
    found = {"sdpa": model}
    for backend, attend in sdpa_backends(device).items():
        name = "sdpa_unmasked" if backend == "sdpa" else f"sdpa_{backend}"
        found[name] = _unmasked(model, name, attend)
    return found


def _unmasked(model: Any, name: str, sdpa: Callable[..., Tensor]) -> Any:
    """A twin that attends by `sdpa` without a mask: causal over a prompt, to all of the cache after it."""
    name = f"sfa_benchmark_{name}"  # with "flash" in it transformers would look for a kernel of flash-attn

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        return sdpa(q, k, v, is_causal=q.shape[2] > 1, scale=scaling).transpose(1, 2), None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    copied = twin(model)
    copied.set_attn_implementation(name)
    return copied


def _compile_parts(model: Any) -> None:
    """Compile what is most small operations in a row: norms and MLPs, in place."""
    for module in model.modules():
        if type(module).__name__.endswith(("Norm", "MLP")):
            module.compile(dynamic=False)


def _graphed(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`step` captured as a CUDA graph; a call replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay

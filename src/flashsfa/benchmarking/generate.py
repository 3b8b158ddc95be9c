"""Cases of whole models: one token over a filled cache, and a prompt, beside the same model dense.

Weights and cached tokens are random: they decide nothing about speed. On a GPU a step is one CUDA graph on both sides.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.masking_utils import AttentionMaskInterface

from ..huggingface import SparseCache, StaticSparseCache, enable
from ..huggingface.cache import cache_nbytes
from ..huggingface.switch import attention_shape
from ..kernels.dispatch import last_choice
from .cases import Baseline, Verdict, Workload, tokens_label

_CHUNK_TOKENS = 4096  # tokens that go into a cache at a time
_STEPS = 128  # room for the tokens of warm-up and repeats, of two baselines over one cache


def cases(device: torch.device, quick: bool) -> list[GenerateCase]:
    """The published shapes on a GPU; the small one elsewhere. The largest need 90 GB: weights and both caches."""
    if device.type != "cuda" or quick:
        sizes: list[tuple[str, int, int]] = [("tiny", 1, 512), ("tiny", 2, 1024)]
    else:
        sizes = [("gpt2", 16, 4096), ("qwen3-0.6b", 1, 32768), ("qwen3-0.6b", 8, 32768)]
        sizes += [("qwen3-8b", 1, 4096), ("qwen3-8b", 8, 32768), ("qwen3-8b", 2, 131072)]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokens = [GenerateCase(shape, batch, n, "token", dtype, device) for shape, batch, n in sizes]
    return tokens + [GenerateCase(shape, 1, min(n, 32768), "prompt", dtype, device) for shape, _, n in sizes[::2]]


@dataclass(frozen=True)
class GenerateCase:
    """A model of `shape` that has n tokens in its cache and makes the next (phase "token"), or reads n ("prompt")."""

    shape: str
    batch: int
    n: int
    phase: str
    dtype: torch.dtype
    device: torch.device

    @property
    def name(self) -> str:
        return f"{self.shape}, {self.phase}, batch {self.batch}, n={tokens_label(self.n)}"

    @property
    def facet(self) -> str:
        return f"{self.shape}: {'time of a token' if self.phase == 'token' else 'time to the first token'}"

    @property
    def curve(self) -> str:
        return f"batch {self.batch}"

    def prepare(self) -> Workload:
        model = _model(self.shape, self.n, self.dtype, self.device)
        _, _, head_dim = attention_shape(model)
        sparse = enable(_twin(model), head_dim // 8, dense_dims=head_dim // 8)
        return (self._prompt if self.phase == "prompt" else self._token)(model, sparse)

    def _token(self, model: Any, sparse: Any) -> Workload:
        dense, dense_bytes = self._filled(model, StaticCache(model.config, max_cache_len=self.n))
        cache, nbytes = self._filled(sparse, StaticSparseCache(sparse, self.n))
        weights, rows = _weight_bytes(model), self._rows(model)
        return Workload(
            run=self._step(sparse, cache),
            check=self._check(sparse, cache),
            nbytes=weights + nbytes,
            tokens=rows,
            bytes_per_token=nbytes / rows,
            choice=lambda: last_choice("decode"),
            baselines={
                "sdpa": Baseline(self._step(model, dense), weights + dense_bytes),
                "sdpa_unmasked": Baseline(self._step(_unmasked(model), dense), weights + dense_bytes),
            },
        )

    def _prompt(self, model: Any, sparse: Any) -> Workload:
        ids = self._ids(self.n)

        @torch.no_grad()
        def read(model: Any, make_cache: Callable[[], Any]) -> Tensor:
            return model(ids, logits_to_keep=1, use_cache=True, past_key_values=make_cache()).logits

        cache = SparseCache(sparse)
        read(sparse, lambda: cache)
        rows, weights = self._rows(model), _weight_bytes(model)
        dense_bytes = rows * 2 * attention_shape(model)[2] * self.dtype.itemsize
        return Workload(
            run=lambda: read(sparse, lambda: SparseCache(sparse)),
            check=lambda out: Verdict(bool(out.isfinite().all()), 0.0, "the logits are not finite"),
            nbytes=weights + cache.nbytes,
            tokens=rows,
            bytes_per_token=cache.nbytes / rows,
            choice=lambda: last_choice("attention"),
            baselines={
                "sdpa": Baseline(lambda: read(model, lambda: DynamicCache(config=model.config)), weights + dense_bytes)
            },
        )

    def _rows(self, model: Any) -> int:
        """Tokens and kv heads of all layers."""
        return self.batch * self.n * attention_shape(model)[1] * model.config.num_hidden_layers

    def _filled(self, model: Any, cache: Any) -> tuple[Any, int]:
        """The cache with all but its last tokens random, and the bytes that it took."""
        _, kv_heads, head_dim = attention_shape(model)
        on_gpu = self.device.type == "cuda"
        k, v = torch.randn(2, self.batch, kv_heads, min(_CHUNK_TOKENS, self.n), head_dim, device=self.device).to(
            self.dtype
        )
        before = torch.cuda.memory_allocated(self.device) if on_gpu else 0
        for layer in cache.layers:
            for start in range(0, self.n - _STEPS, _CHUNK_TOKENS):
                chunk = slice(0, min(_CHUNK_TOKENS, self.n - _STEPS - start))
                layer.update(k[:, :, chunk], v[:, :, chunk])
        if on_gpu:  # what the allocator gave; the CPU's keeps no account
            return cache, torch.cuda.memory_allocated(self.device) - before
        return cache, cache_nbytes(cache)["total"]

    def _step(self, model: Any, cache: Any) -> Callable[[], Tensor]:
        """The next token as a call; on a GPU a captured graph of it."""
        token = self._ids(1)

        @torch.no_grad()
        def step() -> Tensor:
            return model(token, past_key_values=cache, use_cache=True).logits

        return step if self.device.type != "cuda" else _graphed(step)

    def _check(self, model: Any, cache: Any) -> Callable[[Tensor], Verdict]:
        """The step as timed against the same step run plainly; the kernels have their own check in `bench decode`."""

        def check(out: Tensor) -> Verdict:
            for layer in cache.layers:
                layer.crop(-1)
            with torch.no_grad():
                plain = model(self._ids(1), past_key_values=cache, use_cache=True).logits
            error = float((out.float() - plain.float()).norm() / plain.float().norm())
            return Verdict(error < 1e-2, error, f"the captured step is {error:.1e} from the plain one")

        return check

    def _ids(self, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 1000, (self.batch, n), generator=generator).to(self.device)


@functools.lru_cache(maxsize=1)  # the cases of a shape follow one another
def _model(shape: str, n: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with random weights in a published shape."""
    common = {"max_position_embeddings": n, "dtype": dtype}
    if shape == "gpt2":
        config: Any = transformers.GPT2Config(n_positions=n, attn_pdrop=0.0, dtype=dtype)
    elif shape == "tiny":
        config = transformers.Qwen3Config(
            vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, **common,
        )  # fmt: skip
    else:
        width, inner, layers, heads = {"qwen3-0.6b": (1024, 3072, 28, 16), "qwen3-8b": (4096, 12288, 36, 32)}[shape]
        config = transformers.Qwen3Config(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=8, head_dim=128, **common,
        )  # fmt: skip
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _twin(model: Any) -> Any:
    """Another model over the same weights."""
    return copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})


def _weight_bytes(model: Any) -> int:
    """Bytes of the weights that a token reads: an input embedding of its own is looked up in one row."""
    own = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is own
    return sum(p.nbytes for p in model.parameters()) - (0 if tied else own.nbytes)


def _unmasked(model: Any) -> Any:
    """A twin that attends by SDPA without a mask: a full static cache hides nothing, and only without a mask does torch
    choose its fastest kernels."""
    name = "sfa_benchmark_unmasked"

    def attend(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2), None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)
    twin = _twin(model)
    twin.set_attn_implementation(name)
    return twin


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

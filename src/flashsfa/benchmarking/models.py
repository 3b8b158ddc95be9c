"""Models with random weights for cases of whole models: published shapes, their caches filled, and what they are checked by."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import StaticCache

from ..huggingface import StaticSparseCache
from ..huggingface.switch import attention_shape
from ..ops.record import last_choice
from .cases import WrongOutputError
from .results import BaselineResult, Generation
from .timing import Timing

_CHUNK_TOKENS = 4096  # tokens that go into a cache at a time


def published_config(shape: str, dtype: torch.dtype) -> Any:
    """transformers' config of a published shape."""
    if shape == "gpt2":
        return transformers.GPT2Config(n_positions=32768, attn_pdrop=0.0, dtype=dtype)
    common = {"max_position_embeddings": 131072, "dtype": dtype}
    if shape == "tiny":
        return transformers.Qwen3Config(
            vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, **common,
        )  # fmt: skip
    width, inner, layers, heads = {"qwen3-0.6b": (1024, 3072, 28, 16), "qwen3-8b": (4096, 12288, 36, 32)}[shape]
    return transformers.Qwen3Config(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=shape == "qwen3-0.6b", **common,
    )  # fmt: skip


@functools.lru_cache(maxsize=1)  # the cases of a shape follow one another
def random_model(shape: str, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with random weights, drawn where they stay."""
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(published_config(shape, dtype), dtype=dtype).eval()


@functools.cache
def skeleton(shape: str, dtype: torch.dtype) -> Any:
    """The model without weights."""
    return random_model.__wrapped__(shape, dtype, torch.device("meta"))


def twin(model: Any) -> Any:
    """Another model over the same weights."""
    return copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a token reads: input embeddings of their own are looked up in one row."""
    read = {id(p): p.nbytes for p in model.parameters()}
    for table in (m for m in model.modules() if isinstance(m, torch.nn.Embedding)):
        if table.weight is not model.get_output_embeddings().weight:
            read.pop(id(table.weight), None)
    return sum(read.values())


def token_ids(batch: int, n: int, device: torch.device) -> Tensor:
    """Random tokens [batch, n], the same at each call."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randint(0, 1000, (batch, n), generator=generator, device="cpu").to(device)


def fill(cache: Any, model: Any, batch: int, n: int) -> None:
    """Put n random tokens into a cache of the model."""
    _, kv_heads, head_dim = attention_shape(model)
    shape = (batch, kv_heads, min(_CHUNK_TOKENS, n), head_dim)
    k, v = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in "kv")
    for layer in cache.layers:
        for start in range(0, n, _CHUNK_TOKENS):
            chunk = slice(0, min(_CHUNK_TOKENS, n - start))
            layer.update(k[:, :, chunk], v[:, :, chunk])


def check_tokens(model: Any, sparse: Any, cache_of: Callable[[Any], Any] | None = None) -> float:
    """A few tokens made one by one against the same tokens read at once: the error that a cache of codes and the decode
    kernels make. At most three times that of the dense model with its own cache: rounding moves features, too.

    Args:
        cache_of: makes the cache of `sparse` that is checked, and that the tokens read at once see too, as what it rounds is
            rounded for them alike; None for static caches, beside no cache.

    Raises `WrongOutputError`.
    """
    ids = token_ids(2, 64, model.device)

    @torch.no_grad()
    def error(model: Any, cache: Any, whole_cache: Any) -> float:
        whole = model(ids, use_cache=whole_cache is not None, past_key_values=whole_cache).logits[:, -8:]
        model(ids[:, :-8], past_key_values=cache)
        tokens = [model(token, past_key_values=cache).logits for token in ids[:, -8:].split(1, dim=1)]
        return relative(torch.cat(tokens, dim=1), whole)

    if cache_of is None:
        found = error(sparse, StaticSparseCache(sparse, 64), None)
    else:
        found = error(sparse, cache_of(sparse), cache_of(sparse))
    dense = error(model, StaticCache(model.config, max_cache_len=64), None)
    allowed = 3 * dense + 4 * torch.finfo(model.dtype).eps
    if not found <= allowed:
        raise WrongOutputError(f"tokens from the cache are {found:.1e} from those without one, allowed {allowed:.1e}")
    return found


def figures(
    model: Any,
    rows: int,
    bandwidth: float,
    ours: tuple[Timing, Generation],
    baselines: Mapping[str, tuple[Timing, Generation]],
) -> dict[str, Any]:
    """What a row says of its times, for caches of so many tokens of all kv heads and layers."""
    weights, (timing, generation) = weight_bytes(model), ours
    moved, choice = weights + generation.kv_bytes, last_choice("decode")
    return {
        "timing": timing, "generation": generation, "gb_per_s": moved / timing.median_ms / 1e6,
        "roofline_percent": 100 * 1e3 * moved / bandwidth / timing.median_ms,
        "bytes_moved": moved, "bytes_per_token": generation.kv_bytes / rows, "moved_per_token": moved / rows,
        "backend": choice.backend if choice else "not recorded", "reason": choice.reason if choice else "",
        "baselines": {
            name: BaselineResult(
                theirs, gb_per_s=(weights + held.kv_bytes) / theirs.median_ms / 1e6, ratio=theirs.median_ms / timing.median_ms,
                moved_per_token=(weights + held.kv_bytes) / rows, generation=held,
            )
            for name, (theirs, held) in baselines.items()
        },
    }  # fmt: skip


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the error, relative to what is expected."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())

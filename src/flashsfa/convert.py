"""`flashsfa convert`: a dense language model becomes a sparse one, and a report says what it saved and cost."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import __version__
from .attention import sparse_feature_attention
from .basis import FeatureBasis, default_kind
from .budget import DENSE, query_features
from .cache.contiguous import SparseKVCache
from .checks import require
from .decode import sparse_feature_decode
from .evaluation.memory import fill_cache
from .evaluation.perplexity import perplexity
from .evaluation.subject import Progress
from .evaluation.text import separate_texts, token_windows
from .files import require_place, whole_folder
from .formats import cache_bits
from .huggingface import disable, enable
from .huggingface.cache import cache_nbytes
from .huggingface.calibration import gather_moments
from .huggingface.switch import attention_shape
from .models import BUNDLED_NAME, is_converted, load_model
from .presets import default_budget

_PROMPT = "The history of science is"
_LONGEST_PREFILL = 4096  # prefill is quadratic: longer contexts are timed for decode alone


@dataclass(frozen=True)
class ConvertSettings:
    """Arguments of `flashsfa convert`; see its help."""

    model: str | None = None
    topk: int | None = None  # None for that of `default_budget`
    topk_query: int | str = DENSE
    dense_dims: int | None = None  # as topk
    basis: str | None = None  # None for `default_kind`
    max_position: int | None = None
    calibrate: str | None = None
    eval: str | None = None
    dtype: str = "bfloat16"
    cache_dtype: str | None = None  # as `enable`'s
    recent: int = 0  # as `enable`'s
    first: int = 0
    window: int = 768
    windows: int = 10
    contexts: tuple[int, ...] = (1024, 4096, 16384, 32768)
    tokenizer: str | None = None  # as `load_model`'s


def convert(settings: ConvertSettings, output: Path, progress: Progress) -> dict[str, Any]:
    """Convert, measure, and write the model, its tokenizer, report.json and report.png to the folder `output`, whole or not at
    all. Returns the report.

    Raises, before any work: `OSError` if `output` cannot be written, `ValueError` if it holds anything, or if the model, its
    texts or the settings do not fit.
    """
    is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    require(is_free, f"{output} exists already: name a new directory, or remove it first")
    require_place(output.parent)
    require_place(output)
    require(
        not is_converted(settings.model),
        f"{settings.model} is converted already: give the dense model that it was made of, or measure it with flashsfa eval",
    )
    loaded = progress("loading the model", 1)
    model, tokenizer = load_model(settings.model, getattr(torch, settings.dtype), settings.tokenizer)
    loaded()
    calibration, evaluation = _windows(settings, tokenizer)
    *_, head_dim = attention_shape(model)
    usual = default_budget(head_dim)
    topk = usual.topk if settings.topk is None else settings.topk
    dense_dims = usual.dense_dims if settings.dense_dims is None else settings.dense_dims
    topk_query = query_features(settings.topk_query, head_dim)
    budgets: dict[str, Any] = {"topk": topk, "topk_query": topk_query, "dense_dims": dense_dims}
    cached: dict[str, Any] = {"cache_dtype": settings.cache_dtype, "recent": settings.recent, "first": settings.first}
    enable(model, **budgets, **cached)  # refuses a model or a budget before any long work
    disable(model)

    kind = settings.basis or default_kind(topk_query, head_dim)
    moments = gather_moments(
        model, calibration, max_position=settings.max_position, progress=progress("calibrating", len(calibration))
    )
    # A pure top-k code of at most the same bytes, for comparison: 2 M + 3 K bytes at 16 bits, M + 2 K + 4 at 8.
    more = 2 * dense_dims // 3 if settings.cache_dtype is None else dense_dims // 2
    plain = min(head_dim, topk + more)
    fit = progress(f"fitting the basis: {kind}", 2)
    plain_basis = FeatureBasis.from_layers(moments, kind, topk=plain)
    fit()
    basis = FeatureBasis.from_layers(moments, kind, topk=topk, dense_dims=dense_dims)
    fit()
    kept = "" if settings.cache_dtype is None else f", {settings.cache_dtype}"
    if settings.recent or settings.first:
        kept += f", {settings.recent} newest and {settings.first} first tokens exact"
    variants: list[tuple[str, str, dict[str, Any] | None]] = [
        ("dense", "dense", None),
        ("plain_topk", f"top-{plain} alone{kept}", {"topk": plain, "topk_query": topk_query}),
        (
            "basis",
            f"top-{plain}, {kind} basis{kept}",
            {"topk": plain, "topk_query": topk_query, "basis": plain_basis},
        ),
        (
            "sfa",
            f"{dense_dims} dense + top-{topk}, {kind} basis{kept}",
            {**budgets, "basis": basis},
        ),
    ]
    report: dict[str, Any] = {
        "settings": {
            **asdict(settings),
            "model": settings.model or BUNDLED_NAME,
            **budgets,
            "basis": kind,
            "head_dim": head_dim,
        },
        "versions": _versions(),
    }
    for name, label, options in variants:
        if options is None:
            disable(model)
        else:
            enable(model, **options, **cached)
        report[name] = {
            "label": label,
            "perplexity": perplexity(model, evaluation, progress(f"perplexity: {label}", len(evaluation))),
        }
        if name in ("dense", "sfa"):
            report[name] |= _generate(model, tokenizer, evaluation[0], progress(f"generating: {label}", 1))
    report["perplexity_increase"] = report["sfa"]["perplexity"] / report["dense"]["perplexity"] - 1
    report["attention_ms"] = _attention_times(model, settings, budgets, progress)
    _write(model, tokenizer, report, output)
    return report


def _write(model: Any, tokenizer: Any, report: dict[str, Any], output: Path) -> None:
    from .report import draw

    try:
        with whole_folder(output) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
            draw(report, folder / "report.png")
    except Exception as error:  # a full disk is another error in each of the libraries that write here
        raise OSError(f"could not write the result: {error}; make room, or choose another place with -o") from error


def _windows(settings: ConvertSettings, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration and evaluation windows that do not overlap."""
    calibration_text, evaluation_text = separate_texts(settings.calibrate, settings.eval)
    cut = {"length": settings.window, "count": settings.windows}
    return (
        token_windows(tokenizer, calibration_text, purpose="calibration", **cut),
        token_windows(tokenizer, evaluation_text, purpose="evaluation", **cut),
    )


@torch.no_grad()
def _generate(model: Any, tokenizer: Any, window: torch.Tensor, progress: Callable[[], None]) -> dict[str, Any]:
    """A greedy continuation, and the bytes per token of a cache that holds the tokens of `window`, read from its live tensors."""
    inputs = tokenizer(_PROMPT, return_tensors="pt").to(model.device)
    result = model.generate(**inputs, max_new_tokens=32, do_sample=False, return_dict_in_generate=True)
    cache = fill_cache(model, window)
    tokens, nbytes = len(window), cache_nbytes(cache)
    _, kv_heads, _ = attention_shape(model)
    rows = tokens * len(cache.layers) * kv_heads
    progress()
    return {
        "text": tokenizer.decode(result.sequences[0], skip_special_tokens=True),
        "cache": type(result.past_key_values).__name__,
        "kv_bytes_per_token": nbytes["total"] / tokens,
        "key_bytes_per_token_and_head": nbytes["keys"] / rows,
        "value_bytes_per_token_and_head": nbytes["values"] / rows,
    }


@torch.no_grad()
def _attention_times(
    model: Any, settings: ConvertSettings, budgets: dict[str, Any], progress: Progress
) -> list[dict[str, float]]:
    """Median milliseconds of one layer's attention with the model's head counts and widths, dense (SDPA) and sparse.

    In float32, where torch's CPU kernels are at their best; decode over the cache that is asked for, prefill over plain keys
    and values.
    """
    heads, kv_heads, head_dim = attention_shape(model)
    step = progress("timing attention", len(settings.contexts))
    kept_dtype = cache_bits(settings.cache_dtype)

    def row(n: int) -> dict[str, float]:
        q, k, v = (torch.randn(1, h, n, head_dim, device=model.device) for h in (heads, kv_heads, kv_heads))
        newest = q[:, :, -1:]
        cache = SparseKVCache(
            budgets["topk"], dense_dims=budgets["dense_dims"], capacity=n, dtype=kept_dtype, recent=settings.recent,
            first=settings.first,
        )  # fmt: skip
        kv = cache.append(k, v)

        def dense(queries: torch.Tensor, is_causal: bool) -> float:
            sdpa = F.scaled_dot_product_attention
            return _median_ms(lambda: sdpa(queries, k, v, is_causal=is_causal, enable_gqa=True))

        def prefill() -> Any:
            return sparse_feature_attention(q, k, v, is_causal=True, **budgets)

        times = {"context": n, "decode_dense": dense(newest, False)}
        times["decode_sfa"] = _median_ms(lambda: sparse_feature_decode(newest, kv, topk_query=budgets["topk_query"]))
        if n <= _LONGEST_PREFILL:
            times |= {"prefill_dense": dense(q, True), "prefill_sfa": _median_ms(prefill)}
        step()
        return times

    return [row(n) for n in settings.contexts]


def _median_ms(run: Callable[[], Any], repeats: int = 7) -> float:
    def synchronize() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    run()
    times = []
    gc.collect()
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _versions() -> dict[str, str]:
    found = {"flashsfa": __version__, "torch": torch.__version__, "python": platform.python_version()}
    found["transformers"] = version("transformers")
    return {
        **found,
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
    }

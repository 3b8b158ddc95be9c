"""`flashsfa convert`: a dense language model becomes a sparse one, and a report says what it saved and cost."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from .checks import require, require_int
from .decode import sparse_feature_decode
from .evaluation.memory import fill_cache
from .evaluation.perplexity import perplexity
from .evaluation.subject import Progress
from .evaluation.text import separate_texts, token_windows
from .files import require_place, whole_folder
from .formats import ROTATION_WIDTH, CodeFormat, cache_bits
from .huggingface import disable, enable
from .huggingface.attention import LayerCoding
from .huggingface.cache import cache_nbytes
from .huggingface.calibration import gather_moments
from .huggingface.switch import attention_shape
from .models import BUNDLED_NAME, is_converted, load_model
from .presets import default_budget, default_key_bytes, largest_budget, require_one_way
from .stored import KVView

_PROMPT = "The history of science is"
_WINDOW = 2048
_MOST_WIDENED = 1 << 30  # parameters, that take 4 GiB in float32
_LONGEST_PREFILL = 4096  # prefill is quadratic: longer contexts are timed for decode alone


@dataclass(frozen=True)
class ConvertSettings:
    """Arguments of `flashsfa convert`; see its help."""

    model: str | None = None
    key_bytes: int | None = None  # None for `default_key_bytes`, where no topk is given
    topk: int | None = None
    topk_query: int | str | None = None  # None for "dense"
    dense_dims: int | None = None  # None for that of `default_budget`
    basis: str | None = None  # None for `default_kind`
    max_position: int | None = None  # as `gather_moments`'
    calibrate: str | None = None
    eval: str | None = None
    dtype: str = "bfloat16"
    cache_dtype: str | None = "int4"  # this and the next three as `enable`'s
    recent: int = 32
    first: int = 4
    prefill: str = "dense"
    window: int | None = None  # None for 2048, or the model's positions if fewer
    windows: int = 2  # to evaluate on; calibration takes twice as many
    contexts: tuple[int, ...] = (1024, 4096, 16384, 32768)
    tokenizer: str | None = None  # as `load_model`'s

    def __post_init__(self) -> None:
        require_one_way(self.key_bytes, self.topk, self.topk_query, self.dense_dims, self.basis)


@dataclass(frozen=True)
class _Variant:
    """A way to keep the cache that is measured.

    Attributes:
        label: as people read it.
        options: `enable`'s; None for the dense model.
        fit: `FeatureBasis.from_layers`'; None for no basis.
        is_candidate: whether it may be what is written.
    """

    label: str
    options: dict[str, Any] | None = None
    fit: dict[str, Any] | None = None
    is_candidate: bool = False


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
    calibration, evaluation = _windows(settings, model, tokenizer)
    *_, head_dim = attention_shape(model)
    variants = _variants(settings, head_dim)
    for variant in variants.values():  # refuses a model or a budget before any long work
        if variant.options is not None and "topk" in variant.options:
            enable(model, **variant.options)
            disable(model)

    bar = progress("calibrating", len(calibration))
    with _wide_on_a_cpu(model):
        moments = gather_moments(model, calibration, max_position=settings.max_position, progress=bar)
    for layer in moments:
        layer.require_finite()
    report: dict[str, Any] = {
        "settings": {**asdict(settings), "model": settings.model or BUNDLED_NAME, "head_dim": head_dim},
        "versions": _versions(),
    }
    rows: dict[str, Any] = {}
    chosen, chosen_basis = "", None
    for name, variant in variants.items():
        basis = None
        if variant.fit is not None:
            fitted = progress(f"fitting the basis: {variant.label}", 1)
            basis = FeatureBasis.from_layers(moments, **variant.fit)
            fitted()
        _switch(model, variant, basis)
        step = progress(f"perplexity: {variant.label}", len(evaluation))
        with _wide_on_a_cpu(model):
            rows[name] = {"label": variant.label, "perplexity": perplexity(model, evaluation, step)}
        rows[name] |= _cache_bytes(model, evaluation[0])
        if variant.is_candidate and (not chosen or rows[name]["perplexity"] < rows[chosen]["perplexity"]):
            chosen, chosen_basis = name, basis
    texts = {"dense": _continued(disable(model), tokenizer, progress("generating: dense", 1))}
    best = variants[chosen]
    _switch(model, best, chosen_basis)
    texts["sfa"] = _continued(model, tokenizer, progress(f"generating: {best.label}", 1))
    report |= {
        "variants": rows,
        "chosen": chosen,
        "switched": model.config.sfa | {"basis": None if best.fit is None else best.fit["kind"]},
        "perplexity_increase": rows[chosen]["perplexity"] / rows["dense"]["perplexity"] - 1,
        "texts": texts,
        "attention_ms": _attention_times(model, settings, progress),
    }
    _write(model, tokenizer, report, output)
    return report


def _variants(settings: ConvertSettings, head_dim: int) -> dict[str, _Variant]:
    """What is measured, by name: the dense model, its keys and values in 8 and 4 bits, and what may be written."""
    exact: dict[str, Any] = {"recent": settings.recent, "first": settings.first, "prefill": settings.prefill}
    whole: dict[str, Any] = {"topk": head_dim, "dense_dims": 0, "topk_query": DENSE, **exact}
    bits = cache_bits(settings.cache_dtype)
    if isinstance(bits, CodeFormat):
        bits.require_v_dim(head_dim)
    kept = "16 bits" if bits is None else settings.cache_dtype
    variants = {"dense": _Variant("dense"), "dense_int8": _Variant("dense, int8", {**whole, "cache_dtype": "d8s8v8"})}
    if head_dim % ROTATION_WIDTH == 0:
        variants["dense_int4"] = _Variant("dense, int4", {**whole, "cache_dtype": "d8s4v4"})
    if settings.topk is not None:
        budget = default_budget(head_dim).dense_dims if settings.dense_dims is None else settings.dense_dims
        queries = query_features(settings.topk_query or DENSE, head_dim)
        kind = settings.basis or default_kind(queries, head_dim)
        variants["topk"] = _top_k(
            budget, settings.topk, queries, kind, f", {kept}", {**exact, "cache_dtype": settings.cache_dtype}, True
        )
        return variants
    usual = default_budget(head_dim)
    variants["topk_16"] = _top_k(
        usual.dense_dims, usual.topk, head_dim, "dictionary", ", 16 bits, nothing exact", {}, False
    )
    key_bytes = default_key_bytes(head_dim) if settings.key_bytes is None else settings.key_bytes
    require_int("key_bytes", key_bytes, 1, head_dim)
    form = CodeFormat(v_bits=bits.v_bits if isinstance(bits, CodeFormat) else 16 if bits is None else 8)
    fitting = largest_budget(head_dim, key_bytes, form)
    if fitting is not None:
        named = {**exact, "cache_dtype": f"d{form.dense_bits}s{form.value_bits}v{form.v_bits}"}
        variants["topk"] = _top_k(*fitting, head_dim, "dictionary", f", {kept}", named, True)
    fit = {"kind": "scaled", "key_bytes": key_bytes}
    variants["axes"] = _Variant(
        f"bits per axis, {key_bytes} bytes a key, values {kept}",
        {**exact, "cache_dtype": settings.cache_dtype},
        fit,
        True,
    )
    return variants


def _top_k(
    dense_dims: int, topk: int, queries: int, kind: str, kept: str, options: dict[str, Any], is_candidate: bool
) -> _Variant:
    return _Variant(
        f"{dense_dims} dense + top-{topk}{kept}",
        {"topk": topk, "dense_dims": dense_dims, "topk_query": queries, **options},
        {"kind": kind, "topk": topk, "dense_dims": dense_dims},
        is_candidate,
    )


@contextmanager
def _wide_on_a_cpu(model: Any) -> Iterator[None]:
    """On a CPU the model computes in float32, which most CPUs do several times faster than in 16 bits; its weights come out unchanged.
    Large models stay as they are."""
    narrow = [(x, x.dtype) for x in model.parameters() if x.dtype in (torch.bfloat16, torch.float16)]
    if model.device.type != "cpu" or sum(x.numel() for x, _ in narrow) > _MOST_WIDENED:
        yield
        return
    try:
        for x, _ in narrow:
            x.data = x.data.float()
        yield
    finally:
        for x, dtype in narrow:
            x.data = x.data.to(dtype)


def _switch(model: Any, variant: _Variant, basis: FeatureBasis | None) -> None:
    disable(model)
    if variant.options is not None:
        enable(model, basis=basis, **variant.options)


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


def _windows(settings: ConvertSettings, model: Any, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration and evaluation windows that do not overlap."""
    calibration_text, evaluation_text = separate_texts(settings.calibrate, settings.eval)
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    length, count = settings.window or min(_WINDOW, limit or _WINDOW), settings.windows
    return (
        token_windows(tokenizer, calibration_text, length=length, count=2 * count, purpose="calibration"),
        token_windows(tokenizer, evaluation_text, length=length, count=count, purpose="evaluation"),
    )


@torch.no_grad()
def _continued(model: Any, tokenizer: Any, progress: Callable[[], None]) -> str:
    """A greedy continuation."""
    inputs = tokenizer(_PROMPT, return_tensors="pt").to(model.device)
    ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)[0]
    progress()
    return tokenizer.decode(ids, skip_special_tokens=True)


def _cache_bytes(model: Any, window: torch.Tensor) -> dict[str, float]:
    """Bytes of a cache that holds the tokens of `window`, exact ones included, read from its live tensors."""
    cache = fill_cache(model, window)
    tokens, nbytes = len(window), cache_nbytes(cache)
    _, kv_heads, _ = attention_shape(model)
    rows = tokens * len(cache.layers) * kv_heads
    return {
        "kv_bytes_per_token": nbytes["total"] / tokens,
        "key_bytes_per_token_and_head": nbytes["keys"] / rows,
        "value_bytes_per_token_and_head": nbytes["values"] / rows,
    }


@torch.no_grad()
def _attention_times(model: Any, settings: ConvertSettings, progress: Progress) -> list[dict[str, float]]:
    """Median milliseconds of one layer's attention with the model's head counts and widths, dense (SDPA) and as the model is switched.

    In float32, where torch's CPU kernels are at their best. A prompt is coded, and attends as `prefill` says.
    """
    heads, kv_heads, head_dim = attention_shape(model)
    coding = next(module.sfa for module in model.modules() if isinstance(getattr(module, "sfa", None), LayerCoding))
    budget, coder = coding.budget, coding.coder
    step = progress("timing attention", len(settings.contexts))

    def row(n: int) -> dict[str, float]:
        q, k, v = (torch.randn(1, h, n, head_dim, device=model.device) for h in (heads, kv_heads, kv_heads))
        newest = q[:, :, -1:]

        def cached() -> KVView:
            cache = SparseKVCache(
                **coder.arguments(), capacity=n,
                recent=settings.recent, first=settings.first,
            )  # fmt: skip
            return cache.append(k, v)

        def dense(queries: torch.Tensor, is_causal: bool) -> torch.Tensor:
            return F.scaled_dot_product_attention(queries, k, v, is_causal=is_causal, enable_gqa=True)

        def prompt() -> None:
            cached()
            if settings.prefill == "dense":
                dense(q, True)
            else:
                sparse_feature_attention(
                    q,
                    k,
                    v,
                    topk=budget.topk,
                    topk_query=budget.topk_query,
                    dense_dims=budget.dense_dims,
                    is_causal=True,
                )

        kv = cached()
        times = {"context": n, "decode_dense": _median_ms(lambda: dense(newest, False))}
        times["decode_sfa"] = _median_ms(lambda: sparse_feature_decode(newest, kv, topk_query=budget.topk_query))
        if n <= _LONGEST_PREFILL:
            times |= {"prefill_dense": _median_ms(lambda: dense(q, True)), "prefill_sfa": _median_ms(prompt)}
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

"""A dense language model becomes a sparse one, and a report says what it saved and cost: what `flashsfa convert` runs."""

from __future__ import annotations

import gc
import json
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from . import __version__
from .attention import sparse_feature_attention
from .cache.contiguous import SparseKVCache
from .candidates import Candidates, Exact, by_bytes, by_preset, by_topk
from .checks import named_device, require, require_choice
from .choose import Kept, Limits, choose
from .decode import sparse_feature_decode
from .evaluation.subject import Progress
from .evaluation.text import calibration_windows, separate_texts, token_windows
from .files import require_place, whole_folder
from .formats import AUTO
from .huggingface import disable
from .huggingface.attention import LayerCoding
from .huggingface.loading import find_file
from .huggingface.structure import attention_shape, most_positions, require_whole
from .models import BUNDLED_NAME, is_converted, load_model
from .presets import DEFAULT_CACHE_DTYPE, PRESETS, require_key_bytes, require_one_way, require_width
from .stored import KVView

_PROMPT = "The history of science is"
_CONTINUED = 32  # tokens, as far as the model has positions
_WINDOW = 2048
_LONGEST_PREFILL = 4096  # prefill is quadratic: longer contexts are timed for decode alone
# What transformers reads images and videos by.
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_TIMING_MS, _LEAST_TURNS, _MOST_TURNS = 1000, 5, 50


@dataclass(frozen=True)
class ConvertSettings:
    """Arguments of `flashsfa convert`; see its help. None for what is not said."""

    model: str | None = None
    max_loss: float | None = None  # this and the next as in `Limits`: they choose among candidates
    max_bytes: float | None = None
    preset: str | None = None  # a name of `PRESETS`
    key_bytes: int | None = None  # None for `default_key_bytes`, where no topk is given
    topk: int | None = None
    topk_query: int | str | None = None  # None for "dense"
    dense_dims: int | None = None  # None for that of `default_budget`
    basis: str | None = None  # None for `default_kind`
    max_position: int | None = None  # as `gather_moments`'
    calibrate: str | None = None
    eval: str | None = None
    dtype: str = "bfloat16"
    cache_dtype: str | None = None  # as `enable`'s, or "auto" for that of `dtype`; None for `DEFAULT_CACHE_DTYPE`
    recent: int | None = None  # this and the next two as `enable`'s; None for those of `Exact`
    first: int | None = None
    prefill: str | None = None
    window: int | None = None  # None for 2048, or the model's positions if fewer
    windows: int | None = (
        None  # to evaluate on: None for 2, or 4 where limits choose; calibration takes twice as many, or more
    )
    contexts: tuple[int, ...] = (1024, 4096, 16384, 32768)
    tokenizer: str | None = None  # as `load_model`'s
    device: str = "auto"  # as `named_device`'s

    def __post_init__(self) -> None:
        require_one_way(self.key_bytes, self.topk, self.topk_query, self.dense_dims, self.basis)
        require(
            not self.limits or self.preset is None, "a preset is chosen by name and limits choose: give one of them"
        )
        if self.preset is not None:
            require_choice("preset", self.preset, tuple(PRESETS))
        said = ("key_bytes", "topk", "cache_dtype", *(() if self.preset is None else ("recent", "first", "prefill")))
        given = [name for name in said if getattr(self, name) is not None]
        require(
            not given or not (self.limits or self.preset),
            lambda: (
                f"{'a preset' if self.preset else 'the choice'} says it: leave out {', '.join('--' + x.replace('_', '-') for x in given)}"
            ),
        )

    @property
    def limits(self) -> Limits:
        return Limits(self.max_loss, self.max_bytes)

    @property
    def exact(self) -> Exact:
        said: dict[str, Any] = {"recent": self.recent, "first": self.first, "prefill": self.prefill}
        return Exact(**{name: value for name, value in said.items() if value is not None})

    def candidates(self, head_dim: int) -> Candidates | None:
        """What is measured; None for the ladder that limits choose from. Raises `ValueError` for what does not fit the head size."""
        if self.limits:
            return None
        if self.preset is not None:
            preset = PRESETS[self.preset]
            require_width(f"--preset {self.preset}", preset.cache_dtype, head_dim)
            return by_preset(head_dim, preset)
        cache_dtype = None if self.cache_dtype == AUTO else self.cache_dtype or DEFAULT_CACHE_DTYPE
        require_width(f"--cache-dtype {cache_dtype}", cache_dtype, head_dim)
        if self.topk is None:
            require_key_bytes(self.key_bytes, head_dim)
            return by_bytes(head_dim, self.key_bytes, cache_dtype, self.exact, self.basis)
        return by_topk(head_dim, self.topk, self.dense_dims, self.topk_query, self.basis, cache_dtype, self.exact)


def convert(
    settings: ConvertSettings, output: Path, progress: Progress = lambda description, steps: lambda: None
) -> dict[str, Any]:
    """Convert, measure, and write the model, its tokenizer, report.json and report.png to the folder `output`, whole or not at
    all; with limits frontier.png too. Returns the report.

    What a run that ends early has measured stays in a hidden file beside `output`, and the next one goes on from there, with other
    limits too.

    Raises, before any work: `OSError` if `output` cannot be written, `ValueError` if it holds anything, or if the model, its
    texts or the settings do not fit. Later `NothingFitsError`, if no candidate is within the limits.
    """
    is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    require(is_free, f"{output} exists already: name a new directory, or remove it first")
    require_place(output.parent)
    require_place(output)
    require(
        not is_converted(settings.model),
        f"{settings.model} is converted already: give the dense model that it was made of, or measure it with flashsfa eval",
    )
    device = named_device(settings.device)
    both_texts = separate_texts(settings.calibrate, settings.eval)
    loaded = progress("loading the model", 1)
    model, tokenizer = load_model(settings.model, getattr(torch, settings.dtype), settings.tokenizer)
    loaded()
    require_whole(model)
    *_, head_dim = attention_shape(model)
    candidates = settings.candidates(head_dim)
    calibration, evaluation = _windows(settings, both_texts, model, tokenizer)
    model.to(device)
    kept = Kept(output)
    try:
        choice = choose(
            model, calibration, evaluation, settings.limits, candidates=candidates, exact=settings.exact,
            max_position=settings.max_position, kept=kept, progress=progress,
        )  # fmt: skip
        texts = {"dense": _continued(disable(model), tokenizer, progress("generating: dense", 1))}
        choice.switch(model)
        texts["sfa"] = _continued(model, tokenizer, progress(f"generating: {choice.candidate.label}", 1))
        report = {
            "settings": {**asdict(settings), "model": settings.model or BUNDLED_NAME, "head_dim": head_dim},
            "versions": _versions(device),
            "variants": choice.rows,
            "candidates": [name for name, x in choice.candidates.items() if x.may_win],
            "chosen": choice.name,
            "switched": model.config.sfa
            | {"basis": None if choice.candidate.fit is None else choice.candidate.fit["kind"]},
            "perplexity_increase": choice.rows[choice.name]["loss"],
            "texts": texts,
            "attention_ms": _attention_times(model, settings.contexts, progress),
        }
        _write(model, tokenizer, report, settings.model, output)
    except (Exception, KeyboardInterrupt) as stop:
        if kept.path.exists():
            stop.add_note(f"what was measured is kept in {kept.path}: the same command goes on from there")
        raise
    kept.remove()
    return report


def _write(model: Any, tokenizer: Any, report: dict[str, Any], source: str | None, output: Path) -> None:
    from .report import draw, draw_frontier

    try:
        with whole_folder(output) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            for name in _PROCESSOR_FILES:
                file = None if source is None else find_file(source, name, is_optional=True)
                if file is not None:
                    shutil.copy(file, folder / name)
            (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
            draw(report, folder / "report.png")
            if report["settings"]["max_loss"] is not None or report["settings"]["max_bytes"] is not None:
                draw_frontier(report, folder / "frontier.png")
    except Exception as error:  # a full disk is another error in each of the libraries that write here
        raise OSError(f"could not write the result: {error}; make room, or choose another place with -o") from error


def _windows(
    settings: ConvertSettings, texts: tuple[str, str], model: Any, tokenizer: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of the texts to calibrate and to evaluate on. Raises `ValueError` if they, or `max_position`, do not fit the model."""
    limit = most_positions(model)
    length = settings.window or min(_WINDOW, limit or _WINDOW)
    require(limit is None or length <= limit, f"--window must be at most the model's {limit} positions, got {length}")
    furthest = settings.max_position
    require(
        furthest is None or (length <= furthest and (limit is None or furthest <= limit)),
        f"--max-position must be at least the {length} tokens of a window (--window)"
        f"{'' if limit is None else f' and at most the model’s {limit}'}, got {furthest}",
    )
    count = settings.windows or (4 if settings.limits else 2)
    calibration_text, evaluation_text = texts
    return (
        calibration_windows(tokenizer, calibration_text, length=length, least=2 * count),
        token_windows(tokenizer, evaluation_text, length=length, count=count, purpose="evaluation"),
    )


@torch.no_grad()
def _continued(model: Any, tokenizer: Any, progress: Callable[[], None]) -> str:
    """A greedy continuation."""
    inputs = tokenizer(_PROMPT, return_tensors="pt").to(model.device)
    limit = most_positions(model)
    room = _CONTINUED if limit is None else min(_CONTINUED, limit - inputs["input_ids"].shape[1])
    if room < 1:
        progress()
        return _PROMPT
    ids = model.generate(**inputs, max_new_tokens=room, do_sample=False)[0]
    progress()
    return tokenizer.decode(ids, skip_special_tokens=True)


@torch.no_grad()
def _attention_times(model: Any, contexts: Sequence[int], progress: Progress) -> list[dict[str, float]]:
    """Median milliseconds of one layer's attention with the model's head counts and widths, dense (SDPA) and as the model is switched.

    On a CPU in float32, where torch's kernels are at their best. A prompt is coded, and attends as the model's settings say.
    """
    dtype = torch.float32 if model.device.type == "cpu" else model.dtype
    heads, kv_heads, head_dim = attention_shape(model)
    coding = next(module.sfa for module in model.modules() if isinstance(getattr(module, "sfa", None), LayerCoding))
    budget, settings = coding.budget, coding.settings
    step = progress("timing attention", len(contexts))

    def row(n: int) -> dict[str, float]:
        q, k, v = (
            torch.randn(1, h, n, head_dim, dtype=dtype, device=model.device) for h in (heads, kv_heads, kv_heads)
        )
        newest = q[:, :, -1:]

        def cached() -> KVView:
            cache = SparseKVCache(**coding.coder.arguments(), capacity=n, recent=settings.recent, first=settings.first)
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
        times = {"context": n} | _medians_ms(
            decode_dense=lambda: dense(newest, False),
            decode_sfa=lambda: sparse_feature_decode(newest, kv, topk_query=budget.topk_query),
        )
        if n <= _LONGEST_PREFILL:
            times |= _medians_ms(prefill_dense=lambda: dense(q, True), prefill_sfa=prompt)
        step()
        return times

    return [row(n) for n in contexts]


def _medians_ms(**runs: Callable[[], Any]) -> dict[str, float]:
    """Median milliseconds of each of `runs`, which take turns, so that what else the machine does meets all of them."""

    def timed(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    first = sum(min(timed(run) for _ in range(2)) for run in runs.values())  # without what the first call compiles
    turns = min(_MOST_TURNS, max(_LEAST_TURNS, round(_TIMING_MS / first)))
    gc.collect()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            times[name].append(timed(run))
    return {name: statistics.median(found) for name, found in times.items()}


def _versions(device: torch.device) -> dict[str, str]:
    found = {"flashsfa": __version__, "torch": torch.__version__, "python": platform.python_version()}
    found["transformers"] = version("transformers")
    on_gpu = device.type == "cuda"
    return found | {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    }

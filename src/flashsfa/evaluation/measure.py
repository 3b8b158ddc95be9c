"""The evaluations of `flashsfa eval`, whole: a model is loaded and switched, its variants are measured, the figures are written.

Each raises `ValueError` for settings that do not fit, with nothing written, and returns the document and the files written. Its
"results" hold a variant's figures by its name, "sfa" or "dense".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..benchmarking.results import incomplete_note
from ..checks import MOST_TOKENS, named_device, require, require_int, require_tolerance
from ..files import require_place
from ..huggingface.loading import read_config
from ..huggingface.settings import SFASettings
from ..huggingface.switch import load_basis
from ..models import is_converted, load_model, tokenizer_of
from . import VARIANTS, frontier, needle
from .harness import Harness
from .haystack import Haystack, samples
from .memory import cache_bytes_per_token
from .perplexity import spread
from .results import document, save
from .subject import Progress, Subject, SubjectSettings
from .text import read_text, separate_texts, token_windows
from .tolerance import decode_losses

_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of needles
_LENGTHS = (512, 1024, 2048, _LONGEST := 4096)  # where nothing is asked for
_MODEL_FOLDER = "model"  # of a run

Measured = tuple[dict[str, Any], list[Path]]


def measure_perplexity(
    settings: SubjectSettings, output: Path, progress: Progress, *, text: str | None, window: int | None, windows: int
) -> Measured:
    """Perplexity over `windows` windows of `window` tokens, its standard error, and bytes of the cache per token.

    Args:
        text: file or folder; None for `read_text`'s own.
        window: None for 4096, or the model's positions if fewer.
    """
    with _fitting(output):
        calibration_text, evaluation_text = separate_texts(settings.calibrate, text)
        subject = Subject(settings)
        window = subject.fitting((_LONGEST,))[0] if window is None else window
        subject.require_length(window, "--window")
        cut = token_windows(subject.tokenizer, evaluation_text, length=window, count=windows, purpose="evaluation")
        calibration = subject.calibration_windows(calibration_text, window)
        content = _document("perplexity", subject, text=text, window=window, windows=windows)
        for name in subject.variants(calibration, window, progress):
            losses = decode_losses(subject.model, cut, progress(f"perplexity: {VARIANTS[name]}", len(cut)))
            perplexity, error = spread(losses)
            content["results"][name] = {
                "perplexity": perplexity, "standard_error": error, "windows": len(cut), "tokens": cut.numel(),
                "window_losses": losses, "kv_bytes_per_token": cache_bytes_per_token(subject.model, cut[0]),
            }  # fmt: skip
        return _written(content, subject, output)


def measure_needles(
    settings: SubjectSettings, output: Path, progress: Progress, *,
    text: str | None, task: str, lengths: Sequence[int] | None, depths: Sequence[int], trials: int, seed: int,
) -> Measured:  # fmt: skip
    """What is found again of `task`, over contexts of `lengths` tokens and needles at `depths` percent, with a picture.

    Args:
        text: file or folder for the hay; None for `read_text`'s own.
        lengths: None for 512 to 4096, as far as the model has positions.
        trials: prompts for each length and depth.
    """
    for length in lengths or ():
        require_int("each of --lengths", length, 1, MOST_TOKENS)
    require(all(0 <= d <= 100 for d in depths), f"--depths are percents from 0 to 100, got {depths}")
    with _fitting(output):
        calibration_text, hay = separate_texts(settings.calibrate, text)
        subject = Subject(settings)
        lengths = subject.fitting(_LENGTHS) if lengths is None else lengths
        longest = max(lengths)
        subject.require_length(longest, "--lengths")
        prompts = samples(
            task, Haystack(subject.tokenizer, hay), lengths, [depth / 100 for depth in depths], trials, seed
        )
        calibration = subject.calibration_windows(calibration_text, longest)
        own = {"text": text, "task": task, "lengths": lengths, "depths": depths, "trials": trials, "seed": seed}
        content, grids = _document("needle", subject, **own), {}
        for name in subject.variants(calibration, longest, progress):
            step = progress(f"{task}: {VARIANTS[name]}", len(prompts))
            rows = needle.find_needles(subject.model, subject.tokenizer, prompts, step)
            grids[name] = needle.ScoreGrid.of(rows)
            content["results"][name] = {"score": grids[name].mean, "rows": rows}
        title = f"{subject.name}, needle: {task}" + (f", {_label(subject.switched)}" if subject.switched else "")
        return _written(content, subject, output, lambda path: needle.draw(title, grids, path))


def measure_tasks(
    settings: SubjectSettings, output: Path, progress: Progress, *,
    tasks: list[str], include_path: Path | None, limit: int | None, num_fewshot: int | None, batch_size: int,
) -> Measured:  # fmt: skip
    """lm-eval's `tasks`; arguments as in `Harness`."""
    with _fitting(output):
        harness = Harness(tasks, include_path)
        subject = Subject(settings)
        longest = subject.usual_length if settings.max_position is None else settings.max_position
        subject.require_length(longest, "--max-position")
        calibration = subject.calibration_windows(read_text(settings.calibrate), longest)
        asked: dict[str, Any] = {"batch_size": batch_size, "limit": limit, "num_fewshot": num_fewshot}
        content = _document("lm-eval", subject, tasks=tasks, include_path=include_path, **asked)
        for name in subject.variants(calibration, longest, progress):
            content["results"][name] = harness.evaluate(subject.model, subject.tokenizer, **asked)
        return _written(content, subject, output)


def measure_frontier(
    models: Sequence[str], output: Path, progress: Progress, *,
    text: str | None, lengths: Sequence[int], windows: int, tolerances: Sequence[float], trials: int, decode: Sequence[Path],
    dtype: str, device: str, tokenizer: str | None,
) -> Measured:  # fmt: skip
    """What trained models lose in each form of their caches, with a picture; "results" hold a model's figures by its name. Those that
    there are when it is stopped are written too, marked as incomplete, and a note of the interrupt names the files.

    Args:
        models: directories; the dense model that the others are compared with, then those, switched or dense.
        text: file or folder; None for `read_text`'s own.
        lengths: tokens of a window, of which there are at most `windows` each, and of a haystack.
        tolerances: of values, in 16 bits.
        trials: needles for each length and depth; 0 for none.
        decode: results of `flashsfa bench decode`.
    """
    for length in lengths:
        require_int("each of --lengths", length, 2, MOST_TOKENS)
    for tolerance in tolerances:
        require_tolerance(tolerance, "each of --tolerances")
    require(
        not is_converted(models[0]),
        f"{models[0]} is switched: name the dense model first, which the others are compared with",
    )
    for name in models:
        if is_converted(name):
            frontier.require_forms(name, SFASettings.from_config(read_config(name)["sfa"]))
    _require_comparable(models, tokenizer, max(lengths))
    labels = _labels(models)
    with _fitting(output):
        recorded, timed_on = frontier.read_recorded(decode)
        source, where = read_text(text), named_device(device)
        results: frontier.Results = {}
        whole: list[str] = []  # models of which all is measured
        settings = {
            "models": list(models), "text": text, "lengths": lengths, "windows": windows, "tolerances": tolerances, "trials": trials,
            "decode": [path.name for path in decode], "decode_device": timed_on, "dtype": dtype,
        }  # fmt: skip

        def write(incomplete: str | None = None) -> Measured:
            measured = {label: model for label, model in results.items() if model["forms"]}
            frontier.compare(measured)
            content, title = document("frontier", settings, where) | {"results": measured}, ""
            if incomplete is not None:
                content, title = {"incomplete": incomplete, **content}, f"incomplete: {incomplete}"
            return content, save(
                content, output, lambda path: frontier.draw(title, measured, max(lengths), timed_on, path)
            )

        def measure_all() -> None:
            for name, label in zip(models, labels, strict=True):
                model, own = load_model(name, getattr(torch, dtype), tokenizer)
                cuts = {n: token_windows(own, source, length=n, count=windows, purpose="evaluation") for n in lengths}
                prompts = samples("single", Haystack(own, source), lengths, _DEPTHS, trials, 0) if trials else []
                frontier.measure_model(
                    results,
                    label,
                    model.to(where),
                    own,
                    load_basis(name),
                    cuts,
                    tolerances,
                    prompts,
                    recorded,
                    progress,
                )
                whole.append(label)

        try:
            measure_all()
        except KeyboardInterrupt as stop:
            if any(model["forms"] for model in results.values()):
                _, paths = write(f"{len(whole)} of {len(models)} models")
                stop.add_note(incomplete_note(paths))
            raise
        return write()


def _require_comparable(models: Sequence[str], tokenizer: str | None, tokens: int) -> None:
    """Raise `ValueError` before anything is measured unless all models have one vocabulary and positions for so many tokens."""
    vocabulary = None
    for name in models:
        own = tokenizer_of(name, tokenizer).get_vocab()
        vocabulary = own if vocabulary is None else vocabulary
        require(own == vocabulary, f"{name} has another tokenizer than {models[0]}: losses per token do not compare")
        config = read_config(name)
        config = config.get("text_config", config)
        limit = config.get("max_position_embeddings", config.get("n_positions"))  # GPT-2's word for it
        require(
            limit is None or tokens <= limit,
            f"{name} has {limit} positions, fewer than the {tokens} tokens of --lengths: give fewer",
        )


def _labels(models: Sequence[str]) -> list[str]:
    """A short name for each model: that of its folder, or of its run."""
    paths = [Path(name).absolute() for name in models]
    found = [path.parent.name if path.name == _MODEL_FOLDER else path.name for path in paths]
    require(len(set(found)) == len(found), f"two of the models are named alike: {', '.join(found)}")
    return found


@contextmanager
def _fitting(output: Path) -> Iterator[None]:
    """Results can be written to `output`, and a GPU that is too small is said in one line."""
    require_place(output)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError("the GPU is out of memory: use shorter contexts, or smaller batches") from error


def _document(evaluation: str, subject: Subject, **own: Any) -> dict[str, Any]:
    settings = {name: getattr(subject.settings, name) for name in ("dense", "dtype", "device")}
    return document(evaluation, {"model": subject.name, **settings, **own}, subject.model.device)


def _written(
    content: dict[str, Any], subject: Subject, output: Path, draw: Callable[[Path], None] | None = None
) -> Measured:
    content["settings"]["sfa"] = subject.switched
    return content, save(content, output, draw)


def _label(switched: dict[str, Any]) -> str:
    kept = "" if switched["cache_dtype"] is None else f", {switched['cache_dtype']}"
    if switched["recent"] or switched["first"]:
        kept += f", {switched['recent']} newest and {switched['first']} first tokens exact"
    keys = "bits per axis"
    if switched["topk"] is not None:
        keys = f"{switched['dense_dims']} dense features + top-{switched['topk']}"
    return f"{keys}{kept}"

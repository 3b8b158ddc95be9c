"""What each way to keep a cache costs a converted model, as decode sees it, at short and long contexts: SmolLM2-135M-Instruct, no training.

    python benchmarks/cache_quality.py TRAIN.txt TEXT.txt [TEXT.txt ...] [--only NAME ...]

Calibrates on 16 windows of 1024 tokens evenly over TRAIN.txt, and evaluates on each TEXT: 12 windows of 1024 tokens in float32, and on the last
TEXT 8 windows of 8192 in bfloat16. Bytes are those of live caches. `--only` measures the rows of these names alone, beside "dense".
Writes benchmarks/results/cache-DATE-COMMIT.json; three minutes on an H200.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from flashsfa.basis import FeatureBasis
from flashsfa.evaluation.memory import fill_cache
from flashsfa.evaluation.perplexity import window_losses
from flashsfa.evaluation.results import document, save
from flashsfa.evaluation.text import read_text, token_windows
from flashsfa.huggingface import cache_nbytes, disable, enable
from flashsfa.huggingface.calibration import gather_moments
from flashsfa.models import BUNDLED_NAME, load_model
from flashsfa.presets import PRESETS

EXACT = {"recent": 32, "first": 4}
WHOLE = {"topk": 64, "dense_dims": 0, "topk_query": "dense"}
CODE = {"topk": 12, "dense_dims": 22}


def variants() -> dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    """`enable`'s options and `FeatureBasis.from_layers`' by name."""
    dictionary, queries = {"kind": "dictionary", **CODE}, {**CODE, "topk_query": "dense"}
    found: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
        "dense": (None, None),
        "dense, int8": ({**WHOLE, "cache_dtype": "d8s8v8", **EXACT}, None),
        "dense, int4": ({**WHOLE, "cache_dtype": "int4", **EXACT}, None),
        "dense, int4, nothing exact": ({**WHOLE, "cache_dtype": "int4"}, None),
        "dense, keys in 4 bits, values in 3": ({**WHOLE, "cache_dtype": "d8s4v3", **EXACT}, None),
        "22+k12, 16 bits, nothing exact": (queries, dictionary),
        "22+k12, int4": ({**queries, "cache_dtype": "int4", **EXACT}, dictionary),
    }
    for cache_dtype, values, widths in (
        ("int4", "", (40, 36, 32, 30, 28, 26, 24)),
        ("d8s4v3", ", values in 3 bits", (44, 40, 36, 32, 28, 24)),
    ):
        for key_bytes in widths:
            fit = {"kind": "scaled", "key_bytes": key_bytes}
            found[f"bits per axis, {key_bytes}{values}"] = ({"cache_dtype": cache_dtype, **EXACT}, fit)
    lossless = PRESETS["near-lossless"]
    exact = {"recent": lossless.recent, "first": lossless.first}
    fit = {"kind": "scaled", "key_bytes": lossless.key_bytes_of(64)}
    found["near-lossless"] = ({"cache_dtype": lossless.cache_dtype, **exact}, fit)
    fit = {"kind": "scaled", "key_bytes": 36}
    for recent, first in ((0, 0), (16, 4), (64, 4), (32, 0)):
        options = {"cache_dtype": "int4", "recent": recent, "first": first}
        found[f"bits per axis, 36, {recent} newest and {first} first"] = (options, fit)
    return found


LONG = (
    "dense", "dense, int4", "bits per axis, 36", "bits per axis, 32", "bits per axis, 26", "22+k12, int4",
    "bits per axis, 36, values in 3 bits", "bits per axis, 32, values in 3 bits",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--only", nargs="+", default=list(variants()), metavar="NAME", choices=list(variants()))
    given = parser.parse_args()
    train, texts, chosen = given.train, given.texts, {"dense", *given.only}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Any] = {}
    for length, count, dtype, sources in ((1024, 12, torch.float32, texts), (8192, 8, torch.bfloat16, texts[-1:])):
        names = [name for name in variants() if name in chosen and (length == 1024 or name in LONG)]
        if length > 1024 and names == ["dense"]:
            continue
        model, tokenizer = load_model(None, dtype)
        model.to(device)
        calibration = token_windows(tokenizer, read_text(train), length=1024, count=16, purpose="calibration")
        moments = gather_moments(model, calibration)
        windows = {
            text.name: token_windows(tokenizer, read_text(text), length=length, count=count, purpose="evaluation")
            for text in sources
        }
        for name in names:
            options, fit = variants()[name]
            disable(model)
            if options is not None:
                enable(model, basis=None if fit is None else FeatureBasis.from_layers(moments, **fit), **options)
            row = {"options": options, "fit": fit, "losses": {t: window_losses(model, w) for t, w in windows.items()}}
            cache = fill_cache(model, next(iter(windows.values()))[0])
            row["bytes"] = cache_nbytes(cache)["total"] / (
                length * len(cache.layers) * model.config.num_key_value_heads
            )
            results.setdefault(str(length), {})[name] = row
            print(length, name, flush=True)
    settings = {"model": BUNDLED_NAME, "calibration": train.name, "texts": [text.name for text in texts]}
    content = document("cache", settings, device)
    content["results"] = results
    print(*save(content, Path("benchmarks/results")))


if __name__ == "__main__":
    main()

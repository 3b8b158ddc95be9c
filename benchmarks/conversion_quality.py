"""What each configuration of the README costs a converted model, all on one text: SmolLM2-135M-Instruct, no training.

    python benchmarks/conversion_quality.py

Calibrated on one half of Python's help topics and evaluated on the other, as `make demo` does, but in float32, which every CPU multiplies
quickly; names without int8 keep codes as they are. Writes benchmarks/results/conversion-DATE-COMMIT.json; a quarter of an hour on two cores.
"""

from __future__ import annotations

from pathlib import Path

import torch

import flashsfa
from flashsfa.benchmarking.configuration import Configuration
from flashsfa.evaluation.perplexity import perplexity
from flashsfa.evaluation.results import document, save
from flashsfa.evaluation.text import separate_texts, token_windows
from flashsfa.huggingface import attention_shape
from flashsfa.models import BUNDLED_NAME, load_model

WINDOW, WINDOWS = 768, 10
NAMES = (
    "dense", "dense-int8", "22+k12", "22+k12-int8", "28+k12", "28+k12-int8", "32+k8", "32+k8-int8", "24+k8", "16+k8", "k8",
)  # fmt: skip


def main() -> None:
    model, tokenizer = load_model(None, torch.float32)
    *_, head_dim = attention_shape(model)
    calibration, evaluation = (
        token_windows(tokenizer, text, length=WINDOW, count=WINDOWS, purpose="the")
        for text in separate_texts(None, None)
    )
    settings = {"model": BUNDLED_NAME, "window": WINDOW, "windows": WINDOWS, "dtype": "float32", "queries": "dense"}
    basis, calibrated = None, None
    content = document("conversion", settings, model.device)
    for name in NAMES:
        row: dict[str, object] = {"perplexity": None}
        if name != "dense":
            configuration = Configuration.named(name, head_dim)
            topk, dense_dims = configuration.code
            cache_dtype = "int8" if configuration.bits == 8 else None
            budget = {"topk": topk, "dense_dims": dense_dims}
            flashsfa.disable(model)
            if calibrated != budget:  # the row before may have the same features in 16 bits
                basis = None if name == "dense-int8" else flashsfa.calibrate(model, calibration, **budget)
                calibrated = budget
            flashsfa.enable(model, **budget, topk_query=head_dim, basis=basis, cache_dtype=cache_dtype)
            row |= budget | {"cache_dtype": cache_dtype}
        row["perplexity"] = perplexity(model, evaluation)
        content["results"][name] = row
        print(name, row, flush=True)
    print(*save(content, Path("benchmarks/results")))


if __name__ == "__main__":
    main()

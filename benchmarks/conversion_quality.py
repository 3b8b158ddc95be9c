"""What each configuration of the README costs a converted model, all on one text: SmolLM2-135M-Instruct, no training.

    python benchmarks/conversion_quality.py

Calibrated on one half of Python's help topics and evaluated on the other, as `make demo` does. Writes
benchmarks/results/conversion-DATE-COMMIT.json; twenty minutes on two CPU cores.
"""

from __future__ import annotations

from pathlib import Path

import torch

import flashsfa
from flashsfa.evaluation.perplexity import perplexity
from flashsfa.evaluation.results import document, save
from flashsfa.evaluation.text import separate_texts, token_windows
from flashsfa.huggingface import SparseCache, attention_shape, cache_nbytes
from flashsfa.models import BUNDLED_NAME, load_model

WINDOW, WINDOWS = 768, 10
# name: (dense_dims, topk, cache_dtype). 63 + 1 is every feature: what an int8 cache of the dense model holds, and one index.
CONFIGURATIONS = {
    "dense": None,
    "dense-int8": (63, 1, "int8"),
    "22+k12": (22, 12, None),
    "22+k12-int8": (22, 12, "int8"),
    "28+k12": (28, 12, None),
    "28+k12-int8": (28, 12, "int8"),
    "32+k8": (32, 8, None),
    "32+k8-int8": (32, 8, "int8"),
    "24+k8": (24, 8, None),
    "16+k8": (16, 8, None),
    "k16": (0, 16, None),
    "k8": (0, 8, None),
}


def main() -> None:
    model, tokenizer = load_model(None, torch.bfloat16)
    *_, head_dim = attention_shape(model)
    calibration, evaluation = (
        token_windows(tokenizer, text, length=WINDOW, count=WINDOWS, purpose="the")
        for text in separate_texts(None, None)
    )
    settings = {"model": BUNDLED_NAME, "window": WINDOW, "windows": WINDOWS, "dtype": "bfloat16", "queries": "dense"}
    content = document("conversion", settings, model.device)
    for name, kept in CONFIGURATIONS.items():
        row = {"perplexity": None, "kv_bytes_per_token": None}
        if kept is not None:
            dense_dims, topk, cache_dtype = kept
            budget = {"topk": topk, "dense_dims": dense_dims}
            flashsfa.disable(model)
            basis = None if name == "dense-int8" else flashsfa.calibrate(model, calibration, **budget)
            flashsfa.enable(model, **budget, topk_query=head_dim, basis=basis, cache_dtype=cache_dtype)
            row |= budget | {"cache_dtype": cache_dtype}
        row["perplexity"] = perplexity(model, evaluation)
        row["kv_bytes_per_token"] = bytes_per_token(model, evaluation[:1])
        content["results"][name] = row
        print(name, row, flush=True)
    print(*save(content, Path("benchmarks/results")))


@torch.no_grad()
def bytes_per_token(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Of keys and values in all layers, read from the tensors of a cache that has been filled."""
    cache = SparseCache(model) if hasattr(model.config, "sfa") else None
    cache = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
    return cache_nbytes(cache)["total"] / cache.get_seq_length()


if __name__ == "__main__":
    main()

"""What presses of kvpress and caches of few bits lose, each alone and together, at equal bytes: SmolLM2-135M-Instruct, no training.

    python benchmarks/press_quality.py TRAIN.txt TEXT.txt

Needs kvpress, which the environment of `make test` holds. Calibrates on 8 windows of 1024 tokens evenly over TRAIN.txt.
The dense model reads each prompt of TEXT.txt once, as with `prefill="dense"`, while every press scores its tokens; then each cache keeps as many of
the best as its bytes allow, and the model goes on. What follows attends to itself as it comes, so all that is lost is lost by the cache of the
prompt. Measured are the loss of 256 tokens after 1024, and needles whose question comes after pruning. Bytes are those of a 16-bit model, tokens
kept exactly included. Writes benchmarks/results/presses-DATE-COMMIT.json; a quarter of an hour on two cores, a prompt on each.
"""

from __future__ import annotations

import math
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from kvpress import ExpectedAttentionPress, KnormPress, ScorerPress, SnapKVPress
from torch import Tensor

from flashsfa.basis import FeatureBasis
from flashsfa.evaluation.haystack import Haystack, Sample, samples
from flashsfa.evaluation.memory import token_bytes
from flashsfa.evaluation.perplexity import spread
from flashsfa.evaluation.results import document, save
from flashsfa.evaluation.text import read_text, token_windows
from flashsfa.huggingface import SparseCache, attention_shape, disable, enable, pruning
from flashsfa.huggingface.calibration import gather_moments
from flashsfa.models import BUNDLED_NAME, load_model

PROMPT, CONTINUATION, WINDOWS = 1024, 256, 12
NEEDLES: dict[str, Any] = {"lengths": (1024,), "depths": (0.1, 0.3, 0.5, 0.7, 0.9), "trials": 4, "seed": 0}
BUDGETS = (0.5, 0.25, 0.125)  # of a dense cache in 16 bits
PRESSES = {"SnapKV": SnapKVPress(), "ExpectedAttention": ExpectedAttentionPress(), "Knorm": KnormPress()}

EXACT = {"recent": 32, "first": 4}
WHOLE = {"topk": 64, "dense_dims": 0, "topk_query": "dense"}
CODE = {"topk": 12, "dense_dims": 28}
CACHES: dict[
    str, tuple[dict[str, Any], dict[str, Any] | None]
] = {  # `enable`'s options and `FeatureBasis.from_layers`'
    "dense": (WHOLE, None),
    "dense-int8": ({**WHOLE, "cache_dtype": "d8s8v8"}, None),
    "28+k12-int8": ({**CODE, "topk_query": "dense", "cache_dtype": "int8"}, {"kind": "dictionary", **CODE}),
    "dense-int4": ({**WHOLE, "cache_dtype": "int4", **EXACT}, None),
    "axes36-int4": ({"cache_dtype": "int4", **EXACT}, {"kind": "scaled", "key_bytes": 36}),
}


class Reading(ScorerPress):
    """Drops nothing, and notes by layer the keys, the values and the order in which each press would keep their tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[int, tuple[Tensor, Tensor, dict[str, Tensor]]] = {}

    def score(
        self, module: Any, hidden_states: Tensor, keys: Tensor, values: Tensor, attentions: None, kwargs: Any
    ) -> Tensor:
        scores = {
            name: press.score(module, hidden_states, keys, values, attentions, kwargs)
            for name, press in PRESSES.items()
        }
        self.layers[module.layer_idx] = (
            keys,
            values,
            {name: x.argsort(-1, descending=True) for name, x in scores.items()},
        )
        return next(iter(scores.values()))

    def fill(self, cache: SparseCache) -> None:
        for index, (keys, values, _) in self.layers.items():
            cache.update(keys, values, index)

    def prune(self, cache: SparseCache, press: str, kept: int) -> None:
        """Of the prompt in a cache that holds it, or some of it, keep the best `kept` tokens of each kv head."""
        for index, (keys, values, orders) in self.layers.items():
            best = orders[press][..., :kept].sort().values[..., None].expand(-1, -1, -1, keys.shape[-1])
            cache.layers[index].replace_prompt(keys.gather(2, best), values.gather(2, best))


def tokens_within(budget: float, tokens: int, dense: int, coded: int, exact: int) -> int:
    """Of `tokens`, how many a cache holds in the share `budget` of their bytes in 16 bits, `dense` each: `exact` of them take as many, and
    the others `coded`."""
    room = budget * tokens * dense
    return min(tokens, int(room // dense if room < exact * dense else (room - exact * (dense - coded)) // coded))


def read(model: Any, prompt: Tensor) -> Reading:
    reading = Reading()
    enable(model, **WHOLE, prefill="dense")
    with torch.no_grad(), pruning(model, reading):
        model(input_ids=prompt[None], past_key_values=SparseCache(model), logits_to_keep=1)
    return reading


@torch.no_grad()
def continued(model: Any, cache: SparseCache, ids: Tensor) -> Tensor:
    """Logits that a filled cache gives for each of `ids` but the first; the cache is left as it was."""
    logits = model(input_ids=ids[None], past_key_values=cache).logits[0, :-1].float()
    cache.crop(-len(ids))
    return logits


def measure(number: int) -> dict[str, dict[str, Any]]:
    """What the prompt of this number says of each row: its loss of what follows, or, where that ends in an answer, whether greedy decoding
    writes it."""
    model, bases, prompts = STATE
    prompt, then, answer = prompts[number]
    reading, (*_, head_dim), rows = read(model, prompt), attention_shape(model), {}
    for name, (options, _) in CACHES.items():
        enable(disable(model), basis=bases.get(name), prefill="dense", **options)
        dense, exact = 4 * head_dim, options.get("recent", 0) + options.get("first", 0)
        coded = dense if name == "dense" else token_bytes(model)
        choices: list[tuple[str | None, float | None, int]] = [(None, None, len(prompt))]
        for budget in BUDGETS:
            kept = tokens_within(budget, len(prompt), dense, coded, exact)
            choices += [(press, budget, kept) for press in PRESSES if kept < len(prompt)]
        cache = SparseCache(model)
        reading.fill(cache)
        for press, budget, kept in choices:
            if press is not None:
                reading.prune(cache, press, kept)
            logits = continued(model, cache, then)
            row: dict[str, Any] = {"cache": name, "press": press, "budget": budget, "coded_bytes": coded}
            row["bytes"] = (kept * coded + min(kept, exact) * (dense - coded)) / len(prompt)
            if answer:
                row["found"] = bool((logits[-answer:].argmax(-1) == then[-answer:]).all())
            else:
                row["losses"] = F.cross_entropy(logits, then[1:]).item()
            rows[name if press is None else f"{name}, {press}, {budget}"] = row
    return rows


STATE: Any = None  # model, bases and prompts of a worker


def share(*state: Any) -> None:
    global STATE
    STATE = state
    torch.set_num_threads(1)


def asked(haystack: Haystack, sample: Sample) -> tuple[Tensor, Tensor, int]:
    """A sample's context, its question with the answer, and the tokens of the answer."""
    mark = haystack.encode("\n\nQuestion:")
    place = max(i for i in range(len(sample.prompt)) if sample.prompt[i : i + len(mark)] == mark)
    answer = haystack.encode(f" {sample.answers[0]}")
    return torch.tensor(sample.prompt[:place]), torch.tensor(sample.prompt[place:] + answer), len(answer)


def main() -> None:
    train, text = (Path(name) for name in sys.argv[1:])
    model, tokenizer = load_model(None, torch.float32)
    settings = {
        "model": BUNDLED_NAME, "dtype": "float32", "kvpress": version("kvpress"), "calibration": train.name, "text": text.name, "prompt": PROMPT,
        "continuation": CONTINUATION, "needles": NEEDLES, "prefill": "dense", "caches": {name: options for name, (options, _) in CACHES.items()},
    }  # fmt: skip
    content = document("presses", settings, model.device)
    calibration = token_windows(tokenizer, read_text(train), length=1024, count=8, purpose="calibration")
    moments = gather_moments(model, calibration)
    bases = {name: FeatureBasis.from_layers(moments, **fit) for name, (_, fit) in CACHES.items() if fit is not None}
    haystack = Haystack(tokenizer, read_text(text))
    windows = token_windows(
        tokenizer, read_text(text), length=PROMPT + CONTINUATION, count=WINDOWS, purpose="evaluation"
    )
    prompts = [(x[:PROMPT], x[PROMPT:], 0) for x in windows]
    prompts += [asked(haystack, sample) for sample in samples("single", haystack, **NEEDLES)]
    rows: dict[str, Any] = {}
    with ProcessPoolExecutor(2, get_context("fork"), share, (model, bases, prompts)) as pool:
        for number, found in enumerate(pool.map(measure, range(len(prompts))), 1):
            for name, row in found.items():
                kept = rows.setdefault(name, {**row, "bytes": [], "losses": [], "found": []})
                for key in ("bytes", "losses", "found"):
                    kept[key] += [row[key]] if key in row else []
            print(f"{number} of {len(prompts)} prompts", flush=True)
    for name, row in rows.items():
        ratio, error = spread(row["losses"], rows["dense"]["losses"])
        print(
            f"{name:40} {fmean(row['bytes']):6.1f} bytes {100 * (ratio - 1):+7.2f} ± {100 * (error or math.nan):.2f} %  "
            f"{sum(row['found'])} of {len(row['found'])} needles"
        )
    content["results"] = rows
    print(*save(content, Path("benchmarks/results")))


if __name__ == "__main__":
    main()

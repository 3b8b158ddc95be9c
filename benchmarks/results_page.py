"""The tables of docs/results.md, the index of benchmarks/results and the picture of the README, made from the JSON files.

    python benchmarks/results_page.py          # `make results`

Nothing is measured here and no figure is typed in: what no file holds stands as –. Of several runs of a benchmark the newest one of a
clean commit is shown; where there is none, the newest of a changed tree, marked so. A configuration has one name in all tables:
`16+k16-int8` keeps 16 dense features and the 16 largest of the others of each key, in 8 bits.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from flashsfa.benchmarking.cases import rival_name
from flashsfa.benchmarking.configuration import Configuration, code_name
from flashsfa.benchmarking.plots import speedup_bars
from flashsfa.benchmarking.results import compared
from flashsfa.evaluation import frontier
from flashsfa.evaluation.perplexity import spread
from flashsfa.extras import pyplot
from flashsfa.formats import CodeFormat, cache_bits

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, INDEX = ROOT / "docs" / "results.md", RESULTS / "README.md"
DECODE_PICTURE, BYTES_PICTURE, SERVED_PICTURE, TRAINING_PICTURE, FRONTIER_PICTURE = (
    ROOT / "docs" / "images" / name
    for name in ("decode-speed.png", "decode-bytes.png", "served.png", "gpt2-124m.png", "frontier-d128.png")
)


def _runs(operation: str, *, on_gpu: bool = True) -> list[str]:
    """The whole runs of a benchmark, those of changed trees first, else by date."""
    found = []
    for path in RESULTS.glob("*.json"):
        run = json.loads(path.read_text())
        where = run.get("environment", {})
        if run.get("operation") == operation and _is_gpu(where) == on_gpu and "incomplete" not in run:
            found.append((not _is_dirty(where), where["date"], path.stem))
    return [stem for *_, stem in sorted(found)]


def _is_gpu(environment: dict[str, Any]) -> bool:
    return not environment["device"].endswith(" threads")  # as a CPU's name ends


def _is_dirty(environment: dict[str, Any]) -> bool:
    return str(environment.get("commit")).endswith("-dirty")


DECODE, DECODE_CPU = _runs("decode")[::-1], _runs("decode", on_gpu=False)[-1]
PREFILL, SELECTION = _runs("prefill")[-1], _runs("topk")[-1]
WHOLE_MODELS, PLAIN = _runs("generate")[::-1], "generate-plain-2026-11-30-5105982"
STATIC = tuple(f"generate-static-2026-11-30-{commit}" for commit in ("63c377b", "e672356", "5105982"))
GPT2 = ("training-gpt2-2026-11-26-030f89a", "training-gpt2-2026-11-26-f7db930", "training-gpt2-2026-11-27-cd8fbd1")
QWEN3 = ("training-qwen3-2026-11-26-030f89a", "training-qwen3-2026-11-26-f7db930")
QWEN3_WIDE = (
    "training-qwen3-d128-2026-11-29-bea940b", "training-qwen3-d128-2026-11-29-673c449", "training-qwen3-d128-2026-11-30-0712d4a",
    "training-qwen3-d128-2026-11-30-47f92a6",
)  # fmt: skip
GPT2_LARGE = tuple(f"training-gpt2-124m-2026-11-30-{commit}" for commit in ("85c115d", "c6b83d9", "5105982", "196044a"))
GPT2_CUT = "training-gpt2-124m-2026-11-30-c421c47"
QWEN3_LATE, QWEN3_LATE_BITS = "training-qwen3-d128-2026-11-30-f9b44b8", "perplexity-qwen3-late-2026-11-30-f9b44b8"
GPT2_STOPPED = "training-gpt2-124m-2026-11-30-0712d4a"
GPT2_FRONTIER, TOLERANCE = "frontier-gpt2-124m-2026-11-30-85c115d", "tolerance-smollm2-2026-11-30-42ceffb"
HEALED = ("heal-d128-2026-11-30-63c377b", "heal-d128-2026-11-30-24b0076")
HEALED_LONG = ("heal-d128-8k-2026-11-30-2d90403", "heal-d128-8k-2026-12-01-b8ca730")
LONG_FRONTIER = "frontier-d128-8k-2026-12-01-b8ca730"
AXES_HEALED, AXES_FRONTIER = (
    tuple(f"{name}-2026-12-01-{commit}" for commit in ("b6f4c3c", "94dc0b0")) for name in ("heal-d128", "frontier-d128")
)
AXES_TIMES, AXES_GPT2 = "times-axes-2026-12-01-b6f4c3c", "convert-gpt2-124m-2026-12-01-b6f4c3c"
AXES_GPT2_SMALL, GPT2_SEEDS = "convert-gpt2-27m-2026-12-01-94dc0b0", "training-gpt2-124m-2026-12-01-e7d5da1"
GPT2_HEALED, AXES_GPT2_FRONTIER = (
    tuple(f"{name}-gpt2-124m-2026-12-01-{commit}" for commit in ("94dc0b0", "e7d5da1")) for name in ("heal", "frontier")
)
VALUES3, VALUES3_TIMES, VALUES3_TEXTS = (
    "values3-2026-12-01-94dc0b0", "times-values3-2026-12-01-94dc0b0", "cache-2026-12-01-e7d5da1",
)  # fmt: skip
ROTARY, WIDE = "convert-rotary-2026-11-30-47f92a6", "convert-d128-2026-11-30-aa35b10"
TRIALS, STEP = "training-trials-2026-11-26-f7db930", "training-step-2026-11-26-f7db930"
CACHES, LOSSLESS, CHOSEN = "cache-2026-11-29-ddb8670", "cache-2026-11-29-43c8b11", "choose-2026-11-29-088926f"
SERVED, SERVED_SHORT, SERVED_REST = "serve-2026-11-30-afa3c41", "serve-2026-12-01-3987fde", "serve-2026-12-01-3f1c336"
GUESSES = "guesses-2026-11-30-f9b44b8"
PRESSED = "presses-2026-11-30-a83739a"
CONVERTED, CONVERTED_LONGER = "conversion-2026-11-28-06f2435", "convert-8bit-2026-11-26-f7db930"
DISTILLED, NEEDLE = "distill-2026-11-26-f7db930", "needle-2026-11-25-d2240b7"
PICTURED = ("32k", "128k")  # tokens in the cache
NOT_MEASURED = "–"


CONFIGURATIONS = tuple(
    Configuration(64, *kept)
    for kept in ((), (0, None, 8), (0, 8), (16, 8), (22, 12), (22, 12, 8), (24, 8), (28, 12), (28, 12, 8), (32, 8), (32, 8, 8))
) + tuple(
    Configuration(128, *kept)
    for kept in (
        (), (0, None, 8), (0, None, 4), (0, 16), (16, 16), (0, 16, 16, True), (16, 16, 16, True), (0, 16, 8), (16, 16, 8), (0, 16, 8, True),
        (0, 16, 4), (16, 16, 4), (0, 16, 4, True), (0, None, 4, False, 48), (32, 16), (32, 16, 8), (32, 16, 4),
    )
)  # fmt: skip


def main() -> None:
    for path, text in pages().items():
        path.write_text(text)
    draw_decode(DECODE_PICTURE)
    draw_bytes(BYTES_PICTURE)
    draw_served(SERVED_PICTURE)
    draw_training(TRAINING_PICTURE)
    draw_frontier(FRONTIER_PICTURE)


def pages() -> dict[Path, str]:
    """What is written, by path."""
    page = "\n\n".join(
        (
            _INTRODUCTION, _configurations(), _decode(), _prefill(), _whole_models(), _served(), _selection(), _caches(), _values_in_3_bits(), _tolerances(), _pressed(), _chosen(), _converted(), _distilled(), _trained(),
            _needle(), _step(),
        )
    )  # fmt: skip
    return {PAGE: page + "\n", INDEX: _index(page)}


_INTRODUCTION = """# Results

Made by `make results` from the files in `benchmarks/results`, one table per claim; each says the device, the versions and the commit that it
ran on, and shows lost cases too. What was tried on the way is in the [notes](notes/index.md).

A configuration has one name in all tables. It says what the cache keeps of each key:

| name | meaning |
|---|---|
| `k16` | the 16 largest features |
| `16+k16` | 16 dense features, which are always kept, and the 16 largest of the others |
| `…-int8` | key and value in 8 bits, each with a float32 scale |
| `…-int4` | the key in the widths of the default `CodeFormat`, the value in 4 bits; `dense-int4` is a key of 4 bits too |
| `axes48-int4`, `axes48-int3` | a key in bits per axis, 48 bytes in all, and the value in 4 or 3 bits |
| `…-skip` | decode leaves out values that weigh at most 1 % together (`value_tolerance=1e-2`) |
| `dense`, `dense-int8` | ordinary attention over 16-bit keys and values, and over an 8-bit cache of them |

Queries are not cached, so the name does not speak of them. **Quality is measured with dense queries**; the decode tables say what queries they were
timed with: the bytes that decode reads are the same. Speed is against the fastest dense kernel of
the same run, over 16-bit keys and values. `dense-int8` is timed by the same kernels as the others, with a code that keeps every feature. – means
not measured."""


# --- tables, one a claim


def _configurations() -> str:
    rows, times = [], {}
    for run in DECODE:  # of each configuration the newest run that has it
        times = {
            key: row for key, row in _decode_times(run).items() if key[:2] not in {seen[:2] for seen in times}
        } | times
    for configuration in CONFIGURATIONS:
        width = configuration.head_dim
        saved = 1 - configuration.bytes / Configuration(width).bytes
        at = {n: times.get((configuration.name, width, "16/16", n)) for n in PICTURED}
        is_baseline = configuration.name == "dense"
        speed = ["" if is_baseline else compared(at[n]["ratio"]) if at[n] else NOT_MEASURED for n in at]
        rows.append(
            [
                f'<a id="d{width}-{configuration.name}"></a>`{configuration.name}`', width, configuration.key_bytes, configuration.bytes,
                f"−{100 * saved:.0f} %" if saved else "", _converted_loss(configuration), _trained_loss(configuration), *speed,
            ]
        )  # fmt: skip
    head = (
        "configuration", "head size", "key bytes", "key + value bytes", "saved", "loss, converted", "loss, trained so", "decode, 32k",
        "decode, 128k",
    )  # fmt: skip
    return f"""## Configurations

Bytes are per token and kv head. *Converted*: perplexity of SmolLM2-135M against the dense model, without any training ([table](#converted-models)).
*Trained so*: perplexity of a small model trained with the configuration from the start, by the best recipe found, against the same model with dense
attention ([table](#trained-from-scratch)). *Decode*: one H200 (`16+k16-skip` one H100), batch 8, 16 query and 16 kv heads ([tables](#decode)).

{_table(head, rows)}

Most quality has been measured at head size 64. Converted at 128 is a Qwen3 of 125M that was trained here ([table](#125m-parameters))."""


def _decode() -> str:
    parts = []
    for name, device in (
        *((run, "One GPU, batch 8") for run in DECODE),
        (DECODE_CPU, "A CPU, batch 1, float32, cold caches"),
    ):
        run, times = _read(name), _decode_times(name)
        lengths = list(dict.fromkeys(n for *_, n in times))
        keys = list(dict.fromkeys(key[:-1] for key in times))
        rows = []
        for width, heads in dict.fromkeys((width, heads) for _, width, heads in keys):
            cases = {n: [times[key] for key in times if key[1:] == (width, heads, n)] for n in lengths}
            fastest = {
                n: min(min(b["timing"]["median_ms"] for b in case["baselines"].values()) for case in cases[n])
                for n in lengths
            }
            dense = Configuration(width)
            rows.append(
                ["`dense`", "", width, heads, _stored_bytes(run, dense), *(f"{fastest[n]:.3f} ms" for n in lengths)]
            )
            timed = [configuration for configuration, *shape in keys if shape == [width, heads]]
            int8 = Configuration(width, bits=8)
            if int8.name not in timed:
                rows.append([f"`{int8.name}`", "", width, heads, int8.bytes, *[NOT_MEASURED] * len(lengths)])
            for configuration in timed:
                cells = [times.get((configuration, width, heads, n)) for n in lengths]
                first = next(cell for cell in cells if cell)
                rows.append(
                    [
                        f"`{configuration}`", first["queries"], width, heads, f"{first['bytes_per_token']:.0f}",
                        *(f"{cell['timing']['median_ms']:.3f} ms, {compared(cell['ratio'])}" if cell else "failed its check" for cell in cells),
                    ]
                )  # fmt: skip
        head = (
            "configuration", "queries", "head size", "query/kv heads", "key + value bytes", *(f"{n} tokens" for n in lengths),
        )  # fmt: skip
        parts.append(f"**{device}.** {_where(run, name)}\n\n{_table(head, rows)}")
    return "## Decode\n\n" + _DECODE_INTRODUCTION + "\n\n" + "\n\n".join(parts)


_DECODE_INTRODUCTION = """Time of one new token's attention over the tokens in the cache. Keys, values and queries are random; sparse queries keep as many
features as keys. In the `-skip` rows queries are shaped so
that about a fifth of the values carry the weight, as in a trained model; a text that needs more of them gains less.

![Time of a token over the tokens in the cache, and over its bytes](images/decode-bytes.png)"""


def _prefill() -> str:
    run = _read(PREFILL)
    rows = []
    for row in run["rows"]:
        case = _case(r"d=(\d+), ([^,]+)(?:, (dense|2:4) queries)?, 16/16 heads, n=(\w+)", row)
        rows.append(
            [
                f"`{case[2]}`", case[1], case[3] or "sparse", case[4], f"{row['timing']['median_ms']:.3f} ms",
                *(
                    compared(row["baselines"][name]["ratio"]) if name in row["baselines"] else NOT_MEASURED
                    for name in ("fa2", "cudnn", "fa4")
                ),
            ]
        )  # fmt: skip
    head = (
        "configuration",
        "head size",
        "queries",
        "tokens",
        "time, top-k included",
        "than FlashAttention-2",
        "than cuDNN",
        "than FlashAttention-4",
    )
    return f"""## Prefill

A causal forward pass of one sequence, 16 heads; keys and queries are coded within the time. Keys are codes of random tensors. {_where(run, PREFILL)}

{_table(head, rows)}

2:4 queries cost quality in a model that was not trained with them."""


def _whole_models() -> str:
    rows, where = [], []
    for name in WHOLE_MODELS:
        run = _read(name)
        where.append(_where(run, name))
        for row in run["rows"]:
            case = _case(r"qwen3-8b, ([^,]+), batch (\d+), n=(\w+)", row)
            dense = row["baselines"][row["fastest_baseline"]]
            first, dense_first = (x["generation"]["first_token_ms"] for x in (row, dense))
            kept, dense_kept = (x["generation"]["kv_allocated"] for x in (row, dense))
            rows.append(
                [
                    f"`{case[1]}`", case[2], case[3], f"{row['timing']['median_ms']:.2f} ms",
                    f"{dense['timing']['median_ms']:.2f} ms", compared(row["ratio"]),
                    "" if first is None else f"{first:.0f} ms", "" if dense_first is None else f"{dense_first:.0f} ms",
                    f"{kept / 2**30:.1f} GiB", f"−{100 * (1 - kept / dense_kept):.1f} %",
                ]
            )  # fmt: skip
        rows.append(["`dense-int8`", case[2], case[3], *[NOT_MEASURED] * 7])
    head = (
        "configuration", "batch", "tokens", "per token", "`dense`", "", "first token", "`dense`", "KV cache, allocated", "against `dense`",
    )  # fmt: skip
    return f"""## Whole models

A model of Qwen3-8B's shape with random weights, bfloat16, CUDA graphs on both sides, queries as sparse as the keys; dense is the fastest of SDPA's kernels over a static cache.
{" ".join(where)}

{_table(head, rows)}

At batch 1 and 32k tokens nothing is gained: weights and small operations hide it ([notes](notes/2026-11-24-whole-models.md)).

{_plain()}"""


def _plain() -> str:
    run = _read(PLAIN)
    head = ("shape", "batch", "tokens", "configuration", "per token", "SDPA", "", "first token", "SDPA", "")
    rows = [_plain_row(row, "growing") for row in run["rows"]]
    static = [
        [*_plain_row(row, "static"), f"`{_read(name)['environment']['commit']}`"]
        for name in STATIC
        for row in _read(name)["rows"]
    ]
    further = " ".join(
        f"And commit `{_read(name)['environment']['commit']}` (`{name}.json`): {_read(name)['note']}"
        for name in STATIC[1:]
    )
    return f"""### Plain `generate()`

`flashsfa bench generate --plain`: nothing compiled or captured, the caches that `generate()` makes by itself, all lengths met before. The host binds, on both sides: a token takes as long whatever the cache.
{_where(run, PLAIN)}

{_table(head, rows)}

Per token codes are some 5 % slower with the small model, by what the host does in each layer, and level with the larger one within what this machine's times spread. A first token after 4k of the small model takes half as long
again, for the same reason; after 8k it is level but for one row, and faster with the larger model. On an H200 even four sequences of 32k are too little to be bound by the GPU here: **pass `cache_implementation="static"`**, below. What captured steps gain is in the table above, and what many requests gain under [vLLM](#served-by-vllm).

**`generate(cache_implementation="static")`**, which transformers compiles by itself. {_where(_read(STATIC[0]), STATIC[0])} {further}

{_table((*head, "commit"), static)}

Eight sequences of 8k take half of SDPA's time, with the one option. Of one sequence of 4k there is nothing to gain: the host binds here as well, five times later. At `63c377b` codes of 8 bits were still made by some twenty
kernels per layer. The 8B shape was not reached."""


def _plain_row(row: dict[str, Any], kind: str) -> list[Any]:
    shape, code, batch, n = _case(rf"qwen3-([\d.]+b), ([^,]+), {kind} cache, batch (\d+), n=(\w+)", row).groups()
    sdpa = row["baselines"]["sdpa"]
    first, usual = (x["generation"]["first_token_ms"] for x in (row, sdpa))
    return [
        shape.upper(), batch, n, f"`{code}`", f"{row['timing']['median_ms']:.1f} ms", f"{sdpa['timing']['median_ms']:.1f} ms",
        compared(row["ratio"]), f"{first:.0f} ms", f"{usual:.0f} ms", compared(usual / first),
    ]  # fmt: skip


def _served() -> str:
    run, short, rest = _read(SERVED), _read(SERVED_SHORT), _read(SERVED_REST)
    return f"""## Served by vLLM

`flashsfa bench serve`: models of the shapes of Qwen3-0.6B and 8B with random weights and contexts of 32k tokens, CUDA graphs, vLLM {run["environment"]["vllm"]} over HTTP beside its own FlashAttention 3. Tokens per
second are those of all requests together, whose prompts are cached, 512 tokens each; the first token is that of a prompt that is not. {_where(run, SERVED)}

{_served_table(SERVED, "32k")}

![Tokens per second beside a 16-bit cache](images/served.png)

Many requests of 32k gain what the bytes allow. One request of a small model gains little: most of its time goes into weights and launches, whatever the cache.

**Contexts of 8k.** {_where(short, SERVED_SHORT)}

{_served_table(SERVED_SHORT, "8k")}

{_served_first(short, rest)}

**The 8B shape, and servers without CUDA graphs.** {_where(rest, SERVED_REST)}

{_served_table(SERVED_REST, "8k")}

{_served_rest(rest)}

{_guesses()}"""


def _served_first(run: dict[str, Any], rest: dict[str, Any]) -> str:
    """What shorter prompts take, and what one number of the table hides."""
    short, slow = run["first_token_ms_of_short_prompts"], run["runs_of_16_requests_tokens_per_s"]
    ours, dense = short["16+k16"], short["flash_bf16"]
    usual = fmean(slow["flash_bf16"])
    again, usually = (
        rest["first_token_ms_of_short_prompts"][f"qwen3-0.6b-graphs-{side}"]["before"]
        for side in ("16+k16-int8", "flash_bf16")
    )
    return f"""First tokens of shorter prompts: 500 tokens {ours["500"]:.1f} ms with `16+k16` and {dense["500"]:.1f} with FlashAttention in 16 bits, 2,000 tokens {ours["2000"]:.1f} and {dense["2000"]:.1f}. In 8 bits they took {short["16+k16-int8"]["500"]:.1f} and {short["16+k16-int8"]["2000"]:.1f}, with fp8 {short["flash_fp8"]["500"]:.1f} and {short["flash_fp8"]["2000"]:.1f}, after a load that filled the cache. On a server that had just started, of the table below, 8 bits took {again["500"]:.1f} and {again["2000"]:.1f} ms, {again["500"] / usually["500"]:.2f} and {again["2000"] / usually["2000"]:.2f} times as long as with FlashAttention in 16 bits. Since
`3987fde` the layers of a prompt share what the first prepares; before, the first token after 8k took 1.32 times FlashAttention's (`serve-2026-11-30-f9b44b8.json`).

Of `16+k16-int8` with 16 requests the two runs made {slow["16+k16-int8"][0]:,.0f} and {slow["16+k16-int8"][1]:,.0f} tokens per second ({slow["16+k16-int8"][0] / usual:.2f}x and {slow["16+k16-int8"][1] / usual:.2f}x): most likely a kernel for many requests was compiled in the first. vLLM's profiling run does that by now, and both runs are alike, below; at an earlier commit it was the second run that was slow. Of requests that fill the cache the dense server makes fewer tokens than of 16: beside its best the two caches make {fmean(_loads(run, "16+k16")) / usual:.2f}x and {fmean(_loads(run, "16+k16-int8")) / usual:.2f}x."""


def _served_rest(run: dict[str, Any]) -> str:
    """What the table of several servers says."""
    runs = run["runs_tokens_per_s"]["qwen3-0.6b-graphs-16+k16-int8"]["16"]
    dense, ours, narrow, fp8 = (
        run["first_token_ms_of_short_prompts"][f"qwen3-8b-graphs-{side}"]["before"]["500"]
        for side in ("flash_bf16", "16+k16", "16+k16-int8", "flash_fp8")
    )
    return f"""With 16 requests the two runs of `16+k16-int8` made {runs[0]:,.0f} and {runs[1]:,.0f} tokens per second. **Serve with graphs**, which is vLLM's default: without them the host binds, and a layer of codes asks more of it than FlashAttention does, so that both caches of codes are slower than the dense ones there. One request of the 8B shape takes as long with any
cache within 4 %: weights are what it reads. Its first token after 500 tokens takes {ours / dense:.2f} times as long as with FlashAttention in 16 bits with `16+k16`, {narrow / dense:.2f} times in 8 bits and {fp8 / dense:.2f} times with fp8."""


def _loads(run: dict[str, Any], cache: str) -> list[float]:
    """Tokens per second of as many requests as fit."""
    return [row["serving"]["tokens_per_s"] for row in run["rows"] if row["curve"] == f"{cache}, all that fit"]


def _guesses() -> str:
    run = _read(GUESSES)
    whole, narrow = run["results"]["32+k16"], run["results"]["32+k16-int8"]
    taken = {
        name: f"{whole[name]['accepted'] / whole[name]['drafted']:.0%}".replace("%", " %")
        for name in ("ngram", "draft")
    }
    (parted,) = [place for place in narrow["ngram"]["first_differences"] if place is not None]
    return f"""**Guessed tokens change none, of features as they come.** {run["model"].split(" of ")[0]} of `recipes/scale.sh` (125M, trained here), greedy in {run["settings"]["dtype"]} with CUDA graphs: {len(run["settings"]["prompts"])} prompts of held-out text, 5 to 700 tokens, {run["settings"]["new"]} tokens each. With {run["settings"]["guesses"]} tokens guessed ahead by n-gram ({taken["ngram"]} taken) or by a dense draft model of the same weights ({taken["draft"]})
all {whole["ngram"]["same_ids"]} ids are those of the engine that guesses none. In 8 bits {narrow["ngram"]["same_ids"]} are, with either: one of the ten prompts parts after {parted} tokens. An engine without guesses differs too, from its own answer over pages that are in the cache already. Most likely tokens taken in together are multiplied in another order, and the last bit of a key decides to which of two codes it is rounded. {_where(run, GUESSES)}"""


def _served_table(name: str, context: str) -> str:
    rows = []
    for (shape, many), by_cache in _served_sides(name, context).items():
        usual = by_cache["dense"]
        for cache, found in by_cache.items():
            rows.append(
                [
                    shape, many if many != "all that fit" else f"all that fit: {found['requests']}", f"`{cache}`", f"{found['capacity']:,}",
                    _times(found, usual, "capacity"), f"{found['tokens_per_s']:.0f}", _times(found, usual, "tokens_per_s"), f"{found['token_ms']:.1f} ms",
                    f"{found['first_token_ms']:.0f} ms", _times(found, usual, "first_token_ms"),
                ]
            )  # fmt: skip
    head = (
        "shape",
        "requests",
        "cache",
        "tokens that fit",
        "of `dense`",
        "tokens per second",
        "of `dense`",
        "from a token to the next",
        "first token",
        "of `dense`",
    )
    return _table(head, rows)


def _served_sides(name: str, context: str) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """What each server gave, by shape and requests, then by cache."""
    sides: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in _read(name)["rows"]:
        shape, how, code, many = _case(
            rf"qwen3-([\d.]+b), (CUDA graphs|eager), ([^,]+), ([^,]+), n={context}", row
        ).groups()
        dense = {"dense": "flash_bf16", "dense-fp8": "flash_fp8"}
        there = {name: row["baselines"][side]["serving"] for name, side in dense.items() if side in row["baselines"]}
        sides.setdefault((shape.upper() + ", no graphs" * (how == "eager"), many), there)[code] = row["serving"]
    return sides


def _times(found: dict[str, Any], usual: dict[str, Any], name: str) -> str:
    """How many times that of the usual server a figure is."""
    return f"{found[name] / usual[name]:.2f}x"


def _selection() -> str:
    run = _read(SELECTION)
    rows = []
    for row in run["rows"]:
        case = _case(r"d=(\d+), ([^,]+), \[8, 16, (\w+), \d+\]", row)
        times = [row["timing"], *(row["baselines"][x]["timing"] for x in ("torch_topk", "copy"))]
        rows.append([f"`{case[2]}`", case[1], case[3], *(f"{x['median_ms']:.3f} ms" for x in times)])
    head = (
        "configuration",
        "head size",
        "tokens",
        "`topk_codes`",
        "`torch.topk` of the magnitudes",
        "a copy of the keys",
    )
    return f"""## Selecting features

Coding the keys of 128 heads (batch 8, 16 heads). {_where(run, SELECTION)}

{_table(head, rows)}"""


def _caches() -> str:
    run, more = _read(CACHES), _read(LOSSLESS)

    def loss(name: str, length: str, text: str) -> str:
        source = more if name in more["results"]["1024"] and name != "dense" else run
        losses, dense = (source["results"].get(length, {}).get(x, {}).get("losses") for x in (name, "dense"))
        if losses is None:
            return NOT_MEASURED
        share = math.expm1(fmean(losses[text]) - fmean(dense[text]))
        return "" if name == "dense" else f"{'−' if share < 0 else '+'}{abs(100 * share):.2f} %"

    near, far = run["settings"]["texts"]
    long = run["results"]["8192"]
    rows = [
        [
            f"`{name}`", _coded_bytes(row["options"], row["fit"]), loss(name, "1024", near), loss(name, "1024", far),
            loss(name, "8192", far), f"{long[name]['bytes']:.1f}" if name in long else NOT_MEASURED,
        ]
        for name, row in (run["results"]["1024"] | {"near-lossless": more["results"]["1024"]["near-lossless"]}).items()
    ]  # fmt: skip
    trained = [
        [name, f"`{case}`", nbytes, f"{100 * row['increase'][case]:+.2f} %".replace("-", "−")]
        for name, row in run["trained"].items()
        for case, nbytes in row["key_value_bytes"].items()
    ]
    needles = [
        [f"`{name}`", *(f"{found[n]:.0f}" if n in found else NOT_MEASURED for n in ("4096", "8192"))]
        for name, found in run["needles_found_of_30"].items()
    ]
    return f"""## Caches of few bits

SmolLM2-135M-Instruct (head size 64: 256 bytes in 16 bits), no training. Each token is scored as decode sees it: the newest 32 tokens and the first 4
exactly, but for rows that say otherwise, and the others as the cache holds them. `bits per axis, N` keeps a key in N bytes ([the
method](explanation/method.md)), and values in 4 bits; `22+k12, int4` keeps the dense features in 8 bits, the others in 4 with a bitmap, and values in 4
bits. One basis, calibrated on windows of 1024 tokens, serves all positions. Text A is books, text B documentation, encyclopedia and court. Differences of
0.1 to 0.2 % are noise. {_where(run, CACHES)} `near-lossless`, the preset of `flashsfa convert` (52 bytes a key, values in 8 bits), beside a dense model of its own run: {_where(more, LOSSLESS)}

{_table(("cache", "coded bytes", "loss, 1k, text A", "loss, 1k, text B", "loss, 8k, text B", "bytes of a live cache of 8k"), rows)}

Needles in real text that greedy decoding found, of 30; a basis calls itself `scaled` where nothing is said:

{_table(("cache", "4k", "8k"), needles)}

Models *trained* with sparse features, each against its own cache in 16 bits. They want no exact tokens: attention to whole keys is not what they
learned, and a ring of 32 costs them 7 to 34 %.

{_table(("model", "cache", "key + value bytes", "loss"), trained)}"""


def _values_in_3_bits() -> str:
    """Converted models with values in 3 and in 4 bits, at equal bytes where there are such."""
    run = _read(VALUES3)
    rows, found = [], {}
    for row in run["results"]:
        keys = "whole, 4 bits" if row["key_bytes"] is None else f"{row['key_bytes']} bytes per axis"
        values = {"int4": "4 bits", "d8s4v3": "3 bits", "int8": "8 bits"}[row["cache_dtype"]]
        found[row["model"], row["key_bytes"], row["cache_dtype"], row["basis"], row["window"]] = row
        rows.append(
            [
                row["model"], row["window"], keys, values, row["token_bytes"], f"{100 * row['token_bytes'] / row['dense_bytes']:.0f} %",
                row["basis"] or "", _with_error(row["loss"], row["error"]), row["windows"],
            ]
        )  # fmt: skip

    def loss(model: str, key_bytes: int | None, cache_dtype: str, basis: str | None) -> str:
        row = found[model, key_bytes, cache_dtype, basis, 1024]
        return _with_error(row["loss"], row["error"])

    texts = _read(VALUES3_TEXTS)
    near, far = texts["settings"]["texts"]

    def on(name: str, length: str, text: str) -> str:
        losses, dense = (texts["results"][length].get(x, {"losses": {}})["losses"].get(text) for x in (name, "dense"))
        if losses is None:
            return NOT_MEASURED
        ratio, error = spread(losses, dense)
        return _with_error(ratio - 1, error)

    measured = [
        [
            f"`{name}`",
            _coded_bytes(row["options"], row["fit"]),
            on(name, "1024", near),
            on(name, "1024", far),
            on(name, "8192", far),
        ]
        for name, row in texts["results"]["1024"].items()
        if name != "dense"
    ]
    needles = texts["needles_found_of_30"]["bits per axis, 32, values in 3 bits"]
    fewest, in_4_bits = "bits per axis, 32, values in 3 bits", "bits per axis, 26"
    small, wide, gpt2 = dict.fromkeys(row["model"] for row in run["results"])
    files = (AXES_TIMES, VALUES3_TIMES)
    times = [
        [
            f"`{name}`",
            configuration.bytes,
            *_layer_times(configuration, 4, files),
            *_layer_times(configuration, 1, files),
        ]
        for name in ("dense", "dense-int4", "axes48-int4", "axes48-int3", "axes32-int4")
        for configuration in [Configuration.named(name, 128)]
    ]
    heads = ("32 on 8", "16 on 16")
    times_head = ("cache", "bytes of a coded token", *(f"{of}, {n}" for of in heads for n in ("32k", "128k")))
    head = (
        "model",
        "window",
        "keys",
        "values",
        "bytes of a coded token",
        "share of 16 bits",
        "basis",
        "loss",
        "windows",
    )
    return f"""## Values in 3 bits

`d8s4v3` keeps a value in 3 bits a feature, 52 bytes of 256 at head size 128 and 28 of 128 at 64. Converted models, not trained on: the newest 32 tokens and the first 4 exact, the others as the cache holds
them, prompts dense. SmolLM2 has heads of 64; the other two are dense models of this project: a Qwen3 of 125M with heads of 128 (39.3M tokens) and a GPT-2 of 124M (140.2M tokens). One held-out text, which calibration has not seen. {_where(run, VALUES3)}

{_table(head, rows)}

- **100 of 512 bytes lose {loss(wide, 48, "d8s4v3", "whitened")}** of the Qwen3 in a whitened basis, {loss(wide, 48, "d8s4v3", "scaled")} in the default one: keys of 48 bytes beside values in 3 bits. Keys of 32 beside values in 4, as many bytes, lose {loss(wide, 32, "int4", "whitened")} and {loss(wide, 32, "int4", "scaled")}. The aim was 1 %. A dense cache in 4 bits takes 136 and loses {loss(wide, None, "int4", None)}.
- **60 of 256 bytes lose {loss(small, 32, "d8s4v3", "scaled")}** of SmolLM2, where keys of 24 bytes beside values in 4 bits lose {loss(small, 24, "int4", "scaled")}. From 68 bytes on the two ways are level, so the default stays at 4 bits.
- 60 of 256 bytes lose {loss(gpt2, 32, "d8s4v3", "whitened")} of the GPT-2, in its whitened basis, and 52 bytes {loss(gpt2, 24, "d8s4v3", "whitened")}.

**SmolLM2 once more, on two texts, over 8k, and with needles**: 12 windows of 1024 tokens of each text in float32, 8 of 8192 of text B in bfloat16, with another calibration than above. Text A is books, text B documentation, encyclopedia and court. {_where(texts, VALUES3_TEXTS)}

{_table(("cache", "bytes of a coded token", "1k, text A", "1k, text B", "8k, text B"), measured)}

- The 60 bytes lose some 0.2 points more here than on the windows above, about the error of both together. Over contexts of 8192 they lose {on(fewest, "8192", far)} (the two windows above {_percent(found[small, 32, "d8s4v3", "scaled", 8192]["loss"])}), where 62 bytes with values in 4 bits lose {on(in_4_bits, "8192", far)}.
- Beside whole keys in 4 bits, values in 3 in place of 4 lose nothing that shows, and save 8 bytes of 72.
- Needles: the 60 bytes find {needles["4096"]:.0f} of 30 at 4k and {needles["8192"]:.0f} of 30 at 8k. {texts["needles_same"]} of the 60 prompts end as they do with the dense model.

**Decode does not get faster.** A layer of heads of 128, query heads on kv heads, batch 8:

{_table(times_head, times)}

Values in 3 bits take 1 to 6 % longer than in 4 beside as large a key, and 20 to 25 % longer than what has as many bytes: few bits take more instructions than their bytes save ([decode](#decode)). What is saved is memory. {_where(_read(AXES_TIMES), AXES_TIMES)} {_where(_read(VALUES3_TIMES), VALUES3_TIMES)}"""


def _coded_bytes(options: dict[str, Any] | None, fit: dict[str, Any] | None) -> int:
    """Of a coded token of head size 64, keys and values."""
    if options is None:
        return 256
    form = cache_bits(options["cache_dtype"])
    if form is None:
        return 2 * options["dense_dims"] + 3 * options["topk"] + 128
    assert isinstance(form, CodeFormat)
    if fit is not None and "key_bytes" in fit:
        return fit["key_bytes"] + form.v_bytes(64)
    return form.key_bytes(64, options["dense_dims"], options["topk"]) + form.v_bytes(64)


def _tolerances() -> str:
    run, other, mixed = _read(TOLERANCE), _read(GPT2_FRONTIER), _read(LONG_FRONTIER)
    found = {f"SmolLM2-135M, {n} tokens": by_tolerance for n, by_tolerance in run["results"].items()}
    length, *_ = map(str, other["settings"]["lengths"])
    found[f"GPT-2 of 124M, {length} tokens"] = {
        tolerance: by_length[length] for tolerance, by_length in other["results"]["gpt2-dense"]["tolerances"].items()
    }
    for n in ("1024", "8192"):  # beside its own loss without
        by_tolerance = {t: by_length[n] for t, by_length in mixed["results"]["32+16"]["tolerances"].items()}
        found[f"Qwen3 of 125M with `32+k16`, {n} tokens"] = {
            t: row | {"loss": row["loss_of_own"], "error": row["error_of_own"]} for t, row in by_tolerance.items()
        }
    wider = [
        _with_error(by_length["1024"]["loss_of_own"], by_length["1024"]["error_of_own"])
        for tolerance, by_length in mixed["results"]["40+16"]["tolerances"].items()
        if tolerance != "0.01"
    ]
    rows = [
        [where, tolerance, _with_error(row["loss"], row["error"]), f"{100 * row['v_rows_read']:.0f} %"]
        for where, by_tolerance in found.items()
        for tolerance, row in by_tolerance.items()
    ]  # fmt: skip
    return f"""## Values left out

`value_tolerance` of dense models, whose keys and values are as they come, and of one that was trained on with `32+k16`: what the last {run["settings"]["late"]} tokens of a window lose when each attends as decode does, and the share of V rows that they read of those they see, each row counted where any query head of
its group needs it. SmolLM2 has three query heads on a kv head, Qwen3 four and GPT-2 one; of the latter two all tokens are scored. {_where(run, TOLERANCE)} {_where(other, GPT2_FRONTIER)} {_where(mixed, LONG_FRONTIER)}

{_table(("model", "tolerance", "loss", "V rows read"), rows)}

A longer context reads a smaller share of SmolLM2's values, and no smaller one of the Qwen3's. With `40+k16` that model loses {wider[0]} at 0.05 and {wider[1]} at 0.1 (1024 tokens). **Take 0.01**: it costs less than these windows can show, and is what the decode tables are timed with, over data that need 22 % of their values."""


def _pressed() -> str:
    run = _read(PRESSED)
    results, settings = run["results"], run["settings"]
    dense = results["dense"]["losses"]
    by_case = {(row["cache"], row["press"], row["budget"]): row for row in results.values()}
    caches, presses, budgets = (list(dict.fromkeys(key[i] for key in by_case if key[i] is not None)) for i in range(3))

    def loss(row: dict[str, Any]) -> str:
        ratio, error = spread(row["losses"], dense)
        return f"{100 * (ratio - 1):+.1f} ± {100 * (error or 0):.1f} %".replace("-", "−")

    alone = [
        [
            f"`{cache}`", f"{fmean(row['bytes']):.0f}", f"{100 * fmean(row['bytes']) / (4 * 64):.0f} %", "" if cache == "dense" else loss(row),
            sum(row["found"]),
        ]
        for cache in caches
        for row in [by_case[cache, None, None]]
    ]  # fmt: skip
    least = {b: min(fmean(row["losses"]) for key, row in by_case.items() if key[2] == b) for b in budgets}
    together = []
    for press in presses:
        for cache in caches:
            cells = []
            for budget in budgets:
                row = by_case.get((cache, press, budget))
                if row is None:  # it holds the whole prompt in fewer bytes
                    cells += ["as above", ""]
                    continue
                mark = "**" if fmean(row["losses"]) == least[budget] else ""
                cells += [f"{mark}{loss(row)}{mark}", sum(row["found"])]
            together.append([press, f"`{cache}`", *cells])
    head = ("press", "cache", *(cell for b in budgets for cell in (f"loss, {256 * b:g} bytes", "needles")))
    return f"""## Presses at equal bytes

SmolLM2-135M-Instruct, no training. A press of kvpress {settings["kvpress"]} scores the tokens of a prompt, and the cache keeps as many of the best as its bytes allow: few in 16
bits, or more in fewer. Bytes are per token of the prompt and kv head. They count the newest 32 and the first 4 tokens that caches of 4 bits keep
exactly, which weigh in prompts as short as these. The loss is that of the {settings["continuation"]} tokens after a prompt of {settings["prompt"]}, over {len(dense)} windows, against a dense cache of the
whole prompt, with the standard error of paired windows. Tokens after the prompt attend to one another as they come. Needles are {len(results["dense"]["found"])} numbers in prompts of
{" and ".join(map(str, settings["needles"]["lengths"]))} tokens. Their question comes after pruning, and one is found where greedy decoding writes it at once. The least loss at each size is bold. {_where(run, PRESSED)}

The whole prompt:

{_table(("cache", "bytes", "of dense", "loss", "needles"), alone)}

With a press, at {", ".join(f"{100 * b:g}" for b in budgets)} % of a dense cache; a cache that holds the whole prompt in fewer bytes is "as above":

{_table(head, together)}"""


def _chosen() -> str:
    run = _read(CHOSEN)
    dense, chosen = run["results"]["dense"], run["chosen"]

    def loss(row: dict[str, Any], against: dict[str, Any]) -> str:
        ratio, error = spread(row["window_losses"], against["window_losses"])
        return f"{100 * (ratio - 1):+.2f} ± {100 * (error or 0):.2f} %".replace("-", "−")

    rows = [
        [
            f"**{row['label']}**" if name == chosen else row["label"], row["token_bytes"], f"{100 * row['share']:.0f} %", f"{row['perplexity']:.2f}",
            "" if name == "dense" else loss(row, dense),
        ]
        for name, row in sorted(run["results"].items(), key=lambda item: -item[1]["token_bytes"])
    ]  # fmt: skip
    confirmed = run["confirmed"]
    return f"""## What is chosen

`flashsfa convert --max-loss 1%` of SmolLM2-135M-Instruct: what it measured, on 4 windows of 2048 tokens, and in bold what it chose. On 6 other
windows the written model lost {loss(confirmed["sfa"], confirmed["dense"])}. It ran before values in 3 bits were tried. The losses of the presets are those of [caches of few bits](#caches-of-few-bits), of `small` those of [values in 3 bits](#values-in-3-bits). {_where(run, CHOSEN)}

{_table(("cache", "bytes of a coded token", "of dense", "perplexity", "loss"), rows)}"""


def _converted() -> str:
    run = _read(CONVERTED)
    dense = run["results"]["dense"]
    rows = []
    for name, row in run["results"].items():
        configuration = _converted_configuration(name, row)
        loss = row["perplexity"] / dense["perplexity"] - 1
        rows.append(
            [
                f"`{name}`",
                configuration.key_bytes,
                configuration.bytes,
                f"{row['perplexity']:.2f}",
                _percent(loss) if name != "dense" else "",
            ]
        )
    longer = _read(CONVERTED_LONGER)
    more = []
    for row in longer["results"]:
        for kept in ("", "_8_bit"):
            configuration = Configuration(64, row["dense_dims"], row["topk"], 8 if kept else 16)
            perplexity = row[f"perplexity{kept}"]
            more.append(
                [
                    f"`{configuration.name}`",
                    configuration.key_bytes,
                    f"{perplexity:.2f}",
                    _percent(perplexity / longer["dense"] - 1),
                ]
            )
    return f"""## Converted models

SmolLM2-135M-Instruct (head size 64, dense queries, dictionary basis), no training: calibrated on one half of Python's help topics and evaluated on the
other, 10 windows of 768 tokens each, at the positions of the calibration. In float32; bytes are those of a 16-bit cache where the name does not say
int8. {_where(run, CONVERTED)}

{_table(("configuration", "key bytes", "key + value bytes", "perplexity", "against dense"), rows)}

Another text, longer windows: calibrated on 16 windows of 1024 for positions up to 2048, evaluated on 8 windows of 2048 of held-out documents;
float32, and in the `int8` rows keys alone are rounded, not values. {_where(longer, CONVERTED_LONGER)} Dense: {longer["dense"]:.2f}.

{_table(("configuration", "key bytes", "perplexity", "against dense"), more)}"""


def _distilled() -> str:
    run = _read(DISTILLED)
    start = run["perplexity"]["before"]["dense"]
    rows = []
    names = {
        "dense": "`dense`",
        "28+12": "`28+k12`",
        "28+12, 8-bit keys": "`28+k12-int8`, keys alone",
        "16+8": "`16+k8`",
    }
    for training, models in run["perplexity"].items():
        tuned = models.get("dense") if training != "before" else None
        for name, found in models.items():
            cells = [f"{found[text]:.2f}, {_percent(found[text] / start[text] - 1)}" for text in start]
            against = [_percent(found[text] / tuned[text] - 1) if tuned and name != "dense" else "" for text in start]
            rows.append([training.replace("before", "no training"), names[name], *cells, *against])
    rows.append(["any", "`dense-int8`", *[NOT_MEASURED] * 4])
    head = (
        "training",
        "configuration",
        "validation",
        "novels",
        "validation, against dense trained alike",
        "novels, against dense trained alike",
    )
    return f"""## Converted and trained on

SmolLM2-135M-Instruct, 48 windows of 2048 tokens of each text, bfloat16. A model that is trained on a text gets better at it, dense or sparse: the
price of the sparse cache is what it loses against the dense model *trained on the same tokens*, where that was run. {_where(run, DISTILLED)}

{_table(head, rows)}"""


def _trained() -> str:
    again = [
        f"`{run}` gave {_trained_row(QWEN3, run)['perplexity'][0]:.1f} and {perplexity:.1f}"
        for run, perplexity in _repeated().items()
    ]
    small = [_trained_table(*table, 64) for table in (("GPT-2, learned positions", GPT2), ("Qwen3", QWEN3))]
    return f"""## Trained from scratch

28M parameters, 6 layers of 8 heads of size 64, 19.3M tokens in one pass, perplexity on held-out documents; changes at equal seeds. `dense-int8` has
its rows here: `gpt2-int8` and `qwen3-int8-warm`, trained with queries and keys in 8 bits. A model this small, on so few tokens, settles no difference of 2 %: the same run again differs by
2 to 6 % ([notes](notes/2026-11-26-quality.md)). In the table of configurations a seed that was run again counts with the mean of both: {", ".join(again)}.

{small[0]}

{small[1]}

### 125M parameters

Rows of `recipes/scale.sh`. What codes lose that are trained from the first step on is far more here than on the small models, and more the longer a model is trained. A dense start loses less; trained so, the aim of 1 % at 24 of 128 key bytes is missed, and a conversion in bits per axis comes to it (below).

A GPT-2 of 124M, 12 heads of 64, one pass over 150M tokens. By the paper's rule `k8` loses three times as much as heads of 12, which take the same bytes. At step 600 of 3,052 heads of 12 and our recipe of the small models (dense queries, a gradient to all features, query features of one size) are 3 and 5 % behind on training text, the paper's rule 17 %. Then the dense model pulls away while its loss falls from
4.8 to 4.3; from step 1,500 on most gain on it slowly. Our recipe of the small models is behind the paper's rule at the end.

{_trained_table("GPT-2, 150M tokens", GPT2_LARGE, 64)}

{_seeds()}

**A dense first half** is the best that is known here of codes that are trained (`attention.dense_share=0.5`): then a basis is fitted to the model, as `flashsfa convert` does (once in this run; by now anew after each tenth of the steps), and the rest is trained with six dense features and the four largest others of each key, in the bytes of `k8`. {_after_dense()} The paper reports {_percent(18.27 / 17.29 - 1)} for `k8`, of a training on another text.

**Dense queries and scores three times as large** for the whole training (`attention.score_scale=3`, about 1/√k in place of 1/√d; folded into the query weights when the model is saved) take back half of what `k8` lost. At equal bytes
heads of 12 still lose less. With a gradient to all features beside it the training diverges from step 390 of 3,052 on, though a model of 3M parameters had gained by it.

{_cut_off()}

![Perplexity above the dense model's while they are trained](images/gpt2-124m.png)

{_frontier()}

The same rows stopped after 49.2M tokens, a third of that, with a learning rate that ended there.

{_trained_table("GPT-2, 49.2M tokens", (GPT2_STOPPED,), 64)}

The rows of Qwen3 were stopped at 49.2M tokens, half of what the recipe asks for. A Qwen3 of 12 layers, 8 query heads on 2 kv heads of 128: no better than short heads. Two seeds differ by 3 points; seed 0 was trained at `20b8087`. RoPE on a quarter of each head,
which spares a conversion the loss of turned features, costs a dense model 0.8 to 2.0 % itself: three times the same seed, which differs by 0.7 % from itself on another machine. The paper's
`k16` with a linear map after RoPE, keys and queries sparse and learned from scratch, ended at 77.6 by its log, +57 %; its result was not written.

{_trained_table("Qwen3", QWEN3_WIDE, 128)}

{_rotary()}

{_wide()}

{_healed()}"""


def _seeds() -> str:
    run = _read(GPT2_SEEDS)
    dense, short, rounded = run["results"]
    low, high = sorted(dense["perplexity"])
    return f"""**Two dense seeds, short heads and 8 bits**: one pass over {dense["tokens"] / 1e6:.1f}M tokens; the other 11M are kept for training on, so the baseline is another than above. The dense seeds end at {low:.2f} and {high:.2f}, {100 * (high / low - 1):.1f} % apart.

{_trained_table(f"GPT-2, {dense['tokens'] / 1e6:.1f}M tokens", (GPT2_SEEDS,), 64)}

Heads of 32, in 64 of 128 bytes, lose {_percent(fmean(short["change"]))}, and training with queries and keys in 8 bits {_percent(fmean(rounded["change"]))}, which the seeds do not tell from nothing. Bits per axis in 24 bytes, by conversion and some training on, lose less than the short heads (below)."""


def _frontier() -> str:
    run = _read(GPT2_FRONTIER)
    length, *_ = map(str, run["settings"]["lengths"])
    rows = [
        [
            f"`{model}`", f"`{form}`", row["token_bytes"], f"{row['lengths'][length]['perplexity']:.2f}", _percent(row["lengths"][length]["loss"]),
            *(f"{row['decode_ms'][n]:.3f} ms" for n in ("32768", "131072")),
        ]
        for model, found in run["results"].items()
        for form, row in found["forms"].items()
    ]  # fmt: skip
    return f"""**Two of them from loss to bytes to milliseconds**: the cache in 16, 8 and 4 bits, nothing exact, {run["settings"]["windows"]} windows of {length} tokens, and decode of one layer with such a cache ({run["settings"]["decode_device"]}, the table of [decode](#decode)).
{_where(run, GPT2_FRONTIER)}

{_table(("model", "cache", "bytes of a coded token", "perplexity", "loss", "decode, 32k", "decode, 128k"), rows)}

The dense model in 8 bits decodes as fast as `k8` in 16 and loses nothing."""


def _rotary() -> str:
    run = _read(ROTARY)
    models = {"qwen3-dense": "whole heads", "qwen3-dense-quarter": "a quarter of each"}
    rows = [
        [
            models[model], "`32+k16`" if kept == "topk" else f"`{row['label'].replace(', ', '-')}`", row["token_bytes"], f"{row['perplexity']:.2f}",
            _loss_of(row),
        ]
        for model, variants in run["results"].items()
        for kept, row in variants.items()
    ]  # fmt: skip
    return f"""**Two of them converted**, not trained on: RoPE on whole heads and on a quarter of each. {run["settings"]["windows"]} windows of {run["settings"]["window"]} tokens, 36 tokens exact, prompts dense. {_where(run, ROTARY)}

{_table(("RoPE", "cache", "bytes of a coded token", "perplexity", "loss"), rows)}

RoPE on a quarter halves what `32+k16` loses: 0.3 points are saved. Training with it costs 0.8 to 2.0 % before anything is converted, so it is not worth it for the conversion's sake. Either model loses less by conversion than
by training with `32+k16` from scratch, and less in 4 bits than in fewer features."""


def _loss_of(row: dict[str, Any]) -> str:
    """Of a row of a report of `flashsfa convert`, with its standard error; nothing for the dense one."""
    return "" if row["label"] == "dense" else _with_error(row["loss"], row["loss_error"])


def _wide() -> str:
    run = _read(WIDE)
    rows = [
        [
            row["label"], row["exact_tokens"] or "none", row["token_bytes"], f"{100 * row['share']:.0f} %", f"{row['perplexity']:.2f}",
            _loss_of(row), *_wide_times(row["label"]),
        ]
        for row in sorted(run["results"], key=lambda row: (row["exact_tokens"] == 0, -row["token_bytes"]))
    ]  # fmt: skip
    return f"""**One more, through the chooser** and with fewer exact tokens. Its dense perplexity in training is {run["settings"]["trained"]["perplexity"]:.1f}. {run["settings"]["windows"]} windows of {run["settings"]["window"]} tokens. {_where(run, WIDE)}

{_table(("cache", "exact tokens", "bytes of a coded token", "of dense", "perplexity", "loss", "decode, 32k", "decode, 128k"), rows)}

Decode is that of one layer at the same four query heads on a kv head, of the coded tokens alone, with queries as they come (`16+k16`: as sparse as the keys), where the table of [decode](#decode) has it.

`--max-loss 1%` took 116 bytes per token, `--bytes 19.53%` (100 of 512) 98 with +2.4 %. So within 1 % a conversion needs some 110 bytes at this head size; the aim was 100. At 136 bytes and more whole keys in 4 bits lose
as little as anything here; below, bits per axis lose least, and at 98 features lose no more. Exact tokens matter most: without them 4 bits lose 0.4 %, not 0.05, and `32+k16` loses 2.4 %, not the 0.55 above."""


def _healed() -> str:
    runs = [_read(name) for name in HEALED]
    tokens = runs[0]["results"][0]["recipe"]["training"]["tokens"]
    return f"""**And trained on after its conversion**: rows of `recipes/heal.sh`, a dense Qwen3 of 42M tokens ({runs[0]["results"][0]["perplexity"]["dense"]:.1f}), {tokens / 1e6:.1f}M more tokens by `flashsfa train distill`, codes in 16 bits and none exact. {_where_each(HEALED)}

{_healed_table(runs)}

A quarter more tokens take back about half of what the conversion lost, or more. With half of the dense keys' bytes, `40+k16`, {_percent(_after(runs[1], "40+16"))} is left, with `32+k16` {_percent(_after(runs[1], "32+16"))}. A training from scratch with `32+k16` ended at +6.0 %, and one with heads of 64, in the bytes of `40+k16`, at +5.5 %. One seed each;
two dense models of the recipe differ by 0.05 % here, and others of one seed by 0.7 % on two machines.

{_healed_long()}

{_healed_axes()}

{_axes_without_rope()}

{_late()}"""


def _healed_axes() -> str:
    """Qwen3s in bits per axis, trained on as their caches keep them."""
    first, last = (_read(name) for name in AXES_HEALED)
    measured, rows = _read(AXES_FRONTIER[0]), _trained_models(AXES_HEALED, AXES_FRONTIER, most_bits=4)
    dense, ours = (measured["results"][name]["forms"] for name in ("dense", "axes32-int4-whitened"))
    whole, few = dense["dense-int4"], ours["axes32-int4"]
    apart = [f"{100 * abs(whole['decode_ms'][n] / few['decode_ms'][n] - 1):.0f} %" for n in ("32768", "131072", "8192")]
    nothing = _read(VALUES3)["nothing_exact"]
    same = ("model", "key_bytes", "cache_dtype", "basis")
    kept = next(row for row in _read(VALUES3)["results"] if all(row[name] == nothing[name] for name in same))
    head = (*_trained_head(measured), "commit")
    return f"""**In bits per axis**: two Qwen3s of recipes/qwen3-d128.yaml, dense over 39.3M tokens, converted, and trained on for {first["results"][0]["recipe"]["training"]["tokens"] / 1e6:.1f}M more as the cache holds keys and values: rounded in each step (`recipes/heal.sh`). Losses are of the dense model that was trained on alike; the text of training's validation, then {measured["settings"]["windows"]} windows of 1024 tokens of another. Decode: 32 query heads on 8 kv heads, as in the table above; that of few bits was measured with this ({_where(_read(AXES_TIMES), AXES_TIMES)} {_where(_read(VALUES3_TIMES), VALUES3_TIMES)}). {_where_each(AXES_HEALED)} {_where_each(AXES_FRONTIER)}

{_table(head, rows)}

- **100 of 512 bytes within 1 % take exact tokens, not training.** Without exact tokens {_percent(_after(last, "axes48-int3-whitened"))} is left of keys of 48 bytes beside values in 3 bits, and {_percent(_after(first, "axes32-int4-whitened"))} of keys of 32 beside values in 4. Converted alone, with the newest 32 tokens and the first 4 exact, the former lose {_with_error(kept["loss"], kept["error"])} of the same dense model ([table](#values-in-3-bits)); with nothing exact {_with_error(nothing["loss"], nothing["error"])}.
- **A model that was trained without exact tokens gains little from them, or loses by them**: beside 36 exact ones the first three lose 0.8 to 2.9 points more, the others, with values in 4 bits, 0.0 to 0.3 less. With values in 3 bits that was not measured.
- On the other text whole keys and values in 4 bits, 136 bytes, lose {_percent(whole["lengths"]["1024"]["loss"])} of the first model, and `axes32-int4` {_percent(few["lengths"]["1024"]["loss"])}; it is read {apart[0]} and {apart[1]} faster, at 32k and 128k (at 8k {apart[2]} more slowly). `axes48-int3`, of as many bytes as `axes32-int4`, is read more slowly than either."""


def _axes_without_rope() -> str:
    """GPT-2s that are converted in few bytes, and one that is trained on so."""
    run, small, rows = _read(AXES_GPT2), _read(AXES_GPT2_SMALL), []
    for row in run["results"]:
        configuration = Configuration.named(row["code"], 64)
        rows.append(
            [
                f"`{row['code']}`", row["basis"] or "", 128 if row["code"] == "dense" else configuration.key_bytes, row["token_bytes"],
                f"{row['perplexity']:.2f}", "" if row["code"] == "dense" else _with_error(row["loss"], row["loss_error"]),
                *_layer_times(configuration, 1, (AXES_TIMES, DECODE[0])),
            ]
        )  # fmt: skip
    settings = run["settings"]
    loss = {row["basis"]: row["loss"] for row in run["results"] if row["code"] == "axes24"}
    of_small = {row["basis"]: _percent(row["loss"], 2) for row in small["results"] if row["code"] == "axes24"}
    head = (
        "cache", "basis", "key bytes", "bytes of a coded token", "perplexity", "loss", "decode, 32k", "decode, 128k",
    )  # fmt: skip
    healed, measured = (_read(names[0]) for names in (GPT2_HEALED, AXES_GPT2_FRONTIER))
    trained = _trained_models(GPT2_HEALED, AXES_GPT2_FRONTIER, most_bits=16)

    def of(form: str, model: str = "axes24-whitened") -> str:
        both = (_read(name)["results"][model]["forms"][form]["lengths"]["1024"] for name in AXES_GPT2_FRONTIER)
        return " and ".join(_with_error(row["loss"], row["error"]) for row in both)

    return f"""**A GPT-2 in 24 of 128 key bytes, converted and not trained on**: bits per axis in a whitened basis lose {_percent(loss["whitened"])}, which its error does not tell from the aim of 1 %. Another dense GPT-2 of the recipe above, over {settings["trained"]["tokens"] / 1e6:.1f}M tokens (validation perplexity {settings["trained"]["perplexity"]:.1f}), {settings["windows"]} windows of {settings["window"]} tokens of another text, nothing exact. Decode: 16 heads. {_where(run, AXES_GPT2)} {_where(_read(AXES_TIMES), AXES_TIMES)}

{_table(head, rows)}

The paper's kind of code, `k8` in as many bytes, loses {_percent(next(row["loss"] for row in run["results"] if row["code"] == "k8"))} converted in the same way; `6+k4` of the model above, trained after a dense half, 4.3 % on its validation text. **The basis decides here**: in "scaled", which suits models with RoPE, the same bits lose {_percent(loss["scaled"])}. A GPT-2 of 27M says the same: {of_small["whitened"]} whitened, {of_small["scaled"]} scaled ({_where(small, AXES_GPT2_SMALL)}). So for models without RoPE "whitened" is the default.

**And trained on in 24 of 128 key bytes**: two such GPT-2s of 140.2M tokens, seeds 0 and 1, converted, and trained on for {healed["results"][0]["recipe"]["training"]["tokens"] / 1e6:.1f}M as the cache holds keys and values. Losses are of the dense model that was trained on alike; the text of training's validation, then {measured["settings"]["windows"]} windows of 1024 tokens of another. {_where_each(GPT2_HEALED)} {_where_each(AXES_GPT2_FRONTIER)}

{_table((*_trained_head(measured), "commit"), trained)}

- **The aim, 24 of 128 key bytes within 1 %, is reached by either seed**: {of("axes24")} with values in 16 bits and {of("axes24-int4")} in a whole cache of 60 of 256 bytes, nothing exact. A dense cache in 4 bits takes 72 bytes and loses {of("dense-int4", "dense")} so.
- **With 36 tokens exact the dense cache in 4 bits is better**: it loses 0.1 %, these models 0.8 to 0.9 %; and converted alone, with exact tokens, bits per axis lose 0.1 % in 60 bytes and 0.4 % in 52 ([table](#values-in-3-bits)).
- A dense cache in 4 bits is read faster than all of these, 1.2x faster than the 60 bytes at 32k: few bits take instructions. Against 16 bits the 60 bytes are read 2.1x faster."""


def _trained_head(measured: dict[str, Any]) -> tuple[str, ...]:
    """Of the rows of `_trained_forms`."""
    settings = measured["exact_settings"]
    exact = f"and {settings['recent'] + settings['first']} tokens exact"
    return (
        "trained on as", "cache", "bytes of a coded token", "converted", "trained on", "other text", exact, "decode, 32k", "decode, 128k",
    )  # fmt: skip


def _trained_models(healed: Sequence[str], measured: Sequence[str], *, most_bits: int) -> list[list[Any]]:
    """`_trained_forms` of several runs, each with its commit."""
    rows = []
    for run, forms in zip(map(_read, healed), map(_read, measured), strict=True):
        commit = f"`{run['environment']['commit']}`"
        rows += [[*row, commit] for row in _trained_forms(run, forms, most_bits=most_bits)]
    return rows


def _trained_forms(run: dict[str, Any], measured: dict[str, Any], *, most_bits: int) -> list[list[Any]]:
    """Rows of the models of a run of `recipes/heal.sh` in bits per axis: each form of the dense model's cache, and of theirs those whose values
    have `most_bits` or fewer."""
    before = {row["run"]: row["perplexity"]["before"] / row["perplexity"]["dense"] - 1 for row in run["results"]}
    rows = []
    for model, found in measured["results"].items():
        for form, row in found["forms"].items():
            if model != "dense" and row["bits"] > most_bits:
                continue
            is_trained_so = form == model.removesuffix("-whitened") and model != "dense"
            loss, bits = row["lengths"]["1024"], "16" if row["bits"] == 16 else f"int{row['bits']}"
            kept = measured["exact"][model].get(bits)
            rows.append(
                [
                    f"`{model}`", f"`{form}`", row["token_bytes"], _percent(before[model]) if is_trained_so else "",
                    _percent(_after(run, model)) if is_trained_so else "", "" if form == "dense" else _with_error(loss["loss"], loss["error"]),
                    "" if kept is None else _with_error(kept["loss"], kept["error"]),
                    *(f"{row['decode_ms'][n]:.3f} ms" if n in row["decode_ms"] else NOT_MEASURED for n in ("32768", "131072")),
                ]
            )  # fmt: skip
    return rows


def _healed_long() -> str:
    """Models that were converted and trained on at a context of 8192, the last ones in each form of their caches."""
    runs, measured = [_read(name) for name in HEALED_LONG], _read(LONG_FRONTIER)
    whole = [run["converted_only"]["results"]["dense, int4"] for run in runs]
    losses = " and ".join(f"{100 * row['loss']:.1f}" for row in whole)
    tokens = " and ".join(f"{run['results'][0]['recipe']['training']['tokens'] / 1e6:.1f}M" for run in runs)
    before, now = (next(row for row in run["results"] if row["run"] == "32+16")["seconds_per_step"] for run in runs)
    rows, results = [], measured["results"]
    for model, found in results.items():
        for form, row in found["forms"].items():
            at = [row["lengths"][n] for n in ("1024", "8192")]
            rows.append(
                [
                    f"`{model}`", f"`{form}`", row["token_bytes"], *(_with_error(x["loss"], x["error"]) if x["loss"] else "" for x in at),
                    *(f"{100 * row['needles'][n]:.0f} %" for n in ("1024", "8192")),
                    *(f"{row['decode_ms'][n]:.3f} ms" if row["decode_ms"] else NOT_MEASURED for n in ("32768", "131072")),
                ]
            )  # fmt: skip
    mixed = results["32+16"]["forms"]["32+k16"]["lengths"]
    head = (
        "trained on as", "cache", "bytes of a coded token", "loss at 1024", "loss at 8192", "needles, 1024", "needles, 8192", "decode, 32k",
        "decode, 128k",
    )  # fmt: skip
    return f"""**At a context of 8192**: dense Qwen3s of 31.9M tokens at a context of 1024 and {runs[0]["base"]["qwen3-dense-8k"]["steps"] * 49152 / 1e6:.1f}M at 8192 (`recipes/long.sh`), converted and trained on for {tokens} tokens, all at 8192, on text in which facts are asked for later on (`recipes/facts.py`). {_where_each(HEALED_LONG)}

{_healed_table(runs)}

Whole keys and values in 4 bits, {whole[0]["token_bytes"]} bytes, lose {losses} % of these models untrained ({runs[0]["converted_only"]["windows"]} windows of another text), nothing exact. Training on takes back half or more. `32+k16` and `40+k16`, half of a key's bytes, still miss the 1 % that they reached with the model above, at 1024. A step of such a distillation takes {now:.1f} s beside two others on the GPU, where it took {before:.1f}: the dense model ran in float32, without a fused attention. One seed each.

**These models from loss to bytes to milliseconds**: the last three in each form of their caches, nothing exact, beside the dense model trained on alike; {measured["settings"]["windows"]} windows of each length, {5 * measured["settings"]["trials"]} needles of each, and decode of one layer with such a cache ({measured["settings"]["decode_device"]}, 32 query heads on 8 kv heads, four to one as in these models, the table of [decode](#decode)). {_where(measured, LONG_FRONTIER)}

{_table(head, rows)}

![Loss over bytes and over milliseconds](images/frontier-d128.png)

- **What was trained on at 8192 loses as much at 1024**: {_with_error(mixed["1024"]["loss"], mixed["1024"]["error"])} with `32+k16` beside {_with_error(mixed["8192"]["loss"], mixed["8192"]["error"])} at 8192. The conversion alone was not measured at 1024.
- **Whole keys and values in 4 bits lose least at these bytes**, and decode fastest of what was timed. In 4 bits `32+k16` takes 12 bytes less, loses four times as much at 8192 and six times at 1024, and decodes more slowly than in 8 bits.
- Needles: 20 tell no form from the dense model, which at 8192 finds hardly any after so little training. Of three more of RULER's tasks, 6 prompts of each length, the dense model scores {_scores(measured, "dense")}, `32+16` {_scores(measured, "32+16")} and `40+16` {_scores(measured, "40+16")} on average: too little to tell them apart."""


def _scores(run: dict[str, Any], model: str) -> str:
    """The mean of all tasks but the single needle, at both lengths."""
    tasks = run["tasks"][model].values()
    return " and ".join(f"{100 * fmean(task[n] for task in tasks):.0f} %" for n in ("1024", "8192"))


def _healed_table(runs: list[dict[str, Any]]) -> str:
    """Rows of `recipes/heal.sh`: what is converted loses of the dense model, and trained on of the dense model trained on alike."""
    rows = []
    for run in runs:
        after = {row["run"]: row["perplexity"]["after"] for row in run["results"]}
        for row in run["results"]:
            found, is_dense = row["perplexity"], row["run"] == "dense"
            kept = Configuration.named(row["code"], 128)
            rows.append(
                [
                    f"`{row['code']}`", 256 if is_dense else kept.key_bytes, 512 if is_dense else kept.bytes, f"{found['before']:.1f}",
                    "" if is_dense else _percent(found["before"] / found["dense"] - 1), f"{found['after']:.1f}",
                    "" if is_dense else _percent(found["after"] / after["dense"] - 1), f"`{run['environment']['commit']}`",
                ]
            )  # fmt: skip
    head = (
        "cache", "key bytes", "bytes of a coded token", "converted", "of dense", "trained on", "of dense, trained on alike", "commit",
    )  # fmt: skip
    return _table(head, rows)


def _late() -> str:
    """The Qwen3 that begins dense and goes on with codes in one run."""
    run, curves = _read(QWEN3_LATE), _curves((QWEN3_LATE,))
    dense, late = run["results"]
    bits = _read(QWEN3_LATE_BITS)
    kept = {
        name: row["perplexity"] / bits["results"]["32+k16"]["perplexity"] - 1 for name, row in bits["results"].items()
    }
    gaps = [_gap(curves["qwen3-32+16-late"], curves["qwen3-dense"], *steps) for steps in ((425, 460), (800, 850))]
    return f"""**The same in one run is worse here**: `qwen3-32+16-late`, dense for half of its 42M tokens, ends at {late["perplexity"][0]:.1f}, {_percent(late["change"][0])} of the dense model's {dense["perplexity"][0]:.1f} on as many tokens. On training text it loses {_percent(gaps[0])} in its first 35 steps with codes and {_percent(gaps[1])} in the last 50: its basis, which follows RoPE, was fitted once,
and the weights moved on. By now it is fitted anew after each tenth of the steps, which was not run at this size. {_where(run, QWEN3_LATE)}

What fewer bits cost this model, of its own perplexity in 16 bits: {_percent(kept["32+k16-int8"], 2)} in 8 and {_percent(kept["32+k16-int4"], 2)} in 4, 124 of 512 bytes, nothing exact; {_percent(kept["32+k16-int4, 36 exact"], 2)} in 4 with 36 tokens exact, which keep the features that codes drop. {bits["settings"]["windows"]} windows of {bits["settings"]["window"]} tokens, prompts as they are cached. {_where(bits, QWEN3_LATE_BITS)}"""


def _gap(losses: dict[int, float], dense: dict[int, float], first: int, last: int) -> float:
    """How far a perplexity on training text lies above the dense one between two steps, of the same tokens."""
    return math.expm1(fmean(loss - dense[step] for step, loss in _between(losses, first, last).items()))


def _after(run: dict[str, Any], name: str) -> float:
    """What a row of `recipes/heal.sh` loses of the dense model that was trained on alike."""
    after = {row["run"]: row["perplexity"]["after"] for row in run["results"]}
    return float(after[name] / after["dense"] - 1)


def _wide_times(label: str) -> list[str]:
    """Decode of one layer at 32k and 128k tokens for a row of a report of `flashsfa convert`."""
    names = {spelt: name for name, spelt in _WIDE_LABELS.items()}
    if label not in names:
        return [NOT_MEASURED] * 2
    return _layer_times(Configuration.named(names[label], 128), 4, DECODE[:1])


def _layer_times(configuration: Configuration, group: int, files: Sequence[str]) -> list[str]:
    """Decode of one layer at 32k and 128k tokens, of `group` query heads on a kv head; of dense queries where both kinds were timed."""
    recorded = [row for name in files for row in _read(name)["rows"] if row["status"] == "ok"]
    times: dict[int, float] = {}
    for has_dense_queries in (False, True):
        times |= frontier.decode_ms(recorded, configuration, has_dense_queries, group)
    return [f"{times[n]:.3f} ms" if n in times else NOT_MEASURED for n in (2**15, 2**17)]


def _trained_table(title: str, names: Sequence[str], head_dim: int) -> str:
    rows, seen = [], []
    for name in names:
        run = _read(name)
        baseline = run["results"][0]["runs"][0]
        for row in run["results"]:
            if any(
                row["runs"][0] == known and row["perplexity"] == found[: len(row["perplexity"])]
                for known, found in seen
            ):
                continue  # the baseline of an earlier file, repeated for its sake
            seen.append((row["runs"][0], row["perplexity"]))
            attention, change = row["attention"], row["change"]
            kept, key_bytes = _trained_configuration(attention, head_dim)
            spread = (
                f"{_percent(min(change))} to {_percent(max(change))}"
                if len(change) > 1 and row["runs"][0] != baseline
                else ""
            )
            rows.append(
                [
                    f"`{row['runs'][0]}`", kept, _queries(attention, head_dim), _recipe(attention), key_bytes, len(row["seeds"]),
                    f"{fmean(row['perplexity']):.1f}", "" if row["runs"][0] == baseline else f"{_percent(fmean(change))} of `{baseline}`",
                    spread, f"`{run['environment']['commit']}`",
                ]
            )  # fmt: skip
    head = (
        "run",
        "configuration",
        "queries",
        "recipe",
        "key bytes",
        "seeds",
        "perplexity",
        "change",
        "seeds differ",
        "commit",
    )
    where = _where(_read(names[0]), *names)
    return f"**{title}.** {where}\n\n{_table(head, rows)}"


def _cut_off() -> str:
    """The run that did not end, beside others at the same steps, which see the same tokens in the same order."""
    curves = _curves(GPT2_LARGE) | (cut_off := _curves((GPT2_CUT,)))
    ((name, cut),) = cut_off.items()
    last = max(cut)
    first = last - 100
    dense = fmean(_between(curves["gpt2-dense"], first, last).values())
    rows = []
    for run, kept in (
        ("gpt2-short12", "heads of 12"),
        ("gpt2-k8-scaled", "`k8`"),
        (name, "`6+k4`"),
        ("gpt2-dense", "`dense`"),
    ):
        loss = fmean(_between(curves[run], first, last).values())
        rows.append(
            [f"`{run}`", kept, f"{loss:.3f}", "" if run == "gpt2-dense" else _percent(math.expm1(loss - dense))]
        )
    head = ("run", "configuration", "training loss", "perplexity on training text, of dense")
    return f"""**Six dense features and the four largest others**, in the same 24 bytes, scores three times as large, and a gradient to all features for the first tenth of the steps: a recipe with codes from the first step on that loses less than heads of 12. {_where(_read(GPT2_CUT), GPT2_CUT)} The mean of steps {first:,} to {last:,} on the same tokens:

{_table(head, rows)}"""


def _after_dense() -> str:
    """What the run that begins dense loses after its first steps with codes, and at its end, on the tokens that the dense one sees."""
    curves = _curves(GPT2_LARGE)
    dense, late = curves["gpt2-dense"], curves["gpt2-6+4-late"]
    before, then, last = (_gap(late, dense, *steps) for steps in ((1400, 1520), (1526, 1576), (2950, 3052)))
    return (
        f"On training text it loses {_percent(then)} in the first 50 steps with codes, and {_percent(last)} in the last 100; its dense half ran "
        f"{_percent(before)} above the other dense run, which began alike and parted by rounding. At steps 2,330 to 2,430 it is "
        f"{_percent(_gap(late, dense, 2330, 2430))}, where the same code from the first step on is in the table below."
    )


def _curves(names: Iterable[str]) -> dict[str, dict[int, float]]:
    """Training losses by step, by run."""
    return {
        run: {int(step): loss for step, loss in curve.items()}
        for name in names
        for run, curve in _read(name)["curves"].items()
    }


def _between(curve: dict[int, float], first: int, last: int) -> dict[int, float]:
    return {step: loss for step, loss in curve.items() if first <= step <= last}


def _needle() -> str:
    run = _read(NEEDLE)
    order = ("dense", "k8", "k2")
    lengths = list(run["runs"]["dense"]["needle"])
    rows = [[f"`{name}`", *(f"{100 * run['runs'][name]['needle'][n]:.0f} %" for n in lengths)] for name in order]
    where = run["runs"]["dense"] | {"note": run.get("note")}
    return f"""## Needle in a haystack

Small models trained at 8192 tokens on the task; share of 200 needles found; queries keep as many
features as keys. {_where(where, NEEDLE)}

{_table(("configuration", *(f"{n} tokens" for n in lengths)), rows)}"""


def _step() -> str:
    run = _read(STEP)
    names = {
        "dense": "`dense`", "k8": "`k8`, queries sparse as well", "k8-denseq-all": "`k8`, gradient to all features",
        "k8-denseq-all-equal": "`k8`, that and equal query features",
    }  # fmt: skip
    rows = [
        [names[row["attention"]], row["context"], f"{row['step_ms']['median']:.1f} ms", _percent(row["change"]) if row["attention"] != "dense" else "",
         f"{row['activation_peak_bytes'] / 2**30:.2f} GiB"]
        for row in run["results"]
    ]  # fmt: skip
    return f"""## A training step

GPT-2 of 124M, 16k tokens, bfloat16, compiled. {_where(run, STEP)}

{_table(("configuration", "tokens", "step", "time against dense", "peak memory but for weights and optimizer"), rows)}"""


def _index(page: str) -> str:
    """What each result file holds and where its figures stand."""
    rows = []
    notes = {path: path.read_text() for path in sorted((ROOT / "docs" / "notes").glob("*.md"))}
    for path in sorted(RESULTS.glob("*.json")):
        run = _read(path.stem)
        where = (
            run.get("environment")
            or next(iter(run.get("runs", {}).values()), {}).get("environment")
            or run.get("versions", {})
        )
        what = run.get("evaluation") or run.get("operation") or f"flashsfa convert, {run['sfa']['label']}"
        used = ["[results](../../docs/results.md)"] if path.stem in page else []
        used += [f"[{note.stem}](../../docs/notes/{note.name})" for note, text in notes.items() if path.stem in text]
        used = used or ["no page any more: delete it"]
        rows.append(
            [
                f"`{path.name}`",
                what,
                where.get("device", ""),
                f"`{where['commit']}`" if "commit" in where else "",
                ", ".join(used),
            ]
        )
    return f"""# Result files

Made by `make results`, which also makes the tables and pictures of the documentation: here lies JSON alone. A file that no page uses any more goes;
the repository's history keeps it. Files are named by what was run, the day and the
commit; one that ran on a changed tree says so in its `note` and in `environment.commit`.

{_table(("file", "what", "device", "commit", "figures stand in"), rows)}
"""


# --- the pictures


def draw_decode(path: Path) -> None:
    """How much faster decode is than the fastest dense kernel, a bar a configuration, at 32k and 128k tokens."""
    run, times = _read(DECODE[0]), _decode_times(DECODE[0])
    groups: dict[str, dict[str, dict[int, float]]] = {}
    rivals: dict[str, None] = {}
    shown = {(x.head_dim, x.name) for x in CONFIGURATIONS if x.head_dim == 128}
    for (name, width, heads, n), row in times.items():
        if heads == "16/16" and n in PICTURED and (width, name) in shown:
            kept = f"{name}  ({Configuration.named(name, width).bytes} of {4 * width} bytes)"
            groups.setdefault(f"head size {width}", {}).setdefault(kept, {})[row["n"]] = row["ratio"]
            rivals |= {rival_name(x.removesuffix("_grouped")): None for x in row["baselines"]}
    where = run["environment"]
    mark = ", with uncommitted changes" if _is_dirty(where) else ""
    title = f"Attention of one new token: {where['device']}, bfloat16, batch 8, 16 heads\ncommit {where['commit'].removesuffix('-dirty')}{mark}"
    speedup_bars(path, groups, title=title, rivals=tuple(rivals))


def draw_bytes(path: Path) -> None:
    """Time of decode over the tokens in the cache, and at the longest over the bytes of a token, beside what reading them takes."""
    plt = pyplot()
    run, times = _read(DECODE[0]), _decode_times(DECODE[0])
    where, by_name = run["environment"], dict[str, dict[int, float]]()
    for (name, width, heads, _), row in times.items():
        if (width, heads) == (128, "16/16"):
            by_name.setdefault(name, {})[row["n"]] = row["timing"]["median_ms"]
            fastest = min(x["timing"]["median_ms"] for x in row["baselines"].values())
            dense = by_name.setdefault("dense", {})
            dense[row["n"]] = min(fastest, dense.get(row["n"], math.inf))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    shown = (
        "dense",
        "16+k16",
        "k16",
        "dense-int8",
        "16+k16-int8",
        "dense-int4",
        "axes48-int4",
        "k16-int4",
        "k16-int4-skip",
    )
    for name in shown:
        left.plot(list(by_name[name]), list(by_name[name].values()), marker="o", ms=3, lw=1.4, label=name)
    lengths = list(by_name["dense"])
    left.set(
        xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="ms", title="One new token, over the context"
    )
    left.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
    left.set_yticks(marks := (0.05, 0.1, 0.2, 0.5, 1, 2), [f"{x:g}" for x in marks])
    left.minorticks_off()
    left.legend(fontsize=8)
    longest, beside = max(lengths), (6, -9)
    labelled = dict.fromkeys(
        ("dense", "32+k16", "16+k16", "k16", "dense-int8", "16+k16-int8", "dense-int4", "k16-int8-skip", "k16-skip"),
        beside,
    )
    labelled |= {"32+k16-int4": (-6, 7), "axes48-int4": (-62, 3), "k16-int4": (-46, 2), "k16-int4-skip": (-40, -13)}
    for name, by_length in by_name.items():
        token_bytes, is_skip = Configuration.named(name, 128).bytes, name.endswith("-skip")
        right.scatter(
            token_bytes, by_length[longest], color="C1" if is_skip else "C3" if name.startswith("dense") else "C0", s=18
        )
        if name in labelled:
            right.annotate(
                name, (token_bytes, by_length[longest]), fontsize=8, xytext=labelled[name], textcoords="offset points"
            )
    floor = [8 * 16 * longest * x / run["copy_gb_per_s"] / 1e6 for x in (0, 512)]
    right.plot(
        (0, 512),
        floor,
        color="grey",
        lw=1,
        ls="--",
        label=f"bytes at {run['copy_gb_per_s']:.0f} GB/s, as a copy moves them",
    )
    right.set(
        xlabel="bytes of a token per kv head, of all that is stored", ylabel="ms", title=f"At {longest // 1024}k tokens, over the bytes",
        xlim=(0, 570), ylim=(0, None),
    )  # fmt: skip
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"Attention of one new token, 16 heads of 128, batch 8: {where['device']}, commit {where['commit']}",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_served(path: Path) -> None:
    """Tokens per second of vLLM's servers beside those of a 16-bit cache, a bar a cache and number of requests."""
    where = _read(SERVED)["environment"]
    groups: dict[str, dict[str, dict[int, float]]] = {}
    for (shape, many), by_cache in _served_sides(SERVED, "32k").items():
        bars = groups.setdefault(f"the shape of Qwen3-{shape}, {many}", {})
        for name, found in by_cache.items():
            if name != "dense":
                bars[name] = {2**15: found["tokens_per_s"] / by_cache["dense"]["tokens_per_s"]}
    title = f"Served by vLLM {where['vllm']}, tokens per second: {where['device']}, commit {where['commit']}"
    speedup_bars(path, groups, title=title, rivals=("FlashAttention 3 over a 16-bit cache",))


def draw_frontier(path: Path) -> None:
    """What the models of heads of 128 lose in each form of their caches, over bytes and over milliseconds."""
    run = _read(LONG_FRONTIER)
    results = {
        name: model | {"forms": {form: _numbered(row) for form, row in model["forms"].items()}}
        for name, model in run["results"].items()
    }
    title = f"Qwen3 of 125M, converted and trained on at 8192 tokens: {run['environment']['device']}, commit {run['environment']['commit']}"
    frontier.draw(title, results, 8192, run["settings"]["decode_device"], path)


def _numbered(form: dict[str, Any]) -> dict[str, Any]:
    """A form of a cache with tokens as numbers, which JSON has as text."""
    return form | {name: {int(n): found for n, found in form[name].items()} for name in ("lengths", "decode_ms")}


def draw_training(path: Path) -> None:
    """How far GPT-2s of 124M lie above the dense one while they are trained."""
    plt = pyplot()
    curves, where = _curves((*GPT2_LARGE, GPT2_CUT)), _read(GPT2_LARGE[0])["environment"]
    labels = {
        "gpt2-k8-best": "k8, our former recipe", "gpt2-k8": "k8, the paper's rule", "gpt2-k8-scaled": "k8, scores times 3",
        "gpt2-short12": "heads of 12", "gpt2-6+4-early": "6+k4, scores times 3, gradient to all for a tenth (cut off)",
        "gpt2-6+4-late": "6+k4 after a dense half",
    }  # fmt: skip
    figure, axes = plt.subplots(figsize=(9, 4.8), layout="constrained")
    for run, label in labels.items():
        steps = [step for step in curves[run] if step >= _SMOOTHED_STEPS]
        gaps = [100 * _gap(curves[run], curves["gpt2-dense"], step - _SMOOTHED_STEPS, step) for step in steps]
        axes.plot([step * 0.049152 for step in steps], gaps, label=label, lw=1.6)
    axes.set(
        xlabel="trained on, million tokens", ylabel="perplexity on training text above dense, %", ylim=(-3, 36),
        title=f"GPT-2 of 124M, 24 bytes a key where dense has 128: {where['device']}",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, ncols=2, loc="upper right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


_SMOOTHED_STEPS = 150  # that a point of a curve is the mean of


# --- reading


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _case(pattern: str, row: dict[str, Any]) -> re.Match[str]:
    """What the name of a benchmark's row says. Raises `ValueError` for a row that was not timed, or has another name."""
    found = re.fullmatch(pattern, _renamed(row["case"]))
    if found is None or row["status"] != "ok":
        raise ValueError(f"{row['case']} ({row['status']}) is no row of the form {pattern}")
    return found


def _renamed(case: str) -> str:
    """A case with the name of its configuration where an earlier run spelt it: "16 dense + k=16, 8-bit" is 16+k16-int8."""

    def name(spelt: re.Match[str]) -> str:
        return (
            code_name(int(spelt[2]), int(spelt[1] or 0)) + ("-int8" if spelt[3] else "") + ("-skip" if spelt[4] else "")
        )

    return re.sub(r"(?:(\d+) dense \+ )?k=(\d+)(, 8-bit)?(, tolerance 0\.01)?", name, case)


def _decode_times(name: str) -> dict[tuple[str, int, str, str], dict[str, Any]]:
    """Rows by (configuration, head size, heads, tokens), with what `queries` they had."""
    found = {}
    for row in _read(name)["rows"]:
        if row["status"] == "failed":  # its check: no time is shown
            continue
        case = _case(r"d=(\d+), ([^, ]+)(, dense queries| by the same kernels)?, ([\d/]+) heads, n=(\w+)", row)
        key = (case[2], int(case[1]), case[4], case[5])
        found.setdefault(key, row | {"queries": "dense" if case[3] else "sparse"})  # of k8 with both, the sparse ones
    return found


def _stored_bytes(run: dict[str, Any], dense: Configuration) -> int:
    """Of a dense token in the dtype of the run: float32 on a CPU."""
    return dense.bytes if _is_gpu(run["environment"]) else 2 * dense.bytes


def _converted_configuration(name: str, row: dict[str, Any]) -> Configuration:
    if name.startswith("dense"):
        return Configuration(64, bits=8 if name == "dense-int8" else 16)
    return Configuration(64, row["dense_dims"], row["topk"], 8 if row["cache_dtype"] == "int8" else 16)


# How a report of `flashsfa convert` spells configurations that have rows in other tables.
_WIDE_LABELS = {
    "dense": "dense", "dense-int8": "dense, int8", "dense-int4": "dense, int4", "axes48-int4": "bits per axis, 48 bytes a key, values 4 bits",
    "16+k16": "16 dense + top-16, 16 bits", "32+k16": "32 dense + top-16, 16 bits",
}  # fmt: skip


def _converted_loss(configuration: Configuration) -> str:
    if configuration.name == "dense":
        return ""
    if configuration.head_dim == 128:
        rows = {row["label"]: row for row in _read(WIDE)["results"] if not row["exact_tokens"]}
        found = rows.get(_WIDE_LABELS.get(configuration.name, ""))
        return NOT_MEASURED if found is None else f"Qwen3 {_percent(found['loss'], 2)}"
    results = _read(CONVERTED)["results"]
    row = results.get(configuration.name)
    return NOT_MEASURED if row is None else _percent(row["perplexity"] / results["dense"]["perplexity"] - 1)


def _trained_loss(configuration: Configuration) -> str:
    """Mean over seeds of the best recipe, against dense attention; runs of a seed again count with their mean."""
    rows = {
        "dense-int8": (
            ("GPT-2", GPT2, "gpt2-int8", "gpt2-dense"),
            ("Qwen3", QWEN3, "qwen3-int8-warm", "qwen3-full-warm"),
        ),
        "k8": (
            ("GPT-2, 28M", GPT2, "gpt2-k8-denseq-all-equal", "gpt2-dense"),
            ("GPT-2, 124M", GPT2_LARGE, "gpt2-k8-scaled", "gpt2-dense"),
        ),
        "24+k8": (("Qwen3", QWEN3, "qwen3-24+8-denseq-all-warm", "qwen3-full-warm"),),
        "32+k8": (("Qwen3", QWEN3, "qwen3-32+8-denseq-all-warm", "qwen3-full-warm"),),
    }
    if configuration.name == "dense" and configuration.head_dim == 64:
        return ""
    wide = {"32+k16": (("Qwen3", QWEN3_WIDE, "qwen3-32+16", "qwen3-dense"),)}
    known = rows if configuration.head_dim == 64 else wide
    if configuration.name not in known:
        return NOT_MEASURED
    found = []
    for family, files, run, baseline in known[configuration.name]:
        own, dense = _perplexities(files, run), _perplexities(files, baseline)
        found.append(f"{family} {_percent(fmean(x / y for x, y in zip(own, dense, strict=False)) - 1)}")
    return ", ".join(found)


def _perplexities(files: Sequence[str], run: str) -> list[float]:
    """By seed."""
    first, *others = _trained_row(files, run)["perplexity"]
    again = _repeated()
    return [fmean([first, again[run]]) if run in again else first, *others]


def _repeated() -> dict[str, float]:
    """Perplexity of the first seed of runs, where it was run again."""
    mark = ", the same seed again"
    rows = (row for row in _read(TRIALS)["eight_bit"] if row["run"].endswith(mark))
    return {row["run"].removesuffix(mark): row["perplexity"] for row in rows}


def _trained_row(files: Sequence[str], run: str) -> dict[str, Any]:
    for name in files:
        for row in _read(name)["results"]:
            if row["runs"][0] == run:
                return dict(row)
    raise KeyError(run)


def _trained_configuration(attention: dict[str, Any], head_dim: int) -> tuple[str, str]:
    """Name and key bytes."""
    kind, width = attention["kind"], attention["width"]
    if kind == "sfa":
        configuration = Configuration(head_dim, attention["dense_dims"], attention["topk"])
        return f"`{configuration.name}`", str(configuration.key_bytes)
    dense = Configuration(head_dim)
    return {
        "dense": ("`dense`", str(dense.key_bytes)),
        "int8": ("`dense-int8`", str(Configuration(head_dim, bits=8).key_bytes)),
        "short": (f"heads of {width}", f"{2 * (width or 0)}"),
        "low_rank": (f"projections of rank {width}", str(dense.key_bytes)),
        "performer": (f"Performer, {width} features", "none"),
    }[kind]


def _queries(attention: dict[str, Any], head_dim: int) -> str:
    if attention["kind"] != "sfa":
        return ""
    pattern, budget = attention.get("query_pattern"), attention["topk_query"]
    return (
        f"{pattern}, {budget}"
        if pattern
        else "sparse, as keys"
        if budget is None
        else "dense"
        if budget == head_dim
        else f"top-{budget}"
    )


def _recipe(attention: dict[str, Any]) -> str:
    temperature, ends = attention.get("temperature", 1.0), attention.get("gradient_share", 1.0)
    parts = {
        "gradient to all": attention["gradient"] == "all" and ends == 1.0,
        f"gradient to all for the first {100 * ends:g} %": ends != 1.0,
        "equal query features": attention.get("equalize"),
        f"temperature {temperature:g}": temperature != 1.0,
        f"scores times {attention.get('score_scale', 1.0):g}": attention.get("score_scale", 1.0) != 1.0,
        f"dense for the first {100 * attention.get('dense_share', 0):g} %": attention.get("dense_share"),
        "annealed": attention["anneal"],
        f"window of {attention['window']}": attention["window"],
        "first layer dense": attention["layers"],
        "RoPE on the dense features": attention["positions"] == "channel",
    }
    return ", ".join(name for name, is_set in parts.items() if is_set)


# --- writing


def _where(run: dict[str, Any], *names: str) -> str:
    environment = run["environment"]
    versions = [f"{name} {environment[name]}" for name in ("torch", "triton", "transformers") if environment.get(name)]
    note = f" {run['note']}" if run.get("note") else ""
    files = ", ".join(f"`{name}.json`" for name in names)
    mark = " with uncommitted changes" if _is_dirty(environment) else ""
    commit = f"commit `{str(environment['commit']).removesuffix('-dirty')}`{mark}"
    return f"{environment['device']}, {', '.join(versions)}, {commit} ({files}).{note}"


def _where_each(names: Sequence[str]) -> str:
    """Of files that were not run alike."""
    return " ".join(_where(_read(name), name) for name in names)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _with_error(loss: float, error: float) -> str:
    return f"{_percent(loss, 2).removesuffix(' %')} ± {100 * error:.2f} %"


def _percent(share: float, digits: int = 1) -> str:
    rounded = round(100 * share, digits)
    return f"{'−' if rounded < 0 else '+'}{abs(rounded):.{digits}f} %"


if __name__ == "__main__":
    main()

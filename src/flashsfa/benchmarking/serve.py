"""Cases of serving: vLLM with this package's plugin beside vLLM with its own attention, asked over HTTP.

Each side is a server of its own, over the same random weights, one after the other; vLLM's own benchmark asks and measures. Tokens a
second are those of requests whose prompts are in the cache already, so that they make tokens all at once, and of so many tokens that
taking the prompts in is a small part of the time; the first token is that of one request at a time whose prompt is not. A server that
codes keys is compared only if the tokens that it makes one by one are as likely as when it reads them at once.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from ..basis import FeatureBasis
from ..formats import CodeFormat
from ..huggingface.settings import BASIS_FILE
from .cases import UnavailableError, WrongOutputError, tokens_label
from .configuration import Configuration
from .models import published_config
from .results import BaselineResult, Serving
from .timing import Timing, release, summary

_NEW = 512  # tokens that a request makes at the end of its context, or a quarter of it if that is less
_MOST_REQUESTS = 1024
_START = 1800  # seconds that a server may take to start: it reads weights, compiles and captures graphs
_OWN_LOAD = 8  # more than a server and who asks it make
_CPU_CACHE = 2**25  # bytes; on a GPU vLLM takes what is left
_ALL = 0  # as many requests as fit the cache of a side


def cases(device: torch.device, quick: bool) -> list[ServeCase]:
    """The published shapes on a GPU, eager and with CUDA graphs; a small one elsewhere. Cases of the same servers follow one another."""
    if device.type != "cuda":
        return [
            ServeCase("tiny", code, False, 512, many, (2, _ALL), device)
            for code in ("8+k8", "8+k8-int8", "dense-int8")
            for many in (2, _ALL)
        ]
    at_a_time = (1, _ALL) if quick else (1, 16, _ALL)
    return [
        ServeCase(shape, code, graphs, n, many, at_a_time, device)
        for shape in (("qwen3-0.6b",) if quick else ("qwen3-0.6b", "qwen3-8b"))
        for graphs in ((True,) if quick else (False, True))
        for n in (8192, 32768)
        for code in ("16+k16", "16+k16-int8", "dense-int8")
        for many in at_a_time
    ]


@dataclass(frozen=True)
class ServeCase:
    """A model of `shape` with the cache `code`, asked by `requests` at a time (0: as many as fit) with contexts of n tokens.

    `at_a_time` are all numbers of requests that are measured while a server runs.
    """

    shape: str
    code: str
    graphs: bool
    n: int
    requests: int
    at_a_time: tuple[int, ...]
    device: torch.device

    @property
    def name(self) -> str:
        return f"{self.facet}, {self.curve}, n={tokens_label(self.n)}"

    @property
    def facet(self) -> str:
        return f"{self.shape}, {'CUDA graphs' if self.graphs else 'eager'}"

    @property
    def curve(self) -> str:
        many = f"{self.requests} request{'s' * (self.requests > 1)}" if self.requests else "all that fit"
        return f"{self.code}, {many}"

    def measure(self, bandwidth: float, quick: bool) -> dict[str, Any]:
        """The figures of the case's row. Raises `WrongOutputError` if the server's tokens differ from those it reads."""
        dense = {name: _measured(side, quick) for name, side in self._dense().items()}
        ours = _measured(self._side(f"--hf-overrides={json.dumps({'sfa': self._settings()})}"), quick)
        if isinstance(ours, Exception):
            raise ours
        there = {name: found for name, found in dense.items() if isinstance(found, _Served)}
        if not there:
            raise UnavailableError(f"no dense server ran: {'; '.join(map(str, dense.values()))}")
        allowed = 3 * max(found.error for found in there.values()) + 4 * torch.finfo(self.dtype).eps
        if not ours.error <= allowed:
            raise WrongOutputError(f"made tokens are {ours.error:.1e} from read ones, allowed {allowed:.1e}")
        timing, serving = ours.load(self.requests)
        notes = [f"{name}: {found}" for name, found in dense.items() if name not in there]
        notes += [f"{name}: {found.host}" for name, found in {"ours": ours, **there}.items() if found.host]
        baselines = {}
        for name, found in there.items():
            try:
                theirs, of_theirs = found.load(self.requests)
            except UnavailableError as reason:
                notes.append(f"{name}: {reason}")
            else:
                ratio = theirs.median_ms / timing.median_ms
                baselines[name] = BaselineResult(theirs, None, ratio, None, serving=of_theirs)
        return {
            "note": "; ".join(notes), "timing": timing, "error": ours.error, "serving": serving, "backend": "vllm",
            "reason": "served over HTTP", "baselines": baselines,
        }  # fmt: skip

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def _settings(self) -> dict[str, Any]:
        """What `enable` would store: a converted model's queries are dense, and it has a basis."""
        head_dim = published_config(self.shape, self.dtype).head_dim
        code = Configuration.named(self.code, head_dim)
        (topk, dense_dims), bits = code.code, code.cache_dtype
        narrow = bits.name if isinstance(bits, CodeFormat) else "int8"
        return {
            "topk": topk,
            "topk_query": "dense",
            "dense_dims": dense_dims,
            "cache_dtype": None if bits is None else narrow,
            "has_basis": True,
        }

    def _dense(self) -> dict[str, _Side]:
        if self.device.type != "cuda":
            return {
                "cpu_float32": self._side("--block-size=32"),
                "cpu_fp8": self._side("--block-size=32", "--kv-cache-dtype=fp8"),
            }
        flash = "--attention-backend=FLASH_ATTN"
        return {"flash_bf16": self._side(flash), "flash_fp8": self._side(flash, "--kv-cache-dtype=fp8")}

    def _side(self, *arguments: str) -> _Side:
        return _Side(self.shape, self.graphs, self.n, self.at_a_time, self.device, self.dtype, arguments)


@dataclass(frozen=True)
class _Side:
    """A server with its own `arguments`, and the numbers of requests that it is asked."""

    shape: str
    graphs: bool
    n: int
    at_a_time: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    arguments: tuple[str, ...]

    def command(self, folder: str, port: int) -> list[str]:
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", folder, "--port", str(port), "--dtype",
            str(self.dtype).removeprefix("torch."), "--max-model-len", str(self.n), "--max-num-seqs", str(_MOST_REQUESTS),
        ]  # fmt: skip
        if not self.graphs:
            command.append("--enforce-eager")
        if self.device.type != "cuda":
            command += ["--kv-cache-memory-bytes", str(_CPU_CACHE)]
        return [*command, *self.arguments]


@dataclass(frozen=True)
class _Served:
    """What a server gave. `loads` has the timing of a token, milliseconds, and the rest by requests at a time; None for more requests
    than fit. `host` says what else was at work, if it was much."""

    error: float
    loads: Mapping[int, tuple[Timing, Serving] | None]
    host: str = ""

    def load(self, requests: int) -> tuple[Timing, Serving]:
        found = self.loads[requests]
        if found is None:
            raise UnavailableError(f"fewer than {max(1, requests)} requests fit its cache")
        return found


@functools.cache  # a server is asked by several cases
def _measured(side: _Side, quick: bool) -> _Served | Exception:
    """What a server of `side` gives, or why there is none."""
    if not any(entry.value == "flashsfa.vllm:register" for entry in entry_points(group="vllm.general_plugins")):
        return UnavailableError("vLLM does not see the plugin: install this package, rather than put it on a path")
    folder = _model_folder(side.shape, side.device, side.dtype).name
    try:
        with _server(side, folder) as url:
            capacity, page = _capacity(url)
            fit = min(_MOST_REQUESTS, capacity // (page * math.ceil(side.n / page)))
            error = _difference(url, folder)
            new = min(_NEW, side.n // 4)
            ask = functools.partial(_ask, url, folder, tokens=side.n - new)
            found: dict[int, list[dict[str, Any]]] = {asked: [] for asked in side.at_a_time}
            for asked in side.at_a_time:
                many = asked or fit
                if 0 < many <= fit:
                    ask(new=1, prompts=many, at_a_time=many)  # reads the prompts
                    found[asked] = [ask(new=new, prompts=many, at_a_time=many) for _ in range(1 if quick else 2)]
            first = ask(new=1, prompts=3 if quick else 8, at_a_time=1, seed=1)["median_ttft_ms"]
    except Exception as reason:  # whatever it is: the other sides still have their figures
        return reason
    loads = {asked: _load(runs, asked or fit, first, capacity) for asked, runs in found.items()}
    return _Served(error, loads, _busy() if side.device.type == "cuda" else "")


def _busy() -> str:
    """That the host has more to do than a server and who asks it: a server of small steps then waits for it."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return f"the host was busy, with a load of {load:.0f} on {cores} cores" if load > max(_OWN_LOAD, cores / 4) else ""


def _load(runs: list[dict[str, Any]], requests: int, first: float, capacity: int) -> tuple[Timing, Serving] | None:
    if not runs:
        return None
    timing = summary([1e3 / run["output_throughput"] for run in runs])
    waits = summary([run["median_tpot_ms"] for run in runs]).median_ms
    return timing, Serving(requests, 1e3 / timing.median_ms, waits, first, capacity)


def _ask(
    url: str, folder: str, *, tokens: int, new: int, prompts: int, at_a_time: int, seed: int = 0
) -> dict[str, Any]:
    """What vLLM's benchmark finds with random prompts of `tokens`, each of which makes `new` ones."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    options = parser.parse_args([
        f"--base-url={url}", f"--model={folder}", "--dataset-name=random", f"--random-input-len={tokens}",
        f"--random-output-len={new}", f"--num-prompts={prompts}", f"--max-concurrency={at_a_time}", f"--seed={seed}",
        "--temperature=0", "--ignore-eos", "--disable-tqdm", "--ready-check-timeout-sec=0", "--save-detailed",
    ])  # fmt: skip
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        found: dict[str, Any] = serve.main(options)
    if found["completed"] < prompts or found["total_output_tokens"] != prompts * new:
        why = next((error for error in found.get("errors", ()) if error), "no reason given")
        raise RuntimeError(
            f"{found['completed']} of {prompts} requests ended, with {found['total_output_tokens']} tokens: {why}"
        )
    return found


def _difference(url: str, folder: str) -> float:
    """How far the likelihoods of tokens that the server makes one by one are from those of the same tokens read at once, relative."""
    prompt = list(range(10, 10 + 64))
    common = {"model": folder, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    made = _post(f"{url}/v1/completions", common | {"prompt": prompt, "max_tokens": 24, "logprobs": 1})["choices"][0]
    whole = prompt + made["token_ids"]
    read = _post(f"{url}/v1/completions", common | {"prompt": whole, "max_tokens": 1, "prompt_logprobs": 1})["choices"][
        0
    ]
    pairs = zip(made["token_ids"], read["prompt_logprobs"][len(prompt) :], strict=True)
    expected = torch.tensor([of_token[str(token)]["logprob"] for token, of_token in pairs])
    found = torch.tensor(made["logprobs"]["token_logprobs"])
    return float((found - expected).norm() / expected.norm())


def _capacity(url: str) -> tuple[int, int]:
    """Tokens that the server's cache holds, and those of a page, as it says itself."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    info = next(line for line in text.splitlines() if line.startswith("vllm:cache_config_info{"))
    said = dict(re.findall(r'(\w+)="([^"]*)"', info))
    return int(said["kv_cache_size_tokens"]), int(said["block_size"])


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


@contextlib.contextmanager
def _server(side: _Side, folder: str) -> Iterator[str]:
    """The address of a server that is ready. Raises `RuntimeError` with its reason if it ends before that."""
    release(side.device)
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = Path(folder, "server.log")
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        server = subprocess.Popen(
            side.command(folder, port), stdout=out, stderr=out, env=os.environ | quiet, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    before = signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # or the server would outlive this process
    try:
        until = time.monotonic() + _START
        while not _is_up(url):
            if server.poll() is not None:
                raise RuntimeError(f"the server ended: {_reason(log.read_text(errors='replace'))}")
            if time.monotonic() > until:
                raise RuntimeError(f"the server did not start in {_START} seconds")
            time.sleep(0.5)
        yield url
    finally:
        _stop(server)
        signal.signal(signal.SIGTERM, before)


def _is_up(url: str) -> bool:
    with contextlib.suppress(OSError):
        urllib.request.urlopen(f"{url}/health", timeout=5).close()
        return True
    return False


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it started."""
    for word in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, word)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=60)


def _reason(log: str) -> str:
    """The first error that a server's log names: later ones follow from it. Warnings name some that did no harm."""
    lines = log.strip().splitlines()
    found = (re.search(r"\b\w*Error: .+", line) for line in lines if "WARNING" not in line)
    return next((error[0].strip() for error in found if error), (lines or ["it said nothing"])[-1])


@functools.lru_cache(maxsize=1)  # the cases of a shape follow one another
def _model_folder(shape: str, device: torch.device, dtype: torch.dtype) -> TemporaryDirectory[str]:
    """A model with random weights, a tokenizer of as many words, and a basis that turns each head at random."""
    config = published_config(shape, dtype)
    folder = TemporaryDirectory(prefix="flashsfa-serve-")
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder.name)
    del model
    release(device)
    _tokenizer(config.vocab_size).save_pretrained(folder.name)
    heads = (config.num_hidden_layers, config.num_key_value_heads, config.head_dim, config.head_dim)
    turn = torch.linalg.qr(torch.randn(heads, generator=torch.Generator().manual_seed(0), device="cpu")).Q.contiguous()
    path = Path(folder.name, BASIS_FILE)
    path.parent.mkdir()
    FeatureBasis(turn, turn.clone()).save(path)
    return folder


def _tokenizer(size: int) -> Any:
    """Words t0, t1 and so on, with nothing between them: vLLM refuses text of more characters than its tokens can have. No special tokens:
    they make no text, and no time."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("t[0-9]+"), "isolated")
    words.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words)

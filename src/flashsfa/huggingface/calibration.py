"""Calibration of a model's basis: its queries and keys after RoPE, streamed into moments, layer by layer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..basis import KINDS, SHARED, FeatureBasis, Moments
from ..budget import require_budget
from ..checks import require, require_choice, require_int, require_tensor
from .attention import attention_mask, dense_forward
from .structure import (
    attending_by,
    attention_layers,
    attention_shape,
    default_dense_dims,
    default_shared_kind,
    evaluating,
    most_positions,
    require_switchable,
    tensor_device,
    text_config,
    text_part,
    unwrap,
)

_NAME = "sfa_calibration"
_log = logging.getLogger("flashsfa")


def calibrate(
    model: Any,
    windows: Tensor | None = None,
    topk: int | None = None,
    *,
    text: str | None = None,
    tokenizer: Any = None,
    dense_dims: int | None = None,
    key_bytes: int | None = None,
    kind: str | None = None,
    max_position: int | None = None,
    progress: Callable[[], None] | None = None,
) -> FeatureBasis:
    """The basis [L, Hkv, D, D] of a dense model's attention layers, from text.

    Args:
        model: a causal language model of transformers that `enable` can switch, in the wrappers that it takes.
        windows: [S, W] int64 token ids; 8000 tokens suffice, fewer than 4000 cost quality.
        topk, dense_dims: the budget that `enable` will be given, with the same default.
        key_bytes: in place of these: bytes of a key whose axes have a fixed number of bits each.
        text, tokenizer: in place of windows: a text of some 40,000 characters or more, and the model's tokenizer. It is cut into
            windows of up to 1024 tokens, of which 16 are taken evenly across it.
        kind: "dictionary", "balanced" (for sparse queries), "whitened", "scaled", "pca" or "identity"; see
            `FeatureBasis.from_moments`. None: "dictionary" for topk; for key_bytes "scaled", or "whitened" for a model without RoPE.
        max_position, progress: as in `gather_moments`.

    Raises `TypeError` or `ValueError` for what does not fit, before the model runs.
    """
    if (topk is None) == (key_bytes is None) or (key_bytes is not None and dense_dims is not None):
        raise TypeError(
            "calibrate needs topk, with or without dense_dims, or key_bytes alone; got "
            f"topk={topk}, dense_dims={dense_dims}, key_bytes={key_bytes}"
        )
    require_switchable(unwrap(model), attention_layers(model))
    if text is not None:
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        require(windows is None and tokenizer is not None, "text goes with a tokenizer, and takes the place of windows")
        windows = _windows(model, text, tokenizer)
    require(windows is not None, "calibrate needs windows of token ids, or text and tokenizer")
    assert windows is not None
    kind = kind or ("dictionary" if key_bytes is None else default_shared_kind(model))
    if key_bytes is not None:
        require_int("key_bytes", key_bytes, 1, attention_shape(model)[2])
        require(kind in SHARED, f"key_bytes go with the kinds {' and '.join(SHARED)}, got {kind!r}")
        dense_dims = 0
    else:
        assert topk is not None
        dense_dims = default_dense_dims(model) if dense_dims is None else dense_dims
        require_budget(topk, attention_shape(model)[2], dense_dims)
    require_choice("kind", kind, KINDS)
    moments = gather_moments(model, windows, max_position=max_position, progress=progress)
    return FeatureBasis.from_layers(moments, kind, topk=topk, dense_dims=dense_dims, key_bytes=key_bytes)


_WINDOW, _WINDOWS, _FEWEST_TOKENS = 1024, 16, 4000


def _windows(model: Any, text: str, tokenizer: Any) -> Tensor:
    """[S, W] token ids, evenly from a text."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], device="cpu")
    length = min(_WINDOW, most_positions(model) or _WINDOW)
    require(
        ids.numel() >= max(length, _FEWEST_TOKENS),
        f"the text has {ids.numel()} tokens, and calibration needs {max(length, _FEWEST_TOKENS)} or more: give a longer text like "
        "those that the model will read",
    )
    available = ids.numel() // length
    chosen = torch.linspace(0, available - 1, min(_WINDOWS, available), device="cpu").round().long()
    return ids[: available * length].view(available, length)[chosen]


def require_windows(name: str, windows: Tensor, model: Any) -> None:
    """Raise `TypeError` or `ValueError` unless `windows` are token ids [S, W] of a model."""
    require_tensor(name, windows)
    require(
        windows.ndim == 2 and windows.numel() > 0 and windows.dtype in (torch.int64, torch.int32),
        f"{name} must be [S, W] int64 token ids, got {windows.dtype} {tuple(windows.shape)}",
    )
    vocabulary = text_config(model).vocab_size
    require(
        int(windows.min()) >= 0 and int(windows.max()) < vocabulary,
        f"{name} must hold token ids below {vocabulary}, the model's vocabulary; got {windows.min()} to {windows.max()}",
    )


@torch.no_grad()
def gather_moments(
    model: Any, windows: Tensor, *, max_position: int | None = None, progress: Callable[[], None] | None = None
) -> list[Moments]:
    """Moments of each attention layer's queries and keys, after RoPE, over windows [S, W] of token ids. Few tokens log a warning.

    Args:
        max_position: longest context the model will be used with. Rotated keys look different at positions that calibration has
            not seen, so queries and keys of all tokens but the first (the one that attention sinks into) are turned on, each token
            by positions drawn evenly up to there. In a model whose rotation is not found so, the windows are moved there, at
            offsets spread evenly, a single one at the end. None: as far as the model has positions.
        progress: called after each window. None for a bar of its own on a terminal.
    """
    require_windows("windows", windows, model)
    if max_position is not None:
        require_int("max_position", max_position, 1)
    count, length = windows.shape
    if windows.numel() < _FEWEST_TOKENS:
        _log.warning(
            "calibrating on %d tokens: with fewer than %d a basis may lose much, so give more text of the kind that the model will read",
            windows.numel(), _FEWEST_TOKENS,
        )  # fmt: skip
    model = unwrap(model)
    modules: list[Any] = attention_layers(model)
    require_switchable(model, modules)
    limit = most_positions(model)
    furthest = max_position if max_position is not None else max(length, limit or length)
    require(
        length <= furthest and (limit is None or furthest <= limit),
        f"max_position must hold the windows' {length} tokens and be at most the model's {limit}, got {furthest}",
    )
    moments: dict[int, Moments] = {}
    device, turn = tensor_device(model), None
    shifts, draws = torch.zeros(length, dtype=torch.int64, device="cpu"), torch.Generator().manual_seed(0)
    if furthest > length:
        with evaluating(model):
            turn = _rotary_turn(model, modules, windows[:1, :_CHECKED_TOKENS].to(device), furthest)

    def record(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen = moments.setdefault(module.layer_idx, Moments(key.shape[1], key.shape[-1]))
        seen.update(*((query, key) if turn is None else turn(query, key, shifts)))
        return dense_forward(module, query, key, value, *args, **kwargs)

    with evaluating(model), attending_by(model, _NAME, record, attention_mask):
        # a bar on a terminal alone, unless the caller shows progress
        for index, window in enumerate(
            tqdm(windows, "calibrating", disable=None if progress is None else True, leave=False)
        ):
            positions = torch.arange(length)
            if turn is not None:
                shifts[1:] = torch.randint(furthest - length + 1, (length - 1,), generator=draws, device="cpu")
            else:
                positions[1:] += (furthest - length) * (index + 1 if count == 1 else index) // max(1, count - 1)
            _run(model, window[None].to(device), positions)
            if progress is not None:
                progress()
    silent = [module.layer_idx for module in modules if module.layer_idx not in moments]
    require(
        not silent, f"layers {silent} of {type(model).__name__} called no attention function: it cannot be switched"
    )
    return [moments[layer] for layer in sorted(moments)]


Turn = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
_CHECKED_TOKENS = 8


def _run(model: Any, ids: Tensor, positions: Tensor) -> None:
    """The model over ids [B, N] at `positions` [N]."""
    mask = torch.ones_like(ids)  # without one, a gap would read as packed sequences
    model(input_ids=ids, position_ids=positions[None].to(ids.device), attention_mask=mask, use_cache=False)


def _rotary_turn(model: Any, modules: list[Any], ids: Tensor, furthest: int) -> Turn | None:
    """What turns queries [B, Hq, N, D] and keys [B, H, N, D] on by shifts [N] of position, as the model's own rotation does.

    None for a model where it is not found, or does not give the keys that the model itself has at positions further on.
    """
    rotary = next((part for name, part in text_part(model).named_modules() if name.endswith("rotary_emb")), None)
    apply = getattr(sys.modules.get(type(modules[0]).__module__), "apply_rotary_pos_emb", None)
    if rotary is None or apply is None:
        return None

    def turn(q: Tensor, k: Tensor, shifts: Tensor) -> tuple[Tensor, Tensor]:
        q, k = q.float(), k.float()
        cos, sin = (
            x / getattr(rotary, "attention_scaling", 1.0) for x in rotary(q, position_ids=shifts[None].to(q.device))
        )
        width = cos.shape[-1]  # the leading features alone are turned where rotary embeddings are partial
        turned = apply(q[..., :width], k[..., :width], cos, sin)
        return tuple(torch.cat((x, y[..., width:]), dim=-1) for x, y in zip(turned, (q, k), strict=True))  # type: ignore[return-value]

    keys: list[dict[int, tuple[Tensor, Tensor]]] = [{}, {}]
    positions = torch.arange(ids.shape[1])
    shift = furthest - ids.shape[1]
    for held, start in zip(keys, (0, shift), strict=True):

        def record(module: Any, query: Tensor, key: Tensor, *args: Any, held: dict = held, **kwargs: Any) -> Any:
            held[module.layer_idx] = (query, key)
            return dense_forward(module, query, key, *args, **kwargs)

        with attending_by(model, _NAME, record, attention_mask):
            _run(model, ids, positions + start)
    try:
        for layer, near in keys[0].items():
            for turned, far in zip(turn(*near, torch.full_like(positions, shift)), keys[1][layer], strict=True):
                if not (turned - far.float()).norm() <= _SAME * far.float().norm():
                    return None
    except (TypeError, ValueError, RuntimeError, LookupError):  # rotations of other signatures
        return None
    return turn


_SAME = 0.05  # of a key: 16-bit models round their rotation, and another rotation is as far off as another key

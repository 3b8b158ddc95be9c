"""`pruning`: a press of kvpress drops tokens of a prompt from a switched model's cache, which keeps codes of the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import require
from .attention import OtherMask
from .cache import SparseCache, SparseCacheLayer, StaticSparseCache
from .structure import attention_layers, text_part, unwrap
from .switch import is_enabled

_INSTEAD = "take a press that scores tokens by themselves, such as SnapKVPress, KnormPress or ExpectedAttentionPress"


@contextmanager
def pruning(model: Any, press: Any) -> Iterator[None]:
    """Within this context, a prompt that fills an empty cache in one call is pruned: `press`, a scorer press of kvpress such as
    `KnormPress(compression_ratio=0.5)`, scores the tokens of each head by their keys and values as they come, and the cache holds
    codes of the best alone. The prompt itself attends to all of its tokens. Layers with a sliding window, and those left dense, keep
    theirs. Positions go on from the whole prompt.

    Args:
        model: a switched model, which makes a growing cache or is given one.
        press: of kvpress, which is not imported here; other presses than scorers are refused, by name.

    Raises `ValueError`, before anything runs, for a model that is dense or a press that does not compose; in a call for a static
    cache, padding, other masks than causal ones and speculative decoding.
    """
    require(is_enabled(model), "this model is dense, and a press of kvpress runs on it by itself: with press(model)")
    require_scorer(press)
    inner = unwrap(model)
    part = text_part(inner)
    press.post_init_from_model(inner)
    rotary = next((x for name, x in part.named_modules() if name.endswith("rotary_emb")), None)
    with ExitStack() as stack:
        for module in attention_layers(inner):
            if getattr(module, "sfa", None) is None:
                continue
            if not hasattr(module, "rotary_emb"):  # where presses look for it; no part of the model
                vars(module)["rotary_emb"] = rotary
                stack.callback(vars(module).pop, "rotary_emb")
            for handle in _Pruner(press).hook_on(module):
                stack.callback(handle.remove)
        yield


def require_scorer(press: Any) -> None:
    """Raise `ValueError`, with what to use instead, for a press that does more than to score the tokens of a prompt and keep the best
    by key and value: what it would do to dense keys, codes do not allow."""
    name = type(press).__name__
    scorer: Any = next((x for x in type(press).__mro__ if x.__name__ == "ScorerPress"), None)
    require(
        scorer is not None,
        f"{name} does more than to score tokens (it rewrites keys, masks them, or acts while tokens are generated), and a cache of codes "
        f"holds no keys for that: {_INSTEAD}",
    )
    require(
        type(press).compress is scorer.compress and type(press).forward_hook is scorer.forward_hook,
        f"{name} keeps tokens by a rule of its own beside its scores, which sfa does not know: {_INSTEAD}",
    )
    require(
        name != "ObservedAttentionPress",
        f"{name} needs attention weights, which sfa does not form: {_INSTEAD}",
    )


class _Pruner:
    """The hooks of one layer."""

    def __init__(self, press: Any) -> None:
        self._press = press
        self._prompt: tuple[Tensor, Tensor] | None = None

    def hook_on(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after, with_kwargs=True),
        ]

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Have the keys and values of a prompt seen as they come."""
        cache = kwargs.get("past_key_values")
        require(
            not isinstance(cache, StaticSparseCache),
            "a static cache holds every token, and a press has nothing to save there: leave cache_implementation out",
        )
        require(
            cache is None or isinstance(cache, SparseCache),
            lambda: (
                f"tokens are dropped from a SparseCache, not from a {type(cache).__name__}: pass one, call generate(), or use_cache=False"
            ),
        )
        layer = None if cache is None else cache.layers[module.layer_idx]
        if type(layer) is not SparseCacheLayer or layer.get_seq_length():
            return
        mask = kwargs.get("attention_mask")
        require(
            mask is None or (not isinstance(mask, OtherMask) and bool(mask.all())),
            "a press scores tokens, and would score padding: run sequences of one length, and causal masks alone",
        )
        require(
            layer.guesses_after is None,
            "speculative decoding brings guesses with the prompt, which a press would score: decode without one of them",
        )
        layer.__dict__.pop("update", None)  # of a call that failed
        update = layer.update

        def seen(key_states: Tensor, value_states: Tensor, *rest: Any, **options: Any) -> Any:
            del layer.update
            self._prompt = key_states, value_states
            return update(key_states, value_states, *rest, **options)

        layer.update = seen  # type: ignore[method-assign]

    def _after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        prompt, self._prompt = self._prompt, None
        if prompt is None:
            return
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        k, v = prompt
        with torch.no_grad():
            scores = self._press.score(module, hidden, k, v, None, kwargs)  # [B, Hkv, N]
        count = max(1, int(k.shape[2] * (1 - self._press.compression_ratio)))
        kept = scores.topk(count, dim=-1).indices.sort(dim=-1).values[..., None]
        kwargs["past_key_values"].layers[module.layer_idx].replace_prompt(
            *(x.gather(2, kept.expand(-1, -1, -1, x.shape[-1])) for x in prompt)
        )

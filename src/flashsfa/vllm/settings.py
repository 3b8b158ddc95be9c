"""What vLLM's workers need to know of a model: the budgets and the basis that `flashsfa.enable` saved with it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from vllm.config import get_current_vllm_config, get_current_vllm_config_or_none
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from ..basis import FeatureBasis
from ..checks import require
from ..coder import Coder
from ..decode import FEW_QUERIES
from ..formats import cache_bits
from ..huggingface import SFASettings
from ..huggingface.positions import is_channel
from ..huggingface.settings import BASIS_FILE
from .layout import PageLayout

PAGE_SIZES = [16, 32, 64, 128, 256]

_seen: SFASettings | None = None


def require_served(vllm_config: Any) -> None:
    """Raise `ValueError`, with what to do, for a model or a config of vLLM that the backend does not run."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    settings, head_dim = _read(model.hf_config), model.get_head_size()
    settings.budget(head_dim)
    PageLayout(coder_of(settings), head_dim, head_dim, model.dtype)
    path = _basis_path(settings, model.model)
    if path is not None:
        basis, expected = (
            _read_basis(path),
            (model.hf_config.num_hidden_layers, model.get_total_num_kv_heads(), head_dim, head_dim),
        )
        require(
            tuple(basis.key.shape) == expected,
            f"{path} is {tuple(basis.key.shape)}, and the model needs [L, Hkv, D, D] = {expected}: serve the whole folder that "
            "flashsfa saved",
        )
        basis.check(settings.topk, settings.dense_dims)
    require(
        getattr(model.hf_config, "text_config", None) is None,
        f"flashsfa serves models of text alone in vLLM, and {model.model} has other parts: run it in transformers",
    )
    require(
        cache.cache_dtype == "auto",
        f'flashsfa\'s pages hold codes in widths of their own, not in --kv-cache-dtype {cache.cache_dtype}: leave it "auto", and '
        "enable the model with cache_dtype='int8' for 8 bits",
    )
    require(
        not cache.user_specified_block_size or cache.block_size % PAGE_SIZES[0] == 0,
        f"flashsfa's pages hold a multiple of {PAGE_SIZES[0]} tokens, not --block-size {cache.block_size}: leave it out",
    )
    require(
        vllm_config.kv_transfer_config is None and cache.kv_offloading_size is None,
        "KV connectors copy keys and values of tokens, which flashsfa's pages hold as codes: serve without --kv-transfer-config and "
        "--kv-offloading-size",
    )
    if vllm_config.speculative_config is not None:
        _require_speculation(vllm_config.speculative_config)


def _require_speculation(speculative: Any) -> None:
    """Guesses come from the tokens or from a dense model of its own: layers that some methods add to the model would be coded by its
    settings, and of the others none has been proven."""
    require(
        speculative.method in ("ngram", "draft_model"),
        lambda: (
            f"flashsfa serves with speculation by n-grams or by a draft model, not by the method {speculative.method!r}, which is not "
            'proven with codes: use "method": "ngram" or "draft_model" in --speculative-config'
        ),
    )
    if speculative.method == "ngram":
        return
    draft = speculative.draft_model_config
    require(
        getattr(draft.hf_config, "sfa", None) is None,
        lambda: f'the draft model {draft.model} has settings "sfa": draft with the dense model that it was made from',
    )
    require(  # of longer guesses vLLM tells no length on the host
        speculative.num_speculative_tokens < FEW_QUERIES,
        f"a draft model may guess {FEW_QUERIES - 1} tokens, not num_speculative_tokens {speculative.num_speculative_tokens}",
    )
    named = [name for name in ("attention_backend", "kv_cache_dtype") if getattr(speculative, name) is not None]
    require(
        not named,
        lambda: (
            f"leave {' and '.join(named)} out of --speculative-config: beside flashsfa the draft model has vLLM's defaults"
        ),
    )


def current_settings() -> SFASettings:
    """The settings of the model that this process serves.

    vLLM asks for the shape of the KV cache where no config is set, after the layers were built: the last one counts then.

    Raises `ValueError` if the model's config.json has no settings, or some that this backend does not run.
    """
    global _seen
    config = get_current_vllm_config_or_none()
    if config is not None and config.model_config is not None:
        _seen = _read(config.model_config.hf_config)
    if _seen is None:
        raise ValueError("flashsfa's vLLM backend was asked for a cache before vLLM built a layer")
    return _seen


def is_coded(layer_name: str) -> bool:
    """Whether a layer of the model that vLLM builds now is to be coded, by its name in vLLM; asked where its config is set."""
    layers = current_settings().layers
    return layers is None or _layer_index(layer_name) in layers


def longest_context() -> int:
    """Tokens of the longest sequence that vLLM serves here; asked where its config is set."""
    return int(get_current_vllm_config().model_config.max_model_len)


def most_requests() -> int:
    """Sequences that vLLM serves at a time; asked where its config is set."""
    return int(get_current_vllm_config().scheduler_config.max_num_seqs)


def page_size() -> int:
    """Tokens of a page, as far as vLLM knows them when it builds layers; asked where its config is set."""
    return int(get_current_vllm_config().cache_config.block_size or PAGE_SIZES[0])


def coder_of(settings: SFASettings) -> Coder:
    """How the pages of a model keep its keys and values."""
    return Coder(settings.topk, settings.dense_dims, cache_bits(settings.cache_dtype))


class BasisFile:
    """The basis beside the checkpoint, if there is one, as the kv heads of this tensor-parallel rank see it.

    Made where vLLM's config is set; `load` works anywhere. `path` is None where there is no basis.

    Raises `ValueError` unless the settings say whether there is one.
    """

    def __init__(self) -> None:
        self.path = _basis_path(current_settings(), get_current_vllm_config().model_config.model)
        self.share = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()

    def load(self, layer_name: str, num_kv_heads: int) -> FeatureBasis:
        """The basis [Hkv, D, D] of a layer that vLLM calls `layer_name` and that holds `num_kv_heads` heads here."""
        assert self.path is not None
        whole, layer, (rank, ranks) = _read_basis(self.path), _layer_index(layer_name), self.share
        first = (
            rank * whole.key.shape[1] // ranks
        )  # ranks beyond the number of heads share them, as vLLM's projections do
        own = slice(first, first + num_kv_heads)
        return FeatureBasis(whole.query[layer, own].clone(), whole.key[layer, own].clone())


def _layer_index(layer_name: str) -> int:
    return next(int(part) for part in layer_name.split(".") if part.isdecimal())


def _basis_path(settings: SFASettings, model: str) -> Path | None:
    path = Path(model) / BASIS_FILE
    require(
        settings.has_basis == path.is_file(),
        f"the settings name a basis, but {path} is no local file: serve the whole folder that flashsfa saved"
        if settings.has_basis
        else f"{path} is a basis, but the settings name none: give them has_basis, or remove the file",
    )
    return path if settings.has_basis else None


@functools.lru_cache(maxsize=1)
def _read_basis(path: Path) -> FeatureBasis:
    """All layers' basis: one file is read once, not once a layer."""
    return FeatureBasis.load(path)


def _read(hf_config: Any) -> SFASettings:
    stored = getattr(hf_config, "sfa", None)
    if stored is None:
        raise ValueError(
            'the model\'s config.json has no settings "sfa": serve a model that was saved after flashsfa.enable, or pass '
            """--hf-overrides '{"sfa": {"topk": 16, "dense_dims": 32, "topk_query": 128}}'"""
        )
    settings = SFASettings.from_config(stored)
    unknown = [index for index in settings.layers or [] if index >= hf_config.num_hidden_layers]
    require(
        not unknown,
        lambda: f"layers {unknown} do not exist: the model has layers 0 to {hf_config.num_hidden_layers - 1}",
    )
    require(
        settings.topk is not None,
        "vLLM's backend keeps the largest features of a key: enable the model with topk, and a basis of the same",
    )
    require(
        not settings.shows_exact,
        "vLLM's backend codes every token: enable the model with recent=0, first=0 and prefill='coded'",
    )
    require(
        settings.positions is None or hf_config.model_type == "qwen3",
        "vLLM's backend runs positions='channel' in Qwen3 models alone: vLLM's own GPT-2 has learned positions",
    )
    require(
        settings.positions is None or is_channel(hf_config.rope_parameters, settings.dense_dims, hf_config.head_dim),
        "positions='channel' is for a model that was saved after flashsfa.enable: this one's config.json does not turn the "
        "channel alone",
    )
    return settings

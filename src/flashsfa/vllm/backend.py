"""Experimental: vLLM's attention over pages of feature codes. Written against vLLM 0.33, never run inside it.

vLLM sees the cache as `[blocks, kv heads, tokens, C]` cells; `PageLayout` says what is in the C bytes. Decode reads the
codes where they lie. A prompt attends to its own keys, and from its second chunk on to the codes of all keys, spread out.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, SlidingWindowSpec

from ..attention import sparse_feature_attention
from ..basis import FeatureBasis
from ..checks import require
from ..codes import FeatureCodes, topk_codes
from ..decode import sparse_feature_decode
from ..huggingface.positions import channel_first
from .layout import PageLayout
from .settings import BasisFile, current_settings

_log = logging.getLogger("flashsfa")


class SparseFeatureBackend(AttentionBackend):
    """What vLLM asks before it builds anything: sizes, dtypes, the bytes of a cache cell.

    Causal decoder attention of models without sinks, with or without a sliding window; head_dim up to 256; a cache in the
    model's dtype. vLLM itself refuses the rest.
    """

    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # vLLM looks the name up in its own list of backends

    @staticmethod
    def get_impl_cls() -> type[SparseFeatureImpl]:
        return SparseFeatureImpl

    @staticmethod
    def get_builder_cls() -> type[SparseFeatureMetadataBuilder]:
        return SparseFeatureMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [16, 32, 64, 128, 256]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size <= 256

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Those that keep the tokens of one head and page together; a page of all heads together comes first."""
        return KVCacheLayout.LBHNC, KVCacheLayout.BLHNC, KVCacheLayout.BHLNC, KVCacheLayout.LHBNC

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """`spec` with cells of `PageLayout.token_bytes`: keys and values of unequal width."""
        if spec.state_content_bytes is not None:
            return spec
        budget = current_settings().budget(spec.head_size)
        layout = PageLayout(spec.head_size, spec.head_size_v, budget.topk, budget.dense_dims, spec.dtype)
        return replace(spec, state_content_bytes=layout.token_bytes)


@dataclass(frozen=True)
class Prefill:
    """The requests of a batch with several new tokens.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: [S + 1] int32 bounds of their new tokens and of the keys these see.
        max_seqlen_q, max_seqlen_k: longest of them.
        slots: [Tk] int64 where the keys lie in the cache; None if they are the new tokens' own, all of them.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    slots: Tensor | None


@dataclass(frozen=True)
class SparseFeatureMetadata(AttentionMetadata):
    """A batch: decoding requests first, with one new token each, then those in prefill.

    Attributes:
        decodes: number of decoding requests, whose tokens are the first rows.
        tokens: rows in all; vLLM may hand over more.
        seq_lens: [decodes] int32 keys of each, the new one included.
        block_table: [decodes, max_blocks] int32 their pages.
        prefill: the other requests, None if there are none.
    """

    decodes: int
    tokens: int
    seq_lens: Tensor
    block_table: Tensor
    prefill: Prefill | None


class SparseFeatureMetadataBuilder(AttentionMetadataBuilder[SparseFeatureMetadata]):
    """Splits a batch, and finds the cached keys of prompts that come in chunks. Reads lengths on the CPU alone."""

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        require(
            vllm_config.speculative_config is None,
            "flashsfa's vLLM backend does not run speculative decoding: drop --speculative-config",
        )
        self._init_reorder_batch_threshold(1)
        self._page_size = kv_cache_spec.block_size
        # pages that have left a sliding window are gone: their keys must not be looked up
        self._window = kv_cache_spec.sliding_window if isinstance(kv_cache_spec, SlidingWindowSpec) else None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SparseFeatureMetadata:
        batch = common_attn_metadata
        require(batch.causal is True, "flashsfa's vLLM backend runs causal attention only")
        first, prefills, decodes, _ = split_decodes_and_prefills(batch, decode_threshold=1)
        return SparseFeatureMetadata(
            decodes=decodes,
            tokens=int(batch.query_start_loc_cpu[batch.num_reqs]),
            seq_lens=batch.seq_lens[:decodes],
            block_table=batch.block_table_tensor[:decodes],
            prefill=self._prefill(batch, first) if prefills else None,
        )

    def _prefill(self, batch: CommonAttentionMetadata, first: int) -> Prefill:
        """Of the requests from `first` on."""
        requests = slice(first, batch.num_reqs)
        bounds = batch.query_start_loc_cpu[first : batch.num_reqs + 1]
        new = bounds.diff()  # [S] on the CPU, as all lengths here
        held = batch.seq_lens_cpu_upper_bound[requests]  # exact without speculative decoding
        seen = held if self._window is None else torch.minimum(held, new + self._window - 1)
        cu_seqlens_k = torch.nn.functional.pad(seen.cumsum(0), (1, 0)).to(torch.int32)
        all_new = torch.equal(new, held)
        return Prefill(
            cu_seqlens_q=(bounds - bounds[0]).to(self.device, torch.int32, non_blocking=True),
            cu_seqlens_k=cu_seqlens_k.to(self.device, torch.int32, non_blocking=True),
            max_seqlen_q=int(new.max()),
            max_seqlen_k=int(seen.max()),
            slots=None if all_new else _slots(batch.block_table_tensor[requests], held, seen, self._page_size),
        )


def _slots(table: Tensor, held: Tensor, seen: Tensor, page_size: int) -> Tensor:
    """[sum of seen] int64 cache slots of the last `seen` of `held` keys [S] of each sequence with pages `table` [S, W]."""
    sequence = torch.arange(len(seen), device=seen.device).repeat_interleave(seen)  # [Tk]
    position = torch.arange(len(sequence), device=seen.device) + (held - seen.cumsum(0))[sequence]
    sequence, position = (x.to(table.device, non_blocking=True) for x in (sequence, position))
    return table[sequence, position // page_size].long() * page_size + position % page_size


class SparseFeatureImpl(AttentionImpl[SparseFeatureMetadata]):
    """The attention of one layer. vLLM calls `do_kv_cache_update` with a step's keys and values, then `forward`."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        for name, given in (
            ("ALiBi", alibi_slopes),
            ("a cap on scores (softcap)", logits_soft_cap),
            ("a cache shared between layers", kv_sharing_target_layer_name),
        ):
            require(not given, f"flashsfa's vLLM backend does not run {name}")
        require(attn_type == AttentionType.DECODER, f"flashsfa's vLLM backend runs decoder attention, not {attn_type}")
        _warn_experimental()
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.settings = settings = current_settings()
        self._budget, self._window = settings.budget(head_size), sliding_window
        self._file = BasisFile()
        self._basis: FeatureBasis | None = None

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Code keys [T', Hkv, D] and store them with values [T', Hkv, Dv].

        Args:
            slot_mapping: [T] int64, T <= T', the slot of each token; negative for padding, which goes to block 0: vLLM's
                null block, that no request holds.
        """
        tokens = slot_mapping.shape[0]
        codes = topk_codes(
            self._coordinates(layer, key[:tokens], "key"), self._budget.topk, dense_dims=self._budget.dense_dims
        )
        self._layout(value).write(kv_cache, slot_mapping.clamp(min=0), codes, value[:tokens])

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SparseFeatureMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of query [T', Hq, D] over the cache, into output [T', Hq, Dv]; rows past the batch stay as they are.

        key [T', Hkv, D] and value [T', Hkv, Dv] are those that `do_kv_cache_update` stored. Without metadata (vLLM's
        profiling run) the output is 0.
        """
        require(
            output_scale is None and output_block_scale is None, "flashsfa's vLLM backend does not quantise its output"
        )
        # before the profiling run returns: it loads the basis, whose memory vLLM is to see
        query = self._coordinates(layer, query, "query")
        if attn_metadata is None:
            return output.fill_(0)
        decodes, tokens, prefill = attn_metadata.decodes, attn_metadata.tokens, attn_metadata.prefill
        layout, budget = self._layout(value), self._budget
        if decodes:
            codes, v = layout.views(kv_cache)
            out = sparse_feature_decode(
                query[:decodes, :, None], codes, v, kv_lens=attn_metadata.seq_lens, page_table=attn_metadata.block_table,
                topk_query=budget.topk_query, query_pattern=budget.query_pattern, scale=self.scale, window=self._window,
                value_tolerance=self.settings.value_tolerance,
            )  # fmt: skip
            output[:decodes] = out[:, :, 0]
        if prefill is not None:
            new = slice(decodes, tokens)
            k: Tensor | FeatureCodes
            if prefill.slots is None:
                k, v = self._coordinates(layer, key[new], "key"), value[new]
            else:
                k, v = layout.read(kv_cache, prefill.slots)
            output[new] = sparse_feature_attention(
                query[new], k, v, cu_seqlens_q=prefill.cu_seqlens_q, cu_seqlens_k=prefill.cu_seqlens_k,
                max_seqlen_q=prefill.max_seqlen_q, max_seqlen_k=prefill.max_seqlen_k, topk=budget.topk,
                topk_query=budget.topk_query, dense_dims=budget.dense_dims, query_pattern=budget.query_pattern, is_causal=True,
                scale=self.scale, window=self._window,
            )  # fmt: skip
        return output

    def _layout(self, value: Tensor) -> PageLayout:
        budget = self._budget
        return PageLayout(self.head_size, value.shape[-1], budget.topk, budget.dense_dims, value.dtype)

    def _coordinates(self, layer: Any, x: Tensor, side: str) -> Tensor:
        """Queries or keys [T, H, D] with the channel in front, or in the layer's basis, which its first use loads."""
        if self.settings.positions is not None:
            return channel_first(x, self.settings.dense_dims)
        if self._file.path is None:
            return x
        if self._basis is None:
            basis = self._file.load(layer.layer_name, self.num_kv_heads)
            self._basis = FeatureBasis(basis.query.to(x.device), basis.key.to(x.device))
        transform = self._basis.transform_query if side == "query" else self._basis.transform_key
        return transform(x.transpose(0, 1)[None])[0].transpose(0, 1)


@functools.cache
def _warn_experimental() -> None:
    _log.warning(
        "flashsfa's vLLM backend is experimental: it has never run inside vLLM, only against its interfaces (0.33)"
    )

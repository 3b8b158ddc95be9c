"""Experimental: vLLM's attention over pages of feature codes. It is tested inside vLLM 0.32 and 0.33 on the CPU, and measured on a GPU.

vLLM sees the cache as `[blocks, kv heads, tokens, C]` cells; `PageLayout` says what is in the C bytes. Decode reads the
codes where they lie. A prompt attends to its own keys, and from its second chunk on to the codes of all keys, spread out.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, SlidingWindowSpec

from ..basis import FeatureBasis
from ..budget import FeatureBudget
from ..checks import require, runs_plainly
from ..decode import FEW_QUERIES, sparse_feature_decode
from ..huggingface.positions import channel_first
from ..mask import Mask
from ..ops import transform
from ..ops.decode import gpu
from ..ops.prefill import operator
from ..ops.prefill.prepared import Prompt, prepare
from ..scores import ScoreRules
from ..stored import KVView
from .layout import PageLayout, PageStore
from .settings import PAGE_SIZES, BasisFile, coder_of, current_settings, longest_context, most_requests, page_size

if TYPE_CHECKING:
    from ..ops.decode.hopper.decode import Prepared as PreparedDecode

_log = logging.getLogger("flashsfa")
_Made = TypeVar("_Made")
_MOST_PREPARED = 512  # forms of a step: numbers of requests, times numbers of new tokens
_rehearsed: set[Hashable] = set()  # kinds of layers whose kernels have been used in this process
# as much as layers share in a step, which lasts beyond attention: from the profiling run to the first step
_counted: list[Tensor] = []


class SparseFeatureBackend(AttentionBackend):
    """What vLLM asks before it builds anything: sizes, dtypes, the bytes of a cache cell.

    Causal decoder attention of models without sinks, with or without a sliding window; head_dim up to 256; a cache in the
    model's dtype, or in the bits that the model's settings name. vLLM itself refuses the rest.
    """

    forward_includes_kv_cache_update = True
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
        return PAGE_SIZES

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size <= 256

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Connectors copy tokens, and a token's bytes are not together."""
        return False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Those that keep the tokens of one head and page together; a page of all heads together comes first."""
        return KVCacheLayout.LBHNC, KVCacheLayout.BLHNC, KVCacheLayout.BHLNC, KVCacheLayout.LHBNC

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """`spec` with cells of `PageLayout.token_bytes`: keys and values of unequal width."""
        if spec.state_content_bytes is not None:
            return spec
        layout = PageLayout(coder_of(current_settings()), spec.head_size, spec.head_size_v, spec.dtype)
        return replace(spec, state_content_bytes=layout.token_bytes)


@dataclass(frozen=True)
class Decode:
    """Requests of a batch that have M new tokens each, a few.

    Attributes:
        seq_lens: [B] int32 keys of each, the new ones included.
        block_table: [B, max_blocks] int32 their pages.
        rows: the batch's rows of their new tokens, [B, M] int64 or as many that follow one another. Of M = 1 the last requests may be
            empty ones that fill up a CUDA graph.
    """

    seq_lens: Tensor
    block_table: Tensor
    rows: slice | Tensor


@dataclass(frozen=True)
class Shared:
    """What the layers of a batch have alike: the first of them makes it."""

    _made: dict[Hashable, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    def once(self, key: Hashable, make: Callable[[], _Made]) -> _Made:
        """What `make` gives, asked once for each `key`."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


@dataclass(frozen=True)
class Prefill(Shared):
    """Requests of a batch with many new tokens.

    Attributes:
        rows: the batch's rows of their new tokens.
        cu_seqlens_q, cu_seqlens_k: [S + 1] int32 bounds of their new tokens and of the keys these see.
        max_seqlen_q, max_seqlen_k: longest of them.
        slots: [Tk] int64 where the keys lie in the cache; None if they are the new tokens' own, all of them.
    """

    rows: slice
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    slots: Tensor | None = None


@dataclass(frozen=True)
class SparseFeatureMetadata(AttentionMetadata, Shared):
    """A batch: decoding requests first, then those in prefill, in groups.

    Attributes:
        tokens: rows in all; vLLM may hand over more.
        slots: [T] int64, the slot of each token in the cache; negative for padding, which goes nowhere or to block 0: vLLM's null
            block, that no request holds.
        decodes: the decoding requests, by their numbers of new tokens.
        prefills: the others, grouped such that the keys of a group that come from the cache are no more than the longest context.
    """

    tokens: int
    slots: Tensor
    decodes: list[Decode]
    prefills: list[Prefill]


class SparseFeatureMetadataBuilder(AttentionMetadataBuilder[SparseFeatureMetadata]):
    """Splits a batch, and finds the cached keys of prompts that come in chunks. Reads lengths on the CPU alone.

    Requests with a few new tokens decode, all their queries at once: those that verify guessed ones, and short prompts, whole or what is
    left of them.
    """

    # A CUDA graph of such a step reads lengths and pages where vLLM keeps them; a graph's further requests are empty.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(FEW_QUERIES)
        self._page_size = kv_cache_spec.block_size
        # pages that have left a sliding window are gone: their keys must not be looked up
        self._window = kv_cache_spec.sliding_window if isinstance(kv_cache_spec, SlidingWindowSpec) else None
        self._rounds = current_settings().rounds
        self._most_keys = vllm_config.model_config.max_model_len

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SparseFeatureMetadata:
        batch = common_attn_metadata
        require(batch.causal is True, "flashsfa's vLLM backend runs causal attention only")
        first, _, _, _ = split_decodes_and_prefills(batch, decode_threshold=FEW_QUERIES)
        tokens = int(batch.query_start_loc_cpu[batch.num_reqs])
        decodes, prefills = self._decodes(batch, first), self._prefills(batch, first, tokens)
        return SparseFeatureMetadata(tokens, batch.slot_mapping, decodes, prefills)

    def _decodes(self, batch: CommonAttentionMetadata, end: int) -> list[Decode]:
        """Of the requests before `end`."""
        starts = batch.query_start_loc_cpu[: end + 1].long()
        new = starts.diff()
        if bool((new <= 1).all()):  # slices alone: what a CUDA graph reads must lie where vLLM keeps it
            return [Decode(batch.seq_lens[:end], batch.block_table_tensor[:end], slice(0, end))] if end else []
        decodes = []
        for count in sorted(set(new.tolist()) - {0}):
            requests = (new == count).nonzero().flatten()
            first, last = int(requests[0]), int(requests[-1]) + 1
            if last - first == len(requests):
                there = slice(int(starts[first]), int(starts[last]))
                decodes.append(Decode(batch.seq_lens[first:last], batch.block_table_tensor[first:last], there))
            else:
                rows = starts[requests, None] + torch.arange(count, device=starts.device)
                requests, rows = (_sent(x, self.device) for x in (requests, rows))
                decodes.append(Decode(batch.seq_lens[requests], batch.block_table_tensor[requests], rows))
        return decodes

    def _prefills(self, batch: CommonAttentionMetadata, first: int, tokens: int) -> list[Prefill]:
        """Of the requests from `first` on."""
        new = batch.query_start_loc_cpu[first : batch.num_reqs + 1].diff()  # [S] on the CPU, as all lengths here
        held = batch.seq_lens_cpu_upper_bound[first : batch.num_reqs]  # exact where drafts are no model's
        seen = held if self._window is None else torch.minimum(held, new + self._window - 1)
        if not len(new):
            return []
        if not self._rounds and torch.equal(new, held):
            rows = slice(int(batch.query_start_loc_cpu[first]), tokens)
            return [self._prefill(rows, new, seen, None)]
        groups: list[Prefill] = []
        start = first
        while start < batch.num_reqs:
            of = slice(start - first, start - first + self._fit(seen[start - first :]))
            end = first + of.stop
            rows = slice(int(batch.query_start_loc_cpu[start]), int(batch.query_start_loc_cpu[end]))
            slots = _slots(batch.block_table_tensor[start:end], held[of], seen[of], self._page_size)
            groups.append(self._prefill(rows, new[of], seen[of], slots))
            start = end
        return groups

    def _fit(self, seen: Tensor) -> int:
        """How many of these requests, one at least, see no more keys together than the longest context."""
        return max(1, int((seen.cumsum(0) <= self._most_keys).sum()))

    def _prefill(self, rows: slice, new: Tensor, seen: Tensor, slots: Tensor | None) -> Prefill:
        cu_seqlens = (torch.nn.functional.pad(x.cumsum(0), (1, 0)).to(torch.int32) for x in (new, seen))
        cu_seqlens_q, cu_seqlens_k = (_sent(x, self.device) for x in cu_seqlens)
        return Prefill(rows, cu_seqlens_q, cu_seqlens_k, int(new.max()), int(seen.max()), slots)


def _slots(table: Tensor, held: Tensor, seen: Tensor, page_size: int) -> Tensor:
    """[sum of seen] int64 cache slots of the last `seen` of `held` keys [S], both on the CPU, of each sequence with pages `table` [S, W].
    Found where the table is: as many numbers from the CPU would wait for the step before."""
    device, total = table.device, int(seen.sum())
    held, seen = _sent(held.long(), device), _sent(seen.long(), device)
    sequence = torch.arange(len(seen), device=device).repeat_interleave(seen, output_size=total)  # [Tk]
    position = torch.arange(total, device=device) + (held - seen.cumsum(0))[sequence]
    return table[sequence, position // page_size].long() * page_size + position % page_size


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU's on `device`: from pinned memory, as a copy from elsewhere may wait for all that runs there."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class SparseFeatureImpl(AttentionImpl[SparseFeatureMetadata]):
    """The attention of one layer."""

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
        self._budget, self._coder, self._window = settings.budget(head_size), coder_of(settings), sliding_window
        self._longest, self._page_size, self._most_requests = longest_context(), page_size(), most_requests()
        self._file = BasisFile()
        self._basis: FeatureBasis | None = None
        self._pages: PageStore | None = None
        self._prepared: dict[Hashable, PreparedDecode | None] = {}  # by the form of a step

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
        """Store the codes of key [T', Hkv, D] with value [T', Hkv, Dv], and attention of query [T', Hq, D] over the cache into output
        [T', Hq, Dv]; rows past the batch stay as they are.

        Without metadata (vLLM's profiling run) the output is of no use, and the memory that it takes is the most that attention
        takes.
        """
        require(
            output_scale is None and output_block_scale is None, "flashsfa's vLLM backend does not quantise its output"
        )
        q, k = self._coordinates(layer, _by_head(query), _by_head(key), attn_metadata)
        v = _by_head(value)
        if attn_metadata is None:
            return self._rehearse(q, k, v, output)
        _counted.clear()
        store, new = self._store(value), slice(len(attn_metadata.slots))
        store.write(kv_cache, attn_metadata.slots, k[:, :, new], v[:, :, new])
        for decode in attn_metadata.decodes:
            self._decode(q, store.layout, kv_cache, decode, output)
        for prefill in attn_metadata.prefills:
            held, budget = (k[:, :, prefill.rows], v[:, :, prefill.rows]), self._budget
            if prefill.slots is not None:
                rows = store.rows(kv_cache, prefill.slots)
                held, budget = (rows.k, rows.v), budget.with_keys_kept()
            self._attend(q[:, :, prefill.rows], *held, budget, prefill, output[prefill.rows])
        return output

    def _decode(self, q: Tensor, layout: PageLayout, kv_cache: Tensor, decode: Decode, output: Tensor) -> None:
        count, newest, place = len(decode.seq_lens), q[0, :, decode.rows], None
        if isinstance(decode.rows, slice):
            newest = newest.unflatten(1, (count, -1))  # [Hq, B, M, D]
            place = output[decode.rows].unflatten(0, (count, -1)).transpose(1, 2)  # of one token each it is contiguous
        newest = newest.transpose(0, 1)
        out = self._decode_again(newest, layout, kv_cache, decode, place)
        if out is None:
            out = sparse_feature_decode(
                newest, self._view(layout, kv_cache, decode), topk_query=self._budget.topk_query,
                query_pattern=self._budget.query_pattern, scale=self.scale, window=self._window,
                value_tolerance=self.settings.value_tolerance, out=place,
            )  # fmt: skip
        elif place is not None and out is not place:
            place.copy_(out)
        if place is None:
            output[decode.rows] = out.transpose(1, 2)

    def _decode_again(
        self, q: Tensor, layout: PageLayout, kv_cache: Tensor, decode: Decode, place: Tensor | None
    ) -> Tensor | None:
        """The output for q [B, Hq, M, D], in `place` if it is contiguous, by what was prepared when such a step met these pages first: it
        spares the host most of what a step without a graph takes. None where that is not possible."""
        lengths, table = decode.seq_lens, decode.block_table
        form = (
            kv_cache.data_ptr(), kv_cache.shape, kv_cache.stride(), q.dtype, q.shape, q.stride(), table.shape, lengths.dtype,
        )  # fmt: skip
        if form not in self._prepared:
            if len(self._prepared) >= _MOST_PREPARED:
                self._prepared.clear()
            self._prepared[form] = self._prepare_decode(q, layout, kv_cache, decode)
        prepared = self._prepared[form]
        if prepared is None or not (table.is_contiguous() and lengths.is_contiguous()):
            return None
        if place is None or not place.is_contiguous() or place.data_ptr() % 16:
            place = q.new_empty((*q.shape[:3], layout.v_dim))
        return place if prepared.over(lengths, table).attend(q, place, None) is None else None

    def _prepare_decode(self, q: Tensor, layout: PageLayout, kv_cache: Tensor, decode: Decode) -> PreparedDecode | None:
        budget = self._budget
        if budget.query_pattern is not None or not runs_plainly(q):
            return None
        kv = self._view(layout, kv_cache, decode)
        mask, scores = Mask(True, self._window, kv_lens=decode.seq_lens), ScoreRules.of(q, self.scale, None, None)
        topk_query = None if budget.keeps_queries else budget.topk_query
        return gpu.prepared_paged(q, kv, mask, scores, self.settings.value_tolerance, topk_query)

    @staticmethod
    def _view(layout: PageLayout, kv_cache: Tensor, decode: Decode) -> KVView:
        return replace(layout.views(kv_cache), kv_lens=decode.seq_lens, page_table=decode.block_table)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, budget: FeatureBudget, prefill: Prefill, output: Tensor) -> None:
        """Attention of q [1, Hq, T, D] over k and v [1, Hkv, Tk, ...] into output [T, Hq, Dv]."""
        out = _by_head(output)
        form = (
            budget, self._window, self.scale, v.dtype, *(y for x in (q, k, v, out) for y in (x.shape[1], x.shape[3], x.stride())),
        )  # fmt: skip
        prompt = prefill.once(form, lambda: self._prompt(q, k, v, out, budget, prefill))
        if prompt is not None:
            prompt(q, k, v, out)
            return
        scores = ScoreRules.of(q, self.scale, None, None)
        found, _ = operator.attend(q, k, v, budget, self._mask(prefill), scores, gradient_of_all=False, backend="auto")
        out.copy_(found)

    def _prompt(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, budget: FeatureBudget, prefill: Prefill
    ) -> Prompt | None:
        return prepare(q, k, v, out, budget, self._mask(prefill), self.scale)

    def _mask(self, prefill: Prefill) -> Mask:
        bounds = prefill.cu_seqlens_q, prefill.cu_seqlens_k, prefill.max_seqlen_q, prefill.max_seqlen_k
        return Mask(True, self._window, None, *bounds)

    def _rehearse(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor) -> Tensor:
        """Take the memory of the largest batch, a chunk of `q`'s tokens beside the spread keys of the longest context; then use what is
        compiled at its first use, so that no request waits for it."""
        held = self._coder.empty(self._longest, k[:, :, :1], v[:, :, :1])
        spread = [x.new_empty((*x.shape[:2], self._longest, x.shape[3])) for x in (k, v)]
        self._attend_alone(q, k, v, self._budget, output)
        del held, spread  # until here
        kind = self._budget, self._window, self.settings.cache_dtype, *(x.shape[1::2] for x in (q, k, v)), v.dtype
        if kind not in _rehearsed:
            _rehearsed.add(kind)
            _counted.extend((q, k, torch.empty_like(k)))
            self._rehearse_short(q, k, v, output)
        return output

    def _rehearse_short(self, q: Tensor, k: Tensor, v: Tensor, output: Tensor) -> None:
        """Prompts of fewer tokens, one whose keys come from pages, and a few new tokens of one request and of many over these: each has
        kernels of its own."""
        tokens = k.shape[2]
        for count in (2**i for i in range(FEW_QUERIES.bit_length(), (tokens - 1).bit_length())):
            self._attend_alone(q[:, :, :count], k[:, :, :count], v[:, :, :count], self._budget, output[:count])
        few, store = min(FEW_QUERIES, tokens), PageStore(PageLayout(self._coder, self.head_size, v.shape[3], v.dtype))
        shape = 1, k.shape[1], self._page_size, store.layout.token_bytes
        pages = torch.zeros(shape, dtype=torch.uint8, device=k.device).view(v.dtype)
        slots = torch.arange(few, device=k.device)
        store.write(pages, slots, k[:, :, :few], v[:, :, :few])
        rows = store.rows(pages, slots)
        self._attend_alone(q[:, :, :few], rows.k, rows.v, self._budget.with_keys_kept(), output[:few])
        pages_of_one = -(-self._longest // self._page_size)
        for count in range(1, few + 1):
            for requests in sorted({1, min(self._most_requests, tokens // count)}):  # many have kernels of their own
                seq_lens = torch.full((requests,), few, dtype=torch.int32, device=k.device)
                table = seq_lens.new_zeros((requests, pages_of_one))
                self._decode(q, store.layout, pages, Decode(seq_lens, table, slice(requests * count)), output)
        self._prepared.clear()  # these pages go

    def _attend_alone(self, q: Tensor, k: Tensor, v: Tensor, budget: FeatureBudget, output: Tensor) -> None:
        """As `_attend`, of one request whose keys are the queries' own."""
        tokens = k.shape[2]
        bounds = torch.tensor([0, tokens], dtype=torch.int32, device=q.device)
        self._attend(q, k, v, budget, Prefill(slice(tokens), bounds, bounds, tokens, tokens), output)

    def _store(self, value: Tensor) -> PageStore:
        if self._pages is None:
            layout = PageLayout(self._coder, self.head_size, value.shape[-1], value.dtype)
            self._pages = PageStore(layout)
        return self._pages

    def _coordinates(
        self, layer: Any, q: Tensor, k: Tensor, batch: SparseFeatureMetadata | None
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys [1, H, T, D] with the channel in front, or in the layer's basis, which its first use loads. Where prompts are
        read, they lie where those of the layer before lay."""
        if self.settings.positions is not None:
            dims = self.settings.dense_dims
            return channel_first(q, dims), channel_first(k, dims)
        if self._file.path is None:
            return q, k
        if self._basis is None:
            basis = self._file.load(layer.layer_name, self.num_kv_heads)
            self._basis = FeatureBasis(basis.query.to(q.device), basis.key.to(q.device))
        sides = (q, self._basis.query), (k, self._basis.key)
        run: Callable[..., list[Tensor]] | None = None
        if batch is not None and batch.prefills:
            form = q.dtype, *(y for x in (q, k) for y in (x.shape, x.stride()))
            run = batch.once(form, lambda: transform.prepared(*sides))
        one, other = (run or transform.transform)(*sides)
        return one, other


def _by_head(x: Tensor) -> Tensor:
    """vLLM's x [T, H, D] as [1, H, T, D]."""
    return x.transpose(0, 1)[None]


@functools.cache
def _warn_experimental() -> None:
    _log.warning(
        "flashsfa's vLLM backend is experimental: its tests run on the CPU, in vLLM 0.32 and 0.33; on a GPU models of Qwen3's shapes alone "
        "were measured"
    )

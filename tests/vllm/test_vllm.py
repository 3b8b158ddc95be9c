"""Raw pages hold what a paged cache holds, and the vLLM backend, driven as vLLM drives it, equals the operator.

vLLM's own interfaces are used where it is installed; elsewhere stand-ins with the signatures of vLLM 0.33.0. No model
runs inside vLLM here.
"""

import enum
import importlib.util
import inspect
import itertools
import logging
import sys
import types
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Generic, TypeVar

import pytest
import torch

from decode_cases import DecodeRules, decode
from flashsfa import FeatureBasis, FeatureCodes, reference, sparse_feature_decode, topk_codes
from flashsfa.cache.paged import PagedSparseKVCache
from flashsfa.mask import Mask
from flashsfa.vllm.layout import PageLayout

HAS_VLLM = importlib.util.find_spec("vllm") is not None
HKV, D, DV, TOPK, DENSE, PAGE = 2, 32, 24, 5, 4, 16
DTYPES = [torch.float32, torch.bfloat16]

# --- The page layout ---------------------------------------------------------------------------------------------


def raw_pages(layout, pages, heads=HKV, page_size=PAGE, gap=0):
    """[P, Hkv, page_size, C] uint8 in a buffer of 255s: NaN in any float, an index past any head; `gap` between pages."""
    cell = layout.token_bytes
    stride = heads * page_size * cell + gap
    raw = torch.full((pages * stride,), 255, dtype=torch.uint8)
    return raw.as_strided((pages, heads, page_size, cell), (stride, page_size * cell, cell, 1))


def parts(codes, v):
    return codes.dense, codes.values, codes.indices, v


@pytest.mark.parametrize(("dense", "topk", "dtype", "expected"), [
    (0, 16, torch.bfloat16, 304), (16, 16, torch.bfloat16, 336), (0, 15, torch.float16, 302), (3, 5, torch.float32, 552),
])  # fmt: skip
def test_bytes_of_a_token(dense, topk, dtype, expected):
    assert PageLayout(128, 128, topk, dense, dtype).token_bytes == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dense", "topk", "page_size"), [(0, 5, 16), (4, 5, 16), (4, 8, 64), (31, 1, 16)])
def test_views_are_disjoint_aligned_and_cover_the_page(dense, topk, page_size, dtype):
    layout = PageLayout(D, DV, topk, dense, dtype)
    pages = raw_pages(layout, 3, page_size=page_size)
    views = parts(*layout.views(pages))
    for x, width in zip(views, (dense, topk, topk, DV), strict=True):
        assert x.shape == (3, HKV, page_size, width)
        assert x.untyped_storage().data_ptr() == pages.untyped_storage().data_ptr()
        assert (x.storage_offset() * x.itemsize) % 16 == 0
        assert all(x.stride(i) * x.itemsize % 16 == 0 for i in (0, 1))
        assert x.stride()[2:] == (width, 1) or width == 0
    for x in views:  # the last one written would overwrite its neighbours
        x.fill_(1)
    used = sum(x.nbytes for x in views)
    assert [int(x.double().sum()) for x in views] == [x.numel() for x in views]
    assert int((pages == 255).sum()) == pages.numel() - used
    assert pages.numel() - used == 3 * HKV * page_size * (-topk % dtype.itemsize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dense", [0, DENSE])
def test_decode_reads_raw_pages_as_it_reads_a_paged_cache(dense, dtype):
    layout = PageLayout(D, DV, TOPK, dense, dtype)
    cache = PagedSparseKVCache(TOPK, dense_dims=dense, pages=9, page_size=PAGE)
    pages = raw_pages(layout, 9, gap=64)
    sequences = [cache.add() for _ in range(3)]
    for n in (1, PAGE, 2 * PAGE + 3):  # each sequence its own length, then all together past the ends of pages
        k, v = torch.randn(1, HKV, n, D, dtype=dtype), torch.randn(1, HKV, n, DV, dtype=dtype)
        sequence = sequences[[1, PAGE, 2 * PAGE + 3].index(n)]
        cache.append([sequence], k, v)
    cache.append(sequences, torch.randn(3, HKV, 2, D, dtype=dtype), torch.randn(3, HKV, 2, DV, dtype=dtype))
    held = cache.view(sequences)
    for row, length in zip(held.page_table.tolist(), held.kv_lens.tolist(), strict=True):
        slots = torch.tensor([row[i // PAGE] * PAGE + i % PAGE for i in range(length)])
        codes, v = cache.codes, cache.v
        taken = codes[slots // PAGE, :, slots % PAGE]
        layout.write(pages, slots, taken, v[slots // PAGE, :, slots % PAGE])
        again, again_v = layout.read(pages, slots)
        for x, y in zip(parts(again, again_v), parts(taken, v[slots // PAGE, :, slots % PAGE]), strict=True):
            assert torch.equal(x, y)
    q = torch.randn(3, 2 * HKV, 1, D, dtype=dtype)
    codes, v = layout.views(pages)
    for rules in ({}, {"window": 7}, {"topk_query": D}):
        expected = sparse_feature_decode(q, held, **rules)
        out = sparse_feature_decode(q, replace(held, codes=codes, v=v), **rules)
        assert not out.isnan().any()
        assert torch.equal(out, expected)


def test_the_fused_kernel_reads_raw_pages_in_place():
    decode_triton = pytest.importorskip("flashsfa.ops.decode.triton.decode")
    layout = PageLayout(D, DV, TOPK, DENSE, torch.float32)
    pages = raw_pages(layout, 4, gap=32)
    k, v = torch.randn(40, HKV, D, dtype=torch.float32), torch.randn(40, HKV, DV, dtype=torch.float32)
    table = torch.tensor([[3, 1, 2]], dtype=torch.int32)
    slots = torch.tensor([int(table[0, i // PAGE]) * PAGE + i % PAGE for i in range(40)])
    codes = topk_codes(k, TOPK, dense_dims=DENSE)
    layout.write(pages, slots, codes, v)
    q = torch.randn(1, 2 * HKV, 1, D, dtype=torch.float32)
    paged = DecodeRules(kv_lens=torch.tensor([40], dtype=torch.int32), page_table=table)
    out, _ = decode(decode_triton, q, *layout.views(pages), paged, D**-0.5, 0.0, topk_query=D)
    pool, pool_v = layout.views(pages)
    apart = FeatureCodes(*(x.contiguous() for x in (pool.dense, pool.values, pool.indices)), D)
    expected, _ = decode(decode_triton, q, apart, pool_v.contiguous(), paged, D**-0.5, 0.0, topk_query=D)
    assert torch.equal(out, expected)
    plain = sparse_feature_decode(q, pool, pool_v, kv_lens=paged.kv_lens, page_table=table, topk_query=D)
    torch.testing.assert_close(out, plain)


def test_pages_that_do_not_fit_are_refused():
    layout = PageLayout(D, DV, TOPK, DENSE, torch.bfloat16)
    pages = raw_pages(layout, 2)
    with pytest.raises(ValueError, match=f"C of {layout.token_bytes} bytes"):
        layout.views(pages[..., :-2])
    with pytest.raises(ValueError, match=r"must be contiguous.*LBHNC"):
        layout.views(pages.transpose(1, 2).contiguous().transpose(1, 2))
    with pytest.raises(ValueError, match=r"whole torch\.bfloat16 elements"):
        layout.views(raw_pages(layout, 2, gap=1))
    with pytest.raises(ValueError, match="topk must be"):
        PageLayout(D, DV, D, DENSE, torch.bfloat16)
    with pytest.raises(ValueError, match="floating dtype"):
        PageLayout(D, DV, TOPK, DENSE, torch.int8)


# --- vLLM 0.33.0's interfaces, as far as the backend uses them -----------------------------------------------------


class AttentionType(enum.StrEnum):
    DECODER = "decoder"
    ENCODER_ONLY = "encoder_only"


class KVCacheLayout(enum.Enum):
    """Memory order of the axes [layer, block, head, token, content]."""

    LBHNC = (0, 1, 2, 3, 4)
    LBNHC = (0, 1, 3, 2, 4)
    LHBNC = (0, 2, 1, 3, 4)
    BLHNC = (1, 0, 2, 3, 4)
    BLNHC = (1, 0, 3, 2, 4)
    BHLNC = (1, 2, 0, 3, 4)


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    head_size_v: int
    state_content_bytes: int | None = None

    @property
    def state_content_size_bytes(self):
        if self.state_content_bytes is not None:
            return self.state_content_bytes
        return (self.head_size + self.head_size_v) * self.dtype.itemsize

    @property
    def page_size_bytes(self):
        return self.num_kv_heads * self.block_size * self.state_content_size_bytes


class FullAttentionSpec(AttentionSpec):
    pass


@dataclass(frozen=True, kw_only=True)
class SlidingWindowSpec(AttentionSpec):
    sliding_window: int


class AttentionBackend(ABC):
    forward_includes_kv_cache_update = True
    supported_dtypes = (torch.float16, torch.bfloat16)
    supported_kv_cache_dtypes = ("auto", "float16", "bfloat16")

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [1]

    @staticmethod
    @abstractmethod
    def get_name(): ...

    @staticmethod
    @abstractmethod
    def get_impl_cls(): ...

    @staticmethod
    @abstractmethod
    def get_builder_cls(): ...

    @classmethod
    def supports_head_size(cls, head_size):
        return True

    @classmethod
    def supports_sliding_window(cls):
        return False

    @classmethod
    def supported_kv_cache_layouts(cls):
        return None

    @classmethod
    def customize_spec(cls, spec):
        return spec


class AttentionMetadata:
    pass


@dataclass
class CommonAttentionMetadata:
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool | torch.Tensor = True
    seq_lens_cpu_upper_bound: torch.Tensor | None = None


M = TypeVar("M")


class AttentionMetadataBuilder(ABC, Generic[M]):
    reorder_batch_threshold = None

    @abstractmethod
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.kv_cache_spec, self.layer_names = kv_cache_spec, layer_names
        self.vllm_config, self.device = vllm_config, device

    def _init_reorder_batch_threshold(
        self, reorder_batch_threshold=1, supports_spec_as_decode=False, supports_dcp_with_varlen=False
    ):
        self.reorder_batch_threshold = reorder_batch_threshold

    @abstractmethod
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False): ...


class AttentionImpl(ABC, Generic[M]):
    @abstractmethod
    def __init__(
        self,
        num_heads,
        head_size,
        scale,
        num_kv_heads=None,
        alibi_slopes=None,
        sliding_window=None,
        kv_cache_dtype="auto",
        logits_soft_cap=None,
        attn_type=AttentionType.DECODER,
        kv_sharing_target_layer_name=None,
    ): ...

    @abstractmethod
    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ): ...


def split_decodes_and_prefills(
    common_attn_metadata, decode_threshold=1, require_uniform=False, treat_short_extends_as_decodes=True
):
    """Requests and tokens before and from the first request of more than `decode_threshold` tokens."""
    bounds = common_attn_metadata.query_start_loc_cpu.tolist()
    requests, tokens = common_attn_metadata.num_reqs, common_attn_metadata.num_actual_tokens
    long = (i for i in range(requests) if bounds[i + 1] - bounds[i] > decode_threshold)
    first = next(long, requests)
    before = tokens if first == requests else bounds[first]
    return first, requests - first, before, tokens - before


class AttentionBackendEnum(enum.Enum):
    FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
    CUSTOM = None

    def get_path(self, include_classname=True):
        return _registered.get(self, self.value)

    def is_overridden(self):
        return self in _registered

    def clear_override(self):
        _registered.pop(self, None)


_registered = {}


def register_backend(backend, class_path=None, is_mamba=False):
    _registered[backend] = class_path
    return lambda x: x


def unset(*_):
    raise AssertionError("no model runs here")


STAND_INS = {
    "vllm": {},
    "vllm.config": {"get_current_vllm_config": unset, "get_current_vllm_config_or_none": unset},
    "vllm.distributed": {"get_tensor_model_parallel_rank": unset, "get_tensor_model_parallel_world_size": unset},
    "vllm.v1": {},
    "vllm.v1.attention": {},
    "vllm.v1.attention.backend": {
        x.__name__: x
        for x in (AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder, AttentionType,
                  CommonAttentionMetadata)
    },
    "vllm.v1.attention.backends": {},
    "vllm.v1.attention.backends.registry": {
        "AttentionBackendEnum": AttentionBackendEnum, "register_backend": register_backend,
    },
    "vllm.v1.attention.backends.utils": {"split_decodes_and_prefills": split_decodes_and_prefills},
    "vllm.v1.kv_cache_interface": {
        x.__name__: x for x in (AttentionSpec, FullAttentionSpec, KVCacheLayout, SlidingWindowSpec)
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def vllm():
    """vLLM's names in one place: its own where it is installed, else the stand-ins, which leave with this module."""
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_VLLM:
            for name, content in STAND_INS.items():
                module = types.ModuleType(name)
                vars(module).update(content)
                patch.setitem(sys.modules, name, module)
            for name in ("flashsfa.vllm.backend", "flashsfa.vllm.settings"):
                patch.setitem(sys.modules, name, None)  # so that the end of this module forgets them
                del sys.modules[name]
        names = {}
        for module in STAND_INS:
            names |= vars(importlib.import_module(module))
        yield SimpleNamespace(**names)


@pytest.mark.skipif(not HAS_VLLM, reason="needs vLLM, to compare the stand-ins with it")
def test_stand_ins_have_the_signatures_of_vllm(vllm):
    for content in STAND_INS.values():
        for name, stand_in in content.items():
            theirs = getattr(vllm, name)
            functions = {name: (stand_in, theirs)} if inspect.isfunction(stand_in) else {
                x: (getattr(stand_in, x), getattr(theirs, x)) for x, y in vars(stand_in).items()
                if callable(getattr(stand_in, x)) and (x == "__init__" or not x.startswith("__"))
                and isinstance(y, types.FunctionType | staticmethod | classmethod)
            }  # fmt: skip
            for mine, real in functions.values():
                if mine is not unset and name not in ("CommonAttentionMetadata", "AttentionSpec", "SlidingWindowSpec"):
                    assert list(inspect.signature(mine).parameters) == list(inspect.signature(real).parameters), name
    assert {x.name: x.value for x in KVCacheLayout} == {x.name: x.value for x in vllm.KVCacheLayout}


# --- The backend, driven as vLLM drives it -------------------------------------------------------------------------


@pytest.fixture
def serve(vllm, monkeypatch, tmp_path):
    """Sets the model that vLLM serves: its "sfa" settings, and its basis beside the weights."""
    from flashsfa.vllm import settings

    def serve(basis=None, rank=0, ranks=1, speculative=None, model_type="llama", rope=None, **sfa):
        if basis is not None:
            (tmp_path / settings.BASIS_FILE).parent.mkdir(exist_ok=True)
            basis.save(tmp_path / settings.BASIS_FILE)
            sfa = {"has_basis": True, **sfa}
        config = SimpleNamespace(
            model_config=SimpleNamespace(
                hf_config=SimpleNamespace(
                    model_type=model_type, head_dim=D, rope_parameters=rope, num_hidden_layers=3, **sfa and {"sfa": sfa}
                ),
                model=str(tmp_path),
            ),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            speculative_config=speculative,
        )
        monkeypatch.setattr(settings, "_seen", None)
        for name, answer in (
            ("get_current_vllm_config", config), ("get_current_vllm_config_or_none", config),
            ("get_tensor_model_parallel_rank", rank), ("get_tensor_model_parallel_world_size", ranks),
        ):  # fmt: skip
            monkeypatch.setattr(settings, name, lambda answer=answer: answer)
        return config

    return serve


class Server:
    """One attention layer with its pages, requests and steps, as vLLM's scheduler and model runner would have them."""

    def __init__(
        self, vllm, config, *, hq=2 * HKV, hkv=HKV, window=None, layout="LBHNC", dtype=torch.float32, pages=24
    ):
        from flashsfa.vllm.backend import SparseFeatureBackend as Backend

        self.vllm, self.hq, self.hkv, self.window, self.dtype = vllm, hq, hkv, window, dtype
        spec = {"block_size": PAGE, "num_kv_heads": hkv, "head_size": D, "head_size_v": DV, "dtype": dtype}
        kind = vllm.FullAttentionSpec if window is None else vllm.SlidingWindowSpec
        spec = Backend.customize_spec(kind(**spec, **({} if window is None else {"sliding_window": window})))
        assert Backend.customize_spec(spec) is spec
        assert PAGE in Backend.get_supported_kernel_block_sizes(spec)
        assert vllm.KVCacheLayout[layout] in Backend.supported_kv_cache_layouts()
        self.kv_cache = cache_views(spec, pages, vllm.KVCacheLayout[layout])[1]
        self.builder = Backend.get_builder_cls()(
            spec, ["model.layers.1.self_attn.attn"], config, torch.get_default_device()
        )
        assert self.builder.reorder_batch_threshold == 1
        self.impl = Backend.get_impl_cls()(hq, D, D**-0.5, hkv, None, window, "auto", None, "decoder", None)
        self.layer = SimpleNamespace(layer_name="model.layers.1.self_attn.attn")
        self.free = torch.randperm(pages - 1).add(1).tolist()  # block 0 is vLLM's null block
        self.requests = {}  # name: (q, k, v, pages), the tokens seen so far and [T, H, D] each

    def step(self, new, padding=0):
        """`new` maps requests to numbers of new tokens. Returns what each request's new tokens get."""
        new = dict(sorted(new.items(), key=lambda item: item[1] > 1))  # decodes first, as the builder asks
        rows, slots, tables, held = [], [], [], []
        for name, n in new.items():
            fresh = [torch.randn(n, h, w, dtype=self.dtype) for h, w in ((self.hq, D), (self.hkv, D), (self.hkv, DV))]
            *story, pages = self.requests.get(name, (*(x[:0] for x in fresh), []))
            start, end = len(story[0]), len(story[0]) + n
            while len(pages) * PAGE < end:
                pages.append(self.free.pop())
            if self.window is not None:  # pages that the window of the first new token has left are gone
                for i in range(max(0, start - self.window + 1) // PAGE):
                    pages[i] = 0
            self.requests[name] = (*(torch.cat(x) for x in zip(story, fresh, strict=True)), pages)
            rows.append(fresh)
            slots += [pages[i // PAGE] * PAGE + i % PAGE for i in range(start, end)]
            tables.append(torch.tensor(pages, dtype=torch.int32))
            held.append(end)
        query, key, value = (
            torch.cat((*x, torch.randn(padding, *x[0].shape[1:], dtype=self.dtype))) for x in zip(*rows, strict=True)
        )
        bounds = torch.tensor([0, *itertools.accumulate(new.values())], dtype=torch.int32)
        slots = torch.tensor(slots + [-1] * padding)
        lengths = torch.tensor(held, dtype=torch.int32)
        width = max(map(len, tables)) + 2
        common = self.vllm.CommonAttentionMetadata(
            query_start_loc=bounds, query_start_loc_cpu=bounds.cpu(), seq_lens=lengths, num_reqs=len(new),
            num_actual_tokens=int(bounds[-1]), max_query_len=max(new.values()), max_seq_len=max(held),
            block_table_tensor=torch.stack([torch.nn.functional.pad(x, (0, width - len(x))) for x in tables]),
            slot_mapping=slots, seq_lens_cpu_upper_bound=lengths.cpu(),
        )  # fmt: skip
        metadata = self.builder.build(0, common)
        output = self.run(query, key, value, slots, metadata)[: int(bounds[-1])]
        return dict(zip(new, output.split(list(new.values())), strict=True))

    def run(self, query, key, value, slots, metadata):
        output = torch.full((len(query), self.hq, DV), 7.0, dtype=self.dtype)
        self.impl.do_kv_cache_update(self.layer, key, value, self.kv_cache, slots)
        self.impl.forward(self.layer, query, key, value, self.kv_cache, metadata, output=output)
        assert (output[metadata.tokens :] == 7).all()
        return output

    def assert_attends(self, out, **coding):
        """Each request's output within twice the error of the plain operator in the same dtype, over its whole story."""
        for name, rows in out.items():
            truth, plain = (self.expected(name, len(rows), dtype, **coding) for dtype in (torch.float64, self.dtype))
            assert not rows.isnan().any()
            rounding = torch.finfo(self.dtype).eps * truth.abs().max()
            assert (rows - truth).abs().max() <= 2 * (plain - truth).abs().max() + 2 * rounding

    def expected(self, name, n, dtype, topk=TOPK, dense_dims=DENSE, topk_query=None, basis=None, query_pattern=None):
        q, k, v = (x.transpose(0, 1)[None] for x in self.requests[name][:3])
        if basis is not None:
            q, k = basis.transform_query(q), basis.transform_key(k)
        k = topk_codes(k, topk, dense_dims=dense_dims).to_dense()
        if topk_query != D:
            q = topk_codes(q, topk_query or topk, dense_dims=dense_dims, pattern=query_pattern).to_dense()
        q, k, v = (x.to(dtype) for x in (q[:, :, -n:], k, v))
        mask = Mask(is_causal=True, window=self.window)
        return reference.attention(q, k, v, mask=mask, scale=D**-0.5)[0][0].transpose(0, 1)


def cache_views(spec, blocks, layout, layers=2):
    """[blocks, kv heads, tokens, C] of each layer in a buffer of 255s in the memory order of `layout`."""
    shape = (layers, blocks, spec.num_kv_heads, spec.block_size, spec.state_content_size_bytes)
    raw = torch.full([shape[i] for i in layout.value], 255, dtype=torch.uint8)
    logical = raw.permute([layout.value.index(i) for i in range(5)])
    assert spec.page_size_bytes == spec.num_kv_heads * spec.block_size * spec.state_content_bytes
    return [x.view(spec.dtype) for x in logical]


CODING = {"topk": TOPK, "dense_dims": DENSE}
STEPS = [
    {"a": 5},  # a short prompt
    {"a": 1, "b": 40},  # decoding beside a prompt
    {"a": 1, "b": 20, "c": 7},  # the prompt's second chunk, beside a new one
    {"c": 1, "a": 1, "b": 1},
    {"b": 1, "c": 33, "a": 2},  # several tokens for requests that have decoded
    {"a": 1, "b": 1, "c": 1},
]


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC", "BHLNC", "LHBNC"])
@pytest.mark.parametrize("window", [None, 12])
def test_serving_equals_the_operator(vllm, serve, window, layout):
    server = Server(vllm, serve(**CODING), window=window, layout=layout)
    for i, new in enumerate(STEPS):
        server.assert_attends(server.step(new, padding=i % 3))


@pytest.mark.parametrize(("dtype", "hq", "hkv"), [(torch.bfloat16, 4, 2), (torch.float32, 3, 1), (torch.float32, 6, 2)])
def test_dtypes_and_heads_with_dense_queries(vllm, serve, dtype, hq, hkv):
    server = Server(vllm, serve(**CODING, topk_query=D), dtype=dtype, hq=hq, hkv=hkv)
    for new in STEPS[:4]:
        server.assert_attends(server.step(new), topk_query=D)


def test_queries_in_a_pattern(vllm, serve):
    queries = {"topk_query": 6, "query_pattern": "2:4"}
    server = Server(vllm, serve(**CODING, **queries))
    for new in STEPS[:4]:
        server.assert_attends(server.step(new), **queries)


def test_positions_in_the_channel(vllm, serve):
    """vLLM's RoPE leaves the pairs of the channel apart: they are brought to the front, as a basis would."""
    pytest.importorskip("transformers")
    from flashsfa.huggingface.positions import channel_first

    order = channel_first(torch.eye(D), DENSE).expand(HKV, -1, -1)
    rope = {"rope_type": "proportional", "partial_rotary_factor": DENSE / D, "rope_theta": 1e4}
    server = Server(vllm, serve(**CODING, positions="channel", model_type="qwen3", rope=rope))
    for new in STEPS[:3]:
        server.assert_attends(server.step(new), basis=FeatureBasis(order, order))
    whole = {"rope_type": "default", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="does not turn the channel alone"):
        Server(vllm, serve(**CODING, positions="channel", model_type="qwen3", rope=whole))
    with pytest.raises(ValueError, match="Qwen3 models alone"):
        Server(vllm, serve(**CODING, positions="channel", model_type="gpt2"))


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (2, 1), (4, 3)])
def test_a_basis_beside_the_checkpoint(vllm, serve, ranks, rank):
    key = torch.randn(3, HKV, D, D)  # three layers
    basis = FeatureBasis(torch.linalg.inv(key).mT.contiguous(), key)
    hkv = max(1, HKV // ranks)
    server = Server(vllm, serve(basis, rank, ranks, **CODING), hq=2 * hkv, hkv=hkv)
    first = rank * HKV // ranks
    mine = FeatureBasis(basis.query[1, first : first + hkv], basis.key[1, first : first + hkv])
    for new in STEPS[:3]:
        server.assert_attends(server.step(new), basis=mine)


@pytest.mark.parametrize(
    ("layers", "factor", "has_basis", "words"),
    [
        (2, 1, True, "for 2 layers"),
        (3, 9, True, "undo one another"),
        (3, torch.nan, True, "NaN"),
        (3, 1, False, "name none"),
    ],
)
def test_a_basis_that_is_not_the_models_is_refused(vllm, serve, layers, factor, has_basis, words):
    key = torch.randn(layers, HKV, D, D)
    basis = FeatureBasis(torch.linalg.inv(key).mT.contiguous() * factor, key)
    with pytest.raises(ValueError, match=words):
        Server(vllm, serve(basis, **CODING, has_basis=has_basis), hq=2 * HKV, hkv=HKV).step(STEPS[0])


@pytest.mark.skipif(not HAS_VLLM, reason="needs vLLM")
def test_pages_lie_as_vllm_lays_them(vllm, serve):
    from vllm.v1.kv_cache_interface import KVCacheTensor, compute_layout_strides, create_kv_cache_views
    from vllm.v1.worker.utils import customize_attention_spec

    from flashsfa.vllm.backend import SparseFeatureBackend

    serve(**CODING)
    spec = vllm.FullAttentionSpec(block_size=PAGE, num_kv_heads=HKV, head_size=D, head_size_v=DV, dtype=torch.float16)
    spec = customize_attention_spec(SparseFeatureBackend, spec)
    for layout in SparseFeatureBackend.supported_kv_cache_layouts():
        strides = compute_layout_strides(spec, 6, 2, layout)
        raw = torch.zeros(2 * 6 * spec.page_size_bytes, dtype=torch.int8)
        tensor = KVCacheTensor(raw.numel(), ["first", "second"], strides[0], strides[1])
        theirs = create_kv_cache_views(raw, spec, 6, layout, tensor)
        for x, y in zip(theirs, cache_views(spec, 6, layout), strict=True):
            assert (x.shape, x.stride(), x.storage_offset()) == (y.shape, y.stride(), y.storage_offset())
            PageLayout(D, DV, TOPK, DENSE, torch.float16).views(x)


@pytest.mark.skipif(not HAS_VLLM, reason="needs vLLM")
@pytest.mark.parametrize("window", [None, 12])
def test_vllms_own_attention_layer(vllm, serve, window, monkeypatch):
    """vLLM builds the layer with the backend, updates its cache and calls it, through its forward context."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.attention import Attention

    import flashsfa.vllm
    from flashsfa.vllm.backend import SparseFeatureBackend

    flashsfa.vllm.register()
    server = Server(vllm, serve(**CODING), window=window, dtype=torch.float16)
    config = VllmConfig(device_config=DeviceConfig("cpu"))
    name = server.layer.layer_name
    with set_current_vllm_config(config):
        layer = Attention(
            server.hq, D, D**-0.5, HKV, prefix=name, per_layer_sliding_window=window, head_size_v=DV,
            attn_backend=SparseFeatureBackend,
        )  # fmt: skip
    layer.kv_cache = server.kv_cache
    assert layer.get_kv_cache_spec(config).head_size_v == DV

    def run(query, key, value, slots, metadata):
        with set_forward_context({name: metadata}, config, slot_mapping={name: slots}):
            return layer(query.flatten(1), key.flatten(1), value.flatten(1)).unflatten(-1, (-1, DV))

    monkeypatch.setattr(server, "run", run)
    for new in STEPS:
        server.assert_attends(server.step(new, padding=2))


def test_a_page_costs_what_its_codes_cost(vllm, serve):
    from flashsfa.vllm.backend import SparseFeatureBackend

    serve(topk=16, dense_dims=16)
    dense = vllm.FullAttentionSpec(block_size=16, num_kv_heads=8, head_size=128, head_size_v=128, dtype=torch.bfloat16)
    spec = SparseFeatureBackend.customize_spec(dense)
    assert (dense.page_size_bytes, spec.page_size_bytes) == (16 * 8 * 512, 16 * 8 * 336)


def test_padding_tokens_leave_every_page_but_the_null_block_alone(vllm, serve):
    server = Server(vllm, serve(**CODING))
    server.step({"a": 20})
    before = server.kv_cache.clone()
    k, v = torch.randn(3, HKV, D), torch.randn(3, HKV, DV)
    server.impl.do_kv_cache_update(server.layer, k, v, server.kv_cache, torch.full((2,), -1))
    assert torch.equal(server.kv_cache[1:].view(torch.uint8), before[1:].view(torch.uint8))


def test_the_profiling_run_gives_zeros(vllm, serve):
    server = Server(vllm, serve(**CODING))
    q, k, v = torch.randn(3, 4, D), torch.randn(3, HKV, D), torch.randn(3, HKV, DV)
    output = torch.empty(3, 4, DV)
    server.impl.forward(server.layer, q, k, v, torch.tensor([]), None, output=output)
    assert (output == 0).all()


def test_the_backend_has_every_name_that_vllm_calls(vllm, serve):
    from flashsfa.vllm import backend

    pairs = [
        (backend.SparseFeatureBackend, vllm.AttentionBackend),
        (backend.SparseFeatureImpl, vllm.AttentionImpl),
        (backend.SparseFeatureMetadataBuilder, vllm.AttentionMetadataBuilder),
    ]
    for mine, theirs in pairs:
        assert issubclass(mine, theirs)
        assert not inspect.isabstract(mine)
        for name in set(vars(mine)) & set(vars(theirs)) - {"__module__", "__doc__", "__orig_bases__", "__parameters__"}:
            if callable(getattr(mine, name)):
                assert list(inspect.signature(getattr(mine, name)).parameters) == list(
                    inspect.signature(getattr(theirs, name)).parameters
                ), name
    assert backend.SparseFeatureBackend.get_name() in vllm.AttentionBackendEnum.__members__
    assert not backend.SparseFeatureBackend.forward_includes_kv_cache_update
    if HAS_VLLM:
        config = dict(kv_cache_dtype="auto", block_size=16, use_mla=False, has_sink=False, use_sparse=False,
                      use_mm_prefix=False, use_per_head_quant_scales=False, device_capability=None, attn_type="decoder")  # fmt: skip
        check = backend.SparseFeatureBackend.validate_configuration
        assert check(head_size=128, dtype=torch.bfloat16, has_sliding_window=True, **config) == []
        assert check(head_size=512, dtype=torch.bfloat16, **config) == ["head_size not supported"]
        assert check(head_size=64, dtype=torch.bfloat16, **config | {"kv_cache_dtype": "fp8"})


def test_what_cannot_run_is_refused(vllm, serve):
    from flashsfa.vllm.backend import SparseFeatureBackend, SparseFeatureImpl

    ordinary = (4, D, D**-0.5, HKV)
    serve(**CODING)
    for argument in (
        {"alibi_slopes": [0.5] * 4}, {"logits_soft_cap": 30.0}, {"kv_sharing_target_layer_name": "model.layers.0"},
        {"attn_type": "encoder_only"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="flashsfa's vLLM backend"):
            SparseFeatureImpl(*ordinary, **argument)
    with pytest.raises(ValueError, match="speculative"):
        Server(vllm, serve(**CODING, speculative=SimpleNamespace(num_speculative_tokens=None)))
    serve(**CODING, layers=[0])
    with pytest.raises(ValueError, match="codes every layer"):
        SparseFeatureImpl(*ordinary)
    serve(**CODING, query_pattern="1:2")
    with pytest.raises(ValueError, match="query_pattern must be one of"):
        SparseFeatureImpl(*ordinary)
    serve(**CODING, has_basis=True)
    with pytest.raises(ValueError, match="no local file"):
        SparseFeatureImpl(*ordinary)
    serve(**CODING, cache_dtype="int8")
    with pytest.raises(ValueError, match="cache_dtype=None"):
        SparseFeatureImpl(*ordinary)
    for exact in ({"recent": 32}, {"first": 4}):
        serve(**CODING, **exact)
        with pytest.raises(ValueError, match="codes every token"):
            SparseFeatureImpl(*ordinary)
    serve()
    with pytest.raises(ValueError, match=r"flashsfa\.enable.*--hf-overrides"):
        SparseFeatureImpl(*ordinary)
    spec = vllm.FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=32, head_size_v=32, dtype=torch.float16)
    serve(topk=40)
    with pytest.raises(ValueError, match="topk must be 1 to 32"):
        SparseFeatureBackend.customize_spec(spec)


def test_the_cache_spec_is_known_after_vllm_has_left_its_config(vllm, serve, monkeypatch):
    from flashsfa.vllm import settings

    serve(**CODING)
    settings.current_settings()
    monkeypatch.setattr(settings, "get_current_vllm_config_or_none", lambda: None)
    assert settings.current_settings().topk == TOPK


def test_the_backend_says_once_that_it_is_experimental(vllm, serve, caplog):
    from flashsfa.vllm import backend

    backend._warn_experimental.cache_clear()
    serve(**CODING)
    with caplog.at_level(logging.WARNING, logger="flashsfa"):
        for _ in range(2):
            backend.SparseFeatureImpl(4, D, 1.0, HKV)
    assert [x.levelname for x in caplog.records if "experimental" in x.message] == ["WARNING"]


def test_registering(vllm, caplog):
    import flashsfa.vllm

    custom = vllm.AttentionBackendEnum.CUSTOM
    custom.clear_override()
    flashsfa.vllm.register()
    flashsfa.vllm.register()  # vLLM may load a plugin several times
    assert custom.get_path() == "flashsfa.vllm.backend.SparseFeatureBackend"
    module, name = custom.get_path().rsplit(".", 1)
    assert inspect.isclass(getattr(importlib.import_module(module), name))
    assert not caplog.records
    vllm.register_backend(custom, "another.Backend")
    flashsfa.vllm.register()
    assert custom.get_path() == "another.Backend"
    assert "another.Backend" in caplog.text
    custom.clear_override()

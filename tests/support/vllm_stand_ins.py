"""Stand-ins for vLLM 0.33.0's interfaces, as far as the backend uses them: the same names and signatures."""

import enum
import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

HAS_VLLM = importlib.util.find_spec("vllm") is not None


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

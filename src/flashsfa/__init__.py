"""FlashSFA: Sparse Feature Attention (ICLR 2026, arXiv 2603.22300) for PyTorch.

Each query and key keeps only its largest features; scores come from the features two tokens share; softmax
stays exact and values stay dense. `flashsfa.huggingface` switches transformers' models; importing this package
imports neither transformers nor Triton.
"""

from typing import Any

from .attention import sparse_feature_attention, sparse_feature_attention_varlen
from .axes import AxisBits
from .basis import FeatureBasis
from .cache.contiguous import SparseKVCache
from .cache.paged import PagedSparseKVCache
from .checks import checked
from .codes import FeatureCodes, topk_codes
from .decode import sparse_feature_decode
from .formats import CodeFormat
from .nn import SparseFeatureAttention
from .ops.record import explain

__version__ = "0.1.0"

_HUGGINGFACE = ("calibrate", "disable", "enable", "from_pretrained")

__all__ = [
    "AxisBits",
    "CodeFormat",
    "FeatureBasis",
    "FeatureCodes",
    "PagedSparseKVCache",
    "SparseFeatureAttention",
    "SparseKVCache",
    "calibrate",
    "checked",
    "disable",
    "enable",
    "explain",
    "from_pretrained",
    "sparse_feature_attention",
    "sparse_feature_attention_varlen",
    "sparse_feature_decode",
    "topk_codes",
]


def __getattr__(name: str) -> Any:
    if name not in _HUGGINGFACE:
        raise AttributeError(f"module 'flashsfa' has no attribute {name!r}")
    try:
        from . import huggingface
    except ImportError as error:
        from .extras import install_hint

        raise ImportError(f"flashsfa.{name} needs transformers: {install_hint('hf')}") from error
    return getattr(huggingface, name)

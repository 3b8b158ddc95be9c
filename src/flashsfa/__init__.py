"""FlashSFA: Sparse Feature Attention (ICLR 2026, arXiv 2603.22300) for PyTorch.

Each query and key keeps only its largest features; scores come from the features two tokens share; softmax
stays exact and values stay dense.
"""

from .attention import sparse_feature_attention, sparse_feature_attention_varlen
from .checks import checked
from .codes import FeatureCodes, topk_codes
from .kernels.dispatch import explain

__version__ = "0.1.0"

__all__ = [
    "FeatureCodes",
    "checked",
    "explain",
    "sparse_feature_attention",
    "sparse_feature_attention_varlen",
    "topk_codes",
]

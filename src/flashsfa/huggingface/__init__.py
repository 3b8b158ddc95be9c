"""Sparse Feature Attention for transformers' models: one call switches a model, and back."""

from .cache import SparseCache, StaticSparseCache, cache_nbytes
from .calibration import calibrate
from .switch import SFASettings, attention_shape, disable, enable, from_pretrained

__all__ = [
    "SFASettings",
    "SparseCache",
    "StaticSparseCache",
    "attention_shape",
    "cache_nbytes",
    "calibrate",
    "disable",
    "enable",
    "from_pretrained",
]

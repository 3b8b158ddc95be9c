"""Sparse Feature Attention for transformers' models: one call switches a model, and back."""

from .cache import SparseCache, StaticSparseCache
from .calibration import calibrate
from .switch import SFASettings, disable, enable, from_pretrained

__all__ = ["SFASettings", "SparseCache", "StaticSparseCache", "calibrate", "disable", "enable", "from_pretrained"]

"""Sparse Feature Attention for transformers' models: one call switches a model, and back."""

from .cache import SparseCache, StaticSparseCache, cache_nbytes
from .calibration import calibrate
from .presses import pruning
from .settings import SFASettings
from .structure import attention_shape
from .switch import disable, enable, from_pretrained

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
    "pruning",
]

"""What a cache holds and which of its tokens a query sees, as numba's kernels for decode take it.

All of it exists in kernels only: numba shares nested tuples out over no threads, so each task makes them again.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...cpu.parts import Part


class Features(NamedTuple):
    """Keys as features, in the dtype of the queries or in 8 bits with a scale: `codes.FeatureCodes`."""

    values: Part
    indices: Part
    dense: Part
    scale: Part
    topk: int
    dense_dims: int


class Levels(NamedTuple):
    """Keys in levels of `level_bytes`, with the sparse entries of a code beside them.

    The level l of a feature lies at bit `shift` of byte `byte`, all [1 or Hkv, C], and is read as
    (middle + (l - its middle level) * step) * scale + centre, with scale and centre of the key where it has them; in 8 bits
    `is_signed` says that l is.
    Sparse entries are int8 or levels around 7.5, times `value_scale`; their places are told by `form`.
    """

    rows: Part
    level_bytes: int
    byte: np.ndarray
    shift: np.ndarray
    bits: np.ndarray
    step: np.ndarray
    middle: np.ndarray
    is_signed: bool
    scale: Part
    centre: Part
    values: Part
    value_bits: int
    indices: Part
    index_bytes: int
    form: int
    index_bits: int
    topk: int
    dense_dims: int
    value_scale: Part


class Exact(NamedTuple):
    """Tokens that are held as they came."""

    k: Part
    v: Part


class Seen(NamedTuple):
    """Of all tokens each query sees `first` to `last`, both [B, M], but for the padding [B, N]; N may be 0. The `n` tokens after the
    first `n_first` are coded, for each of `kv_heads`."""

    first: np.ndarray
    last: np.ndarray
    padding: np.ndarray
    kv_heads: int
    n_first: int
    n: int

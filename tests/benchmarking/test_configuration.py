"""Names of configurations and the bytes that they stand for."""

import pytest
import torch

from flashsfa import AxisBits, SparseKVCache
from flashsfa.benchmarking.configuration import Configuration
from flashsfa.formats import CodeFormat


@pytest.mark.parametrize(
    ("name", "head_dim", "total"),
    [
        ("dense", 128, 512), ("k16", 128, 304), ("16+k16", 128, 336), ("16+k16-skip", 128, 336), ("k16-int8", 128, 168),
        ("22+k12", 64, 208), ("28+k12-int8", 64, 124), ("dense-int4", 128, 136), ("16+k16-int4", 128, 110), ("axes48-int4", 128, 116),
        ("axes24", 64, 152), ("axes24-int8", 64, 92), ("axes48-int3", 128, 100),
    ],
)  # fmt: skip
def test_a_name_stands_for_bytes(name, head_dim, total):
    configuration = Configuration.named(name, head_dim)
    assert configuration.name == name
    assert configuration.bytes == total
    if name == "dense":
        return
    topk, dense_dims = configuration.code
    if configuration.axis_bytes is None:
        cache = SparseKVCache(topk, dense_dims=dense_dims, dtype=configuration.cache_dtype)
    else:
        _, axes = AxisBits.fit(torch.randn(1, 9, head_dim), configuration.axis_bytes)
        cache = SparseKVCache(axes=axes, dtype=configuration.cache_dtype)
    cache.append(*(torch.zeros(1, 1, 2, head_dim, dtype=torch.bfloat16) for _ in "kv"))
    assert cache.nbytes == 2 * total


def test_a_cache_of_all_features_holds_rows():
    configuration = Configuration.named("dense-int8", 64)
    assert configuration == Configuration(64, bits=8)
    assert configuration.bytes == 2 * (64 + 4)
    assert configuration.code == (64, 0)
    assert configuration.cache_dtype == CodeFormat(value_bits=8, v_bits=8)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "k",
        "16",
        "16+16",
        "k16-int2",
        "k16-int3",
        "dense-int3",
        "axes",
        "axes48-int2",
        "k=16",
        "16+k16-skip-int8",
        "dense+k16",
    ],
)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match="names no configuration"):
        Configuration.named(name, 128)

"""The decode kernel for Hopper compiles for every kind of keys and values, without a GPU: needs NVRTC."""

import dataclasses

import pytest

from flashsfa.ops.decode.hopper import compiler
from flashsfa.ops.nvrtc import cuda

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("nvrtc")]
BASE = compiler.Variant(
    is_bf16=True, head_dim=128, value_dim=128, rows=1, query_dims=128, channel=0, channel_bits=16, kept=16, kept_bits=16, index_bits=8,
    value_bits=16, channel_scale_bytes=0, kept_scale_bytes=0, value_scale_bytes=0, channel_centred=False, value_centred=False,
    channel_alignment=16, kept_alignment=16, index_alignment=16, channel_stride=0, kept_stride=32, index_stride=16, value_stride=256,
    page_size=0, has_padding=False, has_several_queries=False, is_capped=False, is_tolerant=False, warps=4, blocks=2, keys_ahead=1,
)  # fmt: skip
FOUR_BITS = {
    "warps": 12,
    "blocks": 1,
    "value_bits": 4,
    "value_scale_bytes": 2,
    "value_centred": True,
    "value_stride": 64,
}
AXES = {**FOUR_BITS, "channel": 192, "channel_bits": 2, "query_dims": 192, "kept": 0, "channel_stride": 48}
VARIANTS = {
    "16 bits": {},
    "8 bits": {
        "warps": 12,
        "blocks": 1,
        "kept_bits": 8,
        "value_bits": 8,
        "kept_scale_bytes": 4,
        "value_scale_bytes": 4,
        "kept_stride": 16,
        "value_stride": 128,
    },
    "packed": {
        **FOUR_BITS,
        "kept_bits": 4,
        "index_bits": 7,
        "kept_scale_bytes": 2,
        "kept_alignment": 8,
        "index_alignment": 2,
    },
    "bitmap": {**FOUR_BITS, "kept_bits": 4, "index_bits": 0, "kept_scale_bytes": 2, "kept_alignment": 8},
    "channel": {
        "channel": 22,
        "head_dim": 64,
        "value_dim": 64,
        "channel_alignment": 4,
        "channel_stride": 44,
        "value_stride": 128,
    },
    "rows": {
        **FOUR_BITS,
        "channel": 128,
        "channel_bits": 4,
        "kept": 0,
        "channel_scale_bytes": 2,
        "channel_centred": True,
    },
    "pages": {"page_size": 16, "is_capped": True, "is_bf16": False},
    "padding": {"has_padding": True, "has_several_queries": True},
    "axes": AXES,
    "values in 3 bits": {**AXES, "value_bits": 3, "value_stride": 48},
    "narrow values in 3 bits": {**AXES, "value_bits": 3, "value_stride": 24, "value_dim": 64},
}


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("name", VARIANTS)
def test_compiles(name, rows):
    """The sizes of its structures are asserted while it compiles."""
    variant = dataclasses.replace(BASE, rows=rows, is_tolerant=rows == 8, **VARIANTS[name])
    assert (variant.shared_bytes + 1024) * variant.blocks <= 228 * 1024
    assert compiler.compile_cubin(variant).startswith(b"\x7fELF")


def test_sizes_are_checked(monkeypatch):
    monkeypatch.setattr(compiler.Variant, "shared_bytes", 1 << 15)
    with pytest.raises(cuda.CompilationError, match="shared memory of another size"):
        compiler.compile_cubin(BASE)

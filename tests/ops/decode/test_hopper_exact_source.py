"""The kernel for exact tokens compiles for every size, without a GPU: needs NVRTC."""

import pytest

from flashsfa.ops.decode.hopper.exact import compiler
from flashsfa.ops.decode.hopper.exact.compiler import Variant
from flashsfa.ops.nvrtc import cuda

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("nvrtc")]


@pytest.mark.parametrize("is_bf16", [False, True])
@pytest.mark.parametrize("sizes", [(128, 128, 1), (8, 8, 2), (80, 72, 8), (256, 256, 4), (64, 128, 8)])
def test_compiles(sizes, is_bf16):
    """The sizes of its structures are asserted while it compiles."""
    variant = Variant(is_bf16, *sizes)
    assert variant.shared_bytes <= 227 * 1024
    assert compiler.compile_cubin(variant).startswith(b"\x7fELF")


def test_sizes_are_checked(monkeypatch):
    monkeypatch.setattr(Variant, "shared_bytes", 1 << 15)
    with pytest.raises(cuda.CompilationError, match="shared memory of another size"):
        compiler.compile_cubin(Variant(True, 128, 128, 1))

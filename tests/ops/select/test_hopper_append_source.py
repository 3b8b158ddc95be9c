"""The kernel that appends compiles for every format and size, without a GPU: needs NVRTC."""

import pytest

from flashsfa.ops.select.hopper import compiler
from flashsfa.ops.select.hopper.compiler import Variant

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("nvrtc")]


@pytest.mark.parametrize("has_recent", [False, True])
@pytest.mark.parametrize("is_8_bit", [False, True])
@pytest.mark.parametrize("sizes", [(128, 16, 16, 128), (1, 0, 1, 1), (256, 0, 256, 1024), (80, 22, 26, 72)])
def test_compiles(sizes, is_8_bit, has_recent):
    """The size of its parameters is asserted while it compiles."""
    assert compiler.compile_cubin(Variant(is_8_bit, *sizes, is_8_bit, has_recent)).startswith(b"\x7fELF")

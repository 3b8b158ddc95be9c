"""The kernel that appends compiles for every format and size, without a GPU: needs NVRTC."""

import pytest

from flashsfa.ops.select.hopper import compiler
from flashsfa.ops.select.hopper.compiler import Form, Variant

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("nvrtc")]

FEATURES = {"kept_bits": 4, "dense_bits": 8}
FORMS = {
    "16 bits": (80, 72, Form(16, kept=26, dense_dims=22, index_bits=8)),
    "all dense but one": (256, 1024, Form(16, kept=1, dense_dims=255, index_bits=8)),
    "one feature": (1, 1, Form(16, kept=1, index_bits=8)),
    "8 bits": (256, 1, Form(8, 8, 256, 0, 8, 8, shares_scale=True)),
    "4 bits": (128, 128, Form(4, **FEATURES, kept=16, dense_dims=16, index_bits=7)),
    "4 bits in a bitmap": (96, 48, Form(4, **FEATURES, kept=31, index_bits=8, is_bitmap=True)),
    "each in 8 bits": (64, 64, Form(8, 8, kept=5, dense_dims=3, dense_bits=8, index_bits=8)),
    "rows": (128, 1024, Form(4, 4)),
    "rows in 16 and 8 bits": (37, 1, Form(8, 16)),
    "axes": (64, 64, Form(4, axis_bytes=36)),
    "values in 3 bits": (128, 128, Form(3, **FEATURES, kept=16, dense_dims=16, index_bits=7)),
    "axes beside 3 bits": (128, 128, Form(3, axis_bytes=48)),
}


@pytest.mark.parametrize(("has_recent", "is_paged"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("head_dim", "value_dim", "form"), FORMS.values(), ids=FORMS)
def test_compiles(head_dim, value_dim, form, has_recent, is_paged):
    """The size of its parameters is asserted while it compiles."""
    for tokens in (1, 4):
        variant = Variant(has_recent, head_dim, value_dim, has_recent, is_paged, form, tokens)
        assert compiler.compile_cubin(variant).startswith(b"\x7fELF")

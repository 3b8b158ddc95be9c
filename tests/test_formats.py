"""`CodeFormat`: bytes to the last scale and padding bit, names, and what it refuses."""

from itertools import product

import pytest
import torch

from flashsfa.coder import Coder
from flashsfa.formats import INDEX_FORMS, CodeFormat
from flashsfa.narrow import NarrowRows

# (head_dim, dense_dims, topk)
BUDGETS = [(2, 1, 1), (7, 0, 3), (64, 0, 8), (64, 22, 12), (64, 28, 11), (64, 63, 1), (65, 1, 64)]
BUDGETS += [(96, 17, 5), (128, 16, 16), (128, 0, 16), (255, 4, 33), (256, 0, 256), (256, 16, 31), (256, 255, 1)]
FORMATS = [CodeFormat(d, s, i) for d, s, i in product((16, 8), (16, 8, 4), ("auto", *INDEX_FORMS))]


@pytest.mark.parametrize(("head_dim", "dense_dims", "topk"), BUDGETS)
def test_key_bytes_are_those_of_the_tensors(head_dim, dense_dims, topk):
    k, v = torch.randn(1, 2, 3, head_dim).bfloat16(), torch.randn(1, 2, 3, 16).bfloat16()
    for form in FORMATS:
        stored = Coder(topk, dense_dims, form).encode(k, v).codes
        assert stored.nbytes == 6 * form.key_bytes(head_dim, dense_dims, topk), form
        storage = sum(x.untyped_storage().nbytes() for x in stored.tensors())
        assert storage == stored.nbytes, "a view of something larger keeps the larger"


@pytest.mark.parametrize("v_dim", [1, 16, 64, 65, 80, 96, 128, 192, 256, 576])
@pytest.mark.parametrize("v_bits", [16, 8, 4, 3])
def test_value_bytes_are_those_of_the_tensors(v_dim, v_bits):
    form = CodeFormat(v_bits=v_bits)
    v = torch.randn(2, 3, v_dim).bfloat16()
    if v_bits < 8 and v_dim % 16:
        for refused in (lambda: form.v_bytes(v_dim), lambda: NarrowRows.encode(v, v_bits)):
            with pytest.raises(ValueError, match=f"width must be a multiple of 16, got {v_dim}; take 8 bits"):
                refused()
    else:
        assert NarrowRows.encode(v, v_bits).nbytes == 6 * form.v_bytes(v_dim)


@pytest.mark.parametrize(
    ("form", "head_dim", "dense_dims", "topk", "expected"),
    [
        (CodeFormat(), 64, 22, 12, 38),  # 22 + 2 of scale, 6 + 2, a bitmap of 42 bits
        (CodeFormat(8, 4, "packed"), 64, 22, 12, 41),
        (CodeFormat(8, 4, "uint8"), 64, 22, 12, 44),
        (CodeFormat(16, 16, "uint8"), 64, 22, 12, 80),  # 2 M + 3 K
        (CodeFormat(), 64, 0, 8, 4 + 2 + 6),  # indices of 6 bits
        (CodeFormat(), 128, 0, 16, 8 + 2 + 14),
        (CodeFormat(), 128, 16, 32, 18 + 18 + 14),
        (CodeFormat(), 64, 0, 7, 4 + 2 + 6),  # padding: half a byte of values, 6 bits of indices
    ],
)
def test_key_bytes_by_hand(form, head_dim, dense_dims, topk, expected):
    assert form.key_bytes(head_dim, dense_dims, topk) == expected


@pytest.mark.parametrize(
    ("v_bits", "v_dim", "expected"), [(16, 64, 128), (8, 64, 68), (4, 64, 36), (4, 128, 68), (3, 128, 52)]
)
def test_value_bytes_by_hand(v_bits, v_dim, expected):
    assert CodeFormat(v_bits=v_bits).v_bytes(v_dim) == expected


@pytest.mark.parametrize(
    ("topk", "sparse_dims", "form"),
    [
        (12, 42, "bitmap"),
        (8, 64, "packed"),
        (16, 128, "packed"),
        (1, 64, "uint8"),
        (31, 256, "uint8"),
        (33, 256, "bitmap"),
    ],
)
def test_auto_is_the_smallest_form(topk, sparse_dims, form):
    """The first one of those that are equal."""
    auto = CodeFormat()
    assert auto.index_form(topk, sparse_dims) == form
    sizes = [CodeFormat(index=x).index_bytes(topk, sparse_dims) for x in INDEX_FORMS]
    assert auto.index_bytes(topk, sparse_dims) == min(sizes)


@pytest.mark.parametrize("name", ["", "d8", "d4s4v4", "d8s4v4-auto", "d8s4v4-", "d08s4v4", "int8"])
def test_other_names(name):
    with pytest.raises(ValueError, match="names no format of a cache; there are int4, int8, or widths such as d8s4v4"):
        CodeFormat.named(name)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"dense_bits": 4}, ValueError, "dense_bits must be 16 or 8, got 4"),
        ({"value_bits": 2}, ValueError, "value_bits must be 16 or 8 or 4, got 2"),
        ({"v_bits": 2}, ValueError, "v_bits must be 16 or 8 or 4 or 3, got 2"),
        ({"v_bits": 8.0}, TypeError, "v_bits must be an int"),
        ({"value_bits": True}, TypeError, "value_bits must be an int"),
        ({"index": "rle"}, ValueError, "index must be one of auto, uint8, packed, bitmap; got 'rle'"),
    ],
)
def test_bad_fields(fields, error, message):
    with pytest.raises(error, match=message):
        CodeFormat(**fields)


def test_budgets_that_do_not_fit():
    with pytest.raises(ValueError, match="topk must be 1 to 42"):
        CodeFormat().key_bytes(64, 22, 43)
    with pytest.raises(ValueError, match="width must be at least 1"):
        CodeFormat(v_bits=16).v_bytes(0)


@pytest.mark.parametrize("name", ["d8s4v4", "d16s8v16", "d8s4v4-packed", "d8s8v8-bitmap", "d8s4v3"])
def test_a_format_says_the_name_that_it_is_read_from(name):
    assert CodeFormat.named(name).name == name

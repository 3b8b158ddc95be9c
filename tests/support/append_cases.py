"""Keys and values, buffers and caches for tests of the kernel for Hopper that appends; on a CPU `emulated` stands in for the GPU."""

import math

import torch

import emulated
from flashsfa.ops import nvrtc, record

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = [torch.float16, torch.bfloat16]
BITS = {"16 bits": None, "8 bits": torch.int8}
BATCH, HEADS, TOKENS, CAPACITY = 2, 2, 6, 11


def use_kernel(monkeypatch):
    """Have the kernel run, or skip the test; and `explain()` know of nothing before."""
    monkeypatch.setattr(record, "_last", {})
    if emulated.is_needed(DEVICE):
        monkeypatch.setattr(nvrtc, "is_hopper", lambda device: True)
        monkeypatch.setattr(nvrtc, "obstacle", lambda: None)
        monkeypatch.setattr(nvrtc, "load_kernel", emulated.load_kernel)


def hostile(dtype, head_dim, v_dim):
    """Keys and values, neither of which is contiguous, of rows that are random, tied, zero, infinite, tiny, and large."""

    def draw(width):
        x = torch.randn(BATCH, TOKENS, HEADS, width)
        x[:, 1] = x[:, 1].round()
        x[0, 2], x[1, 2] = 0, -1
        x[:, 3, 0, ::3] = math.inf
        x[:, 3, 1, width // 2 :] = -math.inf
        x[:, 4] *= 1e-7
        x[:, 5] = x[:, 5].round() * 10000
        return x.to(DEVICE, dtype)

    wide = torch.full((BATCH, HEADS, TOKENS, v_dim + 3), math.nan, dtype=dtype, device=DEVICE)
    wide[..., 1 : v_dim + 1] = draw(v_dim).transpose(1, 2)
    return draw(head_dim).transpose(1, 2), wide[..., 1 : v_dim + 1]


def poisoned(width, dtype):
    """A buffer [B, H, C, *width] and the memory that it is the middle of, all of whose bits are set."""
    shape = (BATCH, HEADS, CAPACITY, *width)
    memory = torch.full(((math.prod(shape) + 128) * dtype.itemsize,), 255, dtype=torch.uint8, device=DEVICE).view(dtype)
    return memory[64:-64].view(shape), memory


def same_bits(found, expected):
    assert found.dtype == expected.dtype
    assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def draw(n=40, dtype=torch.bfloat16, d=64):
    return torch.randn(2, BATCH, HEADS, n, d, device=DEVICE).to(dtype)


def assert_same_view(found, expected):
    assert type(found.codes) is type(expected.codes)
    assert type(found.v) is type(expected.v)
    assert (found.codes.shape, found.v.shape, found.nbytes) == (expected.codes.shape, expected.v.shape, expected.nbytes)
    assert [x.stride() for x in found.tensors()] == [x.stride() for x in expected.tensors()]
    for one, another in zip(found.tensors(), expected.tensors(), strict=True):
        same_bits(one, another)
    assert len(found.exact) == len(expected.exact)
    for one, another in zip(found.exact, expected.exact, strict=True):
        same_bits(one.k, another.k)
        same_bits(one.v, another.v)

"""Keys in a fixed number of bits per axis, against a model of them that takes one entry at a time."""

import math
from itertools import pairwise

import pytest
import torch

from flashsfa import checked
from flashsfa.axes import AxisBits, AxisCodes
from held_cases import axis_bits

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [
    (1, 1, 1),
    (2, 7, 3),
    (3, 64, 24),
    (1, 80, 80),
    (2, 256, 1),
    (2, 256, 101),
    (1, 5, 5),
]  # heads, D, bytes of a key


def decaying(heads, n, head_dim):
    """[heads, n, D] rows whose axes are of very different size, in no order, around centres that are not zero."""
    sizes = torch.logspace(1, -3, head_dim)[torch.stack([torch.randperm(head_dim) for _ in range(heads)])]
    return (torch.randn(heads, n, head_dim) + torch.randn(heads, 1, head_dim)) * sizes[:, None]


def fitted(heads=2, head_dim=16, key_bytes=6, n=300):
    """Axis bits, and the keys [1, H, n, D] that they were fitted to, their axes in order."""
    keys = decaying(heads, n, head_dim)
    order, axes = AxisBits.fit(keys, key_bytes)
    return axes, keys.gather(-1, order[:, None].expand_as(keys))[None]


def made(*bits):
    """Axis bits of heads with these widths, with steps and centres that differ."""
    bits = torch.tensor(bits, dtype=torch.uint8)
    return AxisBits(bits, torch.rand(bits.shape) + 0.1, torch.randn(bits.shape))


def model_bytes(keys, axes):
    """The bytes of keys [B, H, N, D]: the level of each axis, one after another, as one long number per head."""
    rows = torch.zeros(*keys.shape[:-1], axes.key_bytes, dtype=torch.uint8)
    for b, h, n in torch.cartesian_prod(*(torch.arange(size, device="cpu") for size in keys.shape[:3])).tolist():
        number, place = 0, 0
        for bits, step, centre, x in zip(
            *(t.tolist() for t in (axes.bits[h], axes.step[h], axes.centre[h], keys[b, h, n])), strict=True
        ):
            level = math.floor((x - centre) / step + 2.0 ** (bits - 1)) if step else 0
            number |= min(max(level, 0), 2**bits - 1) << place
            place += bits
        rows[b, h, n] = torch.tensor(list(number.to_bytes(axes.key_bytes, "little")), dtype=torch.uint8)
    return rows


def model_keys(packed, axes):
    """What such bytes are read as, in float64."""
    keys = torch.zeros(*packed.shape[:-1], axes.bits.shape[-1], dtype=torch.float64)
    for b, h, n in torch.cartesian_prod(*(torch.arange(size, device="cpu") for size in packed.shape[:3])).tolist():
        number = int.from_bytes(bytes(packed[b, h, n].tolist()), "little")
        for d, bits in enumerate(axes.bits[h].tolist()):
            level, number = number % 2**bits, number >> bits
            offset = (level + 0.5 - 2.0 ** (bits - 1)) * axes.step[h, d].item() if bits else 0.0
            keys[b, h, n, d] = axes.centre[h, d].item() + offset
    return keys


def assert_as_the_model(axes):
    """For keys of all levels and beyond; none so near to where two meet that rounding could tip it."""
    heads, head_dim = axes.bits.shape
    count = 2.0 ** axes.bits[:, None]
    levels = (torch.rand(2, heads, 3, head_dim) * (count + 4) - 2).floor() + 0.5
    places = levels + 0.8 * torch.rand(levels.shape) - 0.4 - count / 2
    keys = axes.centre[:, None] + places * axes.step[:, None]
    codes = AxisCodes.encode(keys, axes)
    assert torch.equal(codes.packed, model_bytes(keys, axes))
    torch.testing.assert_close(codes.to_dense(torch.float64), model_keys(codes.packed, axes), rtol=1e-5, atol=5e-5)


# ---- the codes


@pytest.mark.parametrize(("heads", "head_dim", "key_bytes"), SHAPES)
def test_bytes_and_keys_are_those_of_the_model(heads, head_dim, key_bytes):
    axes, _ = fitted(heads, head_dim, key_bytes)
    assert_as_the_model(axes)


@pytest.mark.parametrize(
    "bits",
    [
        ([8],),
        ([4, 4], [8, 0]),
        ([8] * 7,),
        ([2] * 8, [4, 4, 4, 2, 2, 0, 0, 0], [8, 8, 0, 0, 0, 0, 0, 0]),
        ([4, 2, 2, 0, 0, 0, 0],),
        ([8, 4, 4, 4, 2, 2, 0],),
        ([8] * 256, [8] * 256),
        ([2] * 256, [8] * 64 + [0] * 192),
    ],
)
def test_widths_as_they_come(bits):
    axes = made(*bits)
    assert axes.key_bytes == sum(bits[0]) / 8
    assert_as_the_model(axes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_come_back_to_half_a_step(dtype):
    axes, keys = fitted(3, 64, 24)
    keys = keys.to(dtype)
    read = AxisCodes.encode(keys, axes).to_dense(torch.float64)
    step, centre, half = (x[:, None].double() for x in (axes.step, axes.centre, 2.0 ** (axes.bits - 1.0)))
    apart, end = (keys.double() - centre).abs(), half * step
    rounding = 1e-5 * (step + centre.abs())
    is_inside, is_kept = apart <= end, (axes.bits > 0)[:, None].expand(keys.shape)
    assert is_inside[is_kept].double().mean() > 0.9
    assert ((keys - read).abs() <= step / 2 + rounding)[is_inside & is_kept].all()
    outermost = centre + (end - step / 2) * (keys.double() - centre).sign()
    torch.testing.assert_close(read[~is_inside & is_kept], outermost[~is_inside & is_kept], rtol=1e-5, atol=1e-5)
    assert torch.equal(read.where(~is_kept, 0), centre.expand(keys.shape).where(~is_kept, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_are_read_in_the_dtype_asked_for(dtype):
    axes, keys = fitted()
    codes = AxisCodes.encode(keys, axes)
    assert codes.to_dense(dtype).dtype == dtype
    torch.testing.assert_close(codes.to_dense(dtype), codes.to_dense(torch.float64).to(dtype))


def test_a_key_is_coded_alike_in_every_dtype():
    axes, keys = fitted()
    keys = keys.half()
    assert torch.equal(AxisCodes.encode(keys, axes).packed, AxisCodes.encode(keys.double(), axes).packed)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_shape_and_bytes(n):
    axes, keys = fitted()
    codes = AxisCodes.encode(keys.expand(3, -1, -1, -1)[:, :, :n], axes)
    assert codes.shape == codes.to_dense(torch.float32).shape == (3, 2, n, 16)
    assert (codes.head_dim, codes.device) == (16, keys.device)
    assert codes.nbytes == 3 * 2 * n * 6
    assert [x.shape for x in codes.tensors()] == [(3, 2, n, 6)]


VIEWS = [
    lambda x: x[:, :, ::2],
    lambda x: x[:, :, 1:],
    lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    lambda x: x[:1].expand(3, *x.shape[1:]),
]


@pytest.mark.parametrize("view", VIEWS)
def test_strided_keys_and_codes(view):
    axes, keys = fitted()
    keys = keys.unflatten(2, (4, -1))[0].transpose(0, 1)  # [4, 2, 75, 16]
    codes = AxisCodes.encode(keys, axes)
    assert torch.equal(AxisCodes.encode(view(keys), axes).packed, view(codes.packed))
    assert torch.equal(codes.map(view).to_dense(torch.float32), view(codes.to_dense(torch.float32)))


@pytest.mark.parametrize("index", [(slice(None), slice(None), slice(2, 5)), slice(1, 3), [2, 0, 2], (..., slice(1)), 0])
def test_batch_and_tokens_are_indexed(index):
    axes, keys = fitted()
    codes = AxisCodes.encode(keys.unflatten(2, (4, -1))[0].transpose(0, 1), axes)
    if index == 0:
        with pytest.raises(
            ValueError, match=r"axis codes must be \[B, 2, N, 6\] with all heads of their axes, got \(2, 75, 6\)"
        ):
            codes[index]
        return
    index = torch.tensor(index) if isinstance(index, list) else index
    whole = (*index, slice(None)) if isinstance(index, tuple) else index
    assert torch.equal(codes[index].to_dense(torch.float32), codes.to_dense(torch.float32)[whole])


def test_map_joins_several():
    axes, keys = fitted()
    codes = AxisCodes.encode(keys, axes)
    both = codes.map(lambda *x: torch.cat(x, dim=2), codes[:, :, :3])
    assert torch.equal(both.to_dense(torch.float32)[:, :, -3:], codes.to_dense(torch.float32)[:, :, :3])
    assert both.axes is axes


def test_any_byte_is_a_key():
    """Unwritten memory too: within the range of each axis."""
    axes, keys = fitted()
    codes = AxisCodes.encode(keys[:, :, :1], axes)
    for byte in (0, 1, 170, 255):
        read = codes.map(lambda x, byte=byte: torch.full_like(x, byte)).to_dense(torch.float32)
        assert ((read[0, :, 0] - axes.centre).abs() <= 128 * axes.step).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(bad):
    axes, keys = fitted()
    keys[0, 1, 7, -1] = bad  # also where no bits are kept
    with checked(), pytest.raises(ValueError, match=r"keys holds? NaN"):
        AxisCodes.encode(keys, axes)
    if keys.device.type == "cpu":
        with pytest.raises(ValueError, match="keys hold NaN or infinity, which axis bits cannot hold"):
            AxisCodes.encode(keys, axes)


def test_what_a_key_holds_stays_in_its_own_bits(monkeypatch):
    """Where values are not looked at, NaN and infinity too; then that axis alone reads otherwise."""
    monkeypatch.setattr("flashsfa.axes.may_look", lambda keys: False)
    axes, keys = fitted()
    expected = AxisCodes.encode(keys, axes).to_dense(torch.float32)
    for bad in (math.nan, math.inf, -math.inf, 3e38):
        spoilt = keys.clone()
        spoilt[..., 3] = bad
        read = AxisCodes.encode(spoilt, axes).to_dense(torch.float32)
        assert torch.equal(read[..., torch.arange(16) != 3], expected[..., torch.arange(16) != 3])


def test_no_gradient_reaches_the_keys():
    axes, keys = fitted()
    codes = AxisCodes.encode(keys.requires_grad_(), axes)
    assert not codes.to_dense(torch.float32).requires_grad


def test_compiled_whole():
    """In one graph, to the same codes, and for keys of another length."""
    axes, keys = fitted()

    def there_and_back(x):
        codes = AxisCodes.encode(x, axes)
        return codes.packed, codes[:, :, 1:].to_dense(x.dtype)

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    for part in (keys, keys[:, :, :7].double()):
        for found, expected in zip(compiled(part), there_and_back(part), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "words"),
    [
        (
            (1, 2, 3, 15),
            torch.float32,
            ValueError,
            r"keys must be \[B, H, N, D\] for axes \[H, D\] of one layer; got \(1, 2, 3, 15\)",
        ),
        ((1, 3, 3, 16), torch.float32, ValueError, r"and \(2, 16\)"),
        ((2, 3, 16), torch.float32, ValueError, "keys must be"),
        ((1, 2, 3, 16), torch.int8, TypeError, "keys must be float16"),
    ],
)
def test_keys_that_do_not_fit(shape, dtype, error, words):
    axes, _ = fitted()
    with pytest.raises(error, match=words):
        AxisCodes.encode(torch.zeros(shape, dtype=dtype), axes)


@pytest.mark.parametrize(
    ("packed", "words"),
    [
        (torch.zeros(1, 2, 3, 5, dtype=torch.uint8, device="cpu"), r"must be \[B, 2, N, 6\]"),
        (torch.zeros(1, 1, 3, 6, dtype=torch.uint8, device="cpu"), r"got \(1, 1, 3, 6\)"),
        (torch.zeros(1, 2, 3, 6, dtype=torch.int8, device="cpu"), "must be uint8, got torch.int8"),
        (torch.zeros(1, 2, 3, 6, dtype=torch.uint8, device="meta"), "axis codes on meta need their axes there"),
    ],
)
def test_codes_that_do_not_fit(packed, words):
    axes, _ = fitted()
    with pytest.raises(ValueError, match=words):
        AxisCodes(packed if packed.is_meta else packed.to(axes.device), axes)
    with pytest.raises(ValueError, match="codes are of one layer"):
        AxisCodes(packed, AxisBits.stack([axes, axes]))


# ---- the bits


@pytest.mark.parametrize(("heads", "head_dim", "key_bytes"), SHAPES)
def test_all_bits_are_spent_and_descend(heads, head_dim, key_bytes):
    keys = decaying(heads, 200, head_dim)
    order, axes = AxisBits.fit(keys, key_bytes)
    assert torch.equal(order.sort(dim=-1).values, torch.arange(head_dim).expand(heads, -1))
    assert axes.bits.sum(-1).tolist() == [8 * key_bytes] * heads
    assert axes.key_bytes == key_bytes
    torch.testing.assert_close(axes.centre, keys.mean(1).gather(-1, order))


def error_of(keys, key_bytes):
    """Mean squared error of keys [H, S, D] in codes that were fitted to them."""
    order, axes = AxisBits.fit(keys, key_bytes)
    ordered = keys.gather(-1, order[:, None].expand_as(keys))[None]
    return (AxisCodes.encode(ordered, axes).to_dense(torch.float64) - ordered).square().sum(-1).mean()


def test_more_bytes_lose_less():
    keys = decaying(2, 500, 32)
    errors = [error_of(keys, key_bytes) for key_bytes in range(1, 33)]
    assert all(more < fewer for fewer, more in pairwise(errors))


@pytest.mark.parametrize(("key_bytes", "bound"), [(8, 1.0), (16, 0.13), (32, 0.013), (64, 1e-4)])
def test_the_error_is_that_of_the_best_uniform_quantisers(key_bytes, bound):
    """Of normal axes of equal size: Max (1960) gives 0.119 for 2 bits and 0.0115 for 4."""
    assert error_of(torch.randn(1, 4000, 64), key_bytes) / 64 < bound


def test_bits_go_where_they_help_most():
    """Greedy is optimal where the drop per bit only falls; here against all ways to share 24 bits among four axes."""
    keys = decaying(1, 500, 4)
    widths = torch.cartesian_prod(*[torch.tensor([0, 2, 4, 8])] * 4)
    ways = [way for way in widths[widths.sum(-1) == 24].tolist() if way == sorted(way, reverse=True)]
    largest_first = keys.std(1).argsort(descending=True, dim=-1)
    ordered = keys.gather(-1, largest_first[:, None].expand_as(keys))[None]
    losses = []
    for way in ways:
        step = torch.stack([AxisBits.fit(ordered[0, :, :, d : d + 1], 1)[1].step[:, 0] for d in range(4)], -1)
        bits = torch.tensor([way], dtype=torch.uint8)
        steps = [step * (128 / 2.0 ** (bits - 1)) * clip for clip in torch.linspace(0.4, 1, 10).tolist()]
        tried = [AxisCodes.encode(ordered, AxisBits(bits, s, ordered[0].mean(1))) for s in steps]
        errors = torch.stack([(x.to_dense(torch.float32) - ordered).square().mean(2)[0] for x in tried])
        losses.append(errors.amin(0).sum())
    assert error_of(keys, 3) <= 1.1 * torch.stack(losses).min()


def test_a_sample_in_16_bits_is_fitted_in_32():
    keys = decaying(2, 300, 16).bfloat16()
    found, expected = AxisBits.fit(keys, 6), AxisBits.fit(keys.float(), 6)
    assert torch.equal(found[0], expected[0])
    for x, y in zip(found[1].tensors(), expected[1].tensors(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("keys", ["zeros", "one", "constant axes", "spikes", "tiny"])
def test_samples_with_little_in_them(keys):
    rows = torch.zeros(2, 50, 8)
    if keys == "one":
        rows = torch.randn(2, 1, 8)
    if keys == "constant axes":
        rows[..., 0], rows[..., 3] = torch.randn(2, 50), 5.0
    if keys == "tiny":
        rows = torch.randn(2, 50, 8) * 1e-42
    if keys == "spikes":
        rows[:, 7] = 1e4 * torch.randn(2, 8)
    order, axes = AxisBits.fit(rows, 3)
    assert axes.bits.sum(-1).tolist() == [24, 24]
    ordered = rows.gather(-1, order[:, None].expand_as(rows))[None]
    read = AxisCodes.encode(ordered, axes).to_dense(torch.float32)
    assert (read - ordered).square().sum() <= (ordered - ordered.mean(2, keepdim=True)).square().sum() + 1e-6
    if keys in ("zeros", "one", "tiny"):
        torch.testing.assert_close(read, ordered)


def test_tensors_of_any_strides():
    """Kernels read them by their addresses."""
    axes = axis_bits(2, 32)
    turned = AxisBits(*(x.T.contiguous().T for x in axes.tensors()))
    assert all(x.is_contiguous() for x in turned.tensors())
    for one, another in zip(turned.tensors(), axes.tensors(), strict=True):
        assert torch.equal(one, another)


def test_layers_are_stacked_and_taken():
    layers = [fitted()[0] for _ in range(3)]
    stacked = AxisBits.stack(layers)
    assert stacked.bits.shape == (3, 2, 16)
    assert stacked.key_bytes == 6
    for layer, expected in enumerate(layers):
        for x, y in zip(stacked[layer].tensors(), expected.tensors(), strict=True):
            assert torch.equal(x, y)


def test_the_same_device_is_the_same_object():
    axes, _ = fitted()
    assert axes.to(axes.device) is axes


@pytest.mark.parametrize(
    ("keys", "key_bytes", "error", "words"),
    [
        (torch.zeros(2, 5, 8), 0, ValueError, "key_bytes must be 1 to 8, got 0"),
        (torch.zeros(2, 5, 8), 9, ValueError, "key_bytes must be 1 to 8, got 9"),
        (torch.zeros(2, 5, 8), 3.0, TypeError, "key_bytes must be an int"),
        (torch.zeros(2, 0, 8), 3, ValueError, r"fitted to keys \[H, S, D\], at least one; got \(2, 0, 8\)"),
        (torch.zeros(5, 8), 3, ValueError, r"got \(5, 8\)"),
        (torch.zeros(2, 5, 8).long(), 3, TypeError, "keys must be float16"),
        (torch.full((2, 5, 8), math.nan), 3, ValueError, "the sample of keys holds NaN or infinity"),
    ],
)
def test_samples_that_do_not_fit(keys, key_bytes, error, words):
    with pytest.raises(error, match=words):
        AxisBits.fit(keys, key_bytes)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"bits": [[8, 3, 3, 2]]}, ValueError, "an axis has 0, 2, 4 or 8 bits; got 2, 3, 8"),
        ({"bits": [[4, 8, 2, 2]]}, ValueError, "must descend"),
        ({"bits": [[8, 2, 0, 0]]}, ValueError, "whole bytes; their axes have 10 bits"),
        ({"bits": [[8, 8, 0, 0], [8, 0, 0, 0]]}, ValueError, "same number of whole bytes; their axes have 8, 16 bits"),
        ({"bits": [[0, 0, 0, 0]]}, ValueError, "their axes have 0 bits"),
        ({"bits": [8, 8, 0, 0]}, ValueError, r"need bits, step and centre \[..., H, D\]; got \(4,\)"),
        ({"step": torch.ones(1, 3)}, ValueError, r"got \(1, 4\), \(1, 3\), \(1, 4\)"),
        ({"step": torch.ones(1, 4).double()}, TypeError, "step and centre in float32; got torch.uint8, torch.float64"),
        ({"step": -torch.ones(1, 4)}, ValueError, "finite and at least 0"),
        ({"step": torch.full((1, 4), math.inf)}, ValueError, "finite and at least 0"),
        ({"centre": torch.full((1, 4), math.nan)}, ValueError, "their centres finite"),
        ({"centre": torch.zeros(1, 4, device="meta")}, ValueError, "all on one device; got"),
    ],
)
def test_bits_that_do_not_fit(change, error, words):
    bits = torch.tensor(change.get("bits", [[8, 4, 2, 2]]), dtype=torch.uint8)
    parts = {"bits": bits, "step": torch.ones(bits.shape), "centre": torch.zeros(bits.shape)}
    change = {name: x if x.is_meta else x.to(bits.device) for name, x in change.items() if name != "bits"}
    with pytest.raises(error, match=words) as raised:
        AxisBits(**(parts | change))
    assert "\n" not in str(raised.value)

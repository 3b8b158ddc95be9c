"""Feature bases: no score changes, the moments are what each kind promises, files round-trip."""

import threading

import pytest
import torch

from flashsfa import FeatureBasis, topk_codes
from flashsfa.axes import AxisBits, AxisCodes, AxisErrors
from flashsfa.basis import KINDS, Moments

pytestmark = pytest.mark.cpu  # calibration and its linear algebra
H, G, D = 2, 3, 8


def draw(n=200):
    q, k = (torch.randn(2, h, n, D, dtype=torch.float64) for h in (H * G, H))
    return q @ torch.randn(D, D, dtype=torch.float64), k @ torch.randn(D, D, dtype=torch.float64)


def moments_of(*pairs):
    moments = Moments(H, D)
    for q, k in pairs:
        moments.update(q, k)
    return moments


def scores(q, k):
    return q.unflatten(1, (H, G)) @ k[:, :, None].mT


@pytest.mark.parametrize("kind", KINDS)
def test_scores_unchanged(kind):
    q, k = draw()
    basis = FeatureBasis.from_moments(moments_of((q, k)), kind, topk=3, dense_dims=2)
    expected = scores(q, k)
    gain = (basis.key.mT.double() @ basis.query.double()).diagonal(dim1=-2, dim2=-1)[:, None]  # [H, 1, D]
    found = scores(FeatureBasis(basis.query / gain, basis.key).transform_query(q), basis.transform_key(k))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()  # the basis is kept in float32


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identity"])
def test_a_gain_makes_up_for_what_is_dropped(kind):
    q, k = draw()
    basis = FeatureBasis.from_moments(moments_of((q, k)), kind, topk=2, dense_dims=3)
    gain = basis.key.mT @ basis.query
    torch.testing.assert_close(gain, gain.diagonal(dim1=-2, dim2=-1).diag_embed(), rtol=0, atol=1e-3)
    rows = basis.transform_key(k)
    whole, kept = (x.square().sum((0, 2, 3)) for x in (rows[..., 3:], topk_codes(rows, 2, dense_dims=3).values))
    expected = torch.ones(H, D)
    expected[:, 3:] = (whole / kept).float()[:, None] ** 0.75
    assert (expected[:, 3:] > 1).all()
    torch.testing.assert_close(gain.diagonal(dim1=-2, dim2=-1), expected, rtol=1e-3, atol=1e-3)


def test_streamed_moments_equal_one_shot():
    q, k = draw()
    whole = moments_of((q, k))
    parts = moments_of(*((q[:, :, a:b], k[:, :, a:b]) for a, b in ((0, 1), (1, 77), (77, 200))))
    assert (parts.count, parts.query_count) == (whole.count, whole.query_count) == (400, 400 * G)
    torch.testing.assert_close(parts.key_outer, whole.key_outer)
    torch.testing.assert_close(parts.query_outer, whole.query_outer)
    torch.testing.assert_close(parts.key_sum, whole.key_sum)
    torch.testing.assert_close(whole.key_sum, k.sum((0, 2)))


def test_the_default_device_does_not_matter():
    q, k = draw()
    with torch.device("meta"):
        moments = moments_of((q, k))
        bases = [FeatureBasis.from_moments(moments, kind, topk=3) for kind in KINDS if kind != "identity"]
    for basis in bases:
        assert basis.key.isfinite().all()


@pytest.mark.parametrize("kind", ["whitened", "balanced", "pca"])
def test_moments_in_the_new_coordinates(kind):
    q, k = draw()
    basis = FeatureBasis.from_moments(moments_of((q, k)), kind)
    found = moments_of((basis.transform_query(q), basis.transform_key(k)))
    query, key = found.query_outer / found.query_count, found.key_outer / found.count
    diagonal = key.diagonal(dim1=-2, dim2=-1)
    assert (key - diagonal.diag_embed()).abs().max() <= 1e-4 * key.abs().max()
    assert (diagonal.diff(dim=-1) <= 0).all()  # largest axis first
    if kind == "whitened":
        torch.testing.assert_close(query, torch.eye(D).double().expand(H, D, D), rtol=0, atol=1e-4)
    if kind == "balanced":
        torch.testing.assert_close(query, key, rtol=1e-3, atol=1e-4 * float(key.abs().max()))


@pytest.mark.parametrize("key_bytes", [1, 3, 8])
def test_bits_per_axis_keep_scores(key_bytes):
    """The sides undo one another, axes with more bits come first, and scores are those of dense keys up to their rounding."""
    q, k = draw()
    k = k + 5 * torch.randn(1, H, 1, D)  # a mean that is no rounding of any axis
    basis = FeatureBasis.from_moments(moments_of((q, k)), "whitened", key_bytes=key_bytes)
    basis.check()
    assert basis.axes.key_bytes == key_bytes
    rotated, rows = basis.transform_query(q), basis.transform_key(k)
    assert (scores(rotated, rows) - scores(q, k)).abs().max() <= 1e-4 * scores(q, k).abs().max()
    torch.testing.assert_close(basis.axes.centre, rows.mean((0, 2)).float(), rtol=1e-4, atol=1e-4)
    lost = AxisCodes.encode(rows, basis.axes).to_dense(torch.float64) - rows
    assert (
        lost.square().mean()
        < {1: 0.7, 3: 0.15, 8: 1e-3}[key_bytes] * (rows - rows.mean((0, 2))[:, None]).square().mean()
    )
    # whitened: the error of a key is, over the queries, that of its scores
    torch.testing.assert_close(scores(rotated, lost).square().mean(), lost.square().sum(-1).mean(), rtol=0.1, atol=0)


def test_axes_with_bits_are_principal_about_the_mean():
    q, k = draw()
    k = k + 20 * torch.randn(1, H, 1, D)
    rows = FeatureBasis.from_moments(moments_of((q, k)), "whitened", key_bytes=4).transform_key(k)
    apart = (rows - rows.mean((0, 2))[:, None]).transpose(0, 1).flatten(1, 2)
    spread = apart.mT @ apart
    assert (spread - spread.diagonal(dim1=-2, dim2=-1).diag_embed()).abs().max() <= 1e-4 * spread.abs().max()


def test_dictionary_loses_less_than_its_start():
    """Keys with a hidden sparse structure: whitened axes miss it, the dictionary finds some of it."""
    q = torch.randn(2, H * G, 500, D, dtype=torch.float64)
    k = (
        topk_codes(torch.randn(2, H, 500, D, dtype=torch.float64), 2).to_dense()
        @ torch.linalg.qr(torch.randn(D, D).double())[0]
    )

    def lost(kind):  # score error of dense queries, what the basis is to keep small
        basis = FeatureBasis.from_moments(moments_of((q, k)), kind, topk=2, dense_dims=1)
        kept = topk_codes(basis.transform_key(k), 2, dense_dims=1).to_dense()
        return (scores(basis.transform_query(q), kept) - scores(q, k)).square().mean()

    assert lost("dictionary") < 0.1 * lost("whitened")


def test_sample_is_bounded_and_uniform():
    moments = Moments(1, 1)
    for start in range(0, 20000, 1000):
        token = torch.arange(start, start + 1000.0).view(1, 1, -1, 1)
        moments.update(token, token)
    assert moments.sample.shape == (1, 4096, 1)
    assert moments.sample.unique().numel() == 4096
    assert abs(moments.sample.mean() - 10000) < 500


def test_save_and_load(tmp_path):
    moments = [moments_of(draw()), moments_of(draw())]
    layers = [FeatureBasis.from_moments(x, "balanced") for x in moments]
    stacked = FeatureBasis.from_layers(moments, "balanced")
    stacked.save(tmp_path / "basis.safetensors")
    loaded = FeatureBasis.load(tmp_path / "basis.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["basis.safetensors"]
    for i, layer in enumerate(layers):
        assert torch.equal(loaded[i].query, layer.query)
        assert torch.equal(loaded[i].key, layer.key)


@pytest.mark.parametrize(
    ("kind", "budget"), [("dictionary", {"topk": 2, "dense_dims": 1}), ("whitened", {"key_bytes": 3})]
)
def test_layers_are_fitted_in_order_and_each_is_told(kind, budget):
    """Whatever the number of threads, which is left as it was."""
    given, told = [draw() for _ in range(5)], []
    found, threads, caller = [], torch.get_num_threads(), threading.get_ident()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            moments = [moments_of(x) for x in given]  # which know of no earlier fit
            found.append(
                FeatureBasis.from_layers(moments, kind, **budget, fitted=lambda: told.append(threading.get_ident()))
            )
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert told == [caller] * 10
    for i, x in enumerate(given):
        expected = FeatureBasis.from_moments(moments_of(x), kind, **budget)
        assert torch.equal(found[0][i].key, found[1][i].key)
        torch.testing.assert_close(found[0][i].key, expected.key)


@pytest.mark.parametrize("kind", ["scaled", "whitened"])
def test_other_numbers_of_bytes_follow_from_what_is_known_of_the_axes(kind, monkeypatch):
    """Which is found once, and again when more tokens came."""
    q, k = draw()
    moments, found = moments_of((q, k)), AxisErrors.of
    calls = []
    monkeypatch.setattr(AxisErrors, "of", lambda keys: calls.append(1) or found(keys))
    for key_bytes in (2, 3, 5):
        basis = FeatureBasis.from_moments(moments, kind, key_bytes=key_bytes)
        expected = FeatureBasis.from_moments(moments_of((q, k)), kind, key_bytes=key_bytes)
        for one, other in zip(tensors_of(basis), tensors_of(expected), strict=True):
            assert torch.equal(one, other)
    assert len(calls) == 1 + 3
    moments.update(*draw())
    more = FeatureBasis.from_moments(moments, kind, key_bytes=5)
    assert len(calls) == 5
    assert not torch.equal(more.key, basis.key)


def test_a_layer_that_cannot_be_fitted_is_an_error():
    moments = [moments_of(draw()), Moments(H, D)]
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match="no token was seen"):
        FeatureBasis.from_layers(moments, "whitened")
    assert torch.get_num_threads() == threads


def test_save_and_load_bits_per_axis(tmp_path):
    moments = [moments_of(draw()), moments_of(draw())]
    layers = [FeatureBasis.from_moments(x, "whitened", key_bytes=3) for x in moments]
    FeatureBasis.from_layers(moments, "whitened", key_bytes=3).save(tmp_path / "basis.safetensors")
    loaded = FeatureBasis.load(tmp_path / "basis.safetensors")
    loaded.check()
    assert loaded.axes.bits.shape == (2, H, D)
    for i, layer in enumerate(layers):
        for found, expected in zip(tensors_of(loaded[i]), tensors_of(layer), strict=True):
            assert torch.equal(found, expected)


def tensors_of(basis):
    return [basis.query, basis.key, *basis.axes.tensors()]


ONE = torch.eye(D).expand(H, D, D)
AXES = {"bits": torch.full((H, D), 2, dtype=torch.uint8), "step": torch.ones(H, D), "centre": torch.zeros(H, D)}
WITH_AXES = {"query": ONE, "key": ONE} | {f"axes.{name}": x for name, x in AXES.items()}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no safetensors", "damaged"),
        (b"", "damaged"),
        ({"weights": torch.ones(2)}, "but weights"),
        ({"query": torch.ones(H, D, D)}, "but query"),
        ({"query": torch.ones(H, D, D), "key": torch.ones(H, D, D), "bias": torch.ones(2)}, "but bias, key, query"),
        ({"query": torch.ones(H, D, D), "key": torch.ones(H, D, D + 1)}, r"query is \(2, 8, 8\)"),
        ({"query": torch.ones(D, D), "key": torch.ones(D, D)}, r"\(8, 8\) of torch.float32"),
        ({"query": torch.eye(D).expand(H, D, D).char(), "key": torch.eye(D).expand(H, D, D)}, "torch.int8"),
        ({"query": torch.eye(D).expand(H, D, D), "key": torch.eye(D).expand(H, D, D) > 0}, "torch.bool"),
        ({"query": torch.full((H, D, D), torch.nan), "key": torch.ones(H, D, D)}, "NaN or infinity stands in query"),
        ({"query": torch.ones(H, D, D), "key": torch.full((H, D, D), torch.inf)}, "NaN or infinity stands in key"),
        ({name: x for name, x in WITH_AXES.items() if name != "axes.step"}, "but axes.bits, axes.centre, key, query"),
        ({name: x for name, x in WITH_AXES.items() if name != "key"}, "axes.step, query"),
        (WITH_AXES | {"axes.bits": AXES["bits"] + 1}, "an axis has 0, 2, 4 or 8 bits; got 3"),
        (WITH_AXES | {"axes.bits": AXES["bits"].int()}, "axis bits need bits in uint8"),
        (WITH_AXES | {"axes.step": -AXES["step"]}, "steps of axes must be finite and at least 0"),
        (WITH_AXES | {"axes.centre": AXES["centre"][:1]}, "axis bits need bits, step and centre"),
        (WITH_AXES | {f"axes.{name}": x[:1] for name, x in AXES.items()}, r"axes.bits is \(1, 8\) but key \(2, 8, 8\)"),
    ],
)
def test_broken_file(tmp_path, content, words):
    from safetensors.torch import save_file

    path = tmp_path / "basis.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file({name: x.contiguous() for name, x in content.items()}, path)
    with pytest.raises(ValueError, match=words) as error:
        FeatureBasis.load(path)
    assert f"{path} holds no feature basis" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", ["usual", "one token", "one feature", "zeros", "long axes"])
def test_bases_of_all_kinds_are_sound(kind, keys):
    q, k = draw()
    rows = {"one token": torch.full((D,), 2.0), "one feature": torch.eye(D)[0], "zeros": torch.zeros(D)}
    if keys in rows:
        q, k = (rows[keys].double().expand(1, h, 1, D) for h in (H * G, H))
    if keys == "long axes":
        q, k = q * 1e3, k * torch.logspace(-4, 4, D).double()
    for topk, dense_dims in ((2, 0), (1, 3), (5, 3)):
        FeatureBasis.from_moments(moments_of((q, k)), kind, topk=topk, dense_dims=dense_dims).check(topk, dense_dims)
    if kind != "dictionary":
        FeatureBasis.from_moments(moments_of((q, k)), kind).check(2, 1)
        FeatureBasis.from_moments(moments_of((q, k)), kind).check()
    if kind == "whitened":
        for key_bytes in (1, 5, 8):
            FeatureBasis.from_moments(moments_of((q, k)), kind, key_bytes=key_bytes).check()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda q, k: (q * 0, k * 0), "undo one another"),
        (lambda q, k: (q, 2 * k), "undo one another"),
        (lambda q, k: (-q, k), "undo one another"),
        (lambda q, k: (q.flip(0), k), "undo one another"),
        (lambda q, k: (q.roll(1, -1), k), "undo one another"),
        (lambda q, k: (q, k + 0.01 * k.roll(1, -1)), "undo one another"),
        (lambda q, k: (q * torch.tensor([1, 1, 1, 1.1, 1, 1, 1, 1]), k), "undo one another"),
        (lambda q, k: (q * torch.nan, k), "NaN or infinity"),
        (lambda q, k: (q, k[0]), "must both be"),
        (lambda q, k: (q.int(), k), "float"),
    ],
)
def test_sides_that_do_not_undo_one_another_are_refused(damage, words):
    basis = FeatureBasis.from_moments(moments_of(draw()), "whitened", topk=2, dense_dims=2)
    basis.check(2, 2)
    with pytest.raises((ValueError, TypeError), match=words):
        FeatureBasis(*damage(basis.query, basis.key)).check(2, 2)
    basis = FeatureBasis.from_moments(moments_of(draw()), "whitened", key_bytes=3)
    basis.check()
    with pytest.raises((ValueError, TypeError), match=words):
        FeatureBasis(*damage(basis.query, basis.key), basis.axes).check()


def test_a_gain_of_another_budget_is_refused():
    basis = FeatureBasis.from_moments(moments_of(draw()), "balanced", topk=2, dense_dims=2)
    basis.check(2, 2)
    with pytest.raises(ValueError, match="another budget"):
        basis.check(2, 3)
    unsaid = FeatureBasis(basis.query, basis.key)  # as of a file from before
    with pytest.raises(ValueError, match="another budget"):
        unsaid.check(6, 2)


def test_the_budget_that_a_basis_is_fitted_to_is_kept(tmp_path):
    """A gain of fewer features may be sound for more, and loses for them."""
    moments = [moments_of(draw()), moments_of(draw())]
    FeatureBasis.from_layers(moments, "dictionary", topk=3, dense_dims=1).save(tmp_path / "basis.safetensors")
    loaded = FeatureBasis.load(tmp_path / "basis.safetensors")
    for basis in (loaded, loaded[0]):
        basis.check(3, 1)
        for topk in (2, 4, None):
            with pytest.raises(ValueError, match=f"fitted to codes of topk=3, and fits none of topk={topk}: calibrate"):
                basis.check(topk, 1)


def test_bits_per_axis_fit_no_budget_and_no_gain():
    moments = moments_of(draw())
    basis = FeatureBasis.from_moments(moments, "whitened", key_bytes=3)
    with pytest.raises(ValueError, match="has bits per axis, 3 bytes of a key, and fits no topk=2: calibrate"):
        basis.check(2, 0)
    gained = FeatureBasis.from_moments(moments, "whitened", topk=2)
    for axes in (None, basis.axes):
        with pytest.raises(ValueError, match="or have a gain, which is for top-k alone"):
            FeatureBasis(gained.query, gained.key, axes).check()
    with pytest.raises(
        ValueError, match=r"bits per axis of the basis must be \[..., H, D\] = \(2, 8\), got \(2, 2, 8\)"
    ):
        FeatureBasis(basis.query, basis.key, AxisBits.stack([basis.axes, basis.axes])).check()


@pytest.mark.parametrize("kind", ["dictionary", "whitened", "balanced", "pca"])
@pytest.mark.parametrize("singular", ["one token", "one feature", "zeros"])
def test_singular_moments_warn_and_stay_finite(kind, singular, caplog):
    row = {"one token": torch.full((D,), 2.0), "one feature": torch.eye(D)[0], "zeros": torch.zeros(D)}[singular]
    q, k = (row.expand(1, h, 1, D) for h in (H * G, H))
    basis = FeatureBasis.from_moments(moments_of((q, k)), kind, topk=2)
    assert "nearly singular" in caplog.text
    assert basis.query.isfinite().all()
    assert basis.key.isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match="basis must be one of"):
        FeatureBasis.from_moments(moments_of(draw()), "fourier")
    with pytest.raises(ValueError, match="give topk"):
        FeatureBasis.from_moments(moments_of(draw()))
    with pytest.raises(ValueError, match="no token"):
        FeatureBasis.from_moments(Moments(H, D))
    for kind, options in (("pca", {}), ("dictionary", {}), ("whitened", {"topk": 2}), ("whitened", {"dense_dims": 1})):
        with pytest.raises(
            ValueError, match="key_bytes go with a basis scaled or whitened and without topk and dense_dims; got"
        ):
            FeatureBasis.from_moments(moments_of(draw()), kind, key_bytes=3, **options)
    for key_bytes in (0, D + 1):
        with pytest.raises(ValueError, match=f"key_bytes must be 1 to {D}, got {key_bytes}"):
            FeatureBasis.from_moments(moments_of(draw()), "whitened", key_bytes=key_bytes)


@pytest.mark.parametrize(
    ("basis", "q", "k"),
    [
        ((2, 8, 8), (1, 3, 5, 8), (1, 2, 5, 8)),  # heads that share no kv head
        ((2, 8, 8), (1, 4, 5, 4), (1, 2, 5, 4)),  # smaller heads
        ((2, 8, 8), (1, 4, 5, 8), (2, 5, 8)),  # no batch
        ((3, 2, 8, 8), (1, 4, 5, 8), (1, 2, 5, 8)),  # that of several layers
    ],
    ids=str,
)
def test_rows_that_do_not_fit_a_basis_are_refused(basis, q, k):
    basis, q, k = FeatureBasis(torch.ones(basis), torch.ones(basis)), torch.ones(q), torch.ones(k)
    with pytest.raises(ValueError, match=r"must be \[B, H \* G, N, D\] for a basis \[H, D, D\]"):
        basis.transform(q, k)

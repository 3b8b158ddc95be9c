"""Feature bases: no score changes, the moments are what each kind promises, files round-trip."""

import pytest
import torch

from flashsfa import FeatureBasis
from flashsfa.basis import KINDS, Moments

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
    basis = FeatureBasis.from_moments(moments_of((q, k)), kind)
    expected = scores(q, k)
    found = scores(basis.transform_query(q), basis.transform_key(k))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()  # the basis is kept in float32


def test_streamed_moments_equal_one_shot():
    q, k = draw()
    whole = moments_of((q, k))
    parts = moments_of(*((q[:, :, a:b], k[:, :, a:b]) for a, b in ((0, 1), (1, 77), (77, 200))))
    assert (parts.count, parts.query_count) == (whole.count, whole.query_count) == (400, 400 * G)
    torch.testing.assert_close(parts.key_outer, whole.key_outer)
    torch.testing.assert_close(parts.query_outer, whole.query_outer)


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


def test_save_and_load(tmp_path):
    layers = [FeatureBasis.from_moments(moments_of(draw())), FeatureBasis.identity(H, D)]
    stacked = FeatureBasis.stack(layers)
    stacked.save(tmp_path / "basis.safetensors")
    loaded = FeatureBasis.load(tmp_path / "basis.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["basis.safetensors"]
    for i, layer in enumerate(layers):
        assert torch.equal(loaded[i].query, layer.query)
        assert torch.equal(loaded[i].key, layer.key)


@pytest.mark.parametrize("content", ["junk", "other tensors"])
def test_broken_file(tmp_path, content):
    from safetensors.torch import save_file

    path = tmp_path / "basis.safetensors"
    if content == "junk":
        path.write_bytes(b"no safetensors")
    else:
        save_file({"weights": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="no feature basis"):
        FeatureBasis.load(path)


@pytest.mark.parametrize("kind", ["whitened", "balanced", "pca"])
@pytest.mark.parametrize("singular", ["one token", "zeros"])
def test_singular_moments_warn_and_stay_finite(kind, singular, caplog):
    q, k = (torch.full((1, h, 1, D), 0.0 if singular == "zeros" else 2.0) for h in (H * G, H))
    if singular == "zeros":
        k, q = k + torch.eye(D)[0], q + torch.eye(D)[0]  # all but one feature are always 0
    basis = FeatureBasis.from_moments(moments_of((q, k)), kind)
    assert "nearly singular" in caplog.text
    assert basis.query.isfinite().all()
    assert basis.key.isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match="basis must be one of"):
        FeatureBasis.from_moments(moments_of(draw()), "fourier")
    with pytest.raises(ValueError, match="no token"):
        FeatureBasis.from_moments(Moments(H, D))

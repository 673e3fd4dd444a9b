"""Clusters inside classes: planted ones are found, whatever the scale, the offset and the order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from isthmus.align.subclasses import Subclasses, subclasses
from isthmus.align.subclasses.clustering import Points, graph_spectrum
from isthmus.align.subclasses.coordinates import linear_coordinates, tsne
from isthmus.align.subclasses.counting import estimate_count
from isthmus.base.errors import DataError, NotFiniteError


def planted(
    counts: tuple[int, ...] = (2, 3), size: int = 40, units: int = 12, gap: float = 8.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Make a mixture of Gaussians with so many components in each class: features, classes and components, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    fine = torch.arange(sum(counts)).repeat_interleave(size)
    coarse = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts) * size)
    means = gap * torch.eye(units, dtype=torch.float64)[: sum(counts)]
    features = means[fine] + torch.randn(len(fine), units, generator=generator, dtype=torch.float64)
    order = torch.randperm(len(fine), generator=generator)
    return features[order], coarse[order], fine[order]


def collapsed(features: Tensor, coarse: Tensor) -> Tensor:
    """Put a million times larger class means under the features."""
    directions = torch.randn(int(coarse.max()) + 1, features.shape[1], generator=torch.Generator().manual_seed(9))
    return features + 1e6 * directions.double()[coarse]


def same(found: Subclasses, fine: Tensor) -> bool:
    return adjusted_rand_score(fine.numpy(), found.labels.numpy()) == 1.0


@pytest.mark.parametrize("method", ["kmeans", "mixture", "spectral"])
@pytest.mark.parametrize("project", ["pca", "whiten", "none"])
def test_planted_components_are_found_under_collapse(method: str, project: str) -> None:
    features, coarse, fine = planted((2, 2))
    dims = 2 if project != "none" else None
    how: dict[str, Any] = {"method": method, "project": project, "dims": dims}
    found = subclasses(collapsed(features, coarse), coarse, count=2, progress=False, **how)
    assert same(found, fine)
    assert found.sizes.tolist() == [40] * 4
    assert found.counts.tolist() == [2, 2]
    assert found.classes.tolist() == [0, 0, 1, 1]
    assert bool((found.classes[found.labels] == coarse).all())
    assert [len(found.members(cluster)) for cluster in range(4)] == [40] * 4


def test_spectral_clustering_finds_what_no_line_parts() -> None:
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(240, generator=generator) * 2 * torch.pi
    radius = torch.where(torch.arange(240) % 2 == 0, 1.0, 6.0) + 0.05 * torch.randn(240, generator=generator)
    rings = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    fine = (radius > 3).long()
    assert same(subclasses(rings, 0 * fine, method="spectral", count=2, project="none"), fine)
    assert not same(subclasses(rings, 0 * fine, count=2, project="none"), fine)


def test_tsne_places_every_sample_in_the_plane() -> None:
    features, coarse, fine = planted((2, 2))
    found = subclasses(collapsed(features, coarse), coarse, count=2, project="tsne", perplexity=10)
    assert same(found, fine)
    assert found.places.shape == (160, 2)
    assert bool(found.places.isfinite().all())
    assert found.method == "kmeans in t-SNE"


@pytest.mark.parametrize("method", ["kmeans", "mixture", "spectral", "hdbscan"])
def test_numbers_of_components_are_found(method: str) -> None:
    counts = (1, 2, 3) if method in ("mixture", "hdbscan") else (2, 2, 3)  # a gap of eigenvalues never says one
    features, coarse, fine = planted(counts, size=60)
    how: dict[str, Any] = {"method": method}
    found = subclasses(features, coarse, project="pca", dims=3, largest=5, **how)
    assert found.counts.tolist() == list(counts)
    known = found.labels >= 0
    assert float(known.float().mean()) > 0.9
    assert adjusted_rand_score(fine[known].numpy(), found.labels[known].numpy()) > 0.98
    if method == "hdbscan":
        assert found.criteria == {}
    else:
        assert sorted(found.criteria) == [0, 1, 2]
        assert "number by" in found.method


@pytest.mark.parametrize("criterion", ["silhouette", "gap", "bic", "eigengap"])
@pytest.mark.parametrize("method", ["kmeans", "mixture", "spectral"])
def test_every_criterion_finds_the_number_for_every_method(method: str, criterion: str) -> None:
    features, coarse, fine = planted((3, 4))
    how: dict[str, Any] = {"method": method, "count": criterion}
    found = subclasses(features, coarse, project="pca", dims=4, largest=5, **how)
    assert found.counts.tolist() == [3, 4]
    assert same(found, fine)
    assert [max(values, key=values.__getitem__) for values in found.criteria.values()] == [3, 4]


def test_counts_of_each_class_are_kept_and_a_class_of_one_cluster_is_left_whole() -> None:
    features, coarse, _ = planted((2, 3))
    found = subclasses(features, coarse, count={0: 1, 1: 3}, project="pca", classes=2)
    assert found.counts.tolist() == [1, 3]
    assert found.sizes.tolist() == [80, 40, 40, 40]


def test_names_of_classes_may_have_gaps() -> None:
    features, coarse, fine = planted((2, 2))
    found = subclasses(features, 3 * coarse + 2, count=2, project="pca")
    assert found.names.tolist() == [2, 5]
    assert found.classes.tolist() == [2, 2, 5, 5]
    assert same(found, fine)


def test_a_part_is_clustered_and_the_rest_joins() -> None:
    features, coarse, fine = planted((2, 2), size=100)
    found = subclasses(features, coarse, count=2, project="tsne", limit=60, perplexity=10)
    assert same(found, fine)
    assert int((~found.places[:, 0].isnan()).sum()) == 120
    assert "at most 60 samples" in found.method


def test_the_largest_cluster_of_a_class_comes_first() -> None:
    features, coarse, fine = planted((3,))
    kept = torch.cat([(fine == part).nonzero().flatten()[: 10 * (part + 1)] for part in range(3)])
    found = subclasses(features[kept], coarse[kept], count=3, project="pca")
    assert found.sizes.tolist() == [30, 20, 10]
    assert found.labels.tolist() == (2 - fine[kept]).tolist()


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-6, 1e6), st.floats(-1e4, 1e4))
def test_scale_offset_rotation_and_order_change_nothing(seed: int, scale: float, offset: float) -> None:
    features, coarse, _ = planted((2, 3), size=12, units=6)
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    order = torch.randperm(len(features), generator=generator)
    found = subclasses(features, coarse, count={0: 2, 1: 3}, project="pca", dims=3)
    other = subclasses(
        (features @ turn * scale + scale * offset)[order], coarse[order], count={0: 2, 1: 3}, project="pca", dims=3
    )
    assert adjusted_rand_score(found.labels[order].numpy(), other.labels.numpy()) == 1.0


def test_the_same_seed_gives_the_same_bits() -> None:
    features, coarse, _ = planted((2, 2), gap=1.0)
    one, two = (subclasses(features, coarse, count=3, project="tsne", perplexity=5, limit=60, seed=4) for _ in range(2))
    assert torch.equal(one.labels, two.labels)
    assert torch.equal(one.places.nan_to_num(), two.places.nan_to_num())


def test_coordinates_are_principal_components_of_mean_variance_one() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * torch.arange(1, 7)
    x -= x.mean(0)
    _, _, vt = np.linalg.svd(x.numpy(), full_matrices=False)
    scores = x.numpy() @ vt[:3].T
    found = linear_coordinates(x, "pca", 3).numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(scores) / np.sqrt(np.square(scores).mean()), atol=1e-9)
    white = linear_coordinates(x, "whiten", None)
    np.testing.assert_allclose((white.T @ white / 50).numpy(), np.eye(6), atol=1e-9)
    assert float(linear_coordinates(x, "none", None).square().mean()) == pytest.approx(1.0)
    assert linear_coordinates(torch.cat([x, x], 1), "whiten", 9).shape == (50, 6)


def test_one_dimension_can_be_placed_in_the_plane() -> None:
    places = tsne(np.linspace(0, 1, 20)[:, None], perplexity=30.0, seed=0)
    assert places.shape == (20, 2)
    assert np.isfinite(places).all()


def test_the_laplacian_is_that_of_the_joined_graph() -> None:
    generator = np.random.default_rng(0)
    x = np.concatenate([generator.standard_normal((300, 2)), generator.standard_normal((300, 2)) + 30])
    values, vectors = graph_spectrum(x, 4)  # by Lanczos
    dense, other = graph_spectrum(x[:500], 4)  # densely
    for found, places in ((values, vectors), (dense, other)):
        assert found[0] == pytest.approx(0, abs=1e-9)
        assert 0 < found[1] < 0.3 * found[2]
        np.testing.assert_allclose(places.T @ places, np.eye(4), atol=1e-8)
    parted = vectors[:, 1] > vectors[:, 1].mean()
    assert len(set(parted[:300])) == len(set(parted[300:])) == 1
    assert parted[0] != parted[-1]


def test_the_gap_statistic_says_one_for_what_has_no_clusters() -> None:
    x = np.random.default_rng(3).uniform(size=(200, 2))
    count, values = estimate_count(Points(x, "kmeans", 0), "gap", 6)
    assert count == 1
    assert len(values) == 6


def test_estimates_stop_at_the_largest_number() -> None:
    x = np.random.default_rng(0).standard_normal((60, 2)) + np.repeat([[0.0, 0], [9, 9], [18, 0]], 20, axis=0)
    assert estimate_count(Points(x, "kmeans", 0), "gap", 2)[0] == 2
    assert estimate_count(Points(x, "mixture", 0), "bic", 2)[0] == 2
    assert estimate_count(Points(x[:3], "kmeans", 0), "silhouette", 6)[0] == 2


def test_a_density_without_regions_is_one_cluster() -> None:
    x = np.random.default_rng(0).uniform(size=(40, 2))
    assert set(Points(x, "hdbscan", 0).dense_regions(30)) == {0}


def test_noise_is_in_no_cluster() -> None:
    features, coarse, _ = planted((2,), size=60, units=2, gap=30.0)
    features[:4] = torch.tensor([[400.0, 0.0], [0.0, 400.0], [-400.0, 0.0], [0.0, -400.0]], dtype=torch.float64)
    found = subclasses(features, coarse, method="hdbscan", project="none")
    assert found.labels[:4].tolist() == [-1] * 4
    assert found.counts.tolist() == [2]
    assert int(found.sizes.sum()) < 120


def test_results_are_data_and_can_be_drawn() -> None:
    import matplotlib.pyplot as plt

    features, coarse, fine = planted((2, 2))
    found = subclasses(features, coarse, project="pca", dims=2)
    told = found.to_dict()
    assert told["counts"] == [2, 2]
    assert told["criteria"]["0"]["3"] < told["criteria"]["0"]["2"]
    assert found.method == "kmeans in principal components (2), number by eigengap"
    assert "4 clusters" in repr(found)
    axes = found.plot()
    assert axes.get_title() == f"class 0: {found.method}"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["cluster 0", "cluster 1"]  # pyright: ignore[reportOptionalMemberAccess]
    legend = found.plot(plt.figure().gca(), name=1, fine=fine).get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["fine label 2", "fine label 3"]  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(DataError, match="no class 7; there are 0, 1"):
        found.plot(name=7)
    with pytest.raises(DataError, match="no cluster 4; there are 4"):
        found.members(4)
    plt.close("all")


X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": Y[:5]}, "5 entries, but there are 12 samples"),
        ({"labels": Y.float()}, "expected whole numbers"),
        ({"labels": Y - 1}, "-1 at sample 0; expected whole numbers from 0"),
        ({"classes": 1}, "has 1 at sample 1; expected 0 to 0"),
        ({"classes": 3}, "class 2 has no sample"),
        ({"classes": 0}, "classes is 0"),
        ({"features": X.long()}, "expected floating point"),
        ({"features": [[0.5, 0.1]] * 3, "labels": [True, False, True]}, "expected whole numbers"),
        ({"features": torch.ones(12, 3)}, "class 0: all 6 samples have the same features"),
        ({"count": 7}, "class 0 has 6 samples, fewer than the 7 clusters"),
        ({"count": 0}, "class 0: count is 0"),
        ({"count": {0: 2}}, "no number of clusters for class 1"),
        ({"count": 2.5}, "count is 2.5"),
        ({"count": "elbow"}, "count is 'elbow'; expected a number"),
        ({"count": 2, "method": "hdbscan"}, "chooses the number of clusters by itself"),
        ({"method": "ward"}, "method is 'ward'"),
        ({"project": "umap"}, "project is 'umap'"),
        ({"dims": 0}, "dims is 0"),
        ({"dims": 3, "project": "none"}, "keeps all units"),
        ({"perplexity": 0.0}, "perplexity is 0.0"),
        ({"largest": 1}, "largest is 1"),
        ({"limit": 2}, "limit is 2"),
        ({"features": X[:4], "labels": Y[:4]}, "class 0 has 2 samples; clusters need at least 3"),
    ],
)
def test_bad_input_is_refused(change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"features": X, "labels": Y, **change}
    features, labels = given.pop("features"), given.pop("labels")
    with pytest.raises(DataError, match=message):
        subclasses(features, labels, **given)  # pyright: ignore[reportArgumentType]


def test_nan_is_refused_and_rounding_is_told() -> None:
    bad = X.clone()
    bad[3, 1] = float("nan")
    with pytest.raises(NotFiniteError, match="NaN or infinity"):
        subclasses(bad, Y)
    with pytest.warns(UserWarning, match=r"of classes 0, 1 vary by little more than the rounding"):
        subclasses(X * 1e-7 + 1, Y, count=1, project="pca")

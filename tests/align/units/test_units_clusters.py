"""Clusters of units across two networks, and what the networks share in each."""

from __future__ import annotations

import json
from importlib import import_module
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.linalg import subspace_angles
from scipy.spatial.distance import squareform
from scipy.stats import ortho_group
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.linear_model import LinearRegression
from sklearn.metrics import adjusted_rand_score

from isthmus.align.units.cluster_scores import cluster_scores
from isthmus.align.units.clusters import spectral_clusters
from isthmus.align.units.hierarchy import hierarchical_clusters
from isthmus.align.units.joint import joint_affinity
from isthmus.base.errors import DataError, LayerNotFoundError, NotFiniteError
from isthmus.base.plain import plain
from isthmus.metrics.moments import Moments

module = import_module("isthmus.align.units.clusters")
k_means: Any = KMeans

LAPLACIANS = ("normalised", "random_walk", "unnormalised")
TRUE_A = np.repeat([0, 1, 2], [7, 4, 3])
TRUE_B = np.repeat([0, 1, 2], [6, 5, 2])


def moments(dtype: Any = torch.float64, **layers: Any) -> Moments:
    found = Moments(product_dtype=dtype)
    for start in range(0, len(next(iter(layers.values()))), 97):
        found.update({name: torch.as_tensor(x[start : start + 97]) for name, x in layers.items()})
    return found


def grouped(noise=0.5, n=400, seed=0):
    """Each unit is the factor of its group, up to sign, and noise."""
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((n, 3))
    signs = [rng.choice([-1, 1], len(labels)) for labels in (TRUE_A, TRUE_B)]
    return [factors[:, labels] * sign + noise * rng.standard_normal((n, len(labels))) + 3
            for labels, sign in zip((TRUE_A, TRUE_B), signs, strict=True)]  # fmt: skip


def affinity(m=20, seed=0):
    values = np.random.default_rng(seed).uniform(0, 1, (m, m)) ** 3
    return (values + values.T) / 2


def joined(found):
    return torch.cat([found.labels_a, found.labels_b]).numpy()


def laplacian_of(s, which):
    s = s - np.diag(np.diag(s))
    d = s.sum(1)
    if which == "unnormalised":
        return np.diag(d) - s
    return np.eye(len(s)) - (s / d[:, None] if which == "random_walk" else s / np.sqrt(np.outer(d, d)))


# Joint affinities


@pytest.mark.parametrize("kind", ["absolute", "positive"])
def test_affinities_are_the_joint_correlations(kind):
    x, y = grouped()
    found = joint_affinity(moments(a=x, b=y), "a", "b", kind=kind)
    r = np.corrcoef(np.hstack([x, y]).T)
    np.testing.assert_allclose(found.values, abs(r) if kind == "absolute" else r.clip(0), atol=1e-12)
    assert (found.values == found.values.T).all()
    assert found.joint.tolist() == list(range(27))


def test_units_that_do_not_vary_are_left_out_and_named():
    x, y = grouped()
    x[:, [0, 5]], y[:, 12] = 7, 0
    found = joint_affinity(moments(a=x, b=y), "a", "b")
    r = np.corrcoef(np.hstack([np.delete(x, [0, 5], 1), y[:, :12]]).T)
    np.testing.assert_allclose(found.values, abs(r), atol=1e-12)
    assert (found.constant_a, found.constant_b) == ((0, 5), (12,))
    assert found.joint.tolist() == [i for i in range(26) if i not in (0, 5)]
    for clusters in (spectral_clusters(found, clusters=3), hierarchical_clusters(found, clusters=3)):
        assert (clusters.labels_a == -1).nonzero().flatten().tolist() == [0, 5]
        assert (clusters.labels_b == -1).nonzero().flatten().tolist() == [12]
        assert (clusters.constant_a, clusters.constant_b, clusters.isolated_a) == ((0, 5), (12,), ())


# Spectral clusters


@pytest.mark.parametrize("laplacian", LAPLACIANS)
@pytest.mark.parametrize("assign", ["kmeans", "cluster_qr"])
@pytest.mark.parametrize("noise", [0.3, 0.8])
def test_planted_clusters_are_found_as_by_scikit_learn(laplacian, assign, noise):
    x, y = grouped(noise)
    found = spectral_clusters(moments(a=x, b=y), "a", "b", clusters=3, laplacian=laplacian, assign=assign)
    r = abs(np.corrcoef(np.hstack([x, y]).T))
    theirs = SpectralClustering(3, affinity="precomputed", assign_labels=assign, random_state=0).fit_predict(r)
    assert adjusted_rand_score(joined(found), theirs) == 1
    # the largest cluster comes first, as planted
    assert found.labels_a.tolist() == TRUE_A.tolist()
    assert found.labels_b.tolist() == TRUE_B.tolist()
    assert found.sizes.tolist() == [[7, 6], [4, 5], [3, 2]]
    assert found.labels_a.dtype == found.labels_b.dtype == torch.int64


def test_in_noise_too_it_agrees_with_scikit_learn():
    # k-means has more than one local optimum there; this assignment has none
    for seed in range(5):
        s = affinity(24, seed)
        found = spectral_clusters(s, sizes=(24, 0), clusters=4, laplacian="random_walk", assign="cluster_qr")
        theirs = SpectralClustering(4, affinity="precomputed", assign_labels="cluster_qr").fit_predict(s)
        assert adjusted_rand_score(joined(found), theirs) == 1


def test_places_are_rows_of_the_eigenvectors_of_norm_one():
    s = affinity(40, 7)
    vectors = np.linalg.eigh(laplacian_of(s, "normalised"))[1][:, :5]
    places = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    best = k_means(5, n_init=200, random_state=1).fit(places).inertia_
    labels = joined(spectral_clusters(s, sizes=(20, 20), minimum=5, largest=5))
    ours = sum(((places[labels == c] - places[labels == c].mean(0)) ** 2).sum() for c in range(5))
    assert best <= ours + 1e-9 < 1.03 * best


@pytest.mark.parametrize("laplacian", LAPLACIANS)
@pytest.mark.parametrize("assign", ["kmeans", "cluster_qr"])
def test_a_number_that_was_found_gives_the_same_as_one_that_was_asked_for(laplacian, assign):
    for seed in range(4):
        s = affinity(24, seed)
        found = spectral_clusters(s, sizes=(12, 12), minimum=3, largest=8, laplacian=laplacian, assign=assign)
        asked = spectral_clusters(s, sizes=(12, 12), clusters=found.count, laplacian=laplacian, assign=assign)
        assert joined(found).tolist() == joined(asked).tolist()


@pytest.mark.parametrize("laplacian", LAPLACIANS)
@pytest.mark.parametrize("dense", [True, False])
def test_eigenvalues_are_those_of_the_dense_laplacian(laplacian, dense, monkeypatch):
    if not dense:
        monkeypatch.setattr(module, "_DENSE", 10)
    s = affinity(60)
    found = spectral_clusters(s, sizes=(25, 35), clusters=5, laplacian=laplacian)
    expected = np.sort(np.linalg.eigvals(laplacian_of(s, laplacian)).real)[:6]
    assert found.eigenvalues is not None
    np.testing.assert_allclose(found.eigenvalues, expected, atol=1e-10)
    # the diagonal of the affinity does not count
    other = spectral_clusters(s * (1 - np.eye(60)), sizes=(25, 35), clusters=5, laplacian=laplacian)
    assert joined(other).tolist() == joined(found).tolist()


def test_both_solvers_find_the_same_clusters_also_in_a_graph_of_separate_parts(monkeypatch):
    parts = np.random.default_rng(0).integers(0, 8, 90)
    s = (parts[:, None] == parts) * 0.7
    dense = spectral_clusters(s, sizes=(50, 40))
    monkeypatch.setattr(module, "_DENSE", 10)
    lanczos = spectral_clusters(s, sizes=(50, 40), largest=12)
    assert dense.count == lanczos.count == 8
    assert adjusted_rand_score(joined(dense), parts) == adjusted_rand_score(joined(lanczos), parts) == 1
    assert dense.eigenvalues is not None
    np.testing.assert_allclose(dense.eigenvalues[:8], 0, atol=1e-12)


@pytest.mark.parametrize("cluster", [spectral_clusters, hierarchical_clusters])
def test_the_number_is_found_within_the_range_that_is_searched(cluster):
    found = moments(**dict(zip("ab", grouped(0.3), strict=True)))
    assert cluster(found, "a", "b").count == 3
    assert cluster(found, "a", "b", minimum=4, largest=6).count in (4, 5, 6)
    assert cluster(found, "a", "b", minimum=2, largest=2).count == 2
    assert cluster(found, "a", "b", minimum=60).count == 27
    assert cluster(found, "a", "b", clusters=1).sizes.tolist() == [[14, 13]]
    each = cluster(found, "a", "b", clusters=27)
    assert joined(each).tolist() == list(range(27))


@pytest.mark.parametrize("cluster", [spectral_clusters, hierarchical_clusters])
def test_layers_of_one_unit_can_be_clustered(cluster):
    x, y = grouped()
    found = moments(a=x[:, :1], b=y[:, :1])
    assert cluster(found, "a", "b", clusters=1).sizes.tolist() == [[1, 1]]
    clusters = cluster(found, "a", "b")
    assert clusters.sizes.tolist() == [[1, 0], [0, 1]]
    assert cluster_scores(clusters, found, "a", "b").subspace.isnan().all()


def test_the_gap_is_the_widest():
    s = affinity(30, 1)
    found = spectral_clusters(s, sizes=(10, 20), minimum=3, largest=9)
    values = np.linalg.eigvalsh(laplacian_of(s, "normalised"))
    assert found.count == 3 + np.diff(values)[2:9].argmax()
    assert found.eigenvalues is not None
    assert len(found.eigenvalues) == 10
    hierarchy = hierarchical_clusters(s, sizes=(10, 20), minimum=3, largest=9)
    heights = linkage(squareform(1 - s, checks=False), "average")[:, 2]
    gaps = {k: heights[30 - k] - heights[29 - k] for k in range(3, 10)}
    assert hierarchy.count == max(gaps, key=gaps.__getitem__)


@pytest.mark.parametrize("cluster", [spectral_clusters, hierarchical_clusters])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_clusters_follow_the_units(cluster, seed):
    rng = np.random.default_rng(seed)
    x, y = grouped(0.6)
    order_a, order_b = rng.permutation(14), rng.permutation(13)
    plain = cluster(moments(a=x, b=y), "a", "b", clusters=3)
    moved = cluster(moments(a=x[:, order_a], b=y[:, order_b] * rng.uniform(0.1, 10, 13)), "a", "b", clusters=3)
    assert moved.labels_a.tolist() == plain.labels_a[order_a].tolist()
    assert moved.labels_b.tolist() == plain.labels_b[order_b].tolist()


def test_equal_seeds_give_equal_clusters():
    s = affinity(40, 5)
    first, second = (spectral_clusters(s, sizes=(20, 20), clusters=6, seed=3) for _ in range(2))
    assert joined(first).tolist() == joined(second).tolist()


def test_a_unit_without_affinities_belongs_to_no_cluster():
    x, y = grouped(0.3)
    s = abs(np.corrcoef(np.hstack([x, y]).T))
    for unit in (2, 20):
        s[unit] = s[:, unit] = 0
        s[unit, unit] = 1
    for laplacian in LAPLACIANS:
        found = spectral_clusters(s, sizes=(14, 13), laplacian=laplacian)
        assert (found.isolated_a, found.isolated_b) == ((2,), (6,))
        assert found.count == 3
        rest = [i for i in range(27) if i not in (2, 20)]
        assert adjusted_rand_score(joined(found)[rest], np.r_[TRUE_A, TRUE_B][rest]) == 1
        assert found.eigenvalues is not None
        assert found.eigenvalues.isfinite().all()
        assert sorted(found.order.tolist()) == rest
    # at distance 1 from all, each joins last, alone
    hierarchy = hierarchical_clusters(s, sizes=(14, 13), clusters=5)
    assert hierarchy.sizes.tolist()[3:] == [[1, 0], [0, 1]]
    assert hierarchy.isolated_a == ()


def test_order_and_members_show_the_blocks():
    x, y = grouped(0.5)
    x[:, 3] = 0
    found = spectral_clusters(moments(a=x, b=y), "a", "b", clusters=3)
    labels = joined(found)
    order = found.order.tolist()
    assert sorted(order) == [i for i in range(27) if i != 3]
    assert (np.diff(labels[order]) >= 0).all()
    joint = np.hstack([x, y])
    for cluster in range(3):
        units_a, units_b = (units.tolist() for units in found.members(cluster))
        inside = [i for i in order if labels[i] == cluster]
        assert sorted(inside[: len(units_a)]) == units_a
        assert sorted(inside[len(units_a) :]) == [14 + unit for unit in units_b]
        # the closest first
        close = abs(np.corrcoef(joint[:, inside].T)).sum(1)
        assert (np.diff(close[: len(units_a)]) <= 1e-12).all()
        assert (np.diff(close[len(units_a) :]) <= 1e-12).all()
    with pytest.raises(DataError, match="no cluster 3"):
        found.members(3)


def test_the_picture_shows_a_block_for_each_cluster():
    import matplotlib.pyplot as plt

    found = spectral_clusters(moments(**dict(zip("ab", grouped(), strict=True))), "a", "b", clusters=3)
    ax: Any = found.plot()
    assert [patch.get_width() for patch in ax.patches] == found.sizes.sum(1).tolist()
    drawn = np.asarray(ax.images[0].get_array())
    starts = np.cumsum([0, *found.sizes.sum(1).tolist()])
    for start, end in pairwise(starts):
        rest = [i for i in range(27) if not start <= i < end]
        assert drawn[start:end, start:end].min() > drawn[start:end, rest].max()
    again = hierarchical_clusters(affinity(8), sizes=(4, 4)).plot(ax)
    assert again is ax
    plt.close("all")


def test_results_are_plain_for_a_file():
    x, y = grouped()
    found = moments(a=x, b=y)
    for clusters in (spectral_clusters(found, "a", "b"), hierarchical_clusters(found, "a", "b")):
        content = json.loads(json.dumps(clusters.to_dict(), allow_nan=False))
        assert content["labels_a"] == clusters.labels_a.tolist()
        assert (content["linkage"] is None) == (content["eigenvalues"] is not None)
        scores = cluster_scores(clusters, found, "a", "b")
        content = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
        assert [row["units_a"] for row in content["clusters"]] == scores.units_a.tolist()
    assert plain([np.float64("inf"), None, "x", np.arange(2)]) == [None, None, "x", [0, 1]]


SQUARE = np.ones((4, 4))


@pytest.mark.parametrize("cluster", [spectral_clusters, hierarchical_clusters])
@pytest.mark.parametrize(
    ("values", "options", "error", "message"),
    [
        (SQUARE, {}, DataError, r"\(4, 4\), sizes is None"),
        (SQUARE, {"sizes": (2, 3)}, DataError, "square matrix"),
        (SQUARE, {"sizes": (-1, 5)}, DataError, "square matrix"),
        (SQUARE[:3], {"sizes": (2, 2)}, DataError, r"\(3, 4\)"),
        (SQUARE - 2 * np.eye(4), {"sizes": (2, 2)}, DataError, "negative"),
        (SQUARE + np.triu(SQUARE), {"sizes": (2, 2)}, DataError, "not symmetric"),
        (SQUARE * np.nan, {"sizes": (2, 2)}, NotFiniteError, "NaN"),
        (SQUARE, {"sizes": (2, 2), "clusters": 5}, DataError, "clusters is 5, but 4"),
        (SQUARE, {"sizes": (2, 2), "clusters": 0}, DataError, "clusters is 0"),
        (SQUARE, {"sizes": (2, 2), "minimum": 0}, DataError, "minimum is 0"),
        (SQUARE, {"sizes": (2, 2), "minimum": 3, "largest": 2}, DataError, "minimum=3 to largest=2"),
        (SQUARE, {"sizes": (2, 2), "a": "x"}, DataError, "named beside a matrix"),
    ],
)
def test_what_cannot_be_clustered_is_refused(cluster, values, options, error, message):
    with pytest.raises(error, match=message):
        cluster(values, **options)


@pytest.mark.parametrize("cluster", [spectral_clusters, hierarchical_clusters])
def test_moments_that_cannot_be_clustered_are_refused(cluster):
    x, y = grouped()
    found = moments(a=x, b=y, dead=x * 0)
    for arguments, error, message in (
        (("a",), DataError, "name two layers"),
        (("a", "c"), LayerNotFoundError, "'c'"),
        (("a", "dead"), DataError, "none of the 14 units of b"),
    ):
        with pytest.raises(error, match=message):
            cluster(found, *arguments)
    with pytest.raises(DataError, match="leave it out"):
        cluster(found, "a", "b", sizes=(14, 13))
    with pytest.raises(DataError, match="absolute, positive"):
        cluster(found, "a", "b", kind="signed")
    few = Moments([("a", "b")])
    few.update({"a": torch.tensor(x), "b": torch.tensor(y)})
    with pytest.raises(LayerNotFoundError, match="were not kept"):
        cluster(few, "a", "b")


def test_unknown_choices_are_refused():
    unknown: Any = "ward"
    with pytest.raises(DataError, match="laplacian is 'ward'"):
        spectral_clusters(SQUARE, sizes=(2, 2), laplacian=unknown)
    with pytest.raises(DataError, match="assign is 'ward'"):
        spectral_clusters(SQUARE, sizes=(2, 2), assign=unknown)
    with pytest.raises(DataError, match="nothing to cluster"):
        spectral_clusters(np.eye(3), sizes=(2, 1))
    with pytest.raises(DataError, match="linkage is 'ward'"):
        hierarchical_clusters(SQUARE, sizes=(2, 2), linkage=unknown)
    with pytest.raises(DataError, match="at most 1"):
        hierarchical_clusters(SQUARE * 2, sizes=(2, 2))
    with pytest.raises(DataError, match="two units or more"):
        hierarchical_clusters(SQUARE[:1, :1], sizes=(1, 0))


# Hierarchical clusters


@pytest.mark.parametrize("method", ["single", "complete", "average", "weighted"])
@pytest.mark.parametrize("count", [2, 3, 7, 19])
def test_hierarchies_are_those_of_scipy(method, count):
    s = affinity(20, 2)
    given = torch.tensor(s)
    found = hierarchical_clusters(given, sizes=(8, 12), clusters=count, linkage=method)
    tree = linkage(squareform(1 - s, checks=False), method)
    assert found.linkage is not None
    np.testing.assert_allclose(found.linkage, tree)
    assert found.count == count
    assert adjusted_rand_score(joined(found), fcluster(tree, count, "maxclust")) == 1
    assert (given == torch.tensor(s)).all()


def test_equal_heights_still_give_the_number_asked_for():
    found = hierarchical_clusters(SQUARE * 0.5, sizes=(2, 2), clusters=3)
    assert found.count == 3
    assert sorted(found.sizes.sum(1).tolist()) == [1, 1, 2]


# What is shared in a cluster


def labelled(labels_a, labels_b):
    """Clusters with given labels: of a graph of separate parts."""
    labels = np.r_[labels_a, labels_b]
    same = (labels[:, None] == labels) * 1.0
    return spectral_clusters(same, sizes=(len(labels_a), len(labels_b)), clusters=len(set(labels.tolist())))


def test_scores_are_what_the_samples_give():
    rng = np.random.default_rng(0)
    labels_a, labels_b = np.repeat([0, 1, 2], [5, 4, 3]), np.repeat([0, 1, 2], [6, 3, 2])
    mixed = rng.standard_normal((60, 23)) @ rng.standard_normal((23, 23))
    x, y = mixed[:, :12] + 5, mixed[:, 12:]
    clusters = labelled(labels_a, labels_b)
    assert clusters.labels_a.tolist() == labels_a.tolist()
    found = cluster_scores(clusters, moments(a=x, b=y), "a", "b")
    r = abs(np.corrcoef(np.hstack([x, y]).T))
    for c in range(3):
        in_a, in_b = labels_a == c, labels_b == c
        inside = np.r_[in_a, in_b]

        def off(values):
            return values[~np.eye(len(values), dtype=bool)].mean()

        xc, yc = ((z - z.mean(0))[:, chosen] for z, chosen in ((x, in_a), (y, in_b)))
        cosines = np.sort(np.cos(subspace_angles(xc, yc)))[::-1]
        between = r[:12, 12:][in_a][:, in_b]
        few, many = (between, between.T)[:: 1 if len(between) <= between.shape[1] else -1]
        best = max(
            sum(few[i, j] ** 2 for i, j in enumerate(order)) for order in permutations(range(many.shape[0]), len(few))
        )
        squares = [LinearRegression().fit(u, v[:, i]).score(u, v[:, i])
                   for u, v in ((yc, xc), (xc, yc)) for i in range(v.shape[1])]  # fmt: skip
        f, g = in_a.sum() / 12, in_b.sum() / 11
        expected = {
            "units_a": in_a.sum(),
            "units_b": in_b.sum(),
            "evenness": 1 - abs(f - g) / (f + g),
            "within": off(r[inside][:, inside]),
            "within_a": off(r[:12, :12][in_a][:, in_a]),
            "within_b": off(r[12:, 12:][in_b][:, in_b]),
            "between": between.mean(),
            "outside": r[inside][:, ~inside].mean(),
            "dimensions_a": in_a.sum(),
            "dimensions_b": in_b.sum(),
            "subspace": (cosines**2).mean(),
            "chance": max(in_a.sum(), in_b.sum()) / 59,
            "explained": np.mean(squares),
            "one_to_one": best / len(few),
            "basis_gap": (cosines**2).mean() - best / len(few),
        }
        row = found.rows()[c]
        assert row.pop("cluster") == c
        assert row == pytest.approx(expected, abs=1e-9)
        np.testing.assert_allclose(found.cosines[c], cosines, atol=1e-7)
    assert found.samples == 60


def test_a_turned_basis_spans_the_same_subspace_with_other_units():
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1, 2], [8, 6, 4])
    # units of a cluster overlap, those of different clusters do not
    common = rng.standard_normal((3000, 3))[:, labels]
    x = 0.9 * common + rng.standard_normal((3000, 18))
    turned, moved = np.empty_like(x), np.empty_like(x)
    for c in range(3):
        units = np.flatnonzero(labels == c)
        turned[:, units] = x[:, units] @ ortho_group.rvs(len(units), random_state=c)
        moved[:, units] = x[:, rng.permutation(units)]
    noise = 0.02 * rng.standard_normal((2, *x.shape))
    found = moments(a=x, turned=turned + noise[0], moved=moved + noise[1])
    for layer, low, high in (("turned", 0.2, 1), ("moved", -1e-3, 0.01)):
        scores = cluster_scores(labelled(labels, labels), found, "a", layer)
        assert (scores.subspace > 0.99).all()
        assert (scores.corrected > 0.99).all()
        assert ((scores.basis_gap >= low) & (scores.basis_gap < high)).all()
        assert (scores.evenness == 1).all()
    # permuted units are found without being told; R² never falls short of the best single unit
    clusters = spectral_clusters(found, "a", "moved", clusters=3)
    assert adjusted_rand_score(joined(clusters), np.r_[labels, labels]) == 1
    scores = cluster_scores(clusters, found, "a", "moved")
    assert (scores.explained >= scores.one_to_one).all()


def test_unrelated_units_share_as_much_as_chance_says():
    rng = np.random.default_rng(2)
    clusters = labelled(np.zeros(6, int), np.zeros(9, int))
    pairs = [moments(a=rng.standard_normal((40, 6)), b=rng.standard_normal((40, 9))) for _ in range(60)]
    scores = [cluster_scores(clusters, pair, "a", "b") for pair in pairs]
    assert scores[0].chance.tolist() == [9 / 39]
    shared = [float(each.subspace) for each in scores]
    assert np.mean(shared) == pytest.approx(9 / 39, abs=4 * np.std(shared) / np.sqrt(60))
    assert np.std(shared) < 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_units_that_depend_on_each_other_add_no_dimension(dtype):
    rng = np.random.default_rng(3)
    base = rng.standard_normal((500, 3)).astype(np.float32)
    x = np.hstack([base, base[:, :1] - base[:, 1:2], 4 * base])
    y = base @ rng.standard_normal((3, 5)).astype(np.float32)
    found = cluster_scores(labelled([0] * 7, [0] * 5), moments(dtype, a=x, b=y), "a", "b")
    assert (found.dimensions_a.tolist(), found.dimensions_b.tolist()) == ([3], [3])
    assert found.subspace.tolist() == pytest.approx([1], abs=1e-4)
    assert found.cosines[0].max() <= 1


def test_a_cluster_of_one_network_has_no_angles():
    x, y = grouped()
    clusters = labelled([0] * 8 + [1] * 6, [0] * 13)
    scores = cluster_scores(clusters, moments(a=x, b=y), "a", "b")
    assert scores.evenness.tolist()[1] == 0
    for name in ("between", "within_b", "subspace", "chance", "explained", "one_to_one", "basis_gap", "corrected"):
        assert getattr(scores, name)[1].isnan()
        assert not getattr(scores, name)[0].isnan()
    assert scores.dimensions_b.tolist() == [13, 0]
    assert len(scores.cosines[1]) == 0


def test_units_that_are_constant_on_the_scored_samples_are_named():
    x, y = grouped()
    clusters = spectral_clusters(moments(a=x, b=y), "a", "b", clusters=3)
    x[:, 8], y[:, [11, 12]] = 1, 0
    scores = cluster_scores(clusters, moments(a=x, b=y), "a", "b")
    assert (scores.constant_a, scores.constant_b) == ((8,), (11, 12))
    assert scores.units_b.tolist() == [6, 5, 2]
    assert scores.dimensions_a.tolist() == [7, 3, 3]
    assert scores.subspace[2].isnan()
    keep = [i for i in range(14) if i != 8]
    rest = cluster_scores(labelled(TRUE_A[keep], TRUE_B[:11]), moments(a=x[:, keep], b=y[:, :11]), "a", "b")
    torch.testing.assert_close(scores.subspace[:2], rest.subspace[:2])
    torch.testing.assert_close(scores.within[:2], rest.within[:2])


def test_few_samples_are_warned_about():
    rng = np.random.default_rng(4)
    clusters = labelled([0] * 12, [0] * 4)
    with pytest.warns(UserWarning, match="layer 'a' has 12 units but 10 samples: in one cluster") as caught:
        found = cluster_scores(
            clusters, moments(a=rng.standard_normal((10, 12)), b=rng.standard_normal((10, 4))), "a", "b"
        )
    assert caught[0].filename == __file__
    assert found.dimensions_a.tolist() == [9]
    assert found.subspace.tolist() == pytest.approx([1])
    assert found.chance.tolist() == [1]
    assert found.corrected.isnan().all()


def test_scores_need_the_layers_that_were_clustered():
    x, y = grouped()
    clusters = labelled(TRUE_A, TRUE_B)
    with pytest.raises(DataError, match="'b' has 14 units, but 13"):
        cluster_scores(clusters, moments(a=x, b=x), "a", "b")
    with pytest.raises(LayerNotFoundError):
        cluster_scores(clusters, moments(a=x, b=y), "a", "c")

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from isthmus.base.errors import DataError, NotFiniteError
from isthmus.metrics import neighbours as module
from isthmus.metrics.neighbours import MutualKNN, mutual_knn

METRICS = ("cosine", "euclidean")


def pair(n=40, p=6, q=9, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)) + 0.5
    return x, x @ rng.standard_normal((p, q)) + rng.standard_normal((n, q)) - 0.5


def oracle(x, y, k, metric):
    a, b = (
        NearestNeighbors(n_neighbors=k, metric=metric, algorithm="brute").fit(z).kneighbors(return_distance=False)
        for z in (x, y)
    )
    return np.mean([len(set(i) & set(j)) / k for i, j in zip(a, b, strict=True)])


def with_random_ties(x, y, k, repeats, seed=0):
    """The definition, with ties broken at random in each representation."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(repeats):
        chosen = []
        for z in (x, y):
            distances = ((z[:, None] - z[None]) ** 2).sum(2)
            np.fill_diagonal(distances, np.inf)
            chosen.append([set(np.lexsort((rng.random(len(z)), row))[:k]) for row in distances])
        found.append(np.mean([len(a & b) / k for a, b in zip(*chosen, strict=True)]))
    return np.mean(found)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 5, 38, 39])
@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_agrees_with_scikit_learn(metric, k, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    x, y = pair()
    assert mutual_knn(x, y, k=k, metric=metric) == pytest.approx(oracle(x, y, k, metric), abs=1e-15)
    assert mutual_knn(y, x, k=k, metric=metric) == pytest.approx(oracle(x, y, k, metric), abs=1e-15)
    assert mutual_knn(x, x, k=k, metric=metric) == 1


def test_ten_neighbours_by_cosine_unless_said_otherwise():
    x, y = pair(n=200)
    assert mutual_knn(x, y) == oracle(x, y, 10, "cosine")
    assert MutualKNN().estimator == "share of 10 nearest neighbours in common, cosine"


def test_unrelated_representations_are_at_chance():
    x, y = torch.randn(2, 1500, 8, generator=torch.Generator().manual_seed(0))
    assert mutual_knn(x, y, k=50) == pytest.approx(50 / 1499, abs=0.003)


def test_an_offset_costs_no_neighbours():
    x, y = pair(n=100)
    x, y = np.round(x * 1024) / 1024, np.round(y * 1024) / 1024  # exact after the offset
    value = mutual_knn(x + 2**20, y - 2**20, metric="euclidean")
    assert value == oracle(x, y, 10, "euclidean")


@pytest.mark.parametrize("k", [2, 7])
def test_ties_count_as_on_average_over_random_order(k):
    rng = np.random.default_rng(1)
    x, y = rng.integers(0, 3, (16, 2)).astype(float), rng.integers(0, 3, (16, 2)).astype(float)
    y[:8] = x[:8]
    expected = with_random_ties(x, y, k, 1500)
    assert mutual_knn(x, y, k=k, metric="euclidean") == pytest.approx(expected, abs=0.01)


def test_ties_do_not_depend_on_the_order_of_samples():
    rng = np.random.default_rng(2)
    x, y = rng.integers(0, 3, (30, 2)) + 1.0, rng.integers(0, 3, (30, 2)) + 1.0
    order = rng.permutation(30)
    for metric in METRICS:
        value = mutual_knn(x, y, k=4, metric=metric)
        assert mutual_knn(x[order], y[order], k=4, metric=metric) == pytest.approx(value, abs=1e-14)


def test_duplicates_are_not_agreement():
    # All samples but a few coincide in both: which are neighbours is chance, and the order must not decide.
    x, y = np.ones((400, 3)), np.ones((400, 3))
    x[:2] += np.eye(3)[:2]
    y[-2:] += np.eye(3)[:2]
    assert mutual_knn(x, y, k=10, metric="euclidean") < 0.06


def test_a_representation_without_neighbours_is_undefined():
    x, y = pair()
    with pytest.warns(UserWarning, match="x does not vary over the samples"):
        assert math.isnan(mutual_knn(np.full_like(x, 0.1), y))
    with pytest.warns(UserWarning, match="y does not vary"):
        assert math.isnan(mutual_knn(x, np.zeros_like(y), metric="euclidean"))
    x[[4, 7]] = 0
    with pytest.warns(UserWarning, match="NaN") as said:
        assert math.isnan(mutual_knn(x, y))
    assert "2 of 40 samples are zero in every unit (4, 7)" in str(said[0].message)
    assert "metric='euclidean'" in str(said[0].message)
    assert mutual_knn(x, y, metric="euclidean") > 0
    x[:20] = 0
    with pytest.warns(UserWarning, match=r"20 of 40 .* 7, …\)"):
        state = MutualKNN().prepare(torch.tensor(x))
    rest = torch.arange(20, 40)
    index = MutualKNN(3)
    value = index.score(index.taken(state, rest), index.prepare(torch.tensor(y[20:])))
    assert value == pytest.approx(oracle(x[20:], y[20:], 3, "cosine"))
    again = index.taken(state, torch.arange(40))
    assert math.isnan(index.score(again, again))


@pytest.mark.parametrize("metric", METRICS)
def test_taken_is_the_state_of_these_rows(metric):
    x, y = map(torch.tensor, pair())
    x[5:9] = x[4]  # ties
    index = MutualKNN(4, metric)
    a, b = index.prepare(x), index.prepare(y)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert index.score(index.taken(a, order), b) == pytest.approx(index(x[order], y), abs=1e-14)
    assert index.score(index.taken(a, order), index.taken(b, order)) == pytest.approx(index(x, y), abs=1e-14)
    some = order[:17]
    value = index.score(index.taken(index.taken(a, order), some), index.taken(b, some))
    assert value == pytest.approx(index(x[order][some], y[some]), abs=1e-14)


def test_all_pairs_of_layers():
    x, y = map(torch.tensor, pair())
    index = MutualKNN(5)
    states = [index.prepare(layer) for layer in (x, y, x.square())]
    values = index.scores(states[:2], states)
    truth = [[oracle(a.numpy(), b.numpy(), 5, "cosine") for b in (x, y, x.square())] for a in (x, y)]
    np.testing.assert_allclose(values, truth, atol=1e-14)


def test_values_far_from_one_stay_within_range():
    x, y = pair()
    for metric in METRICS:
        value = mutual_knn(x * 1e200, y * 1e-200, k=5, metric=metric)
        assert value == pytest.approx(oracle(x, y, 5, metric), abs=1e-15)


CHANGES = {
    "orthogonal": lambda x, rng: x @ np.linalg.qr(rng.standard_normal((x.shape[1],) * 2))[0],
    "scaling": lambda x, rng: x * rng.uniform(0.1, 10),
    "linear": lambda x, rng: x @ (rng.standard_normal((x.shape[1],) * 2) + np.diag(10.0 ** np.arange(x.shape[1]))),
    "permutation": lambda x, rng: x[:, rng.permutation(x.shape[1])],
    "translation": lambda x, rng: x + 3 * rng.standard_normal(x.shape[1]),
}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20))
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("metric", METRICS)
def test_invariances(metric, change, seed):
    x, y = pair(n=80, seed=seed)
    index = MutualKNN(10, metric)
    changed = CHANGES[change](x, np.random.default_rng(seed))
    if getattr(index.invariances, change):
        assert index(changed, y) == pytest.approx(index(x, y), abs=1e-14)
    else:  # beside itself, where any other neighbour shows
        assert index(changed, x) < 1


def test_wrong_input_is_refused():
    x, y = pair()
    with pytest.raises(DataError, match="mutual_knn needs at least 41"):
        mutual_knn(x, y, k=40)
    with pytest.raises(DataError, match=r"\(40, 6\) has 40 samples; 40 neighbours need 41"):
        MutualKNN(40).prepare(torch.tensor(x))
    for k in (0, 2.5):
        with pytest.raises(DataError, match="expected a number of neighbours"):
            MutualKNN(k)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="metric is 'l1'"):
        mutual_knn(x, y, metric="l1")  # pyright: ignore[reportArgumentType]
    x[0, 0] = np.inf
    with pytest.raises(NotFiniteError):
        mutual_knn(x, y)

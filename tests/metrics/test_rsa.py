from __future__ import annotations

import math
from importlib import import_module

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import pdist, squareform

from isthmus.base.errors import DataError, NotFiniteError
from isthmus.metrics.rsa import RSA, rdm, rsa

# The package has a function of this name in place of the module.
module = import_module("isthmus.metrics.rsa")

DISSIMILARITIES = ("correlation", "euclidean", "cosine")
COMPARISONS = ("spearman", "pearson", "kendall", "cosine")


def pair(n=14, p=6, q=9, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)) + 0.3
    return x, x @ rng.standard_normal((p, q)) + rng.standard_normal((n, q)) - 0.2


def oracle(x, y, dissimilarity, comparison):
    a, b = pdist(x, dissimilarity), pdist(y, dissimilarity)
    if comparison == "cosine":
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    return {"spearman": stats.spearmanr, "pearson": stats.pearsonr, "kendall": stats.kendalltau}[comparison](
        a, b
    ).statistic


def test_golden_value():
    rng = np.random.RandomState(1337)
    x = rng.randn(100, 10)
    y = rng.randn(100, 10) + x
    assert rsa(x, y) == pytest.approx(0.472440, abs=5e-7)


@pytest.mark.parametrize("dissimilarity", DISSIMILARITIES)
@pytest.mark.parametrize("comparison", COMPARISONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_scipy(dissimilarity, comparison, seed):
    x, y = pair(seed=seed)
    value = rsa(x, y, dissimilarity=dissimilarity, comparison=comparison)
    assert value == pytest.approx(oracle(x, y, dissimilarity, comparison), abs=1e-12)
    assert value == pytest.approx(rsa(y, x, dissimilarity=dissimilarity, comparison=comparison), abs=1e-14)
    assert rsa(x, x, dissimilarity=dissimilarity, comparison=comparison) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("dissimilarity", DISSIMILARITIES)
@pytest.mark.parametrize("block", [1, 1 << 22])
def test_matrix_agrees_with_scipy(dissimilarity, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    x = pair(n=23)[0] * 7
    found = rdm(x, dissimilarity)
    np.testing.assert_allclose(found, squareform(pdist(x, dissimilarity)), rtol=1e-12, atol=1e-15)
    assert torch.equal(found, found.T)


def test_ties_share_their_rank():
    # Coarse values: many distances are equal.
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 3, (12, 2)).astype(float), rng.integers(0, 3, (12, 2)).astype(float)
    for comparison in ("spearman", "kendall"):
        value = rsa(x, y, dissimilarity="euclidean", comparison=comparison)
        assert value == pytest.approx(oracle(x, y, "euclidean", comparison), abs=1e-12)


@pytest.mark.parametrize("offset", [1e4, 1e7])
def test_neither_an_offset_nor_near_duplicates_cost_digits(offset):
    rng = np.random.default_rng(0)
    centres = rng.integers(-512, 512, (3, 5)) / 64
    # Differences of 2^-20 within three groups; all sums are exact in float64.
    x = np.repeat(centres, 6, 0) + rng.integers(-8, 8, (18, 5)) * 2.0**-20
    truth = squareform(pdist(x, "euclidean"))
    found = rdm(x + offset, "euclidean").numpy()
    np.testing.assert_allclose(found, truth, rtol=1e-7 if offset == 1e7 else 1e-9)


def test_equal_samples_are_at_distance_zero():
    x = pair(n=8)[0]
    x = np.concatenate([x, x])
    for dissimilarity in DISSIMILARITIES:
        distances = rdm(x, dissimilarity)
        assert (distances.diagonal(8) == 0).all()
    assert (rdm(np.full((4, 3), 0.1), "euclidean") == 0).all()


def test_large_and_small_values_stay_within_range():
    x, y = pair()
    for dissimilarity in DISSIMILARITIES:
        truth = oracle(x, y, dissimilarity, "spearman")
        assert rsa(x * 1e200, y * 1e-200, dissimilarity=dissimilarity) == pytest.approx(truth, abs=1e-12)
    np.testing.assert_allclose(rdm(x * 1e200, "euclidean"), squareform(pdist(x)) * 1e200, rtol=1e-12)


@pytest.mark.parametrize(("dissimilarity", "row"), [("correlation", 0.7), ("correlation", 0.0), ("cosine", 0.0)])
def test_a_sample_without_distances_is_named(dissimilarity, row):
    x, y = pair()
    x[3] = row
    with pytest.warns(UserWarning, match="rsa is NaN") as said:
        assert math.isnan(rsa(x, y, dissimilarity=dissimilarity))
    assert "1 of 14 samples" in str(said[0].message)
    assert "(3)" in str(said[0].message)
    assert "dissimilarity='euclidean'" in str(said[0].message)
    with pytest.warns(UserWarning, match=r"rows of the RDM are NaN: 1 of 14"):
        found = rdm(x, dissimilarity)
    others = [i for i in range(14) if i != 3]
    assert found[3].isnan().all()
    assert found[:, 3].isnan().all()
    np.testing.assert_allclose(found[others][:, others], squareform(pdist(x[others], dissimilarity)), atol=1e-13)
    with pytest.warns(UserWarning, match="rsa is NaN"):
        state = RSA(dissimilarity).prepare(torch.tensor(x))
    index = RSA(dissimilarity)
    rest = index.taken(state, torch.tensor(others))
    left = index.prepare(torch.tensor(y[others]))
    assert index.score(rest, left) == pytest.approx(oracle(x[others], y[others], dissimilarity, "spearman"), abs=1e-12)


def test_many_samples_without_distances_are_counted():
    with pytest.warns(UserWarning, match=r"20 of 20 samples have the same value in every unit \(0, 1, .*, …\)"):
        rdm(torch.arange(20.0)[:, None])


@pytest.mark.parametrize("comparison", ["spearman", "pearson", "kendall"])
def test_distances_that_do_not_vary_are_undefined(comparison):
    x, y = pair(n=9)
    for alike in (np.eye(9), np.ones((9, 4))):
        with pytest.warns(UserWarning, match="rsa is NaN"):
            assert math.isnan(rsa(alike, y, dissimilarity="euclidean", comparison=comparison))
        with pytest.warns(UserWarning, match="rsa is NaN"):
            assert math.isnan(rsa(x, alike, dissimilarity="euclidean", comparison=comparison))


def test_cosine_of_equal_distances_is_defined():
    y = pair(n=9)[1]
    value = rsa(np.eye(9), y, dissimilarity="euclidean", comparison="cosine")
    assert value == pytest.approx(oracle(np.eye(9), y, "euclidean", "cosine"), abs=1e-12)


@pytest.mark.parametrize("comparison", COMPARISONS)
@pytest.mark.parametrize("dissimilarity", ["correlation", "euclidean"])
def test_taken_is_the_state_of_these_rows(dissimilarity, comparison):
    x, y = map(torch.tensor, pair())
    index = RSA(dissimilarity, comparison)
    a, b = index.prepare(x), index.prepare(y)
    for rows in (torch.randperm(14), torch.tensor([9, 2, 3, 13, 0]), torch.tensor([1, 1, 4, 0, 4, 7])):
        expected = index.score(index.prepare(x[rows]), b if len(rows) == 14 else index.prepare(y[rows]))
        other = b if len(rows) == 14 else index.taken(b, rows)
        assert index.score(index.taken(a, rows), other) == pytest.approx(expected, abs=1e-12)


def test_taken_again():
    x, y = map(torch.tensor, pair())
    index = RSA()
    a, b = index.prepare(x), index.prepare(y)
    order, some = torch.randperm(14), torch.tensor([2, 0, 7, 8, 9])
    twice = index.taken(index.taken(a, order), some)
    assert index.score(twice, index.taken(b, some)) == pytest.approx(index(x[order[some]], y[some]), abs=1e-12)


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_all_pairs_of_layers_at_once(comparison):
    x, y = map(torch.tensor, pair())
    layers = [x, y, x.relu() + 0.1 * y[:, :6], y.square()]
    index = RSA(comparison=comparison)
    states = [index.prepare(layer) for layer in layers]
    values = index.scores(states[:3], states)
    assert values.dtype == torch.float64
    truth = [[oracle(a.numpy(), b.numpy(), "correlation", comparison) for b in layers] for a in layers[:3]]
    np.testing.assert_allclose(values, truth, atol=1e-12)


def test_float32_input_is_computed_in_float64():
    x, y = (torch.tensor(values, dtype=torch.float32) for values in pair())
    assert rsa(x, y) == rsa(x.double(), y.double())


CHANGES = {
    "orthogonal": lambda x, rng: x @ np.linalg.qr(rng.standard_normal((x.shape[1],) * 2))[0],
    "scaling": lambda x, rng: x * rng.uniform(0.1, 10),
    "linear": lambda x, rng: x @ (rng.standard_normal((x.shape[1],) * 2) + 0.1),
    "permutation": lambda x, rng: x[:, rng.permutation(x.shape[1])],
    "translation": lambda x, rng: x + rng.standard_normal(x.shape[1]),
}


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**20))
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dissimilarity", DISSIMILARITIES)
def test_invariances(dissimilarity, change, seed):
    x, y = pair(seed=seed)
    for comparison in COMPARISONS:
        index = RSA(dissimilarity, comparison)
        changed = CHANGES[change](x, np.random.default_rng(seed))
        if getattr(index.invariances, change):
            assert index(changed, y) == pytest.approx(index(x, y), abs=1e-11)
        else:
            assert index(changed, x) < 1 - 1e-6  # beside itself, where any other distance shows


def test_description():
    assert RSA().name == "rsa"
    assert RSA().distance is False
    assert RSA().estimator == "RSA, correlation distance, spearman over the upper triangle"
    assert "tau-b" in RSA(comparison="kendall").estimator


def test_wrong_input_is_refused():
    x, y = pair()
    with pytest.raises(DataError, match=r"dissimilarity is 'corelation'.*did you mean correlation"):
        rsa(x, y, dissimilarity="corelation")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="comparison is 'rank'; expected one of spearman"):
        RSA(comparison="rank")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="dissimilarity is 'l1'"):
        rdm(x, "l1")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="needs at least 3"):
        rsa(x[:2], y[:2])
    with pytest.raises(DataError, match=r"\(1, 6\) has 1 sample"):
        rdm(x[:1])
    x[0, 0] = np.nan
    with pytest.raises(NotFiniteError, match="x of shape"):
        rdm(x)

"""Mean activations of two layers, as distributions and unit by unit."""

from __future__ import annotations

import json
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, wasserstein_distance

from isthmus.align.units.mean_activations import mean_activations
from isthmus.base.errors import DataError, LayerNotFoundError
from isthmus.metrics.moments import Moments

# The annotations of scipy do not know what it returns.
spearmanr: Any = scipy.stats.spearmanr


def moments(**layers):
    found = Moments("none")
    for start in (0, 20):
        rows = slice(start, start + 20 if not start else None)
        found.update({name: torch.as_tensor(x[rows]) for name, x in layers.items()})
    return found


def of_means(means, n=50, seed=0):
    noise = np.random.default_rng(seed).standard_normal((n, len(means)))
    return noise - noise.mean(0) + means


def pair(p=9, q=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(p) + 1, rng.standard_normal(q)


@given(seed=st.integers(0, 2**32 - 1), p=st.integers(1, 20), q=st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_distances_are_those_of_the_distribution_functions(seed, p, q):
    x, y = pair(p, q, seed)
    found = mean_activations(moments(a=of_means(x), b=of_means(y)), "a", "b")
    grid = np.sort(np.r_[x, y])
    below = [(z[:, None] <= grid + 1e-12).mean(0) for z in (x, y)]
    assert found.ks == pytest.approx(abs(below[0] - below[1]).max())
    assert found.wasserstein == pytest.approx((abs(below[0] - below[1])[:-1] * np.diff(grid)).sum())
    assert found.ks_p_value == pytest.approx(kstest(x, y, method="exact").pvalue)
    np.testing.assert_allclose(found.curve_a, np.sort(x)[::-1])
    np.testing.assert_allclose(found.means_b, y)
    assert found.pairs is None
    assert np.isnan([found.pearson, found.spearman, found.p_value, found.spearman_p_value]).all()


def test_equal_distributions_need_not_agree_unit_by_unit():
    x = pair(40)[0]
    order = np.random.default_rng(1).permutation(40)
    layers = moments(a=of_means(x), b=of_means(x[order], seed=1))
    right, wrong = np.argsort(order), np.arange(40)
    found = mean_activations(layers, "a", "b", wrong)
    # equal but for rounding, which can shift the steps of the distribution functions
    assert found.ks <= 1 / 40 + 1e-12
    assert found.ks_p_value == pytest.approx(1)
    assert found.wasserstein == pytest.approx(0, abs=1e-12)
    assert abs(found.pearson) < 0.5
    assert found.p_value > 0.05
    found = mean_activations(layers, "a", "b", right)
    assert found.pearson == pytest.approx(1)
    assert found.spearman == pytest.approx(1)
    assert found.p_value == found.spearman_p_value == 1 / 1001


def test_matched_means_are_correlated_as_scipy_does():
    x, y = pair(30, 25)
    rng = np.random.default_rng(2)
    y[:20] += x[:20]
    matching = np.r_[np.arange(20), rng.integers(-1, 25, 10)]
    matching[3] = -1
    kept = np.flatnonzero(matching >= 0)
    found = mean_activations(moments(a=of_means(x), b=of_means(y)), "a", "b", torch.tensor(matching), permutations=50)
    u, v = x[kept], y[matching[kept]]
    assert found.pairs is not None
    assert found.pairs.tolist() == np.stack([kept, matching[kept]], 1).tolist()
    assert found.pearson == pytest.approx(np.corrcoef(u, v)[0, 1])
    assert found.spearman == pytest.approx(spearmanr(u, v).statistic)


@pytest.mark.parametrize("seed", range(3))
def test_p_values_approach_those_of_all_pairings(seed):
    x, y = pair(6, 6, seed)
    every = [(np.corrcoef(x, y[list(o)])[0, 1], spearmanr(x, y[list(o)]).statistic) for o in permutations(range(6))]
    pearson, spearman = np.transpose(every)
    found = mean_activations(
        moments(a=of_means(x), b=of_means(y)), "a", "b", np.arange(6), permutations=4000, seed=seed
    )
    assert found.p_value == pytest.approx((pearson >= pearson[0] - 1e-9).mean(), abs=0.03)
    assert found.spearman_p_value == pytest.approx((spearman >= spearman[0] - 1e-9).mean(), abs=0.03)


def test_p_values_under_the_null_are_uniform():
    p_values = []
    for seed in range(100):
        x, y = pair(15, 15, seed)
        found = mean_activations(
            moments(a=of_means(x), b=of_means(y)), "a", "b", np.arange(15), permutations=99, seed=seed
        )
        p_values.append(found.p_value)
    assert kstest(p_values, "uniform").pvalue > 0.01


def test_seeds_and_orders():
    x, y = pair(12, 12)
    layers = moments(a=of_means(x), b=of_means(y))
    first, again, other = (mean_activations(layers, "a", "b", np.arange(12), seed=seed) for seed in (0, 0, 1))
    assert first.p_value == again.p_value != other.p_value
    flipped = mean_activations(moments(a=of_means(x[::-1]), b=of_means(y)), "a", "b", np.arange(12)[::-1].copy())
    for name in ("ks", "wasserstein", "pearson", "spearman"):
        assert getattr(flipped, name) == pytest.approx(getattr(first, name))
    assert flipped.p_value == pytest.approx(first.p_value, abs=0.06)


def test_units_that_do_not_vary_are_left_out_and_named():
    x, y = pair(8, 8)
    a, b = of_means(x), of_means(y)
    a[:, 1], b[:, [3, 7]] = 9, 0
    found = mean_activations(moments(a=a, b=b), "a", "b", np.r_[np.arange(7), -1])
    assert (found.constant_a, found.constant_b) == ((1,), (3, 7))
    assert found.pairs is not None
    assert found.pairs[:, 0].tolist() == [0, 2, 4, 5, 6]
    assert found.wasserstein == pytest.approx(wasserstein_distance(np.delete(x, 1), np.delete(y, [3, 7])))
    assert found.means_a[1].isnan()
    with pytest.raises(DataError, match="none of the 8 units of layer 'b'"):
        mean_activations(moments(a=a, b=b * 0), "a", "b")


def test_too_few_pairs_or_equal_means_have_no_correlation():
    x, _ = pair(4)
    layers = moments(a=of_means(x), b=of_means(x), level=of_means(np.zeros(4)).round(1) * 0 + np.eye(50)[:, :4])
    assert np.isnan(mean_activations(layers, "a", "b", [0, 1, -1, -1]).pearson)
    assert mean_activations(layers, "a", "b", [0, 1, 2, -1]).pearson == pytest.approx(1)
    # every unit fires once in 50 samples, but for the rounding of means
    assert np.isnan(mean_activations(layers, "a", "level", [0, 0, 0, 0]).pearson)


def test_many_units_have_a_p_value_as_well():
    x, y = pair(1200, 700)
    found = mean_activations(moments(a=of_means(x), b=of_means(y)), "a", "b")
    assert found.ks_p_value == pytest.approx(kstest(x, y, method="asymp").pvalue)


@pytest.mark.parametrize(
    ("matching", "message"),
    [
        ([0, 1], r"\(2,\).*\(9,\)"),
        ([0.0] * 9, "float"),
        ([True] * 9, "bool"),
        ([0] * 8 + [12], "from 0 to 12; b has units 0 to 11"),
        ([0] * 8 + [-2], "from -2"),
    ],
)
def test_a_matching_that_does_not_fit_is_refused(matching, message):
    x, y = pair()
    with pytest.raises(DataError, match=message):
        mean_activations(moments(a=of_means(x), b=of_means(y)), "a", "b", torch.tensor(matching))


def test_other_bad_arguments_are_refused():
    x, y = pair()
    layers = moments(a=of_means(x), b=of_means(y))
    with pytest.raises(DataError, match="permutations is 0"):
        mean_activations(layers, "a", "b", permutations=0)
    with pytest.raises(LayerNotFoundError):
        mean_activations(layers, "a", "c")


def test_the_picture_and_the_file_hold_the_means():
    import matplotlib.pyplot as plt

    x, y = pair(5, 5)
    a = of_means(x)
    a[:, 2] = 0
    found = mean_activations(moments(a=a, b=of_means(y)), "a", "b", np.arange(5))
    ax = found.plot()
    curve_a, curve_b, dots = (np.asarray(line.get_data()) for line in ax.get_lines())
    assert found.pairs is not None
    assert curve_a[1].tolist() == found.curve_a.tolist()
    assert curve_b[1].tolist() == found.curve_b.tolist()
    # a dot stands where its unit of a stands on the curve
    for place, height, (unit, partner) in zip(*dots, found.pairs.tolist(), strict=True):
        at = curve_a[0].tolist().index(place)
        assert found.curve_a[at] == found.means_a[unit]
        assert height == found.means_b[partner]
    assert mean_activations(moments(a=a, b=a), "a", "b").plot(ax) is ax
    plt.close("all")
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["means_a"][2] is None
    assert content["ks"] == found.ks

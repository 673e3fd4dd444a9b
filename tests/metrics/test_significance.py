"""Permutation null and jackknife against loops over the array function, and by what they promise."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t as student
from torch import Tensor

from isthmus.base.errors import DataError
from isthmus.metrics.cca import CCA, cca
from isthmus.metrics.cka import CKA, cka
from isthmus.metrics.hsic import HSIC, hsic
from isthmus.metrics.procrustes import Procrustes, procrustes
from isthmus.metrics.rsa import RSA, rsa
from isthmus.metrics.shifts import shifted_products
from isthmus.metrics.significance import jackknife_interval, permutation_null


def pair(n: int, p: int, q: int, shared: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, p, generator=generator)
    y = torch.randn(n, q, generator=generator)
    y[:, : min(p, q)] += shared * x[:, : min(p, q)]
    return x, y


def orders(samples: int, shuffles: int, seed: int, cyclic: bool) -> list[Tensor]:
    """Spell out the rows that stand beside each sample: permutations, or cyclic shifts of a random order."""
    generator, found = torch.Generator().manual_seed(seed), []
    while len(found) < shuffles:
        order = torch.randperm(samples, generator=generator)
        if not cyclic:
            found.append(order)
            continue
        for shift in (1 + torch.randperm(samples - 1, generator=generator)[: shuffles - len(found)]).tolist():
            rows = torch.empty(samples, dtype=torch.long)
            rows[order] = order.roll(-shift)
            found.append(rows)
    return found


@pytest.mark.parametrize("samples", [24, 25])
@pytest.mark.parametrize(
    ("index", "function", "cyclic"),
    [
        (CKA(), cka, True),
        (CKA(debiased=True), partial(cka, debiased=True), True),
        (CKA("rbf", bandwidth=0.6), partial(cka, kernel="rbf", bandwidth=0.6), True),
        (HSIC(), hsic, True),
        (RSA(), rsa, True),
        (RSA("euclidean", "cosine"), partial(rsa, dissimilarity="euclidean", comparison="cosine"), True),
        (RSA(comparison="kendall"), partial(rsa, comparison="kendall"), False),
        (CCA(), cca, False),
        (Procrustes(), procrustes, False),
    ],
)
def test_null_equals_a_loop_over_shuffled_rows(index, function, cyclic, samples) -> None:
    x, y = pair(samples, 4, 6, 0.4)
    a, b = [index.prepare(x), index.prepare(x.abs())], [index.prepare(y), index.prepare(2 * x + y[:, :4])]
    null = permutation_null(index, a, b, index.scores(a, b), samples, shuffles=40, seed=3)
    shuffled = orders(samples, 40, 3, cyclic)
    for row, first in enumerate((x, x.abs())):
        for column, second in enumerate((y, 2 * x + y[:, :4])):
            expected = np.array([function(first, second[order]) for order in shuffled])
            assert null.mean[row, column] == pytest.approx(expected.mean(), abs=1e-8)
            value = function(first, second)
            alike = expected <= value + 1e-9 if index.distance else expected >= value - 1e-9
            assert null.p_values[row, column] == pytest.approx((1 + alike.sum()) / 41)


def test_a_shuffle_that_changes_nothing_counts_as_alike() -> None:
    x = torch.eye(6, dtype=torch.float64)  # all samples alike in all but their name
    states = [CKA("rbf").prepare(x)]
    assert permutation_null(CKA("rbf"), states, states, CKA("rbf").scores(states, states), 6, shuffles=5).p_values == 1


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_shifted_products_equal_the_sums_spelt_out(n: int, left: int, right: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(count, n, n, generator=generator, dtype=torch.float64) for count in (left, right))
    a, b = a + a.mT, b + b.mT
    order = torch.randperm(n, generator=generator)
    found = shifted_products(list(a), list(b), order)
    for shift in range(n):
        rows = torch.empty(n, dtype=torch.long)
        rows[order] = order.roll(-shift)
        expected = torch.einsum("aij,bij->ab", a, b[:, rows][:, :, rows])
        torch.testing.assert_close(found[shift], expected, atol=1e-10, rtol=1e-10)


def test_null_shows_inflation_by_width_and_sample_size() -> None:
    index, means = CKA(), {}
    for n, p in ((40, 40), (40, 200), (400, 40)):
        x, y = pair(n, p, p, 0.0)
        a, b = [index.prepare(x)], [index.prepare(y)]
        means[n, p] = permutation_null(index, a, b, index.scores(a, b), n, shuffles=30).mean[0, 0]
    assert means[40, 200] > means[40, 40] > means[400, 40]


def test_p_value_is_small_for_shared_structure_and_uniform_without() -> None:
    def p_value(shared: float, seed: int) -> float:
        x, y = pair(40, 3, 3, shared, seed)
        a, b = [CKA().prepare(x)], [CKA().prepare(y)]
        return permutation_null(CKA(), a, b, CKA().scores(a, b), 40, shuffles=39, seed=seed).p_values[0, 0]

    assert p_value(1.0, 0) == 1 / 40
    chance = [p_value(0.0, seed) for seed in range(40)]
    assert 0.35 < np.mean(chance) < 0.65


def test_jackknife_equals_a_loop_over_groups() -> None:
    x, y = pair(90, 4, 6, 0.6)
    index = CKA()
    a, b = [index.prepare(x)], [index.prepare(y)]
    values = index.scores(a, b)
    lower, upper = jackknife_interval(index, a, b, values, 90, seed=5)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(5)).numpy()
    left_out = np.array(
        [cka(np.delete(x.numpy(), order[g::20], 0), np.delete(y.numpy(), order[g::20], 0)) for g in range(20)]
    )
    half = np.sqrt(19 / 20 * np.sum((left_out - np.mean(left_out)) ** 2)) * student.ppf(0.975, 19)
    assert lower[0, 0] == pytest.approx(cka(x, y) - half, abs=1e-9)
    assert upper[0, 0] == pytest.approx(cka(x, y) + half, abs=1e-9)


def test_jackknife_covers_the_value_of_many_samples() -> None:
    truth = cka(*pair(40_000, 3, 3, 1.0, seed=99), debiased=True)
    index, covered = CKA(debiased=True), 0
    for seed in range(40):
        x, y = pair(120, 3, 3, 1.0, seed)
        a, b = [index.prepare(x)], [index.prepare(y)]
        lower, upper = jackknife_interval(index, a, b, index.scores(a, b), 120)[:, 0, 0]
        covered += lower <= truth <= upper
    assert covered >= 34


def test_undefined_values_have_no_p_value() -> None:
    x, _ = pair(45, 3, 3, 1.0)
    states = [CKA().prepare(x)], [CKA().prepare(torch.ones(45, 2))]
    values = CKA().scores(*states)
    assert np.isnan(permutation_null(CKA(), *states, values, 45, shuffles=3).p_values).all()
    assert np.isnan(jackknife_interval(CKA(), *states, values, 45)).all()


def test_bad_input() -> None:
    x, y = pair(30, 3, 3, 1.0)
    a, b = [CKA().prepare(x)], [CKA().prepare(y)]
    with pytest.raises(DataError, match="shuffles is 0"):
        permutation_null(CKA(), a, b, CKA().scores(a, b), 30, shuffles=0)
    with pytest.raises(DataError, match="30 samples are too few"):
        jackknife_interval(CKA(), a, b, CKA().scores(a, b), 30)

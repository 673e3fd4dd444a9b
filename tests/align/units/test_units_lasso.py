"""The LASSO on Gram matrices, against scikit-learn on samples, enumeration of supports, and its own conditions."""

from __future__ import annotations

import doctest
import importlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso
from sklearn.linear_model import lasso_path as path_of_sklearn
from torch import Tensor

from isthmus.align.units.active_set import descended, kkt_violation, solved_on_support
from isthmus.align.units.lasso import LassoSolution, largest_penalty, lasso_path
from isthmus.align.units.splitting import Splitting
from isthmus.base.errors import DataError, NotFiniteError


def standard(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(0)
    deviation = x.std(0)
    return x / np.where(deviation > 1e-12, deviation, np.inf)


def correlated(n: int = 300, p: int = 12, q: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """ReLUs of mixtures, and targets that a third of them make up."""
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.standard_normal((n, p)) @ (np.eye(p) + 0.5 * rng.standard_normal((p, p))), -0.5)
    weights = rng.standard_normal((p, q)) * (rng.random((p, q)) < 0.4)
    return x, x @ weights + rng.standard_normal((n, q))


def products(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(x.T @ x / len(x)), torch.from_numpy(x.T @ y / len(x))


def solve(x: np.ndarray, y: np.ndarray, penalty: float, **how: float) -> LassoSolution:
    return next(iter(lasso_path(*products(x, y), [penalty], **how)))  # pyright: ignore[reportArgumentType]


def objective(x: np.ndarray, y: np.ndarray, w: np.ndarray, penalty: float) -> np.ndarray:
    return np.square(y - x @ w).sum(0) / (2 * len(x)) + penalty * np.abs(w).sum(0)


def violation(x: np.ndarray, y: np.ndarray, w: np.ndarray, penalty: float) -> float:
    gradient = x.T @ (y - x @ w) / len(x)
    return float(np.where(w != 0, abs(gradient - penalty * np.sign(w)), np.maximum(abs(gradient) - penalty, 0)).max())


@pytest.mark.parametrize("penalty", [0.002, 0.03, 0.2, 0.6])
def test_solutions_are_those_of_scikit_learn(penalty: float) -> None:
    x, y = (standard(z) for z in correlated())
    found = solve(x, y, penalty, tolerance=1e-10)
    mine, expected = found.coefficients.numpy(), Lasso(penalty, tol=1e-13, max_iter=100_000).fit(x, y).coef_.T
    np.testing.assert_array_equal(mine != 0, expected != 0)
    np.testing.assert_allclose(mine, expected, atol=1e-8)
    np.testing.assert_allclose(objective(x, y, mine, penalty), objective(x, y, expected, penalty), rtol=1e-7)
    np.testing.assert_allclose(found.gradient.numpy(), x.T @ (y - x @ mine) / len(x), atol=1e-12)
    assert found.coefficients.dtype == torch.float64
    assert (found.violation <= 1e-10).all()


@pytest.mark.parametrize("penalty", [0.01, 0.2])
def test_scale_weighs_the_penalty_of_units_as_they_are(penalty: float) -> None:
    x, y = correlated(seed=1)
    x, y = (x - x.mean(0)) * np.geomspace(0.1, 10, x.shape[1]), (y - y.mean(0)) * 3
    scale = 1 / torch.from_numpy(np.outer(x.std(0), y.std(0)))
    (found,) = lasso_path(*products(standard(x), standard(y)), [penalty], scale=scale, tolerance=1e-10)
    mine = found.coefficients.numpy() / x.std(0)[:, None] * y.std(0)
    expected = Lasso(penalty, tol=1e-14, max_iter=200_000).fit(x, y).coef_.T
    np.testing.assert_array_equal(mine != 0, expected != 0)
    np.testing.assert_allclose(objective(x, y, mine, penalty), objective(x, y, expected, penalty), rtol=1e-7)


def test_a_path_is_that_of_scikit_learn_and_of_cold_starts() -> None:
    x, y = (standard(z) for z in correlated(seed=2))
    gram, cross = products(x, y)
    penalties = np.geomspace(largest_penalty(cross), 0.001, 12)
    found = list(lasso_path(gram, cross, penalties.tolist(), tolerance=1e-9))
    how = {"alphas": penalties, "tol": 1e-12, "max_iter": 100_000}
    # Of several targets at once it would be the group LASSO.
    theirs = np.stack([path_of_sklearn(x, target, **how)[1] for target in y.T], 1)
    for solution, expected in zip(found, np.moveaxis(theirs, 2, 0), strict=True):
        np.testing.assert_allclose(solution.coefficients.numpy(), expected, atol=1e-6)
        cold = solve(x, y, solution.penalty, tolerance=1e-9)
        torch.testing.assert_close(solution.coefficients, cold.coefficients, atol=1e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(3, 40),
    share=st.floats(0.01, 1.5),
    copies=st.booleans(),
    constants=st.booleans(),
)
def test_conditions_of_optimality_hold_on_the_samples(
    seed: int, n: int, share: float, copies: bool, constants: bool
) -> None:
    x, y = correlated(n, 10, 3, seed)
    if copies:
        x[:, 5:8] = x[:, :3]
    if constants:
        x[:, 8] = 2.5
    x, y = standard(x), standard(y)
    penalty = share * float(abs(x.T @ y / n).max()) + 1e-6
    found = solve(x, y, penalty, tolerance=1e-8)
    w = found.coefficients.numpy()
    assert violation(x, y, w, penalty) <= 2e-8
    assert not constants or not w[8].any()
    assert share < 1 or not w.any()


@pytest.mark.parametrize("noise", [1e-2, 1e-4])
def test_near_copies_are_told_apart(noise: float) -> None:
    rng = np.random.default_rng(3)
    x, y = correlated(400, 20, 8, seed=3)
    x = standard(np.concatenate([x, x + noise * rng.standard_normal(x.shape)], 1))
    y = standard(y)
    for penalty in (0.1, 0.003):
        found = solve(x, y, penalty)
        assert violation(x, y, found.coefficients.numpy(), penalty) <= 1.01e-6
        assert found.iterations < 5000


def test_planted_sums_are_found() -> None:
    rng = np.random.default_rng(4)
    x = standard(rng.standard_normal((3000, 30)))
    pairs = [rng.choice(30, 2, replace=False) for _ in range(15)]
    y = standard(np.stack([x[:, i] + x[:, j] for i, j in pairs], 1) + 0.2 * rng.standard_normal((3000, 15)))
    found = solve(x, y, 0.1).coefficients
    for target, pair in enumerate(pairs):
        assert found[:, target].nonzero().flatten().tolist() == sorted(pair)


def test_more_than_the_largest_penalty_predicts_nothing() -> None:
    x, y = (standard(z) for z in correlated(seed=5))
    gram, cross = products(x, y)
    scale = torch.rand(cross.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    for weights in (None, scale):
        largest = largest_penalty(cross, weights)
        above, below = lasso_path(gram, cross, [largest * 1.0001, largest * 0.999], scale=weights)
        assert not above.coefficients.any()
        assert int((below.coefficients != 0).sum()) == 1


def test_equal_penalties_and_equal_runs_give_equal_solutions() -> None:
    gram, cross = products(*(standard(z) for z in correlated(seed=6)))
    first, again = ([s.coefficients for s in lasso_path(gram, cross, [0.3, 0.1, 0.1, 0.05])] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.testing.assert_close(first[1], first[2], atol=1e-5, rtol=0)


def test_products_of_low_precision_converge() -> None:
    x, y = (standard(z) for z in correlated(8, 20, 4, seed=7))
    gram, cross = (z.to(torch.bfloat16).double() for z in products(x, y))
    values, vectors = torch.linalg.eigh(gram)
    assert float(values[0]) < -1e-5
    (found,) = lasso_path(gram, cross, [0.05])
    projected = vectors @ values.clamp_min(0).diag() @ vectors.T
    gradient = cross - projected @ found.coefficients
    assert float(kkt_violation(found.coefficients, gradient, cross.new_tensor(0.05)).max()) <= 1.01e-6


def test_a_limit_that_is_reached_is_warned_about() -> None:
    x, y = (standard(z) for z in correlated(30, 40, 3, seed=8))
    solutions = lasso_path(*products(x, y), [0.001], max_iterations=4)
    with pytest.warns(UserWarning, match=r"at penalty 0.001, \d of 3 targets had not converged after 4 iterations"):
        found = next(iter(solutions))
    assert float(found.violation.max()) > 1e-6
    assert violation(x, y, found.coefficients.numpy(), 0.001) == pytest.approx(float(found.violation.max()), rel=1e-6)


@pytest.mark.parametrize(
    ("gram", "cross", "how", "message"),
    [
        (torch.eye(3), torch.ones(2, 4), {}, r"gram of shape \(3, 3\) .* cross of shape \(2, 4\)"),
        (torch.ones(3, 2), torch.ones(3, 4), {}, r"gram of shape \(3, 2\)"),
        (torch.eye(3), torch.ones(3), {}, r"cross has shape \(3,\)"),
        (torch.eye(3), torch.ones(3, 0), {}, r"cross has shape \(3, 0\)"),
        (torch.eye(3, dtype=torch.int64), torch.ones(3, 1), {}, "int64"),
        (torch.eye(3), torch.ones(3, 1), {"penalties": [0.1, 0.2]}, "falling"),
        (torch.eye(3), torch.ones(3, 1), {"penalties": [0.0]}, "positive"),
        (torch.eye(3), torch.ones(3, 1), {"penalties": [float("nan")]}, "positive"),
        (torch.eye(3), torch.ones(3, 1), {"tolerance": -1.0}, "tolerance is -1.0"),
        (torch.eye(3), torch.ones(3, 1), {"scale": torch.ones(1, 3)}, r"scale has shape \(1, 3\)"),
        (torch.eye(3), torch.ones(3, 1), {"scale": torch.zeros(3, 1)}, "positive"),
    ],
)
def test_bad_input_is_refused_before_the_first_solution(gram: Tensor, cross: Tensor, how: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        lasso_path(gram, cross, how.pop("penalties", [0.1]), **how)


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(NotFiniteError, match="cross"):
        lasso_path(torch.eye(2), torch.tensor([[1.0], [float("inf")]]), [0.1])


def enumerated(gram: np.ndarray, c: np.ndarray, penalty: float) -> np.ndarray:
    """The best of the stationary points of all supports and signs."""
    best, least = np.zeros(len(c)), 0.0
    for signs in itertools.product((-1, 0, 1), repeat=len(c)):
        s = np.array(signs)
        inside = s != 0
        w = np.zeros(len(c))
        w[inside] = np.linalg.solve(gram[np.ix_(inside, inside)], c[inside] - penalty * s[inside])
        value = w @ gram @ w / 2 - c @ w + penalty * np.abs(w).sum()
        if (w * s >= 0).all() and value < least:
            best, least = w, value
    return best


@pytest.mark.parametrize("seed", range(4))
def test_changes_of_support_alone_reach_the_best_of_all_supports(seed: int) -> None:
    x, y = (standard(z) for z in correlated(60, 5, 6, seed))
    gram, cross = products(x, y)
    rng = torch.Generator().manual_seed(seed)
    start = torch.randn(cross.shape, generator=rng, dtype=torch.float64)
    found = descended(gram, cross, cross.new_tensor(0.1), start, 1e-10, 1e9)
    for target in range(6):
        expected = enumerated(gram.numpy(), cross[:, target].numpy(), 0.1)
        np.testing.assert_allclose(found[:, target].numpy(), expected, atol=1e-9)
    assert torch.equal(descended(gram, cross, cross.new_tensor(0.1), start, 1e-10, 0.0), start)


def test_solutions_on_supports_are_those_of_dense_algebra() -> None:
    gram, cross = products(*(standard(z) for z in correlated(200, 12, 70, seed=9)))
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(-1, 2, cross.shape, generator=generator).double()
    threshold = torch.rand(cross.shape, generator=generator, dtype=torch.float64)
    found = solved_on_support(gram, cross, threshold, signs, torch.zeros_like(cross))
    for target in range(cross.shape[1]):
        inside = signs[:, target].nonzero().flatten()
        right = (cross - threshold * signs)[inside, target]
        expected = torch.zeros(len(cross), dtype=torch.float64)
        expected[inside] = torch.linalg.solve(gram[inside][:, inside], right)
        torch.testing.assert_close(found[:, target], expected, atol=1e-8, rtol=1e-8)
    near = torch.full_like(cross, 0.5)
    assert torch.equal(solved_on_support(-gram, cross, threshold, near.sign(), near), near)


@pytest.mark.parametrize("exact", [True, False])
def test_splitting_alone_converges_from_anywhere(exact: bool) -> None:
    x, y = (standard(z) for z in correlated(20, 30, 4, seed=10))
    gram, cross = products(x, y)
    splitting = Splitting(gram, tuple(torch.linalg.eigh(gram)), torch.float64)
    start = 3 * torch.randn(cross.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = splitting.solve(cross, cross.new_tensor(0.02), start, 1e-7, 50_000, exact=exact)
    assert violation(x, y, found.coefficients.numpy(), 0.02) <= 1.01e-7


@pytest.mark.parametrize("name", ["active_set", "lasso", "splitting"])
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"isthmus.align.units.{name}")).failed == 0

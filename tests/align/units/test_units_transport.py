from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from isthmus.align.units import transport
from isthmus.align.units.one_to_one import bipartite_matching, semi_matching
from isthmus.align.units.transport import soft_matching
from isthmus.base.errors import DataError, LayerNotFoundError, NotFiniteError
from isthmus.metrics import Moments, coupling, unit_correlation
from isthmus.metrics import soft_matching as soft_index

NAN = math.nan


def correlations(p, q, n=60, seed=0):
    x, y = layers(p, q, n, seed)
    return np.corrcoef(x.T, y.T)[:p, p:]


def layers(p, q, n=60, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    return x, x @ rng.standard_normal((p, q)) + rng.standard_normal((n, q))


def moments(**found):
    read = Moments()
    read.update({name: torch.tensor(x) for name, x in found.items()})
    return read


def program(similarity):
    """All constraints written out, for an interior-point solver."""
    p, q = similarity.shape
    rows = np.kron(np.eye(p), np.ones(q))
    columns = np.kron(np.ones(p), np.eye(q))
    masses = np.r_[np.full(p, 1 / p), np.full(q, 1 / q)]
    return -linprog(-similarity.ravel(), A_eq=np.r_[rows, columns], b_eq=masses, method="highs-ipm").fun


def check_marginals(coupling, atol):
    p, q = coupling.shape
    assert bool((coupling >= 0).all())
    np.testing.assert_allclose(coupling.sum(1), np.full(p, 1 / p), atol=atol)
    np.testing.assert_allclose(coupling.sum(0), np.full(q, 1 / q), atol=atol)


# Exact


@settings(max_examples=25, deadline=None)
@given(shape=st.tuples(st.integers(1, 9), st.integers(1, 9)), seed=st.integers(0, 2**20), coarse=st.booleans())
def test_exact_is_optimal_and_feasible(shape, seed, coarse):
    similarity = np.random.default_rng(seed).standard_normal(shape)
    similarity = np.round(similarity) if coarse else similarity
    found = soft_matching(similarity)
    check_marginals(found.coupling, 1e-15)
    assert found.value == pytest.approx(program(similarity), abs=1e-7)
    assert found.value == pytest.approx(float((found.coupling.numpy() * similarity).sum()))
    if not coarse:  # the only optimum is a vertex
        assert len(found.coupling.nonzero()) < sum(shape)
    assert found.marginal_error < 1e-14
    assert found.iterations == 0
    assert found.regularisation is None


SIZES = [(6, 6), (6, 9), (9, 6), (5, 20), (20, 5), (13, 11)]


def simplex(masses_a, masses_b, cost, *, numItermax, log):
    """What POT would find, by linear programming."""
    p, q = cost.shape
    equations = np.r_[np.kron(np.eye(p), np.ones(q)), np.kron(np.ones(p), np.eye(q))]
    found = linprog(cost.ravel(), A_eq=equations, b_eq=np.r_[masses_a, masses_b], method="highs-ds")
    return found.x.reshape(p, q), {"warning": None if numItermax > p + q and log else "stopped"}


@pytest.mark.parametrize("solver", ["copies", "simplex", "program", "stopped"])
@pytest.mark.parametrize("shape", SIZES)
def test_all_solvers_find_the_same(shape, solver, monkeypatch):
    if solver != "copies":
        monkeypatch.setattr(coupling, "_MOST_COPIES", 0)
    if solver == "simplex":
        monkeypatch.setitem(sys.modules, "ot", SimpleNamespace(emd=simplex))
    elif solver == "stopped":
        monkeypatch.setitem(
            sys.modules, "ot", SimpleNamespace(emd=lambda a, b, cost, **_: (cost * NAN, {"warning": "numItermax"}))
        )
    else:
        monkeypatch.setitem(sys.modules, "ot", None)
    similarity = correlations(*shape)
    found = soft_matching(similarity)
    check_marginals(found.coupling, 1e-15)
    assert found.value == pytest.approx(program(similarity), abs=1e-7)


def test_the_network_simplex_of_pot(monkeypatch):
    pytest.importorskip("ot")
    monkeypatch.setattr(coupling, "_MOST_COPIES", 0)
    for shape in [(6, 9), (13, 11), (40, 70)]:
        found = soft_matching(correlations(*shape))
        check_marginals(found.coupling, 1e-15)
        assert found.value == pytest.approx(program(correlations(*shape)), abs=1e-7)


def test_equal_counts_give_the_bipartite_matching():
    similarity = correlations(30, 30)
    found, one = soft_matching(similarity), bipartite_matching(similarity)
    assert torch.equal(found.doubly_stochastic, one.matrix().to(torch.float64))
    assert found.value == pytest.approx(one.mean, abs=1e-15)
    assert torch.equal(found.hard().partner, one.partner)
    assert found.hard().kind == "soft"
    assert repr(found) == f"SoftMatch(30 x 30 units, exact: mean similarity {one.mean:.3g})"


@pytest.mark.parametrize("shape", SIZES)
def test_the_value_is_that_of_the_index(shape):
    x, y = layers(*shape)
    read = soft_matching(moments(x=x, y=y), "x", "y")
    assert read.value == pytest.approx(soft_index(x, y), abs=1e-9)
    matrix = soft_matching(unit_correlation(x, y))
    np.testing.assert_allclose(read.coupling, matrix.coupling, atol=1e-15)
    assert read.distance is not None
    assert matrix.distance == pytest.approx(read.distance)
    unit = [(z - z.mean(0)) / np.linalg.norm(z - z.mean(0), axis=0) for z in (x, y)]
    squares = ((unit[0][:, :, None] - unit[1][:, None]) ** 2).sum(0)
    assert read.distance == pytest.approx(math.sqrt((read.coupling.numpy() * squares).sum()))


def test_distance_is_a_metric_of_correlations_and_of_nothing_else():
    x, y = layers(5, 7)
    z = np.random.default_rng(1).standard_normal((60, 3)) + x[:, :3]
    xy, yz, xz = (soft_matching(unit_correlation(*pair)).distance or 0 for pair in ((x, y), (y, z), (x, z)))
    assert 0 < max(xy, yz, xz) <= (xy + yz + xz) / 2
    same = soft_matching(unit_correlation(x, np.tile(3 * x + 1, 2))).distance
    assert same == pytest.approx(0, abs=1e-7)
    assert soft_matching([[1.5, 0.0], [0.2, 0.3]]).distance is None
    assert soft_matching([[-1.5, 0.0], [0.2, 0.3]], regularisation=1.0).distance is None


@pytest.mark.parametrize("regularisation", [None, 0.003])
def test_copies_of_a_unit_share_its_mass(regularisation):
    x = np.random.default_rng(0).standard_normal((300, 8))
    order = np.random.default_rng(1).permutation(16)
    y = np.concatenate([x, 2 * x + 0.01 * np.random.default_rng(2).standard_normal(x.shape)], 1)[:, order]
    found = soft_matching(moments(x=x, y=y), "x", "y", regularisation=regularisation)
    expected = np.concatenate([np.eye(8), np.eye(8)], 1)[:, order] / 2
    np.testing.assert_allclose(found.doubly_stochastic, expected, atol=1e-9)
    assert (found.hard().partner[order % 8] >= 0).all()
    assert (order[found.hard().partner] % 8).tolist() == list(range(8))
    assert found.value == pytest.approx(1, abs=1e-4)


# Entropic


def test_two_by_two_in_closed_form():
    s = np.array([[0.9, 0.2], [0.1, 0.4]])
    for epsilon in (5.0, 0.5, 0.1, 0.05):
        ratio = math.exp((s[0, 0] + s[1, 1] - s[0, 1] - s[1, 0]) / (2 * epsilon))
        x = ratio / (1 + ratio) / 2
        found = soft_matching(s, regularisation=epsilon)
        np.testing.assert_allclose(found.coupling, [[x, 0.5 - x], [0.5 - x, x]], atol=1e-9)
        assert found.regularisation == epsilon
        assert found.iterations > 0


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 2**20),
    epsilon=st.sampled_from([10.0, 1.0, 0.1, 0.01]),
    shift=st.sampled_from([0.0, 1e3]),
)
def test_entropic_has_the_form_and_the_marginals_of_the_only_optimum(shape, seed, epsilon, shift):
    s = np.random.default_rng(seed).standard_normal(shape)
    found = soft_matching(s + shift, regularisation=epsilon)
    check_marginals(found.coupling, 1e-9)
    assert found.marginal_error <= 1e-9
    # log T = (f + g + s) / ε: what remains after a term per row and one per column is zero.
    positive = (found.coupling > 1e-280).all(1).numpy()
    rest = epsilon * np.log(found.coupling.numpy()[positive]) - s[positive]
    if positive.any():
        rest = rest - rest.mean(0)
        np.testing.assert_allclose(rest - rest.mean(1, keepdims=True), 0, atol=1e-9 + 1e-12 * shift)
    bound = epsilon * math.log(min(shape))
    assert -1e-6 <= soft_matching(s).value + shift - found.value <= bound + 1e-6


@pytest.mark.parametrize("shape", SIZES)
def test_entropic_goes_to_the_exact_one(shape):
    similarity = correlations(*shape)
    exact = soft_matching(similarity)
    gaps, found = [], exact
    for epsilon in (1.0, 0.1, 0.01, 0.001, 0.0001):
        found = soft_matching(similarity, regularisation=epsilon)
        gaps.append(exact.value - found.value)
        assert found.distance is not None
        assert exact.distance is not None
        assert found.distance >= exact.distance - 1e-9
    assert (np.diff(gaps) <= 1e-8).all()
    assert gaps[0] > 0.01
    assert abs(gaps[-1]) < 1e-6
    np.testing.assert_allclose(found.coupling, exact.coupling, atol=1e-3)
    flat = soft_matching(similarity, regularisation=1e9).coupling
    np.testing.assert_allclose(flat, np.full(shape, 1 / math.prod(shape)), atol=1e-9)


def test_plain_iterations_find_the_same_as_newtons_steps(monkeypatch):
    similarity = correlations(20, 30)
    found = soft_matching(similarity, regularisation=0.02)
    monkeypatch.setattr(transport, "_NEWTON_FROM", 0)
    plain = soft_matching(similarity, regularisation=0.02)
    assert plain.iterations > found.iterations
    np.testing.assert_allclose(plain.coupling, found.coupling, atol=1e-9)


def test_what_does_not_converge_is_said():
    similarity = correlations(30, 30)
    with pytest.warns(UserWarning, match=r"after \d+ iterations at a marginal error of .* tolerance of 1e-09"):
        found = soft_matching(similarity, regularisation=0.005, max_iterations=3)
    assert found.marginal_error > 1e-9
    np.testing.assert_allclose(found.coupling.sum(0), np.full(30, 1 / 30), atol=1e-12)
    rough = soft_matching(similarity, regularisation=0.05, tolerance=1e-2)
    assert 1e-9 < rough.marginal_error <= 1e-2
    assert repr(rough).startswith("SoftMatch(30 x 30 units, regularisation 0.05: mean similarity 0.")


# Both


@pytest.mark.parametrize("regularisation", [None, 0.05])
@pytest.mark.parametrize("shape", SIZES)
def test_exchanging_the_layers_transposes(shape, regularisation):
    similarity = correlations(*shape)
    found = soft_matching(similarity, regularisation=regularisation)
    back = soft_matching(similarity.T, regularisation=regularisation)
    np.testing.assert_allclose(back.coupling.T, found.coupling, atol=1e-9)
    assert back.value == pytest.approx(found.value, abs=1e-9)


@pytest.mark.parametrize("regularisation", [None, 0.05])
def test_the_order_of_the_units_does_not_matter(regularisation):
    similarity, rng = correlations(7, 12), np.random.default_rng(3)
    rows, columns = rng.permutation(7), rng.permutation(12)
    found = soft_matching(similarity, regularisation=regularisation).coupling.numpy()
    other = soft_matching(similarity[rows][:, columns], regularisation=regularisation).coupling
    np.testing.assert_allclose(other, found[rows][:, columns], atol=1e-9)


@pytest.mark.parametrize("regularisation", [None, 0.05])
def test_constant_units_have_no_mass(regularisation):
    x, y = layers(6, 9)
    fixed_x = np.insert(x, 2, 0.1, axis=1)
    fixed_y = np.insert(y, [0, 9], 7.0, axis=1)
    expected = soft_matching(moments(x=x, y=y), "x", "y", regularisation=regularisation)
    for found in (
        soft_matching(moments(x=fixed_x, y=fixed_y), "x", "y", regularisation=regularisation),
        soft_matching(unit_correlation(fixed_x, fixed_y), regularisation=regularisation),
    ):
        assert found.constant_a == (2,)
        assert found.constant_b == (0, 10)
        assert found.coupling.shape == (7, 11)
        assert not found.coupling[2].any()
        assert not found.coupling[:, [0, 10]].any()
        inner = np.delete(np.delete(found.coupling.numpy(), 2, 0), [0, 10], 1)
        np.testing.assert_allclose(inner, expected.coupling, atol=1e-9)
        assert found.value == pytest.approx(expected.value)
        assert found.distance == pytest.approx(expected.distance)
        assert found.hard().partner[2] == -1
        assert found.hard().constant_b == (0, 10)
        np.testing.assert_allclose(found.doubly_stochastic.sum(1), [1, 1, 0, 1, 1, 1, 1], atol=1e-8)


def test_hard_partners_are_the_largest_entries():
    similarity = correlations(6, 9)
    soft = soft_matching(similarity, regularisation=0.1)
    assert soft.hard().partner.tolist() == soft.coupling.argmax(1).tolist()
    np.testing.assert_array_equal(soft.hard().similarity, similarity[np.arange(6), soft.hard().partner])
    assert (soft.hard().similarity <= semi_matching(similarity).similarity).all()
    assert soft_matching([[0.3, 0.5]]).hard().partner.tolist() == [0]  # equal masses: the first


def test_wrong_use_is_refused():
    similarity = correlations(3, 4)
    wrong: dict[str, Any]
    for wrong, message in (
        ({"regularisation": 0.0}, "regularisation is 0.0"),
        ({"regularisation": -1.0}, "regularisation is -1.0"),
        ({"regularisation": math.inf}, "regularisation is inf"),
        ({"regularisation": NAN}, "regularisation is nan"),
        ({"regularisation": 1e-30}, "too small for float64"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"max_iterations": 0}, "max_iterations is 0"),
        ({"a": "x", "b": "y"}, "beside a matrix"),
    ):
        with pytest.raises(DataError, match=message):
            soft_matching(similarity, **wrong)
    x, y = layers(3, 4)
    with pytest.raises(LayerNotFoundError, match="'z'"):
        soft_matching(moments(x=x, y=y), "x", "z")
    with pytest.raises(NotFiniteError, match="NaN at"):
        soft_matching([[0.1, NAN], [0.2, 0.3]])

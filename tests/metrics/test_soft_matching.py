from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from isthmus.base.errors import DataError, LayerNotFoundError, NotFiniteError
from isthmus.metrics import Moments
from isthmus.metrics import coupling as coupling_module
from isthmus.metrics.coupling import soft_coupling
from isthmus.metrics.soft_matching import SoftMatching, soft_matching

KINDS = ("correlation", "distance")


def pair(n=30, p=5, q=5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)) * rng.uniform(0.5, 2, p) + 1
    return x, x @ rng.standard_normal((p, q)) + rng.standard_normal((n, q)) - 2


def scaled(x, kind):
    x = x - x.mean(0)
    return x / np.linalg.norm(x, axis=0) if kind == "correlation" else x / np.linalg.norm(x) * np.sqrt(x.shape[1])


def dense_program(similarity):
    """All constraints written out, no candidates, another algorithm."""
    p, q = similarity.shape
    rows = np.stack([np.repeat(np.eye(p)[i], q) for i in range(p)])
    columns = np.stack([np.tile(np.eye(q)[j], p) for j in range(q)])
    masses = np.r_[np.full(p, 1 / p), np.full(q, 1 / q)]
    solution = linprog(-similarity.ravel(), A_eq=np.r_[rows, columns], b_eq=masses, method="highs-ipm")
    return -solution.fun


def oracle(x, y, kind):
    a, b = scaled(x, kind), scaled(y, kind)
    if a.shape == b.shape:
        orders = map(list, permutations(range(a.shape[1])))
        if kind == "correlation":
            return max((a * b[:, order]).sum() for order in orders) / a.shape[1]
        unit = [z / np.linalg.norm(z) for z in (a, b)]
        return min(np.linalg.norm(unit[0] - unit[1][:, order]) for order in orders)
    if kind == "correlation":
        return dense_program(a.T @ b)
    return math.sqrt(-dense_program(-((a[:, :, None] - b[:, None]) ** 2).sum(0)))


def moments(**layers):
    found = Moments()
    for start in range(0, len(next(iter(layers.values()))), 7):
        found.update({name: torch.tensor(x[start : start + 7]) for name, x in layers.items()})
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("p", "q"), [(5, 5), (1, 1), (3, 5), (5, 2), (1, 4), (4, 6), (12, 17)])
def test_agrees_with_the_definition(kind, p, q):
    x, y = pair(p=p, q=q)
    value = soft_matching(x, y, kind=kind)
    assert value == pytest.approx(oracle(x, y, kind), abs=1e-9)
    assert soft_matching(y, x, kind=kind) == pytest.approx(value, abs=1e-12)
    read = SoftMatching(kind).scores_from_moments(moments(x=x, y=y), ["x"], ["y"])
    assert read.shape == (1, 1)
    assert read.item() == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copies", [1, 2, 3])
def test_equal_tuning_is_recovered(kind, copies):
    x = pair(p=6)[0]
    order = np.random.default_rng(1).permutation(6 * copies)
    y = 3 * np.concatenate([x] * copies, 1)[:, order] + 1
    best = 1 if kind == "correlation" else 0
    assert soft_matching(x, y, kind=kind) == pytest.approx(best, abs=1e-13)
    read = SoftMatching(kind).scores_from_moments(moments(x=x, y=y), ["x"], ["y"])
    assert read.item() == pytest.approx(best, abs=1e-7)


def test_planted_permutation_is_the_coupling():
    x = np.random.default_rng(0).standard_normal((200, 40))
    order = np.random.default_rng(1).permutation(40)
    coupling = soft_coupling(np.corrcoef(x.T, x[:, order].T)[:40, 40:])
    np.testing.assert_array_equal(coupling, np.eye(40)[:, order] / 40)


shapes = st.tuples(st.integers(1, 14), st.integers(1, 14))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**20), coarse=st.booleans())
def test_coupling_is_feasible_and_optimal(shape, seed, coarse):
    similarity = np.random.default_rng(seed).standard_normal(shape)
    similarity = np.round(similarity) if coarse else similarity  # ties, and matrices of zeros
    coupling = soft_coupling(similarity).numpy()
    p, q = shape
    assert (coupling >= 0).all()
    np.testing.assert_allclose(coupling.sum(1), 1 / p, rtol=1e-14)
    np.testing.assert_allclose(coupling.sum(0), 1 / q, rtol=1e-14)
    if not coarse:  # the only optimum is a vertex
        assert np.count_nonzero(coupling) <= p + q - 1
    assert (coupling * similarity).sum() == pytest.approx(dense_program(similarity), abs=1e-7)


@pytest.mark.parametrize("few", [1, 2])
def test_candidates_are_added_until_none_would_gain(few, monkeypatch):
    similarity = np.random.default_rng(0).standard_normal((21, 33)) + 5 * np.arange(33)
    expected = (soft_coupling(similarity).numpy() * similarity).sum()
    assert expected == pytest.approx(dense_program(similarity), abs=1e-9 * 160)
    monkeypatch.setattr(coupling_module, "_CANDIDATES", few)
    assert (soft_coupling(similarity).numpy() * similarity).sum() == pytest.approx(expected, abs=1e-9 * 160)


def test_triangle_inequality():
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, y, z = (rng.standard_normal((6, p)) for p in (2, 3, 4))
        xy, yz, xz = (soft_matching(a, b, kind="distance") for a, b in ((x, y), (y, z), (x, z)))
        assert xz <= xy + yz + 1e-12


def test_a_unit_that_does_not_vary_matches_nothing():
    x, y = pair()
    x[:, 2] = 0.1
    correlation = np.array([[np.corrcoef(a, b)[0, 1] if a.std() > 1e-9 else 0 for b in y.T] for a in x.T])
    expected = max(correlation[np.arange(5), list(order)].sum() for order in permutations(range(5))) / 5
    assert soft_matching(x, y) == pytest.approx(expected, abs=1e-12)
    assert SoftMatching().scores_from_moments(moments(x=x, y=y), ["x"], ["y"]).item() == pytest.approx(expected)
    assert soft_matching(x, y, kind="distance") == pytest.approx(oracle(x, y, "distance"), abs=1e-9)
    assert soft_matching(x, x) == pytest.approx(4 / 5)
    assert soft_matching(x, x, kind="distance") == pytest.approx(0, abs=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_a_representation_that_does_not_vary_is_undefined(kind):
    x, y = pair()
    fixed = np.full_like(x, 0.1)
    with pytest.warns(UserWarning, match="soft_matching is NaN: x does not vary"):
        assert math.isnan(soft_matching(fixed, y, kind=kind))
    with pytest.warns(UserWarning, match="soft_matching is NaN: y does not vary"):
        assert math.isnan(soft_matching(x, fixed, kind=kind))
    with pytest.warns(UserWarning, match="layer 'y' does not vary"):
        values = SoftMatching(kind).scores_from_moments(moments(x=x, y=fixed), ["x"], ["x", "y"])
    assert values.isnan().tolist() == [[False, True]]


@pytest.mark.parametrize("kind", KINDS)
def test_taken_is_the_state_of_these_rows(kind):
    x, y = map(torch.tensor, pair(q=7))
    x[:12, 1] = 0.3  # does not vary in a subset
    index = SoftMatching(kind)
    a, b = index.prepare(x), index.prepare(y)
    for rows in (torch.randperm(30), torch.arange(12)):
        value = index.score(index.taken(a, rows), index.taken(b, rows))
        assert value == pytest.approx(index(x[rows], y[rows]), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_all_pairs_of_layers(kind):
    x, y = pair(q=7)
    layers = {"x": x, "y": y, "z": x**2}
    index = SoftMatching(kind)
    states = [index.prepare(torch.tensor(layer)) for layer in layers.values()]
    values = index.scores(states[:2], states)
    assert values.shape == (2, 3)
    np.testing.assert_allclose(
        index.scores_from_moments(moments(**layers), ["x", "y"], list(layers)), values, atol=1e-7
    )


@pytest.mark.parametrize("kind", KINDS)
def test_values_far_from_one_stay_within_range(kind):
    x, y = pair()
    assert soft_matching(x * 1e200, y * 1e-200, kind=kind) == pytest.approx(oracle(x, y, kind), abs=1e-12)


CHANGES = {
    "orthogonal": lambda x, rng: x @ np.linalg.qr(rng.standard_normal((x.shape[1],) * 2))[0],
    "scaling": lambda x, rng: x * rng.uniform(0.1, 10),
    "linear": lambda x, rng: x @ (rng.standard_normal((x.shape[1],) * 2) + np.eye(x.shape[1])),
    "permutation": lambda x, rng: x[:, rng.permutation(x.shape[1])],
    "translation": lambda x, rng: x + 3 * rng.standard_normal(x.shape[1]),
}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20))
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_invariances(kind, change, seed):
    x, y = pair(q=8, seed=seed)
    index = SoftMatching(kind)
    changed = CHANGES[change](x, np.random.default_rng(seed))
    if getattr(index.invariances, change):
        assert index(changed, y) == pytest.approx(index(x, y), abs=1e-9)
    else:  # beside itself, where any other unit shows
        assert abs(index(changed, x) - index(x, x)) > 1e-4


def test_description():
    assert [SoftMatching(kind).distance for kind in KINDS] == [False, True]
    assert SoftMatching.from_moments
    assert "mean correlation" in SoftMatching().estimator
    assert "distance" in SoftMatching("distance").estimator


def test_wrong_input_is_refused():
    x, y = pair()
    with pytest.raises(DataError, match="kind is 'cosine'"):
        soft_matching(x, y, kind="cosine")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="needs at least 2"):
        soft_matching(x[:1], y[:1])
    with pytest.raises(NotFiniteError, match="similarity of shape"):
        soft_coupling([[math.nan, 1.0]])
    kept = Moments([("x", "x"), ("y", "y")])
    kept.update({"x": torch.tensor(x), "y": torch.tensor(y)})
    with pytest.raises(LayerNotFoundError, match="were not kept"):
        SoftMatching().scores_from_moments(kept, ["x"], ["y"])

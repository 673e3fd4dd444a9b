"""Each index keeps what its table of invariances says, and changes with everything else."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import isthmus.metrics
from isthmus.metrics.cca import CCA, PWCCA, SVCCA
from isthmus.metrics.cka import CKA
from isthmus.metrics.hsic import HSIC
from isthmus.metrics.index import Index, Invariances
from isthmus.metrics.neighbours import MutualKNN
from isthmus.metrics.procrustes import Bures, Procrustes
from isthmus.metrics.regression import LinearRegression
from isthmus.metrics.rsa import RSA
from isthmus.metrics.soft_matching import SoftMatching

# A new index needs one line here; `test_every_index_is_here` says so.
INDICES = [
    *(CKA(), CKA(debiased=True), CKA("rbf"), CKA("rbf", debiased=True, bandwidth=0.5)),
    *(HSIC(), HSIC(debiased=True), HSIC("rbf"), HSIC("rbf", debiased=True)),
    *(CCA(), CCA(squared=False), SVCCA(), SVCCA(0.7, squared=True), PWCCA(), PWCCA("y"), PWCCA("mean")),
    LinearRegression(),
    *(Procrustes(), Procrustes("squared"), Bures()),
    *(RSA(), RSA("euclidean"), RSA("cosine", "pearson")),
    *(MutualKNN(3), MutualKNN(3, "euclidean")),
    *(SoftMatching(), SoftMatching("distance")),
]
CHANGES = [field.name for field in fields(Invariances)]


def pair(rng):
    n, shared, p, q = rng.integers(24, 40), 3, rng.integers(4, 8), rng.integers(4, 8)
    common = rng.standard_normal((n, shared))
    return [
        common @ rng.standard_normal((shared, units)) + rng.standard_normal((n, units)) + rng.standard_normal(units)
        for units in (p, q)
    ]


def changed(z, change, rng):
    units = z.shape[1]
    rotation = np.linalg.qr(rng.standard_normal((units, units)))[0]
    return {
        "orthogonal": lambda: z @ rotation,
        "scaling": lambda: z * rng.uniform(2, 10) ** rng.choice([-1, 1]),
        "linear": lambda: z @ rotation @ np.diag(np.geomspace(0.1, 10, units)) @ rng.permutation(rotation),
        "permutation": lambda: z[:, rng.permutation(units)],
        "translation": lambda: z + 5 * rng.standard_normal(units),
    }[change]()


def change_of(index, side, change, seed):
    """The index with one side changed, less the index as it was."""
    rng = np.random.default_rng(seed)
    x, y = pair(rng)
    before = index(x, y)
    after = index(changed(x, change, rng), y) if side == "x" else index(x, changed(y, change, rng))
    return before, after


def table(index, side):
    return index.invariances if side == "x" or index.invariances_y is None else index.invariances_y


def changes_of(index, side, kept):
    return [change for change in CHANGES if getattr(table(index, side), change) is kept]


@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize("index", INDICES, ids=repr)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_what_is_said_to_be_kept_is_kept(index, side, seed):
    for change in changes_of(index, side, True):
        before, after = change_of(index, side, change, seed)
        assert after == pytest.approx(before, rel=1e-8, abs=1e-8), change


@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_what_is_not_kept_clearly_changes(index, side):
    for change in changes_of(index, side, False):
        values = [change_of(index, side, change, seed) for seed in range(7)]
        assert np.median([abs(after / before - 1) for before, after in values]) > 1e-3, change


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**20))
@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_symmetric_or_not(index, seed):
    x, y = pair(np.random.default_rng(seed))
    if index.symmetric:
        assert index(x, y) == pytest.approx(index(y, x), rel=1e-8)
    else:
        assert index(x, y) != pytest.approx(index(y, x), rel=1e-6)


@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_a_distance_is_smallest_and_a_similarity_largest_for_equal_representations(index):
    for seed in range(5):
        x, y = pair(np.random.default_rng(seed))
        if index.distance:
            assert abs(index(x, x)) < 1e-7 < index(x, y)
        elif not isinstance(index, HSIC):
            assert index(x, x) == pytest.approx(1, abs=1e-9)
            assert index(x, y) < 1


@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_linear_maps_include_rotations_scalings_and_permutations(index):
    for side in "xy":
        kept = table(index, side)
        assert not kept.linear or (kept.orthogonal and kept.scaling)
        assert not kept.orthogonal or kept.permutation


def test_every_index_is_here():
    modules = [
        importlib.import_module(f"isthmus.metrics.{module.name}")
        for module in pkgutil.iter_modules(isthmus.metrics.__path__)
    ]
    kinds = {
        kind
        for module in modules
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, Index) and not inspect.isabstract(kind)
    }
    assert kinds == {type(index) for index in INDICES}

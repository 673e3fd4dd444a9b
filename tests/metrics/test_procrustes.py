from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.base.errors import DataError, NotFiniteError
from isthmus.metrics import Moments
from isthmus.metrics.procrustes import Bures, Procrustes, bures, procrustes

INDICES = [Procrustes(), Procrustes("squared"), Bures()]


def pair(n=100, p=6, q=9, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    return x + offset, x @ rng.standard_normal((p, q)) / 2 + rng.standard_normal((n, q)) + offset


def padded(x, y):
    """Both centred, with as many units."""
    units = max(x.shape[1], y.shape[1])
    return tuple(np.pad(z - z.mean(0), ((0, 0), (0, units - z.shape[1]))) for z in (x, y))


def from_moments(index, x, y, batch=7, **keywords):
    moments = Moments(**keywords)
    for start in range(0, len(x), batch):
        moments.update({"x": torch.as_tensor(x[start : start + batch]), "y": torch.as_tensor(y[start : start + batch])})
    return index.scores_from_moments(moments, ["x"], ["y"]).item()


def rotation(units, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((units, units)))[0]


def test_golden_values():
    rng = np.random.RandomState(1337)
    x = rng.randn(100, 10)
    y = rng.randn(100, 10) + x
    for index, truth in [
        (Procrustes(), 0.743276),
        (Procrustes("squared"), 905.003268),
        (Bures(), math.cos(0.7432764761)),
    ]:
        assert index(x, y) == pytest.approx(truth, abs=5e-7)
        assert from_moments(index, x, y) == pytest.approx(truth, abs=5e-7)


@pytest.mark.parametrize(("n", "p", "q"), [(100, 6, 9), (100, 9, 6), (8, 30, 20), (5, 1, 1), (50, 50, 3)])
def test_agrees_with_scipy(n, p, q):
    x, y = pair(n, p, q)
    u, v = padded(x, y)
    _, nuclear = scipy.linalg.orthogonal_procrustes(u, v)
    cosine = nuclear / np.linalg.norm(u) / np.linalg.norm(v)
    disparity = scipy.spatial.procrustes(u, v)[2]  # of unit norms, the scale fitted as well: sin²
    squared = (u**2).sum() + (v**2).sum() - 2 * nuclear
    assert math.sin(procrustes(x, y)) ** 2 == pytest.approx(disparity, abs=1e-10)
    for index, truth in zip(INDICES, (math.acos(cosine), squared, cosine), strict=True):
        assert index(x, y) == pytest.approx(truth, rel=1e-10)
        assert index(y, x) == pytest.approx(truth, rel=1e-10)
        assert from_moments(index, x, y) == pytest.approx(truth, rel=1e-8)


def test_the_squared_distance_is_what_the_best_rotation_leaves():
    x, y = padded(*pair(100, 6, 6))
    left, _ = scipy.linalg.orthogonal_procrustes(x, y)
    assert procrustes(x, y, kind="squared") == pytest.approx(((x @ left - y) ** 2).sum(), rel=1e-12)
    for seed in range(20):
        assert ((x @ rotation(6, seed) - y) ** 2).sum() > procrustes(x, y, kind="squared")


def test_bures_is_the_fidelity_of_the_kernels():
    x, y = padded(*pair(20, 6, 9))
    k, l = x @ x.T, y @ y.T  # noqa: E741
    values, vectors = np.linalg.eigh(k)
    root = vectors * np.sqrt(np.where(values > 1e-10, values, 0)) @ vectors.T
    values = np.linalg.eigvalsh(root @ l @ root)
    fidelity = np.sqrt(values[values > 1e-10]).sum() / np.sqrt(np.trace(k) * np.trace(l))
    assert bures(x, y) == pytest.approx(fidelity, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), shape=st.tuples(*[st.integers(2, 10)] * 4))
def test_the_angle_is_a_metric(seed, shape):
    rng = np.random.default_rng(seed)
    x, y, z = (rng.standard_normal((shape[0], units)) for units in shape[1:])
    assert procrustes(x, z) <= procrustes(x, y) + procrustes(y, z) + 1e-9
    assert 0 <= procrustes(x, y) <= math.pi / 2
    assert procrustes(x, y) == pytest.approx(procrustes(y, x), abs=1e-9)


@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-8, 1e-11])
def test_small_distances_keep_their_digits(size):
    x, _ = padded(*pair(100, 6, 6))
    noise = np.random.default_rng(1).standard_normal((100, 6)) * size
    noise -= noise.mean(0)
    # For a small change the angle is its part that is neither a rotation nor a scale, relative to the norm.
    skew = x.T @ noise - noise.T @ x
    a = scipy.linalg.solve_sylvester(x.T @ x, x.T @ x, skew)
    rest = noise - x @ a
    squared = (rest**2).sum()
    rest -= (rest * x).sum() / (x**2).sum() * x
    moved = (x + noise) @ rotation(6)
    tolerance = 20 * size + 1e-4 / (size / 1e-11)
    assert procrustes(x, moved) == pytest.approx(np.linalg.norm(rest) / np.linalg.norm(x), rel=tolerance)
    assert procrustes(x, moved, kind="squared") == pytest.approx(squared, rel=tolerance)


def test_equal_representations_have_no_distance():
    x, _ = pair()
    for kind in ("angular", "squared"):
        assert procrustes(x, x @ rotation(6), kind=kind) < 1e-13
        assert procrustes(np.c_[x, np.zeros((100, 2))], x, kind=kind) < 1e-13
        assert from_moments(Procrustes(kind), x, x @ rotation(6)) < 1e-6
    assert bures(x, x @ rotation(6)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("offset", [0, 1, 10, 100, 1000])
@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_an_offset_of_float32_inputs_costs_nothing(index, offset):
    x, y = (array.astype(np.float32) for array in pair(400, 10, 12, offset=offset))
    u, v = padded(x.astype(np.float64), y.astype(np.float64))
    nuclear = np.linalg.norm(u.T @ v, "nuc")
    cosine = nuclear / np.linalg.norm(u) / np.linalg.norm(v)
    squared = (u**2).sum() + (v**2).sum() - 2 * nuclear
    truth = {Procrustes(): math.acos(cosine), Bures(): cosine}.get(index, squared)
    assert index(x, y) == pytest.approx(truth, rel=1e-9)
    assert from_moments(index, x, y, 150) == pytest.approx(truth, rel=1e-9)
    assert from_moments(index, x, y, 150, product_dtype=torch.float32) == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_any_scale(scale):
    x, y = pair()
    assert procrustes(scale * x, y) == pytest.approx(procrustes(x, y), abs=1e-12)
    assert bures(x, scale * y) == pytest.approx(bures(x, y), abs=1e-12)
    larger = y if scale < 1 else scale * x
    if scale < 1e200:
        truth = ((larger - larger.mean(0)) ** 2).sum()
        assert procrustes(scale * x, y, kind="squared") == pytest.approx(truth, rel=1e-12)
    else:
        with pytest.raises(NotFiniteError, match="procrustes of x and y overflows float64"):
            procrustes(scale * x, y, kind="squared")


def test_scaling_both_scales_the_squared_distance():
    x, y = pair()
    assert procrustes(3 * x, 3 * y, kind="squared") == pytest.approx(9 * procrustes(x, y, kind="squared"), rel=1e-12)


@pytest.mark.parametrize("index", INDICES, ids=repr)
@pytest.mark.parametrize("rows", [slice(None, None, -1), slice(0, 40, 3), slice(0, 3)])
def test_taken_is_as_prepared_anew(index, rows):
    x, y = (torch.from_numpy(z) for z in pair(60))
    chosen = torch.from_numpy(np.arange(60)[rows].copy())
    value = index.score(*(index.taken(index.prepare(z), chosen) for z in (x, y)))
    assert float(value) == pytest.approx(index(x[chosen], y[chosen]), rel=1e-9)


@pytest.mark.parametrize("function", [procrustes, bures])
def test_a_constant_representation_is_nan_with_a_warning(function):
    x, _ = pair()
    with pytest.warns(UserWarning, match=f"{function.__name__} is NaN: x does not vary over the samples") as caught:
        assert math.isnan(function(np.full((100, 3), 0.1), x))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("function", [procrustes, bures])
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.ones(5, 2), torch.ones(4, 2), DataError, "x has 5 samples .* y has 4"),
        (torch.ones(1, 2), torch.ones(1, 2), DataError, "1 sample .* needs at least 2"),
        (torch.ones(5, 2, dtype=torch.int32), torch.ones(5, 2), DataError, "x of shape .* is torch.int32"),
        (torch.ones(5, 2), torch.full((5, 2), math.inf), NotFiniteError, "y of shape .* holds NaN"),
    ],
)
def test_bad_input_is_refused(function, x, y, error, message):
    with pytest.raises(error, match=message):
        function(x, y)


def test_parameters():
    with pytest.raises(DataError, match="unknown kind 'square'; did you mean squared"):
        Procrustes("square")  # pyright: ignore[reportArgumentType]
    assert [index.estimator.split(",")[0] for index in INDICES[:2]] == ["angular distance", "squared distance"]
    assert "Bures" in Bures().estimator
    assert [index.distance for index in INDICES] == [True, True, False]

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import cross_decomposition
from sklearn.linear_model import LinearRegression as SklearnRegression

from isthmus.base.errors import DataError, LayerNotFoundError, NotFiniteError
from isthmus.metrics import Moments
from isthmus.metrics.cca import CCA, PWCCA, SVCCA, cca, pwcca, svcca
from isthmus.metrics.regression import LinearRegression, linear_regression
from isthmus.metrics.spectrum import spectrum

ACTIVATIONS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "svcca_activations"
needs_activations = pytest.mark.skipif(
    not ACTIVATIONS.exists(), reason="the activations of trained networks are not on this machine"
)
INDICES = [CCA(), CCA(squared=False), SVCCA(0.8), PWCCA(), PWCCA("y"), PWCCA("mean"), LinearRegression()]


def inverse_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors / np.sqrt(values) @ vectors.T


def canonical(x, y):
    """Hotelling's definition: whiten the covariances by their symmetric inverse roots. Correlations and variates."""
    x, y = (np.asarray(z, dtype=np.float64) for z in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    root_x, root_y = inverse_root(x.T @ x), inverse_root(y.T @ y)
    left, rho, right = np.linalg.svd(root_x @ x.T @ y @ root_y, full_matrices=False)
    return rho, x @ root_x @ left, y @ root_y @ right.T


def weighted_mean(x, y, weights):
    """Morcos, Raghu & Bengio (2018), written out."""
    if weights == "mean":
        return (weighted_mean(x, y, "x") + weighted_mean(x, y, "y")) / 2
    rho, h_x, h_y = canonical(x, y)
    h, z = (h_x, x - x.mean(0)) if weights == "x" else (h_y, y - y.mean(0))
    alpha = [sum(abs(h[:, i] @ z[:, j]) for j in range(z.shape[1])) for i in range(len(rho))]
    return np.average(rho, weights=alpha)


def components(x, threshold):
    """Principal components by the eigenvectors of the covariance, added one by one."""
    x = x - x.mean(0)
    values, vectors = np.linalg.eigh(x.T @ x)
    kept = 1
    while values[::-1][:kept].sum() < threshold * values.sum():
        kept += 1
    return x @ vectors[:, ::-1][:, :kept]


def oracle(index, x, y):
    if isinstance(index, PWCCA):
        return weighted_mean(x, y, index.weights)
    if isinstance(index, LinearRegression):
        residual = y - SklearnRegression().fit(x, y).predict(x)
        return 1 - (residual**2).sum() / ((y - y.mean(0)) ** 2).sum()
    if isinstance(index, SVCCA):
        x, y = components(x, index.threshold), components(y, index.threshold)
    rho = canonical(x, y)[0]
    return (rho**2).mean() if index.squared else rho.mean()


def pair(n=200, p=6, q=9, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)) * np.linspace(1, 3, p)
    return x + offset, x @ rng.standard_normal((p, q)) + rng.standard_normal((n, q)) + offset


def moments_of(batch=7, product_dtype=torch.float64, **layers):
    moments = Moments(product_dtype=product_dtype)
    tensors = {name: torch.as_tensor(np.ascontiguousarray(x)) for name, x in layers.items()}
    for start in range(0, len(next(iter(tensors.values()))), batch):
        moments.update({name: x[start : start + batch] for name, x in tensors.items()})
    return moments


def from_moments(index, x, y, **keywords):
    return index.scores_from_moments(moments_of(x=x, y=y, **keywords), ["x"], ["y"]).item()


def test_golden_values():
    rng = np.random.RandomState(1337)
    x = rng.randn(100, 10)
    y = rng.randn(100, 10) + x
    for index, truth in [
        (CCA(), 0.545396),
        (CCA(squared=False), 0.731014),
        (PWCCA(), 0.734668),
        (PWCCA("y"), 0.736841),
        (LinearRegression(), 0.567743),
    ]:
        assert index(x, y) == pytest.approx(truth, abs=5e-7), index
        assert from_moments(index, x, y) == pytest.approx(truth, abs=5e-7), index
    assert linear_regression(y, x) == pytest.approx(0.563475, abs=5e-7)


@pytest.mark.parametrize("index", INDICES, ids=repr)
@pytest.mark.parametrize(("n", "p", "q"), [(200, 6, 9), (200, 9, 6), (60, 25, 25), (50, 1, 4), (3, 1, 1)])
def test_agrees_with_the_definition(index, n, p, q):
    x, y = pair(n, p, q)
    truth = oracle(index, x, y)
    assert index(x, y) == pytest.approx(truth, abs=1e-10)
    assert from_moments(index, x, y) == pytest.approx(truth, abs=1e-8)


def test_functions_are_the_indices():
    x, y = pair()
    assert cca(x, y) == CCA()(x, y)
    assert cca(x, y, squared=False) == CCA(squared=False)(x, y)
    assert svcca(x, y, threshold=0.8, squared=True) == SVCCA(0.8, squared=True)(x, y)
    assert pwcca(x, y, weights="y") == PWCCA("y")(x, y)
    assert linear_regression(x, y) == LinearRegression()(x, y)


def test_correlations_are_cosines_of_the_angles_between_subspaces():
    x, y = pair(80, 5, 7)
    cosines = np.cos(scipy.linalg.subspace_angles(x - x.mean(0), y - y.mean(0)))
    assert cca(x, y, squared=False) == pytest.approx(cosines.mean(), abs=1e-10)
    assert cca(x, y) == pytest.approx((cosines**2).mean(), abs=1e-10)


def test_agrees_with_scikit_learn():
    x, y = pair(80, 3, 4)
    u, v = cross_decomposition.CCA(n_components=3, max_iter=100_000, tol=1e-15).fit_transform(x, y)
    rho = [np.corrcoef(u[:, i], v[:, i])[0, 1] for i in range(3)]
    assert cca(x, y, squared=False) == pytest.approx(np.mean(rho), abs=1e-8)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), n=st.integers(2, 9), p=st.integers(1, 12), q=st.integers(1, 12))
def test_any_shape_stays_within_bounds_and_is_symmetric(seed, n, p, q):
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, p)), rng.standard_normal((n, q))
    for index in INDICES:
        value = index(x, y)
        assert -1e-9 <= value <= 1 + 1e-9
        if index.symmetric:
            assert index(y, x) == pytest.approx(value, abs=1e-9)
        if p >= n - 1 and not isinstance(index, SVCCA):
            assert value == pytest.approx(1, abs=1e-9)  # whatever y is, x contains it


def test_weights_of_the_other_layer():
    x, y = pair()
    assert pwcca(x, y, weights="y") == pytest.approx(pwcca(y, x, weights="x"), abs=1e-12)
    assert pwcca(x, y, weights="x") != pytest.approx(pwcca(x, y, weights="y"), abs=1e-4)


def test_tied_variates_do_not_depend_on_the_other_layers_basis():
    x, y = pair(12, 7, 8)  # together more dimensions than samples: several correlations are 1
    mixed = y @ np.random.default_rng(1).standard_normal((8, 8))
    assert sum(canonical(x, y)[0] > 1 - 1e-9) == 4
    assert pwcca(x, mixed) == pytest.approx(pwcca(x, y), abs=1e-9)
    assert pwcca(mixed, x, weights="y") == pytest.approx(pwcca(x, y), abs=1e-9)
    # The tied space is that of x and y both; its share of the weight is that of the principal axes of x within it.
    rho, h, _ = canonical(x, y)
    loadings = h.T @ (x - x.mean(0))
    _, s, axes = np.linalg.svd(loadings[:4], full_matrices=False)
    alpha = np.r_[s * np.abs(axes).sum(1), np.abs(loadings[4:]).sum(1)]
    assert pwcca(x, y) == pytest.approx(np.average(rho, weights=alpha), abs=1e-7)


@pytest.mark.parametrize("offset", [0, 1, 10, 100, 1000])
@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_an_offset_of_float32_inputs_costs_nothing(index, offset):
    x, y = (array.astype(np.float32) for array in pair(400, 10, 12, offset=offset))
    truth = oracle(index, x.astype(np.float64), y.astype(np.float64))
    assert 0.1 < truth < 0.99
    assert index(x, y) == pytest.approx(truth, abs=1e-9)
    assert from_moments(index, x, y, batch=150) == pytest.approx(truth, abs=1e-9)
    assert from_moments(index, x, y, batch=150, product_dtype=torch.float32) == pytest.approx(truth, abs=1e-6)


# SVCCA's components


def test_as_many_components_as_the_variance_asks_for():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((300, 60)) - rng.standard_normal(60))[0]
    basis = np.linalg.qr(basis - basis.mean(0))[0]
    x = basis * np.sqrt(np.r_[np.full(40, 0.02475), np.full(20, 0.0005)])  # 40 components carry exactly 99 %
    state = spectrum(torch.from_numpy(x))
    assert SVCCA(0.9899).reduced(state).rank == 40
    assert SVCCA(0.9901).reduced(state).rank == 41
    assert SVCCA(0.02).reduced(state).rank == 1
    assert SVCCA(1.0).reduced(state).rank == 60


def test_shared_components_of_large_variance_are_found_among_noise():
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((500, 5))
    x, y = (shared @ rng.standard_normal((5, 50)) + 0.01 * rng.standard_normal((500, 50)) for _ in range(2))
    assert svcca(x, y) > 0.999
    assert cca(x, y, squared=False) < 0.5


def test_one_component_of_forty():
    """A threshold that is met by the first component alone keeps that one; 0.99 does not, for equal variances."""
    x, y = pair(400, 40, 40)
    assert svcca(x, y) == pytest.approx(oracle(SVCCA(), x, y), abs=1e-10)
    assert SVCCA().reduced(spectrum(torch.from_numpy(x))).rank > 35


# Dependent, dead and constant units


def test_dead_and_dependent_units_change_nothing():
    x, y = pair()
    more = np.c_[x, np.full((200, 3), 0.1), x @ np.ones((6, 2)), np.zeros((200, 1))]
    assert spectrum(torch.from_numpy(more)).rank == 6
    for index in (CCA(), CCA(squared=False), LinearRegression()):
        assert index(more, y) == pytest.approx(index(x, y), abs=1e-10)
        assert from_moments(index, more, y) == pytest.approx(index(x, y), abs=1e-7)
        assert index(more, x) == pytest.approx(1, abs=1e-10)
        assert index(more, more) == pytest.approx(1, abs=1e-10)


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize(("n", "units"), [(300, 40), (100, 150)])
def test_units_that_depend_on_each_other_but_for_float32_rounding(n, units, offset):
    rng = np.random.default_rng(0)
    inputs, other = rng.standard_normal((n, 12)), rng.standard_normal((n, 5))
    matrix = rng.standard_normal((12, units))
    wide = torch.from_numpy(inputs).float() @ torch.from_numpy(matrix).float() + offset  # of 12 dimensions
    assert spectrum(wide).rank > 12
    assert spectrum(wide).significant == 12
    for index in (CCA(), CCA(squared=False), SVCCA(1.0), LinearRegression()):
        assert index(wide, other) == pytest.approx(index(inputs, other), abs=1e-5)
        assert from_moments(index, wide, other) == pytest.approx(index(inputs, other), abs=1e-5)


@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_a_constant_representation_is_nan_with_a_warning(index):
    x, _ = pair(40)
    constant = np.full((40, 3), 0.1)
    with pytest.warns(UserWarning, match=f"{index.name} is NaN: y does not vary over the samples") as caught:
        assert math.isnan(index(x, constant))
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="x and y do not vary over the samples"):
        assert math.isnan(index(constant, constant))
    with pytest.warns(UserWarning, match="layer 'dead' does not vary"):
        values = index.scores_from_moments(moments_of(x=x, dead=constant), ["dead", "x"], ["dead", "x"])
    assert values.isnan().tolist() == [[True, True], [True, False]]


def test_warnings_of_functions_point_at_their_caller():
    for function in (cca, svcca, pwcca, linear_regression):
        with pytest.warns(UserWarning, match="does not vary") as caught:
            function(pair(40)[0], np.ones((40, 2)))
        assert caught[0].filename == __file__


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_any_scale(index, scale):
    x, y = pair()
    assert index(scale * x, y) == pytest.approx(index(x, y), abs=1e-10)
    assert index(x, scale * y) == pytest.approx(index(x, y), abs=1e-10)


# Permutations and subsets of the samples


@pytest.mark.parametrize("index", INDICES, ids=repr)
@pytest.mark.parametrize("kind", ["permutation", "subset", "few", "bootstrap"])
def test_taken_is_as_prepared_anew(index, kind):
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(z) for z in pair(60))
    rows = torch.from_numpy({
        "permutation": rng.permutation(60),
        "subset": rng.permutation(60)[:40],
        "few": rng.permutation(60)[:5],  # fewer than units: another rank
        "bootstrap": rng.integers(0, 60, 60),
    }[kind])  # fmt: skip
    value = index.score(index.taken(index.prepare(x), rows), index.prepare(y[rows]))
    assert float(value) == pytest.approx(index(x[rows], y[rows]), abs=1e-9)
    shuffled = index.score(index.taken(index.prepare(x), rows), index.taken(index.prepare(y), rows))
    assert float(shuffled) == pytest.approx(index(x[rows], y[rows]), abs=1e-9)


def test_all_pairs_are_one_score_each():
    x, y = pair()
    layers = [torch.from_numpy(z) for z in (x, y, np.tanh(x))]
    states = [CCA().prepare(z) for z in layers]
    truth = [[cca(a, b) for b in layers[:2]] for a in layers]
    np.testing.assert_allclose(CCA().scores(states, states[:2]), truth, rtol=1e-12)
    values = CCA().scores_from_moments(moments_of(a=layers[0], b=layers[1], c=layers[2]), list("abc"), list("ab"))
    np.testing.assert_allclose(values, truth, atol=1e-10)


# Activations of trained networks


def activations(name):
    with np.load(ACTIVATIONS / f"{name}.npz") as file:
        return file["model_0"].astype(np.float64), file["model_1"].astype(np.float64)


# Both files are said to hold units x samples. The known value of SVHN comes out with its rows as the samples; as it is
# said to be, 1,000 units of 200 samples, every space is whole and every correlation 1.
@needs_activations
@pytest.mark.parametrize(
    ("name", "samples_first", "truth"),
    [("MNIST_lay04", False, 0.7057263), ("SVHN_lay06", True, 0.5481822), ("SVHN_lay06", False, 1)],
)
def test_mean_correlation_of_trained_networks(name, samples_first, truth):
    x, y = (z if samples_first else np.ascontiguousarray(z.T) for z in activations(name))
    assert cca(x, y, squared=False) == pytest.approx(truth, abs=1e-6)
    assert from_moments(CCA(squared=False), x, y, batch=500) == pytest.approx(truth, abs=1e-6)


# The code that was published with the paper leaves the whitening out of the variates; it gives the other values.
@needs_activations
@pytest.mark.parametrize(
    ("name", "samples_first", "regression", "without_whitening"),
    [
        ("MNIST_lay04", False, (0.807445, 0.798955), (0.737201, 0.817963)),
        ("SVHN_lay06", True, (0.665171, 0.666192), (0.712649, 0.713682)),
    ],
)
def test_weighted_correlation_of_trained_networks(name, samples_first, regression, without_whitening):
    x, y = (z if samples_first else z.T for z in activations(name))
    for weights, value, other in zip(("x", "y"), regression, without_whitening, strict=True):
        assert weighted_mean(x, y, weights) == pytest.approx(value, abs=5e-7)
        assert pwcca(x, y, weights=weights) == pytest.approx(value, abs=5e-7)
        assert abs(pwcca(x, y, weights=weights) - other) > 0.01


# Bad input


@pytest.mark.parametrize("function", [cca, svcca, pwcca, linear_regression])
@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.ones(5, 2), torch.ones(4, 2), DataError, r"x has 5 samples \(shape \(5, 2\)\), y has 4"),
        (torch.ones(1, 2), torch.ones(1, 2), DataError, "1 sample .* needs at least 2"),
        (torch.ones(5, 2), torch.ones(5, 2, dtype=torch.long), DataError, "y of shape .* is torch.int64"),
        (torch.ones(5, 2, 2), torch.ones(5, 2), DataError, "x has shape .*as_samples"),
        (torch.full((5, 2), math.nan), torch.ones(5, 2), NotFiniteError, "x of shape .* holds NaN"),
    ],
)
def test_bad_input_is_refused(function, x, y, error, message):
    with pytest.raises(error, match=message):
        function(x, y)


def test_bad_parameters_are_refused():
    for threshold in (0, -1, 1.01, math.nan):
        with pytest.raises(DataError, match=f"threshold is {threshold}; expected a share"):
            SVCCA(threshold)
    with pytest.raises(DataError, match="unknown weights 'means'; did you mean mean"):
        PWCCA("means")  # pyright: ignore[reportArgumentType]


def test_moments_that_do_not_suffice_are_refused():
    moments = Moments([("x", "x"), ("y", "y")])
    moments.update({"x": torch.randn(9, 2), "y": torch.randn(9, 2)})
    with pytest.raises(LayerNotFoundError, match="'x' and 'y' were not kept"):
        CCA().scores_from_moments(moments, ["x"], ["y"])
    with pytest.raises(DataError, match="'x' has 1 sample; cca needs at least 2"):
        CCA().scores_from_moments(moments_of(x=np.ones((1, 2))), ["x"], ["x"])


def test_estimators_are_named():
    assert CCA().estimator == "mean squared canonical correlation"
    assert SVCCA().estimator == "mean canonical correlation of the components with 0.99 of the variance"
    assert PWCCA("mean").estimator == "canonical correlations weighted by the mean over both layers' projections"
    assert PWCCA("y").estimator == "canonical correlations weighted by y's projections"
    assert "y predicted from x" in LinearRegression().estimator
    assert [index.symmetric for index in (PWCCA(), PWCCA("mean"), CCA(), LinearRegression())] == [0, 1, 1, 0]

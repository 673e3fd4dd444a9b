from __future__ import annotations

import math
from importlib import import_module
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.base.errors import DataError, LayerNotFoundError, NotFiniteError
from isthmus.metrics import Moments, cka, cka_from_moments
from isthmus.metrics.cka import CKA
from isthmus.metrics.hsic import HSIC, hsic

ACTIVATIONS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "svcca_activations"


def through_grams(x, y):
    """The definition: normalised HSIC of the linear kernels, with the centring matrix written out."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    H = np.eye(len(x)) - 1 / len(x)

    def hsic(k, l):  # noqa: E741
        return np.trace(k @ H @ l @ H)

    k, l = x @ x.T, y @ y.T  # noqa: E741
    return hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l))


def pair(n=40, p=6, q=9, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    return x + offset, x @ rng.standard_normal((p, q)) + rng.standard_normal((n, q)) + offset


def from_moments(x, y, batch=7, **keywords):
    moments = Moments(**keywords)
    for start in range(0, len(x), batch):
        moments.update({"x": torch.as_tensor(x[start : start + batch]), "y": torch.as_tensor(y[start : start + batch])})
    return cka_from_moments(moments, ["x"], ["y"]).item()


def test_golden_value():
    rng = np.random.RandomState(1337)
    x = rng.randn(100, 10)
    y = rng.randn(100, 10) + x
    assert cka(x, y) == pytest.approx(0.557613, abs=5e-7)
    assert from_moments(x, y) == pytest.approx(0.557613, abs=5e-7)


@pytest.mark.skipif(not ACTIVATIONS.exists(), reason="the activations of trained networks are not on this machine")
# Both files are said to hold units x samples. The known value of SVHN comes out only with its rows as the samples.
@pytest.mark.parametrize(
    ("name", "samples_first", "truth"),
    [("MNIST_lay04", False, 0.437452), ("SVHN_lay06", True, 0.872379), ("SVHN_lay06", False, 0.177585)],
)
def test_activations_of_trained_networks(name, samples_first, truth):
    with np.load(ACTIVATIONS / f"{name}.npz") as file:
        x, y = (file[key] if samples_first else file[key].T for key in ("model_0", "model_1"))
    assert cka(x, y) == pytest.approx(truth, abs=5e-7)
    assert from_moments(np.ascontiguousarray(x), np.ascontiguousarray(y), batch=333) == pytest.approx(truth, abs=5e-7)


@pytest.mark.parametrize(("n", "p", "q"), [(5, 40, 30), (200, 3, 4), (30, 30, 2), (10, 2, 300), (2, 1, 1)])
def test_sample_and_feature_space_agree_with_the_definition(n, p, q):
    x, y = pair(n, p, q)
    truth = through_grams(x, y)
    assert cka(x, y) == pytest.approx(truth, rel=1e-11)
    assert cka(y, x) == pytest.approx(truth, rel=1e-11)
    assert from_moments(x, y) == pytest.approx(truth, rel=1e-11)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([1e-200, -3.0, 1e200]),
    shape=st.tuples(*[st.integers(2, 12)] * 3),
)
def test_invariant_to_rotation_scale_and_translation(seed, scale, shape):
    x, y = pair(*shape, seed=seed)
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((shape[1], shape[1])))[0]
    assert cka(scale * (x @ rotation + 1), y) == pytest.approx(through_grams(x, y), rel=1e-9)
    assert cka(x, x @ rotation) == pytest.approx(1, rel=1e-12)


def test_not_invariant_to_a_stretch_of_one_axis():
    x, y = pair()
    assert abs(cka(x * np.array([10, 1, 1, 1, 1, 1]), y) - cka(x, y)) > 0.01


@pytest.mark.parametrize("offset", [0, 1, 10, 100, 1000])
def test_an_offset_of_float32_inputs_costs_nothing(offset):
    x, y = (array.astype(np.float32) for array in pair(700, 20, 30, offset=offset))
    centred = [array.astype(np.float64) - array.astype(np.float64).mean(0) for array in (x, y)]
    truth = through_grams(*centred)
    assert 0.1 < truth < 0.9
    assert cka(x, y) == pytest.approx(truth, abs=1e-9)
    assert from_moments(x, y, 300) == pytest.approx(truth, abs=1e-9)
    assert from_moments(x, y, 300, product_dtype=torch.float32) == pytest.approx(truth, abs=1e-6)
    assert from_moments(x, y, 300, product_dtype=torch.bfloat16) == pytest.approx(truth, abs=2e-3)


def test_batches_are_pooled_not_averaged():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((640, 50)), rng.standard_normal((640, 50))
    averaged = np.mean([cka(x[i : i + 16], y[i : i + 16]) for i in range(0, 640, 16)])
    assert averaged > 0.6
    assert from_moments(x, y, 16) == pytest.approx(through_grams(x, y), rel=1e-10)
    assert from_moments(x, y, 16) < 0.1


@pytest.mark.parametrize(
    "kind", [np.float16, np.float32, torch.float16, torch.bfloat16, "list", "read-only", "reversed"]
)
def test_arrays_and_tensors_of_any_floating_point_type(kind):
    x, y = pair()
    if isinstance(kind, torch.dtype):
        x, y = (torch.from_numpy(array).to(kind) for array in (x, y))
        truth = through_grams(x.double(), y.double())
    elif kind == "list":
        truth = through_grams(x, y)
        x, y = x.tolist(), y.tolist()
    elif kind == "read-only":
        x.flags.writeable = False
        truth = through_grams(x, y)
    elif kind == "reversed":
        x, y = np.asfortranarray(x)[::-1], y[::-1]  # negative strides
        truth = through_grams(x, y)
    else:
        x, y = x.astype(kind), y.astype(kind)
        truth = through_grams(x, y)
    assert cka(x, y) == pytest.approx(truth, rel=1e-11)


def test_no_gradient_and_no_change_of_the_input():
    x, y = (torch.from_numpy(array).requires_grad_() for array in pair())
    before = x.detach().clone()
    assert isinstance(cka(x, y), float)
    assert torch.equal(x, before)


def test_a_constant_representation_is_nan_with_a_warning():
    x, _ = pair()
    constant = np.full((40, 3), 0.1)
    with pytest.warns(UserWarning, match="y does not vary over the samples"):
        assert math.isnan(cka(x, constant))
    with pytest.warns(UserWarning, match="x does not vary over the samples"):
        assert math.isnan(cka(constant, x))


def test_a_constant_layer_is_nan_in_its_row_only():
    x, y = pair()
    moments = Moments()
    layers = {"x": torch.from_numpy(x), "dead": torch.full((40, 2), 0.1), "y": torch.from_numpy(y)}
    moments.update({name: layer[:11] for name, layer in layers.items()})
    moments.update({name: layer[11:] for name, layer in layers.items()})
    with pytest.warns(UserWarning, match="layer 'dead' does not vary"):
        values = cka_from_moments(moments, layers, layers)
    assert values[1].isnan().all()
    assert values[:, 1].isnan().all()
    truth = through_grams(x, y)
    np.testing.assert_allclose(values[::2, ::2], [[1, truth], [truth, 1]], rtol=1e-12)


def test_matrix_of_layers_reads_pairs_in_either_order():
    x, y = pair()
    layers = {"x": torch.from_numpy(x), "y": torch.from_numpy(y), "z": torch.from_numpy(x**2)}
    moments = Moments([("y", "x"), ("x", "x"), ("y", "y"), ("z", "y"), ("z", "z")])
    moments.update(layers)
    values = cka_from_moments(moments, ["x", "z"], ["y"])
    assert values.dtype == torch.float64
    np.testing.assert_allclose(values, [[through_grams(x, y)], [through_grams(x**2, y)]], rtol=1e-12)
    with pytest.raises(LayerNotFoundError, match="'x' and 'z' were not kept"):
        cka_from_moments(moments, ["x"], ["z"])


def test_moments_of_one_sample_are_refused():
    moments = Moments()
    moments.update({"x": torch.ones(1, 3)})
    with pytest.raises(DataError, match="'x' has 1 sample"):
        cka_from_moments(moments, ["x"], ["x"])


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.ones(5, 2), torch.ones(4, 2), DataError, r"x has 5 samples \(shape \(5, 2\)\), y has 4"),
        (torch.ones(1, 2), torch.ones(1, 2), DataError, "1 sample .*at least 2"),
        (torch.ones(5, 2), torch.ones(5, 2, dtype=torch.long), DataError, "y of shape .* is torch.int64"),
        (np.ones((5, 2), dtype=int), torch.ones(5, 2), DataError, "x of shape .* is torch.int64"),
        (torch.ones(5, 2), torch.ones(5, 2, 2), DataError, r"y has shape \(5, 2, 2\).*as_samples"),
        (torch.ones(5, 0), torch.ones(5, 2), DataError, "x has shape .*not empty"),
        (np.array([["a"]]), torch.ones(5, 2), DataError, "x is no numeric array"),
        (torch.ones(5, 2), torch.ones(5, 2, device="meta"), DataError, "x is on cpu, y on meta"),
        (torch.ones(5, 2) / 0, torch.ones(5, 2), NotFiniteError, r"x of shape \(5, 2\) holds NaN"),
        (torch.ones(5, 2), torch.full((5, 2), math.nan), NotFiniteError, r"y of shape \(5, 2\) holds NaN"),
    ],
)
def test_bad_input_is_refused(x, y, error, message):
    with pytest.raises(error, match=message):
        cka(x, y)


# Kernels and estimators


def golden():
    rng = np.random.RandomState(1337)
    x = rng.randn(100, 10)
    return x, rng.randn(100, 10) + x


def kernel_of(x, kernel="linear", bandwidth=1.0):
    x = np.asarray(x, dtype=np.float64)
    if kernel == "linear":
        return x @ x.T
    squares = np.array([[((a - b) ** 2).sum() for b in x] for a in x])
    return np.exp(-squares / (2 * bandwidth**2 * np.median(squares)))  # the zeros of the diagonal count


def song(k, l):  # noqa: E741
    """Song et al. (2012), equation 5, with the matrices written out."""
    n = len(k)
    k, l, one = k - np.diag(np.diag(k)), l - np.diag(np.diag(l)), np.ones(n)  # noqa: E741
    middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ l) + middle - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


def gretton(k, l):  # noqa: E741
    H = np.eye(len(k)) - 1 / len(k)
    return np.trace(k @ H @ l @ H) / (len(k) - 1) ** 2


def through_kernels(x, y, debiased, **keywords):
    k, l = kernel_of(x, **keywords), kernel_of(y, **keywords)  # noqa: E741
    estimate = song if debiased else gretton
    return estimate(k, l), estimate(k, l) / np.sqrt(estimate(k, k) * estimate(l, l))


def test_golden_value_debiased():
    x, y = golden()
    assert cka(x, y, debiased=True) == pytest.approx(0.513456, abs=5e-7)
    # The other thing that is called unbiased, a diagonal that is masked after centring, is 0.513946.
    k, l = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y))  # noqa: E741
    k, l = (m - np.diag(np.diag(m)) for m in (k, l))  # noqa: E741
    assert (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum()) == pytest.approx(0.513946, abs=5e-7)


@pytest.mark.parametrize(
    ("bandwidth", "truth"), [(0.2, 0.989807), (0.4, 0.748200), (0.5, 0.654831), (0.8, 0.585857), (1.0, 0.575832)]
)
def test_golden_values_rbf(bandwidth, truth):
    x, y = golden()
    assert cka(x, y, kernel="rbf", bandwidth=bandwidth) == pytest.approx(truth, abs=5e-7)
    # Without the diagonal's zeros the median is larger, and the values are others: 0.989614 … 0.575737.


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("keywords", [{}, {"kernel": "rbf"}, {"kernel": "rbf", "bandwidth": 0.3}])
@pytest.mark.parametrize(("n", "p", "q"), [(5, 40, 30), (4, 2, 3), (70, 3, 4), (30, 30, 2)])
def test_hsic_and_cka_agree_with_the_definition(debiased, keywords, n, p, q):
    x, y = pair(n, p, q)
    truth = through_kernels(x, y, debiased, **keywords)
    assert hsic(x, y, debiased=debiased, **keywords) == pytest.approx(truth[0], rel=1e-10, abs=1e-14)
    assert cka(x, y, debiased=debiased, **keywords) == pytest.approx(truth[1], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shape", [(6, 2, 3), (6, 20, 30)])
def test_debiased_hsic_is_the_mean_over_quadruples(shape):
    """The U-statistic by brute force: Song et al. (2012), equation 4, over all tuples of distinct samples."""
    x, y = pair(*shape)
    k, l = kernel_of(x), kernel_of(y)  # noqa: E741
    terms = [
        (k[i, j] * l[i, j] + k[i, j] * l[q, r] - 2 * k[i, j] * l[i, q]) for i, j, q, r in permutations(range(6), 4)
    ]
    assert hsic(x, y, debiased=True) == pytest.approx(np.mean(terms), rel=1e-10)


def test_debiased_is_zero_on_average_where_biased_is_not():
    rng = np.random.default_rng(0)
    draws = [rng.standard_normal((2, 16, 50)) for _ in range(200)]
    debiased = [cka(x, y, debiased=True) for x, y in draws]
    assert np.mean([cka(x, y) for x, y in draws]) > 0.7
    assert abs(np.mean(debiased)) < 4 * np.std(debiased) / math.sqrt(200)
    assert min(debiased) < -0.05  # not clamped


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("offset", [0, 1, 10, 100, 1000])
def test_an_offset_costs_no_kernel_anything(debiased, kernel, offset):
    x, y = (array.astype(np.float32) for array in pair(120, 20, 30, offset=offset))
    x64, y64 = (array.astype(np.float64) - array.astype(np.float64).mean(0) for array in (x, y))
    truth = through_kernels(x64, y64, debiased, kernel=kernel)[1]
    assert cka(x, y, kernel=kernel, debiased=debiased) == pytest.approx(truth, abs=1e-9)


INDICES = [kind(kernel, debiased) for kind, kernel, debiased in product((CKA, HSIC), ("linear", "rbf"), (False, True))]


@pytest.mark.parametrize("index", INDICES, ids=repr)
@pytest.mark.parametrize("n", [9, 60])
def test_all_pairs_are_one_score_each(index, n):
    layers = [torch.from_numpy(z) for z in (*pair(n, 5, 30), np.tanh(pair(n, 12, 3)[0]))]
    states = [index.prepare(z) for z in layers]
    truth = [[index(a, b) for b in layers[1:]] for a in layers]
    np.testing.assert_allclose(index.scores(states, states[1:]), truth, rtol=1e-9)
    np.testing.assert_allclose(index.scores(states, states[1:]), truth, rtol=1e-9)  # what was formed is used again


@pytest.mark.parametrize("kind", ["permutation", "subset", "bootstrap"])
@pytest.mark.parametrize("formed", [False, True])
@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_taken_is_as_prepared_anew(index, formed, kind):
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(z) for z in pair(40))
    rows = torch.from_numpy({
        "permutation": rng.permutation(40), "subset": rng.permutation(40)[:25], "bootstrap": rng.integers(0, 40, 40)
    }[kind])  # fmt: skip
    states = [index.prepare(z) for z in (x, y)]
    if formed:
        assert [state.matrix.shape for state in states] == [(40, 40)] * 2
    truth = index(x[rows], y[rows])
    if index.kernel == "rbf" and kind != "permutation":  # the bandwidth stays that of all samples
        k, l = (kernel_of(z, "rbf")[rows][:, rows] for z in (x, y))  # noqa: E741
        estimate = song if index.debiased else gretton
        truth = estimate(k, l)
        if isinstance(index, CKA):
            truth /= np.sqrt(estimate(k, k) * estimate(l, l))
    value = index.score(*(index.taken(state, rows) for state in states))
    assert float(value) == pytest.approx(truth, rel=1e-9)
    if kind == "permutation":
        again = [index.taken(index.taken(state, rows), rows.flip(0)[:20]) for state in states]
        assert float(index.score(*again)) == pytest.approx(
            float(index.score(*(index.taken(state, rows[rows.flip(0)[:20]]) for state in states))), rel=1e-9
        )


def test_kernels_in_blocks(monkeypatch):
    monkeypatch.setattr(import_module("isthmus.metrics.hsic"), "_BLOCK_ENTRIES", 500)
    x, y = pair(50, 30, 40)
    assert cka(x, y, kernel="rbf") == pytest.approx(through_kernels(x, y, False, kernel="rbf")[1], rel=1e-10)


def test_equidistant_samples_have_no_debiased_cka():
    x, y = np.eye(12), pair(12)[0]
    assert 0 < cka(x, y) < 1
    for index in (CKA(debiased=True), CKA("rbf", debiased=True)):
        with pytest.warns(UserWarning, match="cka is NaN: undefined for these samples"):
            assert math.isnan(index(x, y))
    assert hsic(x, y, debiased=True) == pytest.approx(0, abs=1e-15)


def test_equal_samples_have_no_bandwidth():
    x = np.zeros((20, 3))
    x[:5] = pair(5, 3)[0]  # most of the distances are zero
    for function in (cka, hsic):
        with pytest.warns(UserWarning, match=f"{function.__name__} is NaN: undefined for these samples") as caught:
            assert math.isnan(function(x, pair(20)[0], kernel="rbf"))
        assert caught[0].filename == __file__
    assert 0 < cka(x, pair(20)[0]) < 1


def test_hsic_of_a_constant_is_zero():
    x, _ = pair()
    assert hsic(x, np.full((40, 2), 0.1)) == 0
    assert hsic(x, np.full((40, 2), 0.1), debiased=True) == 0
    with pytest.warns(UserWarning, match="hsic is NaN: y does not vary"):
        assert math.isnan(hsic(x, np.full((40, 2), 0.1), kernel="rbf"))


@pytest.mark.parametrize("scale", [1e-200, 1e200])
@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_any_scale(kernel, debiased, scale):
    x, y = pair()
    truth = cka(x, y, kernel=kernel, debiased=debiased)
    assert cka(scale * x, y, kernel=kernel, debiased=debiased) == pytest.approx(truth, rel=1e-9)
    if kernel == "linear" and scale > 1:
        with pytest.raises(NotFiniteError, match=r"HSIC of activations of shape \(40, 6\) overflows float64"):
            hsic(scale * x, y, debiased=debiased)


def test_hsic_from_moments():
    x, y = pair()
    moments = Moments()
    moments.update({"x": torch.from_numpy(x), "y": torch.from_numpy(y)})
    values = HSIC().scores_from_moments(moments, ["x", "y"], ["y"])
    np.testing.assert_allclose(values, [[hsic(x, y)], [hsic(y, y)]], rtol=1e-12)
    assert CKA().from_moments
    for index in (CKA("rbf"), CKA(debiased=True), HSIC("rbf")):
        assert not index.from_moments
        with pytest.raises(DataError, match=rf"{index.name} .* needs the samples themselves"):
            index.scores_from_moments(moments, ["x"], ["y"])


def test_debiased_needs_four_samples():
    x, y = pair(3)
    with pytest.raises(DataError, match=r"3 samples .*cka needs at least 4"):
        cka(x, y, debiased=True)
    assert 0 < cka(x, y) <= 1


def test_bad_parameters_are_refused():
    with pytest.raises(DataError, match="unknown kernel 'rfb'; did you mean rbf"):
        CKA("rfb")  # pyright: ignore[reportArgumentType]
    for bandwidth in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(DataError, match=f"bandwidth is {bandwidth}; expected a positive"):
            HSIC("rbf", bandwidth=bandwidth)
    with pytest.raises(DataError, match=r"bandwidth=0\.5 is for kernel='rbf'"):
        CKA(bandwidth=0.5)


def test_estimators_are_named():
    assert CKA().estimator == "biased, linear kernel"
    assert CKA("rbf", True, 0.5).estimator == "debiased, RBF (σ = 0.5 × median distance) kernel"

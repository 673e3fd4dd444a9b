from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.base.errors import DataError, LayerNotFoundError, NotFiniteError
from isthmus.metrics import Moments, cka, cka_from_moments

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
@pytest.mark.parametrize(
    ("name", "samples_first", "truth"), [("MNIST_lay04", False, 0.437452), ("SVHN_lay06", True, 0.872379)]
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

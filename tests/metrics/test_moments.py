from __future__ import annotations

import json
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from isthmus.base.errors import CheckpointError, DataError, LayerNotFoundError, NotFiniteError, OutputError
from isthmus.metrics import Moments

UNITS = {"x": 3, "y": 4}


def draw(n, seed, offset=0.0, dtype: type[np.floating] = np.float64):
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((n, 2))
    return {
        name: (common @ rng.standard_normal((2, p)) + rng.standard_normal((n, p)) + offset).astype(dtype)
        for name, p in UNITS.items()
    }


def stream(arrays, cuts, **keywords):
    moments = Moments(**keywords)
    edges = [0, *cuts, len(arrays["x"])]
    for start, stop in pairwise(edges):
        moments.update({name: torch.from_numpy(array[start:stop]) for name, array in arrays.items()})
    return moments


def dense(arrays):
    """Means and covariances from all samples at once, by numpy in float64."""
    whole = {name: array.astype(np.float64) for name, array in arrays.items()}
    # Twice: at a large offset the mean itself is rounded.
    centred = {name: array - array.mean(0) for name, array in whole.items()}
    centred = {name: array - array.mean(0) for name, array in centred.items()}
    n = len(whole["x"])
    covariance = {(a, b): centred[a].T @ centred[b] / n for a in UNITS for b in UNITS}
    return {name: array.mean(0) for name, array in whole.items()}, covariance


def assert_agrees(moments, arrays, tolerance):
    mean, covariance = dense(arrays)
    for a in UNITS:
        assert moments.count(a) == len(arrays["x"])
        np.testing.assert_allclose(moments.mean(a), mean[a], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(moments.variance(a), np.diag(covariance[a, a]), rtol=tolerance, atol=1e-300)
        for b in UNITS:
            scale = np.sqrt(np.outer(np.diag(covariance[a, a]), np.diag(covariance[b, b])))
            error = np.abs(moments.covariance(a, b).numpy() - covariance[a, b])
            assert (error <= tolerance * scale).all(), (a, b, (error / scale).max())


splits = st.integers(2, 60).flatmap(
    lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n - 1), unique=True, max_size=8).map(sorted))
)


@settings(max_examples=60, deadline=None)
@given(split=splits, seed=st.integers(0, 2**20), offset=st.sampled_from([0.0, -30.0, 1e3, 1e6]))
def test_any_split_into_batches_equals_the_whole(split, seed, offset):
    n, cuts = split
    arrays = draw(n, seed, offset)
    assert_agrees(stream(arrays, cuts), arrays, 1e-12)


@settings(max_examples=25, deadline=None)
@given(split=splits, seed=st.integers(0, 2**20))
def test_float32_inputs_at_an_offset_of_a_thousand(split, seed):
    n, cuts = split
    arrays = draw(n, seed, 1e3, np.float32)
    assert_agrees(stream(arrays, cuts), arrays, 1e-12)
    assert_agrees(stream(arrays, cuts, product_dtype=torch.float32), arrays, 2e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), sizes=st.tuples(*[st.integers(1, 20)] * 3), offset=st.sampled_from([0.0, 1e6]))
def test_any_merge_order_equals_the_whole(seed, sizes, offset):
    arrays = draw(sum(sizes), seed, offset)
    edges = np.cumsum([0, *sizes])
    for order in permutations(range(3)):

        def part(i):
            return stream({name: array[edges[i] : edges[i + 1]] for name, array in arrays.items()}, [])

        i, j, k = order
        assert_agrees(part(i).merge(part(j)).merge(part(k)), arrays, 1e-12)
        assert_agrees(part(i).merge(part(j).merge(part(k))), arrays, 1e-12)


@pytest.mark.parametrize("offset", [0, 1, 10, 100, 1000])
def test_precision_of_low_products_does_not_depend_on_the_offset(offset):
    arrays = draw(2000, 0, offset, np.float32)
    cuts = [300, 301, 1500]
    assert_agrees(stream(arrays, cuts, product_dtype=torch.float32), arrays, 1e-6)
    moments, (_, covariance) = stream(arrays, cuts, product_dtype=torch.bfloat16), dense(arrays)
    for pair in moments.pairs:
        np.testing.assert_allclose(moments.covariance(*pair), covariance[pair], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inputs_of_any_floating_point_type(dtype):
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    moments = Moments()
    moments.update({"x": x})
    truth = np.cov(x.double().numpy().T, bias=True)
    np.testing.assert_allclose(moments.covariance("x", "x"), truth, rtol=1e-12, atol=1e-14)
    assert moments.mean("x").dtype == moments.covariance("x", "x").dtype == torch.float64


def test_corrections_and_correlation_against_numpy():
    arrays = draw(40, 3)
    moments = stream(arrays, [7, 20])
    both = np.concatenate([arrays["x"], arrays["y"]], 1)
    np.testing.assert_allclose(moments.covariance("x", "y", correction=1), np.cov(both.T)[:3, 3:], rtol=1e-10)
    np.testing.assert_allclose(moments.variance("y", correction=1), arrays["y"].var(0, ddof=1), rtol=1e-10)
    np.testing.assert_allclose(moments.correlation("y", "x"), np.corrcoef(both.T)[3:, :3], rtol=1e-10)
    with pytest.raises(DataError, match="40 samples are too few for correction=40"):
        moments.variance("x", correction=40)


def test_pairs_keep_their_order_and_can_be_read_both_ways():
    arrays = draw(30, 1)
    moments = stream(arrays, [10], pairs=[("y", "x"), ("x", "x"), ("x", "y")])
    assert moments.pairs == (("y", "x"), ("x", "x"))
    truth = dense(arrays)[1]
    np.testing.assert_allclose(moments.covariance("y", "x"), truth["y", "x"], atol=1e-12)
    np.testing.assert_allclose(moments.covariance("x", "y"), truth["x", "y"], atol=1e-12)
    with pytest.raises(LayerNotFoundError, match=r"'y' and 'y' were not kept; add the pair \('y', 'y'\)"):
        moments.covariance("y", "y")
    with pytest.raises(LayerNotFoundError, match="no moments of layer 'xx'; did you mean x"):
        moments.correlation("x", "xx")


def test_all_pairs_and_none():
    arrays = draw(30, 1)
    every, none = stream(arrays, []), stream(arrays, [9], pairs="none")
    assert every.pairs == (("x", "x"), ("x", "y"), ("y", "y"))
    assert every.names == none.names == ("x", "y")
    assert none.pairs == ()
    np.testing.assert_allclose(none.variance("x"), arrays["x"].var(0), rtol=1e-12)
    assert repr(none) == "Moments(x: 30 x 3, y: 30 x 4; 0 pairs)"
    assert repr(Moments()) == "Moments(no samples; 0 pairs)"


def test_layers_outside_all_pairs_may_differ_in_samples():
    moments = Moments([("x", "x")])
    x, pool = torch.arange(8.0).reshape(4, 2), torch.arange(3.0)[:, None]
    moments.update({"x": x, "pool": pool})
    assert (moments.count("x"), moments.count("pool")) == (4, 3)
    np.testing.assert_allclose(moments.variance("pool"), [2 / 3], rtol=1e-15)


def test_constant_units_have_no_variance_and_no_correlation():
    moments = Moments()
    generator = torch.Generator().manual_seed(0)
    for n in (3, 7, 11):
        x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
        x[:, 1] = 0.1
        moments.update({"x": x})
    assert moments.variance("x")[1] == 0
    correlation = moments.correlation("x", "x")
    assert correlation[1].isnan().all()
    assert correlation[:, 1].isnan().all()
    kept = correlation[[0, 2]][:, [0, 2]]
    assert kept.isfinite().all()
    np.testing.assert_allclose(kept.diag(), 1, rtol=1e-14)


def test_same_batches_same_bits():
    arrays = draw(500, 5, 3.0)
    first, second = (stream(arrays, [100, 350], product_dtype=torch.float32) for _ in range(2))
    assert torch.equal(first.covariance("x", "y"), second.covariance("x", "y"))


def test_activations_are_left_alone_and_may_need_gradients():
    x = torch.randn(6, 2, requires_grad=True, generator=torch.Generator().manual_seed(0))
    before = x.detach().clone()
    moments = Moments()
    moments.update({"x": x})
    assert torch.equal(x, before)
    assert not moments.mean("x").requires_grad


def test_nothing_of_a_batch_is_kept():
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = x.mean(0)
    moments = Moments()
    moments.update({"x": x})
    x += 100
    np.testing.assert_allclose(moments.mean("x"), mean, rtol=1e-12)


def test_can_start_in_inference_mode_and_go_on_outside():
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    moments = Moments()
    with torch.inference_mode():
        moments.update({"x": x[:3] * 1})
    moments.update({"x": x[3:]})
    np.testing.assert_allclose(moments.variance("x"), x.double().numpy().var(0), rtol=1e-12)


def state(moments):
    return [
        moments.count("x"),
        *(moments.mean(n).tolist() for n in moments.names),
        moments.covariance("x", "y").tolist(),
    ]


NAN = torch.full((5, 4), float("nan"))


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"x": torch.ones(5, 3), "y": NAN}, NotFiniteError, r"'y' of shape \(5, 4\) holds NaN"),
        ({"x": torch.ones(5, 3), "y": torch.ones(5, 4) / 0}, NotFiniteError, "layer 'y'"),
        (
            {"x": torch.ones(5, 3), "y": torch.ones(4, 4)},
            DataError,
            "'x' and 'y' have 5 and 4 samples.*positions='mean'",
        ),
        ({"x": torch.ones(5, 3), "y": torch.ones(5, 5)}, DataError, r"'y' has 5 units \(shape \(5, 5\)\).* had 4"),
        ({"x": torch.ones(5, 3)}, DataError, "holds the layers x; expected x, y"),
        ({"x": torch.ones(5, 3), "y": torch.ones(5, 4), "z": torch.ones(5, 1)}, DataError, "layers x, y, z"),
        ({}, DataError, r"layers \(none\)"),
        ({"x": torch.ones(5, 3), "y": torch.ones(5, 4, 1)}, DataError, r"'y' has shape \(5, 4, 1\).*as_samples"),
        ({"x": torch.ones(0, 3), "y": torch.ones(0, 4)}, DataError, "not empty"),
        ({"x": torch.ones(5, 3), "y": torch.ones(5, 4, dtype=torch.int32)}, DataError, "torch.int32"),
        ({"x": torch.ones(5, 3), "y": torch.ones(5, 4, device="meta")}, DataError, r"'y' is on meta.*move them with"),
    ],
)
def test_a_refused_batch_changes_nothing(batch, error, message):
    moments = stream(draw(30, 1), [12])
    before = state(moments)
    with pytest.raises(error, match=message):
        moments.update(batch)
    assert state(moments) == before
    moments.update({"x": torch.ones(5, 3), "y": torch.ones(5, 4)})
    assert moments.count("x") == 35


def test_a_refused_first_batch_leaves_it_empty():
    moments = Moments()
    with pytest.raises(NotFiniteError):
        moments.update({"x": torch.ones(5, 4), "y": NAN})
    assert moments.names == ()
    assert moments.pairs == ()
    with pytest.raises(LayerNotFoundError, match="no batch has been added yet"):
        moments.mean("x")
    with pytest.raises(DataError, match="on cpu and meta"):
        moments.update({"x": torch.ones(5, 4), "y": torch.ones(5, 4, device="meta")})
    moments.update({"z": torch.ones(2, 1)})
    assert moments.names == ("z",)


def test_products_that_would_overflow_are_refused():
    x = {"x": torch.tensor([[0.0], [1e30]])}
    with pytest.raises(NotFiniteError, match=r"overflow torch\.float32"):
        Moments(product_dtype=torch.float32).update(x)
    moments = Moments()
    moments.update(x)
    assert moments.variance("x").item() == pytest.approx(0.25e60)


def test_bad_arguments():
    with pytest.raises(DataError, match=r"product_dtype is torch\.float16"):
        Moments(product_dtype=torch.float16)
    with pytest.raises(DataError, match="pairs is 'some'"):
        Moments("some")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="pairs holds 'conv1'"):
        Moments(["conv1"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(LayerNotFoundError, match=r"'conv2' of pair.*did you mean conv1"):
        Moments([("conv1", "conv2")]).update({"conv1": torch.ones(2, 2)})


def test_merge_with_empty_with_itself_and_with_another_pair_order():
    arrays = draw(30, 2)
    whole = stream(arrays, [])
    copied = Moments().merge(whole)
    assert state(copied) == state(whole)
    assert copied.pairs == whole.pairs
    assert state(whole.merge(Moments())) == state(copied)
    turned = stream(arrays, [], pairs=[("y", "x")])
    forward = stream(arrays, [], pairs=[("x", "y")])
    twice = forward.merge(turned)
    np.testing.assert_allclose(twice.covariance("x", "y"), copied.covariance("x", "y"), rtol=1e-12)
    assert twice.count("x") == 60
    copied.merge(copied)
    assert copied.count("x") == 60
    np.testing.assert_allclose(copied.covariance("x", "y"), whole.covariance("x", "y"), rtol=1e-12)
    assert whole.count("x") == 30


def test_moments_that_do_not_fit_are_not_merged():
    arrays = draw(30, 2)
    whole = stream(arrays, [])
    with pytest.raises(DataError, match="other pairs"):
        whole.merge(stream(arrays, [], pairs="none"))
    with pytest.raises(DataError, match="other pairs"):
        Moments([("x", "x")]).merge(whole)
    one, other = Moments("none"), Moments("none")
    one.update({"x": torch.ones(2, 3)})
    other.update({"x": torch.ones(2, 4)})
    with pytest.raises(DataError, match=r"\{'x': 3\} and \{'x': 4\}"):
        one.merge(other)
    assert one.count("x") == 2


def test_saved_moments_come_back_and_go_on(tmp_path):
    arrays = draw(50, 4, 10.0)
    moments = stream(
        {name: array[:30] for name, array in arrays.items()}, [11], pairs=[("y", "x"), ("x", "x"), ("y", "y")]
    )
    path = moments.save(tmp_path / "moments")
    loaded = Moments.load(path)
    assert loaded.pairs == moments.pairs
    assert loaded.names == moments.names
    assert state(loaded) == state(moments)
    loaded.update({name: torch.from_numpy(array[30:]) for name, array in arrays.items()})
    assert_agrees(loaded, arrays, 1e-12)
    assert [file.name for file in tmp_path.iterdir()] == ["moments"]


def test_empty_moments_can_be_saved(tmp_path):
    loaded = Moments.load(Moments([("x", "y")], product_dtype=torch.float32).save(tmp_path / "m"))
    assert loaded.pairs == (("x", "y"),)
    assert loaded.product_dtype == torch.float32
    every = Moments.load(Moments().save(tmp_path / "every"))
    every.update({"x": torch.ones(2, 1), "y": torch.ones(2, 1)})
    assert len(every.pairs) == 3


def test_files_that_hold_no_moments_are_refused(tmp_path):
    path = stream(draw(5, 0), []).save(tmp_path / "moments")
    damaged = tmp_path / "damaged"
    damaged.write_bytes(path.read_bytes()[:-10])
    weights = tmp_path / "weights"
    save_file({"weight": torch.ones(2)}, weights)
    partial = tmp_path / "partial"
    tensors = load_file(path)
    del tensors["shift.1"]
    content = {"counts": {"x": 5, "y": 5}, "pairs": [], "every_pair": True, "product_dtype": "float64"}
    save_file(tensors, partial, metadata={"isthmus": json.dumps({"format": "isthmus.moments.1", "content": content})})
    for file in (damaged, partial, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match=file.name):
            Moments.load(file)
    with pytest.raises(CheckpointError, match="weights holds no moments"):
        Moments.load(weights)
    with pytest.raises(OutputError):
        Moments().save(tmp_path / "no" / "folder")


def test_moves_to_a_device_in_place():
    moments = stream(draw(5, 0), [])
    assert moments.to("meta") is moments
    assert moments.mean("x").device.type == moments.covariance("x", "y").device.type == "meta"

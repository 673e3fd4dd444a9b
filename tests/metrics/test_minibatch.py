from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from isthmus.base.errors import CheckpointError, DataError, LayerNotFoundError, NotFiniteError
from isthmus.metrics.minibatch import MinibatchHSIC
from isthmus.metrics.ustatistic import centre_off_diagonal, rbf_from_products

UNITS = {"x": 3, "y": 5, "z": 4}


def draw(n, seed, offset=0.0):
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((n, 2))
    return {
        name: common @ rng.standard_normal((2, p)) + rng.standard_normal((n, p)) + offset for name, p in UNITS.items()
    }


def tensors(arrays, dtype=torch.float64):
    return {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}


def cut(arrays, edges):
    return [{name: array[i:j] for name, array in arrays.items()} for i, j in pairwise(edges)]


def stream(batches, *arguments, **keywords):
    hsic = MinibatchHSIC(*arguments, **keywords)
    for batch in batches:
        hsic.update(tensors(batch))
    return hsic


def kernel_of(x, kernel="linear", bandwidth=1.0):
    if kernel == "linear":
        return x @ x.T
    squares = np.square(x[:, None] - x[None]).sum(-1)
    return np.exp(-squares / (2 * bandwidth**2 * np.median(squares)))


def u_statistic(k, l):  # noqa: E741
    """Song et al. (2012), equation 5, term by term."""
    n = len(k)
    k, l, one = k - np.diag(np.diag(k)), l - np.diag(np.diag(l)), np.ones(n)  # noqa: E741
    sums = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ l) + sums - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


def literal(batches, a, b, *kernel):
    values = [u_statistic(kernel_of(batch[a], *kernel), kernel_of(batch[b], *kernel)) for batch in batches]
    return np.average(values, weights=[len(batch[a]) for batch in batches])


def state(hsic):
    return [hsic.batches, hsic.samples, hsic.skipped, hsic.names, [hsic.hsic(a, b) for a in "xyz" for b in "xyz"]]


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(4, 12), min_size=1, max_size=4),
    seed=st.integers(0, 2**20),
    kernel=st.sampled_from([("linear",), ("rbf", 0.5), ("rbf", 1.0)]),
    offset=st.sampled_from([0.0, 30.0]),
)
def test_is_the_u_statistic_averaged_over_batches(sizes, seed, kernel, offset):
    batches = cut(draw(sum(sizes), seed), np.cumsum([0, *sizes]))
    # The literal statistic would lose digits to the offset, on which the truth does not depend.
    hsic = stream([{name: array + offset for name, array in batch.items()} for batch in batches], *kernel)
    assert (hsic.batches, hsic.samples, hsic.skipped) == (len(sizes), sum(sizes), 0)
    for a in UNITS:
        for b in UNITS:
            truth = literal(batches, a, b, *kernel)
            scale = math.sqrt(abs(literal(batches, a, a, *kernel) * literal(batches, b, b, *kernel)))
            assert hsic.hsic(a, b) == pytest.approx(truth, rel=1e-9, abs=1e-10 * scale + 1e-14)


def test_one_batch_is_debiased_cka_of_all_samples():
    np.random.seed(1337)  # noqa: NPY002
    x = np.random.randn(100, 10)  # noqa: NPY002
    y = np.random.randn(100, 10) + x  # noqa: NPY002
    assert stream([{"x": x, "y": y}]).cka(["x"], ["y"]).item() == pytest.approx(0.513456, abs=5e-7)


@pytest.mark.parametrize(
    ("bandwidth", "cka"), [(0.2, 0.989807), (0.4, 0.748200), (0.5, 0.654831), (0.8, 0.585857), (1.0, 0.575832)]
)
def test_median_distance_is_that_of_the_golden_values(bandwidth, cka):
    np.random.seed(1337)  # noqa: NPY002
    x = np.random.randn(100, 10)  # noqa: NPY002
    y = np.random.randn(100, 10) + x  # noqa: NPY002
    centre = np.eye(100) - 1 / 100
    kernels = []
    for array in (x, y):
        kernel = torch.from_numpy(array @ array.T)
        rbf_from_products(kernel, bandwidth, 10)
        kernels.append(centre @ kernel.numpy() @ centre)
    k, l = kernels  # noqa: E741
    assert (k * l).sum() / np.linalg.norm(k) / np.linalg.norm(l) == pytest.approx(cka, abs=5e-7)


def test_median_over_an_odd_number_of_samples():
    x = np.random.default_rng(0).standard_normal((7, 3))
    centred = torch.from_numpy(x - x.mean(0))
    kernel = centred @ centred.T
    rbf_from_products(kernel, 0.7, 3)
    np.testing.assert_allclose(kernel, kernel_of(x, "rbf", 0.7), rtol=1e-12)


def test_independent_layers_are_near_zero_where_the_biased_average_is_near_one():
    rng = np.random.default_rng(0)
    batches = [{name: rng.standard_normal((16, 200)) for name in "xy"} for _ in range(150)]
    centre = np.eye(16) - 1 / 16
    inner = {"xx": 0.0, "xy": 0.0, "yy": 0.0}
    for batch in batches:
        kernels = {name: centre @ kernel_of(batch[name]) @ centre for name in batch}
        for a, b in inner:
            inner[a + b] += (kernels[a] * kernels[b]).sum()
    assert inner["xy"] / math.sqrt(inner["xx"] * inner["yy"]) > 0.9
    assert abs(stream(batches).cka(["x"], ["y"]).item()) < 0.02


def test_does_not_depend_on_the_batch_size():
    arrays = draw(3000, 5)
    values = [
        stream(cut(arrays, range(0, 3001, size))).cka(["x", "z"], ["y"]).flatten().numpy() for size in (12, 60, 3000)
    ]
    np.testing.assert_allclose(values[0], values[2], atol=0.03)
    np.testing.assert_allclose(values[1], values[2], atol=0.01)


def test_a_small_last_batch_counts_by_its_size():
    arrays = draw(20, 3)
    first, last = cut(arrays, [0, 16, 20])
    parts = [u_statistic(kernel_of(batch["x"]), kernel_of(batch["y"])) for batch in (first, last)]
    assert stream([first, last]).hsic("x", "y") == pytest.approx((16 * parts[0] + 4 * parts[1]) / 20, rel=1e-10)


def test_a_short_last_batch_is_skipped_and_a_short_first_one_refused():
    first, last = cut(draw(18, 3), [0, 16, 18])
    hsic = stream([first])
    before = state(hsic)
    with pytest.warns(
        UserWarning, match=r"a batch of 2 samples, after 1, was skipped: HSIC₁ needs at least 4"
    ) as caught:
        hsic.update(tensors(last))
    assert caught[0].filename == __file__
    assert state(hsic) == [*before[:2], 1, *before[3:]]
    empty = MinibatchHSIC()
    with pytest.raises(DataError, match=r"the first batch is of 1 sample;.*batch_size"):
        empty.update({"x": torch.ones(1, 3)})
    assert empty.names == ()


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ((["x"], ["y", "z"]), ("x", "y", "z")),
        ((["y", "x"], ["x", "z"]), ("y", "x", "z")),
        ((["x", "y"], ["y", "x"]), ("x", "y")),
        ((["z"], ["z"]), ("z",)),
    ],
)
def test_chosen_layers(layers, names):
    batches = cut(draw(24, 1), [0, 10, 24])
    hsic, every = stream(batches, layers=layers), stream(batches)
    assert hsic.names == names
    assert hsic.layers == tuple(map(tuple, layers))
    for a in layers[0]:
        for b in layers[1]:
            assert hsic.hsic(a, b) == pytest.approx(every.hsic(a, b), rel=1e-12)
            assert hsic.hsic(b, a) == hsic.hsic(a, b)
    np.testing.assert_allclose(hsic.cka(*layers), every.cka(*layers), rtol=1e-12)
    for name in names:
        assert hsic.cka([name], [name]).item() == pytest.approx(1, rel=1e-15)


def test_what_was_not_compared_is_said():
    hsic = stream(cut(draw(9, 1), [0, 9]), layers=(["x"], ["y", "z"]))
    with pytest.raises(LayerNotFoundError, match="'y' and 'z' were not compared"):
        hsic.hsic("y", "z")
    with pytest.raises(LayerNotFoundError, match="no HSIC of layer 'xx'; did you mean x"):
        hsic.cka(["xx"], ["y"])
    with pytest.raises(DataError, match="no batch has been added yet"):
        MinibatchHSIC().cka(["x"], ["y"])
    assert hsic.cka([], ["y"]).shape == (0, 1)


@pytest.mark.parametrize("offset", [0, 10, 1000])
def test_float32_products_do_not_depend_on_the_offset(offset):
    arrays = {name: array.astype(np.float32).astype(np.float64) for name, array in draw(60, 2, offset).items()}
    batches = cut(arrays, [0, 30, 60])
    low = MinibatchHSIC(product_dtype=torch.float32)
    for batch in batches:
        low.update(tensors(batch, torch.float32))
    np.testing.assert_allclose(low.cka("xyz", "xyz"), stream(batches).cka("xyz", "xyz"), rtol=0, atol=2e-6)
    assert low.cka(["x"], ["y"]).dtype == torch.float64


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_a_constant_layer_is_nan_and_said(kernel):
    arrays = draw(20, 0)
    arrays["y"][:] = 0.1
    hsic = MinibatchHSIC(kernel)
    if kernel == "rbf":
        with pytest.warns(UserWarning, match="'y': the median distance in a batch is zero") as caught:
            hsic.update(tensors(arrays))
        assert caught[0].filename == __file__
    else:
        hsic.update(tensors(arrays))
    with pytest.warns(UserWarning, match="'y' has HSIC₁ .* with itself, which is not positive") as caught:
        cka = hsic.cka("xy", "xyz")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert cka[1].isnan().all()
    assert cka[0].isnan().tolist() == [False, True, False]


def test_many_equal_samples_do_not_set_the_bandwidth_by_rounding():
    x = np.random.default_rng(0).standard_normal((20, 50))
    x[4:] = x[4] + 100
    with pytest.warns(UserWarning, match="the median distance in a batch is zero"):
        stream([{"x": x}], "rbf")


def test_too_little_is_known_of_a_layer():
    x = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    hsic = MinibatchHSIC()
    hsic.update({"x": x})
    with pytest.warns(UserWarning, match="not positive"):
        assert hsic.cka(["x"], ["x"]).isnan().all()


def test_merge_any_parts_in_any_order():
    batches = cut(draw(50, 7), [0, 16, 32, 46, 50])
    whole = stream(batches)
    turned = [{name: batch[name] for name in "zxy"} for batch in batches]
    for split in range(5):
        first, second = stream(batches[:split]), stream(turned[split:])
        for joined in (first.merge(second), stream(turned[split:]).merge(stream(batches[:split]))):
            assert (joined.batches, joined.samples) == (4, 50)
            np.testing.assert_allclose(joined.cka("xyz", "xyz"), whole.cka("xyz", "xyz"), rtol=1e-11)
        assert second.batches == 4 - split
    doubled = stream(batches).merge(whole)
    doubled.merge(doubled)
    assert doubled.samples == 200
    np.testing.assert_allclose(doubled.cka("xyz", "xyz"), whole.cka("xyz", "xyz"), rtol=1e-11)
    assert MinibatchHSIC().merge(MinibatchHSIC()).names == ()


def test_what_does_not_fit_is_not_merged():
    batches = cut(draw(8, 7), [0, 8])
    whole = stream(batches)
    with pytest.raises(DataError, match=r"other kernel: linear and rbf of bandwidth 0\.5 \(this accumulator"):
        whole.merge(MinibatchHSIC("rbf", 0.5))
    with pytest.raises(DataError, match=r"other columns: \['x'\] and \[\]"):
        whole.merge(stream(batches, layers=(list("xyz"), list("yz"))))
    with pytest.raises(DataError, match=r"other rows: \[\] and \['z'\]"):
        MinibatchHSIC(layers=(list("xy"), list("xyz"))).merge(whole)
    narrow = stream([{name: array[:, :2] for name, array in batches[0].items()}])
    with pytest.raises(DataError, match=r"other units: \{'x': 3, 'y': 5, 'z': 4\} and \{'x': 2"):
        whole.merge(narrow)
    assert whole.batches == 1


@pytest.mark.parametrize("layers", [None, (["y"], ["x", "z"])])
def test_saved_averages_come_back_and_go_on(tmp_path, layers):
    first, second = cut(draw(30, 4), [0, 16, 30])
    hsic = stream([first], "rbf", 0.8, layers=layers)
    loaded = MinibatchHSIC.load(hsic.save(tmp_path / "hsic"))
    assert repr(loaded) == repr(hsic) == "MinibatchHSIC(rbf, bandwidth 0.8: 3 layers, 1 batches, 16 samples)"
    assert loaded.hsic("x", "y") == hsic.hsic("x", "y")
    loaded.update(tensors(second))
    hsic.update(tensors(second))
    assert loaded.hsic("x", "y") == hsic.hsic("x", "y")
    assert loaded.hsic("z", "z") == hsic.hsic("z", "z")
    assert [file.name for file in tmp_path.iterdir()] == ["hsic"]


def test_empty_averages_can_be_saved(tmp_path):
    loaded = MinibatchHSIC.load(MinibatchHSIC(layers=(["x"], ["y"])).save(tmp_path / "e"))
    assert (loaded.layers, loaded.batches) == ((("x",), ("y",)), 0)
    assert repr(MinibatchHSIC.load(MinibatchHSIC().save(tmp_path / "e"))).startswith("MinibatchHSIC(linear: 0 layers")


def test_files_that_hold_no_averages_are_refused(tmp_path):
    path = stream(cut(draw(8, 0), [0, 8])).save(tmp_path / "hsic")
    weights = tmp_path / "weights"
    save_file({"weight": torch.ones(2)}, weights)
    with pytest.raises(CheckpointError, match="weights holds no minibatch hsic"):
        MinibatchHSIC.load(weights)
    short = tmp_path / "short"
    sums = load_file(path)["sums"][:-1]
    content = {
        **{"kernel": "linear", "bandwidth": 1.0, "every_layer": True, "layers": [["x"], ["x"]], "units": {"x": 3}},
        **{"counts": {"batches": 1, "samples": 8, "skipped": 0}, "product_dtype": "float64", "max_bytes": 1},
    }
    save_file(
        {"sums": sums},
        short,
        metadata={"isthmus": json.dumps({"format": "isthmus.minibatch_hsic.1", "content": content})},
    )
    for file in (short, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match=rf"{file.name} is not a whole file of minibatch hsic"):
            MinibatchHSIC.load(file)


NAN = torch.full((5, 5), float("nan"))
FIT = {"x": torch.ones(5, 3), "z": torch.ones(5, 4)}


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({**FIT, "y": NAN}, NotFiniteError, r"'y' of shape \(5, 5\) holds NaN"),
        ({**FIT, "y": torch.ones(4, 5)}, DataError, "'x' and 'y' have 5 and 4 samples.*positions='mean'"),
        ({**FIT, "y": torch.ones(5, 6)}, DataError, r"'y' has 6 units \(shape \(5, 6\)\).* had 5"),
        (FIT, DataError, "holds the layers x, z; expected x, y, z"),
        ({}, DataError, r"layers \(none\)"),
        ({**FIT, "y": torch.ones(5, 5, 1)}, DataError, r"'y' has shape \(5, 5, 1\).*as_samples"),
        ({**FIT, "y": torch.ones(5, 5, dtype=torch.int32)}, DataError, r"torch\.int32"),
        ({**FIT, "y": torch.ones(5, 5, device="meta")}, DataError, r"'y' is on meta.*move them with"),
        ({**FIT, "y": torch.arange(25.0).reshape(5, 5) * 1e30}, NotFiniteError, "'y'.*overflow"),
        ({**FIT, "y": torch.arange(25.0).reshape(5, 5) * 1e10}, NotFiniteError, "'y': the squares.*overflow"),
    ],
)
def test_a_refused_batch_changes_nothing(batch, error, message):
    hsic = stream(cut(draw(30, 1), [0, 12, 30]), product_dtype=torch.float32)
    before = state(hsic)
    with pytest.raises(error, match=message):
        hsic.update(batch)
    assert state(hsic) == before
    hsic.update({**FIT, "y": torch.eye(5)})
    assert hsic.samples == 35


def test_bad_arguments():
    with pytest.raises(DataError, match="unknown kernel 'poly'; known: linear, rbf"):
        MinibatchHSIC("poly")  # pyright: ignore[reportArgumentType]
    for bandwidth in (0, -1, math.nan, math.inf):
        with pytest.raises(DataError, match="bandwidth is"):
            MinibatchHSIC("rbf", bandwidth)
    with pytest.raises(DataError, match=r"product_dtype is torch\.bfloat16"):
        MinibatchHSIC(product_dtype=torch.bfloat16)
    for layers in ("xy", (["x"], "y"), [["x"], ["y"], ["z"]]):
        with pytest.raises(DataError, match="expected two lists of names"):
            MinibatchHSIC(layers=layers)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="at least one layer on each side"):
        MinibatchHSIC(layers=(["x"], []))
    with pytest.raises(LayerNotFoundError, match="'conv2' is missing from the batch; did you mean conv1"):
        MinibatchHSIC(layers=(["conv1"], ["conv2"])).update({"conv1": torch.ones(5, 2)})
    with pytest.raises(DataError, match=r"2 layers on a batch of 1000 samples would take .* use smaller batches"):
        MinibatchHSIC(max_bytes=1 << 20).update({"x": torch.ones(1000, 1), "y": torch.ones(1000, 1)})


def test_can_start_in_inference_mode_and_go_on_outside():
    batches = cut(draw(20, 1), [0, 10, 20])
    hsic = MinibatchHSIC()
    with torch.inference_mode():
        hsic.update({name: x * 1 for name, x in tensors(batches[0]).items()})
    x = {name: x.requires_grad_() for name, x in tensors(batches[1]).items()}
    hsic.update(x)
    assert hsic.hsic("x", "y") == pytest.approx(stream(batches).hsic("x", "y"), rel=1e-12)
    assert hsic.to("meta") is hsic


@settings(max_examples=25, deadline=None)
@given(n=st.integers(4, 15), seed=st.integers(0, 2**20))
def test_centred_kernels_sum_to_zero_and_keep_the_hsic(n, seed):
    rng = np.random.default_rng(seed)
    k, l = (x @ x.T for x in rng.standard_normal((2, n, 3)))  # noqa: E741
    centred = [torch.from_numpy(kernel.copy()) for kernel in (k, l)]
    for kernel in centred:
        centre_off_diagonal(kernel)
        np.testing.assert_allclose(kernel.sum(0), 0, atol=1e-12)
        np.testing.assert_allclose(kernel.diagonal(), 0)
    assert float((centred[0] * centred[1]).sum()) / (n * (n - 3)) == pytest.approx(u_statistic(k, l), abs=1e-11)

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.base.errors import DataError, LayerNotFoundError, NotFiniteError
from isthmus.metrics import tile_products, tile_rows
from isthmus.metrics.gram import Gram
from isthmus.metrics.precision import Precision, products_in
from isthmus.metrics.tiles import cka_from_gram, hsic_from_gram, median_distance

KINDS = [(kernel, debiased) for kernel in ("linear", "rbf") for debiased in (False, True)]


# --- oracles: dense, in float64, with every matrix written out


def dense_kernel(x, kernel, bandwidth):
    x = np.asarray(x, dtype=np.float64)
    if kernel == "linear":
        return x @ x.T
    squares = ((x[:, None] - x[None]) ** 2).sum(-1)
    return np.exp(-squares / (2 * bandwidth**2 * np.median(squares)))


def dense_hsic(k, m, debiased):
    n = len(k)
    if not debiased:
        H = np.eye(n) - np.ones((n, n)) / n
        return np.trace(k @ H @ m @ H) / (n - 1) ** 2
    k, m, one = k - np.diag(np.diag(k)), m - np.diag(np.diag(m)), np.ones(n)
    whole = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (np.trace(k @ m) + whole - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def dense(arrays, names_a, names_b, kernel="linear", debiased=False, bandwidth=1.0, normalised=True):
    # Centring first changes no kernel of differences and no centred one, but keeps the oracle's digits.
    arrays = {name: np.asarray(x, np.float64) - np.asarray(x, np.float64).mean(0) for name, x in arrays.items()}
    kernels = {name: dense_kernel(x, kernel, bandwidth) for name, x in arrays.items()}
    values = np.array([[dense_hsic(kernels[a], kernels[b], debiased) for b in names_b] for a in names_a])
    if not normalised:
        return values
    own = {name: dense_hsic(k, k, debiased) for name, k in kernels.items()}
    return values / np.sqrt([[own[a] * own[b] for b in names_b] for a in names_a])


def draw(n, widths, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((n, 3))
    return {
        f"l{i}": common @ rng.standard_normal((3, p)) + rng.standard_normal((n, p)) + offset
        for i, p in enumerate(widths)
    }


def store(arrays, batch=17, dtype=torch.float64, **keywords):
    gram = Gram(dtype=dtype, **keywords)
    n = len(next(iter(arrays.values())))
    for start in range(0, n, batch):
        gram.update({name: torch.as_tensor(x[start : start + batch]) for name, x in arrays.items()})
    return gram


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles, chunks, columns and blocks of rows so small that every edge is met."""
    monkeypatch.setattr(tile_products, "TILE", 32)
    monkeypatch.setattr(tile_products, "_CHUNK", 64)
    monkeypatch.setattr(tile_products, "_COLUMNS", 5)
    monkeypatch.setattr(tile_products, "_ROWS", 30)


# --- values


def golden():
    rng = np.random.RandomState(1337)
    x = rng.randn(100, 10)
    return store({"x": x, "y": rng.randn(100, 10) + x})


def test_golden_values():
    """Of the published notebook: linear CKA, Song's estimator, and RBF kernels by the median distance."""
    gram = golden()

    def value(**keywords):
        return cka_from_gram(gram, ["x"], ["y"], precision="float64", **keywords).item()

    assert value() == pytest.approx(0.557613, abs=5e-7)
    assert value(debiased=True) == pytest.approx(0.513456, abs=5e-7)
    for bandwidth, truth in [(0.2, 0.989807), (0.4, 0.748200), (0.5, 0.654831), (0.8, 0.585857), (1.0, 0.575832)]:
        assert value(kernel="rbf", bandwidth=bandwidth) == pytest.approx(truth, abs=5e-7)


def test_debiased_hsic_is_the_mean_over_all_quadruples():
    """Song et al. (2012), definition 2: the U-statistic as it is defined, without any algebra."""
    arrays = draw(7, (2, 3))
    k, m = (dense_kernel(x, "linear", 1) for x in arrays.values())
    total = 0.0
    for i, j, q, r in itertools.permutations(range(7), 4):
        total += k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])
    truth = total / (7 * 6 * 5 * 4)
    for space in ("sample", "feature"):
        value = hsic_from_gram(store(arrays), ["l0"], ["l1"], debiased=True, precision="float64", space=space)
        assert value.item() == pytest.approx(truth, rel=1e-10)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("kernel", "debiased"), KINDS)
@pytest.mark.parametrize("n", [4, 5, 31, 32, 33, 64, 101])
def test_any_number_of_samples(n, kernel, debiased):
    arrays = draw(n, (3, 12, 7, 40), seed=n)
    a, b = ["l0", "l1", "l2"], ["l1", "l3"]
    gram = store(arrays)
    for own, read in ((True, cka_from_gram), (False, hsic_from_gram)):
        truth = dense(arrays, a, b, kernel, debiased, 0.7, normalised=own)
        values = read(gram, a, b, kernel=kernel, debiased=debiased, bandwidth=0.7, precision="float64")
        assert values.shape == (3, 2)
        assert values.dtype == torch.float64
        np.testing.assert_allclose(values, truth, rtol=1e-9, atol=1e-11 * np.abs(truth).max())


@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=25, deadline=None)
@given(data=st.data(), debiased=st.booleans(), n=st.integers(4, 70), seed=st.integers(0, 2**20))
def test_all_spaces_agree(data, debiased, n, seed):
    widths = data.draw(st.lists(st.integers(1, 14), min_size=2, max_size=4).filter(lambda ws: len(set(ws)) > 1))
    arrays = draw(n, widths, seed)
    names = st.lists(st.sampled_from(sorted(arrays)), min_size=1, max_size=4)
    a, b = data.draw(names), data.draw(names)
    used = {len(arrays[name].T) for name in (*a, *b)}
    for own, read in ((True, cka_from_gram), (False, hsic_from_gram)):
        truth = dense(arrays, a, b, debiased=debiased, normalised=own)
        for space in ("sample", "feature", "mixed", "auto"):
            if space == "mixed" and len(used) == 1:
                continue
            values = read(store(arrays), a, b, debiased=debiased, precision="float64", space=space)
            np.testing.assert_allclose(values, truth, rtol=1e-9, atol=1e-9 * np.abs(truth).max())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("kernel", "debiased"), KINDS)
def test_bounded_memory_and_spilled_rows_change_nothing(kernel, debiased, tmp_path):
    arrays = draw(150, (20, 33, 8), 1)
    names = list(arrays)
    options = {"kernel": kernel, "debiased": debiased, "precision": "float64"}
    truth = cka_from_gram(store(arrays), names, names, **options)
    np.testing.assert_allclose(truth, dense(arrays, names, names, kernel, debiased), rtol=1e-9)
    for space in ("auto",) if kernel == "rbf" else ("sample", "feature", "mixed"):
        held = cka_from_gram(store(arrays), names, names, space=space, **options)
        spilled = store(arrays, max_bytes=0, folder=tmp_path)
        assert torch.equal(cka_from_gram(spilled, names, names, space=space, **options), held), "bit for bit"
        for max_bytes in (55_000, 80_000, 120_000):
            values = cka_from_gram(spilled, names, names, space=space, max_bytes=max_bytes, **options)
            np.testing.assert_allclose(values, truth, rtol=1e-9)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("widths", "max_bytes", "space"), [((1, 1), 12_000, "sample"), ((7, 12), 400, "feature")])
def test_little_memory_takes_smaller_tiles_and_more_passes(widths, max_bytes, space):
    arrays = draw(150, widths, 8)
    names = list(arrays)
    values = cka_from_gram(store(arrays), names, names, space=space, max_bytes=max_bytes, precision="float64")
    np.testing.assert_allclose(values, dense(arrays, names, names), rtol=1e-9)


@pytest.mark.usefixtures("small_tiles")
def test_rows_are_read_as_often_as_memory_asks_for(monkeypatch):
    arrays = draw(160, (20, 30), 1)
    gram = store(arrays)
    read = []
    original = Gram.rows
    monkeypatch.setattr(
        Gram, "rows", lambda self, name, *at, **k: read.append(at[1] - at[0]) or original(self, name, *at, **k)
    )
    reads = []
    for max_bytes in (1 << 20, 70_000, 50_000, 40_000):
        read.clear()
        cka_from_gram(gram, ["l0"], ["l1"], space="sample", max_bytes=max_bytes, precision="float64")
        reads.append(sum(read))
    assert reads[0] == 2 * 160, "once for each layer"
    assert reads == sorted(reads)
    assert reads[-1] > 2 * reads[0]


def test_too_little_memory_is_said_before_work():
    arrays = draw(200, (20, 30), 1)
    with pytest.raises(DataError, match=r"max_bytes is 1000; kernels of 2 layers need at least \d+ bytes"):
        cka_from_gram(store(arrays), ["l0"], ["l1"], space="sample", max_bytes=1000)


def test_layers_may_repeat_and_come_in_any_order():
    arrays = draw(40, (3, 5, 4), 2)
    gram = store(arrays)
    everything = cka_from_gram(gram, ["l0", "l1", "l2"], ["l0", "l1", "l2"], precision="float64")
    some = cka_from_gram(gram, ["l2", "l0", "l2"], ["l1", "l1"], precision="float64")
    np.testing.assert_allclose(some, everything[[2, 0, 2]][:, [1, 1]], rtol=1e-12)
    np.testing.assert_allclose(everything, everything.T, rtol=1e-12)
    np.testing.assert_allclose(everything.diagonal(), 1, rtol=1e-12)
    assert cka_from_gram(gram, "l0", "l1").shape == (1, 1)


# --- properties


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([1e-150, 1e-30, -3.0, 1e30, 1e100]),
    kind=st.sampled_from(KINDS),
    space=st.sampled_from(["sample", "feature"]),
)
def test_cka_has_no_scale_rotation_or_offset(seed, scale, kind, space):
    kernel, debiased = kind
    space = "auto" if kernel == "rbf" else space
    arrays = draw(30, (4, 6), seed)
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((4, 4)))[0]
    moved = {"l0": scale * (arrays["l0"] @ rotation + 1), "l1": arrays["l1"]}
    options = {"kernel": kernel, "debiased": debiased, "precision": "float64", "space": space}
    truth = dense(arrays, ["l0"], ["l1"], kernel, debiased)
    np.testing.assert_allclose(cka_from_gram(store(moved), ["l0"], ["l1"], **options), truth, rtol=1e-8)


def test_values_that_float32_cannot_square():
    arrays = draw(30, (4, 6))
    truth = dense(arrays, ["l0"], ["l1"])
    for scale in (1e-35, 1e-20, 1e20, 1e37):
        scaled = {name: (scale * x).astype(np.float32) for name, x in arrays.items()}
        gram = store(scaled, dtype=torch.float32)
        for space in ("sample", "feature"):
            values = cka_from_gram(gram, ["l0"], ["l1"], space=space)
            np.testing.assert_allclose(values, truth, rtol=1e-4 if scale == 1e-35 else 1e-6)


def test_hsic_that_overflows_is_refused():
    gram = store({name: 1e100 * x for name, x in draw(10, (2, 3)).items()})
    with pytest.raises(NotFiniteError, match="HSIC overflows float64"):
        hsic_from_gram(gram, ["l0"], ["l1"], precision="float64")


@pytest.mark.parametrize(("kernel", "debiased"), KINDS)
def test_shuffled_samples_share_nothing_that_is_not_there(kernel, debiased):
    """Debiased values of independent representations are near zero, biased ones are not."""
    rng = np.random.default_rng(0)
    gram = store({"x": rng.standard_normal((200, 400)), "y": rng.standard_normal((200, 400))})
    value = cka_from_gram(gram, ["x"], ["y"], kernel=kernel, debiased=debiased).item()
    assert abs(value) < 0.02 if debiased else value > 0.5


# --- precision


@pytest.mark.parametrize("offset", [0, 1, 10, 100, 1000])
@pytest.mark.parametrize("debiased", [False, True])
def test_stated_errors_hold_at_any_offset(offset, debiased):
    n = 400
    arrays = {name: (x + offset).astype(np.float32) for name, x in draw(n, (16, 64, 600), 3).items()}
    names = list(arrays)
    gram = store(arrays, 100, torch.float32)
    truth = dense(arrays, names, names, debiased=debiased)
    bounds: dict[Precision, float] = {"float32": 1e-6, "tf32": 1e-6, "float64": 1e-6, "bf16": 2**-7 / math.sqrt(n)}
    for space in ("sample", "feature"):
        for precision, bound in bounds.items():
            values = cka_from_gram(gram, names, names, debiased=debiased, precision=precision, space=space)
            error = np.abs(values.numpy() - truth).max()
            assert error <= bound, (precision, space, error)
            if precision == "bf16":
                assert error > 1e-7, "bfloat16 was not used"


@pytest.mark.parametrize("bandwidth", [0.2, 0.5, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("debiased", [False, True])
def test_rbf_kernels_in_float32(bandwidth, debiased):
    arrays = {name: x.astype(np.float32) for name, x in draw(300, (10, 100), 4, offset=100.0).items()}
    names = list(arrays)
    truth = dense(arrays, names, names, "rbf", debiased, bandwidth)
    gram = store(arrays, 100, torch.float32)
    values = cka_from_gram(gram, names, names, kernel="rbf", debiased=debiased, bandwidth=bandwidth)
    np.testing.assert_allclose(values, truth, atol=1e-5)


def test_bf16_sums_are_not_rounded_to_bf16():
    """Rounding the factors alone is the whole error, to much better than bfloat16's 3 digits."""
    arrays = draw(400, (32, 48), 5)
    gram = store(arrays, 400, torch.float32)
    rounded = {name: (gram.rows(name) / 8).bfloat16().double().numpy() for name in arrays}
    k, m = (x @ x.T for x in rounded.values())
    truth = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    for space in ("sample", "feature"):
        value = cka_from_gram(gram, ["l0"], ["l1"], precision="bf16", space=space)
        assert value.item() == pytest.approx(truth, abs=1e-6)


@pytest.mark.parametrize("legacy", [False, True])
def test_settings_of_the_process_are_put_back(monkeypatch, legacy):
    if legacy:
        # As before torch 2.9, which has one setting for all.
        monkeypatch.setattr(torch.backends, "mkldnn", object())
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        loose = x @ x
        with products_in("float32"):
            tight = x @ x
        assert torch.equal(x @ x, loose)
        with pytest.raises(ZeroDivisionError), products_in("bf16"):
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "medium"
        np.testing.assert_allclose(tight, x.double() @ x.double(), atol=2e-5)
    finally:
        torch.set_float32_matmul_precision(before)


# --- the width of RBF kernels


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 60), p=st.integers(1, 5), seed=st.integers(0, 2**20))
def test_the_median_is_that_of_all_entries_of_the_distance_matrix(n, p, seed):
    x = np.random.default_rng(seed).standard_normal((n, p))
    squares = ((x[:, None] - x[None]) ** 2).sum(-1)
    assert median_distance(torch.from_numpy(x)) == pytest.approx(math.sqrt(np.median(squares)), rel=1e-9)


def test_the_median_of_many_samples_is_that_of_evenly_spaced_ones(monkeypatch):
    monkeypatch.setattr(tile_rows, "MEDIAN_SAMPLES", 50)
    x = torch.randn(173, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = x[[i * 173 // 50 for i in range(50)]]
    assert median_distance(x) == median_distance(chosen)
    assert median_distance(x) == pytest.approx(median_distance(x[:50]), rel=0.2)
    x -= x.mean(0)
    gram = store({"x": x, "y": x.relu()})
    own = cka_from_gram(gram, ["x"], ["y"], kernel="rbf", precision="float64")
    sigma = {"x": median_distance(x), "y": median_distance(gram.rows("y"))}
    np.testing.assert_allclose(
        own, cka_from_gram(gram, ["x"], ["y"], kernel="rbf", sigma=sigma, precision="float64"), rtol=1e-9
    )


def test_a_given_width_is_in_the_units_of_the_activations():
    arrays = draw(40, (3, 5), 6)
    sigma = {"l0": 2.5, "l1": 1.7}
    kernels = [
        np.exp(-((x[:, None] - x[None]) ** 2).sum(-1) / (2 * s**2))
        for x, s in zip(arrays.values(), sigma.values(), strict=True)
    ]
    value = hsic_from_gram(store(arrays), ["l0"], ["l1"], kernel="rbf", sigma=sigma, precision="float64")
    assert value.item() == pytest.approx(dense_hsic(*kernels, debiased=False), rel=1e-10)


# --- undefined values


@pytest.mark.parametrize(("kernel", "debiased"), KINDS)
@pytest.mark.parametrize("precision", ["float32", "float64", "bf16"])
def test_a_layer_that_does_not_vary_is_nan_and_named(kernel, debiased, precision):
    arrays = draw(20, (3, 4)) | {"flat": np.full((20, 3), 0.1)}
    gram = store(arrays, 7)
    for space in ("auto",) if kernel == "rbf" else ("sample", "feature"):
        options = {"kernel": kernel, "debiased": debiased, "precision": precision, "space": space}
        with pytest.warns(UserWarning, match=r"layer 'flat': its CKA is NaN, .*(does not vary|median distance)"):
            values = cka_from_gram(gram, ["l0", "flat"], ["l1", "flat"], **options)
        assert values.isnan().tolist() == [[False, True], [True, True]]
        with pytest.warns(UserWarning, match="'flat'"):
            assert cka_from_gram(gram, ["flat"], ["flat"], **options).isnan().all()


def test_hsic_of_a_layer_that_does_not_vary_is_zero_or_undefined():
    gram = store(draw(20, (3,)) | {"flat": np.full((20, 3), 0.1)})
    for debiased in (False, True):
        assert hsic_from_gram(gram, ["l0"], ["flat"], debiased=debiased).item() == 0
    with pytest.warns(UserWarning, match=r"layer 'flat': its HSIC is NaN, the median distance .* pass sigma="):
        assert hsic_from_gram(gram, ["l0"], ["flat"], kernel="rbf").isnan().all()
    sigma = {"flat": 1.0, "l0": 1.0}
    with pytest.warns(UserWarning, match="does not vary"):
        assert cka_from_gram(gram, ["l0"], ["flat"], kernel="rbf", sigma=sigma).isnan().all()


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("precision", ["float32", "float64", "bf16"])
def test_equal_distances_have_no_debiased_value(kernel, precision):
    """One-hot rows: every pair of samples is as far apart, so U-centring leaves rounding errors and nothing else."""
    corners = np.eye(12) * 0.37
    gram = store({"corners": corners, "x": draw(12, (5,))["l0"]})
    for space in ("auto",) if kernel == "rbf" else ("sample", "feature"):
        options = {"kernel": kernel, "precision": precision, "space": space}
        with pytest.warns(UserWarning, match="layer 'corners': its CKA is NaN, its debiased HSIC is within rounding"):
            assert cka_from_gram(gram, ["corners"], ["x"], debiased=True, **options).isnan().all()
        assert 0 < cka_from_gram(gram, ["corners"], ["x"], **options).item() < 1


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_many_more_units_than_samples_are_no_rounding_errors(kernel):
    arrays = draw(12, (20000, 20000), 7)
    gram = store({name: x.astype(np.float32) for name, x in arrays.items()}, dtype=torch.float32)
    for precision in ("float32", "bf16"):
        value = cka_from_gram(gram, ["l0"], ["l1"], kernel=kernel, debiased=True, precision=precision).item()
        truth = dense({k: v.astype(np.float32) for k, v in arrays.items()}, ["l0"], ["l1"], kernel, debiased=True)
        assert value == pytest.approx(truth.item(), abs=1e-4 if precision == "float32" else 2e-3)


# --- refused arguments


def test_layers_must_have_the_same_samples():
    gram = Gram()
    gram.update({"conv": torch.randn(8, 2), "fc": torch.randn(4, 2)})
    with pytest.raises(DataError, match=r"'conv' and 'fc' have 8 and 4 samples, but a pair needs .*'features'"):
        cka_from_gram(gram, ["conv"], ["fc"])


def test_too_few_samples():
    gram = store(draw(3, (2,)))
    with pytest.raises(DataError, match="'l0' has 3 samples; this estimator needs at least 4"):
        cka_from_gram(gram, ["l0"], ["l0"], debiased=True)
    with pytest.raises(DataError, match="'l0' has 1 samples; this estimator needs at least 2"):
        hsic_from_gram(store(draw(1, (2,))), ["l0"], ["l0"])


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"kernel": "poly"}, "kernel is 'poly'; expected linear or rbf"),
        ({"precision": "int8"}, "precision is 'int8'; expected one of float32, float64"),
        ({"space": "both"}, "space is 'both'"),
        ({"sigma": {"l0": 1.0, "l1": 1.0}}, "sigma is for kernel='rbf'"),
        ({"kernel": "rbf", "space": "feature"}, "RBF kernels have sample space only"),
        ({"kernel": "rbf", "bandwidth": 0.0}, "bandwidth is 0.0; expected a positive"),
        ({"kernel": "rbf", "bandwidth": math.inf}, "bandwidth is inf"),
        ({"kernel": "rbf", "sigma": {"l0": 1.0}}, "sigma has None for layer 'l1'"),
        ({"kernel": "rbf", "sigma": {"l0": -1.0, "l1": 1.0}}, "sigma has -1.0 for layer 'l0'"),
    ],
)
def test_arguments_out_of_range(keywords, message):
    with pytest.raises(DataError, match=message):
        cka_from_gram(store(draw(10, (2, 3))), ["l0"], ["l1"], **keywords)


def test_layers_that_are_not_there():
    gram = store(draw(10, (2, 3)))
    with pytest.raises(LayerNotFoundError, match="no samples of layer 'l7'"):
        cka_from_gram(gram, ["l0"], ["l7"])
    with pytest.raises(DataError, match="there is no layer to compare"):
        cka_from_gram(gram, [], ["l0"])
    with pytest.raises(DataError, match="precision is 'half'"), products_in("half"):  # pyright: ignore[reportArgumentType]
        pass


def test_devices_must_agree():
    gram = store(draw(10, (2, 3)))
    gram._layers["l1"] = gram._layers["l1"].to("meta")
    with pytest.raises(DataError, match="'l0' and 'l1' are on cpu and meta"):
        cka_from_gram(gram, ["l0"], ["l1"])

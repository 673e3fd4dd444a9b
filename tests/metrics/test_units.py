from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import stats
from sklearn.metrics import mutual_info_score

from isthmus.base.errors import CheckpointError, DataError, LayerNotFoundError, NotFiniteError, OutputError
from isthmus.metrics import Moments, joint_counts, units
from isthmus.metrics.joint_counts import JointCounts, quantile_edges
from isthmus.metrics.state_file import write_state
from isthmus.metrics.units import mutual_information, unit_correlation


def pair(n=60, p=4, q=3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p))
    return x, x @ rng.standard_normal((p, q)) + rng.standard_normal((n, q))


def digitised(x, edges):
    """Count the edges below each value."""
    return (x[:, :, None] > np.asarray(edges)).sum(2)


def oracle(x, y, edges_x, edges_y):
    a, b = digitised(x, edges_x), digitised(y, edges_y)
    return np.array([[mutual_info_score(u, v) for v in b.T] for u in a.T])


def tensors(**layers):
    return {name: torch.as_tensor(x) for name, x in layers.items()}


def stream(x, y, cuts, **keywords):
    counts = JointCounts(**keywords)
    for a, b in zip(np.split(x, cuts), np.split(y, cuts), strict=True):
        counts.update(tensors(x=a, y=b))
    return counts


# ---------------------------------------------------------------- correlation


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_correlation_agrees_with_numpy(offset):
    x, y = pair()
    found = unit_correlation(x + offset, y - offset)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, np.corrcoef(x.T, y.T)[:4, 4:], atol=1e-13 if not offset else 1e-9)
    moments = Moments()
    moments.update(tensors(x=x, y=y))
    np.testing.assert_allclose(unit_correlation(x, y), moments.correlation("x", "y"), atol=1e-14)


def test_correlation_of_a_constant_unit_is_undefined():
    x, y = pair()
    x[:, 1] = 0.1
    found = unit_correlation(torch.tensor(x, dtype=torch.float32), y.astype(np.float32))
    assert found.isnan().any(1).tolist() == [False, True, False, False]
    assert found[1].isnan().all()


def test_correlation_of_values_far_from_one():
    x, y = pair()
    np.testing.assert_allclose(unit_correlation(x * 1e200, y * 1e-200), unit_correlation(x, y), atol=1e-14)


# ---------------------------------------------------------------- edges


@settings(max_examples=50, deadline=None)
@given(n=st.integers(2, 60), bins=st.integers(2, 12), seed=st.integers(0, 2**20))
def test_edges_cut_bins_of_equal_frequency(n, bins, seed):
    n = max(n, bins)
    x = np.random.default_rng(seed).standard_normal((n, 3))
    edges = quantile_edges(x, bins)
    assert edges.shape == (3, bins - 1)
    sizes = np.array([np.bincount(column, minlength=bins) for column in digitised(x, edges).T])
    assert sizes.min() >= n // bins
    assert sizes.max() <= -(-n // bins)


def test_tied_values_share_a_bin_and_the_largest_stays_apart():
    relu = np.r_[np.zeros(7), 1, 2, 3][:, None]
    assert quantile_edges(relu, 5).tolist() == [[0, 0, 0, 1]]
    saturated = np.r_[0.5, 1, np.full(8, 6)][:, None]
    assert quantile_edges(saturated, 5).tolist() == [[1, 1, 1, 1]]
    assert quantile_edges(np.full((10, 1), 3.0), 5).tolist() == [[3, 3, 3, 3]]


@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_binary_unit_keeps_its_information(share):
    x = (np.arange(100) < 100 * share).astype(float)[:, None]
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert mutual_information(x, x).item() == pytest.approx(entropy, rel=1e-12)
    assert mutual_information(x, -x).item() == pytest.approx(entropy, rel=1e-12)


# ---------------------------------------------------------------- information


@pytest.mark.parametrize("bins", [2, 5, 10])
@pytest.mark.parametrize("block", [1, 1 << 24])
def test_information_agrees_with_scikit_learn(bins, block, monkeypatch):
    monkeypatch.setattr(units, "_BLOCK", block)
    monkeypatch.setattr(joint_counts, "_BLOCK", block)
    x, y = pair()
    y = np.maximum(y, 0)
    truth = oracle(x, y, quantile_edges(x, bins), quantile_edges(y, bins))
    np.testing.assert_allclose(mutual_information(x, y, bins=bins), truth, atol=1e-12)
    np.testing.assert_allclose(mutual_information(y, x, bins=bins), truth.T, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    bins=st.integers(2, 6),
    cuts=st.lists(st.integers(12, 59), unique=True, max_size=5).map(sorted),
)
def test_any_split_into_batches_equals_the_whole(seed, bins, cuts):
    x, y = pair(seed=seed)
    first = cuts[0] if cuts else 60
    edges = {"x": quantile_edges(x[:first], bins), "y": quantile_edges(y[:first], bins)}
    counts = stream(x, y, cuts, bins=bins)
    assert counts.count("x") == 60
    for name in edges:
        assert torch.equal(counts.edges[name], edges[name])
    np.testing.assert_allclose(counts.mutual_information("x", "y"), oracle(x, y, *edges.values()), atol=1e-12)
    given_edges = stream(x, y, [3, *cuts], bins=bins, edges=edges)
    assert torch.equal(counts.mutual_information("y", "x"), given_edges.mutual_information("y", "x"))


@pytest.mark.parametrize("limit", [7, 1 << 24])
def test_counts_are_exact(limit, monkeypatch):
    monkeypatch.setattr(joint_counts, "_MOST_ROWS", limit)
    x, y = pair(n=50)
    counts = stream(x.astype(np.float32), y.astype(np.float32), [20], bins=4)
    a, b = (digitised(z.astype(np.float32), counts.edges[name]) for name, z in (("x", x), ("y", y)))
    joint = counts._counted("x", "y").view(4, 4, 3, 4)
    assert joint.dtype == torch.int64
    for i in range(4):
        for j in range(3):
            truth = np.histogram2d(a[:, i], b[:, j], bins=np.arange(5) - 0.5)[0]
            np.testing.assert_array_equal(joint[i, :, j], truth)


def test_entropy_and_the_information_of_a_layer_with_itself():
    x, y = pair()
    counts = stream(x, y, [], bins=7)
    a = digitised(x, counts.edges["x"])
    truth = [stats.entropy(np.bincount(column)) for column in a.T]
    np.testing.assert_allclose(counts.entropy("x"), truth, atol=1e-13)
    np.testing.assert_allclose(counts.mutual_information("x", "x").diagonal(), truth, atol=1e-13)
    np.testing.assert_allclose(counts.entropy("x", corrected=True), np.array(truth) + 6 / 120, atol=1e-13)
    turned = counts.mutual_information("x", "x").T
    np.testing.assert_allclose(counts.mutual_information("x", "x"), turned, atol=1e-14)


def test_a_unit_that_does_not_vary_has_no_information():
    x, y = pair()
    x[:, 1] = 0.1
    found, corrected = mutual_information(x, y), mutual_information(x, y, corrected=True)
    assert (found[1] == 0).all()
    assert (corrected[1] == 0).all()
    assert (found[[0, 2, 3]] > 0).all()
    assert stream(x, y, []).entropy("x")[1] == 0


def test_independent_units_have_the_information_that_is_documented():
    n, bins = 500, 5
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((n, 30)), rng.standard_normal((n, 30))
    chance = (bins - 1) ** 2 / (2 * n)
    assert mutual_information(x, y, bins=bins).mean() == pytest.approx(chance, rel=0.05)
    corrected = mutual_information(x, y, bins=bins, corrected=True)
    assert abs(corrected.mean()) < 0.05 * chance
    assert (corrected < 0).any()


def test_the_correction_is_that_of_miller_and_madow():
    x, y = pair(n=30)
    counts = stream(x, y, [], bins=6)
    a, b = digitised(x, counts.edges["x"]), digitised(y, counts.edges["y"])
    plain, corrected = (counts.mutual_information("x", "y", corrected=flag) for flag in (False, True))
    for i in range(4):
        for j in range(3):
            cells = len(set(zip(a[:, i], b[:, j], strict=True)))
            bias = (cells - len(set(a[:, i])) - len(set(b[:, j])) + 1) / 60
            assert plain[i, j] - corrected[i, j] == pytest.approx(bias, abs=1e-14)


MONOTONE = {"exp": np.exp, "cube": lambda x: x**3 + x, "shift": lambda x: 5 * x - 100, "arctan": np.arctan}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), n=st.integers(10, 60))
@pytest.mark.parametrize("function", MONOTONE)
def test_increasing_functions_of_a_unit_change_nothing(function, seed, n):
    x, y = pair(n=n, seed=seed)
    x = np.round(x, 3)  # so that no two values become one
    assert torch.equal(mutual_information(MONOTONE[function](x), y), mutual_information(x, y))


def test_falling_functions_of_a_unit_change_nothing_in_bins_of_one_size():
    x, y = pair()
    np.testing.assert_allclose(mutual_information(-x, y), mutual_information(x, y), atol=1e-14)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_units_and_samples_may_be_permuted(seed):
    x, y = pair(seed=seed)
    rng = np.random.default_rng(seed)
    rows, order = rng.permutation(60), rng.permutation(4)
    found = mutual_information(x, y)
    assert torch.equal(mutual_information(x[:, order], y), found[order])
    assert torch.equal(mutual_information(x[rows], y[rows]), found)
    np.testing.assert_allclose(mutual_information(y, x), found.T, atol=1e-14)


def test_a_dependence_that_correlation_misses():
    x = np.linspace(-1, 1, 400)[:, None]
    assert abs(unit_correlation(x, x**2).item()) < 1e-12
    assert mutual_information(x, x**2).item() > 1.5


# ---------------------------------------------------------------- the accumulator


def test_pairs_and_layers():
    x, y = pair()
    some = JointCounts([("x", "y")], bins=3)
    some.update(tensors(x=x, y=y, z=y[:20]))  # z is in no pair: it may have other samples
    assert some.names == ("x", "y", "z")
    assert some.pairs == (("x", "y"),)
    assert (some.count("x"), some.count("z")) == (60, 20)
    assert some.entropy("z").shape == (3,)
    with pytest.raises(LayerNotFoundError, match="joint counts of 'x' and 'x' were not kept"):
        some.mutual_information("x", "x")
    with pytest.raises(LayerNotFoundError, match="no counts of layer 'w'; known: x, y, z"):
        some.entropy("w")
    assert stream(x, y, []).pairs == (("x", "x"), ("x", "y"), ("y", "y"))
    assert repr(some) == "JointCounts(x: 60 x 4, y: 60 x 3, z: 20 x 3; 1 pairs, 3 bins)"
    assert repr(JointCounts()) == "JointCounts(no samples; 0 pairs, 10 bins)"
    with pytest.raises(LayerNotFoundError, match="no batch has been added"):
        JointCounts().count("x")
    nothing = stream(x, y, [], pairs="none")
    assert nothing.entropy("x").shape == (4,)


def test_a_refused_batch_changes_nothing():
    x, y = pair()
    counts = stream(x, y, [])
    before = counts.mutual_information("x", "y")
    bad = y.copy()
    bad[3, 1] = np.nan
    for layers, error, words in (
        ({"x": x, "y": bad}, NotFiniteError, r"layer 'y' of shape \(60, 3\) holds NaN"),
        ({"x": x}, DataError, "expected x, y"),
        ({"x": x, "y": y[:30]}, DataError, "60 and 30 samples"),
        ({"x": x, "y": x}, DataError, "layer 'y' has 4 units"),
        ({"x": x, "y": y.astype(int)}, DataError, "expected floating point"),
    ):
        with pytest.raises(error, match=words):
            counts.update(tensors(**layers))
    assert torch.equal(counts.mutual_information("x", "y"), before)
    assert counts.count("x") == 60


def test_wrong_choices_are_refused():
    x, y = pair()
    for bins in (1, 2.5):
        with pytest.raises(DataError, match="expected a whole number, at least 2"):
            JointCounts(bins=bins)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="fewer samples than 10 bins"):
        stream(x[:9], y[:9], [])
    with pytest.raises(DataError, match="needs at least 10"):
        mutual_information(x[:9], y[:9])
    with pytest.raises(DataError, match="has fewer samples than 61 bins"):
        quantile_edges(x, 61)
    with pytest.raises(LayerNotFoundError, match="layer 'z' of pair"):
        stream(x, y, [], pairs=[("x", "z")])
    with pytest.raises(DataError, match="pairs is 'some'"):
        JointCounts("some")  # pyright: ignore[reportArgumentType]
    # (4² + 4 · 3 + 3²) pairs of units, 100 cells of 8 bytes
    need = 37 * 800
    with pytest.raises(DataError, match=f"2.76e-05 GiB, more than max_bytes={need - 1}: choose fewer bins"):
        stream(x, y, [], max_bytes=need - 1)
    assert stream(x, y, [], max_bytes=need).count("x") == 60


def test_wrong_edges_are_refused():
    x, y = pair()
    good = {"x": quantile_edges(x), "y": quantile_edges(y)}
    with pytest.raises(LayerNotFoundError, match="no edges were given for layer 'y'"):
        stream(x, y, [], edges={"x": good["x"]})
    with pytest.raises(DataError, match=r"layer 'y' has 3 units \(shape \(60, 3\)\), edges 4"):
        stream(x, y, [], edges={"x": good["x"], "y": good["x"]})
    with pytest.raises(DataError, match=r"shape \(4, 9\); expected units x 4 for 5 bins"):
        JointCounts(edges=good, bins=5)
    with pytest.raises(DataError, match="do not rise"):
        JointCounts(edges={"x": good["x"].flip(1)})
    with pytest.raises(NotFiniteError, match="edges of layer 'x'"):
        JointCounts(edges={"x": good["x"] * math.nan})


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(1, 59), seed=st.integers(0, 2**20))
def test_merged_parts_equal_the_whole(cut, seed):
    x, y = pair(seed=seed)
    edges = {"x": quantile_edges(x), "y": quantile_edges(y)}
    whole = stream(x, y, [], edges=edges)
    parts = [stream(x[rows], y[rows], [], edges=edges) for rows in (slice(cut), slice(cut, None))]
    merged = JointCounts().merge(parts[0])  # an empty one takes over
    merged.merge(parts[1]).merge(JointCounts())
    assert merged.count("y") == 60
    for names in (("x", "y"), ("x", "x"), ("y", "x")):
        assert torch.equal(merged.mutual_information(*names), whole.mutual_information(*names))
    assert parts[0].count("x") == cut


def test_merged_with_itself_and_with_the_other_order_of_a_pair():
    x, y = pair()
    counts = stream(x, y, [], pairs=[("x", "y")])
    turned = JointCounts([("y", "x")], edges=counts.edges)
    turned.update(tensors(x=x, y=y))
    expected = counts.mutual_information("x", "y")
    counts.merge(counts).merge(turned)
    assert counts.count("x") == 180
    np.testing.assert_allclose(counts.mutual_information("x", "y"), expected, atol=1e-14)
    empty = JointCounts([("y", "x")]).merge(turned)
    assert empty.pairs == (("y", "x"),)
    assert torch.equal(empty.mutual_information("x", "y"), turned.mutual_information("x", "y"))
    empty.update(tensors(x=x, y=y))
    assert (empty.count("x"), turned.count("x")) == (120, 60)


def test_counts_that_do_not_fit_are_not_merged():
    x, y = pair()
    counts = stream(x, y, [])
    for other, words in (
        (stream(x, y, [], pairs=[("x", "y")]), "other pairs"),
        (stream(x[1:], y[1:], []), r"layer 'x': their edges \(shapes \(4, 9\) and \(4, 9\)\) differ"),
        (stream(x, y, [], bins=5), "of 10 and of 5 bins"),
    ):
        with pytest.raises(DataError, match=words):
            counts.merge(other)
    alone, others = JointCounts("none"), JointCounts("none")
    alone.update(tensors(x=x))
    others.update(tensors(y=y))
    with pytest.raises(DataError, match=r"other layers: \('x',\) and \('y',\)"):
        alone.merge(others)


def test_saved_counts_come_back_and_go_on(tmp_path):
    x, y = pair()
    counts = stream(x[:30], y[:30], [])
    loaded = JointCounts.load(counts.save(tmp_path / "counts"))
    assert loaded.to("cpu") is loaded
    assert (loaded.names, loaded.pairs, loaded.bins) == (counts.names, counts.pairs, counts.bins)
    for both in (counts, loaded):
        both.update(tensors(x=x[30:], y=y[30:]))
    assert torch.equal(loaded.mutual_information("x", "y"), counts.mutual_information("x", "y"))
    edges = {"x": quantile_edges(x, 4), "y": quantile_edges(y, 4)}
    empty = JointCounts.load(JointCounts([("y", "x")], bins=4, edges=edges, max_bytes=9999).save(tmp_path / "empty"))
    assert (empty.pairs, empty.bins, empty.max_bytes) == ((("y", "x"),), 4, 9999)
    empty.update(tensors(x=x[:2], y=y[:2]))
    assert torch.equal(empty.edges["x"], edges["x"])
    every = JointCounts.load(JointCounts().save(tmp_path / "every"))
    every.update(tensors(x=x))
    assert every.pairs == (("x", "x"),)


def test_damaged_files_are_refused(tmp_path):
    path = stream(*pair(), []).save(tmp_path / "counts")
    held = load_file(path)
    held.pop("joint.1")
    partial, other, cut = tmp_path / "partial", tmp_path / "other", tmp_path / "cut"
    content = {"bins": 10, "max_bytes": 1, "every_pair": True, "given": False, "names": ["x", "y"], "edges": ["x", "y"]}
    write_state(partial, "isthmus.joint_counts.1", content | {"pairs": [["x", "x"], ["x", "y"], ["y", "y"]]}, held)
    save_file(held, other)
    cut.write_bytes(path.read_bytes()[:-9])
    for file, words in ((partial, "whole file"), (other, "holds no joint counts"), (cut, "whole file")):
        with pytest.raises(CheckpointError, match=words):
            JointCounts.load(file)
    with pytest.raises(OutputError):
        JointCounts().save(tmp_path / "no" / "folder")


def test_batches_seen_in_inference_mode_and_under_autocast():
    x, y = pair()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        counts = stream(x, y, [30])
    counts.update(tensors(x=x, y=y))
    edges = counts.edges
    expected = oracle(np.r_[x, x], np.r_[y, y], edges["x"], edges["y"])
    np.testing.assert_allclose(counts.mutual_information("x", "y"), expected, atol=1e-12)

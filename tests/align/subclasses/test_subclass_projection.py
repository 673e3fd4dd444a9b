"""Pseudo-subclasses by projection: against numpy by the definition, what must hold, what was planted, errors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isthmus.align.subclasses.projection import SubclassProjection, subclass_projection
from isthmus.base.errors import DataError, NotFiniteError


def random_features(seed: int = 0, units: int = 7, classes: int = 2, each: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Features whose axes have unlike variances, labels in mixed order, and a classifier."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes * each) % classes
    x = torch.randn(len(labels), units, generator=generator, dtype=torch.float64) * torch.linspace(0.5, 3, units)
    x = x + 5 * torch.randn(classes, units, generator=generator, dtype=torch.float64)[labels]
    return x, labels, torch.randn(classes, units, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("with_weight", [False, True])
def test_directions_are_the_eigenvectors_of_the_class_covariance(with_weight: bool):
    x, labels, weight = random_features()
    found = subclass_projection(x, labels, count=3, weight=weight if with_weight else None, rotate=False)
    for name in (0, 1):
        own = x[labels == name].numpy()
        centred = own - own.mean(0)
        total = (centred**2).sum()
        if with_weight:
            centred = centred @ (np.eye(7) - np.linalg.pinv(weight.numpy()) @ weight.numpy())
        vectors = np.linalg.eigh(centred.T @ centred)[1][:, ::-1][:, :3]
        rows = found.directions[name].numpy()
        np.testing.assert_allclose(np.abs(rows @ vectors), np.eye(3), atol=1e-10)
        assert (rows[np.arange(3), np.abs(rows).argmax(1)] > 0).all()
        placed = centred @ rows.T
        np.testing.assert_allclose(found.scales[name], np.sqrt((placed**2).mean()), rtol=1e-12)
        np.testing.assert_allclose(found.explained[name], (placed**2).sum() / total, rtol=1e-12)
        np.testing.assert_allclose(found.means[name], own.mean(0), rtol=1e-12)
        mean_square = found.coordinates(x)[labels == name, name].square().mean()
        assert float(mean_square) == pytest.approx(1, rel=1e-10)


def test_coordinates_shares_and_targets_sample_by_sample():
    x, labels, weight = random_features(3)
    found = subclass_projection(x, labels, count=3, weight=weight, seed=4)
    p = torch.softmax(x @ weight.T / 9, 1)
    targets = found.targets(x, p, 0.7).numpy()
    assert targets.shape == (80, 6)
    for row in (0, 31, 79):
        for name in (0, 1):
            direction = found.directions[name].numpy()
            place = direction @ (x[row].numpy() - found.means[name].numpy()) / float(found.scales[name])
            share = np.exp(place / 0.7) / np.exp(place / 0.7).sum()
            np.testing.assert_allclose(targets[row, 3 * name : 3 * name + 3], float(p[row, name]) * share, rtol=1e-9)
        own = int(labels[row])
        best = 3 * own + int(found.coordinates(x)[row, own].argmax())
        assert int(found.labels(x, labels)[row]) == best
    assert found.of_class.tolist() == [0, 0, 0, 1, 1, 1]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.sampled_from(["pca", "random"]), st.booleans(), st.floats(0.05, 5))
def test_probabilities_sum_back_to_the_classes_and_the_classifier_sees_nothing(
    seed: int, count: int, directions: str, rotate: bool, temperature: float
):
    x, labels, weight = random_features(seed, each=20)
    found = subclass_projection(
        x,
        labels,
        count=count,
        weight=weight,
        directions=directions,  # pyright: ignore[reportArgumentType]
        rotate=rotate,
        seed=seed,
    )
    p = torch.softmax(torch.randn(40, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), 1)
    targets = found.targets(x, p, temperature)
    torch.testing.assert_close(targets.reshape(40, 2, count).sum(2), p)
    assert bool((targets >= 0).all())
    gram = found.directions @ found.directions.mT
    torch.testing.assert_close(gram, torch.eye(count, dtype=torch.float64).expand(2, -1, -1))
    torch.testing.assert_close(found.directions @ weight.T, torch.zeros(2, count, 2, dtype=torch.float64))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-4, 1e4), st.floats(-10, 10))
def test_scale_place_and_what_the_classifier_reads_do_not_matter(seed: int, scale: float, along: float):
    x, labels, weight = random_features(seed)
    found = subclass_projection(x, labels, count=3, weight=weight, seed=1)
    moved = scale * x + scale * along * torch.randn(80, 2, dtype=torch.float64, generator=torch.Generator()) @ weight
    other = subclass_projection(moved, labels, count=3, weight=7 * weight, seed=1)
    torch.testing.assert_close(found.shares(x), other.shares(moved), atol=1e-6, rtol=1e-6)


def test_a_turn_keeps_the_span_and_evens_the_variance():
    x, labels, weight = random_features(5, units=12, each=300)
    plain = subclass_projection(x, labels, count=4, weight=weight, rotate=False)
    spread = []
    for seed in range(30):
        turned = subclass_projection(x, labels, count=4, weight=weight, seed=seed)
        torch.testing.assert_close(turned.explained, plain.explained)
        torch.testing.assert_close(turned.scales, plain.scales)
        torch.testing.assert_close(
            turned.directions.mT @ turned.directions, plain.directions.mT @ plain.directions, atol=1e-9, rtol=0
        )
        spread.append(turned.coordinates(x)[labels == 0, 0].square().mean(0))
    # in expectation each direction holds the same; unturned the first holds most
    torch.testing.assert_close(torch.stack(spread).mean(0), torch.ones(4, dtype=torch.float64), atol=0.15, rtol=0)
    assert float(plain.coordinates(x)[labels == 0, 0].square().mean(0)[0]) > 1.2


@pytest.mark.parametrize("collapsed", [1.0, 1e-4])
def test_planted_subclasses_are_found_also_in_a_collapsed_class(collapsed: float):
    generator = torch.Generator().manual_seed(0)
    fine = torch.arange(240) % 4
    weight = torch.zeros(2, 6, dtype=torch.float64)
    weight[0, 0] = weight[1, 1] = 1.0
    x = 0.05 * torch.randn(240, 6, generator=generator, dtype=torch.float64)
    x[:, 2] += torch.where(fine % 2 == 0, 1.0, -1.0)
    x = collapsed * x + 10 * weight[fine // 2]
    found = subclass_projection(x, fine // 2, count=1, weight=weight, rotate=False)
    along = found.coordinates(x)[torch.arange(240), fine // 2, 0]
    assert bool(((along > 0) == (fine % 2 == 0)).all() | ((along > 0) == (fine % 2 == 1)).all())
    assert float(found.explained.min()) > 0.95


def test_sharp_shares_are_the_likeliest_subclass_and_soft_ones_are_even():
    x, labels, weight = random_features(1)
    found = subclass_projection(x, labels, count=3, weight=weight)
    sharp, soft = found.shares(x, 1e-4), found.shares(x, 1e4)
    own = sharp[torch.arange(80), labels]
    assert torch.equal(own.argmax(1) + 3 * labels, found.labels(x, labels))
    assert float(own.amax(1).min()) > 0.9
    torch.testing.assert_close(soft, torch.full_like(soft, 1 / 3), atol=1e-3, rtol=0)


def test_one_seed_one_result_and_inputs_are_left_alone():
    x, labels, weight = random_features(2)
    before = [part.clone() for part in (x, labels, weight)]
    first, again, other = (subclass_projection(x, labels, count=2, weight=weight, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.directions, again.directions)
    assert not torch.equal(first.directions, other.directions)
    assert all(torch.equal(*pair) for pair in zip(before, (x, labels, weight), strict=True))
    assert repr(first) == "SubclassProjection(2 classes into 2 each, 7 units)"


def test_arrays_and_feature_maps_are_read():
    x, labels, weight = random_features(2)
    found = subclass_projection(x.numpy(), labels.numpy(), count=2, weight=weight.numpy())
    mapped = subclass_projection(x.reshape(80, 7, 1), labels, count=2, weight=weight)
    assert torch.equal(found.directions, mapped.directions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count is 0; expected a whole number"),
        ({"count": True}, "count is True"),
        ({"directions": "ica"}, "expected one of pca, random"),
        ({"count": 6}, "class 0 varies in 5 dimensions that the classifier does not read, but count is 6"),
        ({"count": 6, "directions": "random"}, "class 0 varies in 5 dimensions"),
        ({"weight": torch.ones(2, 6)}, r"weight has shape \(2, 6\), but the features \(80, 7\)"),
        ({"labels": torch.arange(79)}, "labels has 79 entries, but there are 80 samples"),
        ({"labels": 2 * (torch.arange(80) % 2)}, "class 1 has no sample"),
        ({"labels": torch.tensor([1, *[0] * 79])}, "class 1: all 1 samples have the same features"),
    ],
)
def test_bad_input_is_named(change: dict, message: str):
    x, labels, weight = random_features()
    given = {"features": x, "labels": labels, "count": 2, "weight": weight, **change}
    with pytest.raises(DataError, match=message):
        subclass_projection(**given)


@pytest.mark.parametrize("directions", ["pca", "random"])
def test_a_class_that_varies_only_where_the_classifier_reads(directions: str):
    weight = torch.eye(4, dtype=torch.float64)[:2]
    x = torch.zeros(20, 4, dtype=torch.float64)
    x[:, 0] = torch.arange(20)
    with pytest.raises(DataError, match="varies in 0 dimensions"):
        subclass_projection(x, [0] * 20, count=1, weight=weight, directions=directions)  # pyright: ignore[reportArgumentType]


def test_infinity_is_refused():
    x, labels, weight = random_features()
    x[3, 2] = torch.inf
    with pytest.raises(NotFiniteError, match="NaN or infinity"):
        subclass_projection(x, labels, count=2)
    x[3, 2], weight[0, 0] = 0.0, torch.nan
    with pytest.raises(NotFiniteError, match="weight"):
        subclass_projection(x, labels, count=2, weight=weight)


def test_what_does_not_fit_the_projection_is_named():
    x, labels, weight = random_features()
    found: SubclassProjection = subclass_projection(x, labels, count=2, weight=weight)
    with pytest.raises(DataError, match=r"shape \(80, 6\), the projection reads 7 units"):
        found.coordinates(x[:, :6])
    with pytest.raises(DataError, match="temperature is 0"):
        found.shares(x, 0)
    with pytest.raises(DataError, match=r"probabilities have shape \(80, 3\); expected \(80, 2\)"):
        found.targets(x, torch.full((80, 3), 1 / 3))
    with pytest.raises(DataError, match=r"pass softmax\(logits\)"):
        found.targets(x, x[:, :2])
    with pytest.raises(DataError, match="labels go up to 2; the projection knows classes 0 to 1"):
        found.labels(x, torch.where(torch.arange(80) == 5, 2, labels))

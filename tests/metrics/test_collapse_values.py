"""Measures of neural collapse against the papers' formulas in numpy, exact simplices, and invariances."""

from __future__ import annotations

import json
import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.spatial.distance import pdist

from isthmus.base.errors import ArchitectureError, DataError, NotFiniteError
from isthmus.metrics.collapse import (
    ClassMoments,
    CollapseValues,
    collapse_of,
    collapse_values,
    decisions,
    frame,
    minority_cosine,
    one_vs_rest_margin,
    orthogonal_distance,
    uniformity,
)

COUNTS = [40, 9, 25, 6, 13, 7]
ZERO_UNDER_COLLAPSE = (
    *("nc1", "nc1_cheap", "cdnv", "equinorm", "cosine_spread", "equiangularity", "simplex_distance", "nc3"),
    *("weight_equinorm", "weight_cosine_spread", "weight_simplex_distance", "uniformity_spread"),
)


def draw(
    counts: list[int] = COUNTS, p: int = 8, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    k = len(counts)
    labels = rng.permutation(np.repeat(np.arange(k), counts))
    centres = rng.standard_normal((k, p)) + 2
    features = centres[labels] + 0.7 * rng.standard_normal((len(labels), p)) * rng.uniform(0.5, 2, p)
    weight = centres - centres.mean(0) + 0.3 * rng.standard_normal((k, p))
    return (
        torch.from_numpy(features),
        torch.from_numpy(labels),
        torch.from_numpy(weight),
        torch.from_numpy(rng.standard_normal(k)),
    )


def direct(
    features: torch.Tensor,
    labels: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    weighted: bool = False,
) -> dict[str, Any]:
    """Follow the definitions of the papers, with dense matrices in float64 and loops over classes."""
    h, y, w = features.double().numpy(), labels.numpy(), weight.double().numpy()
    k = int(y.max()) + 1
    shares = np.array([np.mean(y == c) for c in range(k)]) if weighted else np.full(k, 1 / k)
    mu = np.stack([h[y == c].mean(0) for c in range(k)])
    centre = shares @ mu
    sigma_w = sum((row - mu[c])[:, None] * (row - mu[c])[None] for row, c in zip(h, y, strict=True)) / len(h)
    sigma_b = sum(s * np.outer(m - centre, m - centre) for s, m in zip(shares, mu, strict=True))
    var = [np.mean(np.sum((h[y == c] - mu[c]) ** 2, 1)) for c in range(k)]
    pairs = list(combinations(range(k), 2))
    m = mu - centre
    norms = np.linalg.norm(m, axis=1)
    cosines = np.array([m[i] @ m[j] / norms[i] / norms[j] for i, j in pairs])
    simplex = (np.eye(k) - np.ones((k, k)) / k) / math.sqrt(k - 1)
    gram, raw = m @ m.T, mu @ mu.T
    logs = -np.log(pdist(m / norms[:, None]))
    nearest = np.array([np.argmin([np.linalg.norm(row - c) for c in mu]) for row in h])
    chosen = (h @ w.T + (0 if bias is None else bias.numpy())).argmax(1)
    w_norms = np.linalg.norm(w, axis=1)
    w_cosines = np.array([w[i] @ w[j] / w_norms[i] / w_norms[j] for i, j in pairs])
    w_gram = w @ w.T
    small = [c for c in range(k) if np.sum(y == c) < len(y) / k]
    both = [(i, j) for i, j in pairs if i in small and j in small]

    def apart(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a / np.linalg.norm(a) - b / np.linalg.norm(b)))

    return {
        "nc1": float(np.trace(sigma_w @ np.linalg.pinv(sigma_b, rcond=1e-10))) / k,
        "nc1_cheap": float(np.trace(sigma_w) / np.trace(sigma_b)),
        "cdnv": float(np.mean([(var[i] + var[j]) / 2 / np.sum((mu[i] - mu[j]) ** 2) for i, j in pairs])),
        "equinorm": norms.std() / norms.mean(),
        "cosine_spread": cosines.std(),
        "cosine_mean": cosines.mean(),
        "equiangularity": np.abs(cosines + 1 / (k - 1)).mean(),
        "simplex_distance": float(np.linalg.norm(gram / np.linalg.norm(gram) - simplex)),
        "orthogonal_distance": float(np.linalg.norm(raw / np.linalg.norm(raw) - np.eye(k) / math.sqrt(k))),
        "uniformity": logs.mean(),
        "uniformity_spread": logs.std(),
        "weight_equinorm": w_norms.std() / w_norms.mean(),
        "weight_cosine_spread": w_cosines.std(),
        "weight_simplex_distance": float(np.linalg.norm(w_gram / np.linalg.norm(w_gram) - simplex)),
        "minority_cosine": float(np.mean([cosines[pairs.index(pair)] for pair in both])),
        "weight_minority_cosine": float(np.mean([w_cosines[pairs.index(pair)] for pair in both])),
        "nc3": apart(w, m),
        "nc3_squared": 2 - 2 * float(np.sum(w * m)) / np.linalg.norm(w) / np.linalg.norm(m),
        "nc3_uncentred": apart(w, mu),
        "nc4": np.mean(nearest == chosen),
        "ncm_accuracy": np.mean(nearest == y),
        "accuracy": np.mean(chosen == y),
    }


def check(values: CollapseValues, truth: dict[str, Any], rtol: float = 1e-10) -> None:
    for name, value in truth.items():
        assert getattr(values, name) == pytest.approx(value, rel=rtol, abs=rtol), name


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("units", [3, 5, 8, 200])
def test_every_value_is_that_of_its_definition(units: int, weighted: bool) -> None:
    features, labels, weight, bias = draw(p=units)
    values = collapse_values(features, labels, weight=weight, bias=bias, weighted=weighted, margin=False)
    check(values, direct(features, labels, weight, bias, weighted))
    assert (values.classes, values.samples, values.features, values.smallest_class) == (6, 100, units, 6)
    assert (values.rank, values.weighted, values.margin) == (min(5, units), weighted, None)


def test_a_classifier_without_bias_and_features_in_float32() -> None:
    features, labels, weight, _ = draw(seed=3)
    features = features.float()
    values = collapse_values(features, labels, weight=weight.float())
    check(values, direct(features, labels, weight.float()))


@pytest.mark.parametrize("weighted", [False, True])
def test_nc1_from_the_covariance_is_that_from_the_features(weighted: bool) -> None:
    features, labels, weight, bias = draw()
    moments = ClassMoments(6)
    for part, own in zip(features.split(17), labels.split(17), strict=True):
        moments.update(part, own)
    values = collapse_of(moments, weight, bias, weighted=weighted)
    truth = direct(features, labels, weight, bias, weighted)
    for name in ("nc4", "ncm_accuracy", "accuracy"):
        assert getattr(values, name) is None
        del truth[name]
    check(values, truth)


def test_without_covariance_and_features_nc1_is_not_known() -> None:
    features, labels, *_ = draw()
    moments = ClassMoments(6, covariance=False)
    moments.update(features, labels)
    values = collapse_of(moments)
    assert values.nc1 is None
    assert values.nc3 is values.nc4 is values.weight_equinorm is None
    assert values.nc1_cheap == pytest.approx(direct(*draw())["nc1_cheap"], rel=1e-12)


def test_features_in_pieces_and_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, weight, bias = draw()
    monkeypatch.setattr(decisions, "_PIECE", 50)  # six rows at a time
    moments = ClassMoments(6)
    blocks = list(zip(features.split(13), labels.split(13), strict=True))
    for block in blocks:
        moments.update(*block)
    check(collapse_of(moments, weight, bias, rows=blocks), direct(features, labels, weight, bias))


@pytest.mark.parametrize("classes", [2, 3, 10, 31])
def test_an_exact_simplex_is_all_collapse(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    turn, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64, generator=generator))
    corners = (torch.eye(classes, 40, dtype=torch.float64) - torch.eye(classes, 40, dtype=torch.float64).mean(0)) @ turn
    labels = torch.arange(4 * classes) % classes
    features = 7 * corners[labels] + torch.randn(40, dtype=torch.float64, generator=generator)
    bias = -3 * corners @ features.mean(0)
    values = collapse_values(features, labels, weight=3 * corners, bias=bias, margin=True)
    for name in ZERO_UNDER_COLLAPSE:
        assert getattr(values, name) == pytest.approx(0, abs=1e-10), name
    assert (values.nc4, values.ncm_accuracy, values.accuracy) == (1, 1, 1)
    assert values.cosine_mean == pytest.approx(-1 / (classes - 1), abs=1e-10)
    assert values.uniformity == pytest.approx(-0.5 * math.log(2 * classes / (classes - 1)), abs=1e-10)
    assert values.margin == pytest.approx(classes / (classes - 1), abs=1e-5)
    assert values.minority_cosine is values.weight_minority_cosine is None
    assert values.rank == classes - 1


def test_mean_cosine_tells_little_where_the_spread_does() -> None:
    # Trap: directions that are no simplex have nearly its mean cosine, since centred vectors add up to zero.
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 10
    features = torch.randn(10, 4, generator=generator)[labels] + 0.1 * torch.randn(200, 4, generator=generator)
    values = collapse_values(features, labels)
    assert abs(values.cosine_mean + 1 / 9) < 0.06
    assert values.cosine_spread > 0.3


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), weighted=st.booleans())
def test_rotation_scale_and_translation_change_nothing(seed: int, scale: float, weighted: bool) -> None:
    features, labels, weight, bias = draw(seed=seed)
    rng = np.random.default_rng(seed)
    turn = torch.from_numpy(np.linalg.qr(rng.standard_normal((8, 8)))[0])
    moved = torch.from_numpy(rng.standard_normal(8))
    there = scale * features @ turn + moved
    # The classifier of the moved features that decides alike.
    other = weight @ turn
    shifted = bias * scale - other @ moved
    first = collapse_values(features, labels, weight=weight, bias=bias, weighted=weighted).to_dict()
    second = collapse_values(there, labels, weight=other, bias=shifted, weighted=weighted).to_dict()
    for name, value in first.items():
        if name not in ("orthogonal_distance", "nc3_uncentred"):  # which know the origin
            assert second[name] == pytest.approx(value, rel=1e-7, abs=1e-9), name


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(6)), seed=st.integers(0, 100))
def test_names_of_classes_do_not_matter(order: list[int], seed: int) -> None:
    features, labels, weight, bias = draw(seed=seed)
    there = torch.tensor(order)[labels]
    back = torch.tensor(order).argsort()
    first = collapse_values(features, labels, weight=weight, bias=bias).to_dict()
    second = collapse_values(features, there, weight=weight[back], bias=bias[back]).to_dict()
    for name, value in first.items():
        assert second[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_nc1_does_not_mind_any_linear_map(seed: int) -> None:
    features, labels, *_ = draw(seed=seed, p=4)  # more classes than units: Σ_B has an inverse
    a = torch.from_numpy(np.random.default_rng(seed).standard_normal((4, 4)) + 3 * np.eye(4))
    first, second = collapse_values(features, labels).nc1, collapse_values(features @ a, labels).nc1
    assert first == pytest.approx(second, rel=1e-6)


def test_means_that_coincide_or_span_less() -> None:
    labels = torch.arange(12) % 3
    noise = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat_interleave(6, 0).double()
    values = collapse_values(noise, labels)
    assert values.rank == 0
    assert math.isnan(values.nc1_cheap)
    same = collapse_values(torch.zeros(12, 4), labels)
    assert math.isnan(same.nc1 or 0)
    assert math.isnan(same.nc1_cheap)
    assert same.rank == 0
    plain = same.to_dict()
    assert plain["nc1"] is plain["cosine_spread"] is None
    json.dumps(plain, allow_nan=False)
    line = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]).double()[labels] + 0.1 * noise
    values = collapse_values(line, labels)
    assert values.rank == 1
    # Along the line: variance 0.01 within, 2 / 3 between.
    assert values.nc1 == pytest.approx(0.01 / (2 / 3) / 3, rel=1e-10)


def test_small_classes_that_fall_together() -> None:
    weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 3.0], [0.0, 0.1, 1.0]])
    counts = torch.tensor([100, 90, 5, 4, 6])
    assert minority_cosine(weight, counts) == pytest.approx((1 + 2 / math.sqrt(1.01)) / 3)
    assert minority_cosine(weight, torch.tensor([100, 100, 100, 100, 5])) is None
    with pytest.raises(DataError, match="5 vectors beside counts of 2 classes"):
        minority_cosine(weight, counts[:2])


def test_frames_that_are_not_simplices() -> None:
    axes = torch.eye(3, 5)
    found = frame(torch.tensor([[2.0], [1.0], [1.0]]) * axes)
    assert found.cosine_spread == found.cosine_mean == 0
    assert found.equiangularity == pytest.approx(0.5)
    assert found.equinorm == pytest.approx(np.std([2, 1, 1]) / (4 / 3))
    assert orthogonal_distance(2 * axes) == pytest.approx(0, abs=1e-12)
    assert orthogonal_distance(axes - axes.mean(0)) > 0.3
    assert math.isnan(frame(torch.zeros(3, 2)).cosine_spread)
    assert math.isnan(frame(torch.zeros(3, 2)).equinorm)
    evenly = uniformity(torch.cat([axes, -axes]))
    assert evenly[1] > 0


def polygon(count: int) -> torch.Tensor:
    angles = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count
    return torch.stack([angles.cos(), angles.sin()], 1) * (1 + torch.arange(count))[:, None]


@pytest.mark.parametrize("count", [2, 3, 4, 7, 40])
def test_margin_of_a_regular_polygon(count: int) -> None:
    # The nearest point of the others' hull is in the middle between the two neighbours.
    expected = 2 if count == 2 else 1 - math.cos(2 * math.pi / count)
    assert one_vs_rest_margin(polygon(count), tolerance=1e-10) == pytest.approx(expected, abs=1e-6)


def test_margin_of_an_orthoplex_is_one() -> None:
    axes = torch.eye(6)
    assert one_vs_rest_margin(torch.cat([axes, -axes])) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("count", "units"), [(4, 6), (8, 3), (12, 4)])
def test_margin_against_a_general_solver(count: int, units: int) -> None:
    vectors = np.random.default_rng(count).standard_normal((count, units))
    u = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    found = []
    for k in range(count):
        others = np.delete(u, k, 0)
        result = minimize(
            lambda a, k=k, others=others: np.sum((u[k] - a @ others) ** 2),
            np.full(count - 1, 1 / (count - 1)),
            bounds=[(0, 1)] * (count - 1),
            constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        found.append(math.sqrt(result.fun))
    assert one_vs_rest_margin(torch.from_numpy(vectors), tolerance=1e-10) == pytest.approx(min(found), abs=1e-4)


def test_margin_of_what_has_none() -> None:
    assert math.isnan(one_vs_rest_margin(torch.zeros(3, 2)))
    assert one_vs_rest_margin(torch.ones(3, 2)) == pytest.approx(0, abs=1e-3)
    with pytest.raises(DataError, match=r"shape \(1, 2\); expected at least two"):
        one_vs_rest_margin(torch.ones(1, 2))
    with pytest.raises(DataError, match="of 30 classes is not found in 3 steps"):
        one_vs_rest_margin(torch.randn(30, 2, generator=torch.Generator().manual_seed(0)), steps=3)


def test_more_classes_than_a_simplex_has_room_for() -> None:
    counts = [5] * 12
    features, labels, *_ = draw(counts, p=3)
    values = collapse_values(features, labels)
    assert values.margin is not None
    assert 0 < values.margin < 1
    assert values.rank == 3
    assert collapse_values(features, labels, margin=False).margin is None
    assert collapse_values(*draw(counts, p=11)[:2]).margin is None


def test_bad_input() -> None:
    features, labels, weight, bias = draw()
    with pytest.raises(ArchitectureError, match=r"weight has shape \(6, 7\); expected \(6, 8\), for 6 classes"):
        collapse_values(features, labels, weight=weight[:, 1:])
    with pytest.raises(ArchitectureError, match=r"bias has shape \(5,\); expected \(6,\)"):
        collapse_values(features, labels, weight=weight, bias=bias[1:])
    with pytest.raises(NotFiniteError, match=r"the classifier's bias of shape \(6,\) holds NaN"):
        collapse_values(features, labels, weight=weight, bias=bias / 0 * 0)
    with pytest.raises(DataError, match="label 5 does not fit 4 classes"):
        collapse_values(features, labels, classes=4)
    with pytest.raises(DataError, match=r"1 of 7 classes have fewer than 2 samples: class 6 \(0\)"):
        collapse_values(features, labels, classes=7)
    with pytest.raises(DataError, match="there is no sample"):
        collapse_values(features[:0], labels[:0])
    with pytest.raises(DataError, match="expected their number, at least 2"):
        collapse_values(features, torch.zeros_like(labels))
    lone = labels.clone()
    lone[lone == 3] = 0
    lone[0] = 3
    with pytest.raises(DataError, match=r"fewer than 2 samples: class 3 \(1\)"):
        collapse_values(features, lone)


def test_rows_that_are_not_those_of_the_moments() -> None:
    features, labels, *_ = draw()
    moments = ClassMoments(6)
    moments.update(features, labels)
    with pytest.raises(DataError, match="rows hold 99 samples, or other labels than the 100 samples"):
        collapse_of(moments, rows=[(features[1:], labels[1:])])
    with pytest.raises(DataError, match=r"rows have shape \(100, 7\); expected samples x 8 units"):
        collapse_of(moments, rows=[(features[:, 1:], labels)])

"""Frank-Wolfe for two networks, against dense matrices in numpy and every permutation tried in turn."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from isthmus.align import Permutation, Symmetry, symmetry
from isthmus.align.nets.frank_wolfe import Ascent, Mixture, Slope, frank_wolfe_matching, parts
from isthmus.align.nets.weights import weight_matching
from isthmus.base.errors import DataError, NotFiniteError

Parameters = dict[str, Tensor]
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def parameters(model: nn.Module) -> Parameters:
    return {name: p.detach() for name, p in model.named_parameters()}


def drawn(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def tiny(seed: int) -> nn.Module:
    return drawn(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)), seed)


def dense(a: Parameters, b: Parameters, p: np.ndarray, q: np.ndarray) -> float:
    """Compute <A, X(B)> for the matrices p and q of the two hidden layers."""
    v, w = ({name: tensor.double().numpy() for name, tensor in state.items()} for state in (a, b))
    value = (v["0.weight"] * (p @ w["0.weight"])).sum() + (v["0.bias"] * (p @ w["0.bias"])).sum()
    value += (v["2.weight"] * (q @ w["2.weight"] @ p.T)).sum() + (v["2.bias"] * (q @ w["2.bias"])).sum()
    return value + (v["4.weight"] * (w["4.weight"] @ q.T)).sum()


def dense_gradient(a: Parameters, b: Parameters, p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    v, w = ({name: tensor.double().numpy() for name, tensor in state.items()} for state in (a, b))
    first = v["0.weight"] @ w["0.weight"].T + np.outer(v["0.bias"], w["0.bias"])
    first += v["2.weight"].T @ q @ w["2.weight"]
    second = v["2.weight"] @ p @ w["2.weight"].T + np.outer(v["2.bias"], w["2.bias"]) + v["4.weight"].T @ w["4.weight"]
    return first, second


def corners(size: int) -> list[np.ndarray]:
    return [np.eye(size)[list(order)] for order in itertools.permutations(range(size))]


def mixture_of(found: Symmetry, seed: int, steps: int = 3) -> Mixture:
    generator = torch.Generator().manual_seed(seed)
    mixture = Mixture(found)
    for _ in range(steps):
        mixture = mixture.towards(found.random(generator).indices, float(torch.rand((), generator=generator)) * 0.9)
    return mixture


def slope_of(found: Symmetry, a: Parameters, b: Parameters, mixture: Mixture) -> tuple[Ascent, list[Tensor], Slope]:
    cut = parts(found, a)
    ascent = Ascent(found, cut, {n: t.double() for n, t in b.items()}, mixture, torch.float64)
    reference = [piece.get(a[name].double()) for name, piece in cut]
    return ascent, reference, ascent.slope(ascent.look(), reference)


# Doubly stochastic matrices


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), steps=st.integers(0, 4))
def test_a_mixture_is_doubly_stochastic_and_the_sum_of_its_corners(seed: int, steps: int) -> None:
    found = symmetry(tiny(0), X)
    mixture = mixture_of(found, seed, steps)
    for name, matrix in mixture.matrices(torch.float64).items():
        value = matrix.numpy()
        assert np.allclose(value.sum(0), 1)
        assert np.allclose(value.sum(1), 1)
        assert (value >= 0).all()
        expected = np.full((3, 3), mixture.barycentre / 3)
        for weight, indices in mixture.corners:
            expected += weight * np.eye(3)[indices[name].numpy()]
        assert np.allclose(value, expected)


def test_a_step_of_one_forgets_and_rounding_gives_the_corner(cases: dict[str, Any]) -> None:
    for name in ("mlp", "attention", "nested twice"):
        found = symmetry(cases[name].model(1), cases[name].data(), verify=False)
        corner = found.random(torch.Generator().manual_seed(3))
        arrived = mixture_of(found, 1).towards(corner.indices, 1.0)
        assert len(arrived.corners) == 1
        assert arrived.barycentre == 0
        assert arrived.rounded() == corner
        assert mixture_of(found, 2).towards(corner.indices, 0.7).rounded() == corner


# Value, gradient, gap, and the way


@pytest.mark.parametrize("seed", range(6))
def test_value_gap_and_corner_are_those_of_dense_matrices(seed: int) -> None:
    a, b = parameters(tiny(2 * seed)), parameters(tiny(2 * seed + 1))
    found = symmetry(tiny(0), X)
    mixture = mixture_of(found, seed)
    p, q = (mixture.matrices(torch.float64)[name].numpy() for name in ("0", "2"))
    _, _, slope = slope_of(found, a, b, mixture)
    assert slope.value == pytest.approx(dense(a, b, p, q), rel=1e-12)
    first, second = dense_gradient(a, b, p, q)
    gap = max((first * (d - p)).sum() + (second * (e - q)).sum() for d in corners(3) for e in corners(3))
    assert gap > 0
    assert slope.gap == pytest.approx(gap, rel=1e-9)
    there = [np.eye(3)[slope.corner[name].numpy()] for name in ("0", "2")]
    assert slope.at_corner == pytest.approx(dense(a, b, there[0], there[1]), rel=1e-12)
    best = max(np.linspace(0, 1, 2001), key=lambda t: dense(a, b, p + t * (there[0] - p), q + t * (there[1] - q)))
    assert slope.size == pytest.approx(best, abs=1e-3)


def test_the_polynomial_is_the_objective_along_the_way(case: Any) -> None:
    """Also of degree 3 and 4, where groups lie within others or meet themselves."""
    model = case.model(1)
    found = symmetry(model, case.data(), verify=False)
    a, b = parameters(model), parameters(case.model(2))
    for seed in range(2):
        mixture = mixture_of(found, seed, 2)
        ascent, reference, slope = slope_of(found, a, b, mixture)
        for size in (0.0, 0.17, 0.6, 1.0):
            mixed = ascent.mixed(ascent.matrices(mixture.towards(slope.corner, size)))
            value = sum(float((x * y).sum()) for x, y in zip(reference, mixed, strict=True))
            fitted = np.polynomial.polynomial.polyval(size, slope.polynomial)
            assert fitted == pytest.approx(value, rel=1e-8, abs=1e-8)


def test_values_at_permutations_differ_as_the_inner_products_after_them(case: Any) -> None:
    """What no permutation moves does not count, and is the same in both."""
    model = case.model(1)
    found = symmetry(model, case.data(), verify=False)
    a, b = parameters(model), parameters(case.model(2))
    values, expected = [], []
    for seed in (5, 6):
        permutation = found.random(torch.Generator().manual_seed(seed))
        values.append(slope_of(found, a, b, Mixture(found).towards(permutation.indices, 1.0))[2].value)
        moved = {name: permutation.permute(name, tensor) for name, tensor in b.items()}
        expected.append(sum(float((a[name].double() * moved[name].double()).sum()) for name in a))
    assert values[0] != values[1]
    assert values[0] - values[1] == pytest.approx(expected[0] - expected[1], rel=1e-9)


# The search


@pytest.mark.parametrize("seed", range(12))
def test_the_result_is_a_permutation_with_its_objective_and_no_better_than_the_best(seed: int) -> None:
    a, b = parameters(tiny(2 * seed)), parameters(tiny(2 * seed + 1))
    result = frank_wolfe_matching(symmetry(tiny(0), X), a, b)
    p, q = (np.eye(3)[result.permutation.indices[name].numpy()] for name in ("0", "2"))
    assert result.objective == pytest.approx(dense(a, b, p, q), rel=1e-6)
    best = max(dense(a, b, d, e) for d in corners(3) for e in corners(3))
    assert result.objective <= best + 1e-6
    assert result.gap >= 0
    assert result.history[0][0] == pytest.approx(dense(a, b, np.full((3, 3), 1 / 3), np.full((3, 3), 1 / 3)), rel=1e-5)


def test_it_often_finds_the_best_of_all_permutations() -> None:
    reached = 0
    for seed in range(12):
        a, b = parameters(tiny(2 * seed)), parameters(tiny(2 * seed + 1))
        best = max(dense(a, b, d, e) for d in corners(3) for e in corners(3))
        reached += frank_wolfe_matching(symmetry(tiny(0), X), a, b).objective > best - 1e-6
    assert reached >= 9


def test_the_history_rises_and_the_gap_closes(case: Any) -> None:
    model = case.model(1)
    found = symmetry(model, case.data(), verify=False)
    a, b = parameters(model), parameters(case.model(2))
    result = frank_wolfe_matching(found, a, b, tolerance=1e-3)
    (line,) = result.history
    assert all(later > earlier for earlier, later in itertools.pairwise(line))
    assert result.gap >= 0
    assert len(line) == 101 or result.gap <= 1e-3 * abs(line[-1]) + 1e-6


def test_a_planted_permutation_is_found_under_noise(case: Any) -> None:
    model = case.model(3)
    found = symmetry(model, case.data(), verify=False)
    generator = torch.Generator().manual_seed(1)
    for seed in range(3):
        planted = found.random(torch.Generator().manual_seed(seed))
        noisy = {
            n: p + 0.03 * torch.randn(p.shape, generator=generator) for n, p in parameters(planted.apply(model)).items()
        }
        result = frank_wolfe_matching(found, parameters(model), noisy)
        assert result.permutation == planted.inverse()


class Residual(nn.Module):
    def __init__(self, width: int, inner: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Linear(3, width)
        self.up = nn.ModuleList(nn.Linear(width, inner) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(inner, width) for _ in range(blocks))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return self.head(x)


def test_from_the_barycentre_wide_residual_networks_are_recovered() -> None:
    for seed in range(3):
        model = drawn(Residual(64, 256, 4), seed)
        found = symmetry(model, X, verify=False)
        planted = found.random(torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(9)
        noisy = {
            n: p + 0.3 * torch.randn(p.shape, generator=generator) for n, p in parameters(planted.apply(model)).items()
        }
        assert frank_wolfe_matching(found, parameters(model), noisy).permutation == planted.inverse()


# Where it starts


@pytest.mark.parametrize("mixing", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["mlp", "residual", "attention", "grouped conv", "tied square"])
def test_the_result_is_never_worse_than_the_start(name: str, mixing: float, cases: dict[str, Any]) -> None:
    case = cases[name]
    model = case.model(1)
    found = symmetry(model, case.data(), verify=False)
    a, b = parameters(model), parameters(case.model(2))
    begun = weight_matching(found, a, b, restarts=1)
    result = frank_wolfe_matching(found, a, b, start=begun.permutation, mixing=mixing)
    assert result.objective >= begun.objective - 1e-9
    random = found.random(torch.Generator().manual_seed(1))
    one_step = frank_wolfe_matching(found, a, b, start=random, mixing=0.9, max_steps=1)
    still = frank_wolfe_matching(found, a, b, start=random, mixing=0, max_steps=1)
    assert one_step.objective >= still.history[0][0] - 1e-6 * abs(still.history[0][0])


def test_without_mixing_it_begins_at_the_permutation_itself() -> None:
    a, b = parameters(tiny(0)), parameters(tiny(1))
    found = symmetry(tiny(0), X)
    start = found.random(torch.Generator().manual_seed(4))
    p, q = (np.eye(3)[start.indices[name].numpy()] for name in ("0", "2"))
    line = frank_wolfe_matching(found, a, b, start=start, mixing=0).history[0]
    assert line[0] == pytest.approx(dense(a, b, p, q), rel=1e-5)
    p, q = 0.25 * p + 0.25, 0.25 * q + 0.25
    line = frank_wolfe_matching(found, a, b, start=start, mixing=0.75).history[0]
    assert line[0] == pytest.approx(dense(a, b, p, q), rel=1e-5)
    centre = frank_wolfe_matching(found, a, b)
    assert frank_wolfe_matching(found, a, b, start=start, mixing=1).history == centre.history


def test_max_steps_bounds_the_history() -> None:
    a, b = parameters(drawn(Residual(8, 12, 2), 0)), parameters(drawn(Residual(8, 12, 2), 1))
    found = symmetry(Residual(8, 12, 2), X)
    assert [len(frank_wolfe_matching(found, a, b, max_steps=n, tolerance=0).history[0]) for n in (1, 2, 3)] == [2, 3, 4]


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_without_tolerance_it_ends_where_rounding_errors_begin(offset: float) -> None:
    """Beside a large constant, which no permutation changes, single precision sees slopes where there are none."""
    a, b = ({n: t + offset for n, t in parameters(drawn(Residual(8, 12, 2), k)).items()} for k in (0, 1))
    result = frank_wolfe_matching(symmetry(Residual(8, 12, 2), X), a, b, max_steps=300, tolerance=0)
    line = result.history[0]
    assert len(line) < 301
    assert all(later > earlier for earlier, later in itertools.pairwise(line))
    assert result.gap <= 1e-6 * line[-1]


# What it takes and refuses


def test_types_of_numbers_are_joined_and_nothing_is_changed() -> None:
    model = drawn(Residual(6, 9, 1), 0)
    found = symmetry(model, X)
    planted = found.random(torch.Generator().manual_seed(1))
    a, b = parameters(model), parameters(planted.apply(model))
    copies = [{name: tensor.clone() for name, tensor in state.items()} for state in (a, b)]
    for first, second in itertools.product((torch.bfloat16, torch.float32, torch.float64), repeat=2):
        states = [{n: t.to(kind) for n, t in state.items()} for state, kind in ((a, first), (b, second))]
        assert frank_wolfe_matching(found, *states).permutation == planted.inverse()
    for state, before in zip((a, b), copies, strict=True):
        assert all(torch.equal(state[name], before[name]) for name in state)


def test_the_same_call_gives_the_same_result() -> None:
    a, b = parameters(drawn(Residual(8, 12, 2), 0)), parameters(drawn(Residual(8, 12, 2), 1))
    found = symmetry(Residual(8, 12, 2), X)
    state = torch.get_rng_state()
    runs = [frank_wolfe_matching(found, a, b) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0].permutation == runs[1].permutation
    assert (runs[0].history, runs[0].gap) == (runs[1].history, runs[1].gap)


def test_a_network_without_groups_and_one_of_zeros_stay_as_they_are() -> None:
    model = drawn(nn.Linear(3, 2), 0)
    result = frank_wolfe_matching(symmetry(model, X), parameters(model), parameters(model))
    assert result.permutation == Permutation(symmetry(model, X), {})
    assert (result.objective, result.gap) == (0, 0)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in parameters(tiny(0)).items()}
    result = frank_wolfe_matching(symmetry(tiny(0), X), zeros, zeros)
    assert (result.objective, result.gap, result.history) == (0, 0, ((0.0,),))


def test_progress_is_silent_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    a, b = parameters(tiny(0)), parameters(tiny(1))
    frank_wolfe_matching(symmetry(tiny(0), X), a, b)
    assert capsys.readouterr() == ("", "")
    frank_wolfe_matching(symmetry(tiny(0), X), a, b, progress=True)
    assert "Frank-Wolfe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixing": -0.1}, "mixing is -0.1"),
        ({"mixing": 1.5}, "mixing is 1.5"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"tolerance": -1.0}, "tolerance at least 0"),
        ({"tolerance": float("nan")}, "tolerance at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        frank_wolfe_matching(symmetry(tiny(0), X), parameters(tiny(0)), parameters(tiny(1)), **options)


def test_nan_does_not_pass() -> None:
    for at in (0, 1):
        states = [parameters(tiny(0)), parameters(tiny(1))]
        states[at]["2.weight"][1, 1] = float("nan")
        with pytest.raises(NotFiniteError):
            frank_wolfe_matching(symmetry(tiny(0), X), *states)

"""Weight matching, against every permutation tried in turn and inner products computed apart."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isthmus.align import Permutation, symmetry
from isthmus.align.nets.scores import weight_scores
from isthmus.align.nets.weights import Found, weight_matching
from isthmus.base.errors import DataError, NotFiniteError

Parameters = dict[str, Tensor]


def parameters(model: nn.Module) -> Parameters:
    return {name: p.detach() for name, p in model.named_parameters()}


def drawn(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def tiny(seed: int, sizes: tuple[int, int] = (4, 3)) -> nn.Module:
    return drawn(
        nn.Sequential(
            nn.Linear(3, sizes[0]), nn.ReLU(), nn.Linear(sizes[0], sizes[1]), nn.ReLU(), nn.Linear(sizes[1], 2)
        ),
        seed,
    )


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def inner_product(a: Parameters, b: Parameters) -> float:
    """<theta_a, theta_b> over parameters with permutable axes: all but the biases of the outputs."""
    return float(sum((a[n].double().numpy() * b[n].double().numpy()).sum() for n in a if n != "4.bias"))


def brute_force(a: Parameters, b: Parameters, sizes: tuple[int, int]) -> float:
    w = {name: tensor.double().numpy() for name, tensor in b.items()}
    v = {name: tensor.double().numpy() for name, tensor in a.items()}
    best = -np.inf
    for p in map(list, itertools.permutations(range(sizes[0]))):
        for q in map(list, itertools.permutations(range(sizes[1]))):
            value = (v["0.weight"] * w["0.weight"][p]).sum() + (v["0.bias"] * w["0.bias"][p]).sum()
            value += (v["2.weight"] * w["2.weight"][q][:, p]).sum() + (v["2.bias"] * w["2.bias"][q]).sum()
            best = max(best, value + (v["4.weight"] * w["4.weight"][:, q]).sum())
    return best


def matched(number: int, **options: Any) -> tuple[Parameters, Parameters, Found]:
    a, b = tiny(2 * number), tiny(2 * number + 1)
    return parameters(a), parameters(b), weight_matching(symmetry(a, X), parameters(a), parameters(b), **options)


# The optimum


@pytest.mark.parametrize("seed", range(12))
def test_the_objective_never_exceeds_the_best_of_all_permutations(seed: int) -> None:
    a, b, found = matched(seed, seed=seed)
    assert found.objective <= brute_force(a, b, (4, 3)) + 1e-9
    assert found.objective >= inner_product(a, b) - 1e-9


def test_with_restarts_it_reaches_the_best_of_all_permutations() -> None:
    reached = 0
    for seed in range(12):
        a, b, found = matched(seed, seed=seed, restarts=10)
        best = brute_force(a, b, (4, 3))
        assert found.objective <= best + 1e-9
        reached += found.objective > best - 1e-9
    assert reached >= 10


@pytest.mark.parametrize("seed", range(4))
def test_one_hidden_layer_is_solved_exactly_at_once(seed: int) -> None:
    a, b = (drawn(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), 10 * seed + k) for k in (0, 1))
    found = weight_matching(symmetry(a, X), parameters(a), parameters(b), restarts=1)
    v, w = ({n: t.double().numpy() for n, t in parameters(m).items()} for m in (a, b))
    best = max(
        (v["0.weight"] * w["0.weight"][p]).sum()
        + (v["0.bias"] * w["0.bias"][p]).sum()
        + (v["2.weight"] * w["2.weight"][:, p]).sum()
        for p in map(list, itertools.permutations(range(5)))
    )
    assert found.objective == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_the_objective_is_the_inner_product_after_permutation(seed: int) -> None:
    a, b, found = matched(seed, seed=seed)
    assert found.objective == pytest.approx(inner_product(a, found.permutation.apply(b)), rel=1e-12)
    # permuting the reference alike changes nothing
    model = tiny(2 * seed)
    both = symmetry(model, X).random(torch.Generator().manual_seed(seed))
    assert inner_product(both.apply(a), both.apply(b)) == pytest.approx(inner_product(a, b), rel=1e-9)


def test_blocks_are_matched_as_well_as_the_best_of_the_whole_symmetry() -> None:
    """One hidden layer of 3 blocks of 2 channels: 3! · 2!^3 = 48 permutations, each tried."""
    make = lambda: nn.Sequential(nn.Conv2d(2, 6, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 2, 1))  # noqa: E731
    x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    for seed in range(6):
        a, b = (drawn(make(), 10 * seed + k) for k in (0, 1))
        found = weight_matching(symmetry(a, x), parameters(a), parameters(b), restarts=1)
        v, w = ({n: t.double().numpy().reshape(t.shape[0], -1) for n, t in parameters(m).items()} for m in (a, b))
        best = -np.inf
        for blocks in itertools.permutations(range(3)):
            for flips in itertools.product((0, 1), repeat=3):
                p = [2 * c + (j ^ f) for c, f in zip(blocks, flips, strict=True) for j in (0, 1)]
                names = ("0.weight", "0.bias", "1.weight", "1.bias")
                value = sum((v[n] * w[n][p]).sum() for n in names) + (v["3.weight"] * w["3.weight"][:, p]).sum()
                best = max(best, value)
        assert found.objective == pytest.approx(best, rel=1e-12)


# The search


@pytest.mark.parametrize("name", ["mlp", "residual", "residual conv", "group norm", "grouped conv", "tied square"])
def test_the_history_never_decreases(name: str, cases: dict[str, Any]) -> None:
    case = cases[name]
    a, b = case.model(1), case.model(2)
    found = weight_matching(symmetry(a, case.data(), verify=False), parameters(a), parameters(b), restarts=4, seed=3)
    assert len(found.history) == 4
    for line in found.history:
        assert len(line) >= 2
        assert all(later >= earlier for earlier, later in itertools.pairwise(line))
    assert found.objective == max(line[-1] for line in found.history)
    assert found.objective > found.history[0][0]
    after = found.permutation.apply(b)
    assert found.permutation == symmetry(a, case.data(), verify=False).identity().compose(found.permutation)
    assert torch.allclose(after(case.data()), b(case.data()), atol=1e-4)


def test_restarts_never_worsen_the_best() -> None:
    for seed in range(5):
        objectives = [matched(seed, seed=seed, restarts=restarts)[2].objective for restarts in (1, 2, 4, 8)]
        assert objectives == sorted(objectives)


def test_the_same_seed_gives_the_same_result(cases: dict[str, Any]) -> None:
    case = cases["residual"]
    a, b = case.model(1), case.model(2)
    found = symmetry(a, case.data())
    state = torch.get_rng_state()
    runs = [weight_matching(found, parameters(a), parameters(b), restarts=4, seed=s) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0].permutation == runs[1].permutation
    assert runs[0].history == runs[1].history
    assert runs[0].history != runs[2].history


def test_max_sweeps_bounds_the_history() -> None:
    _, _, found = matched(0, max_sweeps=1, restarts=3)
    assert [len(line) for line in found.history] == [2, 2, 2]


@pytest.mark.parametrize("options", [{"restarts": 0}, {"max_sweeps": 0}, {"restarts": -1}])
def test_no_restarts_or_sweeps_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(DataError, match="must be at least 1"):
        matched(0, **options)


def test_only_the_named_groups_move_and_the_others_stay_at_the_start(cases: dict[str, Any]) -> None:
    case = cases["residual"]
    a, b = case.model(1), case.model(2)
    found = symmetry(a, case.data())
    start = found.random(torch.Generator().manual_seed(9))
    for restarts in (1, 2, 4):
        part = weight_matching(
            found, parameters(a), parameters(b), only=["up.0"], start=start, restarts=restarts
        ).permutation
        assert torch.equal(part.indices["stem"], start.indices["stem"])
        assert torch.equal(part.indices["up.1"], start.indices["up.1"])
        assert not torch.equal(part.indices["up.0"], start.indices["up.0"])


def test_a_group_inside_blocks_may_be_matched_alone(cases: dict[str, Any]) -> None:
    case = cases["grouped conv"]
    model = case.model(1)
    found = symmetry(model, case.data())
    planted = found.random(torch.Generator().manual_seed(2))
    inner = Permutation(found, {**found.identity().indices, "2": planted.indices["2"]})
    moved = parameters(inner.apply(model))
    assert weight_matching(found, parameters(model), moved, only=["2"]).permutation == inner.inverse()
    assert (
        weight_matching(found, parameters(model), moved, only=["0:2"])
        .permutation.indices["2"]
        .equal(found.identity().indices["2"])
    )


@pytest.mark.parametrize("name", ["grouped conv", "group norm", "depthwise", "nested", "attention", "glu"])
def test_no_group_alone_can_be_improved(name: str, cases: dict[str, Any]) -> None:
    """At the result every exchange of two units lowers the objective, be they blocks or inside one."""
    case = cases[name]
    a, b = parameters(case.model(1)), parameters(case.model(2))
    found = symmetry(case.model(1), case.data(), verify=False)
    result = weight_matching(found, a, b, seed=1)
    here = {n: result.permutation.permute(n, tensor) for n, tensor in b.items()}

    def value(state: Parameters) -> float:
        return float(sum((a[n].double() * state[n].double()).sum() for n in a))

    tried = 0
    for group in found.groups:
        still = found.identity().indices[group.name]
        for row in range(still.reshape(-1, group.size).shape[0]):
            for i, j in itertools.combinations(range(group.size), 2):
                index = still.clone().reshape(-1, group.size)
                index[row, [i, j]] = index[row, [j, i]]
                swap = Permutation(found, {**found.identity().indices, group.name: index.reshape(still.shape)})
                changed = {n: swap.permute(n, tensor) for n, tensor in here.items()}
                assert value(changed) <= value(here) + 1e-9
                tried += 1
    assert tried > 5


def test_the_first_restart_begins_at_the_start() -> None:
    a, b = tiny(0), tiny(1)
    found = symmetry(a, X)
    start = found.random(torch.Generator().manual_seed(4))
    result = weight_matching(found, parameters(a), parameters(b), start=start, restarts=1)
    assert result.history[0][0] == pytest.approx(inner_product(parameters(a), start.apply(parameters(b))), rel=1e-12)
    assert result.objective >= result.history[0][0]


def test_parameters_are_untouched_and_nan_does_not_pass(cases: dict[str, Any]) -> None:
    a, b = parameters(tiny(0)), parameters(tiny(1))
    copies = [{name: tensor.clone() for name, tensor in state.items()} for state in (a, b)]
    found = symmetry(tiny(0), X)
    weight_matching(found, a, b, restarts=3)
    for state, before in zip((a, b), copies, strict=True):
        assert all(torch.equal(state[name], before[name]) for name in state)
    b["2.weight"][1, 1] = float("nan")
    with pytest.raises(NotFiniteError):
        weight_matching(found, a, b)


# Planted permutations


def test_a_planted_permutation_is_found_exactly(case: Any) -> None:
    model = case.model(3)
    found = symmetry(model, case.data(), verify=False)
    for seed in range(3):
        planted = found.random(torch.Generator().manual_seed(seed))
        result = weight_matching(found, parameters(model), parameters(planted.apply(model)), seed=seed)
        assert result.permutation == planted.inverse()
        norms = [float((p.double() ** 2).sum()) for n, p in parameters(model).items() if _permutable(found, n)]
        assert result.objective == pytest.approx(sum(norms), rel=1e-6)


def _permutable(found: Any, name: str) -> bool:
    return any(name == axis[0] for group in found.groups for axis in group.axes)


def test_a_planted_permutation_is_found_under_noise(cases: dict[str, Any]) -> None:
    case = cases["residual"]
    model = case.model(3)
    found = symmetry(model, case.data())
    planted = found.random(torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(6)
    noisy = {
        n: p + 0.05 * p.std() * torch.randn(p.shape, generator=generator)
        for n, p in parameters(planted.apply(model)).items()
    }
    assert weight_matching(found, parameters(model), noisy).permutation == planted.inverse()


# Scores


def test_scores_are_the_cosines_of_all_weights_of_a_unit() -> None:
    a, b, found = matched(0)
    scores = weight_scores(found.permutation, a, b)
    w = {name: tensor.double().numpy() for name, tensor in found.permutation.apply(b).items()}
    v = {name: tensor.double().numpy() for name, tensor in a.items()}

    def unit(state: Any, layer: int, k: int) -> np.ndarray:
        return np.concatenate(
            [state[f"{layer}.weight"][k], state[f"{layer}.bias"][k : k + 1], state[f"{layer + 2}.weight"][:, k]]
        )

    for layer, size in ((0, 4), (2, 3)):
        for k in range(size):
            x, y = unit(v, layer, k), unit(w, layer, k)
            cosine = x @ y / np.sqrt((x @ x) * (y @ y))
            assert float(scores[str(layer)][k]) == pytest.approx(cosine, abs=1e-12)


def test_scores_inside_blocks_follow_block_and_unit(cases: dict[str, Any]) -> None:
    case = cases["group norm"]
    a, b = case.model(1), case.model(2)
    identity: Permutation = symmetry(a, case.data()).identity()
    scores = weight_scores(identity, parameters(a), parameters(b))
    assert scores["0"].shape == (4,)
    assert scores["0:2"].shape == (12,)
    v, w = ({n: t.double().numpy() for n, t in parameters(m).items()} for m in (a, b))

    def rows(state: Any, channels: list[int]) -> np.ndarray:
        parts = [state[n][channels].ravel() for n in ("0.weight", "0.bias", "1.weight", "1.bias")]
        return np.concatenate([*parts, state["3.weight"][:, channels].ravel()])

    for k in range(12):
        x, y = rows(v, [k]), rows(w, [k])
        assert float(scores["0:2"][k]) == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)), abs=1e-12)
    for k in range(4):
        x, y = (rows(state, [3 * k, 3 * k + 1, 3 * k + 2]) for state in (v, w))
        assert float(scores["0"][k]) == pytest.approx(x @ y / np.sqrt((x @ x) * (y @ y)), abs=1e-12)

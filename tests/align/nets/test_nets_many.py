"""Many networks in one order: cycles, planted orders, and objectives computed apart."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from isthmus.align import Permutation, Symmetry, symmetry
from isthmus.align.nets.many import ManyMatching, match_many
from isthmus.align.nets.universe import frank_wolfe, inner_products, merge_many, objective_of
from isthmus.align.nets.weights import weight_matching
from isthmus.base.errors import ArchitectureError, CheckpointError, DataError, NotFiniteError

Parameters = dict[str, Tensor]
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
METHODS = pytest.mark.parametrize("method", ["frank_wolfe", "merge_many"])


def parameters(model: nn.Module) -> Parameters:
    return {name: p.detach() for name, p in model.named_parameters()}


def drawn(seed: int, width: int = 3) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def arrays(state: Parameters, p: list[int], q: list[int]) -> np.ndarray:
    """One long vector of what can be permuted, in the order (p, q) of the two hidden layers."""
    w = {name: tensor.double().numpy() for name, tensor in state.items()}
    rows = [w["0.weight"][p], w["0.bias"][p], w["2.weight"][q][:, p], w["2.bias"][q], w["4.weight"][:, q]]
    return np.concatenate([row.ravel() for row in rows])


def brute_force(states: list[Parameters]) -> float:
    """Try every pair of orders for every network but the first."""
    orders = list(itertools.product(map(list, itertools.permutations(range(3))), repeat=2))
    choices = [np.stack([arrays(state, p, q) for p, q in orders]) for state in states]
    still = orders.index(([0, 1, 2], [0, 1, 2]))
    best = -np.inf
    for chosen in itertools.product(range(36), repeat=len(states) - 1):
        vectors = [choices[0][still], *(choices[k + 1][i] for k, i in enumerate(chosen))]
        best = max(best, sum(x @ y for x, y in itertools.combinations(vectors, 2)))
    return float(best)


def planted(case: Any, count: int = 3, noise: float = 0.03, seed: int = 0) -> tuple[list[nn.Module], list[Permutation]]:
    model = case.model(3)
    found = symmetry(model, case.data(), verify=False)
    drawn_ones = [found.random(torch.Generator().manual_seed(100 * seed + number)) for number in range(count)]
    generator = torch.Generator().manual_seed(seed)
    models = [permutation.apply(model) for permutation in drawn_ones]
    with torch.no_grad():
        for parameter in itertools.chain.from_iterable(model.parameters() for model in models):
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return models, drawn_ones


# Inner products


def test_inner_products_are_those_of_the_permuted_networks(case: Any) -> None:
    model = case.model(1)
    found = symmetry(model, case.data(), verify=False)
    states = [parameters(case.model(number)) for number in range(1, 4)]
    results, expected = [], []
    for seed in (0, 10):  # parts that nothing moves do not count; they are the same in both
        permutations = [found.random(torch.Generator().manual_seed(seed + number)) for number in range(3)]
        results.append(inner_products(found, states, permutations).numpy())
        moved = [
            torch.cat([p.permute(name, tensor).double().flatten() for name, tensor in state.items()]).numpy()
            for p, state in zip(permutations, states, strict=True)
        ]
        expected.append(np.array([[x @ y for y in moved] for x in moved]))
    assert np.allclose(results[0] - results[1], expected[0] - expected[1], rtol=0, atol=1e-9)
    assert not np.allclose(results[0], results[1])


@pytest.mark.parametrize("count", [2, 3])
def test_both_methods_stay_below_the_best_of_all_permutations_and_often_reach_it(count: int) -> None:
    found = symmetry(drawn(0), X)
    reached = dict.fromkeys(("frank_wolfe", "merge_many"), 0)
    for seed in range(6):
        models = [drawn(10 * seed + number) for number in range(count)]
        states = [parameters(model) for model in models]
        best = brute_force(states)
        for method in reached:
            matching = match_many(models, symmetry=found, method=method)
            vectors = [
                arrays(state, p.indices["0"].tolist(), p.indices["2"].tolist())
                for state, p in zip(states, matching.permutations, strict=True)
            ]
            products = np.array([[x @ y for y in vectors] for x in vectors])
            assert np.allclose(matching.pairwise.numpy(), products)
            assert matching.objective == pytest.approx(np.triu(products, 1).sum(), rel=1e-9)
            assert matching.objective <= best + 1e-6
            reached[method] += matching.objective > best - 1e-6
    assert min(reached.values()) >= 3


# Planted orders


@METHODS
def test_planted_orders_are_recovered_from_noisy_copies(method: str, case: Any) -> None:
    models, orders = planted(case)
    found = symmetry(models[0], case.data(), verify=False)
    matching = match_many(models, symmetry=found, method=method, verify=False)
    for i, j in itertools.product(range(3), repeat=2):
        assert matching.between(i, j) == orders[i].compose(orders[j].inverse())
    assert matching.permutations[0].is_identity
    assert torch.allclose(matching.before.diag(), matching.pairwise.diag())
    assert (matching.pairwise >= matching.before - 1e-9).all()


@METHODS
def test_networks_keep_their_function_and_lie_beside_each_other(method: str, cases: dict[str, Any]) -> None:
    case = cases["attention"]
    models, _ = planted(case)
    x = case.data()
    matching = match_many(models, x, method=method)
    aligned = matching.apply(models)
    for old, new in zip(models, aligned, strict=True):
        assert torch.allclose(old(x), new(x), atol=1e-5)
    for name, tensor in parameters(aligned[0]).items():
        assert all(torch.allclose(parameters(new)[name], tensor, atol=0.3) for new in aligned[1:])
    states = matching.apply([model.state_dict() for model in models])
    assert all(torch.equal(states[2][name], tensor) for name, tensor in aligned[2].state_dict().items())


# Cycles


@pytest.mark.parametrize("name", ["mlp", "attention", "group norm", "nested twice"])
@settings(deadline=None, max_examples=5)
@given(seed=st.integers(0, 10_000))
def test_whichever_way_round_a_cycle_one_comes_back(name: str, cases: dict[str, Any], seed: int) -> None:
    found = symmetry(cases[name].model(0), cases[name].data(), verify=False)
    generator = torch.Generator().manual_seed(seed)
    nothing = torch.zeros(4, 4)
    matching = ManyMatching(tuple(found.random(generator) for _ in range(4)), 0.0, nothing, nothing)
    assert matching.symmetry is found
    for i, j, k in itertools.product(range(4), repeat=3):
        assert matching.between(i, j).compose(matching.between(j, k)) == matching.between(i, k)
    assert all(matching.between(i, i).is_identity for i in range(4))
    assert matching.between(1, 2) == matching.between(2, 1).inverse()


# The two searches


@pytest.mark.parametrize("name", ["mlp", "residual", "grouped conv", "attention", "tied square", "nested"])
def test_histories_never_fall_and_gaps_are_not_negative(name: str, cases: dict[str, Any]) -> None:
    case = cases[name]
    found = symmetry(case.model(0), case.data(), verify=False)
    states = [parameters(case.model(number)) for number in range(1, 4)]
    climbs = [frank_wolfe(found, states, seed=2), frank_wolfe(found, states, seed=2, mixing=0.3, start=_own(found))]
    for climb in climbs:
        assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise(climb.history))
        assert climb.gap is not None
        assert climb.gap >= 0
        assert len(climb.history) == 101 or climb.gap < 0.05 * abs(climb.history[-1])
    merged = merge_many(found, states, seed=2)
    assert merged.gap is None
    assert all(later > earlier for earlier, later in itertools.pairwise(merged.history))
    assert merged.history[0] >= objective_of(inner_products(found, states, _own(found))) - 1e-9
    for result in (*climbs, merged):
        assert result.objective == objective_of(inner_products(found, states, result.permutations))
        assert result.objective >= objective_of(inner_products(found, states, _own(found)))


def _own(found: Symmetry) -> list[Permutation]:
    return [found.identity()] * 3


@pytest.mark.parametrize("mixing", [0.0, 0.5])
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_frank_wolfe_is_never_worse_than_its_start(name: str, mixing: float, cases: dict[str, Any]) -> None:
    case = cases[name]
    found = symmetry(case.model(0), case.data(), verify=False)
    states = [parameters(case.model(number)) for number in range(1, 5)]
    begun = merge_many(found, states)
    climb = frank_wolfe(found, states, start=begun.permutations, mixing=mixing)
    assert climb.objective >= begun.objective
    if mixing == 0:
        assert climb.history[0] == pytest.approx(begun.objective, rel=1e-5)
    one = frank_wolfe(found, states, start=begun.permutations, mixing=0.99, max_steps=1)
    assert len(one.history) == 2
    assert one.objective >= begun.objective


def test_the_first_history_is_that_of_the_first_network_beside_barycentres() -> None:
    states = [parameters(drawn(number)) for number in range(3)]
    centre = []
    for state in states[1:]:
        w = {name: tensor.double().numpy() for name, tensor in state.items()}
        mean = np.full((3, 3), 1 / 3)
        moved = [mean @ w["0.weight"], mean @ w["0.bias"], mean @ w["2.weight"] @ mean, mean @ w["2.bias"]]
        centre.append(np.concatenate([m.ravel() for m in (*moved, w["4.weight"] @ mean)]))
    vectors = [arrays(states[0], [0, 1, 2], [0, 1, 2]), *centre]
    expected = sum(x @ y for x, y in itertools.combinations(vectors, 2))
    assert frank_wolfe(symmetry(drawn(0), X), states).history[0] == pytest.approx(expected, rel=1e-5)


def test_merge_many_ends_where_no_network_alone_can_be_moved() -> None:
    found = symmetry(drawn(0, 6), X)
    states = [parameters(drawn(number, 6)) for number in range(4)]
    merged = merge_many(found, states)
    for network in range(4):
        moved = [p.apply(state) for p, state in zip(merged.permutations, states, strict=True)]
        others = {n: torch.stack([s[n] for i, s in enumerate(moved) if i != network]).mean(0) for n in states[0]}
        again = weight_matching(found, others, states[network], start=merged.permutations[network], restarts=1)
        assert again.objective - again.history[0][0] < 1e-5 * merged.objective
    assert merge_many(found, states, start=merged.permutations).permutations == merged.permutations
    assert len(merge_many(found, states, start=[found.identity()] * 4, max_sweeps=1).history) == 2


def test_the_same_seed_gives_the_same_result() -> None:
    found = symmetry(drawn(0, 6), X)
    models = [drawn(number, 6) for number in range(4)]
    state = torch.get_rng_state()
    for method in ("frank_wolfe", "merge_many"):
        runs = [match_many(models, symmetry=found, method=method, seed=seed) for seed in (1, 1, 2)]
        assert runs[0].permutations == runs[1].permutations
        assert (runs[0].history, runs[0].gap) == (runs[1].history, runs[1].gap)
        assert runs[0].history != runs[2].history
        assert runs[0].seed == 1
    assert torch.equal(torch.get_rng_state(), state)


# What is told


def test_the_best_stage_is_kept_and_the_reference_keeps_its_order() -> None:
    found = symmetry(drawn(0, 6), X)
    models = [drawn(number, 6) for number in range(4)]
    free = match_many(models, symmetry=found, reference=None)
    assert len(free.history) == 3
    assert len(match_many(models, symmetry=found, restarts=1).history) == 2
    assert free.objective == pytest.approx(free.history[-1][-1])
    for reference in range(4):
        held = match_many(models, symmetry=found, reference=reference)
        assert held.permutations[reference].is_identity
        assert held.reference == reference
        assert held.objective == free.objective
        assert torch.allclose(held.pairwise, free.pairwise)
        assert held.between(1, 3) == free.between(1, 3)
    assert len(free) == 4
    assert free.method == "frank_wolfe"
    assert free.gap is not None


def test_a_start_is_taken() -> None:
    found = symmetry(drawn(0, 6), X)
    models = [drawn(number, 6) for number in range(4)]
    start = [found.random(torch.Generator().manual_seed(number)) for number in range(4)]
    begun = objective_of(inner_products(found, [parameters(model) for model in models], start))
    merged = match_many(models, symmetry=found, method="merge_many", start=start)
    assert merged.history[0][0] == pytest.approx(begun)
    assert merged.objective > begun
    assert match_many(models, symmetry=found, start=start).objective > begun


def test_models_are_left_alone_and_half_precision_is_matched(cases: dict[str, Any]) -> None:
    models, orders = planted(cases["mlp"], noise=0.0)
    copies = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in models]
    found = symmetry(models[0], cases["mlp"].data())
    low = [model.to(torch.bfloat16) for model in models]
    for method in ("frank_wolfe", "merge_many"):
        matching = match_many(low, symmetry=found, method=method, device="cpu")
        assert matching.between(1, 2) == orders[1].compose(orders[2].inverse())
    for model, copy in zip(low, copies, strict=True):
        assert all(torch.equal(model.state_dict()[n], tensor.to(torch.bfloat16)) for n, tensor in copy.items())


def test_networks_without_groups_stay_as_they_are() -> None:
    models = [nn.Linear(3, 2) for _ in range(3)]
    for method in ("frank_wolfe", "merge_many"):
        matching = match_many(models, X, method=method)
        assert all(permutation.is_identity for permutation in matching.permutations)
        assert matching.objective == 0


def test_progress_is_silent_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    match_many([drawn(number) for number in range(3)], X)
    assert capsys.readouterr() == ("", "")
    match_many([drawn(number) for number in range(3)], X, progress=True)
    shown = capsys.readouterr().err
    assert "Frank-Wolfe" in shown
    assert "matching many" in shown


# Files


@METHODS
def test_a_saved_matching_is_the_same_when_it_is_read(method: str, cases: dict[str, Any], tmp_path: Path) -> None:
    case = cases["attention"]
    models, _ = planted(case)
    matching = match_many(models, case.data(), method=method, reference=1, seed=3)
    again = ManyMatching.load(matching.save(tmp_path / "many.safetensors"))
    assert again.permutations == matching.permutations
    assert torch.equal(again.pairwise, matching.pairwise)
    assert torch.equal(again.before, matching.before)
    for name in ("objective", "history", "method", "seed", "gap", "reference"):
        assert getattr(again, name) == getattr(matching, name)
    assert again.between(0, 2) == matching.between(0, 2)


def test_other_files_are_refused(tmp_path: Path) -> None:
    matching = match_many([drawn(number) for number in range(3)], X)
    with pytest.raises(CheckpointError, match=r"end the name in \.safetensors"):
        matching.save(tmp_path / "many.pt")
    path = matching.save(tmp_path / "many.safetensors")
    single = matching.permutations[0].save(tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match="not a file of the form"):
        ManyMatching.load(single)
    with pytest.raises(CheckpointError, match="cannot be read"):
        ManyMatching.load(tmp_path / "none.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        ManyMatching.load(path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = match_many([drawn(number) for number in range(3)], X).save(tmp_path / "many.safetensors")
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != "index 1:0"}  # noqa: SIM118
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"many\.safetensors is damaged .*group 0"):
        ManyMatching.load(path)


# What it refuses


def test_wrong_calls_are_refused() -> None:
    models = [drawn(number) for number in range(3)]
    found = symmetry(models[0], X)
    with pytest.raises(DataError, match=r"unknown method 'frank_wolff' .*did you mean frank_wolfe"):
        match_many(models, X, method="frank_wolff")
    for few in ([], models[:1]):
        with pytest.raises(DataError, match="at least two"):
            match_many(few, X)
        with pytest.raises(DataError, match="at least two"):
            merge_many(found, [parameters(model) for model in few])
        with pytest.raises(DataError, match="at least two"):
            frank_wolfe(found, [parameters(model) for model in few])
    with pytest.raises(DataError, match="start holds 2 permutations for 3 networks"):
        match_many(models, X, start=[found.identity()] * 2)
    with pytest.raises(ArchitectureError, match="another symmetry"):
        match_many(models, X, start=[symmetry(drawn(0, 4), X).identity()] * 3)
    with pytest.raises(DataError, match="reference is 3; expected 0 … 2"):
        match_many(models, X, reference=3)
    with pytest.raises(DataError, match="restarts must be at least 1"):
        match_many(models, X, restarts=0)
    with pytest.raises(DataError, match="max_steps must be at least 1"):
        merge_many(found, [parameters(model) for model in models], max_sweeps=0)
    with pytest.raises(DataError, match="needs inputs"):
        match_many(models)
    with pytest.raises(DataError, match="2 networks for a matching of 3"):
        match_many(models, X).apply(models[:2])


def test_networks_that_differ_or_are_not_finite_are_refused(cases: dict[str, Any]) -> None:
    models = [drawn(number) for number in range(3)]
    with pytest.raises(
        ArchitectureError, match=r"network 0 and network 2 .*0\.weight: \(3, 3\) in network 0, \(4, 3\)"
    ):
        match_many([models[0], models[1], drawn(2, 4)], X)
    tied, free = cases["tied square"].model(1), cases["tied square"].model(2)
    free.second.weight = nn.Parameter(free.second.weight.detach().clone())
    with pytest.raises(ArchitectureError, match="tied to"):
        match_many([tied, free], cases["tied square"].data())
    with torch.no_grad():
        models[1].get_parameter("2.weight")[0, 1] = float("inf")
    with pytest.raises(NotFiniteError, match=r"network 1: 2\.weight of shape \(3, 3\) holds 1 entries"):
        match_many(models, X)
    norms = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval() for _ in range(2)]
    norms[1].get_buffer("1.running_var")[2] = float("nan")
    with pytest.raises(NotFiniteError, match=r"network 1: 1\.running_var"):
        match_many(norms, X)

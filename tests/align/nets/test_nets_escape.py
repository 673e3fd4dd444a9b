"""Starts and escapes of weight matching: planted orders under noise, soft permutations, the bound."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from isthmus import symmetry, zoo
from isthmus.align import Permutation, Symmetry
from isthmus.align.nets import bound
from isthmus.align.nets.annealing import Annealing, balance, temperatures
from isthmus.align.nets.bound import assignment_bound, upper_bound
from isthmus.align.nets.propagation import propagate, spread_weights
from isthmus.align.nets.search import Problem, Search
from isthmus.align.nets.weights import weight_matching

Parameters = dict[str, Tensor]
TOKENS = torch.zeros(1, 8, dtype=torch.long)


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def residual(width: int, hidden: int, blocks: int) -> nn.Module:
    return nn.Sequential(nn.Linear(32, width), *(Block(width, hidden) for _ in range(blocks)), nn.Linear(width, 10))


def plain(width: int, layers: int) -> nn.Module:
    hidden = [m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(32, width), nn.ReLU(), *hidden, nn.Linear(width, 10))


def llama() -> nn.Module:
    return zoo.transformer(
        17, 32, 2, 4, kv_heads=2, context=8, norm="rms", position="rotary", mlp="swiglu", bias=False, seed=0
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "plain, 1": (lambda: plain(64, 1), torch.zeros(1, 32)),
    "plain, 6": (lambda: plain(64, 6), torch.zeros(1, 32)),
    "residual, small": (lambda: residual(16, 64, 1), torch.zeros(1, 32)),
    "residual, middle": (lambda: residual(64, 256, 4), torch.zeros(1, 32)),
    "gpt": (lambda: zoo.transformer(17, 32, 2, 4, context=8, seed=0), TOKENS),
    "gpt, tied": (lambda: zoo.transformer(17, 32, 2, 4, context=8, tied=True, seed=0), TOKENS),
    "llama, grouped queries": (llama, TOKENS),
    "lstm": (lambda: Last(nn.LSTM(12, 24, 2, batch_first=True)), torch.zeros(1, 5, 12)),
}


class Last(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def planted(name: str, seed: int, noise: float) -> tuple[Symmetry, Parameters, Parameters, Permutation]:
    """Gaussian weights; the second network is the first, permuted, with noise as large as `noise` times the weights."""
    make, x = NETWORKS[name]
    generator = torch.Generator().manual_seed(seed)
    net = make()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    found = symmetry(net, x, verify=False)
    drawn = found.random(generator)
    a = {key: p.detach() for key, p in net.named_parameters()}
    b = {key: p.detach() for key, p in drawn.apply(net).named_parameters()}
    b = {key: p + noise * torch.randn(p.shape, generator=generator) for key, p in b.items()}
    return found, a, b, drawn.inverse()


def value(a: Parameters, b: Parameters, permutation: Permutation) -> float:
    """<A, p(B)> in numpy, over parameters that can be permuted."""
    keys = {key for group in permutation.symmetry.groups for key, _ in group.axes} & a.keys()
    return sum(float((a[k].double().numpy() * permutation.permute(k, b[k]).double().numpy()).sum()) for k in keys)


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_planted_order_is_recovered_under_noise_as_large_as_the_weights(name: str, noise: float) -> None:
    for seed in range(3):
        found, a, b, truth = planted(name, seed, noise)
        result = weight_matching(found, a, b, seed=seed)
        assert result.permutation == truth
        assert result.objective == pytest.approx(value(a, b, truth), rel=1e-9)
        assert result.bound is not None
        assert result.objective <= result.bound * (1 + 1e-9)
        if not noise:
            assert len(result.history) == 1  # every unit and its match are each other's best: no further restart


def test_propagation_alone_finds_it_from_the_ends() -> None:
    found, a, b, truth = planted("residual, middle", 0, 0.5)
    search = Search(Problem.between(found, a, b), found.identity())
    propagate(search)
    assert search.permutation == truth


def test_propagation_goes_on_from_groups_that_do_not_move() -> None:
    found, a, b, truth = planted("plain, 6", 0, 0.0)
    names = [group.name for group in found.groups]
    held = Permutation(found, {**found.identity().indices, names[3]: truth.indices[names[3]]})
    search = Search(Problem.between(found, a, b, [name for name in names if name != names[3]]), held)
    propagate(search)
    assert search.permutation == truth


def test_weights_of_pieces_make_up_for_the_size_of_layers() -> None:
    found, a, b, _ = planted("plain, 1", 0, 0.0)
    problem = Problem.between(found, a, b)
    before = spread_weights(problem)
    small = {key: tensor / 10 if key == "2.weight" else tensor for key, tensor in a.items()}
    after = spread_weights(Problem.between(found, small, b))
    for one, other in zip(before.items(), after.items(), strict=True):
        assert other[1] == pytest.approx(one[1] * (10 if one[0].name == "2.weight" else 1), rel=1e-6)
    constant = {key: torch.ones_like(tensor) for key, tensor in a.items()}
    assert set(spread_weights(Problem.between(found, constant, b)).values()) == {0.0}


def test_a_network_without_fixed_ends_starts_from_what_stands_out_most() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(9, 12, bias=False), nn.Linear(12, 7, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x.sum(1, keepdim=True).expand(-1, 9)).relu()).sum(1)

    torch.manual_seed(0)
    net, x = Square(), torch.randn(3, 9)
    found = symmetry(net, x, verify=False)
    assert len(found.groups) == 3
    assert not found.pinned
    drawn = found.random(torch.Generator().manual_seed(0))
    a = {key: p.detach() for key, p in net.named_parameters()}
    result = weight_matching(found, a, drawn.apply(a))
    assert result.permutation == drawn.inverse()


# Annealing


def pair(seed: int, width: int = 24) -> tuple[Symmetry, Parameters, Parameters]:
    nets = [zoo.mlp(20, (width,) * 4, 5, seed=seed + k) for k in (0, 100)]
    a, b = ({k: p.detach() for k, p in n.named_parameters()} for n in nets)
    return symmetry(nets[0], torch.zeros(1, 20)), a, b


def test_annealing_finds_what_descent_from_the_ends_does_not() -> None:
    better = 0
    for seed in range(6):
        found, a, b = pair(seed)
        one, two = (weight_matching(found, a, b, restarts=restarts, seed=seed) for restarts in (1, 2))
        assert two.objective >= one.objective
        better += two.objective > one.objective * 1.01
    assert better >= 5


def test_soft_permutations_stay_doubly_stochastic_and_harden() -> None:
    found, a, b = pair(0)
    search = Search(Problem.between(found, a, b), found.identity())
    annealing = Annealing(search)
    generator = torch.Generator().manual_seed(0)
    assert all(torch.allclose(m, torch.full_like(m, 1 / m.shape[-1])) for m in annealing.matrices.values())
    annealing.run(generator, 10, 1.0, 0.02)
    for matrix in annealing.matrices.values():
        torch.testing.assert_close(matrix.sum(-1), torch.ones(len(matrix)))
        assert float((matrix.sum(-2) - 1).abs().mean()) < 0.2
        assert float(matrix.max(-1).values.mean()) > 0.7
    annealing.harden()
    assert search.objective > 0
    assert set(search.permutation.indices) == {group.name for group in found.groups}


def test_annealing_from_a_start_stays_near_it() -> None:
    found, a, b, truth = planted("residual, middle", 0, 0.0)
    start = Permutation(found, {name: order.clone() for name, order in truth.indices.items()})
    first = found.groups[0].name
    swapped = start.indices[first].clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    wrong = Permutation(found, {**start.indices, first: swapped})
    result = weight_matching(found, a, b, start=wrong, restarts=2)
    assert result.permutation == truth
    assert result.history[0][0] == pytest.approx(value(a, b, wrong), rel=1e-9)


def test_only_the_groups_that_are_named_move() -> None:
    found, a, b = pair(0)
    name = found.groups[1].name
    start = found.random(torch.Generator().manual_seed(0))
    result = weight_matching(found, a, b, only=[name], start=start, restarts=3)
    for group in found.groups:
        if group.name != name:
            assert torch.equal(result.permutation.indices[group.name], start.indices[group.name])
    # one group alone is an assignment, which is solved exactly
    assert result.history[0][-1] == pytest.approx(result.history[1][-1], rel=1e-12)


def test_temperatures_fall_by_one_factor() -> None:
    np.testing.assert_allclose(list(temperatures(3, 1.0, 0.01)), [1.0, 0.1, 0.01])
    assert list(temperatures(1, 1.0, 0.01)) == [1.0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 6))
def test_a_cold_balance_is_the_assignment(seed: int, size: int) -> None:
    similarity = torch.rand(2, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix, potential = balance(similarity, 1.0)
    for heat in (0.3, 0.1, 0.03, 0.01, 0.003, 0.001):
        matrix, potential = balance(similarity, heat, potential, rounds=300)
    for one, soft in zip(similarity, matrix, strict=True):
        rows, columns = linear_sum_assignment(one.numpy(), maximize=True)
        assert float((one * soft).sum()) == pytest.approx(one.numpy()[rows, columns].sum(), abs=0.02)


def test_a_group_without_any_similarity_stays_undecided() -> None:
    found, a, _ = pair(0)
    nothing = {key: torch.zeros_like(tensor) for key, tensor in a.items()}
    result = weight_matching(found, a, nothing)
    assert result.objective == 0
    assert result.bound == 0


# The bound


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 6))
def test_the_bound_of_an_assignment_is_one(seed: int, size: int) -> None:
    similarity = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows, columns = linear_sum_assignment(similarity.numpy(), maximize=True)
    best = similarity.numpy()[rows, columns].sum()
    assert best - 1e-9 <= assignment_bound(similarity) <= similarity.max(1).values.sum() + 1e-9


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_no_permutation_is_above_the_bound(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    nets = [nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2)]
    a, b = (
        {key: torch.randn(p.shape, generator=generator, dtype=torch.float64) for key, p in net.named_parameters()}
        for net in nets
    )
    found = symmetry(nets[0], torch.zeros(1, 2))
    first, second = (group.name for group in sorted(found.groups, key=lambda group: group.size))
    best = max(
        value(a, b, Permutation(found, {first: torch.tensor(p), second: torch.tensor(q)}))
        for p in itertools.permutations(range(3))
        for q in itertools.permutations(range(4))
    )
    assert upper_bound(Problem.between(found, a, b), best) >= best - 1e-9


@pytest.mark.parametrize("name", ["plain, 1", "residual, small", "llama, grouped queries"])
def test_the_bound_is_reached_by_a_permuted_copy(name: str) -> None:
    found, a, b, truth = planted(name, 0, 0.0)
    result = weight_matching(found, a, b)
    assert result.permutation == truth
    assert result.bound == pytest.approx(result.objective, rel=1e-6)


def test_large_networks_have_the_simpler_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    found, a, b = pair(0)
    problem = Problem.between(found, a, b)
    sharp = upper_bound(problem, 0.0)
    monkeypatch.setattr(bound, "_MOST", 10)
    norms = [float(a[name].double().norm() * b[name].double().norm()) for name in {p.name for p in problem.pairs}]
    assert upper_bound(problem, 0.0) == pytest.approx(sum(norms), rel=1e-9)
    assert sharp < sum(norms)

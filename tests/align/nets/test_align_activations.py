"""Activation matching: planted permutations, and correlations computed apart."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from isthmus.align import match, symmetry
from isthmus.align.nets.activations import SIMILARITIES, activation_matching
from isthmus.base.batches import Batch
from isthmus.base.errors import DataError, NotFiniteError


def batches_of(case: Any, count: int = 6) -> list[Tensor]:
    return [case.data(seed) for seed in range(count)]


@pytest.mark.parametrize(
    "name",
    [
        *("mlp", "dropout and softmax", "layer norm", "conv and batch norm", "flatten", "group norm", "grouped conv"),
        *("depthwise", "residual", "residual conv", "dense", "glu", "embedding", "tied embedding", "tied square"),
        *("transposed grouped conv", "attention", "nested"),
    ],
)
def test_a_planted_permutation_is_found_by_activations(name: str, cases: dict[str, Any]) -> None:
    case = cases[name]
    model = case.model(3)
    found = symmetry(model, case.data(), verify=False)
    for seed in range(2):
        planted = found.random(torch.Generator().manual_seed(seed))
        assert not planted.is_identity
        matching = match(model, planted.apply(model), batches_of(case), method="activations", symmetry=found)
        assert matching.permutation == planted.inverse()
        assert matching.by_weights == ()
        assert matching.scores.keys() == case.groups.keys()


def test_dead_units_are_told_apart_by_their_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.get_parameter("0.bias")[3:9] = -100.0  # units that never fire
        model.get_parameter("2.bias")[[0, 5, 7]] = -1000.0
    data = [torch.randn(32, 5, generator=generator) for _ in range(4)]
    assert not model[1](model[0](data[0]))[:, 3:9].any()
    found = symmetry(model, data[0], verify=False)
    for seed in range(4):
        planted = found.random(torch.Generator().manual_seed(seed))
        matching = match(model, planted.apply(model), data, method="activations", symmetry=found)
        assert matching.permutation == planted.inverse()
        # a unit that never fires correlates with nothing; the others with their match entirely
        dead = torch.zeros(16, dtype=torch.bool)
        dead[3:9] = True
        assert matching.scores["0"][dead].abs().max() < 1e-9
        assert torch.allclose(matching.scores["0"][~dead], torch.ones(10, dtype=torch.float64), atol=1e-5)


def correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    size = x.shape[1]
    return np.corrcoef(x.T, y.T)[:size, size:]


def best_matching(similarity: np.ndarray) -> float:
    size = len(similarity)
    return max(similarity[range(size), list(p)].sum() for p in itertools.permutations(range(size)))


def test_scores_are_the_correlations_over_all_batches() -> None:
    make = lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))  # noqa: E731
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, b = make(), make()
    generator = torch.Generator().manual_seed(1)
    data = [3 + torch.randn(size, 5, generator=generator) for size in (40, 7, 1, 25)]
    matching = match(a, b, data, method="activations")
    with torch.no_grad():
        x, y = (torch.cat([m[1](m[0](batch)) for batch in data]).double().numpy() for m in (a, b))
    similarity = correlations(x, y)
    chosen = similarity[range(6), matching.permutation.indices["0"].numpy()]
    assert matching.scores["0"].numpy() == pytest.approx(chosen, abs=1e-5)
    assert matching.objective == pytest.approx(chosen.sum(), abs=1e-5)
    assert chosen.sum() == pytest.approx(best_matching(similarity), abs=1e-5)
    assert matching.history == ((matching.objective,),)


def test_positions_of_a_feature_map_are_samples() -> None:
    make = lambda: nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Conv2d(5, 3, 1))  # noqa: E731
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, b = make(), make()
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn(size, 2, 6, 7, generator=generator) for size in (5, 3)]
    found = symmetry(a, data[0])
    result = activation_matching(found, a, b, [Batch((batch,)) for batch in data])
    assert result.samples == (5 + 3) * 4 * 5
    with torch.no_grad():
        x, y = (
            torch.cat([m[1](m[0](batch)).movedim(1, -1).reshape(-1, 5) for batch in data]).double().numpy()
            for m in (a, b)
        )
    similarity = correlations(x, y)
    chosen = similarity[range(5), result.permutation.indices["0"].numpy()]
    assert result.scores["0"].numpy() == pytest.approx(chosen, abs=1e-5)
    assert chosen.sum() == pytest.approx(best_matching(similarity), abs=1e-5)
    assert result.unseen == ()


def test_correlations_along_a_stream_are_added(cases: dict[str, Any]) -> None:
    """The stream of `residual` is seen as it enters both blocks and the head; the score is the mean of the three."""
    case = cases["residual"]
    a, b = case.model(1), case.model(2)
    data = batches_of(case, 4)
    matching = match(a, b, data, method="activations")
    seen: dict[str, list[Tensor]] = {}

    def watch(model: Any, label: str) -> list[Any]:
        modules = {"up.0": model.up[0], "up.1": model.up[1], "head": model.head}
        return [
            module.register_forward_pre_hook(
                lambda _, args, key=f"{label}{name}": seen.setdefault(key, []).append(args[0].double())
            )
            for name, module in modules.items()
        ]

    handles = [*watch(a, "a"), *watch(b, "b")]
    with torch.no_grad():
        for batch in data:
            a(batch)
            b(batch)
    for handle in handles:
        handle.remove()
    total = sum(
        correlations(*(torch.cat(seen[label + name]).numpy() for label in "ab")) for name in ("up.0", "up.1", "head")
    )
    chosen = np.asarray(total)[range(10), matching.permutation.indices["stem"].numpy()]
    assert matching.scores["stem"].numpy() == pytest.approx(chosen / 3, abs=1e-5)


def test_a_one_shot_iterator_is_enough(cases: dict[str, Any]) -> None:
    case = cases["mlp"]
    a, b = case.model(1), case.model(2)
    data = batches_of(case)
    once = match(a, b, iter(data), method="activations")
    many = match(a, b, data, method="activations")
    assert once.permutation == many.permutation
    assert all(torch.equal(once.scores[name], many.scores[name]) for name in many.scores)
    # the first batch, from which the symmetry is derived, counts like any other
    assert match(a, b, iter(data[1:]), method="activations").objective != once.objective


def test_the_data_are_read_in_one_pass(cases: dict[str, Any]) -> None:
    case = cases["mlp"]
    model = case.model(1)
    read = []

    def stream() -> Any:
        for number, batch in enumerate(batches_of(case, 3)):
            read.append(number)
            yield batch

    match(model, model, stream(), method="activations", symmetry=symmetry(model, case.data()))
    assert read == [0, 1, 2]


def test_groups_without_an_activation_are_matched_by_weights(cases: dict[str, Any]) -> None:
    case = cases["raw parameters"]
    model = case.model(1)
    found = symmetry(model, case.data())
    planted = found.random(torch.Generator().manual_seed(3))
    matching = match(model, planted.apply(model), batches_of(case), method="activations", symmetry=found)
    assert matching.by_weights == ("w1",)
    assert matching.permutation == planted.inverse()
    assert torch.allclose(matching.scores["w1"], torch.ones(9, dtype=torch.float64), atol=1e-6)


class Partly(nn.Module):
    """One hidden layer in a module, one of raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 9)
        self.raw = nn.ParameterList([nn.Parameter(torch.zeros(7, 9)), nn.Parameter(torch.zeros(3, 7))])
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x).tanh() @ self.raw[0].T).tanh() @ self.raw[1].T


def test_groups_seen_and_unseen_are_matched_together() -> None:
    model = Partly()
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    found = symmetry(model, x)
    planted = found.random(torch.Generator().manual_seed(3))
    matching = match(model, planted.apply(model), x, method="activations", symmetry=found)
    assert matching.by_weights == ("raw",)
    assert matching.permutation == planted.inverse()
    assert {name: tuple(score.shape) for name, score in matching.scores.items()} == {"first": (9,), "raw": (7,)}


def test_the_same_run_gives_the_same_result(cases: dict[str, Any]) -> None:
    case = cases["group norm"]
    a, b = case.model(1), case.model(2)
    runs = [match(a, b, batches_of(case), method="activations", seed=1) for _ in range(2)]
    assert runs[0].permutation == runs[1].permutation
    assert runs[0].objective == runs[1].objective
    assert all(torch.equal(runs[0].scores[name], runs[1].scores[name]) for name in runs[0].scores)


@pytest.mark.parametrize(("name", "outer"), [("group norm", "0"), ("residual group norm", "stem")])
def test_inner_scores_are_means_over_the_places_where_units_are_seen(
    name: str, outer: str, cases: dict[str, Any]
) -> None:
    case = cases[name]
    matching = match(case.model(1), case.model(1), batches_of(case), method="activations")
    assert matching.permutation.is_identity
    assert matching.scores[outer].shape == (4,)
    assert matching.scores[f"{outer}:2"].shape == (12,)
    assert all(torch.allclose(s, torch.ones_like(s), atol=1e-5) for s in matching.scores.values())


def two_nets(width: int = 9, seed: int = 0) -> tuple[nn.Sequential, nn.Sequential]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        a, b = (nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3)) for _ in range(2))
    return a, b


def similarity_by_hand(kind: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if kind == "correlation":
        with np.errstate(invalid="ignore"):
            return np.nan_to_num(correlations(x, y))
    size = x.shape[1]
    return np.cov(x.T, y.T, bias=True)[:size, size:] if kind == "covariance" else x.T @ y / len(x)


@pytest.mark.parametrize("kind", SIMILARITIES)
@pytest.mark.parametrize("seed", range(3))
def test_each_similarity_is_assigned_exactly(kind: str, seed: int) -> None:
    a, b = two_nets(seed=seed)
    data = (4 * torch.rand(60, 5, generator=torch.Generator().manual_seed(seed))).split([50, 10])
    result = activation_matching(symmetry(a, data[0]), a, b, [Batch((x,)) for x in data], similarity=kind)
    with torch.no_grad():
        x, y = (torch.cat([m[1](m[0](batch)) for batch in data]).double().numpy() for m in (a, b))
    similarity = similarity_by_hand(kind, x, y)
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    assert result.objective == pytest.approx(similarity[rows, columns].sum(), rel=1e-5)
    found = result.permutation.indices["0"].numpy()
    assert similarity[rows, found].sum() == pytest.approx(similarity[rows, columns].sum(), rel=1e-5)
    # the scores are correlations, whatever was assigned
    assert result.scores["0"].numpy() == pytest.approx(similarity_by_hand("correlation", x, y)[rows, found], abs=1e-5)


def test_the_product_is_the_nearest_in_squares() -> None:
    a, b = two_nets(width=6, seed=5)
    data = torch.rand(40, 5, generator=torch.Generator().manual_seed(5))
    found = activation_matching(symmetry(a, data), a, b, [Batch((data,))], similarity="product").permutation
    with torch.no_grad():
        x, y = (m[1](m[0](data)).double() for m in (a, b))
    least = min(float((x - y[:, list(p)]).square().sum()) for p in itertools.permutations(range(6)))
    assert float((x - y[:, found.indices["0"]]).square().sum()) == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("kind", ["covariance", "product"])
def test_silent_units_are_told_apart_under_every_similarity(kind: str) -> None:
    model, _ = two_nets(width=12, seed=1)
    with torch.no_grad():
        model.get_parameter("0.bias")[2:7] = -100.0
    data = 1000 * torch.randn(50, 5, generator=torch.Generator().manual_seed(0)).clamp(-0.001, 0.001)
    found = symmetry(model, data)
    planted = found.random(torch.Generator().manual_seed(2))
    result = activation_matching(found, model, planted.apply(model), [Batch((data,))], similarity=kind)
    assert result.permutation == planted.inverse()


@settings(deadline=None, max_examples=8)
@given(width=st.integers(2, 14), seed=st.integers(0, 1000), kind=st.sampled_from(SIMILARITIES))
def test_the_order_in_which_the_second_network_comes_does_not_matter(width: int, seed: int, kind: str) -> None:
    a, b = two_nets(width, seed)
    data = [Batch((torch.randn(40, 5, generator=torch.Generator().manual_seed(seed)),))]
    found = symmetry(a, data[0], verify=False)
    drawn = found.random(torch.Generator().manual_seed(seed))
    plain = activation_matching(found, a, b, data, similarity=kind)
    moved = activation_matching(found, a, drawn.apply(b), data, similarity=kind)
    assert moved.objective == pytest.approx(plain.objective, rel=1e-5)
    assert torch.allclose(moved.scores["0"].sort().values, plain.scores["0"].sort().values, atol=1e-4)


def test_wrong_input_is_refused() -> None:
    a, b = two_nets()
    data = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    found = symmetry(a, data)
    with pytest.raises(DataError, match=r"unknown similarity 'covarience'.*did you mean covariance"):
        activation_matching(found, a, b, [Batch((data,))], similarity="covarience")
    with torch.no_grad():
        b.get_parameter("0.weight")[0, 0] = torch.inf
    with pytest.raises(NotFiniteError, match="b:0 at input of 2"):
        activation_matching(found, a, b, [Batch((data,))])


def test_nothing_is_left_behind(cases: dict[str, Any]) -> None:
    model = cases["conv and batch norm"].model(1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = batches_of(cases["conv and batch norm"], 2)
    activation_matching(symmetry(model, data[0]), model, model, [Batch((x,)) for x in data])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

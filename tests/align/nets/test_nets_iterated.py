"""Iterated activation matching: against the published pieces computed by hand, and planted permutations."""

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

from isthmus.align import symmetry
from isthmus.align.nets.iterated import iterated_activation_matching
from isthmus.align.nets.midpoint import midpoint_loss
from isthmus.align.nets.signals import record
from isthmus.align.nets.views import views
from isthmus.base.batches import Batch
from isthmus.base.errors import DataError, NotFiniteError


def mlp(seed: int, widths: tuple[int, ...] = (5, 9, 8, 7, 4), inplace: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU(inplace=inplace)]
    return nn.Sequential(*layers[:-1])


def inputs(*sizes: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 5, generator=generator) for size in sizes]


def labelled(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.arange(len(x)) % 4) for x in inputs(*sizes)]


def projections(sizes: list[int], classes: int, seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    drawn = np.concatenate([torch.randn(n, classes, generator=generator).double().numpy() for n in sizes])
    return drawn - drawn.mean(1, keepdims=True)


def signals_by_hand(model: nn.Sequential, x: np.ndarray, r: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Activations of the hidden layers, and the gradients of the projection r of the outputs, by the chain rule."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    weights = [m.weight.detach().double().numpy() for m in layers]
    biases = [m.bias.detach().double().numpy() for m in layers]
    hidden: list[np.ndarray] = []
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        x = np.maximum(x @ weight.T + bias, 0)
        hidden.append(x)
    gradients = [r @ weights[-1]]
    for at in range(len(weights) - 2, 0, -1):
        gradients.insert(0, (gradients[0] * (hidden[at] > 0)) @ weights[at])
    return hidden, gradients


def correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.corrcoef(x.T, y.T)[: x.shape[1], x.shape[1] :])


def rounds_by_hand(a: nn.Sequential, b: nn.Sequential, data: list[Tensor], count: int) -> list[list[np.ndarray]]:
    x = torch.cat(data).double().numpy()
    r = projections([len(batch) for batch in data], 4, seed=0)
    (ha, ga), (hb, gb) = (signals_by_hand(model, x, r) for model in (a, b))
    told = [
        correlations(p, q) + correlations(s, t) for p, q, s, t in zip(ha, hb, ga, gb, strict=True)
    ]  # one view of each layer
    (wa, ca), (wb, cb) = (
        (
            [m.weight.detach().double().numpy() for m in model if isinstance(m, nn.Linear)],
            [m.bias.detach().double().numpy() for m in model if isinstance(m, nn.Linear)],
        )
        for model in (a, b)
    )
    orders = [linear_sum_assignment(matrix, maximize=True)[1] for matrix in told]
    found = [list(orders)]
    for _ in range(count):
        for at in range(len(told)):
            into = wb[at] if at == 0 else wb[at][:, orders[at - 1]]
            out = wb[at + 1] if at + 1 == len(told) else wb[at + 1][orders[at + 1]]
            mine = np.concatenate([wa[at], ca[at][:, None], wa[at + 1].T], 1)
            other = np.concatenate([into, cb[at][:, None], out.T], 1)
            cosine = mine @ other.T / np.linalg.norm(mine, axis=1)[:, None] / np.linalg.norm(other, axis=1)
            orders[at] = linear_sum_assignment(told[at] + cosine, maximize=True)[1]
        found.append(list(orders))
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_start_and_rounds_are_those_computed_by_hand(seed: int, rounds: int) -> None:
    a, b, data = mlp(seed), mlp(seed + 10), inputs(60, 25, seed=seed)
    found = iterated_activation_matching(symmetry(a, data[0]), a, b, data, rounds=rounds, choose="objective")
    by_hand = rounds_by_hand(a, b, data, rounds)
    assert len(found.objectives) <= rounds + 1
    for name, order in zip(("0", "2", "4"), by_hand[found.chosen], strict=True):
        assert np.array_equal(found.permutation.indices[name].numpy(), order)
    assert found.objective == max(found.objectives) == found.objectives[found.chosen]
    hidden = [signals_by_hand(m, torch.cat(data).double().numpy(), np.zeros((85, 4)))[0] for m in (a, b)]
    for name, x, y in zip(("0", "2", "4"), *hidden, strict=True):
        chosen = correlations(x, y)[range(x.shape[1]), found.permutation.indices[name].numpy()]
        assert found.scores[name].numpy() == pytest.approx(chosen, abs=1e-5)
    assert found.samples == 85
    assert found.unseen == ()


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_are_those_of_the_chain_rule(inplace: bool) -> None:
    a, b, data = mlp(0, inplace=inplace), mlp(1, inplace=inplace), inputs(40, 9)
    for parameter in b.parameters():
        parameter.requires_grad_(False)  # a frozen network is matched like any other
    found = symmetry(a, data[0])
    looks = [view for each in views(found).values() for view in each]
    batches = [Batch((x,)) for x in data]
    with torch.no_grad():  # what surrounds the call does not matter
        signals = record(looks, a, b, batches, backward=True, seed=3, product_dtype=torch.float64)
    assert signals.backward is not None
    x, r = torch.cat(data).double().numpy(), projections([40, 9], 4, seed=3)
    for view, (at, p), q in zip(
        looks, enumerate(signals_by_hand(a, x, r)[1]), signals_by_hand(b, x, r)[1], strict=True
    ):
        assert view.key.startswith(f"{2 * at} at input of {2 * at + 2}")
        measured = signals.backward.covariance(f"a:{view.key}", f"b:{view.key}").numpy()
        size = p.shape[1]
        assert measured == pytest.approx(np.cov(p.T, q.T, bias=True)[:size, size:], abs=1e-6)
    assert all(p.grad is None for model in (a, b) for p in model.parameters())
    assert not any(p.requires_grad for p in b.parameters())
    assert all(p.requires_grad for p in a.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in a.modules())


class Twice(nn.Module):
    """One layer called twice, then a stream that is read and written."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.stem, self.again, self.up, self.head = (
            nn.Linear(5, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
            nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        x = self.again(self.again(x).tanh()).tanh()
        if self.inplace:
            x += self.up(x).relu()
            return self.head(x)
        return self.head(x + self.up(x).relu())


def test_gradients_of_each_call_and_along_a_stream() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Twice()
    (x,) = inputs(30)
    found = symmetry(model, x)
    looks = [view for each in views(found).values() for view in each]
    assert {view.layer for view in looks} == {"again", "again#2", "up", "head"}
    signals = record(looks, model, model, [Batch((x,))], backward=True, product_dtype=torch.float64)
    assert signals.backward is not None
    first = model.stem(x).tanh()
    second = model.again(first).tanh()
    third = model.again(second).tanh()
    last = third + model.up(third).relu()
    places: dict[str, Tensor] = dict(zip(("again", "again#2", "up", "head"), (first, second, third, last), strict=True))
    total = (model.head(last) * torch.from_numpy(projections([30], 4, seed=0)).float()).sum()
    gradients = dict(zip(places, torch.autograd.grad(total, list(places.values())), strict=True))
    for view in looks:
        variance = signals.backward.variance(f"a:{view.key}").numpy()
        assert variance == pytest.approx(gradients[view.layer].double().var(0, correction=0).numpy(), rel=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        *("mlp", "layer norm", "conv and batch norm", "flatten", "group norm", "grouped conv", "depthwise"),
        *("residual", "residual conv", "residual group norm", "dense", "glu", "tied embedding", "tied square"),
        *("attention", "nested", "raw parameters", "low rank", "padded shortcut"),
    ],
)
def test_a_planted_permutation_is_found(name: str, cases: dict[str, Any]) -> None:
    case = cases[name]
    model = case.model(3)
    found = symmetry(model, case.data(), verify=False)
    planted = found.random(torch.Generator().manual_seed(1))
    data = [case.data(seed) for seed in range(4)]
    result = iterated_activation_matching(found, model, planted.apply(model), data)
    assert result.permutation == planted.inverse()
    assert result.unseen == ()
    assert result.converged


def test_rounds_undo_a_start_that_data_cannot_tell() -> None:
    """All hidden units but one are silent on the data: nothing but the weights tells them apart."""
    model = mlp(0, (5, 12, 10, 4))
    with torch.no_grad():
        model.get_parameter("0.bias")[1:] = -100.0
        model.get_parameter("2.bias")[2:] = -100.0
    data = inputs(30)
    found = symmetry(model, data[0], verify=False)
    for seed in range(3):
        planted = found.random(torch.Generator().manual_seed(seed))
        result = iterated_activation_matching(found, model, planted.apply(model), data)
        assert result.permutation == planted.inverse()


def test_an_order_that_depends_on_two_others_is_left(cases: dict[str, Any]) -> None:
    case = cases["nested twice"]
    model = case.model(3)
    found = symmetry(model, case.data(), verify=False)
    planted = found.random(torch.Generator().manual_seed(1))
    result = iterated_activation_matching(found, model, planted.apply(model), [case.data(s) for s in range(4)])
    assert result.unseen == ("0:3",)
    for name in ("0", "0:2"):
        assert torch.equal(result.permutation.indices[name], planted.inverse().indices[name])
    assert torch.equal(result.permutation.indices["0:3"], found.identity().indices["0:3"])


def test_of_all_rounds_the_lowest_midpoint_loss_is_kept() -> None:
    a, b, data = mlp(0), mlp(1), labelled(40, 20)
    found = symmetry(a, data[0][0])
    result = iterated_activation_matching(found, a, b, data)
    assert len(result.losses) == len(result.objectives) > 1
    assert result.chosen == int(np.argmin(result.losses))
    assert midpoint_loss(a, result.permutation.apply(b), data).loss == pytest.approx(min(result.losses), rel=1e-6)
    assert result.objective == result.objectives[result.chosen]
    # without labels, or from an iterator, the largest sum of cosines is
    for plain in ([x for x, _ in data], iter(data)):
        other = iterated_activation_matching(found, a, b, plain)
        assert other.losses == ()
        assert other.objectives == result.objectives
        assert other.chosen == int(np.argmax(other.objectives))


def test_a_loss_of_ones_own_is_used() -> None:
    a, b, data = mlp(0), mlp(1), inputs(40)
    result = iterated_activation_matching(symmetry(a, data[0]), a, b, data, loss=lambda out, _: out.square().mean())
    middle = midpoint_loss(a, result.permutation.apply(b), data, loss=lambda out, _: out.square().mean())
    assert middle.loss == pytest.approx(result.losses[result.chosen], rel=1e-6)


def test_each_part_can_be_left_out() -> None:
    a, b, data = mlp(0), mlp(1), inputs(50)
    found = symmetry(a, data[0])
    run = lambda **options: iterated_activation_matching(found, a, b, data, choose="objective", **options)  # noqa: E731
    start = run(weights=0.0)
    assert len(start.objectives) == 1
    assert start.converged
    assert run(rounds=0).permutation == start.permutation
    forward = run(weights=0.0, backward=0.0)
    x, y = (signals_by_hand(m, data[0].double().numpy(), np.zeros((50, 4)))[0][0] for m in (a, b))
    order = linear_sum_assignment(correlations(x, y), maximize=True)[1]
    assert np.array_equal(forward.permutation.indices["0"].numpy(), order)


@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 1000), widths=st.tuples(st.integers(2, 9), st.integers(2, 9)))
def test_the_order_in_which_the_second_network_comes_does_not_matter(seed: int, widths: tuple[int, int]) -> None:
    a, b = (mlp(s, (5, *widths, 4)) for s in (seed, seed + 1))
    data = inputs(60, seed=seed)
    found = symmetry(a, data[0], verify=False)
    drawn = found.random(torch.Generator().manual_seed(seed))
    plain, moved = (iterated_activation_matching(found, a, m, data) for m in (b, drawn.apply(b)))
    assert moved.objective == pytest.approx(plain.objective, rel=1e-4)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_networks_alone() -> None:
    a, b, data = mlp(0).train(), mlp(1), labelled(40, 8)
    found = symmetry(a, data[0][0])
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (a, b)]
    one, two = (iterated_activation_matching(found, a, b, data, seed=5) for _ in range(2))
    assert one.permutation == two.permutation
    assert (one.objectives, one.losses, one.chosen) == (two.objectives, two.losses, two.chosen)
    assert all(torch.equal(one.scores[name], two.scores[name]) for name in one.scores)
    assert iterated_activation_matching(found, a, b, data, seed=6).objectives != one.objectives
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(module.training for module in a.modules())


class Counted(nn.Module):
    """Gives integers, from which nothing comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).argmax(-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backward": -1.0}, "backward is -1.0"),
        ({"weights": float("nan")}, "weights is nan"),
        ({"rounds": -1}, "rounds is -1"),
        ({"choose": "midpiont"}, "choose='midpiont' is unknown; did you mean midpoint"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    a, data = mlp(0), inputs(8)
    with pytest.raises(DataError, match=message):
        iterated_activation_matching(symmetry(a, data[0]), a, a, data, **options)


def test_wrong_data_is_refused() -> None:
    a, b, data = mlp(0), mlp(1), labelled(8)
    found = symmetry(a, data[0][0])
    with pytest.raises(DataError, match="can be read once"):
        iterated_activation_matching(found, a, b, iter(data), choose="midpoint")
    with pytest.raises(DataError, match="no labels"):
        iterated_activation_matching(found, a, b, [data[0][0]], choose="midpoint")
    with pytest.raises(DataError, match="no batch"):
        iterated_activation_matching(found, a, b, [])
    with torch.no_grad():
        b.get_parameter("0.weight")[0, 0] = torch.inf
    with pytest.raises(NotFiniteError):
        iterated_activation_matching(found, a, b, [data[0][0]])


def test_outputs_that_cannot_be_differentiated_are_refused() -> None:
    counted, data = Counted(), inputs(8)
    plain = symmetry(mlp(0), data[0])
    looks = [view for each in views(plain).values() for view in each]
    named = [type(view)(**{**vars(view), "layer": f"net.{view.layer}"}) for view in looks]
    with pytest.raises(DataError, match=r"Counted cannot be differentiated, nothing leads back.*backward=0"):
        record(named, counted, counted, [Batch((data[0],))], backward=True)
    written = Twice(inplace=True)  # what the gradient of `up` needs is overwritten
    found = symmetry(written, data[0], verify=False)
    with pytest.raises(DataError, match=r"Twice cannot be differentiated, one of the variables .* inplace"):
        iterated_activation_matching(found, written, written, data)
    assert iterated_activation_matching(found, written, written, data, backward=0.0).permutation.is_identity
    assert all(parameter.requires_grad for parameter in written.parameters())

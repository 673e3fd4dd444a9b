"""Matching by the straight-through estimator: planted orders, steps taken by hand, and a trained pair."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus import zoo
from isthmus.align import Permutation, symmetry
from isthmus.align.nets.straight_through import straight_through
from isthmus.align.nets.weights import weight_matching
from isthmus.base.errors import ArchitectureError, DataError, NotFiniteError
from isthmus.base.evaluation import evaluate
from isthmus.base.interpolation import interpolate

Batches = list[tuple[Tensor, Tensor]]


def halfway(a: nn.Module, b: nn.Module, permutation: Permutation) -> nn.Module:
    middle = copy.deepcopy(a)
    middle.load_state_dict(interpolate(a.state_dict(), permutation.apply(b.state_dict()), 0.5))
    return middle


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """As the search runs it, so that its labels are those of the search."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    return model


def one_hidden_layer(seed: int, width: int = 6) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))


def inputs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return x, (x.sum(1) > 0).long()


@pytest.mark.parametrize("name", ["mlp", "conv and batch norm", "attention", "group norm", "residual"])
def test_a_planted_permutation_is_kept_and_approached(name: str, cases: dict[str, Any]) -> None:
    """At the planted order the networks are one, and halfway they compute what each of them does."""
    case = cases[name]
    model = with_batch_statistics(case.model(3))
    found = symmetry(model, case.data(), verify=False)
    planted = found.random(torch.Generator().manual_seed(1))
    moved = planted.apply(model)
    data: Batches = [(x, model(x).detach()) for x in (case.data(seed) for seed in range(4))]
    options: dict[str, Any] = {"steps": 10, "every": 1, "loss": F.mse_loss}
    kept = straight_through(found, model, moved, data, start=planted.inverse(), lr=1e-3, **options)
    assert kept.permutation == planted.inverse()
    assert kept.losses == pytest.approx([0.0] * 10, abs=1e-9)
    assert kept.candidates == pytest.approx([0.0], abs=1e-9)
    approached = straight_through(found, model, moved, data, sweeps=3, **options)
    assert min(approached.candidates) < approached.candidates[0]


def test_one_hidden_layer_is_found_from_nothing_in_one_sweep() -> None:
    net = one_hidden_layer(0)
    planted = symmetry(net, inputs(2)[0]).random(torch.Generator().manual_seed(5))
    x = inputs(20)[0]
    data = [(x, net(x).detach())]
    result = straight_through(planted.symmetry, net, planted.apply(net), data, steps=1, loss=F.mse_loss)
    assert result.permutation == planted.inverse()


def test_two_steps_taken_by_hand() -> None:
    """The first loss is that of weight matching; the gradient of the midpoint moves the latent weights by Adam."""
    a, b = one_hidden_layer(0), one_hidden_layer(1)
    found = symmetry(a, inputs(2)[0])
    data = [inputs(16, seed) for seed in range(3)]
    result = straight_through(found, a, b, data, steps=2, lr=0.3, held=1, every=1)

    latent = {name: p.detach().clone() for name, p in a.named_parameters()}
    expected = []
    for step, (x, y) in enumerate(data[1:]):
        state = {name: p.detach() for name, p in b.named_parameters()}
        permutation = weight_matching(found, latent, state).permutation  # exact for one hidden layer
        middle = halfway(a, b, permutation)
        loss = F.cross_entropy(middle(x), y)
        expected.append(float(loss.detach()))
        loss.backward()
        if step == 0:
            for name, p in middle.named_parameters():
                assert p.grad is not None
                # the first step of Adam; half of what moves the midpoint comes from the latent weights
                latent[name] -= 0.3 * (p.grad / 2) / ((p.grad / 2).abs() + 1e-8)
    assert result.losses == pytest.approx(expected, rel=1e-5)
    assert result.candidates[0] == pytest.approx(evaluate(halfway(a, b, found.identity()), data[0]).loss, rel=1e-5)


@pytest.fixture(scope="module")
def digits() -> Any:
    train_set, test_set = (zoo.load_data("digits", split) for split in ("train", "test"))
    models = []
    for seed in (0, 1):
        model = zoo.mlp(64, (24, 24), seed=seed)
        zoo.train(model, train_set, zoo.Recipe(epochs=12, optimizer="adam", lr=3e-3, weight_decay=0.0, seed=seed))
        models.append(model.eval())
    x, y = train_set.inputs(), train_set.labels
    train = list(zip(x.split(256), y.split(256), strict=True))
    return (*models, train, [(test_set.inputs(), test_set.labels)], symmetry(models[0], x[:4]))


def test_it_lowers_the_loss_between_trained_networks_on_data_it_has_not_seen(digits: Any) -> None:
    a, b, train, test, found = digits
    parameters = [dict(model.named_parameters()) for model in (a, b)]
    descent = weight_matching(found, *parameters, start=found.identity(), restarts=1).permutation
    result = straight_through(found, a, b, train, steps=100, held=2, start=descent)
    before, after = (evaluate(halfway(a, b, p), test).loss for p in (descent, result.permutation))
    naive = evaluate(halfway(a, b, found.identity()), test).loss
    assert after < before < naive
    assert min(result.candidates) == pytest.approx(
        evaluate(halfway(a, b, result.permutation), train[:2]).loss, rel=1e-5
    )


def test_it_never_falls_behind_its_start(digits: Any) -> None:
    a, b, train, _, found = digits
    start = straight_through(found, a, b, train, steps=60).permutation
    result = straight_through(found, a, b, train, steps=3, every=1, lr=10.0, start=start)
    assert min(result.candidates[1:]) > result.candidates[0]
    assert result.permutation == start


def test_the_same_seed_gives_the_same_result_and_nothing_is_changed(digits: Any) -> None:
    a, b, train, _, found = digits
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in (a, b)]
    state = torch.get_rng_state()
    runs = [straight_through(found, a, b, train, steps=8, seed=seed, device="cpu") for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0].losses == runs[1].losses != runs[2].losses
    assert runs[0].permutation == runs[1].permutation
    for model, tensors in zip((a, b), before, strict=True):
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_network_without_groups_stays() -> None:
    net = nn.Linear(3, 2)
    result = straight_through(symmetry(net, torch.ones(1, 3)), net, net, inputs(8), steps=2)
    assert result.permutation.is_identity
    assert result.objective == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"sweeps": 0}, "sweeps is 0"),
        ({"held": 0}, "held is 0"),
        ({"every": 0}, "every is 0"),
    ],
)
def test_wrong_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    net = one_hidden_layer(0)
    with pytest.raises(DataError, match=message):
        straight_through(symmetry(net, torch.ones(1, 3)), net, net, inputs(8), **options)


def test_wrong_data_and_networks_are_refused() -> None:
    net = one_hidden_layer(0)
    found = symmetry(net, torch.ones(1, 3))
    with pytest.raises(DataError, match="no labels"):
        straight_through(found, net, net, inputs(8)[0])
    with pytest.raises(DataError, match="iterator"):
        straight_through(found, net, net, iter([inputs(8)]))
    with pytest.raises(ArchitectureError, match="model b"):
        straight_through(found, net, one_hidden_layer(0, width=5), inputs(8))
    broken = copy.deepcopy(net)
    nn.init.constant_(broken[0].weight, float("inf"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(NotFiniteError, match=r"0\.weight"):
        straight_through(found, net, broken, inputs(8))

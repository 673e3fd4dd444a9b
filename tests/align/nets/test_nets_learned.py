"""Matching by the loss between networks: against networks put together by hand, planted orders, and trained pairs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus import zoo
from isthmus.align import Permutation, Symmetry, symmetry
from isthmus.align.nets.functional import Best, Passes, open_line
from isthmus.align.nets.learned import learned
from isthmus.align.soft import one_hot, soft_apply
from isthmus.base.errors import ArchitectureError, DataError, NotFiniteError
from isthmus.base.evaluation import evaluate
from isthmus.base.interpolation import interpolate

Batches = list[tuple[Tensor, Tensor]]


def labelled(model: nn.Module, inputs: list[Tensor]) -> Batches:
    """Batches whose labels are what the network says, so that it has the lowest loss of all."""
    with torch.no_grad():
        return [(x, model(x).argmax(-1)) for x in inputs]


def halfway(a: nn.Module, b: nn.Module, permutation: Permutation) -> nn.Module:
    middle = copy.deepcopy(a)
    middle.load_state_dict(interpolate(a.state_dict(), permutation.apply(b.state_dict()), 0.5))
    return middle


def with_batch_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    return model


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, nn.Module, Batches, Batches, Symmetry]:
    """Two networks trained on digits from different seeds, batches to learn from and to test on."""
    train_set, test_set = (zoo.load_data("digits", split) for split in ("train", "test"))
    models = []
    for seed in (0, 1):
        model = zoo.mlp(64, (24, 24, 24), seed=seed)
        zoo.train(model, train_set, zoo.Recipe(epochs=12, optimizer="adam", lr=3e-3, weight_decay=0.0, seed=seed))
        models.append(model.eval())
    x, y = train_set.inputs(), train_set.labels
    train = list(zip(x.split(256), y.split(256), strict=True))
    found = symmetry(models[0], x[:4])
    return models[0], models[1], train, [(test_set.inputs(), test_set.labels)], found


# The trained pair


def test_it_lowers_the_loss_between_trained_networks_on_data_it_has_not_seen(digits: Any) -> None:
    a, b, train, test, found = digits
    naive = evaluate(halfway(a, b, found.identity()), test)
    result = learned(found, a, b, train, steps=150, held=2)
    after = evaluate(halfway(a, b, result.permutation), test)
    assert after.loss < 0.5 * naive.loss
    assert after.metric is not None
    assert naive.metric is not None
    assert after.metric > naive.metric + 0.2
    assert len(result.losses) == 150
    # and the candidates are what they are said to be
    assert result.candidates[0] == pytest.approx(evaluate(halfway(a, b, found.identity()), train[:2]).loss, rel=1e-5)
    assert min(result.candidates) == pytest.approx(
        evaluate(halfway(a, b, result.permutation), train[:2]).loss, rel=1e-5
    )


def test_uniform_points_lower_it_too_and_begin_with_the_loss_at_the_point_drawn(digits: Any) -> None:
    a, b, train, test, found = digits
    result = learned(found, a, b, train, steps=100, points="uniform")
    naive = evaluate(halfway(a, b, found.identity()), test).loss
    assert evaluate(halfway(a, b, result.permutation), test).loss < 0.8 * naive


def test_it_never_falls_behind_its_start(digits: Any) -> None:
    a, b, train, _, found = digits
    start = learned(found, a, b, train, steps=60).permutation
    result = learned(found, a, b, train, steps=3, every=1, lr=1e3, start=start)
    assert min(result.candidates[1:]) > result.candidates[0]
    assert result.permutation == start
    assert result.objective == result.history[0][0]


def test_a_polished_candidate_joins_the_others(digits: Any) -> None:
    a, b, train, _, found = digits
    plain, polished = (learned(found, a, b, train, steps=20, polish=polish) for polish in (False, True))
    assert polished.candidates[:-1] == plain.candidates
    assert polished.history[0][-1] > plain.history[0][-1]  # weight matching raises the inner product


def test_the_same_seed_gives_the_same_result_and_nothing_is_changed(digits: Any) -> None:
    a, b, train, _, found = digits
    before = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in (a, b)]
    modes = [[module.training for module in model.modules()] for model in (a, b)]
    state = torch.get_rng_state()
    runs = [learned(found, a, b, train, steps=12, seed=seed, device="cpu") for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    assert runs[0].losses == runs[1].losses != runs[2].losses
    assert runs[0].candidates == runs[1].candidates
    assert runs[0].permutation == runs[1].permutation
    for model, tensors, mode in zip((a, b), before, modes, strict=True):
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
        assert [module.training for module in model.modules()] == mode
        assert all(p.requires_grad and p.grad is None for p in model.parameters())


# Planted orders


@pytest.mark.parametrize("name", ["mlp", "conv and batch norm", "attention", "group norm", "tied embedding"])
def test_it_stays_at_a_planted_order_and_comes_closer_to_it_from_elsewhere(name: str, cases: dict[str, Any]) -> None:
    case = cases[name]
    model = case.model(3)
    found = symmetry(model, case.data(), verify=False)
    planted = found.random(torch.Generator().manual_seed(1))
    moved = planted.apply(model)
    data = labelled(model, [case.data(seed) for seed in range(6)])
    stayed = learned(found, model, moved, data, steps=5, every=1, start=planted.inverse(), sharpness=0.9)
    assert stayed.permutation == planted.inverse()
    assert stayed.objective == pytest.approx(stayed.history[0][0])
    result = learned(found, model, moved, data, steps=40, held=2)
    assert min(result.candidates) < result.candidates[0]


def test_a_planted_permutation_is_found_from_a_start_that_is_partly_wrong(cases: dict[str, Any]) -> None:
    case = cases["mlp"]
    model = case.model(3)
    found = symmetry(model, case.data())
    planted = found.random(torch.Generator().manual_seed(1))
    index = {name: order.clone() for name, order in planted.inverse().indices.items()}
    index["0"][[0, 1, 2]] = index["0"][[1, 2, 0]]
    data = labelled(model, [torch.randn(200, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(4)])
    target = [(x, model(x).detach()) for x, _ in data]
    result = learned(
        found, model, planted.apply(model), target, steps=150, start=Permutation(found, index), loss=F.mse_loss
    )
    assert result.permutation == planted.inverse()
    assert min(result.candidates) < 1e-10


# The line


def test_with_hard_matrices_a_point_of_the_line_is_the_interpolated_network(digits: Any) -> None:
    a, b, train, _, found = digits
    permutation = found.random(torch.Generator().manual_seed(0))
    line = open_line(found, a, b, None, None)
    x, y = train[0]
    batch = Passes([train[0]], torch.device("cpu"), 1).held[0]
    for alpha in (0.0, 0.3, 1.0):
        model = copy.deepcopy(a)
        model.load_state_dict(interpolate(a.state_dict(), permutation.apply(b.state_dict()), alpha))
        value = line.loss_at(alpha, soft_apply(found, line.b, _grown(one_hot(permutation))), batch, 0)
        assert float(value.detach()) == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-5)


def _grown(matrices: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: matrix.requires_grad_() for name, matrix in matrices.items()}


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("gain", torch.ones(6, 1, 1))
        self.gain: Tensor
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(F.relu(self.norm(self.conv(x)) * self.gain)).mean((2, 3)))


def test_batch_norms_take_the_batch_and_dropout_is_off() -> None:
    a, b = (_dropping(seed) for seed in (0, 1))
    x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(2))
    y = torch.arange(8) % 3
    found = symmetry(a.eval(), x)
    permutation = found.random(torch.Generator().manual_seed(3))
    a.train()
    middle = halfway(a, b, permutation)
    expected = F.cross_entropy(with_batch_statistics(middle).eval()(x), y)
    line = open_line(found, a, b, None, None)
    held = Passes((x, y), line.device, 3).held
    assert line.midpoint(permutation, held) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(evaluate(halfway(a, b, permutation), (x, y)).loss) != pytest.approx(float(expected.detach()), rel=1e-3)
    assert "gain" in line.a
    assert "norm.running_mean" not in line.a
    result = learned(found, a, b, (x, y), steps=4)
    assert torch.equal(a.norm.running_mean, _dropping(0).norm.running_mean)  # pyright: ignore[reportArgumentType]
    assert a.training
    assert len(result.losses) == 4


def _dropping(seed: int) -> Dropping:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Dropping()
    generator = torch.Generator().manual_seed(seed)
    for buffer in (model.norm.running_mean, model.norm.running_var, model.gain):
        assert buffer is not None
        buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model


def test_held_batches_are_not_learned_from_where_there_are_others() -> None:
    data = [(torch.full((2, 1), float(k)), torch.zeros(2, dtype=torch.long)) for k in range(4)]
    passes = Passes(data, torch.device("cpu"), 2)
    seen = [float(batch.args[0][0, 0]) for batch, _ in zip(passes, range(6), strict=False)]
    assert [float(batch.args[0][0, 0]) for batch in passes.held] == [0, 1]
    assert seen == [2, 3, 2, 3, 2, 3]
    alone = Passes(data, torch.device("cpu"), 8)
    assert [float(batch.args[0][0, 0]) for batch, _ in zip(alone, range(6), strict=False)] == [0, 1, 2, 3, 0, 1]


def test_the_best_is_kept_and_the_last_is_not_measured_twice(digits: Any) -> None:
    a, b, train, _, found = digits
    line = open_line(found, a, b, None, None)
    held = Passes(train, line.device, 1).held
    drawn = [found.random(torch.Generator().manual_seed(seed)) for seed in range(4)]
    best = Best(line, held, drawn[0])
    for permutation in (*drawn[1:], drawn[3]):
        best.offer(permutation)
    assert len(best.losses) == 4
    assert best.permutation == drawn[min(range(4), key=best.losses.__getitem__)]
    best.loss = float("nan")  # as at a start whose loss overflows
    best.offer(drawn[0])
    assert best.permutation == drawn[0]


def test_a_network_without_groups_stays() -> None:
    net, data = nn.Linear(3, 2), (torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))
    result = learned(symmetry(net, torch.ones(1, 3)), net, net, data, steps=3)
    assert result.permutation.is_identity
    assert result.losses == ()
    assert result.candidates == (pytest.approx(evaluate(net, data).loss),)


# Wrong use


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": 0.0}, "lr is 0"),
        ({"held": 0}, "held is 0"),
        ({"every": -1}, "every is -1"),
        ({"temperature": (0.0, 1.0)}, r"temperature\[0\] is 0"),
        ({"sharpness": 0.0}, "sharpness is 0"),
        ({"points": "midpint"}, "did you mean midpoint"),
        ({"loss": lambda outputs, targets: 1.0}, "no differentiable scalar"),
        ({"loss": lambda outputs, targets: outputs.sum(1)}, "no differentiable scalar"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str, digits: Any) -> None:
    a, b, train, _, found = digits
    with pytest.raises(DataError, match=message):
        learned(found, a, b, train, **options)


def test_wrong_data_is_refused(digits: Any) -> None:
    a, b, train, _, found = digits
    with pytest.raises(DataError, match="no labels"):
        learned(found, a, b, [x for x, _ in train])
    with pytest.raises(DataError, match="iterator"):
        learned(found, a, b, iter(train))
    with pytest.raises(DataError, match="no batch"):
        learned(found, a, b, [])
    with pytest.raises(NotFiniteError, match="NaN or infinity"):
        learned(found, a, b, [(torch.full((2, 64), float("nan")), torch.tensor([0, 1]))])


def test_other_networks_and_nan_are_refused(digits: Any) -> None:
    a, b, train, _, found = digits
    with pytest.raises(ArchitectureError, match="model b"):
        learned(found, a, zoo.mlp(64, (24, 20, 24)), train)
    broken = copy.deepcopy(b)
    with torch.no_grad():
        broken.fc2.weight[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"fc2\.weight"):
        learned(found, a, broken, train)


def test_a_loss_that_overflows_is_refused_with_its_step(digits: Any) -> None:
    a, b, train, _, found = digits
    with pytest.raises(NotFiniteError, match=r"inf in step 0; lower lr"):
        learned(found, a, b, train, loss=lambda outputs, targets: outputs.sum() * 0 + float("inf"))


def test_a_batch_of_one_is_refused_where_statistics_are_taken() -> None:
    make = lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))  # noqa: E731
    found = symmetry(make().eval(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    data = [(torch.ones(1, 3), torch.tensor([0]))]
    with pytest.raises(DataError, match="single sample"):
        learned(found, make(), make(), data)

    def fails(outputs: Tensor, targets: Tensor) -> Tensor:
        raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        learned(found, make(), make(), [(torch.ones(2, 3), torch.tensor([0, 1]))], loss=fails)

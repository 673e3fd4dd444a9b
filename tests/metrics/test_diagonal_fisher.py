"""The diagonal of the Fisher information against sums over all labels, written out one by one in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from isthmus.base.batches import Batch
from isthmus.base.errors import DataError, NotFiniteError
from isthmus.metrics import per_sample
from isthmus.metrics.fisher import diagonal_fisher
from isthmus.metrics.per_sample import per_sample_gradients


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double().eval()


def squares(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, materialize_grads=True)
    return {name: gradient.square() for name, gradient in zip(parameters, found, strict=True)}


def over_labels(model: nn.Module, x: Tensor, kept: Tensor | None = None) -> dict[str, Tensor]:
    """E_y (∇ log p(y))², y running over all sequences of labels of the tokens that are kept."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for index in range(len(x)):
        logits = model(x[index : index + 1])
        logp = logits.log_softmax(-1).reshape(-1, logits.shape[-1])
        tokens = range(len(logp)) if kept is None else kept[index].nonzero().flatten().tolist()
        for labels in itertools.product(range(logp.shape[-1]), repeat=len(tokens)):
            value = torch.stack([logp[token, label] for token, label in zip(tokens, labels, strict=True)]).sum()
            for name, square in squares(model, value).items():
                total[name] += value.detach().exp() * square / len(x)
    return total


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance.get("rtol", 1e-9), atol=1e-12)


class Branching(nn.Module):
    """What it computes depends on the numbers: no operator of `vmap` can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.up(row[None]) if row.sum().item() > 0 else self.down(row[None]) for row in x])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (6, 4)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 3)
        ),
        (4, 2, 3, 3),
    ),
    "branching": (Branching, (5, 3)),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_all_labels_are_weighed_by_their_probability(kind: str) -> None:
    make, shape = NETWORKS[kind]
    model, x = seeded(make), normal(*shape)
    assert_same(diagonal_fisher(model, [x[:3], x[3:]]), over_labels(model, x))


def test_softmax_regression_by_hand() -> None:
    model, x = seeded(lambda: nn.Linear(3, 4)), normal(20, 3)
    p = model(x).detach().softmax(-1)
    spread = p * (1 - p)
    assert_same(
        diagonal_fisher(model, x),
        {"weight": (spread[:, :, None] * x.square()[:, None]).mean(0), "bias": spread.mean(0)},
    )


def test_linear_regression_by_hand() -> None:
    model, x = seeded(lambda: nn.Linear(3, 2)), normal(20, 3)
    found = diagonal_fisher(model, x, likelihood="gaussian")
    assert_same(found, {"weight": x.square().mean(0).expand(2, 3), "bias": torch.ones(2).double()})
    y = normal(20, 2, seed=1)
    residual = (y - model(x).detach()).square()
    empirical = diagonal_fisher(model, (x, y), likelihood="gaussian", labels="data")
    weight = (residual[:, :, None] * x.square()[:, None]).mean(0)
    assert_same(empirical, {"weight": weight, "bias": residual.mean(0)})


def test_labels_of_the_data_are_another_quantity() -> None:
    model, x, y = seeded(NETWORKS["perceptron"][0]), normal(6, 4), torch.tensor([0, 1, 2, 2, 1, -100])
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row, label in zip(x[:5], y[:5], strict=True):
        for name, square in squares(model, model(row[None])[0].log_softmax(-1)[label]).items():
            wanted[name] += square / 6
    assert_same(diagonal_fisher(model, (x, y), labels="data"), wanted)


class Tokens(nn.Module):
    """Each token sees the others before it; logits in a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x).cumsum(1).tanh())


def test_a_sequence_has_the_sum_over_its_tokens_as_likelihood() -> None:
    model, x = seeded(Tokens), normal(3, 2, 3)
    assert_same(diagonal_fisher(model, x), over_labels(model, x))
    y = torch.tensor([[0, -100], [1, 2], [-100, 1]])
    assert_same(diagonal_fisher(model, (x, y)), over_labels(model, x, y != -100))
    wanted = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row, labels in zip(x, y, strict=True):
        logp = model(row[None])[0].log_softmax(-1)
        value = torch.stack([logp[t, label] for t, label in enumerate(labels.tolist()) if label >= 0]).sum()
        for name, square in squares(model, value).items():
            wanted[name] += square / 3
    assert_same(diagonal_fisher(model, (x, y), labels="data"), wanted)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_drawn_labels_approach_all_labels(likelihood: str) -> None:
    model, x = seeded(Tokens), normal(3, 2, 3)
    exact = diagonal_fisher(model, x, likelihood=likelihood)  # pyright: ignore[reportArgumentType]
    drawn = diagonal_fisher(model, x, likelihood=likelihood, draws=4000)  # pyright: ignore[reportArgumentType]
    for name, tensor in exact.items():
        torch.testing.assert_close(drawn[name], tensor, rtol=0.15, atol=0.02 * float(tensor.max()))


def test_many_labels_are_drawn_and_the_seed_decides() -> None:
    model, x = seeded(lambda: nn.Linear(3, 101)), normal(2, 3)
    first, again, other = (diagonal_fisher(model, x, seed=seed)["bias"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first, diagonal_fisher(model, x, draws=1)["bias"])
    p = model(x).detach().softmax(-1)
    possible = {label: ((torch.eye(101)[label] - p[0]) ** 2) / 2 for label in range(101)}
    second = {label: ((torch.eye(101)[label] - p[1]) ** 2) / 2 for label in range(101)}
    assert any(torch.allclose(first, a + b) for a in possible.values() for b in second.values())


@settings(max_examples=8, deadline=None)
@given(chunk=st.integers(1, 7), batch=st.integers(1, 6))
def test_chunks_and_batches_do_not_matter(chunk: int, batch: int) -> None:
    model, x = seeded(NETWORKS["perceptron"][0]), normal(6, 4)
    assert_same(diagonal_fisher(model, list(x.split(batch)), chunk=chunk), diagonal_fisher(model, x))


def test_cotangents_are_split_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = seeded(NETWORKS["perceptron"][0]), normal(6, 4)
    wanted = diagonal_fisher(model, x)
    monkeypatch.setattr(per_sample, "_NUMBERS", 2 * sum(p.numel() for p in model.parameters()))
    pieces = list(per_sample_gradients(model, Batch((x,)), torch.ones(6, 3, 3).double()))
    assert {piece["0.weight"].shape for piece in pieces} == {(1, 2, 5, 4), (1, 1, 5, 4)}
    assert_same(diagonal_fisher(model, x), wanted)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: Tensor, factor: float = 1.0) -> dict[str, Tensor]:
        return {"logits": self.out(self.cell(x * scale[:, None, None])[0][:, -1]) * factor}


def test_gradients_of_a_recurrent_network_with_several_inputs() -> None:
    model, x, scale = seeded(Recurrent), normal(3, 4, 2), normal(3, seed=2)
    cotangents = normal(3, 2, 2, seed=3)
    [found] = per_sample_gradients(model, Batch((x,), {"scale": scale, "factor": 2.0}), cotangents)
    for index, direction in itertools.product(range(3), range(2)):
        value = model(x[index : index + 1], scale[index : index + 1], 2.0)["logits"][0] @ cotangents[index, direction]
        for name, square in squares(model, value).items():
            torch.testing.assert_close(found[name][index, direction].square(), square)


def test_a_permutation_of_units_permutes_the_information() -> None:
    import isthmus

    model, x = seeded(NETWORKS["perceptron"][0]), normal(6, 4)
    permutation = isthmus.symmetry(model, x).random(torch.Generator().manual_seed(3))
    assert_same(diagonal_fisher(permutation.apply(model), x), permutation.apply(diagonal_fisher(model, x)))


def test_tied_and_frozen_parameters_count() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False)).requires_grad_(False)
    model[2].weight = model[0].weight
    found = diagonal_fisher(model, normal(4, 3).float())
    assert torch.equal(found["0.weight"], found["2.weight"])
    assert found["0.weight"].dtype == torch.float32
    assert float(found["0.weight"].min()) > 0


def test_half_precision_gives_single() -> None:
    model = seeded(NETWORKS["perceptron"][0])
    wanted = diagonal_fisher(model, normal(6, 4))
    found = diagonal_fisher(model.to(torch.bfloat16), normal(6, 4).to(torch.bfloat16))
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    torch.testing.assert_close(found["2.bias"].double(), wanted["2.bias"], rtol=0.05, atol=0)


def test_the_network_is_left_as_it_was() -> None:
    model, x = NETWORKS["convolution"][0]().train(), normal(4, 2, 3, 3).float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    diagonal_fisher(model, x)
    with pytest.raises(DataError):
        diagonal_fisher(model, x, labels="data")
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


X = normal(4, 2).float()


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (X, {"labels": "model?"}, r"labels is 'model\?'"),
        (X, {"likelihood": "poisson"}, "likelihood is 'poisson'"),
        (X, {"draws": 0}, "draws is 0"),
        (X, {"chunk": True}, "chunk is True"),
        (X, {"labels": "data", "draws": 2}, "draws is for labels='model'"),
        (X, {"labels": "data"}, "needs labels"),
        ((X, torch.tensor([0, 1, 2, 3])), {"labels": "data"}, "label 3 does not fit"),
        ((X, torch.zeros(4)), {"labels": "data"}, r"integer labels of shape \(4,\)"),
        (X, {"labels": "data", "likelihood": "gaussian"}, "of the same shape, not none"),
        ((X, torch.zeros(4)), {"labels": "data", "likelihood": "gaussian"}, r"not \(4,\) of torch.float32"),
        ([], {}, "no batch"),
    ],
)
def test_bad_input_is_refused(data: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        diagonal_fisher(nn.Linear(2, 3), data, **options)  # pyright: ignore[reportArgumentType]


class Giving(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.weight, self.value = nn.Parameter(torch.ones(2)), value

    def forward(self, x: Tensor) -> object:
        return self.value


def test_outputs_that_are_no_logits_are_refused() -> None:
    with pytest.raises(DataError, match="output is a str"):
        diagonal_fisher(Giving("text"), X)
    with pytest.raises(DataError, match="for 4 inputs"):
        diagonal_fisher(Giving(torch.zeros(3, 2)), X)


def test_numbers_that_are_none_are_refused() -> None:
    model = nn.Linear(2, 3)
    with pytest.raises(NotFiniteError, match="hold NaN"):
        diagonal_fisher(Giving(torch.full((4, 2), torch.inf)), X)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="weight"):
        diagonal_fisher(model, X)

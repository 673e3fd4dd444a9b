"""The network halfway between two, against averages taken by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.align.nets.midpoint import can_measure, midpoint_loss
from isthmus.base.errors import ArchitectureError, DataError, NotFiniteError


def plain(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))


def normed(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.fill_(2.0 + seed if name.endswith("var") else 1.0 - seed)
    return model


def labelled(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 5, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes]


def average(a: nn.Module, b: nn.Module) -> nn.Module:
    model = copy.deepcopy(a).eval()
    other = b.state_dict()
    model.load_state_dict(
        {k: (v + other[k]) / 2 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    )
    return model


def expected(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    with torch.no_grad():
        logits = model(x)
    return float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).double().mean())


def test_loss_and_accuracy_of_the_average() -> None:
    a, b, data = plain(0), plain(1), labelled(20, 7)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (a, b)]
    found = midpoint_loss(a, b, data)
    assert (found.loss, found.metric) == pytest.approx(expected(average(a, b), data), rel=1e-6)
    assert found.samples == 27
    assert midpoint_loss(a, b, iter(data)) == found  # read once
    for model, state in zip((a, b), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_statistics_of_batch_norm_are_measured_again() -> None:
    a, b, data = normed(0), normed(1), labelled(30)
    middle = average(a, b)
    assert midpoint_loss(a, b, data, reset=False).loss == pytest.approx(expected(middle, data)[0], rel=1e-6)
    x = data[0][0]
    hidden = middle.get_submodule("0")(x).detach()
    middle.get_buffer("1.running_mean").copy_(hidden.mean(0))
    middle.get_buffer("1.running_var").copy_(hidden.var(0))
    found = midpoint_loss(a, b, data)
    assert (found.loss, found.metric) == pytest.approx(expected(middle, data), rel=1e-5)
    assert midpoint_loss(a, b, data, reset=True) == found
    # they can come from other data, and then the data need not be read twice
    assert midpoint_loss(a, b, iter(data), reset_data=data) == found


def test_the_midpoint_with_itself_is_the_network() -> None:
    a, data = plain(0), labelled(12)
    assert midpoint_loss(a, a, data).loss == pytest.approx(expected(a, data)[0], rel=1e-6)


def test_a_loss_of_ones_own_needs_no_labels() -> None:
    a, b = plain(0), plain(1)
    x = labelled(12)[0][0]
    found = midpoint_loss(a, b, x, loss=lambda outputs, _: outputs.square().mean())
    assert found.loss == pytest.approx(float(average(a, b)(x).detach().square().mean()), rel=1e-6)
    assert found.metric is None


@pytest.mark.parametrize(
    ("data", "loss", "can"),
    [
        (labelled(4), None, True),
        (labelled(4)[0], None, True),
        (iter(labelled(4)), None, False),
        ([labelled(4)[0][0]], None, False),
        ([(torch.zeros(4, 5), torch.zeros(4, 3))], None, False),
        (torch.zeros(4, 5), lambda outputs, _: outputs.mean(), True),
    ],
)
def test_whether_it_can_be_measured(data: Any, loss: Any, can: bool) -> None:
    assert can_measure(data, loss) is can


def test_wrong_input_is_refused() -> None:
    a, data = plain(0), labelled(6)
    with pytest.raises(ArchitectureError, match="no batch norm with running statistics"):
        midpoint_loss(a, a, data, reset=True)
    with pytest.raises(DataError, match="once to reset batch norm and once to measure"):
        midpoint_loss(normed(0), normed(1), iter(data))
    with pytest.raises(DataError, match="no labels"):
        midpoint_loss(a, a, data[0][0])
    with pytest.raises(ArchitectureError, match="shapes differ"):
        midpoint_loss(a, nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3)), data)
    b = plain(1)
    with torch.no_grad():
        b.get_parameter("0.weight")[0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="network b"):
        midpoint_loss(a, b, data)

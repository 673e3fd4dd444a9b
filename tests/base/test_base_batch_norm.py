"""Batch norm statistics measured again: against numpy, and against a forward pass with batch statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isthmus.base.batch_norm import batch_norms, reset_batch_norms
from isthmus.base.errors import DataError, NotFiniteError


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            *(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4)),
            *(nn.Flatten(), nn.LazyLinear(3), nn.BatchNorm1d(3, track_running_stats=False)),
        )


def images(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [3 + torch.randn(size, 2, 6, 6, generator=generator) for size in sizes]


def test_only_those_with_running_statistics_count() -> None:
    assert list(batch_norms(network())) == ["1", "4"]


def test_statistics_are_those_of_all_samples() -> None:
    model = network()
    batches = images(4, 7, 2)
    reset_batch_norms(model, batches)
    x = torch.cat([model[0](batch).detach() for batch in batches]).double().movedim(1, -1).reshape(-1, 5).numpy()
    norm = model.get_submodule("1")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.running_mean.numpy() == pytest.approx(x.mean(0), rel=1e-5)
    assert norm.running_var.numpy() == pytest.approx(x.var(0, ddof=1), rel=1e-5)
    assert int(norm.num_batches_tracked or 0) == 3
    assert all(module.training for module in model.modules())  # as it was


@pytest.mark.parametrize("memory", [2**30, 4000, 0])
def test_evaluation_shows_just_these_statistics_in_every_layer(memory: int) -> None:
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    x = torch.randn(90, 6, generator=generator)
    reset_batch_norms(model, x.split(20), memory=memory)
    model.double().eval()
    values = x.double()
    for layer in model:
        if isinstance(layer, nn.BatchNorm1d):
            seen = values.detach().numpy()
            assert layer.get_buffer("running_mean").numpy() == pytest.approx(seen.mean(0), abs=1e-5)
            assert layer.get_buffer("running_var").numpy() == pytest.approx(seen.var(0, ddof=1), rel=2e-5)
        values = layer(values)


def test_on_one_batch_evaluation_is_then_training_but_for_the_unbiased_variance() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, eps=1e-12), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    reset_batch_norms(model, x)
    hidden = model[0](x)
    normed = (hidden - hidden.mean(0)) / hidden.std(0)
    expected = model[3](normed.relu())
    assert torch.allclose(model.eval()(x), expected, atol=1e-5)


def test_a_large_offset_costs_no_digits() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2)).double()
    x = np.random.default_rng(0).normal(size=(400, 2)) + 1e8
    reset_batch_norms(model, [torch.from_numpy(part) for part in np.split(x, 4)])
    variance = model.get_buffer("0.running_var")
    assert variance.numpy() == pytest.approx((x - 1e8).var(0, ddof=1), rel=1e-6)


def test_a_norm_that_no_data_reaches_is_left() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(input=x)

    model = Idle()
    x = 5 + torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    reset_batch_norms(model, x)
    assert torch.allclose(model.get_buffer("used.running_mean"), x.mean(0))
    assert not model.get_buffer("idle.running_mean").any()


def test_wrong_data_is_refused_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(DataError, match=r"a batch gives 1 one value for each unit, of shape \(1, 4\)"):
        reset_batch_norms(model, [torch.randn(5, 3), torch.randn(1, 3)], memory=0)
    assert not model.get_buffer("1.running_mean").any()
    with pytest.raises(DataError, match="no batch"):
        reset_batch_norms(model, [])
    with torch.no_grad():
        model[0].get_parameter("bias")[1] = torch.inf
    with pytest.raises(NotFiniteError, match="the input of 1"):
        reset_batch_norms(model, torch.randn(5, 3))

"""Ratios of variance layer by layer, against numpy; they collapse on the way and are one after a repair."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from isthmus.base.errors import ArchitectureError, DataError, NotFiniteError
from isthmus.merge import interpolate, repair
from isthmus.merge.repairs import variance_ratios


def network(seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()),
            *(nn.Linear(8, 8, bias=False), nn.LayerNorm(8), nn.Linear(8, 3)),
        ).eval()


def middle(a: nn.Module, b: nn.Module, alpha: float = 0.5) -> Any:
    model = copy.deepcopy(a)
    model.load_state_dict(interpolate(a.state_dict(), b.state_dict(), alpha))
    return model


def data() -> Tensor:
    return 1 + torch.randn(50, 4, generator=torch.Generator().manual_seed(3))


def outputs(model: nn.Sequential, x: Tensor) -> dict[str, np.ndarray]:
    found = {}
    for index, layer in enumerate(model):
        x = layer(x)
        found[str(index)] = x.detach().double().numpy()
    return found


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_ratios_are_those_of_numpy(alpha: float) -> None:
    a, b, x = network(0), network(1), data()
    naive = middle(a, b, alpha)
    found = variance_ratios(naive, (a, b), x.split(13), alpha=alpha)
    assert found.layers == ("0", "3", "5", "6", "7")  # "2" is what the batch norm reads
    of_a, of_b, of_m = (outputs(model, x) for model in (a, b, naive))
    for index, name in enumerate(found.layers):
        std = (1 - alpha) * of_a[name].std(0) + alpha * of_b[name].std(0)
        mean = (1 - alpha) * of_a[name].mean(0) + alpha * of_b[name].mean(0)
        assert found.unit_ratio[name] == pytest.approx(of_m[name].var(0) / std**2, rel=1e-4)
        assert found.ratio[index] == pytest.approx(of_m[name].var(0).mean() / (std**2).mean(), rel=1e-4)
        off = np.maximum(abs(of_m[name].std(0) / std - 1), abs(of_m[name].mean(0) - mean) / std)
        assert found.deviation[index] == pytest.approx(off.max(), rel=1e-4)
    weighted = variance_ratios(naive, (a, b), x, weights=[1 - alpha, alpha])
    assert weighted.ratio == pytest.approx(found.ratio)


def test_a_repair_brings_them_to_one() -> None:
    a, b, x = network(0), network(1), data()
    naive = middle(a, b)
    before = variance_ratios(naive, (a, b), x)
    after = variance_ratios(repair(naive, x, method="both", endpoints=(a, b)), (a, b), x)
    assert abs(before.ratio[:-1] - 1).max() > 0.1
    rescaled = [index for index, name in enumerate(after.layers) if name in ("0", "5", "6")]
    assert after.ratio[rescaled] == pytest.approx(1, abs=2e-5)
    assert after.deviation[[rescaled[0], rescaled[2]]] == pytest.approx(0, abs=1e-5)


def test_units_that_do_not_vary_are_left_out() -> None:
    a, x = network(0), data()
    with torch.no_grad():
        a[0].get_parameter("weight")[2] = 0
    found = variance_ratios(a, (a, a), x)
    assert np.isnan(found.unit_ratio["0"]).nonzero()[0].tolist() == [2]
    assert found.ratio == pytest.approx(1)
    dead = nn.Linear(3, 2)
    nn.init.zeros_(dead.weight)
    nothing = variance_ratios(dead, (dead, dead), torch.randn(5, 3))
    assert np.isnan(nothing.ratio).all()
    assert nothing.deviation.tolist() == [0]


def test_picture_and_numbers() -> None:
    a, b, x = network(0), network(1), data()
    found = variance_ratios(middle(a, b), (a, b), x, device="cpu")
    axes = found.plot(Figure().subplots(), label="naive")
    assert axes.lines[0].get_ydata() == pytest.approx(found.ratio)
    assert [label.get_text() for label in axes.get_xticklabels()] == list(found.layers)
    legend = axes.get_legend()
    assert legend is not None
    assert legend.get_texts()[0].get_text() == "naive"
    assert found.to_dict() == {
        "layers": list(found.layers),
        "ratio": found.ratio.tolist(),
        "deviation": found.deviation.tolist(),
    }
    alone = found.plot()
    assert alone.get_legend() is None
    import matplotlib.pyplot as plt

    plt.close("all")


def test_refuses_what_cannot_be_compared() -> None:
    a, x = network(0), data()
    with pytest.raises(ArchitectureError, match="runs no layer"):
        variance_ratios(nn.ReLU(), (nn.ReLU(), nn.ReLU()), x)
    with pytest.raises(ArchitectureError, match=r"endpoints\[1\]"):
        variance_ratios(a, (a, nn.Linear(4, 2)), x)
    with pytest.raises(ArchitectureError, match="pass endpoints="):
        variance_ratios(a, (), x)
    with pytest.raises(DataError, match="alpha is 2"):
        variance_ratios(a, (a, a), x, alpha=2)
    with pytest.raises(NotFiniteError, match="batch 0"):
        variance_ratios(a, (a, a), x * torch.nan)
    with pytest.raises(DataError, match="no batch"):
        variance_ratios(a, (a, a), [])

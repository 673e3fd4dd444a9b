"""Activation maximisation: closed forms of linear units, what regularisation does, and a network left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.align.units.maximisation import _blurred, _variation_gradient, maximise
from isthmus.base.errors import DataError, LayerNotFoundError, NotFiniteError

PLAIN: dict[str, Any] = {"total_variation": 0.0, "jitter": 0}


def cosines(x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cosine_similarity(x.flatten(1), y.flatten(1))


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(), nn.Linear(72, 4),
    )  # fmt: skip


def test_a_linear_unit_is_maximised_by_its_weights() -> None:
    torch.manual_seed(0)
    model = nn.Linear(30, 5)
    found = maximise(model, "", [3, 0, 4], (30,), norm=0.7)
    weight = model.weight.detach()[[3, 0, 4]]
    assert (cosines(found.inputs, weight) > 0.9999).all()
    torch.testing.assert_close(found.inputs.square().mean(1).sqrt(), torch.full((3,), 0.7), rtol=1e-5, atol=0)
    best = 0.7 * 30**0.5 * weight.norm(dim=1) + model.bias.detach()[[3, 0, 4]]  # Cauchy and Schwarz
    torch.testing.assert_close(found.values, best.double(), rtol=1e-4, atol=0)
    with torch.no_grad():
        own = model(found.inputs)[torch.arange(3), [3, 0, 4]]
    torch.testing.assert_close(found.values, own.double())


def test_a_convolution_is_maximised_by_its_kernel_at_the_middle() -> None:
    torch.manual_seed(1)
    model = nn.Conv2d(2, 4, 3)
    found = maximise(model, "", range(4), (2, 9, 9), target="centre", **PLAIN)
    assert (cosines(found.inputs[:, :, 3:6, 3:6], model.weight.detach()) > 0.9999).all()
    outside = found.inputs.clone()
    outside[:, :, 3:6, 3:6] = 0
    assert (outside.abs() < 0.05).all()  # noise of the start


def test_bounds_give_the_signs_of_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(2, 1, 4)
    with torch.no_grad():
        model.weight += 0.3 * model.weight.sign()
    low, high = [-1.0, -0.5], [2.0, 0.25]
    found = maximise(model, "", 0, (2, 4, 4), norm=None, rate=0.5, bounds=(low, high), **PLAIN)
    ends = torch.tensor([low, high])[:, :, None, None].expand(2, 2, 4, 4)
    expected = torch.where(model.weight[0] > 0, ends[1], ends[0])
    torch.testing.assert_close(found.inputs[0], expected)


def test_weight_decay_holds_the_input_where_decay_and_ascent_are_equal() -> None:
    model = nn.Linear(4, 1)
    nn.init.ones_(model.weight)
    found = maximise(model, "", 0, (4,), norm=None, l2=2.0, steps=4000)
    torch.testing.assert_close(found.inputs, torch.full((1, 4), 0.5), rtol=1e-3, atol=0)  # x = l2⁻¹ √D g / ‖g‖


def test_activations_rise_above_those_of_random_inputs(network: nn.Sequential) -> None:
    generator = torch.Generator().manual_seed(5)
    random = torch.randn(500, 3, 10, 10, generator=generator)
    random /= random.square().mean((1, 2, 3), keepdim=True).sqrt()
    network.eval()
    for layer in ("0", "5", "8"):
        found = maximise(network, layer, range(4), random[:1], steps=80)
        with torch.no_grad():
            own = network[: int(layer) + 1](random)[:, :4].flatten(2) if layer != "8" else network(random)
        best = (own.mean(2) if own.ndim == 3 else own).amax(0).double()
        assert (found.values > 1.2 * best.clamp(min=0)).all(), layer
        assert (found.values > found.start_values).all()
        assert (found.inputs.square().mean((1, 2, 3)).sqrt() <= 1 + 1e-5).all()
        assert found.silent == ()
        assert repr(found) == f"Maximised({layer}: 4 units, inputs of shape (3, 10, 10))"


def test_same_seed_same_bits_and_no_unit_depends_on_the_others(network: nn.Sequential) -> None:
    arguments: dict[str, Any] = {"example": (3, 10, 10), "steps": 12, "blur_every": 5}
    first, second = (maximise(network, "5", [1, 6], seed=3, **arguments) for _ in range(2))
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.values, second.values)
    assert not torch.equal(first.inputs, maximise(network, "5", [1, 6], seed=4, **arguments).inputs)
    alone = maximise(network, "5", 6, seed=3, **arguments)
    torch.testing.assert_close(alone.inputs[0], first.inputs[1], rtol=1e-4, atol=1e-4)


def test_the_network_and_the_random_numbers_are_as_before(network: nn.Sequential) -> None:
    network[6].eval()
    network[0].weight.requires_grad_(False)
    network[8].weight.grad = torch.ones(4, 72)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes, state = [module.training for module in network.modules()], torch.get_rng_state()
    with torch.inference_mode():
        found = maximise(network, "8", [0, 1], (3, 10, 10), steps=5)
    assert not found.inputs.is_inference()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [p.requires_grad for p in network.parameters()] == [False] + [True] * 7
    assert [p.grad is None for p in network.parameters()] == [True] * 6 + [False, True]
    assert torch.equal(network[8].weight.grad, torch.ones(4, 72))
    assert not any(module._forward_hooks for module in network.modules())


def test_an_inactive_unit_is_woken_through_leaky_rectifiers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 2), nn.ReLU(inplace=True))
    nn.init.constant_(model[0].bias, -1.0)  # pyright: ignore[reportArgumentType]
    found = maximise(model, "1", [0, 1], (6,), norm=3.0)
    assert found.silent == ()
    assert (found.start_values == 0).all()
    assert (cosines(found.inputs, model[0].weight.detach()) > 0.999).all()  # pyright: ignore


def test_units_that_never_move_are_named() -> None:
    model = nn.Sequential(nn.Linear(6, 3), nn.ReLU())
    with torch.no_grad():
        model[0].weight[1] = 0  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
        model[0].bias.copy_(torch.tensor([5.0, -1.0, 5.0]))  # pyright: ignore
    found = maximise(model, "1", [2, 1], (6,), steps=20)
    assert found.silent == (1,)
    assert found.values[1] == 0
    assert found.inputs.isfinite().all()


def test_total_variation_blur_and_jitter_smooth() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(1, 2, 7)
    rough = maximise(model, "", [0, 1], (1, 20, 20), **PLAIN)

    def variation(x: Tensor) -> Tensor:
        return (x.diff(dim=2).abs().sum((1, 2, 3)) + x.diff(dim=3).abs().sum((1, 2, 3))) / x.flatten(1).norm(dim=1)

    ways: list[dict[str, Any]] = [
        {"total_variation": 0.5, "jitter": 0},
        {**PLAIN, "blur_every": 1},
        {**PLAIN, "jitter": 3},
    ]
    for settings in ways:
        smooth = maximise(model, "", [0, 1], (1, 20, 20), **settings)
        assert (variation(smooth.inputs) < 0.9 * variation(rough.inputs)).all(), settings


def test_the_gradient_of_total_variation() -> None:
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def variation(x: Tensor) -> float:
        total = 0.0
        for c in range(2):
            for i in range(4):
                for j in range(5):
                    down = float(x[0, c, i + 1, j] - x[0, c, i, j]) if i < 3 else 0.0
                    right = float(x[0, c, i, j + 1] - x[0, c, i, j]) if j < 4 else 0.0
                    total += (down**2 + right**2 + 1e-6) ** 0.5
        return total

    found = _variation_gradient(x)
    for place in ((0, 0, 0, 0), (0, 1, 3, 4), (0, 1, 2, 2)):
        step = torch.zeros_like(x)
        step[place] = 1e-6
        assert float(found[place]) == pytest.approx((variation(x + step) - variation(x - step)) / 2e-6, rel=1e-5)


def test_the_blur_is_gaussian() -> None:
    from scipy.ndimage import gaussian_filter

    x = torch.randn(2, 3, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = gaussian_filter(x.numpy(), (0, 0, 1.3, 1.3), mode="nearest", radius=(0, 0, 4, 4))
    torch.testing.assert_close(_blurred(x, 1.3), torch.from_numpy(expected))


def test_inputs_without_places_are_not_smoothed() -> None:
    model = nn.Linear(9, 2)
    plain = maximise(model, "", [0, 1], (9,), steps=9, **PLAIN)
    smoothed = maximise(model, "", [0, 1], (9,), steps=9, blur_every=2)
    assert torch.equal(plain.inputs, smoothed.inputs)


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach() * 1.0


class Broken(nn.Module):
    """A root whose gradient at zero is infinite, or which leaves the numbers altogether."""

    def __init__(self, after: float) -> None:
        super().__init__()
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.abs() > self.after, torch.full_like(x, torch.nan), x) if self.after else (0 * x).sqrt()


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"layer": "1"}, LayerNotFoundError, "no layer '1'"),
        ({"units": 7}, DataError, "no unit 7: layer '0' has units 0 to 1"),
        ({"units": []}, DataError, "unit numbers"),
        ({"steps": 0}, DataError, "steps is 0"),
        ({"jitter": -1}, DataError, "jitter is -1"),
        ({"blur_every": 1.5}, DataError, "blur_every is 1.5"),
        ({"rate": 0}, DataError, "rate is 0; expected a number above 0"),
        ({"norm": float("nan")}, DataError, "norm is nan"),
        ({"l2": -1}, DataError, "l2 is -1; expected a number of at least 0"),
        ({"target": "max"}, DataError, "target is 'max'; expected 'mean' or 'centre'"),
        ({"bounds": (1.0, 1.0)}, DataError, "least value below the greatest"),
        ({"bounds": ([0.0, 1.0, 2.0], 5.0)}, DataError, "for all 4 channels or one each"),
        ({"bounds": 3}, DataError, "bounds is 3"),
        ({"model": nn.Sequential(Flat())}, DataError, "passes no gradient back"),
        ({"model": nn.Sequential(Broken(0.5))}, NotFiniteError, "activation of unit 0 of layer '0' became NaN"),
        ({"model": nn.Sequential(Broken(0))}, NotFiniteError, "gradient of unit 0 of layer '0' became NaN"),
    ],
)
def test_wrong_use(wrong: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = {"model": nn.Sequential(nn.Linear(4, 2)), "layer": "0", "units": 0, "example": (4,)}
    arguments |= {"norm": None, "steps": 40} | wrong
    if isinstance(arguments["model"][0], Broken):
        arguments["example"] = torch.full((1, 4), 0.1)
    with pytest.raises(error, match=words):
        maximise(**arguments)


def test_numbers_of_tokens_follow_no_gradient() -> None:
    with pytest.raises(DataError, match="only floating-point inputs can follow a gradient"):
        maximise(nn.Embedding(5, 3), "", 0, torch.zeros(1, 4, dtype=torch.int64))

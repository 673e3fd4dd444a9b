import copy
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from isthmus import zoo
from isthmus.base.batches import batches as read
from isthmus.base.evaluation import choose_measures
from isthmus.base.interpolation import combine, span
from isthmus.merge import connect
from isthmus.merge.paths.first_layer import FirstLayer
from isthmus.merge.paths.large_layers import large_layers, linear
from isthmus.merge.paths.measuring import MEMORY, grouped, measure_points

ALPHAS = np.linspace(0, 1, 7).tolist()
ROWS = [(1 - alpha, alpha) for alpha in ALPHAS]


def images(count=37, size=9, shape=(1, 9, 9), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *shape, generator=generator)
    y = torch.randint(4, (count,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


class Normalised(nn.Module):
    """Normalises its input within, in place; its first layer is a linear one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.3))
        self.fc = nn.Linear(81, 12)
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        x -= self.mean
        return self.out(torch.tanh(self.fc(x.flatten(1))))


class Shifted(Normalised):
    """The same, but its shift depends on the point: the input of its first layer does as well."""

    def __init__(self):
        super().__init__()
        self.mean = torch.rand(())


class Twice(nn.Module):
    """Runs its first layer on two inputs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(81, 12)
        self.out = nn.Linear(12, 4)

    def forward(self, x):
        x = x.flatten(1)
        return self.out(torch.relu(self.fc(x)) * self.fc(x.flip(1)))


class Late(nn.Module):
    """Overwrites its input after the first layer has read it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(81, 4)
        self.register_buffer("scale", torch.rand(()))

    def forward(self, x):
        x = x.flatten(1)
        found = self.fc(x)
        x.data.mul_(0)
        return found * (self.scale + x.sum())


class Mapped(nn.Module):
    """Runs a layer inside of vmap, where tensors have no values."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(81, 4)

    def forward(self, x):
        return torch.vmap(self.fc)(x.flatten(1))


class Cast(nn.Module):
    """Runs its first layer under autocast."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(81, 4)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.fc(x.flatten(1)).float()


def convolutional(padding_mode: Any = "zeros"):
    return nn.Sequential(
        nn.Conv2d(1, 5, 8, padding=2, padding_mode=padding_mode), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(180, 4)
    )


NETWORKS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(81, 12), nn.ReLU(inplace=True), nn.Linear(12, 4)),
    "layer alone": lambda: nn.Sequential(nn.Flatten(), nn.Linear(81, 4, bias=False)),
    "convolution": convolutional,
    "padded in a circle": lambda: convolutional("circular"),
    "narrow": lambda: nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten(), nn.Linear(245, 4)),
    "normalised": Normalised,
    "shifted": Shifted,
    "twice": Twice,
    "late": Late,
    "in vmap": Mapped,
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(81, 12), nn.Linear(12, 4)),
    "parametrised": lambda: nn.Sequential(
        nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(81, 12)), nn.Linear(12, 4)
    ),
    "statistics of the batch": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(81, 12), nn.BatchNorm1d(12, track_running_stats=False), nn.Linear(12, 4)
    ),
}


def pair(make) -> list[nn.Module]:
    nets = []
    with torch.random.fork_rng():
        for seed in (0, 1):
            torch.manual_seed(seed)
            net = make()
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module(torch.randn(20, 5, 3, 3))
            nets.append(net.eval())
    return nets


def plain(nets, data, alphas) -> np.ndarray:
    """Loss and accuracy by a loop in float64, a network built for each point."""
    doubles = [copy.deepcopy(net).double() for net in nets]
    rows = []
    for alpha in alphas:
        first, second = (net.state_dict() for net in doubles)
        between = copy.deepcopy(doubles[0])
        between.load_state_dict({name: (1 - alpha) * first[name] + alpha * second[name] for name in first})
        with torch.no_grad():
            outputs = [between(x.double()) for x, _ in data]
        y = torch.cat([y for _, y in data])
        logits = torch.cat(outputs)
        rows.append([float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).double().mean())])
    return np.array(rows)


def measure(nets, data, memory=MEMORY, alphas=ALPHAS):
    hull = span(nets)
    hull.model.eval()
    rows = [(1 - alpha, alpha) for alpha in alphas]
    return measure_points(hull, rows, data, choose_measures(None, None), memory)


@pytest.mark.parametrize("memory", [MEMORY, 12_000, 1])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_a_plain_loop_in_float64(name, memory):
    nets, data = pair(NETWORKS[name]), images(count=38)
    found = measure(nets, data, memory)
    np.testing.assert_allclose(found.means(), plain(nets, data, ALPHAS), rtol=1e-5, atol=1e-6)
    assert found.samples == 38


def test_autocast_inside_is_left_alone():
    nets, data = pair(Cast), images()
    found = measure(nets, data).means()
    assert found.tolist() == measure(nets, data, memory=1).means().tolist()


def count_products(monkeypatch, nets, data, memory=MEMORY):
    """How many samples pass a linear map of 81 inputs."""
    seen = 0
    real = F.linear

    def counting(x, weight, bias=None):
        nonlocal seen
        seen += len(x) * (weight.shape[1] == 81)
        return real(x, weight, bias)

    monkeypatch.setattr(F, "linear", counting)
    measure(nets, data, memory)
    return seen


def test_the_first_layer_costs_a_product_for_each_network(monkeypatch):
    data = images()
    assert count_products(monkeypatch, pair(NETWORKS["linear"]), data) == 2 * 37
    assert count_products(monkeypatch, pair(NETWORKS["normalised"]), data) == 2 * 37
    assert count_products(monkeypatch, pair(NETWORKS["linear"]), data, memory=1) == 7 * 37
    # a layer that reads something else at each point is tried once, and left to itself from the second point on
    assert count_products(monkeypatch, pair(NETWORKS["shifted"]), data) == 2 * 37 + 6 * 37


def test_the_scratch_network_is_as_it_was():
    hull = span(pair(NETWORKS["linear"]))
    with FirstLayer(hull, MEMORY):
        assert "forward" in vars(hull.model.get_submodule("1"))
    assert not any("forward" in vars(module) for module in hull.model.modules())
    layer = hull.model.get_submodule("1")
    with large_layers(hull.model), FirstLayer(hull, MEMORY):
        pass
    assert "forward" not in vars(layer)
    layer.forward = lambda x: torch.zeros(len(x), 12)  # somebody else's
    with large_layers(hull.model), FirstLayer(hull, MEMORY):
        assert not isinstance(layer.forward, partial)
        assert layer(torch.ones(2, 81)).sum() == 0
    vars(hull.model)["_compiled_call_impl"] = hull.model.forward  # as `compile()` sets it, which takes seconds
    with FirstLayer(hull, MEMORY):  # what is compiled is not reached into
        assert "forward" not in vars(hull.model.get_submodule("3"))


class Wide(nn.Module):
    """Large layers, some of them where only torch's own way will do."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.one, self.two, self.out = nn.Linear(81, 300), nn.Linear(300, 300, bias=False), nn.Linear(300, 4)

    def forward(self, x):
        x = torch.relu(self.one(x.flatten(1)))
        match self.how:
            case "plain":
                x = self.two(x)
            case "three axes":
                x = self.two(x[:, None].expand(-1, 3, -1).contiguous()).mean(1)
            case "not in a row":
                x = self.two(x.t().contiguous().t())
            case "in vmap":
                x = torch.vmap(self.two)(x)
            case "in autocast":
                with torch.autocast("cpu", torch.bfloat16):
                    x = self.two(x).float()
        return self.out(torch.relu(x))


@pytest.mark.parametrize("how", ["plain", "three axes", "not in a row", "in vmap", "in autocast"])
def test_large_layers_compute_the_same(how):
    nets, data = pair(lambda: Wide(how)), images(count=150, size=100)
    exact = pair(lambda: Wide("plain" if how == "in autocast" else how))
    rough = how == "in autocast"
    np.testing.assert_allclose(
        measure(nets, data).means()[:, 0], plain(exact, data, ALPHAS)[:, 0], rtol=0.01 if rough else 1e-5
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300), st.sampled_from([(130, 140), (64, 260), (1030, 16)]), st.booleans(), st.integers(0, 99))
def test_a_large_linear_map(count, shape, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(*sizes, generator=generator) for sizes in ((count, shape[1]), shape))
    shift = torch.randn(shape[0], generator=generator) if bias else None
    wanted = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, shift).double(), wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(linear(x.double(), weight.double(), None), F.linear(x.double(), weight.double()))
    weight.requires_grad_()
    assert linear(x, weight, shift).requires_grad  # gradients flow where they are asked for


def test_an_end_that_overflows_does_not_spoil_the_others():
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(81, 4)) for _ in range(2)]
    for net, value in zip(nets, (1.0, 3e38), strict=True):
        nn.init.constant_(net.get_parameter("1.weight"), value)
    data = [(torch.full((3, 1, 9, 9), 0.9), torch.tensor([0, 1, 2]))]
    with pytest.warns(UserWarning, match="NaN or infinite"):
        path = connect(nets[0], nets[1], data, points=5)
    assert path.finite[0]
    assert not path.finite[-1]


@pytest.mark.parametrize("size", [1, 5, 37])
def test_sizes_of_batches_and_of_memory_do_not_matter(size):
    nets = pair(NETWORKS["linear"])
    whole = measure(nets, images(size=37)).means()
    for memory in (MEMORY, 5_000, 1):
        np.testing.assert_allclose(measure(nets, images(size=size), memory).means(), whole, rtol=1e-6)


def test_a_loader_that_fills_the_same_tensor_again():
    nets, data = pair(NETWORKS["linear"]), images(count=36)

    def filling():
        x, y = torch.empty_like(data[0][0]), torch.empty_like(data[0][1])
        for images, labels in data:
            yield x.copy_(images), y.copy_(labels)

    assert measure(nets, filling()).means().tolist() == measure(nets, data).means().tolist()


def test_batches_are_gathered_by_their_size():
    data = images(count=36)
    sizes = [len(group) for group in grouped(read(iter(data)), 2 * 9 * 81 * 4, copy=True)]
    assert sizes == [2, 2]
    assert [len(group) for group in grouped(read(iter(data)), 1, copy=True)] == [1, 1, 1, 1]
    group = next(grouped(read(data), MEMORY, copy=False))
    assert group[0].args[0].data_ptr() == data[0][0].data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_of_low_precision(dtype):
    nets, data = pair(NETWORKS["linear"]), images()
    for net in nets:
        net.to(dtype)
    rounded = [(x.to(dtype), y) for x, y in data]
    found = measure(nets, rounded).means()
    np.testing.assert_allclose(found[:, 0], plain(nets, rounded, ALPHAS)[:, 0], rtol=0.02)


def test_tied_weights_and_integers():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(81, 81)
            self.two = nn.Linear(81, 81)
            self.two.weight = self.one.weight
            self.register_buffer("steps", torch.tensor(3))

        def forward(self, x):
            return self.two(self.one(x.flatten(1)).relu())[:, :4]

    nets, data = pair(Tied), images()
    nets[1].get_buffer("steps").fill_(9)
    hull = span(nets)
    assert "steps" not in hull.values
    np.testing.assert_allclose(measure(nets, data).means(), plain(nets, data, ALPHAS), rtol=1e-5)


def test_a_transformer_of_tokens_and_mappings():
    nets = [zoo.transformer(12, context=6, width=16, layers=1, heads=2, seed=seed).eval() for seed in (0, 1)]
    tokens = torch.randint(12, (10, 7), generator=torch.Generator().manual_seed(0))
    x, y = tokens[:, :-1], tokens[:, 1:].clone()
    y[3:, 4:] = -100
    data = list(zip(x.split(4), y.split(4), strict=True))
    path = connect(nets[0], nets[1], data, points=3)
    between = copy.deepcopy(nets[0])
    with torch.no_grad():
        for place, a, b in zip(*(net.parameters() for net in (between, *nets)), strict=True):
            place.copy_((a + b) / 2)
        logits = between(x).double()
    assert path.loss[1] == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), y.flatten())), rel=1e-5)
    counted = y != -100
    assert path.accuracy is not None
    assert path.accuracy[1] == pytest.approx(float((logits.argmax(-1) == y)[counted].double().mean()))
    assert path.contributions is not None
    assert path.contributions["loss"].weights.tolist() == counted.sum(1).tolist()

    class Hugging(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, input_ids):
            return SimpleNamespace(logits=self.net(input_ids))

    mappings = [{"input_ids": x, "labels": y} for x, y in data]
    wrapped = connect(Hugging(nets[0]), Hugging(nets[1]), mappings, points=3)
    np.testing.assert_allclose(wrapped.loss, path.loss, rtol=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.floats(-2, 2), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_an_affine_combination(seed, others, dtype):
    generator = torch.Generator().manual_seed(seed)
    coefficients = [1 - sum(others), *others]
    values = [torch.randn(5, generator=generator, dtype=torch.float64).to(dtype) for _ in coefficients]
    for value in values[1:]:
        value[0] = values[0][0]
    found = combine(values, coefficients, torch.empty(5, dtype=dtype))
    wanted = sum(c * value.double() for c, value in zip(coefficients, values, strict=True))
    scale = max(map(abs, coefficients)) * 10
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=scale * torch.finfo(dtype).eps * 4)
    assert found[0] == values[0][0]
    for index, value in enumerate(values):
        corner = [float(index == other) for other in range(len(values))]
        assert torch.equal(combine(values, corner, torch.empty(5, dtype=dtype)), value)

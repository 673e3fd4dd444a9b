"""Scale symmetries, against exponents derived by hand, outputs in float64 and the minimum found by an optimiser."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from isthmus.align import symmetry
from isthmus.align.scales import canonical
from isthmus.align.scales.canonical import canonical_scales
from isthmus.align.scales.groups import Place, Scale, ScaleGroups, apply_scales
from isthmus.align.scales.homogeneity import scale_groups
from isthmus.base.errors import ArchitectureError, DataError, SymmetryError
from isthmus.zoo import resnet

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double()
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
TOKENS = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0)).double()


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 and evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter[0].numel(), 1) ** 0.5)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                noise = torch.randn(buffer.shape, generator=generator)
                buffer.copy_(noise.abs() + 0.5 if name.endswith("var") else 0.3 * noise)
    return model.double().eval()


def mlp(*widths: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise((6, *widths)):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 3))


def found_in(model: nn.Module, inputs: Tensor) -> ScaleGroups:
    return scale_groups(model, symmetry(model, inputs), inputs)


def exponents(scale: Scale) -> dict[str, int]:
    """By tensor and axis; a tensor that is read in several parts counts once."""
    return {f"{place.name}:{place.dim}": place.exponent for place in scale.places}


def apart(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max(float((x.double() - y.double()).abs().max() / y.double().abs().max().clamp_min(1e-9)) for x, y in pairs)


def change(model: nn.Module, other: nn.Module, inputs: Any) -> float:
    with torch.no_grad():
        before, after = model(inputs), other(inputs)
    return float((before - after).abs().max() / before.abs().max())


# What is homogeneous


@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU, lambda: nn.PReLU(init=0.2), nn.Identity, nn.Dropout])
def test_homogeneous_units_have_a_scale(act: Callable[[], nn.Module]) -> None:
    model = drawn(mlp(7, 5, act=act))
    found = found_in(model, X)
    assert [scale.name for scale in found.scales] == ["0", "2"]
    assert exponents(found.scales[0]) == {"0.weight:0": 1, "0.bias:0": 1, "2.weight:1": -1}
    assert exponents(found.scales[1]) == {"2.weight:0": 1, "2.bias:0": 1, "4.weight:1": -1}
    assert not found.left_out


@pytest.mark.parametrize(
    "act",
    [
        nn.GELU,
        nn.Tanh,
        nn.Sigmoid,
        nn.SiLU,
        nn.ELU,
        lambda: nn.Softmax(-1),
        lambda: nn.LayerNorm(7, elementwise_affine=False),
        nn.Softplus,
    ],
)
def test_others_are_left_out_with_the_reason(act: Callable[[], nn.Module]) -> None:
    model = drawn(nn.Sequential(nn.Linear(6, 7), act(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)))
    found = found_in(model, X)
    assert [scale.name for scale in found.scales] == ["2"]
    assert list(found.left_out) == ["0"]
    assert "not positively homogeneous" in found.left_out["0"]


def test_a_rectifier_that_saturates_is_found_out_by_large_factors() -> None:
    for seed in range(3):
        found = scale_groups(model := drawn(mlp(7, act=nn.ReLU6), seed), symmetry(model, X), X, seed=seed)
        assert not found.scales
        assert "homogeneous near zero only" in found.left_out["0"]


def test_max_pooling_and_flattening_are_homogeneous() -> None:
    model = drawn(
        nn.Sequential(
            *(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 4, 1), nn.LeakyReLU(), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(4, 2)),
        )
    )
    found = found_in(model, IMAGES)
    assert [exponents(scale) for scale in found.scales] == [
        {"0.weight:0": 1, "0.bias:0": 1, "3.weight:1": -1},
        {"3.weight:0": 1, "3.bias:0": 1, "7.weight:1": -1},
    ]


def test_units_that_nothing_reads_are_left_out() -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.out = nn.Linear(6, 4), nn.Linear(6, 5), nn.Linear(4, 2)
            self.more = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.one(x).relu()) + 0 * self.more(self.two(x).relu())

    model = drawn(Deaf())
    found = scale_groups(model, symmetry(model, X, verify=False), X)
    assert [scale.name for scale in found.scales] == ["one"]
    assert found.left_out == {"two": "the outputs do not depend on it"}


class Powers(nn.Module):
    """Squared rectifiers, gated units, a tied square layer."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.up = nn.Linear(6, 5), nn.Linear(5, 8)
        self.down = nn.Linear(4, 3)
        self.own = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(self.square(x).relu().square()).chunk(2, -1)
        x = self.down(value * gate.relu()).relu()
        return self.head((x + self.own(x)).relu())


def test_exponents_of_squares_gates_and_streams() -> None:
    model = drawn(Powers())
    found = found_in(model, X)
    by_name = {scale.name: scale for scale in found.scales}
    assert exponents(by_name["square"]) == {"square.weight:0": 1, "square.bias:0": 1, "up.weight:1": -2}
    value, gate = by_name["up"], by_name["up at up.weight"]
    for scale, part in ((value, 0), (gate, 1)):
        assert {(p.name, p.part, p.exponent) for p in scale.places} == {
            ("up.weight", part, 1),
            ("up.bias", part, 1),
            ("down.weight", 0, -1),
        }
    assert {(p.name, p.dim, p.exponent) for p in by_name["down"].places} == {
        ("down.weight", 0, 1),
        ("down.bias", 0, 1),
        ("own.weight", 0, 1),
        ("own.weight", 1, -1),
        ("own.bias", 0, 1),
        ("head.weight", 1, -1),
    }
    form = canonical_scales(model, X, scales=found)
    again = canonical_scales(
        apply_scales(model, found.random(torch.Generator().manual_seed(1)), found), X, scales=found
    )
    assert apart(again.model, form.model) < 1e-8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.o = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.k = nn.Linear(6, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_units_inside_heads_have_scales_of_their_own() -> None:
    model = drawn(Attention())
    found = found_in(model, TOKENS)
    by_name = {scale.name: scale for scale in found.scales}
    assert {place.name: place.exponent for place in by_name["q:2"].places} == {
        "q.weight": 1,
        "q.bias": 1,
        "k.weight": -1,
    }
    assert {place.name: place.exponent for place in by_name["v"].places} == {"v.weight": 1, "v.bias": 1, "o.weight": -1}
    assert set(by_name) == {"q:2", "v"}
    assert found.left_out == {"q": "its units are rescaled one by one, in the groups inside it"}
    assert found.shape(by_name["v"]) == (2, 4)
    factors = found.random(torch.Generator().manual_seed(0))
    rescaled = apply_scales(model, factors, found)
    assert change(model, rescaled, TOKENS) < 1e-12
    moved = model.get_parameter("v.weight") * factors["v"].reshape(-1, 1)
    assert torch.allclose(rescaled.get_parameter("v.weight"), moved)
    form = canonical_scales(model, TOKENS, scales=found)
    weight, bias, out = (form.model.get_parameter(name) for name in ("v.weight", "v.bias", "o.weight"))
    assert torch.allclose((weight.square().sum(1) + bias.square()).sqrt(), out.norm(dim=0))


# Batch norms


def test_a_batch_norm_has_a_scale_before_it_and_one_after() -> None:
    model = drawn(
        nn.Sequential(
            *(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4, affine=False)),
            *(nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)),
        )
    )
    found = found_in(model, IMAGES)
    by_name = {scale.name: exponents(scale) for scale in found.scales}
    assert by_name == {
        "0 at 0.weight": {"0.weight:0": 1, "0.bias:0": 1, "1.running_mean:0": 1, "1.running_var:0": 2},
        "0": {"1.weight:0": 1, "1.bias:0": 1, "3.weight:1": -1},
        "3 at 3.weight": {"3.weight:0": 1, "3.bias:0": 1, "4.running_mean:0": 1, "4.running_var:0": 2},
    }
    assert list(found.left_out) == ["3"]
    assert "only where a norm takes the factors off again" in found.left_out["3"]
    assert {place.shift for scale in found.scales for place in scale.places} == {0.0, 1e-5}


def test_a_residual_network_with_batch_norms_is_brought_to_its_canonical_form() -> None:
    model = drawn(resnet(8, 1, shortcut="conv", seed=0))
    found = found_in(model, IMAGES)
    assert not found.left_out
    # one before each of the 9 norms, one for each of the 3 streams and the 3 inner layers
    assert len(found.scales) == 15
    rescaled = apply_scales(model, found.random(torch.Generator().manual_seed(1)), found)
    assert change(model, rescaled, IMAGES) < 1e-12
    assert apart(model, rescaled) > 0.5
    for rule in ("balanced", "unit"):
        one, other = (canonical_scales(m, IMAGES, scales=found, rule=rule) for m in (model, rescaled))
        assert one.error < 1e-12
        assert change(model, one.model, IMAGES) < 1e-12
        assert apart(one.model, other.model) < 1e-9
        for name, buffer in one.model.named_buffers():
            if name.endswith("running_var"):
                assert torch.allclose(buffer + 1e-5, torch.ones_like(buffer))


def test_weights_whose_scale_a_norm_takes_off_get_norm_one() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(5, 2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    model = model.double().eval()
    found = found_in(model, X)
    direction = "0.parametrizations.weight.original1"
    assert [exponents(scale) for scale in found.scales] == [
        {"0.bias:0": 1, "0.parametrizations.weight.original0:0": 1, "2.weight:1": -1},
        {f"{direction}:0": 1},
    ]
    form = canonical_scales(model, X, scales=found)
    assert torch.allclose(form.model.get_parameter(direction).norm(dim=1), torch.ones(5).double())
    assert change(model, form.model, X) < 1e-12


# The canonical form


@given(st.integers(0, 10_000), st.sampled_from(["balanced", "unit"]), st.integers(2, 6), st.integers(2, 6))
@settings(max_examples=6, deadline=None)
def test_it_is_unique_idempotent_and_the_same_function(seed: int, rule: str, n: int, m: int) -> None:
    model = drawn(mlp(n, m), seed)
    found = scale_groups(reference := drawn(mlp(n, m), 1), symmetry(reference, X, verify=False), X)
    if found.left_out:  # a handful of rectifiers may all be off
        return
    factors = found.random(torch.Generator().manual_seed(seed), spread=2.0)
    rescaled = apply_scales(model, factors, found)
    assert change(model, rescaled, X) < 1e-10
    one, other = (canonical_scales(network, X, scales=found, rule=rule) for network in (model, rescaled))
    again = canonical_scales(one.model, X, scales=found, rule=rule)
    assert apart(one.model, other.model) < 1e-8
    assert apart(again.model, one.model) < 1e-8
    assert all(torch.allclose(f, torch.ones_like(f), atol=1e-8) for f in again.factors.values())
    assert change(model, one.model, X) < 1e-10
    assert apart(apply_scales(model, one.factors, found), one.model) < 1e-9


def norms(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Of the weights into and out of the hidden units, all layers one after the other."""
    layers = [layer.requires_grad_(False) for layer in model.modules() if isinstance(layer, nn.Linear)]
    into = torch.cat([(layer.weight.square().sum(1) + layer.bias.square()).sqrt() for layer in layers[:-1]])
    return into, torch.cat([layer.weight.norm(dim=0) for layer in layers[1:]])


def test_balanced_has_equal_norms_and_the_smallest_of_all() -> None:
    model = drawn(mlp(5, 7, 4), 2)
    found = canonical_scales(model, X)
    into, out = norms(found.model)
    assert torch.allclose(into, out)
    # the same minimum by gradient descent on the logarithms of factors
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    logs = [torch.zeros(layer.out_features, dtype=torch.float64, requires_grad=True) for layer in layers[:-1]]
    optimiser = torch.optim.LBFGS(logs, max_iter=300, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def total() -> Tensor:
        ends = [torch.zeros(6).double(), *logs, torch.zeros(3).double()]
        return torch.stack(
            [
                (layer.weight.detach() * (ends[at + 1][:, None] - ends[at]).exp()).square().sum()
                + (layer.bias.detach() * ends[at + 1].exp()).square().sum()
                for at, layer in enumerate(layers)
            ]
        ).sum()

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = total()
        value.backward()
        return value

    optimiser.step(closure)
    smallest = sum(float(p.detach().square().sum()) for p in found.model.parameters())
    assert smallest == pytest.approx(float(total().detach()), rel=1e-8)
    assert smallest < sum(float(p.detach().square().sum()) for p in model.parameters())
    for log, factor in zip(logs, found.factors.values(), strict=True):
        assert torch.allclose(log.detach().exp(), factor, rtol=1e-5)


def test_unit_has_incoming_norm_one() -> None:
    into, _ = norms(canonical_scales(drawn(mlp(5, 7, 4), 2), X, rule="unit").model)
    assert torch.allclose(into, torch.ones(16).double())


@pytest.mark.parametrize("rule", ["balanced", "unit"])
def test_units_without_weights_on_one_side_are_brought_to_norm_one_on_the_other(rule: str) -> None:
    model = drawn(mlp(5, 4), 2)
    found = found_in(model, X)
    with torch.no_grad():
        model.get_parameter("2.weight")[:, 0] = 0
        model.get_parameter("0.weight")[1] = 0
        model.get_parameter("0.bias")[1] = 0
        model.get_parameter("0.weight")[2], model.get_parameter("0.bias")[2] = 0, 0
        model.get_parameter("2.weight")[:, 2] = 0
    rescaled = apply_scales(model, found.random(torch.Generator().manual_seed(1)), found)
    one, other = (canonical_scales(network, X, scales=found, rule=rule) for network in (model, rescaled))
    assert apart(one.model, other.model) < 1e-8
    into, out = norms(one.model)
    assert into[0] == pytest.approx(1)
    assert out[1] == pytest.approx(1)
    assert into[2] == out[2] == 0


def test_networks_in_single_precision_and_tied_weights_stay_as_they_are() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 6)
            self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.down(self.up(self.table(tokens)).relu()))

    tokens = torch.arange(11)[None]
    model = drawn(Tied()).float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = canonical_scales(model, tokens)
    # what the embedding writes, the decoder's weights are
    table = next(scale for scale in found.scales.scales if any(p.name == "table.weight" for p in scale.places))
    assert {place.name: place.exponent for place in table.places} == {
        "table.weight": 1,
        "up.weight": -1,
        "down.weight": -1,
        "down.bias": -1,
    }
    result: Any = found.model
    assert result.head.weight is result.table.weight
    assert result.head.weight.dtype == torch.float32
    assert torch.allclose(result(tokens), model(tokens), atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    rescaled: Any = apply_scales(model, found.scales.random(torch.Generator().manual_seed(0), 0.3), found.scales)
    assert rescaled.head.weight is rescaled.table.weight
    assert torch.allclose(rescaled(tokens), model(tokens), atol=1e-4)


def test_the_same_seed_gives_the_same() -> None:
    model = drawn(mlp(5, 4))
    one, other = (canonical_scales(model, X, seed=2) for _ in range(2))
    assert all(torch.equal(one.factors[name], other.factors[name]) for name in one.factors)
    first, second = (found_in(model, X).random(torch.Generator().manual_seed(0)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_scales_of_one_tensor_have_names_of_their_own() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 12), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            a, b, c = self.up(x).chunk(3, -1)
            return self.down(a * b.relu() * c)

    model = drawn(Gated())
    found = found_in(model, X)
    assert [scale.name for scale in found.scales] == ["up", "up at up.weight", "up at up.weight'"]
    assert {place.part for scale in found.scales for place in scale.places if place.name == "up.weight"} == {0, 1, 2}
    assert change(model, apply_scales(model, found.random(), found), X) < 1e-12


# What is refused


def test_a_rule_that_does_not_converge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = drawn(mlp(5, 4, 6))
    monkeypatch.setattr(canonical, "_SWEEPS", 2)
    with pytest.raises(SymmetryError, match="'balanced' did not converge in 2 sweeps"):
        canonical_scales(model, X)


def test_wrong_factors_and_rules_are_refused() -> None:
    model = drawn(mlp(5, 4))
    found = found_in(model, X)
    for factors, message in (
        ({"1": torch.ones(5)}, "there is no scale 1; known: 0, 2"),
        ({"0": torch.ones(4)}, r"factors of 0 have shape \(4,\), expected \(5,\)"),
        ({"0": -torch.ones(5)}, "must be positive and finite"),
        ({"0": torch.full((5,), float("inf"))}, "must be positive and finite"),
    ):
        with pytest.raises(ArchitectureError, match=message):
            apply_scales(model, factors, found)
    with pytest.raises(DataError, match="did you mean balanced"):
        canonical_scales(model, X, rule="balance")
    with pytest.raises(ArchitectureError, match="the model"):
        canonical_scales(drawn(mlp(5, 3)), X, scales=found)


def test_scales_that_do_not_hold_are_refused() -> None:
    model = drawn(mlp(5, act=nn.Tanh))
    claim = Scale("0", "0", (Place("0.weight", 0, 0, 1), Place("0.bias", 0, 0, 1), Place("2.weight", 0, 1, -1)))
    wrong = ScaleGroups(symmetry(model, X), (claim,), {})
    with pytest.raises(SymmetryError, match="outputs of the rescaled network differ"):
        canonical_scales(model, X, scales=wrong)


def test_a_network_that_cannot_be_differentiated_is_refused() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.relu(self.up(x))).detach()

    model = drawn(Cut())
    with pytest.raises(SymmetryError, match="cannot be differentiated"):
        found_in(model, X)

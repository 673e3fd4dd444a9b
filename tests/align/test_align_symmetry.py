"""The symmetry of networks: what it is by hand, that it holds, and that a wrong one is caught."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus import zoo
from isthmus.align import Symmetry, symmetry
from isthmus.align.terms import Arranged, Fixed, Product, Sum, Units, groups_of, pieces
from isthmus.base.architecture import full_state
from isthmus.base.errors import ArchitectureError, IsthmusError, SymmetryError


def shape_of(found: Symmetry) -> dict[str, tuple[int, str]]:
    return {group.name: (group.size, group.kind) for group in found.groups}


def rewritten(found: Symmetry, name: str, axis: int, change: Any) -> Symmetry:
    terms = list(found.layout[name])
    terms[axis] = change(terms[axis])
    return dataclasses.replace(found, layout={**found.layout, name: tuple(terms)})


# What it is


def test_groups_are_those_derived_by_hand(case: Any) -> None:
    found = symmetry(case.model(), case.data())
    assert shape_of(found) == case.groups
    assert {group.name: group.within for group in found.groups if group.within} == case.within


def test_every_symmetry_holds(case: Any) -> None:
    model = case.model()
    report = symmetry(model, case.data(), verify=False).verify(model, case.data())
    assert report.check() is report
    assert report.error < 1e-10
    assert report.sensitivity > 1e-2
    assert report.failing == report.insensitive == ()


def left_behind(term: Any, group: str) -> Any:
    if isinstance(term, Arranged):
        return Arranged(left_behind(term.part, group), term.order)
    if isinstance(term, (Product, Sum)):
        return type(term)(tuple(left_behind(part, group) for part in term.parts))
    return Fixed(term.size) if isinstance(term, Units) and term.group == group else term


def test_every_axis_is_needed(case: Any) -> None:
    """Leaving any group behind on any single axis is noticed, and the group is named."""
    model = case.model()
    found = symmetry(model, case.data(), verify=False)
    tried = set()
    for group in found.groups:
        for name, axis in group.axes:
            if any(group.name in found.within[other] for other in groups_of(found.layout[name])):
                continue  # the orders inside the blocks would not be defined
            wrong = rewritten(found, name, axis, lambda term, group=group: left_behind(term, group.name))
            report = wrong.verify(model, case.data())
            assert report.error > 1e-4, (name, axis)
            assert group.name in report.failing, (name, axis)
            with pytest.raises(SymmetryError, match="changes the outputs"):
                report.check()
            tried.add(group.name)
    assert tried >= {group.name for group in found.groups} - {name for group in found.groups for name in group.within}


def test_a_group_that_is_split_in_two_is_noticed(cases: dict[str, Any]) -> None:
    case = cases["residual"]
    model = case.model()
    found = symmetry(model, case.data(), verify=False)
    group = found.by_name["stem"]
    other = dataclasses.replace(group, name="invented")
    wrong = dataclasses.replace(found, groups=(*found.groups, other))
    for name in ("down.1.weight", "down.1.bias", "head.weight"):
        axis = 1 if name == "head.weight" else 0
        wrong = rewritten(wrong, name, axis, lambda term: Units("invented", term.size))
    report = wrong.verify(model, case.data())
    assert set(report.failing) == {"stem", "invented"}
    with pytest.raises(SymmetryError, match="permuting group stem, invented changes the outputs"):
        report.check()


def test_two_groups_that_are_confused_are_noticed() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    found = symmetry(model, x, verify=False)
    wrong = rewritten(found, "2.weight", 0, lambda term: Units("0", term.size))
    report = wrong.verify(model, x)
    assert report.failing == ("0", "2")


def test_blocks_taken_for_free_channels_are_noticed(cases: dict[str, Any]) -> None:
    for name, size in (("group norm", 12), ("grouped conv", 12)):
        case = cases[name]
        model = case.model()
        found = symmetry(model, case.data(), verify=False)
        free = Units("free", size)
        layout = {
            key: tuple(free if term == Product((Units("0", 4), Units("0:2", 3))) else term for term in terms)
            for key, terms in found.layout.items()
        }
        axes = tuple((key, at) for key, terms in layout.items() for at, term in enumerate(terms) if term == free)
        groups = (*found.groups, dataclasses.replace(found.groups[0], name="free", size=size, kind="free", axes=axes))
        report = dataclasses.replace(found, groups=groups, layout=layout).verify(model, case.data())
        assert "free" in report.failing


def test_a_tied_weight_permuted_under_one_of_its_names_is_noticed(cases: dict[str, Any]) -> None:
    case = cases["tied embedding"]
    model = case.model()
    found = symmetry(model, case.data(), verify=False)
    assert found.layout["head.weight"] == found.layout["table.weight"]
    wrong = rewritten(found, "head.weight", 1, lambda term: Fixed(term.size))
    assert wrong.verify(model, case.data()).failing == ("back",)


def test_layouts_say_how_axes_are_made(cases: dict[str, Any]) -> None:
    def layout(name: str, parameter: str) -> Any:
        case = cases[name]
        return symmetry(case.model(), case.data()).layout[parameter]

    assert layout("mlp", "2.weight") == (Units("2", 10), Units("0", 12))
    assert layout("flatten", "4.weight") == (Units("4", 8), Product((Units("0", 6), Fixed(2), Fixed(2))))
    assert layout("group norm", "1.weight") == (Product((Units("0", 4), Units("0:2", 3))),)
    assert layout("grouped conv", "2.weight")[:2] == (Product((Units("0", 4), Units("2", 2))), Units("0:2", 3))
    assert layout("glu", "up.weight")[0] == Sum((Units("up", 8), Units("up", 8)))
    dense = (Units("first", 4), Units("second", 3))
    assert layout("dense", "norm.running_var") == (Sum(dense),)
    assert layout("dense", "head.weight")[1] == Sum((*dense, Units("third", 5)))
    padded = Arranged(Sum((Units("widen", 4), Units("stem", 4))), (0, 1, 4, 5, 6, 7, 2, 3))
    assert layout("padded shortcut", "widen.weight")[0] == padded
    assert layout("tied square", "first.weight") == (Units("stem", 8), Units("stem", 8))


def test_buffers_belong_to_their_channels(cases: dict[str, Any]) -> None:
    case = cases["conv and batch norm"]
    found = symmetry(case.model(), case.data())
    assert found.by_name["0"].axes == (
        *(("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0), ("4.weight", 1)),
        *(("1.running_mean", 0), ("1.running_var", 0)),
    )
    assert found.layout["1.num_batches_tracked"] == ()


def test_resnet20_has_nine_inner_groups_and_three_streams() -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = symmetry(zoo.resnet(20, seed=0), x)
    # per stage of 16, 32, 64 channels: a stream, and the inner layer of each of its three blocks
    assert sorted(group.size for group in found.groups) == [16] * 4 + [32] * 4 + [64] * 4
    assert {group.kind for group in found.groups} == {"free"}


def test_resnet20_with_padded_shortcuts_nests_its_streams() -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = symmetry(zoo.resnet(20, shortcut="pad", seed=0), x)
    # nine inner layers; the stream of 16 is widened by 8 on each side, which are one group of 16, and the 32 by 16 on
    # each side, one group of 32
    assert sorted(group.size for group in found.groups) == [16] * (3 + 1 + 1) + [32] * (3 + 1) + [64] * 3
    (stream,) = found.layout["linear.weight"][1:]
    assert isinstance(stream, Arranged)
    edges = pieces([stream])
    assert [dim.size for piece in edges for dim in piece.dims] == [32, 16, 16]
    outer, inner, first = (at.tolist() for piece in edges for at in piece.positions if at is not None)
    assert outer == [*range(16), *range(48, 64)]
    assert inner == [*range(16, 24), *range(40, 48)]
    assert first == list(range(24, 40))


def test_the_graph_joins_axes_to_their_groups(case: Any) -> None:
    found = symmetry(case.model(), case.data())
    edges = {(("axis", name, axis), ("group", g.name)) for g in found.groups for name, axis in g.axes}
    assert {tuple(sorted(edge, key=lambda node: node[0])) for edge in found.graph.edges} == edges
    for group in found.groups:
        assert found.graph.nodes["group", group.name]["size"] == group.size
        assert found.graph.degree["group", group.name] == len(group.axes)


def test_random_draws_are_uniform_over_the_whole_symmetry(cases: dict[str, Any]) -> None:
    case = cases["depthwise"]
    found = symmetry(case.model(), case.data(), verify=False)
    generator = torch.Generator().manual_seed(0)
    draws = [found.random(generator) for _ in range(400)]
    # one of two orders inside each of the five blocks, independently: 32 equally likely
    inner = {tuple(draw.indices["7"].flatten().tolist()) for draw in draws}
    assert len(inner) == 32
    first = torch.stack([draw.indices["5"] for draw in draws])
    for unit in range(5):
        counts = first[:, unit].bincount(minlength=5)
        assert ((counts > 50) & (counts < 110)).all()  # 80 ± 3.8 standard deviations
    assert found.random(torch.Generator().manual_seed(3)) == found.random(torch.Generator().manual_seed(3))


# What is pinned, and why


class Wrapped(nn.Module):
    """A hidden layer of 8 units, a function of them, a linear layer."""

    def __init__(self, function: Any, out: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.odd = Function(function)
        self.down = nn.Linear(out, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.odd(self.up(x)))


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("operator", "function", "out"),
    [
        ("trace", lambda x: x * x.trace(), 8),
        ("linalg_inv_ex", lambda x: torch.linalg.inv(torch.eye(8, dtype=x.dtype) + 0.1 * x @ x.T) @ x, 8),
        ("linalg_qr", lambda x: torch.linalg.qr(x).Q, 8),
    ],
)
def test_an_operator_without_a_rule_pins_and_is_named(operator: str, function: Any, out: int) -> None:
    model = Wrapped(function, out)
    found = symmetry(model, X)
    if operator != "linalg_inv_ex":  # which has a rule for nothing, but is given what was summed over the units
        assert found.groups == ()
        held = {(item.name, item.axis) for item in found.unruled}
        assert {("up.weight", 0), ("up.bias", 0)} <= held
    for item in found.unruled:
        assert item.operator == operator
        assert item.reason == f"no rule for {operator} in odd"
    assert found.verify(model, X).check().error < 1e-10


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, torch.tensor([7, 6, 5, 4, 3, 2, 1, 1])],
        lambda x: x + x.argsort(-1).to(x),
        lambda x: x * torch.arange(8).to(x),
        lambda x: x * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]).to(x),
        lambda x: x @ torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).to(x),
        lambda x: x + x.argmax(-1, keepdim=True).to(x),
    ],
    ids=["index of some", "argsort", "arange", "constant", "fixed matrix", "argmax"],
)
def test_what_looks_at_single_units_pins_them(function: Any) -> None:
    model = Wrapped(function)
    found = symmetry(model, X)
    assert found.groups == ()
    assert {("up.weight", 0), ("down.weight", 1)} <= {(item.name, item.axis) for item in found.pinned}
    assert all(item.reason for item in found.pinned)


@pytest.mark.parametrize(
    ("function", "sizes"),
    [
        (lambda x: torch.cat([x[:, 3:], x[:, :3]], 1), [3, 5]),  # two segments that change places
        (lambda x: x[:, ::2].repeat(1, 2), [4]),  # every second; the others are not used
        (lambda x: torch.cat([x[:, :4] * x[:, 4:], x[:, 4:]], 1), [4]),  # halves tied by the product
        (lambda x: x[:, torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])], [8]),  # other orders of the same units
        (lambda x: x.index_select(1, torch.tensor([0, 2, 1, 3, 4, 5, 6, 7])), [8]),
        (lambda x: x.flip(-1), [8]),
        (lambda x: x.roll(1, -1), [8]),
        (lambda x: x + x.flip(-1), []),  # unit i meets unit 7 - i
        (lambda x: torch.cat([x[:, :1] * 2, x[:, 1:3].flip(1), x[:, 3:].cumsum(1)], 1), [2]),
        (lambda x: x.view(8, 2, 4).transpose(1, 2).reshape(8, 8), [2, 4]),  # a channel shuffle
        (lambda x: torch.cat([x.view(8, 2, 4).mean(1)] * 2, 1), [2, 4]),
        (lambda x: x.unflatten(1, (2, 4)).softmax(-1).flatten(1), [2, 4]),
        (lambda x: torch.stack([x, x.relu()]).sum(0), [8]),
        (lambda x: sum(part.sum(1, keepdim=True) * x for part in x.split([3, 5], 1)), [3, 5]),
        (lambda x: torch.where(x > 0, x, 0.1 * x).clamp(max=2.0).pow(2), [8]),
        (lambda x: x - x.logsumexp(-1, keepdim=True) + x.amax(-1, keepdim=True), [8]),
        (lambda x: x.select(1, 2)[:, None] * x, [2, 5]),
        (lambda x: F.pad(x, (1, -1)), []),
        (lambda x: x.unbind(1)[0][:, None] + x.var(1, keepdim=True).expand(8, 8), []),
        (lambda x: torch.einsum("ni,nj->nij", x, x).sum(1), [8]),
        (lambda x: x.mul_(2.0).add_(1.0), [8]),
        (lambda x: x.max(1, keepdim=True).values * x, [8]),
        (lambda x: torch.max(x, -x) + torch.min(x) + x.max(), [8]),
        (lambda x: torch.bmm(x[:, :, None], x[:, None, :]).mean(2), [8]),
        (lambda x: torch.baddbmm(x[:, :, None], x[:, :, None], x[:, None, :1]).squeeze(2), [7]),
        (lambda x: x * torch.addmv(x[:, 0], x, x[0])[:, None], [7]),
        (lambda x: x * torch.mv(x, x[0])[:, None] * torch.dot(x[0], x[1]), [8]),
        (lambda x: x * x[:1].squeeze().unsqueeze(0), [8]),
        (lambda x: x.view(torch.int64).view(x.dtype) if x.dtype == torch.float64 else x.view(torch.int32).float(), []),
        (lambda x: x.new_zeros(8, 8).copy_(x) + torch.zeros_like(x) + torch.ones(8, dtype=x.dtype), [8]),
        (lambda x: torch.cat([x[:, :3].clone().zero_(), x[:, 3:]], 1), [3, 5]),
        (lambda x: torch.zeros(8, 8, dtype=x.dtype).index_copy(0, torch.arange(8), x), [8]),
        (lambda x: F.dropout(x, 0.5, training=False) * x.std(1, keepdim=True), [8]),
        (lambda x: x[:, :0].sum() + x, [8]),
        (lambda x: F.interpolate(x.view(8, 2, 2, 2), scale_factor=2.0).mean((2, 3)).repeat_interleave(4, 1), [2]),
        (lambda x: F.max_pool1d(x[:, :, None].expand(8, 8, 3), 3).squeeze(-1), [8]),
        (lambda x: F.avg_pool1d(x, 3, 1, 1), []),
        (lambda x: F.layer_norm(x.view(8, 2, 4), (2, 4)).flatten(1), [2, 4]),
        (lambda x: F.layer_norm(x, (8,)), [8]),
        (lambda x: F.batch_norm(x, None, None, training=True), [8]),
        (lambda x: F.instance_norm(x.view(8, 4, 2)).flatten(1), [2, 4]),
    ],
)
def test_what_is_left_of_a_hidden_layer(function: Any, sizes: list[int]) -> None:
    """Of 8 hidden units what the function leaves to be permuted; the outputs agree in any case."""
    model = Wrapped(function)
    found = symmetry(model, X, verify=False)
    assert found.verify(model, X).error < 1e-10
    read = {name: g.size for g in found.groups for name in [g.name] if ("up.weight", 0) in g.axes}
    assert sorted(read.values()) == sizes


def test_inputs_outputs_and_the_unused_are_pinned() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.spare = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(5, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).relu())

    found = symmetry(Model(), X)
    kinds = {(item.name, item.axis): item.kind for item in found.pinned}
    assert kinds["up.weight", 1] == "input"
    assert kinds["down.weight", 0] == kinds["down.bias", 0] == "output"
    assert kinds["spare.weight", 0] == kinds["spare.weight", 1] == kinds["spare.bias", 0] == "unused"
    assert shape_of(found) == {"up": (8, "free")}
    sizes = {(item.name, item.axis): item.size for item in found.pinned}
    assert sizes["up.weight", 1] == 6
    assert found.unruled == ()


@pytest.mark.parametrize(
    "wrap", [lambda h, y: (h, y), lambda h, y: {"hidden": h, "y": y}, lambda h, y: [y, (y, {"h": h})]]
)
def test_all_outputs_are_pinned_whatever_holds_them(wrap: Any) -> None:
    class Both(Wrapped):
        def forward(self, x: Tensor) -> Any:
            return wrap(self.up(x), super().forward(x))

    found = symmetry(Both(torch.tanh), X)
    assert found.groups == ()
    assert {item.kind for item in found.pinned if item.name == "up.bias"} == {"output"}


def test_kernel_offsets_are_pinned_as_positions(cases: dict[str, Any]) -> None:
    case = cases["conv and batch norm"]
    held = [item for item in symmetry(case.model(), case.data()).pinned if item.name == "0.weight"]
    assert [(item.axis, item.size, item.kind) for item in held] == [
        *((1, 2, "input"), (2, 3, "position"), (3, 3, "position")),
    ]
    assert held[1].operator == "convolution"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_mode_of_the_caller_makes_no_difference(mode: Any, case: Any) -> None:
    model, x = case.model(), case.data()
    expected = symmetry(model, x)
    with mode():
        found = symmetry(model, x.clone())
        assert not torch.is_grad_enabled()
    assert found.groups == expected.groups
    assert found.layout == expected.layout


# What cannot be traced or proved


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)
        self.gate = Function(lambda x: x if x.sum() > 0 else -x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(self.up(x)))


def test_a_course_that_depends_on_data_is_refused_with_the_module() -> None:
    model = Branching()
    with pytest.raises(SymmetryError, match=r"module 'gate', its course depends on the values of tensors"):
        symmetry(model, X)


def test_inputs_that_the_model_cannot_take_are_refused() -> None:
    with pytest.raises(
        SymmetryError, match=r"Sequential could not be traced on inputs of shape \(3, 5\): in module '0'"
    ):
        symmetry(nn.Sequential(nn.Linear(6, 4)), torch.zeros(3, 5))
    with pytest.raises(SymmetryError, match="expected a tensor, a tuple of positional inputs or a mapping"):
        symmetry(nn.Linear(6, 4), "x")


def test_inputs_by_position_and_by_keyword() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(8, 4)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.head((self.left(left) * self.right(right)).tanh())

    y = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    for inputs in ((X, y), [X, y], {"left": X, "right": y}):
        assert shape_of(symmetry(Two(), inputs)) == {"left": (8, "free")}


@pytest.mark.parametrize("factor", [0.0, 1e-30])
def test_a_network_with_vanished_activations_is_refused(factor: float) -> None:
    """It gives the same outputs whatever is permuted, so that nothing would be proved."""
    model = Wrapped(lambda x: factor * x)
    found = symmetry(model, X, verify=False)
    report = found.verify(model, X)
    assert report.error <= report.tolerance
    assert not report.passed
    with pytest.raises(SymmetryError, match="nothing is proved"):
        symmetry(model, X)


def test_a_group_that_never_reaches_the_outputs_is_refused_by_name() -> None:
    class Vanishing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.side, self.back, self.down = (
                *(nn.Linear(6, 8), nn.Linear(6, 7), nn.Linear(7, 8), nn.Linear(8, 4)),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).tanh() + 0.0 * self.back(self.side(x)))

    model = Vanishing()
    report = symmetry(model, X, verify=False).verify(model, X)
    assert report.insensitive == ("side",)
    with pytest.raises(SymmetryError, match="do not depend on group side, so nothing is proved about it"):
        report.check()


def test_a_network_at_zero_initialisation_is_perturbed_before_it_is_checked() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert shape_of(symmetry(model, X)) == {"0": (8, "free")}
    assert all(not parameter.any() for parameter in model.parameters())


@pytest.mark.parametrize("seed", range(5))
def test_a_small_layer_of_rectified_units_that_are_off_is_woken(seed: int) -> None:
    model = nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model.get_parameter("0.bias").fill_(-2.0)
    assert not model[:2](X[:1]).all()
    assert shape_of(symmetry(model, X[:1])) == {"0": (2, "free"), "2": (3, "free")}


def test_a_symmetry_of_another_network_is_refused(cases: dict[str, Any]) -> None:
    found = symmetry(cases["mlp"].model(), cases["mlp"].data())
    with pytest.raises(ArchitectureError, match="the symmetry and the model are not the same architecture"):
        found.verify(cases["glu"].model(), cases["glu"].data())


# What is left behind


def test_the_model_is_untouched(case: Any) -> None:
    model = case.model()
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    hooks = [0]
    model.register_forward_hook(lambda *_: hooks.__setitem__(0, hooks[0] + 1))
    before = copy.deepcopy(full_state(model))
    modes = [module.training for module in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    symmetry(model, case.data())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in full_state(model).items())
    assert len(model._forward_hooks) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules() if m is not model)


def test_the_model_is_untouched_after_an_error() -> None:
    model = Branching().train()
    with pytest.raises(IsthmusError):
        symmetry(model, X)
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_inputs_are_untouched(cases: dict[str, Any]) -> None:
    x = cases["mlp"].data()
    before = x.clone()
    symmetry(cases["mlp"].model(), x)
    assert torch.equal(x, before)


def test_the_result_is_the_same_twice(case: Any) -> None:
    found = [symmetry(case.model(), case.data(), verify=False) for _ in range(2)]
    assert found[0].to_json() == found[1].to_json()
    reports = [found[0].verify(case.model(), case.data()) for _ in range(2)]
    assert reports[0] == reports[1]


# Files


def test_a_symmetry_survives_its_file(case: Any, tmp_path: Path) -> None:
    model = case.model()
    found = symmetry(model, case.data())
    read = Symmetry.load(found.save(tmp_path / "net.json"))
    assert read.to_json() == found.to_json()
    assert (read.groups, read.pinned, read.layout, read.points) == (
        *(found.groups, found.pinned, found.layout, found.points),
    )
    assert read.verify(model, case.data()).passed
    seeds = [torch.Generator().manual_seed(7) for _ in range(2)]
    assert read.random(seeds[0]) == found.random(seeds[1])


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": "isthmus symmetry 1"}', "\x00\xff"])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(SymmetryError, match="is not a saved symmetry"):
        Symmetry.load(path)
    with pytest.raises(SymmetryError, match="is not a saved symmetry"):
        Symmetry.load(tmp_path / "none.json")

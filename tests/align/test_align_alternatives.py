"""Networks that a plain call does not show: other tracers, several examples, groups added and held by hand."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus import zoo
from isthmus.align import Symmetry, symmetry
from isthmus.align.overrides import add_group, hold_groups
from isthmus.align.terms import Fixed, Product, Sum, Units
from isthmus.base.errors import IsthmusError, SymmetryError

GRAPHS = ("export", "make_fx", "make_fx_real")


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (5, 4)), generator=torch.Generator().manual_seed(0))


def sizes(found: Symmetry) -> dict[str, int]:
    return {group.name: group.size for group in found.groups}


class Three(nn.Module):
    """Two hidden layers of six units, which subclasses use in different ways."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(4, 6)
            self.second = nn.Linear(6, 6)
            self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.second(self.first(x).relu()).relu())


# The same by every tracer


class Residual(nn.Module):
    """A small ResNet with a downsampling shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.inner = nn.Sequential(nn.Conv2d(6, 5, 3, 2, 1), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
        self.outer = nn.Sequential(nn.Conv2d(5, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.down = nn.Sequential(nn.Conv2d(6, 8, 1, 2), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(self.outer(self.inner(x)) + self.down(x)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.qkv = nn.ModuleList(nn.Linear(8, 12) for _ in range(3))
        self.out = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (layer(x).unflatten(-1, (3, 4)).transpose(1, 2) for layer in self.qkv)
        weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        return self.head(self.norm(x + self.out((weights @ v).transpose(1, 2).flatten(2))))


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 6)
        self.right = nn.Linear(3, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, *, left: Tensor, right: Tensor, scale: float = 1.0) -> dict[str, Any]:
        hidden = torch.tanh(self.left(left) + self.right(right))
        return {"logits": self.head(hidden), "hidden": (hidden, scale)}


def dropping() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)
    )


NETWORKS: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "residual": (Residual, (x(2, 3, 8, 8),), {"stem.0": 6, "inner.0": 5, "outer.0": 8}),
    # 3 heads; in each 4 units of queries and keys, and 4 of values
    "attention": (Attention, (x(2, 5, 4),), {"embed": 8, "qkv.0": 3, "qkv.0:2": 4, "qkv.2": 4}),
    "dropout": (dropping, x(), {"0": 6, "4": 5}),
    "keywords, mapping": (Keywords, {"right": x(5, 3), "left": x(), "scale": 2.0}, {"left": 6}),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("tracer", GRAPHS)
def test_every_tracer_shows_the_same(name: str, tracer: str) -> None:
    make, inputs, expected = NETWORKS[name]
    torch.manual_seed(0)
    model = make().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found, plain = symmetry(model, inputs, tracer=tracer), symmetry(model, inputs)
    assert sizes(found) == expected
    assert (found.groups, found.layout, found.points) == (plain.groups, plain.layout, plain.points)
    assert {(p.name, p.axis, p.size) for p in found.pinned} == {(p.name, p.axis, p.size) for p in plain.pinned}
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("tracer", GRAPHS)
@pytest.mark.parametrize("name", ["tied square", "grouped conv", "dense", "glu", "tied embedding"])
def test_hand_derived_groups_do_not_depend_on_the_tracer(cases: dict[str, Any], name: str, tracer: str) -> None:
    case = cases[name]
    found = symmetry(case.model(), case.data(), tracer=tracer, verify=False)
    assert {group.name: (group.size, group.kind) for group in found.groups} == case.groups


def test_tracers_need_no_memory_where_there_are_no_weights() -> None:
    with torch.device("meta"):
        model, inputs = Three(), torch.empty(5, 4)
    for tracer in ("run", "export", "make_fx"):
        assert sizes(symmetry(model, inputs, tracer=tracer, verify=False)) == {"first": 6, "second": 6}
    with pytest.raises(SymmetryError, match="meta device"):
        symmetry(model, inputs, tracer="make_fx_real", verify=False)


def test_reasons_name_modules_in_every_tracer() -> None:
    class Sorted(Three):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(self.first(x)))

        def __init__(self) -> None:
            super().__init__()
            self.inner = Cumulated()

    class Cumulated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.logcumsumexp(x, -1)

    for tracer in ("run", *GRAPHS):
        found = symmetry(Sorted(), x(), tracer=tracer, verify=False)
        assert found.groups == ()
        held = next(item for item in found.pinned if (item.name, item.axis) == ("first.weight", 0))
        assert held.operator == "logcumsumexp"
        assert "in inner" in held.reason


def test_an_unknown_tracer_is_refused() -> None:
    with pytest.raises(SymmetryError, match="no tracer 'exprt'; did you mean export"):
        symmetry(Three(), x(), tracer="exprt")


def test_what_a_forward_pass_stores_is_not_left_behind() -> None:
    class Cached(Three):
        def forward(self, x: Tensor) -> Tensor:
            self.last = self.first(x).relu()
            self.count += 1
            return self.head(self.second(self.last))

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

    for tracer in ("run", *GRAPHS):
        model = Cached()
        assert sizes(symmetry(model, x(), tracer=tracer)) == {"first": 6, "second": 6}
        assert not hasattr(model, "last")
        assert model.get_buffer("count") == 0


# A course that depends on values


class Branches(Three):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        if hidden.sum() > 0:
            hidden = self.second(hidden).relu()
        return self.head(hidden)


class Steered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Branches()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_a_course_that_depends_on_values_is_refused_or_followed() -> None:
    for tracer in ("run", "export", "make_fx"):
        with pytest.raises(SymmetryError, match=r"body.*depends on the values") as caught:
            symmetry(Steered(), x(), tracer=tracer)
        if tracer == "run":
            assert "_local_scalar_dense" in str(caught.value)
    assert sizes(symmetry(Steered(), x(), tracer="make_fx_real")) == {"body.first": 6, "body.second": 6}


def test_other_courses_can_be_given_as_well() -> None:
    class Other(Branches):
        """Where the inputs are small the second layer is left out, so that both have one order."""

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).relu()
            if x.abs().sum() > 1:
                hidden = self.second(hidden).relu()
            return self.head(hidden)

    small = 1e-3 * x()
    alone = symmetry(Other(), x(), tracer="make_fx_real", verify=False)
    both = symmetry(Other(), x(), tracer="make_fx_real", also=[small], verify=False)
    assert sizes(alone) == {"first": 6, "second": 6}
    assert sizes(both) == {"first": 6}
    assert both.layout["second.weight"] == (Units("first", 6), Units("first", 6))


def test_a_single_unit_that_is_looked_at_stays_in_place() -> None:
    class First(Three):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            if hidden[0, 0].item() > -100:
                hidden = self.second(hidden)
            return self.head(hidden)

    found = symmetry(First(), x(), tracer="make_fx_real")
    assert sizes(found).get("first", 0) <= 5
    term = found.layout["first.weight"][0]
    assert isinstance(term, Fixed) or (isinstance(term, Sum) and term.parts[0] == Fixed(1))


def test_lists_and_positions_hold_what_they_were_read_from() -> None:
    class Listed(Three):
        def forward(self, x: Tensor) -> Tensor:
            strength = self.first.weight.abs().sum(1).tolist()
            order = sorted(range(6), key=lambda at: strength[at])
            return self.head(self.second(self.first(x)[:, order]))

    class Largest(Three):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            at = int(hidden[0].argmax())
            return self.head(self.second(hidden) + hidden[:, at : at + 1])

    for kind in (Listed, Largest):
        found = symmetry(kind(), x(), tracer="make_fx_real")
        assert sizes(found) == {"second": 6}
        assert found.layout["first.weight"][0] == Fixed(6)


def test_picking_by_masks_leaves_channels_free() -> None:
    class Masked(Three):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).relu()
            chosen = x.sum(1) > 0
            out = torch.zeros(len(x), 3, dtype=x.dtype)
            out[chosen] = self.head(self.second(hidden[chosen]))
            return out

    class Sent(Three):
        """As in mixtures of experts: rows are gathered, computed and added back."""

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).relu()
            (rows,) = torch.where(x[:, 0] > 0)
            return self.head(hidden.index_add(0, rows, self.second(hidden[rows]).relu()))

    assert sizes(symmetry(Masked(), x(), tracer="make_fx_real")) == {"first": 6, "second": 6}
    assert sizes(symmetry(Sent(), x(), tracer="make_fx_real")) == {"first": 6}


def test_values_that_leave_torch_are_refused() -> None:
    class Array(Three):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x)) * float(self.first.bias.detach().numpy().max()))

    with pytest.raises(SymmetryError, match=r"shape \(6,\) leaves torch as an array"):
        symmetry(Array(), x(), tracer="make_fx_real")


def test_a_forward_pass_that_fails_is_a_typed_error() -> None:
    class Broken(Three):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.head(self.first(x)))

    for tracer in GRAPHS:
        with pytest.raises(SymmetryError, match=r"module 'second'.*another tracer: 'run'"):
            symmetry(Broken(), x(), tracer=tracer)


# Higher-order operators and exported programs


class Conditional(Three):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.head(torch.cond(hidden.sum() > 0, lambda h: self.second(h).relu(), torch.sin, (hidden,)))


class Modes(Three):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.first(x).relu()
        with torch.enable_grad():
            hidden = self.second(hidden.float())
        return self.head(hidden)


def exported(model: nn.Module, *args: Any, **kwargs: Any) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(model, args, kwargs, strict=False)


def test_both_branches_of_a_condition_are_followed() -> None:
    program = exported(Conditional().eval(), x())
    assert sizes(symmetry(program, x())) == {"first": 6}  # the other branch keeps the order of the first layer
    assert sizes(symmetry(Conditional(), x(), tracer="export", verify=False)) == {"first": 6}


def test_bodies_in_other_modes_are_followed() -> None:
    for tracer in GRAPHS:
        assert sizes(symmetry(Modes(), x(), tracer=tracer)) == {"first": 6, "second": 6}


def test_a_loop_is_refused_by_name() -> None:
    from torch._higher_order_ops.while_loop import while_loop

    class Loop(Three):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            _, hidden = while_loop(lambda n, h: n < 3, lambda n, h: (n + 1, h.sin()), (torch.tensor(0), hidden))
            return self.head(hidden)

    with pytest.raises(SymmetryError, match="while_loop"):
        symmetry(Loop(), x(), tracer="export")


def test_an_exported_program_has_the_symmetry_of_its_network() -> None:
    for name, (make, inputs, expected) in NETWORKS.items():
        torch.manual_seed(0)
        model = make().eval()
        args, kwargs = (
            ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
        )
        program = exported(model, *args, **kwargs)
        plain = symmetry(model, inputs)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # which torch raises about itself
            decomposed = program.run_decompositions()
        for variant in (program, decomposed):
            found = symmetry(variant, dict(reversed(inputs.items())) if isinstance(inputs, dict) else inputs)
            assert sizes(found) == expected, name
            assert found.layout == plain.layout
            permuted = found.random(torch.Generator().manual_seed(1)).apply(model)
            same = plain.random(torch.Generator().manual_seed(1)).apply(model)
            pairs = zip(permuted.parameters(), same.parameters(), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_inputs_that_do_not_belong_to_a_program_are_refused() -> None:
    program = exported(Keywords().eval(), left=x(), right=x(5, 3))
    with pytest.raises(SymmetryError, match=r"keywords \['left', 'right'\].*given are 1 and \[\]"):
        symmetry(program, x())


def test_a_program_exported_in_training_mode_is_refused() -> None:
    with pytest.raises(SymmetryError, match=r"dropout.*in 3 draws at random.*eval\(\)"):
        symmetry(exported(dropping().train(), x()), x())


# Several examples and chosen outputs


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(4, 6)
        self.text = nn.Linear(3, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> Tensor:
        hidden = self.image(image) if image is not None else self.text(text)
        return self.head(torch.tanh(hidden))


@pytest.mark.parametrize("tracer", ["run", *GRAPHS])
def test_several_examples_hold_together(tracer: str) -> None:
    model = TwoInputs()
    image, text = {"image": x()}, {"text": x(5, 3)}
    one = symmetry(model, image, tracer=tracer)
    assert {item.kind for item in one.pinned if item.name == "text.weight"} == {"unused"}
    both = symmetry(model, image, also=[text], tracer=tracer)
    assert both.groups[0].axes == tuple(
        (f"{n}", a)
        for n, a in [("image.weight", 0), ("image.bias", 0), ("text.weight", 0), ("text.bias", 0), ("head.weight", 1)]
    )


def test_further_examples_come_in_a_list() -> None:
    with pytest.raises(SymmetryError, match="also is a Tensor; expected a list"):
        symmetry(Three(), x(), also=x())  # type: ignore[arg-type]


@pytest.mark.parametrize("tracer", ["run", *GRAPHS])
def test_outputs_that_do_not_matter_may_be_permuted(tracer: str) -> None:
    class Two(Three):
        def forward(self, x: Tensor) -> Any:
            hidden = self.first(x)
            return self.head(self.second(hidden)), hidden

    assert sizes(symmetry(Two(), x(), tracer=tracer)) == {"second": 6}
    found = symmetry(Two(), x(), outputs=0, tracer=tracer)
    assert sizes(found) == {"first": 6, "second": 6}
    assert found.outputs == (0,)


# Overrides


@torch.library.custom_op("isthmus_alternatives::squash", mutates_args=())
def squash(x: Tensor) -> Tensor:
    """No rule knows this operator, which treats all entries alike."""
    return x.tanh()


squash.register_fake(torch.empty_like)


class Hidden(Three):
    """A hidden layer that its operator pins."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.up = nn.Linear(4, 7)
            self.down = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(squash(self.up(x))) + self.head(self.second(self.first(x)))


RIGHT = [("up.weight", 0), ("up.bias", 0), ("down.weight", 1)]


def test_a_group_can_be_added() -> None:
    plain = symmetry(Hidden(), x())
    assert sizes(plain) == {"first": 6, "second": 6}
    (held,) = [item for item in plain.pinned if (item.name, item.axis) == RIGHT[0]]
    assert held.operator.endswith("squash")
    found = symmetry(Hidden(), x(), add={"hidden": [("up.weight", 0), ("up.bias", -1), ("down.weight", -1)]})
    assert found.by_name["hidden"].axes == tuple(RIGHT)
    assert found.layout["up.weight"] == (Units("hidden", 7), Fixed(4))
    assert not {(item.name, item.axis) for item in found.pinned} & set(RIGHT)
    permuted = found.random(torch.Generator().manual_seed(0)).apply(Hidden())
    assert not torch.equal(permuted.up.weight, Hidden().up.weight)
    torch.testing.assert_close(permuted(x()), Hidden()(x()))


@pytest.mark.parametrize("axes", [RIGHT[:2], RIGHT[1:], [("down.weight", 0), ("down.bias", 0)]])
def test_a_wrong_group_is_caught_by_name(axes: list[tuple[str, int]]) -> None:
    with pytest.raises(SymmetryError, match="group hidden"):
        symmetry(Hidden(), x(), add={"hidden": axes})


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ([], "has no axes"),
        ([("up.wieght", 0)], "no parameter or buffer 'up.wieght'; did you mean up.weight"),
        ([("up.weight", 2)], r"up.weight of shape \(7, 4\) has no axis 2"),
        (
            [("up.weight", 0), ("down.weight", 0)],
            "axis 0 of down.weight has 3 positions, but axis 0 of up.weight has 7",
        ),
        (["up.weight"], r"no \(parameter or buffer, axis\) pair"),
    ],
)
def test_a_group_that_cannot_be_is_refused(axes: list[Any], message: str) -> None:
    with pytest.raises(SymmetryError, match=message) as caught:
        symmetry(Hidden(), x(), add={"hidden": axes}, verify=False)
    assert isinstance(caught.value, IsthmusError)
    assert "hidden" in str(caught.value)


def test_what_has_a_group_gets_no_second_one() -> None:
    found = symmetry(Three(), x())
    with pytest.raises(SymmetryError, match=r"axis 0 of first.weight belongs to group first.*hold=\['first'\]"):
        add_group(found, "mine", [("first.weight", 0)])
    with pytest.raises(SymmetryError, match="group 'first' exists already"):
        add_group(found, "first", [("head.weight", 0)])


def test_a_tied_tensor_is_added_under_all_its_names(cases: dict[str, Any]) -> None:
    case = cases["tied embedding"]
    plain = symmetry(case.model(), case.data())
    name = next(group.name for group in plain.groups if ("table.weight", 1) in group.axes)
    axes = [axis for axis in plain.by_name[name].axes if axis[0] != "head.weight"]
    found = symmetry(case.model(), case.data(), hold=name, add={"again": axes})
    assert set(found.by_name["again"].axes) == set(plain.by_name[name].axes)
    assert found.layout["head.weight"] == found.layout["table.weight"]


def test_a_group_can_be_held() -> None:
    plain = symmetry(Three(), x())
    for hold in ("first", ["first"], ("second.weight", 1), [("first.bias", 0)]):
        found = symmetry(Three(), x(), hold=hold)
        assert sizes(found) == {"second": 6}
        assert found.by_name["second"] == plain.by_name["second"]
        assert {(p.name, p.axis, p.size) for p in found.pinned if p.kind == "held"} == {
            ("first.weight", 0, 6),
            ("first.bias", 0, 6),
            ("second.weight", 1, 6),
        }
        assert all(point.term != Units("first", 6) for point in found.points)
    assert plain.is_verified
    assert not hold_groups(plain, "first").is_verified
    assert hold_groups(plain, [("head.weight", 0)]) is plain


def test_holding_what_is_not_there_is_refused() -> None:
    with pytest.raises(SymmetryError, match="no group 'frist'; did you mean first"):
        symmetry(Three(), x(), hold=["frist"])
    with pytest.raises(SymmetryError, match=r"hold: first.bias of shape \(6,\) has no axis 1"):
        symmetry(Three(), x(), hold=[("first.bias", 1)])


def test_what_lies_within_a_held_group_keeps_one_order() -> None:
    torch.manual_seed(0)
    plain = symmetry(Attention(), x(2, 5, 4))
    heads = next(group for group in plain.groups if any(group.name in g.within for g in plain.groups))
    inner = [group.name for group in plain.groups if heads.name in group.within]
    assert len(inner) == 2
    found = symmetry(Attention(), x(2, 5, 4), hold=heads.name)
    assert [found.by_name[name].kind for name in inner] == ["free", "free"]
    assert found.layout["qkv.0.weight"][0] == Product((Fixed(3), Units(inner[0], 4)))
    held = [item for item in found.pinned if item.kind == "held"]
    assert {item.size for item in held} == {3}
    # what it draws is in the symmetry that it was taken from
    drawn = found.random(torch.Generator().manual_seed(0))
    wider = {
        g.name: drawn.indices[g.name].expand(3, -1) if g.within else drawn.indices.get(g.name, torch.arange(3))
        for g in plain.groups
    }
    torch.manual_seed(0)
    model = Attention()
    expected = dataclasses.replace(plain.identity(), indices={k: v.clone() for k, v in wider.items()}).apply(model)
    assert all(torch.equal(a, b) for a, b in zip(drawn.apply(model).parameters(), expected.parameters(), strict=True))


def test_a_held_group_can_be_stated_anew() -> None:
    plain = symmetry(Three(), x())
    found = symmetry(Three(), x(), hold="first", add={"mine": plain.by_name["first"].axes})
    assert sizes(found) == {"second": 6, "mine": 6}
    assert not [item for item in found.pinned if item.kind == "held"]
    saved = Symmetry.from_json(copy.deepcopy(found.to_json()))
    assert saved.groups == found.groups


def test_the_reference_network_is_the_same_by_export() -> None:
    model, inputs = zoo.resnet(width=4), x(2, 3, 32, 32)
    assert symmetry(model, inputs, tracer="export", verify=False).layout == symmetry(model, inputs, verify=False).layout


def test_what_cannot_be_permuted_is_not_added() -> None:
    class Buffered(Three):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("unsaved", torch.ones(6), persistent=False)
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.gain * super().forward(x)

    found = symmetry(Buffered(), x(), verify=False)
    with pytest.raises(SymmetryError, match="a state dict does not hold unsaved"):
        add_group(found, "mine", [("unsaved", 0)])
    with pytest.raises(SymmetryError, match="axis 0 of gain has size 1: nothing to permute"):
        add_group(found, "mine", [("gain", 0)])

"""The inputs that drive each unit: against a pass over all data at once, in integers, so that ties are ties."""

from __future__ import annotations

import doctest
import importlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from isthmus.align.units.top_inputs import TopInputs, top_inputs
from isthmus.align.units.watching import as_units, watching
from isthmus.base.errors import DataError, LayerNotFoundError, NotFiniteError


@pytest.mark.parametrize(
    "name", ["watching", "top_inputs", "receptive_field", "maximisation", "contact_sheet", "seeing"]
)
def test_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = doctest.testmod(importlib.import_module(f"isthmus.align.units.{name}"))
    assert result.failed == 0, capsys.readouterr().out
    assert result.attempted > 0


def whole_numbers(model: nn.Module, seed: int = 0) -> nn.Module:
    """Small integers as weights: sums are exact whatever the batch, and equal activations occur."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randint(-2, 3, weight.shape, generator=generator))
    return model


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 6)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        del attention_mask
        return self.mix(input_ids)


class Twice(nn.Module):
    """One module that runs twice, and a part of a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.pair = nn.ReLU(), Pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(self.relu(2 - self.relu(x)))["b"][0]


class Pair(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"a": None, "b": (x + 1, 3 * x)}


def brute(activations: Tensor, count: int, largest: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort all samples, (N, units, *places), by their best place; earlier first where equal."""
    flat = activations.double().numpy().reshape(*activations.shape[:2], -1)
    sign = 1 if largest else -1
    best = (sign * flat).max(2)
    order = np.stack([np.lexsort((np.arange(len(best)), -best[:, unit])) for unit in range(best.shape[1])])[:, :count]
    where = (sign * flat).argmax(2)
    places = np.stack(np.unravel_index(where, activations.shape[2:]), -1) if activations.ndim > 2 else None
    units = np.arange(best.shape[1])[:, None]
    found = np.zeros((*order.shape, 0)) if places is None else places[order, units]
    return sign * best[order, units], order, found


def check(top: TopInputs, activations: Tensor, data: Tensor, count: int, largest: bool = True) -> None:
    values, indices, positions = brute(activations, count, largest)
    np.testing.assert_array_equal(top.values.numpy(), values)
    np.testing.assert_array_equal(top.indices.numpy(), indices)
    np.testing.assert_array_equal(top.positions.numpy(), positions)
    assert top.values.dtype == torch.float64
    assert top.samples == len(data)
    assert set(top.kept) == set(indices.ravel().tolist())
    for row, unit in enumerate(top.units.tolist()):
        assert torch.equal(top.inputs(unit), data[indices[row].tolist()])


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 23),
    count=st.integers(1, 25),
    largest=st.booleans(),
    form=st.sampled_from(["vector", "tokens", "map", "map before an in-place ReLU", "map after it"]),
    seed=st.integers(0, 5),
)
def test_equals_a_sort_of_all_data(batch: int, count: int, largest: bool, form: str, seed: int) -> None:
    torch.manual_seed(seed)
    if form in ("vector", "tokens"):
        model = whole_numbers(nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True)), seed)
        layer, shape = "0", (4,) if form == "vector" else (3, 4)
    else:
        model = whole_numbers(nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2)), seed)
        layer, shape = {"map": "2", "map after it": "1"}.get(form, "0"), (2, 4, 5)
    data = torch.randint(-2, 3, (20, *shape)).float()
    with torch.no_grad():
        own = data
        for module in list(model.children())[: int(layer) + 1]:  # pyright: ignore[reportArgumentType]
            own = module(own.clone()).clone()
    own = own.movedim(-1, 1) if form == "tokens" else own
    top = top_inputs(model, list(data.split(batch)), layer, count=count, largest=largest)
    check(top, own, data, count, largest)
    assert top.spatial == tuple(own.shape[2:])


def test_some_units_are_rows_of_all() -> None:
    model, data = whole_numbers(nn.Linear(4, 6)), torch.randn(30, 4)
    every, some = top_inputs(model, data, "", count=3), top_inputs(model, data.split(7)[0:], "", units=[4, 1], count=3)
    assert some.units.tolist() == [4, 1]
    assert torch.equal(some.indices, every.indices[[4, 1]])
    assert torch.equal(some.inputs(1), every.inputs(1))
    assert len(some.kept) <= 2 * 3
    assert repr(some) == "TopInputs(: 3 largest of 2 units; 30 samples)"
    with pytest.raises(DataError, match="unit 0 of layer '' was not asked for; there are 4, 1"):
        some.inputs(0)


def test_no_more_inputs_are_kept_than_win() -> None:
    model, kept = nn.Linear(1, 1, bias=False), []
    nn.init.ones_(model.weight)
    data = torch.arange(100.0)[:, None]  # each beats all before
    hook = model.register_forward_hook(lambda *_: kept.append(1))
    top = top_inputs(model, list(data.split(10)), "", count=4)
    hook.remove()
    assert len(kept) == 10  # one pass
    assert list(top.kept) == [96, 97, 98, 99]
    assert top.inputs(0).flatten().tolist() == [99, 98, 97, 96]


def test_padding_never_wins() -> None:
    model = whole_numbers(Tokens())
    x, mask = torch.randint(-3, 4, (9, 5, 4)).float(), torch.ones(9, 5, dtype=torch.int64)
    mask[::2, 3:] = 0
    batches = [{"input_ids": x[part], "attention_mask": mask[part]} for part in (slice(4), slice(4, 9))]
    with torch.no_grad():
        own = model.mix(x).movedim(-1, 1)  # pyright: ignore[reportCallIssue]
    for largest in (True, False):
        shut = own.masked_fill(mask[:, None] == 0, -torch.inf if largest else torch.inf)
        check(top_inputs(model, batches, "mix", count=4, largest=largest), shut, x, 4, largest)
    check(top_inputs(model, batches, "mix", count=4, mask=None), own, x, 4)
    with torch.no_grad():
        weight, bias = model.parameters()
        weight[2], bias[2] = torch.tensor([1.0, 0, 0, 0]), 0
        x[..., 0] = torch.where(mask == 1, 5.0, 99.0)
    assert top_inputs(model, batches, "mix").constant == (2,)
    assert top_inputs(model, batches, "mix", mask=None).constant == ()
    named = top_inputs(model, batches, "mix", count=2, inputs="attention_mask")
    assert torch.equal(named.inputs(0), mask[named.indices[0]])
    with pytest.raises(DataError, match="no mask 'attention_masks'; did you mean attention_mask"):
        top_inputs(model, batches, "mix", mask="attention_masks")
    with pytest.raises(DataError, match="no input 'ids' of 4 samples"):
        top_inputs(model, batches, "mix", inputs="ids")


def test_named_calls_and_parts() -> None:
    model, data = Twice(), torch.randint(-3, 4, (12, 4)).float()
    check(top_inputs(model, data, "relu"), data.relu(), data, 9)
    check(top_inputs(model, data, "relu#2", largest=False), (2 - data.relu()).relu(), data, 9, False)
    check(top_inputs(model, data, "pair[b][1]"), 3 * (2 - data.relu()).relu(), data, 9)
    check(top_inputs(model, data, "pair"), 1 + (2 - data.relu()).relu(), data, 9)  # the first of its outputs


def test_units_on_another_axis() -> None:
    data = torch.randint(-9, 10, (8, 3, 6)).float()
    check(top_inputs(nn.Identity(), data, "", unit_axis=1, count=2), data, data, 2)
    check(top_inputs(nn.Identity(), data, "", count=2), data.movedim(-1, 1), data, 2)


def test_units_that_do_not_vary_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())
    nn.init.constant_(model[0].bias, 0.0)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        model[0].bias[1] = -1e4  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    top = top_inputs(model, list(torch.randn(10, 1, 5, 5).split(3)), "1", units=[2, 1], count=3)
    assert top.constant == (1,)
    assert top.indices[1].tolist() == [0, 1, 2]


def test_the_network_is_as_before() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout())
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    top_inputs(model, torch.randn(5, 1, 4, 4), "1")
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model._forward_pre_hooks
    assert not model[1]._forward_hooks


def test_inputs_of_different_lengths_are_kept_one_by_one() -> None:
    top = top_inputs(nn.Linear(2, 3), [torch.randn(2, 4, 2), torch.randn(2, 6, 2)], "", count=4)
    assert sorted(len(x) for x in top.kept.values()) == [4, 4, 6, 6]
    with pytest.raises(DataError, match=r"unit 0 have shapes \(4, 2\) and \(6, 2\)"):
        top.inputs(0)


class Uneven(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if len(x) == 3 else x[:1]


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"layer": "conf"}, LayerNotFoundError, "no layer 'conf'; did you mean conv"),
        ({"units": [0, 3]}, DataError, "no unit 3: layer 'conv' has units 0 to 2"),
        ({"units": [-1]}, DataError, "no unit -1"),
        ({"units": [0.5]}, DataError, "expected unit numbers"),
        ({"units": []}, DataError, "expected unit numbers"),
        ({"units": "one"}, DataError, "expected unit numbers"),
        ({"units": [True]}, DataError, "expected unit numbers"),
        ({"count": 0}, DataError, "count is 0; expected an integer of at least 1"),
        ({"count": 2.0}, DataError, "count is 2.0"),
        ({"data": torch.full((2, 1, 4, 4), torch.nan)}, NotFiniteError, "NaN or infinity"),
        ({"data": []}, DataError, "no batch"),
        ({"layer": "flat"}, DataError, "expected \\(N, units\\)"),
        ({"unit_axis": 0}, DataError, "unit_axis=0"),
    ],
)
def test_wrong_use(wrong: dict[str, Any], error: type[Exception], words: str) -> None:
    model = nn.Sequential()
    model.add_module("conv", nn.Conv2d(1, 3, 3))
    model.add_module("flat", nn.Flatten(0))
    arguments: dict[str, Any] = {"data": torch.zeros(2, 1, 4, 4), "layer": "conv"} | wrong
    with pytest.raises(error, match=words):
        top_inputs(model, **arguments)


def test_activations_that_are_not_of_the_samples() -> None:
    with pytest.raises(DataError, match="for 4 samples; its first axis must be that of the samples"):
        top_inputs(Uneven(), torch.zeros(4, 2), "")
    with pytest.raises(DataError, match="although its first axis was"):
        top_inputs(Uneven(), [torch.zeros(3, 2), torch.zeros(4, 2)], "")
    with pytest.raises(DataError, match="has 5 units at 1 places, after batches with 2 units"):
        top_inputs(nn.Identity(), [torch.zeros(3, 2), torch.zeros(3, 5)], "")


def test_an_activation_that_is_not_finite() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    nn.init.constant_(model[0].weight, torch.inf)  # pyright: ignore[reportArgumentType]
    with pytest.raises(NotFiniteError, match="0 of shape"):
        top_inputs(model, torch.ones(3, 2), "0")


# One layer, watched


def test_watching_stops_at_the_layer_and_keeps_the_graph() -> None:
    ran: list[str] = []
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(inplace=True), nn.Linear(2, 2))
    handle = model[2].register_forward_hook(lambda *_: ran.append("late"))
    with watching(model, "0", (3,)) as layer:
        ran.clear()
        x = torch.randn(4, 3, requires_grad=True)
        found = layer(x)
        (gradient,) = torch.autograd.grad(found[:, 1].sum(), x)
    handle.remove()
    assert not ran
    torch.testing.assert_close(found, nn.functional.linear(x, model[0].weight, model[0].bias))  # pyright: ignore
    torch.testing.assert_close(gradient, model[0].weight[1].expand(4, 3))  # pyright: ignore
    assert not model[0]._forward_hooks


def test_watching_a_part_of_a_later_call() -> None:
    data = torch.randn(5, 4)
    with watching(Twice(), "relu#2", data) as layer:
        assert torch.equal(layer(data), (2 - data.relu()).relu())
    with watching(Twice(), "pair[b][1]", data) as layer:
        assert torch.equal(layer(data), 3 * (2 - data.relu()).relu())


class Sometimes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x) if len(x) == 2 else x


def test_examples_that_cannot_be_used() -> None:
    for example, words in ((torch.zeros(3), "expected \\(N, …\\)"), ((), "the shape of one"), ((0, 3), "shape of one")):
        with pytest.raises(DataError, match=words), watching(nn.Linear(3, 2), "", example):
            pass
    with pytest.raises(NotFiniteError), watching(nn.Linear(1, 2), "", torch.tensor([[torch.nan]])):
        pass
    with watching(Sometimes(), "relu", (3,)) as layer, pytest.raises(DataError, match="was not called for inputs"):
        layer(torch.zeros(5, 3))


def test_unit_numbers() -> None:
    assert as_units(3).tolist() == [3]
    assert as_units(np.array([2, 0])).tolist() == [2, 0]
    assert as_units(torch.tensor([1], dtype=torch.int32), 2).dtype == torch.int64

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from isthmus.base.errors import DataError, LayerNotFoundError, NotFiniteError
from isthmus.metrics import as_samples, capture
from isthmus.metrics.capture import as_mask, leaf_layers, unit_axes


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Calls(nn.Module):
    """Registers its modules in another order than it runs them, one of them twice."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Linear(4, 2)
        self.unused = nn.Linear(1, 1)
        self.first = nn.Linear(3, 4)

    def forward(self, x):
        return self.relu(self.last(self.relu(self.first(x))))


class Outputs(nn.Module):
    """Gives back whatever it was made with."""

    def __init__(self, value):
        super().__init__()
        self.value = value
        self.inner = nn.Identity()

    def forward(self, x):
        self.inner(x)
        return self.value


class Holder(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x)


@pytest.fixture
def calls():
    torch.manual_seed(0)
    return Calls()


def test_fills_in_execution_order_with_the_true_values(calls):
    x = randn(5, 3)
    with capture(calls) as activations:
        calls(x)
    first = x @ calls.first.weight.T + calls.first.bias
    last = first.clamp(min=0) @ calls.last.weight.T + calls.last.bias
    assert list(activations) == ["first", "relu", "last", "relu#2"]
    for name, truth in zip(activations, (first, first.clamp(min=0), last, last.clamp(min=0)), strict=True):
        torch.testing.assert_close(activations[name], truth.detach())


def test_copies_are_safe_from_in_place_operations_and_carry_no_graph(calls):
    with capture(calls, ["first"]) as activations:
        calls(randn(5, 3))
    assert (activations["first"] < 0).any()
    assert not activations["first"].requires_grad


def test_inputs_are_copied_before_the_module_runs():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    x = randn(5, 3)
    with capture(model, inputs=True) as activations:
        model(x)
    torch.testing.assert_close(activations["0"], x)
    assert (activations["1"] < 0).any()


def test_inputs_take_the_first_tensor_also_a_keyword():
    class Inner(nn.Module):
        def forward(self, flag, *, x):
            return x * flag

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(2.0, x=x)

    model, x = Outer(), randn(4, 3)
    with capture(model, inputs=True) as activations:
        model(x)
    torch.testing.assert_close(activations["inner"], x)


def test_each_forward_call_starts_anew(calls):
    x, y = randn(5, 3), randn(7, 3, seed=1)
    with capture(calls, ["first"]) as activations:
        calls(x)
        calls(y)
    assert list(activations) == ["first"]
    torch.testing.assert_close(activations["first"], calls.first(y).detach())


def test_one_call_of_several_can_be_asked_for_by_its_captured_name(calls):
    with capture(calls, "relu#2") as activations:
        y = calls(randn(5, 3))
    assert list(activations) == ["relu#2"]
    torch.testing.assert_close(activations["relu#2"], y.detach())


def test_parts_of_outputs_are_named_by_their_place():
    model = Holder(nn.LSTM(3, 4, batch_first=True))
    x = randn(2, 6, 3)
    out, (h, c) = model(x)
    with capture(model) as activations:
        model(x)
    assert list(activations) == ["part[0]", "part[1][0]", "part[1][1]"]
    for got, truth in zip(activations.values(), (out, h, c), strict=True):
        torch.testing.assert_close(got, truth.detach())
    assert set(activations.origins.values()) == {"part"}
    with capture(model, ["part[1]"]) as activations:
        model(x)
    assert list(activations) == ["part[1][0]", "part[1][1]"]


def test_mappings_lists_and_other_values():
    a, b = randn(2, 3), randn(2, 3, seed=1)
    model = Holder(Outputs(OrderedDict(logits=a, states=[b, None, "text"], loss=3.0)))
    with capture(model, ["part"]) as activations:
        model(randn(2, 3))
    assert list(activations) == ["part[logits]", "part[states][0]"]
    torch.testing.assert_close(activations["part[states][0]"], b)
    with pytest.raises(LayerNotFoundError, match=r"several outputs.*part\[logits\], part\[states\]\[0\]"):
        activations["part"]


def test_the_model_itself_only_when_asked(calls):
    x = randn(5, 3)
    with capture(calls, ["", "last"]) as activations:
        y = calls(x)
    assert list(activations) == ["last", ""]
    torch.testing.assert_close(activations[""], y.detach())
    with capture(calls, [""], inputs=True) as activations:
        calls(x)
    torch.testing.assert_close(activations[""], x)
    with pytest.raises(LayerNotFoundError, match="Linear has no submodules"), capture(nn.Linear(2, 2)):
        pass


def test_containers_can_be_named_and_come_after_their_parts():
    model = nn.Sequential(OrderedDict(block=nn.Sequential(nn.Linear(3, 3), nn.ReLU()), head=nn.Linear(3, 1)))
    with capture(model, ["block", "block.0"]) as activations:
        model(randn(2, 3))
    assert list(activations) == ["block.0", "block"]
    torch.testing.assert_close(activations["block"], activations["block.0"].clamp(min=0))


def test_reparametrised_layers_are_leaves_and_their_weights_are_no_activations():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.ReLU())
    with capture(model) as activations:
        model(randn(5, 3))
    assert {name: tuple(value.shape) for name, value in activations.items()} == {"0": (5, 4), "1": (5, 4)}


def test_works_under_functional_call(calls):
    doubled = {name: 2 * value for name, value in calls.named_parameters()}
    x = randn(5, 3)
    with capture(calls, ["first"]) as activations:
        calls(x)
        plain = activations["first"]
        torch.func.functional_call(calls, doubled, (x,))
    torch.testing.assert_close(activations["first"], 2 * plain)


def test_unknown_layer_is_refused_before_any_hook_is_set(calls):
    refused = pytest.raises(LayerNotFoundError, match=r"Calls has no layer 'frist'; did you mean first")
    with refused, capture(calls, ["relu", "frist"]):
        pass
    assert hook_count(calls) == 0


def test_layers_that_did_not_run_say_so(calls):
    with capture(calls, ["first", "unused"]) as activations:
        calls(randn(5, 3))
    assert "unused" not in activations
    with pytest.raises(LayerNotFoundError, match="'unused' exists but was not called"):
        activations["unused"]
    with pytest.raises(LayerNotFoundError, match=r"no activation of layer 'fisrt' was captured; did you mean first"):
        activations["fisrt"]


def test_hooks_are_gone_on_exit_and_after_an_error(calls):
    kept = calls.first.register_forward_hook(lambda *_: None)
    with capture(calls) as activations:
        assert hook_count(calls) > 1
    with pytest.raises(RuntimeError), capture(calls):
        calls(randn(5, 17))
    assert hook_count(calls) == 1
    calls(randn(5, 3))
    assert not activations
    kept.remove()


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 5, 6)])
def test_feature_maps_as_samples(shape):
    x = randn(*shape)
    n, units = shape[:2]
    loops = [
        [x[(i, slice(None), *place)] for place in torch.cartesian_prod(*map(torch.arange, shape[2:]))] for i in range(n)
    ]
    rows = torch.stack([torch.stack(row) for row in loops])
    torch.testing.assert_close(as_samples(x), rows.reshape(-1, units))
    torch.testing.assert_close(as_samples(x, "features"), rows.transpose(1, 2).reshape(n, -1))
    torch.testing.assert_close(as_samples(x, "mean"), x.flatten(2).mean(2))


def test_tokens_as_samples():
    x = randn(2, 5, 3)
    torch.testing.assert_close(as_samples(x), torch.cat([x[0], x[1]]))
    torch.testing.assert_close(as_samples(x, "features"), torch.stack([x[0].flatten(), x[1].flatten()]))
    torch.testing.assert_close(as_samples(x, "mean"), x.sum(1) / 5)


def test_unit_axis_overrides():
    x = randn(2, 5, 3)
    torch.testing.assert_close(as_samples(x, unit_axis=1), torch.cat([x[0].T, x[1].T]))
    torch.testing.assert_close(as_samples(x, "mean", unit_axis=-2), x.sum(2) / 3)
    image = randn(2, 4, 5, 3)
    torch.testing.assert_close(as_samples(image, unit_axis=-1), image.reshape(40, 3))
    assert as_samples(randn(2, 3, 1, 1, 1, 4), unit_axis=1).shape == (8, 3)


@pytest.mark.parametrize("positions", ["samples", "features", "mean"])
def test_matrices_are_unchanged(positions):
    x = randn(4, 3)
    assert as_samples(x, positions) is x


@pytest.mark.parametrize(
    ("activation", "keywords", "message"),
    [
        (torch.ones(2, 3, dtype=torch.long), {}, r"embedding of shape \(2, 3\) is torch.int64"),
        (torch.ones(2, 3, dtype=torch.bool), {}, "torch.bool"),
        (torch.ones(2, 3, dtype=torch.complex64), {}, "torch.complex64"),
        (torch.ones(4), {}, r"shape \(4,\); expected \(N, units\)"),
        (torch.ones(1, 1, 1, 1, 1, 1), {}, "unit_axis"),
        (torch.ones(0, 3), {}, r"\(0, 3\) is empty"),
        (torch.ones(2, 3, 4), {"unit_axis": 0}, "axis 0 holds the samples"),
        (torch.ones(2, 3, 4), {"unit_axis": -3}, "axis 0 holds the samples"),
        (torch.ones(2, 3, 4), {"unit_axis": 3}, "unit_axis=3"),
        (torch.ones(2, 3, 4), {"positions": "max"}, "unknown positions 'max'; known: samples, features, mean"),
    ],
)
def test_bad_activations_are_refused(activation, keywords, message):
    with pytest.raises(DataError, match=message):
        as_samples(activation, name="embedding", **keywords)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused_with_the_shape(value):
    x = randn(2, 3, 4, 4)
    x[1, 2, 3, 3] = value
    with pytest.raises(NotFiniteError, match=r"\(2, 3, 4, 4\)"):
        as_samples(x, "mean")


@dataclass
class Answer:
    logits: torch.Tensor
    cache: object = None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "layer 'part' gave no tensor but None; name a layer that gives one"),
        (("a", 3), "gave no tensor but a tuple of str, int"),
        ({"text": "a"}, "gave no tensor but a dict of text"),
        ([], "gave no tensor but a list of nothing"),
        (Answer, "gave no tensor but a type"),
    ],
)
def test_a_layer_without_a_tensor_is_named_with_what_it_gave(value, message):
    model = Holder(Outputs(value))
    with capture(model, ["part"]) as activations:
        model(randn(2, 3))
        with pytest.raises(LayerNotFoundError, match=message):
            activations["part"]


def test_outputs_in_a_dataclass_are_named_by_field():
    x = randn(2, 3)
    model = Holder(Outputs(Answer(x, cache=object())))
    with capture(model, ["part"]) as activations:
        model(x)
    assert list(activations) == ["part[logits]"]
    torch.testing.assert_close(activations["part[logits]"], x)


def test_attention_is_one_layer():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train()
    with capture(model) as activations:
        model(randn(3, 5, 8))
    assert list(activations)[:2] == ["self_attn[0]", "dropout1"]
    assert "self_attn.out_proj" not in leaf_layers(model)
    assert leaf_layers(nn.Sequential(nn.MultiheadAttention(8, 2))) == ["0"]


class Scale(nn.Module):
    """A normalisation as people write it themselves: a weight of one axis."""

    def __init__(self, units):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(units))

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("units", "shape", "axis"),
    [(5, (2, 3, 4, 5), -1), (3, (2, 3, 4, 5), 1), (4, (2, 3, 4, 5), None), (3, (2, 3, 4, 3), None), (4, (4,), None)],
)
def test_units_of_an_own_normalisation_are_where_its_weight_fits(units, shape, axis):
    model = Holder(Scale(units))
    with capture(model) as activations:
        model(randn(*shape))
    assert unit_axes(model, activations) == {"part": axis}


def token_rows(x, mask):
    """Rows of real tokens, one by one."""
    return torch.stack([x[i, t] for i in range(x.shape[0]) for t in range(x.shape[1]) if mask[i][t]])


MASK = [[1, 1, 1, 0], [1, 0, 0, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masked_tokens_are_no_samples_and_add_nothing_to_a_mean(dtype):
    x, mask = randn(3, 4, 5), torch.tensor(MASK).to(dtype)
    x[~mask.bool()] = float("nan")
    truth = token_rows(x, MASK)
    assert torch.equal(as_samples(x, mask=mask), truth)
    assert torch.equal(as_samples(x.mT, mask=mask, unit_axis=1), truth)
    assert torch.equal(as_samples(x.reshape(12, 5), mask=mask), truth)
    means = torch.stack([truth[:3].mean(0), truth[3], truth[4:].mean(0)])
    torch.testing.assert_close(as_samples(x, "mean", mask=mask), means)
    torch.testing.assert_close(as_samples(x.reshape(12, 5), "mean", mask=mask), means)
    with pytest.raises(DataError, match=r"h of shape \(3, 4, 5\) has 6 masked tokens.*positions='samples'"):
        as_samples(x, "features", mask=mask, name="h")


def test_a_mask_without_masked_tokens_changes_nothing():
    x = randn(3, 4, 5)
    for positions in ("samples", "features", "mean"):
        torch.testing.assert_close(as_samples(x, positions, mask=torch.ones(3, 4)), as_samples(x, positions))


def test_nan_in_a_real_token_is_refused():
    x = randn(3, 4, 5)
    x[1, 0, 2] = float("nan")
    with pytest.raises(NotFiniteError, match=r"\(3, 4, 5\) holds NaN"):
        as_samples(x, mask=torch.tensor(MASK))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 5), r"h of shape \(3, 4, 5\) has no row for each token of the mask of shape \(3, 5\)"),
        (torch.ones(3, 1, 4), r"mask of h has shape \(3, 1, 4\); expected \(N, tokens\) = \(3, tokens\)"),
        (torch.tensor([[1, 1, 2, 0]] * 3), "holds other values than 0 and 1"),
        (torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]), "masks every token of sample 1: leave it out"),
    ],
)
def test_bad_masks_are_refused(mask, message):
    with pytest.raises(DataError, match=message):
        as_samples(randn(3, 4, 5), mask=mask, name="h")


def test_a_mask_of_another_type_or_number_of_samples_is_refused():
    with pytest.raises(DataError, match="mask has type list"):
        as_mask([[1, 0]], 1)
    with pytest.raises(DataError, match=r"shape \(2, 3\); expected \(N, tokens\) = \(4, tokens\)"):
        as_mask(torch.ones(2, 3), 4)


def test_nested_and_sparse_activations_are_refused():
    with pytest.raises(DataError, match="h is a nested or sparse tensor"):
        as_samples(torch.eye(3).to_sparse(), name="h")
    nested = torch.nested.as_nested_tensor([randn(2, 3), randn(4, 3)], layout=torch.jagged)
    with pytest.raises(DataError, match="h is a nested or sparse tensor"):
        as_samples(nested, name="h")
    model = Holder(Outputs(nested))
    with capture(model, ["part"]) as activations:
        model(randn(2, 3))
    assert unit_axes(model, activations) == {"part": None}


def test_copies_are_written_over_on_request_only():
    model, x = nn.Sequential(nn.Linear(3, 2), nn.ReLU()), randn(4, 3)
    for reuse in (False, True):
        with capture(model, reuse=reuse) as activations:
            model(x)
            first = activations["0"]
            value = first.clone()
            model(2 * x)
            torch.testing.assert_close(activations["0"], model[0](2 * x))
            assert (activations["0"] is first) is reuse
            assert torch.equal(first, value) is not reuse
            model(x[:2])  # another shape
            torch.testing.assert_close(activations["1"], model(x[:2]))
        assert len(activations["0"]) == 2

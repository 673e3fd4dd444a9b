import copy
import json
import math
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from isthmus.base.batches import Batch
from isthmus.base.errors import ArchitectureError, DataError, LayerNotFoundError, NotFiniteError
from isthmus.merge import connect, evaluate
from isthmus.merge.layerwise import layerwise_paths
from isthmus.merge.layerwise.order import layers_in_order

mpl.use("Agg")


class Backwards(nn.Module):
    """Declares its layers in another order than it runs them, and never calls one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.aside = nn.Linear(4, 4)
        self.head = nn.Linear(5, 3)
        self.norm = nn.BatchNorm1d(5)
        self.scale = nn.Parameter(torch.ones(5))
        self.body = nn.Sequential(nn.Linear(4, 5), nn.ReLU())

    def forward(self, x):
        return self.head(self.scale * self.norm(self.body(F.linear(x, self.aside.weight))))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu())


def made(kind, seed) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind().double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        return model


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def linear():
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4), nn.Linear(4, 3))


def batches(count=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 4, generator=generator, dtype=torch.float64),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def snapshot(model):
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [module.training for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    )


def assert_untouched(model, before):
    after = snapshot(model)
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert after[1:] == before[1:]


def loss_with(base, a, b, names, alpha, data):
    """Loss of the base with the named tensors at a place between those of a and b, made by its state dict."""
    model = copy.deepcopy(base)
    state = model.state_dict()
    for name in names:
        state[name] = (1 - alpha) * a.state_dict()[name] + alpha * b.state_dict()[name]
    model.load_state_dict(state)
    return evaluate(model, data).loss


LAYERS = {"0": ["0.weight", "0.bias"], "2": ["2.weight", "2.bias"], "4": ["4.weight", "4.bias"]}


@pytest.mark.parametrize("how", ["single", "prefix", "suffix"])
@pytest.mark.parametrize("base", ["a", "b", "midpoint"])
def test_every_point_is_the_hybrid_made_by_hand(how: Any, base: Any):
    a, b, data = made(mlp, 0), made(mlp, 1), batches()
    held = {"a": a, "b": b, "midpoint": copy.deepcopy(a)}[base]
    if base == "midpoint":
        held.load_state_dict({name: (t + b.state_dict()[name]) / 2 for name, t in a.state_dict().items()})
    found = layerwise_paths(a, b, data, how=how, base=base, points=5)
    assert (found.layers, found.how, found.base) == (tuple(LAYERS), how, base)
    groups = list(LAYERS.values())
    for index, path in enumerate(found.paths):
        chosen = {"single": groups[index : index + 1], "prefix": groups[: index + 1], "suffix": groups[index:]}[how]
        names = [name for group in chosen for name in group]
        losses = [loss_with(held, a, b, names, alpha, data) for alpha in path.alphas]
        np.testing.assert_allclose(path.loss, losses, rtol=1e-12)
        chord = np.linspace(losses[0], losses[-1], 5)
        assert found.barriers[index] == pytest.approx(max(np.array(losses) - chord), abs=1e-12)
        parents = (evaluate(a, data).loss + evaluate(b, data).loss) / 2
        assert found.midpoint_barriers[index] == pytest.approx(losses[2] - parents, abs=1e-12)
        cost = losses[0] - losses[-1] if base == "b" else losses[-1] - losses[0]
        assert found.swap_costs[index] == pytest.approx(cost, abs=1e-12)


def test_the_ends_are_the_networks():
    a, b, data = made(Backwards, 0), made(Backwards, 1), batches()
    whole = connect(a, b, data, points=3)
    for place, found in (
        (-1, layerwise_paths(a, b, data, how="prefix", points=3)),
        (0, layerwise_paths(a, b, data, how="suffix", points=3)),
    ):
        np.testing.assert_array_equal(found.whole.loss, whole.loss)
        np.testing.assert_array_equal(found.paths[place].loss, whole.loss)
        assert found.swap_costs[place] == whole.loss[-1] - whole.loss[0]
        assert {path.loss[0] for path in found.paths} == {whole.loss[0]}
        assert found.midpoint_barriers[place] == pytest.approx(whole.loss[1] - (whole.loss[0] + whole.loss[-1]) / 2)
    # held at b, what is exchanged last leaves b
    assert {path.loss[-1] for path in layerwise_paths(a, b, data, base="b", points=3).paths} == {whole.loss[-1]}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_linear_network_is_convex_in_each_layer(seed):
    # Adilova et al., theorem 4.1: no barrier over the line between the ends of any single layer
    found = layerwise_paths(made(linear, seed), made(linear, seed + 1), batches(), points=5)
    assert found.barriers.max() < 1e-12


def test_a_network_beside_itself_is_flat():
    model = made(Backwards, 0)
    found = layerwise_paths(model, copy.deepcopy(model), batches(), points=3)
    for values in (found.barriers, found.midpoint_barriers, found.swap_costs):
        assert not values.any()


def test_layers_come_in_the_order_in_which_they_run():
    model = made(Backwards, 0)
    batch = Batch((batches()[0][0],))
    assert layers_in_order(model, batch) == {
        "": ["scale"],
        "body.0": ["body.0.weight", "body.0.bias"],
        "norm": [f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")],
        "head": ["head.weight", "head.bias"],
        "aside": ["aside.weight", "aside.bias"],  # not called: last
    }
    assert list(layers_in_order(model, batch, ["norm", "body"])) == ["body", "norm"]
    assert list(layers_in_order(model, batch, "head")) == ["head"]
    assert len(layers_in_order(model, batch, [""])[""]) == len(model.state_dict())


def test_parametrised_and_attention_layers_are_one():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = parametrizations.weight_norm(nn.Linear(4, 4))
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            x = self.norm(x)
            return self.attention(x, x, x, need_weights=False)[0]

    model = made(Attending, 0)
    found = layers_in_order(model, Batch((torch.randn(2, 3, 4, dtype=torch.float64),)))
    assert list(found) == ["norm", "attention"]
    assert sorted(found["norm"]) == sorted(name for name in model.state_dict() if name.startswith("norm."))
    assert len(found["attention"]) == 4


def test_statistics_without_parameters_are_a_layer_and_constants_are_not():
    class Masked(nn.Module):
        mask: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(4), persistent=False)

        def forward(self, x):
            return self.mask * x

    def make():
        return nn.Sequential(Masked(), nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3))

    a, b, data = made(make, 0), made(make, 1), batches()
    found = layerwise_paths(a, b, data, how="prefix", points=3)
    assert found.layers == ("1", "2", "3")
    assert found.paths[1].loss[2] != found.paths[0].loss[2]
    assert found.paths[2].loss[2] == found.whole.loss[2]


def test_a_tied_tensor_moves_with_both_layers():
    a, b, data = made(Tied, 0), made(Tied, 1), batches()
    found = layerwise_paths(a, b, data, points=3)
    shared = ["first.weight", "second.weight"]
    for path, own in zip(found.paths, (["first.bias"], ["second.bias"]), strict=False):
        losses = [loss_with(a, a, b, [*shared, *own], alpha, data) for alpha in (0, 0.5, 1)]
        np.testing.assert_allclose(path.loss, losses, rtol=1e-12)


def test_a_block_moves_as_one_and_the_rest_is_held():
    a, b, data = made(Backwards, 0), made(Backwards, 1), batches()
    found = layerwise_paths(a, b, data, ["norm", "body"], "prefix", points=3)
    assert found.layers == ("body", "norm")
    names = [name for name in a.state_dict() if name.startswith(("body.", "norm."))]
    names.remove("norm.num_batches_tracked")
    assert found.paths[1].loss[1] == pytest.approx(loss_with(a, a, b, names, 0.5, data), rel=1e-12)


def test_repair_metric_and_loss_reach_the_paths():
    a, b, data = made(Backwards, 0), made(Backwards, 1), batches()
    found = layerwise_paths(a, b, data, ["body"], points=3, repair="reset", repair_data=batches(seed=7))
    assert {path.repair for path in (found.whole, *found.paths)} == {"reset"}
    other = layerwise_paths(a, b, [x for x, _ in data], "body", loss=lambda out, _: out.square().mean(), points=3)
    assert other.paths[0].accuracy is None
    with torch.no_grad():
        expected = float(np.mean([float(a.eval()(x).square().mean()) for x, _ in data]))
    assert other.paths[0].loss[0] == pytest.approx(expected)


def test_the_networks_are_as_before_also_after_an_error():
    a, b = made(Backwards, 0).train(), made(Backwards, 1)
    b.norm.eval()
    before = snapshot(a), snapshot(b)
    first = layerwise_paths(a, b, batches(), points=3)
    again = layerwise_paths(a, b, batches(), points=3)
    for path, other in zip(first.paths, again.paths, strict=True):
        np.testing.assert_array_equal(path.loss, other.loss)
    with pytest.raises(RuntimeError):
        layerwise_paths(a, b, [(torch.zeros(2, 9, dtype=torch.float64), torch.zeros(2, dtype=torch.long))])
    assert_untouched(a, before[0])
    assert_untouched(b, before[1])


def test_refuses_what_cannot_be_measured():
    a, b, data = made(mlp, 0), made(mlp, 1), batches()
    with pytest.raises(DataError, match="how 'all'"):
        layerwise_paths(a, b, data, how="all")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="base 'c'"):
        layerwise_paths(a, b, data, base="c")  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="iterator"):
        layerwise_paths(a, b, iter(data))
    with pytest.raises(DataError, match="no batch"):
        layerwise_paths(a, b, [])
    with pytest.raises(DataError, match="points"):
        layerwise_paths(a, b, data, points=2)
    with pytest.raises(LayerNotFoundError, match="no layer 'fc'"):
        layerwise_paths(a, b, data, "fc")
    with pytest.raises(DataError, match="'1' has neither parameters nor buffers"):
        layerwise_paths(a, b, data, ["0", "1"])
    with pytest.raises(DataError, match="named twice"):
        layerwise_paths(a, b, data, ["0", "0"])
    with pytest.raises(DataError, match="no layer with parameters"):
        layerwise_paths(nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU()), data)
    with pytest.raises(ArchitectureError, match=r"0\.weight"):
        layerwise_paths(a, made(linear, 0), data)
    with torch.no_grad():
        b[0].weight[0, 0] = math.nan
    with pytest.raises(NotFiniteError, match=r"0\.weight"):
        layerwise_paths(a, b, data)


def test_to_dict_repr_and_plot():
    found = layerwise_paths(made(mlp, 0), made(mlp, 1), batches(), how="prefix", points=3)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [row["layer"] for row in content["layers"]] == list(LAYERS)
    assert [row["barrier"] for row in content["layers"]] == found.barriers.tolist()
    assert [row["midpoint_barrier"] for row in content["layers"]] == found.midpoint_barriers.tolist()
    assert content["layers"][2]["swap_cost"] == found.swap_costs[2]
    assert content["whole"] == found.whole.to_dict()
    assert repr(found).startswith("LayerwisePaths(prefix, 3 layers, base a, largest barrier")
    ax = found.plot()
    heights = [bar.get_height() for bar in ax.patches]  # pyright: ignore[reportAttributeAccessIssue]
    assert heights == [*found.barriers, *found.midpoint_barriers]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["… 0", "… 2", "… 4"]
    assert found.plot(ax) is ax
    mpl.pyplot.close("all")  # pyright: ignore[reportAttributeAccessIssue]

import copy
import json
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

from isthmus.align import match
from isthmus.base.errors import ArchitectureError, DataError
from isthmus.base.running import evaluating
from isthmus.merge import connect, evaluate
from isthmus.merge.paths import plane

mpl.use("Agg")


def network(seed, norm=False, width=8):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width) if norm else nn.Identity(), nn.ReLU(), nn.Linear(width, 3)
        )
        net(torch.randn(50, 4))
        return net


def labelled(count=40, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    y = torch.randint(3, (count,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def measured(nets, data, **options):
    a, b, c = nets
    return plane(a, b, c, data, **options)


def flat(net):
    return torch.cat([parameter.detach().double().flatten() for parameter in net.parameters()]).numpy()


def at(nets, place, found):
    """The network at a place of the picture, by the orthonormal basis of the paper, in float64."""
    a, b, c = map(flat, nets)
    u = b - a
    v = (c - a) - (c - a) @ u / (u @ u) * u
    weights = a + place[0] * u / np.linalg.norm(u) + place[1] * v / np.linalg.norm(v)
    between = copy.deepcopy(nets[0]).double()
    torch.nn.utils.vector_to_parameters(torch.from_numpy(weights), between.parameters())
    return between


def test_distances_are_those_of_weight_space():
    nets = [network(seed) for seed in range(3)]
    found = measured(nets, labelled(), points=4)
    for i in range(3):
        for j in range(3):
            distance = np.linalg.norm(flat(nets[i]) - flat(nets[j]))
            assert np.linalg.norm(found.places[i] - found.places[j]) == pytest.approx(distance, abs=1e-9)
    assert found.places[0].tolist() == [0, 0]
    assert found.places[1, 1] == 0
    # margins of a fifth on each side
    assert found.x[0] == pytest.approx(found.places[:, 0].min() - 0.2 * np.ptp(found.places[:, 0]))
    assert found.y[-1] == pytest.approx(1.2 * found.places[2, 1])


def test_every_point_is_the_network_there():
    nets, data = [network(seed) for seed in range(3)], labelled()
    doubles = [(x.double(), y) for x, y in data]
    found = measured(nets, data, points=4)
    assert found.accuracy is not None
    assert found.corner_accuracy is not None
    for row, y in enumerate(found.y):
        for column, x in enumerate(found.x):
            there = evaluate(at(nets, (x, y), found), doubles)
            assert found.loss[row, column] == pytest.approx(there.loss, rel=1e-5)
            assert found.accuracy[row, column] == there.metric
    for index, net in enumerate(nets):
        there = evaluate(net, data)
        assert (found.corner_loss[index], found.corner_accuracy[index]) == (there.loss, there.metric)
    assert (found.samples, found.metric_name, found.repair) == (40, "accuracy", None)


def test_its_lower_edge_is_the_path():
    nets, data = [network(seed) for seed in range(3)], labelled()
    # an isosceles triangle: c above the middle of the edge from a to b
    with torch.no_grad():
        for p, q, r in zip(*(net.parameters() for net in nets), strict=True):
            r.sub_((p + q) / 2)
        u, r = flat(nets[1]) - flat(nets[0]), flat(nets[2])
        upright = torch.from_numpy(r - (r @ u) / (u @ u) * u + (flat(nets[0]) + flat(nets[1])) / 2).float()
        torch.nn.utils.vector_to_parameters(upright, nets[2].parameters())
    found = measured(nets, iter(data), points=5, margin=0)
    path = connect(nets[0], nets[1], data, points=5)
    np.testing.assert_allclose(found.loss[0], path.loss, rtol=1e-4)
    assert found.places[2, 0] == pytest.approx(found.places[1, 0] / 2, rel=1e-4)


def test_tied_weights_count_once():
    def tied(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        return net

    nets = [tied(seed) for seed in range(3)]
    found = measured(nets, (torch.randn(4, 3), torch.zeros(4).long()), points=3)
    assert found.places[1, 0] == pytest.approx(np.linalg.norm(flat(nets[1]) - flat(nets[0])))


def test_negative_variances_are_told_and_reset():
    nets, data = [network(seed, norm=True) for seed in range(3)], labelled()
    with torch.no_grad():
        nets[1].get_buffer("1.running_var").mul_(20)
    with pytest.warns(UserWarning, match="negative beyond the triangle; use repair='reset'"):
        broken = measured(nets, data, points=3, margin=1)
    assert not np.isfinite(broken.loss).all()
    assert np.isfinite(broken.corner_loss).all()
    broken.plot()
    whole = measured(nets, data, points=3, margin=1, repair="auto")
    assert whole.repair == "reset"
    assert np.isfinite(whole.loss).all()
    assert whole.corner_loss.tolist() == broken.corner_loss.tolist() == [evaluate(net, data).loss for net in nets]
    # one point by hand: weights there, batch norm in training mode over all of the data at once
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    there = at(nets, (whole.x[2], whole.y[1]), whole)
    norm: Any = there[1]
    with evaluating(there), torch.no_grad():
        norm.train()
        norm.momentum = None
        norm.reset_running_stats()
        there(x.double())
    assert whole.loss[1, 2] == pytest.approx(evaluate(there, (x.double(), y)).loss, rel=1e-4)
    with pytest.raises(DataError, match="is an iterator"):
        measured(nets, iter(data), repair="reset")
    plt.close("all")


def test_after_an_alignment():
    nets, data = [network(seed) for seed in range(3)], labelled()
    moved = [match(nets[0], net, data, method="weights").apply(net) for net in nets[1:]]
    before, after = measured(nets, data, points=3), measured([nets[0], *moved], data, points=3)
    np.testing.assert_allclose(after.corner_loss, before.corner_loss, rtol=1e-5)
    assert after.places[1, 0] < before.places[1, 0]


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: (a, b, a),
        lambda a, b: (a, a, b),
        lambda a, b: (a, b, b),
        lambda a, b: (a, a, a),
        lambda a, b: (a, b, _between(a, b)),
    ],
)
def test_refuses_three_on_a_line(make):
    with pytest.raises(ArchitectureError, match=r"one line in weight space: \|b - a\| = .* use connect for two"):
        measured(make(network(0), network(1)), labelled())


def _between(a, b):
    middle = copy.deepcopy(a)
    torch.nn.utils.vector_to_parameters(torch.from_numpy(0.3 * flat(a) + 0.7 * flat(b)).float(), middle.parameters())
    return middle


def test_refuses_the_rest():
    nets, data = [network(seed) for seed in range(3)], labelled()
    for points in (2, 2.5, True):
        with pytest.raises(DataError, match="at least 3, along each side"):
            measured(nets, data, points=points)
    for margin in (-0.1, float("nan"), float("inf")):
        with pytest.raises(DataError, match="a share of at least 0"):
            measured(nets, data, margin=margin)
    with pytest.raises(DataError, match="outside of the triangle"):
        measured(nets, data, repair="rescale")
    with pytest.raises(ArchitectureError, match="shapes differ"):
        plane(nets[0], nets[1], network(2, width=9), data)


def test_draws_and_tells():
    nets, data = [network(seed) for seed in range(3)], labelled()
    found = measured(nets, data, points=4)
    for quantity in ("loss", "accuracy", "error"):
        ax = found.plot(quantity=quantity, labels=("one", "two", "three"))
        assert ax.get_aspect() == 1
        assert [text.get_text() for text in ax.texts] == ["one", "two", "three"]
        assert [getattr(text, "xy", None) for text in ax.texts] == [tuple(place) for place in found.places]
        (bar,) = [other for other in ax.figure.axes if other is not ax]
        assert quantity in (bar.get_ylabel(), bar.get_xlabel())
    own = plt.subplots()[1]
    top = float(np.median(found.loss))
    assert found.plot(own, highest=top) is own
    assert max(level for part in own.collections for level in getattr(part, "levels", [])) == pytest.approx(top)
    assert found.plot(quantity="accuracy", highest=0.5).get_title() == ""
    content = json.loads(json.dumps(found.to_dict()))
    assert content["loss"] == found.loss.tolist()
    assert content["places"] == found.places.tolist()
    assert content["corner_accuracy"] is not None
    with pytest.raises(DataError, match="'speed' was not measured"):
        found.plot(quantity="speed")
    with pytest.raises(DataError, match="2 labels for three"):
        found.plot(labels=("a", "b"))
    plt.close("all")


def test_a_flat_plane_and_an_empty_one():
    nets, data = [network(seed) for seed in range(3)], labelled()
    level = measured(nets, data, points=3, loss=lambda out, _: out.new_ones(()))
    assert level.accuracy is None
    assert level.to_dict()["accuracy"] is None
    assert level.plot().get_xlabel().startswith("distance")
    with pytest.raises(DataError, match="'accuracy' was not measured"):
        level.plot(quantity="accuracy")
    with pytest.warns(UserWarning, match="do the outputs overflow"):
        nothing = measured(nets, data, points=3, loss=lambda out, _: out.new_tensor(torch.nan))
    with pytest.raises(DataError, match="nothing to draw"):
        nothing.plot()
    plt.close("all")

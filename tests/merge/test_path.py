import copy
import itertools
import json
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isthmus.base.errors import ArchitectureError, DataError, NotFiniteError
from isthmus.merge import Path, connect, evaluate, interpolate

mpl.use("Agg")


def network(seed, norm=True, width=6) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(4, width),
            nn.BatchNorm1d(width) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(width, 3),
        )
        if norm:
            net(torch.randn(50, 4))
    return net


def batches(count=4, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 4, generator=generator), torch.randint(3, (size,), generator=generator))
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


def constant(value):
    layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(layer.weight, value)
    return layer


def test_a_quartic_has_the_barrier_of_its_closed_form():
    # L(w) = (w² - 1)²: two minima at -1 and 1, a barrier of 1 between them
    path = connect(
        constant(-1.0),
        constant(1.0),
        torch.ones(1, 1, dtype=torch.float64),
        points=101,
        loss=lambda out, _: (out**2 - 1).square().mean(),
    )
    w = 2 * np.linspace(0, 1, 101) - 1
    np.testing.assert_allclose(path.loss, (w**2 - 1) ** 2, atol=1e-12)
    assert path.barrier == pytest.approx(1, abs=1e-12)
    assert path.midpoint == 50
    assert path.midpoint_loss == pytest.approx(1)
    assert (path.accuracy, path.metric_name, path.accuracy_barrier, path.midpoint_accuracy) == (None, None, None, None)


def test_a_convex_loss_has_none_and_uneven_ends_count():
    # L(w) = w² from 1 to 3: the path lies below its chord, and touches it at the ends
    x = torch.ones(1, 1, dtype=torch.float64)
    path = connect(constant(1.0), constant(3.0), x, points=9, loss=lambda out, _: out.square().mean())
    assert path.barrier == 0
    # L(w) = -w²: the same, above; the highest point over the chord is alpha (1 - alpha) 4 = 1
    path = connect(constant(1.0), constant(3.0), x, points=9, loss=lambda out, _: -out.square().mean())
    assert path.barrier == pytest.approx(1)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("repair", [None, "auto"])
def test_ends_are_the_networks(norm, repair):
    a, b = network(0, norm), network(1, norm)
    data = batches()
    path = connect(a, b, data, points=5, repair=repair)
    for index, model in ((0, a), (-1, b)):
        found = evaluate(model, data)
        assert path.accuracy is not None
        assert (path.loss[index], path.accuracy[index]) == (found.loss, found.metric)
    assert path.samples == 32
    assert path.repair == (None if repair is None else "reset" if norm else "rescale")
    assert path.alphas.tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_every_point_is_the_interpolated_network():
    a, b = network(0), network(1)
    data = batches()
    path = connect(a, b, data, points=4)
    assert path.accuracy is not None
    for alpha, loss, accuracy in zip(path.alphas, path.loss, path.accuracy, strict=True):
        between = copy.deepcopy(a)
        between.load_state_dict(interpolate(a.state_dict(), b.state_dict(), alpha))
        found = evaluate(between, data)
        assert (loss, accuracy) == (pytest.approx(found.loss, rel=1e-6), found.metric)
    assert path.accuracy is not None
    chord = (1 - path.alphas) * path.accuracy[0] + path.alphas * path.accuracy[-1]
    assert path.accuracy_barrier == (chord - path.accuracy).max()


def test_reads_the_data_once_and_takes_an_iterator():
    a, b = network(0), network(1)
    path = connect(a, b, iter(batches()), points=3)
    assert path.loss.tolist() == connect(a, b, batches(), points=3).loss.tolist()


@pytest.mark.parametrize("repair", [None, "reset", "rescale"])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, None])
def test_leaves_both_networks_alone(repair, stop):
    a, b = network(0), network(1).eval()
    b[2].train()
    before = snapshot(a), snapshot(b)
    state = torch.random.get_rng_state()
    calls = itertools.count()

    def loss(outputs, targets):
        if stop is not None and next(calls) == 7:
            raise stop
        return F.cross_entropy(outputs, targets)

    if stop is None:
        connect(a, b, batches(), points=3, repair=repair, loss=loss)
    else:
        with pytest.raises(stop):
            connect(a, b, batches(), points=3, repair=repair, loss=loss)
    assert_untouched(a, before[0])
    assert_untouched(b, before[1])
    assert torch.equal(state, torch.random.get_rng_state())


def test_same_call_same_bits():
    a, b = network(0, norm=False), network(1, norm=False)
    first, second = (connect(a, b, batches(), points=7, repair="rescale").loss for _ in range(2))
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize("norm", [True, False])
def test_a_repaired_point_does_not_leak_into_the_next(norm):
    a = network(0, norm)
    b = network(1, norm)
    with torch.no_grad():  # what is equal in both must be restored as well
        b[0].weight.copy_(a[0].weight)
        b[0].bias.copy_(a[0].bias)
    data = [(torch.cat([x for x, _ in batches()]), torch.cat([y for _, y in batches()]))]
    fine = connect(a, b, data, points=9, repair="auto")
    coarse = connect(a, b, data, points=3, repair="auto")
    assert fine.loss[[0, 4, 8]].tolist() == coarse.loss.tolist()


def test_repair_data_is_what_is_repaired_on():
    a, b = network(0), network(1)
    with pytest.raises(DataError, match="is an iterator"):
        connect(a, b, batches(), repair="reset", repair_data=iter(batches()))
    shifted = [(x * 3 + 1, y) for x, y in batches(seed=5)]
    own, other = (connect(a, b, batches(), points=3, repair="reset", repair_data=d) for d in (None, shifted))
    assert own.loss[1] != other.loss[1]
    assert own.loss[[0, 2]].tolist() == other.loss[[0, 2]].tolist()


def test_an_untied_network_is_not_a_tied_one():
    def tied(yes):
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        if yes:
            net[1].weight = net[0].weight
        return net

    data = (torch.randn(4, 3), torch.zeros(4).long())
    with pytest.raises(ArchitectureError, match=r"1\.weight is tied to 0\.weight in one network"):
        connect(tied(True), tied(False), data)
    assert connect(tied(True), tied(True), data, points=3).samples == 4


def test_masks_of_minus_infinity_do_not_disturb():
    def masked(seed):
        net = network(seed, norm=False)
        net.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1), persistent=False)
        return net

    assert connect(masked(0), masked(1), batches(), points=3).finite.all()


def test_an_overflow_is_told():
    # float16 outputs overflow half way only: 300 · 300 > 65504, while each end is 300 · 1
    class Product(nn.Module):
        def __init__(self, u, v):
            super().__init__()
            self.u, self.v = (nn.Parameter(torch.tensor(x, dtype=torch.float16)) for x in (u, v))

        def forward(self, x):
            return x * self.u * self.v

    x = torch.ones(2, 1, dtype=torch.float16)
    with pytest.warns(UserWarning, match=r"NaN or infinite at alpha = 0\.5, and so is the barrier"):
        path = connect(Product(600.0, 0.0), Product(0.0, 600.0), x, points=3, loss=lambda out, _: out.mean())
    assert path.finite.tolist() == [True, False, True]
    assert path.barrier == np.inf
    with pytest.warns(UserWarning, match="alpha = 0"):
        path = Path(np.linspace(0, 1, 3), np.array([np.inf, 1.0, 1.0]), None, None, 1, None)
    assert np.isnan(path.barrier)
    with pytest.warns(UserWarning, match="alpha = 0.5"):
        path = Path(np.linspace(0, 1, 3), np.array([1.0, np.nan, 1.0]), None, None, 1, None)
    assert np.isnan(path.barrier)


def test_draws_and_tells():
    path = connect(network(0), network(1), batches(), points=5)
    ax = path.plot(label="naive")
    assert path.plot(ax, quantity="accuracy") is ax
    assert path.accuracy is not None
    assert [np.asarray(line.get_ydata()).tolist() for line in ax.lines] == [path.loss.tolist(), path.accuracy.tolist()]
    assert ax.get_ylabel() == "accuracy"
    content = json.loads(json.dumps(path.to_dict()))
    assert content["loss"] == path.loss.tolist()
    assert content["metric"] == "accuracy"
    assert content["barrier"] == path.barrier
    assert f"barrier {path.barrier:.4g}, accuracy barrier" in repr(path)
    bare = Path(path.alphas, path.loss, None, None, 32, None)
    assert repr(bare).endswith(f"barrier {path.barrier:.4g})")
    assert bare.to_dict()["accuracy"] is None
    with pytest.raises(DataError, match="'accuracy' was not measured"):
        bare.plot(quantity="accuracy")
    with pytest.raises(DataError, match="'speed' was not measured"):
        path.plot(quantity="speed")
    plt.close("all")


def test_a_metric_of_the_user_has_its_name():
    def confidence(outputs, _):
        return outputs.softmax(-1).amax(-1).mean()

    path = connect(network(0), network(1), batches(), points=3, metric=confidence)
    assert path.metric_name == "confidence"
    assert path.accuracy is not None
    assert path.accuracy[0] == pytest.approx(evaluate(network(0), batches(), metric=confidence).metric)


@pytest.mark.parametrize("points", [2, 0, -1, 2.5, True, "25"])
def test_refuses_points(points):
    with pytest.raises(DataError, match="at least 3"):
        connect(network(0), network(1), batches(), points=points)


def test_refuses_networks():
    with pytest.raises(ArchitectureError, match="shapes differ"):
        connect(network(0), network(1, width=7), batches())
    with pytest.raises(ArchitectureError, match=r"1\.running_mean"):
        connect(network(0), network(1, norm=False), batches())
    broken = network(1)
    nn.init.constant_(broken[0].bias, torch.nan)
    with pytest.raises(NotFiniteError, match=r"network b: 0\.bias"):
        connect(network(0), broken, batches())


def test_refuses_data_and_repair():
    a, b = network(0), network(1)
    with pytest.raises(DataError, match="no labels"):
        connect(a, b, [x for x, _ in batches()])
    with pytest.raises(DataError, match="no batch"):
        connect(a, b, [])
    with pytest.raises(DataError, match="iterator"):
        connect(a, b, iter(batches()), repair="reset")
    with pytest.raises(DataError, match="'rest' is unknown"):
        connect(a, b, batches(), repair="rest")
    with pytest.raises(ArchitectureError, match="use method='rescale'"):
        connect(network(0, norm=False), network(1, norm=False), batches(), repair="reset")

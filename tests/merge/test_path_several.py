import copy
import json

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isthmus.base.errors import ArchitectureError, DataError
from isthmus.base.evaluation import accuracy
from isthmus.merge import connect, evaluate, interpolate
from isthmus.merge.paths import midpoint, plot_paths

mpl.use("Agg")


def network(seed, norm=True):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Linear(8, 3))
        net(torch.randn(50, 4))
        return net


def labelled(count=40, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    y = torch.randint(3, (count,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def second_best(outputs, targets):
    """One value for each sample: whether the label is among the two highest."""
    return (outputs.topk(2, dim=-1).indices == targets[:, None]).any(-1).float()


@pytest.mark.parametrize("repair", [None, "reset"])
def test_further_data_is_measured_in_the_same_call(repair):
    a, b, test, train = network(0), network(1), labelled(), labelled(count=24, seed=1)
    path = connect(a, b, test, points=5, also={"train": train}, repair=repair, repair_data=train)
    alone = connect(a, b, train, points=5, repair=repair)
    assert list(path.also) == ["train"]
    assert path.also["train"].loss.tolist() == alone.loss.tolist()
    assert path.also["train"].samples == 24
    assert path.also["train"].repair == repair
    assert path.also["train"].barrier_interval() == alone.barrier_interval()
    assert path.loss.tolist() == connect(a, b, test, points=5, repair=repair, repair_data=train).loss.tolist()
    content = json.loads(json.dumps(path.to_dict()))
    assert content["also"]["train"]["loss"] == alone.loss.tolist()
    if repair is None:
        once = connect(a, b, iter(test), points=5, also={"train": iter(train)})
        assert once.also["train"].loss.tolist() == alone.loss.tolist()
    else:
        with pytest.raises(DataError, match="is an iterator"):
            connect(a, b, test, repair=repair, also={"train": iter(train)})


@pytest.mark.parametrize("repair", [None, "reset"])
def test_any_number_of_metrics(repair):
    a, b, data = network(0), network(1), labelled()
    metrics = {"two": second_best, "accuracy": accuracy, "sure": lambda outputs, _: outputs.softmax(-1).amax(-1).mean()}
    path = connect(a, b, data, points=3, metric=metrics, repair=repair)
    plain = connect(a, b, data, points=3, repair=repair)
    assert list(path.metrics) == ["accuracy", "two", "sure"]
    assert plain.accuracy is not None
    assert path.accuracy is not None
    assert path.metric_name == "accuracy"
    assert path.accuracy.tolist() == plain.accuracy.tolist() == path.metrics["accuracy"].tolist()
    assert path.error is not None
    assert path.error.tolist() == (1 - plain.accuracy).tolist()
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    b.eval()
    with torch.no_grad():
        assert path.metrics["two"][-1] == pytest.approx(float(second_best(b(x), y).mean()))
        assert path.metrics["sure"][-1] == pytest.approx(float(b(x).softmax(-1).amax(-1).mean()))
    assert (path.metrics["two"] >= path.metrics["accuracy"]).all()
    low, high = path.barrier_interval(quantity="two")
    assert 0 <= low <= high
    assert path.values("two").tolist() == path.to_dict()["metrics"]["two"]
    with pytest.raises(DataError, match="'error', which is taken"):
        connect(a, b, data, metric={"error": accuracy})


def test_metrics_without_accuracy_and_none_at_all():
    a, b, data = network(0), network(1), labelled()
    path = connect(a, b, data, points=3, metric={"two": second_best})
    assert path.metric_name == "two"
    assert path.accuracy is not None
    assert path.accuracy.tolist() == path.values("accuracy").tolist() == path.metrics["two"].tolist()
    assert path.barrier_interval(quantity="accuracy") == path.barrier_interval(quantity="two")
    bare = connect(a, b, data, points=3, metric={}, loss=F.cross_entropy)
    assert bare.metrics == {}
    assert bare.error is None
    with pytest.raises(DataError, match="quantity 'error' was not measured"):
        bare.plot(quantity="error")


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_the_midpoint_alone(alpha):
    a, b, data = network(0), network(1), labelled()
    between = copy.deepcopy(a)
    between.load_state_dict(interpolate(a.state_dict(), b.state_dict(), alpha))
    assert midpoint(a, b, data, alpha=alpha) == evaluate(between, data)
    assert midpoint(a, b, iter(data), alpha=alpha).samples == 40
    found = midpoint(a, b, data, alpha=alpha, loss=F.cross_entropy, metric=second_best)
    assert found.metric == pytest.approx(evaluate(between, data, metric=second_best).metric)


@pytest.mark.parametrize("norm", [True, False])
def test_the_midpoint_repaired(norm):
    a, b, data, train = network(0, norm), network(1, norm), labelled(), labelled(seed=1)
    states = [{name: tensor.clone() for name, tensor in net.state_dict().items()} for net in (a, b)]
    path = connect(a, b, data, points=3, repair="auto", repair_data=train)
    found = midpoint(a, b, data, repair="auto", repair_data=train)
    assert (found.loss, found.metric) == (path.midpoint_loss, path.midpoint_accuracy)
    for net, before in zip((a, b), states, strict=True):
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(module.training for module in a.modules())


def test_the_midpoint_refuses():
    a, b, data = network(0), network(1), labelled()
    for alpha in (0, 1, -1, float("nan")):
        with pytest.raises(DataError, match="between 0 and 1"):
            midpoint(a, b, data, alpha=alpha)
    with pytest.raises(DataError, match="is an iterator"):
        midpoint(a, b, data, repair="reset", repair_data=iter(data))
    with pytest.raises(ArchitectureError, match="use method='rescale'"):
        midpoint(network(0, False), network(1, False), data, repair="reset")


def test_paths_beside_each_other():
    a, b, data = network(0), network(1), labelled()
    naive = connect(a, b, data, points=5, also={"train": labelled(seed=1)})
    other = connect(a, a, data, points=5)
    ax = plot_paths({"naive": naive, "itself": other}, quantity="error")
    lines = {line.get_label(): np.asarray(line.get_ydata()) for line in ax.lines}
    assert list(lines) == ["naive", "naive, train", "itself"]
    assert naive.error is not None
    assert lines["naive"].tolist() == naive.error.tolist()
    assert naive.also["train"].error is not None
    assert lines["naive, train"].tolist() == naive.also["train"].error.tolist()
    colours = [line.get_color() for line in ax.lines]
    assert colours[0] == colours[1] != colours[2]
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == list(lines)
    assert ax.get_ylabel() == "error"
    assert plot_paths({"naive": naive}, ax=ax, band=0.9) is ax
    assert len(ax.collections) == 2
    assert ax.get_ylim()[0] <= 0
    with pytest.raises(DataError, match="no path to draw"):
        plot_paths({})
    with pytest.raises(DataError, match="'sure' was not measured"):
        plot_paths({"naive": naive}, quantity="sure")
    plt.close("all")


def test_a_path_with_further_data_names_both():
    path = connect(network(0), network(1), labelled(), points=3, also={"train": labelled(seed=1)})
    assert [line.get_label() for line in path.plot().lines] == ["data", "train"]
    assert [line.get_label() for line in path.plot(label="test").lines] == ["test", "test, train"]
    plt.close("all")

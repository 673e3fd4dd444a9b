import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from isthmus.align import match
from isthmus.base.errors import ArchitectureError, DataError, NotFiniteError
from isthmus.merge import connect, evaluate, interpolate, repair


def seeded(make, seed) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def mlp():
    return nn.Sequential(
        nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 6, bias=False), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)
    )


def convnet():
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(5, 6, 3, groups=1, stride=2),
        nn.Flatten(2),
        nn.Conv1d(6, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 8, 3),
    )


def normed():
    return nn.Sequential(
        nn.Conv2d(2, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(5, 4, 3, bias=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.Flatten(),
        nn.Linear(4 * 9, 3),
        nn.BatchNorm1d(3, affine=False),
    )


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def between(a, b, alpha) -> Any:
    model = copy.deepcopy(a)
    model.load_state_dict(interpolate(a.state_dict(), b.state_dict(), alpha))
    return model


def raw_outputs(model, x):
    """Outputs of every linear layer in numpy, units last."""
    found = []
    for layer in model.eval():
        x = layer(x)
        if isinstance(layer, nn.Linear):
            found.append(x.detach().double().numpy())
        elif isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            found.append(x.detach().double().movedim(1, -1).flatten(0, -2).numpy())
    return found


@pytest.mark.parametrize(("make", "shape"), [(mlp, (64, 4)), (convnet, (40, 2, 7, 7))])
@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_rescaled_units_have_the_statistics_of_their_targets(make, shape, alpha):
    a, b = seeded(make, 0), seeded(make, 1)
    x = inputs(*shape)
    naive = between(a, b, alpha)
    repaired = repair(naive, x, method="rescale", endpoints=(a, b), alpha=alpha)
    layers = [layer for layer in repaired if hasattr(layer, "weight")]
    found = zip(layers, *(raw_outputs(model, x) for model in (a, b, naive, repaired)), strict=True)
    for index, (layer, of_a, of_b, before, after) in enumerate(found):
        std = (1 - alpha) * of_a.std(0) + alpha * of_b.std(0)
        if index == len(layers) - 1:
            assert torch.equal(layer.weight, naive[-1].weight)  # the logits are left alone
        else:
            np.testing.assert_allclose(after.std(0), std, rtol=1e-5)
            assert np.abs(before.std(0) - std).max() > 0.01 * std.max()
        if index < len(layers) - 1 and layer.bias is not None:
            mean = (1 - alpha) * of_a.mean(0) + alpha * of_b.mean(0)
            np.testing.assert_allclose(after.mean(0), mean, atol=1e-5 * np.abs(mean).max())


# the first bound joins all batches; the second some, which takes further passes; the third keeps none of the inputs
@pytest.mark.parametrize("memory", [2**30, 2000, 0])
@pytest.mark.parametrize("data", ["split", "iterator"])
def test_every_layer_is_exact_over_many_batches(memory, data):
    a, b = seeded(mlp, 0), seeded(mlp, 1)
    x = inputs(60, 4)
    given = iter(x.split(7)) if data == "iterator" else x.split(7)
    if data == "iterator" and not memory:
        with pytest.raises(DataError, match="is an iterator"):
            repair(between(a, b, 0.5), given, endpoints=(a, b), memory=memory)
        return
    repaired = repair(between(a, b, 0.5), given, endpoints=(a, b), memory=memory)
    for index in range(3):
        of_a, of_b, after = (raw_outputs(model, x)[index] for model in (a, b, repaired))
        np.testing.assert_allclose(after.std(0), (of_a.std(0) + of_b.std(0)) / 2, rtol=1e-5)
        if index != 1:  # that layer has no bias
            np.testing.assert_allclose(after.mean(0), (of_a.mean(0) + of_b.mean(0)) / 2, atol=1e-5)


def test_the_logits_are_rescaled_on_request():
    a, b, x = seeded(mlp, 0), seeded(mlp, 1), inputs(60, 4)
    repaired = repair(between(a, b, 0.5), x.split(20), endpoints=(a, b), logits=True)
    of_a, of_b, after = (raw_outputs(model, x)[-1] for model in (a, b, repaired))
    np.testing.assert_allclose(after.std(0), (of_a.std(0) + of_b.std(0)) / 2, rtol=1e-5)
    np.testing.assert_allclose(after.mean(0), (of_a.mean(0) + of_b.mean(0)) / 2, atol=1e-5)
    single = nn.Linear(4, 2)
    torch.testing.assert_close(repair(single, x, endpoints=(single, single), logits=True)(x), single(x))


def test_data_is_read_once():
    a, b = seeded(mlp, 0), seeded(mlp, 1)
    readings = []

    class Batches:
        def __iter__(self):
            readings.append(1)
            yield from inputs(60, 4).split(20)

    repair(between(a, b, 0.5), Batches(), endpoints=(a, b))
    assert len(readings) == 1


@pytest.mark.parametrize(("make", "shape"), [(mlp, (64, 4)), (convnet, (40, 2, 7, 7))])
def test_the_same_network_at_both_ends_needs_no_repair(make, shape):
    a, x = seeded(make, 0), inputs(*shape)
    repaired = repair(a, x, endpoints=(a, a))
    torch.testing.assert_close(repaired(x), a(x), rtol=1e-4, atol=1e-5)
    assert a(x).std() > 0.01


def test_undoes_what_scales_and_shifts_the_units():
    # no statistics in this oracle: whatever affine map disturbs the hidden units, the repair takes it back
    a, x = seeded(mlp, 0), inputs(64, 4)
    disturbed = copy.deepcopy(a)
    with torch.no_grad():
        for index, layer in enumerate(disturbed[:-1]):
            if isinstance(layer, nn.Linear):
                scale = 0.2 + inputs(len(layer.weight), seed=index).abs()
                layer.weight.mul_(scale[:, None])
                if layer.bias is not None:
                    layer.bias.mul_(scale).add_(3 * scale)
    assert (disturbed(x) - a(x)).abs().max() > 0.1
    torch.testing.assert_close(repair(disturbed, x, endpoints=(a, a))(x), a(x), rtol=1e-3, atol=1e-4)


def test_many_parents_are_weighted():
    parents = [seeded(mlp, seed) for seed in range(3)]
    x, shares = inputs(64, 4), [0.5, 0.2, 0.3]
    repaired = repair(parents[0], x, method="rescale", endpoints=parents, weights=[5, 2, 3])
    of_parents = [raw_outputs(parent, x)[0] for parent in parents]
    after = raw_outputs(repaired, x)[0]
    np.testing.assert_allclose(after.std(0), np.average([y.std(0) for y in of_parents], 0, shares), rtol=1e-5)
    np.testing.assert_allclose(after.mean(0), np.average([y.mean(0) for y in of_parents], 0, shares), atol=1e-5)
    equal = raw_outputs(repair(parents[0], x, endpoints=parents), x)[0]
    np.testing.assert_allclose(equal.std(0), np.mean([y.std(0) for y in of_parents], 0), rtol=1e-5)


def test_a_unit_that_never_varies_is_shifted_only():
    a, b, x = seeded(mlp, 0), seeded(mlp, 1), inputs(64, 4)
    merged = between(a, b, 0.5)
    with torch.no_grad():
        merged[0].weight[2] = 0
        merged[0].bias[2] = 123.456
    repaired = repair(merged, x, endpoints=(a, b))
    assert torch.equal(repaired[0].weight[2], torch.zeros(4))
    mean = (raw_outputs(a, x)[0].mean(0) + raw_outputs(b, x)[0].mean(0))[2] / 2
    assert repaired[0].bias[2].item() == pytest.approx(mean, abs=1e-4)


def test_a_layer_without_bias_is_scaled_only():
    a, b, x = seeded(mlp, 0), seeded(mlp, 1), inputs(64, 4)
    merged = between(a, b, 0.5)
    ratio = repair(merged, x, endpoints=(a, b))[2].weight / merged[2].weight
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=0)
    assert (ratio - 1).abs().max() > 0.05


def test_shared_layers_and_shared_weights():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.tied = nn.Linear(4, 4)
            self.tied.weight = self.again.weight
            self.unused = nn.Linear(2, 2)

        def forward(self, x):
            for layer in (self.first, self.first, self.again, self.tied):
                x = torch.relu(layer(x))
            return self.head(x)

    a, b, x = seeded(Shared, 0), seeded(Shared, 1), inputs(64, 4)
    merged = between(a, b, 0.5)
    repaired = repair(merged, x, endpoints=(a, b))
    same = {
        name: torch.equal(p, q) for (name, p), q in zip(merged.named_parameters(), repaired.parameters(), strict=True)
    }
    assert [name for name, equal in same.items() if not equal] == ["first.weight", "first.bias"]

    def pooled(model):
        once = model.first(x)
        return torch.cat([once, model.first(once.relu())]).detach().double().numpy()

    target = (pooled(a).std(0) + pooled(b).std(0)) / 2
    assert np.abs(pooled(repaired).std(0) / target - 1).max() < np.abs(pooled(merged).std(0) / target - 1).max()


def dense_statistics(model, x):
    """Mean and unbiased variance of the inputs of every batch norm, each of which normalises by just these."""
    found = []
    x = x.double()
    for layer in copy.deepcopy(model).double().eval():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            flat = x.movedim(1, -1).flatten(0, -2)
            found.append((flat.mean(0), flat.var(0)))
            shape = [1, -1] + [1] * (x.ndim - 2)
            x = (x - flat.mean(0).view(shape)) / (flat.var(0) + layer.eps).sqrt().view(shape)
            if layer.affine:
                x = x * layer.weight.view(shape) + layer.bias.view(shape)
        else:
            x = layer(x)
    return found


def test_reset_equals_a_dense_oracle_in_one_batch():
    model, x = seeded(normed, 0), inputs(20, 2, 7, 7)
    with torch.no_grad():
        model[1].weight.copy_(inputs(5))
    repaired = repair(model, x)
    norms = [layer for layer in repaired if hasattr(layer, "running_mean")]
    for layer, (mean, variance) in zip(norms, dense_statistics(model, x), strict=True):
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-5, atol=1e-5)
        assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("method", ["auto", "reset"])
def test_reset_is_exact_over_uneven_batches(method):
    model, x = seeded(normed, 0), inputs(23, 2, 7, 7)
    x[:7] += 10  # far from the rest: the mean of the batches' variances would be far off
    repaired = repair(model, iter(x.split([7, 2, 14])), method=method)
    norms = [layer for layer in repaired if hasattr(layer, "running_mean")]
    for layer, (mean, variance) in zip(norms, dense_statistics(model, x), strict=True):
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-5, atol=1e-6)
        assert layer.num_batches_tracked == 3


def test_reset_leaves_a_norm_that_is_not_reached():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.bare = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)
            self.bare = nn.BatchNorm1d(3, track_running_stats=False)
            self.unused.running_mean = torch.full((3,), 5.0)

        def forward(self, x):
            return self.bare(self.used(input=x))

    x = inputs(9, 3)
    repaired = repair(Partly(), x)
    torch.testing.assert_close(repaired.used.running_mean, x.mean(0))
    assert torch.equal(repaired.get_buffer("unused.running_mean"), torch.full((3,), 5.0))


@pytest.mark.parametrize("fault", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(("make", "method"), [(normed, "reset"), (normed, "rescale"), (convnet, "rescale")])
def test_leaves_every_network_alone(make, method, fault):
    a, b = seeded(make, 0), seeded(make, 1).eval()
    model = between(a, b, 0.5)
    model[1].eval()
    before = [copy.deepcopy(m.state_dict()) for m in (a, b, model)]
    modes = [[x.training for x in m.modules()] for m in (a, b, model)]

    def data():
        yield inputs(8, 2, 7, 7)
        if fault:
            raise fault
        yield inputs(8, 2, 7, 7, seed=1)

    class Batches:
        def __iter__(self):
            return data()

    if fault:
        with pytest.raises(fault):
            repair(model, Batches(), method=method, endpoints=(a, b))
    else:
        repaired = repair(model, Batches(), method=method, endpoints=(a, b), device="cpu")
        assert [x.training for x in repaired.modules()] == modes[2]
        assert any(not torch.equal(x, repaired.state_dict()[name]) for name, x in before[2].items())
        again = repair(model, Batches(), method=method, endpoints=(a, b))
        assert all(torch.equal(x, again.state_dict()[name]) for name, x in repaired.state_dict().items())
    for m, state, flags in zip((a, b, model), before, modes, strict=True):
        assert all(torch.equal(x, state[name]) for name, x in m.state_dict().items())
        assert [x.training for x in m.modules()] == flags
        assert not any(x._forward_hooks or x._forward_pre_hooks for x in m.modules())


def test_refuses_methods_that_do_not_fit():
    a, x = seeded(mlp, 0), inputs(8, 4)
    with pytest.raises(ArchitectureError, match="use method='rescale'"):
        repair(a, x, method="reset")
    with pytest.raises(DataError, match="'renorm' is unknown; choose one of 'auto', 'reset', 'rescale', 'both'"):
        repair(a, x, method="renorm")
    with pytest.raises(ArchitectureError, match="pass endpoints="):
        repair(a, x)
    with pytest.raises(ArchitectureError, match="no linear or convolutional layer"):
        repair(nn.ReLU(), x)
    with pytest.raises(ArchitectureError, match="no hidden"):
        repair(nn.Linear(4, 2), x, endpoints=(nn.Linear(4, 2), nn.Linear(4, 2)))
    bound = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    with pytest.raises(ArchitectureError, match="the weight of 0 is computed"):
        repair(nn.Sequential(bound, nn.Linear(4, 2)), x)


def test_refuses_endpoints_and_weights():
    a, x = seeded(mlp, 0), inputs(8, 4)
    with pytest.raises(ArchitectureError, match=r"only model has .*endpoints\[1\]|endpoints\[1\]"):
        repair(a, x, endpoints=(a, seeded(convnet, 0)))
    with pytest.raises(DataError, match="expected a number from 0"):
        repair(a, x, endpoints=(a, a), alpha=1.5)
    with pytest.raises(DataError, match="3 weights for 2"):
        repair(a, x, endpoints=(a, a), weights=[1, 1, 1])


@pytest.mark.parametrize("make", [mlp, normed])
def test_refuses_data(make):
    model = seeded(make, 0)
    ends = (model, model)
    shape = (4,) if make is mlp else (2, 7, 7)
    with pytest.raises(DataError, match="no batch"):
        repair(model, [], endpoints=ends)
    with pytest.raises(NotFiniteError, match="batch 0"):
        repair(model, torch.full((4, *shape), torch.nan), endpoints=ends)
    if make is mlp:
        with pytest.raises(DataError, match=r"one value for each unit, of shape \(1, .*drop_last=True"):
            repair(model, inputs(1, *shape), endpoints=ends)
    repair(model, [inputs(5, *shape), inputs(1, *shape)], endpoints=ends)  # joined, they have a variance
    with pytest.raises(DataError, match=r"one value for each unit, of shape \(1, .*drop_last=True"):
        repair(model, [inputs(5, *shape), inputs(1, *shape)], endpoints=ends, memory=0)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the products are too small to share
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_raises_the_midpoint_of_a_narrow_deep_network():
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images / 16, dtype=torch.float32)[order], torch.tensor(labels)[order]

    def train(seed):
        widths = [64, *[64] * 6]
        layers = [m for p, q in itertools.pairwise(widths) for m in (nn.Linear(p, q), nn.ReLU())]
        for layer in layers[::2]:
            nn.init.kaiming_normal_(layer.get_parameter("weight"))
        net = nn.Sequential(*layers, nn.Linear(64, 10))
        optimiser = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(15):
            for rows in torch.randperm(1400, generator=generator).split(100):
                optimiser.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                optimiser.step()
        return net

    a, b = seeded(lambda: train(0), 0), seeded(lambda: train(1), 1)
    test, calibration = (x[1400:], y[1400:]), (x[:1400], y[:1400])
    b = match(a, b, calibration, method="activations").apply(b)
    plain = connect(a, b, test, points=3)
    fixed = connect(a, b, test, points=3, repair="rescale", repair_data=calibration)
    assert plain.accuracy is not None
    assert fixed.midpoint_accuracy is not None
    assert plain.midpoint_accuracy is not None
    assert min(plain.accuracy[[0, 2]]) > 0.95
    assert fixed.midpoint_accuracy > plain.midpoint_accuracy + 0.1
    assert fixed.barrier < plain.barrier
    alone = repair(between(a, b, 0.5), calibration, endpoints=(a, b))
    assert evaluate(alone, test).metric == pytest.approx(fixed.midpoint_accuracy)

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isthmus.align import match, symmetry
from isthmus.base.errors import ArchitectureError, DataError, NotFiniteError
from isthmus.merge import evaluate, merge, repair, weighted_mean


def network(seed, width=12, norm=False) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(5, width),
            nn.BatchNorm1d(width) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, 3),
        )
        if norm:
            net(torch.randn(64, 5) * 2 + 1)
    return net


def labelled(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(count // 4, 5, generator=generator), torch.randint(3, (count // 4,), generator=generator))
        for _ in range(4)
    ]


@pytest.mark.parametrize("align", ["weights", "activations"])
@pytest.mark.parametrize("norm", [False, True])
def test_permuted_copies_merge_into_the_function_of_the_first(align, norm):
    a, data = network(0, norm=norm).eval(), labelled()
    found = symmetry(a, data[0][0])
    copies = [found.random(torch.Generator().manual_seed(seed)).apply(a) for seed in (1, 2)]
    merged = merge([a, *copies], data, align=align)
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(merged.model(x), a(x), rtol=1e-4, atol=1e-5)
    naive = merge([a, *copies], data, align=None)
    assert (naive.model(x) - a(x)).abs().max() > 0.1
    assert len(merged.report["objective"]) == 2
    assert merged.report["merged"]["loss"] == pytest.approx(evaluate(a, data).loss, rel=1e-4)


def test_the_report_holds_what_was_measured():
    models, data = [network(seed) for seed in range(3)], labelled()
    merged = merge(models, data, weights=[2, 1, 1])
    assert set(merged.report) == {
        "method", "weights", "align", "objective", "repair", "repaired_on", "parents", "merged", "samples",
    }  # fmt: skip
    assert merged.report["weights"] == [0.5, 0.25, 0.25]
    assert merged.report["method"] == "mean"
    assert merged.report["align"] == "weights"
    assert merged.report["samples"] == 40
    found = [evaluate(model, data) for model in (*models, merged.model)]
    for given, own in zip([*merged.report["parents"], merged.report["merged"]], found, strict=True):
        assert given == {"loss": own.loss, "metric": own.metric}
    matchings = [match(models[0], model, data) for model in models[1:]]
    assert merged.report["objective"] == [matching.objective for matching in matchings]
    given = merge(models, align=matchings, weights=[2, 1, 1])
    assert given.report["align"] == "given"
    assert "merged" not in given.report
    for (name, x), y in zip(given.model.state_dict().items(), merged.model.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_without_alignment_it_is_the_weighted_mean():
    models = [network(seed, norm=True) for seed in range(3)]
    merged = merge(models, align=None, weights=[1, 0, 3]).model
    oracle = weighted_mean([model.state_dict() for model in models], [1, 0, 3])
    assert all(torch.equal(tensor, oracle[name]) for name, tensor in merged.state_dict().items())
    expected = (models[0][0].weight.detach().numpy() + 3 * models[2][0].weight.detach().numpy()) / 4
    first: Any = merged
    np.testing.assert_allclose(first[0].weight.detach().numpy(), expected, atol=1e-6)


def test_data_without_labels_measures_nothing_unless_a_loss_needs_none():
    models = [network(0), network(1)]
    inputs = [x for x, _ in labelled()]
    assert "parents" not in merge(models, inputs).report
    report = merge(models, inputs, loss=lambda out, _: out.square().mean()).report
    assert report["parents"][0]["metric"] is None
    assert report["parents"][0]["loss"] != report["parents"][1]["loss"]


@pytest.mark.parametrize(("norm", "method"), [(False, "rescale"), (True, "reset"), (True, "rescale")])
def test_repair_is_that_of_the_aligned_parents(norm, method):
    models, data = [network(seed, norm=norm).eval() for seed in range(3)], labelled()
    merged = merge(models, data, weights=[1, 2, 1], repair=method)
    matchings = [match(models[0], model, data) for model in models[1:]]
    aligned = [models[0], *(m.apply(model) for m, model in zip(matchings, models[1:], strict=True))]
    plain = merge(aligned, align=None, weights=[1, 2, 1]).model
    oracle = repair(plain, data, method=method, endpoints=aligned, weights=[1, 2, 1])
    for (name, x), y in zip(merged.model.state_dict().items(), oracle.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, msg=name)
    assert any(
        not torch.equal(x, y) for x, y in zip(plain.state_dict().values(), oracle.state_dict().values(), strict=True)
    )
    assert merged.report["repair"] == method
    assert merged.report["repaired_on"] == "data"
    other = merge(models, data, weights=[1, 2, 1], repair="auto", repair_data=[x + 1 for x, _ in data])
    assert other.report["repaired_on"] == "repair_data"
    assert other.report["repair"] == ("reset" if norm else "rescale")
    assert other.report["merged"] != merged.report["merged"]


def test_leaves_the_parents_alone_and_repeats_itself():
    models, data = [network(0).eval(), network(1).train()], labelled()
    before = [copy.deepcopy(model.state_dict()) for model in models]
    first, second = (merge(models, data, align="activations", repair="auto", seed=3, device="cpu") for _ in range(2))
    for model, state, training in zip(models, before, (False, True), strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert all(module.training is training for module in model.modules())
    assert first.report == second.report
    assert all(map(torch.equal, first.model.state_dict().values(), second.model.state_dict().values()))
    assert not first.model.training


def test_a_given_symmetry_needs_no_data():
    a = network(0)
    found = symmetry(a, torch.randn(2, 5))
    planted = found.random(torch.Generator().manual_seed(0)).apply(a)
    merged = merge([a, planted], symmetry=found)
    found: Any = merged.model
    torch.testing.assert_close(found[3].weight, a[3].weight)
    assert not torch.equal(planted[3].weight, a[3].weight)


def test_unsaved_buffers_and_ties_are_kept():
    class Tied(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
            nn.init.constant_(self.a.weight, value)
            self.b.weight = self.a.weight
            self.register_buffer("scale", torch.tensor(float(value)), persistent=False)

    merged: Any = merge([Tied(1), Tied(3)], align=None).model
    assert merged.a.weight is merged.b.weight
    assert merged.a.weight.tolist() == [[2, 2], [2, 2]]
    assert merged.scale == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "tangle"}, "method 'tangle' is unknown"),
        ({"align": "guess"}, "'guess' is unknown"),
        ({"align": []}, "2 networks need 1 matchings"),
        ({"align": object()}, "2 networks need 1 matchings"),
        ({}, "pass data or symmetry="),
        ({"align": "activations"}, "runs the networks on data"),
        ({"align": "weigths"}, "did you mean weights"),
        ({"align": None, "repair": "auto"}, "repair='auto' measures statistics on data"),
        ({"data": iter([])}, "is an iterator"),
        ({"align": None, "repair": "auto", "repair_data": iter([])}, "is an iterator"),
        ({"data": []}, "no batch"),
        ({"align": None, "weights": [1, -1]}, "none negative"),
        ({"align": None, "weights": [1]}, "1 weights for 2"),
        ({"data": (torch.zeros(2, 5), torch.tensor([0, 3]))}, "label 3 does not fit"),
    ],
)
def test_refuses_arguments(arguments, message):
    with pytest.raises(DataError, match=message):
        merge([network(0), network(1)], **arguments)


def test_refuses_networks():
    with pytest.raises(ArchitectureError, match="two networks or more, and there are 1"):
        merge([network(0)], align=None)
    with pytest.raises(ArchitectureError, match=r"0\.weight: \(12, 5\) in 0, \(9, 5\) in 1"):
        merge([network(0), network(1, width=9)], labelled())
    with pytest.raises(ArchitectureError, match="use method='rescale'"):
        merge([network(0), network(1)], labelled(), repair="reset")
    broken = network(1)
    nn.init.constant_(broken[3].weight, torch.inf)
    with pytest.raises(NotFiniteError, match=r"network 1: 3\.weight"):
        merge([network(0), broken], labelled())


def test_regression_labels_need_a_loss():
    models = [network(0), network(1)]
    data = [(x, x[:, :3]) for x, _ in labelled()]
    with pytest.raises(DataError, match="pass loss= and metric="):
        merge(models, data)
    assert merge(models, data, loss=F.mse_loss).report["merged"]["loss"] > 0

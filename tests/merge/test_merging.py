import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isthmus.align import match, match_many, symmetry
from isthmus.base.errors import ArchitectureError, DataError, NotFiniteError, OutputError
from isthmus.base.files import load_state_dict
from isthmus.merge import evaluate, merge, repair, weighted_mean
from isthmus.merge.ensemble import Ensemble
from isthmus.merge.repairs import choose_method


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
        "method", "options", "weights", "base", "align", "align_reason", "objective", "repair", "repaired_on",
        "fitted_on", "parents", "ensemble", "merged", "samples",
    }  # fmt: skip
    assert (merged.report["base"], merged.report["align_reason"], merged.report["fitted_on"]) == (None, None, None)
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
    together = evaluate(Ensemble(models, [2, 1, 1]), data)
    assert merged.report["ensemble"] == {"loss": together.loss, "metric": together.metric}
    assert "ensemble" not in merge(models, data, ensemble=False).report
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
    assert other.report["repair"] == choose_method(models[0], "auto")
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
        ({"align": "univers"}, "did you mean universe"),
        ({"align": "universe"}, "pass data or symmetry="),
        ({"align_options": {"restart": 1}}, "'weights' has no option 'restart'; did you mean restarts"),
        ({"align": "universe", "align_options": {"bound": 1}}, "'universe' has no option 'bound'"),
        ({"align": None, "align_options": {"restarts": 1}}, "nothing is matched here"),
        ({"align": None, "base": [network(0)] * 3}, "3 bases for 2 networks"),
        ({"align": None, "fit_data": iter([])}, "is an iterator"),
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


# Fine-tuned networks


def tuned(base, seed, size=0.1):
    """A network not far from its parent."""
    child = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in child.parameters():
            tensor.add_(size * torch.randn(tensor.shape, generator=generator))
    return child


def test_networks_of_one_base_are_not_aligned_unless_asked():
    base, data = network(0), labelled()
    models = [tuned(base, 1), tuned(base, 2)]
    merged = merge(models, data, method="task_arithmetic", base=base, scale=0.5)
    assert merged.report["align"] is None
    assert "order of units is theirs" in merged.report["align_reason"]
    assert merged.report["base"] == "common"
    assert merged.report["options"] == {"scale": 0.5}
    oracle = merge(models, data, align=None).model.state_dict()  # half of both is their mean
    for name, tensor in merged.model.state_dict().items():
        torch.testing.assert_close(tensor, oracle[name])
    asked = merge(models, data, method="task_arithmetic", base=base, scale=0.5, align="weights")
    assert (asked.report["align"], asked.report["align_reason"]) == ("weights", None)
    assert len(asked.report["objective"]) == 1
    assert inspect.signature(merge).parameters["align"].default == "weights"
    plain = merge(models, base=[base, base])  # the mean of networks that share their parent
    assert plain.report["align"] is None
    assert plain.report["base"] == "common"


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare"])
@pytest.mark.parametrize("align", ["weights", "universe", "given"])
def test_parents_are_moved_with_their_children(method, align):
    base, data = network(0), labelled()
    children = [tuned(base, seed) for seed in (1, 2, 3)]
    found = symmetry(base, data[0][0])
    moves = [found.identity(), *(found.random(torch.Generator().manual_seed(seed)) for seed in (1, 2))]
    models = [move.apply(child) for move, child in zip(moves, children, strict=True)]
    bases = [move.apply(base) for move in moves]
    how: dict[str, Any] = {} if align == "weights" else {"align": align}
    if align == "given":
        how["align"] = [match(models[0], model, data) for model in models[1:]]
    merged = merge(models, data, method=method, base=bases, **how)
    assert merged.report["base"] == "own"
    assert merged.report["align"] == align
    oracle = merge(children, data, method=method, base=base).model.state_dict()
    for name, tensor in merged.model.state_dict().items():
        torch.testing.assert_close(tensor, oracle[name], rtol=1e-4, atol=1e-5, msg=name)


def test_one_network_is_enough_with_a_parent():
    base = network(0)
    child = tuned(base, 1)
    merged = merge([child], method="task_arithmetic", base=base, scale=-1.0)
    for (name, tensor), parent, own in zip(
        merged.model.state_dict().items(), base.state_dict().values(), child.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(tensor, 2 * parent - own, msg=name)
    assert merged.report["align_reason"] == "there is one network"


def test_all_at_once_by_one_matching():
    a, data = network(0), labelled()
    found = symmetry(a, data[0][0])
    copies = [found.random(torch.Generator().manual_seed(seed)).apply(a) for seed in (1, 2)]
    merged = merge([a, *copies], data, align="universe", align_options={"method": "merge_many"}, seed=2)
    matching = match_many([a, *copies], data, method="merge_many", seed=2)
    assert merged.report["objective"] == [matching.objective]
    given = merge([a, *copies], data, align=matching)
    assert given.report["align"] == "given"
    for (name, tensor), other, own in zip(
        merged.model.state_dict().items(), given.model.state_dict().values(), a.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name
        torch.testing.assert_close(tensor, own, msg=name)
    # whichever network a matching keeps as it is, the result is in the order of the first
    last = merge([a, *copies], data, align=match_many([a, *copies], data, reference=2))
    torch.testing.assert_close(dict(last.model.named_parameters())["0.weight"], a[0].weight)
    with pytest.raises(DataError, match="matching is of 3 networks, and there are 2"):
        merge([a, copies[0]], data, align=matching)


def test_alignment_and_repair_read_fit_data():
    models, data = [network(0), network(1)], labelled()
    other = labelled(seed=5)
    options: dict[str, Any] = {"align": "activations", "repair": "rescale"}
    fitted = merge(models, data, fit_data=other, **options)
    oracle = merge(models, other, **options)
    assert (fitted.report["fitted_on"], fitted.report["repaired_on"]) == ("fit_data", "fit_data")
    assert (oracle.report["fitted_on"], oracle.report["repaired_on"]) == ("data", "data")
    assert all(map(torch.equal, fitted.model.state_dict().values(), oracle.model.state_dict().values()))
    assert fitted.report["merged"]["loss"] == evaluate(fitted.model, data).loss
    assert "merged" not in merge(models, fit_data=other, **options).report


def test_a_soup_is_repaired_by_those_that_are_in_it():
    models = [network(7), tuned(network(0), 1, size=0.001), network(0)]
    with torch.no_grad():
        data = [(x, models[2](x).argmax(1)) for x, _ in labelled()]
    soup = merge(models, data, method="greedy_soup", align=None, repair="rescale")
    chosen = soup.report["chosen"]
    assert chosen == [1, 2]
    ends = [models[index] for index in chosen]
    plain = merge(models, data, method="greedy_soup", align=None).model
    oracle = repair(plain, data, method="rescale", endpoints=ends, weights=[1] * len(ends))
    for tensor, other in zip(soup.model.state_dict().values(), oracle.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, other)


def test_heads_of_other_sizes_point_to_zipping():
    models = [network(0), network(1)]
    wide = network(1)
    wide[5] = nn.Linear(12, 7)
    with pytest.raises(
        ArchitectureError, match=r"5\.weight: \(3, 12\) in 0, \(7, 12\) in 1.*Only 5 differs.*zip_networks"
    ):
        merge([models[0], wide], labelled())
    deeper = nn.Sequential(*models[1], nn.Linear(3, 3))
    with pytest.raises(ArchitectureError, match=r"only 1 has 6\.weight, 6\.bias") as caught:
        merge([models[0], deeper], labelled())
    assert "zip_networks" not in str(caught.value)


def test_saves_whole_or_not_at_all(tmp_path):
    merged = merge([network(0), network(1)], align=None)
    for name in ("net.safetensors", "net.pt"):
        path = merged.save(tmp_path / name)
        state = load_state_dict(path)
        assert all(torch.equal(tensor, state[key]) for key, tensor in merged.model.state_dict().items())
    with pytest.raises(OutputError, match="missing"):
        merged.save(tmp_path / "missing" / "net.safetensors")

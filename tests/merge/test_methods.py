"""Every method of `merge`: what it must leave alone, what it must refuse; and the mean by layers."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from isthmus.base.errors import ArchitectureError, DataError, NotFiniteError
from isthmus.merge import merge, weighted_mean
from isthmus.merge.averages.mean import mean
from isthmus.merge.merging import merge_states
from isthmus.merge.methods import METHODS, Method, method_of, rehearse


def network(seed, width=6, outputs=3) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, outputs),
        )  # fmt: skip
        net(torch.randn(64, 4) * 2 + 1)
    return net.eval()


def labelled():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(32, 4, generator=generator), torch.randint(3, (32,), generator=generator)) for _ in range(3)]


ON_STATES = [name for name, method in METHODS.items() if method.on_states]
# What solves for weights by a decomposition gives the same network up to rounding.
ROUNDED = {"fisher", "regmean", "least_squares", "zip"}
# By default it expects batch norms to be measured anew.
OPTIONS: dict[str, dict[str, Any]] = {"least_squares": {"inputs": "parents"}}


@pytest.mark.parametrize("name", METHODS)
def test_a_network_merged_with_itself_is_itself(name):
    model, data = network(0), labelled()
    models = [model, copy.deepcopy(model)]
    before = copy.deepcopy(model.state_dict())
    merged = merge(models, data, method=name, base=copy.deepcopy(model), align=None, **OPTIONS.get(name, {}))
    for key, tensor in merged.model.state_dict().items():
        if name not in ROUNDED:
            assert torch.equal(tensor, before[key]), key
        elif name != "zip":
            torch.testing.assert_close(tensor, before[key], rtol=1e-4, atol=1e-5, msg=key)
    x = labelled()[0][0]
    torch.testing.assert_close(merged.model(x), model(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_networks_are_left_alone_and_results_repeat(name):
    models, base, data = [network(1), network(2).train()], network(0), labelled()
    before = [copy.deepcopy(model.state_dict()) for model in (*models, base)]
    first, second = (merge(models, data, method=name, base=base, seed=3) for _ in range(2))
    for model, state in zip((*models, base), before, strict=True):
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
    assert models[1].training
    assert not base.training
    assert all(map(torch.equal, first.model.state_dict().values(), second.model.state_dict().values()))
    assert first.report == second.report
    assert first.report["method"] == name
    assert {"parents", "ensemble", "merged", "samples"} <= first.report.keys()
    assert type(first.model) is nn.Sequential
    assert any(not torch.equal(t, before[0][key]) for key, t in first.model.state_dict().items()) or (
        first.report.get("chosen") == [0]
    )


@pytest.mark.parametrize("name", METHODS)
def test_bad_input_is_refused_by_name(name):
    models, base, data = [network(1), network(2)], network(0), labelled()
    with pytest.raises(DataError, match="has no option 'densty'"):
        merge(models, data, method=name, base=base, densty=0.5)
    with pytest.raises(ArchitectureError, match=r"0\.weight: \(6, 4\) in 0, \(7, 4\) in 1"):
        merge([models[0], network(2, width=7)], data, method=name, base=base)
    with pytest.raises(ArchitectureError, match=r"5\.weight: \(3, 6\) in 0, \(2, 6\) in 1.*zip_networks"):
        merge([models[0], network(2, outputs=2)], data, method=name, base=base)
    with torch.no_grad():
        models[1][3].bias[2] = math.nan
    with pytest.raises(NotFiniteError, match=r"network 1: 3\.bias"):
        merge(models, data, method=name, base=base)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mean", {"by_layer": {"9.*": [1, 2]}}, "no tensor fits '9.*'"),
        ("mean", {"by_layer": {"0": [1]}}, r"by_layer\['0'\]: 1 weights for 2"),
        ("slerp", {"norm": "long"}, "norm is 'long'"),
        ("task_arithmetic", {"scale": [1]}, "1 numbers for 2 networks"),
        ("ties", {"density": 0}, "0 < density"),
        ("dare", {"drop": 1}, "0 ≤ drop < 1"),
    ],
)
def test_values_of_options_are_refused_before_any_work(name, options, message):
    class Untouched(nn.Sequential):
        def forward(self, input):
            raise AssertionError("the network was run")

    models = [Untouched(*network(seed)) for seed in (1, 2)]
    with pytest.raises(DataError, match=message):
        merge(models, labelled(), method=name, base=Untouched(*network(0)), align="weights", **options)


def test_needs_are_refused():
    states = [network(seed).state_dict() for seed in (1, 2, 3)]
    with pytest.raises(DataError, match="'tie' is unknown; did you mean ties"):
        merge_states(states, "tie")
    with pytest.raises(DataError, match="works on what was added to a common parent; pass base="):
        merge_states(states, "ties")
    with pytest.raises(DataError, match="'regmean' runs the networks on data"):
        merge_states(states, "regmean")
    with pytest.raises(DataError, match="takes 2 networks, and there are 3"):
        merge_states(states, "slerp")
    with pytest.raises(ArchitectureError, match="two networks or more, and there are 1"):
        merge_states(states[:1])
    with pytest.raises(ArchitectureError, match="a network or more, and there are 0"):
        merge_states([], "ties", base=states[0])
    with pytest.raises(DataError, match="'greedy_soup' needs data: pass batches \\(inputs, labels\\)"):
        method_of("greedy_soup", None, None, {})
    with pytest.raises(DataError, match="'fisher' needs data: pass batches of inputs"):
        method_of("fisher", None, None, {})
    assert method_of("fisher", None, None, {"own_data": [1, 2]}) is METHODS["fisher"]
    with pytest.raises(DataError, match="'zip' takes all networks alike"):
        merge([network(0), network(1)], labelled(), method="zip", weights=[1, 2])
    with pytest.raises(DataError, match="pass them as fit_data"):
        merge([network(0), network(1)], labelled(), method="zip", repair="reset", repair_data=labelled())


def test_what_is_known_of_the_methods():
    assert list(METHODS) == [
        "mean", "greedy_soup", "fisher", "regmean", "least_squares", "zip", "task_arithmetic", "ties", "dare", "slerp",
    ]  # fmt: skip
    assert ON_STATES == ["mean", "task_arithmetic", "ties", "dare", "slerp"]
    assert [name for name, method in METHODS.items() if method.base] == ["task_arithmetic", "ties", "dare"]
    assert METHODS["mean"].options == ["by_layer"]
    assert METHODS["dare"].options == ["drop", "rescale", "combine", "scale", "density"]
    assert set(METHODS["zip"].options) == {"how", "within", "penalty"}
    assert not METHODS["zip"].weighted
    bare = Method(lambda task: pytest.fail("it ran"), lambda models: None)
    assert bare.options == []
    rehearse(bare, ["a"], 2, {})


@pytest.mark.parametrize("name", ON_STATES)
def test_states_and_networks_merge_alike(name):
    models, base = [network(1), network(2)], network(0)
    states = [model.state_dict() for model in models]
    given: Any = {"base": base.state_dict()} if METHODS[name].base else {}
    found = merge_states(states, name, weights=[1, 2], seed=5, **given)
    merged = merge(models, method=name, weights=[1, 2], seed=5, base=base)
    assert list(found) == list(states[0])
    for key, tensor in merged.model.state_dict().items():
        assert torch.equal(tensor, found[key]), key


def test_fisher_and_layers_read_fit_data_or_data_of_their_own():
    models, data = [network(1), network(2)], labelled()
    other = [(x + 3, y) for x, y in data]
    for name in ("fisher", "regmean"):
        own = merge(models, method=name, align=None, own_data=[data, other])
        assert own.report["fitted_on"] == "own_data"
        assert own.report["options"] == {}
        fitted = merge(models, data, method=name, align=None, fit_data=other)
        assert fitted.report["fitted_on"] == "fit_data"
        plain = merge(models, other, method=name, align=None)
        assert plain.report["fitted_on"] == "data"
        for key, tensor in fitted.model.state_dict().items():
            assert torch.equal(tensor, plain.model.state_dict()[key])
        assert not torch.equal(own.model.state_dict()["0.weight"], plain.model.state_dict()["0.weight"])
    layers = merge(models, data, method="least_squares", align=None).report
    assert layers["solved"] == ["0", "3", "5"]


def test_zip_repairs_on_what_it_reads():
    models, data = [network(1), network(2)], labelled()
    plain, fixed = (merge(models, data, method="zip", repair=how) for how in (None, "reset"))
    assert fixed.report["repair"] == "reset"
    assert fixed.report["repaired_on"] == "data"
    assert fixed.report["align"] is None
    assert "finds by itself" in fixed.report["align_reason"]
    assert [group["size"] for group in fixed.report["groups"]] == [6, 6]
    same, own = plain.model.state_dict(), fixed.model.state_dict()
    assert not torch.equal(same["1.running_var"], own["1.running_var"])


# The mean by layers


def test_each_layer_has_its_weights():
    states = [network(seed).state_dict() for seed in range(3)]
    layers = {"*": [1, 1, 2], "3": [0, 1, 0], "*.bias": [1, 0, 0], "5.bias": [1, 1, 1]}
    found = mean(states, [1, 2, 3], by_layer=layers)
    for key, tensor in found.items():
        parts = [state[key].double().numpy() for state in states]
        if key == "1.num_batches_tracked":
            expected = parts[0]
        elif key == "5.bias":
            expected = sum(parts) / 3
        elif key.endswith("bias"):
            expected = parts[0]
        elif key == "3.weight":
            expected = parts[1]
        else:
            expected = (parts[0] + parts[1] + 2 * parts[2]) / 4
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=1e-7)
    rest = mean(states, [1, 2, 3], by_layer={"0": [1, 0, 0]})
    plain = weighted_mean(states, [1, 2, 3])
    assert list(rest) == list(plain)
    assert all(torch.equal(rest[key], plain[key]) for key in plain if not key.startswith("0."))
    assert torch.equal(rest["0.weight"], states[0]["0.weight"])


def test_without_layers_it_is_the_weighted_mean():
    states = [network(seed).state_dict() for seed in range(2)]
    plain = weighted_mean(states, [2, 1])
    assert all(torch.equal(tensor, plain[key]) for key, tensor in mean(states, [2, 1]).items())


@pytest.mark.parametrize("shared", [True, False])
def test_tied_tensors_must_get_the_same_weights(shared):
    states = []
    for seed in range(2):
        embedding = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        states.append({"in": embedding, "out": embedding if shared else embedding.clone(), "norm": torch.ones(3)})
    with pytest.raises(DataError, match="out and in different weights, and they are one tensor"):
        mean(states, by_layer={"out": [1, 3]})
    found = mean(states, by_layer={"[io]*": [1, 3], "norm": [1, 2]})
    assert torch.equal(found["in"], found["out"])
    # the same at the ends and halfway, and yet another tensor
    near = [{name: state["in"].clone() for name in ("in", "out")} for state in states]
    near[0]["out"][0, 1] += 1
    assert torch.equal(mean(near, by_layer={"out": [0, 1]})["out"], near[1]["out"])
    # two norms that are all ones in one network and all twos in the other are no tie
    scales: list[dict[str, torch.Tensor]] = [
        {"a": torch.full((2,), value), "b": torch.full((2,), value)} for value in (1.0, 2.0)
    ]
    assert mean(scales, by_layer={"a": [0, 1]})["a"].tolist() == [2, 2]
    blank = [{"a": torch.zeros(0), "b": torch.zeros(0)} for _ in range(2)]
    assert mean(blank, by_layer={"a": [0, 1]})["a"].shape == (0,)

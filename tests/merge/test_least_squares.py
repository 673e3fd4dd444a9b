"""Least squares of layers against numpy on rows written out, layer by layer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from isthmus.base.architecture import full_state
from isthmus.base.errors import ArchitectureError, DataError, NotFiniteError
from isthmus.base.interpolation import weighted_mean
from isthmus.merge.averages.least_squares import least_squares_merge
from isthmus.merge.averages.regmean import regmean_merge


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double().eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(make: Callable[[], nn.Module]) -> list[nn.Module]:
    return [seeded(make, 0), seeded(make, 1)]


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3, bias=False))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(),
        nn.Linear(16, 3),
    )  # fmt: skip


def fit(x: np.ndarray, y: np.ndarray, bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Solve by numpy: weights (out, in) and biases."""
    rows = np.hstack([x, np.ones((len(x), 1))]) if bias else x
    found = np.linalg.lstsq(rows, y, rcond=None)[0]
    return found[: x.shape[1]].T, found[x.shape[1] :].reshape(-1)


def steps(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Activations of a sequential network: the input, then what comes out of each module."""
    found = [x]
    with torch.no_grad():
        for module in model.children():
            found.append(module(found[-1]))
    return found


def test_means_of_the_parents_layer_by_layer() -> None:
    models, x = pair(perceptron), normal(60, 5, seed=2) + 0.5
    found = least_squares_merge(models, list(x.split(25)), inputs="parents", weights=[3, 1], ridge=0)
    assert found.solved == ("0", "2", "4")
    first, second = (steps(model, x) for model in models)
    blend = [(0.75 * a + 0.25 * b).numpy() for a, b in zip(first, second, strict=True)]
    for index in (0, 2, 4):
        weight, bias = fit(blend[index], blend[index + 1], index < 4)
        np.testing.assert_allclose(found.state[f"{index}.weight"].numpy(), weight, rtol=1e-6, atol=1e-9)
        if index < 4:
            np.testing.assert_allclose(found.state[f"{index}.bias"].numpy(), bias, rtol=1e-6, atol=1e-9)


def test_each_layer_is_fed_by_the_layers_before_it() -> None:
    models, x = pair(perceptron), normal(60, 5, seed=2) + 0.5
    found = least_squares_merge(models, list(x.split(25)), weights=[3, 1], ridge=0).state
    first, second = (steps(model, x) for model in models)
    mean = weighted_mean([full_state(model) for model in models], [3, 1])
    features, alive = x.numpy(), np.ones(5, dtype=bool)
    for index in (0, 2, 4):
        target = (0.75 * first[index + 1] + 0.25 * second[index + 1]).numpy()
        weight, bias = fit(features, target, index < 4)
        alive = features.std(0) > 0
        solved = found[f"{index}.weight"].numpy()
        np.testing.assert_allclose(solved[:, alive], weight[:, alive], rtol=1e-5, atol=1e-8)
        np.testing.assert_array_equal(solved[:, ~alive], mean[f"{index}.weight"].numpy()[:, ~alive])
        features = np.maximum(features @ weight.T + (bias if index < 4 else 0), 0)
    assert not alive.all()  # a unit of the merged network that never fires: the mean of the weights that read it


def test_a_convolution_in_groups_behind_a_batch_norm() -> None:
    models, x = pair(convolutional), normal(30, 2, 5, 5, seed=2)
    for model in models:
        model.train()(x)
        model.eval()
    found = least_squares_merge(models, x, ridge=0).state
    first, second = (steps(model, x) for model in models)
    with torch.no_grad():
        y = F.conv2d(x, found["0.weight"])
        scale, shift = found["1.weight"], found["1.bias"]
        features = F.batch_norm(y, None, None, scale, shift, training=True).relu()
    target = (first[4] + second[4]) / 2
    for group in range(2):
        patches = F.unfold(features[:, 2 * group : 2 * group + 2], 2).movedim(1, 2).flatten(0, 1)
        wanted = target[:, 2 * group : 2 * group + 2].flatten(2).movedim(1, 2).flatten(0, 1)
        weight, bias = fit(patches.numpy(), wanted.numpy(), True)
        part = slice(2 * group, 2 * group + 2)
        np.testing.assert_allclose(found["3.weight"][part].flatten(1).numpy(), weight, rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(found["3.bias"][part].numpy(), bias, rtol=1e-5, atol=1e-8)
    mean = weighted_mean([full_state(model) for model in models])
    for name in ("1.weight", "1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(found[name], mean[name])


def test_ridge_by_hand() -> None:
    models, x = pair(perceptron), normal(40, 5, seed=2)
    found = least_squares_merge(models, x, inputs="parents", ridge=0.5).state
    first, second = (steps(model, x) for model in models)
    a, y = ((first[i] + second[i]).numpy() / 2 for i in (2, 3))
    a, y = a - a.mean(0), y - y.mean(0)
    mean = weighted_mean([full_state(model) for model in models])["2.weight"].numpy().T
    gram = a.T @ a / 40
    pull = 0.5 * np.trace(gram) / 6 * np.eye(6)
    wanted = np.linalg.solve(gram + pull, a.T @ y / 40 + pull @ mean)
    np.testing.assert_allclose(found["2.weight"].numpy().T, wanted, rtol=1e-8)


def test_own_data_with_inputs_of_the_parents_is_regmean() -> None:
    models, data = pair(perceptron), [normal(40, 5, seed=2) + 1, normal(30, 5, seed=3)]
    found = least_squares_merge(models, own_data=data, inputs="parents", weights=[2, 1], ridge=0).state
    wanted = regmean_merge(models, own_data=data, shrink=1, weights=[2, 1], ridge=0).state
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-8)


def test_own_data_with_inputs_of_the_merged_network() -> None:
    models, data = pair(perceptron), [normal(40, 5, seed=2) + 1, normal(40, 5, seed=3)]
    found = least_squares_merge(models, own_data=data, ridge=0).state
    own = [steps(model, x) for model, x in zip(models, data, strict=True)]
    features = torch.cat(data).numpy()
    for index in (0, 2, 4):
        weight, bias = fit(features, torch.cat([activations[index + 1] for activations in own]).numpy(), index < 4)
        np.testing.assert_allclose(found[f"{index}.weight"].numpy(), weight, rtol=1e-5, atol=1e-8)
        features = np.maximum(features @ weight.T + (bias if index < 4 else 0), 0)


@settings(max_examples=4, deadline=None)
@given(inputs=st.sampled_from(["merged", "parents"]), share=st.floats(0.1, 0.9))
def test_a_network_merged_with_itself_stays(inputs: str, share: float) -> None:
    model, x = seeded(convolutional), normal(20, 2, 5, 5)
    model.train()(x)
    with torch.no_grad():  # statistics that are exactly those of the data
        batch_norm = model.get_submodule("1")
        y = model.get_submodule("0")(x)
        batch_norm.running_mean.copy_(y.mean((0, 2, 3)))  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        batch_norm.running_var.copy_(y.var((0, 2, 3), correction=0))  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    found = least_squares_merge([model.eval()] * 2, x, weights=[share, 1 - share], inputs=inputs)  # pyright: ignore[reportArgumentType]
    for name, tensor in full_state(model).items():
        torch.testing.assert_close(found.state[name], tensor, rtol=1e-6, atol=1e-8)


def test_what_earlier_layers_lost_is_made_good() -> None:
    models, x = pair(perceptron), normal(300, 5, seed=2)
    target = sum(model(x).detach() for model in models) / 2

    def error(state: dict[str, Tensor]) -> float:
        merged = perceptron().double()
        merged.load_state_dict(state)
        return float((merged(x).detach() - target).square().mean())

    plain = error(weighted_mean([full_state(model) for model in models]))
    parents = error(least_squares_merge(models, x, inputs="parents", ridge=1e-6).state)
    merged = error(least_squares_merge(models, x, ridge=1e-6).state)
    assert merged < min(plain, parents)


class Branched(nn.Module):
    """A layer that runs twice, one that never runs, an embedding, and keyword inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.twice = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.runs = 0

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.twice(self.twice(self.embed(tokens)).relu())
        self.runs += 1
        return self.head(x)


TOKENS = torch.randint(7, (8, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("inputs", ["merged", "parents"])
def test_what_is_not_solved_is_averaged_and_named(inputs: str) -> None:
    models = pair(Branched)
    found = least_squares_merge(models, TOKENS, inputs=inputs)  # pyright: ignore[reportArgumentType]
    assert found.solved == ("twice", "head")
    assert set(found.averaged) == {"embed", "unused"}
    mean = weighted_mean([full_state(model) for model in models])
    assert torch.equal(found.state["embed.weight"], mean["embed.weight"])
    assert torch.equal(found.state["unused.bias"], mean["unused.bias"])
    assert not torch.equal(found.state["twice.bias"], mean["twice.bias"])


def test_the_rest_of_the_network_does_not_run() -> None:
    models = pair(Branched)
    least_squares_merge(models, TOKENS)
    # Counted in front of the head: once to learn the order, then for the head, not for the layer before it.
    assert [model.runs for model in models] == [2, 1]


def test_padding_does_not_count() -> None:
    models, mask = pair(Branched), torch.ones(8, 5, dtype=torch.long)
    mask[:, 3:] = 0
    found = least_squares_merge(models, {"tokens": TOKENS, "attention_mask": mask}).state
    wanted = least_squares_merge(models, {"tokens": TOKENS[:, :3]}).state
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor)


def test_rows_are_drawn_by_the_seed_alike_for_inputs_and_outputs() -> None:
    models, x = pair(convolutional), normal(20, 2, 5, 5)
    first, again, other = (
        least_squares_merge(models, x, rows=15, seed=seed, inputs="parents").state["3.weight"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # Inputs that are the same in all networks are fitted exactly by any rows that determine the weights.
    layers = pair(lambda: nn.Linear(5, 2))
    found = least_squares_merge(layers, normal(50, 5), rows=9, ridge=0).state
    for name, tensor in weighted_mean([full_state(layer) for layer in layers]).items():
        torch.testing.assert_close(found[name], tensor)


def test_networks_are_left_as_they_were() -> None:
    models, x = [model.train() for model in pair(convolutional)], normal(20, 2, 5, 5)
    before = [{name: tensor.clone() for name, tensor in full_state(model).items()} for model in models]
    least_squares_merge(models, x, device="cpu")
    with pytest.raises(NotFiniteError, match="input of 0"):
        least_squares_merge([Exploding(*model.children()) for model in models], x)  # pyright: ignore[reportArgumentType]
    for model, state in zip(models, before, strict=True):
        assert all(module.training for module in model.modules())
        assert not any(module._forward_hooks for module in model.modules())
        assert all(torch.equal(full_state(model)[name], tensor) for name, tensor in state.items())


class Exploding(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * torch.inf)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": "both"}, "inputs is 'both'"),
        ({"ridge": float("nan")}, "ridge is nan"),
        ({"rows": True}, "rows is True"),
        ({"weights": [0, 0]}, "not all zero"),
        ({"own_data": [normal(2, 5)]}, "1 data sets for 2 networks"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        least_squares_merge(pair(perceptron), normal(4, 5), **options)


def test_data_and_networks_that_do_not_fit_are_refused() -> None:
    models = pair(perceptron)
    with pytest.raises(DataError, match="pass data, or own_data"):
        least_squares_merge(models)
    with pytest.raises(DataError, match="can be read once"):
        least_squares_merge(models, iter([normal(4, 5)]))
    assert least_squares_merge(models, iter([normal(4, 5)]), inputs="parents").solved == ("0", "2", "4")
    with pytest.raises(DataError, match="no batch"):
        least_squares_merge(models, [])
    with pytest.raises(ArchitectureError, match="shapes differ"):
        least_squares_merge([nn.Linear(2, 2), nn.Linear(3, 2)], normal(2, 2))
    with pytest.raises(ArchitectureError, match="no linear layer"):
        least_squares_merge([nn.LayerNorm(2), nn.LayerNorm(2)], normal(2, 2))

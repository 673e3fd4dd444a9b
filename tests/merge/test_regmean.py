"""RegMean against least squares on stacked rows, solved by numpy, and by patches cut out by hand."""

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
from isthmus.merge.averages import reading
from isthmus.merge.averages.reading import input_rows, solvable, solve
from isthmus.merge.averages.regmean import regmean_merge


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().double().eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(make: Callable[[], nn.Module]) -> list[nn.Module]:
    return [seeded(make, 0), seeded(make, 1)]


def stacked(models: list[nn.Module], rows: list[np.ndarray], weights: list[float], bias: bool) -> np.ndarray:
    """Solve one linear layer for the outputs of each network on its own rows: (in, out), the bias below."""
    left, right = [], []
    for model, x, weight in zip(models, rows, weights, strict=True):
        x = np.hstack([x, np.ones((len(x), 1))]) if bias else x
        own = model.get_parameter("weight").detach().flatten(1).numpy().T
        own = np.vstack([own, model.get_parameter("bias").detach().numpy()]) if bias else own
        scale = np.sqrt(weight / len(x))
        left.append(scale * x)
        right.append(scale * x @ own)
    return np.linalg.lstsq(np.vstack(left), np.vstack(right), rcond=None)[0]


@settings(max_examples=10, deadline=None)
@given(bias=st.booleans(), first=st.integers(6, 30), share=st.floats(0.1, 0.9))
def test_a_linear_layer_is_the_least_squares_fit_of_all_rows(bias: bool, first: int, share: float) -> None:
    models = pair(lambda: nn.Linear(5, 3, bias=bias))
    data = [normal(first, 5, seed=1) + 1, normal(20, 5, seed=2)]
    wanted = stacked(models, [x.numpy() for x in data], [share, 1 - share], bias)
    found = regmean_merge(models, own_data=data, weights=[share, 1 - share], shrink=1, ridge=0)
    np.testing.assert_allclose(found.state["weight"].numpy().T, wanted[:5], rtol=1e-6, atol=1e-8)
    if bias:
        np.testing.assert_allclose(found.state["bias"].numpy(), wanted[5], rtol=1e-6, atol=1e-8)
    assert found.solved == ("",)


def test_shrunk_products_by_hand() -> None:
    models = pair(lambda: nn.Linear(3, 2))
    data = [normal(9, 3, seed=1) + 1, normal(7, 3, seed=2)]
    left, right = np.zeros((3, 3)), np.zeros((3, 2))
    for model, x in zip(models, data, strict=True):
        gram = (x.T @ x / len(x)).numpy()
        gram = 0.9 * gram + 0.1 * np.diag(np.diag(gram))
        left += gram
        right += gram @ model.get_parameter("weight").detach().numpy().T
    found = regmean_merge(models, own_data=data, bias="mean", ridge=0).state
    np.testing.assert_allclose(found["weight"].numpy().T, np.linalg.solve(left, right), rtol=1e-8)
    torch.testing.assert_close(found["bias"], weighted_mean([full_state(m) for m in models])["bias"])


def test_without_off_diagonals_each_input_has_weights_of_its_own() -> None:
    models = pair(lambda: nn.Linear(3, 2, bias=False))
    data = [normal(9, 3, seed=1) + 1, normal(7, 3, seed=2)]
    power = torch.stack([x.square().mean(0) for x in data])
    own = torch.stack([model.get_parameter("weight").detach() for model in models])
    wanted = (power[:, None] * own).sum(0) / power.sum(0)
    torch.testing.assert_close(regmean_merge(models, own_data=data, shrink=0, ridge=0).state["weight"], wanted)


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2d": (lambda: nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (3, 2, 6, 8)),
    "2d, no bias": (lambda: nn.Conv2d(2, 3, 3, padding=1, bias=False), (2, 2, 5, 5)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_is_a_linear_layer_of_patches(kind: str) -> None:
    make, shape = CONVOLUTIONS[kind]
    models, data = pair(make), [normal(*shape, seed=1), normal(*shape, seed=2)]
    conv = models[0]
    assert isinstance(conv, nn.Conv2d)
    rows = [
        F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).movedim(1, 2).flatten(0, 1).numpy()  # pyright: ignore[reportArgumentType]
        for x in data
    ]
    wanted = stacked(models, rows, [0.5, 0.5], conv.bias is not None)
    found = regmean_merge(models, own_data=data, shrink=1, ridge=0).state
    np.testing.assert_allclose(found["weight"].flatten(1).numpy().T, wanted[: rows[0].shape[1]], rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 3), (2, 4, 5)),
        (nn.Linear(5, 3), (5,)),
        (nn.Conv1d(4, 6, 3, groups=2, padding="same"), (2, 4, 7)),
        (nn.Conv1d(4, 6, 4, padding="same"), (2, 4, 7)),
        (nn.Conv2d(4, 4, 3, groups=4, padding=2, dilation=2), (2, 4, 7, 6)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 5, 6)),
        (nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1), padding_mode="circular"), (2, 2, 3, 4, 5)),
    ],
)
def test_rows_times_weight_are_the_output(layer: reading.Layer, shape: tuple[int, ...]) -> None:
    layer, x = layer.double(), normal(*shape)
    assert layer.bias is not None
    rows = input_rows(layer, x)
    places = rows.shape[: rows.ndim - layer.weight.ndim]
    flat = rows.reshape(-1, reading.groups_of(layer), layer.weight[0].numel())
    found = torch.einsum("ngd,gdo->ngo", flat, reading.matrices(layer, layer.weight)).flatten(1) + layer.bias
    wanted = reading.output_rows(layer, layer(x))
    assert wanted.shape[:-2] == places
    torch.testing.assert_close(found, wanted.reshape(found.shape))


def test_groups_are_solved_one_by_one() -> None:
    whole = pair(lambda: nn.Conv1d(4, 6, 3, groups=2))
    data = [normal(4, 4, 9, seed=1), normal(5, 4, 9, seed=2)]
    found = regmean_merge(whole, own_data=data).state
    for group in range(2):
        parts = []
        for model in whole:
            part = nn.Conv1d(2, 3, 3).double()
            with torch.no_grad():
                part.weight.copy_(model.get_parameter("weight")[3 * group : 3 * group + 3])
                assert part.bias is not None
                part.bias.copy_(model.get_parameter("bias")[3 * group : 3 * group + 3])
            parts.append(part)
        alone = regmean_merge(parts, own_data=[x[:, 2 * group : 2 * group + 2] for x in data]).state
        for name in ("weight", "bias"):
            torch.testing.assert_close(found[name][3 * group : 3 * group + 3], alone[name])


class Mixed(nn.Module):
    """Layers of every kind: solved, shared, reparametrised, unused, and weights that are no matrix of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.tied, self.also = nn.Linear(4, 4), nn.Linear(4, 4)
        self.also.weight = self.tied.weight
        self.norm = nn.LayerNorm(4)
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.twice = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.odd = Odd(4, 4)
        self.head = nn.Linear(4, 3)
        self.alias = self.head

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.norm(self.also(self.tied(self.embed(tokens))).relu())
        x = self.odd(self.weighted(x))
        return self.head(input=self.twice(self.twice(x).tanh()))


class Odd(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).square()


TOKENS = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(0))


def test_what_is_not_solved_is_averaged_and_named() -> None:
    models = pair(Mixed)
    found = regmean_merge(models, TOKENS)
    assert found.solved == ("twice", "head")
    assert found.averaged.keys() == {"embed", "tied", "also", "weighted", "unused", "odd"}
    assert "computed from other parameters" in found.averaged["weighted"]
    assert "shares its weight" in found.averaged["tied"]
    assert "never reached" in found.averaged["unused"]
    assert "of its own" in found.averaged["odd"]
    mean = weighted_mean([full_state(model) for model in models])
    solved = {"twice.weight", "twice.bias", "head.weight", "head.bias", "alias.weight", "alias.bias"}
    for name, tensor in mean.items():
        assert torch.equal(found.state[name], tensor) != (name in solved), name
    assert torch.equal(found.state["alias.weight"], found.state["head.weight"])
    assert found.report()["solved"] == ["twice", "head"]


def test_a_layer_that_runs_twice_sees_both_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.one(x))

    models, x = pair(Twice), normal(20, 3)
    inner = [model.get_submodule("one") for model in models]
    rows = [torch.cat([x, one(x)]).detach().numpy() for one in inner]
    found = regmean_merge(models, x, shrink=1, ridge=0).state["one.weight"]
    np.testing.assert_allclose(found.numpy().T, stacked(inner, rows, [0.5, 0.5], False), rtol=1e-8)


def test_padding_does_not_count() -> None:
    models, mask = pair(Mixed), torch.ones(6, 5, dtype=torch.long)
    mask[:, 3:] = 0
    found = regmean_merge(models, {"tokens": TOKENS, "attention_mask": mask}).state
    wanted = regmean_merge(models, {"tokens": TOKENS[:, :3]}).state
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor)


def test_inputs_that_never_vary_keep_the_mean() -> None:
    models = pair(lambda: nn.Linear(6, 2, bias=False))
    data = [normal(10, 6, seed=seed) for seed in (1, 2)]
    for x in data:
        x[:, 3:5], x[:, 5] = 0, x[:, 0]
    mean = weighted_mean([full_state(model) for model in models])["weight"]
    for ridge in (0.0, 1e-6):
        found = regmean_merge(models, own_data=data, shrink=1, ridge=ridge).state["weight"]
        assert torch.equal(found[:, 3:5], mean[:, 3:5])
        # Twins share what there is to change.
        torch.testing.assert_close((found - mean)[:, 5], (found - mean)[:, 0], atol=1e-6, rtol=0)
        assert not torch.allclose(found[:, :3], mean[:, :3])
    dead = [torch.zeros(4, 6, dtype=torch.float64)] * 2
    assert torch.equal(regmean_merge(models, own_data=dead).state["weight"], mean)


def residual() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).float()


def test_a_network_merged_with_itself_stays_bit_for_bit() -> None:
    model, x = residual().eval(), normal(5, 2, 4, 4).float()
    found = regmean_merge([model, model], x, weights=[1, 2])
    assert found.solved == ("0", "4")
    assert all(torch.equal(found.state[name], tensor) for name, tensor in full_state(model).items())


def test_batches_pieces_and_device_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    models, x = pair(residual), normal(6, 2, 4, 4)
    wanted = regmean_merge(models, x).state
    monkeypatch.setattr(reading, "_NUMBERS", 40)
    found = regmean_merge(models, list(x.split(4)), device="cpu", rows=10**6).state
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor)


def test_rows_are_drawn_by_the_seed() -> None:
    models, x = pair(residual), normal(6, 2, 4, 4)
    first, again, other, whole = (
        regmean_merge(models, x, rows=rows, seed=seed).state["4.weight"]
        for rows, seed in ((3, 0), (3, 0), (3, 1), (None, 0))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, whole)


def test_networks_are_left_as_they_were() -> None:
    models, x = [model.train() for model in pair(residual)], normal(6, 2, 4, 4)
    before = [{name: tensor.clone() for name, tensor in full_state(model).items()} for model in models]
    regmean_merge(models, x)
    with pytest.raises(NotFiniteError, match="input of 0"):
        regmean_merge([Exploding(*model.children()) for model in models], x)  # pyright: ignore[reportArgumentType]
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
        ({"shrink": 1.5}, "shrink is 1.5"),
        ({"bias": "none"}, "bias is 'none'"),
        ({"ridge": -1.0}, "ridge is -1.0"),
        ({"rows": 0}, "rows is 0"),
        ({"weights": [1, -1]}, "none negative"),
        ({"own_data": []}, "0 data sets for 2 networks"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        regmean_merge(pair(residual), normal(2, 2, 4, 4), **options)


def test_networks_without_such_layers_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="a weight of Embedding is no matrix"):
        regmean_merge(pair(lambda: nn.Embedding(3, 2)), TOKENS)
    with pytest.raises(DataError, match="pass data, or own_data"):
        regmean_merge(pair(residual))
    with pytest.raises(ArchitectureError, match="shapes differ"):
        regmean_merge([nn.Linear(2, 2), nn.Linear(3, 2)], normal(2, 2))
    assert list(solvable(nn.Linear(2, 2))[0]) == [""]


def test_solve_is_the_smallest_solution() -> None:
    x = normal(3, 6)
    gram, target = x.T @ x, x.T @ normal(3, 2, seed=1)
    wanted = np.linalg.pinv(gram.numpy(), rcond=1e-10) @ target.numpy()
    np.testing.assert_allclose(solve(gram, target, 0.0).numpy(), wanted, atol=1e-8)
    ridge = 0.3 * float(gram.diagonal().mean())
    wanted = np.linalg.solve(gram.numpy() + ridge * np.eye(6), target.numpy())
    np.testing.assert_allclose(solve(gram, target, 0.3).numpy(), wanted, atol=1e-10)

"""The mean weighted by Fisher information against sums written out, and against plain means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from isthmus.base.architecture import full_state
from isthmus.base.errors import ArchitectureError, DataError, NotFiniteError
from isthmus.base.interpolation import weighted_mean
from isthmus.merge.averages.fisher import fisher_mean, fisher_merge
from isthmus.metrics.fisher import diagonal_fisher


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
        model(torch.randn(8, 4))  # running statistics of its own
    return model.eval()


X = torch.randn(12, 4, generator=generator())


@settings(max_examples=15, deadline=None)
@given(count=st.integers(1, 4), seed=st.integers(0, 99), floor=st.sampled_from([0.0, 1e-6, 0.1]))
def test_it_is_the_quotient_of_two_sums(count: int, seed: int, floor: float) -> None:
    random = generator(seed)
    states = [
        {"w": torch.randn(3, 2, generator=random), "free": torch.randn(2, generator=random)} for _ in range(count)
    ]
    fishers = [{"w": torch.rand(3, 2, generator=random)} for _ in range(count)]
    weights = (torch.rand(count, generator=random) + 0.1).double()
    shares = weights / weights.sum()
    lift = floor * (shares[:, None, None] * torch.stack([f["w"] for f in fishers]).double()).sum(0).mean()
    above = sum(s * (f["w"].double() + lift) * t["w"].double() for s, f, t in zip(shares, fishers, states, strict=True))
    below = sum(s * (f["w"].double() + lift) for s, f in zip(shares, fishers, strict=True))
    found = fisher_mean(states, fishers, weights.tolist(), floor=floor)
    assert isinstance(above, Tensor)
    torch.testing.assert_close(found["w"].double(), above / below, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["free"], weighted_mean(states, weights.tolist())["free"])


def test_equal_information_and_none_at_all_give_the_weighted_mean() -> None:
    states = [full_state(network(seed)) for seed in range(3)]
    plain = weighted_mean(states, [3, 2, 1])
    some = {name: torch.rand(t.shape, generator=generator()) + 0.1 for name, t in states[0].items() if t.ndim}
    none = {name: torch.zeros_like(tensor) for name, tensor in some.items()}
    for fisher in (some, none):
        found = fisher_mean(states, [fisher] * 3, [3, 2, 1])
        assert found.keys() == plain.keys()
        for name, tensor in plain.items():
            torch.testing.assert_close(found[name], tensor)
            assert found[name].dtype == tensor.dtype


def test_entries_without_information_fall_back_one_by_one() -> None:
    states = [{"w": torch.tensor([0.0, 0.0, 0.0])}, {"w": torch.tensor([4.0, 4.0, 4.0])}]
    fishers = [{"w": torch.tensor([1.0, 0.0, 0.0])}, {"w": torch.tensor([0.0, 0.0, 1.0])}]
    wanted = torch.tensor([0.0, 3.0, 4.0])
    torch.testing.assert_close(fisher_mean(states, fishers, [1, 3])["w"], wanted, atol=1e-4, rtol=0)
    assert torch.equal(fisher_mean(states, fishers, [1, 3], floor=0)["w"], wanted)


def test_normalised_information_does_not_depend_on_its_scale() -> None:
    states = [{"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([4.0, 2.0])}]
    fishers = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([2.0, 1.0])}]
    louder = [fishers[0], {"w": 100 * fishers[1]["w"]}]
    wanted = fisher_mean(states, fishers)["w"]
    torch.testing.assert_close(fisher_mean(states, louder, normalise=True)["w"], wanted)
    assert not torch.allclose(fisher_mean(states, louder)["w"], wanted, atol=0.1)
    torch.testing.assert_close(wanted, torch.tensor([8 / 3, 4 / 3]))


def test_a_network_merged_with_itself_stays_bit_for_bit() -> None:
    model = network(0)
    merged = fisher_merge([model, model, model], X, weights=[1, 2, 4])
    assert all(torch.equal(merged[name], tensor) for name, tensor in full_state(model).items())


@pytest.mark.parametrize("labels", ["model", "data"])
def test_merge_measures_each_network_on_its_own_data(labels: str) -> None:
    models = [network(0), network(1)]
    data = [(X[:6], torch.arange(6) % 3), (X[6:], torch.arange(6) % 2)]
    before = [{name: tensor.clone() for name, tensor in full_state(model).items()} for model in models]
    found = fisher_merge(models, own_data=data, weights=[1, 2], labels=labels)  # pyright: ignore[reportArgumentType]
    fishers = [
        diagonal_fisher(model, own, labels=labels)  # pyright: ignore[reportArgumentType]
        for model, own in zip(models, data, strict=True)
    ]
    wanted = fisher_mean([full_state(model) for model in models], fishers, [1, 2])
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(full_state(model)[name], tensor) for name, tensor in state.items())


def test_linear_regressions_of_disjoint_inputs_are_joined() -> None:
    # Each network knows the inputs that it has seen: the mean by information is the least squares fit of all.
    truth = torch.randn(3, 6, generator=generator(1))
    first, second = nn.Linear(6, 3, bias=False), nn.Linear(6, 3, bias=False)
    with torch.no_grad():
        first.weight[:, :3], second.weight[:, 3:] = truth[:, :3], truth[:, 3:]
    x = torch.randn(40, 6, generator=generator(2))
    left, right = x.clone(), x.clone()
    left[:, 3:], right[:, :3] = 0, 0
    found = fisher_merge([first, second], own_data=[left, right], likelihood="gaussian")["weight"]
    torch.testing.assert_close(found, truth, atol=1e-4, rtol=0)


W = {"w": torch.ones(2)}


@pytest.mark.parametrize(
    ("fishers", "options", "error", "message"),
    [
        ([W], {}, DataError, "1 sets of Fisher information for 2 networks"),
        ([W, {}], {}, ArchitectureError, r"fishers\[1\] lacks w"),
        ([W, {**W, "v": torch.ones(1)}], {}, ArchitectureError, r"fishers\[1\] has v"),
        ([W, {"w": torch.ones(3)}], {}, ArchitectureError, r"shape \(3,\) for a parameter of shape \(2,\)"),
        ([W, {"w": torch.tensor([1.0, torch.nan])}], {}, NotFiniteError, "holds NaN"),
        ([W, {"w": torch.tensor([1.0, -1.0])}], {}, DataError, "negative numbers"),
        ([W, W], {"floor": -1.0}, DataError, "floor is -1.0"),
        ([W, W], {"weights": [1]}, DataError, "1 weights for 2 networks"),
    ],
)
def test_bad_input_is_refused(fishers: list[dict[str, Tensor]], options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        fisher_mean([W, W], fishers, **options)


def test_merge_refuses_before_it_works() -> None:
    models = [network(0), network(1)]
    with pytest.raises(DataError, match="pass data, or own_data"):
        fisher_merge(models)
    with pytest.raises(DataError, match="1 data sets for 2 networks"):
        fisher_merge(models, own_data=[X])
    with pytest.raises(DataError, match="can be read once"):
        fisher_merge(models, iter([X]))
    with pytest.raises(DataError, match="floor is nan"):
        fisher_merge(models, X, floor=float("nan"))
    with pytest.raises(ArchitectureError, match="shapes differ"):
        fisher_merge([nn.Linear(2, 3), nn.Linear(3, 3)], X)
    with torch.no_grad():
        models[1].get_parameter("0.weight")[0, 0] = torch.inf
    with pytest.raises(NotFiniteError, match=r"0\.weight"):
        fisher_merge(models, X)

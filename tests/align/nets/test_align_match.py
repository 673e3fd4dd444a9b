"""`match`: what it takes, what it refuses, what it leaves alone, what it saves."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from isthmus.align import Matching, Symmetry, match, symmetry
from isthmus.base.architecture import full_state
from isthmus.base.errors import ArchitectureError, CheckpointError, DataError, NotFiniteError, SymmetryError


def networks(width: int = 8) -> tuple[Any, Any]:
    def make(seed: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return model

    return make(1), make(2)


X = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
METHODS = pytest.mark.parametrize("method", ["weights", "activations"])


def same(a: Matching, b: Matching) -> bool:
    return (
        a.permutation == b.permutation
        and a.objective == b.objective
        and a.history == b.history
        and a.scores.keys() == b.scores.keys()
        and all(torch.equal(a.scores[name], b.scores[name]) for name in a.scores)
    )


# What it takes


class Named(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, features: Tensor) -> Tensor:
        return self.body(features)


@METHODS
def test_batches_may_be_inputs_pairs_or_mappings(method: str) -> None:
    a, b = map(Named, networks())
    y = torch.zeros(16)
    forms: list[Any] = [
        *([X], X, [(X, y)], (X, y), [X.clone()], ((X, y) for _ in range(1))),
        *([{"features": X}], {"features": X, "labels": y}, DataLoader(TensorDataset(X), batch_size=16)),
    ]
    found = [match(a, b, data, method=method) for data in forms]
    assert not found[0].permutation.is_identity
    assert all(same(matching, found[0]) for matching in found)


def test_weights_need_only_an_example_or_a_symmetry() -> None:
    a, b = networks()
    found = match(a, b, X)
    assert same(match(a, b, example_inputs=X), found)
    assert same(match(a, b, example_inputs=(X,)), found)
    assert same(match(a, b, symmetry=symmetry(a, X)), found)
    assert same(match(a, b, X, symmetry=symmetry(a, X)), found)


@METHODS
def test_what_is_found_is_told(method: str) -> None:
    a, b = networks()
    matching = match(a, b, X, method=method, seed=4)
    assert (matching.method, matching.seed) == (method, 4)
    assert isinstance(matching.symmetry, Symmetry)
    assert matching.objective == pytest.approx(max(line[-1] for line in matching.history))
    assert {name: tuple(score.shape) for name, score in matching.scores.items()} == {"0": (8,)}
    new = matching.apply(b)
    assert torch.allclose(new.eval()(X), copy.deepcopy(b).eval()(X), atol=1e-5)
    state = matching.apply(b.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in new.state_dict().items())
    assert not torch.equal(state["0.weight"], b.state_dict()["0.weight"])


@METHODS
def test_a_network_matches_itself_as_it_is(method: str) -> None:
    a, _ = networks()
    matching = match(a, copy.deepcopy(a), X, method=method)
    assert matching.permutation.is_identity
    assert torch.allclose(matching.scores["0"], torch.ones(8, dtype=torch.float64), atol=1e-5)


@METHODS
def test_half_precision_weights_are_matched(method: str) -> None:
    a, _ = networks()
    found = symmetry(a, X)
    planted = found.random(torch.Generator().manual_seed(1))
    low, moved = (m.to(torch.bfloat16) for m in (copy.deepcopy(a), planted.apply(a)))
    matching = match(low, moved, X.to(torch.bfloat16), method=method, symmetry=found)
    assert matching.permutation == planted.inverse()


def test_a_device_may_be_named() -> None:
    a, b = networks()
    for method in ("weights", "activations"):
        assert same(match(a, b, X, method=method, device="cpu"), match(a, b, X, method=method))


@METHODS
def test_same_seed_same_result(method: str) -> None:
    a, b = networks(12)
    state = torch.get_rng_state()
    assert same(match(a, b, X, method=method, seed=5), match(a, b, X, method=method, seed=5))
    assert torch.equal(torch.get_rng_state(), state)


def test_more_restarts_make_longer_histories() -> None:
    a, b = networks()
    assert len(match(a, b, X, restarts=1).history) == 1
    assert len(match(a, b, X, restarts=5).history) == 5


def test_progress_is_silent_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    a, b = networks()
    match(a, b, X, method="activations")
    match(a, b, X)
    assert capsys.readouterr() == ("", "")
    match(a, b, X, progress=True)
    assert "matching weights" in capsys.readouterr().err
    match(a, b, X, method="activations", progress=True)
    assert "matching activations" in capsys.readouterr().err


# What it refuses


def test_other_shapes_are_refused_with_both() -> None:
    with pytest.raises(
        ArchitectureError, match=r"0\.weight: \(8, 5\) in model a, \(9, 5\) in model b; .*3\.weight: \(3, 8\)"
    ):
        match(networks(8)[0], networks(9)[1], X)


def test_other_names_are_refused() -> None:
    a, b = networks()
    with pytest.raises(ArchitectureError, match=r"only model b has 4\.weight, 4\.bias"):
        match(a, nn.Sequential(*b, nn.Linear(3, 3)), X)


@METHODS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_weights_that_are_not_finite_are_refused_by_name(method: str, bad: float, which: int) -> None:
    pair = networks()
    with torch.no_grad():
        pair[which][3].weight[1, 2] = bad
    with pytest.raises(NotFiniteError, match=rf"model {'ab'[which]}: 3\.weight of shape \(3, 8\) holds 1 entries"):
        match(*pair, X, method=method)


def test_running_statistics_that_are_not_finite_are_refused_by_name() -> None:
    a, b = networks()
    b[1].running_var[0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"model b: 1\.running_var"):
        match(a, b, X)


@METHODS
def test_data_that_are_not_finite_are_refused(method: str) -> None:
    bad = X.clone()
    bad[3, 1] = float("nan")
    with pytest.raises(NotFiniteError, match=r"batch 0: an input of shape \(16, 5\) holds NaN or infinity"):
        match(*networks(), [bad], method=method)
    with pytest.raises(NotFiniteError, match="batch 1"):
        match(*networks(), [X, bad], method="activations")


@METHODS
@pytest.mark.parametrize("empty", [[], iter([]), torch.zeros(0, 5)])
def test_no_data_is_refused(method: str, empty: Any) -> None:
    with pytest.raises(DataError, match="the data holds no batch"):
        match(*networks(), empty, method=method)


def test_activations_that_are_not_finite_are_refused() -> None:
    a, b = networks()
    with torch.no_grad():
        b[3].weight[0, 0] = b[0].weight[0, 0] = 3e38  # finite, but not what they make of the data
    with pytest.raises(NotFiniteError):
        match(a, b, 100 * X, method="activations", symmetry=symmetry(a, X))


def test_an_unknown_method_is_refused_with_a_suggestion() -> None:
    with pytest.raises(DataError, match="unknown matching method 'weight'; did you mean weights"):
        match(*networks(), X, method="weight")


def test_activations_without_data_are_refused() -> None:
    with pytest.raises(DataError, match="matching by activations needs data"):
        match(*networks(), method="activations", example_inputs=X)


def test_no_inputs_at_all_are_refused() -> None:
    with pytest.raises(DataError, match="pass data, example_inputs, or a symmetry"):
        match(*networks())


@METHODS
def test_the_symmetry_of_another_network_is_refused(method: str) -> None:
    other = symmetry(networks(9)[0], X)
    with pytest.raises(ArchitectureError, match=r"the symmetry and model a are not .*0\.weight: \(9, 5\) in the symm"):
        match(*networks(), X, method=method, symmetry=other)


def test_inputs_of_another_shape_are_refused() -> None:
    with pytest.raises(SymmetryError, match=r"inputs of shape \(16, 4\): in module '0'"):
        match(*networks(), X[:, :4])


# What it leaves alone


@METHODS
@pytest.mark.parametrize("fails", [False, True])
def test_models_are_as_they_were(method: str, fails: bool) -> None:
    a, b = networks()
    a.train()
    b.eval()
    b[1].train()
    before = [copy.deepcopy(full_state(model)) for model in (a, b)]
    modes = [[module.training for module in model.modules()] for model in (a, b)]
    x = X.clone()
    if fails:
        with pytest.raises(NotFiniteError if method == "activations" else DataError):
            match(a, b, [x, x / 0], method=method, restarts=0)
    else:
        match(a, b, x, method=method)
    assert torch.equal(x, X)
    for model, state, mode in zip((a, b), before, modes, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in full_state(model).items())
        assert [module.training for module in model.modules()] == mode
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())


# Files


@METHODS
def test_a_matching_survives_its_file(method: str, tmp_path: Path) -> None:
    a, b = networks()
    matching = match(a, b, X, method=method, seed=3)
    read = Matching.load(matching.save(tmp_path / "m.safetensors"))
    assert same(read, matching)
    assert (read.method, read.seed, read.by_weights) == (matching.method, 3, matching.by_weights)
    assert read.symmetry.to_json() == matching.symmetry.to_json()
    state = read.apply(b.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in matching.apply(b.state_dict()).items())


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    a, b = networks()
    matching = match(a, b, X)
    with pytest.raises(CheckpointError, match=r"end the name in \.safetensors"):
        matching.save(tmp_path / "m.pt")
    permutation = matching.permutation.save(tmp_path / "p.safetensors")
    with pytest.raises(CheckpointError, match="is not a file of the form 'isthmus matching 1'"):
        Matching.load(permutation)
    whole = matching.save(tmp_path / "m.safetensors")
    whole.write_bytes(whole.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"m\.safetensors cannot be read"):
        Matching.load(whole)
    for name, metadata in (("index:0", {}), ("odd", {"matching": "{}"}), ("index:0", {"matching": "{}"})):
        save_file({name: torch.arange(8)}, whole, metadata={"format": "isthmus matching 1", **metadata})
        with pytest.raises(CheckpointError, match=r"m\.safetensors is damaged"):
            Matching.load(whole)

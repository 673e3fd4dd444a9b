"""All methods behind one call, how they start one another, and matching from files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from isthmus import symmetry, zoo
from isthmus.align import Matching, Permutation, match, match_checkpoints
from isthmus.align.nets.methods import METHODS
from isthmus.base.errors import ArchitectureError, CheckpointError, DataError, NotFiniteError
from isthmus.base.evaluation import evaluate
from isthmus.base.files import save_state_dict
from isthmus.base.lazy import LazyState, open_state_dict

QUICK = {
    "sinkhorn": {"steps": 40},
    "straight_through": {"steps": 10, "held": 2},
    "learned": {"steps": 10, "held": 2},
    "auto": {"candidates": ("weights", "activations")},
}


@pytest.fixture(scope="module")
def digits() -> list[tuple[Tensor, Tensor]]:
    return list(zoo.loader(zoo.load_data("digits", "train"), 256))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, nn.Module]:
    nets = [zoo.mlp(64, (32, 32), seed=seed) for seed in (0, 1)]
    for seed, net in enumerate(nets):
        recipe = zoo.Recipe(epochs=6, optimizer="adam", lr=3e-3, weight_decay=0.0, seed=seed)
        zoo.train(net, zoo.load_data("digits", "train"), recipe, progress=False)
    return nets[0], nets[1]


def midpoint(a: nn.Module, b: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    middle = zoo.mlp(64, (32, 32))
    with torch.no_grad():
        for place, x, y in zip(middle.parameters(), a.parameters(), b.parameters(), strict=True):
            place.copy_((x + y) / 2)
    return evaluate(middle, data).loss


@pytest.mark.parametrize("method", METHODS)
def test_every_method_finds_a_planted_order(
    method: str, trained: tuple[nn.Module, nn.Module], digits: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    a = trained[0]
    drawn = symmetry(a, digits[0][0]).random(torch.Generator().manual_seed(0))
    found = match(a, drawn.apply(a), digits, method=method, **QUICK.get(method, {}))
    assert found.permutation == drawn.inverse()
    assert found.method.startswith(method)
    assert set(found.scores) == set(found.permutation.indices)
    assert all(float(score.nanmedian()) > 0.999 for score in found.scores.values())  # some units never fire
    loaded = Matching.load(found.save(tmp_path / "found.safetensors"))
    assert loaded.permutation == found.permutation
    assert (loaded.method, loaded.bound, loaded.history) == (found.method, found.bound, found.history)
    assert [dict(line) for line in loaded.candidates] == [dict(line) for line in found.candidates]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_the_loss_halfway(
    method: str, trained: tuple[nn.Module, nn.Module], digits: list[tuple[Tensor, Tensor]]
) -> None:
    a, b = trained
    found = match(a, b, digits, method=method, **QUICK.get(method, {}))
    assert midpoint(a, found.apply(b), digits) < 0.7 * midpoint(a, b, digits)
    again = match(a, b, digits, method=method, **QUICK.get(method, {}))
    assert again.permutation == found.permutation


def test_restarts_are_chosen_by_the_loss_halfway_on_request(
    trained: tuple[nn.Module, nn.Module], digits: list[tuple[Tensor, Tensor]]
) -> None:
    a, b = trained
    found = match(a, b, digits, choose="midpoint", restarts=6)
    ends = [match(a, b, digits, restarts=count) for count in (1, 6)]
    losses = [midpoint(a, end.apply(b), digits) for end in ends]
    assert midpoint(a, found.apply(b), digits) <= min(losses) + 1e-9
    assert found.objective in {line[-1] for line in found.history}
    with pytest.raises(DataError, match="choosing by midpoint loss needs data"):
        match(a, b, example_inputs=digits[0][0], choose="midpoint")
    with pytest.raises(DataError, match="choose is 'loss'; expected one of 'objective', 'midpoint'"):
        match(a, b, digits, choose="loss")


def test_auto_says_which_won_and_by_how_much(
    trained: tuple[nn.Module, nn.Module], digits: list[tuple[Tensor, Tensor]]
) -> None:
    a, b = trained
    found = match(a, b, digits, method="auto", candidates=("weights", "activations"))
    table = {line["method"]: line for line in found.candidates}
    assert list(table) == ["identity", "weights", "activations"]
    losses = {
        name: midpoint(a, match(a, b, digits, method=name).apply(b), digits) for name in ("weights", "activations")
    }
    losses["identity"] = midpoint(a, b, digits)
    for name, loss in losses.items():
        assert table[name]["loss"] == pytest.approx(loss, rel=1e-5)
    winner = min(losses, key=lambda name: losses[name])
    assert found.method == f"auto: {winner}"
    assert table[winner]["margin"] <= 0


def test_auto_keeps_the_order_of_networks_that_are_aligned(
    trained: tuple[nn.Module, nn.Module], digits: list[tuple[Tensor, Tensor]]
) -> None:
    a = trained[0]
    drawn = symmetry(a, digits[0][0]).random(torch.Generator().manual_seed(0))
    found = match(a, a, digits, method="auto", init=drawn, candidates=("frank_wolfe",))
    assert found.permutation.is_identity
    squares = [float((p.detach().double() ** 2).sum()) for name, p in a.named_parameters() if name != "fc3.bias"]
    assert found.objective == pytest.approx(sum(squares), rel=1e-9)


@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if entry.starts and name != "auto"])
def test_any_result_starts_another(
    method: str, trained: tuple[nn.Module, nn.Module], digits: list[tuple[Tensor, Tensor]]
) -> None:
    a, b = trained
    first = match(a, b, digits, method="activations")
    found = match(a, b, digits, method=method, init=first, **QUICK.get(method, {}))
    assert midpoint(a, found.apply(b), digits) < midpoint(a, b, digits)
    if method in ("weights", "frank_wolfe"):
        start = match(a, b, digits, init=first.permutation, restarts=1).history[0][0]
        assert found.objective >= start - 1e-9


def test_options_and_data_are_checked_before_work(trained: tuple[nn.Module, nn.Module]) -> None:
    a, b = trained
    x = torch.zeros(2, 64)
    with pytest.raises(DataError, match=r"'learnt'; did you mean learned\?; there are weights"):
        match(a, b, x, method="learnt")
    with pytest.raises(DataError, match="method 'weights' has no option 'step'; did you mean steps"):
        match(a, b, x, step=3)
    with pytest.raises(DataError, match=r"matching by learned needs data: pass batches \(inputs, labels\)"):
        match(a, b, method="learned")
    with pytest.raises(DataError, match="'activations' cannot begin at a given permutation; weights"):
        match(a, b, x, method="activations", init=symmetry(a, x).identity())
    other = zoo.mlp(64, (16,), seed=0)
    with pytest.raises(DataError, match="init permutes the groups"):
        match(a, b, x, init=symmetry(other, x).identity())


# From files


def save(model: nn.Module, path: Path) -> Path:
    return save_state_dict(model.state_dict(), path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_checkpoints_are_matched_as_networks_are(suffix: str, tmp_path: Path) -> None:
    a, b = (zoo.resnet(8, seed=seed) for seed in (0, 1))
    x = torch.zeros(1, 3, 32, 32)
    found = match(a, b, x)
    paths = save(a, tmp_path / f"a{suffix}"), save(b, tmp_path / f"b{suffix}")
    read = match_checkpoints(*paths, found.symmetry)
    assert read.permutation == found.permutation
    assert read.objective == pytest.approx(found.objective, rel=1e-12)
    assert read.bound == pytest.approx(found.bound, rel=1e-9)
    for name, scores in found.scores.items():
        torch.testing.assert_close(read.scores[name], scores, equal_nan=True)
    started = match_checkpoints(*paths, found.symmetry, init=found, restarts=1)
    assert started.permutation == found.permutation


def test_tensors_stay_in_their_file(tmp_path: Path) -> None:
    state = {"module.w": torch.arange(6.0).reshape(2, 3), "module.b": torch.ones(2)}
    lazy = open_state_dict(save_state_dict(state, tmp_path / "net.safetensors"))
    assert isinstance(lazy, LazyState)
    assert list(lazy) == ["b", "w"]
    assert len(lazy) == 2
    assert lazy.shapes["w"].shape == (2, 3)
    assert lazy.shapes["w"].is_meta
    assert torch.equal(lazy["w"], state["module.w"])
    assert lazy["w"] is not lazy["w"]


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    a = zoo.mlp(8, (4,), seed=0)
    found = symmetry(a, torch.zeros(1, 8))
    good = save(a, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        match_checkpoints(good, tmp_path / "none.safetensors", found)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        match_checkpoints(good, tmp_path / "bad.safetensors", found)
    with pytest.raises(ArchitectureError, match="not the same architecture"):
        match_checkpoints(good, save(zoo.mlp(8, (5,), seed=0), tmp_path / "wide.safetensors"), found)
    with torch.no_grad():
        next(a.parameters())[0, 0] = math.nan
    with pytest.raises(NotFiniteError, match=r"network b: fc1\.weight"):
        match_checkpoints(good, save(a, tmp_path / "nan.safetensors"), found)


def test_a_start_is_a_permutation_of_this_architecture() -> None:
    a = zoo.mlp(8, (4,), seed=0)
    x = torch.zeros(1, 8)
    start = symmetry(a, x).random(torch.Generator().manual_seed(0))
    loaded = Permutation(symmetry(a, x), start.indices)
    assert match(a, a, x, init=loaded).permutation.is_identity

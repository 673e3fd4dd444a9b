"""Forks of a training by a recipe: in Python against training by hand, on the command line against Python."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from isthmus.base.errors import ArchitectureError, CheckpointError, DivergedError
from isthmus.base.files import load_state_dict
from isthmus.cli import main
from isthmus.merge import connect
from isthmus.spawning import RecipeTraining, spawn_recipe
from isthmus.zoo import RECIPES, Dataset, Recipe, Text, load_data, loader, mlp, train, transformer

RECIPE = Recipe(epochs=4, batch_size=64, lr=0.1, seed=7)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits", limit=300)


@pytest.fixture(scope="module")
def test_set() -> Dataset:
    return load_data("digits", "test")


def test_children_of_the_initial_weights_are_trainings_with_other_seeds(digits: Dataset, test_set: Dataset):
    model = mlp(64, (12, 12), seed=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = spawn_recipe(model, digits, test_set, RECIPE, at=(0, 20), points=5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert (found.total, found.seed, found.seeds) == (20, 7, (8, 9))
    a, b = (mlp(64, (12, 12), seed=3) for _ in range(2))
    for seed, child in ((8, a), (9, b)):
        train(child, digits, dataclasses.replace(RECIPE, seed=seed))
    expected = connect(a, b, loader(test_set), points=5)
    np.testing.assert_allclose(found.paths[0][0].loss, expected.loss, rtol=1e-6)
    assert found.paths[0][0].accuracy is not None
    assert expected.accuracy is not None
    np.testing.assert_array_equal(found.paths[0][0].accuracy, expected.accuracy)
    # at the end of training the fork is the training itself
    trunk = mlp(64, (12, 12), seed=3)
    train(trunk, digits, RECIPE)
    assert found.paths[20][0].loss[0] == pytest.approx(connect(trunk, trunk, loader(test_set), points=3).loss[0])
    assert found.barriers[1] == 0


def test_a_text(tmp_path: Path):
    text = Text("mine", "train", torch.arange(300) ** 2 % 7, 8, tuple("abcdefg"), "made up")
    model = transformer(vocabulary=7, context=8, width=8, heads=2, layers=1, seed=0)
    found = spawn_recipe(model, text, text, Recipe(1, 4, "adamw", lr=1e-3), at=(2,), points=3, folder=tmp_path)
    assert found.total == 9  # of 37 windows 36 are there wherever the cuts begin
    assert found.paths[2][0].samples == len(text)


def test_what_determines_a_training(digits: Dataset, test_set: Dataset, tmp_path: Path):
    def spawned(model_seed: int = 0, data: Dataset = digits, recipe: Recipe = RECIPE) -> None:
        spawn_recipe(mlp(64, (4,), seed=model_seed), data, test_set, recipe, at=(3,), points=3, folder=tmp_path)

    spawned()
    spawned()
    files = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="initial weights is"):
        spawned(model_seed=1)
    with pytest.raises(CheckpointError, match=r"its lr is 0\.1, that of this one 0\.2"):
        spawned(recipe=dataclasses.replace(RECIPE, lr=0.2))
    other = copy.copy(digits)
    object.__setattr__(other, "labels", digits.labels.flip(0))
    with pytest.raises(CheckpointError, match="SHA-256 of the data is"):
        spawned(data=other)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    # the seed of the noise is in the names
    spawned(recipe=dataclasses.replace(RECIPE, seed=1))
    assert len(list(tmp_path.iterdir())) == 2 * len(files)


def test_split_or_not_the_trunk_is_one(digits: Dataset):
    training = RecipeTraining(mlp(64, (12,), seed=0), digits, RECIPE)
    middle = training(training(None, 0, 3, 7), 3, 9, 7)
    assert torch.equal(middle["model"]["fc1.weight"], training(None, 0, 9, 7)["model"]["fc1.weight"])


def test_trainings_that_cannot_be(digits: Dataset, test_set: Dataset):
    with pytest.raises(ArchitectureError, match="does not take digits"):
        spawn_recipe(mlp(784, (4,), seed=0), digits, test_set, RECIPE, at=(0,))
    with pytest.raises(DivergedError, match="in epoch"):
        spawn_recipe(
            mlp(64, (16, 16), seed=0), digits, test_set, Recipe(4, 8, lr=1e20, warmup_epochs=0), at=(0,), points=3
        )


def arguments(network: list[str], **options: Any) -> list[Any]:
    chosen = {"data": "digits", "limit": 300, "epochs": 3, "lr": 0.01, "at": "0,4", "points": 5, **options}
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in chosen.items() if value is not None]
    return ["spawn", *network, *(each for pair in pairs for each in pair)]


def test_the_command_is_the_function(network: list[str], run_json: Any, tmp_path: Path):
    plot, folder = tmp_path / "spawning.svg", tmp_path / "runs"
    call = arguments(network, folder=folder, plot=plot, children=3, seed=5, batch_size=50)
    found = run_json(*call)
    recipe = dataclasses.replace(RECIPES["mlp"], epochs=3, lr=0.01, seed=5, batch_size=50)
    data, test_set = load_data("digits", limit=300), load_data("digits", "test", limit=300)
    expected = spawn_recipe(mlp(64, [24, 16], seed=5), data, test_set, recipe, at=(0, 4), children=3, points=5)
    content = json.loads(json.dumps(expected.to_dict()))
    assert {name: found[name] for name in content} == content
    assert found["seeds"] == [6, 7, 8]
    assert found["total"] == 18
    assert found["measured_on"] == {"split": "test", "samples": 300}
    assert found["recipe"]["lr"] == 0.01
    drawn = plot.read_text()
    assert "loss barrier between children" in drawn
    assert "instability (error) between children" in drawn
    # the folder serves the next call, and its files every other command
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run_json(*call) == found
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == files
    children = [folder / f"trunk-5-step-000004-child-{seed}.pt" for seed in (6, 7)]
    assert "fc1.weight" in load_state_dict(children[0])
    path = run_json("connect", *children, *network, "--data", "digits", "--limit", 300, "--points", 5)
    assert path["loss"] == pytest.approx(found["paths"][1][0]["loss"], rel=1e-6)


def test_lines_for_a_person(network: list[str], capsys: pytest.CaptureFixture, tmp_path: Path):
    assert main([str(each) for each in arguments(network, at=None, plot=tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "mlp on digits, 3 epochs of 3 steps" in out
    assert "parted at  loss barrier  instability (error)  accuracy of children" in out
    assert "from step" in out or "at no step that was tried" in out
    assert out.rstrip().endswith(f"wrote {tmp_path / 'a.png'}")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_training_that_is_stable_nowhere_is_called_so(network: list[str], capsys: pytest.CaptureFixture):
    # a rate a hundred times that of the recipe
    assert main([str(each) for each in arguments(network, at="0,2", lr=0.1, epochs=10)]) == 0
    assert "stable (instability below 2 %) at no step that was tried" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"at": "0,x"}, "expected whole numbers separated by commas"),
        ({"at": "0,10"}, "at holds 10; expected steps from 0"),
        ({"lr": -1}, "lr is -1.0"),
        ({"split": "test"}, "--split does not fit"),
        ({"plot": "a.gif"}, "must end in .png"),
        ({"data": "digit"}, "no data set 'digit'; did you mean digits"),
        ({"data": "os:getcwdb", "limit": None}, "data"),
        ({"device": "none"}, "--device none"),
    ],
)
def test_refused_before_any_work(options: dict[str, Any], said: str, network: list[str], refused: Any, tmp_path: Path):
    assert said in refused(*arguments(network, folder=tmp_path / "runs", **options))


def test_data_of_a_factory_is_no_data_set(network: list[str], refused: Any, tmp_path: Path, monkeypatch: Any):
    (tmp_path / "mine_to_spawn.py").write_text("import torch\ndef batches():\n    return [torch.ones(2, 64)]\n")
    monkeypatch.chdir(tmp_path)
    assert "needs a data set of the zoo" in refused(*arguments(network, data="mine_to_spawn:batches", limit=None))


def test_a_folder_that_cannot_be(network: list[str], refused: Any, tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert "choose another place" in refused(*arguments(network, folder=tmp_path / "file" / "runs"))

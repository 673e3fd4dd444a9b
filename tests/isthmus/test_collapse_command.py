"""`isthmus collapse` as a user runs it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import isthmus
from isthmus.base.files import load_state_dict, save_state_dict
from isthmus.cli import main
from isthmus.commands import coarse
from isthmus.commands.collapse import step_names
from isthmus.zoo import coarsen, load_data, loader, mlp

RunJson = Callable[..., dict[str, Any]]
Refused = Callable[..., str]
PAIRS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three networks of five classes."""
    folder = tmp_path_factory.mktemp("epochs")
    paths = [folder / f"epoch-{step:02d}.safetensors" for step in (0, 2, 10)]
    for seed, path in enumerate(paths):
        save_state_dict(mlp(64, [24, 16], classes=5, seed=seed).state_dict(), path)
    return paths


def test_it_gives_what_python_gives(pair: Path, network: list[str], run_json: RunJson) -> None:
    found = run_json("collapse", pair / "a.safetensors", *network, "--data", "digits", "--layers", "all")
    model = mlp(64, [24, 16])
    model.load_state_dict(load_state_dict(pair / "a.safetensors"))
    same = isthmus.collapse(model, loader(load_data("digits")), layers="all")
    assert found["collapses"][0] == json.loads(json.dumps(same.to_dict()))
    assert found["steps"] == ["a"]
    assert found["measured_on"] == {"data": "digits", "split": "train", "source": load_data("digits").source}
    assert found["coarse"] is None


def test_nc1_by_the_definition(checkpoints: list[Path], network: list[str], run_json: RunJson) -> None:
    found = run_json("collapse", checkpoints[1], *network, "--data", "digits", "--split", "test", "--coarse", "pairs")
    model = mlp(64, [24, 16], classes=5).double()
    model.load_state_dict(load_state_dict(checkpoints[1]))
    data = load_data("digits", "test")
    with torch.no_grad():
        h = model[:-1](data.inputs().double()).numpy()
    labels = data.labels.numpy() // 2
    means = np.stack([h[labels == c].mean(0) for c in range(5)])
    within = (h - means[labels]).T @ (h - means[labels]) / len(h)
    centred = means - means.mean(0)
    nc1 = np.trace(within @ np.linalg.pinv(centred.T @ centred / 5, rcond=1e-10)) / 5
    assert found["collapses"][0]["values"]["fc3.input"]["nc1"] == pytest.approx(nc1, rel=1e-4)
    assert found["coarse"] == [list(group) for group in PAIRS]
    assert found["class_names"][1] == "2+3"


def test_several_checkpoints_with_a_report(
    checkpoints: list[Path], network: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "report", tmp_path / "curves.svg"
    arguments = ["collapse", *checkpoints, *network, "--data", "digits", "--split", "test", "--coarse", "neighbours",
                 "--layers", "relu1", "--plot", plot, "--report", out]  # fmt: skip
    assert main(list(map(str, arguments))) == 0
    printed = capsys.readouterr().out
    assert "checkpoint" in printed
    assert "relu1" in printed
    assert f"wrote {plot}" in printed
    assert f"wrote {out / 'report.html'}" in printed
    assert "Over training" not in plot.read_text()
    names = {path.name for path in out.iterdir()}
    assert names == {"report.html", "collapse.json", "collapse.csv", "training.png", "depth.png", "cosines.png",
                     "means.png", "simplex.png", "tsne.png"}  # fmt: skip
    with (out / "collapse.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["checkpoint"] for row in rows] == ["0", "0", "2", "2", "10", "10"]
    assert [row["layer"] for row in rows[:3]] == ["relu1", "fc3.input", "relu1"]
    content = json.loads((out / "collapse.json").read_text())
    assert content["steps"] == [0, 2, 10]
    assert float(rows[1]["nc1"]) == pytest.approx(content["collapses"][0]["values"]["fc3.input"]["nc1"])
    assert [file["role"] for file in content["files"]] == ["checkpoint 0", "checkpoint 2", "checkpoint 10"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 6
    assert "src=" not in page
    assert "which the network did not see" in page


def test_one_checkpoint_is_drawn_along_its_depth(
    pair: Path, network: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["collapse", pair / "a.safetensors", *network, "--data", "digits", "--limit", 200, "--layers",
                 "relu1,relu2", "--plot", tmp_path / "depth.svg", "--report", tmp_path / "out"]  # fmt: skip
    assert main(list(map(str, arguments))) == 0
    assert "relu2" in (tmp_path / "depth.svg").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "coloured by classes" in page
    assert "Over training" not in page
    assert "checkpoint " not in capsys.readouterr().out


def test_steps_are_named_by_the_user(checkpoints: list[Path], network: list[str], run_json: RunJson) -> None:
    usual = ["collapse", *checkpoints, *network, "--data", "digits", "--split", "test", "--coarse", "neighbours"]
    assert run_json(*usual, "--steps", "1,2.5,4")["steps"] == [1, 2.5, 4]
    assert run_json(*usual, "--steps", "a,2,3")["steps"] == ["a", "2", "3"]


def test_steps_from_names() -> None:
    assert step_names([Path("b-9.pt"), Path("b-10.pt")]) == (9, 10)
    assert step_names([Path("b-10.pt"), Path("b-9.pt")]) == ("b-10", "b-9")
    assert step_names([Path("x.pt"), Path("b-9.pt")]) == ("x", "b-9")
    assert step_names([Path("epoch-9.pt")]) == ("epoch-9",)


def test_groups_by_name_are_those_of_the_whole_training_split(
    checkpoints: list[Path], network: list[str], run_json: RunJson
) -> None:
    for name in ("similar", "random", "dissimilar"):
        found = run_json("collapse", checkpoints[0], *network, "--data", "digits", "--split", "test", "--limit", 200,
                         "--coarse", name, "--seed", 3)  # fmt: skip
        expected = coarsen(load_data("digits"), name, seed=3).groups
        assert found["coarse"] == [list(group) for group in expected]


def test_groups_from_a_file(checkpoints: list[Path], network: list[str], run_json: RunJson, tmp_path: Path) -> None:
    groups = [[0, 5], [1, 6], [2, 7], [3, 8], [4, 9]]
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    usual = ["collapse", checkpoints[0], *network, "--data", "digits", "--split", "test", "--coarse"]
    from_file = run_json(*usual, tmp_path / "groups.json")
    assert from_file["coarse"] == groups
    assert from_file == run_json(*usual, json.dumps(groups))


FACTORY = """
import torch
from isthmus.zoo import load_data, loader, mlp

def fine():
    return list(loader(load_data("digits", "test"), 100))

def unlabelled():
    return [torch.randn(10, 1, 8, 8)]

def network():
    return mlp(64, [24, 16], classes=5)

class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp(64, [24, 16], classes=5)
    def forward(self, x):
        return self.body(x) * 2

def wide():
    return Wide()
"""


def test_data_and_networks_of_ones_own(
    checkpoints: list[Path], network: list[str], run_json: RunJson, refused: Refused, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "my_collapse_data.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = ["collapse", checkpoints[0], "--model", "my_collapse_data:network", "--data", "my_collapse_data:fine"]
    groups = json.dumps(PAIRS)
    found = run_json(*own, "--coarse", groups)
    known = run_json("collapse", checkpoints[0], *network, "--data", "digits", "--split", "test", "--coarse", "pairs")
    assert found["collapses"][0]["values"]["fc3.input"]["nc1"] == pytest.approx(
        known["collapses"][0]["values"]["fc3.input"]["nc1"], rel=1e-6
    )
    assert "give the groups as JSON" in refused(*own, "--coarse", "random")
    assert "the groups hold 0 to 3" in refused(*own, "--coarse", "[[0,1],[2,3]]")
    assert "do not hold every fine label" in refused(*own, "--coarse", "[[0,2],[2,3]]")
    assert "labels" in refused(*own[:-1], "my_collapse_data:unlabelled", "--coarse", groups)

    wide = {f"body.{key}": value for key, value in load_state_dict(checkpoints[0]).items()}
    save_state_dict(wide, tmp_path / "wide.safetensors")
    usual = ["collapse", tmp_path / "wide.safetensors", "--model", "my_collapse_data:wide", "--data",
             "my_collapse_data:fine", "--coarse", groups]  # fmt: skip
    assert "classifier" in refused(*usual)
    without = run_json(*usual, "--layers", "body.relu2", "--classes", 5, "--positions", "samples", "--report",
                       tmp_path / "wide")  # fmt: skip
    assert without["collapses"][0]["classifier"] is None
    assert "rows of the classifier" not in (tmp_path / "wide" / "report.html").read_text()
    named = run_json(*usual, "--classifier", "body.fc3")
    assert named["collapses"][0]["layers"] == ["body.fc3.input"]


def test_wrong_use_is_refused_before_work(
    checkpoints: list[Path], network: list[str], refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = ["collapse", checkpoints[0], *network, "--data", "digits"]
    assert "NET" in refused("collapse", *network, "--data", "digits")
    assert "2 names for 1" in refused(*usual, "--steps", "1,2")
    assert "is no file" in refused(*usual, "--coarse", "neighbors")
    assert "not JSON" in refused(*usual, "--coarse", "[[0,1]")
    for wrong in ("[1,2]", '[["a"]]', "[[true]]"):
        assert "no groups" in refused(*usual, "--coarse", wrong)
    assert "do not hold each of the 10 classes" in refused(*usual, "--coarse", "[[0,1],[2,3]]")
    assert "--model-args" in refused(*usual)  # ten classes, where the network has five
    assert "relu9" in refused(*usual, "--coarse", "pairs", "--layers", "relu9")
    assert "must end in" in refused(*usual, "--plot", tmp_path / "curves.txt")
    (tmp_path / "file").write_text("")
    assert "file" in refused(*usual, "--report", tmp_path / "file" / "in")
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("to be or not to be " * 40)
    text = [*usual[:-1], "tinyshakespeare", "--data-dir", tmp_path, "--data-args", '{"context": 8}']
    assert "a text has no classes" in refused(*text)
    monkeypatch.setattr(coarse, "find_spec", lambda _: None)
    assert "umap-learn" in refused(*usual, "--coarse", "pairs", "--embedding", "umap")


def test_the_second_checkpoint_is_checked_before_the_first_is_measured(
    checkpoints: list[Path], pair: Path, network: list[str], refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    import isthmus.metrics.collapse as room

    monkeypatch.setattr(room, "collapse", lambda *_, **__: pytest.fail("work before the check"))
    found = refused(
        "collapse", checkpoints[0], pair / "a.safetensors", *network, "--data", "digits", "--coarse", "pairs"
    )
    assert "fc3" in found

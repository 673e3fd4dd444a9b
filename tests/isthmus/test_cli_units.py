"""`isthmus units` as a user runs it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.align import ANALYSES, correspond
from isthmus.base.files import load_state_dict, save_state_dict
from isthmus.cli import main
from isthmus.commands import units
from isthmus.zoo import load_data, loader, mlp

RunJson = Callable[..., dict[str, Any]]
QUICK = ("--without", "rotation,clusters,transport,means", "--folds", "5", "--held-out", "1")


def test_it_gives_what_python_gives(pair: Path, network: list[str], run_json: RunJson) -> None:
    found = run_json("units", pair / "a.safetensors", pair / "b.safetensors", *network, "--data", "digits", "--split",
                     "train", "--layer", "relu1", "--penalty", 0.05, *QUICK)  # fmt: skip
    models = mlp(64, [24, 16]), mlp(64, [24, 16])
    for model, name in zip(models, "ab", strict=True):
        model.load_state_dict(load_state_dict(pair / f"{name}.safetensors"))
    data = loader(load_data("digits"), shuffle=True, generator=torch.Generator().manual_seed(0))
    same = correspond(
        models[0],
        models[1],
        data,
        layers="relu1",
        folds=5,
        held_out=1,
        penalty=0.05,
        analyses=["stability", "prediction"],
    )
    assert found["summary"][0]["one_to_one"] == pytest.approx(same.summary()[0]["one_to_one"], abs=1e-12)
    assert found["measured_on"]["data"] == "digits"
    assert found["summary"][0]["one_to_one"] > found["summary"][0]["null"] + 0.2


def test_a_folder_with_everything(
    pair: Path, network: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "units"
    arguments = ["units", pair / "a.safetensors", pair / "b.safetensors", *network, "--data", "digits", "--split",
                 "train", "--layer", "relu1,relu2", "--layer-b", "relu1,relu1", "--clusters", 3, "--pictures", 3,
                 "--out", out]  # fmt: skip
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert "held-out rows" in captured.out
    assert "relu2, relu1" in captured.out
    assert f"wrote {out / 'report.html'}" in captured.out
    names = {path.name for path in out.iterdir()}
    assert {"report.html", "units.json", "units-relu1.csv", "units-relu2-relu1.csv"} <= names
    assert {"units1-relu1.png", "units2-relu1.png", "matching-relu2-relu1.safetensors"} <= names
    with (out / "units-relu2-relu1.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 16
    content = json.loads((out / "units.json").read_text())
    assert [file["role"] for file in content["files"]] == ["network A", "network B"]


def test_networks_of_two_architectures(pair: Path, network: list[str], tmp_path: Path, run_json: RunJson) -> None:
    other = mlp(64, [12], seed=3)
    save_state_dict(other.state_dict(), tmp_path / "c.safetensors")
    found = run_json("units", pair / "a.safetensors", tmp_path / "c.safetensors", *network, "--model-b-args",
                     '{"widths": [12]}', "--data", "digits", "--layer", "relu2", "--layer-b", "relu1", "--without",
                     ",".join(ANALYSES))  # fmt: skip
    assert (found["summary"][0]["units_a"], found["summary"][0]["units_b"]) == (16, 12)


def test_wrong_use_is_refused_before_work(
    pair: Path, network: list[str], refused: Callable[..., str], tmp_path: Path
) -> None:
    usual = ["units", pair / "a.safetensors", pair / "b.safetensors", *network, "--data", "digits"]
    assert "--layer" in refused(*usual)
    assert "2 layers for 1" in refused(*usual, "--layer", "relu1", "--layer-b", "relu1,relu2")
    assert "--without rotations" in refused(*usual, "--layer", "relu1", "--without", "rotations")
    assert "relu9" in refused(*usual, "--layer", "relu9", *QUICK)
    assert "penalty" in refused(*usual, "--layer", "relu1", "--penalty", "-1", "--split", "train", *QUICK)
    (tmp_path / "file").write_text("")
    assert "file" in refused(*usual, "--layer", "relu1", "--out", tmp_path / "file" / "in")


def test_the_names_in_the_help_are_those_of_the_analyses() -> None:
    assert units._WITHOUT == ANALYSES

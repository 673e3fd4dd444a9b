"""`isthmus subclasses` as a user runs it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.align.subclasses import agreement, cluster_and_probe, match_subclasses, subclasses, subspace_angles
from isthmus.base.files import load_state_dict, save_state_dict
from isthmus.cli import main
from isthmus.zoo import Recipe, coarsen, load_data, mlp, train

RunJson = Callable[..., dict[str, Any]]
Refused = Callable[..., str]
QUICK = ("--count", "2", "--project", "pca")


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two networks that were trained on five classes of two digits each."""
    folder = tmp_path_factory.mktemp("coarse")
    data = coarsen(load_data("digits")).dataset
    paths = [folder / f"net{seed}.safetensors" for seed in (0, 1)]
    for seed, path in enumerate(paths):
        model = mlp(64, [24, 16], classes=5, seed=seed)
        train(model, data, Recipe(epochs=6, lr=0.1, seed=seed), progress=False)
        save_state_dict(model.state_dict(), path)
    return paths


def features(path: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    model = mlp(64, [24, 16], classes=5)
    model.load_state_dict(load_state_dict(path))
    data = load_data("digits", split)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        return model[:-1](data.inputs()), data.labels


def test_it_gives_what_python_gives(nets: list[Path], network: list[str], run_json: RunJson) -> None:
    found = run_json("subclasses", nets[0], *network, "--data", "digits", "--coarse", "pairs", *QUICK)
    (x, fine), (y, test_fine) = features(nets[0], "train"), features(nets[0], "test")
    clusters = subclasses(x, fine // 2, count=2, project="pca", limit=2000)
    assert found["found"]["labels"] == clusters.labels.tolist()
    own = found["agreements"]["the network"]
    assert own["purity"] == agreement(clusters, fine).purity
    assert own["fine_names"] == list("0123456789")
    pixels = subclasses(load_data("digits").inputs().flatten(1), fine // 2, count=2, project="pca", limit=2000)
    assert found["agreements"]["raw inputs"]["purity"] == agreement(pixels, fine).purity
    probe = cluster_and_probe(x, fine // 2, fine, y, test_fine, found=clusters)
    assert found["probe"]["accuracy"] == pytest.approx(probe.accuracy, abs=0.01)
    assert found["tested_on"]["split"] == "test"
    assert found["second"] is None
    assert found["caution"] is None


def test_two_networks_with_a_report(
    nets: list[Path], network: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    arguments = ["subclasses", nets[0], *network, "--data", "digits", "--coarse", "pairs", *QUICK, "--second", nets[1],
                 "--untrained", "--limit", 600, "--report", out]  # fmt: skip
    assert main(list(map(str, arguments))) == 0
    printed = capsys.readouterr().out
    for text in ("fc3.input on digits", "an untrained network", "raw inputs", "0+1", "partner clusters", "probe of"):
        assert text in printed
    assert {path.name for path in out.iterdir()} == {
        "report.html", "subclasses.json", "subclasses.csv", "clusters.png", "agreement.png", "agreement-inputs.png",
        "agreement-an-untrained-network.png", "probe.png", "second.png", "angles.png", "means.png", "simplex.png",
        "tsne.png",
    }  # fmt: skip
    content = json.loads((out / "subclasses.json").read_text())
    with (out / "subclasses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 600
    assert [int(row["cluster"]) for row in rows] == content["found"]["labels"]
    assert [int(row["cluster_of_second"]) for row in rows] == content["second"]["labels"]
    assert all(int(row["class"]) == int(row["fine"]) // 2 for row in rows)
    assert [file["role"] for file in content["files"]] == ["the network", "the second network"]
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 10
    assert "src=" not in page


def test_the_second_network_is_compared_as_in_python(nets: list[Path], network: list[str], run_json: RunJson) -> None:
    found = run_json("subclasses", nets[0], *network, "--data", "digits", "--split", "test", "--coarse", "neighbours",
                     "--second", nets[1], "--no-inputs", *QUICK)  # fmt: skip
    (x, fine), (z, _) = features(nets[0], "test"), features(nets[1], "test")
    a, b = (subclasses(part, fine // 2, count=2, project="pca") for part in (x, z))
    assert found["matching"]["overlap"] == match_subclasses(a, b).overlap
    assert found["matching"]["p_value"] < 0.05
    assert found["angles"]["mean"] == pytest.approx(subspace_angles(x, z, fine // 2).mean.tolist(), rel=1e-4)
    assert list(found["agreements"]) == ["the network"]
    assert found["probe"] is None  # the clusters themselves are of the test split


def test_without_coarse_labels_there_are_clusters_alone(
    pair: Path, network: list[str], run_json: RunJson, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    usual = ["subclasses", pair / "a.safetensors", *network, "--data", "digits", "--split", "test", "--layer", "relu1",
             "--method", "mixture", "--count", "bic", "--project", "pca"]  # fmt: skip
    found = run_json(*usual)
    assert found["layer"] == "relu1"
    assert found["agreements"] == {}
    assert len(found["found"]["names"]) == 10
    assert len(found["found"]["criteria"]) == 10
    assert (
        main([str(part) for part in (*usual[:-4], "--count", 1, "--project", "none", "--report", tmp_path / "out")])
        == 0
    )
    assert "purity" not in capsys.readouterr().out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "10 clusters inside 10 classes" in page
    assert "the first 6 of 10 classes" in page


def test_other_groups_than_those_of_the_training_are_noticed(
    nets: list[Path], network: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    groups = "[[2,4],[0,6],[1,8],[3,9],[5,7]]"
    arguments = ["subclasses", nets[0], *network, "--data", "digits", "--split", "test", "--coarse", groups, *QUICK]
    assert main(list(map(str, arguments))) == 0
    assert "caution: the network puts" in capsys.readouterr().out


def test_wrong_use_is_refused_before_work(
    nets: list[Path], network: list[str], refused: Refused, tmp_path: Path
) -> None:
    usual = ["subclasses", nets[0], *network, "--data", "digits"]
    assert "--count" in refused(*usual, "--count", "two")
    assert "--count" in refused(*usual, "--count", "0")
    assert "--untrained" in refused(*usual, "--untrained")
    assert "--count" in refused(*usual, "--coarse", "pairs", "--count", "elbow")
    assert "relu9" in refused(*usual, "--coarse", "pairs", "--layer", "relu9")
    assert "missing.pt" in refused(*usual, "--coarse", "pairs", "--second", tmp_path / "missing.pt")
    (tmp_path / "file").write_text("")
    assert "file" in refused(*usual, "--coarse", "pairs", "--report", tmp_path / "file" / "in")

"""`isthmus connect`: several curves, intervals, both splits, the midpoint, planes, and layer by layer."""

import dataclasses

import numpy as np
import pytest

import isthmus
from isthmus.align import Matching
from isthmus.base.files import load_state_dict, save_state_dict
from isthmus.cli import main
from isthmus.merge.layerwise import feature_connectivity, layerwise_paths
from isthmus.merge.paths import midpoint
from isthmus.zoo import load_data, loader, mlp

WIDTHS = [24, 16]


@pytest.fixture(scope="module")
def models(pair):
    found = []
    for name in "ab":
        found.append(mlp(64, WIDTHS, seed=9))
        found[-1].load_state_dict(load_state_dict(pair / f"{name}.safetensors"))
    return [model.eval() for model in found]


@pytest.fixture
def args(pair, network):
    return [pair / "a.safetensors", pair / "b.safetensors", *network, "--data", "digits"]


@pytest.fixture(scope="module")
def test_set():
    return loader(load_data("digits", "test"))


def test_curves_of_several_matchings(args, models, test_set, run_json, tmp_path, capsys):
    a, b = models
    matching = isthmus.match(a, b, test_set)
    matching.save(tmp_path / "m.safetensors")
    train_set = loader(load_data("digits", "train"))
    by = {"as trained": b, "mine": matching.apply(b)}
    by["by activations"] = isthmus.match(a, b, train_set, method="activations").apply(b)
    given = ["--matching", f"mine={tmp_path / 'm.safetensors'}", "--match", "activations", "--points", 5]
    plot = tmp_path / "p.svg"
    found = run_json("connect", *args, *given, "--interval", "--also-split", "train", "--plot", plot)
    paths = {name: isthmus.connect(a, model, test_set, points=5) for name, model in by.items()}
    assert list(found["paths"]) == list(paths)
    for name, path in paths.items():
        assert found["paths"][name]["loss"] == path.loss.tolist()
        assert found["intervals"][name] == list(path.barrier_interval())
        also = isthmus.connect(a, by[name], train_set, points=5)
        assert found["paths"][name]["also"]["digits, train split"]["barrier"] == pytest.approx(also.barrier, rel=1e-6)
    assert found["loss"] == paths["as trained"].loss.tolist()
    assert found["matched_on"]["split"] == "train"
    text = plot.read_text()
    assert all(name in text for name in paths)

    assert main(list(map(str, ["connect", *args, *given, "--repair", "rescale"]))) == 0
    said = capsys.readouterr().out
    assert "mine and repaired" in said
    assert "\nas trained  " in said
    assert "these networks have seen it" in said
    assert "95 % interval" not in said


def test_one_matching_is_one_curve_and_files_may_hold_a_sign(
    args, models, test_set, run_json, refused, tmp_path, capsys
):
    matching = isthmus.match(models[0], models[1], test_set)
    file = tmp_path / "x=1.safetensors"
    matching.save(file)
    found = run_json("connect", *args, "--matching", file, "--points", 3, "--interval")
    assert "paths" not in found
    path = isthmus.connect(models[0], Matching.load(file).apply(models[1]), test_set, points=3)
    assert found["loss"] == path.loss.tolist()
    assert found["interval"] == list(path.barrier_interval())
    assert main(list(map(str, ["connect", *args, "--matching", file, "--points", 3, "--also-split", "train"]))) == 0
    said = capsys.readouterr().out
    assert "matched, on digits, train split" in said
    assert "accuracy barrier  " in said
    message = refused("connect", *args, "--matching", f"y={file}", "--matching", f"y={file}")
    assert "two curves are called 'y'" in message


def test_the_midpoint_alone(args, models, test_set, run_json, capsys):
    found = run_json("connect", *args, "--midpoint", "--match", "weights")
    a, b = models
    ordered = isthmus.match(a, b, test_set).apply(b)
    assert found["midpoints"]["as trained"] == dataclasses.asdict(midpoint(a, b, test_set))
    assert found["midpoints"]["by weights"] == dataclasses.asdict(midpoint(a, ordered, test_set))
    assert found["measured_on"]["split"] == "test"
    assert main(list(map(str, ["connect", *args, "--midpoint"]))) == 0
    assert "halfway" in capsys.readouterr().out


def test_layer_by_layer(args, models, test_set, run_json, capsys):
    found = run_json("connect", *args, "--layerwise", "--features", "--points", 3)
    expected = layerwise_paths(models[0], models[1], test_set)
    assert found["layerwise"]["as trained"]["layers"][0]["barrier"] == expected.barriers[0]
    features = feature_connectivity(models[0], models[1], test_set)
    last = found["features"]["as trained"]["layers"][-1]
    assert last["cosine_distance"] == features.cosine_distance[-1]
    assert main(list(map(str, ["connect", *args, "--layerwise", "--features", "--points", 3]))) == 0
    said = capsys.readouterr().out
    assert "layer halfway" in said
    assert "1 − cosine" in said
    assert "relu2" in said


def test_a_plane_through_three(args, models, run_json, refused, tmp_path):
    c, plot = tmp_path / "c.safetensors", tmp_path / "plane.svg"
    save_state_dict(mlp(64, WIDTHS, seed=5).state_dict(), c)
    files = [*args[:2], c, *args[2:], "--plane", plot, "--points", 3, "--limit", 60]
    found = run_json("connect", *files, "--match", "weights")
    assert found["plane"] == str(plot)
    aligned = plot.read_bytes()
    assert b"<svg" in aligned
    run_json("connect", *files)
    assert plot.read_bytes() != aligned
    mean = {name: (value + models[1].state_dict()[name]) / 2 for name, value in models[0].state_dict().items()}
    save_state_dict(mean, c)
    assert "one line in weight space" in refused("connect", *files)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--match", "wieghts"], "--match: there is no method 'wieghts'"),
        (["--plane", "p.png"], "a plane goes through three networks"),
        (["--also-split", "test"], "the split that is measured anyway"),
        (["--midpoint", "--interval"], "--midpoint measures one place only"),
        (["--plane", "p.gif"], "must end in .png"),
    ],
)
def test_wrong_use(options, said, args, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in refused("connect", *args, *options)
    assert not list(tmp_path.iterdir())


def test_layers_of_a_figure_are_named_at_a_few_places_only():
    from isthmus import figures

    ax = figures.Figure().subplots()
    figures._name_layers(ax, [f"layer{i}" for i in range(40)])
    assert np.array_equal(ax.get_xticks(), range(0, 40, 3))

"""Each command against the Python functions that it stands for."""

import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import isthmus
from isthmus.align import Matching
from isthmus.align.nets.methods import METHODS
from isthmus.base.files import load_state_dict, save_state_dict
from isthmus.cli import main
from isthmus.commands.methods import ALIGN, BASED, MERGING, NEEDS, REPAIRS, UNALIGNED
from isthmus.merge import evaluate
from isthmus.merge.methods import METHODS as MERGES
from isthmus.merge.repairs.prepared import METHODS as HOW_TO_REPAIR
from isthmus.report import HOW
from isthmus.zoo import load_data, loader, mlp, resnet

WIDTHS = [24, 16]


def _model(path):
    model = mlp(64, WIDTHS, seed=9)
    model.load_state_dict(load_state_dict(path))
    return model.eval()


@pytest.fixture
def models(pair):
    return _model(pair / "a.safetensors"), _model(pair / "b.safetensors")


@pytest.fixture
def test_set():
    return loader(load_data("digits", "test"))


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    (tmp_path / "mine_for_cli.py").write_text(
        """
import torch
from torch import nn

def network(width=4, out=3):
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, out))

def batches(count=2, split="test"):
    generator = torch.Generator().manual_seed(0 if split == "test" else 1)
    for _ in range(count):
        yield torch.randn(6, 5, generator=generator), torch.randint(3, (6,), generator=generator)

def unlabelled():
    return [torch.ones(3, 5)]

def number():
    return 3

constant = 4
"""
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("mine_for_cli", None)


def test_train_writes_what_training_in_python_gives(tmp_path, network, run_json):
    out = tmp_path / "a.safetensors"
    found = run_json(
        "train", *network, "--data", "digits", "--epochs", 2, "--lr", 0.01, "--seed", 3, "--out", out,
        "--limit", 200, "--batch-size", 50, "--optimizer", "adam", "--checkpoints", tmp_path / "epochs",
    )  # fmt: skip
    from isthmus.zoo import RECIPES, train

    data = load_data("digits", limit=200)
    recipe = RECIPES["mlp"].__class__(
        epochs=2, lr=0.01, seed=3, batch_size=50, optimizer="adam", weight_decay=0.0, warmup_epochs=0.0
    )
    expected = mlp(64, WIDTHS, seed=3)
    train(expected, data, recipe)
    state = load_state_dict(out)
    assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())
    assert found["test_accuracy"] == pytest.approx(
        evaluate(expected, loader(load_data("digits", "test", limit=200))).metric
    )
    assert [path.name for path in sorted((tmp_path / "epochs").iterdir())] == [
        "epoch-001.safetensors",
        "epoch-002.safetensors",
        "history.json",
    ]
    with safe_open(out, framework="pt") as file:
        facts = file.metadata()
    assert json.loads(facts["model_args"]) == {"widths": WIDTHS}
    assert json.loads(facts["recipe"])["seed"] == 3


def test_train_keeps_a_short_training_within_its_warm_up(tmp_path, capsys):
    args = ["--model-args", '{"depth": 8}', "--data", "digits", "--limit", "64", "--epochs", "1"]
    assert main(["train", "--model", "resnet", *args, "--out", str(tmp_path / "r.pt")]) == 0
    captured = capsys.readouterr()
    assert "test accuracy" in captured.out
    assert set(load_state_dict(tmp_path / "r.pt")) == set(resnet(8, in_channels=1).state_dict())


def test_match_by_weights_and_by_activations(tmp_path, pair, network, models, run_json, capsys):
    a, b = pair / "a.safetensors", pair / "b.safetensors"
    data = ["--data", "digits"]
    found = run_json("match", a, b, *network, *data, "--out", tmp_path / "m.safetensors", "--seed", 5)
    expected = isthmus.match(models[0], models[1], torch.zeros(1, 1, 8, 8), seed=5)
    loaded = Matching.load(tmp_path / "m.safetensors")
    assert loaded.permutation == expected.permutation
    assert not loaded.permutation.is_identity
    assert found["objective"] == expected.objective
    assert found["mean_scores"]["fc1"] == pytest.approx(float(expected.scores["fc1"].mean()))
    assert found["matched_on"] is None

    found = run_json(
        "match", a, b, *network, *data, "--method", "activations", "--limit", 300, "--save-model", tmp_path / "b.pt"
    )
    expected = isthmus.match(
        models[0], models[1], loader(load_data("digits", "train", limit=300)), method="activations"
    )
    state = load_state_dict(tmp_path / "b.pt")
    assert torch.equal(state["fc1.weight"], expected.apply(models[1]).state_dict()["fc1.weight"])
    assert not torch.equal(state["fc1.weight"], models[1].state_dict()["fc1.weight"])
    assert found["objective"] == expected.objective
    assert found["matched_on"]["split"] == "train"

    assert main(["match", str(a), str(b), *network, *data]) == 0
    assert "cosine similarity of weights" in capsys.readouterr().out


def test_match_by_other_methods_and_from_a_start(tmp_path, pair, network, models, run_json, capsys):
    a, b = pair / "a.safetensors", pair / "b.safetensors"
    data = ["--data", "digits", "--limit", "300"]
    batches = loader(load_data("digits", "train", limit=300))
    options: dict[str, Any] = {"candidates": ["weights", "activations"]}
    args = ["match", a, b, *network, *data, "--method", "auto", "--options", json.dumps(options)]
    found = run_json(*args, "--out", tmp_path / "m.safetensors")
    expected = isthmus.match(models[0], models[1], batches, method="auto", **options)
    assert Matching.load(tmp_path / "m.safetensors").permutation == expected.permutation
    assert [line["method"] for line in found["candidates"]] == ["identity", "weights", "activations"]
    assert found["method"] == expected.method
    assert main([*map(str, args)]) == 0
    assert "lowest" in capsys.readouterr().out

    begun = run_json("match", a, b, *network, *data, "--init", tmp_path / "m.safetensors", "--restarts", "1")
    assert begun["bound"] >= begun["objective"]
    start = isthmus.match(models[0], models[1], batches, init=expected, restarts=1)
    assert begun["objective"] == start.objective
    start.permutation.save(tmp_path / "p.safetensors")
    again = run_json("match", a, b, *network, *data, "--init", tmp_path / "p.safetensors", "--restarts", "1")
    assert again["objective"] == start.objective


def test_the_command_line_knows_every_method_and_what_it_needs():
    assert {name: method.needs for name, method in METHODS.items()} == NEEDS
    assert {*METHODS, "identity"} - {"auto"} == set(HOW)


def test_the_command_line_knows_every_method_of_merging_and_what_it_needs():
    assert {name: method.needs for name, method in MERGES.items()} == MERGING
    assert tuple(name for name, method in MERGES.items() if method.base) == BASED
    assert tuple(name for name, method in MERGES.items() if not method.aligned) == UNALIGNED
    assert {name: need for name, need in ALIGN.items() if name != "universe"} == NEEDS
    assert tuple(HOW_TO_REPAIR) == REPAIRS


def test_match_takes_a_saved_symmetry_in_place_of_data(tmp_path, pair, run_json):
    args = ["--model", "mlp", "--model-args", json.dumps({"in_features": 64, "widths": WIDTHS})]
    a, b = pair / "a.safetensors", pair / "b.safetensors"
    by_shape = run_json("match", a, b, *args, "--input-shape", "2,1,8,8")
    run_json("symmetry", *args, "--input-shape", "2,64", "--save", tmp_path / "s.json")
    by_file = run_json("match", a, b, *args, "--symmetry", tmp_path / "s.json")
    assert by_shape["objective"] == by_file["objective"] > 0


def test_connect_tells_the_path_and_on_which_data(tmp_path, pair, network, models, test_set, run_json, capsys):
    a, b = pair / "a.safetensors", pair / "b.safetensors"
    found = run_json("connect", a, b, *network, "--data", "digits", "--points", 5)
    naive = isthmus.connect(models[0], models[1], test_set, points=5)
    assert found["loss"] == naive.loss.tolist()
    assert found["barrier"] == naive.barrier > 0.1
    assert found["samples"] == 359
    assert found["measured_on"]["split"] == "test"

    run_json("match", a, b, *network, "--data", "digits", "--out", tmp_path / "m.safetensors")
    options = ["--matching", tmp_path / "m.safetensors", "--points", 5, "--repair", "auto"]
    found = run_json("connect", a, b, *network, "--data", "digits", *options)
    ordered = Matching.load(tmp_path / "m.safetensors").apply(models[1])
    train_set = loader(load_data("digits", "train"))
    repaired = isthmus.connect(models[0], ordered, test_set, points=5, repair="auto", repair_data=train_set)
    assert np.allclose(found["loss"], repaired.loss)
    assert found["repair"] == "rescale"
    assert found["repaired_on"]["split"] == "train"
    assert found["barrier"] < naive.barrier / 2

    plot = tmp_path / "path.svg"
    args = ["connect", a, b, *network, "--data", "digits", "--plot", plot, *options]
    assert main(list(map(str, args))) == 0
    said = capsys.readouterr().out
    assert "measured on digits, test split: 359 samples" in said
    assert "digits, train split: these networks have seen it" in said
    assert "accuracy barrier" in said
    assert "matched and repaired" in plot.read_text()


def test_merge_measures_beside_both_parents(tmp_path, pair, network, models, test_set, run_json, capsys):
    a, b = pair / "a.safetensors", pair / "b.safetensors"
    out = tmp_path / "m.safetensors"
    found = run_json("merge", a, b, *network, "--data", "digits", "--out", out, "--weights", "0.75,0.25")
    expected = isthmus.merge(list(models), test_set, weights=[0.75, 0.25])
    state = load_state_dict(out)
    assert torch.equal(state["fc2.weight"], expected.model.state_dict()["fc2.weight"])
    assert found["merged"] == expected.report["merged"]
    assert found["parents"] == expected.report["parents"]
    assert found["ensemble"] == expected.report["ensemble"]
    assert found["weights"] == [0.75, 0.25]

    explicit = ["--model", "mlp", "--model-args", json.dumps({"in_features": 64, "widths": WIDTHS})]
    found = run_json("merge", a, b, a, *explicit, "--align", "none", "--out", out)
    mean = (2 * models[0].fc1.weight + models[1].fc1.weight) / 3
    assert torch.allclose(load_state_dict(out)["fc1.weight"], mean, atol=1e-6)
    assert "merged" not in found

    repair = ["--align", "activations", "--repair", "rescale"]
    assert main(list(map(str, ["merge", a, b, *network, "--data", "digits", "--out", out, *repair]))) == 0
    said = capsys.readouterr().out
    assert "repaired on digits, train split: the merged network has seen it" in said
    assert "b.safetensors" in said


def test_merge_says_why_nothing_was_measured(tmp_path, pair, capsys):
    a, b = str(pair / "a.safetensors"), str(pair / "b.safetensors")
    args = ["--model", "mlp", "--model-args", json.dumps({"in_features": 64, "widths": WIDTHS})]
    assert main(["merge", a, b, *args, "--align", "none", "--out", str(tmp_path / "m.pt")]) == 0
    assert "no --data was given" in capsys.readouterr().out


def test_merge_report_holds_the_study(tmp_path, pair, network, test_set, run_json, capsys):
    a, b, out = pair / "a.safetensors", pair / "b.safetensors", tmp_path / "m.safetensors"
    args = [a, b, *network, "--data", "digits", "--out", out, "--report", tmp_path / "deep" / "report"]
    found = run_json("merge", *args, "--repair", "auto")
    assert found["merged"]["loss"] == pytest.approx(evaluate(_model(out), test_set).loss)
    content = json.loads((tmp_path / "deep" / "report" / "report.json").read_text())
    assert content["verdict"] == found["study"]["verdict"]
    assert [file["name"] for file in content["files"]] == ["a.safetensors", "b.safetensors"]
    assert main(list(map(str, ["merge", *args]))) == 0
    said = capsys.readouterr().out
    assert "naive average" in said
    assert "report.html" in said


def test_compare_tells_the_map_and_its_convention(tmp_path, pair, network, models, test_set, run_json, capsys):
    a, b = pair / "a.safetensors", pair / "b.safetensors"
    args = [a, b, *network, "--data", "digits"]
    found = run_json("compare", *args, "--layers", "fc1, fc2")
    expected = isthmus.compare(models[0], models[1], test_set, layers=["fc1", "fc2"])
    assert np.array_equal(found["values"], expected.values)
    assert found["convention"]["samples"] == 359
    plot = tmp_path / "map.png"
    assert main(list(map(str, ["compare", *args, "--plot", plot, "--positions", "mean"]))) == 0
    said = capsys.readouterr().out
    assert "359 samples, positions=mean" in said
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_compare_by_any_index_with_significance(pair, network, models, test_set, run_json, refused, capsys):
    args = [pair / "a.safetensors", pair / "b.safetensors", *network, "--data", "digits"]
    chosen = ["--index", "svcca", "--index-args", '{"threshold": 0.9}', "--significance", "permutation", "--seed", 3]
    found = run_json("compare", *args, *chosen)
    expected = isthmus.compare(
        models[0], models[1], test_set, index="svcca", threshold=0.9, significance="permutation", seed=3
    ).to_dict()
    assert found["values"] == expected["values"]
    assert found["p_values"] == expected["p_values"]
    assert main(list(map(str, ["compare", *args, "--significance", "both", "--layers", "fc1,fc2"]))) == 0
    said = capsys.readouterr().out
    assert "95 % interval" in said
    assert "  0.005  " in said
    assert "did you mean svcca" in refused("compare", *args, "--index", "svca")
    assert "no parameter 'treshold'" in refused("compare", *args, "--index", "svcca", "--index-args", '{"treshold": 1}')
    assert "does not take" in refused("compare", *args, "--index", "svcca", "--index-args", '{"threshold": "high"}')
    assert "does not take" in refused(
        "compare", *args, "--index", "minibatch_cka", "--index-args", '{"bandwidth": "x"}'
    )


def test_own_network_and_own_data(factories, run_json, refused, capsys):
    # found in the current folder, which the import below then finds as well
    assert "has no function 'netwrk'; did you mean network" in refused("symmetry", "--model", "mine_for_cli:netwrk")
    from mine_for_cli import batches, network, unlabelled  # pyright: ignore[reportMissingImports]

    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        torch.save(network(width=7).state_dict(), f"{name}.pt")
    own = ["--model", "mine_for_cli:network", "--model-args", '{"width": 7}']
    data = ["--data", "mine_for_cli:batches", "--data-args", '{"count": 3}']
    found = run_json("connect", "a.pt", "b.pt", *own, *data, "--points", 3)
    a, b = network(width=7), network(width=7)
    a.load_state_dict(torch.load("a.pt"))
    b.load_state_dict(torch.load("b.pt"))
    assert found["loss"] == isthmus.connect(a, b, list(batches(3)), points=3).loss.tolist()
    assert found["samples"] == 18
    assert found["measured_on"] == {"data": "mine_for_cli:batches", "split": "test", "source": None}
    found = run_json("connect", "a.pt", "b.pt", *own, *data, "--points", 3, "--split", "train")
    assert found["loss"] == isthmus.connect(a, b, list(batches(3, "train")), points=3).loss.tolist()

    assert unlabelled()[0].shape == (3, 5)
    merge = ["merge", "a.pt", "b.pt", *own, "--out", "m.pt", "--data", "mine_for_cli:unlabelled"]
    assert main(merge) == 0
    assert "has no labels" in capsys.readouterr().out
    message = refused("connect", "a.pt", "b.pt", *own, "--data", "mine_for_cli:unlabelled")
    assert "no labels" in message
    message = refused("connect", "a.pt", "b.pt", *own, "--data", "mine_for_cli:unlabelled", "--split", "test")
    assert "no parameter 'split'" in message
    assert "--data-args" in refused("connect", "a.pt", "b.pt", *own, *data, "--limit", 3)
    assert "no module 'nowhere'" in refused("symmetry", "--model", "nowhere:net")
    assert "expected package.module:factory" in refused("symmetry", "--model", ":net")
    assert "expected a torch.nn.Module" in refused("symmetry", "--model", "mine_for_cli:number")
    assert "unexpected keyword" in refused("symmetry", *own[:3], '{"wdth": 7}')
    assert "needs a data set of the zoo" in refused("train", *own, *data, "--out", "c.pt")


def test_a_failing_import_inside_the_users_module_is_a_failure(factories, capsys):
    (factories / "broken_for_cli.py").write_text("import a_module_that_is_not_there\n")
    assert main(["symmetry", "--model", "broken_for_cli:net", "--input-shape", "1,2"]) == 1
    assert "a_module_that_is_not_there" in capsys.readouterr().err


def test_demo_agrees_with_the_same_steps_in_python(tmp_path, run_json, test_set, capsys):
    threads = torch.get_num_threads()
    found = run_json("demo", "--out", tmp_path / "demo", "--epochs", 3)
    assert torch.get_num_threads() == threads
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    checkpoints = {"a.safetensors", "b.safetensors", "matching.safetensors", "merged.safetensors"}
    assert names == checkpoints | {"report.html", "report.json", "path.png"}

    def load(name):
        model = mlp(64, found["widths"], seed=0)
        model.load_state_dict(load_state_dict(tmp_path / "demo" / f"{name}.safetensors"))
        return model

    a, b, merged = map(load, ("a", "b", "merged"))
    assert found["paths"]["as trained"]["barrier"] == pytest.approx(isthmus.connect(a, b, test_set).barrier, rel=1e-5)
    matching = isthmus.match(a, b, test_set)
    assert Matching.load(tmp_path / "demo" / "matching.safetensors").permutation == matching.permutation
    path = isthmus.connect(a, matching.apply(b), test_set)
    assert found["paths"]["matched"]["loss"] == pytest.approx(path.loss.tolist(), rel=1e-5)
    assert found["networks"]["merged"]["loss"] == pytest.approx(evaluate(merged, test_set).loss, rel=1e-5)
    assert found["networks"]["B"]["metric"] == pytest.approx(evaluate(b, test_set).metric)
    assert np.allclose(found["similarity"]["values"], isthmus.compare(a, b, test_set).values, atol=1e-5)
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["paths"] == found["paths"]

    assert main(["demo", "--out", str(tmp_path / "demo"), "--epochs", "1"]) == 0
    assert "report: " in capsys.readouterr().out


def test_checkpoints_without_counters_of_batch_norm_load(tmp_path, run_json):
    model = resnet(8, in_channels=1, seed=0)
    old = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_state_dict(old, tmp_path / "old.pt")
    args = ("--model", "resnet", "--model-args", '{"depth": 8, "in_channels": 1}', "--input-shape", "2,1,8,8")
    out = tmp_path / "matching.safetensors"
    run_json("match", tmp_path / "old.pt", tmp_path / "old.pt", *args, "--out", out)
    aligned = Matching.load(out).apply(old)
    assert aligned.keys() == old.keys()
    assert all(torch.equal(aligned[name], value) for name, value in old.items())


def test_a_training_that_diverges_is_a_failure_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "a.safetensors"
    assert (
        main(["train", "--model", "mlp", "--data", "digits", "--lr", "1e30", "--epochs", "2", "--out", str(out)]) == 1
    )
    assert "diverged" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""Recipes that are followed: what they write, that they repeat it, and what they leave alone when they fail."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
import torch

import isthmus
from isthmus import recipe
from isthmus.base.errors import ArchitectureError, NotFiniteError, OutputError, SymmetryError
from isthmus.base.files import load_state_dict, save_state_dict
from isthmus.recipe_faults import RecipeFileError
from isthmus.zoo import load_data, loader, mlp

WIDTHS = [24, 16]


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def network(path: Path):
    model = mlp(64, WIDTHS, seed=9)
    model.load_state_dict(load_state_dict(path))
    return model.eval()


@pytest.fixture
def folder(tmp_path, pair):
    """A folder with two trained networks, and one for results."""
    for name in "ab":
        shutil.copy(pair / f"{name}.safetensors", tmp_path)
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.fixture
def follow(folder):
    def run(text: str, name: str = "r.toml"):
        (folder / name).write_text(text)
        return recipe.run(folder / name, progress=False)

    return run


PAIR = """
output = "out/m.safetensors"
inputs = [{ path = "a.safetensors" }, { path = "b.safetensors" }]
"""
MLP = '[model]\nname = "mlp"\nargs = { widths = [24, 16] }\n[data]\nname = "digits"\n'
EXPLICIT = '[model]\nname = "mlp"\nargs = { in_features = 64, widths = [24, 16] }\n'
NONE = '[align]\nmethod = "none"\n'


def test_a_recipe_gives_what_merging_in_python_gives(folder, follow):
    found = follow(PAIR + "seed = 5\n" + MLP + '[repair]\nmethod = "auto"\n')
    models = [network(folder / f"{name}.safetensors") for name in "ab"]
    train_set, test_set = loader(load_data("digits", "train")), loader(load_data("digits", "test"))
    expected = isthmus.merge(models, test_set, repair="auto", repair_data=train_set, seed=5)
    state = load_state_dict(folder / "out" / "m.safetensors")
    assert state.keys() == expected.model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in expected.model.state_dict().items())
    assert all(torch.equal(found.state[name], value) for name, value in state.items())
    for name in ("parents", "ensemble", "merged", "samples", "weights"):
        assert found.report[name] == expected.report[name]
    assert found.report["align"] == "weights"
    assert found.report["measured_on"]["split"] == "test"
    assert found.report["repaired_on"]["split"] == "train"
    assert found.model is not None
    assert found.sha256 == digest(found.output)


def test_the_complete_recipe_repeats_the_merge_bit_for_bit(folder, follow):
    found = follow(PAIR + MLP + '[repair]\nmethod = "auto"\n')
    before, record = found.output.read_bytes(), found.record.read_text()
    assert found.record.name == "m.safetensors.recipe.toml"
    for line in (
        f'"../a.safetensors" = "{digest(folder / "a.safetensors")}"',
        f'"m.safetensors" = "{digest(found.output)}"',
        f'torch = "{torch.__version__}"',
        'method = "rescale"',  # what "auto" came to
        "restarts = 2",
        "weight = 1.0",
    ):
        assert line in record
    found.output.unlink()
    again = recipe.run(found.record, progress=False)
    assert again.output.resolve() == found.output
    assert found.output.read_bytes() == before
    assert found.record.read_text() == record


def test_another_input_is_refused_by_name(folder, follow):
    found = follow(PAIR + NONE)
    before = found.output.read_bytes()
    known = digest(folder / "b.safetensors")
    save_state_dict(mlp(64, WIDTHS, seed=7).state_dict(), folder / "b.safetensors")
    with pytest.raises(RecipeFileError) as error:
        recipe.run(found.record)
    said = str(error.value)
    assert "inputs[1].path: " in said
    assert "b.safetensors is not the file that this recipe was written for" in said
    assert known in said
    assert digest(folder / "b.safetensors") in said
    lines = found.record.read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if 'path = "../b.safetensors"' in text)
    assert f"{found.record}:{line}: " in said
    assert "a.safetensors" not in said
    assert found.output.read_bytes() == before


def test_another_result_is_said_with_the_versions(follow):
    found = follow(PAIR + NONE)
    text = found.record.read_text()
    old = text.replace(f'torch = "{torch.__version__}"', 'torch = "1.0"').replace(found.sha256, "0" * 64)
    found.record.write_text(old)
    with pytest.warns(UserWarning, match=r"m.safetensors is not what it was .* torch 1.0, now "):
        recipe.run(found.record)
    assert found.record.read_text() == text
    found.record.write_text(text.replace(found.sha256, "0" * 64))
    with pytest.warns(UserWarning, match="by the same versions; on another machine"):
        recipe.run(found.record)


def test_state_dicts_of_any_class(folder, follow):
    a, b, base = ({"w": torch.randn(3, 2), "n": torch.tensor(7)} for _ in range(3))
    for name, state in (("x.pt", a), ("y.safetensors", b), ("z.safetensors", base)):
        save_state_dict(state, folder / name)
    inputs = 'inputs = [{ path = "x.pt", weight = 3 }, { path = "y.safetensors", weight = 1 }]\n'
    found = follow('output = "m.safetensors"\n' + inputs + NONE)
    state = load_state_dict(folder / "m.safetensors")
    assert torch.allclose(state["w"], 0.75 * a["w"] + 0.25 * b["w"])
    assert state["n"] == 7
    assert found.model is None
    assert "merged" not in found.report
    # a common parent: no alignment, a method of task vectors, its options
    text = (
        'output = "m.safetensors"\nbase = "z.safetensors"\ninputs = [{ path = "x.pt" }, { path = "y.safetensors" }]\n'
    )
    found = follow(text + '[merge]\nmethod = "task_arithmetic"\noptions = { scale = 0.5 }\n')
    expected = base["w"] + 0.5 * (a["w"] - base["w"]) + 0.5 * (b["w"] - base["w"])
    assert torch.allclose(load_state_dict(folder / "m.safetensors")["w"], expected, atol=1e-6)
    before = found.output.read_bytes()
    assert recipe.run(found.record).output.read_bytes() == before
    # each its own
    own = 'inputs = [{ path = "x.pt", base = "z.safetensors" }, { path = "y.safetensors", base = "z.safetensors" }]\n'
    follow('output = "m.safetensors"\n' + own + '[merge]\nmethod = "task_arithmetic"\noptions = { scale = 0.5 }\n')
    assert (folder / "m.safetensors").read_bytes() == before


def test_values_of_options_are_refused_before_a_weight_is_read(folder, follow):
    text = PAIR + 'base = "a.safetensors"\n[merge]\nmethod = "ties"\noptions = { density = 3 }\n'
    with pytest.raises(RecipeFileError, match=r"r.toml:7: merge.options: density"):
        follow(text)


def test_state_dicts_that_do_not_fit_are_refused_by_name(folder, follow):
    save_state_dict({"w": torch.zeros(3)}, folder / "x.safetensors")
    save_state_dict({"w": torch.zeros(4)}, folder / "y.safetensors")
    text = 'output = "m.safetensors"\ninputs = [{ path = "x.safetensors" }, { path = "y.safetensors" }]\n' + NONE
    with pytest.raises(RecipeFileError, match=r"r.toml:2: inputs\[1\].path: .*w: \(3,\) in .*, \(4,\) in"):
        follow(text)
    unread = text.replace("y.safetensors", "y.pt")
    save_state_dict({"w": torch.zeros(4)}, folder / "y.pt")
    with pytest.raises(ArchitectureError, match=r"w: \(3,\) in .*, \(4,\) in"):
        follow(unread)
    save_state_dict({"v": torch.zeros(3)}, folder / "y.safetensors")
    with pytest.raises(RecipeFileError, match="has v"):
        follow(text)
    save_state_dict({"w": torch.tensor([1, 2, float("nan")])}, folder / "y.safetensors")
    with pytest.raises(NotFiniteError, match=r"y.safetensors: w of shape \(3,\) holds 1"):
        follow(text)
    (folder / "y.safetensors").write_bytes(b"short")
    with pytest.raises(RecipeFileError, match=r"inputs\[1\].path: .* is not a whole safetensors file"):
        follow(text)
    assert not (folder / "m.safetensors").exists()
    assert not (folder / "m.safetensors.recipe.toml").exists()


def test_alignment_from_files(folder, follow, monkeypatch):
    models = [network(folder / f"{name}.safetensors") for name in "ab"]
    example = torch.zeros(2, 64)
    symmetry = isthmus.symmetry(models[0], example)
    symmetry.save(folder / "s.json")
    matching = isthmus.match(models[0], models[1], symmetry=symmetry)
    matching.save(folder / "match.safetensors")
    expected = isthmus.merge(models, align=[matching]).model.state_dict()

    def same(found) -> bool:
        return all(torch.equal(found.state[name], value) for name, value in expected.items())

    assert same(follow(PAIR + 'align.matchings = ["match.safetensors"]\n'))
    assert same(follow(PAIR + 'align.matchings = ["match.safetensors"]\n' + MLP))
    assert same(follow(PAIR + 'align.symmetry = "s.json"\n'))  # by weights, from the files alone
    found = follow(PAIR + 'align.symmetry = "s.json"\n' + EXPLICIT)
    assert same(found)
    assert '"../s.json" = "' in found.record.read_text()
    # parents of their own go with their children
    for name in "ab":
        save_state_dict(mlp(64, WIDTHS, seed=3).state_dict(), folder / f"{name}0.safetensors")
    own = PAIR.replace('b.safetensors"', 'b.safetensors", base = "b0.safetensors"').replace(
        'a.safetensors"', 'a.safetensors", base = "a0.safetensors"'
    )
    tasks = 'align.matchings = ["match.safetensors"]\nmerge = { method = "task_arithmetic", options = { scale = 1 } }\n'
    plain, run = follow(own + tasks), follow(own + tasks + MLP)
    assert all(torch.allclose(plain.state[name], value, atol=1e-6) for name, value in run.state.items())

    isthmus.symmetry(models[0], example, verify=False).save(folder / "s.json")
    with pytest.raises(SymmetryError, match="never verified"):
        follow(PAIR + 'align.symmetry = "s.json"\n')
    assert same(follow(PAIR + 'align = { symmetry = "s.json", verify = false }\n'))


def test_methods_that_read_data_read_the_train_split_or_another(folder, follow):
    save_state_dict(mlp(64, WIDTHS, seed=1).state_dict(), folder / "c.safetensors")
    three = PAIR.replace("]", ', { path = "c.safetensors" }]')
    found = follow(three + MLP + '[align]\nmethod = "universe"\n[merge]\nmethod = "greedy_soup"\n')
    models = [network(folder / f"{name}.safetensors") for name in "abc"]
    train_set, test_set = (loader(load_data("digits", split)) for split in ("train", "test"))
    for splits in (("train", train_set), ("test", test_set)):
        text = f'[align]\nmethod = "universe"\n[merge]\nmethod = "greedy_soup"\nsplit = "{splits[0]}"\n'
        found = follow(three + MLP + text)
        expected = isthmus.merge(models, test_set, method="greedy_soup", align="universe", fit_data=splits[1])
        assert all(torch.equal(found.state[name], value) for name, value in expected.model.state_dict().items())
        assert found.report["merged"] == expected.report["merged"]


def test_an_example_of_the_inputs_by_its_shape(folder, follow):
    model = '[model]\nname = "mlp"\nargs = { in_features = 64, widths = [24, 16] }\n[align]\ninput_shape = [2, 64]\n'
    found = follow(PAIR + model + "restarts = 1\n")
    models = [network(folder / f"{name}.safetensors") for name in "ab"]
    matching = isthmus.match(models[0], models[1], torch.zeros(2, 64), restarts=1)
    expected = isthmus.merge(models, align=[matching]).model.state_dict()
    assert all(torch.equal(found.state[name], value) for name, value in expected.items())
    assert found.report["measured_on"] is None
    assert "input_shape = [2, 64]" in found.record.read_text()


def test_faults_that_only_the_networks_show_come_before_anything_is_written(folder, follow, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(RecipeFileError, match=r"r.toml: --model nowhere:net: there is no module 'nowhere'"):
        follow(PAIR + NONE + '[model]\nname = "nowhere:net"\n')
    with pytest.raises(ArchitectureError, match=r"fc2\.weight"):
        follow(PAIR + NONE + '[model]\nname = "mlp"\nargs = { in_features = 64, widths = [24, 17] }\n')
    with pytest.raises(RecipeFileError, match=r"r.toml:\d+: merge.options: .*fc7"):
        follow(PAIR + MLP + NONE + '[merge]\noptions = { by_layer = { "fc7.*" = [1, 0] } }\n')
    assert not list((folder / "out").iterdir())


def test_recipes_can_be_made_in_python(folder):
    inputs = tuple(recipe.Input(folder / f"{name}.safetensors") for name in "ab")
    made = recipe.Recipe(inputs, folder / "m.safetensors", align=recipe.Alignment(None))
    found = recipe.run(made)
    mean = torch.stack([load_state_dict(source.path)["fc1.weight"] for source in inputs]).mean(0)
    assert torch.allclose(found.state["fc1.weight"], mean, atol=1e-7)
    assert [source.path for source in recipe.load(found.record).inputs] == [source.path for source in inputs]
    with pytest.raises(RecipeFileError, match=r"^merge.method: there is no 'men'; did you mean mean"):
        recipe.run(recipe.Recipe(inputs, folder / "m.safetensors", "men", align=recipe.Alignment(None)))


def test_a_full_disk_leaves_the_old_output(folder, follow, monkeypatch):
    found = follow(PAIR + NONE)
    before = {path: path.read_bytes() for path in found.output.parent.iterdir()}
    from safetensors import torch as safetensors

    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors, "save_file", full)
    with pytest.raises(OutputError, match="No space left"):
        follow(PAIR + NONE + "[merge]\noptions = { by_layer = { fc1 = [1, 0] } }\n")
    assert {path: path.read_bytes() for path in found.output.parent.iterdir()} == before


def test_ctrl_c_in_the_middle_leaves_the_old_output(folder, follow):
    found = follow(PAIR + NONE)
    before = {path: path.read_bytes() for path in found.output.parent.iterdir()}
    (folder / "slow_for_recipes.py").write_text(
        """
import time
from pathlib import Path
import torch

def batches():
    Path("begun").touch()
    yield torch.randn(4, 64), torch.zeros(4, dtype=torch.int64)
    time.sleep(100)
"""
    )
    text = EXPLICIT + '[data]\nname = "slow_for_recipes:batches"\n'
    (folder / "slow.toml").write_text(PAIR + text)
    with subprocess.Popen(
        [sys.executable, "-m", "isthmus", "merge", "--recipe", "slow.toml"],
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            patience = time.monotonic() + 120
            while not (folder / "begun").exists() and time.monotonic() < patience and process.poll() is None:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted"
    assert {path: path.read_bytes() for path in found.output.parent.iterdir()} == before


def test_tied_tensors_that_a_file_holds_once(tmp_path, monkeypatch):
    (tmp_path / "tied_for_recipes.py").write_text(
        """
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))
"""
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    states = [{"embed.weight": torch.randn(5, 3)} for _ in range(2)]
    for state, name in zip(states, "ab", strict=True):
        save_state_dict(state, tmp_path / f"{name}.safetensors")
    text = PAIR.replace("out/", "") + NONE + '[model]\nname = "tied_for_recipes:Tied"\n'
    (tmp_path / "r.toml").write_text(text)
    found = recipe.run(tmp_path / "r.toml")
    mean = (states[0]["embed.weight"] + states[1]["embed.weight"]) / 2
    assert torch.allclose(found.state["embed.weight"], mean, atol=1e-7)
    assert torch.equal(found.state["head.weight"], found.state["embed.weight"])
    sys.modules.pop("tied_for_recipes", None)


def test_the_command_follows_a_recipe(folder, run_json, refused, capsys):
    (folder / "r.toml").write_text(PAIR + MLP)
    found = run_json("merge", "--recipe", folder / "r.toml")
    assert found["out"] == str(folder / "out/m.safetensors")
    assert found["sha256"] == digest(folder / "out/m.safetensors")
    assert found["ensemble"]["loss"] > 0
    assert json.dumps(found["recipe"]).endswith('.recipe.toml"')
    from isthmus.cli import main

    assert main(["merge", "--recipe", str(folder / "r.toml")]) == 0
    said = capsys.readouterr().out
    assert "ensemble" in said
    assert "measured on digits, test split" in said
    file = folder / "r.toml"
    message = refused("merge", "--recipe", file, "--seed", 0, "--out", "x.pt")
    assert "leave out --out, --seed" in message
    (folder / "r.toml").write_text(PAIR + MLP + "[algn]\n")
    assert "r.toml:9: algn: there is no such key; did you mean align?" in refused("merge", "--recipe", file)

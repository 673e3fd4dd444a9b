"""`isthmus merge` by every method: what it gives, what it writes, what it refuses."""

import json

import pytest
import torch

import isthmus
from isthmus import recipe
from isthmus.base.files import load_state_dict, save_state_dict
from isthmus.cli import main
from isthmus.merge.merging import merge_states
from isthmus.zoo import load_data, loader, mlp

WIDTHS = [24, 16]


@pytest.fixture
def files(pair, tmp_path):
    base = tmp_path / "base.safetensors"
    save_state_dict(mlp(64, WIDTHS, seed=3).state_dict(), base)
    return pair / "a.safetensors", pair / "b.safetensors", base


@pytest.fixture
def out(tmp_path):
    return tmp_path / "m.safetensors"


def same(path, state) -> bool:
    return all(torch.equal(value, state[name]) for name, value in load_state_dict(path).items())


def test_state_dicts_without_an_architecture(files, out, run_json, capsys):
    a, b, base = files
    states = [load_state_dict(path) for path in files]
    run_json("merge", a, b, "--align", "none", "--out", out, "--by-layer", '{"fc1.*": [1, 0]}')
    assert same(out, merge_states(states[:2], by_layer={"fc1.*": [1, 0]}))
    ties = ["--method", "ties", "--option", "density=0.5", "--option", "scale=0.8", "--base", base]
    found = run_json("merge", a, b, *ties, "--out", out)
    assert same(out, merge_states(states[:2], "ties", base=states[2], density=0.5, scale=0.8))
    assert found["align"] is None
    run_json("merge", a, "--method", "task_arithmetic", "--base", base, "--option", "scale=-1", "--out", out)
    assert same(out, merge_states(states[:1], "task_arithmetic", base=states[2], scale=-1))
    own = ["--base", base, "--base", a]
    run_json("merge", a, b, "--method", "dare", *own, "--option", "combine=ties", "--seed", 4, "--out", out)
    expected = merge_states(states[:2], "dare", base=[states[2], states[0]], combine="ties", seed=4)
    assert same(out, expected)
    assert main(list(map(str, ["merge", a, b, "--method", "slerp", "--align", "none", "--out", out]))) == 0
    assert "no --data was given" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "options"),
    [("regmean", {"shrink": 0.5}), ("least_squares", {}), ("greedy_soup", {}), ("fisher", {"draws": 1}), ("zip", {})],
)
def test_methods_that_read_the_train_split(method, options, files, out, network, run_json):
    a, b, _ = files
    args = [f"--option={name}={json.dumps(value)}" for name, value in options.items()]
    found = run_json(
        "merge", a, b, *network, "--data", "digits", "--limit", 100, "--method", method, *args, "--out", out
    )
    models = []
    for path in (a, b):
        models.append(mlp(64, WIDTHS, seed=0))
        models[-1].load_state_dict(load_state_dict(path))
    train_set, test_set = (loader(load_data("digits", split, limit=100)) for split in ("train", "test"))
    expected = isthmus.merge([model.eval() for model in models], test_set, method=method, fit_data=train_set, **options)
    assert same(out, expected.model.state_dict())
    assert found["merged"] == expected.report["merged"]
    assert found["ensemble"] == expected.report["ensemble"]


def test_what_was_done_is_written_as_a_recipe(files, out, tmp_path, network, run_json):
    a, b, _ = files
    (tmp_path / "sub").mkdir()
    file = tmp_path / "sub" / "r.toml"
    args = [*network, "--data", "digits", "--repair", "auto", "--weights", "3,1", "--seed", 2, "--write-recipe", file]
    run_json("merge", a, b, *args, "--out", out)
    before = out.read_bytes()
    done = recipe.run(file, progress=False)
    assert done.output.resolve() == out
    assert out.read_bytes() == before
    assert recipe.load(file).weights == [3, 1]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "--align weights is for networks that can be run; pass --model, or --align none"),
        (["--align", "none", "--data", "digits"], "--data is for networks that can be run; pass --model"),
        (["--align", "none", "--method", "ties"], "--method ties works on what was added to a common parent"),
        (["--align", "none", "--method", "regmean"], "--method regmean needs data; pass --data"),
        (["--align", "none", "--option", "scale"], "expected name=value"),
        (["--align", "none", "--option", "scale=1"], "--option scale: mean has no such option; known: by_layer"),
        (["--base", "{base}", "--method", "ties", "--option", 'density="x"'], "--option density: is 'x'"),
        (["--base", "{base}", "--method", "ties", "--option", "density=7"], "density is 7"),
        (["--base", "{base}", "--base", "{base}", "--base", "{base}"], "3 of them; pass one for all"),
        (["--align", "none", "--base", "none.pt"], "--base: no checkpoint at"),
        (["--align", "none", "--by-layer", '{"fc9": [1, 0]}'], "fc9"),
        (["--align", "none", "--write-recipe", "{here}/r.txt"], "must end in .toml"),
        (["--align", "none", "--device", "abacus"], "--device: is 'abacus'"),
        (["--recipe", "r.toml"], "--recipe holds the whole merge; leave out checkpoints, --out"),
    ],
)  # fmt: skip
def test_wrong_use(args, said, files, out, refused, tmp_path):
    a, b, base = files
    args = [arg.format(base=base, here=tmp_path) if "{" in arg and "[" not in arg else arg for arg in args]
    message = refused("merge", a, b, "--out", out, *args)
    assert said in message
    assert not out.exists()


def test_an_output_must_be_named_and_method_must_exist(files, refused, tmp_path):
    a, b, _ = files
    assert "Missing option '--out'" in refused("merge", a, b, "--align", "none")
    assert "'men' is not one of" in refused("merge", a, b, "--method", "men", "--out", tmp_path / "m.pt")
    assert "no recipe at" in refused("merge", "--recipe", tmp_path / "none.toml")

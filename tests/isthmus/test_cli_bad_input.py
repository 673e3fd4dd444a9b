"""Bad input is refused before any work: exit code 2, the thing named, nothing written."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from isthmus.base.files import load_state_dict
from isthmus.zoo import mlp


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def _truncated(folder: Path, good: Path) -> str:
    (folder / "bad.safetensors").write_bytes(good.read_bytes()[:5000])
    return "not a whole safetensors file"


def _truncated_pt(folder: Path, good: Path) -> str:
    torch.save(load_state_dict(good), folder / "bad.pt")
    (folder / "bad.pt").write_bytes((folder / "bad.pt").read_bytes()[:5000])
    return "not a whole PyTorch checkpoint"


def _pickle(folder: Path, good: Path) -> str:
    (folder / "bad.pt").write_bytes(pickle.dumps(Bomb(folder / "exploded"), protocol=2))
    return "was refused"


def _other_widths(folder: Path, good: Path) -> str:
    save_file(mlp(64, [24, 17], seed=0).state_dict(), folder / "bad.safetensors")
    return "fc2.weight: (16, 24) in the network mlp, (17, 24) in"


def _fewer_layers(folder: Path, good: Path) -> str:
    save_file(mlp(64, [24], seed=0).state_dict(), folder / "bad.safetensors")
    return "only the network mlp has fc3.weight, fc3.bias"


def _nan(folder: Path, good: Path) -> str:
    state = load_state_dict(good)
    state["fc2.weight"][3, 4] = float("nan")
    save_file(state, folder / "bad.safetensors")
    return "fc2.weight of shape (16, 24) holds 1 entries that are NaN"


def _missing(folder: Path, good: Path) -> str:
    return "no checkpoint at"


@pytest.mark.parametrize("spoil", [_truncated, _truncated_pt, _pickle, _other_widths, _fewer_layers, _nan, _missing])
@pytest.mark.parametrize("command", ["match", "connect", "merge", "compare"])
def test_bad_checkpoints(command, spoil, pair, network, refused, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    said = spoil(folder, pair / "a.safetensors")
    bad = next(folder.iterdir(), folder / "bad.safetensors")
    out = {
        "match": ["--out", tmp_path / "o.safetensors"],
        "connect": ["--plot", tmp_path / "o.svg"],
        "merge": ["--out", tmp_path / "o.pt", "--report", tmp_path / "report"],
        "compare": ["--plot", tmp_path / "o.png"],
    }[command]
    message = refused(command, pair / "a.safetensors", bad, *network, "--data", "digits", *out)
    assert said in message
    assert bad.name in message
    assert list(tmp_path.iterdir()) == [folder]
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize(
    ("command", "args", "said"),
    [
        ("match", ["--out", "{file}/x.safetensors"], "{file}"),
        ("match", ["--out", "{here}/none/x.safetensors"], "there is no folder {here}/none"),
        ("match", ["--out", "{here}/x.bin"], "must end in .safetensors"),
        ("match", ["--save-model", "{here}"], "it is a folder"),
        ("match", ["--symmetry", "{file}"], "is not a saved symmetry"),
        ("connect", ["--plot", "{here}/x.gif"], "must end in .png"),
        ("connect", ["--matching", "{file}"], "cannot be read"),
        ("merge", ["--out", "{here}/m.pt", "--report", "{file}/report"], "cannot write to {file}"),
        ("compare", ["--layers", "fc1,fc7"], "has no layer 'fc7'; did you mean fc"),
        ("compare", ["--index", "ckaa"], "unknown index 'ckaa'; did you mean cka"),
    ],
)
def test_bad_paths_and_names(command, args, said, pair, network, refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("no folder")
    places = {"file": str(file), "here": str(tmp_path)}
    files = [pair / "a.safetensors", pair / "b.safetensors"]
    message = refused(command, *files, *network, "--data", "digits", *(arg.format(**places) for arg in args))
    assert said.format(**places) in message
    assert list(tmp_path.iterdir()) == [file]


def test_a_matching_of_another_architecture(pair, network, refused, run_json, tmp_path):
    for name in "ab":
        save_file(mlp(64, [8], seed=ord(name)).state_dict(), tmp_path / f"{name}.safetensors")
    small = ["--model", "mlp", "--model-args", '{"widths": [8]}', "--data", "digits"]
    matching = tmp_path / "m.safetensors"
    run_json("match", tmp_path / "a.safetensors", tmp_path / "b.safetensors", *small, "--out", matching)
    files = [pair / "a.safetensors", pair / "b.safetensors"]
    message = refused("connect", *files, *network, "--data", "digits", "--matching", matching)
    assert "fc1.weight" in message


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model", "mlp", "--data", "digit"], "no data set 'digit'; did you mean digits"),
        (["--model", "mpl", "--data", "digits"], "no network 'mpl'; did you mean mlp"),
        (["--model", "mlp", "--data", "mnist"], "train-images-idx3-ubyte"),
        (["--model", "mlp", "--data", "digits", "--data-args", "{}"], "arguments of a factory"),
        (["--model", "mlp", "--model-args", '{"width": 3}', "--data", "digits"], "did you mean widths"),
        (["--model", "mlp", "--model-args", '{"widths": [0]}', "--data", "digits"], "widths[0] is 0"),
        (["--model", "mlp", "--model-args", '{"seed": 0}', "--data", "digits"], "given by --seed"),
        (["--model", "mlp", "--data", "digits", "--lr", "-1"], "lr is -1.0"),
    ],
)
def test_bad_training(args, said, refused, tmp_path):
    message = refused("train", *args, "--data-dir", tmp_path, "--out", tmp_path / "a.safetensors")
    assert said in message
    assert not list(tmp_path.iterdir())


def test_network_and_data_that_do_not_fit(pair, network, refused):
    wide = json.dumps({"in_features": 64, "widths": [24, 16]})
    args = ["--model", "mlp", "--model-args", wide, "--input-shape", "2,1,28,28"]
    message = refused("match", pair / "a.safetensors", pair / "b.safetensors", *args)
    assert "does not take inputs" in message
    assert "(2, 1, 28, 28)" in message
    assert "pass --data, or --input-shape" in refused("symmetry", "--model", "mlp")


def test_demo_checks_its_folder_before_training(refused, tmp_path):
    file = tmp_path / "file"
    file.write_text("no folder")
    assert f"cannot write to {file}" in refused("demo", "--out", file / "below")
    assert list(tmp_path.iterdir()) == [file]

"""The commands that permute units measure first that they may."""

import json
import sys

import pytest
import torch

from isthmus.align import Matching, Symmetry
from isthmus.base.files import save_state_dict
from isthmus.cli import main

NETWORK = ["--model", "mlp", "--model-args", json.dumps({"in_features": 64, "widths": [24, 16]})]
SHAPE = ["--input-shape", "2,64"]


def test_a_saved_symmetry_is_verified_once(tmp_path, pair, run_json, capsys, monkeypatch):
    file = tmp_path / "s.json"
    match = ["match", pair / "a.safetensors", pair / "b.safetensors", *NETWORK, "--symmetry", file]
    runs = []
    verify = Symmetry.verify
    monkeypatch.setattr(Symmetry, "verify", lambda *given, **more: (runs.append(1), verify(*given, **more))[1])

    run_json("symmetry", *NETWORK, *SHAPE, "--no-verify", "--save", file)
    assert main(list(map(str, match))) == 2
    assert "was never verified; pass --data or --input-shape" in capsys.readouterr().err
    by_trust = run_json(*match, "--no-verify")
    assert not runs
    measured = run_json(*match, *SHAPE, "--out", tmp_path / "m.safetensors")
    assert len(runs) == 1
    assert measured["objective"] == by_trust["objective"]
    assert Matching.load(tmp_path / "m.safetensors").symmetry.is_verified

    run_json("symmetry", *NETWORK, *SHAPE, "--save", file)
    assert len(runs) == 2
    run_json(*match)
    assert len(runs) == 2


def test_a_saved_symmetry_of_another_network_is_refused(tmp_path, pair, run_json, capsys):
    file = tmp_path / "s.json"
    run_json("symmetry", "--model", "mlp", "--model-args", json.dumps({"in_features": 64}), *SHAPE, "--save", file)
    line = ["match", pair / "a.safetensors", pair / "b.safetensors", *NETWORK, "--symmetry", file]
    assert main(list(map(str, line))) == 2
    assert "the symmetry and the network are not the same architecture" in capsys.readouterr().err


@pytest.fixture
def hiding(tmp_path, monkeypatch):
    """A network in the current folder that looks at its units by number, but not while it is traced."""
    (tmp_path / "hiding_for_cli.py").write_text(
        """
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

class Hiding(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 6), nn.Linear(6, 3)
    def forward(self, x):
        x = self.up(x)
        return self.down(x if isinstance(x, FakeTensor) else x * torch.arange(6))
"""
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"up.weight": (6, 64), "up.bias": (6,), "down.weight": (3, 6), "down.bias": (3,)}
        state = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        save_state_dict(state, tmp_path / f"{name}.safetensors")
    yield tmp_path
    sys.modules.pop("hiding_for_cli", None)


@pytest.mark.parametrize("command", ["match", "merge"])
def test_match_and_merge_go_no_further_with_a_wrong_symmetry(command, hiding, capsys):
    line = [command, "a.safetensors", "b.safetensors", "--model", "hiding_for_cli:Hiding", *SHAPE, "--out"]
    line.append("out.safetensors")
    assert main(line) == 2
    assert "permuting group up changes the outputs" in capsys.readouterr().err
    assert not (hiding / "out.safetensors").exists()
    assert main([*line, "--no-verify"]) == 0
    assert (hiding / "out.safetensors").exists()

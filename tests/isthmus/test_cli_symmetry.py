"""`isthmus symmetry`: what it prints, word for word; the same as JSON; the picture."""

import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

from isthmus import figures
from isthmus.align import Group, Pinned, Symmetry, symmetry
from isthmus.align.terms import Fixed, Product, Units
from isthmus.cli import main
from isthmus.listing import symmetry_lines

NETWORKS = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(5, 4), nn.ModuleList([Block(), Block()]), nn.Linear(4, 3)
    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
"""

PLAIN = """\
nothing is pinned for want of a rule
axes that keep their order by meaning: 1 of inputs, 2 of outputs (--all lists them)

group            count  size  kind  parameters [axis]
stem                 1     4  free  stem.{weight,bias}[0], blocks.{0-1}.up.weight[1], \
blocks.{0-1}.down.{weight,bias}[0], head.weight[1]
blocks.{0-1}.up      2     6  free  blocks.{0-1}.up.{weight,bias}[0], blocks.{0-1}.down.weight[1]

Plain: 3 groups, 16 units, 12,441,600 permutations; 98.1 % of the parameters have an axis to permute; verified (error E)
"""

PLAIN_ALL = """\
nothing is pinned for want of a rule
axes that keep their order by meaning: 1 of inputs, 2 of outputs:
  stem.weight[1] (5): input: the network's input keeps its order
  head.weight[0] (3): output: the network's output keeps its order
  head.bias[0] (3): output: the network's output keeps its order

group        size  kind  parameters [axis]
stem            4  free  stem.weight[0], stem.bias[0], blocks.0.up.weight[1], blocks.0.down.weight[0], \
blocks.0.down.bias[0], blocks.1.up.weight[1], blocks.1.down.weight[0], blocks.1.down.bias[0], head.weight[1]
blocks.0.up     6  free  blocks.0.up.weight[0], blocks.0.up.bias[0], blocks.0.down.weight[1]
blocks.1.up     6  free  blocks.1.up.weight[0], blocks.1.up.bias[0], blocks.1.down.weight[1]

Plain: 3 groups, 16 units, 12,441,600 permutations; 98.1 % of the parameters have an axis to permute; not verified
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    """The networks, in a module of the current folder."""
    (tmp_path / "nets_for_cli.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("nets_for_cli", None)


def printed(capsys, *args):
    assert main(["symmetry", *args]) == 0
    return re.sub(r"\(error \S+\)", "(error E)", capsys.readouterr().out)


# By hand: Plain has 24 + 2 · (30 + 28) + 15 = 155 parameters, of which the head's bias (3) has no axis to permute;
# 4! · 6!² = 12,441,600. Odd has 36 + 49 + 16 = 101, of which two (49) and the weight of three (14) have one.


def test_it_prints_what_is_pinned_then_groups_then_a_summary(factories, capsys):
    args = ["--input-shape", "3,5", "--model"]
    assert printed(capsys, *args, "nets_for_cli:Plain") == PLAIN
    assert printed(capsys, *args, "nets_for_cli:Plain", "--all", "--no-verify") == PLAIN_ALL


def test_what_has_no_rule_comes_first_by_operator_with_a_remedy():
    places = [
        ("blocks.0.up.weight", 0),
        ("blocks.0.up.bias", 0),
        ("blocks.1.up.weight", 0),
        ("blocks.1.down.weight", 1),
    ]
    pinned = [
        Pinned("stem.weight", 1, 5, "input", "input", "the network's input keeps its order"),
        *(Pinned(n, a, 6, "operator", "renorm", f"no rule for renorm in {n.rpartition('.')[0]}") for n, a in places),
        Pinned("head.weight", 1, 4, "operator", "qr", "no rule for qr in forward"),
    ]
    found = Symmetry((), tuple(pinned), {}, architecture="Odd")
    assert list(symmetry_lines(found, 0.5)) == [
        "pinned for want of a rule; the true symmetry may be larger:",
        "  renorm: 4 axes, in blocks.{0-1}.up, blocks.1.down",
        "  qr: 1 axis, in forward",
        "  remedy: write a rule for the operator (docs/extending.md), or state the group: symmetry(..., add=...)",
        "axes that keep their order by meaning: 1 of inputs (--all lists them)",
        "",
        "Odd: 0 groups, 0 units, 1 permutation; 50.0 % of the parameters have an axis to permute; not verified",
    ]
    lines = list(symmetry_lines(found, 0.5, everything=True))
    assert lines[1] == "  blocks.0.up.weight[0] (6): renorm: no rule for renorm in blocks.0.up"
    assert lines[6].startswith("  remedy")
    assert lines[8] == "  stem.weight[1] (5): input: the network's input keeps its order"


def test_json_holds_everything(factories, run_json):
    found = run_json("symmetry", "--model", "nets_for_cli:Plain", "--input-shape", "3,5", "--save", "s.json")
    saved = Symmetry.load("s.json")
    assert [
        Group(g["name"], g["size"], g["kind"], tuple((n, a) for n, a in g["axes"]), tuple(g["within"]))
        for g in found["groups"]
    ] == list(saved.groups)
    assert [Pinned(**item) for item in found["pinned"]] == list(saved.pinned)
    assert found["unruled"] == []
    assert found["parameters"] == {"total": 155, "permutable": 152, "share": 152 / 155}
    assert found["order"] == pytest.approx(math.log(math.factorial(4) * math.factorial(6) ** 2))
    assert 10 ** found["log10_permutations"] == pytest.approx(12_441_600)
    assert found["verified"]
    assert found["verification"]["error"] < 1e-8
    assert saved.is_verified
    found = run_json("symmetry", "--model", "nets_for_cli:Plain", "--input-shape", "3,5", "--no-verify")
    assert (found["verified"], found["verification"]) == (False, None)


def test_data_of_the_zoo_will_do(network, run_json, tmp_path):
    found = run_json("symmetry", *network, "--data", "digits", "--save", tmp_path / "s.json")
    assert [(group["name"], group["size"]) for group in found["groups"]] == [("fc1", 24), ("fc2", 16)]


def test_heads_constants_and_what_is_held_are_told_apart():
    """A symmetry made by hand: 3 heads of 2 units in two layers, an axis held by a constant, one by request."""
    groups, layout = [], {}
    for layer in range(2):
        qkv, proj = f"layers.{layer}.qkv.weight", f"layers.{layer}.proj.weight"
        heads, inner = f"layers.{layer}.qkv", f"layers.{layer}.qkv:2"
        axes = ((qkv, 0), (proj, 1))
        groups += [Group(heads, 3, "heads", axes), Group(inner, 2, "within", axes, (heads,))]
        term = Product((Units(heads, 3), Units(inner, 2)))
        layout |= {qkv: (term, Fixed(6)), proj: (Fixed(6), term)}
    pinned = (
        Pinned("layers.0.proj.weight", 0, 6, "operator", "constant", "a tensor in layers.0 that is no parameter"),
        Pinned("layers.1.proj.weight", 0, 6, "operator", "constant", "a tensor in layers.1 that is no parameter"),
        Pinned("layers.1.qkv.weight", 1, 6, "held", "hold", "held by request"),
        Pinned("layers.0.qkv.weight", 1, 6, "operator", "split", "split in layers.0 combines axes that do not fit"),
    )
    lines = list(symmetry_lines(Symmetry(tuple(groups), pinned, layout, architecture="Twice"), 1.0))
    assert lines[:7] == [
        "nothing is pinned for want of a rule",
        "pinned by a constant, a tensor that is no parameter:",
        "  constant: 2 axes, in layers.{0-1}",
        "pinned: held:",
        "  hold: 1 axis, in layers.1.qkv (held by request)",
        "pinned by an operator:",
        "  split: 1 axis, in layers.0 (combines axes that do not fit)",
    ]
    rows = lines[8].splitlines()
    assert [row.split()[:4] for row in rows[1:]] == [
        ["layers.{0-1}.qkv", "2", "3", "heads"],
        ["layers.{0-1}.qkv:2", "2", "2", "within"],
    ]
    assert "within layers.{0-1}.qkv  layers.{0-1}.qkv.weight[0], layers.{0-1}.proj.weight[1]" in rows[2]
    # two layers, each with 3 heads and 3 times 2 units; (3! · 2!³)² permutations
    assert lines[-1].startswith("Twice: 4 groups, 18 units, 2,304 permutations; ")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_picture_is_written(factories, capsys, suffix):
    said = printed(
        capsys, "--model", "nets_for_cli:Plain", "--input-shape", "3,5", "--no-verify", "--plot", f"s.{suffix}"
    )
    assert said.endswith(f"wrote s.{suffix}\n")
    assert (factories / f"s.{suffix}").stat().st_size > 1000


def test_the_png_is_not_blank_and_the_svg_labels_each_group(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 17), nn.ReLU(), nn.Linear(17, 23), nn.ReLU(), nn.Linear(23, 2))
    figure = figures.symmetry_figure(symmetry(model, torch.ones(1, 4), verify=False))
    pixels = imread(figures.save(figure, tmp_path / "s.png"))[..., :3]
    blue = np.abs(pixels - np.array([0, 0x72, 0xB2]) / 255).max(-1) < 0.02  # of groups that are permuted freely
    assert 0.001 < blue.mean() < 0.5
    text = figures.save(figure, tmp_path / "s.svg").read_text()
    assert {">17<", ">23<"} <= set(re.findall(r">\d+<", text))
    assert {"group-0", "group-2"} <= set(re.findall(r'id="([^"]+)"', text))


def test_where_the_picture_goes_is_checked_before_any_work(refused, tmp_path):
    args = ["symmetry", "--model", "nowhere:at_all", "--input-shape", "1,2", "--plot"]
    assert "must end in .png or .svg or .pdf" in refused(*args, tmp_path / "s.jpg")
    assert "there is no folder" in refused(*args, tmp_path / "none" / "s.png")
    (tmp_path / "folder.png").mkdir()
    assert "it is a folder" in refused(*args, tmp_path / "folder.png")


def test_a_network_without_symmetry_is_listed_too(capsys):
    found = symmetry(nn.Linear(3, 2), torch.ones(1, 3), verify=False)
    lines = list(symmetry_lines(found, 0.0))
    assert lines[1].startswith("axes that keep their order by meaning: ")
    assert lines[-1].startswith("Linear: 0 groups, 0 units, 1 permutation; 0.0 % of the parameters")
    assert len(json.dumps(found.to_json())) > 0
    figures.symmetry_figure(found)

"""Lanes and rows of the picture of a symmetry: packing by properties, marks by hand."""

import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from isthmus.align import Group, Pinned, Symmetry, symmetry
from isthmus.align.drawing import figure_size, plot
from isthmus.align.lanes import chart, count_units, execution_order, fold, pack
from isthmus.align.terms import Fixed, Product, Units

SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=25)


@settings(deadline=None)
@given(SPANS)
def test_lanes_never_overlap_and_each_group_has_one(pairs):
    spans = {f"g{at}": (first, first + length) for at, (first, length) in enumerate(pairs)}
    lanes = pack(spans)
    assert list(lanes) == list(spans)
    rows = [(lane, row) for name, lane in lanes.items() for row in range(spans[name][0], spans[name][1] + 1)]
    assert len(rows) == len(set(rows))
    assert set(lanes.values()) == set(range(max(lanes.values(), default=-1) + 1))
    if spans:
        assert 0 in {lanes[name] for name, (first, last) in spans.items() if last - first == max(b for _, b in pairs)}


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=80).map(sorted), st.integers(1, 7))
def test_columns_hold_each_row_once_in_order(blocks, count):
    modules = [f"blocks.{block}.fc{row}" for row, block in enumerate(blocks)]
    columns = fold(modules, count)
    assert [row for rows in columns for row in rows] == list(range(len(modules)))
    assert len(columns) <= count
    assert max(map(len, columns)) <= 1 + 4 * len(modules) / (3 * count)


class Backwards(nn.Module):
    """Registered in another order than it runs."""

    def __init__(self):
        super().__init__()
        self.last, self.middle, self.norm, self.first = (
            nn.Linear(7, 2),
            nn.Linear(6, 7),
            nn.LayerNorm(7),
            nn.Linear(3, 6),
        )

    def forward(self, x):
        return self.last(self.norm(self.middle(self.first(x).relu())).relu())


class Many(nn.Module):
    """A depthwise and a transposed convolution, a norm, a scale of its own, a residual branch."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.depth, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.up, self.head = nn.ConvTranspose2d(8, 5, 2), nn.Conv2d(5, 2, 1)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.scale * self.point(self.depth(x).relu())
        return self.head(self.up(x).relu())


class Tied(nn.Module):
    """Tokens and positions are looked up; the head is tied to the tokens."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 6), nn.Parameter(torch.randn(1, 4, 6))
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        x = self.tokens(ids) + self.places
        return self.head(x + self.down(F.relu(self.up(x))))


def drawn(model, example):
    found = symmetry(model, example, verify=False)
    laid = chart(found)
    size = {group.name: group.size for group in found.groups}
    return laid, {(laid.modules[row], size[group]): role for (row, group), role in laid.marks.items()}


def test_rows_are_in_order_of_execution():
    laid, marks = drawn(Backwards(), torch.ones(2, 3))
    assert [name for name in laid.modules if name != "norm"] == ["first", "middle", "last"]
    assert marks["first", 6] == "out"
    assert marks["middle", 6] == "in"
    assert marks["middle", 7] == "out"
    assert marks["norm", 7] == "each"
    assert marks["last", 7] == "in"


def test_convolutions_are_marked_by_what_they_do():
    _, marks = drawn(Many(), torch.ones(1, 3, 8, 8))
    # the residual stream ties stem and point; depth reads it and makes it, for it works channel by channel
    assert marks == {
        ("stem", 8): "out",
        ("norm", 8): "each",
        ("depth", 8): "through",
        ("point", 8): "through",
        ("", 8): "each",
        ("up", 8): "in",
        ("up", 5): "out",
        ("head", 5): "in",
    }


def test_embeddings_make_the_stream_and_a_tied_head_reads_it():
    laid, marks = drawn(Tied(), torch.randint(11, (2, 4)))
    assert marks == {
        ("tokens", 6): "out",
        ("", 6): "each",
        ("up", 6): "in",
        ("up", 9): "out",
        ("down", 9): "in",
        ("down", 6): "out",
        ("head", 6): "in",
    }
    assert laid.width == 2
    stream = max(laid.spans, key=lambda name: laid.spans[name][1] - laid.spans[name][0])
    assert laid.lanes[stream] == 0
    assert laid.spans[stream] == (0, len(laid.modules) - 1)


def test_inputs_first_as_in_gpt2():
    transformers = pytest.importorskip("transformers")
    layer = nn.Sequential(transformers.pytorch_utils.Conv1D(9, 4), nn.ReLU(), transformers.pytorch_utils.Conv1D(2, 9))
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), layer)
    _, marks = drawn(model, torch.ones(2, 3))
    assert marks == {("0", 4): "out", ("2.0", 4): "in", ("2.0", 9): "out", ("2.2", 9): "in"}


def test_what_has_no_rule_is_on_its_row():
    layout = {"a.weight": (Fixed(3), Fixed(2)), "b.weight": (Units("b", 4), Fixed(3))}
    pinned = tuple(
        Pinned(n, 0, 3, "operator", o, f"no rule for {o}") for n, o in (("a.weight", "qr"), ("a.weight", "lu"))
    )
    found = Symmetry((Group("b", 4, "free", (("b.weight", 0),)),), pinned, layout)
    laid = chart(found)
    assert (laid.modules, laid.unruled) == (("a", "b"), {0: ("qr", "lu")})
    ax = plot(found, Figure().subplots())
    assert "qr, lu" in {text.get_text() for text in ax.texts}
    assert any(patch.get_hatch() for patch in ax.patches)


def test_units_are_counted_at_each_position_of_the_outer_group():
    groups = (Group("heads", 3, "heads", ()), Group("inner", 5, "within", (), ("heads",)))
    assert count_units(Symmetry(groups, (), {})) == 3 + 3 * 5


def test_every_module_has_its_row_and_every_group_its_label():
    torch.manual_seed(0)
    layers = [nn.Linear(10 + at, 11 + at) for at in range(90)]
    found = symmetry(
        nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU()))), torch.ones(1, 10), verify=False
    )
    width, height = figure_size(found)
    assert 0.5 < width / height < 3  # ninety rows do not fit below one another
    ax = plot(found)
    said = [text.get_text() for text in ax.texts]
    assert {str(group.size) for group in found.groups} <= set(said)
    assert set(execution_order(found)) <= set(said)
    assert {line.get_gid() for line in ax.lines if line.get_gid()} == {f"group-{group.name}" for group in found.groups}
    left, right = ax.get_xlim()
    bottom, top = ax.get_ylim()
    assert all(left <= text.get_position()[0] <= right and bottom <= text.get_position()[1] <= top for text in ax.texts)
    plt.close(ax.figure)  # pyright: ignore[reportArgumentType]


def test_heads_and_what_lies_within_are_told_apart():
    term = Product((Units("heads", 3), Units("inner", 5)))
    axes = (("q.weight", 0),)
    groups = (Group("heads", 3, "heads", axes), Group("inner", 5, "within", axes, ("heads",)))
    ax = plot(Symmetry(groups, (), {"q.weight": (term, Fixed(2))}, architecture="Attention"), Figure().subplots())
    assert {"3 heads", "5 each", "Attention: 2 groups, 18 units"} <= {text.get_text() for text in ax.texts}
    legend = ax.get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == {
        "attention heads, moved as wholes",
        "within each head or block",
        "made by the module",
    }

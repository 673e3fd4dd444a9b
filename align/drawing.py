"""A picture of a symmetry: modules from top to bottom in order of execution, each group a lane beside them.

A residual stream is a long lane, a hidden layer a short one, like branches in the log of a version control system.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .lanes import block_of, chart, count_units, fold
from .symmetry import Group, Symmetry

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

# Okabe and Ito's palette, told apart with any colour vision.
_COLOURS = {"free": "#0072B2", "heads": "#E69F00", "blocks": "#009E73", "within": "#CC79A7"}
_KINDS = {
    "free": "permuted freely",
    "heads": "attention heads, moved as wholes",
    "blocks": "blocks, moved as wholes",
    "within": "within each head or block",
}
_ROLES = {
    "out": "made by the module",
    "in": "read by it",
    "through": "both",
    "each": "one by one: norm, position",
}
# Lengths in inches, letters in points.
_ROW, _DOT, _MARGIN, _GAP, _LETTER, _FONT = 0.165, 0.13, 0.15, 0.3, 0.0545, 6.5
_LONGEST_NAME = 48
_LEGEND_ROW, _LEGEND_ENTRY = 0.17, 2.2
_SHAPE = 1.3  # the width that a picture strives for, in heights


class _Sheet:
    """Where everything lies on the paper, in inches from the upper left; down is negative."""

    def __init__(self, symmetry: Symmetry) -> None:
        self.symmetry = symmetry
        self.chart = chart(symmetry)
        self.labels = {group.name: _label(group) for group in symmetry.groups}
        self.names = [_shortened(name) for name in self.chart.modules]
        self.name_width = _LETTER * max(map(len, self.names), default=0) + 0.12
        self.lane_width = max(0.24, _DOT + _LETTER * max(map(len, self.labels.values()), default=0))
        operators = [", ".join(names) for names in self.chart.unruled.values()]
        self.note_width = _LETTER * max(map(len, operators), default=0) + (0.1 if operators else 0)
        self.column = self.name_width + self.chart.width * self.lane_width + self.note_width + _GAP
        rows = len(self.names)
        count = max(1, round(math.sqrt(_SHAPE * rows * _ROW / self.column)))
        self.columns = fold(self.chart.modules, min(count, max(rows, 1)))
        self.width = max(len(self.columns) * self.column - _GAP + 2 * _MARGIN, _LEGEND_ENTRY + 2 * _MARGIN, 3.0)
        self.kinds = [kind for kind in _COLOURS if any(group.kind == kind for group in symmetry.groups)]
        self.roles = [role for role in _ROLES if role in self.chart.marks.values()]
        entries = len(self.kinds) + len(self.roles) + bool(self.chart.unruled)
        self.legend_columns = max(1, min(entries, int((self.width - _MARGIN) / _LEGEND_ENTRY)))
        self.top = 0.42 + _LEGEND_ROW * math.ceil(entries / self.legend_columns) + 1.5 * _ROW
        self.height = self.top + _ROW * max(map(len, self.columns), default=0) + _MARGIN
        self.place = {row: (k, at) for k, rows in enumerate(self.columns) for at, row in enumerate(rows)}

    def left(self, column: int) -> float:
        return _MARGIN + column * self.column

    def right(self, column: int) -> float:
        return self.left(column) + self.column - _GAP

    def x(self, column: int, lane: float) -> float:
        return self.left(column) + self.name_width + lane * self.lane_width + _DOT / 2

    def y(self, at: float) -> float:
        return -self.top - _ROW * at

    def at(self, row: int, group: str) -> tuple[float, float]:
        column, at = self.place[row]
        return self.x(column, self.chart.lanes[group]), self.y(at)


def figure_size(symmetry: Symmetry) -> tuple[float, float]:
    """Give the width and height in inches at which a picture is legible."""
    sheet = _Sheet(symmetry)
    return sheet.width, sheet.height


def plot(symmetry: Symmetry, ax: Axes | None = None) -> Axes:
    """Draw which units run where: modules in order of execution as rows, groups as lanes, long networks in columns.

    A filled dot marks a module that makes the units of the lane, an open one a module that reads them, a small one a
    module that acts on each of them. The number at a lane's beginning is the group's size. Rows are hatched where an
    axis is pinned for want of a rule. In an SVG file the element of a lane has the id `group-NAME`.

    Args:
        symmetry: What to draw.
        ax: Where to draw; `figure_size` tells how large it should be. Default: a new figure of that size.

    Returns:
        The axes.
    """
    sheet = _Sheet(symmetry)
    if ax is None:
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=(sheet.width, sheet.height))
        ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, sheet.width)
    ax.set_ylim(-sheet.height, 0)
    ax.set_axis_off()
    _draw_rows(ax, sheet)
    for group in symmetry.groups:
        _draw_lane(ax, sheet, group)
    _draw_marks(ax, sheet)
    title = f"{symmetry.architecture}: {len(symmetry.groups):,} groups, {count_units(symmetry):,} units"
    ax.text(_MARGIN, -0.18, title, fontsize=9, fontweight="bold", va="center")
    _draw_legend(ax, sheet)
    return ax


def _label(group: Group) -> str:
    named = {"heads": " heads", "blocks": " blocks"}.get(group.kind, "")
    return f"{group.size}{named}{' each' if group.within else ''}"


def _shortened(name: str) -> str:
    name = name or "(the model)"
    if len(name) <= _LONGEST_NAME:
        return name
    tail = name[1 - _LONGEST_NAME :]
    return "…" + tail[tail.find(".") + 1 :]


def _draw_rows(ax: Axes, sheet: _Sheet) -> None:
    """Name the modules, shade every other block, join what a module holds, hatch what has no rule."""
    from matplotlib.patches import Rectangle

    shade, block = True, None
    held: dict[int, list[str]] = {}
    for row, group in sheet.chart.marks:
        held.setdefault(row, []).append(group)
    for row, name in enumerate(sheet.names):
        column, at = sheet.place[row]
        left, y = sheet.left(column), sheet.y(at)
        here = block_of(sheet.chart.modules[row])
        shade, block = shade if here == block else not shade, here
        if shade:
            corner, width = (left - 0.06, y - _ROW / 2), sheet.right(column) - left + 0.12
            ax.add_patch(Rectangle(corner, width, _ROW, facecolor="#f1f3f5", linewidth=0, zorder=0))
        ax.text(left, y, name, fontsize=_FONT, va="center_baseline", color="#2b2f36")
        xs = [sheet.at(row, group)[0] for group in held.get(row, [])]
        if xs:
            end = left + _LETTER * len(name) + 0.05
            ax.plot([end, min(xs)], [y, y], color="#c9cdd2", linewidth=0.4, zorder=1)
            ax.plot([min(xs), max(xs)], [y, y], color="#8a8f98", linewidth=2.2, zorder=1.5, solid_capstyle="round")
        if row in sheet.chart.unruled:
            _draw_unruled(ax, sheet, row)


def _draw_unruled(ax: Axes, sheet: _Sheet, row: int) -> None:
    from matplotlib.patches import Rectangle

    column, at = sheet.place[row]
    left, right, y = sheet.left(column) + sheet.name_width - 0.05, sheet.right(column), sheet.y(at)
    corner, width = (left, y - 0.4 * _ROW), right - sheet.note_width - left
    ax.add_patch(Rectangle(corner, width, 0.8 * _ROW, **_HATCHED, zorder=0.5))
    note = ", ".join(sheet.chart.unruled[row])
    ax.text(right, y, note, fontsize=_FONT, va="center_baseline", ha="right", color="#4a4f57")


_HATCHED = {"facecolor": "none", "edgecolor": "#9aa0a8", "hatch": "//////", "linewidth": 0}


def _draw_lane(ax: Axes, sheet: _Sheet, group: Group) -> None:
    first, last = sheet.chart.spans[group.name]
    for column, (start, end) in _stretches(sheet, first, last):
        x = sheet.x(column, sheet.chart.lanes[group.name])
        (line,) = ax.plot(
            [x, x], [sheet.y(start), sheet.y(end)], color=_COLOURS.get(group.kind, "black"), linewidth=1.8, zorder=2,
            solid_capstyle="butt",
        )  # fmt: skip
        line.set_gid(f"group-{group.name}")
        again = start < 0
        at = (x, sheet.y(start)) if again else (x + 0.08, sheet.y(start) + 0.055)
        ax.text(
            *at, sheet.labels[group.name], fontsize=_FONT - 0.5, zorder=5, color="#8a8f98" if again else "black",
            ha="center" if again else "left", va="bottom" if again else "center",
        )  # fmt: skip


def _stretches(sheet: _Sheet, first: int, last: int) -> Iterator[tuple[int, tuple[float, float]]]:
    """Cut a span into its parts in each column; it is open by half a row where it goes on."""
    for column, rows in enumerate(sheet.columns):
        if first < rows.stop and last >= rows.start:
            start = first - rows.start if first >= rows.start else -0.75
            end = last - rows.start if last < rows.stop else len(rows) - 0.4
            yield column, (start, end)


def _draw_marks(ax: Axes, sheet: _Sheet) -> None:
    kind_of = {group.name: group.kind for group in sheet.symmetry.groups}
    places: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for (row, group), role in sheet.chart.marks.items():
        places.setdefault((role, kind_of[group]), []).append(sheet.at(row, group))
    for (role, kind), points in places.items():
        xs, ys = zip(*points, strict=True)
        ax.plot(xs, ys, linestyle="", zorder=4, **_marker(role, _COLOURS.get(kind, "black")))


def _marker(role: str, colour: str) -> dict:
    style = {"marker": "o", "markersize": 5.5, "markeredgecolor": colour, "markeredgewidth": 1.2}
    match role:
        case "in":
            return style | {"markerfacecolor": "white"}
        case "through":
            return style | {"markerfacecolor": "white", "markerfacecoloralt": colour, "fillstyle": "top"}
        case "each":
            return style | {"markerfacecolor": colour, "markersize": 2.4}
        case _:
            return style | {"markerfacecolor": colour}


def _draw_legend(ax: Axes, sheet: _Sheet) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Artist] = [
        *(Line2D([], [], color=_COLOURS[kind], linewidth=1.8, label=_KINDS[kind]) for kind in sheet.kinds),
        *(Line2D([], [], linestyle="", label=_ROLES[role], **_marker(role, "#4a4f57")) for role in sheet.roles),
        *([Patch(**_HATCHED, label="pinned for want of a rule")] if sheet.chart.unruled else []),
    ]
    if handles:
        ax.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(_MARGIN - 0.06, -0.3), bbox_transform=ax.transData,
            ncols=sheet.legend_columns, frameon=False, fontsize=_FONT, borderaxespad=0, borderpad=0, handlelength=1.6,
            labelspacing=0.4, columnspacing=1.5,
        )  # fmt: skip

"""A contact sheet: units of two networks side by side, each a row of the inputs that drive it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...base.errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Extent = tuple[float, float, float, float]

# Lengths in inches, letters in points.
_MARGIN, _LABEL, _GUTTER, _GAP, _SPACE, _HEAD = 0.15, 0.62, 0.72, 0.12, 0.035, 0.5
_SMALL, _LARGE = 7.0, 9.5
_LETTER = 0.094  # a wide one of a title
_INK, _MUTED, _ACCENT, _EMPTY = "#1d2127", "#5d646e", "#D55E00", "#dfe1e5"


@dataclass(frozen=True, eq=False)
class Strip:
    """What is drawn of one unit.

    Attributes:
        label: Its name.
        inputs: (k, channels, height, width) with 1 or 3 channels, images; (k, features), drawn as curves; (k, channels,
            length), drawn as maps; best first. NaN is left empty.
        picture: One input more that is drawn first, as the one that maximises the unit; stretched to its own range.
        boxes: For each image (top, left, height, width) in pixels, to be drawn around a part of it.
        note: Said in place of inputs where there are none.
    """

    label: str
    inputs: Tensor | None
    picture: Tensor | None = None
    boxes: Sequence[Sequence[int]] | None = None
    note: str = ""


Row = tuple[Strip | None, Strip | None]


def contact_sheet(
    rows: Sequence[Row],
    *,
    labels: Sequence[str] | None = None,
    titles: tuple[str, str] = ("network A", "network B"),
    heading: str = "largest activations",
    label_heading: str = "",
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    cell: float = 0.5,
    figure: Figure | None = None,
) -> Figure:
    """Draw units of two networks side by side (as Li et al. 2015, Figure 2).

    Images are shown as pixels from 0 to 1 after undoing a normalisation by `mean` and `std`; without these, all inputs
    of a network share one scale from their least to their largest value. All cells are of one size, images keep their
    shape inside.

    Args:
        rows: A strip for the left block and one for the right; None leaves the place empty.
        labels: What stands between the two, such as a similarity; one for each row.
        titles: What stands above the blocks.
        heading: What stands above the inputs.
        label_heading: What stands above the labels.
        mean: The mean that was subtracted of each channel, for pixels in [0, 1].
        std: The standard deviation that each channel was divided by.
        cell: Side of a cell in inches.
        figure: Where to draw, with its size left as it is. Default: a new figure, as large as it needs to be.

    Returns:
        The figure; `figure.savefig("units.png", dpi=200)` writes it.

    Raises:
        DataError: There is no row, the labels are not one for each, mean and std do not fit, or inputs are not
            something that can be drawn.

    >>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> sheet = contact_sheet([(Strip("unit 3", images), Strip("unit 7", images))], labels=["0.93"])
    >>> sheet.get_size_inches().round(2).tolist()
    [6.26, 1.18]
    """
    rows = list(rows)
    if not any(strip is not None for row in rows for strip in row):
        raise DataError("there is no unit to draw; pass rows of a left and a right strip")
    if labels is not None and len(labels) != len(rows):
        raise DataError(f"{len(labels)} labels for {len(rows)} rows; give one for each")
    for strip in (strip for row in rows for strip in row if strip is not None):
        _check(strip)
    layout = _Layout([[row[side] for row in rows] for side in (0, 1)], cell)
    if figure is None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(layout.width, layout.height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(0, layout.width)
    ax.set_ylim(-layout.height, 0)
    ax.autoscale(False)
    ax.set_axis_off()
    for side, (block, title) in enumerate(zip(layout.blocks, titles, strict=True)):
        scale = _scale([strip for strip in block if strip is not None], mean, std)
        _draw_heads(ax, layout, side, title, heading)
        for at, strip in enumerate(block):
            if strip is not None:
                _draw_strip(ax, layout, side, at, strip, scale)
    if labels:
        ax.text(layout.middle, -0.37, label_heading, fontsize=_SMALL, ha="center", va="center", color=_MUTED)
    for at, label in enumerate(labels or ()):
        ax.text(layout.middle, layout.centre(at), label, fontsize=_LARGE, ha="center", va="center", color=_INK)
    return figure


class _Layout:
    """Where everything lies on the paper, in inches from the upper left; down is negative."""

    def __init__(self, blocks: Sequence[Sequence[Strip | None]], cell: float) -> None:
        self.blocks, self.cell = blocks, cell
        strips = [[strip for strip in block if strip is not None] for block in blocks]
        self.pictures = any(strip.picture is not None for block in strips for strip in block)
        counts = [max((len(s.inputs) for s in block if s.inputs is not None), default=0) for block in strips]
        self.counts = [max(count, 3) for count in counts]  # room for the words above
        self.before = _LABEL + (cell + _GAP if self.pictures else 0)
        self.widths = [self.before + count * cell for count in self.counts]
        self.width = 2 * _MARGIN + sum(self.widths) + _GUTTER
        self.height = _HEAD + len(blocks[0]) * (cell + _SPACE) + _MARGIN
        self.middle = _MARGIN + self.widths[0] + _GUTTER / 2

    def left(self, side: int) -> float:
        return _MARGIN + side * (self.widths[0] + _GUTTER)

    def centre(self, row: int) -> float:
        return -_HEAD - row * (self.cell + _SPACE) - self.cell / 2

    def cell_at(self, side: int, row: int, column: int | None) -> Extent:
        """Give left, right, bottom, top of a cell; column None is the picture's."""
        left = self.left(side) + (_LABEL if column is None else self.before + column * self.cell)
        half = self.cell / 2
        inner = self.cell - _SPACE
        return left, left + inner, self.centre(row) - half + _SPACE / 2, self.centre(row) + half - _SPACE / 2


@dataclass(frozen=True, eq=False)
class _Scale:
    """What turns values into shades: pixels are (x - low) / (high - low)."""

    low: Tensor
    high: Tensor


def _check(strip: Strip) -> None:
    for name, x, axes in (("inputs", strip.inputs, (2, 3, 4)), ("picture", strip.picture, (1, 2, 3))):
        if x is None:
            continue
        if x.ndim not in axes or (x.ndim == axes[-1] and x.shape[-3] not in (1, 3)):
            raise DataError(
                f"{name} of {strip.label} have shape {tuple(x.shape)}, which cannot be drawn; images have 1 or 3 "
                "channels (channels, height, width), other inputs one axis (features) or two (channels, length)"
            )
        if not (x.is_floating_point() or x.dtype == torch.uint8):
            raise DataError(f"{name} of {strip.label} are {x.dtype}; numbers of tokens and the like are no picture")
    if strip.boxes is not None and (strip.inputs is None or len(strip.boxes) != len(strip.inputs)):
        raise DataError(f"{strip.label} has {len(strip.boxes)} boxes; give one for each input")


def _scale(
    strips: Sequence[Strip], mean: Sequence[float] | float | None, std: Sequence[float] | float | None
) -> _Scale:
    inputs = [strip.inputs.to("cpu", torch.float32) for strip in strips if strip.inputs is not None]
    if mean is not None or std is not None:
        mean, std = (0.0 if mean is None else mean), (1.0 if std is None else std)
        means, stds = (torch.as_tensor(x, dtype=torch.float32).reshape(-1, 1, 1) for x in (mean, std))
        for x in inputs:
            if x.ndim != 4 or any(len(y) not in (1, x.shape[1]) for y in (means, stds)) or not bool((stds > 0).all()):
                raise DataError(
                    f"mean {mean} and std {std} for inputs of shape {tuple(x.shape)}; give one of each per channel of "
                    "images, std above zero"
                )
        return _Scale(-means / stds, (1 - means) / stds)
    values = torch.cat([x[x.isfinite()] for x in inputs]) if inputs else torch.empty(0)
    return _range(values)


def _range(values: Tensor) -> _Scale:
    values = values[values.isfinite()]
    if not len(values):
        return _Scale(torch.zeros(()), torch.ones(()))
    low, high = values.aminmax()
    return _Scale(low, high if high > low else low + 1)


def _draw_heads(ax: Axes, layout: _Layout, side: int, title: str, heading: str) -> None:
    left = layout.left(side)
    width = layout.widths[side] - _LABEL + (_GUTTER if side == 0 else _MARGIN)
    ax.text(left + _LABEL, -0.16, _shortened(title, width), fontsize=_LARGE, fontweight="bold", va="center", color=_INK)
    first = layout.cell_at(side, 0, 0)[0]
    ax.text(first, -0.37, heading, fontsize=_SMALL, va="center", color=_MUTED)
    if layout.pictures:
        ax.text(left + _LABEL, -0.37, "maximal", fontsize=_SMALL, va="center", color=_ACCENT)


def _shortened(title: str, width: float) -> str:
    """Keep the end of a title, which tells layers apart, where all of it is too wide."""
    most = int(width / _LETTER)
    return title if len(title) <= most else "…" + title[len(title) + 1 - most :]


def _draw_strip(ax: Axes, layout: _Layout, side: int, row: int, strip: Strip, scale: _Scale) -> None:
    x, y = layout.left(side) + _LABEL - 0.08, layout.centre(row)
    ax.text(x, y, strip.label, fontsize=_SMALL + 0.5, ha="right", va="center", color=_INK)
    if strip.note:
        ax.text(
            layout.cell_at(side, row, 0)[0], y, strip.note, fontsize=_SMALL, va="center", color=_MUTED, style="italic"
        )
    if strip.picture is not None:
        picture = strip.picture.to("cpu", torch.float32)
        extent = _draw_cell(ax, layout.cell_at(side, row, None), picture, _range(picture))
        _frame(ax, extent, _ACCENT, 1.0)
    for column, values in enumerate(() if strip.inputs is None else strip.inputs.to("cpu", torch.float32)):
        extent = _draw_cell(ax, layout.cell_at(side, row, column), values, scale)
        if strip.boxes is not None:
            _frame(ax, _boxed(extent, strip.boxes[column], values.shape[-2:]), _ACCENT, 0.9)


def _draw_cell(ax: Axes, place: Extent, values: Tensor, scale: _Scale) -> Extent:
    """Draw one input in its cell; gives the part of the cell that it takes."""
    left, right, bottom, top = place
    if values.ndim == 1:
        share = ((values - scale.low) / (scale.high - scale.low)).clamp(0, 1).numpy()
        steps = np.linspace(left, right, len(share) + 1)
        zero = float((-scale.low / (scale.high - scale.low)).clamp(0, 1))
        ax.stairs(
            bottom + share * (top - bottom), steps, baseline=bottom + zero * (top - bottom), fill=True, color=_MUTED
        )
        _frame(ax, place, _EMPTY, 0.6)
        return place
    if values.ndim == 2:
        shades = ((values - scale.low) / (scale.high - scale.low)).clamp(0, 1).numpy()
        ax.imshow(shades, extent=place, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        return place
    height, width = values.shape[-2:]
    side = max(height, width)
    across, down = (right - left) * width / side / 2, (top - bottom) * height / side / 2
    middle = ((left + right) / 2, (top + bottom) / 2)
    extent = (middle[0] - across, middle[0] + across, middle[1] - down, middle[1] + down)
    ax.imshow(_pixels(values, scale), extent=extent, aspect="auto", interpolation="nearest")
    return extent


def _pixels(values: Tensor, scale: _Scale) -> np.ndarray:
    """Give (height, width, 3) from 0 to 1; what is NaN becomes light grey."""
    from matplotlib.colors import to_rgb

    shades = ((values - scale.low) / (scale.high - scale.low)).clamp(0, 1)
    empty = values.isnan().any(0)
    colours = shades.expand(3, -1, -1).permute(1, 2, 0).clone()
    colours[empty] = torch.tensor(to_rgb(_EMPTY))
    return colours.numpy()


def _boxed(extent: Extent, box: Sequence[int], shape: Sequence[int]) -> Extent:
    """Give where a box of pixels lies on the paper, cut at the border of its image."""
    left, right, bottom, top = extent
    edges = []
    for start, length, size in zip(box[:2], box[2:], shape, strict=True):
        edges.append((max(start, 0) / size, min(start + length, size) / size))
    (above, below), (first, last) = edges
    wide, high = right - left, top - bottom
    return left + first * wide, left + last * wide, top - below * high, top - above * high


def _frame(ax: Axes, extent: Extent, colour: str, width: float) -> None:
    from matplotlib.patches import Rectangle

    left, right, bottom, top = extent
    ax.add_patch(Rectangle((left, bottom), right - left, top - bottom, fill=False, edgecolor=colour, linewidth=width))

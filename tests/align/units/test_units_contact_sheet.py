"""Contact sheets: what is drawn where, that nothing overlaps, and what cannot be drawn."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from isthmus.align.units.contact_sheet import Strip, contact_sheet
from isthmus.align.units.maximisation import maximise
from isthmus.align.units.receptive_field import receptive_field
from isthmus.align.units.seeing import see_cluster, see_pairs
from isthmus.align.units.top_inputs import top_inputs
from isthmus.base.errors import DataError, LayerNotFoundError


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts if text.get_text()]


def pictures(figure: Figure) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for image in figure.axes[0].images]


def extents(figure: Figure) -> np.ndarray:
    return np.array([image.get_extent() for image in figure.axes[0].images])


def frames(figure: Figure) -> list[Rectangle]:
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]


def assert_nothing_overlaps(figure: Figure) -> None:
    """No text touches another, a cell, or the edge of the paper; no cell touches another."""
    figure.set_dpi(100)
    renderer = FigureCanvasAgg(figure).get_renderer()
    ax = figure.axes[0]
    texts = [text.get_window_extent(renderer) for text in ax.texts if text.get_text()]
    cells = [image.get_window_extent(renderer) for image in ax.images]
    for first, second in (*combinations(texts, 2), *((t, c) for t in texts for c in cells), *combinations(cells, 2)):
        assert not first.padded(-0.6).overlaps(second), (first, second)
    for box in texts:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_sheet_of_images(images: Tensor) -> None:
    left = [Strip(f"unit {1000 + unit}", images[:4], images[5]) for unit in range(3)]
    right = [Strip("unit 7", images[2:]), None, Strip("unit 8", None, note="does not vary")]
    labels, titles = ["0.91", "−0.35", "–"], ("network A · layer1.0.conv1", "network B · layer1.0.conv1")
    sheet = contact_sheet(list(zip(left, right, strict=True)), labels=labels, titles=titles, label_heading="similarity")
    assert_nothing_overlaps(sheet)
    found = words(sheet)
    assert {*labels, *titles, "similarity", "maximal", "unit 1002", "unit 8", "does not vary"} <= set(found)
    assert len(pictures(sheet)) == 3 * 5 + 4
    sides = np.abs(extents(sheet)[:, [1, 3]] - extents(sheet)[:, [0, 2]])
    np.testing.assert_allclose(sides, sides[0, 0])  # cells of one size, and square
    assert len({round(x, 6) for x in extents(sheet)[:, 0]}) == 5 + 4  # in columns: both networks' pictures aligned
    assert len(frames(sheet)) == 3


def test_a_narrow_sheet_has_room_for_its_words(images: Tensor) -> None:
    assert_nothing_overlaps(contact_sheet([(Strip("unit 1", images[:1]), Strip("unit 2", images[:1]))]))


def test_long_titles_keep_their_end(images: Tensor) -> None:
    titles = ("network A · encoder.layers.11.mlp.dense_h_to_4h", "network B" + " · module" * 9)
    sheet = contact_sheet([(Strip("a", images[:3]), Strip("b", images[:3]))], titles=titles)
    assert_nothing_overlaps(sheet)
    assert any(word.startswith("…") and word.endswith("_h_to_4h") for word in words(sheet))


def test_images_keep_their_shape() -> None:
    sheet = contact_sheet([(Strip("a", torch.rand(2, 1, 6, 3)), Strip("b", torch.rand(2, 1, 3, 6)))])
    left, right, bottom, top = extents(sheet).T
    np.testing.assert_allclose((top - bottom) / (right - left), [2, 2, 0.5, 0.5])
    assert_nothing_overlaps(sheet)


def test_normalisation_is_undone(images: Tensor) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    normal = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    sheet = contact_sheet([(Strip("a", normal), None)], mean=mean, std=std)
    for drawn, image in zip(pictures(sheet), images, strict=True):
        np.testing.assert_allclose(drawn, image.permute(1, 2, 0).numpy(), atol=1e-6)
    assert_nothing_overlaps(sheet)
    grey = contact_sheet([(Strip("a", images[:, :1] - 0.25), None)], mean=0.25)
    np.testing.assert_allclose(pictures(grey)[3], images[3, :1].expand(3, 8, 8).permute(1, 2, 0).numpy(), atol=1e-6)


def test_inputs_of_a_network_share_a_scale_and_pictures_have_their_own(images: Tensor) -> None:
    rows = [(Strip("a", 5 * images[:2], 100 * images[4]), Strip("b", images[:2])), (Strip("c", images[:2]), None)]
    sheet = contact_sheet(rows)
    largest = [round(float(drawn.max()), 4) for drawn in pictures(sheet)]
    scale = float(images[:2].max() - images[:2].min() / 5)
    assert largest[0] == 1  # the picture
    assert max(largest[1:3]) == 1
    low, high = float(images[:2].min()), 5 * float(images[:2].max())
    own = [round((float(x.max()) - low) / (high - low), 4) for x in images[:2]]
    assert largest[3:5] == own
    assert scale > 0
    assert max(largest[5:7]) == 1  # network B has a scale of its own


def test_what_is_missing_is_grey_and_constants_are_drawn() -> None:
    crops = torch.zeros(2, 1, 4, 4)
    crops[0, :, :2] = torch.nan
    sheet = contact_sheet([(Strip("a", crops), Strip("b", torch.full((1, 1, 4, 4), torch.nan)))])
    first, second, empty = pictures(sheet)
    assert np.ptp(first[:2, :, 0]) == 0
    assert first[0, 0, 0] > 0.8
    assert (first[2:] == 0).all()
    assert (second == 0).all()
    assert np.array_equal(empty, np.broadcast_to(first[0, 0], (4, 4, 3)))


def test_boxes_lie_on_their_pixels(images: Tensor) -> None:
    boxes = [(-2, 4, 6, 4), (0, 0, 8, 8)]
    sheet = contact_sheet([(Strip("a", images[:2], boxes=boxes), None)])
    (left, right, bottom, top), second = extents(sheet)
    pixel = (right - left) / 8
    first, other = frames(sheet)
    corner = (first.get_x(), first.get_y(), first.get_width(), first.get_height())
    np.testing.assert_allclose(corner, (left + 4 * pixel, top - 4 * pixel, 4 * pixel, 4 * pixel))
    assert other.get_x() == pytest.approx(second[0])
    assert other.get_height() == pytest.approx(top - bottom)


def test_vectors_are_curves_and_sequences_maps() -> None:
    values = torch.tensor([[0.0, 1.0, -1.0], [0.5, 0.5, 0.5]])
    sheet = contact_sheet([(Strip("a", values, values[1]), Strip("b", torch.rand(2, 5, 9)))], labels=["1.00"])
    assert_nothing_overlaps(sheet)
    assert [drawn.shape for drawn in pictures(sheet)] == [(5, 9), (5, 9)]
    first = [patch for patch in sheet.axes[0].patches if not isinstance(patch, Rectangle)][1]
    heights = first.get_data().values - first.get_data().baseline  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_allclose(heights / heights.max(), [0, 1, -1], atol=1e-6)


def test_drawing_into_a_figure(images: Tensor) -> None:
    figure = Figure(figsize=(3, 2))
    assert contact_sheet([(Strip("a", images), None)], figure=figure) is figure
    assert figure.get_size_inches().tolist() == [3, 2]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([], {}, "no unit to draw"),
        ([(None, None)], {}, "no unit to draw"),
        ([(Strip("a", torch.rand(1, 1, 2, 2)), None)], {"labels": ["1", "2"]}, "2 labels for 1 rows"),
        ([(Strip("u", torch.rand(1, 2, 4, 4)), None)], {}, r"inputs of u have shape \(1, 2, 4, 4\), which cannot be"),
        ([(Strip("u", torch.rand(1, 1, 2, 4, 4)), None)], {}, "cannot be drawn"),
        ([(Strip("u", None, torch.rand(4, 4, 4)), None)], {}, r"picture of u have shape \(4, 4, 4\)"),
        ([(Strip("u", torch.zeros(2, 5, dtype=torch.int64)), None)], {}, "numbers of tokens and the like"),
        ([(Strip("u", torch.rand(2, 1, 4, 4), boxes=[(0, 0, 1, 1)]), None)], {}, "u has 1 boxes"),
        ([(Strip("u", torch.rand(2, 3, 4, 4)), None)], {"mean": [0.5, 0.5]}, "one of each per channel"),
        ([(Strip("u", torch.rand(2, 3, 4, 4)), None)], {"std": 0.0}, "std above zero"),
        ([(Strip("u", torch.rand(2, 9)), None)], {"std": 1.0}, r"inputs of shape \(2, 9\)"),
    ],
)
def test_what_cannot_be_drawn(rows: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        contact_sheet(rows, **arguments)


# From networks to the sheet


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(5, 4, 3, padding=1),
        nn.Flatten(), nn.Linear(144, 6), nn.ReLU(),
    )  # fmt: skip


DATA = torch.randn(40, 1, 12, 12, generator=torch.Generator().manual_seed(9))


def shades(image: Tensor, low: Tensor, high: Tensor) -> np.ndarray:
    return ((image - low) / (high - low)).expand(3, *image.shape[1:]).permute(1, 2, 0).numpy()


def test_pairs_show_the_inputs_of_their_units() -> None:
    a, b = network(0), network(1)
    pairs = [(3, 2), (0, 2), (3, 5)]
    similarities = torch.arange(36.0).reshape(6, 6) / -36
    sheet = see_pairs(a, b, list(DATA.split(7)), "5", pairs, similarities=similarities, count=4)
    assert_nothing_overlaps(sheet)
    found = words(sheet)
    assert {"network A · 5", "network B · 5", "similarity", "largest activations"} <= set(found)
    assert {"−0.56", "−0.06", "−0.64"} <= set(found)
    drawn = pictures(sheet)
    assert len(drawn) == 3 * 2 * 4
    for offset, model, units in ((0, a, (3, 0, 3)), (12, b, (2, 2, 5))):
        top = top_inputs(model, DATA, "5", units=sorted(set(units)), count=4)
        ends = torch.stack([x for unit in units for x in top.inputs(unit)]).aminmax()
        for row, unit in enumerate(units):
            for column, image in enumerate(top.inputs(unit)):
                np.testing.assert_allclose(drawn[offset + 4 * row + column], shades(image, *ends), atol=1e-6)
    assert not frames(sheet)  # a linear layer sees all of the image


def test_crops_are_receptive_fields_and_boxes_frame_them() -> None:
    a, b = network(0), network(1)
    top = top_inputs(a, DATA, "3", units=[1], count=5)
    field = receptive_field(a, "3", DATA[:1])
    crops = see_pairs(a, b, DATA, "3", torch.tensor([[1, 1]]), count=5)
    low, high = torch.stack(
        [field.at(p).crop(x, torch.nan) for p, x in zip(top.positions[0], top.inputs(1), strict=True)]
    ).nan_to_num(0.0).aminmax()  # fmt: skip
    assert low < 0 < high
    for place, image, drawn in zip(top.positions[0], top.inputs(1), pictures(crops), strict=False):
        expected = field.at(place).crop(image, torch.nan)
        assert drawn.shape == (8, 8, 3)
        inside = ~expected[0].isnan().numpy()
        np.testing.assert_allclose(drawn[inside], shades(expected, low, high)[inside], atol=1e-6)
        assert (drawn[~inside] > 0.8).all()
    boxes = see_pairs(a, b, DATA, "3", [(1, 1)], count=5, crop=False)
    assert [drawn.shape for drawn in pictures(boxes)] == [(12, 12, 3)] * 10
    assert len(frames(boxes)) == 10
    assert_nothing_overlaps(boxes)


def test_pictures_that_maximise() -> None:
    a, b = network(0), network(1)
    short = {"steps": 6, "seed": 4}
    whole = see_pairs(a, b, DATA, ("5", "6"), [(0, 1)], count=2, maximise=short, mean=0.5, std=2.0)
    assert len(pictures(whole)) == 2 * 3
    assert {"network A · 5", "network B · 6", "maximal"} <= set(words(whole))
    cropped = see_pairs(a, b, DATA, "3", [(0, 1)], count=2, maximise=short)
    assert [drawn.shape for drawn in pictures(cropped)] == [(8, 8, 3)] * 6
    assert_nothing_overlaps(cropped)
    linear = see_pairs(nn.Linear(8, 2), nn.Linear(8, 2), torch.randn(9, 8), "", [(0, 1)], maximise={"steps": 3})
    assert_nothing_overlaps(linear)
    constant = see_pairs(a, b, torch.zeros(3, 1, 12, 12), "5", [(0, 1)], maximise={"steps": 2})
    assert words(constant).count("does not vary") == 2
    found = maximise(a, "5", 0, DATA[:1], bounds=(-0.25, 0.25), norm=None, steps=6, seed=4).inputs
    assert float(found.abs().max()) <= 0.25


def test_a_cluster_has_as_many_rows_as_it_needs() -> None:
    a, b = network(0), network(1)
    sheet = see_cluster(a, b, DATA, "3", [2], [0, 3, 1], count=3, largest=False, titles=("first", "second"))
    assert_nothing_overlaps(sheet)
    assert {"first", "second", "unit 2", "unit 0", "unit 3", "unit 1", "least activations"} == set(words(sheet))
    assert len(pictures(sheet)) == 4 * 3
    alone = see_cluster(a, b, DATA, "3", [], torch.tensor([1]), count=3)
    assert len(pictures(alone)) == 3
    with pytest.raises(DataError, match="the cluster has no unit"):
        see_cluster(a, b, DATA, "3", [], [])


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"pairs": [1, 2]}, DataError, r"pairs have shape \(2,\)"),
        ({"pairs": []}, DataError, "expected \\(m, 2\\) unit numbers"),
        ({"pairs": [(0.5, 1)]}, DataError, "of float64"),
        ({"pairs": [(0, 9)]}, DataError, "no unit 9: layer '5' has units 0 to 5"),
        ({"similarities": [0.5, 0.5]}, DataError, r"similarities have shape \(2,\) for 1 pairs"),
        ({"similarities": torch.ones(1, 1)}, DataError, r"similarities of shape \(1, 1\) lack a unit"),
        ({"layers": ("5", "9")}, LayerNotFoundError, "no layer '9'"),
        ({"data": iter([DATA])}, DataError, "each network reads it"),
        ({"count": 0}, DataError, "count is 0"),
    ],
)
def test_wrong_use(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"data": DATA, "layers": "5", "pairs": [(1, 2)]} | wrong
    with pytest.raises(error, match=message):
        see_pairs(network(0), network(1), **arguments)

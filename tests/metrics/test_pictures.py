"""Pictures: what is drawn where, checked on the artists, and values against independent numpy."""

from __future__ import annotations

import matplotlib as mpl

mpl.use("Agg")

from collections.abc import Iterator
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from isthmus.base.errors import DataError
from isthmus.metrics import cka
from isthmus.metrics.pictures import difference_map, layer_map, shared_eigenvectors, training_map
from isthmus.metrics.similarity_map import Similarity


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture
def similarity() -> Similarity:
    values = np.array([[1.0, 0.4, 0.2], [0.3, 0.9, -0.1]])
    return Similarity(values, ("a1", "a2"), ("b1", "b2", "b3"), "cka", {"samples": 10})


def drawn(ax: Axes) -> np.ndarray:
    return np.ma.filled(ax.images[0].get_array(), np.nan)


def labels(ax: Axes) -> tuple[list[str], list[str]]:
    return [t.get_text() for t in ax.get_xticklabels()], [t.get_text() for t in ax.get_yticklabels()]


def colourbar(ax: Axes) -> str:
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure.axes[-1].get_ylabel()


def test_layer_map_draws_values_names_and_limits(similarity: Similarity) -> None:
    ax = layer_map(similarity)
    np.testing.assert_array_equal(drawn(ax), similarity.values)
    assert labels(ax) == (["b1", "b2", "b3"], ["a1", "a2"])
    assert ax.images[0].get_clim() == (-0.1, 1.0)
    assert ax.images[0].origin == "lower"
    assert colourbar(ax) == "CKA"


def test_layer_map_uses_and_returns_the_given_axes(similarity: Similarity) -> None:
    _, ax = plt.subplots()
    assert layer_map(similarity, ax) is ax
    assert similarity.plot(ax) is ax
    assert difference_map(similarity, similarity, ax) is ax
    assert shared_eigenvectors(np.eye(4), np.eye(4), ax) is ax


def test_distances_are_coloured_to_their_largest(similarity: Similarity) -> None:
    ax = layer_map(replace(similarity, values=similarity.values + 0.1, distance=True, index="procrustes"))
    assert ax.images[0].get_clim() == (0.0, 1.1)
    assert colourbar(ax) == "procrustes"


def test_undefined_values_are_left_grey(similarity: Similarity) -> None:
    ax = layer_map(replace(similarity, values=np.full((2, 3), np.nan)))
    assert np.ma.count(ax.images[0].get_array()) == 0
    assert ax.images[0].get_clim() == (0.0, 1.0)


def test_chance_values_are_crossed_out(similarity: Similarity) -> None:
    p_values = np.array([[0.01, 0.5, 0.01], [0.01, 0.01, 0.06]])
    (crosses,) = layer_map(replace(similarity, p_values=p_values)).lines
    points = np.column_stack([np.asarray(crosses.get_xdata()), np.asarray(crosses.get_ydata())])
    assert {tuple(point) for point in points.tolist()} == {(1, 0), (2, 1)}


def test_difference_map_is_second_minus_first_with_symmetric_limits(similarity: Similarity) -> None:
    second = replace(similarity, values=similarity.values + np.array([[0.0, 0.1, 0.0], [-0.3, 0.0, 0.0]]))
    ax = difference_map(similarity, second)
    np.testing.assert_allclose(drawn(ax), second.values - similarity.values)
    np.testing.assert_allclose(ax.images[0].get_clim(), (-0.3, 0.3))
    assert difference_map(similarity, similarity).images[0].get_clim() == (-1.0, 1.0)


@pytest.mark.parametrize("change", [{"index": "cca"}, {"values": np.zeros((3, 3))}])
def test_difference_of_unlike_maps_is_refused(similarity: Similarity, change: dict) -> None:
    with pytest.raises(DataError, match="cannot subtract"):
        difference_map(similarity, replace(similarity, **change))


def test_training_map_draws_the_diagonals(similarity: Similarity) -> None:
    square = replace(similarity, values=similarity.values[:, :2], layers_b=("a1", "a2"))
    later = replace(square, values=np.array([[0.7, 0.0], [0.0, 0.8]]))
    ax = training_map([square, later], ["start", "end"])
    np.testing.assert_array_equal(drawn(ax), [[1.0, 0.7], [0.9, 0.8]])
    assert labels(ax) == (["start", "end"], ["a1", "a2"])
    assert labels(training_map([square, later]))[0] == ["0", "1"]
    assert training_map([replace(square, distance=True)]).images[0].get_clim() == (0.9, 1.0)


def test_training_map_refuses_what_does_not_fit(similarity: Similarity) -> None:
    square = replace(similarity, values=similarity.values[:, :2], layers_b=("a1", "a2"))
    with pytest.raises(DataError, match="no similarity"):
        training_map([])
    with pytest.raises(DataError, match="checkpoint 0 compares"):
        training_map([similarity])
    with pytest.raises(DataError, match="checkpoint 1 compares"):
        training_map([square, replace(square, index="cca")])
    with pytest.raises(DataError, match="3 steps for 1"):
        training_map([square], [1, 2, 3])


def test_shared_eigenvectors_against_numpy() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5)) * [5, 4, 3, 2, 1]
    y = np.concatenate([x[:, :2] * 2, rng.normal(size=(60, 4))], 1) + 7
    ax = shared_eigenvectors(x, y, components=4)
    grams = [(z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y)]
    (lx, u), (ly, v) = (np.linalg.eigh(gram) for gram in grams)
    cells = (u[:, ::-1][:, :4].T @ v[:, ::-1][:, :4]) ** 2
    np.testing.assert_allclose(drawn(ax), cells, atol=1e-10)
    assert labels(ax)[1][0] == f"1 ({lx[-1] / lx.sum():.0%})"
    assert labels(ax)[0][0] == f"1 ({ly[-1] / ly.sum():.0%})"


def test_weighted_cells_add_up_to_linear_cka() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=generator), torch.randn(40, 9, generator=generator)
    ax = shared_eigenvectors(x, y, components=100, weighted=True)
    assert drawn(ax).shape == (6, 9)
    assert drawn(ax).sum() == pytest.approx(cka(x, y), abs=1e-10)


def test_shared_eigenvectors_refuse_bad_input() -> None:
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match=r"y of shape .* does not vary"):
        shared_eigenvectors(x, torch.ones(5, 3))
    with pytest.raises(DataError, match="components is 0"):
        shared_eigenvectors(x, x, components=0)


def test_nearest_layers(similarity: Similarity) -> None:
    assert similarity.nearest_layers() == ("b1", "b2")
    assert replace(similarity, distance=True).nearest_layers() == ("b3", "b3")
    with pytest.raises(DataError, match="'a2' is undefined"):
        replace(similarity, values=np.array([[1.0, np.nan, 0.0], [np.nan] * 3])).nearest_layers()


def test_to_dict_holds_significance_where_asked_for(similarity: Similarity) -> None:
    assert "p_values" not in similarity.to_dict()
    content = replace(similarity, p_values=np.array([[0.5, np.nan, 1.0]] * 2), interval=np.zeros((2, 2, 3))).to_dict()
    assert content["p_values"][0] == [0.5, None, 1.0]
    assert np.shape(content["interval"]) == (2, 2, 3)

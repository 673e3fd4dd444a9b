"""Pictures of similarity: maps of layers, their difference, their course over training, shared eigenvectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..base.errors import DataError
from .arrays import as_pair
from .similarity_map import Similarity
from .spectrum import spectrum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from numpy.typing import ArrayLike


def layer_map(similarity: Similarity, ax: Axes | None = None) -> Axes:
    """Draw a heat map: layers of b along x, of a along y, the first ones at the lower left.

    Similarities are coloured from 0 to 1, or as far as the values reach beyond; distances from 0. An undefined value is
    left grey; where p-values are there, a cross marks what chance would give (p > 0.05).

    Args:
        similarity: From `compare` or `similarity`.
        ax: Where to draw. Default: a new figure, sized for the layer names.

    Returns:
        The axes.
    """
    values = similarity.values
    finite = values[np.isfinite(values)]
    low, high = (min(0.0, float(finite.min())), float(finite.max())) if finite.size else (0.0, 1.0)
    ax, image = _map(ax, values, similarity.layers_a, similarity.layers_b, "viridis")
    image.set_clim(low, high if similarity.distance else max(1.0, high))
    ax.figure.colorbar(image, ax=ax, label=similarity.label)
    if similarity.p_values is not None:
        rows, columns = np.nonzero(similarity.p_values > 0.05)
        ax.plot(columns, rows, "x", color="white", markeredgecolor="red", markersize=4)
    return ax


def difference_map(first: Similarity, second: Similarity, ax: Axes | None = None) -> Axes:
    """Draw the second map minus the first: red where the second is higher, blue where it is lower.

    Args:
        first: A map of similarities.
        second: One of the same shape and index; its layer names are drawn.
        ax: Where to draw. Default: a new figure.

    Returns:
        The axes.

    Raises:
        DataError: The maps differ in shape or index.
    """
    if first.values.shape != second.values.shape or first.index != second.index:
        raise DataError(
            f"cannot subtract {first.index} of shape {first.values.shape} from {second.index} of shape "
            f"{second.values.shape}; compare the same layers by the same index"
        )
    difference = second.values - first.values
    ax, image = _map(ax, difference, second.layers_a, second.layers_b, "RdBu_r")
    finite = np.abs(difference[np.isfinite(difference)])
    limit = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    image.set_clim(-limit, limit)
    ax.figure.colorbar(image, ax=ax, label=f"difference of {first.label}")
    return ax


def training_map(
    similarities: Sequence[Similarity], steps: Sequence[Any] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the similarity of each layer with itself at the end of training: checkpoints along x, layers along y.

    Args:
        similarities: One for each checkpoint, of its layers with the same layers of the final network.
        steps: What to write under each checkpoint. Default: 0, 1, 2, …
        ax: Where to draw. Default: a new figure.

    Returns:
        The axes.

    Raises:
        DataError: There is none; they differ in layers or index; a map is not square; or `steps` is of another length.
    """
    if not similarities:
        raise DataError("there is no similarity to draw; pass one for each checkpoint")
    first = similarities[0]
    for position, each in enumerate(similarities):
        same = (each.layers_a, each.layers_b, each.index) == (first.layers_a, first.layers_b, first.index)
        if not same or len(each.layers_a) != len(each.layers_b):
            raise DataError(
                f"checkpoint {position} compares {each.layers_a} with {each.layers_b} by {each.index}, the first "
                f"{first.layers_a} with {first.layers_b} by {first.index}; compare the same layers with each other"
            )
    steps = range(len(similarities)) if steps is None else steps
    if len(steps) != len(similarities):
        raise DataError(f"{len(steps)} steps for {len(similarities)} checkpoints; name each one")
    values = np.stack([each.values.diagonal() for each in similarities], 1)
    ax, image = _map(ax, values, first.layers_a, [str(step) for step in steps], "viridis")
    if not first.distance:
        image.set_clim(min(0.0, float(np.nanmin(values, initial=0.0))), 1.0)
    ax.set_xlabel("checkpoint")
    ax.set_ylabel("layer")
    ax.figure.colorbar(image, ax=ax, label=f"{first.label} with the final network")
    return ax


def shared_eigenvectors(
    x: Tensor | ArrayLike,
    y: Tensor | ArrayLike,
    ax: Axes | None = None,
    *,
    components: int = 20,
    weighted: bool = False,
) -> Axes:
    """Draw which principal components two representations share (Kornblith et al. 2019, Figure 8).

    Cell (i, j) is ⟨u_i, v_j⟩², u_i and v_j the eigenvectors of the centred Gram matrices of x and y: 1 where component
    j of y is component i of x, whatever units carry it. Linear CKA is the sum of these cells with weights λ_i λ_j.

    Args:
        x: Samples x units.
        y: Samples x units; the same samples.
        ax: Where to draw. Default: a new figure.
        components: How many of each, largest first; fewer where the rank is lower.
        weighted: Draw λ_i λ_j ⟨u_i, v_j⟩² / (‖λ_x‖ ‖λ_y‖) instead, the share of each cell in linear CKA; all cells of
            all components add up to it.

    Returns:
        The axes.

    Raises:
        DataError: Not two matrices of the same samples, a constant one, or no component asked for.
        NotFiniteError: One holds NaN or infinity.
    """
    if components < 1:
        raise DataError(f"components is {components}; draw at least one, 20 say")
    x, y = as_pair(x, y, "the map of shared eigenvectors")
    (u, spectrum_x), (v, spectrum_y) = _components(x, "x"), _components(y, "y")
    u, v = u[:, :components], v[:, :components]
    cells = (u.T @ v).square()
    if weighted:
        weights = torch.outer(spectrum_x[: u.shape[1]], spectrum_y[: v.shape[1]])
        cells = cells * weights / (spectrum_x.norm() * spectrum_y.norm())
    names_x, names_y = _shares(spectrum_x, u.shape[1]), _shares(spectrum_y, v.shape[1])
    ax, image = _map(ax, cells.cpu().numpy(), names_x, names_y, "magma")
    image.set_clim(0, None if weighted else 1)
    ax.set_xlabel("component of y (share of variance)")
    ax.set_ylabel("component of x (share of variance)")
    ax.figure.colorbar(image, ax=ax, label="share in linear CKA" if weighted else "squared cosine")
    return ax


def _components(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        found = spectrum(x)
    if not found.rank:
        raise DataError(f"{name} of shape {tuple(x.shape)} does not vary over the samples: it has no components")
    assert found.u is not None  # it is of samples, not of moments
    return found.u, found.s.square()


def _shares(spectrum: Tensor, count: int) -> list[str]:
    shares = spectrum[:count] / spectrum.sum()
    return [f"{i} ({share:.0%})" for i, share in enumerate(shares.tolist(), 1)]


def _map(
    ax: Axes | None, values: np.ndarray, rows: Sequence[str], columns: Sequence[str], colours: str
) -> tuple[Axes, AxesImage]:
    import matplotlib.pyplot as plt

    if ax is None:
        size = (2.5 + 0.25 * max(len(columns), 8), 1.5 + 0.25 * max(len(rows), 8))
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    ax.set_facecolor("lightgrey")  # where a value is NaN
    image = ax.imshow(values, origin="lower", aspect="auto", cmap=colours)
    ax.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    ax.set_yticks(range(len(rows)), rows, fontsize=8)
    ax.set_xlabel("layers of b")
    ax.set_ylabel("layers of a")
    return ax, image

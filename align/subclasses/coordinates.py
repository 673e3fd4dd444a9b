"""Where the samples of one class are clustered: their principal components, whitened or not, or a t-SNE of these."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...base.errors import DataError
from ...metrics.spectrum import spectrum

Projection = Literal["pca", "whiten", "tsne", "none"]

DIMENSIONS = {"pca": 10, "whiten": 15, "tsne": 50}
"""Principal components that are kept unless told otherwise.

Whitened, the purity of clusters is flat from 12 to 20 components and falls on either side: too few miss what tells
subclasses apart, too many are noise blown up. Measured on networks for pairs of digits and of clothes.
"""


def linear_coordinates(x: Tensor, project: Projection, dims: int | None) -> Tensor:
    """Give the coordinates of the samples of one class in a space of few dimensions.

    Args:
        x: Centred, (samples x units), float64.
        project: "none" keeps the units; "pca" and "tsne" take the first principal components; "whiten" divides each of
            them by its standard deviation.
        dims: How many components, at most as many as vary. Default: see `DIMENSIONS`.

    Returns:
        (samples x dims), with a mean variance of 1 over the coordinates.
    """
    if project == "none":
        return x * (x.shape[0] * x.shape[1]) ** 0.5 / x.norm()
    layer = spectrum(x)
    kept = layer.first(min(DIMENSIONS[project] if dims is None else dims, layer.significant))
    assert kept.u is not None
    scores = kept.u if project == "whiten" else kept.u * kept.s
    return _signed(scores) * (scores.numel() ** 0.5 / scores.norm())


def _signed(scores: Tensor) -> Tensor:
    """Fix the signs of components, which the factorisation leaves open: the largest entry is positive."""
    rows = scores.abs().argmax(0)
    return scores * torch.where(scores[rows, torch.arange(scores.shape[1], device=scores.device)] < 0, -1.0, 1.0)


def tsne(x: np.ndarray, perplexity: float, seed: int) -> np.ndarray:
    """Place samples in the plane by t-SNE (van der Maaten & Hinton 2008), from their first two components.

    Args:
        x: (samples x dims).
        perplexity: Effective number of neighbours, at most a third of the samples.
        seed: Of what is random.

    Returns:
        (samples x 2), centred, with a mean variance of 1.
    """
    from sklearn.manifold import TSNE

    if x.shape[1] < 2:  # of one dimension: its own order is the best place
        x = np.pad(x, ((0, 0), (0, 2 - x.shape[1])))
    perplexity = min(perplexity, max(1.0, (len(x) - 1) / 3))
    found = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(x).astype(np.float64)
    found -= found.mean(0)
    return found / np.sqrt(np.square(found).mean())


def check_projection(project: str, dims: int | None, perplexity: float) -> None:
    """Refuse what no class could be projected by.

    Raises:
        DataError: A number is too small, or goes with no projection.
    """
    if dims is not None and (isinstance(dims, bool) or not isinstance(dims, int) or dims < 1):
        raise DataError(f"dims is {dims!r}; expected a whole number of components, at least 1")
    if dims is not None and project == "none":
        raise DataError(f"dims={dims} was given with project='none', which keeps all units; take 'pca' or 'whiten'")
    if not perplexity >= 1:
        raise DataError(f"perplexity is {perplexity}; expected at least 1, 30 say")

"""Layerwise linear feature connectivity and its two conditions, on plain tensors (Zhou et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...base.errors import DataError, NotFiniteError


def feature_distance(between: Tensor, features_a: Tensor, features_b: Tensor, alpha: float = 0.5) -> float:
    """Measure how far the features of a network on the line are from the features on the line between two networks.

    The mean over samples of 1 - cos(f_alpha(x), (1 - alpha) f_a(x) + alpha f_b(x)), as in section 3 of Zhou, Yang,
    Yang, Yan and Hu, "Going Beyond Linear Mode Connectivity: The Layerwise Linear Feature Connectivity" (NeurIPS 2023):
    zero if and only if c f_alpha = (1 - alpha) f_a + alpha f_b with some c > 0 for each sample (their Definition 2,
    where alpha is the share of the first network). A sample whose features are all zero has distance 0 from another
    such sample, and 1 from any other.

    Args:
        between: Features of the network at `alpha`; (N, …), flattened per sample.
        features_a: Features of the first network on the same samples, of the same shape.
        features_b: Features of the second.
        alpha: The place on the line, 0 for the first network and 1 for the second.

    Returns:
        From 0 to 2.

    Raises:
        DataError: The shapes differ, or there is no sample.
        NotFiniteError: A value is NaN or infinite.

    >>> f_a, f_b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> feature_distance(torch.tensor([[5.0, 5.0]]), f_a, f_b)
    0.0
    >>> round(feature_distance(torch.tensor([[5.0, 0.0]]), f_a, f_b), 4)
    0.2929
    """
    _check_same_shape(between=between, features_a=features_a, features_b=features_b)
    return _mean(cosine_distances(between.flatten(1), mixed(features_a, features_b, alpha).flatten(1)))


def weak_additivity(
    before_a: Tensor, before_b: Tensor, alpha: float = 0.5, activation: Callable[[Tensor], Tensor] = torch.relu
) -> float:
    """Measure how far an activation is from being linear between what goes into it in two networks.

    The mean over samples of 1 - cos(σ((1 - alpha) h_a + alpha h_b), (1 - alpha) σ(h_a) + alpha σ(h_b)), after weak
    additivity for ReLU activations (Definition 3 of Zhou et al. 2023), which asks for equality at every alpha.

    Args:
        before_a: What goes into the activation in the first network; (N, …), flattened per sample.
        before_b: Likewise in the second, of the same shape.
        alpha: The place on the line.
        activation: σ, element by element; it is given tensors of its own.

    Returns:
        From 0 to 2; samples of zeros count as in `feature_distance`.

    Raises:
        DataError: The shapes differ, or there is no sample.
        NotFiniteError: A value is NaN or infinite.

    >>> weak_additivity(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, -1.0]]))  # no unit changes sign
    0.0
    >>> round(weak_additivity(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, -1.0]])), 4)  # (1, 0) and (1, 1/2)
    0.1056
    """
    _check_same_shape(before_a=before_a, before_b=before_b)
    inside, outside = additivity_sides(before_a, before_b, alpha, activation)
    return _mean(cosine_distances(inside.flatten(1), outside.flatten(1)))


def commutativity(weight_a: Tensor, weight_b: Tensor, inputs_a: Tensor, inputs_b: Tensor) -> float:
    """Measure whether the weights of two networks do the same to the features of either.

    1 - cos(vec(W_a H_a + W_b H_b), vec(W_a H_b + W_b H_a)) over all samples at once, after the commutativity property
    (Definition 4 of Zhou et al. 2023), which asks for equality; the two differ by (W_a - W_b)(H_a - H_b). Biases are
    left out, as in the paper: they are the same sum on both sides.

    Args:
        weight_a: Weights of a linear layer of the first network; (outputs, inputs).
        weight_b: Likewise of the second.
        inputs_a: What goes into the layer in the first network; (samples, inputs), the transpose of the paper's H.
        inputs_b: Likewise in the second.

    Returns:
        From 0 to 2.

    Raises:
        DataError: The shapes do not fit, or there is no sample.
        NotFiniteError: A value is NaN or infinite.

    >>> h_a, h_b = torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> commutativity(torch.eye(2), torch.eye(2), h_a, h_b)
    0.0
    >>> round(commutativity(torch.eye(2), -torch.eye(2), h_a, h_b), 6)
    2.0
    """
    _check_same_shape(weight_a=weight_a, weight_b=weight_b)
    _check_same_shape(inputs_a=inputs_a, inputs_b=inputs_b)
    if weight_a.ndim != 2 or inputs_a.ndim != 2 or weight_a.shape[1] != inputs_a.shape[1]:
        raise DataError(
            f"weights of shape {tuple(weight_a.shape)} beside inputs of shape {tuple(inputs_a.shape)}; expected "
            "(outputs, inputs) and (samples, inputs)"
        )
    overlap = Overlap()
    overlap.add(
        inputs_a @ weight_a.T + inputs_b @ weight_b.T, inputs_b @ weight_a.T + inputs_a @ weight_b.T, "the products"
    )
    return overlap.distance


def mixed(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Give (1 - alpha) a + alpha b, in float32 or better; exactly a where both are equal."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return torch.lerp(a.to(wide), b.to(wide), alpha)


def additivity_sides(
    before_a: Tensor, before_b: Tensor, alpha: float, activation: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Give the activation of the mean and the mean of the activations; the activation may work in place."""
    inside = activation(mixed(before_a, before_b, alpha))
    return inside, mixed(activation(before_a.clone()), activation(before_b.clone()), alpha)


def cosine_distances(x: Tensor, y: Tensor) -> Tensor:
    """Give 1 - cos between the rows of two matrices.

    As half the squared distance of the normalised rows, which loses no digits where the cosine is near one. Two rows
    of zeros have distance 0; a row of zeros and another row have distance 1.

    Args:
        x: (N, features).
        y: (N, features).

    Returns:
        (N,), from 0 to 2.

    >>> cosine_distances(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 3.0], [0.0, 0.0]]))
    tensor([1., 0.])
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    x, y = x.to(wide), y.to(wide)
    norm_x, norm_y = torch.linalg.vector_norm(x, dim=1), torch.linalg.vector_norm(y, dim=1)
    alive_x, alive_y = norm_x > 0, norm_y > 0
    x = x / norm_x.where(alive_x, 1)[:, None]
    y = y / norm_y.where(alive_y, 1)[:, None]
    distances = (x - y).square_().sum(1) / 2
    return torch.where(alive_x == alive_y, distances, torch.ones_like(distances))


@dataclass
class Overlap:
    """The cosine between two vectors that come in pieces; sums in float64.

    Attributes:
        difference: |x - y|².
        excess: |x|² - |y|², as the inner product of x - y and x + y.
        squares_x: |x|².
        squares_y: |y|².
        product: The inner product of x and y.
    """

    difference: float = 0.0
    excess: float = 0.0
    squares_x: float = 0.0
    squares_y: float = 0.0
    product: float = 0.0

    def add(self, x: Tensor, y: Tensor, name: str) -> None:
        """Add a piece of both; (N, …) each.

        Raises:
            NotFiniteError: A sum is NaN or infinite.
        """
        wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        x, y = x.flatten(1).to(wide), y.flatten(1).to(wide)
        step = x - y
        self.difference += total(step * step, name)
        self.excess += total(step * (x + y), name)
        self.squares_x += total(x * x, name)
        self.squares_y += total(y * y, name)
        self.product += total(x * y, name)

    @property
    def distance(self) -> float:
        """1 - cos(x, y), without loss of digits where it is small; 0 for two zero vectors, 1 if only one is zero."""
        norm_x, norm_y = math.sqrt(self.squares_x), math.sqrt(self.squares_y)
        if not norm_x or not norm_y:
            return float(norm_x != norm_y)
        gap = self.excess / (norm_x + norm_y)
        return max(0.0, (self.difference - gap * gap) / (2 * norm_x * norm_y))

    @property
    def coefficient(self) -> float:
        """The c for which |c x - y| is smallest; NaN if x is zero."""
        return self.product / self.squares_x if self.squares_x else math.nan

    @property
    def relative_error(self) -> float:
        """|x - y| / |y|; infinite if only y is zero, 0 if both are."""
        if not self.squares_y:
            return math.inf if self.difference else 0.0
        return math.sqrt(self.difference / self.squares_y)


def total(values: Tensor, name: str) -> float:
    """Add up the entries of (N, …): within a row in the precision of the values, over rows in float64.

    Raises:
        NotFiniteError: The sum is NaN or infinite.
    """
    found = float(values.flatten(1).sum(1).to("cpu", torch.float64).sum())
    if not math.isfinite(found):
        raise NotFiniteError(
            f"{name}: activations of shape {tuple(values.shape)} hold NaN or infinity, or overflow when squared; "
            "networks that diverged? Run them in float32 or float64"
        )
    return found


def _mean(distances: Tensor) -> float:
    found = float(distances.to("cpu", torch.float64).mean())
    if not math.isfinite(found):
        raise NotFiniteError(f"the features of {len(distances)} samples hold NaN or infinity, or overflow when squared")
    return found


def _check_same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    first = next(iter(shapes.values()))
    if any(shape != first for shape in shapes.values()):
        described = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise DataError(f"shapes differ: {described}; pass the same layer of both networks on the same samples")
    if len(first) < 2 or 0 in first:
        raise DataError(f"{next(iter(shapes))} has shape {first}; expected (N, …) with at least one sample and feature")

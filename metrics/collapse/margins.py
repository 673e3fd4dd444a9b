"""How far each direction is from the convex hull of all others: what generalised neural collapse maximises."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...base.errors import DataError

_CHECK_EVERY = 10


def one_vs_rest_margin(vectors: Tensor, *, tolerance: float = 1e-6, steps: int = 20_000) -> float:
    """Compute the least distance of one unit vector from the convex hull of all others.

    min_k min_a ‖u_k - Σ_{j≠k} a_j u_j‖ with u the vectors scaled to length 1 and a ≥ 0, Σ a = 1: the one-vs-rest
    distance that class means and classifiers maximise where there are more classes than a simplex has room for, the
    softmax codes of generalised neural collapse (Jiang et al. 2023). Up to K = units + 1 classes the
    best is the simplex, K / (K - 1); up to 2 · units it is at most 1; then it falls.

    All K problems are solved together, by accelerated projected gradients; a problem is left as soon as its
    Frank-Wolfe gap shows that another is smaller. Each step takes K² · (problems left) multiplications.

    Args:
        vectors: (K x units), K ≥ 2, none of length zero.
        tolerance: How far the squared distance may be from the least.
        steps: When to give up.

    Returns:
        The distance, between 0 and 2; NaN where a vector has length zero.

    Raises:
        DataError: It is no matrix of two rows or more, or `steps` were not enough.

    >>> round(one_vs_rest_margin(torch.eye(4) - 1 / 4), 4)
    1.3333
    """
    if vectors.ndim != 2 or len(vectors) < 2:
        raise DataError(f"vectors have shape {tuple(vectors.shape)}; expected at least two of them: classes x units")
    vectors = vectors.detach().to(torch.float64)
    lengths = torch.linalg.norm(vectors, dim=1, keepdim=True)
    if not bool((lengths > 0).all()):
        return math.nan
    units = vectors / lengths
    return math.sqrt(max(_least(units @ units.T, tolerance, steps), 0.0))


def _least(gram: Tensor, tolerance: float, steps: int) -> float:
    """Minimise ‖u_k - Σ a_j u_j‖² over all k and a."""
    count = len(gram)
    rate = 1 / float(torch.linalg.eigvalsh(gram)[-1])
    index = torch.arange(count, device=gram.device)
    a = _on_simplex(torch.full_like(gram, 1.0 / (count - 1)), index)
    momentum, before = a.clone(), torch.ones(count, 1, dtype=gram.dtype, device=gram.device)
    for step in range(1, steps + 1):
        moved = _on_simplex(momentum - rate * (momentum @ gram - gram[index]), index)
        # Restarted where the momentum points uphill (O'Donoghue & Candès 2015).
        uphill = ((momentum - moved) * (moved - a)).sum(1, keepdim=True) > 0
        after = torch.where(uphill, 1.0, (1 + (1 + 4 * before.square()).sqrt()) / 2)
        momentum = moved + torch.where(uphill, 0.0, (before - 1) / after) * (moved - a)
        a, before = moved, after
        if step % _CHECK_EVERY == 0:
            values, gaps = _bounds(gram, a, index)
            left = values - 2 * gaps <= values.min()
            # Where the smallest is known well enough, none that is left can be smaller by more than that.
            if bool((2 * gaps[left] <= tolerance).all()):
                return float(values.min())
            a, momentum, before, index = a[left], momentum[left], before[left], index[left]
    raise DataError(f"the one-vs-rest margin of {count} classes is not found in {steps} steps; allow more steps")


def _bounds(gram: Tensor, a: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Give squared distances, and Frank-Wolfe gaps: half of what they can fall by, at most."""
    product = a @ gram
    values = gram.diagonal()[index] - 2 * (a * gram[index]).sum(1) + (a * product).sum(1)
    slope = product - gram[index]
    reachable = slope.scatter(1, index[:, None], torch.inf)
    return values, ((a * slope).sum(1) - reachable.amin(1)).clamp(min=0)


def _on_simplex(rows: Tensor, index: Tensor) -> Tensor:
    """Project each row onto a ≥ 0, Σ a = 1, a_k = 0 for its own class (Held, Wolfe & Crowder 1974)."""
    rows = rows.scatter(1, index[:, None], -torch.inf)
    ordered = rows.sort(1, descending=True).values[:, :-1]  # without its own class
    excess = (ordered.cumsum(1) - 1) / torch.arange(1, ordered.shape[1] + 1, dtype=rows.dtype, device=rows.device)
    last = (ordered > excess).sum(1, keepdim=True) - 1
    return (rows - excess.gather(1, last)).clamp(min=0)

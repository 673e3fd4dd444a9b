"""Activation matching: by the correlation of what units do on data (Li et al. 2015; Ainsworth et al. 2023, §3.1)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...base.batches import Batch, model_device
from ...base.progress import progress as bar
from ...base.running import evaluating
from ...metrics import Moments, capture
from ..permutation import Permutation
from ..symmetry import Point, Symmetry
from ..terms import Piece, pieces
from .problem import Family, Pair, Similarities, families, front, pairs, weight_similarities


@dataclass(frozen=True)
class View:
    """One look at a family's units: a point of the network, and which dimensions of its axis are the units."""

    key: str
    point: Point
    piece: Piece
    dims: tuple[int, ...]
    inner: str | None

    def samples(self, activation: Tensor) -> Tensor:
        """Cut the units out of an activation: (everything else, units)."""
        flat = activation.movedim(self.point.axis, -1).reshape(-1, activation.shape[self.point.axis])
        if self.piece.positions[0] is not None:
            flat = flat[:, self.piece.positions[0].to(flat.device)]
        flat = flat.reshape(-1, *(dim.size for dim in self.piece.dims))
        ends = range(flat.ndim - len(self.dims), flat.ndim)
        units = 1
        for dim in self.dims:
            units *= self.piece.dims[dim].size
        return flat.movedim([dim + 1 for dim in self.dims], list(ends)).reshape(-1, units)


@dataclass(frozen=True)
class Correlated:
    """Result of activation matching.

    Attributes:
        permutation: Of the second network; the identity for groups in `unseen`.
        objective: Sum of the correlations of matched units, over all points where they were seen.
        scores: Per group the mean correlation of each unit with its match.
        samples: How many samples (positions included) the first point had.
        unseen: Groups of which no activation shows the units.
    """

    permutation: Permutation
    objective: float
    scores: dict[str, Tensor]
    samples: int
    unseen: tuple[str, ...] = field(default=())


def views(symmetry: Symmetry) -> dict[str, list[View]]:
    """Find, for every family of groups, where its units can be seen; keyed by the family's first group."""
    found: dict[str, list[View]] = {family.group.name: [] for family in families(symmetry)}
    for family in families(symmetry):
        if family.group.within:
            continue  # its order differs with the position of several others: no activation shows it alone
        for point in symmetry.points:
            for part, piece in enumerate(pieces([point.term])):
                for at, dim in enumerate(piece.dims):
                    dims, inner = front(piece, at, family)
                    others = [d for i, d in enumerate(piece.dims) if i not in dims]
                    # beside an order that is not yet known, samples of the two networks do not correspond
                    if dim.group == family.group.name and not any(d.group for d in others):
                        key = f"{family.group.name} at {point.side} of {point.layer}, part {part}.{at}"
                        found[family.group.name].append(View(key, point, piece, tuple(dims), inner))
    return found


def activation_matching(
    symmetry: Symmetry,
    model_a: nn.Module,
    model_b: nn.Module,
    data: Iterable[Batch],
    *,
    product_dtype: torch.dtype = torch.float32,
    progress: bool | None = None,
) -> Correlated:
    """Find the permutation of b whose units correlate best with those of a, in one pass over the data.

    The units of a group are looked at where they enter the modules that consume them, so after the nonlinearity;
    where there are several such places, as along a residual stream, the correlations are added. Positions and tokens
    count as samples. Units that never fire on the data are told apart by their weights.

    Args:
        symmetry: Of both networks.
        model_a: The reference; it runs in evaluation mode.
        model_b: The network to be permuted.
        data: Batches.
        product_dtype: Precision of the products of centred activations; sums are in float64.
        progress: Show a bar; None: on a terminal.
    """
    seen = views(symmetry)
    looks = [view for found in seen.values() for view in found]
    moments = _correlate(looks, model_a, model_b, data, product_dtype, progress)
    weights = pairs(symmetry, dict(model_a.named_parameters()), dict(model_b.named_parameters()))
    indices = dict(symmetry.identity().indices)
    scores: dict[str, Tensor] = {}
    objective = 0.0
    for family in families(symmetry):
        solved = _solve(family, seen[family.group.name], moments, weights)
        indices.update(solved.indices)
        scores.update(solved.scores)
        objective += solved.objective
    samples = moments.count(f"a:{looks[0].key}") if looks else 0
    unseen = tuple(group.name for group in symmetry.groups if group.name not in scores)
    return Correlated(Permutation(symmetry, indices), objective, scores, samples, unseen)


def _correlate(
    looks: list[View],
    model_a: nn.Module,
    model_b: nn.Module,
    data: Iterable[Batch],
    product_dtype: torch.dtype,
    progress: bool | None,
) -> Moments:
    moments = Moments([(f"a:{view.key}", f"b:{view.key}") for view in looks], product_dtype=product_dtype)
    if not looks:
        return moments
    layers = {
        side: list(dict.fromkeys(v.point.module for v in looks if v.point.side == side)) for side in ("input", "output")
    }
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model_a))
        stack.enter_context(evaluating(model_b))
        captured = {
            (label, side): stack.enter_context(capture(model, names, inputs=side == "input"))
            for label, model in (("a", model_a), ("b", model_b))
            for side, names in layers.items()
            if names
        }
        devices = model_device(model_a), model_device(model_b)
        for batch in bar(data, "matching activations", show=progress):
            batch.to(devices[0]).call(model_a)
            batch.to(devices[1]).call(model_b)
            moments.update(
                {
                    f"{label}:{view.key}": view.samples(captured[label, view.point.side][view.point.layer]).to(
                        devices[0]
                    )
                    for view in looks
                    for label in ("a", "b")
                }
            )
    return moments


@dataclass(frozen=True)
class _Solved:
    indices: dict[str, Tensor]
    scores: dict[str, Tensor]
    objective: float


def _solve(family: Family, looks: list[View], moments: Moments, weights: list[Pair]) -> _Solved:
    group = family.group
    total = Similarities.zeros(family)
    count = dict.fromkeys(family.names, 0)
    silent = False
    for view in looks:
        correlation = moments.correlation(f"a:{view.key}", f"b:{view.key}")
        silent |= bool(correlation.isnan().any())
        total.add(view.inner, correlation.nan_to_num_(0.0))  # a unit that never changes correlates with nothing
        count[view.inner or group.name] += 1
    if not any(count.values()) or any(not count[name] for name in total.inner):
        return _Solved({}, {}, 0.0)
    chosen = (_with_silent_units(total, family, weights) if silent else total).solve(family)
    matched = chosen[group.name]
    blocks = torch.arange(group.size)
    scores, objective = {}, 0.0
    value = total.outer[blocks, matched]
    for name, similarity in total.inner.items():
        units = torch.arange(similarity.shape[1])
        values = similarity[blocks[:, None], units, matched[:, None], chosen[name]]
        scores[name] = values.flatten() / count[name]
        value = value + values.sum(1)
    objective = float(value.sum())
    scores[group.name] = value / (count[group.name] + sum(count[g.name] * g.size for g in family.inner))
    return _Solved(chosen, scores, objective)


def _with_silent_units(total: Similarities, family: Family, weights: list[Pair]) -> Similarities:
    """Add the similarity of the weights' profiles, too small to count where there is a correlation."""
    ties = weight_similarities(weights, family, profiles=True)
    for correlation, similarity in ((total.outer, ties.outer), *((total.inner[k], ties.inner[k]) for k in ties.inner)):
        largest = torch.maximum(similarity.max(), -similarity.min())
        similarity *= 1e-6 / largest.clamp_min(1e-300)
        similarity += correlation
    return ties

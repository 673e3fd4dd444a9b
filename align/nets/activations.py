"""Activation matching: by what units do on data (Li et al. 2015; Ainsworth et al. 2023, §3.1)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ...base.batches import Batch
from ...base.errors import DataError, nearest
from ...metrics import Moments
from ..permutation import Permutation
from ..symmetry import Symmetry
from .problem import Family, Pair, Similarities, families, pairs, weight_similarities
from .signals import record, similarity_of
from .views import View, views

SIMILARITIES = ("correlation", "covariance", "product")


@dataclass(frozen=True)
class Correlated:
    """Result of activation matching.

    Attributes:
        permutation: Of the second network; the identity for groups in `unseen`.
        objective: Sum of the similarities of matched units, over all points where they were seen.
        scores: Per group the mean correlation of each unit with its match, whatever the similarity.
        samples: How many samples (positions included) the first point had.
        unseen: Groups of which no activation shows the units.
    """

    permutation: Permutation
    objective: float
    scores: dict[str, Tensor]
    samples: int
    unseen: tuple[str, ...] = field(default=())


def activation_matching(
    symmetry: Symmetry,
    model_a: nn.Module,
    model_b: nn.Module,
    data: Iterable[Batch],
    *,
    similarity: str = "correlation",
    product_dtype: torch.dtype = torch.float32,
    progress: bool | None = None,
) -> Correlated:
    """Find the permutation of b whose units do what those of a do, in one pass over the data.

    The units of a group are looked at where they enter the modules that consume them, so after the nonlinearity;
    where there are several such places, as along a residual stream, the similarities are added. Positions and tokens
    count as samples. Units that never vary on the data are told apart by their weights. See `views` for where units are
    seen that share an axis with others.

    Args:
        symmetry: Of both networks.
        model_a: The reference; it runs in evaluation mode.
        model_b: The network to be permuted.
        data: Batches.
        similarity: What is added up over matched units.

            "correlation" (Li et al. 2015): every unit counts alike, however large its activations are.

            "covariance": the same without the division by both standard deviations, so that units that vary much
            count more. It is the best least-squares fit of centred activations.

            "product": the mean product of activations that are not centred. Its best assignment minimises
            Σ |z_a - P z_b|², the objective of Ainsworth et al. (2023, §3.1).
        product_dtype: Precision of the products of centred activations; sums are in float64.
        progress: Show a bar; None: on a terminal.

    Returns:
        The permutation, with the correlation of each unit with its match.

    Raises:
        DataError: There is no such similarity.
        NotFiniteError: An activation holds NaN or infinity.

    >>> from isthmus import symmetry
    >>> _ = torch.manual_seed(0)
    >>> a, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(20, 4)
    >>> drawn = symmetry(a, x).random(torch.Generator().manual_seed(1))
    >>> activation_matching(drawn.symmetry, a, drawn.apply(a), [Batch((x,))]).permutation == drawn.inverse()
    True
    """
    if similarity not in SIMILARITIES:
        raise DataError(f"unknown similarity {similarity!r} of activations{nearest(similarity, SIMILARITIES)}")
    seen = views(symmetry, model_a)
    looks = [view for found in seen.values() for view in found]
    signals = record(looks, model_a, model_b, data, product_dtype=product_dtype, progress=progress)
    weights = pairs(symmetry, dict(model_a.named_parameters()), dict(model_b.named_parameters()))
    indices = dict(symmetry.identity().indices)
    scores: dict[str, Tensor] = {}
    objective = 0.0
    for family in families(symmetry):
        found = sighted(family, seen[family.group.name])
        if found is None:
            continue
        evidence = Evidence.gather(found, seen[family.group.name], signals.forward, similarity)
        step = evidence.with_ties(weights).solve(found)
        indices.update(step)
        scores.update(evidence.scores(step))
        objective += evidence.value(step)
    samples = signals.forward.count(f"a:{looks[0].key}") if looks else 0
    return Correlated(Permutation(symmetry, indices), objective, scores, samples, not_in(symmetry, scores))


def sighted(family: Family, looks: Sequence[View]) -> Family | None:
    """Give the part of a family that is seen; None if its group is not."""
    names = {view.name for view in looks}
    return replace(family, inner=tuple(group for group in family.inner if group.name in names)) if names else None


def not_in(symmetry: Symmetry, found: Iterable[str]) -> tuple[str, ...]:
    """Name the groups that are not among those found."""
    names = set(found)
    return tuple(group.name for group in symmetry.groups if group.name not in names)


@dataclass(frozen=True)
class Evidence:
    """What activations say of a family's units.

    Attributes:
        family: As far as it is seen.
        total: Sum of the similarities over all views; zero for units that never vary.
        correlation: The same of correlations.
        count: Number of views of each group.
        silent: Whether a unit never varied in one of the views.
    """

    family: Family
    total: Similarities
    correlation: Similarities
    count: dict[str, int]
    silent: bool

    @classmethod
    def gather(cls, family: Family, looks: Sequence[View], moments: Moments, kind: str = "correlation") -> Evidence:
        """Read it off the moments."""
        correlation = Similarities.zeros(family)
        total = correlation if kind == "correlation" else Similarities.zeros(family)
        count = dict.fromkeys(family.names, 0)
        silent = False
        for view in looks:
            found = similarity_of(moments, view, "correlation")
            silent |= bool(found.isnan().any())
            correlation.add(view.inner, found.nan_to_num_(0.0))  # a unit that never varies correlates with nothing
            if kind != "correlation":
                total.add(view.inner, similarity_of(moments, view, kind))
            count[view.name] += 1
        return cls(family, total, correlation, count, silent)

    def with_ties(self, weights: Iterable[Pair]) -> Similarities:
        """Where units are silent, add the similarity of the weights' profiles, too small to count beside any other."""
        if not self.silent:
            return self.total
        ties = weight_similarities(weights, self.family, profiles=True)
        for mine, tie in zip(matrices(self.total), matrices(ties), strict=True):
            scale = float(mine.abs().max()) or 1.0
            tie *= 1e-6 * scale / tie.abs().max().clamp_min(1e-300)
            tie += mine
        return ties

    def value(self, step: dict[str, Tensor]) -> float:
        """Give the sum of the similarities of matched units."""
        outer, inner = picked(self.total, self.family, step)
        return float(outer.sum()) + sum(float(values.sum()) for values in inner.values())

    def scores(self, step: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give the mean correlation of each unit with its match; that of a block over all that is seen of it."""
        value, inner = picked(self.correlation, self.family, step)
        scores = {name: values.flatten() / self.count[name] for name, values in inner.items()}
        seen = self.count[self.family.group.name]
        for group in self.family.inner:
            value = value + inner[group.name].sum(1)
            seen += self.count[group.name] * group.size
        return {self.family.group.name: value / seen, **scores}


def picked(total: Similarities, family: Family, step: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Give the similarity of each unit with its match: (G,), and per group inside the blocks (G, m)."""
    blocks, matched = torch.arange(family.group.size), step[family.group.name]
    inner = {
        name: similarity[blocks[:, None], torch.arange(similarity.shape[1]), matched[:, None], step[name]]
        for name, similarity in total.inner.items()
    }
    return total.outer[blocks, matched], inner


def matrices(total: Similarities) -> list[Tensor]:
    """List the matrices of similarities, the blocks' first."""
    return [total.outer, *total.inner.values()]

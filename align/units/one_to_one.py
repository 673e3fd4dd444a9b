"""Which unit of one layer is which unit of another: one-to-one and semi-matching."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...base.errors import DataError
from ...base.files import PathLike
from ...metrics.moments import Moments
from ...metrics.state_file import read_state, write_state
from .between import Between, between

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import ArrayLike

Kind = Literal["bipartite", "semi", "soft"]

_FORMAT = "isthmus.unit_matching.1"
_KINDS = ("bipartite", "semi", "soft")
_ROUNDING = 1e-9


@dataclass(frozen=True, eq=False, repr=False)
class UnitMatching:
    """The partner in a layer b of each unit of a layer a, where it has one.

    Attributes:
        kind: "bipartite", each unit has one partner at most (`bipartite_matching`); "semi", the best partner, repeats
            allowed (`semi_matching`); "soft", the partner that gets most of the unit's mass in an optimal transport,
            repeats allowed (`SoftMatch.hard`).
        partner: (units of a,) place in b, int64 on the CPU; -1 for a unit without partner.
        similarity: (units of a,) similarity with the partner, float64 on the CPU; NaN without partner.
        shape: Numbers of all units of a and of b.
        constant_a: Units of a that do not vary. They have no partner.
        constant_b: Units of b that do not vary. They are nobody's partner.

    Raises:
        DataError: The parts do not fit each other.
    """

    kind: Kind
    partner: Tensor
    similarity: Tensor
    shape: tuple[int, int]
    constant_a: tuple[int, ...] = ()
    constant_b: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        p, q = self.shape
        if self.kind not in _KINDS:
            raise DataError(f"kind is {self.kind!r}; expected one of {', '.join(_KINDS)}")
        shapes = tuple(self.partner.shape), tuple(self.similarity.shape)
        if shapes != ((p,), (p,)) or self.partner.dtype != torch.int64:
            raise DataError(f"partner and similarity have shapes {shapes}; expected ({p},) and int64 partners")
        chosen = self.partner[self._matched]
        if not bool(((self.partner >= -1) & (self.partner < q)).all()):
            raise DataError(f"partner holds places outside -1 … {q - 1}")
        if self.kind == "bipartite" and len(chosen.unique()) < len(chosen):
            raise DataError("partner holds a unit of b twice; a bipartite matching is one-to-one")

    def __repr__(self) -> str:
        p, q = self.shape
        return f"UnitMatching({self.kind}: {len(self._matched)} of {p} units to {q}, mean similarity {self.mean:.3g})"

    @property
    def _matched(self) -> Tensor:
        return (self.partner >= 0).nonzero().flatten()

    @property
    def unmatched_a(self) -> tuple[int, ...]:
        """Units of a that vary but have no partner."""
        return _without(self.shape[0], self._matched, self.constant_a)

    @property
    def unmatched_b(self) -> tuple[int, ...]:
        """Units of b that vary but are nobody's partner."""
        return _without(self.shape[1], self.partner[self._matched], self.constant_b)

    @property
    def pairs(self) -> Tensor:
        """Pairs of partners, (pairs, 2) int64: unit of a, unit of b; the most similar first."""
        matched = self._matched
        matched = matched[self.similarity[matched].argsort(descending=True, stable=True)]
        return torch.stack([matched, self.partner[matched]], 1)

    @property
    def mean(self) -> float:
        """Mean similarity over the pairs; NaN without any."""
        return float(self.similarity[self._matched].mean())

    @property
    def total(self) -> float:
        """Sum of similarities over the pairs."""
        return float(self.similarity[self._matched].sum())

    def on(self, similarity: Moments | Tensor | ArrayLike, a: str | None = None, b: str | None = None) -> Tensor:
        """Read the similarity of the same pairs in other data, as on samples that were held out of the matching.

        Matching picks what is large in its own data, chance included: similarities there are biased upwards.

        Args:
            similarity: (units of a x units of b), or `Moments`, see `between`.
            a: Name of the first layer in the moments.
            b: Name of the second layer in the moments.

        Returns:
            (units of a,) in float64 on the CPU; NaN without partner, and where one of the pair does not vary.

        Raises:
            DataError: Another number of units, or as `between`.
            LayerNotFoundError: As `between`.
            NotFiniteError: As `between`.
        """
        found = between(similarity, a, b)
        if found.shape != self.shape:
            raise DataError(f"the similarities are of {found.shape} units, this matching of {self.shape}")
        matched = self._matched
        rows = _places(found.units_a, self.shape[0])[matched]
        columns = _places(found.units_b, self.shape[1])[self.partner[matched]]
        vary = (rows >= 0) & (columns >= 0)
        values = torch.full_like(self.similarity, math.nan)
        values[matched[vary]] = found.values[rows[vary], columns[vary]].cpu()
        return values

    def agreement(self, other: UnitMatching) -> float:
        """Give the share of the units matched here that have the same partner in another matching of these layers.

        Of a bipartite and a semi-matching this is their overlap (Li et al. 2015, section 3).

        Returns:
            From 0 to 1; NaN if no unit is matched here.

        Raises:
            DataError: The other matching is of other numbers of units.
        """
        _check_shapes(self, other)
        matched = self._matched
        return float((self.partner == other.partner)[matched].to(torch.float64).mean())

    def inverse(self) -> UnitMatching:
        """Give the same pairs as a matching of b with a.

        Raises:
            DataError: It is not bipartite: a unit of b may have several partners.
        """
        if self.kind != "bipartite":
            raise DataError(f"a {self.kind} matching has no inverse, partners repeat; match b with a instead")
        matched = self._matched
        p, q = self.shape
        partner = torch.full((q,), -1)
        similarity = self.similarity.new_full((q,), math.nan)
        partner[self.partner[matched]] = matched
        similarity[self.partner[matched]] = self.similarity[matched]
        return UnitMatching(self.kind, partner, similarity, (q, p), self.constant_b, self.constant_a)

    def matrix(self) -> Tensor:
        """Give the pairs as a matrix, (units of a x units of b) of bool."""
        matrix = torch.zeros(self.shape, dtype=torch.bool)
        matrix[self._matched, self.partner[self._matched]] = True
        return matrix

    def to_dict(self) -> dict[str, Any]:
        """Give all of it in lists and numbers that JSON can hold; None for NaN, -1 for no partner."""
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "partner": self.partner.tolist(),
            "similarity": [None if math.isnan(value) else value for value in self.similarity.tolist()],
            "constant_a": list(self.constant_a),
            "constant_b": list(self.constant_b),
            "unmatched_a": list(self.unmatched_a),
            "unmatched_b": list(self.unmatched_b),
            "mean": None if math.isnan(self.mean) else self.mean,
            "total": self.total,
        }

    def save(self, path: PathLike) -> Path:
        """Write to a safetensors file, whole or not at all.

        Raises:
            OutputError: The file cannot be written.
        """
        content = {name: getattr(self, name) for name in ("kind", "shape", "constant_a", "constant_b")}
        return write_state(path, _FORMAT, content, {"partner": self.partner, "similarity": self.similarity})

    @classmethod
    def load(cls, path: PathLike) -> UnitMatching:
        """Read what `save` wrote.

        Raises:
            CheckpointError: The file is missing, damaged, or holds something else.
        """
        return read_state(path, _FORMAT, cls._from_file)

    @classmethod
    def _from_file(cls, content: Any, tensors: dict[str, Tensor]) -> UnitMatching:
        p, q = content["shape"]
        constant = (tuple(content[name]) for name in ("constant_a", "constant_b"))
        return cls(content["kind"], tensors["partner"], tensors["similarity"], (p, q), *constant)


def bipartite_matching(
    similarity: Moments | Tensor | ArrayLike,
    a: str | None = None,
    b: str | None = None,
    *,
    minimum: float | None = None,
) -> UnitMatching:
    """Match units one-to-one so that the sum of their similarities is largest (Li et al. 2015, section 3).

    max Σ_i s(i, m(i)) over one-to-one m: maximum-weight bipartite matching, exact (Kuhn 1955; Crouse 2016, by scipy in
    float64 on the CPU). Of p and q units that vary, min(p, q) pairs are made. Of a rectangle the units left alone are
    those whose pairs would add least to the sum.

    Args:
        similarity: (units of a x units of b), any number of each, NaN for units that do not vary. Or `Moments`, whose
            correlations are taken.
        a: Name of the first layer in the moments; None for a matrix.
        b: Name of the second layer in the moments; None for a matrix.
        minimum: A pair must be above it, in units of the similarity: then Σ (s(i, m(i)) - minimum) is largest among
            all matchings that may leave units alone. Other pairs may come out than without it. None: no such limit.

    Returns:
        The matching, of a to b.

    Raises:
        DataError: No floating-point matrix, no unit varies, layers are named wrongly, or `minimum` is not finite.
        LayerNotFoundError: The moments lack a layer or the pair.
        NotFiniteError: The similarity holds infinity, or NaN outside whole rows and columns.

    >>> similarity = torch.tensor([[0.9, 0.8, 0.0], [0.7, 0.1, 0.2]])
    >>> bipartite_matching(similarity).partner, bipartite_matching(similarity, minimum=0.75).partner
    (tensor([1, 0]), tensor([ 0, -1]))
    """
    from scipy.optimize import linear_sum_assignment

    check_minimum(minimum)
    found = between(similarity, a, b)
    weights = found.values
    if minimum is not None:
        # With w = max(s - minimum, 0) any matching extends to min(p, q) pairs at no loss, and of min(p, q) pairs those
        # without weight can be left out at no loss: both problems have the same optimum.
        weights = (weights - minimum).clamp_(min=0)
    rows, columns = map(torch.from_numpy, linear_sum_assignment(weights.cpu().numpy(), maximize=True))
    if minimum is not None:
        gain = weights[rows, columns].cpu() > 0
        rows, columns = rows[gain], columns[gain]
    return matching_of("bipartite", found, rows, columns)


def semi_matching(
    similarity: Moments | Tensor | ArrayLike,
    a: str | None = None,
    b: str | None = None,
    *,
    minimum: float | None = None,
) -> UnitMatching:
    """Give each unit of a the unit of b that is most similar to it, repeats allowed (Li et al. 2015, section 3).

    It is not symmetric: exchange a and b for the best partners of the units of b.

    Args:
        similarity: (units of a x units of b), NaN for units that do not vary. Or `Moments`, whose correlations are
            taken.
        a: Name of the first layer in the moments; None for a matrix.
        b: Name of the second layer in the moments; None for a matrix.
        minimum: A pair must be above it, in units of the similarity. None: no such limit.

    Returns:
        The matching, of a to b; of equally similar units the first.

    Raises:
        DataError: No floating-point matrix, no unit varies, layers are named wrongly, or `minimum` is not finite.
        LayerNotFoundError: The moments lack a layer or the pair.
        NotFiniteError: The similarity holds infinity, or NaN outside whole rows and columns.

    >>> semi_matching(torch.tensor([[0.9, 0.8, 0.0], [0.7, 0.1, 0.2]])).partner
    tensor([0, 0])
    """
    check_minimum(minimum)
    found = between(similarity, a, b)
    best, columns = (part.cpu() for part in found.values.max(1))
    rows = torch.arange(len(best))
    if minimum is not None:
        rows, columns = rows[best > minimum], columns[best > minimum]
    return matching_of("semi", found, rows, columns)


def semi_matching_gain(bipartite: UnitMatching, semi: UnitMatching) -> Tensor:
    """Compute how much more similar the best partner of each unit is than its partner one-to-one.

    The two curves of Li et al. (2015), figure 3, differ by this; a large gain points at units of b that several units
    of a share, or at one that is split among several.

    Args:
        bipartite: From `bipartite_matching`.
        semi: From `semi_matching`, of the same similarities.

    Returns:
        (units of a,) in float64, not negative; NaN for a unit that has no partner in one of the two matchings, for
        which there is nothing to compare: those that the one-to-one matching leaves alone, and those that do not vary.

    Raises:
        DataError: They are not of these kinds and the same units, or a gain is negative, as it can only be between
            matchings of different similarities.

    >>> similarity = torch.tensor([[0.9, 0.8, 0.0], [0.7, 0.1, 0.2]], dtype=torch.float64)
    >>> semi_matching_gain(bipartite_matching(similarity), semi_matching(similarity))
    tensor([0.1000, 0.0000], dtype=torch.float64)
    """
    if (bipartite.kind, semi.kind) != ("bipartite", "semi"):
        raise DataError(f"expected a bipartite and a semi-matching; these are {bipartite.kind} and {semi.kind}")
    _check_shapes(bipartite, semi)
    gain = semi.similarity - bipartite.similarity
    scale = semi.similarity.nan_to_num(0).abs().max()
    if bool((gain < -_ROUNDING * scale).any()):
        raise DataError(f"the gain of unit {int(gain.nan_to_num(0).argmin())} is negative: match the same similarities")
    return gain.clamp_(min=0)


def matching_of(kind: Kind, found: Between, rows: Tensor, columns: Tensor) -> UnitMatching:
    """Make a matching of all units from pairs of those that vary.

    Args:
        kind: As of `UnitMatching`.
        found: The similarities.
        rows: (pairs,) rows of `found.values`, each once, on the CPU.
        columns: (pairs,) their columns.
    """
    partner = torch.full((found.shape[0],), -1)
    similarity = torch.full((found.shape[0],), math.nan, dtype=torch.float64)
    partner[found.units_a[rows]] = found.units_b[columns]
    similarity[found.units_a[rows]] = found.values[rows, columns].cpu()
    return UnitMatching(kind, partner, similarity, found.shape, found.constant_a, found.constant_b)


def check_minimum(minimum: float | None) -> None:
    """Refuse a minimum that is not finite.

    Raises:
        DataError: It is NaN or infinite.
    """
    if minimum is not None and not math.isfinite(minimum):
        raise DataError(f"minimum is {minimum}; expected a finite number, or None for no limit")


def _check_shapes(one: UnitMatching, other: UnitMatching) -> None:
    if one.shape != other.shape:
        raise DataError(f"the matchings are of {one.shape} and of {other.shape} units; expected the same layers")


def _places(units: Tensor, count: int) -> Tensor:
    places = torch.full((count,), -1)
    places[units] = torch.arange(len(units))
    return places


def _without(count: int, matched: Tensor, constant: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(range(count)).difference(matched.tolist(), constant)))

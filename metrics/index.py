"""What every index of similarity is made of: one preparation per layer, one score per pair of layers."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .arrays import as_pair

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .moments import Moments


@dataclass(frozen=True)
class Invariances:
    """Changes of one representation, x or y, that leave an index as it is.

    Attributes:
        orthogonal: x → x Q with an orthogonal matrix Q (rotations and reflections of the space of units).
        scaling: x → c x with c > 0.
        linear: x → x A with an invertible matrix A; implies the first two.
        permutation: x → x P with a permutation of the units.
        translation: x → x + 1 bᵀ, another mean for each unit.
    """

    orthogonal: bool
    scaling: bool
    linear: bool
    permutation: bool
    translation: bool


class Index(ABC):
    """A similarity (or distance) of two representations of the same samples.

    What depends on one layer alone is prepared once; each pair of layers then costs one score. So all pairs of layers,
    a permutation null and a jackknife share the preparation. Subclasses are frozen dataclasses: their fields are the
    parameters of the index.
    """

    name: ClassVar[str]
    invariances: ClassVar[Invariances] | Invariances
    distance: ClassVar[bool] = False
    """A distance is 0 for equal representations, a similarity is largest."""
    symmetric: ClassVar[bool] = True
    """Whether score(x, y) is score(y, x)."""
    from_moments: ClassVar[bool] = False
    """Whether `scores_from_moments` is there: the index can be read off units x units moments."""

    @property
    @abstractmethod
    def estimator(self) -> str:
        """Say in a few words what the values are, parameters included."""

    @property
    def least(self) -> int:
        """The fewest samples that the index is defined for."""
        return 2

    @abstractmethod
    def prepare(self, x: Tensor) -> Any:
        """Compute what depends on one representation alone.

        Args:
            x: Samples x units: finite, floating-point, not centred, checked by the caller.
        """

    @abstractmethod
    def score(self, a: Any, b: Any) -> Tensor | float:
        """Compare two prepared representations of the same samples; NaN where undefined."""

    @abstractmethod
    def taken(self, state: Any, rows: Tensor) -> Any:
        """Give the state of x[rows], for a permutation or a subset of the samples."""

    def scores(self, states_a: Sequence[Any], states_b: Sequence[Any]) -> Tensor:
        """Compare each of one list with each of another: (len(a) x len(b)) in float64."""
        rows = [[float(self.score(a, b)) for b in states_b] for a in states_a]
        return torch.tensor(rows, dtype=torch.float64)

    def scores_from_moments(self, moments: Moments, layers_a: Sequence[str], layers_b: Sequence[str]) -> Tensor:
        """Compare layers by their moments alone: (len(a) x len(b)) in float64."""
        raise NotImplementedError(f"{self.name} needs the samples themselves")

    def __call__(self, x: Tensor | ArrayLike, y: Tensor | ArrayLike) -> float:
        """Compare two representations, arrays or tensors of samples x units.

        Raises:
            DataError: Not two floating-point matrices with the same number of samples on one device, or too few.
            NotFiniteError: One holds NaN or infinity.
        """
        x, y = as_pair(x, y, self.name, self.least)
        with torch.no_grad():
            value = float(self.score(self.prepare(x), self.prepare(y)))
        if math.isnan(value):
            constant = [name for name, values in (("x", x), ("y", y)) if bool((values == values[0]).all())]
            what = f"{' and '.join(constant)} constant over the samples" if constant else "undefined for these samples"
            warnings.warn(f"{self.name} is NaN: {what}", stacklevel=2)
        return value

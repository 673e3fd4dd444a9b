"""What every index of similarity is made of: one preparation per layer, one score per pair of layers."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..base.errors import DataError, NotFiniteError, nearest
from .arrays import as_pair

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .moments import Moments


def check_choice(what: str, value: object, known: Collection[str]) -> None:
    """Refuse a value that is none of the known ones.

    Raises:
        DataError: With the nearest or all of them.
    """
    if value not in known:
        raise DataError(f"unknown {what} {value!r}{nearest(str(value), known)}")


@dataclass(frozen=True)
class Invariances:
    """Changes of one representation that leave an index as it is.

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
    invariances: ClassVar[Invariances]
    """What may be done to x alone; to y as well, unless `invariances_y` says otherwise."""
    invariances_y: ClassVar[Invariances | None] = None
    """What may be done to y alone, where it is not what may be done to x."""
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

    def nbytes(self, samples: int, units: int) -> int:
        """Bytes of what `prepare` gives of a layer, about; by default those of its singular value decomposition."""
        return 8 * (samples + units) * min(samples, units)

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
        values = torch.empty(len(states_a), len(states_b), dtype=torch.float64)
        same = self.symmetric and list(map(id, states_a)) == list(map(id, states_b))
        for row, a in enumerate(states_a):
            for column, b in enumerate(states_b):
                mirrored = same and column < row
                values[row, column] = values[column, row] if mirrored else float(self.score(a, b))
        return values

    def shifted(self, states_a: Sequence[Any], states_b: Sequence[Any], order: Tensor) -> Tensor | None:
        """Compare under every cyclic shift of the samples of b in an order, (samples x len(a) x len(b)).

        Shift s is x beside y[rows] with rows[order[r]] = order[r + s]. None where that is not cheaper than `taken`.
        """
        del states_a, states_b, order
        return None

    def scores_from_moments(self, moments: Moments, layers_a: Sequence[str], layers_b: Sequence[str]) -> Tensor:
        """Compare layers by their moments alone: (len(a) x len(b)) in float64."""
        raise NotImplementedError(f"{self.name} needs the samples themselves")

    def __call__(self, x: Tensor | ArrayLike, y: Tensor | ArrayLike, *, stacklevel: int = 2) -> float:
        """Compare two representations, arrays or tensors of samples x units.

        Args:
            x: Samples x units.
            y: Samples x units; the same samples, any number of units.
            stacklevel: Which caller a warning is ascribed to, see `warnings.warn`.

        Returns:
            The value; NaN, with a warning, where it is undefined, as for a representation that does not vary.

        Raises:
            DataError: Not two floating-point matrices with the same number of samples on one device, or too few.
            NotFiniteError: One holds NaN or infinity, or the value leaves float64.
        """
        x, y = as_pair(x, y, self.name, self.least)
        with torch.no_grad():
            value = float(self.score(self.prepare(x), self.prepare(y)))
        if math.isinf(value):
            raise NotFiniteError(f"{self.name} of x and y overflows float64; rescale them")
        if math.isnan(value):
            fixed = [name for name, values in (("x", x), ("y", y)) if bool((values == values[0]).all())]
            what = f"{' and '.join(fixed)} {'do' if len(fixed) > 1 else 'does'} not vary over the samples"
            warnings.warn(
                f"{self.name} is NaN: {what if fixed else 'undefined for these samples'}", stacklevel=stacklevel
            )
        return value


def check_moments(moments: Moments, layers: Iterable[str], index: str, least: int = 2) -> None:
    """Refuse layers with too few samples before an index is read off moments; warn of those that do not vary.

    Args:
        moments: With the layers.
        layers: Their names.
        index: What they are for, in a message.
        least: The fewest samples that the index is defined for.

    Raises:
        DataError: A layer has fewer samples.
        LayerNotFoundError: A layer is missing.
    """
    for name in dict.fromkeys(layers):
        count = moments.count(name)
        if count < least:
            raise DataError(f"layer {name!r} has {count} sample{'s' * (count > 1)}; {index} needs at least {least}")
        if not moments.variance(name).any():
            warnings.warn(f"layer {name!r} does not vary over the samples: its {index} is NaN", stacklevel=3)

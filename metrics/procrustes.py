"""Distance and similarity of layers once one is rotated onto the other: Procrustes and Bures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from .index import Invariances, check_choice
from .spectrum import Cross, SpectralIndex, Spectrum

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Kind = Literal["angular", "squared"]

# Relative squared distances below this lose digits as a difference of norms; their square root would show it.
_CLOSE = 1e-4


def _cosine(cross: Cross) -> Tensor:
    nuclear = torch.linalg.svdvals(cross.weighted).sum()
    return nuclear / (cross.a.energy * cross.b.energy).sqrt()


def _squared_distance(cross: Cross, scale_a: Tensor | float, scale_b: Tensor | float) -> Tensor:
    """‖scale_a X Q − scale_b Y‖²_F for the best rotation Q, with activations as the spectra hold them."""
    nuclear = torch.linalg.svdvals(cross.weighted).sum()
    size = scale_a**2 * cross.a.energy + scale_b**2 * cross.b.energy
    distance = size - 2 * scale_a * scale_b * nuclear
    if distance > _CLOSE * size:
        return distance
    if cross.a.u is None or cross.b.u is None:
        return distance.clamp(min=0)  # a negative one is rounding
    left, _, right = torch.linalg.svd(cross.weighted)
    x, y = scale_a * cross.a.u * cross.a.s @ left, scale_b * cross.b.u * cross.b.s @ right.T
    units = max(x.shape[1], y.shape[1])
    return (pad(x, (0, units - x.shape[1])) - pad(y, (0, units - y.shape[1]))).square().sum()


@dataclass(frozen=True)
class Procrustes(SpectralIndex):
    """Procrustes distance: what remains between two representations after the best rotation (Williams et al. 2021).

    Both are centred, and the narrower one is padded with zeros. "angular" is the shape distance
    arccos(‖XᵀY‖_*/(‖X‖_F ‖Y‖_F)) in radians, between 0 and π/2, a metric. "squared" is
    min_Q ‖X Q − Y‖²_F = ‖X‖²_F + ‖Y‖²_F − 2‖XᵀY‖_*, in squared units of the activations, summed over samples.
    Small distances are taken from the difference itself, and are as accurate as large ones; from moments alone angles
    below about 1e-7 (float64 products) cannot be told from 0.

    Args:
        kind: "angular" or "squared".

    Raises:
        DataError: There is no such kind.

    >>> x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    >>> round(Procrustes()(x, 2 * x.flip(1)), 6), round(Procrustes()(x, x.relu()), 3)
    (0.0, 0.503)
    """

    kind: Kind = "angular"

    name: ClassVar[str] = "procrustes"
    distance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, get_args(Kind))

    @property
    def estimator(self) -> str:
        """Say which distance."""
        return "angular distance, in radians" if self.kind == "angular" else "squared distance, summed over samples"

    @property
    def invariances(self) -> Invariances:  # pyright: ignore[reportIncompatibleVariableOverride]  it depends on the kind
        """All but linear maps; scaling only of the angle."""
        return Invariances(
            orthogonal=True, scaling=self.kind == "angular", linear=False, permutation=True, translation=True
        )

    def reduced(self, layer: Spectrum) -> Spectrum:
        """Compare all of it: directions count by their variance."""
        return layer

    def of(self, cross: Cross) -> Tensor:
        """Measure what the best rotation leaves."""
        a, b = cross.a, cross.b
        if self.kind == "squared":
            # Relative to the larger scale: otherwise the square of a small one could vanish beside it.
            scale = max(a.scale, b.scale)
            return _squared_distance(cross, a.scale / scale, b.scale / scale) * scale * scale
        chord = _squared_distance(cross, a.energy.rsqrt(), b.energy.rsqrt()).sqrt()
        return 2 * torch.asin(chord / 2)


@dataclass(frozen=True)
class Bures(SpectralIndex):
    """Normalised Bures similarity: the fidelity of the centred linear kernels K and L of two representations.

    tr((K^½ L K^½)^½)/√(tr K tr L) = ‖XᵀY‖_*/(‖X‖_F ‖Y‖_F), the cosine of the angular Procrustes distance
    (Harvey, Larsen & Williams 2024).

    >>> x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    >>> round(Bures()(x, 2 * x.flip(1)), 6), round(Bures()(x, x.relu()), 3)
    (1.0, 0.876)
    """

    name: ClassVar[str] = "bures"
    invariances: ClassVar[Invariances] = Invariances(
        orthogonal=True, scaling=True, linear=False, permutation=True, translation=True
    )

    @property
    def estimator(self) -> str:
        """Say what it is."""
        return "normalised Bures similarity of centred linear kernels"

    def reduced(self, layer: Spectrum) -> Spectrum:
        """Compare all of it: directions count by their variance."""
        return layer

    def of(self, cross: Cross) -> Tensor:
        """Divide the nuclear norm by the Frobenius norms."""
        return _cosine(cross)


def procrustes(x: Tensor | ArrayLike, y: Tensor | ArrayLike, *, kind: Kind = "angular") -> float:
    """Compute the Procrustes distance of two representations of the same samples; see `Procrustes`.

    Args:
        x: Samples x units.
        y: Samples x units; the same samples, any number of units.
        kind: "angular", in radians, or "squared", in squared units of the activations, summed over samples.

    Returns:
        At least 0; NaN, with a warning, where a representation does not vary.

    Raises:
        DataError: Not two floating-point matrices with the same number of samples, at least two, on one device; there
            is no such kind.
        NotFiniteError: One holds NaN or infinity, or the squared distance leaves float64.

    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> round(procrustes(x, x.relu()), 3)
    0.493
    """
    return Procrustes(kind)(x, y, stacklevel=3)


def bures(x: Tensor | ArrayLike, y: Tensor | ArrayLike) -> float:
    """Compute the normalised Bures similarity of two representations of the same samples; see `Bures`.

    Args:
        x: Samples x units.
        y: Samples x units; the same samples, any number of units.

    Returns:
        Between 0 and 1; NaN, with a warning, where a representation does not vary.

    Raises:
        DataError: Not two floating-point matrices with the same number of samples, at least two, on one device.
        NotFiniteError: One holds NaN or infinity.

    >>> x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    >>> round(bures(x, x.relu()), 3)
    0.881
    """
    return Bures()(x, y, stacklevel=3)

"""Pseudo-subclasses by linear projection: each class is split along directions in which its samples vary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ...base.errors import DataError
from ...metrics.arrays import as_matrix, centred
from ...metrics.spectrum import spectrum
from .labelled import as_features, as_labels, within_class

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Directions = Literal["pca", "random"]

_RANK = 1e-6  # of the largest singular value of the weight: what is below is rounding
_SUM = 1e-4  # by which probabilities in float32 may miss a sum of 1


@dataclass(frozen=True, eq=False)
class SubclassProjection:
    """For each class as many directions as it gets pseudo-subclasses; all tensors are float64.

    Attributes:
        directions: (classes, count, units), orthonormal within a class.
        means: (classes, units) of the features that the directions were found on.
        scales: (classes,) root mean square of the coordinates of a class along its own directions.
        explained: (classes,) share of a class's variance that lies in the span of its directions.
    """

    directions: Tensor
    means: Tensor
    scales: Tensor
    explained: Tensor

    def __repr__(self) -> str:
        classes, count, units = self.directions.shape
        return f"SubclassProjection({classes} classes into {count} each, {units} units)"

    @property
    def count(self) -> int:
        """Number of pseudo-subclasses of each class."""
        return self.directions.shape[1]

    @property
    def of_class(self) -> Tensor:
        """The class of each pseudo-subclass, (classes · count,) int64, in the order of `targets`."""
        return torch.arange(len(self.directions)).repeat_interleave(self.count)

    def coordinates(self, features: Tensor | ArrayLike) -> Tensor:
        """Place samples along the directions of every class, from its mean and in units of its scale.

        Args:
            features: (samples x units).

        Returns:
            (samples, classes, count), float64 on the device of the features.

        Raises:
            DataError: The features have another number of units.
            NotFiniteError: They hold NaN or infinity.
        """
        x = as_features(features)
        if x.shape[1] != self.means.shape[1]:
            raise DataError(f"features have shape {tuple(x.shape)}, the projection reads {self.means.shape[1]} units")
        means, directions, scales = (part.to(x.device) for part in (self.means, self.directions, self.scales))
        x = x.to(torch.float64)
        placed = [(x - mean) @ rows.T for mean, rows in zip(means, directions, strict=True)]
        return torch.stack(placed, 1) / scales[:, None]

    def shares(self, features: Tensor | ArrayLike, temperature: float = 1.0) -> Tensor:
        """Divide each class among its pseudo-subclasses: the softmax of the coordinates over the temperature.

        Args:
            features: (samples x units).
            temperature: Small numbers put nearly all of a class into one pseudo-subclass.

        Returns:
            (samples, classes, count), which sum to 1 over the last axis; errors as `coordinates`.

        Raises:
            DataError: The temperature is not above zero.
        """
        if not 0 < temperature < float("inf"):
            raise DataError(f"temperature is {temperature!r}; expected a number above zero")
        return (self.coordinates(features) / temperature).softmax(-1)

    def targets(
        self, features: Tensor | ArrayLike, probabilities: Tensor | ArrayLike, temperature: float = 1.0
    ) -> Tensor:
        """Give the probability of each pseudo-subclass: that of its class times its share of the class.

        Args:
            features: (samples x units) of the teacher.
            probabilities: (samples x classes) of the teacher, which sum to 1.
            temperature: Of the shares.

        Returns:
            (samples x classes · count) in float64, class by class; those of a class sum to its probability.

        Raises:
            DataError: The probabilities have another shape, are negative, or do not sum to 1; and as `shares`.
            NotFiniteError: Something holds NaN or infinity.
        """
        shares = self.shares(features, temperature)
        p = as_matrix(probabilities, "probabilities").to(shares.device, torch.float64)
        if p.shape != shares.shape[:2]:
            raise DataError(f"probabilities have shape {tuple(p.shape)}; expected {tuple(shares.shape[:2])}")
        if float(p.min()) < 0 or float((p.sum(1) - 1).abs().max()) > _SUM:
            raise DataError("probabilities are negative or do not sum to 1 over the classes; pass softmax(logits)")
        return (p[..., None] * shares).flatten(1)

    def labels(self, features: Tensor | ArrayLike, labels: Tensor | ArrayLike) -> Tensor:
        """Give the likeliest pseudo-subclass of each sample's own class, numbered as in `targets`, (samples,) int64.

        Raises:
            DataError: A label is beyond the classes, or the lengths differ; and as `coordinates`.
        """
        placed = self.coordinates(features).cpu()
        own = as_labels(labels, len(placed))
        if len(own) and int(own.max()) >= len(self.directions):
            raise DataError(
                f"labels go up to {int(own.max())}; the projection knows classes 0 to {len(self.means) - 1}"
            )
        return own * self.count + placed[torch.arange(len(own)), own].argmax(1)


def subclass_projection(
    features: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    *,
    count: int,
    weight: Tensor | ArrayLike | None = None,
    directions: Directions = "pca",
    rotate: bool = True,
    seed: int = 0,
) -> SubclassProjection:
    """Find the directions of pseudo-subclasses (Loo, Iliopoulos, Hu & Vee 2024, LELP, section 3.1).

    What the classifier reads is taken off the features first (the null space of its weight): class probabilities tell
    of it already. Of the rest, each class keeps its first principal directions, `count` of them, turned into each other
    at random: in expectation they then hold the same variance, so that none of the pseudo-subclasses takes all samples.

    Coordinates are counted from the class mean in units of their root mean square over the class, so that a temperature
    means the same whatever is left of a collapsed class.

    Args:
        features: Samples x units, the input of the teacher's last linear layer.
        labels: (samples,) whole numbers from 0; each class up to the largest has samples.
        count: Pseudo-subclasses of each class.
        weight: (classes x units) of the last linear layer. Default: nothing is taken off.
        directions: "pca", or "random" ones in the same space, as a control.
        rotate: Turn the principal directions; otherwise the first of them holds most of the variance.
        seed: Of what is random.

    Returns:
        The directions.

    Raises:
        DataError: Shapes do not fit, a class has no sample or does not vary in as many dimensions, or a choice is
            unknown.
        NotFiniteError: Something holds NaN or infinity.

    >>> generator = torch.Generator().manual_seed(0)
    >>> features, labels = torch.randn(60, 8, generator=generator), torch.arange(60) % 2
    >>> found = subclass_projection(features, labels, count=3, weight=features[:2])
    >>> targets = found.targets(features, torch.tensor([0.9, 0.1]).expand(60, 2), temperature=0.5)
    >>> targets.shape, targets[0].reshape(2, 3).sum(1)
    (torch.Size([60, 6]), tensor([0.9000, 0.1000], dtype=torch.float64))
    """
    x = as_features(features)
    coarse = as_labels(labels, len(x)).to(x.device)
    if directions not in get_args(Directions):
        raise DataError(f"directions is {directions!r}; expected one of {', '.join(get_args(Directions))}")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise DataError(f"count is {count!r}; expected a whole number of pseudo-subclasses, at least 1")
    sizes = torch.bincount(coarse).tolist()
    if 0 in sizes:
        raise DataError(f"class {sizes.index(0)} has no sample; number the classes that occur from 0 without gaps")
    read = _row_space(weight, x)
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for name in range(len(sizes)):
        own = x[coarse == name]
        # Centred and of unit spread: what is left of a collapsed class is as good as any.
        inside = within_class(own, name)
        free = inside - (inside @ read.T) @ read
        rows = _principal(free, count, name) if directions == "pca" else _random(free, read, count, name, generator)
        if rotate and directions == "pca":
            rows = _turn(count, generator).to(rows) @ rows
        placed = free @ rows.T
        explained = placed.square().sum() / inside.square().sum()
        scale = (centred(own) @ rows.T).square().mean().sqrt()
        found.append((rows, own.to(torch.float64).mean(0), scale, explained))
    return SubclassProjection(*(torch.stack(part).cpu() for part in zip(*found, strict=True)))


def _row_space(weight: Tensor | ArrayLike | None, x: Tensor) -> Tensor:
    """Give orthonormal rows that span those of the weight, (rank x units); none without a weight."""
    if weight is None:
        return x.new_zeros(0, x.shape[1], dtype=torch.float64)
    w = as_matrix(weight, "weight").to(x.device, torch.float64)
    if w.shape[1] != x.shape[1]:
        raise DataError(f"weight has shape {tuple(w.shape)}, but the features {tuple(x.shape)}; units must agree")
    _, s, vt = torch.linalg.svd(w, full_matrices=False)
    return vt[s > _RANK * s[0]]


def _principal(free: Tensor, count: int, name: int) -> Tensor:
    if not bool(free.any()):
        raise _too_few(name, 0, count)
    layer = spectrum(free)
    # Rounding of the features, 1e-6 of what the class had before anything was taken off, is no direction.
    held = int((layer.s * layer.scale > _RANK * len(free) ** 0.5).sum())
    if min(held, layer.significant) < count:
        raise _too_few(name, min(held, layer.significant), count)
    rows = layer.first(count).vt
    # The factorisation leaves signs open.
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * torch.where(largest < 0, -1.0, 1.0)


def _random(free: Tensor, read: Tensor, count: int, name: int, generator: torch.Generator) -> Tensor:
    units = free.shape[1]
    if units - len(read) < count:
        raise _too_few(name, units - len(read), count)
    drawn = torch.randn(count, units, generator=generator, dtype=torch.float64).to(free.device)
    rows = torch.linalg.qr((drawn - (drawn @ read.T) @ read).T).Q.T
    if not bool((free @ rows.T).any()):
        raise _too_few(name, 0, count)
    return rows


def _turn(count: int, generator: torch.Generator) -> Tensor:
    """Draw an orthogonal matrix uniformly (Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _too_few(name: int, dimensions: int, count: int) -> DataError:
    return DataError(
        f"class {name} varies in {dimensions} dimensions that the classifier does not read, but count is {count}; ask "
        "for fewer, bring more samples, or leave weight out"
    )

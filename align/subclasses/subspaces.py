"""Whether two networks vary alike inside a class: canonical angles of their leading subspaces over the same samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...base.errors import DataError
from ...base.plain import plain
from ...metrics.spectrum import Spectrum, spectrum
from .labelled import as_features, as_labels, class_names, warn_of_rounding, within_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike


@dataclass(frozen=True, eq=False)
class SubspaceAngles:
    """Canonical angles between what two networks do inside each class; every tensor is float64.

    Attributes:
        cosines: (classes x dims), canonical correlations of each class, largest first; NaN beyond the smaller subspace.
        mean: (classes,), mean squared cosine.
        null: (classes,), its mean when the samples are shuffled; about dims/(samples of the class - 1).
        null_cosines: (classes x dims), mean cosines of the same.
        p_values: (classes,), (1 + shuffles at least as alike) / (1 + shuffles); Phipson & Smyth (2010).
        captured_a: (classes,), share of the variance of a inside the class that the subspace holds.
        captured_b: (classes,), the same of b.
        names: (classes,) int64, the classes.
        samples: (classes,) int64, the number of samples of each.
        shuffles: How many.
    """

    cosines: Tensor
    mean: Tensor
    null: Tensor
    null_cosines: Tensor
    p_values: Tensor
    captured_a: Tensor
    captured_b: Tensor
    names: Tensor
    samples: Tensor
    shuffles: int

    def __repr__(self) -> str:
        return (
            f"SubspaceAngles({len(self.names)} classes, {self.cosines.shape[1]} dimensions: mean squared cosine "
            f"{float(self.mean.mean()):.3f}, by chance {float(self.null.mean()):.3f})"
        )

    @property
    def angles(self) -> Tensor:
        """Canonical angles in radians, smallest first, (classes x dims)."""
        return self.cosines.clamp(max=1.0).acos()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the canonical correlations of each class beside those of shuffled samples.

        Args:
            ax: Where to draw. Default: a new figure.

        Returns:
            The axes.
        """
        from .pictures import new_axes

        ax = new_axes(ax, (4.6, 3.4))
        places = range(1, self.cosines.shape[1] + 1)
        for row, name in enumerate(self.names.tolist()):
            ax.plot(places, self.cosines[row].numpy(), marker="o", markersize=3, linewidth=1.4, label=f"class {name}")
        chance = self.null_cosines.nanmean(0).numpy()
        ax.plot(places, chance, color="#5d646e", linestyle=":", linewidth=1.4, label="shuffled samples")
        ax.set_xlabel("canonical direction")
        ax.set_ylabel("canonical correlation")
        ax.set_ylim(-0.02, 1.02)
        ax.legend(fontsize="small")
        return ax

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain lists and numbers for JSON."""
        return plain({**vars(self), "angles": self.angles})


def subspace_angles(
    features_a: Tensor | ArrayLike,
    features_b: Tensor | ArrayLike,
    labels: Tensor | ArrayLike,
    *,
    dims: int = 5,
    shuffles: int = 200,
    seed: int = 0,
) -> SubspaceAngles:
    """Compare how two networks vary inside each class by canonical correlations (Hotelling 1936).

    Two networks have no units in common, but the same samples: the features of a class, centred, span a subspace of the
    functions of its samples. Compared are the leading principal components of each, by the singular values of U_aᵀ U_b
    (Björck & Golub 1973; singular vector CCA, Raghu et al. 2017), beside those of samples shuffled inside the class.

    Args:
        features_a: Samples x units of the one network.
        features_b: Samples x units of the other network; the same samples.
        labels: (samples,) the class of each sample, from 0.
        dims: Principal components that are compared, fewer where fewer vary.
        shuffles: How often the samples are shuffled.
        seed: Of the shuffles.

    Raises:
        DataError: Lengths differ, a class has no more samples than `dims` + 1, or its samples are all the same.
        NotFiniteError: Features hold NaN or infinity.

    >>> generator = torch.Generator().manual_seed(0)
    >>> x = torch.randn(200, 3, generator=generator)
    >>> found = subspace_angles(x, x @ torch.randn(3, 6, generator=generator), [0] * 100 + [1] * 100, dims=3)
    >>> found.mean.round(decimals=3).tolist(), bool((found.null < 0.1).all())
    ([1.0, 1.0], True)
    """
    a, b = as_features(features_a, "features_a"), as_features(features_b, "features_b")
    if len(a) != len(b):
        raise DataError(f"features_a has {len(a)} samples (shape {tuple(a.shape)}), features_b has {len(b)}")
    coarse = as_labels(labels, len(a))
    names = class_names(coarse)
    sizes = torch.bincount(coarse)[names]
    _check(dims, shuffles, names, sizes)
    generator = torch.Generator().manual_seed(seed)
    rounded: tuple[list[int], list[int]] = ([], [])
    parts = [_of_class((a, b), coarse, name, dims, shuffles, generator, rounded) for name in names.tolist()]
    for x, doubtful in zip((a, b), rounded, strict=True):
        warn_of_rounding(doubtful, x.dtype)
    cosines, mean, null, null_cosines, p_values, captured_a, captured_b = (
        torch.stack(part) for part in zip(*parts, strict=True)
    )
    return SubspaceAngles(cosines, mean, null, null_cosines, p_values, captured_a, captured_b, names, sizes, shuffles)


def _check(dims: int, shuffles: int, names: Tensor, sizes: Tensor) -> None:
    for key, number in (("dims", dims), ("shuffles", shuffles)):
        if number < 1:
            raise DataError(f"{key} is {number}; expected at least 1")
    least = int(sizes.argmin())
    if int(sizes[least]) < dims + 2:
        raise DataError(
            f"class {int(names[least])} has {int(sizes[least])} samples, too few for {dims} dimensions, which any "
            f"features would then share; take dims below {max(int(sizes[least]) - 1, 1)}, or more samples"
        )


def _of_class(
    sides: tuple[Tensor, Tensor], coarse: Tensor, name: int, dims: int, shuffles: int, generator: torch.Generator,
    rounded: tuple[list[int], list[int]],
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = (coarse == name).nonzero().flatten()
    left, right = (
        spectrum(within_class(x[rows.to(x.device)], name, doubtful)) for x, doubtful in zip(sides, rounded, strict=True)
    )
    u, v = (_basis(layer, dims).cpu() for layer in (left, right))
    cosines = _padded(torch.linalg.svdvals(u.T @ v), dims)
    shuffled = torch.stack([_padded(values, dims) for values in _shuffled(u, v, shuffles, generator)])
    mean, null = cosines.square().nanmean(), shuffled.square().nanmean(1)
    p_value = (1 + (null >= mean - 1e-12).sum()) / (1 + shuffles)
    captured = (_captured(left, dims), _captured(right, dims))
    return cosines, mean, null.mean(), shuffled.mean(0), p_value.double(), *captured


def _basis(layer: Spectrum, dims: int) -> Tensor:
    kept = layer.first(min(dims, layer.significant))
    assert kept.u is not None
    return kept.u


def _captured(layer: Spectrum, dims: int) -> Tensor:
    return (layer.s[:dims].square().sum() / layer.energy).cpu()


def _shuffled(u: Tensor, v: Tensor, shuffles: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(shuffles):
        yield torch.linalg.svdvals(u.T @ v[torch.randperm(len(v), generator=generator)])


def _padded(values: Tensor, dims: int) -> Tensor:
    return torch.nn.functional.pad(values.clamp(max=1.0), (0, dims - len(values)), value=float("nan"))

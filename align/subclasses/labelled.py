"""Features of samples with the class of each: read and checked once, before any work."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...base.errors import DataError, NotFiniteError
from ...metrics.arrays import as_matrix, centred

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_ROUNDING = 8  # times the rounding of a feature: less variation than this says nothing


def as_features(features: Tensor | ArrayLike, name: str = "features") -> Tensor:
    """Read features as samples x units; images and feature maps are flattened.

    Raises:
        DataError: They are no floating-point array with samples first, or empty.
        NotFiniteError: They hold NaN or infinity.

    >>> as_features(torch.zeros(5, 1, 4, 4)).shape
    torch.Size([5, 16])
    """
    if not isinstance(features, Tensor):
        features = np.asarray(features)
    if features.ndim > 2 and len(features):
        features = features.reshape(len(features), -1)
    return as_matrix(features, name)


def as_labels(labels: Tensor | ArrayLike, samples: int, name: str = "labels", least: int = 0) -> Tensor:
    """Read one whole number for each sample, int64 on the CPU.

    Args:
        labels: (samples,).
        samples: How many there must be.
        name: What to call them in a message.
        least: The smallest that may be.

    Raises:
        DataError: They are no whole numbers, too small, or not as many as there are samples.

    >>> as_labels([0, 1, 1], 3)
    tensor([0, 1, 1])
    """
    values = labels if isinstance(labels, Tensor) else torch.from_numpy(np.asarray(labels))
    if values.ndim != 1 or values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise DataError(
            f"{name} is {values.dtype} of shape {tuple(values.shape)}; expected whole numbers, one for each sample"
        )
    if len(values) != samples:
        raise DataError(f"{name} has {len(values)} entries, but there are {samples} samples")
    if len(values) and int(values.min()) < least:
        where = int((values < least).nonzero()[0])
        raise DataError(f"{name} has {int(values[where])} at sample {where}; expected whole numbers from {least}")
    return values.detach().to("cpu", torch.int64)


def class_names(labels: Tensor, classes: int | None = None, name: str = "labels") -> Tensor:
    """List the classes that occur, rising; all of them must where their number is known.

    Raises:
        DataError: A label is beyond the last class, or a class has no sample.

    >>> class_names(torch.tensor([3, 1, 3]))
    tensor([1, 3])
    """
    found = labels.unique()
    if classes is None:
        return found
    if classes < 1:
        raise DataError(f"classes is {classes}; expected at least 1")
    if int(found[-1]) >= classes:
        where = int((labels >= classes).nonzero()[0])
        raise DataError(f"{name} has {int(labels[where])} at sample {where}; expected 0 to {classes - 1}")
    if len(found) < classes:
        missing = sorted(set(range(classes)) - set(found.tolist()))
        raise DataError(f"class {missing[0]} has no sample in {name}: leave `classes` out, or bring samples of it")
    return found


def within_class(features: Tensor, name: int, rounded: list[int] | None = None) -> Tensor:
    """Centre the features of one class and scale them by how far its samples lie from its mean, in float64.

    Collapsed features differ by amounts that are tiny beside their class mean; afterwards the mean squared distance
    from it is 1.

    Args:
        features: The samples of one class, (samples x units).
        name: The class, for messages.
        rounded: Gets the name where the samples differ by little more than the rounding of the features.

    Raises:
        DataError: All samples are the same.

    >>> within_class(torch.tensor([[1.0, 100.0], [1.0, 100.5]]), 0).tolist()
    [[0.0, -1.0], [0.0, 1.0]]
    """
    x = centred(features)
    scale = float(x.abs().amax())
    if scale == 0:
        raise DataError(
            f"class {name}: all {len(x)} samples have the same features; nothing inside it can be told apart"
        )
    spread = scale * float((x / scale).square().sum(1).mean().sqrt())
    rounding = torch.finfo(features.dtype).eps * float(features.abs().amax()) * x.shape[1] ** 0.5
    if rounded is not None and spread < _ROUNDING * rounding:
        rounded.append(name)
    return x / spread


def warn_of_rounding(rounded: list[int], dtype: torch.dtype) -> None:
    """Say once which classes vary by little more than rounding, on behalf of the caller's caller."""
    if rounded:
        names = ", ".join(map(str, rounded))
        warnings.warn(
            f"the features of class{'es' * (len(rounded) > 1)} {names} vary by little more than the rounding of "
            f"{dtype}; run the network in a higher precision",
            stacklevel=4,
        )


def check_finite_number(name: str, value: float, least: float = 0.0) -> None:
    """Refuse NaN, infinity and numbers below a bound.

    Raises:
        DataError: The number is too small.
        NotFiniteError: It is none.
    """
    if not np.isfinite(value):
        raise NotFiniteError(f"{name} is {value}; expected a finite number")
    if value < least:
        raise DataError(f"{name} is {value:g}; expected at least {least:g}")

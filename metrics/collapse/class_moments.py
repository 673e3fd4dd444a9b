"""Counts, means and within-class scatter of classes, streamed batch by batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...base.errors import DataError, NotFiniteError
from ...base.files import PathLike
from ...base.finite import all_finite
from ..batch_checks import check_matrix, check_same
from ..state_file import read_state, write_state

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FORMAT = "isthmus.class_moments.1"
_PRODUCT_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
_PIECE = 1 << 22
"""Entries of a batch that are held in float64 at a time."""


class ClassMoments:
    """Counts and means of classes and the scatter of features inside them, from any number of batches.

    Batches are merged class by class by the pairwise update of Chan, Golub & LeVeque (1983), all classes at once: no
    two large sums are subtracted, and only the classes of a batch cost anything. Sums are float64, on the device of the
    features; they take 8 · (classes · units + units²) bytes, whatever the number of samples. Of a data set in parts,
    `merge` joins the moments of each part; where the parts are with the processes of `torch.distributed`, `all_reduce`
    joins them in every process.

    Args:
        classes: Their number K, at least 2; labels are 0 to K - 1.
        covariance: Keep the within-class covariance, (units x units). Without it, its trace and those of the single
            classes are known, at the cost of the means alone.
        product_dtype: The precision of the matrix products, taken of centred features: float64, float32 or bfloat16.

    Raises:
        DataError: An argument cannot be used.

    >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, 4.0], [5.0, 6.0]])
    >>> moments = ClassMoments(2)
    >>> moments.update(x[:3], torch.tensor([0, 0, 1]))
    >>> moments.update(x[3:], torch.tensor([1]))
    >>> moments.means
    tensor([[1., 1.],
            [5., 5.]], dtype=torch.float64)
    >>> moments.within()
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]], dtype=torch.float64)
    """

    def __init__(self, classes: int, *, covariance: bool = True, product_dtype: torch.dtype = torch.float64) -> None:
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
            raise DataError(f"classes is {classes!r}; expected their number, at least 2")
        if product_dtype not in _PRODUCT_DTYPES:
            raise DataError(f"product_dtype is {product_dtype}; expected one of {', '.join(map(str, _PRODUCT_DTYPES))}")
        self.classes = classes
        self.covariance = bool(covariance)
        self.product_dtype = product_dtype
        # Means are kept relative to the first sample ever seen, so that a large offset costs no digits.
        self._shift: Tensor | None = None
        self._counts = torch.zeros(classes, dtype=torch.int64)
        self._means = torch.zeros(classes, 0, dtype=torch.float64)
        self._squares = torch.zeros(classes, dtype=torch.float64)
        self._products: Tensor | None = None

    def __repr__(self) -> str:
        return f"ClassMoments({self.classes} classes; {self.samples} samples x {self.units} units)"

    @property
    def units(self) -> int:
        """Number of units; 0 before the first batch."""
        return self._means.shape[1]

    @property
    def samples(self) -> int:
        """Number of samples of all classes."""
        return int(self._counts.sum())

    @property
    def counts(self) -> Tensor:
        """Number of samples of each class, (classes,) in int64."""
        return self._counts.clone()

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return self._means.device

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add one batch; a batch that is refused changes nothing.

        Args:
            features: Samples x units, floating-point; the same units in every batch.
            labels: (samples,), integers from 0 to classes - 1.

        Raises:
            DataError: A shape, dtype, device or label does not fit.
            NotFiniteError: A feature holds NaN or infinity, or its squares overflow.
        """
        # State that is born under inference_mode could not be updated outside it.
        with torch.inference_mode(False), torch.no_grad():
            labels = self._check(features, labels)
            if self._shift is None:
                self._allocate(features[0].to(torch.float64, copy=True))
            # Pieces with far more samples than classes, so that merging means costs little.
            step = max(_PIECE // self.units, 4 * self.classes)
            for start in range(0, len(features), step):
                self._add(features[start : start + step], labels[start : start + step])

    def _check(self, features: Tensor, labels: Tensor) -> Tensor:
        check_matrix("features", features, None if self._shift is None else (self.units, self.device))
        check_labels(labels, len(features), self.classes)
        if not all_finite(features):
            raise NotFiniteError(f"features of shape {tuple(features.shape)} hold NaN or infinity")
        bounds = [*features.aminmax(), *(() if self._shift is None else self._shift.aminmax())]
        least, greatest = (pick(float(bound) for bound in bounds) for pick in (min, max))
        limit = torch.finfo(self.product_dtype).max
        extent = greatest - least
        if not extent * extent * features.numel() < limit:
            raise NotFiniteError(
                f"features of shape {tuple(features.shape)} range from {least:.3g} to {greatest:.3g}: their squares "
                f"overflow {self.product_dtype}; scale them down first"
            )
        return labels.to(features.device, torch.int64)

    def _allocate(self, shift: Tensor) -> None:
        self._shift = shift
        self._counts = self._counts.to(shift.device)
        self._means = shift.new_zeros(self.classes, len(shift))
        self._squares = shift.new_zeros(self.classes)
        self._products = shift.new_zeros(len(shift), len(shift)) if self.covariance else None

    def _add(self, features: Tensor, labels: Tensor) -> None:
        assert self._shift is not None
        present, place, counts = labels.unique(return_inverse=True, return_counts=True)
        x = features.to(torch.float64) - self._shift
        # Unlike index_add_, the same bits every time on a GPU as well.
        means = x.new_zeros(len(present), self.units).index_put_((place,), x, accumulate=True)
        means /= counts[:, None]
        x -= means[place]
        squares = x.new_zeros(len(present)).index_put_((place,), torch.linalg.vecdot(x, x), accumulate=True)
        self._absorb(present, counts, means, squares)
        if self._products is not None:
            add_product(self._products, x.to(self.product_dtype))

    def _absorb(self, present: Tensor, counts: Tensor, means: Tensor, squares: Tensor) -> None:
        """Move to the common means; what the products of both sides gain by it is added here."""
        seen = self._counts[present]
        total = seen + counts
        weight = seen * counts / total.to(torch.float64)
        delta = means - self._means[present]
        if self._products is not None and bool(seen.any()):
            add_product(self._products, delta * weight.sqrt()[:, None])
        self._squares[present] += squares + weight * torch.linalg.vecdot(delta, delta)
        self._means[present] += delta * (counts / total.to(torch.float64))[:, None]
        self._counts[present] = total

    def merge(self, other: ClassMoments) -> ClassMoments:
        """Add all that another accumulator has seen, in place; the other one is left as it is.

        Args:
            other: Moments of other samples of the same classes and units, both with covariance or both without.

        Returns:
            This accumulator.

        Raises:
            DataError: Classes, units or covariance differ.

        >>> x, labels = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 0, 1, 0])
        >>> first, second = ClassMoments(2), ClassMoments(2)
        >>> first.update(x[:4], labels[:4])
        >>> second.update(x[4:], labels[4:])
        >>> first.merge(second).counts
        tensor([3, 3])
        """
        check_same("class moments", [self._shared(), other._shared()], ["this accumulator", "the other one"])
        if other._shift is None:
            return self
        with torch.inference_mode(False), torch.no_grad():
            device = other.device if self._shift is None else self.device
            # Copies: one accumulator merged with itself must not read what it has just written.
            shift, counts, means, squares = (
                part.to(device, copy=True) for part in (other._shift, other._counts, other._means, other._squares)
            )
            products = None if other._products is None else other._products.to(device, copy=True)
            if self._shift is None:
                self._allocate(shift)
            assert self._shift is not None
            present = counts.nonzero().flatten()
            moved = means[present] + (shift - self._shift)
            self._absorb(present, counts[present], moved, squares[present])
            if self._products is not None and products is not None:
                self._products += products
        return self

    def _shared(self) -> dict[str, Any]:
        return {"classes": self.classes, "covariance": self.covariance, "units": self.units or None}

    def all_reduce(self, group: ProcessGroup | None = None) -> ClassMoments:
        """Add up what all processes of a group have seen, in place; every process ends with the same bits.

        Each process calls this once, after its last batch, also one that has seen none.

        Args:
            group: The processes. Default: all.

        Returns:
            This accumulator.

        Raises:
            DataError: `torch.distributed` is not initialised, or classes, units or covariance differ between processes
                (then in all of them).
        """
        from .reducing import all_reduce_class_moments

        return all_reduce_class_moments(self, group)

    @property
    def means(self) -> Tensor:
        """Mean of each class, (classes x units) in float64; NaN for a class without samples."""
        self._need_samples()
        assert self._shift is not None
        return (self._means + self._shift).masked_fill(self._counts[:, None] == 0, torch.nan)

    def centred_means(self, weighted: bool = False) -> Tensor:
        """Give the class means minus their mean, (classes x units) in float64.

        Args:
            weighted: Subtract the mean of all samples, in which large classes weigh more; by default the mean of the
                class means, in which all classes count alike. They agree where classes are of one size.

        Raises:
            DataError: A class has no sample.
        """
        self.check_classes(1)
        return self._means - self.weights(weighted) @ self._means

    def weights(self, weighted: bool = False) -> Tensor:
        """Give how much each class counts, (classes,), of sum 1: its share of the samples, or 1 / classes."""
        counts = self._counts.to(torch.float64)
        return counts / counts.sum() if weighted else torch.full_like(counts, 1 / self.classes)

    def mean(self, weighted: bool = False) -> Tensor:
        """Give the mean of the class means, or that of all samples if `weighted`; (units,) in float64."""
        self.check_classes(1)
        assert self._shift is not None
        return self.weights(weighted) @ self._means + self._shift

    def within(self) -> Tensor:
        """Give the within-class covariance Σ_W, pooled over the samples and divided by their number: (units x units).

        Raises:
            DataError: There is no sample, or it was not kept.
        """
        self._need_samples()
        if self._products is None:
            raise DataError("the within-class covariance was not kept: make ClassMoments(covariance=True)")
        return self._products / self.samples

    def between(self, weighted: bool = False) -> Tensor:
        """Give the covariance Σ_B of the class means, (units x units); `weighted` by the shares of the classes."""
        centred = self.centred_means(weighted) * self.weights(weighted).sqrt()[:, None]
        return centred.T @ centred

    def total(self) -> Tensor:
        """Give the covariance of all samples, Σ_W plus the weighted Σ_B: (units x units)."""
        return self.within() + self.between(weighted=True)

    @property
    def variances(self) -> Tensor:
        """Mean squared distance of the samples of each class from its mean, tr Σ_W of the class: (classes,)."""
        return self._squares / self._counts

    def within_trace(self) -> float:
        """Give tr Σ_W: the mean squared distance of all samples from the mean of their class."""
        self._need_samples()
        return float(self._squares.sum()) / self.samples

    def _need_samples(self) -> None:
        if self._shift is None:
            raise DataError("the class moments hold no sample: call update first")

    def check_classes(self, least: int = 2) -> None:
        """Refuse classes with too few samples.

        Args:
            least: The fewest samples that a class may have.

        Raises:
            DataError: A class has fewer; with their names.
        """
        self._need_samples()
        few = (self._counts < least).nonzero().flatten().tolist()
        if few:
            named = ", ".join(f"{label} ({int(self._counts[label])})" for label in few[:8])
            raise DataError(
                f"{len(few)} of {self.classes} classes have fewer than {least} samples: class {named}"
                f"{', …' if len(few) > 8 else ''}; pass more data, or number only the classes that are there from 0"
            )

    def to(self, device: torch.device | str) -> ClassMoments:
        """Move to a device, in place; returns this accumulator."""
        self._shift = None if self._shift is None else self._shift.to(device)
        self._products = None if self._products is None else self._products.to(device)
        self._counts, self._means = self._counts.to(device), self._means.to(device)
        self._squares = self._squares.to(device)
        return self

    def save(self, path: PathLike) -> Path:
        """Write to a safetensors file, whole or not at all.

        Raises:
            OutputError: The file cannot be written.
        """
        tensors = {"counts": self._counts, "means": self._means, "squares": self._squares}
        optional = {"shift": self._shift, "products": self._products}
        tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        product_dtype = str(self.product_dtype).removeprefix("torch.")
        content = {"classes": self.classes, "covariance": self.covariance, "product_dtype": product_dtype}
        return write_state(path, _FORMAT, content, tensors)

    @classmethod
    def load(cls, path: PathLike, device: torch.device | str = "cpu") -> ClassMoments:
        """Read what `save` wrote.

        Args:
            path: The file.
            device: Where to put the sums.

        Raises:
            CheckpointError: The file is missing, damaged, or holds something else.
        """
        return read_state(path, _FORMAT, cls._from_file, device)

    @classmethod
    def _from_file(cls, content: Any, tensors: dict[str, Tensor]) -> ClassMoments:
        dtype = getattr(torch, content["product_dtype"])
        moments = cls(content["classes"], covariance=content["covariance"], product_dtype=dtype)
        moments._counts, moments._means, moments._squares = (tensors[key] for key in ("counts", "means", "squares"))
        moments._shift, moments._products = tensors.get("shift"), tensors.get("products")
        return moments


def check_labels(labels: Tensor, count: int, classes: int) -> None:
    """Refuse labels that are no class numbers of a batch.

    Args:
        labels: Expected (count,), integers from 0 to classes - 1.
        count: Number of samples.
        classes: Number of classes.

    Raises:
        DataError: They are something else.
    """
    shape = tuple(labels.shape)
    if shape != (count,) or labels.dtype.is_floating_point or labels.dtype in (torch.bool, torch.complex64):
        raise DataError(f"labels have shape {shape} and type {labels.dtype}; expected integers of shape {(count,)}")
    least, greatest = (int(bound) for bound in labels.aminmax())
    if least < 0 or greatest >= classes:
        raise DataError(
            f"label {least if least < 0 else greatest} does not fit {classes} classes: labels must be 0 to "
            f"{classes - 1}; number the classes from 0, leave out samples that are to be ignored, or give classes="
        )


def add_product(total: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ rows to a float64 matrix; of rows of lower precision the product comes out in that."""
    if rows.dtype == total.dtype:
        total.addmm_(rows.T, rows)
    else:
        total += rows.T @ rows

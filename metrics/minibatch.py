"""HSIC₁ averaged over minibatches: CKA of many layers from one pass, whatever the number of samples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..base.errors import DataError, LayerNotFoundError, NotFiniteError, nearest
from ..base.files import PathLike
from ..base.finite import all_finite
from .batch_checks import check_layers, check_matrix, check_pair, check_same
from .state_file import read_state, write_state
from .ustatistic import LEAST, centre_off_diagonal, rbf_from_products

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FORMAT = "isthmus.minibatch_hsic.1"
_KERNELS = ("linear", "rbf")


class MinibatchHSIC:
    """The unbiased HSIC₁ of pairs of layers, averaged over minibatches (Nguyen, Raghu & Kornblith 2021, equation 3).

    HSIC₁ of a batch of n samples is the U-statistic of Song et al. (2012),
    [tr(K̃L̃) + 1ᵀK̃1 1ᵀL̃1 / ((n−1)(n−2)) − 2/(n−2) 1ᵀK̃L̃1] / (n(n−3)) with zero diagonals in K̃ and L̃. It is unbiased
    for every n, so its average does not depend on the batch size, where an average of biased values does: of
    independent wide layers that one is near 1 in small batches. The average is over batches as they come; shuffle.

    Each batch counts by its number of samples. With batches of one size this is the plain average of the paper; a
    smaller last batch, whose estimate is noisier, counts less. Batches under 4 samples have no HSIC₁: a first one is
    refused, a later one is skipped with a warning.

    A batch costs one kernel per layer and one (L1 × n²)(n² × L2) product for all pairs together, and holds one n × n
    kernel per layer. For the value over all samples at once see `Moments` and `Gram`.

    Args:
        kernel: "linear" (x·y) or "rbf" (exp(−d²/(2σ²))).
        bandwidth: σ of the RBF kernel in units of the median distance between the samples of each batch, taken over
            all n² entries of the matrix of distances, its zero diagonal included (Kornblith et al. 2019).
        layers: Compare each of the first names with each of the second. Layers in neither are left out. Default: each
            layer of the first batch with each other.
        product_dtype: Precision of the products, taken of centred activations: float64, or float32 (CKA within 1e-6 for
            batches up to 256 samples). Sums are float64.
        max_bytes: Refuse a batch whose kernels would take more.

    Raises:
        DataError: An argument is none of these.

    >>> generator = torch.Generator().manual_seed(0)
    >>> hsic = MinibatchHSIC()
    >>> for _ in range(50):
    ...     x = torch.randn(16, 100, generator=generator)
    ...     hsic.update({"x": x, "relu": x.relu(), "other": torch.randn(16, 100, generator=generator)})
    >>> hsic.cka(["x"], ["x", "relu", "other"])
    tensor([[1.0000, 0.7286, 0.0154]], dtype=torch.float64)
    """

    def __init__(
        self,
        kernel: Literal["linear", "rbf"] = "linear",
        bandwidth: float = 1.0,
        *,
        layers: tuple[Iterable[str], Iterable[str]] | None = None,
        product_dtype: torch.dtype = torch.float64,
        max_bytes: int = 4 << 30,
    ) -> None:
        if kernel not in _KERNELS:
            raise DataError(f"unknown kernel {kernel!r}; known: {', '.join(_KERNELS)}")
        if not 0 < bandwidth < math.inf:
            raise DataError(f"bandwidth is {bandwidth}; expected a positive multiple of the median distance")
        if product_dtype not in (torch.float64, torch.float32):
            raise DataError(f"product_dtype is {product_dtype}; expected torch.float64 or torch.float32")
        self.kernel = kernel
        self.bandwidth = float(bandwidth)
        self.product_dtype = product_dtype
        self.max_bytes = max_bytes
        self._every_layer = layers is None
        self._rows, self._columns = ((), ()) if layers is None else _two_lists(layers)
        self._units: dict[str, int] = {}
        self._cross = torch.zeros(0, 0, dtype=torch.float64)
        self._own = torch.zeros(0, dtype=torch.float64)
        self._counts = {"batches": 0, "samples": 0, "skipped": 0}

    def __repr__(self) -> str:
        kernel = self.kernel if self.kernel == "linear" else f"rbf, bandwidth {self.bandwidth:g}"
        return f"MinibatchHSIC({kernel}: {len(self.names)} layers, {self.batches} batches, {self.samples} samples)"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers, rows before columns; without a choice of layers in the order of the first batch."""
        return tuple(dict.fromkeys((*self._rows, *self._columns)))

    @property
    def layers(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The two lists of layers, each of the first compared with each of the second."""
        return self._rows, self._columns

    @property
    def batches(self) -> int:
        """Batches in the average."""
        return self._counts["batches"]

    @property
    def samples(self) -> int:
        """Samples in the average."""
        return self._counts["samples"]

    @property
    def skipped(self) -> int:
        """Batches that were too short to count."""
        return self._counts["skipped"]

    def update(self, activations: Mapping[str, Tensor]) -> None:
        """Add one batch; a batch that is refused changes nothing.

        Args:
            activations: Samples x units by layer name, of the same samples in every layer; the same layers and unit
                counts in every batch.

        Raises:
            DataError: A shape, dtype or device does not fit; layers differ in their number of samples; the first batch
                has fewer than 4 samples; the kernels would take more than `max_bytes`.
            LayerNotFoundError: A chosen layer is missing.
            NotFiniteError: An activation holds NaN or infinity, or its products overflow.
        """
        # State that is born under inference_mode could not be updated outside it.
        with torch.inference_mode(False), torch.no_grad():
            rows, columns = (tuple(activations),) * 2 if self._every_layer and not self._units else self.layers
            chosen = self._check(activations, rows, columns)
            n = len(next(iter(chosen.values())))
            if n < LEAST:
                self._skip(n)
                return
            cross, own = self._batch(chosen, rows, columns)
            if not self._units:
                self._rows, self._columns = rows, columns
                self._units = {name: x.shape[1] for name, x in chosen.items()}
                self._cross, self._own = torch.zeros_like(cross), torch.zeros_like(own)
            self._cross += n * cross
            self._own += n * own
            self._counts["batches"] += 1
            self._counts["samples"] += n

    def _check(
        self, activations: Mapping[str, Tensor], rows: tuple[str, ...], columns: tuple[str, ...]
    ) -> dict[str, Tensor]:
        names = tuple(dict.fromkeys((*rows, *columns)))
        if self._every_layer:
            check_layers(activations, self._units)
        chosen = {}
        for name in names:
            if name not in activations:
                raise LayerNotFoundError(f"layer {name!r} is missing from the batch{nearest(name, activations)}")
            x = chosen[name] = activations[name]
            check_matrix(name, x, (self._units[name], self._cross.device) if self._units else None)
            check_pair(names[0], name, activations)
            if not all_finite(x):
                raise NotFiniteError(f"layer {name!r} of shape {tuple(x.shape)} holds NaN or infinity")
        n = len(chosen[names[0]])
        needed = len(names) * n * n * self.product_dtype.itemsize
        if needed > self.max_bytes:
            raise DataError(
                f"the kernels of {len(names)} layers on a batch of {n} samples would take {needed / 2**30:.3g} GiB, "
                f"more than max_bytes={self.max_bytes}: use smaller batches, fewer layers, or Gram for all samples"
            )
        return chosen

    def _skip(self, n: int) -> None:
        what = f"of {n} sample{'s' * (n > 1)}"
        if not self.batches:
            raise DataError(f"the first batch is {what}; HSIC₁ needs at least {LEAST}: use a larger batch_size")
        warnings.warn(
            f"a batch {what}, after {self.batches}, was skipped: HSIC₁ needs at least {LEAST}; to use every sample "
            "choose a batch_size that leaves no such rest",
            stacklevel=3,
        )
        self._counts["skipped"] += 1

    def _batch(
        self, chosen: Mapping[str, Tensor], rows: Sequence[str], columns: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        n = len(next(iter(chosen.values())))
        kernels = next(iter(chosen.values())).new_empty(len(chosen), n, n, dtype=self.product_dtype)
        for (name, x), kernel in zip(chosen.items(), kernels, strict=True):
            self._fill(kernel, x, name)
        flat = kernels.flatten(1)
        place = {name: index for index, name in enumerate(chosen)}
        at = [place[name] for name in columns]
        adjacent = at == list(range(at[0], at[-1] + 1))
        right = flat[at[0] : at[-1] + 1] if adjacent else flat[at]
        cross = flat[: len(rows)] @ right.T
        own = torch.stack([kernel.dot(kernel) for kernel in flat])
        for name, value in zip(chosen, own.tolist(), strict=True):
            if math.isinf(value):
                raise NotFiniteError(f"layer {name!r}: the squares of its kernel overflow {self.product_dtype}")
        return cross.double() / (n * (n - 3)), own.double() / (n * (n - 3))

    def _fill(self, kernel: Tensor, x: Tensor, name: str) -> None:
        # HSIC₁ does not see a translation of the units. Relative to one of the samples products keep their digits at
        # any offset, and a layer that does not vary is exactly zero; subtracting the mean would read x twice more.
        x = x.to(torch.promote_types(x.dtype, self.product_dtype))
        x = (x - x[0]).to(self.product_dtype)
        torch.mm(x, x.T, out=kernel)
        if not all_finite(kernel):
            raise NotFiniteError(f"layer {name!r}: its products overflow {self.product_dtype}")
        if self.kernel == "rbf":
            rbf_from_products(kernel, self.bandwidth, x.shape[1])
            if kernel.isnan().any():
                warnings.warn(
                    f"layer {name!r}: the median distance in a batch is zero, its RBF kernel and HSIC are NaN",
                    stacklevel=4,
                )
        centre_off_diagonal(kernel)

    def hsic(self, a: str, b: str) -> float:
        """Give the average HSIC₁ of two layers; it can be negative.

        Raises:
            LayerNotFoundError: The two were not compared.
            DataError: No batch has been added yet.
        """
        return float(self._sum(a, b)) / self.samples

    def _sum(self, a: str, b: str) -> Tensor:
        if not self._units:
            raise DataError("no batch has been added yet: HSIC is not defined; call update first")
        for name in (a, b):
            if name not in self._units:
                raise LayerNotFoundError(f"no HSIC of layer {name!r}{nearest(name, self._units)}")
        if a == b:
            return self._own[self.names.index(a)]
        for left, right in ((a, b), (b, a)):
            if left in self._rows and right in self._columns:
                return self._cross[self._rows.index(left), self._columns.index(right)]
        raise LayerNotFoundError(f"{a!r} and {b!r} were not compared; name them on two sides of layers=(…, …)")

    def cka(self, layers_a: Iterable[str], layers_b: Iterable[str]) -> Tensor:
        """Compute the CKA of each layer with each other from the averages (Nguyen et al. 2021, equation 2).

        Args:
            layers_a: Layers of the rows.
            layers_b: Layers of the columns.

        Returns:
            (layers of a x layers of b) in float64, unclamped: near zero it can be negative. NaN, with a warning, where
            the average HSIC₁ of a layer with itself is not positive: it does not vary, or too little is known of it.

        Raises:
            LayerNotFoundError: Two layers were not compared.
            DataError: No batch has been added yet.
        """
        layers_a, layers_b = list(layers_a), list(layers_b)
        own = {name: float(self._sum(name, name)) for name in dict.fromkeys((*layers_a, *layers_b))}
        for name, value in own.items():
            if not value > 0:
                warnings.warn(
                    f"layer {name!r} has HSIC₁ {value / self.samples:.3g} with itself, which is not positive: its CKA "
                    "is NaN",
                    stacklevel=2,
                )
        scale = {name: math.sqrt(value) if value > 0 else math.nan for name, value in own.items()}
        rows = [[float(self._sum(a, b)) / scale[a] / scale[b] for b in layers_b] for a in layers_a]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(layers_a), len(layers_b))

    def merge(self, other: MinibatchHSIC) -> MinibatchHSIC:
        """Add all batches that another accumulator has seen, in place; the other one is left as it is.

        Args:
            other: Of other batches of the same layers, with the same kernel.

        Returns:
            This accumulator.

        Raises:
            DataError: Kernels, layers or unit counts differ.
        """
        check_same("HSIC", [self._shared(), other._shared()], ["this accumulator", "the other one"])
        lead = self if self._units else other
        with torch.inference_mode(False), torch.no_grad():
            sums = lead._packed(lead.layers) * 0
            for part in (self, other):
                sums += part._packed(lead.layers).to(sums.device)
            counts = {key: self._counts[key] + other._counts[key] for key in self._counts}
            self._set(lead.layers, lead._units, sums, counts)
        return self

    def _shared(self) -> dict[str, Any]:
        rows, columns = (None, None) if self._every_layer and not self._units else map(set, self.layers)
        kernel = self.kernel if self.kernel == "linear" else f"rbf of bandwidth {self.bandwidth:g}"
        return {"kernel": kernel, "rows": rows, "columns": columns, "units": self._units or None}

    def _packed(self, layers: tuple[Sequence[str], Sequence[str]]) -> Tensor:
        """Give all sums as one vector, the layers in the order of another accumulator; zeros before any batch."""
        rows, columns = layers
        names = tuple(dict.fromkeys((*rows, *columns)))
        if not self._units:
            return self._own.new_zeros(len(rows) * len(columns) + len(names))
        at = [self._rows.index(name) for name in rows], [self._columns.index(name) for name in columns]
        own = self._own[[self.names.index(name) for name in names]]
        return torch.cat([self._cross[at[0]][:, at[1]].flatten(), own])

    def _set(
        self,
        layers: tuple[Sequence[str], Sequence[str]],
        units: Mapping[str, int],
        sums: Tensor,
        counts: Mapping[str, int],
    ) -> None:
        self._rows, self._columns = map(tuple, layers)
        self._units, self._counts = dict(units), dict(counts)
        cross, own = sums.split([len(self._rows) * len(self._columns), len(self.names)])
        self._cross, self._own = cross.reshape(len(self._rows), len(self._columns)).clone(), own.clone()

    def all_reduce(self, group: ProcessGroup | None = None) -> MinibatchHSIC:
        """Add up what all processes of a group have seen, in place; every process ends with the same bits.

        Each process calls this once, after its last batch, also one that has seen none. See `distributed`.

        Args:
            group: The processes. Default: all.

        Returns:
            This accumulator.

        Raises:
            DataError: `torch.distributed` is not initialised, or kernels, layers or unit counts differ between
                processes (then in all of them).
        """
        from .distributed import all_reduce_minibatch

        return all_reduce_minibatch(self, group)

    def to(self, device: torch.device | str) -> MinibatchHSIC:
        """Move to a device, in place; returns this accumulator."""
        self._cross, self._own = self._cross.to(device), self._own.to(device)
        return self

    def save(self, path: PathLike) -> Path:
        """Write to a safetensors file, whole or not at all.

        Raises:
            OutputError: The file cannot be written.
        """
        content = {
            "kernel": self.kernel,
            "bandwidth": self.bandwidth,
            "every_layer": self._every_layer,
            "layers": self.layers,
            "units": self._units,
            "counts": self._counts,
            "product_dtype": str(self.product_dtype).removeprefix("torch."),
            "max_bytes": self.max_bytes,
        }
        return write_state(path, _FORMAT, content, {"sums": self._packed(self.layers)})

    @classmethod
    def load(cls, path: PathLike, device: torch.device | str = "cpu") -> MinibatchHSIC:
        """Read what `save` wrote.

        Args:
            path: The file.
            device: Where to put the sums.

        Raises:
            CheckpointError: The file is missing, damaged, or holds something else.
        """
        return read_state(path, _FORMAT, cls._from_file, device)

    @classmethod
    def _from_file(cls, content: Any, tensors: dict[str, Tensor]) -> MinibatchHSIC:
        layers = content["layers"]
        loaded = cls(
            content["kernel"],
            content["bandwidth"],
            layers=None if content["every_layer"] else layers,
            product_dtype=getattr(torch, content["product_dtype"]),
            max_bytes=content["max_bytes"],
        )
        if content["units"]:
            loaded._set(layers, content["units"], tensors["sums"], content["counts"])
        return loaded


def _two_lists(layers: tuple[Iterable[str], Iterable[str]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    sides = tuple(layers)
    if len(sides) != 2 or any(isinstance(side, str) for side in sides):
        raise DataError(f"layers is {layers!r}; expected two lists of names, such as (['a.conv1'], ['b.conv1'])")
    rows, columns = (tuple(dict.fromkeys(side)) for side in sides)
    if not rows or not columns:
        raise DataError(f"layers is {layers!r}: name at least one layer on each side")
    return rows, columns

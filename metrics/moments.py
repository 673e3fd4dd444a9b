"""Joint first and second moments of the units of many layers, streamed batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..base.errors import DataError, LayerNotFoundError, NotFiniteError, nearest
from ..base.files import PathLike
from .batch_checks import Pair, check_layers, check_matrix, check_pair, check_same, unique_pairs
from .state_file import read_state, write_state

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FORMAT = "isthmus.moments.1"
_PRODUCT_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass
class _Sums:
    """Moments of one layer. Means are kept relative to `shift`, its first sample ever seen.

    Constant units then have exactly zero variance, and a large offset costs no digits.
    """

    count: int
    shift: Tensor
    mean: Tensor
    squares: Tensor

    def to(self, device: torch.device | str) -> _Sums:
        return _Sums(self.count, self.shift.to(device), self.mean.to(device), self.squares.to(device))

    def mean_from(self, shift: Tensor) -> Tensor:
        return self.mean + (self.shift - shift)


class Moments:
    """Joint means and (co)variances of the units of many layers, from any number of batches.

    Batches are merged by the pairwise update of Chan, Golub & LeVeque (1983): no two large sums are ever subtracted.
    Sums are float64, on the device of the activations. Of a data set in parts, `merge` joins the moments of each part;
    where the parts are with the processes of `torch.distributed`, `all_reduce` joins them in every process.

    Args:
        pairs: The layers whose cross-moments are kept: "all" pairs, a layer with itself included; "none" (means and
            variances only); or pairs of names, (name, name) for the covariance inside one layer.
        product_dtype: The precision of the matrix products, taken of centred activations: float64, float32 (relative
            error about 1e-7 of an entry, at half the time) or bfloat16.

    Raises:
        DataError: `pairs` or `product_dtype` is none of these.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])
    >>> moments = Moments()
    >>> moments.update({"x": x[:2]})
    >>> moments.update({"x": x[2:]})
    >>> moments.covariance("x", "x", correction=1)
    tensor([[ 4., -1.],
            [-1.,  7.]], dtype=torch.float64)
    """

    def __init__(
        self,
        pairs: Literal["all", "none"] | Iterable[Pair] = "all",
        *,
        product_dtype: torch.dtype = torch.float64,
    ) -> None:
        if product_dtype not in _PRODUCT_DTYPES:
            raise DataError(f"product_dtype is {product_dtype}; expected one of {', '.join(map(str, _PRODUCT_DTYPES))}")
        self._every_pair = isinstance(pairs, str) and pairs == "all"
        self._pairs = unique_pairs(pairs)
        self.product_dtype = product_dtype
        self._sums: dict[str, _Sums] = {}
        self._products: dict[Pair, Tensor] = {}

    def __repr__(self) -> str:
        layers = ", ".join(f"{name}: {sums.count} x {len(sums.mean)}" for name, sums in self._sums.items())
        return f"Moments({layers or 'no samples'}; {len(self._pairs)} pairs)"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers, in the order of the first batch."""
        return tuple(self._sums)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Pairs of layers whose cross-moments are kept, each once."""
        return self._pairs

    def update(self, activations: Mapping[str, Tensor]) -> None:
        """Add one batch; a batch that is refused changes nothing.

        Args:
            activations: Samples x units by layer name; the same layers and unit counts in every batch. Layers outside
                all pairs add to their means and variances.

        Raises:
            DataError: A shape, dtype or device does not fit, or the layers of a pair differ in their number of samples.
            LayerNotFoundError: A layer of `pairs` is missing.
            NotFiniteError: An activation holds NaN or infinity, or its products overflow.
        """
        # State that is born under inference_mode could not be updated outside it.
        with torch.inference_mode(False), torch.no_grad():
            pairs = self._check(activations)
            paired = {name for pair in pairs for name in pair}
            batch, centred = {}, {}
            for name, x in activations.items():
                shift = self._sums[name].shift if name in self._sums else x[0].to(torch.float64, copy=True)
                batch[name], x = _centre(x, shift, self.product_dtype)
                _check_range(name, batch[name], self.product_dtype)
                if name in paired:
                    centred[name] = x
            if not self._sums:
                self._pairs = pairs
                self._allocate(batch)
            self._absorb(batch, lambda total, a, b: _add_product(total, centred[a], centred[b]))

    def _check(self, activations: Mapping[str, Tensor]) -> tuple[Pair, ...]:
        names = tuple(activations)
        pairs = tuple(combinations_with_replacement(names, 2)) if self._every_pair and not self._sums else self._pairs
        check_layers(names, self._sums)
        for name, x in activations.items():
            sums = self._sums.get(name)
            check_matrix(name, x, (len(sums.mean), sums.mean.device) if sums else None)
        for a, b in pairs:
            for name in (a, b):
                if name not in activations:
                    raise LayerNotFoundError(f"layer {name!r} of pair {(a, b)} is missing{nearest(name, names)}")
            check_pair(a, b, activations)
        return pairs

    def _allocate(self, batch: Mapping[str, _Sums]) -> None:
        for name, new in batch.items():
            self._sums[name] = _Sums(0, new.shift, torch.zeros_like(new.mean), torch.zeros_like(new.squares))
        for a, b in self._pairs:
            self._products[a, b] = batch[a].mean.new_zeros(len(batch[a].mean), len(batch[b].mean))

    def _absorb(self, batch: Mapping[str, _Sums], add: Callable[[Tensor, str, str], object]) -> None:
        delta = {name: new.mean_from(self._sums[name].shift) - self._sums[name].mean for name, new in batch.items()}
        weight = {name: self._sums[name].count * new.count / (self._sums[name].count + new.count)
                  for name, new in batch.items()}  # fmt: skip
        for (a, b), total in self._products.items():
            add(total, a, b)
            total.addr_(delta[a], delta[b], alpha=weight[a])
        for name, new in batch.items():
            sums = self._sums[name]
            sums.count += new.count
            sums.mean += delta[name] * (new.count / sums.count)
            sums.squares += new.squares + weight[name] * delta[name] ** 2

    def merge(self, other: Moments) -> Moments:
        """Add all that another accumulator has seen, in place; the other one is left as it is.

        Args:
            other: Moments of other samples of the same layers, with the same pairs.

        Returns:
            This accumulator.

        Raises:
            DataError: Layers, unit counts or pairs differ.

        >>> x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
        >>> first, second = Moments(), Moments()
        >>> first.update({"x": x[:4]})
        >>> second.update({"x": x[4:]})
        >>> first.merge(second).count("x")
        6
        """
        if not other._sums:
            return self
        device = next(iter((self if self._sums else other)._sums.values())).mean.device
        with torch.inference_mode(False), torch.no_grad():
            check_same("moments", [self._shared(), other._shared()], ["this accumulator", "the other one"])
            theirs = {name: sums.to(device) for name, sums in other._sums.items()}
            # A copy: one accumulator merged with itself must not read what it has just written.
            products = {pair: other._product(*pair).to(device, copy=True) for pair in self._pairs or other._pairs}
            if not self._sums:
                self._pairs = self._pairs or other._pairs
                self._allocate(theirs)
            self._absorb(theirs, lambda total, a, b: total.add_(products[a, b]))
        return self

    def _shared(self) -> dict[str, Any]:
        pairs = {(min(pair), max(pair)) for pair in self._pairs}
        return {
            "pairs": pairs if self._sums or not self._every_pair else None,
            "units": {name: len(sums.mean) for name, sums in self._sums.items()} or None,
        }

    def all_reduce(self, group: ProcessGroup | None = None) -> Moments:
        """Add up what all processes of a group have seen, in place; every process ends with the same bits.

        Each process calls this once, after its last batch, also one that has seen none. See `distributed`.

        Args:
            group: The processes. Default: all.

        Returns:
            This accumulator.

        Raises:
            DataError: `torch.distributed` is not initialised, or layers, unit counts or pairs differ between processes
                (then in all of them).
        """
        from .distributed import all_reduce_moments

        return all_reduce_moments(self, group)

    def _layer(self, name: str) -> _Sums:
        if name not in self._sums:
            hint = nearest(name, self._sums) if self._sums else "; no batch has been added yet"
            raise LayerNotFoundError(f"no moments of layer {name!r}{hint}")
        return self._sums[name]

    def _product(self, a: str, b: str) -> Tensor:
        for name in (a, b):
            self._layer(name)
        if (a, b) in self._products:
            return self._products[a, b]
        if (b, a) in self._products:
            return self._products[b, a].T
        raise LayerNotFoundError(
            f"cross-moments of {a!r} and {b!r} were not kept; "
            f"add the pair ({a!r}, {b!r}) to Moments(pairs=...), or keep 'all', and run the data again"
        )

    def count(self, name: str) -> int:
        """Give the number of samples of a layer."""
        return self._layer(name).count

    def mean(self, name: str) -> Tensor:
        """Give the mean of each unit, (units,) in float64."""
        sums = self._layer(name)
        return sums.shift + sums.mean

    def variance(self, name: str, correction: int = 0) -> Tensor:
        """Give the variance of each unit: squared deviations over (count - correction), (units,) in float64.

        Raises:
            DataError: There are too few samples.
        """
        return self._layer(name).squares / self._divisor(name, correction)

    def covariance(self, a: str, b: str, correction: int = 0) -> Tensor:
        """Give the covariance of each unit of one layer with each of another.

        Args:
            a: Layer of the rows.
            b: Layer of the columns. One order of a pair is kept, both can be read.
            correction: Divide by count - correction.

        Returns:
            (units of a x units of b) in float64.

        Raises:
            LayerNotFoundError: The pair was not kept.
            DataError: There are too few samples.
        """
        return self._product(a, b) / self._divisor(a, correction)

    def correlation(self, a: str, b: str) -> Tensor:
        """Give Pearson's correlation of each unit of one layer with each of another; NaN for constant units.

        Raises:
            LayerNotFoundError: The pair was not kept.
        """
        scale = [self._layer(name).squares.sqrt() for name in (a, b)]
        return (self._product(a, b) / scale[0][:, None]).div_(scale[1])

    def _divisor(self, name: str, correction: int) -> int:
        divisor = self.count(name) - correction
        if divisor <= 0:
            raise DataError(f"layer {name!r}: {self.count(name)} samples are too few for correction={correction}")
        return divisor

    def to(self, device: torch.device | str) -> Moments:
        """Move to a device, in place; returns this accumulator."""
        self._sums = {name: sums.to(device) for name, sums in self._sums.items()}
        self._products = {pair: product.to(device) for pair, product in self._products.items()}
        return self

    def save(self, path: PathLike) -> Path:
        """Write to a safetensors file, whole or not at all.

        Raises:
            OutputError: The file cannot be written.
        """
        return write_state(path, _FORMAT, *self._to_file())

    def _to_file(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {f"product.{index}": self._products[pair] for index, pair in enumerate(self._products)}
        for index, sums in enumerate(self._sums.values()):
            tensors |= {f"{part}.{index}": getattr(sums, part) for part in ("shift", "mean", "squares")}
        content = {
            "counts": {name: sums.count for name, sums in self._sums.items()},
            "pairs": self._pairs,
            "every_pair": self._every_pair,
            "product_dtype": str(self.product_dtype).removeprefix("torch."),
        }
        return content, tensors

    @classmethod
    def load(cls, path: PathLike, device: torch.device | str = "cpu") -> Moments:
        """Read what `save` wrote.

        Args:
            path: The file.
            device: Where to put the sums.

        Raises:
            CheckpointError: The file is missing, damaged, or holds something else.
        """
        return read_state(path, _FORMAT, cls._from_file, device)

    @classmethod
    def _from_file(cls, content: Any, tensors: dict[str, Tensor]) -> Moments:
        pairs = [(a, b) for a, b in content["pairs"]]
        moments = cls("all" if content["every_pair"] else pairs, product_dtype=getattr(torch, content["product_dtype"]))
        moments._pairs = tuple(pairs)
        for index, (name, count) in enumerate(content["counts"].items()):
            parts = (tensors[f"{part}.{index}"] for part in ("shift", "mean", "squares"))
            moments._sums[name] = _Sums(count, *parts)
        for index, pair in enumerate(pairs if moments._sums else ()):
            moments._products[pair] = tensors[f"product.{index}"]
        return moments


def _centre(x: Tensor, shift: Tensor, dtype: torch.dtype) -> tuple[_Sums, Tensor]:
    x = x - shift
    mean = x.mean(0)
    x -= mean
    centred = x.to(dtype)
    squares = x.square() if centred is x else x.square_()  # fresh memory costs more than the arithmetic
    return _Sums(len(x), shift, mean, squares.sum(0)), centred


def _check_range(name: str, sums: _Sums, dtype: torch.dtype) -> None:
    # By Cauchy-Schwarz no sum of products exceeds the largest sum of squares.
    if not (sums.squares <= torch.finfo(dtype).max).all():
        raise NotFiniteError(
            f"layer {name!r} of shape {(sums.count, len(sums.mean))} holds NaN, infinity, or values whose squares "
            f"overflow {dtype}"
        )


def _add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    if x.dtype == total.dtype:
        total.addmm_(x.T, y)
    else:
        total += x.T @ y

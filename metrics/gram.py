"""The samples themselves of many layers, streamed batch by batch: what sample x sample kernels need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..base.errors import DataError, LayerNotFoundError, NotFiniteError, nearest
from ..base.files import PathLike
from .batch_checks import check_layers, check_matrix
from .fingerprints import Samples, check_same, fingerprints
from .gram_file import load_gram, save_gram
from .gram_store import Block, Layer, Spill, check_mergeable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Gram:
    """The activations of many layers, samples x units, from any number of batches.

    Kernels between samples (RBF, debiased CKA, distances) need the samples themselves; a `Gram` keeps them once, for
    every layer of both networks, and every index of this kind is computed from it. Rows are kept as they come where
    `dtype` holds them exactly, else relative to the mean of their first batch, so that a large offset costs no digits.
    What exceeds `max_bytes` goes to one temporary file, read back piece by piece; it is gone with the object, or with
    the process however that ends.

    Args:
        dtype: The precision of the rows: float32, float64, bfloat16 or float16.
        max_bytes: How many bytes of rows stay in memory, on the device of the activations.
        folder: Where the temporary file is made; None for the system's folder of temporary files.

    Raises:
        DataError: `dtype` or `max_bytes` cannot be used.

    Attributes:
        convention: How activations became rows, in words and numbers, as whoever filled the store noted it.

    >>> x = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])
    >>> gram = Gram()
    >>> gram.update({"x": x[:2]}, samples=[10, 11])
    >>> gram.update({"x": x[2:]}, samples=[12])
    >>> gram.rows("x")
    tensor([[-2., -1.],
            [ 0.,  3.],
            [ 2., -2.]])
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        max_bytes: int = 4 << 30,
        folder: PathLike | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise DataError(f"dtype is {dtype}; expected one of {', '.join(map(str, _DTYPES))}")
        if max_bytes < 0:
            raise DataError(f"max_bytes is {max_bytes}; expected a number of bytes, 0 to keep all rows in a file")
        self.dtype = dtype
        self.max_bytes = max_bytes
        self.folder = folder
        self._layers: dict[str, Layer] = {}
        self._held = 0
        self._spill: Spill | None = None
        self._samples: list[Tensor] = []
        self.convention: dict[str, Any] = {}

    def __repr__(self) -> str:
        layers = ", ".join(f"{name}: {layer.count} x {len(layer.shift)}" for name, layer in self._layers.items())
        return f"Gram({layers or 'no samples'}; {self.nbytes} bytes, {self.spilled} of them in a file)"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers, in the order of the first batch."""
        return tuple(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, in memory or in a file."""
        return sum(block.nbytes for layer in self._layers.values() for block in layer.blocks)

    @property
    def spilled(self) -> int:
        """Bytes of the rows that stand in a file."""
        blocks = (block for layer in self._layers.values() for block in layer.blocks)
        return sum(block.nbytes for block in blocks if block.rows is None)

    @property
    def samples(self) -> Tensor | None:
        """Fingerprints of the samples in the order seen, (samples,) in int64; None where none were given."""
        if len(self._samples) > 1:
            self._samples = [torch.cat(self._samples)]
        return self._samples[0] if self._samples else None

    def count(self, name: str) -> int:
        """Give the number of samples of a layer."""
        return self._layer(name).count

    def units(self, name: str) -> int:
        """Give the number of units of a layer."""
        return len(self._layer(name).shift)

    def device(self, name: str) -> torch.device:
        """Give the device of a layer's rows."""
        return self._layer(name).shift.device

    def mean(self, name: str) -> Tensor:
        """Give the mean of each unit over the rows as they are kept, (units,) in float64."""
        layer = self._layer(name)
        return layer.shift + layer.mean

    def rows(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        centred: bool = True,
    ) -> Tensor:
        """Give samples of a layer, in the order seen, centred by the mean of all.

        Args:
            name: The layer.
            start: The first sample.
            stop: One after the last sample; None for all.
            dtype: Of the result; None for float64 where rows are kept so, else float32.
            centred: Subtract the mean; without, they are as they came, but for the rounding to the store's dtype.

        Returns:
            A new tensor, (samples x units).

        Raises:
            LayerNotFoundError: There is no such layer.
            OutputError: The temporary file cannot be read back.
        """
        layer = self._layer(name)
        dtype = dtype or torch.promote_types(layer.dtype, torch.float32)
        start, stop, _ = slice(start, stop).indices(layer.count)
        with torch.inference_mode(False), torch.no_grad():
            return layer.rows(start, max(start, stop), dtype, centred)

    def update(self, activations: Mapping[str, Tensor], samples: Samples | None = None) -> None:
        """Add one batch; a batch that is refused changes nothing.

        Args:
            activations: Samples x units by layer name; the same layers and unit counts in every batch. Layers may
                differ in their number of samples (positions of feature maps); those of a pair must agree when it is
                compared.
            samples: What tells which samples these are: identities (integers, strings) or the inputs themselves, see
                `fingerprints`; in every batch or in none. Grams of two networks are then refused by `join` if their
                samples differ.

        Raises:
            DataError: A shape, dtype or device does not fit; samples came with some batches only.
            NotFiniteError: An activation holds NaN or infinity, or does not fit into `dtype`.
            OutputError: The temporary file cannot be written.
        """
        with torch.inference_mode(False), torch.no_grad():
            self._check(activations)
            prints = [] if samples is None else [fingerprints(samples)]
            if self._layers and bool(prints) != bool(self._samples):
                raise DataError(
                    f"this batch came {'with' if prints else 'without'} samples, earlier ones "
                    f"{'with' if self._samples else 'without'}; pass samples= with every batch, or with none"
                )
            mark = self._mark()
            try:
                staged = {name: self._kept(name, *self._shifted(name, x)) for name, x in activations.items()}
            except BaseException:
                self._forget(*mark)
                raise
            self._commit(staged)
            self._samples += prints

    def _check(self, activations: Mapping[str, Tensor]) -> None:
        check_layers(activations, self._layers)
        for name, x in activations.items():
            known = self._layers.get(name)
            check_matrix(name, x, None if known is None else (len(known.shift), known.shift.device))

    def _shifted(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(x.dtype, self.dtype) == self.dtype
        if name in self._layers:
            shift = self._layers[name].shift
        else:
            # Rounding takes fewer digits from what is near zero.
            shift = torch.zeros_like(x[0], dtype=torch.float64) if exact else _mean(x)
        if exact and not shift.any():
            return x.to(self.dtype, copy=True), shift
        return (x - shift).to(self.dtype), shift

    def _kept(self, name: str, rows: Tensor, shift: Tensor) -> tuple[Block, Tensor]:
        """Put rows where there is room; gives their block and their mean. What it takes, `_forget` gives back."""
        least, greatest = rows.aminmax()
        peak = float(torch.maximum(-least, greatest))
        if not peak < float("inf"):
            raise NotFiniteError(
                f"layer {name!r} of shape {tuple(rows.shape)} holds NaN, infinity, or values that overflow {rows.dtype}"
            )
        mean = _mean(rows)
        block = Block(len(rows), shift, peak, rows.dtype)
        if self._held + rows.nbytes <= self.max_bytes:
            self._held += rows.nbytes
            return replace(block, rows=rows), mean
        self._spill = self._spill or Spill(self.folder)
        return replace(block, spill=self._spill, start=self._spill.write(rows)), mean

    def _mark(self) -> tuple[int, int]:
        return self._held, self._spill.size if self._spill else 0

    def _forget(self, held: int, size: int) -> None:
        self._held = held
        if self._spill:
            self._spill.forget(size)

    def _commit(self, staged: Mapping[str, tuple[Block, Tensor]]) -> None:
        for name, (block, mean) in staged.items():
            if name not in self._layers:
                self._layers[name] = Layer(block.shift, torch.zeros_like(block.shift), block.dtype)
            self._layers[name].add(block, mean)

    def _blocks(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Give the blocks of a layer one by one: rows as they are kept, and their shift (units,) in float64."""
        for block in list(self._layer(name).blocks):
            yield block.read(), block.shift

    def _append(self, name: str, rows: Tensor, shift: Tensor) -> None:
        """Add rows to one layer, kept as they are (not copied): rows + shift are the activations.

        The caller sees to it that all layers get the rows of the same samples.
        """
        known = self._layers.get(name)
        if known and len(known.shift) != len(shift):
            raise DataError(f"layer {name!r} has {len(shift)} units; earlier batches had {len(known.shift)}")
        self._commit({name: self._kept(name, rows.to(known.dtype if known else rows.dtype), shift)})

    def _peak(self, name: str) -> float:
        """Give a bound on the magnitude of centred rows, for scaling."""
        return self._layer(name).peak()

    def merge(self, other: Gram) -> Gram:
        """Add all samples that another store has seen, in place, after those seen here; the other is left as it is.

        Args:
            other: Samples of the same layers, both with fingerprints or both without.

        Returns:
            This store.

        Raises:
            DataError: Layers, unit counts or devices differ, or only one has fingerprints.

        >>> x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
        >>> first, second = Gram(), Gram()
        >>> first.update({"x": x[:4]})
        >>> second.update({"x": x[4:]})
        >>> first.merge(second).count("x")
        6
        """
        if not other._layers:
            return self
        check_mergeable(self._layers, other._layers)
        if self._layers and bool(self._samples) != bool(other._samples):
            raise DataError(
                "only one of the two stores has fingerprints of its samples; pass samples= to both updates, or to none"
            )
        with torch.inference_mode(False), torch.no_grad():
            mark, before = self._mark(), {name: layer.copy() for name, layer in self._layers.items()}
            samples = list(other._samples)
            try:
                for name in self.names or other.names:
                    for rows, shift in other._blocks(name):
                        self._append(name, rows, shift)
            except BaseException:
                self._layers = before
                self._forget(*mark)
                raise
            self._samples += samples
            self.convention = self.convention or dict(other.convention)
        return self

    def all_reduce(self, group: ProcessGroup | None = None) -> Gram:
        """Put the samples of all processes of a group one after the other, in order of rank, in place, in all of them.

        Each process calls this once, after its last batch, also one that has seen none. Returns this store.

        Args:
            group: The processes. Default: all.

        Raises:
            DataError: `torch.distributed` is not initialised, or layers, unit counts or types differ between processes
                (then in all of them).
            OutputError: A process cannot write its temporary file (then in all of them).
        """
        from .distributed import all_reduce_gram

        return all_reduce_gram(self, group)

    @classmethod
    def join(cls, grams: Mapping[str, Gram]) -> Gram:
        """Put the layers of several networks side by side: "a.conv1" is layer "conv1" of the store named "a".

        Nothing is copied; what is added to a store afterwards does not appear in the joined one. Its
        `convention` is what all agree on.

        Args:
            grams: Stores by name, of the same samples in the same order.

        Raises:
            DataError: Two have fingerprints of their samples that differ (a loader that shuffles), or two layers would
                have the same name.

        >>> x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
        >>> a, b = Gram(), Gram()
        >>> a.update({"fc": x}, samples=range(6))
        >>> b.update({"fc": x.relu()}, samples=range(6))
        >>> Gram.join({"a": a, "b": b}).names
        ('a.fc', 'b.fc')
        """
        if not grams:
            raise DataError("there is nothing to join; pass stores by name, such as {'a': gram_a, 'b': gram_b}")
        first = next(iter(grams.values()))
        joined = cls(dtype=first.dtype, max_bytes=max(gram.max_bytes for gram in grams.values()), folder=first.folder)
        known = {key: gram.samples for key, gram in grams.items()}
        given = {key: samples for key, samples in known.items() if samples is not None}
        for key, samples in given.items():
            start = next(iter(given))
            check_same(given[start], samples, f"{start!r}", f"{key!r}")
        joined._samples = list(given.values())[:1]
        told = [{(key, repr(value)) for key, value in gram.convention.items()} for gram in grams.values()]
        agreed = set.intersection(*told)
        joined.convention = {key: value for key, value in first.convention.items() if (key, repr(value)) in agreed}
        for key, gram in grams.items():
            for name, layer in gram._layers.items():
                if f"{key}.{name}" in joined._layers:
                    raise DataError(f"two layers would be named '{key}.{name}'; name the stores without dots")
                joined._layers[f"{key}.{name}"] = layer.copy()
        joined._held = joined.nbytes - joined.spilled
        return joined

    def _layer(self, name: str) -> Layer:
        if name not in self._layers:
            hint = nearest(name, self._layers) if self._layers else "; no batch has been added yet"
            raise LayerNotFoundError(f"no samples of layer {name!r}{hint}")
        return self._layers[name]

    def to(self, device: torch.device | str) -> Gram:
        """Move to a device, in place; rows in a file stay there and are read to the device. Returns this store."""
        self._layers = {name: layer.to(device) for name, layer in self._layers.items()}
        return self

    def save(self, path: PathLike) -> Path:
        """Write to a safetensors file, whole or not at all, block by block: no more than one block is held.

        Raises:
            OutputError: The file cannot be written.
        """
        return save_gram(self, path)

    @classmethod
    def load(
        cls,
        path: PathLike,
        device: torch.device | str = "cpu",
        *,
        max_bytes: int = 4 << 30,
        folder: PathLike | None = None,
    ) -> Gram:
        """Read what `save` wrote, in pieces of 64 MiB; what exceeds `max_bytes` goes to a temporary file.

        Args:
            path: The file.
            device: Where to put the rows.
            max_bytes: As in the class.
            folder: As in the class.

        Raises:
            CheckpointError: The file is missing, damaged, or holds something else.
            OutputError: The temporary file cannot be written.
        """
        gram = cls(max_bytes=max_bytes, folder=folder)
        load_gram(gram, path, device)
        return gram


def _mean(x: Tensor) -> Tensor:
    # Relative to its first sample a constant unit is exactly zero, and stays so.
    first = x[0].to(torch.float64)
    return first + (x - first).mean(0)

"""Where a `Gram` keeps its rows: blocks in memory or in a temporary file."""

from __future__ import annotations

import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..base.errors import DataError, OutputError
from ..base.files import PathLike


class Spill:
    """Rows in a temporary file; where the system allows that it has no name, so that nothing can leave it behind.

    Args:
        folder: Where to make it; None for the system's folder of temporary files.

    Raises:
        OutputError: It cannot be made there.
    """

    def __init__(self, folder: PathLike | None) -> None:
        self.folder = Path(folder or tempfile.gettempdir())
        self.size = 0
        try:
            # Open as long as this object lives: the finalizer below closes it.
            self._file = tempfile.TemporaryFile(dir=self.folder, prefix="isthmus-", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._refused(error) from error
        self.close = weakref.finalize(self, self._file.close)

    def _refused(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot keep activations in a temporary file of {self.folder}: {error.strerror or error}; choose a folder "
            "with more room, Gram(folder=...), or more memory, Gram(max_bytes=...)"
        )

    def write(self, rows: Tensor) -> int:
        """Add rows at the end; gives where they start.

        Raises:
            OutputError: The disk is full, or fails.
        """
        start = self.size
        try:
            self._file.seek(start)
            write_bytes(self._file, rows)
        except OSError as error:
            self._file.truncate(start)
            raise self._refused(error) from error
        self.size = start + rows.nbytes
        return start

    def read(self, start: int, into: Tensor) -> None:
        """Fill a contiguous tensor in main memory with what stands at `start`.

        Raises:
            OutputError: It cannot be read back.
        """
        view = into.view(torch.uint8).numpy().data.cast("B")
        try:
            self._file.seek(start)
            while view:
                done = self._file.readinto(view)
                if not done:
                    raise OSError(None, "the file is shorter than it was")
                view = view[done:]
        except OSError as error:
            raise self._refused(error) from error

    def forget(self, size: int) -> None:
        """Drop what stands beyond `size`: rows of a batch that was refused."""
        self._file.truncate(size)
        self.size = size


def write_bytes(file: BinaryIO, values: Tensor) -> None:
    """Write the entries of a tensor, in row-major order and the machine's byte order."""
    view = values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    while view:
        # One call of the system writes 2 GiB at most.
        view = view[file.write(view) :]


@dataclass(frozen=True)
class Block:
    """Rows of one layer that came together: x ≈ rows + shift.

    Attributes:
        count: Number of rows.
        shift: (units,) in float64.
        peak: The largest magnitude of the rows.
        dtype: Of the rows.
        rows: (count x units), or None where they stand in a file.
        spill: The file.
        start: Where in the file, in bytes.
    """

    count: int
    shift: Tensor
    peak: float
    dtype: torch.dtype
    rows: Tensor | None = None
    spill: Spill | None = None
    start: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return self.count * len(self.shift) * self.dtype.itemsize

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Give rows as they are kept, on the device of the shift; not to be written to."""
        stop = self.count if stop is None else stop
        if self.rows is not None:
            return self.rows[start:stop]
        assert self.spill is not None
        width = len(self.shift)
        rows = torch.empty(stop - start, width, dtype=self.dtype)
        self.spill.read(self.start + start * width * self.dtype.itemsize, rows)
        return rows.to(self.shift.device)

    def to(self, shift: Tensor) -> Block:
        """Move to where its shift has been moved."""
        return replace(self, shift=shift, rows=None if self.rows is None else self.rows.to(shift.device))


@dataclass
class Layer:
    """Rows of one layer. Its mean is kept relative to `shift`, that of its first block."""

    shift: Tensor
    mean: Tensor
    dtype: torch.dtype
    blocks: list[Block] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of rows of all blocks."""
        return self.stops[-1] if self.stops else 0

    def add(self, block: Block, mean: Tensor) -> None:
        """Add a block whose rows have this mean (as they are kept: relative to the block's shift)."""
        moved = mean + (block.shift - self.shift) - self.mean
        self.mean = self.mean + moved * (block.count / (self.count + block.count))
        self.blocks.append(block)
        self.stops.append(self.count + block.count)

    def rows(self, start: int, stop: int, dtype: torch.dtype, centred: bool) -> Tensor:
        """Give some of the rows in a new tensor, minus their mean if `centred`."""
        rows = torch.empty(stop - start, len(self.shift), dtype=dtype, device=self.shift.device)
        at = bisect_right(self.stops, start)
        while start < stop:
            block, end = self.blocks[at], self.stops[at]
            first, last = start - (end - block.count), min(stop, end) - (end - block.count)
            piece = rows[len(rows) - (stop - start) :][: last - first]
            offset = self.mean + (self.shift - block.shift) if centred else -block.shift
            kept = block.read(first, last)
            wide = torch.promote_types(kept.dtype, dtype)
            # In two parts a large offset costs no digits; float64 would take ten times as long.
            high = offset.to(wide)
            piece.copy_((kept.to(wide) - high).sub_((offset - high).to(wide)))
            start, at = min(stop, end), at + 1
        return rows

    def peak(self) -> float:
        """Give a bound on the magnitude of centred rows."""
        peaks: dict[int, float] = {}
        for block in self.blocks:
            peaks[id(block.shift)] = max(peaks.get(id(block.shift), 0.0), block.peak)
        shifts = {id(block.shift): block.shift for block in self.blocks}
        mean = self.shift + self.mean
        return max(peak + float((shifts[key] - mean).abs().amax()) for key, peak in peaks.items())

    def copy(self) -> Layer:
        """Give a layer of the same blocks, to which others can be added."""
        return replace(self, blocks=list(self.blocks), stops=list(self.stops))

    def to(self, device: torch.device | str) -> Layer:
        """Move to a device; rows in a file stay there."""
        shifts = {id(block.shift): block.shift.to(device) for block in self.blocks}
        blocks = [block.to(shifts[id(block.shift)]) for block in self.blocks]
        return replace(self, shift=self.shift.to(device), mean=self.mean.to(device), blocks=blocks)


def check_mergeable(mine: Mapping[str, Layer], theirs: Mapping[str, Layer]) -> None:
    """Refuse layers that cannot be put behind one another; without own layers, all can.

    Raises:
        DataError: Names, unit counts or devices differ.
    """
    units = [{name: len(layer.shift) for name, layer in layers.items()} for layers in (mine, theirs)]
    if mine and units[0] != units[1]:
        raise DataError(f"cannot merge samples of other layers (units by name): {units[0]} and {units[1]}")
    for name, layer in mine.items():
        devices = layer.shift.device, theirs[name].shift.device
        if devices[0] != devices[1]:
            raise DataError(f"layer {name!r} is on {devices[0]} and {devices[1]}; move them to one device with .to()")

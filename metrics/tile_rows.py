"""Centred rows of many layers, scaled, in one precision, handed out piece by piece within a bound on memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .gram import Gram
from .precision import Precision, products_in
from .ustatistic import median_square

MEDIAN_SAMPLES = 4096
"""Median distances are exact up to so many samples."""


class TileRows:
    """Rows of layers of a `Gram` that have the same samples, as kernels need them.

    Rows are scaled by a power of two, which no index notices and which keeps their products within range: a kernel of
    degree one in each of its rows is 4^exponent times that of the scaled rows.

    Args:
        gram: The store.
        names: The layers.
        precision: Of the rows: "float64", else float32; "bf16" rounds them to bfloat16, and hands them out in float32.
        max_bytes: Rows are kept in memory, once centred, if all of them fit into this.
    """

    def __init__(self, gram: Gram, names: Sequence[str], precision: Precision, max_bytes: int) -> None:
        self.gram = gram
        self.precision: Precision = precision
        self.samples = gram.count(names[0])
        self.units = {name: gram.units(name) for name in names}
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self.device = gram.device(names[0])
        self.exponent = {name: _exponent(gram._peak(name), self.dtype) for name in names}
        self._kept: dict[str, Tensor] = {}
        if self.samples * self.width * self.dtype.itemsize <= max_bytes:
            self._kept = {name: self._read(name, 0, self.samples) for name in names}

    @property
    def kept(self) -> bool:
        """Whether all rows are in memory."""
        return bool(self._kept)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the rows in memory."""
        return sum(rows.nbytes for rows in self._kept.values())

    @property
    def width(self) -> int:
        """Units of all layers together."""
        return sum(self.units.values())

    def __call__(self, name: str, start: int, stop: int) -> Tensor:
        """Give scaled centred rows, (samples x units); not to be written to."""
        if name in self._kept:
            return self._kept[name][start:stop]
        return self._read(name, start, stop)

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        rows = self.gram.rows(name, start, stop, dtype=self.dtype)
        rows *= 2.0 ** -self.exponent[name]
        return rows.to(torch.bfloat16).to(self.dtype) if self.precision == "bf16" else rows

    def pieces(self, name: str, step: int = 4096) -> Iterator[tuple[slice, Tensor]]:
        """Give all rows of a layer in pieces of at most `step` samples, each with its range."""
        for start in range(0, self.samples, step):
            piece = slice(start, min(start + step, self.samples))
            yield piece, self(name, piece.start, piece.stop)

    def squared_norms(self, name: str) -> Tensor:
        """Give the squared norm of each row, (samples,) in float64."""
        norms = [torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64) for _, rows in self.pieces(name)]
        return torch.cat(norms).square_()

    def median_distance(self, name: str) -> float:
        """Give the median distance between (scaled) rows, see `median_distance`."""
        if self.samples <= MEDIAN_SAMPLES:
            return median_distance(self(name, 0, self.samples))
        chosen = _evenly_spaced(self.samples).to(self.device)
        spread = []
        for piece, rows in self.pieces(name):
            inside = chosen[(chosen >= piece.start) & (chosen < piece.stop)]
            spread.append(rows[inside - piece.start])
        return median_distance(torch.cat(spread))


def _exponent(peak: float, dtype: torch.dtype) -> int:
    # Factors beyond these would leave the normal numbers.
    most = 1000 if dtype == torch.float64 else 120
    return max(-most, min(most, math.frexp(peak)[1])) if peak else 0


def _evenly_spaced(samples: int) -> Tensor:
    return torch.arange(MEDIAN_SAMPLES) * samples // MEDIAN_SAMPLES


def median_distance(rows: Tensor) -> float:
    """Compute the median Euclidean distance between samples, the width of RBF kernels at bandwidth 1.

    The square root of the median of all n² squared distances, those of a sample to itself included, as in the notebook
    that Kornblith et al. (2019) published. Exact up to 4,096 samples; of more, 4,096 evenly spaced ones are taken. A
    median that is within the rounding errors of equal samples is 0.

    Args:
        rows: (samples x units), floating-point; a common offset costs digits, so centre first.

    >>> median_distance(torch.tensor([[0.0], [3.0], [7.0]]))
    3.0
    """
    if len(rows) > MEDIAN_SAMPLES:
        rows = rows[_evenly_spaced(len(rows)).to(rows.device)]
    largest = rows.square().sum(1).amax()
    return math.sqrt(median_square(_squared_distances(rows), len(rows), largest, rows.shape[1]))


def _squared_distances(rows: Tensor, step: int = 512) -> Tensor:
    """Give the squared distance of each pair of different samples once."""
    n = len(rows)
    norms = rows.square().sum(1)
    squares = rows.new_empty(n * (n - 1) // 2)
    end = 0
    with products_in("float32"):
        for start in range(0, n, step):
            stop = min(start + step, n)
            square = (rows[start:stop] @ rows[start:].T).mul_(-2).add_(norms[start:stop, None]).add_(norms[start:])
            square.clamp_(min=0)
            own = torch.ones(stop - start, stop - start, dtype=torch.bool, device=rows.device).triu(1)
            for part in (square[:, : stop - start][own], square[:, stop - start :].reshape(-1)):
                squares[end : end + len(part)] = part
                end += len(part)
    return squares

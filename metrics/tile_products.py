"""Sums over pairs of samples, or of units, of the products of many layers at once, within a bound on memory."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..base.errors import DataError
from ..base.progress import progress as progress_bar
from .cost import TILE, Pair
from .precision import products_in
from .tile_rows import TileRows

_LEAST_SIDE = 16
_CHUNK = 4096
"""Entries of a tile that are summed in the precision of the tile before float64 takes over."""
_COLUMNS = 2048
"""Units along the side of a units x units product."""
_ROWS = 2048
"""Samples whose units x units products are summed in the precision of the rows before float64 takes over."""


@dataclass(frozen=True)
class Stack:
    """Layers whose kernels are stacked: those of the rows stand first, those of the columns last, shared ones between.

    Attributes:
        names: All layers, each once.
        rows: How many of the first are compared ...
        columns: ... with how many of the last.
        own: Whether each is also compared with itself.
    """

    names: tuple[str, ...]
    rows: int
    columns: int
    own: bool

    @classmethod
    def of(cls, layers_a: Collection[str], layers_b: Collection[str], *, own: bool) -> Stack:
        """Order the layers of two sides so that the kernels of neither are copied."""
        only_a = [name for name in layers_a if name not in layers_b]
        both = [name for name in layers_a if name in layers_b]
        only_b = [name for name in layers_b if name not in layers_a]
        return cls((*only_a, *both, *only_b), len(layers_a), len(layers_b), own)

    @classmethod
    def alone(cls, layers: Collection[str]) -> Stack:
        """Compare each layer with itself only."""
        return cls(tuple(layers), 0, 0, own=True)


class Kernel(Protocol):
    """Writes a tile of one layer's kernel."""

    def __call__(self, name: str, x: Tensor, y: Tensor, at: tuple[int, int], out: Tensor) -> None:
        """Write the kernel of rows x, from sample at[0], with rows y, from sample at[1], to `out`."""
        ...


@dataclass(frozen=True)
class Linear:
    """K = x yᵀ; U-centred (Székely & Rizzo 2014) where `shares` are given, with a diagonal of zeros.

    Attributes:
        shares: What U-centring adds to each row and column, by layer, (samples,). The rows of a centred linear kernel
            without its diagonal sum to minus the diagonal, so that it is known beforehand.
    """

    shares: Mapping[str, Tensor] | None = None

    @classmethod
    def u_centred(cls, norms: Mapping[str, Tensor], dtype: torch.dtype) -> Linear:
        """Make it of the squared norms of the rows by layer, (samples,) in float64."""
        n = len(next(iter(norms.values())))
        return cls({name: (d / (n - 2) - d.sum() / (2 * (n - 1) * (n - 2))).to(dtype) for name, d in norms.items()})

    def __call__(self, name: str, x: Tensor, y: Tensor, at: tuple[int, int], out: Tensor) -> None:
        """See `Kernel`."""
        torch.mm(x, y.T, out=out)
        if self.shares is not None:
            share = self.shares[name]
            out.add_(share[at[0] : at[0] + len(x), None]).add_(share[at[1] : at[1] + len(y)])
            if at[0] == at[1]:
                out.fill_diagonal_(0)


@dataclass(frozen=True)
class RBF:
    """K = exp(-d²/(2σ²)) − level: a constant that centring takes out anyway, so that little cancels then.

    Attributes:
        scaled: ‖x‖²/(2σ²) by layer, (samples,).
        rates: 1/σ² by layer.
        levels: What is subtracted, by layer: the kernel at the mean squared distance.
        means: That distance, squared, over 2σ².
        hollow: Whether the diagonal is left out, for debiased estimates.
    """

    scaled: Mapping[str, Tensor]
    rates: Mapping[str, float]
    levels: Mapping[str, float]
    means: Mapping[str, float]
    hollow: bool

    @classmethod
    def of(cls, norms: Mapping[str, Tensor], sigma: Mapping[str, float], dtype: torch.dtype, *, hollow: bool) -> RBF:
        """Make it of the squared norms of the rows by layer, (samples,) in float64, and of the widths."""
        scaled = {name: d / (2 * sigma[name] ** 2) for name, d in norms.items()}
        means = {name: 2 * float(d.mean()) for name, d in scaled.items()}
        levels = {name: math.exp(-mean) for name, mean in means.items()}
        rates = {name: sigma[name] ** -2 for name in norms}
        return cls({name: d.to(dtype) for name, d in scaled.items()}, rates, levels, means, hollow)

    def __call__(self, name: str, x: Tensor, y: Tensor, at: tuple[int, int], out: Tensor) -> None:
        """See `Kernel`."""
        scaled = self.scaled[name]
        torch.mm(x, y.T, out=out).mul_(self.rates[name])
        out.sub_(scaled[at[0] : at[0] + len(x), None]).sub_(scaled[at[1] : at[1] + len(y)]).clamp_(max=0)
        if at[0] == at[1]:
            out.fill_diagonal_(0)
        # exp(e) − level, without losing the small differences of kernels near 1.
        out.expm1_().sub_(math.expm1(-self.means[name]))
        if self.hollow and at[0] == at[1]:
            out.fill_diagonal_(0)

    def entry_noise(self, name: str) -> float:
        """Bound the rounding errors of a typical entry, which equal distances would leave behind."""
        return 16 * torch.finfo(self.scaled[name].dtype).eps * (1 + self.means[name]) * self.levels[name]


def sample_products(
    rows: TileRows, stack: Stack, kernel: Kernel, max_bytes: int, show: bool | None = None
) -> tuple[Tensor, Tensor]:
    """Sum products of kernels over samples x samples, in tiles of one triangle; the other is its mirror image.

    Args:
        rows: Of the layers.
        stack: Which layers are compared.
        kernel: Of the samples.
        max_bytes: Bound on the tiles, and on the rows that are held while others stream by.
        show: Show progress: always, never, or on a terminal only (None).

    Returns:
        Σ_kl K_kl L_kl of the layers of the stack, (layers x layers), NaN where not asked for; and Σ_l K_kl, (layers x
        samples), zero for linear kernels, which are centred already. Both in float64.

    Raises:
        DataError: Not even the smallest tiles fit into `max_bytes`.
    """
    count = len(stack.names)
    side, held = _sizes(rows, count, max_bytes)
    tiles = torch.empty(count, -(-side * side // _CHUNK) * _CHUNK, dtype=rows.dtype, device=rows.device)
    products = torch.full((count, count), math.nan, dtype=torch.float64, device=rows.device)
    products[: stack.rows, count - stack.columns :] = 0
    own = torch.zeros(count, dtype=torch.float64, device=rows.device)
    sums = torch.zeros(count, rows.samples, dtype=torch.float64, device=rows.device)
    number = math.comb(-(-rows.samples // side) + 1, 2)
    with products_in("float32"):
        for i, j, x, y in progress_bar(_walk(rows, stack.names, side, held), "kernels", number, show):
            shape = (i.stop - i.start, j.stop - j.start)
            size = shape[0] * shape[1]
            with products_in(rows.precision):
                for tile, name in zip(tiles, stack.names, strict=True):
                    kernel(name, x[name], y[name], (i.start, j.start), tile[:size].view(shape))
            if isinstance(kernel, RBF):
                _add_rows(sums, tiles[:, :size].view(count, *shape), i, j)
            _add_products(products, own, stack, _chunked(tiles, size), 1 if i == j else 2)
    if stack.own:
        # Shared layers have been compared with themselves already.
        diagonal = products.diagonal()
        diagonal.copy_(torch.where(diagonal.isnan(), own, diagonal))
    return products, sums


def _chunked(tiles: Tensor, size: int) -> Tensor:
    padded = -(-size // _CHUNK) * _CHUNK
    tiles[:, size:padded] = 0
    return tiles[:, :padded].unflatten(1, (-1, _CHUNK))


def _add_rows(sums: Tensor, tiles: Tensor, i: slice, j: slice) -> None:
    sums[:, i] += tiles.sum(2)
    if i != j:
        sums[:, j] += tiles.sum(1)


def _add_products(products: Tensor, own: Tensor, stack: Stack, tiles: Tensor, weight: int) -> None:
    first, last = stack.rows, len(stack.names) - stack.columns
    partial = torch.bmm(tiles[:first].transpose(0, 1), tiles[last:].permute(1, 2, 0))
    products[:first, last:] += weight * partial.sum(0, dtype=torch.float64)
    for alone in (slice(0, last), slice(max(first, last), None)) if stack.own else ():
        own[alone] += weight * torch.linalg.vector_norm(tiles[alone], dim=2).to(torch.float64).square_().sum(1)


def _sizes(rows: TileRows, count: int, max_bytes: int) -> tuple[int, int]:
    """Choose the side of the tiles, and how many samples are held while others stream by."""
    entry, largest = rows.dtype.itemsize, TILE if rows.device.type == "cpu" else 8 * TILE
    feasible = []
    for side in (size for size in (largest >> step for step in range(20)) if size >= _LEAST_SIDE):
        balanced = -(-rows.samples // -(-rows.samples // side))
        used = count * (balanced**2 + _CHUNK) * entry
        if rows.kept:
            if used <= max_bytes:
                return balanced, rows.samples
            continue
        # Beside the held rows there are those that stream by: the last ones and the next ones.
        held = (max_bytes - used) // (rows.width * entry) - 2 * balanced
        if held >= balanced:
            feasible.append((balanced, min(held // balanced * balanced, rows.samples)))
    if not feasible:
        need = (count * (_LEAST_SIDE**2 + _CHUNK) + 3 * _LEAST_SIDE * rows.width) * entry
        raise DataError(f"max_bytes is {max_bytes}; kernels of {count} layers need at least {need} bytes")
    # All rows are read once for each set that is held: large tiles must not leave it small.
    return next((sizes for sizes in feasible if sizes[1] >= min(4 * sizes[0], rows.samples)), feasible[-1])


Tile = tuple[slice, slice, Mapping[str, Tensor], Mapping[str, Tensor]]


def _walk(rows: TileRows, names: Sequence[str], side: int, held: int) -> Iterator[Tile]:
    """Give the ranges i <= j of each tile and the rows of both by layer, reading as little as possible."""
    near = _Held(rows, names, held)
    for top in range(0, rows.samples, held):
        stop = min(top + held, rows.samples)
        near.fill(top, stop)
        inside = _cut(top, stop, side)
        for at, j in enumerate(inside):
            for i in inside[: at + 1]:
                yield i, j, near.take(i), near.take(j)
        for j in _cut(stop, rows.samples, side):
            far = {name: rows(name, j.start, j.stop) for name in names}
            for i in inside:
                yield i, j, near.take(i), far


def _cut(start: int, stop: int, side: int) -> list[slice]:
    return [slice(first, min(first + side, stop)) for first in range(start, stop, side)]


class _Held:
    """Rows that stay while others stream by, in the same memory each time."""

    def __init__(self, rows: TileRows, names: Sequence[str], count: int) -> None:
        self.rows = rows
        self.names = names
        self.start = 0
        shapes = {} if rows.kept else {name: (count, rows.units[name]) for name in names}
        self.buffers = {
            name: torch.empty(shape, dtype=rows.dtype, device=rows.device) for name, shape in shapes.items()
        }

    def fill(self, start: int, stop: int) -> None:
        self.start = start
        for name, buffer in self.buffers.items():
            for piece in _cut(start, stop, _ROWS):
                buffer[piece.start - start : piece.stop - start] = self.rows(name, piece.start, piece.stop)

    def take(self, piece: slice) -> dict[str, Tensor]:
        if self.rows.kept:
            return {name: self.rows(name, piece.start, piece.stop) for name in self.names}
        return {
            name: buffer[piece.start - self.start : piece.stop - self.start] for name, buffer in self.buffers.items()
        }


@dataclass(frozen=True)
class _Task:
    """A part of the units of one layer with a part of those of another."""

    a: str
    b: str
    units_a: slice
    units_b: slice
    weight: int

    @property
    def entries(self) -> int:
        return (self.units_a.stop - self.units_a.start) * (self.units_b.stop - self.units_b.start)


def feature_products(
    rows: TileRows, pairs: Iterable[Pair], max_bytes: int, show: bool | None = None
) -> dict[Pair, float]:
    """Compute ‖XᵀY‖²_F of pairs of layers, over units x units, in as many passes over the rows as memory asks for.

    Args:
        rows: Of the layers.
        pairs: Names.
        max_bytes: Bound on the sums, and on the rows that are held at a time.
        show: Show progress: always, never, or on a terminal only (None).
    """
    totals = dict.fromkeys(pairs, 0.0)
    passes = list(_passes(_tasks(totals, rows.units), max_bytes // 2))
    with products_in(rows.precision):
        for tasks in progress_bar(passes, "units x units", show=show):
            for task, norm in zip(tasks, _norms(rows, tasks, max_bytes // 4), strict=True):
                totals[task.a, task.b] += task.weight * norm
    return totals


def _tasks(pairs: Iterable[Pair], units: Mapping[str, int]) -> Iterator[_Task]:
    for a, b in pairs:
        for i in _cut(0, units[a], _COLUMNS):
            for j in _cut(0, units[b], _COLUMNS):
                if a != b or i.start <= j.start:
                    yield _Task(a, b, i, j, 2 if a == b and i.start < j.start else 1)


def _passes(tasks: Iterable[_Task], max_bytes: int) -> Iterator[list[_Task]]:
    chosen, used = [], 0
    for task in tasks:
        need = 8 * task.entries
        if chosen and used + need > max_bytes:
            yield chosen
            chosen, used = [], 0
        chosen.append(task)
        used += need
    if chosen:
        yield chosen


def _norms(rows: TileRows, tasks: Sequence[_Task], max_bytes: int) -> list[float]:
    names = {name: rows.units[name] for task in tasks for name in (task.a, task.b)}
    step = _ROWS if rows.kept else max(min(_ROWS, max_bytes // (rows.dtype.itemsize * sum(names.values()))), 1)
    sums: list[Tensor | None] = [None] * len(tasks)
    last = rows.samples <= step
    norms = []
    for piece in _cut(0, rows.samples, step):
        block = {name: rows(name, piece.start, piece.stop) for name in names}
        for at, task in enumerate(tasks):
            product = block[task.a][:, task.units_a].T @ block[task.b][:, task.units_b]
            if last:
                norms.append(_squared_norm(product))
            else:
                known = sums[at]
                sums[at] = product.to(torch.float64) if known is None else known.add_(product)
    return norms if last else [_squared_norm(total) for total in sums if total is not None]


def _squared_norm(product: Tensor) -> float:
    return float(torch.linalg.vector_norm(product, dtype=torch.float64)) ** 2

"""Rows of samples dealt into folds as they stream by, each with rows of another sample beside it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..base.errors import DataError

_HELD_BYTES = 1 << 26

Groups = Mapping[int, dict[str, Tensor]]
"""Samples x units by layer, of some folds."""


class Deal:
    """Deals samples into folds one after the other: each run of as many samples as folds by a permutation of its own.

    Args:
        folds: How many.
        seed: Of the permutations.

    >>> deal = Deal(3, seed=0)
    >>> deal(4), deal(2)
    (tensor([2, 0, 1, 2]), tensor([1, 0]))
    """

    def __init__(self, folds: int, seed: int) -> None:
        self._folds = folds
        self._generator = torch.Generator().manual_seed(seed & (1 << 62) - 1)
        self._left = torch.empty(0, dtype=torch.int64)

    def __call__(self, count: int) -> Tensor:
        """Give the folds of the next samples, (count,) in int64."""
        runs = -(-max(0, count - len(self._left)) // self._folds)
        dealt = [torch.randperm(self._folds, generator=self._generator) for _ in range(runs)]
        dealt = torch.cat([self._left, *dealt])
        self._left = dealt[count:]
        return dealt[:count]


def rows_before(latest: Tensor, rows: Tensor, sizes: Tensor) -> Tensor:
    """Give each sample the rows of the one before it.

    Row k of a sample gets row k of the sample before; where that one has fewer rows, it starts over.

    Args:
        latest: (any number, units): the sample before the first.
        rows: (total, units): samples one after the other.
        sizes: (samples,) in int64: how many rows each of them has, at least one.

    >>> a, b, c = [1.0], [[2.0], [3.0]], [[4.0], [5.0], [6.0]]
    >>> rows_before(torch.tensor([a]), torch.tensor([*b, *c]), torch.tensor([2, 3])).flatten()
    tensor([1., 1., 2., 3., 2.])
    """
    before = torch.cat([sizes.new_tensor([len(latest)]), sizes])[:-1]
    starts = before.cumsum(0)  # of each sample, where the latest one stands before all
    place = torch.arange(len(rows), device=rows.device) + len(latest) - starts.repeat_interleave(sizes)
    found = (starts - before).repeat_interleave(sizes) + place % before.repeat_interleave(sizes)
    return torch.cat([latest, rows])[found]


@dataclass
class _Fold:
    """What waits in one fold: the first sample to the end, others until there are rows of every layer."""

    samples: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    first: dict[str, Tensor] = field(default_factory=dict)
    latest: dict[str, Tensor] = field(default_factory=dict)
    waiting: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))

    def take(self, name: str, rows: Tensor, samples: Tensor, null: str | None) -> None:
        sizes = samples.unique_consecutive(return_counts=True)[1]
        self.samples[name] += len(sizes)
        if name not in self.first:
            start = int(sizes[0])
            self.first[name] = self.latest[name] = rows[:start].clone()
            rows, sizes = rows[start:], sizes[1:]
        if len(rows):
            self._wait(name, rows, sizes, null)

    def close(self, nulls: Mapping[str, str]) -> None:
        """Put the first sample, before which there was none, behind the last one."""
        for name, rows in self.first.items():
            self._wait(name, rows, torch.tensor([len(rows)], device=rows.device), nulls.get(name))

    def _wait(self, name: str, rows: Tensor, sizes: Tensor, null: str | None) -> None:
        self.waiting[name].append(rows)
        if null is not None:
            self.waiting[null].append(rows_before(self.latest[name], rows, sizes))
            self.latest[name] = rows[len(rows) - int(sizes[-1]) :].clone()

    def group(self, names: Iterable[str]) -> dict[str, Tensor] | None:
        """Hand over what waits, if it is something of every layer."""
        if not all(self.waiting.get(name) for name in names):
            return None
        group = {name: torch.cat(self.waiting[name]) for name in names}
        self.waiting.clear()
        return group


class FoldingRows:
    """Sorts rows into folds of samples and hands them on in groups large enough to be worth a product.

    Beside a layer it can give a null: for each sample the rows of the one before it in its fold, and for the first one
    those of the last. That is another sample always, whatever the batches were; where samples have equal numbers of
    rows, place by place the same rows in another order.

    Args:
        folds: How many.
        seed: Of the folds, see `Deal`.
        nulls: Names of the nulls by layer.
        hand_on: Takes samples x units by layer, nulls included, for some of the folds.
        held_bytes: Rows that are held back before they are handed on. Default: 64 MiB.

    Attributes:
        samples: How many were added.
    """

    def __init__(
        self,
        folds: int,
        seed: int,
        nulls: Mapping[str, str],
        hand_on: Callable[[Groups], None],
        held_bytes: int | None = None,
    ) -> None:
        self.samples = 0
        self._deal, self._nulls, self._hand_on = Deal(folds, seed), dict(nulls), hand_on
        self._folds = [_Fold() for _ in range(folds)]
        self._held_bytes, self._bytes = _HELD_BYTES if held_bytes is None else held_bytes, 0
        self._names: tuple[str, ...] = ()
        self._pending: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)

    def add(self, rows: Mapping[str, Tensor], owners: Mapping[str, Tensor], count: int) -> None:
        """Add one batch.

        Args:
            rows: Samples x units by layer, the same layers each time; may be written over afterwards.
            owners: For each layer the sample of the batch that each row is of, rising.
            count: Samples in the batch, those without a row included.
        """
        self._names = self._names or tuple(rows)
        folds = self._deal(count)
        self._bytes += sum(x.numel() * x.element_size() for x in rows.values())
        full = self._bytes >= self._held_bytes
        for name, x in rows.items():
            own = owners[name]
            held = x if full else x.clone()
            self._pending[name].append((held, own + self.samples, folds.to(own.device)[own]))
        self.samples += count
        if full:
            self._sort()
            self._pass_on()

    def finish(self) -> None:
        """Hand on what is left.

        Raises:
            DataError: A fold has too few samples.
        """
        self._sort()
        self._check()
        for fold in self._folds:
            fold.close(self._nulls)
        self._pass_on()

    def _sort(self) -> None:
        for name, parts in self._pending.items():
            rows, samples, folds = (torch.cat(part) for part in zip(*parts, strict=True))
            order = folds.argsort(stable=True)
            counts = folds.bincount(minlength=len(self._folds)).tolist()
            split = zip(self._folds, rows[order].split(counts), samples[order].split(counts), strict=True)
            for fold, own_rows, own_samples in split:
                if len(own_rows):
                    fold.take(name, own_rows, own_samples, self._nulls.get(name))
        self._bytes = 0
        self._pending.clear()

    def _pass_on(self) -> None:
        names = [*self._names, *self._nulls.values()]
        groups = {index: fold.group(names) for index, fold in enumerate(self._folds)}
        found = {index: group for index, group in groups.items() if group is not None}
        if found:
            self._hand_on(found)

    def _check(self) -> None:
        least = 2 if self._nulls else 1
        for index, fold in enumerate(self._folds):
            for name in self._names:
                if fold.samples[name] < least:
                    other = ", or shuffled=False, which needs 1" if least == 2 else ""
                    raise DataError(
                        f"fold {index} has {fold.samples[name]} of the {self.samples} samples of {name!r}, but each "
                        f"of the {len(self._folds)} folds needs at least {least}; pass more samples, fewer folds{other}"
                    )

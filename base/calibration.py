"""Layers whose parameters are set from the statistics of their units, each after those that run before it."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .batches import Batch, model_device
from .errors import DataError, NotFiniteError
from .held import Held
from .progress import progress as progress_bar
from .running import evaluating

TOLERANCE = 1e-6
"""Statistics that are off by less, in standard deviations, are right."""

PASSES = 8
"""Most passes that measure and settle again, where one cannot be exact."""

_AT_ONCE = 2**22  # numbers that are brought to float64 at a time
_MASK = "attention_mask"
_CLOCK = itertools.count(1)


@dataclass
class Statistics:
    """Mean and sum of squared deviations of each unit, batches merged as by Chan, Golub & LeVeque (1983).

    Attributes:
        count: Samples.
        shift: The first sample, (units,), float64; `mean` is relative to it, so that constant units have no variance.
        mean: (units,), float64.
        squares: (units,), float64.
    """

    count: int = 0
    shift: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    mean: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    squares: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)

    @property
    def average(self) -> Tensor:
        """Mean of each unit, (units,), float64."""
        return self.shift + self.mean

    def variance(self, correction: int = 0) -> Tensor:
        """Give squared deviations over (count - correction), (units,), float64."""
        return self.squares / max(self.count - correction, 1)

    def add(self, samples: Tensor) -> None:
        """Add samples x units."""
        samples = samples.to(torch.float64)
        if not self.count:
            self.shift = samples[0].clone()
        samples = samples - self.shift
        mean = samples.mean(0)
        self._absorb(len(samples), mean, (samples - mean).square_().sum(0))

    def merge(self, other: Statistics) -> None:
        """Add all that another has seen."""
        if other.count:
            if not self.count:
                self.shift = other.shift
            self._absorb(other.count, other.mean + (other.shift - self.shift), other.squares)

    def _absorb(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if not self.count:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + squares + delta.square() * (self.count * count / total)
        self.count = total


class Handles:
    """Several hooks that are removed as one."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self.handles = handles

    def remove(self) -> None:
        """Remove all."""
        for handle in self.handles:
            handle.remove()


class Site(ABC):
    """A place in a network whose statistics some parameters or buffers can set.

    Attributes:
        name: What messages call it.
        module: Whose calls are watched.
        found: What was seen there in this pass.
        calls: How often, in this pass.
        first: When its first call of this pass was, on a clock that all sites share.
        latest: When its last call was.
        steering: Whether each batch is made right as it passes, by its own statistics.
        mask: Real tokens (N, tokens) of the batch that is running, or None.
    """

    what = "output"

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.found, self.calls = Statistics(), 0
        self.first = self.latest = 0
        self.steering = False
        self.mask: Tensor | None = None

    @abstractmethod
    def attach(self) -> RemovableHandle | Handles:
        """Watch the calls of the module: hand each value to `note`, and make it right if `steering`."""

    @abstractmethod
    def samples(self, values: Tensor) -> Tensor:
        """Read values as samples x units; with a mask, only those of real tokens."""

    @abstractmethod
    def settle(self, found: Statistics) -> None:
        """Set the parameters such that units which showed these statistics show the wanted ones."""

    @abstractmethod
    def error(self, found: Statistics) -> float:
        """Tell how far statistics are from the wanted ones, in standard deviations."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """List what `settle` writes to."""

    def _parts(self, values: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Cut along the first axis, so that not too much is brought to float64 at a time."""
        if values.ndim < 2:
            yield values[None], None
            return
        fits = self.mask is None or self.mask.shape == values.shape[:2]
        rows = max(1, _AT_ONCE * len(values) // max(values.numel(), 1)) if fits and self.cuts(values) else len(values)
        masks = [None] * len(values) if self.mask is None else self.mask.split(rows)
        yield from zip(values.split(rows), masks, strict=False) if fits else [(values, None)]

    def cuts(self, values: Tensor) -> bool:
        """Whether the first axis holds samples."""
        return values.ndim > 1

    def note(self, values: Tensor) -> Statistics:
        """Add the values of one call, and give their own statistics.

        Raises:
            DataError: There is only one for each unit.
            NotFiniteError: One is NaN or infinite.
        """
        batch = Statistics()
        for part, mask in self._parts(values):
            whole, self.mask = self.mask, mask
            batch.add(self.samples(part))
            self.mask = whole
        if not torch.isfinite(batch.squares).all():
            raise NotFiniteError(
                f"the {self.what} of {self.name}, of shape {tuple(values.shape)}, holds NaN or infinity"
            )
        if self.steering and batch.count < 2:
            raise DataError(
                f"a batch gives {self.name} one value for each unit, of shape {tuple(values.shape)}, which has no "
                "variance; use larger batches, and drop_last=True if the last one is that small"
            )
        self.found.merge(batch)
        self.latest = next(_CLOCK)
        self.first = self.first if self.calls else self.latest
        self.calls += 1
        return batch


@contextmanager
def watching(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Attach sites to a network in evaluation mode; nothing of them is left afterwards, also after an error."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with evaluating(model), ExitStack() as stack, torch.no_grad():
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)  # it passes modules by
        for site in sites:
            stack.callback(site.attach().remove)
        yield


def run(model: nn.Module, sites: Sequence[Site], data: Iterable[Batch], show: bool | None, what: str) -> int:
    """Run a network with its sites attached, afresh; gives the number of batches."""
    for site in sites:
        site.found, site.calls = Statistics(), 0
    count = 0
    for batch in progress_bar(data, what, show=show):
        run_batch(model, sites, batch)
        count += 1
    return count


def run_batch(model: nn.Module, sites: Sequence[Site], batch: Batch) -> None:
    """Run a network with its sites attached; padding that an attention mask names is no sample."""
    batch = batch.to(model_device(model))
    mask = batch.kwargs.get(_MASK)
    mask = mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None
    for site in sites:
        site.mask = mask
    batch.call(model)


def calibrate(
    model: nn.Module, sites: Sequence[Site], data: Held, passes: int = PASSES, show: bool | None = None, what: str = ""
) -> None:
    """Settle the sites of a network, in place, so that each has the wanted statistics over all data.

    What a site shows depends on the sites before it. With all data in one run each is settled before what follows is
    computed: exact. Where it does not fit into memory, or a module is called more than once, each batch passes with its
    own statistics first; then whole passes measure what the settled network shows and settle again. Each makes one more
    layer exact, so that as many as there are layers in a row suffice; the nearest of all that were measured is kept.

    Args:
        model: The network; after an error it is as it was.
        sites: Of the network, in any order.
        data: Batches of inputs.
        passes: Most passes after the first; 0 for none.
        show: Show a bar always (True), never (False), or on a terminal (None).
        what: What the bar says.

    Raises:
        DataError: There is no batch, or one holds a single value for each unit.
        NotFiniteError: An input or an activation is NaN or infinite.
    """
    before = _snapshot(sites)
    try:
        groups = data.groups(model)
        with watching(model, sites):
            count = _steer(model, sites, groups, show, what)
            called = [site for site in sites if site.calls]
            if count > 1 or any(site.calls > 1 for site in called):
                _polish(model, called, groups, passes, show, what)
    except BaseException:
        _restore(before)
        raise


def _steer(model: nn.Module, sites: Sequence[Site], groups: Iterable[Batch], show: bool | None, what: str) -> int:
    for site in sites:
        site.steering = True
    try:
        count = run(model, sites, groups, show, what)
    finally:
        for site in sites:
            site.steering = False
    for site in sites:
        if site.calls:
            site.settle(site.found)
    return count


def _polish(
    model: nn.Module, sites: Sequence[Site], groups: Iterable[Batch], passes: int, show: bool | None, what: str
) -> None:
    best, kept = float("inf"), _snapshot(sites)
    for _ in range(passes):
        run(model, sites, groups, show, what)
        error = max(site.error(site.found) for site in sites)
        if error < best:
            best, kept = error, _snapshot(sites)
        if error <= TOLERANCE:
            return
        for site in sites:
            site.settle(site.found)
    if passes:
        _restore(kept)


def _snapshot(sites: Sequence[Site]) -> list[tuple[Tensor, Tensor]]:
    return [(tensor, tensor.detach().clone()) for site in sites for tensor in site.tensors()]


@torch.no_grad()
def _restore(saved: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, values in saved:
        tensor.copy_(values)

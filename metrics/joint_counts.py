"""Joint histograms of the units of many layers, streamed batch by batch, and the information that they hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..base.errors import DataError, LayerNotFoundError, NotFiniteError, nearest
from ..base.files import PathLike
from ..base.finite import all_finite
from .arrays import as_matrix
from .batch_checks import Pair, check_layers, check_matrix, check_pair, unique_pairs
from .state_file import read_state, write_state

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

_FORMAT = "isthmus.joint_counts.1"
_BLOCK = 1 << 24
_MOST_ROWS = 4096


def check_bins(bins: int) -> None:
    """Refuse a number of bins that is none.

    Raises:
        DataError: It is no whole number, or below 2.
    """
    if not isinstance(bins, int) or bins < 2:
        raise DataError(f"bins is {bins!r}; expected a whole number, at least 2")


def quantile_edges(x: Tensor | ArrayLike, bins: int = 10) -> Tensor:
    """Give the inner edges of bins of equal frequency for each unit.

    Edge k is the smallest sample with at least k/bins of the samples at or below it, and a value belongs to the first
    bin whose edge is not below it. Equal values thus share a bin: all zeros of a ReLU are in one, the bins that they
    use up stay empty. Edges stay below the largest sample, so that a unit which varies has two bins at least.

    Args:
        x: Samples x units.
        bins: For each unit, at least 2.

    Returns:
        (units x (bins - 1)) in float64, in rising order.

    Raises:
        DataError: No floating-point matrix, or fewer samples than bins.
        NotFiniteError: It holds NaN or infinity.

    >>> quantile_edges([[0.0, 5.0], [0.0, 7.0], [0.0, 6.0], [4.0, 8.0]], bins=4)
    tensor([[0., 0., 0.],
            [5., 6., 7.]], dtype=torch.float64)
    """
    check_bins(bins)
    x = as_matrix(x)
    n = len(x)
    if n < bins:
        raise DataError(f"x of shape {tuple(x.shape)} has fewer samples than {bins} bins; choose fewer bins")
    ordered = x.to(torch.float64).sort(0).values
    places = [(n * k + bins - 1) // bins - 1 for k in range(1, bins)]
    below = torch.where(ordered < ordered[-1], ordered, -torch.inf).amax(0)
    below = torch.where(below.isfinite(), below, ordered[-1])  # a unit that does not vary
    return torch.minimum(ordered[places], below).T.contiguous()


class JointCounts:
    """Joint histograms of each unit of one layer with each unit of another, streamed; exact whole counts.

    They give the mutual information I = Σ p(u, v) log(p(u, v) / p(u) p(v)) of binned activations in nats, the plug-in
    estimate. It is biased: n samples of independent units with B bins each give (B - 1)² / 2n nats on average, which
    the correction of Miller & Madow (1955) takes off to first order. Counts, unlike moments, need bins that are fixed
    before the first sample: those of equal frequency in the first batch, unless given. Later values beyond the outer
    edges count in the outer bins. For parts of the data that are to be merged give all of them the same edges.

    Args:
        pairs: The layers whose joint counts are kept: "all" pairs, a layer with itself included; "none"; or pairs of
            names.
        bins: For each unit, at least 2.
        edges: Inner edges by layer, (units x (bins - 1)), rising, see `quantile_edges`. Default: those of the first
            batch, which should then be large and shuffled.
        max_bytes: Refuse to keep counts beyond this size, 8 · units · units · bins² bytes for each pair.

    Raises:
        DataError: Pairs, bins or edges make no sense.

    >>> x = torch.arange(8.0)[:, None]
    >>> counts = JointCounts(bins=4)
    >>> counts.update({"x": x, "y": x.square()})
    >>> counts.update({"x": x, "y": -x})
    >>> counts.mutual_information("x", "y").round(decimals=4), counts.entropy("x").round(decimals=4)
    (tensor([[0.5537]], dtype=torch.float64), tensor([1.3863], dtype=torch.float64))
    """

    def __init__(
        self,
        pairs: Literal["all", "none"] | Iterable[Pair] = "all",
        *,
        bins: int = 10,
        edges: Mapping[str, Tensor] | None = None,
        max_bytes: int = 4 << 30,
    ) -> None:
        check_bins(bins)
        self.bins = bins
        self.max_bytes = max_bytes
        self._every_pair = isinstance(pairs, str) and pairs == "all"
        self._pairs = unique_pairs(pairs)
        self._given = edges is not None
        self._edges = {name: _checked_edges(name, values, bins) for name, values in (edges or {}).items()}
        self._single: dict[str, Tensor] = {}
        self._joint: dict[Pair, Tensor] = {}

    def __repr__(self) -> str:
        layers = ", ".join(f"{name}: {self.count(name)} x {len(counts)}" for name, counts in self._single.items())
        return f"JointCounts({layers or 'no samples'}; {len(self._pairs)} pairs, {self.bins} bins)"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers, in the order of the first batch."""
        return tuple(self._single)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Pairs of layers whose joint counts are kept, each once."""
        return self._pairs

    @property
    def edges(self) -> dict[str, Tensor]:
        """Inner edges of the bins by layer, (units x (bins - 1)) in float64; to be given to other parts of the data."""
        return dict(self._edges)

    def update(self, activations: Mapping[str, Tensor]) -> None:
        """Add one batch; a batch that is refused changes nothing.

        Args:
            activations: Samples x units by layer name; the same layers and unit counts in every batch. Layers outside
                all pairs add to their entropies.

        Raises:
            DataError: A shape, dtype or device does not fit; the layers of a pair differ in their number of samples;
                the first batch has fewer samples than bins; the counts are too large.
            LayerNotFoundError: A layer of `pairs`, or the edges of a layer, are missing.
            NotFiniteError: An activation holds NaN or infinity.
        """
        # State that is born under inference_mode could not be updated outside it.
        with torch.inference_mode(False), torch.no_grad():
            self._check(activations)
            if not self._single:
                self._begin(activations)
            widths = [self.bins * x.shape[1] for x in activations.values()]
            rows = max(1, min(_MOST_ROWS, 4 * _BLOCK // sum(widths)))
            longest = max(len(x) for x in activations.values())
            for start in range(0, longest, rows):
                self._add({name: x[start : start + rows] for name, x in activations.items()})

    def _pairs_of(self, activations: Mapping[str, Tensor]) -> tuple[Pair, ...]:
        fresh = self._every_pair and not self._single
        return tuple(combinations_with_replacement(activations, 2)) if fresh else self._pairs

    def _check(self, activations: Mapping[str, Tensor]) -> None:
        names = tuple(activations)
        check_layers(names, self._single)
        for name, x in activations.items():
            known = self._single.get(name)
            check_matrix(name, x, None if known is None else (len(known), known.device))
            if not all_finite(x):
                raise NotFiniteError(f"layer {name!r} of shape {tuple(x.shape)} holds NaN or infinity")
            self._check_edges(name, x)
        for a, b in self._pairs_of(activations):
            for name in (a, b):
                if name not in activations:
                    raise LayerNotFoundError(f"layer {name!r} of pair {(a, b)} is missing{nearest(name, names)}")
            check_pair(a, b, activations)
        if not self._single:
            self._check_size(activations)

    def _check_size(self, activations: Mapping[str, Tensor]) -> None:
        pairs = self._pairs_of(activations)
        needed = sum(8 * activations[a].shape[1] * activations[b].shape[1] * self.bins**2 for a, b in pairs)
        if needed > self.max_bytes:
            raise DataError(
                f"the joint counts would take {needed / 2**30:.3g} GiB, more than max_bytes={self.max_bytes}: choose "
                f"fewer bins than {self.bins}, fewer pairs, or a larger max_bytes"
            )

    def _check_edges(self, name: str, x: Tensor) -> None:
        shape = tuple(x.shape)
        if name in self._edges:
            if len(self._edges[name]) != shape[1]:
                raise DataError(f"layer {name!r} has {shape[1]} units (shape {shape}), edges {len(self._edges[name])}")
        elif self._given:
            raise LayerNotFoundError(f"no edges were given for layer {name!r}{nearest(name, self._edges)}")
        elif len(x) < self.bins:
            raise DataError(
                f"layer {name!r} of shape {shape}: the first batch has fewer samples than {self.bins} bins; make it "
                "larger, or give edges"
            )

    def _begin(self, activations: Mapping[str, Tensor]) -> None:
        self._pairs = self._pairs_of(activations)
        for name, x in activations.items():
            edges = self._edges[name] if self._given else quantile_edges(x, self.bins)
            self._edges[name] = edges.to(x.device)
            self._single[name] = torch.zeros(x.shape[1], self.bins, dtype=torch.int64, device=x.device)
        for a, b in self._pairs:
            shape = [self.bins * len(self._single[name]) for name in (a, b)]
            self._joint[a, b] = torch.zeros(shape, dtype=torch.int64, device=activations[a].device)

    def _add(self, activations: Mapping[str, Tensor]) -> None:
        paired = {name for pair in self._pairs for name in pair}
        marks = {}
        for name, x in activations.items():
            # Searching the left side puts a value that equals an edge below it.
            bins = torch.searchsorted(self._edges[name], x.T.to(torch.float64).contiguous())
            columns = bins + self.bins * torch.arange(len(bins), device=x.device)[:, None]
            self._single[name] += columns.flatten().bincount(minlength=self.bins * len(bins)).view(-1, self.bins)
            if name in paired:
                mark = torch.zeros(len(x), self.bins * len(bins), device=x.device)
                marks[name] = mark.scatter_(1, columns.T, 1.0)
        for (a, b), total in self._joint.items():
            several = max(1, _BLOCK // len(total[0]))
            # Whole numbers to 2^24 are exact in float32, but not in what autocast would make of it.
            with torch.autocast(total.device.type, enabled=False):
                for part, mark in zip(total.split(several), marks[a].split(several, 1), strict=True):
                    part += (mark.T @ marks[b]).to(torch.int64)

    def merge(self, other: JointCounts) -> JointCounts:
        """Add all that another has counted, in place; the other one is left as it is.

        Args:
            other: Counts of other samples of the same layers, with the same pairs and edges.

        Returns:
            This accumulator.

        Raises:
            DataError: Pairs, layers, units, bins or edges differ.
        """
        if not other._single:
            return self
        with torch.inference_mode(False), torch.no_grad():
            self._check_mergeable(other)
            device = next(iter((self if self._single else other)._single.values())).device
            if not self._single:
                self._pairs = self._pairs or other._pairs
                self._edges = {name: other._edges[name].to(device, copy=True) for name in other._single}
                self._single = {name: torch.zeros_like(counts) for name, counts in other._single.items()}
                self._joint = {pair: torch.zeros_like(other._counted(*pair)) for pair in self._pairs}
            for name, counts in self._single.items():
                counts += other._single[name].to(device)
            for pair, counts in self._joint.items():
                counts += other._counted(*pair).to(device)
        return self

    def _check_mergeable(self, other: JointCounts) -> None:
        mine, theirs = ({frozenset(pair) for pair in counts._pairs} for counts in (self, other))
        if mine != theirs and (self._single or not self._every_pair):
            raise DataError(f"cannot merge counts of other pairs: {self._pairs} and {other._pairs}")
        if self._single and set(self._single) != set(other._single):
            raise DataError(f"cannot merge counts of other layers: {self.names} and {other.names}")
        if self.bins != other.bins:
            raise DataError(f"cannot merge counts of {self.bins} and of {other.bins} bins")
        for name, edges in self._edges.items():
            if name in other._edges and not torch.equal(edges, other._edges[name].to(edges.device)):
                raise DataError(
                    f"cannot merge counts of layer {name!r}: their edges (shapes {tuple(edges.shape)} and "
                    f"{tuple(other._edges[name].shape)}) differ; make both with the same edges=..."
                )

    def _layer(self, name: str) -> Tensor:
        if name not in self._single:
            hint = nearest(name, self._single) if self._single else "; no batch has been added yet"
            raise LayerNotFoundError(f"no counts of layer {name!r}{hint}")
        return self._single[name]

    def _counted(self, a: str, b: str) -> Tensor:
        for name in (a, b):
            self._layer(name)
        if (a, b) in self._joint:
            return self._joint[a, b]
        if (b, a) in self._joint:
            return self._joint[b, a].T
        raise LayerNotFoundError(
            f"joint counts of {a!r} and {b!r} were not kept; add the pair ({a!r}, {b!r}) to JointCounts(pairs=...), or "
            "keep 'all', and run the data again"
        )

    def count(self, name: str) -> int:
        """Give the number of samples of a layer."""
        return int(self._layer(name)[0].sum())

    def entropy(self, name: str, *, corrected: bool = False) -> Tensor:
        """Give the entropy of each binned unit in nats, (units,) in float64.

        Args:
            name: The layer.
            corrected: Add (occupied bins - 1) / 2n, the first-order bias (Miller & Madow).

        Raises:
            LayerNotFoundError: There is no such layer.
        """
        counts, n = self._layer(name), self.count(name)
        shares = counts.to(torch.float64) / n
        entropy = -torch.xlogy(shares, shares).sum(1)
        return entropy + ((counts > 0).sum(1) - 1).to(torch.float64) / (2 * n) if corrected else entropy

    def mutual_information(self, a: str, b: str, *, corrected: bool = False) -> Tensor:
        """Give the mutual information of each unit of one layer with each of another.

        Args:
            a: Layer of the rows.
            b: Layer of the columns. One order of a pair is kept, both can be read.
            corrected: Subtract (occupied cells - occupied bins of both + 1) / 2n, the first-order bias (Miller &
                Madow); it can then be negative.

        Returns:
            (units of a x units of b) in nats, float64; 0 for units whose values are all in one bin.

        Raises:
            LayerNotFoundError: The pair was not kept.
        """
        counts, single_a, single_b, n = self._counted(a, b), self._layer(a), self._layer(b), self.count(a)
        several = max(1, _BLOCK // (counts.shape[1] * self.bins))
        parts = []
        for joint, own in zip(counts.split(several * self.bins), single_a.split(several), strict=True):
            joint = joint.reshape(len(own), self.bins, len(single_b), self.bins).to(torch.float64)
            product = own[:, :, None, None].to(torch.float64) * single_b
            # Whole numbers in one quotient: exactly 1, and no information, where all values are in one bin.
            information = torch.xlogy(joint, joint * n / product.clamp_(min=1)).sum((1, 3)) / n
            if corrected:
                occupied = [(own > 0).sum(1)[:, None], (single_b > 0).sum(1)]
                information += (occupied[0] + occupied[1] - 1 - (joint > 0).sum((1, 3))).to(torch.float64) / (2 * n)
            parts.append(information)
        return torch.cat(parts)

    def to(self, device: torch.device | str) -> JointCounts:
        """Move to a device, in place; returns this accumulator."""
        self._edges = {name: edges.to(device) for name, edges in self._edges.items()}
        self._single = {name: counts.to(device) for name, counts in self._single.items()}
        self._joint = {pair: counts.to(device) for pair, counts in self._joint.items()}
        return self

    def save(self, path: PathLike) -> Path:
        """Write to a safetensors file, whole or not at all.

        Raises:
            OutputError: The file cannot be written.
        """
        return write_state(path, _FORMAT, *self._to_file())

    def _to_file(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        content = {"bins": self.bins, "max_bytes": self.max_bytes, "every_pair": self._every_pair}
        content |= {"given": self._given, "pairs": self._pairs, "edges": list(self._edges), "names": list(self._single)}
        parts = {"edges": self._edges, "single": self._single, "joint": self._joint}
        tensors = {f"{part}.{index}": x for part, state in parts.items() for index, x in enumerate(state.values())}
        return content, tensors

    @classmethod
    def load(cls, path: PathLike, device: torch.device | str = "cpu") -> JointCounts:
        """Read what `save` wrote.

        Args:
            path: The file.
            device: Where to put the counts.

        Raises:
            CheckpointError: The file is missing, damaged, or holds something else.
        """
        return read_state(path, _FORMAT, cls._from_file, device)

    @classmethod
    def _from_file(cls, content: Any, tensors: dict[str, Tensor]) -> JointCounts:
        pairs = [(a, b) for a, b in content["pairs"]]
        counts = cls("all" if content["every_pair"] else pairs, bins=content["bins"], max_bytes=content["max_bytes"])
        counts._given, counts._pairs = content["given"], tuple(pairs)
        counts._edges = {name: tensors[f"edges.{index}"] for index, name in enumerate(content["edges"])}
        counts._single = {name: tensors[f"single.{index}"] for index, name in enumerate(content["names"])}
        if counts._single:
            counts._joint = {pair: tensors[f"joint.{index}"] for index, pair in enumerate(pairs)}
        return counts


def _checked_edges(name: str, edges: Tensor, bins: int) -> Tensor:
    edges = as_matrix(edges, f"edges of layer {name!r}").to(torch.float64)
    shape = tuple(edges.shape)
    if edges.shape[1] != bins - 1:
        raise DataError(f"edges of layer {name!r} have shape {shape}; expected units x {bins - 1} for {bins} bins")
    if not (edges.diff(dim=1) >= 0).all():
        raise DataError(f"edges of layer {name!r} of shape {shape} do not rise; sort them along axis 1")
    return edges.contiguous()

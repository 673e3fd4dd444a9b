"""`match_widths`: which units of a wide network are those of a narrow one, and which it has beside them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...base.architecture import check_finite
from ...base.batches import Batch, Data, batches
from ...base.errors import ArchitectureError, DataError, SymmetryError, nearest
from ...base.files import PathLike
from ...base.running import on_device
from ..derive import as_example
from ..derive import symmetry as derive
from ..nets.weights import weight_matching
from ..permutation import Permutation
from ..storage import store, stored
from ..symmetry import Symmetry
from ..verification import TOLERANCE
from .padding import SIDES, Frame, Side, embedding_error, frame, transfer
from .rectangular import cosines, scaled, seen_alike, shared_entries

FORMAT = "isthmus width matching 1"
METHODS = ("weights", "activations")


@dataclass(frozen=True, eq=False)
class Surplus:
    """Units of one network that have no partner in the other.

    Attributes:
        group: Their group.
        network: "a" or "b": the one that has them.
        units: Their numbers, int64; in groups that lie within others counted over all positions of those.
        scores: For each its largest similarity to any unit of the other network: near 1 for a copy of what is matched.
    """

    group: str
    network: Side
    units: Tensor
    scores: Tensor


@dataclass(frozen=True, eq=False)
class WidthMatching:
    """Which units of one network are which of another, of other widths.

    Attributes:
        frame: Both symmetries, and the frame of common sizes.
        permutation: Of the frame: brings the second network, padded, into the order of the first.
        objective: Mean product of matched weights, each tensor divided by its root mean square in its network; or the
            sum of matched correlations.
        similarities: Per group the similarity of every unit of a (rows) with every one of b in the matched order, both
            in the frame: cosine of all weights that lead to matched units, or correlation.
        history: Per restart the objective at the start and after each sweep.
        method: "weights" or "activations"; of the latter, what never changes on the data has a similarity of 0.
        seed: Of visiting orders and random starts.
        by_weights: Groups that were matched by weights although the method was another, for want of an activation.
        embedding: Largest relative change of the outputs when the narrow network is embedded in the wide one; None
            where it was not measured, as in mixed cases.
    """

    frame: Frame
    permutation: Permutation
    objective: float
    similarities: Mapping[str, Tensor]
    history: tuple[tuple[float, ...], ...] = ()
    method: str = "weights"
    seed: int = 0
    by_weights: tuple[str, ...] = ()
    embedding: float | None = None

    @property
    def matched(self) -> dict[str, Tensor]:
        """Per group the pairs (unit of a, unit of b), (pairs, 2) in int64, in the order of a's units."""
        return {name: torch.stack(self._labels(name), 1)[self._both(name)] for name in self.similarities}

    @property
    def scores(self) -> dict[str, Tensor]:
        """Per group the similarity of each matched pair, in the order of `matched`."""
        return {name: values.diagonal()[self._both(name)] for name, values in self.similarities.items()}

    @property
    def surplus(self) -> tuple[Surplus, ...]:
        """What the wider network of each group has beside the matched units; none where sizes are equal."""
        found: list[Surplus] = []
        for name, values in self.similarities.items():
            a, b = self._labels(name)
            for side in SIDES:
                mine, other, table = (a, b, values) if side == "a" else (b, a, values.T)
                alone = (mine >= 0) & (other < 0)
                if alone.any():
                    found.append(Surplus(name, side, mine[alone], table[alone][:, other >= 0].amax(1)))
        return tuple(found)

    def _labels(self, group: str) -> tuple[Tensor, Tensor]:
        return self.frame.labels(group, "a"), self.frame.labels(group, "b", self.permutation)

    def _both(self, group: str) -> Tensor:
        a, b = self._labels(group)
        return (a >= 0) & (b >= 0)

    @property
    def wide(self) -> Side:
        """Which network is at least as wide as the other everywhere: "b" if both are.

        Raises:
            ArchitectureError: Neither is.
        """
        for side in ("b", "a"):
            if self.frame.wider(side):
                return side
        groups = [g.name for g in self.frame.common.groups if g.size > self.frame.b.by_name[g.name].size]
        raise ArchitectureError(
            f"neither network is the wider one: a is wider in {', '.join(groups)}, b elsewhere; `narrow` and `widen` "
            "need one that is. Use `matched` and `surplus`"
        )

    def narrow(self, wide: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Restrict the wide network to its matched units, in the order of the narrow one.

        Args:
            wide: The wide network, or its state dict.

        Returns:
            A state dict that the narrow architecture loads.

        Raises:
            ArchitectureError: It is another architecture, or neither network is the wider one.
        """
        return transfer(self.frame, self.permutation, wide, self.wide)

    def widen(self, narrow: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embed the narrow network in the wide architecture, with zeros for the surplus units: the same function.

        The surplus units stay silent, and gradients do not wake them. Their running variances are 1.

        Args:
            narrow: The narrow network, or its state dict.

        Returns:
            A state dict that the wide architecture loads.

        Raises:
            ArchitectureError: It is another architecture, or neither network is the wider one.
            SymmetryError: That the function stays the same has not been measured, or it does not: where a norm over
                units, a softmax over them or a number of units in the formula counts those that are zero.
        """
        side: Side = "a" if self.wide == "b" else "b"
        if self.embedding is None:
            raise SymmetryError(
                "it has not been measured whether zeros for the surplus units leave the function as it is; call "
                "match_widths with data or example_inputs, and verify=True"
            )
        if not self.embedding <= TOLERANCE:
            groups = dict.fromkeys(item.group for item in self.surplus)
            raise SymmetryError(
                f"zeros for the surplus units of {', '.join(groups)} change the outputs by {self.embedding:.1e}: a "
                "layer or group norm, a softmax or a mean over these units, or a formula with their number, counts "
                "them; narrow() is possible"
            )
        return transfer(self.frame, self.permutation, narrow, side)

    def save(self, path: PathLike) -> Path:
        """Write to a safetensors file, whole or not at all."""
        names = ("objective", "history", "method", "seed", "by_weights", "embedding")
        facts = {
            "symmetries": [self.frame.a.to_json(), self.frame.b.to_json()],
            "matching": {name: getattr(self, name) for name in names},
        }
        return store(path, FORMAT, facts, {"index": self.permutation.indices, "similarity": self.similarities})

    @classmethod
    def load(cls, path: PathLike) -> WidthMatching:
        """Read a saved matching.

        Raises:
            CheckpointError: The file is missing, damaged or something else.
        """
        with stored(path, FORMAT) as (found, parts):
            facts = found["matching"]
            facts["history"] = tuple(tuple(line) for line in facts["history"])
            facts["by_weights"] = tuple(facts["by_weights"])
            both = frame(*map(Symmetry.from_json, found["symmetries"]))
            return cls(both, Permutation(both.common, parts["index"]), similarities=parts["similarity"], **facts)


def match_widths(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Data | None = None,
    *,
    method: str = "weights",
    symmetry_a: Symmetry | None = None,
    symmetry_b: Symmetry | None = None,
    example_inputs: Any = None,
    seed: int = 0,
    restarts: int = 2,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    verify: bool = True,
) -> WidthMatching:
    """Match the units of two networks of one architecture whose widths differ.

    In every group each unit of the narrower network gets a partner in the wider one, by an exact rectangular
    assignment, while the other groups stay as they are; groups in turn, as in weight matching (Ainsworth et al. 2023,
    algorithm 1). Weights of each tensor are divided by their root mean square in both networks, so that neither a
    wide layer, whose weights are small, nor a large bias counts for more than its entries. One network may be
    the wider one in some groups and the narrower one in others.

    Args:
        model_a: The first network.
        model_b: The second: the same layers; sizes differ along axes of groups only. Neither is changed.
        data: Batches. Needed for method "activations" and read once; for "weights" the first batch serves as example.
        method: "weights", or "activations" (correlation on `data`; what no activation shows is matched by weights).
        symmetry_a: Of the first network; None derives it.
        symmetry_b: Of the second.
        example_inputs: For deriving and verifying symmetries, where there is no data.
        seed: Of visiting orders and random starts; same seed, same result.
        restarts: Restarts of weight matching; the best is returned.
        device: Where to compute; None: where the models are.
        progress: Show bars; None: on a terminal.
        verify: Measure that the symmetries hold, and whether the narrow network can be embedded in the wide one.

    Raises:
        ArchitectureError: The networks do not correspond, with the parameter, the axis and both shapes.
        NotFiniteError: A parameter or an activation holds NaN or infinity.
        DataError: Data or example inputs are needed and missing, or the method is unknown.
        SymmetryError: A symmetry cannot be derived or does not hold.

    >>> make = lambda n: nn.Sequential(nn.Linear(6, n), nn.ReLU(), nn.Linear(n, 2))
    >>> narrow, wide, x = make(2), make(4), torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    >>> with torch.no_grad():  # units 3 and 1 of the wide network are those of the narrow one
    ...     for mine, theirs in zip(narrow.parameters(), wide.parameters()):
    ...         at = (slice(None), [3, 1]) if len(theirs) == 2 else [3, 1]
    ...         _ = theirs.copy_(mine) if theirs.shape == mine.shape else theirs.__setitem__(at, mine)
    >>> found = match_widths(narrow, wide, x)
    >>> found.matched["0"].tolist(), found.surplus[0].units.sort().values.tolist()
    ([[0, 3], [1, 1]], [0, 2])
    """
    if method not in METHODS:
        raise DataError(f"unknown matching method {method!r}{nearest(method, METHODS)}")
    if method == "activations" and data is None:
        raise DataError("matching by activations needs data: pass batches of inputs")
    models = model_a, model_b
    for model, name in zip(models, ("model a", "model b"), strict=True):
        check_finite(dict(model.named_parameters()), name)
    stream = iter(()) if data is None else batches(data)
    first = next(stream, None)
    inputs = first if example_inputs is None else example_inputs
    example = None if inputs is None else as_example(inputs)
    given = (symmetry_a, symmetry_b)
    both = frame(*(_symmetry(s, m, example, verify) for s, m in zip(given, models, strict=True)))
    search = _Search(both, models, seed, restarts, device, progress)
    if method == "weights":
        found = search.by_weights()
    else:
        found = search.by_activations(itertools.chain([] if first is None else [first], stream))
    error = embedding_error(both, found.permutation, models, example) if verify and example is not None else None
    return replace(found, embedding=error)


def _symmetry(given: Symmetry | None, model: nn.Module, example: Batch | None, verify: bool) -> Symmetry:
    if given is None and example is None:
        raise DataError(
            "deriving the symmetries needs inputs: pass data, example_inputs, or both symmetry_a and symmetry_b"
        )
    if given is None:
        return derive(model, example, verify=verify)
    given.check_fits(model, "the network that it was passed with")
    return given.verified(model, example) if verify and example is not None else given


@dataclass(frozen=True)
class _Search:
    both: Frame
    models: tuple[nn.Module, nn.Module]
    seed: int
    restarts: int
    device: torch.device | str | None
    progress: bool | None

    def by_weights(self, only: Sequence[str] | None = None, start: Permutation | None = None) -> WidthMatching:
        a, b = scaled(self.both, self.models, self.device)
        found = weight_matching(
            self.both.common,
            *(a, b),
            restarts=self.restarts,
            seed=self.seed,
            only=only,
            start=start,
            progress=self.progress,
        )
        entries = max(shared_entries(self.both, a), 1)
        history = tuple(tuple(value / entries for value in line) for line in found.history)
        similarities = cosines(self.both, found.permutation, a, b)
        return WidthMatching(
            self.both, found.permutation, found.objective / entries, similarities, history, "weights", self.seed
        )

    def by_activations(self, data: Iterable[Batch]) -> WidthMatching:
        here = tuple(on_device(model, self.device) for model in self.models)
        alike = seen_alike(self.both, (here[0], here[1]), data, self.progress)
        permutation, similarities = alike.permutation, alike.similarities
        if alike.unseen:
            rest = self.by_weights(alike.unseen, permutation)
            permutation = rest.permutation
            similarities |= {name: rest.similarities[name] for name in alike.unseen}
        history = ((alike.objective,),)
        return WidthMatching(
            *(self.both, permutation, alike.objective, similarities, history, "activations", self.seed, alike.unseen)
        )

"""Several paths from one network to another: as trained, and by each way of matching it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as File
from typing import Any

from torch import nn

from isthmus.align import Matching, Symmetry, match
from isthmus.base.batches import Data
from isthmus.base.errors import DataError
from isthmus.merge import Path

from .plain import number, percent, table

AS_TRAINED = "as trained"


def others(
    model_a: nn.Module,
    model_b: nn.Module,
    files: Mapping[str, File],
    methods: Sequence[str],
    data: Data | None,
    symmetry: Callable[[], Symmetry],
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, nn.Module]:
    """Give the second network in every order that was asked for, by what was done to it.

    Args:
        model_a: The reference.
        model_b: The network to be put in order.
        files: Saved matchings, by the name of their curve.
        methods: Of `match`.
        data: What the methods read.
        symmetry: Gives the symmetry of both; called if there is a method.
        seed: Of the matchings.
        device: Where to compute.

    Returns:
        Networks by name: the network as trained, unless there is but one file.
    """
    found = {} if len(files) == 1 and not methods else {AS_TRAINED: model_b}
    found |= {name: Matching.load(path).apply(model_b) for name, path in files.items()}
    if methods:
        known = symmetry()
        for name in methods:
            options = {"method": name, "symmetry": known, "seed": seed, "device": device}
            found[f"by {name}"] = match(model_a, model_b, data, **options).apply(model_b)
    return found


def interval(path: Path) -> tuple[float, float] | None:
    """Give the 95 % interval of a loss barrier; None where single samples are not known."""
    try:
        return path.barrier_interval()
    except DataError:
        return None


def barriers_table(paths: Mapping[str, Path], intervals: Mapping[str, tuple[float, float] | None]) -> str:
    """Lay out the barriers of several paths, and of the same on further data.

    Args:
        paths: By name.
        intervals: Of those that have one.
    """
    rows = []
    for name, path in paths.items():
        rows.append(_row(name, path, intervals.get(name), bool(intervals)))
        rows += [_row(f"{name}, on {where}", other, None, bool(intervals)) for where, other in path.also.items()]
    headers = ["path", "loss barrier", *(["95 % interval"] if intervals else []), "accuracy barrier"]
    return table([*headers, "loss at 1/2", "accuracy at 1/2"], rows)


def _row(name: str, path: Path, found: tuple[float, float] | None, wide: bool) -> list[str]:
    cell = "–" if found is None else f"{number(found[0])} to {number(found[1])}"
    figures = [number(path.accuracy_barrier), number(path.midpoint_loss), percent(path.midpoint_accuracy)]
    return [name, number(path.barrier), *([cell] if wide else []), *figures]


def layerwise_table(found: Mapping[str, Any]) -> str:
    """Lay out the barriers of one layer at a time, a column for each order of the second network."""
    (first, *_), columns = found.values(), list(found)
    rows = [
        (layer, *(number(float(each.midpoint_barriers[place])) for each in found.values()))
        for place, layer in enumerate(first.layers)
    ]
    return table(("layer halfway: loss above both", *columns), rows)


def features_table(found: Mapping[str, Any]) -> str:
    """Lay out how linear the features are halfway, a column for each order of the second network."""
    (first, *_), columns = found.values(), list(found)
    pairs = [(each.cosine_distance, each.endpoint_distance) for each in found.values()]
    rows = [
        (layer, *(f"{number(float(between[place]))} ({number(float(ends[place]))})" for between, ends in pairs))
        for place, layer in enumerate(first.layers)
    ]
    return table(("features, 1 − cosine: halfway (ends)", *columns), rows)

"""Merging of two or more networks into one: align, average, repair, measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..base.architecture import full_state
from ..base.batches import Data, batches, require_repeatable
from ..base.errors import ArchitectureError, DataError, nearest
from ..base.evaluation import Evaluation, Measure, evaluate
from ..base.interpolation import check_same_ties, normalised, varying
from .methods import Task, method_of
from .repairs import choose_method
from .repairs import repair as repair_network

if TYPE_CHECKING:
    from ..align import Matching, Symmetry


@dataclass(frozen=True)
class Merged:
    """A merged network and what was measured on the way.

    Attributes:
        model: The merged network, in the order of units of the first one.
        report: How it was made; and, where the data has labels, loss and metric of each parent and of the result.
    """

    model: nn.Module
    report: dict[str, Any]


def merge(
    models: Sequence[nn.Module],
    data: Data | None = None,
    *,
    method: str = "mean",
    weights: Sequence[float] | None = None,
    align: str | Sequence[Matching] | None = "weights",
    repair: str | None = None,
    repair_data: Data | None = None,
    symmetry: Symmetry | None = None,
    loss: Measure | None = None,
    metric: Measure | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    verify: bool = True,
    base: nn.Module | None = None,
    **options: Any,
) -> Merged:
    """Merge networks of one architecture: bring all into the order of the first, average, and repair.

    Args:
        models: Two networks or more; none is changed.
        data: Batches. The first gives the example inputs for the symmetry; all serve activation matching and, where
            there are labels, the measurement of each parent and of the merged network.
        method: "mean", the weighted mean of the aligned weights.
        weights: One non-negative number for each network; equal by default.
        align: A method of `match`; matchings that bring `models[1:]` into the order of the first; or None where they
            are in the same order already.
        repair: None, or how to repair the statistics of the average: "auto", "reset" or "rescale"; see `repair`.
        repair_data: Batches to repair on; `data` by default.
        symmetry: The symmetry of the architecture; derived from `models[0]` by default. One that was not verified yet
            is, on the first batch.
        loss: Function (outputs, targets) → mean over the batch; cross entropy by default.
        metric: A second one; accuracy beside the default loss.
        seed: Seed of the matching.
        device: Where to compute; that of each network by default.
        verify: Refuse a symmetry of which it has not been measured that it holds; False takes it on trust.
        base: The common parent of fine-tuned networks, for the methods that need it; in the order of `models[0]`.
        **options: Further arguments of the method.

    Returns:
        The merged network, on the device of the first one, and the report: `method`, `weights`, `align`, `objective`
        (one of each matching), `repair`, `repaired_on`, and where there are labels, or a `loss`, `parents`, `merged`
        and `samples`.

    Raises:
        ArchitectureError: The networks differ in a name or shape, or the repair does not fit them.
        DataError: Data is missing, an iterator, or has labels that do not fit; or `method`, `weights` or `align` is not
            valid.
        NotFiniteError: A network or an input holds NaN or infinity.
        SymmetryError: The symmetry cannot be derived, or fails when it is verified; the groups are named.

    >>> ones = nn.Linear(2, 2)
    >>> _ = nn.init.ones_(ones.weight), nn.init.zeros_(ones.bias)
    >>> threes = nn.Linear(2, 2)
    >>> _ = nn.init.constant_(threes.weight, 3.0), nn.init.zeros_(threes.bias)
    >>> merge([ones, threes], align=None, weights=[3, 1]).model.weight.tolist()
    [[1.5, 1.5], [1.5, 1.5]]
    """
    how_merged = method_of(method, data, base, options)
    shares = _check(models, data, weights, align, repair, repair_data, symmetry)
    varying([full_state(model) for model in models])
    check_same_ties(models)
    how = None if repair is None else choose_method(models[0], repair)
    measured = data is not None and (loss is not None or _has_labels(data))
    parents = [_measure(model, data, loss, metric, device) for model in models] if measured else []
    matchings = _match(models, data, align, symmetry, seed, device, verify)
    moved = [matching.apply(model) for matching, model in zip(matchings, models[1:], strict=False)]
    aligned = [models[0], *(moved or models[1:])]
    outcome = how_merged.run(Task(aligned, shares, base, data, loss, metric, seed, device, options))
    merged = outcome.model
    if how is not None:
        calibration = data if repair_data is None else repair_data
        assert calibration is not None
        merged = repair_network(merged, calibration, method=how, endpoints=aligned, weights=shares, device=device)
    report: dict[str, Any] = {
        "method": method,
        "weights": shares,
        "align": align if align is None or isinstance(align, str) else "given",
        "objective": [matching.objective for matching in matchings],
        "repair": how,
        "repaired_on": None if how is None else "data" if repair_data is None else "repair_data",
        **outcome.report,
    }
    if measured:
        found = _measure(merged, data, loss, metric, device)
        report |= {"parents": list(map(_figures, parents)), "merged": _figures(found), "samples": found.samples}
    return Merged(merged, report)


def _check(
    models: Sequence[nn.Module],
    data: Data | None,
    weights: Sequence[float] | None,
    align: str | Sequence[Matching] | None,
    repair: str | None,
    repair_data: Data | None,
    symmetry: Symmetry | None,
) -> list[float]:
    count = len(models)
    if count < 2:
        raise ArchitectureError(f"merging needs two networks or more, and there are {count}; pass a list of networks")
    from ..align.nets.methods import METHODS as ALIGNMENTS

    if isinstance(align, str) and align not in ALIGNMENTS:
        raise DataError(
            f"align {align!r} is unknown{nearest(align, ALIGNMENTS)}; choose a method of match "
            f"({', '.join(ALIGNMENTS)}), a list of matchings, or None"
        )
    if not (align is None or isinstance(align, str) or (isinstance(align, Sequence) and len(align) == count - 1)):
        raise DataError(
            f"{count} networks need {count - 1} matchings: pass align=[...] with one for each but the first"
        )
    if data is None and isinstance(align, str) and ALIGNMENTS[align].needs:
        raise DataError(f"align={align!r} runs the networks on data; pass data, or align='weights'")
    if data is None and isinstance(align, str) and symmetry is None:
        raise DataError(
            f"align={align!r} runs the network once to find its symmetry; pass data or symmetry=, or align=None "
            "for networks whose units are in the same order already"
        )
    if repair is not None and data is None and repair_data is None:
        raise DataError(f"repair={repair!r} measures statistics on data; pass data or repair_data, or repair=None")
    for given in (data, repair_data):
        if given is not None:
            require_repeatable(given, "merging reads it for the symmetry, the repair and each network that it measures")
    return normalised(weights, count)


def _has_labels(data: Data) -> bool:
    return next(batches(data)).targets is not None


def _measure(
    model: nn.Module, data: Any, loss: Measure | None, metric: Measure | None, device: torch.device | str | None
) -> Evaluation:
    return evaluate(model, data, loss=loss, metric=metric, device=device)


def _figures(found: Evaluation) -> dict[str, float | None]:
    return {name: value for name, value in asdict(found).items() if name != "samples"}


def _match(
    models: Sequence[nn.Module],
    data: Data | None,
    align: str | Sequence[Matching] | None,
    symmetry: Symmetry | None,
    seed: int,
    device: torch.device | str | None,
    verify: bool,
) -> Sequence[Matching]:
    if align is None:
        return []
    if not isinstance(align, str):
        return align
    from ..align import match
    from ..align import symmetry as derive

    example = None if data is None else next(batches(data))
    symmetry = derive(models[0], example, verify=False) if symmetry is None else symmetry
    if verify and example is not None:  # once for all
        symmetry = symmetry.verified(models[0], example)
    options: dict[str, Any] = {
        "method": align,
        "symmetry": symmetry,
        "seed": seed,
        "device": device,
        "verify": verify and example is None,
    }
    return [match(models[0], model, data, **options) for model in models[1:]]

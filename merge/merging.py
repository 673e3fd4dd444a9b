"""Merging of two or more networks into one: align, average, repair, measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..base.architecture import State, full_state
from ..base.batches import Data, batches, require_repeatable
from ..base.errors import ArchitectureError, DataError
from ..base.evaluation import Evaluation, Measure, evaluate
from ..base.files import PathLike, save_state_dict
from ..base.interpolation import check_same_ties, normalised, varying
from .alignment import UNSAID, aligned, planned
from .ensemble import measured
from .methods import METHODS, Method, Outcome, Task, combined, method_of, rehearse
from .repairs import choose_method
from .repairs import repair as repair_network
from .task_vectors.vectors import bases_of

if TYPE_CHECKING:
    from ..align import ManyMatching, Matching, Symmetry


@dataclass(frozen=True)
class Merged:
    """A merged network and what was measured on the way.

    Attributes:
        model: The merged network, in the order of units of the first one.
        report: How it was made; and, where the data has labels, loss and metric of each parent, of their ensemble and
            of the result.
    """

    model: nn.Module
    report: dict[str, Any]

    def save(self, path: PathLike) -> Path:
        """Write the merged network's state dict, whole or not at all: as safetensors if the name ends so.

        Raises:
            OutputError: The folder is missing or cannot be written.
        """
        return save_state_dict(self.model.state_dict(), path)


def merge(
    models: Sequence[nn.Module],
    data: Data | None = None,
    *,
    method: str = "mean",
    weights: Sequence[float] | None = None,
    align: str | Sequence[Matching] | ManyMatching | None = UNSAID,
    repair: str | None = None,
    repair_data: Data | None = None,
    symmetry: Symmetry | None = None,
    loss: Measure | None = None,
    metric: Measure | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    verify: bool = True,
    base: nn.Module | Sequence[nn.Module] | None = None,
    fit_data: Data | None = None,
    align_options: Mapping[str, Any] | None = None,
    ensemble: bool = True,
    **options: Any,
) -> Merged:
    """Merge networks of one architecture: bring all into the order of the first, average, and repair.

    | method | gives | needs |
    | --- | --- | --- |
    | "mean" | the weighted mean, by layer if wanted: `by_layer={"layer1.*": [0.7, 0.3]}` | nothing |
    | "greedy_soup" | the mean of those networks that make it better (Wortsman et al. 2022) | labels |
    | "fisher" | the mean, weighted by information (Matena & Raffel 2022) | inputs |
    | "regmean" | layers that fit each network on its own inputs (Jin et al. 2023) | inputs |
    | "least_squares" | layers that fit the mean of what all give (Nasery et al. 2024) | inputs |
    | "zip" | units merged across and within networks (Stoica et al. 2024) | inputs |
    | "slerp" | the way between two along a circle (Shoemake 1985) | nothing |
    | "task_arithmetic" | parent + λ · sum of what each has learnt (Ilharco et al. 2023) | `base` |
    | "ties" | the same, trimmed, where signs agree (Yadav et al. 2023) | `base` |
    | "dare" | the same, thinned out at random (Yu et al. 2024) | `base` |

    Args:
        models: Two networks or more; none is changed. One is enough for a method that needs `base`.
        data: Batches. The first gives the example inputs for the symmetry; all serve activation matching and, where
            there are labels, the measurement of each parent, of their ensemble and of the merged network.
        method: See above.
        weights: One non-negative number for each network; equal by default.
        align: A method of `match`; "universe", all at once by `match_many`; matchings that bring `models[1:]` into the
            order of the first; or None where they are in the same order already. By default "weights", or None where
            the networks have one `base`, whose order they have kept.
        repair: None, or how to repair the average: "auto", "reset", "rescale" or "both"; see `repair`.
        repair_data: Batches to repair on; `fit_data` or else `data` by default.
        symmetry: The symmetry of the architecture; derived from `models[0]` by default. One that was not verified yet
            is, on the first batch.
        loss: Function (outputs, targets) → mean over the batch; cross entropy by default.
        metric: A second one; accuracy beside the default loss.
        seed: Seed of the matching and of the method.
        device: Where to compute; that of each network by default.
        verify: Refuse a symmetry of which it has not been measured that it holds; False takes it on trust.
        base: The common parent of fine-tuned networks, in the order of `models[0]`; or a list with the parent of each,
            in the order of its child: parents are then brought into the order of the first with their children.
        fit_data: Batches on which the alignment and the method work; `data` by default. What is chosen or fitted on
            data looks better on them than on others.
        align_options: Further arguments of `match` or `match_many`, such as `{"restarts": 1}`.
        ensemble: Whether to measure the ensemble of the parents too: the mean of their probabilities, or of their
            outputs where `loss` is given.
        **options: Further arguments of the method: see the functions of the same names.

    Returns:
        The merged network, on the device of the first one, and the report: `method`, `options`, `weights`, `base`
        ("common", "own" or None), `align`, `align_reason`, `objective` (one of each matching), `repair`, `repaired_on`,
        `fitted_on`, what the method has to say, and where there are labels, or a `loss`, `parents`, `ensemble`,
        `merged` and `samples`.

    Raises:
        ArchitectureError: The networks differ in a name or shape, or the repair does not fit them.
        DataError: Data is missing, an iterator, or has labels that do not fit; or `method`, an option of it, `weights`
            or `align` is not valid.
        NotFiniteError: A network or an input holds NaN or infinity.
        SymmetryError: The symmetry cannot be derived, or fails when it is verified; the groups are named.

    >>> ones = nn.Linear(2, 2)
    >>> _ = nn.init.ones_(ones.weight), nn.init.zeros_(ones.bias)
    >>> threes = nn.Linear(2, 2)
    >>> _ = nn.init.constant_(threes.weight, 3.0), nn.init.zeros_(threes.bias)
    >>> merge([ones, threes], align=None, weights=[3, 1]).model.weight.tolist()
    [[1.5, 1.5], [1.5, 1.5]]
    >>> merge([threes], base=ones, method="task_arithmetic", scale=-1).model.weight.tolist()
    [[-1.0, -1.0], [-1.0, -1.0]]
    """
    fit = data if fit_data is None else fit_data
    calibration = fit if repair_data is None else repair_data
    chosen = method_of(method, fit, base, options, len(models))
    shares, bases = _shares(chosen, method, weights, len(models)), _bases(base, len(models))
    plan = planned(align, align_options, len(models), bases, chosen.aligned, fit, symmetry)
    _check_data(chosen, repair, calibration, (data, fit_data, repair_data), fit)
    rehearse(chosen, _check_networks(models, bases), len(models), options)
    how = None if repair is None else choose_method(models[0], repair)
    measures: dict[str, Any] = {"loss": loss, "metric": metric, "device": device}
    before = _before(models, data, shares, ensemble, measures)
    ordered = aligned(models, bases, plan, data=fit, symmetry=symmetry, seed=seed, device=device, verify=verify)
    task = Task(ordered.models, shares, ordered.bases, fit, loss, metric, seed, device, options, how, symmetry)
    outcome = chosen.run(task)
    merged = outcome.model if how is None or chosen.repairs else _repaired(task, outcome, calibration)
    fitted = "data" if fit_data is None else "fit_data"
    report = {
        "method": method,
        "options": {name: value for name, value in options.items() if not name.endswith("data")},
        "weights": shares,
        "base": None if base is None else "common" if len(bases) == 1 else "own",
        "align": plan.name,
        "align_reason": plan.reason,
        "objective": ordered.objectives,
        "repair": how,
        "repaired_on": None if how is None else fitted if repair_data is None else "repair_data",
        "fitted_on": "own_data" if options.get("own_data") else fitted if chosen.needs or plan.reads else None,
        **outcome.report,
        **before,
    }
    if before and data is not None:
        report |= {"merged": _figures(found := evaluate(merged, data, **measures)), "samples": found.samples}
    return Merged(merged, report)


def merge_states(
    states: Sequence[State],
    method: str = "mean",
    *,
    weights: Sequence[float] | None = None,
    base: State | Sequence[State] | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, Tensor]:
    """Merge checkpoints whose networks need not be known, by a method that needs no data.

    Args:
        states: Tensors by name; of the same names and shapes, their units in the same order. None is changed.
        method: "mean", "slerp", "task_arithmetic", "ties" or "dare"; see `merge`.
        weights: One non-negative number for each; equal by default.
        base: The common parent of fine-tuned networks, or a list with the parent of each.
        seed: Of a method that draws at random.
        **options: Further arguments of the method.

    Returns:
        Tensors by name, of the types and on the devices of the first, in its sequence.

    Raises:
        ArchitectureError: There are too few, or they differ in a name or shape.
        DataError: The method is unknown or needs data, or an argument does not fit.
        NotFiniteError: A tensor holds NaN or infinity.

    >>> a, b = {"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([2.0, 4.0])}
    >>> merge_states([a, b], weights=[1, 3])
    {'w': tensor([1.5000, 3.5000])}
    """
    if method in METHODS and not METHODS[method].on_states:
        able = ", ".join(repr(name) for name, entry in METHODS.items() if entry.on_states)
        raise DataError(f"method {method!r} runs the networks on data: use merge, or one of {able}")
    chosen = method_of(method, None, base, options, len(states))
    bases = [] if base is None else bases_of(base, len(states))
    return combined(chosen, states, options=options, weights=weights, base=bases, seed=seed)


def _bases(base: nn.Module | Sequence[nn.Module] | None, count: int) -> list[nn.Module]:
    """List the parents: none, one for all networks, or one for each."""
    if base is None:
        return []
    if isinstance(base, nn.Module):
        return [base]
    bases = list(base)
    if len(bases) not in (1, count):
        raise DataError(f"{len(bases)} bases for {count} networks; pass one for all of them, or one for each")
    return bases[:1] if len({id(parent) for parent in bases}) == 1 else bases


def _check_networks(models: Sequence[nn.Module], bases: Sequence[nn.Module]) -> list[str]:
    """Refuse networks that differ, and name their tensors."""
    everything = [*models, *bases]
    states = [full_state(model) for model in everything]
    labels: Any = [
        *map(str, range(len(models))),
        *(["base"] if len(bases) == 1 else [f"base {i}" for i in range(len(bases))]),
    ]
    try:
        names = varying(states, labels)
    except ArchitectureError as error:
        head = _head(states)
        if head is None:
            raise
        raise ArchitectureError(
            f"{error}. Only {head} differs, by its number of outputs: for tasks of their own, "
            "isthmus.merge.zip_networks merges the layers below it and keeps a head for each network"
        ) from None
    check_same_ties(everything)
    return names


def _head(states: Sequence[State]) -> str | None:
    """Name the module that alone makes networks differ, and only by how many outputs it has."""
    first = states[0]
    if any(state.keys() != first.keys() for state in states):
        return None
    unequal = [name for name, tensor in first.items() if any(state[name].shape != tensor.shape for state in states)]
    modules = {name.rpartition(".")[0] for name in unequal}
    alike = all(state[name].shape[1:] == first[name].shape[1:] for state in states for name in unequal)
    return modules.pop() if len(modules) == 1 and alike else None


def _shares(chosen: Method, method: str, weights: Sequence[float] | None, count: int) -> list[float]:
    shares = normalised(weights, count)
    if len(set(shares)) > 1 and not chosen.weighted:
        raise DataError(f"method {method!r} takes all networks alike; leave weights out")
    return shares


def _before(
    models: Sequence[nn.Module], data: Any, shares: Sequence[float], ensemble: bool, measures: Mapping[str, Any]
) -> dict[str, Any]:
    """Measure the parents and their ensemble; nothing where there is nothing to measure on."""
    if data is None or not (measures["loss"] is not None or _has_labels(data)):
        return {}
    parents, together = measured(models, data, weights=shares, ensemble=ensemble, **measures)
    return {"parents": list(map(_figures, parents))} | ({} if together is None else {"ensemble": _figures(together)})


def _repaired(task: Task, outcome: Outcome, data: Any) -> nn.Module:
    """Give the merged network the statistics of those networks that are in it."""
    own = range(len(task.models)) if outcome.chosen is None else outcome.chosen
    shares = [task.shares[index] for index in own]
    return repair_network(
        outcome.model,
        data,
        method=str(task.repair),
        endpoints=[task.models[index] for index in own],
        weights=shares if any(shares) else None,
        device=task.device,
    )


def _check_data(
    chosen: Method, repair: str | None, calibration: Data | None, given: Sequence[Data | None], fit: Data | None
) -> None:
    if repair is not None and chosen.repairs and calibration is not fit:
        raise DataError("this method repairs on the data that it works on; pass them as fit_data, without repair_data")
    if repair is not None and calibration is None:
        raise DataError(f"repair={repair!r} measures statistics on data; pass data or repair_data, or repair=None")
    for data in given:
        if data is not None:
            require_repeatable(data, "merging reads it for the symmetry, the repair and each network that it measures")


def _has_labels(data: Data) -> bool:
    return next(batches(data)).targets is not None


def _figures(found: Evaluation) -> dict[str, float | None]:
    return {name: value for name, value in asdict(found).items() if name != "samples"}

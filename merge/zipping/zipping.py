"""ZipIt: merge networks of different tasks up to a layer, units within a network as well as across."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...align import Symmetry
from ...base.batches import Data, batches, model_device, require_repeatable
from ...base.errors import DataError, nearest
from ...base.running import on_device
from ..repairs import choose_method
from .evidence import correlations
from .greedy import zip_units
from .permuting import permuted
from .planning import UNSEEN, Plan
from .repairing import repaired
from .slots import Slots
from .zipped import Zipped, ZippedGroup, check_classes

HOW = ("zip", "permute", "mean")


def zip_networks(
    models: Sequence[nn.Module],
    data: Data,
    *,
    upto: str | None = None,
    how: str = "zip",
    within: float = 1.0,
    penalty: float | None = None,
    classes: Sequence[Sequence[int]] | None = None,
    repair: str | None = "auto",
    symmetry: Symmetry | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Zipped:
    """Merge networks, also of different tasks, up to a layer: ZipIt! (Stoica et al. 2024).

    Units of all networks are compared by the correlation of their activations. The k n units of each group (see
    `isthmus.symmetry`) are merged into n, the most alike first, of one network as well as of several. What writes units
    is averaged over those that became one (the merge matrix M), what reads them is added up (the unmerge matrix U,
    M U = 1). Behind `upto` each network keeps its own layers, which read the merged units through U.

    That a group can be merged so is measured, in float64, before any data is read. Where units act on each other, as
    in a layer norm, or have an order inside or around them, as heads have, they are matched one to one and averaged,
    and `Zipped.groups` says why. It is measured as well that the heads read all that crosses the boundary.

    Args:
        models: Two or more. What is merged must be alike; behind `upto` they may differ, as in the number of classes.
            None is changed.
        data: Batches of the inputs of all tasks together, on which each network is run; labels are ignored. They are
            read several times.
        upto: Name of the last layer that is merged; None: all, outputs included, which gives one plain network.
        how: "zip"; "permute", in which every unit is matched with one of each other network (the best assignment);
            "mean", in which units stay where they are.
        within: For "zip", the budget β in [0, 1] of merges within one network; see `zip_units`.
        penalty: For "zip", α in [0, 1], for merging merged units again; None: 0 for two networks, else 0.5.
        classes: For each network the joint class of each of its outputs, such as `[[0, 1, 2], [3, 4]]`: the result then
            gives joint logits. None: it gives a list of outputs.
        repair: What is done about the statistics of activations, which merging shrinks: "reset" measures batch norms
            anew on `data`, "rescale" gives units the means and deviations of their parents', "both" does both, "auto"
            chooses, None does nothing.
        symmetry: Of the networks; None derives it.
        device: Where to compute and leave the result; that of the first network by default.
        progress: Show bars; None: on a terminal.

    Returns:
        The networks, which share what was merged.

    Raises:
        DataError: There are fewer than two networks, no batch, or an argument is out of range.
        ArchitectureError: What is to be merged differs, or no head can read what crosses the boundary.
        LayerNotFoundError: There is no layer `upto`, with the nearest names.
        NotFiniteError: A parameter or an activation holds NaN or infinity.
        SymmetryError: The symmetry cannot be derived.

    >>> make = lambda seed: (torch.manual_seed(seed), nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))[1]
    >>> x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    >>> zipped = zip_networks([make(0), make(1)], x, upto="1", classes=[[0, 1], [2, 3]])
    >>> zipped(x).shape, zipped.task(0)[0] is zipped.task(1)[0]
    (torch.Size([64, 4]), True)
    """
    _check(models, data, how, within, penalty)
    labels = None if classes is None else check_classes(classes, len(models) if upto is not None else 1)
    if repair is not None:
        repair = choose_method(models[0], repair)
    device = model_device(models[0]) if device is None else torch.device(device)
    models = [on_device(model, device) for model in models]
    plan = Plan.of(models, upto, symmetry, next(batches(data, device)))
    refused = plan.refused() if how == "zip" else dict.fromkeys(plan.groups)
    chosen = [group for group in plan.groups if group not in refused]
    joint = plan.joint(chosen)
    parents, scores = permuted(plan, [] if how == "mean" else list(refused), data, progress)
    found = correlations(parents, {group: plan.looks[group] for group in chosen}, data, progress=progress)
    again = penalty if penalty is not None else 0.0 if len(models) == 2 else 0.5
    slots = {group: zip_units(matrix, len(models), within=within, penalty=again) for group, matrix in found.items()}
    heads = joint.heads(parents, slots)
    groups = _groups(plan, found, slots, refused, scores, how)
    zipped = Zipped(heads, joint.structure, labels, groups, [_count(model) for model in models])
    if repair is not None:
        repaired(zipped, parents, plan, slots, data, repair, progress)
    return zipped


def _groups(
    plan: Plan,
    found: Mapping[str, Tensor],
    slots: Mapping[str, Slots],
    refused: Mapping[str, str | None],
    scores: Mapping[str, float],
    how: str,
) -> list[ZippedGroup]:
    """Say of each group what was done with it."""
    groups = []
    for name in plan.groups:
        size = plan.symmetries[0].by_name[name].size
        if name in slots:
            alike = _within_slots(found[name], slots[name])
            groups.append(ZippedGroup(name, size, "zip", None, slots[name].across, alike))
        else:
            unmatched = UNSEEN if how != "mean" and name not in scores else None
            way = "permute" if name in scores else "mean"
            groups.append(ZippedGroup(name, size, way, refused[name] or unmatched, 1.0, scores.get(name)))
    return groups


def _within_slots(correlation: Tensor, slots: Slots) -> float:
    """Give the mean correlation of two units in one slot."""
    index = slots.index.flatten()
    together = (index[:, None] == index).fill_diagonal_(False)
    return float(correlation[together].mean())


def _check(models: Sequence[nn.Module], data: Data, how: str, within: float, penalty: float | None) -> None:
    if len(models) < 2:
        raise DataError(f"zipping needs two networks or more, and there are {len(models)}; pass a list of networks")
    if how not in HOW:
        raise DataError(f"how={how!r} is unknown{nearest(how, HOW)}; choose one of {', '.join(map(repr, HOW))}")
    for name, value in (("within", within), ("penalty", penalty)):
        if value is not None and not 0 <= value <= 1:
            raise DataError(f"{name} is {value}; expected a number from 0 to 1")
    require_repeatable(data, "zipping reads it for the symmetry, for correlations and for the repair")


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())

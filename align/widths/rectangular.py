"""How alike the units of two networks of unequal widths are: by the weights that lead to matched units, or on data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...base.architecture import full_state
from ...base.batches import Batch, model_device
from ...base.progress import progress as bar
from ...base.running import evaluating
from ...metrics import Moments, capture
from ..nets.problem import Family, Similarities, families, pairs, rows
from ..nets.views import View, views
from ..permutation import Permutation
from ..terms import pieces
from .padding import SIDES, Frame

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Alike:
    """What was matched by correlation.

    Attributes:
        permutation: Of the frame; the identity for groups in `unseen`.
        objective: Sum of the correlations of matched units, over all points where they were seen.
        similarities: Per group the mean correlation of every unit of a with every one of b in the matched order, in the
            frame, flat over the groups that it lies within.
        unseen: Groups of which no activation shows the units.
    """

    permutation: Permutation
    objective: float
    similarities: dict[str, Tensor]
    unseen: tuple[str, ...]


def scaled(
    both: Frame, models: tuple[nn.Module, nn.Module], device: torch.device | str | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Embed the parameters that have a group in the frame, with products that no layer's size of weights sways.

    Both networks' tensors of a name are divided by the geometric mean of their root mean squares.

    Args:
        both: The frame.
        models: Both networks.
        device: Where to; None leaves them.
    """
    states = full_state(models[0]), full_state(models[1])
    parameters = dict(models[0].named_parameters())
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for name in dict.fromkeys(name for group in both.common.groups for name, _ in group.axes):
        if name not in parameters:
            continue
        size = math.prod(float(state[name].double().square().mean()) for state in states) ** 0.25
        for side, state, embedded in zip(SIDES, states, found, strict=True):
            tensor = state[name].to(device)
            embedded[name] = both.pad(name, tensor / size if size else tensor, side)
    return found


def shared_entries(both: Frame, names: Iterable[str]) -> int:
    """Count the entries of some tensors at which both networks have weights once they are matched."""
    layouts = [(pieces(both.a.layout[name]), pieces(both.b.layout[name])) for name in names]
    return sum(
        math.prod(min(x.size, y.size) for x, y in zip(one.dims, other.dims, strict=True))
        for parts in layouts
        for one, other in zip(*parts, strict=True)
        if any(dim.group for dim in one.dims)
    )


def cosines(both: Frame, permutation: Permutation, a: State, b: State) -> dict[str, Tensor]:
    """Compute, for each unit of a and each of b, the cosine of all weights between them and matched units.

    Args:
        both: The frame.
        permutation: Of the frame, to be applied to b.
        a: Parameters of the first network in the frame, by name.
        b: Those of the second.

    Returns:
        Per group (units of the frame, units of the frame), float64 on the CPU, flat over the groups that it lies
        within; 0 for units without weights.
    """
    moved = {name: permutation.permute(name, b[name]) for name in a}
    there = {
        name: both.pad(name, torch.ones(both.a.shapes[name]), "a")
        * permutation.permute(name, both.pad(name, torch.ones(both.b.shapes[name]), "b"))
        for name in a
    }
    dots: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for pair, matched in zip(pairs(both.common, a, moved), pairs(both.common, there, there), strict=True):
        for at, dim in enumerate(pair.piece.dims):
            if dim.group is None:
                continue
            dims = pair.piece.around(at, both.common.within[dim.group])
            features = rows(matched.a, dims).amax(0).to(pair.a.device, torch.float64)
            x, y = (rows(tensor, dims).double() * features for tensor in (pair.a, pair.b))
            dots[dim.group] = dots.get(dim.group, 0) + (x @ y.T).cpu()
            norms = torch.stack([x.square().sum(1), y.square().sum(1)]).cpu()
            squares[dim.group] = squares.get(dim.group, 0) + norms
    return {
        name: (dot / squares[name][0].sqrt()[:, None] / squares[name][1].sqrt()).nan_to_num(0.0)
        for name, dot in dots.items()
    }


def seen_alike(
    both: Frame, models: tuple[nn.Module, nn.Module], data: Iterable[Batch], progress: bool | None = None
) -> Alike:
    """Match units by the correlation of what they do, in one pass over the data; see `activation_matching`.

    Args:
        both: The frame.
        models: Both networks; they run in evaluation mode.
        data: Batches.
        progress: Show a bar; None: on a terminal.
    """
    indices = dict(both.common.identity().indices)
    similarities: dict[str, Tensor] = {}
    objective = 0.0
    for family, (total, count) in correlations(both, models, data, progress).items():
        chosen = total.solve(family)
        tables = _in_order(family, total, chosen, count)
        indices.update(chosen)
        similarities.update(tables)
        objective += sum(float(count[name] * tables[name].trace()) for name in count if count[name])
    unseen = tuple(group.name for group in both.common.groups if group.name not in similarities)
    return Alike(Permutation(both.common, indices), objective, similarities, unseen)


def correlations(
    both: Frame, models: tuple[nn.Module, nn.Module], data: Iterable[Batch], progress: bool | None = None
) -> dict[Family, tuple[Similarities, dict[str, int]]]:
    """Correlate the units of two networks wherever both can be seen.

    Args:
        both: The frame.
        models: Both networks; they run in evaluation mode.
        data: Batches.
        progress: Show a bar; None: on a terminal.

    Returns:
        For each family of groups the sums of correlations in the frame, 0 for units that never change, and in how many
        places each of its groups was seen; families that cannot be seen are left out.
    """
    seen = [
        # beside an order that is not known, the samples of layers of unequal widths do not correspond
        {family: [view for view in found if not view.loose] for family, found in views(symmetry, model).items()}
        for symmetry, model in zip((both.a, both.b), models, strict=True)
    ]
    looks = [{view.key: view for found in sides.values() for view in found} for sides in seen]
    moments = _moments(looks, models, data, progress)
    found = {}
    for family in families(both.common):
        total, count = Similarities.zeros(family), dict.fromkeys(family.names, 0)
        for one in seen[0][family.group.name]:
            other = looks[1][one.key]
            correlation = moments.correlation(f"a:{one.key}", f"b:{one.key}").nan_to_num_(0.0)
            total.add(one.inner, _padded(both, one, other, correlation))
            count[one.inner or family.group.name] += 1
        if any(count.values()) and all(count[name] for name in total.inner):
            found[family] = total, count
    return found


def _moments(
    looks: list[dict[str, View]], models: tuple[nn.Module, nn.Module], data: Iterable[Batch], progress: bool | None
) -> Moments:
    moments = Moments([(f"a:{key}", f"b:{key}") for key in looks[0]], product_dtype=torch.float32)
    if not looks[0]:
        return moments
    layers = {
        side: list(dict.fromkeys(view.layer for view in looks[0].values() if view.side == side))
        for side in dict.fromkeys(view.side for view in looks[0].values())
    }
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        captured = []
        for model in models:
            stack.enter_context(evaluating(model))
            captured.append(
                {
                    side: stack.enter_context(capture(model, names, inputs=side == "input"))
                    for side, names in layers.items()
                }
            )
        devices = [model_device(model) for model in models]
        parameters = [dict(model.named_parameters(remove_duplicate=False)) for model in models]
        for batch in bar(data, "matching activations", show=progress):
            seen = {}
            for at, label in enumerate("ab"):
                batch.to(devices[at]).call(models[at])
                for key, view in looks[at].items():
                    activation = captured[at][view.side][view.layer]
                    seen[f"{label}:{key}"] = view.samples(activation, parameters[at]).to(devices[0])
            moments.update(seen)
    return moments


def _padded(both: Frame, one: View, other: View, correlation: Tensor) -> Tensor:
    sizes = [view.piece.dims[dim].size for view in (one, other) for dim in view.dims]
    names = [one.piece.dims[dim].group or "" for dim in one.dims]
    result = torch.zeros([both.common.by_name[name].size for name in names] * 2, dtype=torch.float64)
    result[tuple(map(slice, sizes))] = correlation.to(result).reshape(sizes)
    return result


def _in_order(
    family: Family, total: Similarities, chosen: Mapping[str, Tensor], count: Mapping[str, int]
) -> dict[str, Tensor]:
    """Give mean similarities with the columns in the matched order; of blocks, those of the units inside them."""
    group = family.group.name
    blocks = chosen[group]
    if not total.inner:
        return {group: total.outer[:, blocks] / count[group]}
    tables, whole = {}, total.outer[:, blocks].clone()
    for name, similarity in total.inner.items():
        moved = similarity[:, :, blocks[:, None], chosen[name]]
        whole += moved.diagonal(dim1=1, dim2=3).sum(-1)
        tables[name] = moved.flatten(2).flatten(0, 1) / count[name]
    seen = count[group] + sum(count[inner.name] * inner.size for inner in family.inner)
    return {group: whole / seen, **tables}
